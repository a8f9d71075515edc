"""Tests of inputs against the standard normal distribution, as a learner of half-spaces needs it."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from robustjax import _arguments, _validate
from robustjax.typing import AnyArray

matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
"""In float32 on every device: TPUs and GPUs would round its factors, and what is bounded with it is a guarantee."""
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(16)


class Statistics(NamedTuple):
    r"""How far inputs are from standard normal ones, as seen from a direction w; large is far.

    A band is what the surrogate looks at: inputs are weighted by :math:`\ell_\sigma'(\langle w, x\rangle)`, which is 0
    from :math:`|\langle w, x\rangle| = \sigma / 2` on. Orthogonal parts are the parts of inputs orthogonal to w.

    Attributes:
      moments: T1, largest deviation of a moment of degree 4 or less from the moment of N(0, I), in standard errors.
      band_mass: T2, relative deviation of the mean weight.
      band_covariance: T3, largest deviation from 1 of an eigenvalue of the orthogonal second moment in the band.
      band_kurtosis: T3, upper bound of the fourth moment in the band in any orthogonal direction, 3 for N(0, I).
      disagreement: T4, see :func:`disagreement_bound`.
    """

    moments: Float[Array, ""]
    band_mass: Float[Array, ""]
    band_covariance: Float[Array, ""]
    band_kurtosis: Float[Array, ""]
    disagreement: Float[Array, ""]


@_arguments.checked
def statistics(
    x: Float[AnyArray, "batch dim"], weights: Float[AnyArray, " dim"], *, sigma: float, theta: float
) -> Statistics:
    """Computes the statistics of the four tests; labels matter only through w.

    The cost grows with the fourth power of ``dim``, in time and memory: meant for some tens of dimensions.

    Args:
      x: ``(batch, dim)``, inputs that w does not depend on; at least 2 dimensions.
      weights: ``(dim,)`` w, of norm 1.
      sigma: width of the ramp.
      theta: largest angle to w, in (0, pi / 2).

    Returns:
      The statistics. For inputs from N(0, I) their distribution does not depend on w.

    Raises:
      ValueError: a setting is out of its range, or the inputs have fewer than 2 dimensions.

    Example:
      >>> found = halfspaces.statistics(inputs, normal, sigma=0.5, theta=0.1)
      >>> f"{found.moments:.1f} standard errors"
      '2.4 standard errors'
    """
    check_geometry(x.shape, sigma, theta)
    x = jnp.asarray(x)
    margin, pairs, rows, columns = _orthogonal_pairs(x, weights)
    u = jnp.clip(margin / sigma + 0.5, 0, 1)
    slope = 6 * u * (1 - u) / sigma
    mass = slope.mean()
    gaussian = np.sum(_NODE_WEIGHTS * 0.75 * (1 - _NODES**2) * np.exp(-((sigma * _NODES / 2) ** 2) / 2))
    weight = slope / jnp.where(mass > 0, slope.sum(), 1)  # nothing in the band fails T2
    identity = jnp.asarray(rows == columns, x.dtype)
    # <u, z>^4 = (u u^T) M (u u^T); for such matrices of rank 1 the identity taken off and 1 are the same, and no bound
    # by an eigenvalue is exact for N(0, I) without it.
    fourth = matmul((pairs * weight[:, None]).T, pairs) - jnp.outer(identity, identity)
    eigenvalues = jnp.linalg.eigvalsh(_symmetric(matmul(weight, pairs), rows, columns))
    return Statistics(
        moments=_moments(x),
        band_mass=jnp.abs(mass * math.sqrt(2 * math.pi) / gaussian - 1),
        band_covariance=jnp.abs(eigenvalues - 1).max(),
        band_kurtosis=jnp.linalg.eigvalsh(fourth)[-1] + 1,
        disagreement=_disagreement(margin, pairs, rows, columns, theta),
    )


@_arguments.checked
def disagreement_bound(
    x: Float[AnyArray, "batch dim"], weights: Float[AnyArray, " dim"], *, theta: float
) -> Float[Array, ""]:
    r"""Bounds the share of inputs on which any half-space within an angle of w can differ from w.

    Such a half-space differs at x only if :math:`|\langle u, x\rangle| \tan\theta \ge |\langle w, x\rangle|` for its
    direction u orthogonal to w. In strips :math:`k\theta \le |\langle w, x\rangle| < (k + 1)\theta`, by Chebyshev,

    .. math:: B = p_0 + \sum_{k \ge 1} \min\Bigl(p_k,\ \frac{\tan^2\theta}{k^2\theta^2}\,
                  \lambda_{\max}\bigl(\tfrac 1 n \textstyle\sum_{i \in k} z_i z_i^\top\bigr)\Bigr)

    with :math:`p_k` the share of inputs in a strip, z their parts orthogonal to w, and the last strip, from
    :math:`\sqrt{2 \ln(1/\theta)}` on, without an end. For inputs from N(0, I) it is about :math:`2\,\theta`.

    Args:
      x: ``(batch, dim)``.
      weights: ``(dim,)`` w, of norm 1.
      theta: the angle, in (0, pi / 2).

    Returns:
      The scalar B.

    Raises:
      ValueError: ``theta`` is out of its range, or the inputs have fewer than 2 dimensions.

    Guarantee:
      For all v within theta of w, ``mean(sign(x @ v) != sign(x @ w)) <= B`` on these very inputs, whatever they are.
      For any labels, the error of w exceeds the error of v by at most B.

    Example:
      >>> f"{halfspaces.disagreement_bound(inputs, normal, theta=0.1):.2f}"
      '0.19'
    """
    check_geometry(x.shape, 1.0, theta)
    return _disagreement(*_orthogonal_pairs(x, weights), theta)


@_arguments.checked
def null_thresholds(
    key: Key[Array, ""],
    num_samples: int,
    dimension: int,
    *,
    sigma: float,
    theta: float,
    delta: float = 0.02,
    num_draws: int = 300,
) -> Statistics:
    """Simulates the tests on N(0, I), and takes the order statistic that each test exceeds with probability delta / 5.

    Args:
      key: typed PRNG key of the simulation.
      num_samples: number of inputs to test.
      dimension: dimension of the inputs.
      sigma: width of the ramp.
      theta: largest angle to w.
      delta: probability that any test fails.
      num_draws: simulated samples, at least ``5 / delta - 1``.

    Returns:
      The thresholds, for ``num_samples`` inputs.

    Raises:
      ValueError: a setting is out of its range.

    Guarantee:
      Inputs drawn from N(0, I), independent of w and of ``key``, pass all tests with probability at least 1 - delta
      over both: exactly, for any number of draws, because the thresholds are order statistics of exchangeable values.

    Example:
      >>> limits = halfspaces.null_thresholds(jax.random.key(0), 3000, 3, sigma=0.5, theta=0.1)
      >>> f"{limits.moments:.1f} standard errors"
      '3.8 standard errors'
    """
    _validate.key(key)
    _validate.at_least(1, num_samples=num_samples)
    _validate.at_least(2, dimension=dimension)
    _validate.probability(delta=delta)
    check_geometry((num_samples, dimension), sigma, theta)
    least = math.ceil(len(Statistics._fields) / delta - 1 - 1e-9)
    _validate.at_least(least, num_draws=num_draws)
    return _null_thresholds(key, num_samples, dimension, sigma, theta, delta, num_draws)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5, 6))
def _null_thresholds(key, num_samples, dimension, sigma, theta, delta, num_draws):
    def draw(key):
        x = jax.random.normal(key, (num_samples, dimension))
        return statistics(x, jnp.eye(dimension)[0], sigma=sigma, theta=theta)

    drawn = jax.lax.map(draw, jax.random.split(key, num_draws))
    rank = math.ceil((1 - delta / len(Statistics._fields)) * (num_draws + 1) - 1e-9)
    return jax.tree.map(lambda values: jnp.sort(values)[rank - 1], drawn)


def _orthogonal_pairs(x, weights):
    """Margins, and products of the parts of x orthogonal to w: ``z_i z_j`` for i <= j, times sqrt 2 off the diagonal.

    With this scale, the product of two such rows is the product of the matrices ``z z^T``.
    """
    _validate.floating(2, x=x)
    _validate.floating(1, weights=weights)
    if not isinstance(weights, jax.core.Tracer) and abs((norm := np.linalg.norm(np.asarray(weights))) - 1) > 1e-3:
        raise ValueError(f"weights must have norm 1, got {norm:g}.")
    x, weights = jnp.asarray(x), jnp.asarray(weights)
    sign = jnp.where(weights[0] >= 0, 1.0, -1.0).astype(weights.dtype)
    mirror = weights.at[0].add(sign)  # a reflection takes w to the first axis
    z = (x - jnp.outer(matmul(x, mirror), mirror) * (2 / matmul(mirror, mirror)))[:, 1:]
    rows, columns = np.triu_indices(z.shape[1])
    scale = jnp.asarray(np.where(rows == columns, 1.0, math.sqrt(2)), x.dtype)[None]
    return matmul(x, weights), z[:, rows] * z[:, columns] * scale, rows, columns


def _symmetric(products, rows, columns):
    """The matrices whose products ``_orthogonal_pairs`` computes."""
    size = int(rows.max()) + 1
    half = jnp.asarray(np.where(rows == columns, 0.5, math.sqrt(0.5)), products.dtype)
    half = jnp.broadcast_to(half, products.shape)
    upper = jnp.zeros((*products.shape[:-1], size, size), products.dtype).at[..., rows, columns].set(products * half)
    return upper + jnp.swapaxes(upper, -1, -2)


def _disagreement(margin, pairs, rows, columns, theta):
    last = math.ceil(math.sqrt(2 * max(math.log(1 / theta), 0.5)) / theta)
    strip = jnp.minimum(jnp.floor(jnp.abs(margin) / theta).astype(jnp.int32), last)
    member = jax.nn.one_hot(strip, last + 1, dtype=pairs.dtype)
    share = member.mean(0)[1:]
    second = _symmetric(matmul(member.T, pairs)[1:] / margin.shape[0], rows, columns)
    distance = jnp.asarray(theta * np.arange(1, last + 1) / math.tan(theta), pairs.dtype)
    return member[:, 0].mean() + jnp.minimum(share, jnp.linalg.eigvalsh(second)[:, -1] / distance**2).sum()


def _moments(x):
    """Largest deviation of a monomial of degree 1 to 4 from its mean under N(0, I), in standard errors."""
    n, d = x.shape
    rows, columns = np.triu_indices(d)
    features = jnp.concatenate([jnp.ones((n, 1), x.dtype), x, x[:, rows] * x[:, columns]], axis=1)
    unit = np.eye(d, dtype=np.int64)
    degrees = np.concatenate([np.zeros((1, d), np.int64), unit, unit[rows] + unit[columns]])
    of_power = np.array([1, 0, 1, 0, 3, 0, 15, 0, 105], np.float64)  # E z^k
    power = degrees[:, None] + degrees[None]
    mean, square = of_power[power].prod(-1), of_power[2 * power].prod(-1)
    error = np.sqrt(np.maximum(square - mean**2, 0) / n)
    error[0, 0] = np.inf  # the constant
    deviation = jnp.abs(matmul(features.T, features) / n - jnp.asarray(mean, x.dtype))
    return (deviation / jnp.asarray(error, x.dtype)).max()


def check_geometry(shape, sigma, theta):
    _validate.positive(sigma=sigma)
    if not 0 < _validate.number(theta) < math.pi / 2:
        raise ValueError(f"theta must lie strictly between 0 and pi / 2, got {theta!r}.")
    if len(shape) != 2 or shape[1] < 2:
        raise ValueError(f"x must have shape (batch, dim >= 2), got {tuple(shape)}.")
