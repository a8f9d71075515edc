"""Initial parameters: bit for bit those that Flax makes with JAX below 0.12, from programs that XLA compiles quickly.

From JAX 0.12 on, Flax multiplies in another order, and the last bit may differ. The order here stays, so that a seed
gives the same parameters with every JAX.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

_DRAWS: dict[str, Callable[..., Array]] = {
    "uniform": lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -1),
    "normal": lambda key, shape, dtype: jax.random.normal(key, shape, dtype),
    "truncated_normal": lambda key, shape, dtype: jax.random.truncated_normal(key, -2, 2, shape, dtype),
}
_DEVIATION_OF_TRUNCATED = 0.87962566103423978


@functools.partial(jax.jit, static_argnames=("distribution", "shape", "dtype"))
def drawn(
    key: Key[Array, ""],
    factor: Float[Any, ""],
    *,
    distribution: str,
    shape: tuple[int, ...],
    dtype: DTypeLike = np.float32,
) -> Float[Array, "..."]:
    """Draws numbers and multiplies them; flat, since XLA compiles a draw of several axes up to ten times as long."""
    flat = _DRAWS[distribution](key, (math.prod(shape),), dtype)
    return (jax.lax.optimization_barrier(flat) * factor).reshape(shape)  # rounded before it is multiplied, as in Flax


def variance_scaling(
    scale: float,
    mode: Literal["fan_in", "fan_out"],
    distribution: Literal["uniform", "normal", "truncated_normal"],
    *,
    stacked: bool = False,
) -> Callable[..., Array]:
    """As ``nnx.initializers.variance_scaling``, for kernels ``(..., inputs, outputs)``, or a stack of them."""

    def init(key: Key[Array, ""], shape: Sequence[int], dtype: DTypeLike = np.float32) -> Array:
        fan = math.prod(shape[stacked:-2]) * shape[-2 if mode == "fan_in" else -1]
        variance = np.asarray(scale / fan, dtype)
        factor = np.sqrt(3 * variance if distribution == "uniform" else variance)
        if distribution == "truncated_normal":
            factor = factor / np.asarray(_DEVIATION_OF_TRUNCATED, dtype)
        factor = np.asarray(factor, dtype)
        return drawn(key, factor, distribution=distribution, shape=tuple(shape), dtype=jnp.dtype(dtype))

    return init


def zeros(key: Any, shape: Sequence[int], dtype: DTypeLike = np.float32) -> Array:
    """Zeros, for which nothing is compiled."""
    return jnp.asarray(np.zeros(shape, dtype))


def ones(key: Any, shape: Sequence[int], dtype: DTypeLike = np.float32) -> Array:
    """Ones, for which nothing is compiled."""
    return jnp.asarray(np.ones(shape, dtype))
