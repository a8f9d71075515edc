import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustjax import data


def test_splits_are_the_usual_ones():
    assert data.splits("mnist") == ("train[:90%]", "train[90%:]", "test")
    assert data.splits("cifar10:3.0.2", validation=0.25) == ("train[:75%]", "train[75%:]", "test")
    assert data.splits("imagenet2012").test == "validation"
    assert data.splits("imagenet2012:5.1.0").test == "validation"


@given(validation=st.floats(0.001, 0.999))
@settings(max_examples=25, deadline=None)
def test_train_and_validation_partition_the_training_split(validation):
    names = data.splits("digits", validation=validation)
    whole, train, held = (data.load("digits", split).arrays().image for split in ("train", *names[:2]))
    assert abs(len(held) - validation * len(whole)) <= 0.51
    np.testing.assert_array_equal(np.concatenate([train, held]), whole)


@given(validation=st.one_of(st.floats(max_value=0.0), st.floats(min_value=1.0), st.just(1e-9), st.just(float("nan"))))
def test_a_fraction_outside_the_unit_interval_is_refused(validation):
    with pytest.raises(ValueError, match=re.escape(f"validation must lie strictly between 0 and 1, got {validation}.")):
        data.splits("digits", validation=validation)


def test_published_constants():
    digits = data.load("digits", "train")
    named = lambda name: data.channel_statistics(dataclasses.replace(digits, name=name))
    assert data.channel_statistics(digits) == named("mnist:3.0.1") == ((0.0,), (1.0,))
    assert named("cifar10") == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert named("imagenet2012") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_other_data_sets_are_measured(tiny):
    dataset = data.load("tiny", "train", tiny[0])
    image = dataset.arrays().image.astype(np.float64)
    measured = data.channel_statistics(dataset)
    np.testing.assert_allclose(measured.mean, image.mean((0, 1, 2)), rtol=1e-6)  # float32 images, float64 sums
    np.testing.assert_allclose(measured.std, image.std((0, 1, 2)), rtol=1e-6)
    hash(measured)


def test_at_most_ten_thousand_images_are_measured_evenly_spaced():
    seen = []

    def read(ids):
        seen.extend(ids)
        return np.tile(np.arange(2, dtype=np.uint8), (len(ids), 1)).reshape(-1, 1, 2, 1), np.zeros(len(ids), int)

    dataset = data.Dataset("large", "train", 2, (1, 2, 1), 99_991, read, white=1)
    assert data.channel_statistics(dataset) == ((0.5,), (0.5,))
    assert len(seen) == 10_000
    assert (seen[0], seen[-1]) == (0, 99_990)
    assert set(np.diff(seen)) <= {9, 10, 11}


def test_a_constant_channel_is_refused():
    dataset = data.Dataset(
        "flat", "train", 2, (1, 1, 1), 3, lambda ids: (np.full((len(ids), 1, 1, 1), 77, np.uint8), ids)
    )
    with pytest.raises(ValueError, match="Every channel of flat must vary, got standard deviations"):
        data.channel_statistics(dataset)
