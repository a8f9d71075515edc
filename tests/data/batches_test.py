import json
import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustjax import data

SIZE = 30


@pytest.fixture(scope="module")
def dataset(tiny) -> data.Dataset:
    return data.load("tiny", "train", tiny[0])


def take(iterator: data.BatchIterator, count: int) -> list[np.ndarray]:
    return [next(iterator).id for _ in range(count)]


def test_each_epoch_holds_every_image_once_in_an_order_of_its_own(dataset):
    epochs = np.concatenate([batch.id for batch in data.batches(dataset, 10, seed=0, num_epochs=4)]).reshape(4, SIZE)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(SIZE), (4, 1)))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_batches_hold_the_images_of_their_ids(dataset):
    whole = dataset.arrays()
    for batch in data.batches(dataset, 7, seed=1, num_epochs=2):
        assert batch.image.shape == (7, 6, 5, 3)
        np.testing.assert_array_equal(batch.image, whole.image[batch.id])
        np.testing.assert_array_equal(batch.label, whole.label[batch.id])


def test_the_first_position_is_uniform_over_seeds():
    digits = data.load("digits", "train[:10]")
    first = [next(data.batches(digits, 1, seed=seed, prefetch=0)).id[0] for seed in range(200)]
    counts = np.bincount(first, minlength=10)
    assert np.square(counts - 20).sum() / 20 < 27.9  # chi square, 9 degrees of freedom, p = 0.001


def test_the_seed_alone_decides_the_order(dataset):
    reference = take(data.batches(dataset, 8, seed=5), 9)
    for prefetch in (0, 1, 7):
        np.testing.assert_array_equal(take(data.batches(dataset, 8, seed=5, prefetch=prefetch), 9), reference)
    np.testing.assert_array_equal(take(data.batches(dataset.cached(), 8, seed=5), 9), reference)
    assert not np.array_equal(take(data.batches(dataset, 8, seed=6), 9), reference)


def test_the_order_is_pinned():
    ids = next(data.batches(data.load("digits", "train"), 6, seed=0)).id
    np.testing.assert_array_equal(ids, np.random.RandomState([0, 0]).permutation(1297)[:6])


def test_without_shuffle_the_order_is_that_of_the_split(dataset):
    ids = np.concatenate(take(data.batches(dataset, 10, seed=0, shuffle=False), 6))
    np.testing.assert_array_equal(ids, np.tile(np.arange(SIZE), 2))


@given(position=st.integers(0, 12), overshoot=st.integers(0, 4), prefetch=st.integers(0, 3))
@settings(max_examples=8, deadline=None)
def test_a_resumed_iterator_goes_on_as_the_uninterrupted_one(dataset, position, overshoot, prefetch):
    whole = take(data.batches(dataset, 8, seed=2), 16)
    first = data.batches(dataset, 8, seed=2, prefetch=prefetch)
    take(first, position)
    state = json.loads(json.dumps(first.get_state()))
    take(first, overshoot)
    for resumed in (data.batches(dataset, 8, seed=2, prefetch=prefetch), first):  # a new one, and the old one set back
        resumed.set_state(state)
        np.testing.assert_array_equal(take(resumed, 16 - position), whole[position:])


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("drop_remainder", [True, False])
def test_processes_share_each_batch_of_the_single_process(dataset, world, drop_remainder):
    common = {"seed": 3, "num_epochs": 2, "drop_remainder": drop_remainder}
    whole = [batch.id for batch in data.batches(dataset, 12, **common, process_index=0, process_count=1)]
    assert [len(ids) for ids in whole] == ([12, 12] if drop_remainder else [12, 12, 6]) * 2
    shares = [
        [batch.id for batch in data.batches(dataset, 12, **common, process_index=rank, process_count=world)]
        for rank in range(world)
    ]
    for ids, *parts in zip(whole, *shares, strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), ids)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    if not drop_remainder:
        epoch = np.concatenate([ids for share in shares for ids in share[:3]])
        np.testing.assert_array_equal(np.sort(epoch), np.arange(SIZE))


@pytest.mark.parametrize(("drop_remainder", "last"), [(True, [[], [], [], []]), (False, [[1], [1], [0], [0]])])
def test_every_process_gets_as_many_batches(dataset, drop_remainder, last):
    common = {"seed": 0, "num_epochs": 1, "process_count": 4, "drop_remainder": drop_remainder}
    for rank in range(4):
        lengths = [len(batch.id) for batch in data.batches(dataset, 28, **common, process_index=rank)]
        assert lengths == [7] + last[rank]


def test_a_state_serves_any_number_of_processes(dataset):
    whole = take(data.batches(dataset, 12, seed=4, process_index=0, process_count=1), 5)
    three = data.batches(dataset, 12, seed=4, process_index=1, process_count=3)
    take(three, 3)
    two = data.batches(dataset, 12, seed=4, process_index=0, process_count=2)
    two.set_state(three.get_state())
    np.testing.assert_array_equal(next(two).id, whole[3][:6])


def test_the_process_is_asked_for_when_the_iterator_is_made(dataset, monkeypatch):
    whole = next(data.batches(dataset, 12, seed=0)).id
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    np.testing.assert_array_equal(next(data.batches(dataset, 12, seed=0)).id, whole[8:])


def test_the_end_is_the_end_of_the_last_epoch(dataset):
    iterator = data.batches(dataset, 30, seed=0, num_epochs=2)
    take(iterator, 2)
    with pytest.raises(StopIteration):
        next(iterator)


@given(batch_size=st.integers(-5, 40), world=st.integers(-1, 4), rank=st.integers(-2, 4))
@settings(max_examples=50, deadline=None)
def test_sizes_and_processes_are_checked(batch_size, world, rank):
    digits = data.load("digits", "train[:30]")
    good = 1 <= batch_size <= 30 and 0 <= rank < world and batch_size % world == 0
    try:
        iterator = data.batches(digits, batch_size, seed=0, process_index=rank, process_count=world, prefetch=0)
    except ValueError as error:
        assert not good
        name, value = re.match(r"(batch_size|process_\w+) must .*, got (-?\d+)\.$", str(error)).groups()  # noqa: PT017
        assert int(value) == {"batch_size": batch_size, "process_index": rank, "process_count": world}[name]
    else:
        assert good
        assert len(next(iterator).id) == batch_size // world


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must lie between 1 and the 30 images of tiny train, got 0."),
        ({"batch_size": 31}, "batch_size must lie between 1 and the 30 images of tiny train, got 31."),
        ({"process_count": 3, "process_index": 0}, "batch_size must be a multiple of process_count=3, got 8."),
        ({"process_count": 2, "process_index": 2}, "process_index must lie in [0, process_count=2), got 2."),
        ({"seed": -1}, "seed must lie in [0, 2**32), got -1."),
        ({"seed": 2**32}, "seed must lie in [0, 2**32), got 4294967296."),
        ({"num_epochs": 0}, "num_epochs must be at least 1, or None for no end, got 0."),
        ({"prefetch": -1}, "prefetch must not be negative, got -1."),
    ],
)
def test_bad_settings_are_named(dataset, settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        data.batches(dataset, **{"batch_size": 8, "seed": 0} | settings)
