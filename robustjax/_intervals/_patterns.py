"""Bounds of functions that forget too much step by step: an activation is a product of two functions of one input."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jaxtyping import Array

from robustjax._intervals._nodes import Node, lowers, size
from robustjax._intervals._rules import difference, quotient

# Activations that decrease up to a minimum and increase from there on: x times the other factor, and where it is.
_VALLEYS: dict[str, tuple[Callable[[Array], Array], float]] = {
    "logistic(x)": (lambda x: x * jax.nn.sigmoid(x), -1.2784645427610738),
    "(1 + erf(0.707107 x))": (lambda x: x * (1 + jax.lax.erf(x / math.sqrt(2))), -0.7517915241128298),
    "erfc(-0.707107 x)": (lambda x: x * jax.lax.erfc(-x / math.sqrt(2)), -0.7517915241128298),
    "(1 + tanh(0.797885 (0.044715 x x x + x)))": (
        lambda x: x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))), -0.7524614220710137,
    ),
}  # fmt: skip
_FACTORS = {"add", "div", "erf", "erfc", "integer_pow", "logistic", "mul", "neg", "square", "tanh"}
# Activations that JAX compiles as a function of one array, and that increase (for positive factors, as by default).
_INCREASING = {
    function.__name__: function
    for function in (jax.nn.celu, jax.nn.elu, jax.nn.leaky_relu, jax.nn.log_sigmoid, jax.nn.selu, jax.nn.softplus)
}


def increasing_activation(equation: core.JaxprEqn, operands: list[Any]) -> bool:
    """Whether an equation calls one of JAX's activations that increase, and not something else of this name."""
    function = _INCREASING.get(equation.params.get("name", ""))
    if function is None or len(operands) != 1:
        return False
    known = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(operands[0].lower.shape, operands[0].lower.dtype))
    [called] = [inner.params["jaxpr"] for inner in known.eqns if inner.primitive.name == equation.primitive.name]
    return str(called) == str(equation.params["jaxpr"])


def pattern(equation: core.JaxprEqn, operands: list[Any]) -> Callable | None:
    """The rule for a product, quotient or difference that is an activation, a softmax or its logarithm as a whole."""
    name = equation.primitive.name
    if (
        name not in ("mul", "div", "sub")
        or not all(isinstance(x, Node) for x in operands)
        or operands[0] is operands[1]
    ):
        return None
    x, y = operands
    if name == "div":
        axis = _axis(x, y, y.lower.shape)
        return None if axis is None else functools.partial(_softmax, axis)
    if name == "sub":
        y, shape = _whole(y), y.lower.shape
        total = _whole(y.operands[0]) if y.name == "log" else y
        part = total.operands[0] if y.name == "log" and total.name == "reduce_sum" else y
        axis = _axis(part, total, shape) if part.name == "exp" and part.operands[0] is x else None
        return None if axis is None else functools.partial(_log_softmax, axis)
    for root in (x, y, *x.operands, *y.operands):
        if isinstance(root, Node) and root.lower.shape == jnp.broadcast_shapes(x.lower.shape, y.lower.shape):
            first, second = _product(x, root), _product(y, root)
            if first and second:
                *rest, last = sorted(first[1] + second[1])
                if last == "x" and len(rest) == 1 and rest[0] in _VALLEYS:
                    return functools.partial(_valley, root, first[0] * second[0], *_VALLEYS[rest[0]])
    return None


def _valley(root, constant, function, lowest, *_):
    ends = function(root.lower), function(root.upper)
    least = function(jnp.clip(root.lower.dtype.type(lowest), root.lower, root.upper))
    bounds = constant * least, constant * jnp.maximum(*ends)
    terms = abs(constant) * size(root)
    return (*bounds, terms, terms) if constant >= 0 else (*bounds[::-1], terms, terms)


