"""Detectors that read inputs score rows of a table, ``(batch, dim)``, in any range."""

import jax
import jax.numpy as jnp
import numpy as np

from robustjax import scoring

RNG = np.random.default_rng(0)
ROWS = RNG.normal(300.0, 50.0, (24, 4)).astype(np.float32)
WEIGHTS = RNG.normal(size=(4, 3)).astype(np.float32) / 50


def linear(x):
    return (x - 300.0) @ WEIGHTS


def test_odin():
    score = np.asarray(scoring.odin(linear, temperature=1.0, epsilon=5.0).score((), ROWS))
    log_p = lambda x: np.asarray(jax.nn.log_softmax(linear(x)))
    gradient = jax.grad(lambda x: jax.nn.log_softmax(linear(x)).max(-1).sum())(jnp.asarray(ROWS))
    stepped = np.exp(log_p(ROWS + 5.0 * np.sign(gradient)).max(-1))
    np.testing.assert_allclose(score, np.log1p(-stepped), rtol=1e-3)


def test_mahalanobis_ensemble():
    labels = np.arange(24) % 2
    rows = ROWS + np.float32(400.0) * labels[:, None].astype(np.float32)
    detector = scoring.mahalanobis_ensemble(lambda x: {"first": x})
    state = detector.fit(rows, labels, inliers=rows, outliers=rows[:8] + np.float32(5000.0))
    inside, outside = (np.asarray(detector.score(state, x)) for x in (rows[:8], rows[:8] + np.float32(5000.0)))
    assert inside.max() < outside.min()


def test_outputs_of_rows():
    labels = np.arange(24) % 3
    outputs = scoring.Outputs(linear(ROWS), ROWS)
    near, far = ROWS[:8], ROWS[:8] + np.array([[2000.0, 0.0, -2000.0, 0.0]], np.float32)
    for detector in (scoring.mahalanobis(), scoring.relative_mahalanobis()):
        state = detector.fit(outputs, labels)
        inside, outside = (np.asarray(detector.score(state, scoring.Outputs(linear(x), x))) for x in (near, far))
        assert inside.mean() < outside.mean()
