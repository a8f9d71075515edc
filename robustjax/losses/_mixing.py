"""Training of the network that mixes two classifiers, and the loss of an adaptive attack on the mixture."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from robustjax import _arguments, _validate
from robustjax._precision import in_float32
from robustjax.losses._adversarial_training import Adversary, Examples, _accuracy, _attacked
from robustjax.losses._classification import check_logits_and_labels, cross_entropy
from robustjax.losses._objectives import Aux
from robustjax.typing import Apply, Batch, ModelState


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveCrossEntropy:
    r"""Cross-entropy of a mixture plus a term that is high where an image looks clean: the loss of an adaptive attack.

    .. math:: (1 - w)\, \ell\bigl(f(x), y\bigr) + w \ln\bigl(1 + e^{-\gamma(x)}\bigr)

    gamma is the logsumexp of the logits, as :func:`robustjax.certification.mixing.mixture` returns them.

    Attributes:
      weight: w in [0, 1]; drawn from [0, 0.4] in the authors' training.

    Example:
      >>> print(losses.adaptive_cross_entropy(weight=0.2)(logits, labels))
      [0.16 1.17]

    Reference:
      Bai et al. 2023, Improving the Accuracy-Robustness Trade-off of Classifiers via Adaptive Smoothing,
      arXiv:2301.12554.
    """

    weight: float = 0.2

    def __post_init__(self):
        if not 0 <= _validate.number(self.weight) <= 1:
            raise ValueError(f"weight must lie in [0, 1], got {self.weight!r}.")

    def __call__(self, logits: Float[Array, "..."], labels: Array) -> Float[Array, " batch"]:
        """Returns one loss for each example."""
        check_logits_and_labels(logits, labels)
        unseen = jax.nn.softplus(-jax.nn.logsumexp(in_float32(logits), axis=-1))
        return (1 - self.weight) * cross_entropy(logits, labels) + self.weight * unseen


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class MixingTraining:
    r"""Trains a mixing network to tell attacked images from clean ones, above all where the mixture's loss is high.

    .. math:: \mathbb{E}\, a\, b + c\, \ell + p\, b\, \ell, \qquad
              b = \ln(1 + e^\gamma) - s \gamma, \quad s = 1 \text{ for attacked images, } 0 \text{ for clean ones}

    with the cross-entropy :math:`\ell` of the mixture. The model is a :func:`robustjax.certification.mixing.mixture`:
    the logsumexp of its logits is gamma, and its only parameters are the parameters of the mixing network, so both
    classifiers stay fixed. The attack sees the mixture as it is at inference; the authors attack it with the mixing
    weights of training.

    The metric ``told_apart`` is the share of images with gamma on the right side of 0.

    Attributes:
      attack: makes the attacked images, such as ``attacks.pgd(epsilon=8/255, loss=losses.adaptive_cross_entropy(),
        keep="last")``.
      binary: a, weight of the binary cross-entropy b.
      classes: c, weight of the cross-entropy of the mixture.
      product: p, weight of the product of both.
      factors: range of a random factor that multiplies each perturbation, so that not all attacked images lie on the
        surface of the ball; the authors draw the epsilon of each image instead.

    Example:
      >>> attack = attacks.fgsm(epsilon=0.2, loss=losses.adaptive_cross_entropy())
      >>> objective = losses.mixing_training(attack=attack)  # a linear model for the mixture
      >>> loss, aux = jax.jit(objective, static_argnums=1)(key, apply, state, batch)
      >>> f"loss {loss:.2f}, robust accuracy {aux.metrics['robust_accuracy']:.2f}"
      'loss 1.37, robust accuracy 0.50'

    Reference:
      Bai et al. 2023, Improving the Accuracy-Robustness Trade-off of Classifiers via Adaptive Smoothing,
      arXiv:2301.12554.
    """

    attack: Adversary
    binary: float = 1.5
    classes: float = 0.0
    product: float = 0.3
    factors: tuple[float, float] = (0.4, 1.1)

    def __post_init__(self):
        _validate.not_negative(binary=self.binary, classes=self.classes, product=self.product)
        low, high = self.factors
        if not 0 <= _validate.number(low) <= _validate.number(high) < float("inf"):
            raise ValueError(f"factors must be (low, high) with 0 <= low <= high, got {self.factors}.")

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the mean loss of ``batch``, and the updated state with metrics."""
        return self.loss(apply, state, self.examples(key, apply, state, batch))

    def examples(self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch) -> Examples:
        """Attacks the mixture."""
        factor_key, key = jax.random.split(key)
        examples = _attacked(key, apply, state, batch, self.attack)
        shape = (examples.clean.shape[0], *(1,) * (examples.clean.ndim - 1))
        factor = jax.random.uniform(factor_key, shape, minval=self.factors[0], maxval=self.factors[1])
        moved = examples.clean + factor * (examples.adversarial - examples.clean)
        return examples._replace(adversarial=jax.lax.stop_gradient(jnp.clip(moved, 0.0, 1.0)))

    def loss(self, apply: Apply, state: ModelState, examples: Examples) -> tuple[Float[Array, ""], Aux]:
        """Returns the mean loss, and the updated state with metrics; clean and attacked images go through together."""
        count = examples.label.shape[0]
        labels, attacked = jnp.tile(examples.label, 2), jnp.repeat(jnp.asarray([0.0, 1.0]), count)
        outputs, state = apply(state, jnp.concatenate([examples.clean, examples.adversarial]), train=True)
        gamma = jax.nn.logsumexp(in_float32(outputs.logits), axis=-1)
        losses, binary = cross_entropy(outputs.logits, labels), jax.nn.softplus((1 - 2 * attacked) * gamma)
        loss = (self.binary * binary + self.classes * losses + self.product * binary * losses).mean()
        metrics = {
            "loss": loss,
            "accuracy": _accuracy(outputs.logits[:count], examples.label),
            "robust_accuracy": _accuracy(outputs.logits[count:], examples.label),
            "told_apart": ((gamma > 0) == (attacked > 0)).mean(dtype=jnp.float32),
        }
        return loss, Aux(state, metrics)


adaptive_cross_entropy = AdaptiveCrossEntropy
mixing_training = MixingTraining