def _product(value: Any, root: Node, depth: int = 8) -> tuple[float, list[str]] | None:
    """A function of ``root`` as a constant and factors; None if it is something else, or long."""
    if value is root:
        return 1.0, ["x"]
    if not isinstance(value, Node):
        constant = not isinstance(value, jax.core.Tracer) and np.size(value) == 1
        return (float(np.reshape(value, ())), []) if constant else None
    if not depth or value.name not in _FACTORS:
        return None
    inner = [product for operand in value.operands if (product := _product(operand, root, depth - 1))]
    if len(inner) < len(value.operands):
        return None
    (constant, factors), (other, others) = inner[0], inner[-1]
    if value.name == "mul":
        return constant * other, factors + others
    if value.name == "div":
        return None if others or not other else (constant / other, factors)
    if value.name == "neg":
        return -constant, factors
    if value.name in ("square", "integer_pow"):
        power = value.params.get("y", 2)
        return (constant**power, factors * power) if power > 0 else None
    terms = sorted(_text(constant, factors) for constant, factors in inner)
    return 1.0, [f"({' + '.join(terms)})" if value.name == "add" else f"{value.name}({terms[0]})"]


def _text(constant: float, factors: list[str]) -> str:
    return " ".join([f"{constant:.6g}"] * (constant != 1 or not factors) + sorted(factors))


def _whole(x: Node) -> Node:
    """The array of which x is another shape."""
    while x.name in ("broadcast_in_dim", "reshape") and x.operands[0].lower.size == x.lower.size:
        x = x.operands[0]
    return x


def _axis(x: Node, y: Node, shape: tuple[int, ...]) -> int | None:
    """The only axis over which y, of this shape beside x, sums up x, an exponential; None if this is something else."""
    y = _whole(y)
    if x.name != "exp" or y.name != "reduce_sum" or y.operands[0] is not x or len(y.params["axes"]) != 1:
        return None
    [axis] = y.params["axes"]
    beside = (*x.lower.shape[:axis], 1, *x.lower.shape[axis + 1 :])
    return axis if shape == beside else None  # each sum is beside its own terms


def _softmax(axis, equation, operands):
    """An element is largest where its input is largest and all others are smallest."""
    [x] = operands[0].operands
    low, high, least, most, relative = _terms(axis, x)
    steps = quotient(equation, operands)
    low = jnp.maximum(steps[0], jnp.where(least > 0, low / least, 0.0))
    high = jnp.minimum(steps[1], jnp.where(most > 0, high / most, 1.0))
    return low, high, relative * low, relative * high


def _log_softmax(axis, equation, operands):
    """As ``_softmax``, and its steps' bounds where float32 has no exponential."""
    low, high, least, most, relative = _terms(axis, operands[0])
    steps, tiny = difference(equation, operands), 1e-30
    ratio = lambda part, whole: jnp.log(jnp.where(part > tiny, part / jnp.where(part > tiny, whole, 1.0), 1.0))
    low = jnp.where(low > tiny, jnp.maximum(steps[0], ratio(low, least)), steps[0])
    high = jnp.minimum(jnp.where(high > tiny, jnp.minimum(steps[1], ratio(high, most)), steps[1]), 0.0)
    return low, high, relative - low, relative - low


def _terms(axis, x):
    """Numerators and denominators of the least and largest softmax of x, and room for their relative errors."""
    offset = 0.0
    if x.name == "sub" and isinstance(x.operands[0], Node):
        shape = jnp.shape(lowers(x.operands)[1])
        if not shape or shape[axis] == 1:  # the same for all elements, and so without effect
            x, offset = x.operands
    top = x.upper.max(axis, keepdims=True)
    low, high = jnp.exp(x.lower - top), jnp.exp(x.upper - top)
    relative = 1 + 2 * (size(x).max(axis, keepdims=True) + size(offset))
    return low, high, low + _others(high, axis), high + _others(low, axis), relative


def _others(x: Array, axis: int) -> Array:
    """The sum of all other elements along an axis, without cancellation."""
    x = jnp.moveaxis(x, axis, -1)
    zero = jnp.zeros_like(x[..., :1])
    before = jnp.concatenate([zero, jnp.cumsum(x[..., :-1], -1)], -1)
    after = jnp.concatenate([jnp.cumsum(x[..., :0:-1], -1)[..., ::-1], zero], -1)
    return jnp.moveaxis(before + after, -1, axis)
