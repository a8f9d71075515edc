"""Residual networks: with a small stem for CIFAR, and with a large one for ImageNet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from robustjax import _arguments
from robustjax.models._classifier import Classifier, ImageShape
from robustjax.models._layers import Norm, conv, normalised

_CIFAR = (16, 32, 64)
_IMAGENET = (64, 128, 256, 512)


class _Shortcut(nnx.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = conv(inputs, outputs, 1, stride, dtype=dtype, rngs=rngs)
        self.norm = Norm(outputs, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        return normalised(self.conv, self.norm, x)


class _Block(nnx.Module):
    """Convolutions of the given sizes, each normalised, with the input added to their output."""

    def __init__(self, inputs: int, layers: Sequence[tuple[int, int, int]], *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, stride = inputs, 1
        self.convs, self.norms = nnx.List([]), nnx.List([])
        for size, outputs, step in layers:
            self.convs.append(conv(width, outputs, size, step, dtype=dtype, rngs=rngs))
            self.norms.append(Norm(outputs, rngs=rngs))
            width, stride = outputs, stride * step
        changes = stride != 1 or width != inputs
        self.shortcut = _Shortcut(inputs, width, stride, dtype=dtype, rngs=rngs) if changes else None
        self.width = width

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        y = x
        for index, (convolve, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = normalised(convolve, norm, y if index == 0 else nnx.relu(y))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


def _basic(width: int, stride: int) -> list[tuple[int, int, int]]:
    return [(3, width, stride), (3, width, 1)]


def _bottleneck(width: int, stride: int) -> list[tuple[int, int, int]]:
    return [(1, width, 1), (3, width, stride), (1, 4 * width, 1)]


class _ResNet(nnx.Module):
    def __init__(
        self,
        image_shape: ImageShape,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        *,
        block: Callable[[int, int], list[tuple[int, int, int]]],
        widths: tuple[int, ...],
        depths: tuple[int, ...],
        large_stem: bool,
    ):
        size, stride = (7, 2) if large_stem else (3, 1)
        self.large_stem = large_stem
        self.stem = conv(image_shape[-1], widths[0], size, stride, dtype=dtype, rngs=rngs)
        self.norm = Norm(widths[0], rngs=rngs)
        self.blocks = nnx.List([])
        inputs = widths[0]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for index in range(depth):
                layers = block(width, 2 if stage > 0 and index == 0 else 1)
                self.blocks.append(_Block(inputs, layers, dtype=dtype, rngs=rngs))
                inputs = layers[-1][1]
        self.num_features = inputs

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b dim"]:
        x = nnx.relu(normalised(self.stem, self.norm, x))
        if self.large_stem:
            x = nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x)
        return x.astype(jnp.float32).mean((1, 2))


@_arguments.checked
def resnet20(
    key: Key[Array, ""],
    *,
    image_shape: Sequence[int] = (32, 32, 3),
    num_classes: int = 10,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Classifier:
    """Residual network of 20 layers for CIFAR, with projections where the shape changes.

    272,474 parameters for RGB images and 10 classes.

    Args:
      key: typed PRNG key of the initial parameters.
      image_shape: height, width and channels of the images.
      num_classes: number of logits.
      mean: subtracted from the images, one number or one per channel.
      std: divides the images, likewise.
      dtype: dtype of the body's arithmetic; parameters, batch statistics and outputs are float32.

    Returns:
      The module, ``x (batch, height, width, channels) -> Outputs``; 64 features.

    Raises:
      ValueError: if an argument is out of its range.

    Example:
      >>> shapes = jax.eval_shape(lambda key: models.functional(models.resnet20(key)).state, jax.random.key(0))
      >>> models.num_parameters(shapes.params)
      272474

    Reference:
      He et al., Deep Residual Learning for Image Recognition, 2016, arXiv:1512.03385 (section 4.2);
      projections as in Cohen et al., Certified Adversarial Robustness via Randomized Smoothing, 2019, arXiv:1902.02918.
    """
    body = partial(_ResNet, block=_basic, widths=_CIFAR, depths=(3, 3, 3), large_stem=False)
    return Classifier(key, body, image_shape=image_shape, num_classes=num_classes, mean=mean, std=std, dtype=dtype)


@_arguments.checked
def resnet56(
    key: Key[Array, ""],
    *,
    image_shape: Sequence[int] = (32, 32, 3),
    num_classes: int = 10,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Classifier:
    """Residual network of 56 layers for CIFAR, with projections where the shape changes.

    855,770 parameters for RGB images and 10 classes.

    Args:
      key: typed PRNG key of the initial parameters.
      image_shape: height, width and channels of the images.
      num_classes: number of logits.
      mean: subtracted from the images, one number or one per channel.
      std: divides the images, likewise.
      dtype: dtype of the body's arithmetic; parameters, batch statistics and outputs are float32.

    Returns:
      The module, ``x (batch, height, width, channels) -> Outputs``; 64 features.

    Raises:
      ValueError: if an argument is out of its range.

    Reference:
      He et al., Deep Residual Learning for Image Recognition, 2016, arXiv:1512.03385 (section 4.2);
      projections as in Cohen et al., Certified Adversarial Robustness via Randomized Smoothing, 2019, arXiv:1902.02918.
    """
    body = partial(_ResNet, block=_basic, widths=_CIFAR, depths=(9, 9, 9), large_stem=False)
    return Classifier(key, body, image_shape=image_shape, num_classes=num_classes, mean=mean, std=std, dtype=dtype)


@_arguments.checked
def resnet110(
    key: Key[Array, ""],
    *,
    image_shape: Sequence[int] = (32, 32, 3),
    num_classes: int = 10,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Classifier:
    """Residual network of 110 layers for CIFAR, with projections where the shape changes.

    1,730,714 parameters for RGB images and 10 classes.

    Args:
      key: typed PRNG key of the initial parameters.
      image_shape: height, width and channels of the images.
      num_classes: number of logits.
      mean: subtracted from the images, one number or one per channel.
      std: divides the images, likewise.
      dtype: dtype of the body's arithmetic; parameters, batch statistics and outputs are float32.

    Returns:
      The module, ``x (batch, height, width, channels) -> Outputs``; 64 features.

    Raises:
      ValueError: if an argument is out of its range.

    Reference:
      He et al., Deep Residual Learning for Image Recognition, 2016, arXiv:1512.03385 (section 4.2);
      projections as in Cohen et al., Certified Adversarial Robustness via Randomized Smoothing, 2019, arXiv:1902.02918.
    """
    body = partial(_ResNet, block=_basic, widths=_CIFAR, depths=(18, 18, 18), large_stem=False)
    return Classifier(key, body, image_shape=image_shape, num_classes=num_classes, mean=mean, std=std, dtype=dtype)


@_arguments.checked
def resnet18(
    key: Key[Array, ""],
    *,
    image_shape: Sequence[int] = (224, 224, 3),
    num_classes: int = 10,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Classifier:
    """Residual network of 18 layers for ImageNet.

    11,689,512 parameters for RGB images and 1000 classes.

    Args:
      key: typed PRNG key of the initial parameters.
      image_shape: height, width and channels of the images.
      num_classes: number of logits.
      mean: subtracted from the images, one number or one per channel.
      std: divides the images, likewise.
      dtype: dtype of the body's arithmetic; parameters, batch statistics and outputs are float32.

    Returns:
      The module, ``x (batch, height, width, channels) -> Outputs``; 512 features.

    Raises:
      ValueError: if an argument is out of its range.

    Example:
      >>> init = lambda key: models.functional(models.resnet18(key, num_classes=1000)).state
      >>> shapes = jax.eval_shape(init, jax.random.key(0))
      >>> models.num_parameters(shapes.params)
      11689512

    Reference:
      He et al., Deep Residual Learning for Image Recognition, 2016, arXiv:1512.03385.
    """
    body = partial(_ResNet, block=_basic, widths=_IMAGENET, depths=(2, 2, 2, 2), large_stem=True)
    return Classifier(key, body, image_shape=image_shape, num_classes=num_classes, mean=mean, std=std, dtype=dtype)


@_arguments.checked
def resnet50(
    key: Key[Array, ""],
    *,
    image_shape: Sequence[int] = (224, 224, 3),
    num_classes: int = 10,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Classifier:
    """Residual network of 50 layers for ImageNet.

    25,557,032 parameters for RGB images and 1000 classes. A bottleneck strides in its 3x3 convolution, as
    torchvision does.

    Args:
      key: typed PRNG key of the initial parameters.
      image_shape: height, width and channels of the images.
      num_classes: number of logits.
      mean: subtracted from the images, one number or one per channel.
      std: divides the images, likewise.
      dtype: dtype of the body's arithmetic; parameters, batch statistics and outputs are float32.

    Returns:
      The module, ``x (batch, height, width, channels) -> Outputs``; 2048 features.

    Raises:
      ValueError: if an argument is out of its range.

    Reference:
      He et al., Deep Residual Learning for Image Recognition, 2016, arXiv:1512.03385.
    """
    body = partial(_ResNet, block=_bottleneck, widths=_IMAGENET, depths=(3, 4, 6, 3), large_stem=True)
    return Classifier(key, body, image_shape=image_shape, num_classes=num_classes, mean=mean, std=std, dtype=dtype)
