"""Objectives whose settings change during training."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from robustjax import _arguments, _validate
from robustjax.losses._objectives import Augmented, Aux, Objective
from robustjax.typing import Apply, Batch, ModelState


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class Ramp:
    r"""A number that changes linearly from one value to another.

    .. math:: v(t) = a + (b - a)\, \min\bigl(1, \max(0, (t - t_0) / n)\bigr)

    With ``steps=0`` it jumps from ``start`` to ``end`` at step ``begin``.

    Attributes:
      end: b, the value after the ramp.
      steps: n, number of training steps that the ramp takes.
      start: a, the value before the ramp.
      begin: t_0, the step at which the ramp begins.

    Example:
      >>> epsilon = losses.ramp(end=1.0, steps=1000, begin=500)
      >>> print(*(f"{epsilon(jnp.array(step)):.1f}" for step in (0, 500, 1000, 1500, 2000)))
      0.0 0.0 0.5 1.0 1.0
    """

    end: float
    steps: int
    start: float = 0.0
    begin: int = 0

    def __post_init__(self):
        _validate.finite_number(start=self.start, end=self.end)
        _validate.at_least(0, steps=self.steps, begin=self.begin)

    def __call__(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """Returns the value at a step, float32."""
        if not self.steps:
            return jnp.where(step >= self.begin, jnp.float32(self.end), jnp.float32(self.start))
        share = jnp.clip((step - self.begin).astype(jnp.float32) / self.steps, 0, 1)
        return self.start + (self.end - self.start) * share


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """An objective with settings that depend on the training step; made by :func:`scheduled`.

    :func:`robustjax.training.make_step` uses the settings of the current step; a direct call uses the final settings.
    """

    objective: Objective
    ramps: tuple[tuple[str, Ramp], ...]

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss of ``batch`` with the final settings, and the updated state with metrics."""
        return _with(self.objective, {name: ramp.end for name, ramp in self.ramps})(key, apply, state, batch)


@_arguments.checked
def scheduled(objective: Any, **ramps: Any) -> Objective:
    """Makes settings of an objective depend on the training step, as in the warm-ups of the papers.

    Args:
      objective: a frozen dataclass, as all objectives of this package are; for an augmented objective, the settings are
        the settings of the objective inside.
      **ramps: a :func:`ramp` for each setting that changes, by its name; the setting must be a float.

    Returns:
      An objective; equal for equal arguments.

    Raises:
      ValueError: for a name that is not a float setting of the objective, or a ramp that ends outside the setting's
        range.

    Example:
      >>> warm_up = losses.ramp(end=1.0, steps=1000)
      >>> objective = losses.scheduled(losses.smoothing.smoothadv(sigma=0.5), epsilon=warm_up)
      >>> print(losses.at_step(objective, jnp.array(250)).epsilon)
      0.25
    """
    if not dataclasses.is_dataclass(objective) or isinstance(objective, type):
        raise ValueError(f"objective must be a dataclass with settings, got {_validate.short(objective)}.")
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


@_arguments.checked
def at_step(objective: Objective, step: Int[Array, ""]) -> Objective:
    """Returns a scheduled objective with its settings at a step, as every training step uses it.

    Args:
      objective: any objective; an objective without schedules is returned unchanged.
      step: number of steps taken; may be traced.

    Returns:
      The objective at this step; it cannot be hashed if the step is traced.

    Example:
      >>> weight = losses.ramp(end=16.0, begin=3000, steps=0)
      >>> objective = losses.scheduled(losses.smoothing.macer(sigma=0.5), weight=weight)
      >>> print(*(losses.at_step(objective, jnp.array(step)).weight for step in (2999, 3000)))
      0.0 16.0
    """
    if not dataclasses.is_dataclass(objective) or isinstance(objective, type):
        raise ValueError(f"objective must be a dataclass with settings, got {_validate.short(objective)}.")
    if isinstance(objective, Augmented):
        return dataclasses.replace(objective, objective=at_step(objective.objective, step))
    if isinstance(objective, Scheduled):
        return _with(objective.objective, {name: ramp(step) for name, ramp in objective.ramps})
    return objective


ramp = Ramp


def _with(objective: Objective, settings: dict) -> Objective:
    """The objective with other settings, unchecked: they may be traced, and 0 at the start of a ramp."""
    changed = copy.copy(objective)
    for name, value in settings.items():
        object.__setattr__(changed, name, value)
    return changed
