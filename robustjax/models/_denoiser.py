"""Small networks from images to images: a denoiser, and the noise predictor of a diffusion model."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, Shaped

from robustjax import _arguments, _validate
from robustjax.models._convolution import conv_general_dilated
from robustjax.models._functional import functional
from robustjax.models._initializers import variance_scaling, zeros
from robustjax.typing import ModelState


class _Convolutions(nnx.Module):
    """3x3 convolutions with ReLU between them, on blocks of ``fold`` x ``fold`` pixels folded into channels.

    The last one is initialised to zero. ``shift`` is added to the outputs of the others, before ReLU.
    """

    def __init__(self, channels: int, width: int, depth: int, fold: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.fold = fold
        widths = (fold * fold * channels, *(width,) * (depth - 1), fold * fold * channels)
        starts = (*(variance_scaling(2.0, "fan_in", "truncated_normal"),) * (depth - 1), zeros)
        layer = functools.partial(
            nnx.Conv,
            kernel_size=(3, 3),
            padding="SAME",
            dtype=dtype,
            conv_general_dilated=conv_general_dilated,
            rngs=rngs,
        )
        self.layers = nnx.List(
            [
                layer(inputs, outputs, kernel_init=start, bias_init=zeros)
                for inputs, outputs, start in zip(widths[:-1], widths[1:], starts, strict=True)
            ]
        )

    def __call__(
        self, x: Float[Array, "b h w c"], shift: Float[Array, "b layers width"] | None = None
    ) -> Float[Array, "b h w c"]:
        (batch, height, width, channels), n = x.shape, self.fold
        x = x.reshape(batch, height // n, n, width // n, n, channels).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, height // n, width // n, n * n * channels)
        *hidden, last = self.layers
        for i, layer in enumerate(hidden):
            x = layer(x)
            x = nnx.relu(x if shift is None else x + shift[:, None, None, i])
        x = last(x).reshape(batch, height // n, width // n, n, n, channels).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(batch, height, width, channels)


def _checked_shape(image_shape: Sequence[int], key: Array, width: int, depth: int, fold: int) -> tuple[int, int, int]:
    _validate.key(key)
    _validate.at_least(1, width=width, fold=fold)
    _validate.at_least(2, depth=depth)
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape must be a positive (height, width, channels), got {tuple(image_shape)}.")
    rows, columns, channels = image_shape
    if rows % fold or columns % fold:
        raise ValueError(f"fold must divide height and width of {tuple(image_shape)}, got {fold}.")
    return rows, columns, channels


def _check_images(x: Array, image_shape: tuple[int, int, int]) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.shape[1:] != image_shape:
        wanted = ", ".join(map(str, image_shape))
        raise ValueError(f"x must be floating point of shape (batch, {wanted}), got {x.dtype} {x.shape}.")


class Denoiser(nnx.Module):
    r"""Residual denoiser :math:`D(x) = x - r(x)`, initially the identity; see :func:`denoiser`."""

    def __init__(
        self,
        key: Key[Array, ""],
        *,
        image_shape: Sequence[int],
        width: int,
        depth: int,
        fold: int,
        dtype: DTypeLike,
    ):
        self.image_shape = _checked_shape(image_shape, key, width, depth, fold)
        self.dtype = jnp.dtype(dtype)
        self.body = _Convolutions(self.image_shape[-1], width, depth, fold, self.dtype, nnx.Rngs(params=key))

    def __call__(self, x: Shaped[Array, "..."]) -> Float[Array, "batch height width channels"]:
        """Denoised images.

        Args:
          x: ``(batch, height, width, channels)``, floating point: images in [0, 1] with noise, not clipped.

        Returns:
          Of the shape of ``x``, float32, not clipped.

        Raises:
          ValueError: if ``x`` has another shape or dtype.
        """
        _check_images(x, self.image_shape)
        x = x.astype(jnp.float32)
        # Centred on the middle of the range, so that the zero padding of convolutions is grey and not black.
        return x - self.body((x - 0.5).astype(self.dtype)).astype(jnp.float32)


class NoisePredictor(nnx.Module):
    r"""Network :math:`\epsilon(x_t, t)` of a diffusion model; see :func:`noise_predictor`."""

    def __init__(
        self,
        key: Key[Array, ""],
        *,
        image_shape: Sequence[int],
        width: int,
        depth: int,
        fold: int,
        dtype: DTypeLike,
    ):
        self.image_shape = _checked_shape(image_shape, key, width, depth, fold)
        self.dtype = jnp.dtype(dtype)
        rngs = nnx.Rngs(params=key)
        self.body = _Convolutions(self.image_shape[-1], width, depth, fold, self.dtype, rngs)
        self.waves = 16
        self.time1 = nnx.Linear(2 * self.waves, width, rngs=rngs)
        self.time2 = nnx.Linear(width, (depth - 1) * width, rngs=rngs)

    def __call__(
        self, x: Shaped[Array, "..."], time: Int[Array, " batch"]
    ) -> Float[Array, "batch height width channels"]:
        """The noise in noisy images.

        Args:
          x: ``(batch, height, width, channels)``, floating point: x_t, images in [-1, 1] scaled down, with noise.
          time: ``(batch,)`` steps of the diffusion, from 0.

        Returns:
          Of the shape of ``x``, float32.

        Raises:
          ValueError: if ``x`` has another shape or dtype.
        """
        _check_images(x, self.image_shape)
        frequencies = jnp.exp(-math.log(10_000) * jnp.arange(self.waves, dtype=jnp.float32) / self.waves)
        angles = time.astype(jnp.float32)[:, None] * frequencies[None]
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        shift = self.time2(nnx.relu(self.time1(waves))).reshape(x.shape[0], len(self.body.layers) - 1, -1)
        return self.body(x.astype(self.dtype), shift.astype(self.dtype)).astype(jnp.float32)


@_arguments.checked
def denoiser(
    key: Key[Array, ""],
    *,
    width: int = 32,
    depth: int = 6,
    fold: int = 2,
    image_shape: Sequence[int] = (28, 28, 1),
    dtype: DTypeLike = jnp.float32,
) -> Denoiser:
    r"""Residual denoiser for one level of noise: :math:`D(x) = x - r(x)` with a stack of 3x3 convolutions for r.

    39,332 parameters for images of one channel. The stack follows DnCNN, which has 17 layers of 64 units and batch
    normalisation. Here the pixels are first folded into channels, which doubles the receptive field at a quarter of the
    cost.

    Args:
      key: typed PRNG key of the initial parameters.
      width: units of each hidden layer.
      depth: layers, at least 2.
      fold: side of the squares of pixels that become channels; divides height and width. 1 folds nothing.
      image_shape: height, width and channels of the images.
      dtype: dtype of the arithmetic of r; parameters and outputs are float32.

    Returns:
      The module, ``x (batch, height, width, channels) -> (batch, height, width, channels)``.

    Raises:
      ValueError: if an argument is out of its range.

    Example:
      >>> denoise = lambda key, x: models.denoiser(key, image_shape=(8, 8, 1))(x)
      >>> jax.eval_shape(denoise, jax.random.key(0), jnp.ones((2, 8, 8, 1))).shape
      (2, 8, 8, 1)

    Reference:
      Zhang et al. 2017, Beyond a Gaussian Denoiser: Residual Learning of Deep CNN for Image Denoising,
      arXiv 1608.03981; the folding: Zhang, Zuo and Zhang 2018, FFDNet, arXiv 1710.04026.
    """
    return Denoiser(key, image_shape=image_shape, width=width, depth=depth, fold=fold, dtype=dtype)


@_arguments.checked
def noise_predictor(
    key: Key[Array, ""],
    *,
    width: int = 32,
    depth: int = 6,
    fold: int = 2,
    image_shape: Sequence[int] = (28, 28, 1),
    dtype: DTypeLike = jnp.float32,
) -> NoisePredictor:
    r"""Network :math:`\epsilon(x_t, t)` of a small diffusion model: a stack of 3x3 convolutions that takes the time.

    Sines and cosines of the time pass through a hidden layer and are added to the units of every layer.

    Args:
      key: typed PRNG key of the initial parameters.
      width: units of each hidden layer.
      depth: layers, at least 2.
      fold: side of the squares of pixels that become channels; divides height and width. 1 folds nothing.
      image_shape: height, width and channels of the images.
      dtype: dtype of the arithmetic of the convolutions; parameters and outputs are float32.

    Returns:
      The module, ``x (batch, height, width, channels), time (batch,) -> (batch, height, width, channels)``.

    Raises:
      ValueError: if an argument is out of its range.

    Example:
      >>> predict = lambda key, x, time: models.noise_predictor(key, image_shape=(8, 8, 1))(x, time)
      >>> jax.eval_shape(predict, jax.random.key(0), jnp.ones((2, 8, 8, 1)), jnp.array([0, 999])).shape
      (2, 8, 8, 1)

    Reference:
      Ho, Jain and Abbeel 2020, Denoising Diffusion Probabilistic Models, arXiv 2006.11239, whose network is a U-Net.
    """
    return NoisePredictor(key, image_shape=image_shape, width=width, depth=depth, fold=fold, dtype=dtype)


class ImageFunctional(NamedTuple):
    """A network that gives images, as pure functions and the arrays they start from.

    Attributes:
      apply: ``apply(state, *inputs, train=False) -> (image, state)``; the state is returned unchanged.
      outputs: ``outputs(state, *inputs) -> image``.
      state: the initial arrays, copied from the module; no batch statistics.
    """

    apply: Callable[..., tuple[Array, ModelState]]
    outputs: Callable[..., Array]
    state: ModelState


@functools.cache  # equal architectures get the same functions, so that jit does not trace them again
def _pure_functions(graph: nnx.GraphDef) -> tuple[Callable, Callable]:
    def outputs(state: ModelState, *inputs: Shaped[Array, "..."]) -> Float[Array, "batch height width channels"]:
        return nnx.merge(graph, nnx.restore_int_paths(state.params))(*inputs)

    def apply(
        state: ModelState, *inputs: Shaped[Array, "..."], train: bool = False
    ) -> tuple[Float[Array, "batch height width channels"], ModelState]:
        return outputs(state, *inputs), state

    return apply, outputs


@_arguments.checked
def image_functional(module: nnx.Module) -> ImageFunctional:
    """Makes pure functions of a Flax module that returns images, as :func:`functional` does for a classifier.

    Args:
      module: a module whose variables are all ``nnx.Param``; it is not changed.

    Returns:
      The pure functions, which can be static arguments of ``jax.jit``, and the module's state.

    Raises:
      ValueError: if the module has other kinds of variables.

    Example:
      >>> model = models.image_functional(models.denoiser(jax.random.key(0), width=4, depth=2, image_shape=(8, 8, 1)))
      >>> model.outputs(model.state, jnp.ones((2, 8, 8, 1))).shape
      (2, 8, 8, 1)
    """
    state = functional(module).state
    if state.batch_stats:
        raise ValueError("module must hold only nnx.Param variables, got batch statistics too.")
    return ImageFunctional(*_pure_functions(nnx.graphdef(module)), state)
