"""Losses of one example each, without reduction."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float


def cross_entropy(logits: Float[Array, "..."], labels: Array) -> Float[Array, " batch"]:
    r"""Computes the cross-entropy of each example, in nats.

    .. math:: -f_y(x) + \ln \sum_k e^{f_k(x)}

    Args:
      logits: ``(batch, classes)``, floating.
      labels: ``(batch,)``, integer, in ``0, ..., classes - 1``.

    Returns:
      ``(batch,)`` losses.

    Raises:
      ValueError: shapes or dtypes do not fit.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be (batch, classes), got shape {logits.shape}.")
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels must be ({logits.shape[0]},) to match the logits, got shape {labels.shape}.")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}.")
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
