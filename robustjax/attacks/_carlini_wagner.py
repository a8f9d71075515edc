"""The Carlini-Wagner attack: the smallest l2 change, by gradient descent and a binary search."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from robustjax import _arguments, _validate, losses
from robustjax.attacks import _ball
from robustjax.attacks._attack import Model, check_settings, run
from robustjax.attacks._compose import MinimumNorm, nearer, unmoved
from robustjax.typing import AnyArray, LogitsFn

_INSIDE = 1 - 1e-6  # the inverse of tanh is infinite where a pixel is 0 or 1
_LARGEST_C = 1e10


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class CarliniWagner:
    r"""Minimum-norm l2 attack: minimises the distance and the lead of the right class together.

    .. math:: \min_w \lVert z - x \rVert_2^2 + c\, \max\bigl(f_y(z) - \max_{k \ne y} f_k(z) + \kappa,\ 0\bigr),
              \qquad z = (\tanh w + 1) / 2

    by Adam, starting from x for each c, or a little inside the box where w is beyond ``steps * learning_rate``, from
    where Adam would not come back. c grows tenfold until the model is fooled; after that, c is the middle between the
    largest c that failed and the smallest c that succeeded. The nearest point that fools the model is returned. All
    steps are taken, whereas the authors' code ends a round once the objective no longer falls. The model must return
    logits, not probabilities; with batch normalisation it must use its running statistics.

    Attributes:
      steps: number of steps of Adam for each c.
      binary_search_steps: number of values of c.
      learning_rate: learning rate of Adam.
      confidence: kappa, the lead of the wrong class over the right one that counts as success.
      initial_c: the first value of c.
      targeted: labels are the classes that the attack aims at.

    Example:
      >>> attack = attacks.carlini_wagner(steps=100, learning_rate=0.05)
      >>> print(attack(key, logits_fn, x, labels).distance)
      [0.19 0.38]

    Reference:
      Carlini and Wagner 2017, Towards Evaluating the Robustness of Neural Networks, arXiv 1608.04644.
    """

    steps: int = 1000
    binary_search_steps: int = 9
    learning_rate: float = 1e-2
    confidence: float = 0.0
    initial_c: float = 1e-3
    targeted: bool = False

    def __post_init__(self):
        check_settings(steps=self.steps, binary_search_steps=self.binary_search_steps)
        _validate.positive(learning_rate=self.learning_rate, initial_c=self.initial_c)
        _validate.not_negative(confidence=self.confidence)

    def __call__(
        self, key: Key[Array, "..."], logits_fn: LogitsFn, x: Float[AnyArray, "batch ..."], labels: AnyArray
    ) -> MinimumNorm:
        """Returns the nearest adversarial inputs; the key does not matter. Raises as :func:`pgd`."""
        return run(self, key, logits_fn, x, labels)

    def perturb(self, keys, logits_fn, x, labels, epsilon):
        """Runs the whole search, traceable."""
        import optax

        model = Model(logits_fn, losses.margin, labels, targeted=self.targeted)
        optimizer = optax.adam(self.learning_rate)
        # No farther out than the steps lead back: the change of variables has hardly a slope at the ends of the box.
        limit = min(_INSIDE, math.tanh(self.steps * self.learning_rate))
        start = jnp.arctanh(jnp.clip((2 * x - 1) * _INSIDE, -limit, limit))
        infinite, nobody = jnp.full(x.shape[0], jnp.inf, x.dtype), jnp.zeros(x.shape[0], bool)

        def search(_, state):
            c, low, high, found = state

            def step(_, state):
                w, moments, found, succeeded = state
                tanh = jnp.tanh(w)
                z = (tanh + 1) / 2
                lead, fooled, gradient = model.ascend(keys, z)
                fooled &= lead >= self.confidence
                found = nearer(found, z, _ball.norms_of(z - x, "l2"), fooled)
                weight = _ball.per_row(jnp.where(lead < self.confidence, c, 0.0), x)
                slope = (2 * (z - x) - weight * gradient) * (1 - jnp.square(tanh)) / 2
                with jax.numpy_dtype_promotion("standard"):  # Optax's Adam raises a float to an integer power
                    updates, moments = optimizer.update(slope, moments)
                return optax.apply_updates(w, updates), moments, found, succeeded | fooled

            state = (start, optimizer.init(start), found, nobody)
            *_, found, succeeded = jax.lax.fori_loop(0, self.steps, step, state)
            low, high = jnp.where(succeeded, low, c), jnp.where(succeeded, c, high)
            c = jnp.where(jnp.isfinite(high), (low + high) / 2, jnp.minimum(10 * c, _LARGEST_C))
            return c, low, high, found

        lead, fooled = model.look(keys, x)
        state = (jnp.full_like(infinite, self.initial_c), jnp.zeros_like(infinite), infinite)
        found = unmoved(x, fooled & (lead >= self.confidence))
        return jax.lax.fori_loop(0, self.binary_search_steps, search, (*state, found))[3]


carlini_wagner = CarliniWagner
