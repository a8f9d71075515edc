"""Objectives for smoothing beside their equations in float64, their attacks beside closed forms."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from robustjax import losses, training
from robustjax.losses import _smoothing
from robustjax.typing import Batch, ModelState, Outputs

RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(12, 3)).astype(np.float32)
X = RNG.uniform(0.3, 0.7, (5, 2, 2, 3)).astype(np.float32)
BATCH = Batch(jnp.asarray(X), jnp.asarray([0, 1, 2, 0, 1]), jnp.arange(5))
STATE = ModelState({"kernel": jnp.asarray(KERNEL)}, {})
KEY = jax.random.key(4)
ALL = [
    losses.smoothing.stability(sigma=0.3),
    losses.smoothing.consistency(sigma=0.3),
    losses.smoothing.macer(sigma=0.3, num_noise=3),
    losses.smoothing.smoothadv(sigma=0.3, steps=2, num_noise=2, epsilon=0.2),
    losses.smoothing.smoothmix(sigma=0.3, steps=2, step_size=0.2),
]
BY_NAME = pytest.mark.parametrize("objective", ALL, ids=lambda objective: type(objective).__name__)


def apply(state, x, *, train=False):
    features = x.reshape(x.shape[0], -1)
    return Outputs(features @ state.params["kernel"], features), state


@functools.cache
def noise_of(num_noise, splits=0):
    """What an objective draws from KEY, where it takes ``splits`` keys for itself first; copies ``(batch, m, dim)``."""
    key = jax.random.split(KEY, splits)[0] if splits else KEY
    return np.asarray(_smoothing._images_and_noise(key, BATCH.image, 0.3, num_noise)[1], np.float64)


def log_softmax_at(x, noise, kernel=KERNEL):
    logits = (np.asarray(x, np.float64)[:, None] + noise).reshape(*noise.shape[:2], -1) @ np.asarray(kernel, np.float64)
    return special.log_softmax(logits, -1)


def right(values):
    return np.take_along_axis(values, np.asarray(BATCH.label).reshape(-1, *(1,) * (values.ndim - 1)), axis=-1)[..., 0]


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(objective, params):
    return jax.value_and_grad(lambda params: objective(KEY, apply, ModelState(params, {}), BATCH)[0])(params)


DIRECTION = np.cos(np.arange(36.0)).reshape(12, 3)


def loss_and_slope(objective):
    """The loss, and its slope along a direction of the kernel."""
    value, gradient = loss_and_gradient(objective, STATE.params)
    return float(value), float((gradient["kernel"] * DIRECTION).sum())


def value_and_slope(equation):
    """The same of an equation in the kernel, in float64, the slope as a difference."""
    kernel = KERNEL.astype(np.float64)
    return equation(kernel), (equation(kernel + 1e-6 * DIRECTION) - equation(kernel - 1e-6 * DIRECTION)) / 2e-6


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def ascend(params, labels, noise, steps, step_size, epsilon, key=KEY):
    return _smoothing._ascend(key, apply, ModelState(params, {}), BATCH.image, labels, noise, steps, step_size, epsilon)


def test_stability_is_its_equation():
    def equation(kernel):
        clean = log_softmax_at(X, np.zeros((5, 1, 2, 2, 3)), kernel)[:, 0]
        return (
            -right(clean).mean() - 1.5 * (np.exp(clean) * log_softmax_at(X, noise_of(1), kernel)[:, 0]).sum(-1).mean()
        )

    found = loss_and_slope(losses.smoothing.stability(sigma=0.3, weight=1.5))
    assert found == pytest.approx(value_and_slope(equation), rel=1e-5)


def test_consistency_is_its_equation():
    def equation(kernel):
        log_p = log_softmax_at(X, noise_of(4), kernel)
        mean = np.exp(log_p).mean(1)
        divergence = (mean[:, None] * (np.log(mean)[:, None] - log_p)).sum(-1).mean()
        return -right(log_p).mean() + 3 * divergence - 0.7 * (mean * np.log(mean)).sum(-1).mean()

    found = loss_and_slope(losses.smoothing.consistency(sigma=0.3, num_noise=4, weight=3.0, entropy_weight=0.7))
    assert found == pytest.approx(value_and_slope(equation), rel=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 8.0])
def test_macer_is_its_equation(gamma):
    def equation(kernel):
        log_p = log_softmax_at(X, noise_of(3), kernel)
        votes = special.softmax(2.0 * log_p, -1).mean(1)
        first, second = np.sort(votes)[:, :-3:-1].T
        xi = special.ndtri(first) - special.ndtri(second)
        active = (votes.argmax(-1) == np.asarray(BATCH.label)) & (xi <= gamma)
        assert active.any()
        assert not active.all()
        return -np.log(right(np.exp(log_p).mean(1))).mean() + 6 * np.where(active, 0.15 * (gamma - xi), 0).mean()

    found = loss_and_slope(losses.smoothing.macer(sigma=0.3, num_noise=3, weight=6.0, beta=2.0, gamma=gamma))
    assert found == pytest.approx(value_and_slope(equation), rel=1e-4)


def test_macer_has_a_hinge_and_a_gradient_where_votes_are_all_or_nothing():
    """The quantiles are kept 1e-7 from 0 and 1: xi is 10.4 at most, and a larger gamma keeps the hinge active."""
    objective = losses.smoothing.macer(sigma=0.003, num_noise=3, weight=1e4, gamma=20.0)
    log_p = log_softmax_at(X, noise_of(3) / 100, 100 * KERNEL.astype(np.float64))
    votes = special.softmax(16 * log_p, -1).mean(1)
    is_right = votes.argmax(-1) == np.asarray(BATCH.label)
    assert votes.max(-1).min() > 1 - 1e-9
    assert 0 < is_right.sum() < 5
    expected = -right(special.logsumexp(log_p, 1) - math.log(3)).mean()
    expected += 1e4 * is_right.mean() * 0.0015 * (20 + 2 * special.ndtri(1e-7))
    value, _ = loss_and_gradient(objective, {"kernel": 100 * KERNEL})
    assert float(value) == pytest.approx(expected, rel=1e-4)
    for scale in (1e-6, 1e4):
        _, gradient = loss_and_gradient(objective, {"kernel": np.float32(scale) * KERNEL})
        assert np.isfinite(gradient["kernel"]).all()


def test_smoothadv_goes_straight_where_the_gradient_is_constant():
    """Two classes and one draw: every gradient points along the difference of the weights, to the sphere."""
    labels = np.asarray(BATCH.label) % 2
    found = np.asarray(ascend({"kernel": KERNEL[:, :2]}, labels, np.float32(noise_of(1)), 5, 0.08, 0.2))
    away = np.where(labels[:, None], KERNEL[:, 0] - KERNEL[:, 1], KERNEL[:, 1] - KERNEL[:, 0])
    expected = X.reshape(5, -1) + 0.2 * away / np.linalg.norm(away, axis=1, keepdims=True)
    np.testing.assert_allclose(found.reshape(5, -1), expected, atol=1e-6)


def test_smoothadv_raises_what_it_says_in_the_ball_and_the_box():
    noise = noise_of(4)
    found = np.asarray(ascend(STATE.params, BATCH.label, np.float32(noise), 10, 0.2, 1.0))
    assert np.linalg.norm((found - X).reshape(5, -1), axis=1).max() <= 1 + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    before, after = (-np.log(right(np.exp(log_softmax_at(x, noise)).mean(1))) for x in (X, found))
    assert (after > before + 0.1).all()
    unbounded = np.asarray(ascend(STATE.params, BATCH.label, np.float32(noise), 10, 1.0, np.inf))
    assert np.linalg.norm((unbounded - X).reshape(5, -1), axis=1).min() > 1
    assert np.ptp(unbounded) == 1


def test_without_a_gradient_the_attack_strays():
    found = ascend({"kernel": 0 * KERNEL}, BATCH.label, np.zeros((5, 2, 2, 2, 3), np.float32), 2, 0.1, 0.1)
    np.testing.assert_allclose(np.linalg.norm((found - X).reshape(5, -1), axis=1), 0.1, rtol=1e-4)


def test_smoothadv_is_cross_entropy_under_noise_at_what_it_found():
    keys, noise = jax.random.split(KEY), noise_of(2, 2)
    found = ascend(STATE.params, BATCH.label, np.float32(noise), 2, 0.2, 0.2, keys[1])
    expected = value_and_slope(lambda kernel: -right(log_softmax_at(found, noise, kernel)).mean())
    assert loss_and_slope(ALL[3]) == pytest.approx(expected, rel=1e-5)


def test_smoothmix_is_its_equation():
    keys, noise = jax.random.split(KEY, 3), noise_of(2, 3)
    far = ascend(STATE.params, BATCH.label, np.float32(noise), 2, 0.2, np.inf, keys[1])
    share = np.asarray(jax.random.uniform(keys[2], (5,), maxval=0.5), np.float64)
    assert share.max() > 0.2
    mixed = X + share[:, None, None, None] * (np.asarray(far, np.float64) - X)

    def equation(kernel):
        log_p, log_mixed = log_softmax_at(X, noise, kernel), log_softmax_at(mixed, noise, kernel)
        mean = np.exp(log_p).mean(1)
        target = (1 - share)[:, None] * mean + share[:, None] / 3
        divergence = (target[:, None] * (np.log(target)[:, None] - log_mixed)).sum(-1).mean(1)
        is_right = mean.argmax(-1) == np.asarray(BATCH.label)
        assert is_right.any()
        assert not is_right.all()
        return -right(log_p).mean() + 5 * np.where(is_right, divergence, 0).mean()

    assert loss_and_slope(ALL[4]) == pytest.approx(value_and_slope(equation), rel=1e-5)


@pytest.mark.parametrize("objective", ALL[3:])
def test_the_attack_sees_the_model_at_inference_and_the_loss_in_training(objective):
    modes = []

    def seen(state, x, *, train=False):
        modes.append(train)
        return apply(state, x)

    jax.eval_shape(lambda: objective(KEY, seen, STATE, BATCH)[0])
    assert modes[0] is False
    assert modes == sorted(modes)
    assert modes[-1] is True


@BY_NAME
def test_an_objective_trains(objective):
    """Three patterns, under noise of a quarter of what tells them apart."""
    import optax

    labels = jnp.arange(12) % 3
    patterns = jnp.repeat(jnp.eye(3), 4, axis=1)[labels].reshape(12, 2, 2, 3)
    batch = Batch(0.3 + 0.4 * patterns, labels, jnp.arange(12))
    optimizer, zero = optax.adam(0.1), ModelState({"kernel": jnp.zeros((12, 3))}, {})
    step, state = training.make_step(objective, optimizer), training.init(jax.random.key(0), zero, optimizer)
    history = []
    for _ in range(40):
        state, metrics = step(apply, state, batch)
        history.append(float(metrics["accuracy"]))
    assert history[0] < 0.5
    assert np.mean(history[-10:]) > 0.75


def test_the_least_settings_are_taken():
    assert losses.smoothing.stability(weight=0.0).weight == 0
    consistency = losses.smoothing.consistency(num_noise=2, weight=0.0, entropy_weight=0.0)
    assert (consistency.num_noise, consistency.weight, consistency.entropy_weight) == (2, 0, 0)
    macer = losses.smoothing.macer(num_noise=1, weight=0.0)
    assert (macer.num_noise, macer.weight) == (1, 0)
    smoothadv = losses.smoothing.smoothadv(steps=1, num_noise=1)
    assert (smoothadv.steps, smoothadv.num_noise) == (1, 1)
    smoothmix = losses.smoothing.smoothmix(steps=1, num_noise=1, weight=0.0)
    assert (smoothmix.steps, smoothmix.num_noise, smoothmix.weight) == (1, 1, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: losses.smoothing.stability(sigma=0.0), "sigma must be positive and finite, got 0.0"),
        (lambda: losses.smoothing.stability(weight=-1.0), "weight must be"),
        (lambda: losses.smoothing.consistency(num_noise=1), "num_noise must be .* at least 2, got 1"),
        (lambda: losses.smoothing.macer(beta=0.0), "beta must be positive and finite, got 0.0"),
        (lambda: losses.smoothing.smoothadv(epsilon=float("nan")), "epsilon must be positive and finite, got nan"),
        (lambda: losses.smoothing.smoothadv(steps=0), "steps must be .* at least 1, got 0"),
        (lambda: losses.smoothing.smoothmix(step_size=-0.1), "step_size must be positive and finite, got -0.1"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
