"""A user's own data by name: ``arrays:FILE.npz`` and ``folder:PATH``."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from etils import epath

from robustjax import _paths
from robustjax.data import _arrays, _folder, _slices
from robustjax.data._dataset import Dataset


class Name(NamedTuple):
    """The name of a user's own data set."""

    kind: str  # arrays or folder
    path: epath.Path


def parsed(name: str) -> Name | None:
    """The parts of ``arrays:FILE.npz`` or ``folder:PATH``; None for other names."""
    kind, colon, path = name.partition(":")
    if not colon or kind not in ("arrays", "folder"):
        return None
    if not path:
        raise ValueError(f"name must be {kind}:{'FILE.npz' if kind == 'arrays' else 'PATH'}, got {name!r}.")
    return Name(kind, _paths.path_of(name=path))


def permuted(size: int, test: int) -> dict[str, np.ndarray]:
    """Positions of the splits of a set that has none of its own: ``test`` are the last of one fixed permutation."""
    order = np.random.RandomState(0).permutation(size)  # NumPy promises that it never changes
    return {"train": order[: size - test], "test": order[size - test :]}


def splits(name: Name) -> dict[str, int]:
    """The splits of a data set, with their numbers of images."""
    return {split: len(rows) for split, (_, rows) in _rows(_stored(name)[1]).items()}


def has_splits(name: Name) -> bool:
    """Whether the data set is stored in splits, and not as a whole that is split by a permutation."""
    return "all" not in _stored(name)[1]


def load(name: str, split: str, image_size: int | None) -> Dataset:
    """Opens a split of a user's own data set; see :func:`robustjax.data.load`."""
    ours = parsed(name)
    assert ours is not None
    stored, sizes = _stored(ours)
    rows = _rows(sizes)
    slices = _slices.ranges(name, split, {key: len(found) for key, (_, found) in rows.items()})
    chosen = [(rows[key][0], rows[key][1][start:stop]) for key, start, stop in slices]
    if ours.kind == "arrays":
        if image_size is not None:
            raise ValueError(
                f"image_size must be None for arrays, got {image_size}: data.match_images changes the size of images."
            )
        parts = [(*stored[part], ids) for part, ids in chosen]
        return _arrays.read(ours.path, parts, of=list(stored.values()), name=name, split=split)
    files, class_names = stored
    parts = [
        _folder.Files(files[part].folder, [files[part].names[i] for i in ids], files[part].labels[ids])
        for part, ids in chosen
    ]
    return _folder.opened(
        parts, list(files.values()), image_size=image_size, channels=None, class_names=class_names, name=name,
        split=split,
    )  # fmt: skip


def _stored(name: Name) -> tuple[Any, dict[str, int]]:
    """What a file or folder holds, and the numbers of images of its own splits; ``all`` where it has none."""
    if name.kind == "arrays":
        arrays = _arrays.stored(name.path)
        return arrays, {key: len(labels) for key, (_, labels) in arrays.items()}
    files, class_names = _folder.stored(name.path)
    return (files, class_names), {key: len(part.names) for key, part in files.items()}


def _rows(sizes: dict[str, int]) -> dict[str, tuple[str, np.ndarray]]:
    """For each split where it is stored, and its positions there."""
    if "all" not in sizes:
        return {key: (key, np.arange(size)) for key, size in sizes.items()}
    size = sizes["all"]
    return {key: ("all", rows) for key, rows in permuted(size, -(-size // 5)).items()}
