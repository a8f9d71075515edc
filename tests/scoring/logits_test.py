import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import entr, log_softmax, logsumexp, softmax

from robustjax import scoring
from robustjax.typing import Outputs


def outputs(logits):
    logits = jnp.asarray(logits, jnp.float32)
    return Outputs(logits, jnp.zeros((logits.shape[0], 1)))


def score(detector, logits, train=None, labels=None):
    return np.asarray(
        detector.score(detector.fit(outputs(logits if train is None else train), labels), outputs(logits))
    )


def random_logits(scale, seed=0, rows=50, classes=7):
    return (scale * np.random.default_rng(seed).normal(size=(rows, classes))).astype(np.float32)


def doubt(logits):
    """log(1 - max softmax) in float64, from the other logits."""
    ordered = np.sort(logits.astype(np.float64), axis=-1)
    return logsumexp(ordered[:, :-1], axis=-1) - logsumexp(ordered, axis=-1)


def gen(logits, gamma=0.1, top=7):
    log_p = np.sort(log_softmax(logits.astype(np.float64), axis=-1))[:, ::-1]
    log_q = np.concatenate([doubt(logits)[:, None], np.log1p(-np.exp(log_p[:, 1:]))], axis=1)
    return np.exp(gamma * (log_p + log_q))[:, :top].sum(-1)


def wide_entropy(logits):
    """The entropy in float64, with the term of the largest probability from the rest of them."""
    p, rest = softmax(logits.astype(np.float64), axis=-1), np.exp(doubt(logits))
    largest = p == p.max(-1, keepdims=True)
    return entr(np.where(largest, 0, p)).sum(-1) - (1 - rest) * np.log1p(-rest)


FLOAT64 = {
    "msp": (scoring.msp(), doubt),
    "max_logit": (scoring.max_logit(), lambda logits: -logits.max(-1)),
    "energy": (scoring.energy(), lambda logits: -logsumexp(logits.astype(np.float64), axis=-1)),
    "energy 3": (
        scoring.energy(temperature=3.0),
        lambda logits: -3 * logsumexp(logits.astype(np.float64) / 3, axis=-1),
    ),
    "entropy": (scoring.entropy(), wide_entropy),
    "gen": (scoring.generalized_entropy(), gen),
    "gen of 3": (scoring.generalized_entropy(gamma=0.5, top=3), lambda logits: gen(logits, 0.5, 3)),
    "gen of 1": (scoring.generalized_entropy(gamma=2.0, top=1), lambda logits: gen(logits, 2.0, 1)),
}


@pytest.mark.parametrize("name", FLOAT64)
@pytest.mark.parametrize("scale", [0.01, 1, 10, 40, 1e4])
def test_float64_is_met(name, scale):
    detector, reference = FLOAT64[name]
    logits = random_logits(scale)
    scores = score(detector, logits)
    assert np.isfinite(scores).all()
    np.testing.assert_allclose(scores, reference(logits), rtol=1e-4, atol=1e-30)


def test_msp_is_the_literal_score_under_an_increasing_function():
    logits = random_logits(3.0)
    np.testing.assert_allclose(np.expm1(score(scoring.msp(), logits)), -softmax(logits, axis=-1).max(-1), rtol=1e-5)


def test_msp_tells_rows_apart_where_the_literal_score_ties():
    logits = np.stack([np.arange(18, 600, 3), *np.zeros((2, 194))], axis=-1).astype(np.float32)
    assert len(np.unique(np.asarray(jax.nn.softmax(logits).max(-1)))) == 1
    assert (np.diff(score(scoring.msp(), logits)) < 0).all()


