"""Exact nearest neighbours among the training features."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from robustjax import _arguments, _validate
from robustjax.scoring._detector import Detector, cached_by_settings, make_detector, require

_ROWS = 256
_GROUP = 16


@_arguments.checked
@cached_by_settings
def knn(*, k: int = 50) -> Detector:
    r"""Distance to the k-th nearest training feature, with all features scaled to unit length.

    .. math:: \Big\lVert \frac{z}{\lVert z \rVert} - \frac{z_{(k)}}{\lVert z_{(k)} \rVert} \Big\rVert_2

    The search is exact: each block of 256 scored rows is compared with all training rows at once. A training row is its
    own first neighbour when it is scored; a feature of zeros is not scaled.

    Args:
      k: which neighbour, from 1. The paper uses 50 for CIFAR-10, 200 for CIFAR-100 and 1000 for ImageNet.

    Returns:
      The detector; its state is a ``Bank`` of all training features. ``fit`` raises ValueError for fewer than
      k rows.

    Example:
      >>> detector = scoring.knn(k=3)
      >>> state = detector.fit(train)
      >>> print(detector.score(state, test))
      [0.16 0.9 ]

    Reference:
      Sun, Ming, Zhu and Li, "Out-of-distribution detection with deep nearest neighbors", arXiv:2204.06507.
    """
    _validate.at_least(1, k=k)

    def fit(outputs, labels, head):
        require("knn", outputs=outputs)
        if k > outputs.features.shape[0]:
            raise ValueError(f"k must be at most the number of training rows, {outputs.features.shape[0]}, got {k}.")
        return _bank(outputs.features)

    def score(state, outputs):
        rows = _unit(outputs.features) - state.origin[None]
        # The distance itself: the root of 2 - 2 cos has few digits where neighbours are near.
        return jnp.linalg.norm(rows - state.rows[nearest(state.rows, rows, k, state.halves)[:, -1]], axis=-1)

    return make_detector(fit, score, lambda state: (None, state.rows.shape[1]))


class Bank(NamedTuple):
    """Unit training features minus their mean, so that inner products of close rows keep their digits.

    Attributes:
      origin: ``(dim,)``, the mean.
      rows: ``(rows, dim)``, unit features minus the mean.
      halves: ``(rows,)``, half of the squared lengths of the rows.
    """

    origin: Float[Array, " dim"]
    rows: Float[Array, "rows dim"]
    halves: Float[Array, " rows"]


@jax.jit
def _bank(features):
    unit = _unit(features)
    origin = unit.mean(0)
    rows = unit - origin[None]
    return Bank(origin, rows, jnp.square(rows).sum(-1) / 2)


def nearest(
    bank: Float[Array, "rows dim"],
    queries: Float[Array, "batch dim"],
    k: int,
    halves: Float[Array, " rows"] | None = None,
) -> Int[Array, "batch k"]:
    """Indices of the k rows of the bank with the largest inner products with each query, the largest first.

    With ``halves``, half of the squared lengths of the rows, the rows at the smallest distances, the nearest first.
    """

    def of_block(block):
        products = jnp.matmul(block, bank.T, precision=jax.lax.Precision.HIGHEST)
        return _largest(products if halves is None else products - halves[None], k)

    batch, dim = queries.shape
    if batch <= _ROWS:
        return of_block(queries)
    steps = -(-batch // _ROWS)
    padded = jnp.pad(queries, ((0, steps * _ROWS - batch), (0, 0)))
    # Rows that are steps apart share a block: so each block has rows of every device that the queries are spread over.
    found = jax.lax.map(of_block, padded.reshape(_ROWS, steps, dim).swapaxes(0, 1))
    return found.swapaxes(0, 1).reshape(-1, k)[:batch]


def _largest(values, k):
    """Indices of the k largest entries of each row, exactly, the largest first.

    They lie in the k groups with the largest maxima, whichever of equal maxima are taken.
    """
    rows, columns = values.shape
    groups = columns // _GROUP
    if 2 * k > groups:
        return _top(values, k)
    grouped = values[:, : groups * _GROUP].reshape(rows, groups, _GROUP)
    best = _top(grouped.max(-1), k)
    rest = jnp.arange(groups * _GROUP, columns, dtype=best.dtype)
    candidates = (best[:, :, None] * _GROUP + jnp.arange(_GROUP, dtype=best.dtype)[None, None]).reshape(rows, -1)
    candidates = jnp.concatenate([candidates, jnp.broadcast_to(rest[None], (rows, rest.shape[0]))], axis=1)
    inside = _top(jnp.take_along_axis(values, candidates, axis=1), k)
    return jnp.take_along_axis(candidates, inside, axis=1)


def _top(values, k):
    # Without the barrier XLA turns a top_k whose result is sliced into a sort of all columns, on a CPU.
    return jax.lax.optimization_barrier(jax.lax.top_k(values, k)[1])


@jax.jit
def _unit(features):
    """Features of unit length; scaled by the largest entry first, whose square float32 may not hold."""
    largest = jnp.abs(features).max(-1, keepdims=True)
    scaled = features / jnp.where(largest > 0, largest, 1.0)
    length = jnp.linalg.norm(scaled, axis=-1, keepdims=True)
    return scaled / jnp.where(length > 0, length, 1.0)
