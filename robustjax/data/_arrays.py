"""A user's own images as arrays, in memory or in an npz file."""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from robustjax import _arguments, _validate
from robustjax.data._dataset import Dataset, is_floating
from robustjax.typing import AnyArray

SPLITS = ("train", "test", "val", "validation")
"""Splits that a file or a folder may have of its own."""


@_arguments.checked
def from_arrays(
    images: AnyArray, labels: AnyArray, *, num_classes: int | None = None, name: str = "arrays", split: str = "all"
) -> Dataset:
    """Makes a data set of images and labels in memory.

    Args:
      images: ``(n, height, width, channels)``, or ``(n, height, width)`` for grey images: uint8 from 0 to 255, or
        floating numbers in [0, 1]. They are kept, not copied; a ``Dataset`` yields them as float32.
      labels: ``(n,)`` integers from 0. A column ``(n, 1)``, as Keras stores them, is taken as well.
      num_classes: number of classes; by default the largest label plus 1.
      name: what the data set is called in messages and reports.
      split: what this part of it is called.

    Returns:
      The data set, of :class:`robustjax.typing.Batch` with images in [0, 1].

    Raises:
      ValueError: if images are of another layout, type or range, hold a NaN, or are none; or if labels are not as many
        integers from 0 to ``num_classes - 1``.

    Example:
      >>> images, labels = np.zeros((5, 28, 28), np.uint8), np.array([0, 1, 2, 1, 0])
      >>> mine = data.from_arrays(images, labels)
      >>> len(mine), mine.image_shape, mine.num_classes
      (5, (28, 28, 1), 3)
      >>> mine[:2].image.dtype.name
      'float32'
    """
    images, labels = np.asarray(images), np.asarray(labels)
    images, labels = _images(images), _labels(labels, len(images))
    most = int(labels.max())
    if num_classes is None:
        num_classes = most + 1
    _validate.at_least(1, num_classes=num_classes)
    if most >= num_classes:
        raise ValueError(f"labels must be 0 to {num_classes - 1} with num_classes={num_classes}, got {most}.")
    height, width, channels = images.shape[1:]
    read = lambda ids: (images[ids], labels[ids])
    return Dataset(name, split, num_classes, (height, width, channels), len(images), read)


def _images(images: np.ndarray) -> np.ndarray:
    """The images with an axis of channels; ValueError for those that cannot be."""
    shape, wanted = images.shape, "images must have shape (n, height, width, channels), or (n, height, width) for grey"
    if images.ndim == 2:
        raise ValueError(
            f"{wanted}, got rows of shape {shape}: a Dataset is of images; pass images.reshape(-1, height, width, "
            "channels)."
        )
    if images.ndim not in (3, 4):
        raise ValueError(f"{wanted}, got {shape}.")
    if 0 in shape:
        raise ValueError(f"images must hold at least one image of at least one pixel, got shape {shape}.")
    if images.ndim == 4 and shape[1] in (1, 3) and shape[3] > 4:
        raise ValueError(f"{wanted}, got {shape}, whose channels come first: pass np.moveaxis(images, 1, -1).")
    if images.dtype != np.uint8 and not is_floating(images):
        values = advice = ""
        if images.dtype == bool:
            advice = ": pass images.astype(np.float32)"
        elif jnp.issubdtype(images.dtype, np.integer):
            low, high = _range(images)
            values = f" with values from {low:g} to {high:g}"
            levels = low >= 0 and 1 < high <= 255
            advice = ": pass images.astype(np.uint8)" if levels else ": divide by the value of white"
        raise ValueError(
            f"images must be uint8 from 0 to 255, or floating in [0, 1], got {images.dtype}{values}{advice}."
        )
    low, high = _range(images)
    if is_floating(images) and not (low >= 0 and high <= 1):
        values = f"images must lie in [0, 1] where they are floating, got values from {low:g} to {high:g}"
        if not np.isfinite(low) or not np.isfinite(high):
            bad = np.flatnonzero(~np.isfinite(images).reshape(len(images), -1).all(-1))
            raise ValueError(
                f"images must be finite, got NaN or infinite values in {len(bad):,} images, the first at {bad[0]}."
            )
        if low < 0:
            raise ValueError(f"{values}: undo the normalisation, which happens inside the model.")
        raise ValueError(f"{values}: divide by {'255' if 1.5 < high <= 255 else 'the value of white, or clip'}.")
    if images.dtype == np.uint8 and high == 1:
        raise ValueError(
            "images must reach 255 where they are white if they are uint8, got values from 0 to 1: pass "
            "images.astype(np.float32)."
        )
    return images if images.ndim == 4 else images[..., None]


