"""The split syntax of data sets that are not of TFDS, beside TFDS's own parser."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from robustjax.data import _slices

SIZES = {"train": 37, "test": 11}
EDGE = st.sampled_from(
    ["", "0", "5", "-3", "37", "-37", "38", "11", "10%", "33.4%", "-50%", "100%", "101%", "x", "1.5", "2_0"]
)
PART = st.builds("{}[{}:{}]".format, st.sampled_from(["train", "test", "val", "all"]), EDGE, EDGE)
TEXT = st.text(alphabet="trainesl[]:+%-_.0123456789 ", max_size=14)


def of_tfds(split):
    import tensorflow_datasets as tfds

    infos = {name: tfds.core.SplitInfo(name=name, shard_lengths=[n], num_bytes=0) for name, n in SIZES.items()}
    found = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    return [(s.splitname, s.from_ or 0, SIZES[s.splitname] if s.to is None else s.to) for s in found]


@given(split=st.one_of(st.lists(PART, min_size=1, max_size=3).map(" + ".join), TEXT))
@example(split="all")
@example(split="train+test[:3]")
@example(split="train[10:50%]")
@example(split="train[:]")
@example(split="train[5]")
@settings(max_examples=300, deadline=None)
def test_every_split_means_what_it_means_to_tfds(split):
    try:
        theirs = of_tfds(split)
    except (ValueError, NotImplementedError):
        with pytest.raises(ValueError):
            _slices.parsed(split, SIZES)
    else:
        assert _slices.parsed(split, SIZES) == theirs


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("train[:1shard]", "got 'train[:1shard]': 'train[:1shard]' names shards, which only data sets of TFDS have."),
        ("val", "got 'val': There is no split 'val'. mine has train (37 images), test (11 images)."),
        ("test[:12]", "'test[:12]' reaches past the 11 images of the split."),
        ("train[5:5]", "split must hold at least one image, got 'train[5:5]', which is empty: mine has"),
    ],
)
def test_what_is_no_split_is_named(split, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        _slices.ranges("mine", split, SIZES)