@pytest.mark.parametrize("constant", [-50.0, 50.0])
def test_a_constant_moves_energy_and_max_logit_but_no_score_of_the_softmax(constant):
    logits, names = random_logits(2.0), ("msp", "entropy", "generalized_entropy", "kl_matching")
    for name in names:
        np.testing.assert_allclose(
            score(getattr(scoring, name)(), logits + np.float32(constant)),
            score(getattr(scoring, name)(), logits),
            rtol=1e-3,
            atol=1e-4,
        )
    for name in ("energy", "max_logit"):
        moved = score(getattr(scoring, name)(), logits + np.float32(constant)) - score(getattr(scoring, name)(), logits)
        np.testing.assert_allclose(moved, -constant, rtol=1e-5)


def test_energy_tends_to_max_logit_and_to_the_mean_logit():
    logits = random_logits(3.0)
    np.testing.assert_allclose(score(scoring.energy(temperature=1e-3), logits), -logits.max(-1), rtol=1e-3)
    hot = score(scoring.energy(temperature=1e3), logits) + 1e3 * np.log(7)
    np.testing.assert_allclose(hot, -logits.mean(-1), atol=0.05)


def test_equal_logits_give_the_extremes():
    equal = np.zeros((1, 7))
    np.testing.assert_allclose(score(scoring.msp(), equal), np.log(6 / 7), rtol=1e-6)
    np.testing.assert_allclose(score(scoring.entropy(), equal), np.log(7), rtol=1e-6)
    np.testing.assert_allclose(score(scoring.generalized_entropy(), equal), 7 * (6 / 49) ** 0.1, rtol=1e-6)


def test_generalized_entropy_takes_the_hundred_largest_of_many_classes():
    logits = random_logits(4.0, rows=5, classes=300)
    np.testing.assert_allclose(score(scoring.generalized_entropy(), logits), gen(logits, 0.1, 100), rtol=1e-4)
    np.testing.assert_allclose(score(scoring.generalized_entropy(top=300), logits), gen(logits, 0.1, 300), rtol=1e-4)


def score_unfitted(detector, logits):
    return np.asarray(detector.score((), outputs(logits)))


def calibrated(rows, classes, scale, temperature, seed=0):
    """Logits whose labels are drawn from their softmax at the temperature."""
    rng = np.random.default_rng(seed)
    logits = (scale * rng.normal(size=(rows, classes))).astype(np.float32)
    chances = softmax(logits.astype(np.float64) / temperature, axis=-1).cumsum(-1)
    return logits + np.float32(20), (chances > rng.random((rows, 1))).argmax(-1)


def slope(logits, labels, temperature):
    """d NLL / d log T in float64."""
    logits, temperature = logits.astype(np.float64), np.float64(temperature)
    expected = (softmax(logits / temperature, axis=-1) * logits).sum(-1)
    return (logits[np.arange(len(labels)), labels] - expected).mean() / temperature


@pytest.mark.parametrize(
    ("rows", "classes", "scale", "truth"), [(1000, 10, 3, 0.5), (1000, 10, 6, 2.5), (3000, 4, 30, 20)]
)
def test_temperature_is_where_the_slope_of_the_likelihood_is_0(rows, classes, scale, truth):
    logits, labels = calibrated(rows, classes, scale, truth)
    found = scoring.fit_temperature(logits, labels)
    assert abs(slope(logits, labels, found.temperature)) < 1e-6
    np.testing.assert_allclose(found.temperature, truth, rtol=0.1)
    own = np.arange(rows), labels
    for nll, temperature in ((found.nll_before, 1), (found.nll_after, np.float64(found.temperature))):
        want = -log_softmax(logits.astype(np.float64) / temperature, axis=-1)[own].mean()
        np.testing.assert_allclose(nll, want, rtol=1e-5)
    assert found.nll_after < found.nll_before


def test_temperature_ends_at_the_ends_of_the_search():
    logits = 30 * np.eye(3, dtype=np.float32)
    assert scoring.fit_temperature(logits, np.arange(3)).temperature == np.float32(np.exp(-5))
    assert scoring.fit_temperature(logits, np.array([1, 2, 0])).temperature == np.float32(np.exp(5))


