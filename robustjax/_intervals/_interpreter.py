"""Interval arithmetic on a jaxpr.

Arrays that do not depend on the input are computed as usual; the others are known up to an interval. Where an array is
an affine function of earlier ones, the map is kept too: the difference of two logits is bounded through all affine
steps after the last activation, not from separate bounds of the two logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array

from robustjax._intervals import _patterns
from robustjax._intervals._nodes import Node, bind, lowers, rounding, scale, size, unknown, uppers
from robustjax._intervals._rules import (
    EXACT,
    INCREASING,
    LINEAR,
    LOGICAL,
    MOVES,
    PLACES,
    SUMS,
    increasing,
    lost,
    rule_of,
)

_CALLS = {
    "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "jit": "jaxpr",
    "checkpoint": "jaxpr", "remat2": "jaxpr",
}  # fmt: skip
"""Primitives that call a jaxpr, and the parameter that holds it."""


def trace(function: Callable, shape: Sequence[int], dtype: Any) -> core.ClosedJaxpr:
    with jax.default_matmul_precision("highest"):
        jaxpr = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(shape, dtype))
    if len(jaxpr.out_avals) != 1:
        raise ValueError(f"function must return one array, got {len(jaxpr.out_avals)}.")
    return jaxpr


def propagate(jaxpr: core.ClosedJaxpr, lower: Array, upper: Array, *, outward: bool) -> Node:
    """The output over a box; with ``outward``, every step leaves room for its rounding errors."""
    terms = jnp.maximum(jnp.abs(lower), jnp.abs(upper)) if outward else None
    [output] = _interpret(jaxpr, [Node(lower, upper, terms)], outward)
    if isinstance(output, Node):
        return output
    output = jnp.asarray(output)
    return Node(output, output, jnp.abs(output) if outward else None)


def bases_of(output: Node) -> list[Node]:
    """The nodes that an output is affine in, and that are not affine in other nodes themselves."""
    seen, waiting = {}, [output]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Node) and node not in seen:
            seen[node] = None
            waiting += node.operands if node.affine else ()
    return [node for node in seen if node.affine is None]


def value_of(node: Any, values: dict[Node, Array]) -> Any:
    """The value of a node for these values of its bases; caches intermediate results."""
    if not isinstance(node, Node):
        return node
    if node not in values:
        assert node.affine is not None, "bases have values"
        values[node] = node.affine(*(value_of(operand, values) for operand in node.operands))
    return values[node]


def _interpret(closed: Any, arguments: Sequence[Any], outward: bool) -> list[Any]:
    jaxpr, consts = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    read = lambda variable: variable.val if isinstance(variable, core.Literal) else values[variable]
    for equation in jaxpr.eqns:
        results = _step(equation, [read(variable) for variable in equation.invars], outward)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _step(equation: core.JaxprEqn, operands: list[Any], outward: bool) -> list[Any]:
    """The results of an equation, arrays or nodes."""
    name = equation.primitive.name
    places = {i for i, operand in enumerate(operands) if isinstance(operand, Node)}
    if not places:
        return bind(equation, operands)
    if name in ("optimization_barrier", "stop_gradient"):  # left in, they would hide an affine map from its Jacobian
        return operands
    # With the gradient that its author defined, which no certificate needs.
    whole = name == "custom_jvp_call" and not outward and _is_increasing(equation)
    whole = whole or name == "jit" and _patterns.increasing_activation(equation, operands)
    if name in _CALLS and not whole:
        return _interpret(equation.params[_CALLS[name]], operands, outward)
    if name == "scan" and equation.params["length"]:
        return _scan(equation, operands, outward)
    if name == "cond":
        return _cond(equation, operands, outward)
    conditional = any(isinstance(operand, Node) and operand.lower.dtype == bool for operand in operands)
    affine = name in MOVES or name in SUMS or name == "sub" or len(places) == 1 and places <= LINEAR.get(name, set())
    if rule := _patterns.pattern(equation, operands) or rule_of(equation, operands):
        found = [rule(equation, operands)]
    elif whole or name in MOVES | SUMS | INCREASING | LOGICAL or name == "sort":
        found = increasing(equation, operands)
    else:
        raise unknown(equation)
    affine, gone = affine and not conditional, False if name == "custom_jvp_call" else lost(equation, operands)
    return [_node(equation, i, operands, ends, affine, gone, outward) for i, ends in enumerate(found)]


def _node(equation, i, operands, found, affine, gone, outward) -> Node:
    lower, upper, below, above = found if len(found) == 4 else (*found, *map(jnp.abs, found))
    if lower.dtype == bool:
        return Node(lower, upper, None, equation, tuple(operands))
    if lower.dtype not in (jnp.float32, jnp.float64):
        raise unknown(equation, f", which gives {lower.dtype} and not float32 or float64")
    terms = None
    if outward:
        allowed = rounding(lower.dtype)
        if equation.primitive.name not in EXACT:
            lower, upper = lower - allowed * below, upper + allowed * above
        terms = _scale(equation, i, operands) if affine else size(Node(lower, upper))
    # NaN from outside a domain or from inf - inf, which a network passes on or turns into any answer, stays for good.
    unbounded = (lower == -jnp.inf) & (upper == jnp.inf)
    undefined = jnp.isnan(lower) | jnp.isnan(upper) | unbounded | gone
    lower, upper = jnp.where(undefined, jnp.nan, lower), jnp.where(undefined, jnp.nan, upper)
    affine_map = (lambda *values: bind(equation, values)[i]) if affine else None
    return Node(lower, upper, terms, equation, tuple(operands), affine_map)


def _scale(equation, i, operands) -> Array:
    """The sum of the absolute terms of an affine step."""
    name = equation.primitive.name
    x, *rest = [scale(operand) for operand in operands]
    if name == "neg":
        return x
    return x + rest[0] if name == "sub" else bind(equation, [x, *rest])[i]


def _is_increasing(equation: core.JaxprEqn) -> bool:
    """Whether every called function increases in all its operands, wherever intervals may enter."""
    inner = equation.params[_CALLS[equation.primitive.name]]
    return all(
        _is_increasing(e)
        if e.primitive.name in _CALLS
        else e.primitive.name in (MOVES | SUMS | INCREASING) - set(PLACES)
        and jnp.issubdtype(e.outvars[0].aval.dtype, jnp.floating)  # conditions and integers do not increase
        for e in getattr(inner, "jaxpr", inner).eqns
    )


def _moved(function: Callable[..., Array], operands: Sequence[Any]) -> Any:
    """``function`` of nodes and arrays, which only moves elements."""
    if not any(isinstance(operand, Node) for operand in operands):
        return function(*operands)
    terms = None
    if any(isinstance(operand, Node) and operand.scale is not None for operand in operands):
        terms = function(*map(scale, operands))
    return Node(function(*lowers(operands)), function(*uppers(operands)), terms, None, tuple(operands), function)


def _scan(equation, operands, outward) -> list[Any]:
    """All steps, one after the other."""
    params = equation.params
    if "ft_in" in params:  # JAX 0.12 has trees in place of numbers
        first, num_carry = (len(list(tree)) for tree in params["ft_in"].unpack()[:2])
    else:
        first, num_carry = params["num_consts"], params["num_carry"]
    last = first + num_carry
    consts, carry, inputs = operands[:first], operands[first:last], operands[last:]
    steps, outputs = range(params["length"]), {}
    for i in reversed(steps) if params["reverse"] else steps:
        slices = [_moved(lambda a, i=i: a[i], [array]) for array in inputs]
        results = _interpret(params["jaxpr"], [*consts, *carry, *slices], outward)
        carry, outputs[i] = results[:num_carry], results[num_carry:]
    together = zip(*(outputs[i] for i in steps), strict=True)
    return [*carry, *(_moved(lambda *arrays: jnp.stack(arrays), rows) for rows in together)]


def _cond(equation, operands, outward) -> list[Any]:
    index, *arguments = operands
    if isinstance(index, Node):
        raise unknown(equation, " with a predicate that depends on the input")
    branches = equation.params["branches"]
    if not isinstance(index, jax.core.Tracer):
        return _interpret(branches[min(max(int(index), 0), len(branches) - 1)], arguments, outward)
    results = [_interpret(branch, arguments, outward) for branch in branches]

    def choose(*cases):
        chosen = cases[0]
        for i, case in enumerate(cases[1:], 1):
            chosen = jnp.where(index >= i, case, chosen)
        return chosen

    return [_moved(choose, cases) for cases in zip(*results, strict=True)]
