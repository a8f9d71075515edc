"""The Carlini-Wagner attack: the smallest l2 change, by gradient descent and a binary search."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from robustjax import _arguments, _validate, losses
from robustjax.attacks import _ball, _box
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
    where Adam would not come back. In a box of another width, lengths are in units of its largest finite width. A
    number with one bound is :math:`\log(1 + e^w)` away from it, and one without bounds is :math:`x + w`. c grows
    tenfold until the model is fooled; after that, c is the middle between the largest c that failed and the smallest c
    that succeeded. The nearest point that fools the model is returned. All steps are taken, whereas the authors' code
    ends a round once the objective no longer falls. The model must return logits, not probabilities; with batch
    normalisation it must use its running statistics.

    Attributes:
      steps: number of steps of Adam for each c.
      binary_search_steps: number of values of c.
      learning_rate: learning rate of Adam.
      confidence: kappa, the lead of the wrong class over the right one that counts as success.
      initial_c: the first value of c.
      targeted: labels are the classes that the attack aims at.
      bounds: the range of inputs: ``(low, high)``, numbers or one number for each feature, or None for any numbers.

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
    bounds: _box.Bounds | None = (0.0, 1.0)

    def __post_init__(self):
        _box.keep_frozen(self)
        check_settings(steps=self.steps, binary_search_steps=self.binary_search_steps)
        _validate.positive(learning_rate=self.learning_rate, initial_c=self.initial_c)
        _validate.not_negative(confidence=self.confidence)

    def __call__(
        self, key: Key[Array, "..."], logits_fn: LogitsFn, x: Float[AnyArray, "batch ..."], labels: AnyArray
    ) -> MinimumNorm:
        """Returns the nearest adversarial inputs; the key does not matter. Raises as :func:`pgd`."""
        return run(self, key, logits_fn, x, labels)

    def perturb(self, keys, logits_fn, x, labels, epsilon, *, box=None):
        """Runs the whole search, traceable."""
        import optax

        model = Model(logits_fn, losses.margin, labels, targeted=self.targeted)
        optimizer = optax.adam(self.learning_rate)
        box = _box.of(box or self.bounds, x)
        start, point = (_in_box if _box.is_finite(self.bounds) else _anywhere)(x, box, self.steps * self.learning_rate)
        infinite, nobody = jnp.full(x.shape[0], jnp.inf, x.dtype), jnp.zeros(x.shape[0], bool)

        def search(_, state):
            c, low, high, found = state

            def step(_, state):
                w, moments, found, succeeded = state
                z, rate = point(w)
                lead, fooled, gradient = model.ascend(keys, z)
                fooled &= lead >= self.confidence
                found = nearer(found, z, _ball.norms_of(z - x, "l2"), fooled)
                weight = _ball.per_row(jnp.where(lead < self.confidence, c, 0.0), x)
                slope = (2 * (z - x) / jnp.square(box.scale) - weight * gradient) * rate
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


def _in_box(x, box, reach):
    """The variable w of inputs that have two bounds, and the function from w to points and their derivatives."""
    width = box.high - box.low
    unit = 2 * ((x - box.low) / jnp.where(width > 0, width, 1.0)) - 1
    # No farther out than the steps lead back: the change of variables has hardly a slope at the ends of the box.
    limit = min(_INSIDE, math.tanh(reach))

    def point(w):
        tanh = jnp.tanh(w)
        z = box.low + width * ((tanh + 1) / 2)
        return jnp.clip(z, box.low, box.high), width * ((1 - jnp.square(tanh)) / 2)

    return jnp.arctanh(jnp.clip(unit * _INSIDE, -limit, limit)), point


def _anywhere(x, box, reach):
    """As ``_in_box``, for inputs of which some numbers have one bound or none."""
    from_low, from_high = jnp.isfinite(box.low), jnp.isfinite(box.high)
    low, high = jnp.where(from_low, box.low, 0.0), jnp.where(from_high, box.high, 0.0)
    has_two = from_low & from_high
    inner, inner_point = _in_box(x, _box.Box(jnp.where(has_two, low, 0.0), jnp.where(has_two, high, 1.0), 1.0), reach)
    away = jnp.maximum(jnp.where(from_low, x - low, high - x) / box.scale, 1 - _INSIDE)
    outer = jnp.maximum(away + jnp.log(-jnp.expm1(-away)), -reach)  # the inverse of softplus

    def pick(two, one, none):
        return jnp.where(has_two, two, jnp.where(from_low | from_high, one, none))

    def point(w):
        z, rate = inner_point(w)
        step, slope = box.scale * jax.nn.softplus(w), box.scale * jax.nn.sigmoid(w)
        z = pick(z, jnp.where(from_low, low + step, high - step), x + box.scale * w)
        return jnp.clip(z, box.low, box.high), pick(rate, jnp.where(from_low, slope, -slope), box.scale)

    return pick(inner, outer, 0.0), point


carlini_wagner = CarliniWagner
