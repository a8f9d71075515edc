"""Adversarial training: objectives that search for adversarial inputs, or weights, before they compute the loss."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from robustjax import _arguments, _validate
from robustjax._precision import in_float32
from robustjax.losses._adversarial import boosted_cross_entropy, entropy, kl_divergence, log_odds_against
from robustjax.losses._classification import cross_entropy
from robustjax.losses._objectives import Aux
from robustjax.typing import Apply, Batch, LogitsFn, ModelState

Adversary: TypeAlias = Callable[[Array, LogitsFn, Array, Array], Array]
"""``(key, logits_fn, x, labels) -> x_adv``; for attacks of :mod:`robustjax.attacks`, ``keep="last"`` is best."""


class Examples(NamedTuple):
    """The clean images of a batch and their adversarial versions.

    Attributes:
      clean: ``(batch, height, width, channels)``.
      adversarial: of the same shape; no gradient flows through them.
      label: ``(batch,)``, int32.
    """

    clean: Float[Array, "batch height width channels"]
    adversarial: Float[Array, "batch height width channels"]
    label: Int[Array, " batch"]


@runtime_checkable
class AdversarialObjective(Protocol):
    """An objective in two parts: the attack, and the loss of the images that it finds."""

    def examples(self, key: Array, apply: Apply, state: ModelState, batch: Batch) -> Examples:
        """Attacks the model."""
        ...

    def loss(self, apply: Apply, state: ModelState, examples: Examples) -> tuple[Array, Aux]:
        """Returns the mean loss, and the updated state with metrics."""
        ...


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialTraining:
    r"""Mean cross-entropy on adversarial images.

    .. math:: \mathbb{E}\, \ell\bigl(f(x'), y\bigr), \qquad x' = \mathrm{attack}(f, x, y)

    The model sees no clean images: ``accuracy`` and ``robust_accuracy`` are both the accuracy on adversarial images.

    Attributes:
      attack: makes the adversarial images; in the paper for CIFAR-10
        ``attacks.pgd(epsilon=8/255, steps=7, step_size=2/255, keep="last")``.

    Example:
      >>> loss, aux = losses.adversarial.adversarial_training(attack=attack)(key, apply, state, batch)
      >>> f"loss {loss:.2f}, robust accuracy {aux.metrics['robust_accuracy']:.2f}"
      'loss 0.77, robust accuracy 0.50'

    Reference:
      Madry et al. 2018, Towards Deep Learning Models Resistant to Adversarial Attacks, arXiv 1706.06083.
    """

    attack: Adversary

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the mean loss of ``batch``, and the updated state with metrics."""
        return self.loss(apply, state, self.examples(key, apply, state, batch))

    def examples(self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch) -> Examples:
        """Attacks the model."""
        return _attacked(key, apply, state, batch, self.attack)

    def loss(self, apply: Apply, state: ModelState, examples: Examples) -> tuple[Float[Array, ""], Aux]:
        """Returns the mean loss, and the updated state with metrics."""
        outputs, state = apply(state, examples.adversarial, train=True)
        loss = cross_entropy(outputs.logits, examples.label).mean()
        accuracy = _accuracy(outputs.logits, examples.label)
        return loss, Aux(state, {"loss": loss, "accuracy": accuracy, "robust_accuracy": accuracy})


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class TRADES:
    r"""Mean cross-entropy on clean images, and the divergence between predictions for clean and adversarial images.

    .. math:: \mathbb{E}\, \ell\bigl(f(x), y\bigr) + \beta\, \mathbb{E}\, \mathrm{KL}\bigl(p(x) \,\|\, p(x')\bigr)

    Gradients flow through both predictions. The attack maximises the same divergence and needs no labels: it gets the
    logits of the clean images instead, and its loss must be :func:`kl_divergence`. The divergence has no gradient at x,
    so the attack has to start at another point; the authors use ``attacks.pgd(epsilon=0.031, steps=10,
    step_size=0.007, random_start=0.001, loss=losses.kl_divergence, keep="last")``. Their code also passes the clean
    images through the model a second time, which changes only the running batch statistics. The metric
    ``robust_loss`` is the mean divergence.

    Attributes:
      attack: makes the adversarial images, ``(key, logits_fn, x, clean_logits) -> x_adv``.
      beta: weight of the divergence, 6 in the paper for CIFAR-10 and at least 0.

    Example:
      >>> from_clean = attacks.pgd(epsilon=0.2, steps=2, random_start=0.001, loss=losses.kl_divergence, keep="last")
      >>> loss, aux = losses.adversarial.trades(attack=from_clean)(key, apply, state, batch)
      >>> f"loss {loss:.2f}, divergence {aux.metrics['robust_loss']:.2f}"
      'loss 1.59, divergence 0.23'

    Reference:
      Zhang et al. 2019, Theoretically Principled Trade-off between Robustness and Accuracy, arXiv 1901.08573.
    """

    attack: Adversary
    beta: float = 6.0

    def __post_init__(self):
        _validate.not_negative(beta=self.beta)
        _validate.untargeted(self.attack)
        if isinstance(loss := getattr(self.attack, "loss", None), str):
            raise ValueError(f"attack must have loss=losses.kl_divergence, which reads clean logits, got {loss!r}.")

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss of ``batch``, and the updated state with metrics."""
        return self.loss(apply, state, self.examples(key, apply, state, batch))

    def examples(self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch) -> Examples:
        """Attacks the model."""
        from_clean_logits = lambda key, logits_fn, x, labels: self.attack(key, logits_fn, x, logits_fn(x))
        return _attacked(key, apply, state, batch, from_clean_logits)

    def loss(self, apply: Apply, state: ModelState, examples: Examples) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss, and the updated state with metrics."""
        clean, adversarial, state = _both(apply, state, examples)
        robust_loss = kl_divergence(adversarial, clean).mean()
        loss = cross_entropy(clean, examples.label).mean() + self.beta * robust_loss
        return loss, Aux(state, _metrics(loss, clean, adversarial, examples.label) | {"robust_loss": robust_loss})


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class MART:
    r"""Boosted cross-entropy on adversarial images, and a divergence with more weight where the clean answer is wrong.

    .. math:: \mathbb{E}\, \mathrm{BCE}\bigl(f(x'), y\bigr)
       + \beta\, \mathbb{E}\, \mathrm{KL}\bigl(p(x) \,\|\, p(x')\bigr) \bigl(1 - p_y(x)\bigr)

    with :func:`boosted_cross_entropy`. Gradients flow through both predictions, and through the weight
    :math:`1 - p_y(x)`. The metric ``robust_loss`` is the term that :math:`\beta` multiplies.

    Attributes:
      attack: makes the adversarial images; in the authors' code
        ``attacks.pgd(epsilon=0.031, steps=10, step_size=0.007, random_start=0.001, keep="last")``.
      beta: weight of the divergence, at least 0; the authors' scripts use 6 for a Wide ResNet and 5 for a ResNet.

    Example:
      >>> loss, aux = losses.adversarial.mart(attack=attack)(key, apply, state, batch)
      >>> f"loss {loss:.2f}, robust accuracy {aux.metrics['robust_accuracy']:.2f}"
      'loss 1.86, robust accuracy 0.50'

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
        """Returns the loss of ``batch``, and the updated state with metrics."""
        return self.loss(apply, state, self.examples(key, apply, state, batch))

    def examples(self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch) -> Examples:
        """Attacks the model."""
        return _attacked(key, apply, state, batch, self.attack)

    def loss(self, apply: Apply, state: ModelState, examples: Examples) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss, and the updated state with metrics."""
        clean, adversarial, state = _both(apply, state, examples)
        wrong = jnp.exp(-jax.nn.softplus(-log_odds_against(clean, examples.label)))  # 1 - p_y, exact next to 0 and 1
        robust_loss = (kl_divergence(adversarial, clean) * wrong).mean()
        loss = boosted_cross_entropy(adversarial, examples.label).mean() + self.beta * robust_loss
        return loss, Aux(state, _metrics(loss, clean, adversarial, examples.label) | {"robust_loss": robust_loss})


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitPairing:
    r"""Mean cross-entropy on clean and adversarial images in equal parts, and the squared distance of their logits.

    .. math:: \mathbb{E}\, \tfrac{1}{2} \bigl(\ell(f(x), y) + \ell(f(x'), y)\bigr)
       + \lambda\, \mathbb{E}\, \frac{1}{K} \lVert f(x) - f(x') \rVert_2^2

    Clean and adversarial images form one batch, as in the authors' code: batch normalisation sees both together. The
    metric ``pairing_loss`` is the term that :math:`\lambda` multiplies.

    This objective is known to mask gradients: Engstrom, Ilyas and Athalye (2018, arXiv 1807.10272) reduced the accuracy
    of the authors' ImageNet model to 0.6 % with a longer attack. Evaluate its models with a strong ensemble of attacks.

    Attributes:
      attack: makes the adversarial images.
      weight: weight of the distance, :math:`\lambda`, at least 0; 0.5 in the authors' example for ImageNet.

    Example:
      >>> loss, aux = losses.adversarial.logit_pairing(attack=attack)(key, apply, state, batch)
      >>> f"loss {loss:.2f}, robust accuracy {aux.metrics['robust_accuracy']:.2f}"
      'loss 0.82, robust accuracy 0.50'

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
        """Returns the loss of ``batch``, and the updated state with metrics."""
        return self.loss(apply, state, self.examples(key, apply, state, batch))

    def examples(self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch) -> Examples:
        """Attacks the model."""
        return _attacked(key, apply, state, batch, self.attack)

    def loss(self, apply: Apply, state: ModelState, examples: Examples) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss, and the updated state with metrics."""
        outputs, state = apply(state, jnp.concatenate([examples.clean, examples.adversarial]), train=True)
        clean, adversarial = jnp.split(in_float32(outputs.logits), 2)
        pairing_loss = jnp.square(clean - adversarial).mean()
        both = cross_entropy(clean, examples.label) + cross_entropy(adversarial, examples.label)
        loss = both.mean() / 2 + self.weight * pairing_loss
        return loss, Aux(state, _metrics(loss, clean, adversarial, examples.label) | {"pairing_loss": pairing_loss})


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class EntropyRegularization:
    r"""Mean cross-entropy and entropy of the prediction: widens the gap between the two largest logits.

    .. math:: \mathbb{E}\, \ell\bigl(f(x), y\bigr) + \lambda\, \mathbb{E}\, H\bigl(p(x)\bigr)

    No attack is needed. The gap may grow only because all logits grow: evaluate with attacks that do not depend on the
    scale of the logits (the DLR loss).

    Attributes:
      weight: weight of the entropy, :math:`\lambda`, at least 0.

    Example:
      >>> loss, aux = losses.adversarial.entropy_regularization(weight=0.5)(key, apply, state, batch)
      >>> f"loss {loss:.2f}, entropy {aux.metrics['entropy']:.2f}"
      'loss 0.46, entropy 0.45'

    Reference:
      Cubuk et al. 2017, Intriguing Properties of Adversarial Examples, arXiv 1711.02846.
    """

    weight: float = 0.5

    def __post_init__(self):
        _validate.not_negative(weight=self.weight)

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss of ``batch``, and the updated state with metrics; ``entropy`` is the mean entropy."""
        outputs, state = apply(state, batch.image, train=True)
        uncertainty = entropy(outputs.logits).mean()
        loss = cross_entropy(outputs.logits, batch.label).mean() + self.weight * uncertainty
        accuracy = _accuracy(outputs.logits, batch.label)
        return loss, Aux(state, {"loss": loss, "accuracy": accuracy, "entropy": uncertainty})


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class AWP:
    r"""Adversarial weight perturbation: an objective at the worst weights in the neighbourhood.

    .. math:: L(\theta + \delta), \qquad
       \delta_l = \gamma\, \lVert \theta_l \rVert_2\, \frac{\nabla_l L(\theta)}{\lVert \nabla_l L(\theta) \rVert_2}

    for each kernel :math:`\theta_l`, a parameter array with more than one axis; biases and scales are not perturbed.
    The attack runs once, at :math:`\theta`. The gradient is computed at :math:`\theta + \delta` and applied to
    :math:`\theta`; metrics and updated batch statistics also come from :math:`\theta + \delta`.

    Attributes:
      objective: an objective with an attack, see :class:`AdversarialObjective`.
      gamma: size of the perturbation relative to the weights, at least 0; in the authors' code 0.01 with
        :func:`adversarial_training`, and 0.005 with :func:`trades`, after ten epochs without perturbation.

    Example:
      >>> inner = losses.adversarial.adversarial_training(attack=attack)
      >>> objective = losses.adversarial.awp(objective=inner, gamma=0.1)
      >>> print(*(f"{f(key, apply, state, batch)[0]:.2f}" for f in (inner, objective)))  # the second is larger
      0.77 0.80

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
        """Returns the loss of ``batch`` at the perturbed weights, and the updated state with metrics."""
        examples = self.objective.examples(key, apply, state, batch)
        constant_state, constant_examples = jax.lax.stop_gradient((state, examples))

        def loss(params):
            return self.objective.loss(apply, constant_state._replace(params=params), constant_examples)[0]

        def perturb(weights, gradient):
            if weights.ndim < 2:
                return weights
            largest = jnp.abs(gradient).max(initial=0.0)
            gradient = gradient / jnp.where(largest > 0, largest, 1.0)  # squares of small gradients vanish
            size = self.gamma * jnp.linalg.norm(jax.lax.stop_gradient(weights).ravel())
            return weights + size * (gradient / jnp.maximum(jnp.linalg.norm(gradient.ravel()), 1.0))

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
    _validate.untargeted(attack)
    constant_state, constant_images = jax.lax.stop_gradient((state, batch.image))
    logits_fn = jax.tree_util.Partial(_logits_of(apply), constant_state)
    adversarial = attack(jax.random.fold_in(key, 1), logits_fn, constant_images, batch.label)
    if getattr(adversarial, "shape", None) != batch.image.shape:
        got = getattr(adversarial, "shape", type(adversarial).__name__)
        raise ValueError(f"attack must return images of shape {batch.image.shape}, got {got}.")
    return Examples(batch.image, jax.lax.stop_gradient(adversarial), batch.label)


@functools.cache  # one function for each model, so that calls of an attack share a compiled program
def _logits_of(apply: Apply) -> Callable[[ModelState, Array], Array]:
    return lambda state, x: apply(state, x, train=False)[0].logits


def _both(apply: Apply, state: ModelState, examples: Examples) -> tuple[Array, Array, ModelState]:
    clean, state = apply(state, examples.clean, train=True)
    adversarial, state = apply(state, examples.adversarial, train=True)
    return in_float32(clean.logits), in_float32(adversarial.logits), state


def _metrics(loss: Array, clean: Array, adversarial: Array, labels: Array) -> dict[str, Array]:
    accuracy, robust_accuracy = _accuracy(clean, labels), _accuracy(adversarial, labels)
    return {"loss": loss, "accuracy": accuracy, "robust_accuracy": robust_accuracy}


def _accuracy(logits: Array, labels: Array) -> Array:
    return (logits.argmax(-1) == labels).mean(dtype=jnp.float32)
