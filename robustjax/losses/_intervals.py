"""Training for certificates by interval bound propagation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from robustjax import _arguments, _validate
from robustjax._intervals import ball, margin_bounds
from robustjax.losses._classification import cross_entropy
from robustjax.losses._objectives import Aux
from robustjax.typing import Apply, Batch, ModelState


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class IntervalTraining:
    r"""Cross-entropy of the answer, and of the worst answer in the linf ball that interval bounds cannot rule out.

    .. math:: \kappa\, \ell\bigl(f(x), y\bigr) + (1 - \kappa)\, \ell(\hat z, y), \qquad
              \hat z_j - \hat z_y = -\underline m_j, \quad
              \underline m_j \le \min_{\lVert x' - x \rVert_\infty \le \epsilon} f_y(x') - f_j(x')

    with the bounds of :func:`robustjax.certification.intervals.certify`: within [0, 1], and with the last layer elided.
    The bounds hold for the model at inference, with its running batch statistics.

    Training has to start from small balls: the paper begins with kappa 1 and epsilon 0 and changes both linearly, as
    :func:`scheduled` does::

        ramp = functools.partial(losses.ramp, begin=2_000, steps=10_000)
        losses.scheduled(losses.interval_training(), epsilon=ramp(end=0.2), kappa=ramp(start=1.0, end=0.5))

    The metric ``verified`` is the share of the batch whose margins are all positive.

    Attributes:
      epsilon: radius of the ball, linf in units of [0, 1] images; in the paper larger than the radius to be certified,
        0.4 for 0.3 on MNIST.
      kappa: weight of the cross-entropy at the image itself, 0 to 1.

    Example:
      >>> objective = losses.interval_training(epsilon=0.15)
      >>> loss, aux = jax.jit(objective, static_argnums=1)(key, apply, state, batch)
      >>> f"accuracy {aux.metrics['accuracy']:.2f}, verified {aux.metrics['verified']:.2f}"
      'accuracy 1.00, verified 0.50'

    Reference:
      Gowal et al. 2018, On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust Models,
      arXiv 1810.12715.
    """

    epsilon: float | Float[Array, ""] = 0.4
    kappa: float | Float[Array, ""] = 0.5

    def __post_init__(self):
        _validate.not_negative(epsilon=self.epsilon, kappa=self.kappa)
        if not isinstance(self.kappa, jax.core.Tracer) and self.kappa > 1:
            raise ValueError(f"kappa must be at most 1, got {self.kappa!r}.")

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss of ``batch``, and the updated state with metrics."""
        outputs, renewed = apply(state, batch.image, train=True)
        bounds = margin_bounds(lambda x: apply(state, x)[0].logits, *ball(batch.image, self.epsilon), batch.label)
        loss = self.kappa * cross_entropy(outputs.logits, batch.label).mean()
        loss += (1 - self.kappa) * cross_entropy(-bounds, batch.label).mean()
        accuracy = (outputs.logits.argmax(-1) == batch.label).mean(dtype=jnp.float32)
        other = jnp.arange(bounds.shape[-1])[None] != batch.label[:, None]
        verified = (~other | (bounds > 0)).all(-1).mean(dtype=jnp.float32)
        return loss, Aux(renewed, {"loss": loss, "accuracy": accuracy, "verified": verified})


interval_training = IntervalTraining
