"""The statistics beside brute force, the bound of T4 under attack, and how often normal inputs fail."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.certification import halfspaces

SIGMA, THETA, N, D = 0.8, 0.3, 400, 3
statistics = jax.jit(functools.partial(halfspaces.statistics, sigma=SIGMA, theta=THETA))
bound = jax.jit(functools.partial(halfspaces.disagreement_bound, theta=THETA))
RNG = np.random.default_rng(0)
W = RNG.normal(size=D)
W = (W / np.linalg.norm(W)).astype(np.float32)
NORMAL = RNG.normal(size=(N, D))
INPUTS = {
    "normal": NORMAL,
    "heavy": RNG.standard_t(1.5, size=(N, D)),
    "corners": RNG.choice([-1.0, 1.0], size=(N, D)),
    "near": NORMAL - 0.97 * np.outer(NORMAL @ W, W),
    "on the plane": NORMAL - np.outer(NORMAL @ W, W),
    "wide": NORMAL + 5 * np.outer(RNG.normal(size=N), np.cross(W, [1, 0, 0])),
}


def basis(w):
    """Orthonormal, w first."""
    return np.linalg.qr(np.column_stack([w, np.eye(D)[:, : D - 1]]))[0]


def test_moments_are_those_of_all_monomials():
    odd = lambda k: np.prod(np.arange(k - 1, 0, -2)) if k % 2 == 0 else 0.0  # E z^k
    worst = 0.0
    for degree in range(1, 5):
        for axes in itertools.combinations_with_replacement(range(D), degree):
            powers = np.bincount(axes, minlength=D)
            mean, square = np.prod([odd(p) for p in powers]), np.prod([odd(2 * p) for p in powers])
            error = np.sqrt((square - mean**2) / N)
            worst = max(worst, abs((NORMAL**powers).prod(1).mean() - mean) / error)
    assert float(statistics(jnp.asarray(NORMAL, jnp.float32), W).moments) == pytest.approx(worst, rel=1e-3)


@pytest.mark.parametrize("name", ["normal", "heavy", "wide"])
def test_the_band_is_that_of_brute_force(name):
    x = INPUTS[name]
    parts = x @ basis(W)
    u = np.clip(np.abs(parts[:, 0]) / SIGMA + 0.5, 0, 1)
    slope = 6 * u * (1 - u) / SIGMA
    grid = np.linspace(-SIGMA / 2, SIGMA / 2, 20001)
    v = grid / SIGMA + 0.5
    expected = np.trapezoid(6 * v * (1 - v) / SIGMA * np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi), grid)
    found = statistics(jnp.asarray(x, jnp.float32), W)
    assert float(found.band_mass) == pytest.approx(abs(slope.mean() / expected - 1), rel=1e-3, abs=1e-5)
    z, weight = parts[:, 1:], slope / slope.sum()
    eigenvalues = np.linalg.eigvalsh((weight[:, None] * z).T @ z)
    assert float(found.band_covariance) == pytest.approx(np.abs(eigenvalues - 1).max(), rel=1e-3)
    angle = np.linspace(0, np.pi, 500)
    fourth = (weight[:, None] * (z @ np.stack([np.cos(angle), np.sin(angle)])) ** 4).sum(0)
    assert fourth.max() <= float(found.band_kurtosis) * (1 + 1e-4)
    assert float(found.band_kurtosis) < 1.5 * fourth.max()


@pytest.mark.slow
def test_on_many_normal_inputs_they_are_what_they_should_be():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(40_000, D)), jnp.float32)
    found = statistics(x, W)
    assert float(found.moments) < 5
    assert float(found.band_mass) < 0.03
    assert float(found.band_covariance) < 0.05
    assert float(found.band_kurtosis) == pytest.approx(3, rel=0.08)
    bound = jax.jit(functools.partial(halfspaces.disagreement_bound, theta=0.1))
    assert float(bound(x, W)) == pytest.approx(2 * 0.1, rel=0.05)


@pytest.mark.parametrize("name", INPUTS)
def test_no_half_space_within_the_angle_differs_more_than_the_bound(name):
    x, frame = INPUTS[name], basis(W)
    frame[:, 0] = W
    most = 0.0
    for angle in np.linspace(0, 2 * np.pi, 180, endpoint=False):
        u = frame[:, 1:] @ [np.cos(angle), np.sin(angle)]
        for theta in np.linspace(0.02, 1, 25) * THETA:
            v = np.cos(theta) * W + np.sin(theta) * u
            most = max(most, ((x @ v >= 0) != (x @ W >= 0)).mean())
    found = float(bound(jnp.asarray(x, jnp.float32), W))
    assert most <= found + 1e-6
    assert name != "normal" or most > 0.1 * found
    assert found <= 1 + 1e-6


def test_the_bound_is_reached():
    t = THETA * (1 + 1e-3) * RNG.integers(1, 4, N)
    frame = basis(W)
    x = np.outer(t, W) - np.outer(t / np.tan(THETA) * (1 + 1e-3), frame[:, 1])
    v = np.cos(THETA) * W + np.sin(THETA) * frame[:, 1]
    assert (x @ v < 0).all()
    assert float(bound(jnp.asarray(x, jnp.float32), W)) == pytest.approx(1, rel=1e-5)


def test_they_turn_with_the_inputs():
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(D, D)))[0]
    for w in (W, np.eye(D, dtype=np.float32)[0], -np.eye(D, dtype=np.float32)[0]):
        for name in ("normal", "corners"):
            one = statistics(jnp.asarray(INPUTS[name], jnp.float32), jnp.asarray(w))
            other = statistics(jnp.asarray(INPUTS[name] @ turn, jnp.float32), jnp.asarray(w @ turn, jnp.float32))
            np.testing.assert_allclose(one[1:], other[1:], rtol=2e-3, atol=1e-4)


def test_normal_inputs_exceed_each_threshold_as_often_as_they_should():
    n, delta, draws = 1000, 0.1, 600  # as in learner_test: one program
    limits = halfspaces.null_thresholds(jax.random.key(0), n, D, sigma=0.12, theta=0.2, delta=delta, num_draws=draws)
    of = functools.partial(halfspaces.statistics, sigma=0.12, theta=0.2)
    keys = jax.random.split(jax.random.key(1), draws)
    found = jax.jit(lambda keys: jax.lax.map(lambda key: of(jax.random.normal(key, (n, D)), W), keys))(keys)
    failed = np.stack([np.asarray(value) > np.asarray(limit) for value, limit in zip(found, limits)])
    error = np.sqrt(0.02 * 0.98 * 2 / draws)
    np.testing.assert_allclose(failed.mean(1), delta / 5, atol=4 * error)
    assert 0.02 < failed.any(0).mean() <= delta + 4 * error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma": 0.0}, "sigma must be positive and finite, got 0.0"),
        ({"theta": 1.6}, "theta must lie strictly between 0 and pi / 2, got 1.6"),
        ({"delta": 1.0}, "delta must lie strictly between 0 and 1, got 1.0"),
        ({"num_draws": 248}, "num_draws must be an integer of at least 249, got 248"),
        ({"num_samples": 0}, "num_samples must be an integer of at least 1, got 0"),
        ({"dimension": 1}, "dimension must be an integer of at least 2, got 1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    settings = {"num_samples": 9, "dimension": 2, "sigma": 0.1, "theta": 0.1} | settings
    with pytest.raises(ValueError, match=message):
        halfspaces.null_thresholds(jax.random.key(0), **settings)


@pytest.mark.parametrize(
    ("x", "weights", "message"),
    [
        (np.ones((4, 3)), 100 * np.eye(3)[0], "weights must have norm 1, got 100"),
        (np.full((4, 3), np.nan), np.eye(3)[0], "x must be finite, got 12 that are not"),
        (np.ones((4, 3)), np.ones((1, 3)), r"weights must be a floating array \(dim,\)"),
    ],
)
def test_what_a_bound_would_be_wrong_for_is_named(x, weights, message, unchecked):
    with pytest.raises(ValueError, match=message):
        halfspaces.disagreement_bound(x.astype(np.float32), weights.astype(np.float32), theta=0.2)
