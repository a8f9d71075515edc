"""Bounds of primitives.

A rule maps an equation and its operands to the bounds of its result, and, if these are not proportional to the bounds,
the terms to which the rounding errors of both are proportional: ``lower, upper`` or ``lower, upper, below, above``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array

from robustjax._intervals._nodes import Node, bind, lowers, size, unknown, uppers

# Not decreasing in any operand, affine, and exact (between formats of numbers, almost).
MOVES = {
    "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "copy_p", "dynamic_slice",
    "dynamic_update_slice", "gather", "pad", "reshape", "rev", "scatter", "select_n", "sharding_constraint", "slice",
    "split", "squeeze", "stack", "tile", "transpose", "unstack",
}  # fmt: skip
# Not decreasing in any operand, and affine: sums.
SUMS = {"add", "add_any", "cumsum", "reduce_sum", "reduce_window_sum", "scatter-add"}
# Not decreasing in any operand, and exact; a maximum over other elements, and of operands.
_EXTREMA = {
    "cummax": 1,
    "reduce_max": 1,
    "reduce_window_max": 1,
    "cummin": -1,
    "reduce_min": -1,
    "reduce_window_min": -1,
}
_EXACT = {"ceil", "clamp", "floor", "max", "min", "round", "sign", *_EXTREMA}
# Not decreasing in any operand.
INCREASING = _EXACT | {
    "acosh", "asin", "asinh", "atan", "atanh", "cbrt", "erf", "erf_inv", "exp", "exp2", "expm1",
    "log", "log1p", "logistic", "sinh", "sqrt", "tanh",
}  # fmt: skip
EXACT = (MOVES - {"convert_element_type"}) | _EXACT | {"abs", "neg", "sort"}
LOGICAL = {"and", "or", "reduce_and", "reduce_or"}
"""Increasing, of conditions."""
PLACES = {
    "dynamic_slice": {0}, "dynamic_update_slice": {0, 1}, "gather": {0}, "scatter": {0, 2}, "scatter-add": {0, 2},
    "select_n": {1, 2},
}  # fmt: skip
"""Where an interval may stand among the operands; anywhere by default."""
LINEAR = {"conv_general_dilated": {0, 1}, "div": {0}, "dot_general": {0, 1}, "mul": {0, 1}, "neg": {0}}
"""Positions at which one interval among known operands makes the primitive an affine map."""


def increasing(equation: core.JaxprEqn, operands: list[Any]) -> list[tuple[Array, ...]]:
    """Bounds of every result of a primitive that decreases in no operand."""
    name = equation.primitive.name
    places = PLACES.get(name)
    if places and any(isinstance(operand, Node) and i not in places for i, operand in enumerate(operands)):
        raise unknown(equation, " with a condition or indices that depend on the input")
    if name == "sort" and len(operands) > 1:
        raise unknown(equation, " of several arrays")
    ends = [bind(equation, lowers(operands)), bind(equation, uppers(operands))]
    if name in SUMS:
        for end in (lowers(operands), uppers(operands)):
            ends.append(bind(equation, [size(a) for a in end]))
    return list(zip(*ends, strict=True))


def lost(equation: core.JaxprEqn, operands: list[Any]) -> Array | bool:
    """Where an operand is NaN and the primitive might give a number, as a maximum does on some devices."""
    name = equation.primitive.name
    if name in MOVES or name in SUMS or name in ("dot_general", "conv_general_dilated"):
        return False  # NaN stays NaN, unless nothing reads it
    missing = [jnp.isnan(operand.lower) for operand in operands if isinstance(operand, Node) and not _logical(operand)]
    if name in _EXTREMA:
        [found] = bind(equation, [_EXTREMA[name] * where.astype(operands[0].lower.dtype) for where in missing])
        return found * _EXTREMA[name] > 0
    if name == "sort":
        return missing[0].any(equation.params["dimension"], keepdims=True)
    return functools.reduce(jnp.logical_or, missing, False)


def _logical(x: Any) -> bool:
    return isinstance(x, Node) and x.lower.dtype == bool


def _bilinear(equation, operands):
    low, high, ends = lowers(operands), uppers(operands), [size(operand) for operand in operands]
    middle = [(a + b) / 2 if isinstance(x, Node) else x for x, a, b in zip(operands, low, high, strict=True)]
    spread = [(b - a) / 2 if isinstance(x, Node) else jnp.abs(x) for x, a, b in zip(operands, low, high, strict=True)]
    if all(isinstance(operand, Node) for operand in operands):  # xy - cd = (x - c) y + c (y - d)
        [first], [second] = bind(equation, [spread[0], ends[1]]), bind(equation, [jnp.abs(middle[0]), spread[1]])
        radius = first + second
    else:
        [radius] = bind(equation, spread)
    [centre], [terms] = bind(equation, middle), bind(equation, ends)
    return centre - radius, centre + radius, terms, terms


def _negative(_, operands):
    [x] = operands
    return -x.upper, -x.lower


def _decreasing(equation, operands):
    return bind(equation, uppers(operands))[0], bind(equation, lowers(operands))[0]


def difference(equation, operands):
    (a, b), (c, d) = lowers(operands), uppers(operands)
    terms = jnp.abs(a) + jnp.abs(d), jnp.abs(c) + jnp.abs(b)
    return bind(equation, [a, d])[0], bind(equation, [c, b])[0], *terms


def _product(_, operands):
    x, y = operands
    return _squared(x) if x is y else _hull(x, y)


def quotient(_, operands):
    x, y = operands
    if isinstance(y, Node):
        return _hull(x, Node(*_reciprocal(y)))
    ends = x.lower / y, x.upper / y
    return jnp.minimum(*ends), jnp.maximum(*ends)


def _hull(x, y):
    ends = [(a.lower, a.upper) if isinstance(a, Node) else (a,) for a in (x, y)]
    products = [a * b for a, b in itertools.product(*ends)]
    return functools.reduce(jnp.minimum, products), functools.reduce(jnp.maximum, products)


def _reciprocal(x):
    known = (x.lower > 0) | (x.upper < 0)
    low, high = jnp.where(known, x.lower, 1.0), jnp.where(known, x.upper, 1.0)
    return jnp.where(known, 1 / high, -jnp.inf), jnp.where(known, 1 / low, jnp.inf)


def _absolute(x):
    return jnp.maximum(0.0, jnp.maximum(x.lower, -x.upper)), jnp.maximum(-x.lower, x.upper)


def _squared(x):
    low, high = _absolute(x)
    return low * low, high * high


def _integer_power(equation, operands):
    [x] = operands
    y = equation.params["y"]
    low, high = (x.lower, x.upper) if y % 2 else _absolute(x)
    ends = jax.lax.integer_pow(low, abs(y)), jax.lax.integer_pow(high, abs(y))
    return ends if y >= 0 else _reciprocal(Node(*ends))


def _power(_, operands):
    """Monotone in both operands over a positive base, or 0 where the exponent is nowhere negative; else unknown."""
    ends = [(a.lower, a.upper) if isinstance(a, Node) else (a,) for a in operands]
    base, exponent = ends[0][0], ends[1][0]
    outside = (base < 0) | (base == 0) & (exponent < 0)  # 1 / -0.0 is minus infinity
    powers = [jnp.where(outside, jnp.nan, a**b) for a, b in itertools.product(*ends)]
    return functools.reduce(jnp.minimum, powers), functools.reduce(jnp.maximum, powers)


def _reciprocal_root(_, operands):
    [x] = operands
    return _reciprocal(Node(jnp.sqrt(x.lower), jnp.sqrt(x.upper)))


def _selected(_, operands):
    """Where a condition that depends on the input leaves two cases, both."""
    which, *cases = operands
    (a, b), (c, d) = lowers(cases), uppers(cases)
    low = jnp.where(which.lower, b, jnp.where(which.upper, jnp.minimum(a, b), a))
    high = jnp.where(which.lower, d, jnp.where(which.upper, jnp.maximum(c, d), c))
    return low, high


def _compared(equation, operands):
    """Whether a comparison is true everywhere, and whether it is true anywhere."""
    (a, b), (c, d) = lowers(operands), uppers(operands)
    name = equation.primitive.name
    if name in ("lt", "le"):
        (a, b), (c, d), name = (b, a), (d, c), {"lt": "gt", "le": "ge"}[name]
    missing = jnp.isnan(a) | jnp.isnan(b) | jnp.isnan(c) | jnp.isnan(d)
    if name in ("gt", "ge"):
        compare = jnp.greater if name == "gt" else jnp.greater_equal
        always, ever = compare(a, d), compare(c, b)
    else:
        same = operands[0] is operands[1]  # x == x asks for NaN
        always, ever = (a == d) & (b == c) | same, (a <= d) & (b <= c)
        always, ever = (always, ever) if name == "eq" else (~ever, ~always)
    return always & ~missing, ever | missing


def _finite(_, operands):
    [x] = operands
    return jnp.isfinite(x.lower) & jnp.isfinite(x.upper), jnp.isfinite(x.lower) | ~(x.lower == x.upper)


def _not_zero(_, operands):
    [x] = operands
    return (x.lower > 0) | (x.upper < 0), ~((x.lower == 0) & (x.upper == 0))


RULES: dict[str, Callable[[core.JaxprEqn, list[Any]], tuple[Array, ...]]] = {
    "abs": lambda _, operands: _absolute(*operands),
    "conv_general_dilated": _bilinear,
    "div": quotient,
    "dot_general": _bilinear,
    "erfc": _decreasing,
    "integer_pow": _integer_power,
    "is_finite": _finite,
    "mul": _product,
    "neg": _negative,
    "not": _decreasing,
    "pow": _power,
    "rsqrt": _reciprocal_root,
    "square": lambda _, operands: _squared(*operands),
    "sub": difference,
    **dict.fromkeys(("eq", "ge", "gt", "le", "lt", "ne"), _compared),
}


def rule_of(equation: core.JaxprEqn, operands: list[Any]) -> Callable | None:
    name = equation.primitive.name
    if name == "convert_element_type" and jnp.issubdtype(equation.params["new_dtype"], jnp.bool_):
        return _not_zero
    return _selected if name == "select_n" and _logical(operands[0]) else RULES.get(name)
