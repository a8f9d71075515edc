"""Layers: convolutions, pooling whose gradient is fast on a CPU too, and batch normalisation."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from robustjax.models._convolution import conv_general_dilated
from robustjax.models._initializers import ones, variance_scaling, zeros

_he_init = variance_scaling(2.0, "fan_out", "normal")


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


def normalised(
    convolve: Callable, norm: Callable, x: Float[Array, "batch height width channels"]
) -> Float[Array, "batch height2 width2 channels2"]:
    r"""Computes ``norm(convolve(x))``, for a convolution without bias; at inference, as one convolution.

    .. math:: \gamma\, \frac{x * k - \mu}{\sqrt{v + \epsilon}} + \beta
              = x * (s k) + (\beta - s \mu), \qquad s = \frac{\gamma}{\sqrt{v + \epsilon}}

    The two differ by rounding. They do not agree in half precision, where the kernel is rounded after it is scaled, and
    where the output of the convolution itself is looked at (``Functional.activations``); nothing is folded there.
    """
    folds = isinstance(convolve, nnx.Conv) and isinstance(norm, Norm)
    if not folds or not norm.use_running_average or convolve.dtype != jnp.float32:
        return norm(convolve(x))
    gamma, beta, mean, variance = (nnx.to_pure_dict(nnx.state(norm))[name] for name in ("scale", "bias", "mean", "var"))
    scale = gamma * jax.lax.rsqrt(variance + norm.epsilon)
    graph, state = nnx.split(convolve)
    folded = nnx.merge(graph, jax.tree.map(lambda kernel: kernel * scale[None, None, None], state))
    return folded(x) + (beta - scale * mean)[None, None, None]
