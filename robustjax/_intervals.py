"""Bounds of a function over a box, by interval arithmetic on its jaxpr.

Arrays that do not depend on the input are computed as usual; the others are known up to an interval. Where an array is
an affine function of earlier ones, the map is kept too: the difference of two logits is bounded through all affine
steps after the last activation, not from separate bounds of the two logits.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array, Float, Int

from robustjax import _validate
from robustjax.typing import AnyArray, LogitsFn


class Interval(NamedTuple):
    """Bounds of an array, element by element.

    Attributes:
      lower: smallest values.
      upper: largest values, of the same shape.
    """

    lower: Float[Array, "..."]
    upper: Float[Array, "..."]


class Margins(NamedTuple):
    """Lower bounds of the margins of a class over the others.

    Attributes:
      lower: ``(batch, classes)``, of :math:`f_y - f_j` over the box; 0 for the class y itself.
      scale: ``(batch, classes)``, the sum of the absolute terms of both logits; rounding errors are proportional
        to it, however much of it cancels.
    """

    lower: Float[Array, "batch classes"]
    scale: Float[Array, "batch classes"]


def bounds(
    function: Callable[[Array], Array], lower: Float[AnyArray, "..."], upper: Float[AnyArray, "..."]
) -> Interval:
    r"""Bounds every output of a function over all inputs in a box, by interval arithmetic.

    .. math:: \underline z \le f(x) \le \overline z \quad \text{for all } \underline x \le x \le \overline x

    An affine step maps centre and radius, :math:`c' = W c + b` and :math:`r' = |W|\, r`; a monotone one maps the ends.
    Each step is exact, but their composition is not, because an interval forgets how its elements depend on each other.
    The bounds are exact for one affine map, and for networks with nonnegative weights and increasing activations.

    Supported are matrix products and convolutions with weights that do not depend on the input, arithmetic, increasing
    functions, absolute values, powers, sums, maxima, pooling, and operations that only move elements. Gradients reach
    the bounds and the arrays that the function holds.

    Args:
      function: maps an array of the shape of ``lower`` to one array; a plain function, or a pytree that holds its
        arrays. Its matrix products are computed in full float32 unless it asks for another precision.
      lower: smallest inputs, float32 or float64.
      upper: largest inputs, of the same shape; nowhere below ``lower``.

    Returns:
      Bounds of the shape of the output; infinite where no bound is known, as for the logarithm of an interval that
      reaches below 0.

    Raises:
      ValueError: shapes or dtypes do not fit, a lower bound exceeds its upper bound, or the function contains a JAX
        primitive whose bounds are not known; the message names the primitive.

    Guarantee:
      Holds for every input in the box, in exact arithmetic. The bounds are computed in the precision of the inputs and
      are not rounded outwards: an output may leave them by rounding errors.

    Example:
      >>> difference = lambda x: jax.nn.relu(x[0] - x[1])
      >>> found = intervals.bounds(difference, lower=jnp.array([0.0, 0.2]), upper=jnp.array([0.5, 0.3]))
      >>> f"{found.lower:.1f} to {found.upper:.1f}"
      '0.0 to 0.3'

    Reference:
      Gowal et al. 2018, On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust Models,
      arXiv 1810.12715.
    """
    function = _validate.as_pytree(function=function)
    lower, upper = jnp.asarray(lower), jnp.asarray(upper)
    if lower.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"lower must be float32 or float64, got {lower.dtype}.")
    if (lower.shape, lower.dtype) != (upper.shape, upper.dtype):
        raise ValueError(f"upper must be {lower.dtype} of shape {lower.shape}, got {upper.dtype} of {upper.shape}.")
    with jax.ensure_compile_time_eval():  # constants are checked under jit, too
        known = not any(isinstance(end, jax.core.Tracer) for end in (lower, upper))
        if known and not bool((lower <= upper).all()):
            raise ValueError("lower must be at most upper everywhere, and neither may be NaN.")
    return _interval_bounds(function, lower, upper)


@jax.jit
def _interval_bounds(function, lower, upper):
    node = _propagate(_trace(function, lower.shape, lower.dtype), lower, upper)
    return Interval(node.lower, node.upper)


def margin_bounds(
    logits_fn: LogitsFn,
    lower: Float[AnyArray, "batch ..."],
    upper: Float[AnyArray, "batch ..."],
    labels: Int[AnyArray, " batch"],
) -> Margins:
    """Bounds how far each class stays below the label of its input, separately for every input of a batch.

    The model is traced for a batch of one, so that the bounds of an input do not depend on the other inputs. The map
    from the last activations to a difference of logits is affine, and its bound over their box is exact.

    Args:
      logits_fn: maps ``(1, ...)`` to ``(1, classes)``.
      lower: ``(batch, ...)``, smallest inputs.
      upper: ``(batch, ...)``, largest inputs.
      labels: ``(batch,)``, the classes y.

    Returns:
      The bounds, ``-inf`` where no bound is known.

    Raises:
      ValueError: the model contains a primitive whose bounds are not known.
    """
    jaxpr = _trace(logits_fn, (1, *lower.shape[1:]), lower.dtype)

    def of_example(lower, upper, label):
        output = _propagate(jaxpr, lower[None], upper[None])
        bases = _bases(output)
        centres = [(base.lower + base.upper) / 2 for base in bases]
        radii = [(base.upper - base.lower) / 2 for base in bases]

        def logits(centres):
            return _value(output, dict(zip(bases, centres, strict=True)))[0]

        values, pull = jax.vjp(logits, centres)
        [rows] = jax.vmap(pull)(jnp.eye(*values.shape * 2, dtype=values.dtype))
        ends = [jnp.abs(centre) + radius for centre, radius in zip(centres, radii, strict=True)]
        bound = values[label] - values - _weighed([row[label][None] - row for row in rows], radii)
        terms = jnp.abs(values) + _weighed(rows, ends)
        return Margins(jnp.where(jnp.isnan(bound), -jnp.inf, bound), terms[label] + terms)

    return jax.vmap(of_example)(lower, upper, labels)


def _weighed(rows: list[Array], factors: list[Array]) -> Array:
    """``(classes,)`` sums of absolute weights times factors."""
    products = [jnp.abs(row) * factor[None] for row, factor in zip(rows, factors, strict=True)]
    return functools.reduce(jnp.add, [product.sum(range(1, product.ndim)) for product in products])


def ball(x: Float[Array, "..."], epsilon: Any) -> Interval:
    """The linf ball around x within [0, 1]."""
    epsilon = jnp.asarray(epsilon, x.dtype)
    return Interval(jnp.clip(x - epsilon, 0, 1), jnp.clip(x + epsilon, 0, 1))


@dataclasses.dataclass(frozen=True, eq=False)
class _Node:
    """An array known up to an interval; where it is affine in its operands, also the map."""

    lower: Array
    upper: Array
    operands: tuple[Any, ...] = ()
    affine: Callable[..., Array] | None = None


# Not decreasing in any operand, and affine: addition, and operations that only move elements.
_MOVES = {
    "add", "add_any", "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "copy_p", "cumsum",
    "dynamic_slice", "gather", "pad", "reduce_sum", "reduce_window_sum", "reshape", "rev", "select_n",
    "sharding_constraint", "slice", "split", "squeeze", "stack", "transpose", "unstack",
}  # fmt: skip
# Not decreasing in any operand.
_INCREASING = {
    "asinh", "atan", "cbrt", "ceil", "clamp", "cummax", "cummin", "erf", "exp", "exp2", "expm1", "floor", "log",
    "log1p", "logistic", "max", "min", "reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min", "round",
    "sign", "sinh", "sqrt", "tanh",
}  # fmt: skip
_PLACES = {"convert_element_type": {0}, "dynamic_slice": {0}, "gather": {0}, "select_n": {1, 2}}
"""Where an interval may stand among the operands; anywhere by default."""
_CALLS = {
    "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "jit": "jaxpr",
    "checkpoint": "jaxpr", "remat2": "jaxpr",
}  # fmt: skip
"""Primitives that call a jaxpr, and the parameter that holds it."""


def _trace(function: Callable, shape: Sequence[int], dtype: Any) -> core.ClosedJaxpr:
    with jax.default_matmul_precision("highest"):
        jaxpr = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(shape, dtype))
    if len(jaxpr.out_avals) != 1:
        raise ValueError(f"function must return one array, got {len(jaxpr.out_avals)}.")
    return jaxpr


def _propagate(jaxpr: core.ClosedJaxpr, lower: Array, upper: Array) -> _Node:
    [output] = _interpret(jaxpr.jaxpr, jaxpr.consts, [_Node(lower, upper)])
    return output if isinstance(output, _Node) else _Node(jnp.asarray(output), jnp.asarray(output))


def _interpret(jaxpr: core.Jaxpr, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    read = lambda variable: variable.val if isinstance(variable, core.Literal) else values[variable]
    for equation in jaxpr.eqns:
        results = _step(equation, [read(variable) for variable in equation.invars])
        values.update(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _step(equation: core.JaxprEqn, operands: list[Any]) -> list[Any]:
    """The results of an equation, arrays or nodes."""
    name = equation.primitive.name
    places = {i for i, operand in enumerate(operands) if isinstance(operand, _Node)}
    if not places:
        return _bind(equation, operands)
    if name == "stop_gradient":  # changes no bound; left in, it would hide an affine map from its Jacobian
        return operands
    whole = name == "custom_jvp_call" and _is_increasing(equation)  # with the gradient that its author defined
    if name in _CALLS and not whole:
        inner = equation.params[_CALLS[name]]
        return _interpret(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), operands)
    if name in _RULES:
        alone = len(places) == 1 and places <= _LINEAR.get(name, set())
        intervals, is_affine = [_RULES[name](equation, operands)], alone or name == "sub"
    elif whole or name in _MOVES or name in _INCREASING:
        if not places <= _PLACES.get(name, places):
            raise _unknown(f"{name!r} with a condition or indices that depend on the input")
        intervals = zip(_bind(equation, _lower(operands)), _bind(equation, _upper(operands)), strict=True)
        is_affine = name in _MOVES
    else:
        raise _unknown(repr(name))
    maps = [
        (lambda *values, i=i: _bind(equation, values)[i]) if is_affine else None for i in range(len(equation.outvars))
    ]
    return [_node(equation, *ends, tuple(operands), map_) for ends, map_ in zip(intervals, maps, strict=True)]


def _bind(equation: core.JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    results = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(equation.params))
    return results if equation.primitive.multiple_results else [results]


def _node(equation: core.JaxprEqn, lower: Array, upper: Array, operands: tuple, affine: Callable | None) -> _Node:
    if lower.dtype not in (jnp.float32, jnp.float64):
        name = equation.primitive.name
        raise ValueError(f"interval bounds need float32 or float64, but the primitive {name!r} gives {lower.dtype}.")
    # NaN, from inf - inf or from outside a domain, is no bound, and a maximum may lose it on the way.
    unknown = jnp.isnan(lower) | jnp.isnan(upper)
    lower, upper = jnp.where(unknown, -jnp.inf, lower), jnp.where(unknown, jnp.inf, upper)
    return _Node(lower, upper, operands if affine else (), affine)


def _unknown(what: str) -> ValueError:
    return ValueError(f"interval bounds are not known for primitive {what}.")


def _lower(operands: Sequence[Any]) -> list[Any]:
    return [operand.lower if isinstance(operand, _Node) else operand for operand in operands]


def _upper(operands: Sequence[Any]) -> list[Any]:
    return [operand.upper if isinstance(operand, _Node) else operand for operand in operands]


def _is_increasing(equation: core.JaxprEqn) -> bool:
    """Whether every called function increases in all its operands, wherever intervals may enter."""
    inner = equation.params[_CALLS[equation.primitive.name]]
    return all(
        _is_increasing(e) if e.primitive.name in _CALLS else e.primitive.name in (_MOVES | _INCREASING) - set(_PLACES)
        for e in getattr(inner, "jaxpr", inner).eqns
    )


def _bilinear(equation, operands):
    if all(isinstance(operand, _Node) for operand in operands):
        raise _unknown(f"{equation.primitive.name!r} of two operands that both depend on the input")
    low, high = _lower(operands), _upper(operands)
    middle = [(a + b) / 2 if isinstance(x, _Node) else x for x, a, b in zip(operands, low, high, strict=True)]
    spread = [(b - a) / 2 if isinstance(x, _Node) else jnp.abs(x) for x, a, b in zip(operands, low, high, strict=True)]
    [centre], [radius] = _bind(equation, middle), _bind(equation, spread)
    return centre - radius, centre + radius


def _negative(_, operands):
    [x] = operands
    return -x.upper, -x.lower


def _difference(equation, operands):
    (a, b), (c, d) = _lower(operands), _upper(operands)
    return _bind(equation, [a, d])[0], _bind(equation, [c, b])[0]


def _product(_, operands):
    x, y = operands
    return _squared(x) if x is y else _hull(x, y)


def _quotient(_, operands):
    x, y = operands
    if isinstance(y, _Node):
        return _hull(x, _Node(*_reciprocal(y)))
    ends = x.lower / y, x.upper / y
    return jnp.minimum(*ends), jnp.maximum(*ends)


def _hull(x, y):
    ends = [(a.lower, a.upper) if isinstance(a, _Node) else (a,) for a in (x, y)]
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


def _power(equation, operands):
    [x] = operands
    y = equation.params["y"]
    low, high = (x.lower, x.upper) if y % 2 else _absolute(x)
    ends = jax.lax.integer_pow(low, abs(y)), jax.lax.integer_pow(high, abs(y))
    return ends if y >= 0 else _reciprocal(_Node(*ends))


def _reciprocal_root(_, operands):
    [x] = operands
    return _reciprocal(_Node(jnp.sqrt(x.lower), jnp.sqrt(x.upper)))


_LINEAR = {"conv_general_dilated": {0, 1}, "div": {0}, "dot_general": {0, 1}, "mul": {0, 1}, "neg": {0}}
"""Positions at which one interval among known operands makes the primitive an affine map."""
_RULES: dict[str, Callable[[core.JaxprEqn, list[Any]], tuple[Array, Array]]] = {
    "abs": lambda _, operands: _absolute(*operands),
    "conv_general_dilated": _bilinear,
    "div": _quotient,
    "dot_general": _bilinear,
    "integer_pow": _power,
    "mul": _product,
    "neg": _negative,
    "rsqrt": _reciprocal_root,
    "square": lambda _, operands: _squared(*operands),
    "sub": _difference,
}


def _bases(output: _Node) -> list[_Node]:
    """The nodes that an output is affine in, and that are not affine in other nodes themselves."""
    seen, waiting = {}, [output]
    while waiting:
        node = waiting.pop()
        if isinstance(node, _Node) and node not in seen:
            seen[node] = None
            waiting += node.operands
    return [node for node in seen if node.affine is None]


def _value(node: Any, values: dict[_Node, Array]) -> Any:
    """The value of a node for these values of its bases; caches intermediate results."""
    if not isinstance(node, _Node):
        return node
    if node not in values:
        assert node.affine is not None, "bases have values"
        values[node] = node.affine(*(_value(operand, values) for operand in node.operands))
    return values[node]
