"""Balls around inputs, intersected with the box of inputs: norms, projections, steepest directions and random starts.

Inputs have the batch as first axis and any shape after it; every function acts on each row independently.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Shaped

from robustjax.attacks._box import Box
from robustjax.perturbations import standard_normal

Norm = Literal["linf", "l2", "l1"]
NORMS = ("linf", "l2", "l1")
TINY = 1e-12  # no guard may be larger: gradients of confident models are small, and only their direction counts
_BISECTIONS = 50


def check_norm(norm: str, norms: tuple[str, ...] = NORMS) -> None:
    """Raises ValueError for an unknown norm."""
    if norm not in norms:
        raise ValueError(f"norm must be one of {', '.join(norms)}, got {norm!r}.")


def per_row(values: Shaped[Array, " batch"], x: Float[Array, "batch ..."]) -> Shaped[Array, "batch ..."]:
    """Values of rows, with the rank of x."""
    return values.reshape(values.shape[0], *(1,) * (x.ndim - 1))


def norms_of(displacement: Float[Array, "batch ..."], norm: Norm) -> Float[Array, " batch"]:
    """Norm of each row; the l2 norm neither overflows nor vanishes unless the largest entry does."""
    size = jnp.abs(displacement.reshape(displacement.shape[0], -1))
    if norm == "l1":
        return size.sum(-1)
    largest = size.max(-1, initial=0.0)
    if norm == "linf":
        return largest
    scale = jnp.where(largest > 0, largest, 1.0)
    return scale * jnp.sqrt(jnp.square(size / scale[:, None]).sum(-1))


def unit(direction: Float[Array, "batch ..."], norm: Norm) -> Float[Array, "batch ..."]:
    """Rows of norm 1; rows of zeros stay."""
    length = norms_of(direction, norm)
    return direction / per_row(jnp.where(length > 0, length, 1.0), direction)


def steepest(gradient: Float[Array, "batch ..."], norm: Norm) -> Float[Array, "batch ..."]:
    """Direction of norm 1 along which a linear function rises most; zero where the gradient is zero.

    The sign for linf, the gradient itself for l2, and for l1 only the largest coordinate (the first of several).
    """
    if norm == "linf":
        return jnp.sign(gradient)
    if norm == "l2":
        return unit(gradient, "l2")
    flat = gradient.reshape(gradient.shape[0], -1)
    chosen = jax.nn.one_hot(jnp.abs(flat).argmax(-1), flat.shape[-1], dtype=flat.dtype)
    return (chosen * jnp.sign(flat)).reshape(gradient.shape)


def linf_bounds(
    x: Float[Array, "batch ..."], epsilon: Float[Array, ""], box: Box
) -> tuple[Float[Array, "batch ..."], Float[Array, "batch ..."]]:
    """Smallest and largest floats of the linf ball in the box: no rounding of x - epsilon or x + epsilon leaves it."""
    return jnp.maximum(_no_farther(x, -epsilon), box.low), jnp.minimum(_no_farther(x, epsilon), box.high)


def _no_farther(x, step):
    """``x + step``, rounded towards x."""
    # The rounding error of x + step, exactly (Knuth 1969); outward where it has the sign of -step.
    total = x + step
    back = total - x
    error = (x - (total - back)) + (step - back)
    return jnp.where(error * jnp.sign(step) < 0, jnp.nextafter(total, x), total)


def project(
    z: Float[Array, "batch ..."], x: Float[Array, "batch ..."], epsilon: Float[Array, ""], norm: Norm, box: Box
) -> Float[Array, "batch ..."]:
    r"""Moves z into the ball of radius epsilon around x and into the box.

    For linf and l1 this is the nearest such point; for l2 the point of the ball, clipped, which moves it closer to x.
    For l1 each displacement u shrinks by one threshold, as far as its pixel has room:
    :math:`\mathrm{sign}(u)\min(\max(|u| - \lambda, 0), \text{room})`.

    Reference:
      Croce and Hein 2021, Mind the box: l1-APGD for sparse adversarial attacks on image classifiers, arXiv 2103.01208.
    """
    if norm == "linf":
        low, high = linf_bounds(x, epsilon, box)
        return jnp.clip(z, low, high)
    displacement = z - x
    if norm == "l2":
        length = norms_of(displacement, "l2")
        shrink = jnp.minimum(1.0, epsilon / jnp.where(length > 0, length, 1.0))
        return jnp.clip(x + displacement * per_row(shrink, x), box.low, box.high)
    size = jnp.abs(displacement).reshape(x.shape[0], -1)
    room = jnp.where(displacement > 0, box.high - x, x - box.low).reshape(size.shape)

    def shrunk(threshold):
        return jnp.minimum(jnp.maximum(size - threshold[:, None], 0.0), room)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        inside = shrunk(middle).sum(-1) <= epsilon
        return jnp.where(inside, low, middle), jnp.where(inside, middle, high)

    inside = shrunk(jnp.zeros(x.shape[0], x.dtype)).sum(-1) <= epsilon
    bounds = (jnp.zeros(x.shape[0], x.dtype), size.max(-1, initial=0.0))
    threshold = jnp.where(inside, 0.0, jax.lax.fori_loop(0, _BISECTIONS, halve, bounds)[1])
    moved = shrunk(threshold).reshape(x.shape) * jnp.sign(displacement)
    return jnp.clip(x + moved, box.low, box.high)


def settle(
    z: Float[Array, "batch ..."], x: Float[Array, "batch ..."], epsilon: Float[Array, ""], norm: Norm, box: Box
) -> Float[Array, "batch ..."]:
    """Projects, then corrects points that rounding has left outside: the last step of an attack."""
    z = project(z, x, epsilon, norm, box)
    if norm == "linf":
        return z
    length, limit = norms_of(z - x, norm), epsilon * np.float32(1 - 2**-21)  # the sum rounds too
    shrink = limit / jnp.where(length > limit, length, 1.0)
    nearer = jnp.clip(_no_farther(x, (z - x) * per_row(shrink, x)), box.low, box.high)
    return jnp.where(per_row(length > limit, x), nearer, z)


def uniform(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Draws float32 numbers from [-1, 1]; ``jax.random.uniform`` takes ten times as long to compile."""
    return jax.lax.erf(standard_normal(key, shape) * np.float32(math.sqrt(0.5)))


def random_start(
    keys: Key[Array, " batch"],
    x: Float[Array, "batch ..."],
    epsilon: Float[Array, ""],
    norm: Norm,
    box: Box,
    sigma: float | None = None,
) -> Float[Array, "batch ..."]:
    """Uniform draws from the ball around x or, with sigma, Gaussian ones projected into it; in the box."""
    size = x[0].size if x.shape[0] else 0

    def draw(key, x):
        if sigma is not None:
            return sigma * standard_normal(key, x.shape).astype(x.dtype)
        if norm == "linf":
            return epsilon * uniform(key, x.shape).astype(x.dtype)
        direction_key, radius_key = jax.random.split(key)
        if norm == "l2":
            direction = standard_normal(direction_key, x.shape)
        else:  # Laplace draws
            draws = uniform(direction_key, x.shape)
            direction = jnp.sign(draws) * -jnp.log1p(-jnp.minimum(jnp.abs(draws), np.float32(1 - 2**-24)))
        radius = jnp.abs(uniform(radius_key, ())) ** (1 / size)
        return (unit(direction[None], norm)[0] * radius).astype(x.dtype) * epsilon

    return project(x + jax.vmap(draw)(keys, x), x, epsilon, norm, box)
