"""Conformal training beside its equation in float64, and the smooth quantile beside the hard one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize, special

from robustjax import losses, training
from robustjax.losses import _smoothing
from robustjax.typing import Batch, ModelState, Outputs

RNG = np.random.default_rng(0)
VALUES = jnp.asarray(RNG.normal(size=9).astype(np.float32))
KERNEL = RNG.normal(size=(12, 3)).astype(np.float32)
LABELS = np.arange(12, dtype=np.int32) % 3
PATTERNS = np.repeat(np.eye(3, dtype=np.float32), 4, axis=1)[LABELS].reshape(12, 2, 2, 3)
BATCH = jax.tree.map(jnp.asarray, Batch(np.float32(0.3) + np.float32(0.4) * PATTERNS, LABELS, LABELS))
STATE = ModelState({"kernel": jnp.asarray(KERNEL)}, {})
KEY = jax.random.key(4)
quantile = jax.jit(losses.soft_quantile)
OBJECTIVE = losses.conformal_training(sigma=0.3, epsilon=0.06, alpha=0.4, num_noise=4, size_weight=0.5)


@jax.jit
def loss_and_gradient(state):
    return jax.value_and_grad(lambda state: OBJECTIVE(KEY, apply, state, BATCH), has_aux=True)(state)


def apply(state, x, *, train=False):
    features = x.reshape(x.shape[0], -1)
    return Outputs(features @ state.params["kernel"], features), state


def root_of(values, rank, dispersion):
    equation = lambda q: special.expit((q - np.asarray(values, np.float64)) / dispersion).sum() - rank + 0.5
    return optimize.brentq(equation, -100, 100)


def test_the_quantile_is_the_root_of_its_equation():
    for rank in (1, 4, 9):
        for dispersion in (0.03, 0.3, 3.0):
            root = root_of(VALUES, rank, dispersion)
            assert quantile(VALUES, rank=rank, dispersion=dispersion) == pytest.approx(root, abs=1e-5)


def test_the_quantile_tends_to_the_hard_one():
    errors = []
    for dispersion in (0.3, 0.1, 0.01, 0.001):
        soft = [float(quantile(VALUES, rank=rank, dispersion=dispersion)) for rank in range(1, 10)]
        assert (np.diff(soft) > 0).all()
        errors.append(np.abs(np.asarray(soft) - np.sort(VALUES)).max())
    assert (np.diff(errors) < 0).all()
    assert errors[-1] < 1e-3


def test_the_quantile_is_the_hard_one_where_no_float32_lies_on_the_slope():
    for rank in range(1, 10):
        soft = quantile(VALUES, rank=rank, dispersion=1e-12)
        assert soft == pytest.approx(float(np.sort(VALUES)[rank - 1]), abs=1e-6)


def test_the_gradient_of_the_quantile_is_that_of_its_equation():
    gradient = jax.jit(jax.grad(losses.soft_quantile))
    for dispersion in (0.3, 0.01):
        q = float(quantile(VALUES, rank=4, dispersion=dispersion))
        s = special.expit((q - np.asarray(VALUES, np.float64)) / dispersion)
        weights = s * (1 - s) / (s * (1 - s)).sum()
        np.testing.assert_allclose(gradient(VALUES, rank=4, dispersion=dispersion), weights, atol=2e-3)
    tied = gradient(jnp.zeros(9), rank=2, dispersion=1e-6)
    np.testing.assert_allclose(tied, 1 / 9, atol=1e-6)


def test_the_loss_is_its_equation():
    noise = np.asarray(_smoothing._images_and_noise(KEY, BATCH.image, 0.3, 4)[1], np.float64)
    copies = (np.asarray(BATCH.image, np.float64)[:, None] + noise).reshape(12, 4, -1)
    scores = special.ndtri(special.softmax(copies @ KERNEL.astype(np.float64), -1).mean(1))
    right = lambda a: a[np.arange(12), np.asarray(LABELS)]
    tau = root_of(right(scores)[:6], 2, 0.1) - 0.2  # rank floor(0.4 * (6 + 1)), epsilon / sigma
    sets = special.expit((scores - tau) / 0.1)
    missed, size = (1 - right(sets)[6:]).mean(), sets[6:].sum(-1)
    assert 0.01 < missed < 0.9
    (loss, aux), _ = loss_and_gradient(STATE)
    assert float(loss) == pytest.approx(np.log(missed + 0.5 * np.maximum(size - 1, 0).mean() + 1e-8), rel=1e-4)
    assert float(aux.metrics["size"]) == pytest.approx(size.mean(), rel=1e-4)


def test_it_trains_smaller_sets():
    objective = losses.conformal_training(epsilon=0.05, alpha=0.2, num_noise=4)
    optimizer, zero = optax.adam(0.1), ModelState({"kernel": 0.01 * STATE.params["kernel"]}, {})
    step, state = training.make_step(objective, optimizer), training.init(jax.random.key(0), zero, optimizer)
    history = []
    for _ in range(60):
        state, metrics = step(apply, state, BATCH)
        history.append([float(metrics[name]) for name in ("size", "accuracy", "loss")])
    first, last = history[0], np.mean(history[-10:], axis=0)
    assert first[0] > 2
    assert last[0] < 1.3
    assert last[1] > 0.9
    assert last[2] < first[2] - 1


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_the_gradient_is_finite_where_answers_are_none_or_certain(scale):
    state = ModelState({"kernel": scale * STATE.params["kernel"]}, {})
    _, gradient = loss_and_gradient(state)
    assert np.isfinite(gradient.params["kernel"]).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: losses.conformal_training(sigma=0.0), "sigma must be positive and finite, got 0.0"),
        (lambda: losses.conformal_training(epsilon=-0.1), "epsilon must be at least 0"),
        (lambda: losses.conformal_training(alpha=1.0), "alpha must lie strictly between 0 and 1, got 1.0"),
        (lambda: losses.conformal_training(num_noise=0), "num_noise must be .* at least 1, got 0"),
        (lambda: losses.soft_quantile(VALUES, rank=0), "rank must be an integer of at least 1, got 0"),
        (lambda: losses.soft_quantile(VALUES, rank=10), "rank must be at most 9, the number of values, got 10"),
        (lambda: losses.soft_quantile(VALUES, rank=1, dispersion=0.0), "dispersion must be positive"),
        (
            lambda: losses.conformal_training()(KEY, apply, STATE, jax.tree.map(lambda a: a[:1], BATCH)),
            "batch must hold at least 2 images, got 1",
        ),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
