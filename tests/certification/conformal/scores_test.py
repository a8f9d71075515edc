"""Scores beside their definitions, one label at a time."""

import math
from fractions import Fraction

import jax
import numpy as np
import pytest

from robustjax.certification import conformal

RNG = np.random.default_rng(0)
PROBABILITIES = RNG.dirichlet(np.full(7, 0.5), 40).astype(np.float32)
UNIFORMS = RNG.uniform(size=40).astype(np.float32)


def aps_by_hand(p, u, y):
    before = sum(p[k] for k in range(len(p)) if p[k] > p[y] or (p[k] == p[y] and k < y))
    return before + (1 - u) * p[y]


def rank_by_hand(p, y):
    return 1 + sum(p[k] > p[y] or (p[k] == p[y] and k < y) for k in range(len(p)))


def of_all(by_hand):
    return [[by_hand(p.astype(np.float64), float(u), y) for y in range(7)] for p, u in zip(PROBABILITIES, UNIFORMS)]


def test_thr():
    np.testing.assert_array_equal(conformal.thr(PROBABILITIES), 1 - PROBABILITIES.astype(np.float64))


def test_aps():
    np.testing.assert_allclose(conformal.aps(PROBABILITIES, UNIFORMS), of_all(aps_by_hand), atol=1e-6)


def test_aps_of_the_true_label_is_uniform():
    from scipy import stats

    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.ones(4), 4000)
    labels = (p.cumsum(1) < rng.uniform(size=(4000, 1))).sum(1)
    scores = conformal.aps(p.astype(np.float32), rng.uniform(size=4000).astype(np.float32))
    assert stats.kstest(np.asarray(scores)[np.arange(4000), labels], "uniform").pvalue > 0.001


def test_scores_of_confident_models_are_exact_and_do_not_tie():
    """Nine classes that follow the first at leads of 18 to 20: in float32, sums from the large end are all 1."""
    logits = -np.random.default_rng(2).uniform(18, 20, (60, 10)).astype(np.float32)
    logits[:, 0] = 0
    logits[-2:] = [[30, *[0] * 9], [-17, 0, -16, *[-40] * 7]]
    powers = [[Fraction(math.exp(value)) for value in row] for row in logits.tolist()]
    exact = [[power / sum(row) for power in row] for row in powers]
    probabilities, zeros = np.asarray(jax.nn.softmax(logits)), np.zeros(60, np.float32)
    for score, by_hand in ((conformal.aps, aps_by_hand), (conformal.thr, lambda p, u, y: 1 - p[y])):
        missing = [[float(1 - by_hand(row, 0, y)) for y in range(10)] for row in exact]  # of 1, where float64 is fine
        np.testing.assert_allclose(1 - score(probabilities, zeros), missing, rtol=1e-5, atol=1e-15)
    scores, third = conformal.aps(probabilities, zeros)[:58], logits[:58].argsort(-1)[:, -3]
    sizes = conformal.split_conformal(scores[:29], third[:29], scores[29:], alpha=0.3).sum(-1)
    assert 2 < sizes.mean() < 3.5
    np.testing.assert_allclose(jax.jit(conformal.aps)(probabilities, zeros)[:58], scores, atol=1e-7)


@pytest.mark.parametrize("k_reg", [0, 2, 7, 9])
def test_raps(k_reg):
    def by_hand(p, u, y):
        beyond = max(0, rank_by_hand(p, y) - k_reg) / max(7 - k_reg, 1)
        return (aps_by_hand(p, u, y) + 0.3 * beyond) / 1.3

    got = conformal.raps(PROBABILITIES, UNIFORMS, weight=0.3, k_reg=k_reg)
    np.testing.assert_allclose(got, of_all(by_hand), atol=1e-6)


@pytest.mark.parametrize("score", [conformal.thr, conformal.aps, conformal.raps])
def test_scores_lie_in_0_1_and_ties_go_by_class(score):
    p = np.array([[1, 0, 0], [0.25, 0.5, 0.25], [1 / 3] * 3, [0, 0.4, 0.6]], np.float32)
    for u in (0.0, 0.5, 1.0):
        scores = np.asarray(score(p, np.full(4, u, np.float32)))
        assert scores.min() >= 0
        assert scores.max() <= 1
    assert (np.diff(scores[2]) > 0).all() or score is conformal.thr


def test_ptt_is_a_rank_and_a_sigmoid_and_never_decreases():
    holdout = RNG.uniform(size=50).astype(np.float32)
    score = conformal.ptt(holdout, conformal.thr, temperature=0.1, bias=0.6)
    base, got = np.asarray(conformal.thr(PROBABILITIES)), np.asarray(score(PROBABILITIES, UNIFORMS))
    rank = (holdout[None, None] <= base[..., None]).mean(-1)
    np.testing.assert_allclose(got, 1 / (1 + np.exp(-(rank - 0.6) / 0.1)), atol=1e-6)
    assert (np.diff(got.ravel()[np.argsort(base.ravel(), kind="stable")]) >= 0).all()
    paper = np.asarray(conformal.ptt(holdout, conformal.thr)(PROBABILITIES, UNIFORMS))
    assert np.isfinite(paper).all()
    assert (paper.min(), paper.max()) == (0, 1)


def test_settings_are_arguments_of_programs():
    traces = []

    @jax.jit
    def scored(score, p, u):
        traces.append(p.shape)
        return score(p, u)

    for weight, k_reg, seed in ((0.1, 2, 0), (0.4, 3, 1)):
        holdout = np.random.default_rng(seed).uniform(size=20)
        base = jax.tree_util.Partial(conformal.raps, weight=weight, k_reg=k_reg)
        score = conformal.ptt(holdout, base, temperature=weight)
        np.testing.assert_allclose(scored(score, PROBABILITIES, UNIFORMS), score(PROBABILITIES, UNIFORMS), atol=1e-6)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conformal.thr(np.array([[8.0, 3, -2]])), "probabilities must be >= 0 .* sum 9 .* got logits"),
        (lambda: conformal.aps(np.array([[0.9, 0.3]]), np.zeros(1)), "probabilities must .* row 0 with sum 1.2"),
        (lambda: conformal.raps(np.array([[1.5, -0.5]]), np.zeros(1)), "probabilities must .* least value -0.5"),
        (lambda: conformal.aps(PROBABILITIES[0], UNIFORMS), r"probabilities must be a floating .* \(7,\)"),
        (lambda: conformal.aps(PROBABILITIES, UNIFORMS[:1]), r"uniforms must be \(40,\), got shape \(1,\)"),
        (lambda: conformal.aps(PROBABILITIES, 2 + UNIFORMS), r"uniforms must lie in \[0, 1\], got values from 2"),
        (lambda: conformal.aps(PROBABILITIES, 2 * UNIFORMS), r"uniforms must lie in \[0, 1\], got .* to 1.9"),
        (lambda: conformal.aps(PROBABILITIES, UNIFORMS - 0.5), r"uniforms must lie in \[0, 1\], got values from -0"),
        (lambda: conformal.raps(PROBABILITIES, UNIFORMS, weight=-0.1), "weight must be at least 0"),
        (lambda: conformal.raps(PROBABILITIES, UNIFORMS, k_reg=-1), "k_reg must be an integer of at least 0"),
        (lambda: conformal.ptt([], conformal.thr), "holdout_scores must be a vector of finite"),
        (lambda: conformal.ptt([np.nan], conformal.thr), "holdout_scores must be a vector of finite"),
        (lambda: conformal.ptt([0.5], conformal.thr, temperature=0.0), "temperature must be positive"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
