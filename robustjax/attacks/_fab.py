"""Fast adaptive boundary attack: steps to the linearised decision boundary that come ever nearer to the input."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from robustjax import _arguments, _validate
from robustjax.attacks import _ball, _box
from robustjax.attacks._attack import Model, check_settings, fold_in, is_fooled, rows, run
from robustjax.attacks._compose import MinimumNorm, nearer, unmoved
from robustjax.perturbations import standard_normal
from robustjax.typing import AnyArray, LogitsFn

_LEAST_NORM = 1e-8  # keeps the weights of the two projections finite if both are zero; as in the authors' code


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class FAB:
    r"""Minimum-norm attack that walks along the decision boundary towards the input (FAB-T).

    For each target t, a class with one of the next largest clean logits, the boundary :math:`f_t(z) = f_y(z)` is
    linearised at the current point z. With the shortest displacements :math:`\delta` from z and :math:`\delta_0` from
    the input x to this hyperplane, both within the box,

    .. math:: z \leftarrow (1 - \alpha)(z + \eta\,\delta) + \alpha (x + \eta\,\delta_0), \qquad
              \alpha = \min\Bigl(\frac{\lVert\delta\rVert}{\lVert\delta\rVert + \lVert\delta_0\rVert},
              \alpha_{\max}\Bigr)

    clipped to the box. A point that fools the model is kept if it is the nearest so far, and the walk continues from
    :math:`x + \beta (z - x)`. A model with batch normalisation must use its running statistics.

    Attributes:
      norm: ``"linf"``, ``"l2"`` or ``"l1"``.
      steps: number of gradients for each target and restart.
      num_targets: number of classes to try; all wrong classes if there are fewer.
      restarts: walks to each target; the first starts at x.
      alpha_max: largest weight of the step from x.
      eta: factor by which to overshoot the hyperplane; at least 1.
      beta: share of the displacement from x that is kept once the model is fooled.
      epsilon: a distance that is near enough, in units of the inputs, at which the search for an input ends; None
        never ends it. Restarts begin at half the smallest distance known, or at half of epsilon if that is smaller.
      bounds: the range of inputs: ``(low, high)``, numbers or one number for each feature, or None for any numbers.

    Example:
      >>> found = attacks.fab(norm="linf", steps=20)(key, logits_fn, x, labels)
      >>> print(found.distance)
      [0.1 0.2]

    Reference:
      Croce and Hein 2020, Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack,
      arXiv 1907.02044; the targets: arXiv 2003.01690.
    """

    norm: _ball.Norm = "linf"
    steps: int = 100
    num_targets: int = 9
    restarts: int = 1
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    epsilon: float | None = None
    bounds: _box.Bounds | None = (0.0, 1.0)

    def __post_init__(self):
        check_settings(steps=self.steps, num_targets=self.num_targets, restarts=self.restarts)
        check_settings(epsilon=0.0 if self.epsilon is None else self.epsilon)
        _ball.check_norm(self.norm)
        _box.keep_frozen(self)
        if self.epsilon is not None:
            _box.check_epsilon(self.epsilon, self.norm, self.bounds)
        _validate.probability(alpha_max=self.alpha_max, beta=self.beta)
        if not 1 <= _validate.number(self.eta) < math.inf:
            raise ValueError(f"eta must be at least 1 and finite, got {self.eta!r}.")

    def __call__(
        self, key: Key[Array, "..."], logits_fn: LogitsFn, x: Float[AnyArray, "batch ..."], labels: AnyArray
    ) -> MinimumNorm:
        """Returns the nearest adversarial inputs; only restarts use the key. Raises as :func:`pgd`."""
        return run(self, key, logits_fn, x, labels)

    def attempt(self, number: int | np.integer, key, logits_fn, x, labels):
        """One walk by its number, over all targets and restarts; all numbers share one compiled program."""
        _validate.at_least(0, number=number)
        return run(self, key, logits_fn, x, labels, number)

    def perturb(self, keys, logits_fn, x, labels, epsilon, attempt=None, *, box=None):
        """Runs all walks, or only one; traceable."""
        box = _box.of(box or self.bounds, x)
        sides = _box.as_row(box)
        logits = logits_fn(x)
        num_targets = min(self.num_targets, logits.shape[-1] - 1)
        ranked = jax.lax.top_k(logits, num_targets + 1)[1]
        near_enough = jnp.zeros((), x.dtype) if epsilon is None else epsilon

        def walk(index, found):
            targets = ranked[:, 1 + index // self.restarts]
            model = Model(logits_fn, functools.partial(_difference, targets=targets), labels)

            def step(state):
                i, z, found = state
                value, _, gradient = model.ascend(keys, z)
                normal = gradient.reshape(x.shape[0], -1)
                points = jnp.stack([z, x]).reshape(2, *normal.shape)
                # The linear function at x from its value at z: by the offset of the plane, more digits would cancel.
                values = jnp.stack([value, value + (normal * (points[1] - points[0])).sum(-1)])
                move = functools.partial(to_hyperplane, norm=self.norm, box=sides)
                moves = jax.vmap(move, (0, None, 0))(points, normal, values)
                lengths = jnp.maximum(jax.vmap(functools.partial(_ball.norms_of, norm=self.norm))(moves), _LEAST_NORM)
                alpha = jnp.minimum(lengths[0] / lengths.sum(0), self.alpha_max)[:, None]
                ahead = points + self.eta * moves
                z = jnp.clip(ahead[0] * (1 - alpha) + ahead[1] * alpha, sides.low, sides.high).reshape(x.shape)
                fooled = model.look(keys, z)[1]
                searching = found.distance > near_enough
                found = nearer(found, z, _ball.norms_of(z - x, self.norm), fooled & searching)
                return i + 1, rows(fooled, x + self.beta * (z - x), z), found

            def goes_on(state):
                i, _, found = state
                return (i < self.steps) & (found.distance > near_enough).any()

            start = self._start(fold_in(keys, index), x, box, found.distance, epsilon, index % self.restarts > 0)
            return jax.lax.while_loop(goes_on, step, (jnp.int32(0), start, found))[2]

        walks = (0, num_targets * self.restarts) if attempt is None else (attempt, attempt + 1)
        return jax.lax.fori_loop(*walks, walk, unmoved(x, is_fooled(logits, labels)))

    def _start(self, keys, x, box, distance, epsilon, is_restart):
        if self.restarts == 1:
            return x
        draw = _ball.uniform if self.norm == "linf" else standard_normal
        direction = _ball.unit(jax.vmap(lambda key: draw(key, x.shape[1:]))(keys).astype(x.dtype), self.norm)
        radius = distance if epsilon is None else jnp.minimum(distance, epsilon)
        radius = jnp.where(is_restart, jnp.where(jnp.isfinite(radius), radius, box.scale) / 2, 0.0)
        return jnp.clip(x + _ball.per_row(radius, x) * direction, box.low, box.high)


def _difference(logits, labels, *, targets):
    of = lambda classes: jnp.take_along_axis(logits, classes[:, None], -1)[:, 0]
    return of(targets) - of(labels)


def to_hyperplane(
    x: Float[Array, "batch dim"],
    normal: Float[Array, "batch dim"],
    value: Float[Array, " batch"],
    norm: _ball.Norm,
    box: _box.Box,
) -> Float[Array, "batch dim"]:
    r"""Computes the shortest displacement that takes each point to a hyperplane without leaving the box.

    .. math:: \arg\min_\delta \lVert\delta\rVert_p \quad\text{with}\quad
              \langle w, \delta\rangle = -v, \quad x + \delta \in \text{box}

    Exact up to rounding. Where the plane does not intersect the box, every coordinate moves as far as it can.

    Args:
      x: ``(batch, dim)`` points in the box.
      normal: ``(batch, dim)``, w.
      value: ``(batch,)``, v: the linear function at x, zero on the plane.
      norm: ``"linf"``, ``"l2"`` or ``"l1"``, the p.
      box: its sides, of shape ``()`` or ``(1, dim)``, may be infinite.

    Returns:
      ``(batch, dim)`` displacements.
    """
    largest = jnp.abs(normal).max(-1, initial=0.0)
    scale = jnp.where(largest > 0, largest, 1.0)  # so that squares of small gradients do not vanish
    slope, missing = jnp.abs(normal) / scale[:, None], jnp.abs(value) / scale
    direction = -jnp.sign(value)[:, None] * jnp.sign(normal)
    room = jnp.where(direction == 0, 0.0, jnp.where(direction > 0, box.high - x, x - box.low))
    return direction * (_fill if norm == "l1" else functools.partial(_share, norm=norm))(slope, room, missing)


def _fill(slope, room, missing):
    """For l1: the steepest coordinates move first, each as far as it has room."""
    enough = jnp.minimum(missing[:, None] / jnp.where(slope > 0, slope, 1.0), np.finfo(np.float32).max)
    room = jnp.where(jnp.isinf(room), enough, room)  # the sums below must be finite
    order = jnp.argsort(-slope, axis=-1)
    slope, room = jnp.take_along_axis(slope, order, -1), jnp.take_along_axis(room, order, -1)
    gain = slope * room
    left = missing[:, None] - (jnp.cumsum(gain, -1) - gain)
    moves = jnp.where(left >= gain, room, jnp.maximum(left, 0.0) / jnp.where(slope > 0, slope, 1.0))
    return jnp.put_along_axis(jnp.zeros_like(moves), order, moves, -1, inplace=False)


def _share(slope, room, missing, *, norm):
    """For linf and l2: all coordinates move at once, equally or in proportion to their slope, until they have no room.

    The total gain is concave in the step, so Newton's method approaches the root from below. It is exact as soon as the
    right coordinates have stopped, because the gain is linear between two stops.
    """
    rate = jnp.ones_like(slope) if norm == "linf" else slope

    def newton(state):
        step, _ = state
        moves = step[:, None] * rate < room
        left = missing - jnp.where(moves, 0.0, slope * room).sum(-1)
        gain = jnp.where(moves, slope * rate, 0.0).sum(-1)
        return jnp.where(gain > 0, jnp.maximum(step, left / jnp.where(gain > 0, gain, 1.0)), step), step

    start = jnp.zeros_like(missing)
    step, _ = jax.lax.while_loop(lambda state: (state[0] > state[1]).any(), newton, (start, start - 1.0))
    way = step[:, None] * rate
    return jnp.where(way < room, way, room)


fab = FAB
