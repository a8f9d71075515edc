"""Numbers of models in float32: half precision is raised to it, and logarithms keep their digits next to 0."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def in_float32(values: Any) -> Any:
    """Floating numbers of at least 32 bits: coarser ones lose digits in every step, and linear algebra has none."""
    fine = jnp.issubdtype(values.dtype, jnp.floating) and values.dtype.itemsize >= 4
    return values if fine else values.astype(np.float32)


@jax.custom_jvp
def log_softmax(logits: Float[Array, "... classes"]) -> Float[Array, "... classes"]:
    """As ``jax.nn.log_softmax``, with a small relative error of all values and derivatives next to certainty.

    Where a probability p rounds to 1, the plain form rounds log p and the derivative 1 - p to 0. Here they are sums
    over the other classes.
    """
    below = logits - logits.max(-1, keepdims=True)
    largest = below == 0
    others = jnp.where(largest, 0, jnp.exp(below)).sum(-1, keepdims=True)
    return below - jnp.log1p(others + (largest.sum(-1, keepdims=True, dtype=logits.dtype) - 1))


@log_softmax.defjvp
def _(primals, tangents):
    (logits,), (change,) = primals, tangents
    log_p = log_softmax(logits)
    p = jnp.exp(log_p)
    # Only differences between changes count. A class of p near 1 is the one to which they are taken.
    still = p > 0.6
    change = jnp.where(still, 0, change - jnp.where(still, change, 0).sum(-1, keepdims=True))
    return log_p, change - (p * change).sum(-1, keepdims=True)
