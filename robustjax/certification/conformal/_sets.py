"""Thresholds and sets of labels: split conformal prediction, RSCP and RSCP+; on the host, in float64."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

import numpy as np

from robustjax import _arguments, _validate
from robustjax.certification._means import empirical_bernstein_lower_bound, hoeffding_lower_bound
from robustjax.certification._measures import Gaussian, resolved
from robustjax.certification.conformal._smoothed import SmoothedScores
from robustjax.typing import ArrayLike


@_arguments.checked
def conformal_quantile(scores: ArrayLike, *, alpha: float = 0.1) -> float:
    r"""Computes the threshold of split conformal prediction.

    .. math:: s_{(k)}, \qquad k = \lceil (n + 1) (1 - \alpha) \rceil

    the k-th smallest of n scores, and plus infinity if k is n + 1. It is always one of the scores, because an
    interpolated quantile can be too small. ``alpha`` means the decimal number that it prints as.

    Args:
      scores: ``(n,)`` scores of the true labels of the calibration inputs.
      alpha: how often the true label of a new input may be missed, in (0, 1).

    Returns:
      The threshold, float64; warns if it is infinite.

    Raises:
      ValueError: for alpha outside (0, 1), or scores that are not a vector, empty, or NaN.

    Guarantee:
      For n + 1 exchangeable scores, ``P(new score <= threshold) >= 1 - alpha`` over all of them; where scores do not
      tie, also at most ``1 - alpha + 1 / (n + 1)``, and the probability given the n scores has the law
      Beta(k, n + 1 - k).

    Example:
      >>> conformal.conformal_quantile([0.1, 0.5, 0.2, 0.9, 0.4, 0.3, 0.8, 0.6, 0.7], alpha=0.2)  # the eighth of nine
      0.8

    Reference:
      Vovk, Gammerman and Shafer, "Algorithmic learning in a random world", 2005.
    """
    _validate.probability(alpha=alpha)
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 1 or not scores.size or np.isnan(scores).any():
        raise ValueError(f"scores must be a vector of numbers without NaN, got shape {scores.shape}.")
    n = scores.size
    above = math.floor(_exactly(alpha) * (n + 1))
    if above < 1:
        _validate.warn(
            f"{n} calibration scores are too few for alpha={alpha:g}: the threshold is infinite, sets hold all labels."
        )
        return math.inf
    return float(np.partition(scores, n - above)[n - above])


@_arguments.checked
def prediction_sets(scores: ArrayLike, threshold: float) -> np.ndarray:
    r"""Collects the labels that conform.

    .. math:: C(x) = \{y : S(x, y) \le t\}

    Args:
      scores: ``(batch, classes)``.
      threshold: t, from ``conformal_quantile``.

    Returns:
      ``(batch, classes)`` bool, True for the labels in the set; ``sets.sum(-1)`` are the sizes.

    Raises:
      ValueError: for scores that are not ``(batch, classes)``, or NaN, which would silently be left out.

    Example:
      >>> conformal.prediction_sets([[0.3, 0.8, 0.9], [0.2, 0.4, 0.5]], threshold=0.45)
      array([[ True, False, False],
             [ True,  True, False]])
    """
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 2 or np.isnan(scores).any() or math.isnan(_validate.number(threshold)):
        raise ValueError(
            f"scores must be (batch, classes) without NaN, and threshold not NaN, got shape {scores.shape}."
        )
    return scores <= float(threshold)


@_arguments.checked
def split_conformal(calibration: ArrayLike, labels: ArrayLike, scores: ArrayLike, *, alpha: float = 0.1) -> np.ndarray:
    """Computes the sets of split conformal prediction: ``prediction_sets`` at the ``conformal_quantile``.

    Args:
      calibration: ``(n, classes)`` scores of the calibration inputs.
      labels: ``(n,)`` their integer true classes.
      scores: ``(batch, classes)`` scores of new inputs, drawn in the same way.
      alpha: how often the true label of a new input may be missed, in (0, 1).

    Returns:
      ``(batch, classes)`` bool.

    Raises:
      ValueError: for scores or labels that are not as above, or NaN, and alpha outside (0, 1).

    Guarantee:
      A new input that is exchangeable with the calibration inputs has its true label in the set with probability at
      least 1 - alpha, over calibration and new inputs together. An attacked input is not exchangeable.

    Example:
      >>> conformal.split_conformal(calibration, labels, [[0.2, 0.9], [0.4, 0.45]], alpha=0.1)
      array([[ True, False],
             [ True,  True]])
    """
    threshold = conformal_quantile(_of_labels(calibration, labels), alpha=alpha)
    _same_classes(np.asarray(calibration), scores=np.asarray(scores))
    return prediction_sets(scores, threshold)


@_arguments.checked
def rscp(
    calibration: SmoothedScores,
    labels: ArrayLike,
    test: SmoothedScores,
    measure: Gaussian,
    *,
    epsilon: float = 0.125,
    alpha: float = 0.1,
) -> np.ndarray:
    r"""Computes the sets of randomly smoothed conformal prediction (RSCP), whose guarantee has a gap.

    .. math:: C(x) = \Bigl\{y : \Phi^{-1}\bigl(\bar s(x, y)\bigr) - \frac\epsilon\sigma \le \Phi^{-1}(t)\Bigr\}

    with t the conformal quantile of :math:`\bar s` at the calibration inputs.

    Args:
      calibration: smoothed scores of n clean inputs.
      labels: ``(n,)`` their integer true classes.
      test: smoothed scores of inputs that may be attacked.
      measure: the ``gaussian(sigma)`` behind both.
      epsilon: l2 norm of the attack, at least 0, in units of [0, 1] images; the paper's delta.
      alpha: how often the true label may be missed, in (0, 1).

    Returns:
      ``(batch, classes)`` bool, True for the labels in the set.

    Raises:
      ValueError: for another measure, scores outside [0, 1] or labels that do not fit them.

    Guarantee:
      None. Were :math:`\bar s` the exact expectation, coverage would be at least 1 - alpha, since
      :math:`\Phi^{-1} \circ E S` changes by at most :math:`\lVert\delta\rVert_2 / \sigma`. This is
      not true for means of any number of draws: the quantile allows for the spread of clean means, but attacked means
      have another spread. If all clean inputs have a smoothed score of 0.9 and :math:`\epsilon = \sigma / 2`, a
      worst-case attack leaves a coverage of 0.80 instead of 0.9 with 256 draws, and of 0.83 with 100,000. Use
      ``rscp_plus``.

    Example:
      >>> smoothed = conformal.SmoothedScores(calibration, np.full((99, 2), 0.01), np.full(99, 256))
      >>> test = conformal.SmoothedScores(np.array([[0.2, 0.9]]), np.full((1, 2), 0.01), np.array([256]))
      >>> conformal.rscp(smoothed, labels, test, certification.gaussian(0.5), epsilon=0.125)
      array([[ True, False]])

    Reference:
      Gendler et al., "Adversarially robust conformal prediction", ICLR 2022; the gap: Yan, Romano and Weng,
      arXiv:2404.19651. Differs from the authors' code in the quantile, which interpolates there.
    """
    shift = _checked_shift(measure, epsilon)
    clean, mean = _mean(calibration=calibration), _mean(test=test)
    _same_classes(clean, test=mean)
    return _robust_sets(mean, conformal_quantile(_of_labels(clean, labels), alpha=alpha), shift)


@_arguments.checked
def rscp_plus(
    calibration: SmoothedScores,
    labels: ArrayLike,
    test: SmoothedScores,
    measure: Gaussian,
    *,
    epsilon: float = 0.125,
    alpha: float = 0.1,
    beta: float = 0.001,
    bound: Literal["bernstein", "hoeffding"] = "bernstein",
) -> np.ndarray:
    r"""Computes the sets of RSCP+, which hold under attack and allow for all sampling errors.

    .. math:: C(x) = \Bigl\{y : \Phi^{-1}\bigl(\underline s(x, y)\bigr) - \frac\epsilon\sigma \le
              \Phi^{-1}\bigl(\min(1,\ t + b)\bigr)\Bigr\}, \qquad b = \sqrt{\frac{\ln(1/\beta)}{2 n_s}}

    t is the conformal quantile of the clean means at level :math:`\alpha - 2 \beta`, b Hoeffding's distance from the
    clean mean to its expectation, and :math:`\underline s` a lower bound of the expectation at the test input, at level
    beta. Where t + b reaches 1, sets contain all labels.

    Args:
      calibration: smoothed scores of n clean inputs, all with the same number of copies.
      labels: ``(n,)`` their integer true classes.
      test: smoothed scores of inputs that may be attacked; the number of copies may differ.
      measure: the ``gaussian(sigma)`` behind both.
      epsilon: l2 norm of the attack, at least 0, in units of [0, 1] images; the paper's delta.
      alpha: how often the true label may be missed, in (0, 1).
      beta: probability that each of the two bounds fails, below alpha / 2.
      bound: the lower bound, by the empirical Bernstein inequality or, as for calibration, Hoeffding's.

    Returns:
      ``(batch, classes)`` bool, True for the labels in the set.

    Raises:
      ValueError: for another measure, scores outside [0, 1], labels that do not fit them, calibration inputs with
        different numbers of copies, or beta that is not below alpha / 2.

    Guarantee:
      Let clean inputs be exchangeable with the calibration inputs and noise be drawn in the same way for all. Each
      test input is changed by at most epsilon in l2, with knowledge of everything but the noise to come. The true label
      is in the set with probability at least 1 - alpha: over inputs and noise together, in exact arithmetic, for each
      single test input. With a ``grid`` in the measure, epsilon is between the lattice points nearest to the inputs.

    Example:
      >>> smoothed = conformal.SmoothedScores(calibration, np.full((99, 2), 0.01), np.full(99, 256))
      >>> test = conformal.SmoothedScores(np.array([[0.2, 0.99]]), np.full((1, 2), 0.01), np.array([256]))
      >>> conformal.rscp_plus(smoothed, labels, test, certification.gaussian(0.5), epsilon=0.125)
      array([[ True, False]])

    Reference:
      Yan, Romano and Weng, "Provably robust conformal prediction with improved efficiency", arXiv:2404.19651.
    """
    shift = _checked_shift(measure, epsilon)
    _validate.probability(alpha=alpha, beta=beta)
    left = _exactly(alpha) - 2 * _exactly(beta)
    if left <= 0:
        raise ValueError(f"beta must be below alpha / 2 = {alpha / 2:g}, got {beta!r}.")
    copies = np.unique(np.asarray(calibration.num_samples))
    if copies.size != 1:
        raise ValueError(f"calibration.num_samples must be one number for all inputs, got {copies}.")
    clean, mean = _mean(calibration=calibration), _mean(test=test)
    _same_classes(clean, test=mean)
    quantile = conformal_quantile(_of_labels(clean, labels), alpha=float(left))
    threshold = 1 - hoeffding_lower_bound(1 - min(quantile, 1.0), copies[0], beta)
    num_samples = np.asarray(test.num_samples)[:, None]
    if bound == "bernstein":
        lower = empirical_bernstein_lower_bound(mean, test.variance, num_samples, beta)
    elif bound == "hoeffding":
        lower = hoeffding_lower_bound(mean, num_samples, beta)
    else:
        raise ValueError(f"bound must be bernstein or hoeffding, got {bound!r}.")
    return _robust_sets(resolved(lower), float(threshold), shift)


def _robust_sets(lower: np.ndarray, threshold: float, shift: float) -> np.ndarray:
    """Labels whose clean score may be at most the threshold. -inf and +inf compare, and are never subtracted."""
    from scipy import special

    return special.ndtri(lower) - shift <= special.ndtri(min(threshold, 1.0))


def _exactly(value: float) -> Fraction:
    """The decimal number that ``value`` prints as: 0.29 * 100 is 29, not a little less."""
    return Fraction(repr(float(value)))


def _checked_shift(measure: Gaussian, epsilon: float) -> float:
    if not isinstance(measure, Gaussian):
        raise ValueError(f"measure must be gaussian(sigma), whose change under an attack is known, got {measure!r}.")
    _validate.not_negative(epsilon=epsilon)
    return float(epsilon) / measure.sigma


def _mean(**scores: SmoothedScores) -> np.ndarray:
    ((name, value),) = scores.items()
    mean = np.asarray(value.mean, np.float64)
    if mean.ndim != 2 or not ((mean >= 0) & (mean <= 1)).all():
        raise ValueError(f"{name}.mean must be (batch, classes) in [0, 1], got shape {mean.shape}.")
    for field, wanted in (("variance", mean.shape), ("num_samples", mean.shape[:1])):
        if np.shape(getattr(value, field)) != wanted:
            raise ValueError(f"{name}.{field} must have shape {wanted}, got {np.shape(getattr(value, field))}.")
    return mean


def _same_classes(calibration: np.ndarray, **scores: np.ndarray) -> None:
    ((name, value),) = scores.items()
    if value.shape[1:] != calibration.shape[1:]:
        raise ValueError(
            f"{name} must have the {calibration.shape[-1]} classes of calibration, got shape {value.shape}."
        )


def _of_labels(scores: ArrayLike, labels: ArrayLike) -> np.ndarray:
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if scores.ndim != 2:
        raise ValueError(f"calibration must be (n, classes) scores, got shape {scores.shape}.")
    if labels.shape != scores.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be ({scores.shape[0]},) integers, got {labels.dtype} {labels.shape}.")
    if labels.size and not 0 <= labels.min() <= labels.max() < scores.shape[1]:
        raise ValueError(f"labels must lie in 0, ..., {scores.shape[1] - 1}, got {labels.min()} to {labels.max()}.")
    return np.take_along_axis(scores, labels[:, None], axis=-1)[:, 0]
