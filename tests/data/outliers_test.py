import json

import jax
import numpy as np
import pytest

from robustjax import data

SHAPE = (6, 5, 3)


@pytest.fixture(scope="module")
def dataset(tiny):
    return data.load("tiny", "train", tiny[0]).cached()


@pytest.fixture(scope="module")
def outliers():
    return data.synthetic("uniform_noise", SHAPE, 11)


@pytest.fixture
def joined(dataset, outliers):
    return lambda **common: data.with_outliers(
        data.batches(dataset, 8, seed=2, **common), data.batches(outliers, 4, seed=3, **common)
    )


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


def test_rows_are_those_of_both_and_outliers_have_no_label(dataset, outliers, joined):
    apart = data.batches(dataset, 8, seed=2), data.batches(outliers, 4, seed=3)
    iterator = joined()
    assert isinstance(iterator, data.BatchIterator)
    assert iter(iterator) is iterator
    for _ in range(9):  # more than two epochs of either
        batch, known, unknown = next(iterator), *map(next, apart)
        assert_same((rows[:8] for rows in batch), known)
        np.testing.assert_array_equal(batch.image[8:], unknown.image)
        np.testing.assert_array_equal(batch.label[8:], np.full(4, -1))
        np.testing.assert_array_equal(-1 - batch.id[8:], unknown.id)
        assert [rows.dtype for rows in batch] == [np.float32, np.int32, np.int32]
        assert len(set(batch.id.tolist())) == 12


def test_a_per_image_key_can_be_folded_with_the_id_of_an_outlier(joined):
    ids = next(joined()).id
    keys = jax.vmap(lambda i: jax.random.key_data(jax.random.fold_in(jax.random.key(0), i)))(ids)
    assert len(np.unique(keys, axis=0)) == 12


@pytest.mark.parametrize("position", [0, 1, 5])
def test_a_resumed_iterator_goes_on_as_the_uninterrupted_one(joined, position):
    whole = [batch for batch, _ in zip(joined(), range(10))]
    first = joined()
    for _ in range(position):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    next(first)
    for resumed in (joined(), first):  # a new one, and the old one set back
        resumed.set_state(state)
        for want in whole[position:]:
            assert_same(next(resumed), want)


def test_the_end_is_that_of_the_first_to_end(dataset, outliers):
    for epochs, count in (((1, None), 3), ((None, 1), 2), ((1, 1), 2)):
        known = data.batches(dataset, 8, seed=0, num_epochs=epochs[0])
        iterator = data.with_outliers(known, data.batches(outliers, 4, seed=0, num_epochs=epochs[1]))
        assert len(list(iterator)) == count


def test_processes_share_the_joined_batch(joined):
    whole = next(joined())
    shares = [next(joined(process_index=rank, process_count=2)) for rank in range(2)]
    for rank, share in enumerate(shares):
        known, foreign = np.split(whole.id[:8], 2)[rank], np.split(whole.id[8:], 2)[rank]
        np.testing.assert_array_equal(share.id, np.concatenate([known, foreign]))


def test_images_of_another_shape(dataset):
    iterator = data.with_outliers(
        data.batches(dataset, 8, seed=0), data.batches(data.synthetic("textures", (6, 5, 1), 5), 4, seed=0)
    )
    message = r"outlier_batches must have images of shape \(6, 5, 3\), as batches has, got \(6, 5, 1\)"
    with pytest.raises(ValueError, match=message):
        next(iterator)
