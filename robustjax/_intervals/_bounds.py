"""Bounds of a function over a box, and of the margins of a classifier."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from robustjax import _arguments, _validate
from robustjax._intervals._interpreter import bases_of, propagate, trace, value_of
from robustjax._intervals._nodes import rounding
from robustjax.typing import AnyArray, LogitsFn


class Interval(NamedTuple):
    """Bounds of an array, element by element.

    Attributes:
      lower: smallest values.
      upper: largest values, of the same shape.
    """

    lower: Float[Array, "..."]
    upper: Float[Array, "..."]


@_arguments.checked
def bounds(
    function: Callable[[Array], Array], lower: Float[AnyArray, "..."], upper: Float[AnyArray, "..."]
) -> Interval:
    r"""Bounds every output of a function over all inputs in a box, by interval arithmetic.

    .. math:: \underline z \le f(x) \le \overline z \quad \text{for all } \underline x \le x \le \overline x

    An affine step maps centre and radius, :math:`c' = W c + b` and :math:`r' = |W|\, r`; a monotone one maps the ends.
    Each step is exact, but their composition is not, because an interval forgets how its elements depend on each other.
    The bounds are exact for one affine map, and for networks with nonnegative weights and increasing activations.

    Supported are matrix products and convolutions, arithmetic, functions that increase or decrease, absolute values,
    powers, sums, maxima, pooling, comparisons, operations that only move elements, ``scan``, and ``cond`` with a
    predicate that does not depend on the input: what Flax's layers and JAX's activations are made of. SiLU, GELU,
    softmax and log-softmax over one axis have their exact extrema. Gradients reach the bounds and the arrays that the
    function holds.

    Args:
      function: maps an array of the shape of ``lower`` to one array; a plain function, or a pytree that holds its
        arrays. Its matrix products are computed in full float32 unless it asks for another precision.
      lower: smallest inputs, float32 or float64.
      upper: largest inputs, of the same shape; nowhere below ``lower``.

    Returns:
      Bounds of the shape of the output. They are infinite on both sides where no bound is known: where a step may leave
      its domain, as the logarithm of an interval that reaches below 0, or may overflow to inf - inf, and in all that is
      computed from its result, whatever clip, max or where make of it.

    Raises:
      ValueError: shapes or dtypes do not fit, a lower bound exceeds its upper bound, or the function contains a JAX
        primitive whose bounds are not known; the message names the primitive, its layer, and the line of the function.

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
    node = propagate(trace(function, lower.shape, lower.dtype), lower, upper, outward=False)
    known = ~jnp.isnan(node.lower)
    return Interval(jnp.where(known, node.lower, -jnp.inf), jnp.where(known, node.upper, jnp.inf))


def margin_bounds(
    logits_fn: LogitsFn,
    lower: Float[AnyArray, "batch ..."],
    upper: Float[AnyArray, "batch ..."],
    labels: Int[AnyArray, " batch"],
    *,
    outward: bool = False,
) -> Float[Array, "batch classes"]:
    """Bounds how far each class stays below the label of its input, separately for every input of a batch.

    The model is traced for a batch of one, so that the bounds of an input do not depend on the other inputs. The map
    from the last activations to a difference of logits is affine, and its bound over their box is exact.

    Args:
      logits_fn: maps ``(1, ...)`` to ``(1, classes)``.
      lower: ``(batch, ...)``, smallest inputs.
      upper: ``(batch, ...)``, largest inputs.
      labels: ``(batch,)``, the classes y.
      outward: whether every step leaves room for its rounding errors and the model's: 84 units in the last place of its
        absolute terms.

    Returns:
      Lower bounds of :math:`f_y - f_j` over the box, ``-inf`` where no bound is known; 0, or below by the room for
      rounding, for the class y itself.

    Raises:
      ValueError: the model contains a primitive whose bounds are not known.
    """
    jaxpr = trace(logits_fn, (1, *lower.shape[1:]), lower.dtype)

    def of_example(lower, upper, label):
        output = propagate(jaxpr, lower[None], upper[None], outward=outward)
        bases = bases_of(output)
        centres = [(base.lower + base.upper) / 2 for base in bases]
        radii = [(base.upper - base.lower) / 2 for base in bases]

        def logits(centres):
            return value_of(output, dict(zip(bases, centres, strict=True)))[0]

        values, pull = jax.vjp(logits, centres)
        [rows] = jax.vmap(pull)(jnp.eye(*values.shape * 2, dtype=values.dtype))
        bound = values[label] - values - _weighed([row[label][None] - row for row in rows], radii)
        if output.scale is not None:
            terms = output.scale[0]
            bound = bound - rounding(values.dtype) * (terms[label] + terms)
        return jnp.where(jnp.isnan(bound), -jnp.inf, bound)

    return jax.vmap(of_example)(lower, upper, labels)


def _weighed(rows: list[Array], factors: list[Array]) -> Array:
    """``(classes,)`` sums of absolute weights times factors."""
    products = [jnp.abs(row) * factor[None] for row, factor in zip(rows, factors, strict=True)]
    return functools.reduce(jnp.add, [product.sum(range(1, product.ndim)) for product in products])


def ball(x: Float[Array, "..."], epsilon: Any, low: Any = 0, high: Any = 1) -> Interval:
    """The linf ball around x within [low, high]."""
    epsilon = jnp.asarray(epsilon, x.dtype)
    return Interval(jnp.clip(x - epsilon, low, high), jnp.clip(x + epsilon, low, high))
