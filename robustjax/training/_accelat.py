"""A learning rate that falls when validation accuracy stops rising."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from robustjax import _arguments, _validate


class AccelATState(NamedTuple):
    """The state of the rule between two epochs.

    Attributes:
      learning_rate: of the next epoch.
      accuracies: of the last ``window`` epochs, the newest last; 0 before the first epoch.
      epochs: number of epochs so far.
      quiet: epochs since the last reduction, counted as the authors do.
    """

    learning_rate: Float[Array, ""]
    accuracies: Float[Array, " window"]
    epochs: Int[Array, ""]
    quiet: Int[Array, ""]


class AccelAT(NamedTuple):
    """A pair of pure functions, as an Optax transformation is.

    Attributes:
      init: ``() -> state``.
      update: ``(state, validation_accuracy) -> (state, learning_rate)``, once an epoch; the accuracy is in [0, 1].
    """

    init: Callable[[], AccelATState]
    update: Callable[[AccelATState, Array | float], tuple[AccelATState, Array]]


@_arguments.checked
def accelat(
    *,
    learning_rate: float = 1e-3,
    factor: float = 0.8,
    minimum: float = 1e-6,
    window: int = 5,
    patience: int = 5,
    threshold: float = 0.005,
) -> AccelAT:
    r"""Makes the rule that multiplies the learning rate by a factor when accuracy stops rising.

    .. math:: \eta_{t+1} = \max(\rho\, \eta_t, \eta_{\min}) \quad\text{if}\quad \bar a_t - \bar a_{t-1} < \tau

    with :math:`\bar a_t` the mean accuracy of the last W epochs. The first decision is made at epoch W + 2, and after a
    reduction the next one comes at least Q epochs later. The paper validates on adversarial images that were made once,
    before training.

    Use an optimizer with the rate in its state, ``optax.inject_hyperparams(optax.sgd)(learning_rate=1e-3)``, and set
    the rate between two epochs::

        controller, rate = rule.update(controller, validation_accuracy)
        state = state._replace(opt_state=optax.tree.set(state.opt_state, learning_rate=rate))

    Args:
      learning_rate: of the first epochs.
      factor: rho, below 1.
      minimum: the learning rate never falls below it; at most ``learning_rate``.
      window: W, number of epochs averaged.
      patience: Q, number of epochs.
      threshold: tau, smallest gain of the mean accuracy in one epoch that keeps the rate, in units of [0, 1].

    Returns:
      The pair ``(init, update)``.

    Raises:
      ValueError: an argument is out of range; ``update`` raises it for an accuracy outside [0, 1].

    Example:
      >>> rule = training.accelat(learning_rate=0.1, factor=0.5, window=1, patience=1)
      >>> state = rule.init()
      >>> for accuracy in (0.5, 0.7, 0.7, 0.7):
      ...     state, rate = rule.update(state, accuracy)
      >>> f"{rate:.3f}"
      '0.025'

    Reference:
      Nikfam et al. 2022, AccelAT: A Framework for Accelerating the Adversarial Training of Deep Neural Networks Through
      Accuracy Gradient, IEEE Access 10, doi 10.1109/ACCESS.2022.3213734; the defaults come from the authors' code.
    """
    _validate.positive(learning_rate=learning_rate, minimum=minimum, threshold=threshold)
    _validate.probability(factor=factor)
    _validate.at_least(1, window=window, patience=patience)
    if minimum > learning_rate:
        raise ValueError(f"minimum must be at most learning_rate={learning_rate!r}, got {minimum!r}.")

    def init() -> AccelATState:
        zeros = jnp.zeros(window, jnp.float32)
        return AccelATState(jnp.float32(learning_rate), zeros, jnp.int32(0), jnp.int32(patience))

    def update(state: AccelATState, validation_accuracy: Array | float) -> tuple[AccelATState, Array]:
        if not isinstance(validation_accuracy, jax.core.Tracer) and not 0 <= _validate.number(validation_accuracy) <= 1:
            raise ValueError(f"validation_accuracy must lie in [0, 1], got {validation_accuracy!r}.")
        newest = jnp.asarray(validation_accuracy, jnp.float32)
        gain = (newest - state.accuracies[0]) / window  # of the mean, which drops its oldest term
        quiet = state.quiet + 1
        reduce = (state.epochs > window) & (quiet > patience) & (gain < threshold)
        rate = jnp.maximum(jnp.where(reduce, factor * state.learning_rate, state.learning_rate), minimum)
        accuracies = jnp.append(state.accuracies[1:], newest)
        # A copy: the step that receives the rate may donate it.
        return AccelATState(rate, accuracies, state.epochs + 1, jnp.where(reduce, 1, quiet)), jnp.copy(rate)

    return AccelAT(init, update)
