"""APGD: projected gradient descent that chooses its own step sizes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from robustjax import _arguments, _validate, losses
from robustjax.attacks import _ball, _box
from robustjax.attacks._attack import (
    Best,
    LossFn,
    Model,
    better,
    check_settings,
    fold_in,
    is_fooled,
    loss_of,
    rows,
    run,
    start_from,
)
from robustjax.perturbations import standard_normal
from robustjax.typing import AnyArray


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class APGD:
    r"""Auto-PGD: gradient steps with momentum, whose size is halved where the loss no longer rises.

    .. math::
        z_{t+1} &= \Pi\bigl(x_t + \eta\, v(\nabla_x L(x_t, y))\bigr) \\
        x_{t+1} &= \Pi\bigl(x_t + \tfrac 3 4 (z_{t+1} - x_t) + \tfrac 1 4 (x_t - x_{t-1})\bigr)

    from :math:`\eta = 2 \epsilon`, for linf and l2. At each checkpoint (after 22, 41, 57, 70, 80, 87, 93 and 99 of 100
    steps), an input halves eta and returns to its best point in two cases: at most a share ``rho`` of the steps since
    the last checkpoint raised the loss, or eta was not halved at the last checkpoint and the highest loss has not risen
    since.

    For l1, a step has no momentum. It moves the pixels with the largest gradients, two thirds as many as the best point
    has changed, and its size falls from :math:`\epsilon` by a factor of 1.5 at each checkpoint, until the best point
    changes fewer pixels. The radius is :math:`3 \epsilon`, then :math:`2 \epsilon`, for 30 % of the steps each.

    Each input stops at the first point that fools the model. A model with batch normalisation must use its running
    statistics.

    Attributes:
      epsilon: radius of the ball, in units of the inputs; at most their largest distance, 1 in linf for images.
      norm: ``"linf"``, ``"l2"`` or ``"l1"``.
      steps: number of steps for each restart.
      loss: ``"ce"`` (or ``"cross_entropy"``), ``"dlr"``, ``"margin"``, or ``(logits, labels) -> (batch,)``.
      restarts: number of random starts; the best point of all starts is returned.
      rho: share of rising steps below which eta is halved.
      targeted: labels are the classes that the attack aims at, and the loss is minimised.
      samples: draws of a random model, see :func:`expectation_over_transformation`.
      bounds: the range of inputs: ``(low, high)``, numbers or one number for each feature, or None for any numbers.

    Differs from the paper as the authors' code does: the first step counts as a rise if its loss is above 0, rather
    than above the loss of the start, and the checkpoints are rounded down.

    Example:
      >>> x_adv = attacks.apgd(epsilon=0.15)(key, logits_fn, x, labels)
      >>> print(logits_fn(x_adv).argmax(-1) == labels)
      [False  True]

    Reference:
      Croce and Hein 2020, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
      attacks, arXiv 2003.01690; for l1: Croce and Hein 2021, Mind the box: l1-APGD for sparse adversarial attacks on
      image classifiers, arXiv 2103.01208.
    """

    epsilon: float
    norm: _ball.Norm = "linf"
    steps: int = 100
    loss: str | LossFn = "ce"
    restarts: int = 1
    rho: float = 0.75
    targeted: bool = False
    samples: int | None = None
    bounds: _box.Bounds | None = (0.0, 1.0)

    def __post_init__(self):
        check_settings(epsilon=self.epsilon, steps=self.steps, restarts=self.restarts, samples=self.samples)
        _ball.check_norm(self.norm)
        _box.keep_frozen(self)
        _box.check_epsilon(self.epsilon, self.norm, self.bounds)
        loss_of(self.loss)
        _validate.probability(rho=self.rho)

    def __call__(
        self, key: Key[Array, "..."], logits_fn: Callable, x: Float[AnyArray, "batch ..."], labels: AnyArray
    ) -> Float[Array, "batch ..."]:
        """Returns adversarial inputs, for one key or one key per input; ValueError for inputs of the wrong kind."""
        return run(self, key, logits_fn, x, labels)

    def perturb(self, keys, logits_fn, x, labels, epsilon, *, box=None):
        """Runs all restarts, traceable."""
        box = _box.of(box or self.bounds, x)
        model = Model(logits_fn, loss_of(self.loss), labels, self.samples, self.targeted)
        return _best_of((0, self.restarts), self, lambda _: model, keys, x, epsilon, box, start_from(x)).x


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class APGDTargeted:
    """Auto-PGD on the targeted DLR loss, towards one likely wrong class after another.

    The targets of an input are the classes with its largest logits, except the first. An input is done as soon as the
    model answers any wrong class; see :func:`apgd` for the steps.

    Attributes:
      epsilon: radius of the ball, in units of the inputs; at most their largest distance, 1 in linf for images.
      norm: ``"linf"``, ``"l2"`` or ``"l1"``.
      steps: number of steps for each target and restart.
      num_targets: number of targets; if it exceeds the number of wrong classes, all of them are tried, with a warning.
      restarts: number of random starts for each target.
      rho: share of rising steps below which the step size is halved.
      samples: draws of a random model, see :func:`expectation_over_transformation`.
      bounds: the range of inputs: ``(low, high)``, numbers or one number for each feature, or None for any numbers.

    Reference:
      Croce and Hein 2020, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
      attacks, arXiv 2003.01690.
    """

    epsilon: float
    norm: _ball.Norm = "linf"
    steps: int = 100
    num_targets: int = 9
    restarts: int = 1
    rho: float = 0.75
    samples: int | None = None
    bounds: _box.Bounds | None = (0.0, 1.0)

    def __post_init__(self):
        check_settings(epsilon=self.epsilon, steps=self.steps, restarts=self.restarts, samples=self.samples)
        check_settings(num_targets=self.num_targets)
        _ball.check_norm(self.norm)
        _box.keep_frozen(self)
        _box.check_epsilon(self.epsilon, self.norm, self.bounds)
        _validate.probability(rho=self.rho)

    def __call__(
        self, key: Key[Array, "..."], logits_fn: Callable, x: Float[AnyArray, "batch ..."], labels: AnyArray
    ) -> Float[Array, "batch ..."]:
        """Returns adversarial inputs; ValueError for inputs of the wrong kind and models of fewer than 4 classes."""
        return run(self, key, logits_fn, x, labels)

    def attempt(self, number: int | np.integer, key, logits_fn, x, labels):
        """One attempt by its number, over all targets and restarts; all numbers share one compiled program."""
        _validate.at_least(0, number=number)
        return run(self, key, logits_fn, x, labels, number)

    def perturb(self, keys, logits_fn, x, labels, epsilon, attempt=None, *, box=None):
        """Runs all targets and restarts, or only one attempt; traceable."""
        box = _box.of(box or self.bounds, x)
        logits = Model(logits_fn, losses.margin, labels, self.samples).answer(fold_in(keys, 0), x)
        ranked = jnp.argsort(logits, axis=-1, descending=True)
        targets = min(self.num_targets, logits.shape[-1] - 1)

        def model_of(attempt):
            target = jnp.take(ranked, 1 + attempt // self.restarts, axis=-1)
            loss = lambda logits, labels: losses.targeted_difference_of_logits_ratio(logits, labels, target)
            return Model(logits_fn, loss, labels, self.samples)

        start = start_from(x)._replace(fooled=is_fooled(logits, labels))
        attempts = (0, targets * self.restarts) if attempt is None else (attempt, attempt + 1)
        best = _best_of(attempts, self, model_of, fold_in(keys, 1), x, epsilon, box, start)
        if targets < self.num_targets:
            _validate.warn(
                f"num_targets={self.num_targets} exceeds the wrong answers of a model of {logits.shape[-1]} classes: "
                f"only {targets} are tried."
            )
        return best.x


apgd = APGD
apgd_targeted = APGDTargeted


def checkpoints(steps: int) -> tuple[int, ...]:
    """Numbers of steps after which a step size may be halved: 22 %, then windows that shrink by 3 % down to 6 %."""
    window, smaller, smallest = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    positions = [window]
    while positions[-1] + (window := max(window - smaller, smallest)) <= steps:
        positions.append(positions[-1] + window)
    return tuple(positions)


class _Plan(NamedTuple):
    """Phases of a run, each at its own radius, each from the best point of the previous phase.

    Attributes:
      radii: ``(phases,)``, in units of epsilon.
      steps: ``(phases,)``.
      most_rises: ``(phases, steps + 1)``: at a checkpoint, the number of rising steps up to which eta is halved (only
        for linf and l2); -1 elsewhere.
    """

    radii: Float[Array, " phases"]
    steps: Int[Array, " phases"]
    most_rises: Int[Array, "phases steps"]


def _plan(attack, dtype) -> _Plan:
    if attack.norm == "l1":
        early = min(math.ceil(0.3 * attack.steps), (attack.steps - 1) // 2)
        radii, steps = (3.0, 2.0, 1.0), (early, early, attack.steps - 2 * early)
        windows = [max(int(0.04 * n), 1) for n in steps]
        positions = [np.arange(window, n + 1, window) for window, n in zip(windows, steps)]
    else:
        radii, steps, positions = (1.0,), (attack.steps,), [np.array(checkpoints(attack.steps))]
    most_rises = np.full((len(radii), attack.steps + 1), -1, np.int32)
    for row, at in zip(most_rises, positions):
        row[at] = np.floor(attack.rho * np.diff(at, prepend=0))
    return _Plan(jnp.array(radii, dtype), jnp.array(steps, jnp.int32), jnp.array(most_rises))


def _best_of(attempts, attack, model_of, keys, x, epsilon, box, best) -> Best:
    """The best of a range of attempts, each with its own model and its own start."""
    plan = _plan(attack, x.dtype)
    phases = plan.radii.shape[0]

    def attempt(number, best):
        start_keys, step_keys = fold_in(fold_in(keys, number), 0), fold_in(fold_in(keys, number), 1)
        model = model_of(number)

        def phase(number, found):
            radius, most_rises = plan.radii[number] * epsilon, plan.most_rises[number]
            keys, can_end = fold_in(step_keys, number), number == phases - 1
            climb = _Climb(model, keys, x, radius, attack.norm, box, most_rises, can_end)
            goes_on = lambda state: (state.i <= plan.steps[number]) & ~(best.fooled | state.best.fooled).all()
            return jax.lax.while_loop(goes_on, climb.step, climb.start(found.x)).best

        start = _start(start_keys, x, plan.radii[0] * epsilon, attack.norm, box)
        return better(best, *jax.lax.fori_loop(0, phases, phase, start_from(start)))

    return jax.lax.fori_loop(attempts[0], attempts[1], attempt, best)


def _start(keys, x, radius, norm, box):
    """Draws from the surface of the ball, not yet clipped to the box; for l1, normal draws that are projected later."""
    draw = _ball.uniform if norm == "linf" else standard_normal
    draws = jax.vmap(lambda key: draw(key, x.shape[1:]))(keys).astype(x.dtype)
    if norm == "l1":  # as wide as the box; where it has no width, as the ball
        return x + draws * jnp.where(jnp.isfinite(box.high - box.low), box.scale, radius)
    return x + radius * _ball.unit(draws, norm)


class _Halving(NamedTuple):
    """What step sizes depend on, for linf and l2: the loss of the last point, and the state since a checkpoint."""

    step_size: Float[Array, " batch"]
    value: Float[Array, " batch"]
    rises: Int[Array, " batch"]
    highest: Float[Array, " batch"]
    halved: Bool[Array, " batch"]


def halve(state: _Halving, i: Array, value: Array, highest: Array, most_rises: Array) -> tuple[Array, _Halving]:
    """Returns which inputs go back to their best point after step i, and the next state."""
    rises = state.rises + (value > state.value).astype(jnp.int32)
    is_checkpoint = most_rises >= 0
    stalls = ~state.halved & (highest <= state.highest)
    halved = is_checkpoint & ((rises <= most_rises) | stalls)
    # The loss of the start counts as 0, as in the authors' code; before the start, no loss rises and no input stalls.
    return halved, _Halving(
        step_size=jnp.where(halved, state.step_size / 2, state.step_size),
        value=jnp.where(i == 0, 0.0, value),
        rises=jnp.where(is_checkpoint, 0, rises),
        highest=jnp.where(is_checkpoint, highest, state.highest),
        halved=jnp.where(is_checkpoint, halved, state.halved),
    )


class _Sparsity(NamedTuple):
    """What steps depend on, for l1: the number of pixels that the best point had changed at the last checkpoint."""

    step_size: Float[Array, " batch"]
    changed: Int[Array, " batch"]


def sparsen(state: _Sparsity, changed: Array, radius: Array, is_checkpoint: Array) -> tuple[Array, _Sparsity]:
    """Returns which inputs go back to their best point, because it changes under 95 % of the pixels, and the state."""
    fewer = is_checkpoint & (20 * changed < 19 * state.changed)
    smaller = jnp.where(fewer, radius, jnp.maximum(state.step_size / 1.5, radius / 10))
    return fewer, _Sparsity(
        step_size=jnp.where(is_checkpoint, smaller, state.step_size),
        changed=jnp.where(is_checkpoint, changed, state.changed),
    )


class _State(NamedTuple):
    """After i steps: the point and the one before, the best point with its gradient, and what steps depend on."""

    i: Int[Array, ""]
    z: Float[Array, "batch ..."]
    previous: Float[Array, "batch ..."]
    best: Best
    gradient: Float[Array, "batch ..."]
    schedule: _Halving | _Sparsity


class _Climb(NamedTuple):
    """Steps of one run in one ball around x."""

    model: Model
    keys: Key[Array, " batch"]
    x: Float[Array, "batch ..."]
    radius: Float[Array, ""]
    norm: _ball.Norm
    box: _box.Box
    most_rises: Int[Array, " steps"]
    can_end: Bool[Array, ""]  # whether a point that fools the model ends the search: not at the larger radii of l1

    def start(self, z):
        """The state before the first step."""
        z = _ball.settle(z, self.x, self.radius, self.norm, self.box)
        of_rows = lambda value: jnp.full(z.shape[0], value, z.dtype)
        if self.norm == "l1":
            schedule = _Sparsity(of_rows(self.radius), self._changed(z))
        else:
            zeros = jnp.zeros(z.shape[0], jnp.int32)
            schedule = _Halving(of_rows(2 * self.radius), of_rows(jnp.inf), zeros, of_rows(jnp.inf), zeros == 0)
        return _State(jnp.int32(0), z, z, start_from(z), jnp.zeros_like(z), schedule)

    def step(self, state):
        """Evaluates the point, and takes a step from it or from the best point."""
        i, z, previous, best, gradient_of_best, schedule = state
        value, fooled, gradient = self.model.ascend(fold_in(self.keys, i), z)
        gradient_of_best = rows(value > best.value, gradient, gradient_of_best)
        best = better(best, z, value, fooled & self.can_end)
        if self.norm == "l1":
            back, schedule = sparsen(schedule, self._changed(best.x), self.radius, self.most_rises[i] >= 0)
        else:
            back, schedule = halve(schedule, i, value, best.value, self.most_rises[i])
        z, gradient = rows(back, best.x, z), rows(back, gradient_of_best, gradient)
        moved = self._move(z, previous, gradient, schedule, jnp.where(i == 0, 1.0, 0.75).astype(z.dtype))
        return _State(i + 1, moved, z, best, gradient_of_best, schedule)

    def _move(self, z, previous, gradient, schedule, share):
        step_size = _ball.per_row(schedule.step_size, z)
        if self.norm == "l1":
            sparse = z + step_size * _sparse(gradient, schedule.changed)
            return _ball.settle(sparse, self.x, self.radius, self.norm, self.box)
        aim = _ball.project(
            z + step_size * _ball.steepest(gradient, self.norm), self.x, self.radius, self.norm, self.box
        )
        return _ball.settle(
            z + share * (aim - z) + (1 - share) * (z - previous), self.x, self.radius, self.norm, self.box
        )

    def _changed(self, z):
        return (z != self.x).reshape(z.shape[0], -1).sum(-1, dtype=jnp.int32)


def _sparse(gradient, changed):
    """Signs of the largest gradients, two thirds as many as there are changed pixels, scaled to l1 norm 1."""
    size = jnp.abs(gradient.reshape(gradient.shape[0], -1))
    kept = jnp.maximum((2 * changed + 2) // 3, 1)
    least = jnp.take_along_axis(jnp.sort(size, -1), (size.shape[-1] - kept)[:, None], -1)[:, 0]
    chosen = jnp.abs(gradient) >= _ball.per_row(least, gradient)
    return _ball.unit(jnp.where(chosen, jnp.sign(gradient), 0.0), "l1")
