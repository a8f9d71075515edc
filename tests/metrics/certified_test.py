"""Certified accuracy, its lower bound and the average certified radius against figures by hand."""

import numpy as np
import pytest

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


def test_lower_bound_by_hand():
    bound = metrics.certified_accuracy_lower_bound(CERTIFICATE, LABELS, [0.0, 1.0], alpha=0.001, rho=0.01)
    by_hand = 0.5 - 0.001 - np.sqrt(0.001 * 0.999 * np.log(100) / 4) - np.log(100) / 12
    np.testing.assert_allclose(bound, [by_hand, 0.0])


def test_lower_bound_holds_by_simulation():
    """Certificates wrong with probability alpha inflate the count; the bound may exceed the truth in rho of runs."""
    generator, alpha, rho, m = np.random.default_rng(0), 0.05, 0.05, 200
    truth = np.arange(m) < 120
    failures = 0
    for _ in range(500):
        claimed = truth | (generator.random(m) < alpha)
        certificate = Certificate(np.zeros(m, np.int32), claimed * 1.0, np.where(claimed, 0.9, 0.1), ~claimed)
        bound = metrics.certified_accuracy_lower_bound(certificate, np.zeros(m, int), [1.0], alpha=alpha, rho=rho)
        failures += bound[0] > truth.mean()
    assert failures <= 500 * rho + 3 * np.sqrt(500 * rho)


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
