"""Adversarial training: objectives that look for bad inputs, or bad weights, before they take the loss."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from robustjax import _validate
from robustjax.losses._adversarial import boosted_cross_entropy, entropy, kl_divergence
from robustjax.losses._classification import cross_entropy
from robustjax.losses._objectives import Aux
from robustjax.typing import Apply, Batch, LogitsFn, ModelState

Adversary: TypeAlias = Callable[[Array, LogitsFn, Array, Array], Array]
"""``(key, logits_fn, x, labels) -> x_adv``; those of :mod:`robustjax.attacks` best with ``keep="last"``."""


class Examples(NamedTuple):
    """Images of a batch and their adversarial twins.

    Attributes:
      clean: ``(batch, height, width, channels)``.
      adversarial: of the same shape; constants to differentiation.
      label: ``(batch,)``, int32.
    """

    clean: Float[Array, "batch height width channels"]
    adversarial: Float[Array, "batch height width channels"]
    label: Int[Array, " batch"]


@runtime_checkable
class AdversarialObjective(Protocol):
    """An objective in two halves: the attack, and the loss of what it found."""

    def examples(self, key: Array, apply: Apply, state: ModelState, batch: Batch) -> Examples:
        """Attacks the model."""
        ...

    def loss(self, apply: Apply, state: ModelState, examples: Examples) -> tuple[Array, Aux]:
        """Returns the mean loss, and the renewed state with metrics."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialTraining:
    r"""Mean cross-entropy on adversarial images.

    .. math:: \mathbb{E}\, \ell\bigl(f(x'), y\bigr), \qquad x' = \mathrm{attack}(f, x, y)

    The model sees no clean images: both metrics of accuracy are that on adversarial ones.

    Attributes:
      attack: what makes the images; in the paper for CIFAR-10
        ``attacks.pgd(epsilon=8/255, steps=7, step_size=2/255, keep="last")``.

    Reference:
      Madry et al. 2018, Towards Deep Learning Models Resistant to Adversarial Attacks, arXiv 1706.06083.
    """

    attack: Adversary

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the mean loss of ``batch``, and the renewed state with metrics."""
        return self.loss(apply, state, self.examples(key, apply, state, batch))

    def examples(self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch) -> Examples:
        """Attacks the model."""
        return _attacked(key, apply, state, batch, self.attack)

    def loss(self, apply: Apply, state: ModelState, examples: Examples) -> tuple[Float[Array, ""], Aux]:
        """Returns the mean loss, and the renewed state with metrics."""
        outputs, state = apply(state, examples.adversarial, train=True)
        loss = cross_entropy(outputs.logits, examples.label).mean()
        accuracy = _accuracy(outputs.logits, examples.label)
        return loss, Aux(state, {"loss": loss, "accuracy": accuracy, "robust_accuracy": accuracy})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TRADES:
    r"""Mean cross-entropy on clean images, and the divergence of the prediction for an adversarial image from theirs.

    .. math:: \mathbb{E}\, \ell\bigl(f(x), y\bigr) + \beta\, \mathbb{E}\, \mathrm{KL}\bigl(p(x) \,\|\, p(x')\bigr)

    Gradients flow through both predictions. The attack raises the same divergence and knows no labels: it is given the
    logits of the clean images in their place, and its loss must be :func:`kl_divergence`. That has no gradient at x
    itself, so that it has to start beside it: in the authors' code
    ``attacks.pgd(epsilon=0.031, steps=10, step_size=0.007, random_start=0.001, loss=losses.kl_divergence,
    keep="last")``. That code passes the clean images a second time, for the running batch statistics alone to notice.
    The metric ``robust_loss`` is the mean divergence.

    Attributes:
      attack: what makes the images, ``(key, logits_fn, x, clean_logits) -> x_adv``.
      beta: weight of the divergence, 6 in the paper for CIFAR-10 and at least 0.

    Reference:
      Zhang et al. 2019, Theoretically Principled Trade-off between Robustness and Accuracy, arXiv 1901.08573.
    """

    attack: Adversary
    beta: float = 6.0

    def __post_init__(self):
        _validate.not_negative(beta=self.beta)
        if isinstance(loss := getattr(self.attack, "loss", None), str):
            raise ValueError(f"attack must have a loss of clean logits, losses.kl_divergence, got {loss!r}.")

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss of ``batch``, and the renewed state with metrics."""
        return self.loss(apply, state, self.examples(key, apply, state, batch))

    def examples(self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch) -> Examples:
        """Attacks the model."""
        from_clean_logits = lambda key, logits_fn, x, labels: self.attack(key, logits_fn, x, logits_fn(x))
        return _attacked(key, apply, state, batch, from_clean_logits)

    def loss(self, apply: Apply, state: ModelState, examples: Examples) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss, and the renewed state with metrics."""
        clean, adversarial, state = _both(apply, state, examples)
        robust_loss = kl_divergence(adversarial, clean).mean()
        loss = cross_entropy(clean, examples.label).mean() + self.beta * robust_loss
        return loss, Aux(state, _metrics(loss, clean, adversarial, examples.label) | {"robust_loss": robust_loss})


@dataclasses.dataclass(frozen=True, kw_only=True)
class MART:
    r"""Boosted cross-entropy on adversarial images, and a divergence that counts more where the clean answer is wrong.

    .. math:: \mathbb{E}\, \mathrm{BCE}\bigl(f(x'), y\bigr)
       + \beta\, \mathbb{E}\, \mathrm{KL}\bigl(p(x) \,\|\, p(x')\bigr) \bigl(1 - p_y(x)\bigr)

    with :func:`boosted_cross_entropy`. Gradients flow through both predictions, the weight :math:`1 - p_y(x)` included.
    The metric ``robust_loss`` is what :math:`\beta` multiplies.

    Attributes:
      attack: what makes the images; in the authors' code
        ``attacks.pgd(epsilon=0.031, steps=10, step_size=0.007, random_start=0.001, keep="last")``.
      beta: weight of the divergence, at least 0; the authors' scripts have 6 for a Wide ResNet and 5 for a ResNet.

    Reference:
      Wang et al. 2020, Improving Adversarial Robustness Requires Revisiting Misclassified Examples, ICLR.
    """

    attack: Adversary
    beta: float = 6.0

    def __post_init__(self):
        _validate.not_negative(beta=self.beta)

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss of ``batch``, and the renewed state with metrics."""
        return self.loss(apply, state, self.examples(key, apply, state, batch))

    def examples(self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch) -> Examples:
        """Attacks the model."""
        return _attacked(key, apply, state, batch, self.attack)

    def loss(self, apply: Apply, state: ModelState, examples: Examples) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss, and the renewed state with metrics."""
        clean, adversarial, state = _both(apply, state, examples)
        wrong = -jnp.expm1(-cross_entropy(clean, examples.label))  # 1 - p_y, exact where p_y is almost 1
        robust_loss = (kl_divergence(adversarial, clean) * wrong).mean()
        loss = boosted_cross_entropy(adversarial, examples.label).mean() + self.beta * robust_loss
        return loss, Aux(state, _metrics(loss, clean, adversarial, examples.label) | {"robust_loss": robust_loss})


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitPairing:
    r"""Mean cross-entropy on clean and adversarial images in equal parts, and the squared distance of their logits.

    .. math:: \mathbb{E}\, \tfrac{1}{2} \bigl(\ell(f(x), y) + \ell(f(x'), y)\bigr)
       + \lambda\, \mathbb{E}\, \frac{1}{K} \lVert f(x) - f(x') \rVert_2^2

    Clean and adversarial images make one batch here, as in the authors' code: batch normalisation sees both together.
    The metric ``pairing_loss`` is what :math:`\lambda` multiplies.

    This objective is known to hide gradients: Engstrom, Ilyas and Athalye (2018, arXiv 1807.10272) brought the authors'
    ImageNet model to 0.6 % under a longer attack. Measure its models with a strong ensemble of attacks.

    Attributes:
      attack: what makes the images.
      weight: of the distance, :math:`\lambda`, at least 0; 0.5 in the authors' example for ImageNet.

    Reference:
      Kannan, Kurakin and Goodfellow 2018, Adversarial Logit Pairing, arXiv 1803.06373.
    """

    attack: Adversary
    weight: float = 0.5

    def __post_init__(self):
        _validate.not_negative(weight=self.weight)

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss of ``batch``, and the renewed state with metrics."""
        return self.loss(apply, state, self.examples(key, apply, state, batch))

    def examples(self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch) -> Examples:
        """Attacks the model."""
        return _attacked(key, apply, state, batch, self.attack)

    def loss(self, apply: Apply, state: ModelState, examples: Examples) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss, and the renewed state with metrics."""
        outputs, state = apply(state, jnp.concatenate([examples.clean, examples.adversarial]), train=True)
        clean, adversarial = jnp.split(outputs.logits, 2)
        pairing_loss = jnp.square(clean - adversarial).mean()
        both = cross_entropy(clean, examples.label) + cross_entropy(adversarial, examples.label)
        loss = both.mean() / 2 + self.weight * pairing_loss
        return loss, Aux(state, _metrics(loss, clean, adversarial, examples.label) | {"pairing_loss": pairing_loss})


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntropyRegularization:
    r"""Mean cross-entropy and entropy of the prediction: widens the gap between the two largest logits.

    .. math:: \mathbb{E}\, \ell\bigl(f(x), y\bigr) + \lambda\, \mathbb{E}\, H\bigl(p(x)\bigr)

    Needs no attack. The larger gap may be a larger scale of the logits alone: measure with attacks that are blind to it
    (the DLR loss).

    Attributes:
      weight: of the entropy, :math:`\lambda`, at least 0.

    Reference:
      Cubuk et al. 2017, Intriguing Properties of Adversarial Examples, arXiv 1711.02846.
    """

    weight: float = 0.5

    def __post_init__(self):
        _validate.not_negative(weight=self.weight)

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss of ``batch``, and the renewed state with metrics; ``entropy`` is the mean entropy."""
        outputs, state = apply(state, batch.image, train=True)
        uncertainty = entropy(outputs.logits).mean()
        loss = cross_entropy(outputs.logits, batch.label).mean() + self.weight * uncertainty
        accuracy = _accuracy(outputs.logits, batch.label)
        return loss, Aux(state, {"loss": loss, "accuracy": accuracy, "entropy": uncertainty})


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWP:
    r"""Adversarial weight perturbation: an objective at the weights that are worst for it nearby.

    .. math:: L(\theta + \delta), \qquad
       \delta_l = \gamma\, \lVert \theta_l \rVert_2\, \frac{\nabla_l L(\theta)}{\lVert \nabla_l L(\theta) \rVert_2}

    for each kernel :math:`\theta_l`, a parameter array with more than one axis; biases and scales stay. The attack is
    made once, at :math:`\theta`. The gradient is taken at :math:`\theta + \delta` and applied to :math:`\theta`; the
    metrics and the renewed batch statistics are those of :math:`\theta + \delta`.

    Attributes:
      objective: one with an attack, see :class:`AdversarialObjective`.
      gamma: size of the perturbation relative to the weights, at least 0: 0.01 in the authors' code with
        :func:`adversarial_training`, 0.005 with :func:`trades`, there after ten epochs without.

    Reference:
      Wu, Xia and Wang 2020, Adversarial Weight Perturbation Helps Robust Generalization, arXiv 2004.05884.
    """

    objective: AdversarialObjective
    gamma: float = 0.01

    def __post_init__(self):
        _validate.not_negative(gamma=self.gamma)
        if not isinstance(self.objective, AdversarialObjective):
            raise ValueError(f"objective must have the methods examples and loss, got {self.objective!r}.")

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss of ``batch`` at the perturbed weights, and the renewed state with metrics."""
        examples = self.objective.examples(key, apply, state, batch)
        constant_state, constant_examples = jax.lax.stop_gradient((state, examples))

        def loss(params):
            return self.objective.loss(apply, constant_state._replace(params=params), constant_examples)[0]

        def perturb(weights, gradient):
            if weights.ndim < 2:
                return weights
            length = jnp.linalg.norm(gradient.ravel())
            size = self.gamma * jnp.linalg.norm(jax.lax.stop_gradient(weights).ravel())
            return weights + size * (gradient / jnp.where(length > 0, length, 1.0))

        perturbed = jax.tree.map(perturb, state.params, jax.grad(loss)(constant_state.params))
        value, aux = self.objective.loss(apply, state._replace(params=perturbed), examples)
        return value, aux._replace(state=aux.state._replace(params=state.params))


adversarial_training = AdversarialTraining
trades = TRADES
mart = MART
logit_pairing = LogitPairing
entropy_regularization = EntropyRegularization
awp = AWP


def _attacked(key: Array, apply: Apply, state: ModelState, batch: Batch, attack: Adversary) -> Examples:
    constant_state, constant_images = jax.lax.stop_gradient((state, batch.image))
    logits_fn = jax.tree_util.Partial(_logits_of(apply), constant_state)
    adversarial = attack(jax.random.fold_in(key, 1), logits_fn, constant_images, batch.label)
    if getattr(adversarial, "shape", None) != batch.image.shape:
        got = getattr(adversarial, "shape", type(adversarial).__name__)
        raise ValueError(f"attack must give images of shape {batch.image.shape}, got {got}.")
    return Examples(batch.image, jax.lax.stop_gradient(adversarial), batch.label)


@functools.cache  # one function for each model, so that what an attack compiles is shared
def _logits_of(apply: Apply) -> Callable[[ModelState, Array], Array]:
    return lambda state, x: apply(state, x, train=False)[0].logits


def _both(apply: Apply, state: ModelState, examples: Examples) -> tuple[Array, Array, ModelState]:
    clean, state = apply(state, examples.clean, train=True)
    adversarial, state = apply(state, examples.adversarial, train=True)
    return clean.logits, adversarial.logits, state


def _metrics(loss: Array, clean: Array, adversarial: Array, labels: Array) -> dict[str, Array]:
    accuracy, robust_accuracy = _accuracy(clean, labels), _accuracy(adversarial, labels)
    return {"loss": loss, "accuracy": accuracy, "robust_accuracy": robust_accuracy}


def _accuracy(logits: Array, labels: Array) -> Array:
    return (logits.argmax(-1) == labels).mean(dtype=jnp.float32)
