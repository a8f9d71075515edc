"""What is known of an array: an interval for each element, and how the array was made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core, source_info_util
from jaxtyping import Array

_ROUNDING = 84
"""Rounding errors that are allowed for, in units of the last place: 1e-5 in float32."""


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """An array known up to an interval; where it is affine in its operands, also the map.

    Attributes:
      lower: smallest values; NaN where the function may leave a domain, and with it its answers on the way.
      upper: largest values; NaN where ``lower`` is.
      scale: sums of absolute terms since the last step that is not affine, to which rounding errors are proportional;
        None without allowance for rounding.
      equation: that made it, with a primitive whose bounds are known.
      operands: of this equation, nodes and arrays.
      affine: from operands to the array.
    """

    lower: Array
    upper: Array
    scale: Array | None = None
    equation: core.JaxprEqn | None = None
    operands: tuple[Any, ...] = ()
    affine: Callable[..., Array] | None = None

    @property
    def name(self) -> str:
        return self.equation.primitive.name if self.equation else ""

    @property
    def params(self) -> dict[str, Any]:
        return self.equation.params if self.equation else {}


def lowers(operands: Sequence[Any]) -> list[Any]:
    return [operand.lower if isinstance(operand, Node) else operand for operand in operands]


def uppers(operands: Sequence[Any]) -> list[Any]:
    return [operand.upper if isinstance(operand, Node) else operand for operand in operands]


def size(x: Any) -> Any:
    """Largest absolute values; indices and conditions stay."""
    if isinstance(x, Node):
        return jnp.maximum(jnp.abs(x.lower), jnp.abs(x.upper))
    return jnp.abs(x) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x


def scale(x: Any) -> Any:
    return x.scale if isinstance(x, Node) else size(x)


def bind(equation: core.JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    results = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(equation.params))
    return results if equation.primitive.multiple_results else [results]


def rounding(dtype: Any) -> float:
    return _ROUNDING * float(jnp.finfo(dtype).eps)


def unknown(equation: core.JaxprEqn, what: str = "") -> ValueError:
    """The error for an equation without bounds; it names the primitive, the layer and the line of the model."""
    scope = str(equation.source_info.name_stack)
    line = source_info_util.summarize(equation.source_info)
    where = f"in {scope}, at {line}" if scope else f"at {line}"
    return ValueError(f"interval bounds are not known for primitive {equation.primitive.name!r}{what}, {where}.")
