"""The box that inputs lie in: a setting of each attack, and arrays of its compiled program."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from robustjax import _validate
from robustjax.typing import AnyArray

Bounds = tuple[Any, Any]
"""``(low, high)``, numbers or one number for each feature, which may be infinite."""

IMAGES = (0.0, 1.0)
_FINITE = (-1.0, 1.0)
_UNLIMITED = 1e38  # widths of larger float32 numbers overflow


class Box(NamedTuple):
    """Bounds of inputs as arrays, of shape ``()`` or ``(1, ...)``: traced, so that another range compiles nothing.

    Attributes:
      low: the smallest values, or minus infinity.
      high: the largest values, or infinity.
      scale: ``()``, the largest finite width, 1 if there is none: the unit of lengths that no argument says.
    """

    low: Any
    high: Any
    scale: Any


def frozen(bounds: Any) -> Bounds | None:
    """``bounds`` as hashable Python numbers, or nested tuples of them; ValueError unless they are a box."""
    if bounds is None or isinstance(bounds, tuple) and all(type(b) is float for b in bounds) and bounds == IMAGES:
        return bounds
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(bounds)):
        raise ValueError("bounds must be numbers that are known, got traced ones: make the attack outside jit.")
    sides = _sides(bounds)
    if sides is None:
        raise ValueError(
            "bounds must be (low, high) with low < high, numbers or one number for each feature, or None for inputs of "
            f"any range, got {_validate.short(bounds)}."
        )
    return _as_tuples(sides[0].tolist()), _as_tuples(sides[1].tolist())


def _sides(bounds):
    """Bounds as two float64 arrays; None if they are no box."""
    try:
        low, high = map(np.asarray, bounds)
        if not {low.dtype.kind, high.dtype.kind} <= set("fiu"):
            return None
        sides = [side.astype(np.float64) for side in (low, high)]
        low, high = (np.where(abs(side) > _UNLIMITED, np.copysign(np.inf, side), side) for side in sides)
        ordered = low <= high if low.ndim or high.ndim else low < high  # a feature may be constant
    except (TypeError, ValueError):  # no pair, or of shapes that do not fit
        return None
    return (low, high) if (ordered & (low < np.inf) & (high > -np.inf)).all() else None


def _as_tuples(value):
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def keep_frozen(attack: Any) -> None:
    """Freezes the field ``bounds`` of a frozen dataclass, so that it is hashable."""
    object.__setattr__(attack, "bounds", frozen(attack.bounds))


def bounds_of(attack: Any) -> Bounds | None:
    """The bounds of an attack; [0, 1] of one that does not say."""
    return frozen(getattr(attack, "bounds", IMAGES))


def is_finite(bounds: Bounds | None) -> bool:
    """Whether every feature has two bounds."""
    return bounds is not None and all(np.isfinite(side).all() for side in bounds)


def static(bounds: Bounds | None) -> Bounds | None:
    """What a compiled program knows of bounds: whether all are finite."""
    return _FINITE if is_finite(bounds) else None


def of(bounds: Bounds | Box | None, x: Any) -> Box:
    """The box of inputs such as x, in their precision; ValueError if bounds do not broadcast against one input."""
    if isinstance(bounds, Box):
        return bounds
    low, high = (np.asarray(side) for side in bounds or (-math.inf, math.inf))
    if low.ndim or high.ndim:
        try:
            low, high = (np.broadcast_to(side, x.shape[1:])[None] for side in (low, high))
        except ValueError:
            raise ValueError(
                f"bounds must be numbers, or broadcast against one input of shape {x.shape[1:]}, got shapes "
                f"{low.shape} and {high.shape}."
            ) from None
    width = high - low
    scale = np.asarray(width[np.isfinite(width)].max(initial=0.0) or 1.0)
    return Box(*(side.astype(x.dtype) for side in (low, high, scale)))


def as_row(box: Box) -> Box:
    """The box of flat inputs, ``(batch, dim)``."""
    return Box(*(side.reshape(1, -1) if side.ndim else side for side in box))


def check_inside(x: AnyArray, bounds: Bounds | None, *, name: str = "x") -> None:
    """Raises ValueError for values that are not finite or out of bounds; those of a traced array are not checked."""
    low, high, _ = of(bounds, x)
    finite = is_finite(bounds)

    def inside(x):  # not by the smallest and the largest value: on CPUs, XLA's min and max ignore NaN
        within = (x >= low) & (x <= high)
        return within if finite else within & _validate.finite(x)

    if isinstance(x, jax.core.Tracer) or _validate.holds(inside, x):
        return
    values = np.asarray(x)
    also = " and NaN" if np.isnan(values).any() else ""
    if low.ndim:
        at = tuple(map(int, np.argwhere(~inside(values))[0]))
        where = f"bounds, got {values[at]:g} at {name}{list(at)}, which is in [{low[0][at[1:]]:g}, {high[0][at[1:]]:g}]"
        raise ValueError(f"{name} must lie within {where}.")
    got = f"got values from {float(np.nanmin(values))} to {float(np.nanmax(values))}{also}"
    if np.isinf(low) and np.isinf(high):
        raise ValueError(f"{name} must be finite, {got}.")
    raise ValueError(
        f"{name} must lie in [{low:g}, {high:g}], {got}: bounds= says another range, bounds=None allows any."
    )


def unlike(x: np.ndarray, box: Box) -> np.ndarray:
    """Other inputs in the box: each number moves to the farther bound, or by the scale of the box."""
    low, high, scale = box
    with np.errstate(invalid="ignore"):  # the middle of no bounds
        farther = np.where(x <= (low + high) / 2, high, low)
    inward = np.where(np.isfinite(low), x + scale, np.where(np.isfinite(high), x - scale, _validate.unlike(x)))
    return np.where(np.isfinite(high - low), farther, inward).astype(x.dtype)


def check_epsilon(epsilon: Any, norm: str | None, bounds: Bounds | None, shape: tuple[int, ...] | None = None) -> None:
    """Raises ValueError for a ball that reaches beyond all inputs of a shape, such as 8 for 8/255 in linf."""
    if bounds is None or isinstance(epsilon, jax.core.Tracer):
        return
    farthest = _farthest(norm, bounds, shape)
    slack = 1e-6 * (bounds != IMAGES)  # the difference of two bounds rounds
    if not _validate.number(epsilon) > farthest * (1 + slack):
        return
    words = "bounds" if any(map(np.ndim, bounds)) else f"[{bounds[0]:g}, {bounds[1]:g}]"
    hint = "bounds= says another range of inputs"
    if bounds == IMAGES and (levels := _validate.levels(epsilon)):
        hint = f"{levels}, or else {hint}"
    raise ValueError(
        f"epsilon must be at most {farthest:g}, the largest {norm} distance of inputs in {words}, got {epsilon!r}: "
        f"{hint}, and None none."
    )


def _farthest(norm, bounds, shape):
    width = np.asarray(bounds[1]) - np.asarray(bounds[0])
    if norm == "linf":
        return float(width.max())
    if norm not in ("l2", "l1") or shape is None:
        return math.inf
    size = math.prod(shape) / width.size  # bounds that broadcast repeat as often
    return float(np.sqrt(np.square(width).sum() * size) if norm == "l2" else width.sum() * size)
