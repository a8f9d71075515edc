"""Mixtures of two images of a batch, with labels mixed in the same proportion."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from robustjax import _arguments, _validate


class Mixed(NamedTuple):
    """Mixed images and their labels.

    Attributes:
      image: ``(batch, height, width, channels)``, in the dtype of the given images.
      label_probabilities: ``(batch, classes)``, float32, rows that sum to 1.
    """

    image: Float[Array, "batch height width channels"]
    label_probabilities: Float[Array, "batch classes"]


@_arguments.checked
def mixup(
    key: Key[Array, ""],
    images: Float[Array, "batch height width channels"],
    labels: Int[Array, " batch"],
    *,
    num_classes: int,
    alpha: float | Float[Array, ""] = 1.0,
) -> Mixed:
    r"""Mixes each image with another image of the batch, pixel by pixel.

    .. math:: \lambda x + (1 - \lambda) x_{\pi}, \qquad \lambda\, e_y + (1 - \lambda)\, e_{y_\pi},
       \qquad \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    with one random permutation :math:`\pi` and, as in the authors' code, one :math:`\lambda` for the whole batch.

    Args:
      key: typed PRNG key.
      images: ``(batch, height, width, channels)``.
      labels: ``(batch,)``, in ``0, ..., num_classes - 1``; other labels give probabilities of NaN.
      num_classes: number of classes, at least 2.
      alpha: of the Beta distribution, positive; may be traced.

    Returns:
      The mixed images and labels.

    Raises:
      ValueError: a shape does not fit, or a setting is out of range.

    Example:
      >>> x, labels = jnp.stack([jnp.zeros((8, 8, 1)), jnp.ones((8, 8, 1))]), jnp.array([0, 1])
      >>> mixed = perturbations.mixup(jax.random.key(4), x, labels, num_classes=2)
      >>> print(mixed.image[:, 0, 0, 0], mixed.label_probabilities[:, 1])
      [0.37 0.63] [0.37 0.63]

    Reference:
      Zhang, Cisse, Dauphin and Lopez-Paz 2018, mixup: Beyond Empirical Risk Minimization, arXiv 1710.09412.
    """
    _check(images, labels, num_classes, alpha)
    beta_key, order_key = jax.random.split(key)
    kept = jax.random.beta(beta_key, alpha, alpha, dtype=jnp.float32)
    partner = jax.random.permutation(order_key, images.shape[0])
    share = kept.astype(images.dtype)
    mixed = share * images + (1 - share) * images[partner]
    return Mixed(mixed, _mixed_labels(labels, partner, kept, num_classes))


@_arguments.checked
def cutmix(
    key: Key[Array, ""],
    images: Float[Array, "batch height width channels"],
    labels: Int[Array, " batch"],
    *,
    num_classes: int,
    alpha: float | Float[Array, ""] = 1.0,
) -> Mixed:
    r"""Pastes a box of another image of the batch into each image.

    .. math:: m \odot x + (1 - m) \odot x_{\pi}, \qquad \bar m\, e_y + (1 - \bar m)\, e_{y_\pi}

    The mask :math:`m` is 0 in a box around a uniformly drawn pixel; its sides are :math:`\sqrt{1 - \lambda}` times the
    image's, :math:`\lambda \sim \mathrm{Beta}(\alpha, \alpha)`, and the border cuts it off. Labels are mixed by the
    mean :math:`\bar m` of the mask, the share of pixels that stay, and not by :math:`\lambda`. As in the authors' code,
    there is one box for the whole batch, and sides with an odd number of pixels are one pixel shorter.

    Args:
      key: typed PRNG key.
      images: ``(batch, height, width, channels)``.
      labels: ``(batch,)``, in ``0, ..., num_classes - 1``; other labels give probabilities of NaN.
      num_classes: number of classes, at least 2.
      alpha: of the Beta distribution, positive; may be traced.

    Returns:
      The mixed images and labels.

    Raises:
      ValueError: a shape does not fit, or a setting is out of range.

    Example:
      >>> x, labels = jnp.stack([jnp.zeros((8, 8, 1)), jnp.ones((8, 8, 1))]), jnp.array([0, 1])
      >>> mixed = perturbations.cutmix(jax.random.key(4), x, labels, num_classes=2)
      >>> print(mixed.image.mean((1, 2, 3)), mixed.label_probabilities[:, 1])  # shares of pixels are the labels
      [0.25 0.75] [0.25 0.75]

    Reference:
      Yun et al. 2019, CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features,
      arXiv 1905.04899.
    """
    _check(images, labels, num_classes, alpha)
    _validate.channels_last(images=images)
    beta_key, order_key, row_key, column_key = jax.random.split(key, 4)
    side = jnp.sqrt(1 - jax.random.beta(beta_key, alpha, alpha, dtype=jnp.float32))

    def inside(key, length):
        centre = jax.random.randint(key, (), 0, length)
        half = (side * length).astype(jnp.int32) // 2
        position = jnp.arange(length)
        return (position >= centre - half) & (position < centre + half)

    height, width = images.shape[1:3]
    box = inside(row_key, height)[:, None] & inside(column_key, width)[None, :]
    partner = jax.random.permutation(order_key, images.shape[0])
    mixed = jnp.where(box[None, :, :, None], images[partner], images)
    return Mixed(mixed, _mixed_labels(labels, partner, jnp.mean(~box, dtype=jnp.float32), num_classes))


def _check(images: Array, labels: Array, num_classes: int, alpha: float | Array) -> None:
    if images.ndim != 4:
        raise ValueError(f"images must be (batch, height, width, channels), got shape {images.shape}.")
    if labels.shape != images.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be ({images.shape[0]},) integers to match the images, "
            f"got {labels.dtype} of shape {labels.shape}."
        )
    _validate.at_least(2, num_classes=num_classes)
    _validate.positive(alpha=alpha)


def _mixed_labels(labels: Array, partner: Array, kept: Array, num_classes: int) -> Array:
    known = (labels >= 0) & (labels < num_classes)
    one_hot = jnp.where(known[:, None], jax.nn.one_hot(labels, num_classes, dtype=jnp.float32), jnp.nan)
    return kept * one_hot + (1 - kept) * one_hot[partner]
