"""Data sets by the names of the command line: their images in one size, and what a name stands for."""

from __future__ import annotations

from robustjax import data
from robustjax.data import _own

# In names of files; the slices [:5], [5:], [:-5] and [:5%] keep four different names.
UNSAFE = str.maketrans({"/": "-", "\\": "-", ":": "-", "[": "_", "]": "", "%": "pct", " ": ""})


def opened(name: str, split: str, data_dir: str | None, image_size: int | None = None) -> data.Dataset:
    """A split of a data set, resized as a whole to ``image_size``; of a folder, whose images may differ, cropped."""
    if image_size is not None and name.startswith("folder:"):
        return data.load(name, split, data_dir, image_size=image_size)
    part = data.load(name, split, data_dir)
    return part if image_size is None else data.match_images(part, (image_size, image_size, part.image_shape[-1]))


def is_whole(name: str) -> bool:
    """Whether this is a user's own data set without splits: nothing says which of its images a model has seen."""
    own = _own.parsed(name)
    return own is not None and not _own.has_splits(own)


def identity(name: str) -> str:
    """What data sets of the same images have in common: the name without a version, or the whole path."""
    own = _own.parsed(name)
    return name.split(":")[0] if own is None else f"{own.kind}:{own.path.resolve()}"


def short(name: str) -> str:
    """The name for a folder of results: of a user's own file or folder only the last part of its path."""
    own = _own.parsed(name)
    return (name if own is None else f"{own.kind}-{own.path.resolve().name.removesuffix('.npz')}").translate(UNSAFE)
