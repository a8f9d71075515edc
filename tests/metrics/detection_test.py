"""Detection metrics against scikit-learn, against counting all pairs, by hand, and on a device against the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import metrics

CASES = ["continuous", "ties", "heavy ties", "infinite", "one each"]


def scores_of(case: str, seed: int = 0, dtype=np.float64) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng([seed, CASES.index(case)])
    scores_in, scores_out = generator.normal(size=83), generator.normal(0.8, 1.5, size=61)
    if case == "one each":
        scores_in, scores_out = scores_in[:1], scores_out[:1]
    if case in ("ties", "infinite"):
        scores_in, scores_out = np.round(scores_in, 1), np.round(scores_out, 1)
    if case == "heavy ties":
        scores_in, scores_out = np.round(scores_in), np.round(scores_out)
    if case == "infinite":
        scores_in[:9], scores_in[9:12], scores_out[:4], scores_out[4:15] = -np.inf, np.inf, -np.inf, np.inf
    return scores_in.astype(dtype), scores_out.astype(dtype)


def pooled(scores_in, scores_out):
    """Labels and scores for scikit-learn, which refuses infinite scores."""
    labels = np.r_[np.zeros(scores_in.size, int), np.ones(scores_out.size, int)]
    return labels, np.clip(np.r_[scores_in, scores_out].astype(np.float64), -1e9, 1e9)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("case", CASES)
def test_equal_to_scikit_learn(case, seed):
    from sklearn import metrics as reference  # here, as importing it takes seconds

    scores_in, scores_out = scores_of(case, seed, np.float32 if seed % 2 else np.float64)
    labels, scores = pooled(scores_in, scores_out)
    np.testing.assert_allclose(
        metrics.auroc(scores_in, scores_out), reference.roc_auc_score(labels, scores), atol=1e-12
    )
    for positive, y, s in (("ood", labels, scores), ("id", 1 - labels, -scores)):
        found = metrics.aupr(scores_in, scores_out, positive=positive)
        np.testing.assert_allclose(found, reference.average_precision_score(y, s), atol=1e-12)
        found = metrics.aupr(scores_in, scores_out, positive=positive, interpolation="trapezoid")
        precision, recall, _ = reference.precision_recall_curve(y, s)
        np.testing.assert_allclose(found, reference.auc(recall, precision), atol=1e-12)
        false, true, _ = reference.roc_curve(y, s, drop_intermediate=False)
        for tpr in (0.001, 0.5, 0.8, 0.95, 1.0):
            found = metrics.fpr_at_tpr(scores_in, scores_out, tpr=tpr, positive=positive)
            np.testing.assert_allclose(found, false[np.argmax(true >= tpr)], atol=1e-12)
    false, true, _ = reference.roc_curve(labels, scores)
    error = metrics.detection_error(scores_in, scores_out)
    np.testing.assert_allclose(error, ((1 - true + false) / 2).min(), atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_auroc_counts_pairs(case):
    scores_in, scores_out = scores_of(case)
    difference = np.sign(scores_out[:, None].clip(-9, 9) - scores_in.clip(-9, 9))
    assert metrics.auroc(scores_in, scores_out) == pytest.approx((difference.mean() + 1) / 2, abs=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tpr", [0.3, 0.95, 1.0])
def test_all_metrics_are_the_single_ones(case, tpr):
    scores = scores_of(case)
    together = metrics.detection_metrics(*scores, tpr=tpr)
    alone = metrics.DetectionMetrics(
        auroc=metrics.auroc(*scores),
        aupr_in=metrics.aupr(*scores, positive="id"),
        aupr_out=metrics.aupr(*scores),
        fpr_id_positive=metrics.fpr_at_tpr(*scores, tpr=tpr, positive="id"),
        fpr_ood_positive=metrics.fpr_at_tpr(*scores, tpr=tpr),
        detection_error=metrics.detection_error(*scores),
    )
    np.testing.assert_allclose(together, alone, atol=1e-12)
    assert all(type(value) is float for value in (*together, *alone))


def test_constant_scores_tell_nothing():
    found = metrics.detection_metrics(np.zeros(30), np.zeros(10))
    assert found == (0.5, 0.75, 0.25, 1.0, 1.0, 0.5)
    assert metrics.aupr(np.zeros(30), np.zeros(10), interpolation="trapezoid") == (1 + 0.25) / 2


def test_separated_scores_tell_all_without_rounding():
    assert metrics.auroc(np.arange(1000.0) - 1000, np.arange(777.0)) == 1
    assert metrics.auroc(np.arange(777.0), np.arange(1000.0) - 1000) == 0
    found = metrics.detection_metrics([0.0, 1.0], [2.0, np.inf])
    assert found == (1.0, 1.0, 1.0, 0.0, 0.0, 0.0)


def test_two_conventions_of_fpr_by_hand():
    scores_in, scores_out = np.arange(20.0), np.array([2.5] + [15.5] * 4 + [30.0] * 15)
    # 19 of 20 OOD scores are at least 15.5, as are 16, ..., 19; 19 of 20 ID ones are at most 18, as are 5 of OOD.
    assert metrics.fpr_at_tpr(scores_in, scores_out) == 4 / 20
    assert metrics.fpr_at_tpr(scores_in, scores_out, positive="id") == 5 / 20
    assert metrics.fpr_at_tpr(scores_in, scores_out, tpr=1.0) == 17 / 20


@pytest.mark.parametrize("total", [20, 40, 60, 100, 140, 700, 10_000])
def test_operating_point_is_not_moved_by_rounding(total):
    scores = np.arange(total, dtype=np.float64)
    for percent in range(1, 101):
        needed = -(-percent * total // 100)
        assert metrics.fpr_at_tpr(scores, scores, tpr=percent / 100) == needed / total


def test_gaussian_scores_have_the_auroc_of_theory():
    """P(N(d, 1) > N(0, 1)) = Phi(d / sqrt(2)); 0.7602 for d = 1, with a standard error of 0.0007 at this size."""
    generator = np.random.default_rng(0)
    found = metrics.auroc(generator.normal(size=250_000), generator.normal(1.0, size=250_000))
    assert found == pytest.approx(0.76025, abs=0.003)


def test_ties_are_those_of_the_dtype():
    scores_in, scores_out = np.array([1.0]), np.array([1.0 + 1e-9])
    assert metrics.auroc(scores_in, scores_out) == 1
    assert metrics.auroc(scores_in.astype(np.float32), scores_out.astype(np.float32)) == 0.5
    assert metrics.auroc(scores_in.astype(np.float32), scores_out) == 1


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.float16, jnp.bfloat16, bool])
def test_narrow_and_whole_scores(dtype):
    scores_in, scores_out = np.array([0, 1, 1, 0]).astype(dtype), np.array([1, 1, 0]).astype(dtype)
    assert metrics.detection_metrics(scores_in, scores_out) == metrics.detection_metrics([0.0, 1, 1, 0], [1.0, 1, 0])


def test_jax_arrays_on_the_host():
    scores_in, scores_out = scores_of("ties", dtype=np.float32)
    found = metrics.detection_metrics(jnp.asarray(scores_in), jnp.asarray(scores_out))
    assert found == metrics.detection_metrics(scores_in, scores_out)


@pytest.fixture(scope="module")
def on_device():
    return jax.jit(metrics.detection_metrics_on_device, static_argnames="tpr")


@pytest.mark.parametrize("tpr", [0.8, 0.95])
def test_on_device_as_on_the_host(on_device, tpr):
    cases = [scores_of(case, seed, np.float32) for case in CASES[:-1] for seed in range(4)]
    stacked = [jnp.stack(side) for side in zip(*cases)]
    found = jax.jit(jax.vmap(lambda a, b: metrics.detection_metrics_on_device(a, b, tpr=tpr)))(*stacked)
    assert all(value.dtype == jnp.float32 for value in found)
    expected = [metrics.detection_metrics(*case, tpr=tpr) for case in cases]
    np.testing.assert_allclose(np.stack(found, axis=1), expected, atol=1e-6)


def test_on_device_with_many_scores(on_device):
    """More pairs than int32 counts, and sums of more terms than float32 adds without care."""
    generator = np.random.default_rng(0)
    scores_in = np.round(generator.normal(size=200_000), 4).astype(np.float32)
    scores_out = np.round(generator.normal(1.0, size=150_000), 4).astype(np.float32)
    np.testing.assert_allclose(
        on_device(scores_in, scores_out), metrics.detection_metrics(scores_in, scores_out), atol=1e-6
    )


def test_on_device_in_a_compiled_loop():
    generator = np.random.default_rng(0)
    scores_in, scores_out = jnp.asarray(generator.normal(size=(2, 3, 40)), jnp.float32)
    loop = jax.jit(lambda *xs: jax.lax.scan(lambda c, x: (c, metrics.detection_metrics_on_device(*x).auroc), 0, xs)[1])
    expected = [metrics.auroc(a, b) for a, b in zip(scores_in, scores_out)]
    np.testing.assert_allclose(loop(scores_in, scores_out), expected, atol=1e-6)


def test_on_device_constant_separated_zero_and_nan(on_device):
    zeros = jnp.zeros(8, jnp.float32)
    assert [float(value) for value in on_device(zeros, zeros)] == [0.5, 0.5, 0.5, 1.0, 1.0, 0.5]
    assert [float(value) for value in on_device(zeros, -zeros)] == [0.5, 0.5, 0.5, 1.0, 1.0, 0.5]
    assert [float(value) for value in on_device(zeros, zeros + 1)] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert on_device(np.zeros(8, np.float32), np.full(8, 1e-40, np.float32)).auroc == 1  # subnormal, and yet not 0
    assert np.isnan(on_device(zeros, zeros.at[3].set(jnp.nan))).all()
    assert np.isnan(on_device(zeros.at[3].set(-jnp.nan), zeros)).all()


def test_on_device_in_other_precisions(on_device):
    scores_in, scores_out = (jnp.asarray(s, jnp.bfloat16) for s in scores_of("continuous"))
    expected = metrics.detection_metrics(scores_in, scores_out)
    np.testing.assert_allclose(on_device(scores_in, scores_out), expected, atol=1e-6)
    with jax.enable_x64(True):
        assert on_device(jnp.asarray([1.0], jnp.float64), jnp.asarray([1.0 + 1e-9], jnp.float64)).auroc == 1


ONE = np.ones(3)
FUNCTIONS = ["auroc", "aupr", "fpr_at_tpr", "detection_error", "detection_metrics"]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("scores_in", "scores_out", "message"),
    [
        (np.array([1, np.nan, np.nan]), ONE, "scores_in must have no NaN, got 2 among 3 scores"),
        (ONE, np.array([np.nan, np.inf]), "scores_out must have no NaN, got 1 among 2 scores"),
        ([], ONE, "scores_in must not be empty: a rate of no inputs is undefined"),
        (ONE, ONE[:0], "scores_out must not be empty"),
        (np.ones((3, 2)), ONE, r"scores_in must be a vector, one score per input, got shape \(3, 2\)"),
        (ONE, 1.0, r"scores_out must be a vector, one score per input, got shape \(\)"),
        (np.array([2**53, 2**53 + 1]), ONE, r"scores_in must be integers up to 2\^53, .* to 9007199254740993"),
        (ONE * 1j, ONE, "scores_in must be real numbers, got complex128"),
    ],
)
def test_bad_scores_are_named(name, scores_in, scores_out, message):
    with pytest.raises(ValueError, match=message):
        getattr(metrics, name)(scores_in, scores_out)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("tpr", [0.0, -0.1, 1.01, 95.0, float("nan"), "0.95"])
def test_bad_tpr_is_named(tpr):
    for function in (metrics.fpr_at_tpr, metrics.detection_metrics):
        with pytest.raises(ValueError, match=rf"tpr must (lie in \(0, 1\]|be a number), got {tpr!r}"):
            function(ONE, ONE, tpr=tpr)
    with pytest.raises(ValueError, match="tpr must "):
        metrics.detection_metrics_on_device(jnp.ones(3), jnp.ones(3), tpr=tpr)


@pytest.mark.usefixtures("unchecked")
def test_unknown_choices_are_named():
    for function in (metrics.aupr, metrics.fpr_at_tpr):
        with pytest.raises(ValueError, match="positive must be ood or id, got 'in'"):
            function(ONE, ONE, positive="in")
    with pytest.raises(ValueError, match="interpolation must be step or trapezoid, got 'linear'"):
        metrics.aupr(ONE, ONE, interpolation="linear")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("scores_in", "scores_out", "message"),
    [
        (jnp.ones((3, 1)), jnp.ones(3), r"scores_in must be a floating array \(m,\), got float32 of shape \(3, 1\)"),
        (jnp.ones(3), jnp.ones(0), "scores_out must not be empty"),
        (jnp.ones(3), jnp.ones(3, jnp.bfloat16), "must be of one floating dtype, got float32 and bfloat16"),
        (jnp.ones(3, jnp.int32), jnp.ones(3, jnp.int32), r"scores_in must be a floating array \(m,\), got int32"),
        (jax.ShapeDtypeStruct((2**24,), jnp.float32), jnp.ones(1), "at most 2.24 together, got 16777217"),
    ],
)
def test_bad_scores_on_device_are_named(scores_in, scores_out, message):
    with pytest.raises(ValueError, match=message):
        metrics.detection_metrics_on_device(scores_in, scores_out)


def test_ranks_have_the_order_and_the_ties_of_the_scores():
    scores_in, scores_out = np.array([0.3, -np.inf, 1 + 1e-12]), np.array([np.inf, 1.0, 0.3, 1 + 1e-12])
    found = metrics.ranks(scores_in, scores_out)
    assert [part.tolist() for part in found] == [[1, 0, 3], [4, 2, 1, 3]]
    assert {part.dtype for part in found} == {np.dtype(np.float32)}
    assert metrics.auroc(*found) == metrics.auroc(scores_in, scores_out)


def test_under_jit_the_host_metrics_point_to_the_one_on_a_device():
    with pytest.raises(ValueError, match="scores_in is traced.*use detection_metrics_on_device"):
        jax.jit(metrics.auroc)(jnp.ones(3), jnp.ones(3))
