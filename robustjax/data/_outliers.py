"""Batches joined with outliers."""

from __future__ import annotations

from typing import Any

import numpy as np

from robustjax import _arguments
from robustjax.data._batches import BatchIterator
from robustjax.typing import Batch


@_arguments.checked
def with_outliers(batches: BatchIterator, outlier_batches: BatchIterator) -> BatchIterator:
    """Joins each batch with a batch of outliers: inputs of no class, for objectives such as outlier exposure.

    Rows of ``batches`` come first and are unchanged; rows of ``outlier_batches`` follow with label -1, whatever label
    they had, and id ``-1 - id``, so that no two rows of a joined batch share an id. The two iterators keep their own
    batch sizes, orders and epochs; each of several processes joins its own shares. The position of the joined iterator
    consists of the positions of both.

    Args:
      batches: labelled batches, from :func:`robustjax.data.batches`.
      outlier_batches: at least as many batches, with images of the same shape; best without end.

    Returns:
      An iterator over the joined batches, which ends when either ends.

    Raises:
      ValueError: when a batch is asked for, if images differ in shape.

    Example:
      >>> inside = data.batches(data.load("digits", "train"), 3, seed=0)
      >>> outside = data.batches(data.synthetic("textures", (8, 8, 1), 100), 2, seed=0)
      >>> batch = next(data.with_outliers(inside, outside))
      >>> batch.image.shape, (batch.label == -1).tolist()
      ((5, 8, 8, 1), [False, False, False, True, True])
    """
    return _WithOutliers(batches, outlier_batches)


class _WithOutliers:
    def __init__(self, batches: BatchIterator, outlier_batches: BatchIterator):
        self._batches, self._outliers = batches, outlier_batches

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> Batch:
        batch, outliers = next(self._batches), next(self._outliers)
        if batch.image.shape[1:] != outliers.image.shape[1:]:
            raise ValueError(
                f"outlier_batches must have images of shape {batch.image.shape[1:]}, as batches has, "
                f"got {outliers.image.shape[1:]}; data.match_images changes it."
            )
        fields: tuple[Any, Any, Any] = (
            np.concatenate([batch.image, outliers.image]),
            np.concatenate([batch.label, np.full_like(outliers.label, -1)]),
            np.concatenate([batch.id, -1 - outliers.id]),
        )
        return Batch(*fields)

    def get_state(self) -> Any:
        return {"batches": self._batches.get_state(), "outlier_batches": self._outliers.get_state()}

    def set_state(self, state: Any) -> None:
        self._batches.set_state(state["batches"])
        self._outliers.set_state(state["outlier_batches"])
