"""Binomial statistics on the host, in float64: float32 cannot tell 1 - 1e-8 from 1."""

from __future__ import annotations

import numpy as np

from robustjax import _arguments, _validate
from robustjax.typing import ArrayLike


def _check_integers(least: int, **values: np.ndarray) -> None:
    for name, value in values.items():
        if not np.issubdtype(value.dtype, np.integer):
            raise ValueError(f"{name} must be integers, got {value.dtype}.")
        if (value < least).any():
            raise ValueError(f"{name} must be at least {least}, got {value.min()}.")


@_arguments.checked
def binomial_lower_bound(successes: ArrayLike, trials: ArrayLike, alpha: float) -> np.ndarray:
    r"""Computes the one-sided Clopper-Pearson lower confidence bound of a probability.

    .. math:: \underline p = \mathrm{Beta}^{-1}(\alpha;\ k,\ n - k + 1), \qquad \underline p = 0 \text{ for } k = 0

    Args:
      successes: counts k, any shape, integers with 0 <= k <= n.
      trials: numbers of draws n >= 1, broadcast against ``successes``; fixed before the draws were made.
      alpha: probability that the bound fails, in (0, 1).

    Returns:
      float64 array of the broadcast shape; ``alpha ** (1 / n)`` where every draw succeeded.

    Raises:
      ValueError: for alpha outside (0, 1), or counts that are not integers between 0 and ``trials``.

    Guarantee:
      For k ~ Binomial(n, p) with any p, ``P(bound > p) <= alpha`` for each single bound.

    Example:
      >>> f"{certification.binomial_lower_bound(9_900, 10_000, 0.001):.4f}"
      '0.9865'

    Reference:
      Clopper and Pearson, "The use of confidence or fiducial limits", Biometrika 1934.
    """
    from scipy import stats

    _validate.probability(alpha=alpha)
    successes, trials = np.asarray(successes), np.asarray(trials)
    _check_integers(0, successes=successes)
    _check_integers(1, trials=trials)
    if (successes > trials).any():
        raise ValueError(f"successes must not exceed trials, got {successes.max()} of {trials.min()}.")
    k, n = np.broadcast_arrays(successes.astype(np.float64), trials.astype(np.float64))
    return np.where(k > 0, stats.beta.ppf(alpha, np.maximum(k, 1), n - k + 1), 0.0)


@_arguments.checked
def sign_test_p_value(first: ArrayLike, second: ArrayLike) -> np.ndarray:
    r"""Computes the two-sided p-value of "both counts are equally likely".

    .. math:: p = \min(1,\ 2\, P[\mathrm{Binomial}(a + b, 1/2) \ge \max(a, b)])

    Args:
      first: counts a, integers >= 0.
      second: counts b of the same shape.

    Returns:
      float64 array; 1 where the counts are equal (or both 0).

    Raises:
      ValueError: for counts that are not integers >= 0, or differ in shape.

    Example:
      >>> f"{certification.sign_test_p_value(60, 40):.3f}"
      '0.057'
    """
    from scipy import stats

    first, second = np.asarray(first), np.asarray(second)
    if first.shape != second.shape:
        raise ValueError(f"first and second must have one shape, got {first.shape} and {second.shape}.")
    _check_integers(0, first=first, second=second)
    first, second = first.astype(np.float64), second.astype(np.float64)  # the sum of two uint8 would overflow
    return np.asarray(np.minimum(1.0, 2.0 * stats.binom.sf(np.maximum(first, second) - 1, first + second, 0.5)))
