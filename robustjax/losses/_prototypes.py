"""Objectives for networks of prototypes: a margin between probabilities, and the certified radius itself."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from robustjax import _validate, models
from robustjax.losses._objectives import Aux
from robustjax.typing import Apply, Batch, ModelState


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrototypeMargin:
    r"""Hinge on the difference of two probabilities: of the best wrong class, and of the right one.

    .. math:: \mathbb{E}\, \max\Bigl(0,\ \max_{j \ne y} p_j(x) - p_y(x) + m\Bigr)

    For models whose logits are logarithms of probabilities that do not sum to 1, such as those of
    :func:`robustjax.models.prototypes.classifier`: cross-entropy has no meaning for them.

    Attributes:
      margin: m, in (0, 1).

    Reference:
      Saralajew et al. 2024, A Robust Prototype-Based Network with Interpretable RBF Classifier Foundations,
      arXiv 2412.15499.
    """

    margin: float = 0.3

    def __post_init__(self):
        _validate.probability(margin=self.margin)

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the mean loss of ``batch``, and the state with metrics."""
        outputs, state = apply(state, batch.image, train=True)
        probabilities = jnp.exp(outputs.logits)
        right = jax.nn.one_hot(batch.label, probabilities.shape[-1], dtype=bool)
        wrong = jnp.where(right, -jnp.inf, probabilities).max(-1)
        loss = jax.nn.relu(wrong - jnp.where(right, probabilities, 0.0).sum(-1) + self.margin).mean()
        accuracy = (outputs.logits.argmax(-1) == batch.label).mean(dtype=jnp.float32)
        return loss, Aux(state, {"loss": loss, "accuracy": accuracy})


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrototypeRadius:
    r"""Minus the certified radius of a network of prototypes, up to a radius that is enough.

    .. math:: \mathbb{E}\, \max\bigl(0,\ \tau - R(x, y)\bigr), \text{ or } -\mathbb{E}\, R(x, y)

    with the signed l2 radius R of :func:`robustjax.certification.prototypes.radius`, negative where the answer is
    wrong. The parameters must be those of :func:`robustjax.models.prototypes.classifier`. The metric ``radius`` is the
    mean of R.

    Attributes:
      target: tau, l2 in units of [0, 1] images; None for no bound.
      cancel: False for the published radius, which is at most as large.

    Reference:
      Saralajew et al. 2024, A Robust Prototype-Based Network with Interpretable RBF Classifier Foundations,
      arXiv 2412.15499.
    """

    target: float | None = None
    cancel: bool = True

    def __post_init__(self):
        if self.target is not None:
            _validate.positive(target=self.target)

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the mean loss of ``batch``, and the state with metrics; ``apply`` is not asked."""
        del apply
        network = models.prototypes.network(state.params)
        radius = models.prototypes.radius(network, batch.image, batch.label, cancel=self.cancel)
        loss = (-radius if self.target is None else jax.nn.relu(self.target - radius)).mean()
        metrics = {"loss": loss, "accuracy": (radius > 0).mean(dtype=jnp.float32), "radius": radius.mean()}
        return loss, Aux(state, metrics)


prototype_margin = PrototypeMargin
prototype_radius = PrototypeRadius
