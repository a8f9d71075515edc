"""Objectives: ``(key, apply, state, batch) -> (scalar, Aux)``, differentiated with respect to ``state.params``.

An objective is a frozen dataclass, so that two with equal settings are equal, hash equal and share one compiled step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from robustjax import _validate
from robustjax.losses._classification import cross_entropy
from robustjax.perturbations import gaussian_noise
from robustjax.typing import Apply, Batch, ModelState


class Aux(NamedTuple):
    """What an objective reports beside its value.

    Attributes:
      state: the model with renewed batch statistics.
      metrics: scalars by name; ``loss`` and ``accuracy`` always.
    """

    state: ModelState
    metrics: dict[str, Float[Array, ""]]


Augment: TypeAlias = Callable[[Array, Array], Array]
"""``(key, images) -> images``."""

Objective: TypeAlias = Callable[[Array, Apply, ModelState, Batch], tuple[Array, Aux]]
"""``(key, apply, state, batch) -> (scalar, Aux)``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standard:
    """Mean cross-entropy on the images as they are.

    Attributes:
      augment: ``(key, images) -> images``, applied first; None for none.
    """

    augment: Augment | None = None

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the mean loss of ``batch``, and the renewed state with metrics."""
        images = batch.image if self.augment is None else self.augment(key, batch.image)
        return _mean_cross_entropy(apply, state, images, batch.label)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianAugmentation:
    r"""Mean cross-entropy on images with Gaussian noise, one draw per image and step.

    .. math:: \mathbb{E}_{z \sim \mathcal{N}(0, I)} \, \ell\bigl(f(x + \sigma z), y\bigr)

    Trains the base classifier for randomized smoothing at the same sigma. Noise comes after ``augment``, is not
    clipped, and is drawn and added in float32 also for models that compute in bfloat16.

    Attributes:
      sigma: standard deviation of the noise, l2 in units of [0, 1] images.
      augment: ``(key, images) -> images``, applied before the noise; None for none.

    Reference:
      Cohen, Rosenfeld, Kolter 2019, Certified Adversarial Robustness via Randomized Smoothing, arXiv 1902.02918.
    """

    sigma: float = 0.5
    augment: Augment | None = None

    def __post_init__(self):
        _validate.positive(sigma=self.sigma)

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the mean loss of the noisy ``batch``, and the renewed state with metrics."""
        augment_key, noise_key = jax.random.split(key)
        images = batch.image if self.augment is None else self.augment(augment_key, batch.image)
        noisy = gaussian_noise(noise_key, images, sigma=self.sigma)
        return _mean_cross_entropy(apply, state, noisy, batch.label)


standard = Standard
gaussian_augmentation = GaussianAugmentation


def _mean_cross_entropy(apply: Apply, state: ModelState, images: Array, labels: Array) -> tuple[Array, Aux]:
    outputs, state = apply(state, images, train=True)
    loss = cross_entropy(outputs.logits, labels).mean()
    accuracy = (outputs.logits.argmax(-1) == labels).mean(dtype=jnp.float32)
    return loss, Aux(state, {"loss": loss, "accuracy": accuracy})
