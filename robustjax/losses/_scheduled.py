"""Objectives whose settings change while a model is trained."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from robustjax import _validate
from robustjax.losses._objectives import Augmented, Aux, Objective
from robustjax.typing import Apply, Batch, ModelState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ramp:
    r"""A number that goes from one value to another in a straight line.

    .. math:: v(t) = a + (b - a)\, \min\bigl(1, \max(0, (t - t_0) / n)\bigr)

    With ``steps`` = 0 it jumps from ``start`` to ``end`` at ``begin``.

    Attributes:
      end: b, its value after the ramp.
      steps: n, how many steps of training the ramp takes.
      start: a, its value before.
      begin: t_0, the step at which it begins to change.
    """

    end: float
    steps: int
    start: float = 0.0
    begin: int = 0

    def __post_init__(self):
        for name in ("start", "end"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)!r}.")
        _validate.at_least(0, steps=self.steps, begin=self.begin)

    def __call__(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """Returns its value at a step, float32."""
        if not self.steps:
            return jnp.where(step >= self.begin, jnp.float32(self.end), jnp.float32(self.start))
        share = jnp.clip((step - self.begin).astype(jnp.float32) / self.steps, 0, 1)
        return self.start + (self.end - self.start) * share


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """An objective with settings that follow the step of training; made by :func:`scheduled`.

    A training step of :func:`robustjax.training.make_step` takes its settings at that step; called by itself, it is the
    objective with its settings at the end.
    """

    objective: Objective
    ramps: tuple[tuple[str, Ramp], ...]

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss of ``batch`` with all settings at their end, and the renewed state with metrics."""
        return _with(self.objective, {name: ramp.end for name, ramp in self.ramps})(key, apply, state, batch)


def scheduled(objective: Any, **ramps: Any) -> Objective:
    """Lets settings of an objective follow the step of training, as in the warm-ups of the papers.

    ::

        losses.scheduled(losses.smoothing.smoothadv(sigma=0.5), epsilon=losses.ramp(end=1.0, steps=1000))
        losses.scheduled(losses.smoothing.macer(sigma=0.5), weight=losses.ramp(end=16.0, begin=3000, steps=0))

    Args:
      objective: a frozen dataclass, as all objectives of this package are; an augmented one has the settings of the
        objective inside.
      **ramps: for names of its settings that are floats, their :func:`ramp`.

    Returns:
      An objective; equal for equal arguments.

    Raises:
      ValueError: for a name that is no float setting of the objective, or a ramp that ends out of the setting's range.
    """
    if isinstance(objective, Augmented):
        return dataclasses.replace(objective, objective=scheduled(objective.objective, **ramps))
    floats = [
        field.name for field in dataclasses.fields(objective) if isinstance(getattr(objective, field.name), float)
    ]
    for name, ramp in ramps.items():
        if name not in floats:
            wanted = ", ".join(floats) or "none"
            raise ValueError(f"ramps must name float settings of {type(objective).__name__} ({wanted}), got {name!r}.")
        if not isinstance(ramp, Ramp):
            raise ValueError(f"{name} must be a losses.ramp, got {ramp!r}.")
    dataclasses.replace(objective, **{name: ramp.end for name, ramp in ramps.items()})  # checks their ranges
    return Scheduled(objective, tuple(sorted(ramps.items())))


def at_step(objective: Objective, step: Int[Array, ""]) -> Objective:
    """Sets the settings of a scheduled objective to their values at a step, as every step of training does.

    Args:
      objective: any; one without schedules is returned as it is.
      step: number of steps taken; may be traced.

    Returns:
      The objective at this step; not to be hashed where the step is traced.
    """
    if isinstance(objective, Augmented):
        return dataclasses.replace(objective, objective=at_step(objective.objective, step))
    if isinstance(objective, Scheduled):
        return _with(objective.objective, {name: ramp(step) for name, ramp in objective.ramps})
    return objective


ramp = Ramp


def _with(objective: Objective, settings: dict) -> Objective:
    """The objective with other settings, which it does not check: they may be traced, and 0 where a ramp begins."""
    changed = copy.copy(objective)
    for name, value in settings.items():
        object.__setattr__(changed, name, value)
    return changed
