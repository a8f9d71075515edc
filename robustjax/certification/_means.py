"""Confidence bounds of the mean of numbers in [0, 1], on the host, in float64."""

from __future__ import annotations

import math

import numpy as np

from robustjax import _arguments, _validate
from robustjax.typing import ArrayLike


@_arguments.checked
def hoeffding_lower_bound(mean: ArrayLike, num_samples: ArrayLike, alpha: float) -> np.ndarray:
    r"""Computes Hoeffding's one-sided lower confidence bound of a mean.

    .. math:: \max\Bigl(0,\ \bar s - \sqrt{\tfrac{\ln(1/\alpha)}{2 n}}\Bigr)

    The upper bound is ``1 - hoeffding_lower_bound(1 - mean, num_samples, alpha)``.

    Args:
      mean: averages of n numbers in [0, 1], any shape.
      num_samples: n >= 1, broadcast against ``mean``; fixed before the draws were made.
      alpha: probability that the bound fails, in (0, 1).

    Returns:
      float64 array of the broadcast shape, not below 0.

    Raises:
      ValueError: for alpha outside (0, 1), a mean outside [0, 1] or NaN, or num_samples below 1.

    Guarantee:
      For independent numbers in [0, 1] of any distribution, ``P(bound > expected mean) <= alpha`` for each single
      bound.

    Example:
      >>> f"{certification.hoeffding_lower_bound(0.9, 1000, 0.001):.3f}"
      '0.841'

    Reference:
      Hoeffding, "Probability inequalities for sums of bounded random variables", JASA 1963.
    """
    mean, num_samples = _checked(mean, num_samples, alpha, 1)
    return np.asarray(np.maximum(mean - np.sqrt(math.log(1 / alpha) / (2 * num_samples)), 0.0))


@_arguments.checked
def empirical_bernstein_lower_bound(
    mean: ArrayLike, variance: ArrayLike, num_samples: ArrayLike, alpha: float
) -> np.ndarray:
    r"""Computes a one-sided lower confidence bound of a mean, which is tighter if the sample varies little.

    .. math:: \max\Bigl(0,\ \bar s - \sqrt{\tfrac{2 v \ln(2/\alpha)}{n}} - \tfrac{7 \ln(2/\alpha)}{3 (n - 1)}\Bigr)

    Args:
      mean: averages of n numbers in [0, 1], any shape.
      variance: their unbiased sample variances v, with divisor n - 1, broadcast against ``mean``.
      num_samples: n >= 2, broadcast against ``mean``; fixed before the draws were made.
      alpha: probability that the bound fails, in (0, 1).

    Returns:
      float64 array of the broadcast shape, not below 0.

    Raises:
      ValueError: for alpha outside (0, 1), a mean outside [0, 1], a negative variance, NaN, or num_samples below 2.

    Guarantee:
      For independent, identically distributed numbers in [0, 1], ``P(bound > expected mean) <= alpha`` for each single
      bound.

    Example:
      >>> f"{certification.empirical_bernstein_lower_bound(0.9, 0.01, 1000, 0.001):.3f}"  # Hoeffding's is 0.841
      '0.870'

    Reference:
      Maurer and Pontil, "Empirical Bernstein bounds and sample variance penalization", arXiv:0907.3740, theorem 4.
    """
    mean, num_samples = _checked(mean, num_samples, alpha, 2)
    variance = np.asarray(variance, np.float64)
    if not (variance >= 0).all():
        raise ValueError(f"variance must be at least 0, got {variance.min()}.")
    log = math.log(2 / alpha)
    width = np.sqrt(2 * variance * log / num_samples) + 7 * log / (3 * (num_samples - 1))
    return np.asarray(np.maximum(mean - width, 0.0))


def _checked(mean: ArrayLike, num_samples: ArrayLike, alpha: float, least: int) -> tuple[np.ndarray, np.ndarray]:
    _validate.probability(alpha=alpha)
    mean, num_samples = np.asarray(mean, np.float64), np.asarray(num_samples)
    if not ((mean >= 0) & (mean <= 1)).all():
        raise ValueError(f"mean must lie in [0, 1], got values from {mean.min()} to {mean.max()}.")
    if not np.issubdtype(num_samples.dtype, np.integer) or (num_samples < least).any():
        raise ValueError(f"num_samples must be integers of at least {least}, got {num_samples}.")
    return mean, num_samples.astype(np.float64)
