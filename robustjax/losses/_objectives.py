"""Objectives: ``(key, apply, state, batch) -> (scalar, Aux)``, differentiated with respect to ``state.params``.

An objective is a frozen dataclass, so that two with equal settings are equal, hash equal and share one compiled step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from robustjax import _arguments, _validate, perturbations
from robustjax.losses._classification import cross_entropy, normalized_cross_entropy, soft_cross_entropy
from robustjax.typing import Apply, Batch, ModelState


class Aux(NamedTuple):
    """What an objective reports besides its value.

    Attributes:
      state: the model with updated batch statistics.
      metrics: scalars by name; always ``loss``, and ``accuracy`` for classifiers.
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

    Example:
      >>> loss_fn = lambda params: losses.standard()(key, apply, state._replace(params=params), batch)
      >>> (loss, aux), gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(state.params)
      >>> f"loss {loss:.2f}, accuracy {aux.metrics['accuracy']:.2f}"
      'loss 0.23, accuracy 1.00'
    """

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the mean loss of ``batch``, and the updated state with metrics."""
        return _mean_loss(apply, state, batch.image, batch.label, cross_entropy)


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianAugmentation:
    r"""Mean cross-entropy on images with Gaussian noise, one draw per image and step.

    .. math:: \mathbb{E}_{z \sim \mathcal{N}(0, I)} \, \ell\bigl(f(x + \sigma z), y\bigr)

    Trains the base classifier for randomized smoothing at the same sigma. Noise is not clipped, and is drawn and
    added in float32, also for models that compute in bfloat16.

    Attributes:
      sigma: standard deviation of the noise, l2 in units of [0, 1] images.

    Example:
      >>> loss, aux = losses.smoothing.gaussian_augmentation(sigma=0.25)(key, apply, state, batch)
      >>> f"loss {loss:.2f}, accuracy {aux.metrics['accuracy']:.2f}"
      'loss 0.52, accuracy 0.50'

    Reference:
      Cohen, Rosenfeld, Kolter 2019, Certified Adversarial Robustness via Randomized Smoothing, arXiv 1902.02918.
    """

    sigma: float = 0.5

    def __post_init__(self):
        _validate.positive(sigma=self.sigma)

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the mean loss of the noisy ``batch``, and the updated state with metrics."""
        noisy = perturbations.gaussian_noise(jax.random.fold_in(key, 1), batch.image, sigma=self.sigma)
        return _mean_loss(apply, state, noisy, batch.label, cross_entropy)


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitNorm:
    r"""Mean cross-entropy of the logits scaled to norm ``1 / tau``.

    .. math:: \mathbb{E}\, \ell\Bigl(\frac{f(x)}{\tau \lVert f(x) \rVert_2},\, y\Bigr)

    Attributes:
      tau: temperature, 0.04 in the paper for CIFAR-10.

    Example:
      >>> loss, aux = losses.logit_norm(tau=0.5)(key, apply, state, batch)
      >>> f"loss {loss:.2f}, accuracy {aux.metrics['accuracy']:.2f}"
      'loss 0.06, accuracy 1.00'

    Reference:
      Wei et al. 2022, Mitigating Neural Network Overconfidence with Logit Normalization, arXiv 2205.09310.
    """

    tau: float = 0.04

    def __post_init__(self):
        _validate.positive(tau=self.tau)

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the mean loss of ``batch``, and the updated state with metrics."""
        return _mean_loss(
            apply, state, batch.image, batch.label, functools.partial(normalized_cross_entropy, tau=self.tau)
        )


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixup:
    """Mean cross-entropy on mixtures of two images, with the mixture of their labels as target.

    The metric ``accuracy`` counts a mixture as right by the share of the class that is answered.

    Attributes:
      num_classes: number of classes.
      alpha: of the Beta distribution of the share, see :func:`robustjax.perturbations.mixup`.

    Example:
      >>> loss, aux = losses.mixup(num_classes=2)(key, apply, state, batch)
      >>> f"loss {loss:.2f}, accuracy {aux.metrics['accuracy']:.2f}"
      'loss 0.73, accuracy 0.50'

    Reference:
      Zhang, Cisse, Dauphin and Lopez-Paz 2018, mixup: Beyond Empirical Risk Minimization, arXiv 1710.09412.
    """

    num_classes: int
    alpha: float = 1.0

    def __post_init__(self):
        _validate.at_least(2, num_classes=self.num_classes)
        _validate.positive(alpha=self.alpha)

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the mean loss of the mixed ``batch``, and the updated state with metrics."""
        mix_key = jax.random.fold_in(key, 1)
        mixed = perturbations.mixup(mix_key, batch.image, batch.label, num_classes=self.num_classes, alpha=self.alpha)
        return _mean_soft_cross_entropy(apply, state, mixed)


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class CutMix:
    """Mean cross-entropy on images with a box of another image pasted in, with the mixture of their labels as target.

    The metric ``accuracy`` counts a mixture as right by the share of the class that is answered.

    Attributes:
      num_classes: number of classes.
      alpha: of the Beta distribution of the share, see :func:`robustjax.perturbations.cutmix`.

    Example:
      >>> loss, aux = losses.cutmix(num_classes=2)(key, apply, state, batch)
      >>> f"loss {loss:.2f}, accuracy {aux.metrics['accuracy']:.2f}"
      'loss 0.23, accuracy 1.00'

    Reference:
      Yun et al. 2019, CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features,
      arXiv 1905.04899.
    """

    num_classes: int
    alpha: float = 1.0

    def __post_init__(self):
        _validate.at_least(2, num_classes=self.num_classes)
        _validate.positive(alpha=self.alpha)

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the mean loss of the mixed ``batch``, and the updated state with metrics."""
        mix_key = jax.random.fold_in(key, 1)
        mixed = perturbations.cutmix(mix_key, batch.image, batch.label, num_classes=self.num_classes, alpha=self.alpha)
        return _mean_soft_cross_entropy(apply, state, mixed)


