"""Small models without batch normalisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from robustjax import _arguments
from robustjax.models._classifier import Classifier, ImageShape, torch_init
from robustjax.models._convolution import conv_general_dilated
from robustjax.models._initializers import zeros
from robustjax.models._layers import max_pool


def _flatten(x: Float[Array, "b h w c"]) -> Float[Array, "b h*w*c"]:
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


class _Mlp(nnx.Module):
    def __init__(self, image_shape: ImageShape, dtype: DTypeLike, rngs: nnx.Rngs, *, hidden: tuple[int, ...]):
        widths = (math.prod(image_shape), *hidden)
        self.dense = nnx.List(
            [
                nnx.Linear(inputs, outputs, dtype=dtype, kernel_init=torch_init, bias_init=zeros, rngs=rngs)
                for inputs, outputs in zip(widths[:-1], widths[1:], strict=True)
            ]
        )
        self.num_features = widths[-1]

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b dim"]:
        x = _flatten(x)
        for dense in self.dense:
            x = nnx.relu(dense(x))
        return x


class _ConvNet(nnx.Module):
    """Two blocks of convolution, pooling (unless convolutions have a stride) and ReLU; then a dense layer with ReLU."""

    def __init__(
        self,
        image_shape: ImageShape,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        *,
        channels: tuple[int, int],
        kernel: int,
        padding: str,
        dense: int,
        stride: int = 1,
    ):
        height, width, inputs = image_shape
        lost, self.pools = kernel - 1 if padding == "VALID" else 0, stride == 1
        least = 3 * lost + 4 if self.pools else (stride + 1) * lost + 1
        if min(height, width) < least:
            raise ValueError(f"image_shape must be at least {least} pixels high and wide, got {image_shape}.")
        if self.pools:
            height, width = (((n - lost) // 2 - lost) // 2 for n in (height, width))
        else:
            height, width = ((n - lost - 1) // stride + 1 - lost for n in (height, width))
        layer = partial(
            nnx.Conv,
            kernel_size=(kernel, kernel),
            padding=padding,
            dtype=dtype,
            kernel_init=torch_init,
            bias_init=zeros,
            conv_general_dilated=conv_general_dilated,
            rngs=rngs,
        )
        self.conv1 = layer(inputs, channels[0], strides=stride)
        self.conv2 = layer(channels[0], channels[1])
        flat = height * width * channels[1]
        self.dense = nnx.Linear(flat, dense, dtype=dtype, kernel_init=torch_init, bias_init=zeros, rngs=rngs)
        self.num_features = dense

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b dim"]:
        for conv in (self.conv1, self.conv2):
            x = conv(x)
            x = nnx.relu(max_pool(x) if self.pools else x)  # the same as pooling after ReLU, on a quarter of the pixels
        return nnx.relu(self.dense(_flatten(x)))


@_arguments.checked
def mlp(
    key: Key[Array, ""],
    *,
    hidden: Sequence[int] = (128, 128),
    image_shape: Sequence[int] = (28, 28, 1),
    num_classes: int = 10,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Classifier:
    """Multi-layer perceptron with ReLU; without hidden layers, a linear classifier.

    Args:
      key: typed PRNG key of the initial parameters.
      hidden: widths of the hidden layers.
      image_shape: height, width and channels of the images.
      num_classes: number of logits.
      mean: subtracted from the images, one number or one per channel.
      std: divides the images, likewise.
      dtype: dtype of the body's arithmetic; parameters and outputs are float32.

    Returns:
      The module, ``x (batch, height, width, channels) -> Outputs``.

    Raises:
      ValueError: if an argument is out of its range.

    Example:
      >>> module = models.mlp(jax.random.key(0), hidden=(16,), image_shape=(8, 8, 1))
      >>> module(jnp.ones((2, 8, 8, 1))).features.shape
      (2, 16)
    """
    if any(width < 1 for width in hidden):
        raise ValueError(f"hidden must be positive widths, got {tuple(hidden)}.")
    body = partial(_Mlp, hidden=tuple(hidden))
    return Classifier(key, body, image_shape=image_shape, num_classes=num_classes, mean=mean, std=std, dtype=dtype)


@_arguments.checked
def lenet(
    key: Key[Array, ""],
    *,
    image_shape: Sequence[int] = (28, 28, 1),
    num_classes: int = 10,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Classifier:
    """LeNet of the randomized-smoothing literature: 20 and 50 kernels of 5x5 without padding, 500 hidden units.

    431,080 parameters for 28x28x1 images and 10 classes.

    Args:
      key: typed PRNG key of the initial parameters.
      image_shape: height, width and channels of the images, at least 16 pixels high and wide.
      num_classes: number of logits.
      mean: subtracted from the images, one number or one per channel.
      std: divides the images, likewise.
      dtype: dtype of the body's arithmetic; parameters and outputs are float32.

    Returns:
      The module, ``x (batch, height, width, channels) -> Outputs``; 500 features.

    Raises:
      ValueError: if an argument is out of its range.

    Example:
      >>> shapes = jax.eval_shape(lambda key: models.functional(models.lenet(key)).state, jax.random.key(0))
      >>> models.num_parameters(shapes.params)
      431080

    Reference:
      Zhai et al., MACER: Attack-free and Scalable Robust Training via Maximizing Certified Radius, 2020,
      arXiv:2001.02378 (the network for MNIST).
    """
    body = partial(_ConvNet, channels=(20, 50), kernel=5, padding="VALID", dense=500)
    return Classifier(key, body, image_shape=image_shape, num_classes=num_classes, mean=mean, std=std, dtype=dtype)


@_arguments.checked
def cnn(
    key: Key[Array, ""],
    *,
    image_shape: Sequence[int] = (28, 28, 1),
    num_classes: int = 10,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Classifier:
    """Small convolutional network: 32 and 64 kernels of 3x3, each pooled by 2, and 128 hidden units.

    421,642 parameters for 28x28x1 images and 10 classes.

    Args:
      key: typed PRNG key of the initial parameters.
      image_shape: height, width and channels of the images, at least 4 pixels high and wide.
      num_classes: number of logits.
      mean: subtracted from the images, one number or one per channel.
      std: divides the images, likewise.
      dtype: dtype of the body's arithmetic; parameters and outputs are float32.

    Returns:
      The module, ``x (batch, height, width, channels) -> Outputs``; 128 features.

    Raises:
      ValueError: if an argument is out of its range.

    Example:
      >>> shapes = jax.eval_shape(lambda key: models.functional(models.cnn(key)).state, jax.random.key(0))
      >>> models.num_parameters(shapes.params)
      421642
    """
    body = partial(_ConvNet, channels=(32, 64), kernel=3, padding="SAME", dense=128)
    return Classifier(key, body, image_shape=image_shape, num_classes=num_classes, mean=mean, std=std, dtype=dtype)


@_arguments.checked
def strided_cnn(
    key: Key[Array, ""],
    *,
    image_shape: Sequence[int] = (28, 28, 1),
    num_classes: int = 10,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Classifier:
    """Small convolutional network without pooling, the "small" network of interval bound propagation.

    16 kernels of 4x4 with stride 2 and 32 of 4x4, without padding, and 100 hidden units; 329,606 parameters for 28x28x1
    images and 10 classes.

    Args:
      key: typed PRNG key of the initial parameters.
      image_shape: height, width and channels of the images, at least 10 pixels high and wide.
      num_classes: number of logits.
      mean: subtracted from the images, one number or one per channel.
      std: divides the images, likewise.
      dtype: dtype of the body's arithmetic; parameters and outputs are float32.

    Returns:
      The module, ``x (batch, height, width, channels) -> Outputs``; 100 features.

    Raises:
      ValueError: if an argument is out of its range.

    Example:
      >>> shapes = jax.eval_shape(lambda key: models.functional(models.strided_cnn(key)).state, jax.random.key(0))
      >>> models.num_parameters(shapes.params)
      329606

    Reference:
      Gowal et al., On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust Models, 2018,
      arXiv:1810.12715.
    """
    body = partial(_ConvNet, channels=(16, 32), kernel=4, padding="VALID", dense=100, stride=2)
    return Classifier(key, body, image_shape=image_shape, num_classes=num_classes, mean=mean, std=std, dtype=dtype)
