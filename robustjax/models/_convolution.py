"""Convolution whose derivatives are fast on a CPU too."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

_PIXELS = 2**14
"""Least number of pixels, of all outputs in a batch together, for which products of patches are faster on a CPU."""
_BLOCK = 4
"""Examples in one product: their patches stay in the cache."""


def conv_general_dilated(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "k l c d"],
    window_strides: tuple[int, ...],
    padding: Any,
    *,
    dimension_numbers: jax.lax.ConvDimensionNumbers,
    **settings: Any,
) -> Float[Array, "b h2 w2 d"]:
    r"""Computes ``lax.conv_general_dilated`` without groups and dilation, for ``nnx.Conv``, with other derivatives.

    On a CPU, the gradient of the kernel that XLA makes, a convolution with a window as large as the image, takes up to
    eight times as long as the convolution itself. In large batches the tangent of the kernel is therefore written as a
    product with the matrix of patches, a few examples at a time:

    .. math:: \dot y = P(x)\, \dot k

    Its transpose is the same product with :math:`P(x)^T`. So is the tangent of x where the output is smaller than x.

    Elsewhere the tangent of x is a convolution, written with the last two axes of the kernel swapped, so that its
    transpose has them in XLA's order. In a loop, such as an attack's, XLA does not reorder them itself, and the
    gradient takes up to nine times as long.
    """
    outputs, inputs, *window = dimension_numbers.rhs_spec
    swapped = dimension_numbers._replace(rhs_spec=(inputs, outputs, *window))

    def convolve(x, kernel, numbers):
        return jax.lax.conv_general_dilated(x, kernel, window_strides, padding, dimension_numbers=numbers, **settings)

    def jvp(primals, tangents):
        (x, kernel), (dx, dkernel) = primals, tangents
        y, parts = plain(x, kernel), []
        large = math.prod(y.shape[:-1]) >= _PIXELS or kernel.shape[:2] == (1, 1)
        large &= not any(jax.typeof(x).sharding.spec)  # explicit axes would want the sharding of each block
        of_patches = functools.partial(_of_patches, size=y.shape[1:3], strides=window_strides, padding=padding)
        either = functools.partial(jax.lax.platform_dependent, cpu=of_patches)
        if not isinstance(dx, SymbolicZero):
            turned = lambda x, kernel: convolve(x, kernel.swapaxes(inputs, outputs), swapped)
            smaller = y.shape[1] < x.shape[1]
            parts.append(either(dx, kernel, default=turned) if large and smaller else turned(dx, kernel))
        if not isinstance(dkernel, SymbolicZero):
            parts.append(either(x, dkernel, default=plain) if large else plain(x, dkernel))
        return y, sum(parts[1:], parts[0]) if parts else jnp.zeros_like(y)

    plain = functools.partial(convolve, numbers=dimension_numbers)
    convolution = jax.custom_jvp(plain)
    convolution.defjvp(jvp, symbolic_zeros=True)
    return convolution(x, kernel)


def _of_patches(x, kernel, *, size, strides, padding):
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    rows, columns = (
        [slice(first, first + (number - 1) * stride + 1, stride) for first in range(length)]
        for length, number, stride in zip(kernel.shape, size, strides)
    )

    @jax.checkpoint  # patches are larger than x by the number of pixels of the kernel: they are made again, not kept
    def product(x, kernel):
        padded = jnp.pad(x, (*[(0, 0)] * (x.ndim - 3), *padding, (0, 0)))
        moved = jnp.concatenate([padded[..., columns_, :] for columns_ in columns], -1)
        return jnp.concatenate([moved[..., rows_, :, :] for rows_ in rows], -1) @ kernel

    kernel = kernel.reshape(-1, kernel.shape[-1])
    if len(rows) * len(columns) == 1:
        return product(x, kernel)
    # Where devices share the batch, each goes through its own part, and gradients are added after the loop.
    parts = jax.device_count() if x.shape[0] % jax.device_count() == 0 else 1
    in_blocks = lambda x, kernel: jax.lax.map(lambda x: product(x, kernel), x, batch_size=_BLOCK)
    y = jax.vmap(in_blocks)(x.reshape(parts, -1, *x.shape[1:]), jnp.broadcast_to(kernel, (parts, *kernel.shape)))
    return y.reshape(-1, *y.shape[2:])
