"""The parts that all models share: input checks, normalisation, a body that computes features, a linear head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, Shaped

from robustjax import _validate
from robustjax.models._initializers import variance_scaling, zeros
from robustjax.typing import Outputs

ImageShape = tuple[int, int, int]
"""Height, width, channels."""


class Body(Protocol):
    """The part between normalisation and head: an ``nnx.Module`` that knows its number of features."""

    num_features: int

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch dim"]:
        """Features of normalised images."""
        ...


# Uniform in +-1/sqrt(fan_in), as PyTorch's layers and so the models of published recipes start. He's weights have 6
# times the variance: under noise of sigma 1 the units of a LeNet die in the first steps.
torch_init = variance_scaling(1 / 3, "fan_in", "uniform")


def _per_channel(name: str, value: float | Sequence[float], channels: int) -> tuple[float, ...]:
    values = (float(value),) * channels if isinstance(value, (int, float)) else tuple(float(v) for v in value)
    if len(values) != channels or not all(map(math.isfinite, values)):
        raise ValueError(f"{name} must be a finite number, or one for each of {channels} channels, got {value!r}.")
    return values


class Classifier(nnx.Module):
    r"""Image classifier that normalises its input: :math:`W\,f((x - \mu) / \sigma) + b`.

    Normalisation and head are computed in float32 whatever ``dtype`` is, on every device, so that rounding removes
    neither the noise on an image nor the difference between two logits. The constants :math:`\mu, \sigma` are not
    parameters.

    Args:
      key: typed PRNG key of the initial parameters.
      body: builds :math:`f` from the image shape, the compute dtype and the random streams.
      image_shape: height, width and channels of the images.
      num_classes: number of logits.
      mean: :math:`\mu`, one number or one per channel, in units of the images.
      std: :math:`\sigma`, likewise.
      dtype: dtype in which ``body`` computes; its parameters and all outputs are float32.

    Raises:
      ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        key: Key[Array, ""],
        body: Callable[[ImageShape, DTypeLike, nnx.Rngs], Body],
        *,
        image_shape: Sequence[int],
        num_classes: int,
        mean: float | Sequence[float],
        std: float | Sequence[float],
        dtype: DTypeLike,
    ):
        _validate.key(key)
        _validate.at_least(1, num_classes=num_classes)
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise ValueError(f"image_shape must be a positive (height, width, channels), got {tuple(image_shape)}.")
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"dtype must be floating point, got {jnp.dtype(dtype)}.")
        height, width, channels = image_shape
        self.image_shape = (height, width, channels)
        self.mean = _per_channel("mean", mean, channels)
        self.std = _per_channel("std", std, channels)
        _validate.positive(std=min(self.std))
        self.dtype = jnp.dtype(dtype)
        rngs = nnx.Rngs(params=key)
        self.body = body(self.image_shape, self.dtype, rngs)
        exact = jax.lax.Precision.HIGHEST  # the default is bfloat16 on a TPU, and TF32 on a GPU
        start = {"kernel_init": torch_init, "bias_init": zeros}
        self.head = nnx.Linear(self.body.num_features, num_classes, precision=exact, **start, rngs=rngs)

    def __call__(self, x: Shaped[Array, "..."]) -> Outputs:
        """Logits and features of a batch of images.

        Args:
          x: ``(batch, height, width, channels)``, floating point, in [0, 1].

        Returns:
          ``logits (batch, num_classes)`` and ``features (batch, dim)``, the input of the head; both float32.

        Raises:
          ValueError: if ``x`` has another shape or dtype.
        """
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x must be floating point, got {x.dtype} of shape {x.shape}.")
        if x.shape[1:] != self.image_shape:
            wanted = ", ".join(map(str, self.image_shape))
            raise ValueError(f"x must have shape (batch, {wanted}), got {x.shape}.")
        mean, std = (jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1) for values in (self.mean, self.std))
        normalised = (jnp.asarray(x, jnp.float32) - mean) / std
        features = self.body(normalised.astype(self.dtype)).astype(jnp.float32)
        return Outputs(self.head(features), features)
