"""Operators of PyTorch that replace torchax's: images NCHW outside, NHWC inside.

XLA for CPUs is slow with channels first: convolutions in loops, and so all those of a certificate or an attack, take 40
times as long, maxima of 2x2 pixels 7 times, their gradient 12 times. Each function here takes torchax's operator, which
it calls for what it does not compute itself, and returns an operator of the same arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def convolution(known: Callable) -> Callable:
    """Convolutions, also transposed ones, whose groups torchax confuses."""

    def convolved(x, kernel, bias, stride, padding, dilation, *more):
        if kernel.ndim != 4 or x.ndim != 4:
            return known(x, kernel, bias, stride, padding, dilation, *more)
        stride, padding, dilation = map(_pair, (stride, padding, dilation))
        pads, spread, groups = [(size, size) for size in padding], [1, 1], more[-1]
        if len(more) > 1 and more[0]:  # transposed: a convolution of spread pixels
            inputs, outputs, *sizes = kernel.shape  # outputs of one group
            kernel = kernel.reshape(groups, inputs // groups, outputs, *sizes).transpose(0, 2, 1, 3, 4)
            kernel = jnp.flip(kernel.reshape(groups * outputs, inputs // groups, *sizes), (2, 3))
            lows = [step * (size - 1) - pad for step, size, pad in zip(dilation, sizes, padding)]
            pads = [(low, low + extra) for low, extra in zip(lows, _pair(more[1]))]
            stride, spread = [1, 1], stride
        y = jax.lax.conv_general_dilated(
            jnp.moveaxis(x, 1, -1), kernel.transpose(2, 3, 1, 0), stride, pads, spread, dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
        )  # fmt: skip
        return jnp.moveaxis(y if bias is None else y + bias, -1, 1)

    return convolved


def max_pool(known: Callable) -> Callable:
    """Maxima of windows; at ties the first in reading order has the whole gradient, as in PyTorch."""

    def pooled(x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
        if return_indices or not jnp.issubdtype(x.dtype, jnp.floating):
            return known(x, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        axes = _axes(x.shape[-2:], kernel_size, stride or kernel_size, padding, dilation, ceil_mode)
        return jnp.moveaxis(_reduced(True, axes, jnp.moveaxis(x, -3, -1)), -1, -3)

    return pooled


def avg_pool(known: Callable) -> Callable:
    """Means of windows; torchax counts some pixels wrongly in the last ones of ``ceil_mode``."""
    del known

    def pooled(x, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None):
        axes = _axes(x.shape[-2:], kernel_size, stride or kernel_size, padding, 1, ceil_mode)
        sums, counts = _reduced(False, axes, jnp.moveaxis(x, -3, -1)), []
        for length, outputs, axis in zip(x.shape[-2:], sums.shape[-3:-1], axes):
            start, counted = np.arange(outputs) * axis.stride - axis.low, axis.low if count_include_pad else 0
            counts.append(np.minimum(start + axis.size, length + counted) - np.maximum(start, -counted))
        divisor = divisor_override or np.multiply.outer(*counts)[..., None]
        return jnp.moveaxis(sums / jnp.asarray(divisor, x.dtype), -1, -3)

    return pooled


def adaptive_avg_pool(known: Callable) -> Callable:
    """Means of as many windows as are wanted; torchax does those of unequal sizes."""

    def pooled(x, output_size):
        sizes, rests = zip(*map(divmod, x.shape[-2:], output_size))
        return known(x, output_size) if any(rests) else avg_pool(known)(x, sizes)

    return pooled


class _Axis(NamedTuple):
    """The windows along an axis, which is padded by ``low`` pixels before its start and ``high`` behind its end."""

    size: int
    stride: int
    low: int
    high: int
    dilation: int


def _pair(values) -> list[int]:
    return np.broadcast_to(values, 2).tolist()


def _axes(lengths, *settings) -> tuple[_Axis, ...]:
    *pairs, ceil_mode = settings
    axes = []
    for length, size, stride, low, dilation in zip(lengths, *map(_pair, pairs)):
        reach = dilation * (size - 1) + 1
        last, rest = divmod(length + 2 * low - reach, stride)
        last += bool(ceil_mode and rest and (last + 1) * stride < length + low)  # none starts behind the image
        axes.append(_Axis(size, stride, low, max(0, last * stride + reach - length - low), dilation))
    return tuple(axes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _reduced(largest, axes, x):
    """Maxima or sums of windows of (..., height, width, channels)."""
    sizes, strides, lows, highs, dilations = zip(*axes)
    each = lambda values, other: [other] * (x.ndim - 3) + [*values, other]
    start, reduce = (-jnp.inf, jax.lax.max) if largest else (0.0, jax.lax.add)
    pads = each(zip(lows, highs), (0, 0))
    return jax.lax.reduce_window(
        x, start, reduce, each(sizes, 1), each(strides, 1), pads, window_dilation=each(dilations, 1)
    )


@_reduced.defjvp
def _reduced_jvp(largest, axes, primals, tangents):
    # XLA's own gradient, of reduce_window, takes 13 times as long on a CPU for maxima of 2x2 pixels. Within a row, then
    # over rows: so the first of equal maxima is that of reading order.
    first = lambda y, other: jnp.where((other > y) | jnp.isnan(other), other, y)

    def folded(x):
        for i, (size, stride, low, high, dilation) in ((x.ndim - 2, axes[1]), (x.ndim - 3, axes[0])):
            pads = [(low, high, 0) if i == j else (0, 0, 0) for j in range(x.ndim)]
            x = jax.lax.pad(x, jnp.asarray(-jnp.inf if largest else 0, x.dtype), pads)
            offsets = range(0, dilation * size, dilation)
            end = x.shape[i] - offsets[-1]
            parts = [jax.lax.slice_in_dim(x, offset, offset + end, stride, i) for offset in offsets]
            x = functools.reduce(first if largest else jnp.add, parts)
        return x

    return jax.jvp(folded, primals, tangents)
