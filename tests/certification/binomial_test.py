"""Clopper-Pearson and the sign test against scipy, exact sums and simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from robustjax import certification


@pytest.mark.parametrize("trials", [1, 10, 100, 100_000])
@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_equals_scipys_exact_interval(trials, alpha):
    successes = np.unique(np.linspace(0, trials, 9).astype(int))
    ours = certification.binomial_lower_bound(successes, trials, alpha)
    exact = [
        stats.binomtest(int(k), trials, alternative="greater").proportion_ci(1 - alpha, method="exact").low
        for k in successes
    ]
    np.testing.assert_allclose(ours, exact, rtol=1e-9)


def test_ends():
    np.testing.assert_allclose(certification.binomial_lower_bound([0, 1000], 1000, 0.001), [0.0, 0.001**0.001])
    # The largest radii of the literature, in units of sigma.
    largest = certification.gaussian(1.0).radius(
        certification.binomial_lower_bound([1_000, 10_000, 100_000], [1_000, 10_000, 100_000], 0.001)
    )
    np.testing.assert_allclose(largest, [2.4633, 3.1986, 3.8115], atol=5e-5)


@pytest.mark.parametrize("probability", [0.55, 0.9, 0.999])
def test_covers_by_simulation_and_exactly(probability):
    alpha, trials, runs = 0.01, 10_000, 20_000
    draws = np.random.default_rng(0).binomial(trials, probability, runs)
    failed = (certification.binomial_lower_bound(draws, trials, alpha) > probability).mean()
    assert failed <= alpha + 3 * np.sqrt(alpha / runs)
    counts = np.arange(trials + 1)
    fails = certification.binomial_lower_bound(counts, trials, alpha) > probability
    exact = stats.binom.pmf(counts[fails], trials, probability).sum()
    assert exact <= alpha
    # Sharp: one more failing count would overspend alpha.
    assert stats.binom.sf(counts[fails].min() - 2, trials, probability) > alpha


@given(st.integers(1, 10**6), st.data())
@settings(deadline=None)
def test_bound_solves_its_equation(trials, data):
    successes = data.draw(st.integers(1, trials))
    bound = certification.binomial_lower_bound(successes, trials, 0.001)
    assert 0 < bound < successes / trials
    np.testing.assert_allclose(stats.binom.sf(successes - 1, trials, bound), 0.001, rtol=1e-6)


@given(st.integers(0, 500), st.integers(0, 500))
@settings(deadline=None)
def test_sign_test_equals_scipy(first, second):
    exact = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    np.testing.assert_allclose(certification.sign_test_p_value(first, second), exact, rtol=1e-9)


def test_sign_test_adds_up_counts_of_one_byte():
    first, second = np.array([130, 0], np.uint8), np.array([126, 0], np.uint8)
    np.testing.assert_allclose(certification.sign_test_p_value(first, second), [0.851315, 1.0], atol=1e-6)


@given(st.one_of(st.floats(max_value=0), st.floats(min_value=1), st.just(float("nan"))))
def test_alpha_outside_its_interval_is_named(alpha):
    with pytest.raises(ValueError, match="alpha must lie strictly between 0 and 1, got"):
        certification.binomial_lower_bound(3, 5, alpha)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [(-1, 5, "first must be at least 0, got -1"), ([1, 2], [1, 2, 3], "must have one shape"), (1, 0.5, "got float64")],
)
def test_bad_votes_are_named(first, second, message):
    with pytest.raises(ValueError, match=message):
        certification.sign_test_p_value(first, second)


@pytest.mark.parametrize(
    ("successes", "trials", "message"),
    [
        (-1, 5, "successes must be at least 0, got -1"),
        (6, 5, "successes must not exceed trials, got 6 of 5"),
        (0, 0, "trials must be at least 1, got 0"),
        (2.5, 5, "successes must be integers, got float64"),
    ],
)
def test_bad_counts_are_named(successes, trials, message):
    with pytest.raises(ValueError, match=message):
        certification.binomial_lower_bound(successes, trials, 0.01)
