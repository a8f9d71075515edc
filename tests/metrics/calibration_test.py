"""Calibration errors, proper scores and selective risk: by hand, by brute force and against scikit-learn."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import metrics


def draw(seed: int = 0, batch: int = 200, classes: int = 4, dtype=np.float32):
    generator = np.random.default_rng(seed)
    probabilities = generator.dirichlet(np.full(classes, 0.4), size=batch).astype(dtype)
    return probabilities, generator.integers(classes, size=batch)


def gaps(probabilities, labels, members):
    """Rows and |accuracy - confidence| of each set of rows that is not empty."""
    confidence, correct = probabilities.max(1).astype(np.float64), probabilities.argmax(1) == labels
    return [(len(m), abs(correct[m].mean() - confidence[m].mean())) for m in members if len(m)]


def binary(confidences):
    return np.stack([confidences, 1 - np.asarray(confidences)], axis=1)


@pytest.mark.parametrize("num_bins", [1, 7, 15])
@pytest.mark.parametrize("seed", range(3))
def test_calibration_errors_by_brute_force(seed, num_bins):
    probabilities, labels = draw(seed)
    confidence = probabilities.max(1)
    edges = np.linspace(0, 1, num_bins + 1, dtype=np.float32)
    by_width = [np.flatnonzero((confidence > a) & (confidence <= b)) for a, b in itertools.pairwise(edges)]
    by_mass = np.array_split(np.argsort(confidence, kind="stable"), num_bins)
    for binning, members in (("width", by_width), ("mass", by_mass)):
        expected = gaps(probabilities, labels, members)
        assert sum(n for n, _ in expected) == 200
        error = metrics.expected_calibration_error(probabilities, labels, num_bins=num_bins, binning=binning)
        assert error == pytest.approx(sum(n * gap for n, gap in expected) / 200, abs=1e-12)
        error = metrics.maximum_calibration_error(probabilities, labels, num_bins=num_bins, binning=binning)
        assert error == pytest.approx(max(gap for _, gap in expected), abs=1e-12)


def test_calibration_errors_by_hand():
    probabilities, labels = binary([0.6, 0.6, 0.9, 0.9]), [0, 1, 0, 0]
    # bins (0.5, 0.75] and (0.75, 1] have gaps of 0.1 and 0.1; a third right answer less makes it 0.4
    assert metrics.expected_calibration_error(probabilities, labels, num_bins=4) == pytest.approx(0.1)
    assert metrics.maximum_calibration_error(probabilities, [0, 1, 0, 1], num_bins=4) == pytest.approx(0.4)
    assert metrics.expected_calibration_error(probabilities, [0, 1, 0, 1], num_bins=4) == pytest.approx(0.25)
    assert metrics.expected_calibration_error(probabilities, labels, num_bins=1) == pytest.approx(0)


def test_bins_are_closed_on_the_right():
    """A confidence of exactly 0.5 shares the bin (0.25, 0.5], not that of 0.6."""
    probabilities = np.array([[0.5, 0.3, 0.2], [0.6, 0.2, 0.2]], np.float32)
    assert metrics.expected_calibration_error(probabilities, [0, 1], num_bins=4) == pytest.approx((0.5 + 0.6) / 2)
    assert metrics.expected_calibration_error(probabilities, [0, 1], num_bins=1) == pytest.approx(0.05)


def test_a_confidence_a_little_above_one_has_a_bin():
    probabilities = np.array([[1.0000001, 0.0], [0.55, 0.45]], np.float32)
    assert metrics.expected_calibration_error(probabilities, [0, 0]) == pytest.approx(0.45 / 2, abs=1e-6)


def test_calibrated_labels_have_a_small_error_and_overconfident_ones_a_large():
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.5, 1, 100_000)
    labels = (generator.random(100_000) > confidence).astype(int)
    for binning in ("width", "mass"):
        assert metrics.expected_calibration_error(binary(confidence), labels, binning=binning) < 0.01
        sharp = binary(1 - (1 - confidence) / 2)
        error = metrics.expected_calibration_error(sharp, labels, binning=binning)
        assert error == pytest.approx(0.125, abs=0.01)


def test_adaptive_bins_with_fewer_rows_than_bins():
    error = metrics.expected_calibration_error(binary([0.6, 0.7]), [0, 1], num_bins=15, binning="mass")
    assert error == pytest.approx((0.4 + 0.7) / 2)


def test_equal_confidences_share_a_bin_in_any_order():
    probabilities, order = (
        binary(np.repeat([0.6, 0.7, 0.8, 0.9], [30, 10, 60, 100])),
        np.random.default_rng(1).permutation(200),
    )
    labels = draw(classes=2)[1]
    error = metrics.expected_calibration_error(probabilities, labels, num_bins=4, binning="mass")
    again = metrics.expected_calibration_error(probabilities[order], labels[order], num_bins=4, binning="mass")
    expected = gaps(probabilities, labels, [np.arange(100), np.arange(100, 200)])  # 0.8 begins in the first bin of 50
    assert error == pytest.approx(sum(n * gap for n, gap in expected) / 200, abs=1e-12)
    assert again == pytest.approx(error, abs=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_proper_scores_equal_scikit_learn(dtype):
    from sklearn import metrics as reference  # here, as importing it takes seconds

    probabilities, labels = draw(dtype=dtype)
    probabilities = probabilities.clip(1e-6)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    found = metrics.brier_score(probabilities, labels)
    expected = reference.brier_score_loss(labels, probabilities, labels=range(4), scale_by_half=False)
    assert found == pytest.approx(expected, abs=1e-6)
    found = metrics.negative_log_likelihood(probabilities, labels)
    assert found == pytest.approx(reference.log_loss(labels, probabilities, labels=range(4)), abs=1e-6)


def test_proper_scores_by_hand():
    probabilities, labels = np.array([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]]), [0, 1]
    assert metrics.brier_score(probabilities, labels) == (0.25 + 0.0625 + 0.0625) / 2
    assert metrics.negative_log_likelihood(probabilities, labels) == pytest.approx(np.log(2) / 2)
    assert metrics.brier_score(probabilities, [0, 2]) == (0.375 + 2) / 2
    assert metrics.negative_log_likelihood(probabilities, [0, 2]) == np.inf


def test_narrow_probabilities_may_be_rounded():
    """Ten bfloat16 numbers of a softmax miss a sum of 1 by more than 1e-3."""
    probabilities = jax.nn.softmax(jnp.asarray(np.random.default_rng(0).normal(size=(50, 10)), jnp.float32))
    narrow = probabilities.astype(jnp.bfloat16)
    assert abs(np.asarray(narrow, np.float64).sum(1) - 1).max() > 1e-3
    labels = np.zeros(50, np.int32)
    assert metrics.brier_score(narrow, labels) == pytest.approx(metrics.brier_score(probabilities, labels), abs=0.01)


@pytest.mark.parametrize("scores", [[0, 1, 2, 3], [3, 1, 2, 0], [0, 0, 1, 1], [1, 0, 1, 1], [5, 5, 5, 5]])
def test_aurc_is_the_mean_over_orders_of_ties(scores):
    errors = [1.0, 0.0, 0.25, 1.0]
    orders = [o for o in itertools.permutations(range(4)) if sorted(scores) == [scores[i] for i in o]]
    area = np.mean([[np.mean([errors[i] for i in o[:k]]) for k in range(1, 5)] for o in orders])
    assert metrics.aurc(scores, errors) == pytest.approx(area)


def test_aurc_of_the_best_and_worst_order():
    errors = np.arange(100) >= 90
    best = np.mean([max(0, k - 90) / k for k in range(1, 101)])
    assert metrics.aurc(np.arange(100), errors) == pytest.approx(best)
    assert metrics.aurc(np.zeros(100), errors) == pytest.approx(0.1)
    assert metrics.aurc(-np.arange(100.0), errors) > 0.3


PROBABILITIES, LABELS = draw(batch=4)


@pytest.mark.parametrize(
    "function",
    [
        metrics.expected_calibration_error,
        metrics.maximum_calibration_error,
        metrics.brier_score,
        metrics.negative_log_likelihood,
    ],
)
@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        (
            np.array([[0.5, 0.5], [2.0, -3.0]]),
            [0, 1],
            "got row 1 with sum -1 and least value -3: expected prob.*, got log",
        ),
        (
            np.array([[1.5, -0.5]]),
            [0],
            "must be >= 0 with rows that sum to 1, got row 0 with sum 1 and least value -0.5",
        ),
        (np.array([[0.5, 0.502]]), [0], "got row 0 with sum 1.002"),
        (np.array([[np.inf, -np.inf]]), [0], "expected probabilities, got logits?"),
        (np.array([[np.nan, 1.0], [0.5, 0.5]]), [0, 0], "probabilities must have no NaN, got 1 such rows among 2"),
        (np.ones((4, 1)), LABELS, r"probabilities must be \(batch >= 1, classes >= 2\), got \(4, 1\)"),
        (np.ones(4), LABELS, r"got \(4,\)"),
        (np.ones((0, 3)), LABELS[:0], r"got \(0, 3\)"),
        (np.eye(4, dtype=int), LABELS, "probabilities must be floating, got int64"),
        (PROBABILITIES, LABELS[:3], r"labels must be \(4,\) integers, got int64 \(3,\)"),
        (PROBABILITIES, LABELS * 1.0, r"labels must be \(4,\) integers, got float64"),
        (PROBABILITIES, [0, 1, 2, 4], r"labels must lie in 0, ..., 3, got 0 to 4"),
        (PROBABILITIES, [0, 1, 2, -1], r"labels must lie in 0, ..., 3, got -1 to 2"),
    ],
)
def test_bad_probabilities_and_labels_are_named(function, probabilities, labels, message):
    with pytest.raises(ValueError, match=message):
        function(probabilities, labels)


@pytest.mark.usefixtures("unchecked")
def test_bad_bins_are_named():
    for function in (metrics.expected_calibration_error, metrics.maximum_calibration_error):
        with pytest.raises(ValueError, match="num_bins must be an integer of at least 1, got 0"):
            function(PROBABILITIES, LABELS, num_bins=0)
        with pytest.raises(ValueError, match="binning must be width or mass, got 'uniform'"):
            function(PROBABILITIES, LABELS, binning="uniform")


@pytest.mark.parametrize(
    ("scores", "errors", "message"),
    [
        ([0.1, 0.2], [1], r"scores and errors must be vectors of one length, got \(2,\) and \(1,\)"),
        (np.ones((2, 2)), np.ones((2, 2)), "must be vectors of one length"),
        ([], [], "scores must not be empty"),
        ([0.1, np.nan], [0, 1], "scores must have no NaN, got 1 among 2 values"),
        ([0.1, 0.2], [0, np.nan], "errors must have no NaN, got 1 among 2 values"),
    ],
)
def test_bad_input_of_aurc_is_named(scores, errors, message):
    with pytest.raises(ValueError, match=message):
        metrics.aurc(scores, errors)


def test_under_jit_it_is_said_that_the_host_computes():
    probabilities, labels = jnp.asarray(PROBABILITIES), jnp.asarray(LABELS)
    with pytest.raises(ValueError, match="probabilities and labels must be arrays, not traced"):
        jax.jit(lambda p: metrics.brier_score(p, labels))(probabilities)
    with pytest.raises(ValueError, match="probabilities and labels must be arrays, not traced"):
        jax.jit(lambda y: metrics.brier_score(probabilities, y))(labels)


@pytest.mark.parametrize("binning", ["width", "mass"])
def test_reliability_gives_the_points_of_the_errors(binning):
    probabilities, labels = draw(3)
    points = metrics.reliability(probabilities, labels, num_bins=7, binning=binning)
    gap = np.abs(points.accuracy - points.confidence)
    error = metrics.expected_calibration_error(probabilities, labels, num_bins=7, binning=binning)
    np.testing.assert_allclose((points.share * gap).sum(), error, rtol=1e-12)
    np.testing.assert_allclose((points.share * points.accuracy).sum(), (probabilities.argmax(1) == labels).mean())
    np.testing.assert_allclose((points.share * points.confidence).sum(), probabilities.max(1).mean(), rtol=1e-6)
    assert (np.diff(points.confidence) > 0).all()
    certain = metrics.reliability(np.eye(3), np.arange(3))
    assert [part.tolist() for part in certain] == [[1.0], [1.0], [1.0]]


def test_reliability_lies_in_the_unit_square_where_sums_are_rounded():
    above = np.array([[1.0000001, 0.0]], np.float32)
    assert metrics.reliability(above, [0]).confidence == 1
    sure = [0.75, 0.87, 0.78]
    mean, surplus = (np.cumsum(values)[-1] / 3 for values in (sure, 1 - np.array(sure)))
    assert mean + surplus > 1  # an accuracy of 1, in float64
    assert metrics.reliability(binary(sure), [0, 0, 0], num_bins=1).accuracy == 1
