"""Wide residual networks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from robustjax import _arguments, _validate
from robustjax.models._classifier import Classifier, ImageShape
from robustjax.models._layers import Norm, conv, normalised


class _Block(nnx.Module):
    """Normalisation and ReLU before each of two convolutions; a projection comes after the first of them too."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1 = Norm(inputs, rngs=rngs)
        self.conv1 = conv(inputs, outputs, 3, stride, dtype=dtype, rngs=rngs)
        self.norm2 = Norm(outputs, rngs=rngs)
        self.conv2 = conv(outputs, outputs, 3, dtype=dtype, rngs=rngs)
        self.shortcut = conv(inputs, outputs, 1, stride, dtype=dtype, rngs=rngs) if inputs != outputs else None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        active = nnx.relu(self.norm1(x))
        y = self.conv2(nnx.relu(normalised(self.conv1, self.norm2, active)))
        return y + (x if self.shortcut is None else self.shortcut(active))


class _WideResNet(nnx.Module):
    def __init__(self, image_shape: ImageShape, dtype: DTypeLike, rngs: nnx.Rngs, *, depth: int, width: int):
        self.stem = conv(image_shape[-1], 16, 3, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([])
        inputs = 16
        for stage in range(3):
            outputs = 16 * width * 2**stage
            for index in range((depth - 4) // 6):
                stride = 2 if stage > 0 and index == 0 else 1
                self.blocks.append(_Block(inputs, outputs, stride, dtype=dtype, rngs=rngs))
                inputs = outputs
        self.norm = Norm(inputs, rngs=rngs)
        self.num_features = inputs

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b dim"]:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return nnx.relu(self.norm(x)).astype(jnp.float32).mean((1, 2))


@_arguments.checked
def wide_resnet(
    key: Key[Array, ""],
    *,
    depth: int = 28,
    width: int = 10,
    image_shape: Sequence[int] = (32, 32, 3),
    num_classes: int = 10,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Classifier:
    """Wide residual network, pre-activation and without dropout.

    36,479,194 parameters for depth 28, width 10, RGB images and 10 classes.

    Args:
      key: typed PRNG key of the initial parameters.
      depth: number of layers, 4 more than a multiple of 6.
      width: factor on the 16, 32 and 64 channels of the thin network.
      image_shape: height, width and channels of the images.
      num_classes: number of logits.
      mean: subtracted from the images, one number or one per channel.
      std: divides the images, likewise.
      dtype: dtype of the body's arithmetic; parameters, batch statistics and outputs are float32.

    Returns:
      The module, ``x (batch, height, width, channels) -> Outputs``; ``64 * width`` features.

    Raises:
      ValueError: if an argument is out of its range.

    Example:
      >>> shapes = jax.eval_shape(lambda key: models.functional(models.wide_resnet(key)).state, jax.random.key(0))
      >>> models.num_parameters(shapes.params)
      36479194

    Reference:
      Zagoruyko & Komodakis, Wide Residual Networks, 2016, arXiv:1605.07146.
    """
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"depth must be 6n + 4 with n at least 1, got {depth}.")
    _validate.at_least(1, width=width)
    body = partial(_WideResNet, depth=depth, width=width)
    return Classifier(key, body, image_shape=image_shape, num_classes=num_classes, mean=mean, std=std, dtype=dtype)
