"""The images of an out-of-distribution evaluation: in-distribution, near and far sets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from robustjax import data

from . import checks, images

SYNTHETIC = ("textures", "uniform_noise", "gaussian_noise")
HELD_OUT, PERMUTED = "held_out", "permuted_pixels"
# The split to use of a set without a test split, and the sets that are black on white where MNIST is white on black.
SPLITS = {"omniglot": "small1+small2"}
INVERTED = ("omniglot",)

# The five splits of the open-set literature (Neal et al. 2018, ECCV; used by Vaze et al. 2022, arXiv 2110.06207): the
# classes that are known. In CIFAR-10's order of classes.
OPEN_SET_CLASSES = {
    "mnist": ((2, 4, 5, 9, 8, 3), (3, 2, 6, 9, 4, 0), (5, 8, 3, 2, 4, 6), (3, 7, 8, 4, 0, 5), (6, 3, 4, 9, 8, 2)),
    "cifar10": ((0, 6, 4, 9, 1, 7), (7, 6, 4, 9, 0, 1), (1, 5, 7, 3, 9, 4), (8, 6, 1, 9, 0, 7), (2, 4, 1, 7, 9, 6)),
}


class Foreign(NamedTuple):
    """A set of out-of-distribution images."""

    group: str  # ``"near"`` or ``"far"``
    dataset: data.Dataset  # images in the shape of the in-distribution images


class Sets(NamedTuple):
    """All images of a run."""

    train: data.Dataset  # in-distribution images to fit on
    validation: data.Dataset  # in-distribution images, held out of the training split
    test: data.Dataset  # in-distribution images to score
    foreign: dict[str, Foreign]  # out-of-distribution sets by name
    outliers: data.Dataset | None  # out-of-distribution images to train on, or None


def parsed(name: str) -> tuple[str, str]:
    """Data set and split of ``NAME@SPLIT``; of ``NAME``, its test split; of a synthetic set, the split ``""``."""
    base, at, split = name.partition("@")
    if base.startswith(("arrays:", "folder:")):  # whose paths may hold an @ themselves
        found = re.fullmatch(r"(.*?)(?:(@)([^@/]*))?", name, re.DOTALL)
        base, at, split = (part or "" for part in found.groups()) if found else (name, "", "")
    if base in (HELD_OUT, PERMUTED, *SYNTHETIC):
        if at:
            raise ValueError(f"{base} has no splits, got {name!r}.")
        return base, ""
    if not base or (at and not split) or "@" in split:
        raise ValueError(f"near, far and outliers must be NAME or NAME@SPLIT, such as omniglot@small1, got {name!r}.")
    return base, split or SPLITS.get(base.split(":")[0], data.splits(base).test)


def overlap(one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Whether two of ``(data set, split)`` may share images; two slices of one stored split count as sharing."""
    stored = [{part.split("[")[0].strip() for part in split.split("+")} for _, split in (one, other)]
    same = images.identity(one[0]) == images.identity(other[0])
    return same and bool(stored[0] & stored[1] or "all" in stored[0] | stored[1])


def open_sets(
    dataset: str,
    data_dir: str | None,
    *,
    classes: Sequence[int],
    near: Sequence[str],
    far: Sequence[str],
    outliers: str | None,
    max_images: int,
    seed: int,
    image_size: int | None = None,
) -> Sets:
    """Opens all sets, in-distribution images by the splits of the data set; the others as :func:`open_foreign` does.

    Raises:
      ValueError: as ``open_foreign``, or the data set cannot be opened.
    """
    with checks.renamed("name", "dataset"):
        splits = data.splits(dataset)
        known, validation, test = (images.opened(dataset, split, data_dir, image_size) for split in splits)
    foreign, trained_on = open_foreign(
        test, splits, data_dir, classes=classes, near=near, far=far, outliers=outliers, max_images=max_images,
        seed=seed, image_size=image_size,
    )  # fmt: skip
    if classes:
        known, validation, test = (data.select_classes(part, classes) for part in (known, validation, test))
    return Sets(known, validation, test, foreign, trained_on)


def open_foreign(
    everything: data.Dataset,
    splits: Sequence[str],
    data_dir: str | None,
    *,
    classes: Sequence[int],
    near: Sequence[str],
    far: Sequence[str],
    outliers: str | None = None,
    max_images: int,
    seed: int,
    image_size: int | None = None,
) -> tuple[dict[str, Foreign], data.Dataset | None]:
    """Opens the sets that are foreign to a test set, ``everything`` with the other classes than ``classes``, too.

    Sets are named as in ``parsed``; near sets default to the held-out classes, far sets to synthetic images.

    Returns:
      The foreign sets by name, and the outliers to train on.

    Raises:
      ValueError: a set is named twice, is not foreign to ``splits``, is both tested and trained on, has no such split,
        needs ``classes`` to hold some out, or cannot be opened.
    """
    dataset, test = everything.name, data.select_classes(everything, classes) if classes else everything
    rest = sorted(set(range(everything.num_classes)) - set(classes)) if classes else []
    near = tuple(near) or ((HELD_OUT,) if rest else ())
    far = tuple(far) or ("textures", "uniform_noise", PERMUTED)
    names = (*near, *far)
    if len(set(names)) < len(names):
        raise ValueError(f"near and far must name each set once, got {' '.join(names)}.")
    part_of = {name: parsed(name) for name in (*names, *([] if outliers is None else [outliers]))}
    for name in names:
        if name != HELD_OUT and any(overlap(part_of[name], (dataset, split)) for split in splits):
            raise ValueError(
                f"near and far must be foreign to {dataset}, got {name!r}; use {HELD_OUT} for its other classes."
            )
    part_of[HELD_OUT] = (dataset, everything.split)
    tested = {name: part_of[name] for name in names}
    if outliers != HELD_OUT:  # held-out images lie in the same stored split as the test images, but are not among them
        tested[dataset] = part_of[HELD_OUT]
    for name, part in tested.items():
        if outliers is not None and overlap(part, part_of[outliers]):
            raise ValueError(
                f"outliers must not share a stored split with a tested set, got {outliers!r} and {name!r}; tested are "
                f"{', '.join(tested)}."
            )

    def opened(name: str) -> data.Dataset:
        if name == HELD_OUT:
            if not rest:
                raise ValueError(f"{HELD_OUT} needs --classes that leave out some of {dataset}, got {tuple(classes)}.")
            return data.select_classes(everything, rest)
        if name == PERMUTED:
            return data.permute_pixels(test, seed=seed)
        if name in SYNTHETIC:
            return data.synthetic(name, test.image_shape, min(max_images, len(test)), seed=seed)
        base, split = part_of[name]
        with checks.renamed("name", "outliers" if name == outliers else "near and far"):
            foreign = images.opened(base, split, data_dir, image_size if base.startswith("folder:") else None)
        return data.match_images(foreign, test.image_shape, invert=base.split(":")[0] in INVERTED)

    foreign = {name: Foreign("near" if name in near else "far", opened(name)) for name in names}
    return foreign, None if outliers is None else opened(outliers)