def _range(images: np.ndarray) -> tuple[float, float]:
    """Least and largest value; NaN where there is one."""
    return float(images.min()), float(images.max())


def _labels(labels: np.ndarray, count: int) -> np.ndarray:
    """The labels of ``count`` images, ``(count,)``; ValueError for what is none."""
    shape = labels.shape
    if labels.ndim == 2 and shape[1] > 1:
        raise ValueError(
            f"labels must be integers (n,), got shape {shape}: if they are one-hot or probabilities, pass "
            "labels.argmax(-1)."
        )
    if labels.ndim == 0:
        raise ValueError("labels must be integers (n,), got one number: pass images[None] and [label] of one image.")
    if labels.ndim not in (1, 2):
        raise ValueError(f"labels must be integers (n,), got shape {shape}.")
    if not len(labels) or len(labels) != count:
        raise ValueError(f"labels must be as many as images, got {len(labels):,} labels and {count:,} images.")
    if not jnp.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}: if they are whole, pass labels.astype(int).")
    if (least := labels.min()) < 0:
        raise ValueError(f"labels must be integers from 0, got {least}.")
    if (most := int(labels.max())) >= 2**31:
        raise ValueError(f"labels must be below 2**31, got {most}.")
    return labels.reshape(-1)


def stored(path: epath.Path) -> dict[str, tuple[str, np.ndarray]]:
    """The splits in an npz file: the key of their images, and their labels; ``all`` where the file holds one set.

    Raises:
      ValueError: the file is no npz file, or holds neither one set nor splits.
      FileNotFoundError: it is missing.
    """
    pairs = {"all": [("images", "labels")]} | {
        split: [(f"{split}_images", f"{split}_labels"), (f"x_{split}", f"y_{split}")] for split in SPLITS
    }
    with _file(path) as arrays:
        found = {
            split: (images, _array(path, arrays, labels))
            for split, keys in pairs.items()
            for images, labels in keys
            if images in arrays and labels in arrays
        }
        keys = list(arrays)
    if not found or len(found) > 1 and "all" in found:
        raise ValueError(
            f"{path} must hold the arrays images and labels, or those of its splits: train_images, train_labels, "
            f"test_images, test_labels (or x_train, y_train, x_test, y_test), got {', '.join(keys) or 'none'}."
        )
    return found


def read(
    path: epath.Path,
    parts: Sequence[tuple[str, np.ndarray, np.ndarray]],
    *,
    of: Sequence[tuple[str, np.ndarray]],
    name: str,
    split: str,
) -> Dataset:
    """Rows of arrays in an npz file, joined: of each part the key of its images, its labels, and the rows to take.

    The number of classes is that of the labels of the whole of it, ``of``: a part may lack some.
    """
    with _file(path) as arrays:
        sets = {key: (_array(path, arrays, key), labels) for key, labels, _ in parts}
    try:
        sets = {key: (_images(images), _labels(labels, len(images))) for key, (images, labels) in sets.items()}
        shapes = {key: images.shape[1:] for key, (images, _) in sets.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"images must have one shape in all splits, got {shapes}.")
        num_classes = max(int(_labels(labels, len(labels)).max()) for _, labels in of if len(labels)) + 1
        images, labels = (np.concatenate([sets[key][i][rows] for key, _, rows in parts]) for i in (0, 1))
        return from_arrays(images, labels, num_classes=num_classes, name=name, split=split)
    except ValueError as error:
        raise ValueError(f"{path} is not a data set: {error}") from error


@contextlib.contextmanager
def _file(path: epath.Path) -> Iterator[Any]:
    """An open npz file, whose arrays are read when they are asked for."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: arrays:FILE.npz names a file that np.savez wrote.")
    wanted = f"{path} must be an npz file, as np.savez writes it"
    if path.is_dir():
        raise ValueError(f"{wanted}, got a folder: folder:{path} names a folder of images.")
    with path.open("rb") as file:
        try:
            arrays = np.load(file, allow_pickle=False)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{wanted}, got another file, or a damaged one: {error}.") from error
        if isinstance(arrays, np.ndarray):
            raise ValueError(f"{wanted}, got a single array.")
        with arrays:
            yield arrays


def _array(path: epath.Path, arrays: Any, key: str) -> np.ndarray:
    try:
        return arrays[key]
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:  # objects are never unpickled
        raise ValueError(f"{path} must hold {key} as numbers, but it cannot be read: {error}.") from error
