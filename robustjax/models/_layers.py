"""The two layers that residual networks are made of."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

_he_init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv(inputs: int, outputs: int, size: int, stride: int = 1, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Conv:
    """Convolution without bias, padded by ``size // 2`` on every side as in PyTorch, He initialisation by fan-out."""
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        stride,
        padding=size // 2,  # "SAME" would pad a strided convolution on one side only
        use_bias=False,
        dtype=dtype,
        kernel_init=_he_init,
        rngs=rngs,
    )


class Norm(nnx.BatchNorm):
    r"""Batch normalisation that keeps its statistics and does its arithmetic in float32.

    Running statistics move as :math:`m \leftarrow 0.9\,m + 0.1\,\hat m`, with the biased variance of the batch.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        super().__init__(width, use_running_average=True, momentum=0.9, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        """Normalises over all axes but the last, and returns the dtype of ``x``."""
        return super().__call__(x).astype(x.dtype)
