"""Objectives for prototype networks: a margin between probabilities, and the certified radius itself."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from robustjax import _arguments, _prototypes, _validate
from robustjax._precision import in_float32
from robustjax.losses._classification import of_label
from robustjax.losses._objectives import Aux
from robustjax.typing import Apply, Batch, ModelState


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class PrototypeMargin:
    r"""Hinge on the probability of the best wrong class minus the probability of the right class.

    .. math:: \mathbb{E}\, \max\Bigl(0,\ \max_{j \ne y} p_j(x) - p_y(x) + m\Bigr)

    For models whose logits are logarithms of probabilities that do not sum to 1, such as
    :func:`robustjax.models.prototypes.classifier`: cross-entropy has no meaning for such a model.

    Attributes:
      margin: m, in (0, 1).

    Example:
      >>> module = models.prototypes.classifier(key, image, batch.label, num_classes=2, reasoning="rbf")
      >>> model = models.functional(module)  # with the images themselves as prototypes
      >>> objective = losses.prototype_margin(margin=0.3)
      >>> loss, aux = jax.jit(objective, static_argnums=1)(key, model.apply, model.state, batch)
      >>> f"loss {loss:.2f}, accuracy {aux.metrics['accuracy']:.2f}"
      'loss 0.00, accuracy 1.00'

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
        probabilities = jnp.exp(in_float32(outputs.logits))
        right = jax.nn.one_hot(batch.label, probabilities.shape[-1], dtype=bool)
        wrong = jnp.where(right, -jnp.inf, probabilities).max(-1)
        loss = jax.nn.relu(wrong - of_label(probabilities, batch.label) + self.margin).mean()
        accuracy = (outputs.logits.argmax(-1) == batch.label).mean(dtype=jnp.float32)
        return loss, Aux(state, {"loss": loss, "accuracy": accuracy})


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class PrototypeRadius:
    r"""Negative certified radius of a prototype network; with a target, radii beyond the target cost nothing.

    .. math:: \mathbb{E}\, \max\bigl(0,\ \tau - R(x, y)\bigr), \text{ or } -\mathbb{E}\, R(x, y)

    with the signed l2 radius R of :func:`robustjax.certification.prototypes.radius`, negative where the answer is
    wrong. The model must be a :func:`robustjax.models.prototypes.classifier`. The metric ``radius`` is the mean of R.

    Attributes:
      target: tau, l2 in units of [0, 1] images; None for the second form, without a bound.
      cancel: False for the published radius, which is never larger.

    Example:
      >>> module = models.prototypes.classifier(key, image, batch.label, num_classes=2, reasoning="rbf")
      >>> model = models.functional(module)  # with the images themselves as prototypes
      >>> loss, aux = jax.jit(losses.prototype_radius(), static_argnums=1)(key, model.apply, model.state, batch)
      >>> f"mean radius {aux.metrics['radius']:.2f}"
      'mean radius 0.42'

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
        """Returns the mean loss of ``batch``, and the state with metrics; ``apply`` is not called."""
        del apply
        network = _prototypes.network(state.params)
        radius = _prototypes.radius(network, batch.image, batch.label, cancel=self.cancel)
        loss = (-radius if self.target is None else jax.nn.relu(self.target - radius)).mean()
        metrics = {"loss": loss, "accuracy": (radius > 0).mean(dtype=jnp.float32), "radius": radius.mean()}
        return loss, Aux(state, metrics)


prototype_margin = PrototypeMargin
prototype_radius = PrototypeRadius
