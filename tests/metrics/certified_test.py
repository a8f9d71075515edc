"""Certified accuracy, its lower bound and the average certified radius against figures by hand."""

import bisect
import functools
import math

import numpy as np
import pytest
from scipy import stats

from robustjax import metrics
from robustjax.certification import ABSTAIN, Certificate

CERTIFICATE = Certificate(
    label=np.array([0, 1, 2, ABSTAIN], np.int32),
    radius=np.array([0.5, 0.25, 1.0, 0.0]),
    probability=np.array([0.9, 0.7, 0.99, 0.4]),
    abstained=np.array([False, False, False, True]),
)
LABELS = np.array([0, 1, 0, 3])


def test_by_hand():
    radii = [0.0, 0.25, 0.26, 0.5, 1.0]
    np.testing.assert_array_equal(metrics.certified_accuracy(CERTIFICATE, LABELS, radii), [0.5, 0.5, 0.25, 0.25, 0.0])
    assert metrics.average_certified_radius(CERTIFICATE, LABELS) == (0.5 + 0.25) / 4


def test_an_abstention_is_wrong_even_where_the_label_is_minus_one():
    assert metrics.certified_accuracy(CERTIFICATE, np.full(4, ABSTAIN), [0.0]) == 0


def all_correct(held):
    """Certificates of class 0 with radius 1 where ``held``; the others abstain."""
    return Certificate(np.zeros(held.size, np.int32), held * 1.0, np.where(held, 0.9, 0.1), ~held)


def test_lower_bound_by_hand():
    # Of 4 certificates one is wrong with probability 0.004 <= 0.01, two with 6e-6: q is 0 at rho 0.01 and 1 at 1e-4.
    bound = functools.partial(metrics.certified_accuracy_lower_bound, CERTIFICATE, LABELS, [0.0, 1.0], alpha=0.001)
    np.testing.assert_array_equal(bound(rho=0.01), [0.5, 0.0])
    np.testing.assert_array_equal(bound(rho=1e-4), [0.25, 0.0])


@pytest.mark.parametrize("m", [1, 30, 10_000])
@pytest.mark.parametrize("alpha", [1e-4, 0.05, 0.4])
@pytest.mark.parametrize("rho", [1e-12, 0.001, 0.3])
def test_lower_bound_fails_with_probability_at_most_rho_and_not_much_less(m, alpha, rho):
    """Nobody is robust and W ~ Binomial(m, alpha) certificates are wrong: the bound fails where it is above 0."""

    def fails(wrong):
        certificate, labels = all_correct(np.arange(m) < wrong), np.zeros(m, int)
        return metrics.certified_accuracy_lower_bound(certificate, labels, [1.0], alpha=alpha, rho=rho)[0] > 0

    least = bisect.bisect_left(range(m + 1), True, key=fails)  # m + 1 where it never fails
    tail = lambda k: math.fsum(math.exp(log_binomial(m, j, alpha)) for j in range(k, min(m, k + 2000) + 1))
    assert tail(least) <= rho * (1 + 1e-9)
    assert least == 1 or tail(least - 1) > rho * (1 - 1e-9)


def test_lower_bound_at_a_rho_that_the_tail_meets_exactly_and_one_minus_rho_rounds_away():
    # All five are wrong with probability 1e-20, as much as rho allows: four may be.
    rho = stats.binom.sf(4, 5, 1e-4)
    assert 1 - rho == 1
    certificate = all_correct(np.ones(5, bool))
    bound = metrics.certified_accuracy_lower_bound(certificate, np.zeros(5, int), [1.0], alpha=1e-4, rho=rho)
    assert bound[0] == 1 - 4 / 5


def log_binomial(m, k, p):
    """The logarithm of the probability of k in Binomial(m, p)."""
    choose = math.lgamma(m + 1) - math.lgamma(k + 1) - math.lgamma(m - k + 1)
    return choose + k * math.log(p) + (m - k) * math.log1p(-p)


@pytest.mark.parametrize(
    ("labels", "radii", "message"),
    [
        (LABELS[:3], [0.0], r"labels must have shape \(4,\), one per certificate, got \(3,\)"),
        (LABELS * 1.0, [0.0], "labels must be integers, got float64"),
        (LABELS, [-0.1], "radii must be a vector of numbers >= 0"),
        (LABELS, 0.5, "radii must be a vector"),
        (LABELS, [np.nan], "radii must be a vector"),
    ],
)
def test_bad_input_is_named(labels, radii, message):
    with pytest.raises(ValueError, match=message):
        metrics.certified_accuracy(CERTIFICATE, labels, radii)


def test_no_images_have_no_accuracy():
    with pytest.raises(ValueError, match="labels must not be empty"):
        metrics.average_certified_radius(Certificate(*(field[:0] for field in CERTIFICATE)), LABELS[:0])
