"""The learner, and its answer with the tests."""

# ruff: noqa: PT028  (the paper's name begins like one of a test)

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from robustjax import _arguments, _validate
from robustjax.certification.halfspaces._testers import Statistics, check_geometry, matmul, null_thresholds, statistics
from robustjax.typing import AnyArray


class Result(NamedTuple):
    """The answer of a tester-learner.

    Attributes:
      weights: ``(dim,)``, of norm 1; the answer for x is the sign of their product.
      accepted: whether no test failed and the learner converged; if False, do not use the weights.
      error: share of wrong answers on the rows for choosing.
      gradient_norm: norm of the gradient of the surrogate at the learner's last weights, on the rows for learning.
      statistics: statistics of the rows for testing.
      thresholds: the values above which a statistic fails.
    """

    weights: Float[Array, " dim"]
    accepted: Bool[Array, ""]
    error: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    statistics: Statistics
    thresholds: Statistics


@_arguments.checked
def surrogate_loss(
    weights: Float[AnyArray, " dim"],
    x: Float[AnyArray, "batch dim"],
    y: Float[AnyArray, " batch"],
    *,
    sigma: float | Array,
) -> Float[Array, ""]:
    r"""Computes a smooth surrogate for the share of wrong answers, whose stationary points are good half-spaces.

    .. math:: L_\sigma(w) = \frac 1 n \sum_i \ell_\sigma\Bigl(-y_i \frac{\langle w, x_i\rangle}{\lVert w\rVert}\Bigr),
              \qquad \ell_\sigma(t) = 3u^2 - 2u^3, \quad u = \mathrm{clip}(t / \sigma + 1/2,\ 0,\ 1)

    Let inputs be of any distribution, P(y is not the sign of :math:`\langle w^*, x\rangle` given x) at most
    :math:`\eta < 1/2`, and :math:`\theta < \pi / 2` the angle between w and :math:`w^*`. If the norm of the expected
    gradient is g, and A the least of :math:`E\,\ell_\sigma'(\langle w, x\rangle)\,|\langle u, x\rangle|` over unit
    vectors u orthogonal to w, then

    .. math:: \tan\theta \le \frac{2 (1 - \eta)\, E\,\ell_\sigma'(\langle w, x\rangle)\,|\langle w, x\rangle|}
                                  {(1 - 2\eta) A - g}

    wherever the denominator is positive, which for inputs from N(0, I) is :math:`O(\sigma / (1 - 2\eta))`. The same
    holds for -w, whose gradient has the same norm.

    Args:
      weights: ``(dim,)`` w, not 0; the loss does not depend on its norm.
      x: ``(batch, dim)``.
      y: ``(batch,)``, labels -1 and 1.
      sigma: width of the ramp, in the units of x.

    Returns:
      The scalar loss in [0, 1].

    Raises:
      ValueError: ``sigma`` is not positive.

    Example:
      >>> f"{halfspaces.surrogate_loss(normal, inputs, targets, sigma=0.5):.2f}"
      '0.13'
      >>> f"{halfspaces.surrogate_loss(-normal, inputs, targets, sigma=0.5):.2f}"
      '0.87'

    Reference:
      Gollakota et al. 2023, arXiv 2302.14853; the ramp here is a polynomial of their family.
    """
    _validate.positive(sigma=sigma)
    _check_shapes(x, y)
    if weights.shape != x.shape[1:]:
        raise ValueError(f"weights must have shape {x.shape[1:]}, got {weights.shape}.")
    t = -y * matmul(x, weights / jnp.linalg.norm(weights))
    u = jnp.clip(t / sigma + 0.5, 0, 1)
    return (u * u * (3 - 2 * u)).mean()


