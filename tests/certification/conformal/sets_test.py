"""Coverage by simulation and in closed form, with and without attack; what RSCP promises and does not keep."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from robustjax import certification
from robustjax.certification import conformal
from robustjax.certification.conformal import SmoothedScores

MEASURE = certification.gaussian(0.25)
EPSILON = 0.125


def test_coverage_given_the_calibration_scores_is_beta():
    """Of uniform scores the threshold is the coverage itself."""
    rng = np.random.default_rng(0)
    for n, alpha, k in ((39, 0.1, 36), (50, 0.25, 39)):  # ceil(40 * 0.9), ceil(51 * 0.75)
        coverage = [conformal.conformal_quantile(rng.uniform(size=n), alpha=alpha) for _ in range(2000)]
        assert stats.kstest(coverage, stats.beta(k, n + 1 - k).cdf).pvalue > 0.001


def test_the_rank_is_that_of_the_decimal_number():
    for n in (9, 10, 19, 99, 100, 999):
        for cents in range(1, 100):
            rank = -(-(n + 1) * (100 - cents) // 100)  # the ceiling, in integers
            if rank <= n:
                assert conformal.conformal_quantile(np.arange(1.0, n + 1)[::-1], alpha=cents / 100) == rank
            else:
                with pytest.warns(UserWarning, match=f"{n} calibration scores are too few for alpha="):
                    assert conformal.conformal_quantile(np.arange(n), alpha=cents / 100) == math.inf


def test_split_conformal_covers():
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(4000, 5)), rng.integers(0, 5, 4000)
    logits[np.arange(4000), labels] += 1.5
    p, u = special.softmax(logits, -1).astype(np.float32), rng.uniform(size=4000).astype(np.float32)
    for score in (conformal.thr, conformal.aps, conformal.raps):
        scores = np.asarray(score(p, u))
        sets = conformal.split_conformal(scores[:2000], labels[:2000], scores[2000:], alpha=0.2)
        covered = sets[np.arange(2000), labels[2000:]].mean()
        assert covered == pytest.approx(0.8, abs=4 * 0.4 * math.sqrt(2 / 2000))
        assert 1 < sets.sum(-1).mean() < 5
    # Ranks among other scores change no order: sets grow by ties alone, little by little with more of them.
    base = np.asarray(conformal.thr(p))
    sets = conformal.split_conformal(base[:2000], labels[:2000], base[2000:])
    holdout = rng.uniform(size=20_000)
    after = np.asarray(conformal.ptt(holdout, conformal.thr, temperature=1.0)(p, u))
    grown = conformal.split_conformal(after[:2000], labels[:2000], after[2000:])
    assert not (sets & ~grown).any()
    assert (grown & ~sets).mean() < 0.001


def exact(mean, n=10**9):
    mean = np.atleast_2d(mean)
    return SmoothedScores(mean, np.zeros_like(mean), np.full(len(mean), n))


def test_with_exact_expectations_rscp_is_sharp():
    """Half-spaces attain the bound: the attacked score is the clean one, moved by epsilon / sigma and no less."""
    rng = np.random.default_rng(2)
    clean = rng.uniform(0.01, 0.99, 999)
    labels = np.zeros(999, int)
    worst = special.ndtr(special.ndtri(clean) + EPSILON / 0.25)
    t = conformal.conformal_quantile(clean)
    sets = conformal.rscp(exact(clean[:, None]), labels, exact(worst[:, None] - 1e-12), MEASURE, epsilon=EPSILON)
    np.testing.assert_array_equal(sets[:, 0], clean <= t)
    beyond = conformal.rscp(exact(clean[:, None]), labels, exact(worst[:, None] + 1e-9), MEASURE, epsilon=EPSILON)
    np.testing.assert_array_equal(beyond[:, 0], clean < t)


def coverage_at_one_score(p, n_s, rscp_plus, *, simulations=400, n=300, tests=50, **settings):
    """Coverage of half-spaces that all have the score p, under the worst attack; copies of n_s draws."""
    rng = np.random.default_rng(3)
    attacked = special.ndtr(special.ndtri(p) + EPSILON / 0.25)
    labels, covered = np.zeros(n, int), []

    def drawn(probability, size):
        mean = rng.binomial(n_s, probability, (size, 1)) / n_s
        return SmoothedScores(mean, mean * (1 - mean) * n_s / (n_s - 1), np.full(size, n_s))

    method = conformal.rscp_plus if rscp_plus else conformal.rscp
    for _ in range(simulations):
        sets = method(drawn(p, n), labels, drawn(attacked, tests), MEASURE, epsilon=EPSILON, **settings)
        covered.append(sets.mean())
    return np.mean(covered)


def test_rscp_misses_its_coverage_and_more_draws_do_not_help():
    """The quantile is right for the spread of clean means; that of attacked ones, seen through Phi^-1, is wider."""
    for n_s, expected in ((256, 0.80), (100_000, 0.83)):
        assert coverage_at_one_score(0.9, n_s, False) == pytest.approx(expected, abs=0.015)
    assert coverage_at_one_score(0.1, 256, False) > 0.9


@pytest.mark.parametrize("bound", ["bernstein", "hoeffding"])
def test_rscp_plus_keeps_its_coverage_there(bound):
    for p in (0.1, 0.5, 0.7):
        assert coverage_at_one_score(p, 256, True, bound=bound, simulations=50) >= 0.9
    with np.errstate(all="raise"):
        assert coverage_at_one_score(0.9, 10_000, True, bound=bound, simulations=50) >= 0.9
    # And leaves labels out: what scores 0.9 where true labels score 0.5 is not in a set.
    sets = conformal.rscp_plus(exact([[0.5]] * 100, 1000), [0] * 100, exact([[0.9]], 1000), MEASURE, bound=bound)
    assert not sets.any()


def test_rscp_plus_covers_a_model_under_attack():
    """From images to sets: half-spaces in two classes at one distance, where RSCP fails, moved towards the border."""
    rng = np.random.default_rng(4)
    x = np.stack([np.full(300, 0.6), *rng.uniform(size=(2, 300))], -1).astype(np.float32)  # p = Phi(-0.1 / 0.25)
    half_space = jax.tree_util.Partial(lambda x: 1e6 * jnp.stack([x[:, 0] - 0.5, 0.5 - x[:, 0]], -1))
    of = lambda x: conformal.smoothed_scores(jax.random.key(0), half_space, x, MEASURE, num_samples=1000)
    clean, attacked = of(x), of(x - np.float32([EPSILON, 0, 0]))
    labels = np.zeros(300, int)
    for bound in ("bernstein", "hoeffding"):
        sets = conformal.rscp_plus(clean, labels, attacked, MEASURE, epsilon=EPSILON, bound=bound)
        assert sets[:, 0].mean() >= 0.95
        assert not conformal.rscp_plus(clean, labels, clean, MEASURE, epsilon=0.0, bound=bound)[:, 1].any()
    unmoved = conformal.split_conformal(clean.mean, labels, attacked.mean)
    assert unmoved[:, 0].mean() < 0.05


@pytest.mark.parametrize("bound", ["bernstein", "hoeffding"])
def test_rscp_plus_bounds_each_input_by_its_own_number_of_copies(bound):
    rng = np.random.default_rng(7)
    mean, copies = rng.uniform(size=(4, 200)), np.array([64, 256, 1024, 4096])
    of = lambda rows: SmoothedScores(mean[rows], mean[rows] * (1 - mean[rows]), copies[rows])
    clean = exact(rng.uniform(0.2, 0.6, (200, 200)), 1024)
    sets = lambda rows: conformal.rscp_plus(clean, np.arange(200), of(rows), MEASURE, bound=bound)
    together = sets(np.arange(4))
    np.testing.assert_array_equal(together, np.concatenate([sets(np.array([row])) for row in range(4)]))
    sizes = together.sum(-1)
    assert (np.diff(sizes) < 0).all()  # more copies of an input leave fewer of its labels


def test_without_an_attack_rscp_is_split_conformal_and_ties_stay():
    rng = np.random.default_rng(5)
    calibration, test = (exact(rng.integers(0, 9, (60, 4)) / 8) for _ in range(2))
    labels = rng.integers(0, 4, 60)
    sets = conformal.rscp(calibration, labels, test, MEASURE, epsilon=0.0)
    np.testing.assert_array_equal(sets, conformal.split_conformal(calibration.mean, labels, test.mean))


def test_scores_of_0_and_1_compare():
    """Infinities are compared and never subtracted from one another."""
    scores, labels = exact([[0.0, 1.0]] * 30), np.zeros(30, int)
    for epsilon in (0.0, 10.0):
        with np.errstate(all="raise"):
            assert conformal.rscp(scores, labels, scores, MEASURE, epsilon=epsilon).tolist() == [[True, False]] * 30
            assert conformal.rscp(scores, labels + 1, scores, MEASURE, epsilon=epsilon).all()
            assert conformal.rscp_plus(exact([[1.0, 1.0]] * 30), labels, scores, MEASURE, epsilon=epsilon).all()


def test_too_few_scores_give_all_labels():
    few = exact([[0.2, 0.7]] * 8)
    for method in (conformal.rscp, conformal.rscp_plus):
        with pytest.warns(UserWarning, match="8 calibration scores are too few"):
            assert method(few, [0] * 8, few, MEASURE).all()


def test_levels_and_bounds_are_those_of_the_paper():
    """Sets around the threshold, from the published formula."""
    rng = np.random.default_rng(6)
    clean, n_s = rng.uniform(0, 0.5, 200), 256
    rank = math.ceil(201 * (1 - 0.1 + 0.002) - 1e-9)
    t = special.ndtr(special.ndtri(np.sort(clean)[rank - 1] + math.sqrt(math.log(1000) / 512)) + 0.5)
    grid = np.linspace(0, 1, 2001)[:, None]
    test = SmoothedScores(grid, np.full_like(grid, 0.02), np.full(2001, n_s))
    margins = {"hoeffding": math.sqrt(math.log(1000) / 512)}
    margins["bernstein"] = math.sqrt(0.04 * math.log(2000) / 256) + 7 * math.log(2000) / (3 * 255)
    for bound, margin in margins.items():
        sets = conformal.rscp_plus(exact(clean[:, None], n_s), np.zeros(200, int), test, MEASURE, bound=bound)
        np.testing.assert_array_equal(sets[:, 0], np.maximum(grid[:, 0] - margin, 0) <= t)


GOOD = exact([[0.2, 0.7]] * 50)
LABELS = np.zeros(50, int)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conformal.conformal_quantile([0.1], alpha=1.0), "alpha must lie strictly between 0 and 1, got 1.0"),
        (lambda: conformal.conformal_quantile([[0.1]]), "scores must be a vector of numbers without NaN, got shape"),
        (lambda: conformal.conformal_quantile([0.1, np.nan]), "scores must be a vector of numbers without NaN"),
        (lambda: conformal.prediction_sets([[0.1, np.nan]], 0.5), "without NaN"),
        (lambda: conformal.prediction_sets([[0.1]], np.nan), "and threshold not NaN"),
        (lambda: conformal.split_conformal(GOOD.mean, LABELS + 2, GOOD.mean), "labels must lie in 0, ..., 1, got 2"),
        (lambda: conformal.split_conformal(GOOD.mean, LABELS[1:], GOOD.mean), "labels must be (50,) integers, got"),
        (
            lambda: conformal.split_conformal(GOOD.mean, LABELS, np.ones((3, 5))),
            "scores must have the 2 classes of calibration, got shape (3, 5)",
        ),
        (
            lambda: conformal.rscp(GOOD, LABELS, exact([[0.5] * 5]), MEASURE),
            "test must have the 2 classes of calibration, got shape (1, 5)",
        ),
        (
            lambda: conformal.rscp_plus(GOOD, LABELS, GOOD._replace(num_samples=np.full(1, 256)), MEASURE),
            "test.num_samples must have shape (50,), got (1,)",
        ),
        (
            lambda: conformal.rscp(exact([[1.5]] * 50), LABELS, GOOD, MEASURE),
            "calibration.mean must be (batch, classes)",
        ),
        (lambda: conformal.rscp(GOOD, LABELS, exact([[np.nan]]), MEASURE), "test.mean must be (batch, classes) in [0"),
        (lambda: conformal.rscp(GOOD, LABELS, GOOD, MEASURE, epsilon=-1.0), "epsilon must be at least 0"),
        (lambda: conformal.rscp_plus(GOOD, LABELS, GOOD, MEASURE, beta=0.05), "beta must be below alpha / 2 = 0.05"),
        (lambda: conformal.rscp_plus(GOOD, LABELS, GOOD, MEASURE, beta=0.0), "beta must lie strictly"),
        (
            lambda: conformal.rscp_plus(GOOD._replace(num_samples=np.arange(50)), LABELS, GOOD, MEASURE),
            "calibration.num_samples must be one number",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_other_bad_arguments_are_named(unchecked):
    with pytest.raises(ValueError, match=re.escape("measure must be gaussian(sigma)")):
        conformal.rscp(GOOD, LABELS, GOOD, certification.laplace(0.25))
    with pytest.raises(ValueError, match="bound must be bernstein or hoeffding, got 'normal'"):
        conformal.rscp_plus(GOOD, LABELS, GOOD, MEASURE, bound="normal")
