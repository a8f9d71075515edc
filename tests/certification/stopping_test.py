"""Thresholds against exact distributions: every path of few draws, and a dynamic programme without windows of many."""

import itertools
import re

import numpy as np
import pytest
from scipy import special, stats
from scipy.optimize import brentq

from robustjax import certification
from robustjax.certification import _stopping

PROBABILITIES = (0.5, 0.6, 0.8, 0.95, 0.99, 0.999)
MEASURE = certification.gaussian(0.5)


def convolve(a, b):
    """By the Fast Fourier Transform, whose errors of 1e-16 are of no account beside what is summed here."""
    size = len(a) + len(b) - 1
    fast = 1 << (size - 1).bit_length()
    return np.fft.irfft(np.fft.rfft(a, fast) * np.fft.rfft(b, fast), fast)[:size]


def walk(q, looks, stopping):
    """P(stop at look i with count c) as (k, n + 1), for ``stopping(i, counts)``; all counts are kept, however rare."""
    alive, before, stopped = np.ones(1), 0, np.zeros((len(looks), looks[-1] + 1))
    for i, n in enumerate(looks):
        alive = convolve(alive, stats.binom.pmf(np.arange(n - before + 1), n - before, q))
        stop = stopping(i, np.arange(n + 1))
        stopped[i, : n + 1] = np.where(stop, alive, 0)
        alive, before = np.where(stop, 0, alive), n
    return stopped


def expected_samples(q, looks, first, low):
    last = len(looks) - 1
    stopped = walk(q, looks, lambda i, c: (c >= first[i]) | (c <= low[i]) | (i == last))
    return stopped.sum(1) @ looks


def mixture_threshold(p, looks, alpha):
    """The rule that ours replaces: least counts where a mixture martingale, Beta(1/2, 1/2) on (p, 1], has 1 / alpha."""
    prior, first = special.betaln(0.5, 0.5) + np.log(special.betaincc(0.5, 0.5, p)), []
    for n in looks:
        c = np.arange(int(np.ceil(p * n)), n + 1)
        with np.errstate(divide="ignore"):
            wealth = special.betaln(c + 0.5, n - c + 0.5) + np.log(special.betaincc(c + 0.5, n - c + 0.5, p))
        wealth -= prior + special.xlogy(c, p) + special.xlog1py(n - c, -p)
        first.append(c[wealth >= -np.log(alpha)].min(initial=n + 1))
    return np.asarray(first)


def test_looks():
    assert _stopping.look_times(100_000)[:6].tolist() == [100, 125, 157, 197, 247, 309]
    for n in (1, 99, 100, 101, 125, 100_000):
        looks = _stopping.look_times(n)
        assert looks[-1] == n
        assert (np.diff(looks) > 0).all()
    assert len(looks) == 32


def test_counts_stop_at_each_bound_itself():
    counts = np.arange(1, 9)
    np.testing.assert_array_equal(counts[_stopping.stops(counts, 3, 5, 7)], [1, 2, 3, 5, 6, 7])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.83])
@pytest.mark.parametrize("level", [0.03, 0.2])
def test_boundary_is_the_largest_that_keeps_its_level_on_every_path(p, level):
    looks = np.array([3, 5, 8, 12])
    paths = np.array(list(itertools.product([0, 1], repeat=12)))
    weights = np.prod(np.where(paths, p, 1 - p), axis=1)
    counts = paths.cumsum(1)[:, looks - 1]
    boundary = _stopping.lower_boundary(p, looks, level)

    def spent(boundary, i):
        return weights[(counts <= boundary)[:, : i + 1].any(1)].sum()

    for i in range(4):
        budget = level * (i + 1) / 4
        assert spent(boundary, i) <= budget
        higher = boundary + (np.arange(4) == i)
        assert spent(higher, i) > 0.999 * budget
    assert (spent(boundary, 3) > 0) == ((1 - p) ** 12 <= 0.999 * level)


@pytest.mark.parametrize("p", PROBABILITIES)
def test_false_certification_is_within_alpha_and_hardly_below(p):
    rule = _stopping.target_rule(p, 0.001, 0.01, 20_000)
    with_futility = walk(p, rule.looks, lambda i, c: (c >= rule.first[i]) | (c <= rule.low[i]))
    without = walk(p, rule.looks, lambda i, c: c >= rule.first[i])
    certified = np.arange(without.shape[1]) >= rule.first[:, None]
    assert 0.0009 < without.sum() <= 0.001  # without futility, on which the guarantee does not rely
    assert 0.0008 < (with_futility * certified).sum() <= 0.001
    easier = walk(p - 0.01 * (1 - p), rule.looks, lambda i, c: c >= rule.first[i])
    assert easier.sum() < without.sum()


@pytest.mark.slow
def test_false_certification_with_all_draws():
    rule = _stopping.target_rule(0.95, 0.001, 0.01, 100_000)
    assert 0.0009 < walk(0.95, rule.looks, lambda i, c: c >= rule.first[i]).sum() <= 0.001


@pytest.mark.parametrize("p", PROBABILITIES)
def test_what_the_last_look_would_surely_certify_is_seldom_given_up(p):
    n, alpha, futility = 20_000, 0.001, 0.01
    rule = _stopping.target_rule(p, alpha, futility, n)
    q = brentq(lambda q: stats.binom.cdf(rule.first[-1] - 1, n, q) - alpha, p, 1 - 1e-9)
    given_up = walk(q, rule.looks[:-1], lambda i, c: c <= rule.low[i]).sum()
    assert 0.9 * 30 / 31 * futility * (len(rule.looks) - 1) / len(rule.looks) < given_up <= futility
    assert (rule.low < rule.first).all()
    assert rule.low[-1] == rule.first[-1] - 1