def test_temperature_undoes_a_factor():
    logits, labels = calibrated(1000, 10, 3, 1)
    once, thrice = (scoring.fit_temperature(np.float32(c) * logits, labels).temperature for c in (1, 3))
    np.testing.assert_allclose(thrice, 3 * once, rtol=1e-5)
    scores = [score(scoring.temperature_scaling(), np.float32(c) * logits, labels=labels) for c in (1, 3)]
    np.testing.assert_allclose(*scores, rtol=1e-3, atol=1e-5)


def test_temperature_scaling_is_msp_at_the_temperature():
    logits, labels = calibrated(1000, 10, 3, 2)
    at = logits / scoring.fit_temperature(logits, labels).temperature
    np.testing.assert_allclose(
        score(scoring.temperature_scaling(), logits, labels=labels), score(scoring.msp(), at), rtol=1e-5
    )


@pytest.mark.parametrize("scale", [1, 20, 1e4])
def test_kl_matching_meets_float64(scale):
    train, logits = random_logits(scale, seed=1), random_logits(scale, seed=2)
    log_train, log_p = (log_softmax(a.astype(np.float64), axis=-1) for a in (train, logits))
    divergences = []
    for k in range(7):
        rows = log_train[log_train.argmax(-1) == k]
        assert len(rows)
        template = logsumexp(rows, axis=0) - np.log(len(rows))
        divergences.append((np.exp(log_p) * (log_p - template)).sum(-1))
    np.testing.assert_allclose(
        score(scoring.kl_matching(), logits, train), np.min(divergences, axis=0), rtol=1e-3, atol=1e-3
    )


def test_kl_matching_leaves_out_classes_that_are_never_predicted():
    train = np.array([[3.0, 0.0, 1.0], [4.0, 1.0, 1.0], [0.0, 1.0, 5.0]], np.float32)
    state = scoring.kl_matching().fit(outputs(train))
    assert state.seen.tolist() == [True, False, True]
    np.testing.assert_allclose(np.exp(state.log_templates[2]), softmax(train[2]), rtol=1e-5)
    scores = score(scoring.kl_matching(), [[0.0, 1.0, 5.0], [0.0, 50.0, 0.0]], train)
    np.testing.assert_allclose(scores[0], 0, atol=1e-6)
    assert 1 < scores[1] < np.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scoring.energy(temperature=0.0), "temperature must be positive and finite, got 0.0"),
        (lambda: scoring.energy(temperature=np.nan), "temperature must be positive and finite, got nan"),
        (lambda: scoring.generalized_entropy(gamma=-1.0), "gamma must be positive and finite, got -1.0"),
        (lambda: scoring.generalized_entropy(top=0), "top must be an integer of at least 1, got 0"),
        (
            lambda: score(scoring.generalized_entropy(top=8), np.zeros((2, 7))),
            "top must be at most the 7 classes, got 8",
        ),
        (
            lambda: scoring.temperature_scaling().fit(outputs(np.zeros((2, 3)))),
            "labels must be given to fit temperature",
        ),
        (lambda: scoring.kl_matching().fit(), "outputs must be given to fit kl_matching"),
        (
            lambda: scoring.fit_temperature(np.zeros(3), np.zeros(3, int)),
            r"logits must be a floating array \(batch, classes\)",
        ),
        (lambda: scoring.fit_temperature(np.zeros((0, 3)), np.zeros(0, int)), r"logits must be .*got \(0, 3\)"),
        (lambda: scoring.fit_temperature(np.zeros((2, 3)), np.zeros(1, int)), r"labels must be \(2,\) integers"),
        (lambda: scoring.fit_temperature(np.zeros((2, 3)), np.full(2, 3)), "labels must lie in 0, ..., 2, got 3 to 3"),
        (
            lambda: scoring.fit_temperature(np.array([[0.0, 1], [np.inf, 0]]), np.zeros(2, int)),
            "logits must be finite, 1 of 2 rows are not, the first is row 1",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
