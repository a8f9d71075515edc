"""A split of labelled images with random access."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from robustjax import _arguments, _validate
from robustjax.typing import Batch


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
      read: ``(n,)`` positions to ``(n, height, width, channels)`` uint8 images and their ``(n,)`` labels.
      white: the stored value that means 1.0.

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

    def __post_init__(self):
        _validate.at_least(0, num_classes=self.num_classes, size=self.size)
        _validate.at_least(1, white=self.white)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, indices: Any) -> Batch:
        """Reads the images that NumPy would pick with ``indices``: an integer, a slice, integers or a mask."""
        ids = self._ids[indices]
        images, labels = self.read(np.atleast_1d(ids))
        # A division, not a product with 1 / white: the float32 nearest to the fraction.
        fields: tuple[Any, Any, Any] = (
            images.astype(np.float32) / np.float32(self.white),
            labels.astype(np.int32),
            np.atleast_1d(ids),
        )
        return Batch(*(field[0] for field in fields)) if np.ndim(ids) == 0 else Batch(*fields)

    @functools.cached_property
    def _ids(self) -> np.ndarray:
        return np.arange(self.size, dtype=np.int32)

    def arrays(self) -> Batch:
        """Reads the whole split into memory, 4 bytes per pixel and channel."""
        return self[:]

    def cached(self) -> Dataset:
        """Reads the whole split once and keeps it in memory, 1 byte per pixel and channel.

        Returns:
          The same data set, with identical values, that no longer reads files: for sets like MNIST, whose images would
          otherwise be decoded again in each epoch.
        """
        images, labels = self.read(self._ids)
        return dataclasses.replace(self, read=lambda ids: (images[ids], labels[ids]))