@_arguments.checked
@dataclasses.dataclass(frozen=True)
class Augmented:
    """Any objective, computed on augmented images.

    Augmentation comes before everything that the objective itself does to images: noise, attacks, mixing.

    Attributes:
      augment: ``(key, images) -> images``; combine several with :func:`robustjax.perturbations.compose`.
      objective: the objective that sees the augmented images.

    Raises:
      ValueError: one of them cannot be called.

    Example:
      >>> augment = perturbations.random_horizontal_flip
      >>> objective = losses.augmented(augment, losses.smoothing.gaussian_augmentation(sigma=0.25))
      >>> loss, aux = objective(key, apply, state, batch)
      >>> f"loss {loss:.2f}, accuracy {aux.metrics['accuracy']:.2f}"
      'loss 0.13, accuracy 1.00'
    """

    augment: Augment
    objective: Objective

    def __post_init__(self):
        for name, wanted in (("augment", "(key, images)"), ("objective", "(key, apply, state, batch)")):
            if not callable(value := getattr(self, name)):
                raise ValueError(f"{name} must be a function of {wanted}, got {value!r}.")

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss of the augmented ``batch``, and the updated state with metrics."""
        augment_key, key = jax.random.split(key)
        return self.objective(key, apply, state, batch._replace(image=self.augment(augment_key, batch.image)))


standard = Standard
gaussian_augmentation = GaussianAugmentation
logit_norm = LogitNorm
mixup = Mixup
cutmix = CutMix
augmented = Augmented


def _mean_loss(
    apply: Apply, state: ModelState, images: Array, labels: Array, loss_of: Callable[[Array, Array], Array]
) -> tuple[Array, Aux]:
    outputs, state = apply(state, images, train=True)
    loss = loss_of(outputs.logits, labels).mean()
    accuracy = (outputs.logits.argmax(-1) == labels).mean(dtype=jnp.float32)
    return loss, Aux(state, {"loss": loss, "accuracy": accuracy})


def _mean_soft_cross_entropy(apply: Apply, state: ModelState, mixed: perturbations.Mixed) -> tuple[Array, Aux]:
    outputs, state = apply(state, mixed.image, train=True)
    loss = soft_cross_entropy(outputs.logits, mixed.label_probabilities).mean()
    answer = outputs.logits.argmax(-1, keepdims=True)
    accuracy = jnp.take_along_axis(mixed.label_probabilities, answer, axis=-1).mean()
    return loss, Aux(state, {"loss": loss, "accuracy": accuracy})
