"""Deterministic, resumable batches."""

from __future__ import annotations

import functools
import sys
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from robustjax import _arguments, _validate
from robustjax.data._dataset import Dataset
from robustjax.typing import Batch


@runtime_checkable
class BatchIterator(Protocol):
    """An iterator over batches that can resume where it stopped."""

    def __iter__(self) -> BatchIterator:
        """Returns itself."""
        ...

    def __next__(self) -> Batch:
        """Returns the next batch."""
        ...

    def get_state(self) -> Any:
        """Returns the position, as a value that JSON can hold."""
        ...

    def set_state(self, state: Any) -> None:
        """Moves to a position that ``get_state`` returned."""
        ...


@_arguments.checked
def batches(
    dataset: Dataset,
    batch_size: int,
    *,
    seed: int,
    shuffle: bool = True,
    num_epochs: int | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
    drop_remainder: bool = True,
    prefetch: int = 2,
) -> BatchIterator:
    """Iterates over a data set in batches, epoch after epoch, in an order that depends only on the seed.

    Each epoch is one permutation of the split, cut into batches; each process reads its share of every batch, the
    ``process_index``-th of ``process_count`` pieces. Joined in the order of the processes, these pieces equal the
    batches of a single process, row by row, and ``get_state`` returns the same position.

    Args:
      dataset: what to read.
      batch_size: images per batch over all processes, a multiple of ``process_count``.
      seed: of the permutations, in ``[0, 2**32)``; each epoch has its own.
      shuffle: False to read every epoch in the order of the split.
      num_epochs: how many times to go through the data set; None for no end.
      process_index: which share to read; by default this process's index in JAX.
      process_count: how many shares there are; by default the number of JAX processes.
      drop_remainder: whether to drop the images that do not fill a batch at the end of each epoch (under ``shuffle``,
        different images in each epoch). Otherwise the last batch is smaller; processes may differ by one image, and
        some may get none.
      prefetch: how many batches to read ahead, each in its own thread; 0 to read only when asked. The result does not
        depend on it. More threads help with images so large that decoding takes longer than Python's own work.

    Returns:
      A grain iterator over :class:`robustjax.typing.Batch` of NumPy arrays, with ``get_state``, ``set_state`` and
      ``close``.

    Raises:
      ValueError: if a setting is out of its range, or ``batch_size`` exceeds the data set or is no multiple of
        ``process_count``.

    Example:
      >>> digits = data.load("digits", "train")
      >>> batch = next(data.batches(digits, 32, seed=0))
      >>> batch.image.shape, batch.label.dtype.name
      ((32, 8, 8, 1), 'int32')
    """
    import grain

    process_index = jax.process_index() if process_index is None else process_index
    process_count = jax.process_count() if process_count is None else process_count
    _validate.at_least(1, process_count=process_count)
    if not 1 <= batch_size <= len(dataset):
        raise ValueError(
            f"batch_size must lie between 1 and the {len(dataset)} images of {dataset.name} {dataset.split}, "
            f"got {batch_size}."
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must lie in [0, process_count={process_count}), got {process_index}.")
    if batch_size % process_count:
        raise ValueError(f"batch_size must be a multiple of process_count={process_count}, got {batch_size}.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie in [0, 2**32), got {seed}.")
    if num_epochs is not None and num_epochs < 1:
        raise ValueError(f"num_epochs must be at least 1, or None for no end, got {num_epochs}.")
    if prefetch < 0:
        raise ValueError(f"prefetch must not be negative, got {prefetch}.")

    @functools.lru_cache(maxsize=2)  # batches that are read ahead may belong to the next epoch
    def order(epoch: int) -> np.ndarray:
        if not shuffle:
            return np.arange(len(dataset))
        # RandomState: NumPy promises that its streams never change, so a run resumed years later sees the same order.
        return np.random.RandomState([seed, epoch]).permutation(len(dataset))

    per_epoch = len(dataset) // batch_size if drop_remainder else -(-len(dataset) // batch_size)

    def fetch(step: int) -> Batch:
        epoch, position = divmod(step, per_epoch)
        start = position * batch_size
        return dataset[np.array_split(order(epoch)[start : start + batch_size], process_count)[process_index]]

    # A whole permutation at once, and elements that are batches: grain's own shuffle and batch cost 20 us per image.
    steps = grain.MapDataset.range(sys.maxsize if num_epochs is None else num_epochs * per_epoch)
    options = grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)
    return iter(steps.map(fetch).to_iter_dataset(options))
