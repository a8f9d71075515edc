"""The inequality behind the learner on inputs of all kinds, what it learns, and what is accepted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.certification import halfspaces

N, D, ETA, EPSILON = 3000, 3, 0.2, 0.2
SIGMA = (1 - 2 * ETA) * EPSILON
W = np.array([2.0, -1.0, 2.0]) / 3
loss_and_gradient = jax.jit(lambda w, x, y, sigma: jax.value_and_grad(halfspaces.surrogate_loss)(w, x, y, sigma=sigma))


def sample(kind, seed=0):
    """Inputs, and labels with Massart noise: flipped with probability ETA where the second coordinate is positive."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, D))
    x = {
        "normal": x,
        "corners": np.sign(x),
        "box": rng.uniform(-1, 1, (N, D)),
        "heavy": rng.standard_t(3, size=(N, D)) / np.sqrt(3),
    }[kind]
    y = np.where(x @ W >= 0, 1, -1) * np.where((rng.random(N) < ETA) & (x[:, 1] > 0), -1, 1)
    return x.astype(np.float32), y


def test_the_surrogate_is_a_smooth_share_of_errors():
    x, y = sample("normal")
    v = np.array([1.0, 0.5, -0.3])
    wrong = (np.sign(x @ v) != y).mean()
    loss = lambda v, sigma: float(
        halfspaces.surrogate_loss(jnp.asarray(v, jnp.float32), x, jnp.float32(y), sigma=sigma)
    )
    assert loss(v, 1e-4) == pytest.approx(wrong, abs=1e-3)
    assert loss(5 * v, 0.3) == pytest.approx(loss(v, 0.3), abs=1e-6)
    assert loss(-v, 0.3) == pytest.approx(1 - loss(v, 0.3), abs=1e-6)
    _, gradient = loss_and_gradient(jnp.asarray(v, jnp.float32), x, np.float32(y), 0.3)
    assert abs(float(gradient @ v)) < 1e-5 * float(jnp.linalg.norm(gradient))


@pytest.mark.parametrize("kind", ["normal", "box", "heavy"])
def test_where_the_gradient_is_small_the_true_half_space_is_near(kind):
    """The inequality of the docstring, in expectation over labels: each input five times, once with a flipped label."""
    x = sample(kind)[0][: N // 5]
    clean = np.where(x @ W >= 0, 1, -1)
    flips = np.zeros((5, N // 5), bool)
    flips[0] = x[:, 1] > 0
    copies, labels = np.tile(x, (5, 1)), np.where(flips, -clean, clean).reshape(-1)
    told, rng = 0, np.random.default_rng(2)
    for angle in np.geomspace(0.005, 1.5, 40):
        u = rng.normal(size=D)
        u -= (u @ W) * W
        w = np.cos(angle) * W + np.sin(angle) * u / np.linalg.norm(u)
        _, gradient = loss_and_gradient(jnp.asarray(w, jnp.float32), copies, np.float32(labels), 0.3)
        margin, toward = x @ w, (W - (W @ w) * w) / np.sin(angle)
        ramp = np.clip(margin / 0.3 + 0.5, 0, 1)
        slope = 6 * ramp * (1 - ramp) / 0.3
        lost = 2 * (1 - ETA) * (slope * np.abs(margin)).mean()
        won = (1 - 2 * ETA) * (slope * np.abs(x @ toward)).mean()
        assert -float(gradient @ toward.astype(np.float32)) >= won - lost / np.tan(angle) - 1e-4
        left = won - float(jnp.linalg.norm(gradient))
        assert left <= 0 or np.tan(angle) <= lost / left + 1e-3
        told += left > 0
    assert told >= 5


@pytest.fixture(scope="module")
def thresholds():
    return halfspaces.null_thresholds(
        jax.random.key(5), N // 3, D, sigma=SIGMA, theta=EPSILON, delta=0.1, num_draws=600
    )


def learned(kind, seed, thresholds):
    x, y = sample(kind, seed)
    key = jax.random.key(seed)
    return halfspaces.tester_learner(key, x, y, epsilon=EPSILON, eta=ETA, thresholds=thresholds)


def test_normal_inputs_are_accepted_and_learnt(thresholds):
    results = [learned("normal", seed, thresholds) for seed in range(6)]
    assert sum(bool(result.accepted) for result in results) >= 4  # each with probability 0.9
    for seed, result in enumerate(results):
        assert np.arccos(float(result.weights @ jnp.asarray(W, jnp.float32))) < EPSILON
        assert float(jnp.linalg.norm(result.weights)) == pytest.approx(1, abs=1e-5)
        assert float(result.error) == pytest.approx(ETA / 2, abs=0.04)
        assert float(result.gradient_norm) < (1 - 2 * ETA) / (2 * np.pi)
        x = jnp.asarray(sample("normal", seed)[0])
        apart = float(((x @ result.weights >= 0) != (x @ jnp.asarray(W, jnp.float32) >= 0)).mean())
        assert apart < float(result.statistics.disagreement)


@pytest.mark.parametrize("kind", ["corners", "heavy"])
def test_other_inputs_are_rejected(kind, thresholds):
    for seed in range(3):
        result = learned(kind, seed, thresholds)
        assert not result.accepted
        assert all(np.isfinite(value) for value in result.statistics)
        over = [float(a) > float(b) for a, b in zip(result.statistics, thresholds)]
        assert any(over)


def test_the_gradient_that_is_allowed_falls_with_the_noise(thresholds):
    x, y = sample("normal")
    one = halfspaces.tester_learner(jax.random.key(0), x, y, epsilon=EPSILON, eta=ETA, thresholds=thresholds)
    noisy = {"epsilon": EPSILON, "eta": 0.5 - 1e-9, "sigma": SIGMA, "thresholds": thresholds}
    other = halfspaces.tester_learner(jax.random.key(0), x, y, **noisy)
    assert one.accepted
    assert not other.accepted
    jax.tree.map(np.testing.assert_array_equal, one[2:], other[2:])


def test_the_key_decides(thresholds):
    x, y = sample("normal")
    of = lambda seed: halfspaces.tester_learner(
        jax.random.key(seed), x, y, epsilon=EPSILON, eta=ETA, thresholds=thresholds
    )
    one, again, other = of(0), of(0), of(1)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(again), strict=True))
    assert not np.array_equal(one.weights, other.weights)


X, Y = sample("normal")


@pytest.mark.parametrize(
    ("x", "y", "settings", "message"),
    [
        (X, Y, {"eta": 0.5}, r"eta must lie in \[0, 1/2\), got 0.5"),
        (X, Y, {"epsilon": 0.0}, "epsilon must lie strictly between 0 and 1, got 0.0"),
        (X, (Y + 1) // 2, {}, "y must hold only the labels -1 and 1, got 0"),
        (X, Y[1:], {}, r"y must have shape \(3000,\), got \(2999,\)"),
        (X[:11], Y[:11], {}, r"x must have shape \(batch >= 3 \(dim \+ 1\), dim\), got \(11, 3\)"),
        (np.where(X > 3, np.nan, X), Y, {}, "x must be finite, got NaN or infinity"),
        (X, Y, {"sigma": -1.0}, "sigma must be positive and finite, got -1.0"),
    ],
)
def test_bad_input_is_named(x, y, settings, message):
    with pytest.raises(ValueError, match=message):
        halfspaces.tester_learner(jax.random.key(0), x, y, **{"epsilon": 0.1, "eta": 0.1} | settings)
