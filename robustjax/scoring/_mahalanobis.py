"""Distances under Gaussians with one covariance, also relative to the distance under one Gaussian of all rows."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from robustjax import _arguments
from robustjax._precision import in_float32
from robustjax.scoring._detector import (
    Detector,
    cached_by_settings,
    check_finite,
    check_scale,
    fitted_shapes,
    make_detector,
    require,
)
from robustjax.scoring._factor import stacked_factor, triangular_factor
from robustjax.typing import AnyArray

_CUT = 1e-9
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class MahalanobisState(NamedTuple):
    r"""Gaussians of the classes, with one covariance :math:`S`.

    Attributes:
      origin: ``(dim,)``, subtracted from all features first, so that float32 keeps their digits.
      means: ``(classes, dim)``, means of the classes, relative to the origin.
      factor: ``(dim, dim)``, upper triangular :math:`R` with :math:`S = R^\top R`.
      whitener: ``(dim, dim)``, :math:`W` with :math:`S^+ = W W^\top`; columns of ignored directions are zero.
      white_means: ``(classes, dim)``, ``means @ whitener``.
    """

    origin: Float[Array, " dim"]
    means: Float[Array, "classes dim"]
    factor: Float[Array, "dim dim"]
    whitener: Float[Array, "dim dim"]
    white_means: Float[Array, "classes dim"]


class RelativeMahalanobisState(NamedTuple):
    """Gaussians of the classes, and one of all rows, where the two differ: in the span of the means of white classes.

    Attributes:
      origin: ``(dim,)``, the mean of all rows.
      whitener: ``(dim, rank)``, to coordinates of that span, at most one for each class.
      white_means: ``(classes, rank)``, of the classes, there.
      background: ``(dim, rank)``, to coordinates of the span in which all rows together are white.
    """

    origin: Float[Array, " dim"]
    whitener: Float[Array, "dim rank"]
    white_means: Float[Array, "classes rank"]
    background: Float[Array, "dim rank"]


@cached_by_settings
def mahalanobis() -> Detector:
    r"""Squared Mahalanobis distance to the nearest class mean, with one covariance for all classes.

    .. math:: \min_c\, (z - \mu_c)^\top S^+ (z - \mu_c), \qquad
        S = \frac1N \sum_i (z_i - \mu_{y_i})(z_i - \mu_{y_i})^\top

    :math:`S^+` is a pseudo-inverse in units of the standard deviations of the features: directions in which the
    variance is below :math:`10^{-9}` of the largest are ignored, and so are features that within the classes vary no
    more than float32 rounds them (units that are dead after a ReLU). With fewer rows than dimensions, the parts of
    features outside the span of the training rows therefore add nothing to the distance. Up to a condition number of S
    of 1e8, scores agree with float64 arithmetic within 1e-3.

    ``fit`` needs labels, and at least one row of every class. New classes can be added later: ``add_class``.

    Returns:
      The detector; its state is a ``MahalanobisState``.

    Example:
      >>> detector = scoring.mahalanobis()
      >>> state = detector.fit(train, labels)
      >>> print(detector.score(state, test))
      [  0.85 162.42]

    Reference:
      Lee, Lee, Lee and Shin, "A simple unified framework for detecting out-of-distribution samples and adversarial
      attacks", arXiv:1807.03888. Their confidence is this score times -1/2.
    """

    def fit(outputs, labels, head):
        require("mahalanobis", outputs=outputs, labels=labels)
        check_scale("mahalanobis", outputs.features)
        return _fit_classes(outputs, labels)[0]

    return make_detector(fit, lambda state, outputs: _nearest(state, outputs.features)[1], _fitted_on)


@cached_by_settings
def relative_mahalanobis() -> Detector:
    r"""Mahalanobis distance to the nearest class, minus the distance under a single Gaussian of all training rows.

    .. math:: \min_c\, (z - \mu_c)^\top S^+ (z - \mu_c) - (z - \mu_0)^\top S_0^+ (z - \mu_0)

    Directions that do not separate the classes add the same to both distances and cancel, so they are left out from the
    start; scores may be negative. Labels and :math:`S^+` are as in ``mahalanobis``, and :math:`S_0^+` ignores the same
    directions as :math:`S^+`. Up to a condition number of S of 1e7, scores agree with float64 arithmetic within 1e-3 of
    the largest score.

    Returns:
      The detector; its state is a ``RelativeMahalanobisState``.

    Example:
      >>> detector = scoring.relative_mahalanobis()
      >>> state = detector.fit(train, labels)
      >>> print(detector.score(state, test))
      [-1.65  2.93]

    Reference:
      Ren et al., "A simple fix to Mahalanobis distance for improving near-OOD detection", arXiv:2106.09022.
    """

    def fit(outputs, labels, head):
        require("relative_mahalanobis", outputs=outputs, labels=labels)
        check_scale("relative_mahalanobis", outputs.features)
        return _fit_background(*_fit_classes(outputs, labels))

    def score(state, outputs):
        white = _matmul(outputs.features - state.origin[None], state.background)
        return _nearest(state, outputs.features)[1] - jnp.square(white).sum(-1)

    return make_detector(fit, score, lambda state: (None, state.background.shape[0]))


@_arguments.checked
def add_class(state: MahalanobisState, features: Float[AnyArray, "rows dim"]) -> MahalanobisState:
    r"""Adds a class to a fitted ``mahalanobis``, without the rows of the other classes.

    .. math:: S \leftarrow \frac{C}{C + 1} S + \frac{1}{C + 1} S_\text{new}

    with :math:`C` the number of classes before: each class counts once, however many rows it has.

    Args:
      state: a fitted state, or a result of this function.
      features: ``(rows, dim)`` of the new class, at least one row.

    Returns:
      The state with one more class, the last one.

    Raises:
      ValueError: for features without rows, of another dimension or not finite, and for another state.

    Example:
      >>> state = scoring.mahalanobis().fit(train, labels)
      >>> more = scoring.add_class(state, features[:10] + 3)  # rows of a fourth class
      >>> print(scoring.nearest_class(more, features[10:14] + 3))
      [3 3 3 3]

    Reference:
      Lee et al., arXiv:1807.03888, Algorithm 2.
    """
    return _with_class(state, _checked_features(state, features, 1))


@_arguments.checked
def nearest_class(state: MahalanobisState, features: Float[AnyArray, "batch dim"]) -> Int[Array, " batch"]:
    """The class whose mean is nearest in Mahalanobis distance: the classifier that can learn new classes.

    Args:
      state: a state of ``mahalanobis``, with or without added classes.
      features: ``(batch, dim)``.

    Returns:
      ``(batch,)``, int32; added classes come after the classes of the model, in the order of their addition. Under
      ``jit``, -1 for features that are not finite.

    Raises:
      ValueError: for features of another dimension or not finite, and for another state.

    Example:
      >>> state = scoring.mahalanobis().fit(train, labels)
      >>> print(scoring.nearest_class(state, features[:5]))
      [0 1 2 0 1]
    """
    features = _checked_features(state, features, 0)
    return jnp.where(jnp.isfinite(features).all(-1), _nearest(state, features)[0], -1)


def _fitted_on(state):
    return None, state.factor.shape[0]


def _checked_features(state, features, least_rows):
    features, (_, dim) = in_float32(jnp.asarray(features)), fitted_shapes(_fitted_on, state)
    if features.ndim != 2 or features.shape[0] < least_rows or features.shape[1] != dim:
        raise ValueError(f"features must be (rows >= {least_rows}, {dim}), got {features.shape}.")
    check_finite("features", features)
    return features


def _fit_classes(outputs, labels):
    classes, here = outputs.logits.shape[1], labels.is_fully_addressable  # else other processes hold rows, too
    counts = np.bincount(labels, minlength=classes) if here else np.asarray(jnp.bincount(labels, length=classes))
    if not counts.all():
        raise ValueError(f"labels must hold every class, class {int(counts.argmin())} has no rows.")
    weights = counts.astype(outputs.features.dtype)
    # The mean on its own: within one program XLA may subtract it before it is rounded here, and after it there.
    return _fit(outputs.features, outputs.features.mean(0), labels, weights), weights / weights.sum()


@jax.jit
def _fit(features, origin, labels, counts):
    centred = features - origin[None]
    members = jax.nn.one_hot(labels, counts.shape[0], dtype=features.dtype, axis=0)
    means = _matmul(members, centred) / counts[:, None]
    return _gaussians(origin, means, triangular_factor(centred - means[labels]))


@jax.jit
def _fit_background(classes, weights):
    mean = _matmul(weights[None], classes.means)
    means = _matmul(classes.means - mean, classes.whitener)
    basis = jnp.linalg.qr(means.T)[0]
    whitener, means = _matmul(classes.whitener, basis), _matmul(means, basis)
    within = jnp.eye(basis.shape[1], dtype=means.dtype)
    factor = stacked_factor(within, jnp.sqrt(weights)[:, None] * means)
    background = _matmul(whitener, jax.scipy.linalg.solve_triangular(factor, within))
    return RelativeMahalanobisState(classes.origin + mean[0], whitener, means, background)


@jax.jit
def _with_class(state, features):
    before = state.means.shape[0]
    centred = features - state.origin[None]
    mean = centred.mean(0, keepdims=True)
    old, new = (before / (before + 1)) ** 0.5, (before + 1) ** -0.5
    factor = stacked_factor(old * state.factor, new * triangular_factor(centred - mean))
    return _gaussians(state.origin, jnp.concatenate([state.means, mean]), factor)


def _gaussians(origin, means, factor):
    deviation = jnp.linalg.norm(factor, axis=0)
    alive = deviation > 2 * jnp.finfo(factor.dtype).eps * jnp.abs(origin[None] + means).max(0)
    per_deviation = jnp.where(alive, 1 / jnp.where(alive, deviation, 1.0), 0.0)
    scaled = factor * per_deviation[None]

    def pseudo_inverse():
        _, values, directions = jnp.linalg.svd(scaled)
        kept = values > _CUT**0.5 * values[0]
        return directions.T * jnp.where(kept, 1 / jnp.where(kept, values, 1.0), 0.0)[None]

    # Where the norms show that every direction would be kept, the inverse does as well, at a twentieth of the time.
    inverse = jax.scipy.linalg.solve_triangular(scaled, jnp.eye(scaled.shape[0], dtype=scaled.dtype))
    all_kept = _CUT**0.5 * jnp.linalg.norm(inverse) * jnp.linalg.norm(scaled) < 1
    whitener = per_deviation[:, None] * jax.lax.cond(all_kept, lambda: inverse, pseudo_inverse)
    return MahalanobisState(origin, means, factor, whitener, _matmul(means, whitener))


def _nearest(state, features):
    """The nearest class, found in one matrix product, and the squared distance to it, by its definition."""
    white, means = _matmul(features - state.origin[None], state.whitener), state.white_means
    nearest = (jnp.square(means).sum(-1)[None] - 2 * _matmul(white, means.T)).argmin(-1).astype(jnp.int32)
    return nearest, jnp.square(white - means[nearest]).sum(-1)
