"""Bounds of means beside all outcomes of coins, and their published forms."""

import math

import numpy as np
import pytest
from scipy import stats

from robustjax import certification

ALPHA = 0.05


@pytest.mark.parametrize("n", [2, 16, 256])
@pytest.mark.parametrize("bound", ["hoeffding", "bernstein"])
def test_bounds_of_coins_fail_no_oftener_than_alpha(n, bound):
    """Brute force: every count of heads, with its exact probability, for coins of every kind."""
    heads = np.arange(n + 1)
    mean = heads / n
    if bound == "hoeffding":
        lower = certification.hoeffding_lower_bound(mean, n, ALPHA)
    else:
        lower = certification.empirical_bernstein_lower_bound(mean, mean * (1 - mean) * n / (n - 1), n, ALPHA)
    assert (lower <= mean).all()
    worst = max(stats.binom.pmf(heads[lower > p], n, p).sum() for p in np.linspace(0.001, 0.999, 333))
    assert worst <= ALPHA
    if n == 256 and bound == "hoeffding":
        assert worst > 0.005  # not by being empty


def test_bounds_are_their_equations():
    assert certification.hoeffding_lower_bound(0.7, 256, 0.001) == pytest.approx(0.7 - math.sqrt(math.log(1000) / 512))
    log = math.log(2000)
    expected = 0.7 - math.sqrt(2 * 0.04 * log / 256) - 7 * log / (3 * 255)
    assert certification.empirical_bernstein_lower_bound(0.7, 0.04, 256, 0.001) == pytest.approx(expected, rel=1e-12)
    assert certification.empirical_bernstein_lower_bound(1.0, np.inf, 256, 0.001) == 0
    assert certification.hoeffding_lower_bound([0.0, 1.0], 1, 0.05).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: certification.hoeffding_lower_bound(1.1, 5, 0.1), r"mean must lie in \[0, 1\], got .* to 1.1"),
        (lambda: certification.hoeffding_lower_bound(np.nan, 5, 0.1), "mean must lie"),
        (lambda: certification.hoeffding_lower_bound(0.5, 0, 0.1), "num_samples must be integers of at least 1, got 0"),
        (lambda: certification.hoeffding_lower_bound(0.5, 5, 0.0), "alpha must lie strictly between 0 and 1, got 0.0"),
        (lambda: certification.empirical_bernstein_lower_bound(0.5, 0.1, 1, 0.1), "num_samples must be .* at least 2"),
        (lambda: certification.empirical_bernstein_lower_bound(0.5, -0.1, 5, 0.1), "variance must be at least 0"),
        (lambda: certification.empirical_bernstein_lower_bound(0.5, np.nan, 5, 0.1), "variance must be at least 0"),
    ],
)
def test_bad_numbers_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
