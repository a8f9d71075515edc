"""Classifiers of several views, whose logits are weighted sums of what each view says."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Key, Shaped

from robustjax import _arguments, _validate
from robustjax.models._initializers import drawn, variance_scaling, zeros
from robustjax.typing import Outputs

# Fan-in of each matrix of a stack; as torch_init otherwise.
_stacked_init = variance_scaling(1 / 3, "fan_in", "uniform", stacked=True)


class Multimodal(nnx.Module):
    """Classifier of images cut into vertical strips; see :func:`multimodal`."""

    def __init__(
        self,
        key: Key[Array, ""],
        *,
        hidden: int | None,
        num_modalities: int,
        image_shape: Sequence[int],
        num_classes: int,
    ):
        _validate.key(key)
        _validate.at_least(1, num_modalities=num_modalities, num_classes=num_classes)
        if hidden is not None:
            _validate.at_least(2, hidden=hidden)  # a row of one unit has no norm without its mean
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise ValueError(f"image_shape must be a positive (height, width, channels), got {tuple(image_shape)}.")
        height, width, channels = image_shape
        if width % num_modalities:
            raise ValueError(f"num_modalities must divide the width {width} of the images, got {num_modalities}.")
        self.image_shape, self.num_modalities = (height, width, channels), num_modalities
        pixels = math.prod(image_shape) // num_modalities
        self.hidden = hidden is not None
        kernel_key, row_key = jax.random.split(key)
        if hidden is not None:
            self.kernel = nnx.Param(_stacked_init(kernel_key, (num_modalities, pixels, hidden), jnp.float32))
            self.hidden_bias = nnx.Param(zeros(None, (num_modalities, hidden)))
        size = pixels if hidden is None else hidden
        shape = (num_modalities, num_classes, size)
        self.rows = nnx.Param(drawn(row_key, 1.0, distribution="normal", shape=shape) / math.sqrt(size))
        self.weights = nnx.Param(jnp.asarray(np.full((num_modalities, num_classes), 0.1, np.float32)))
        self.bias = nnx.Param(zeros(None, (num_classes,)))

    def __call__(self, x: Shaped[Array, "..."]) -> Outputs:
        r"""Logits, and what each modality says of each class.

        Args:
          x: ``(batch, height, width, channels)``, floating point, in [0, 1].

        Returns:
          ``logits (batch, num_classes)``, and as ``features (batch, modalities * classes)`` the :math:`\zeta_{mk}`, one
          modality after another; both float32.

        Raises:
          ValueError: if ``x`` has another shape or dtype.
        """
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.shape[1:] != self.image_shape:
            wanted = ", ".join(map(str, self.image_shape))
            raise ValueError(f"x must be floating point of shape (batch, {wanted}), got {x.dtype} of {x.shape}.")
        height, width, channels = self.image_shape
        strips = x.astype(jnp.float32).reshape(-1, height, self.num_modalities, width // self.num_modalities, channels)
        phi = jnp.moveaxis(strips, 2, 1).reshape(x.shape[0], self.num_modalities, -1)
        if self.hidden:
            phi = nnx.relu(jnp.einsum("bmp,mph->bmh", phi, self.kernel[...]) + self.hidden_bias[...][None])
        rows = self.rows[...] - self.rows[...].mean(-1, keepdims=True)
        rows = rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)
        scores = jnp.einsum("bmh,mkh->bmk", phi, rows)
        logits = (self.weights[...][None] * scores).sum(1) + self.bias[...][None]
        return Outputs(logits, scores.reshape(x.shape[0], -1))


@_arguments.checked
def multimodal(
    key: Key[Array, ""],
    *,
    hidden: int | None = 128,
    num_modalities: int = 2,
    image_shape: Sequence[int] = (28, 28, 1),
    num_classes: int = 10,
) -> Multimodal:
    r"""Classifier of images cut into vertical strips, the modalities, each with its own encoder.

    .. math:: h_k(x) = \sum_m a_{mk}\, \zeta_{mk}(x_m) + b_k, \qquad
              \zeta_{mk} = \Bigl\langle \frac{W_{mk}}{\lVert W_{mk} \rVert_2}, \phi_m(x_m) \Bigr\rangle

    with rows :math:`W_{mk}` of mean 0 and :math:`\phi_m(x_m) = \max(0, V_m^\top x_m + c_m)`, or the pixels themselves.
    A row of norm 1 does not stretch: each :math:`\zeta_{mk}` has the Lipschitz constant :math:`\lVert V_m \rVert_2`.

    The parameters, by name: ``kernel`` V, ``(modalities, pixels, hidden)``, and ``hidden_bias`` c, if there is a hidden
    layer; ``rows`` W, ``(modalities, classes, hidden)``; ``weights`` a, ``(modalities, classes)``; ``bias`` b.

    Args:
      key: typed PRNG key of the initial parameters.
      hidden: units of each encoder, with ReLU; None for linear ones.
      num_modalities: strips, which must divide the width of the images; 2 for a left and a right half.
      image_shape: height, width and channels of the images.
      num_classes: number of logits.

    Returns:
      The module, ``x (batch, height, width, channels) -> Outputs``, with the
      :math:`\zeta_{mk}` as features, one modality after another.

    Raises:
      ValueError: if an argument is out of its range.

    Example:
      >>> classify = lambda key, x: models.multimodal(key, image_shape=(8, 8, 1))(x)  # a left and a right half
      >>> outputs = jax.eval_shape(classify, jax.random.key(0), jnp.ones((2, 8, 8, 1)))
      >>> outputs.features.shape  # two modalities of ten classes
      (2, 20)

    Reference:
      Yang et al. 2024, Quantifying and Enhancing Multi-modal Robustness with Modality Preference, arXiv 2402.06244 (the
      last layer).
    """
    return Multimodal(
        key, hidden=hidden, num_modalities=num_modalities, image_shape=image_shape, num_classes=num_classes
    )