@_arguments.checked
def learn(
    key: Key[Array, ""],
    x: Float[AnyArray, "batch dim"],
    y: Float[AnyArray, " batch"],
    *,
    sigma: float,
    steps: int = 300,
    restarts: int = 4,
    step_size: float = 0.5,
) -> tuple[Float[Array, "restarts dim"], Float[Array, " restarts"]]:
    r"""Descends the surrogate on the unit sphere, from random directions.

    .. math:: w \leftarrow \frac{w - \beta_t \nabla L_\sigma(w)}{\lVert w - \beta_t \nabla L_\sigma(w)\rVert}

    The gradient is orthogonal to w; :math:`\beta_t` falls to 0 linearly. The published method takes fresh inputs at
    each step, this one all inputs.

    Args:
      key: typed PRNG key of the starts.
      x: ``(batch, dim)``, finite.
      y: ``(batch,)``, labels -1 and 1, floating.
      sigma: width of the ramp, see :func:`surrogate_loss`.
      steps: number of gradients.
      restarts: number of starts.
      step_size: :math:`\beta_0`.

    Returns:
      ``(restarts, dim)`` unit vectors, and the norm of the gradient at each.

    Raises:
      ValueError: a setting is not positive.

    Example:
      >>> weights, norms = halfspaces.learn(jax.random.key(0), inputs, targets, sigma=0.5, restarts=1)
      >>> f"{(weights @ normal).max():.2f}"  # the cosine to the true normal
      '1.00'
    """
    _validate.positive(sigma=sigma, step_size=step_size)
    _validate.at_least(1, steps=steps, restarts=restarts)
    _check_shapes(x, y)
    gradient = jax.vmap(jax.grad(functools.partial(surrogate_loss, sigma=sigma)), (0, None, None))
    unit = lambda w: w / jnp.linalg.norm(w, axis=-1, keepdims=True)

    def step(w, i):
        return unit(w - step_size * (1 - i / jnp.float32(steps)) * gradient(w, x, y)), None

    start = unit(jax.random.normal(key, (restarts, x.shape[1])))
    w, _ = jax.lax.scan(step, start, jnp.arange(steps, dtype=jnp.float32))
    return w, jnp.linalg.norm(gradient(w, x, y), axis=-1)


@_arguments.checked
def tester_learner(
    key: Key[Array, ""],
    x: Float[AnyArray, "batch dim"],
    y: AnyArray,
    *,
    epsilon: float,
    eta: float,
    sigma: float | None = None,
    theta: float | None = None,
    delta: float = 0.02,
    steps: int = 300,
    restarts: int = 4,
    num_draws: int = 300,
    thresholds: Statistics | None = None,
) -> Result:
    r"""Learns a half-space through the origin from noisy labels, and tests whether its error is near the best.

    The rows are split in three parts at random: to learn directions (:func:`learn`), to choose the one with the least
    error among the directions and their negatives, and to test it (:func:`statistics`). It is accepted if no statistic
    exceeds its threshold and the norm of its gradient is at most :math:`(1 - 2\eta) / (2\pi)`, half of the norm at a
    direction that is far from :math:`w^*` for inputs from N(0, I).

    Args:
      key: typed PRNG key of the split, the starts and the simulated thresholds.
      x: ``(batch, dim)``, finite, at least ``3 (dim + 1)`` rows, drawn independently; ``dim`` at least 2.
      y: ``(batch,)``, labels -1 and 1.
      epsilon: how far the error may be above the best, in (0, 1).
      eta: bound of the label noise (Massart): no label is flipped with a larger probability; in [0, 1/2).
      sigma: width of the ramp; None for ``(1 - 2 eta) epsilon``.
      theta: largest angle that T4 covers; None for epsilon.
      delta: how often inputs from N(0, I) may be rejected.
      steps: gradients of the learner.
      restarts: starts of the learner.
      num_draws: samples behind the thresholds.
      thresholds: of :func:`null_thresholds`, for ``batch // 3`` inputs and the same sigma and theta; None to simulate.

    Returns:
      The direction and the results of its tests.

    Raises:
      ValueError: labels are not -1 and 1, inputs are not finite or too few, or a setting is out of its range.

    Guarantee:
      Completeness: on inputs from N(0, I), whatever the labels, the tests fail with probability at most delta over the
      inputs and the key; that the learner converges is measured, not proven. Soundness: on any inputs, half-spaces
      within theta of an accepted w differ from it on no more than ``statistics.disagreement`` of the tested inputs.
      That the best half-space is within O(epsilon) of w is the paper's theorem, by the inequality of
      :func:`surrogate_loss`; its constants, and how many rows it takes, are simplified here and not proven.

    Example:
      >>> result = halfspaces.tester_learner(jax.random.key(0), inputs, targets, epsilon=0.3, eta=0.1)
      >>> print(result.accepted, f"{result.weights @ normal:.2f}")
      True 1.00

    Reference:
      Gollakota, Klivans, Stavropoulos and Vasilyan 2023, An Efficient Tester-Learner for Halfspaces, arXiv 2302.14853.
      Differs in tolerances, which are quantiles of simulated statistics instead of unnamed constants, in using all
      moments up to degree 4 for T1, and in the certified fourth moment of T3.
    """
    _validate.key(key)
    if not 0 < _validate.number(epsilon) < 1:
        raise ValueError(f"epsilon must lie strictly between 0 and 1, got {epsilon!r}.")
    if not 0 <= _validate.number(eta) < 0.5:
        raise ValueError(f"eta must lie in [0, 1/2), got {eta!r}.")
    _validate.at_least(1, steps=steps, restarts=restarts, num_draws=num_draws)
    _validate.probability(delta=delta)
    sigma = (1 - 2 * eta) * epsilon if sigma is None else sigma
    theta = epsilon if theta is None else theta
    check_geometry(x.shape, sigma, theta)
    _check_sample(x, y)
    third, dimension = x.shape[0] // 3, x.shape[1]
    split_key, learn_key, null_key = jax.random.split(key, 3)
    if thresholds is None:
        settings = {"sigma": sigma, "theta": theta, "delta": delta, "num_draws": num_draws}
        thresholds = null_thresholds(null_key, third, dimension, **settings)
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y).astype(jnp.float32)
    return _tester_learner(split_key, learn_key, x, y, jnp.float32(eta), thresholds, sigma, theta, steps, restarts)