def test_fewer_draws_than_a_mixture_martingale():
    """Inputs whose margin, in units of sigma, is anything from -1 to 3.5."""
    p, n = special.ndtr(1.0), 10_000
    rule = _stopping.target_rule(p, 0.001, 0.01, n)
    mixture = mixture_threshold(p, rule.looks, 0.001)
    give_up = rule.looks - mixture_threshold(1 - p, rule.looks, 0.01)
    shares = special.ndtr(np.linspace(-1, 3.5, 46))
    ours, with_our_futility, with_the_mirrored_test = (
        np.mean([expected_samples(q, rule.looks, first, low) for q in shares])
        for first, low in ((rule.first, rule.low), (mixture, rule.low), (mixture, give_up))
    )
    assert ours < 0.92 * with_our_futility
    assert ours < 0.75 * with_the_mirrored_test


@pytest.mark.slow
def test_the_mixture_compared_with_is_that_of_the_literature():
    """Looks after every draw, at most 3000; P(false) and E[draws] as computed for Beta(1/2, 1/2) on (p, 1]."""
    p = 0.95
    looks = np.arange(1, 3001)
    first = mixture_threshold(p, looks, 0.001)

    def expected_and_certified(q):
        alive, expected, certified = np.ones(1), 0.0, 0.0
        for least in first:
            expected += alive.sum()
            alive = np.append(alive * (1 - q), 0) + np.append(0, alive * q)
            certified += alive[least:].sum()
            alive[least:] = 0
        return expected, certified

    assert expected_and_certified(special.ndtr(special.ndtri(p) + 0.25))[0] == pytest.approx(1500, rel=0.01)
    assert expected_and_certified(p)[1] == pytest.approx(0.00082, rel=0.01)


@pytest.mark.parametrize("q", [0.51, *PROBABILITIES[1:5]])
def test_confidence_sequence_fails_at_any_look_within_alpha(q):
    """The exact probability that one of the bounds exceeds q."""
    rule = _stopping.radius_rule(MEASURE, 0.001, 0.01, 5000, 0.05)
    first = []
    for i, n in enumerate(rule.looks):
        counts = np.zeros((n + 1, len(rule.looks)), int)
        counts[:, i] = np.arange(n + 1)
        above = _stopping.lower_bounds(counts, rule, 0.001)[:, i] > q
        first.append(int(above.argmax()) if above.any() else n + 1)
    assert 0.0001 < walk(q, rule.looks, lambda i, c: c >= first[i]).sum() <= 0.001


def test_the_radius_is_enough_where_the_definition_says_so():
    n, alpha, tolerance = 20_000, 0.001, 0.1
    rule = _stopping.radius_rule(MEASURE, alpha, 0.01, n, tolerance)
    for look in (3, 12, 18, 22):
        t = int(rule.looks[look])
        counts = np.arange(t + 1)
        here = MEASURE.radius(certification.binomial_lower_bound(counts, t, alpha / len(rule.looks)))
        there = MEASURE.radius(certification.binomial_lower_bound(counts * n // t, n, alpha))
        enough = (there > 0) & (here >= (1 - tolerance) * there)
        ours = (rule.first[look] <= counts) & (counts <= rule.last[look])
        assert not (ours & ~enough).any()
        assert (ours != enough).sum() <= 0.03 * t  # the grid
    assert ours.any()
    hopeless = walk(0.5 + 0.03, rule.looks[:-1], lambda i, c: c <= rule.low[i]).sum()
    assert hopeless <= 0.01  # of a class that the last look would certify
    assert walk(0.4, rule.looks[:-1], lambda i, c: c <= rule.low[i]).sum() > 0.999


def test_the_radius_is_given_up_where_the_last_look_would_hardly_certify():
    n, alpha, futility = 500, 0.001, 0.01
    rule = _stopping.radius_rule(MEASURE, alpha, futility, n, 0.1)
    votes, level = np.arange(n + 1), alpha / len(rule.looks)
    least = int(np.argmax(certification.binomial_lower_bound(votes, n, level) > 0.5))
    surely = float(stats.beta.ppf(1 - alpha, least, n - least + 1))
    np.testing.assert_array_equal(rule.low[:-1], _stopping.lower_boundary(surely, rule.looks, futility)[:-1])
    assert rule.low[-1] == n


def test_needed_probability_is_the_least():
    for radius in (0.0, 1e-9, 0.25, 0.5, 2.0, 2.2):
        p = _stopping.needed_probability(MEASURE, radius)
        assert MEASURE.radius(p) >= radius
        assert p == 0.5 or MEASURE.radius(np.nextafter(p, 0)) < radius
        assert p == pytest.approx(special.ndtr(radius / 0.5), rel=1e-12)
    with pytest.raises(ValueError, match=re.escape("target_radius must be at most 2.58329, the reach of Gaussian(")):
        _stopping.needed_probability(MEASURE, 4.2)


def test_thresholds_cannot_be_spoilt():
    rule = _stopping.target_rule(0.8, 0.001, 0.01, 500)
    assert rule is _stopping.target_rule(0.8, 0.001, 0.01, 500)
    with pytest.raises(ValueError, match="read-only"):
        rule.first[0] = 0
