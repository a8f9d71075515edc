"""A split of labelled images with random access."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from robustjax import _arguments, _validate
from robustjax.typing import Batch


def is_floating(images: np.ndarray) -> bool:
    """Whether images are in [0, 1] as they are stored; others are integers, of which ``Dataset.white`` means 1."""
    return bool(jnp.issubdtype(images.dtype, jnp.floating))


@_arguments.checked
@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A split of labelled images, read on demand.

    ``dataset[17]`` is one example, and ``dataset[indices]``, ``dataset[:100]`` and ``dataset[mask]`` are batches: host
    NumPy arrays in a :class:`robustjax.typing.Batch`, whose ``id`` is the position in the split. Only the requested
    images are read and decoded, so a data set may be larger than memory.

    Attributes:
      name: as given to :func:`robustjax.data.load`.
      split: as given to :func:`robustjax.data.load`.
      num_classes: number of classes; 0 if the labels are plain integers.
      image_shape: ``(height, width, channels)`` of every image.
      size: the number of images, ``len(dataset)``.
      read: ``(n,)`` positions to ``(n, height, width, channels)`` images and their ``(n,)`` labels. Images are uint8,
        or floating numbers in [0, 1], which are taken as they are.
      white: the stored uint8 that means 1.0.
      class_names: the names of the labels 0, 1, ...; empty where they have none.

    Raises:
      ValueError: a number is out of its range.
    """

    name: str
    split: str
    num_classes: int
    image_shape: tuple[int, int, int]
    size: int
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] = dataclasses.field(repr=False)
    white: int = 255
    class_names: tuple[str, ...] = ()

    def __post_init__(self):
        _validate.at_least(0, num_classes=self.num_classes, size=self.size)
        _validate.at_least(1, white=self.white)
        if len(self.class_names) not in (0, self.num_classes):
            raise ValueError(
                f"class_names must name each of num_classes={self.num_classes} classes, or none, got "
                f"{len(self.class_names)} names."
            )

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, indices: Any) -> Batch:
        """Reads the images that NumPy would pick with ``indices``: an integer, a slice, integers or a mask."""
        ids = self._ids[indices]
        images, labels = self.read(np.atleast_1d(ids))
        scaled = images.astype(np.float32)
        if not is_floating(images):  # a division, not a product with 1 / white: the float32 nearest to the fraction
            scaled /= np.float32(self.white)
        fields: tuple[Any, Any, Any] = (scaled, labels.astype(np.int32), np.atleast_1d(ids))
        return Batch(*(field[0] for field in fields)) if np.ndim(ids) == 0 else Batch(*fields)

    @functools.cached_property
    def _ids(self) -> np.ndarray:
        return np.arange(self.size, dtype=np.int32)

    def arrays(self) -> Batch:
        """Reads the whole split into memory, 4 bytes per pixel and channel."""
        return self[:]

    def cached(self) -> Dataset:
        """Reads the whole split once and keeps it in memory as it is stored: uint8 takes 1 byte per pixel and channel.

        Returns:
          The same data set, with identical values, that no longer reads files: for sets like MNIST, whose images would
          otherwise be decoded again in each epoch.
        """
        images, labels = self.read(self._ids)
        return dataclasses.replace(self, read=lambda ids: (images[ids], labels[ids]))