@functools.partial(jax.jit, static_argnums=(6, 7, 8, 9))
def _tester_learner(split_key, learn_key, x, y, eta, thresholds, sigma, theta, steps, restarts):
    third = x.shape[0] // 3
    order = jax.random.permutation(split_key, x.shape[0])
    to_learn, to_test, to_choose = order[:third], order[third : 2 * third], order[2 * third :]
    weights, gradient_norms = learn(learn_key, x[to_learn], y[to_learn], sigma=sigma, steps=steps, restarts=restarts)
    candidates = jnp.concatenate([weights, -weights])
    answers = jnp.where(matmul(x[to_choose], candidates.T) >= 0, 1.0, -1.0)
    errors = (answers != y[to_choose, None]).mean(0, dtype=jnp.float32)
    best = errors.argmin()
    found = statistics(x[to_test], candidates[best], sigma=sigma, theta=theta)
    gradient_norm = gradient_norms[best % restarts]
    passed = jnp.stack([value <= limit for value, limit in zip(found, thresholds)]).all()
    converged = gradient_norm <= (1 - 2 * eta) / (2 * math.pi)
    return Result(candidates[best], passed & converged, errors[best], gradient_norm, found, thresholds)


def _check_shapes(x, y):
    if y.shape != x.shape[:1]:
        raise ValueError(f"y must have shape {x.shape[:1]}, got {y.shape}.")


def _check_sample(x, y):
    if x.ndim != 2 or x.shape[0] < 3 * (x.shape[1] + 1):
        raise ValueError(f"x must have shape (batch >= 3 (dim + 1), dim), got {x.shape}.")
    _check_shapes(x, y)
    if not isinstance(y, jax.core.Tracer) and not bool(((y == 1) | (y == -1)).all()):
        other = np.asarray(y)[~np.isin(np.asarray(y), (-1, 1))][0]
        raise ValueError(f"y must hold only the labels -1 and 1, got {other}.")
    if not isinstance(x, jax.core.Tracer) and not bool(np.isfinite(np.asarray(x)).all()):
        raise ValueError("x must be finite, got NaN or infinity.")
