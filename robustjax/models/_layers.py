"""Layers: convolution and pooling whose gradients are fast on a CPU too, and batch normalisation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from robustjax.models._initializers import ones, variance_scaling, zeros

_he_init = variance_scaling(2.0, "fan_out", "normal")


def conv_general_dilated(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "k l c d"],
    *args: Any,
    dimension_numbers: jax.lax.ConvDimensionNumbers,
    **settings: Any,
) -> Float[Array, "b h2 w2 d"]:
    """Computes ``lax.conv_general_dilated`` without groups; for ``nnx.Conv``.

    The tangent of x is written with the last two axes of the kernel swapped, so that its transpose, the gradient, has
    them in XLA's order. In a loop, such as an attack's, XLA does not reorder them itself, and the gradient
    becomes a convolution that takes up to nine times as long on a CPU.
    """
    outputs, inputs, *window = dimension_numbers.rhs_spec
    swapped = dimension_numbers._replace(rhs_spec=(inputs, outputs, *window))

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, *args, dimension_numbers=dimension_numbers, **settings)

    def jvp(primals, tangents):
        (x, kernel), (dx, dkernel) = primals, tangents
        y, parts = convolve(x, kernel), []
        if not isinstance(dx, SymbolicZero):
            kernel = kernel.swapaxes(inputs, outputs)
            parts.append(jax.lax.conv_general_dilated(dx, kernel, *args, dimension_numbers=swapped, **settings))
        if not isinstance(dkernel, SymbolicZero):
            parts.append(convolve(x, dkernel))
        return y, sum(parts[1:], parts[0]) if parts else jnp.zeros_like(y)

    convolution = jax.custom_jvp(convolve)
    convolution.defjvp(jvp, symbolic_zeros=True)
    return convolution(x, kernel)


@jax.custom_jvp
def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h//2 w//2 c"]:
    """Computes the maxima of blocks of 2x2 pixels; equal maxima share the gradient."""
    return nnx.max_pool(x, (2, 2), (2, 2))


@max_pool.defjvp
def _max_pool_jvp(primals, tangents):
    # XLA's own gradient, of reduce_window, takes three times as long on a CPU.
    y = max_pool(*primals)
    batch, height, width, channels = y.shape

    def blocks(a):
        return a[:, : 2 * height, : 2 * width].reshape(batch, height, 2, width, 2, channels)

    largest = ~(blocks(primals[0]) < y[:, :, None, :, None])  # and NaN
    ties = sum(largest[:, :, i, :, j].astype(y.dtype) for i in (0, 1) for j in (0, 1))
    return y, jnp.where(largest, blocks(tangents[0]), 0.0).sum((2, 4)) / ties


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
        conv_general_dilated=conv_general_dilated,
        rngs=rngs,
    )


class Norm(nnx.BatchNorm):
    r"""Batch normalisation with statistics and arithmetic in float32.

    Running statistics move as :math:`m \leftarrow 0.9\,m + 0.1\,\hat m`, with the biased variance of the batch.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        start = {"scale_init": ones, "bias_init": zeros, "rngs": rngs}
        super().__init__(width, use_running_average=True, momentum=0.9, epsilon=1e-5, dtype=jnp.float32, **start)

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        """Normalises over all axes but the last, and returns the dtype of ``x``."""
        return super().__call__(x).astype(x.dtype)
