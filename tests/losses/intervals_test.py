"""Interval training beside its equation in float64, its gradient, and what it is for."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from robustjax import certification, losses
from robustjax.typing import Batch, ModelState, Outputs

RNG = np.random.default_rng(0)
W1, W2 = (RNG.normal(size=shape).astype(np.float32) for shape in ((12, 8), (8, 3)))
X = RNG.uniform(0.1, 0.9, (5, 2, 2, 3)).astype(np.float32)
BATCH = Batch(jnp.asarray(X), jnp.asarray([0, 1, 2, 0, 1]), jnp.arange(5))
STATE = ModelState({"first": jnp.asarray(W1), "second": jnp.asarray(W2)}, {})
KEY = jax.random.key(4)


def apply(state, x, *, train=False):
    features = jax.nn.relu(x.reshape(x.shape[0], -1) @ state.params["first"])
    return Outputs(features @ state.params["second"], features), state


def expected(epsilon, kappa):
    x, w1, w2 = (a.astype(np.float64) for a in (X.reshape(5, -1), W1, W2))
    low, high = np.clip(x - epsilon, 0, 1), np.clip(x + epsilon, 0, 1)
    plus, minus = np.maximum(w1, 0), np.minimum(w1, 0)
    low, high = np.maximum(low @ plus + high @ minus, 0), np.maximum(high @ plus + low @ minus, 0)
    logits, total, verified = np.maximum(x @ w1, 0) @ w2, 0.0, 0
    for i, y in enumerate(np.asarray(BATCH.label)):
        difference = w2[:, [y]] - w2
        margins = low[i] @ np.maximum(difference, 0) + high[i] @ np.minimum(difference, 0)
        total -= kappa * special.log_softmax(logits[i])[y] + (1 - kappa) * special.log_softmax(-margins)[y]
        verified += np.delete(margins, y).min() > 0
    return total / 5, verified / 5, np.mean(logits.argmax(-1) == np.asarray(BATCH.label))


@jax.jit
def loss_at(epsilon, kappa):
    return losses.interval_training(epsilon=epsilon, kappa=kappa)(KEY, apply, STATE, BATCH)


@pytest.mark.parametrize(("epsilon", "kappa"), [(0.05, 0.25), (0.0, 0.5), (0.3, 1.0)])
def test_it_is_its_equation(epsilon, kappa):
    objective = losses.interval_training(epsilon=epsilon, kappa=kappa)
    loss, aux = loss_at(epsilon, kappa)
    value, verified, accuracy = expected(epsilon, kappa)
    assert float(loss) == pytest.approx(value, rel=1e-5)
    assert float(aux.metrics["accuracy"]) == pytest.approx(accuracy)
    assert float(aux.metrics["verified"]) == pytest.approx(verified)
    assert objective == losses.interval_training(epsilon=epsilon, kappa=kappa)


def test_gradient_is_that_of_finite_differences():
    loss = jax.jit(
        lambda params: losses.interval_training(epsilon=0.05)(KEY, apply, STATE._replace(params=params), BATCH)[0]
    )
    gradient = jax.grad(loss)(STATE.params)
    for name in STATE.params:
        step = 1e-3 * np.sign(gradient[name])
        ends = [loss(STATE.params | {name: STATE.params[name] + sign * step}) for sign in (1, -1)]
        assert np.isfinite(gradient[name]).all()
        assert float((gradient[name] * step).sum()) == pytest.approx(float(ends[0] - ends[1]) / 2, rel=2e-2)


def test_training_makes_certificates():
    """Two classes that differ in one pixel by 0.6, in noise: intervals verify 0.2 after training for it alone."""
    labels = RNG.integers(0, 3, 128)
    images = RNG.uniform(0, 1, (128, 2, 2, 3)).astype(np.float32)
    images[:, 0, 0] = 0.2 + 0.6 * np.eye(3)[labels]
    batch = Batch(jnp.asarray(images), jnp.asarray(labels), jnp.arange(128))
    start = jax.tree.map(lambda a: 0.3 * a, STATE.params)
    optimizer = optax.adam(0.03)

    @jax.jit
    def step(i, params, state, kappa):  # the ball and its share grow in the first half, as the docstring has it
        share = jnp.clip(i / 150.0, 0.0, 1.0)
        objective = losses.interval_training(epsilon=0.2 * share, kappa=1 - share * (1 - kappa))
        loss = lambda params: objective(KEY, apply, ModelState(params, {}), batch)[0]
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    share = []
    for kappa in (1.0, 0.5):  # 1 is standard training
        params, state = start, optimizer.init(start)
        with jax.numpy_dtype_promotion("standard"):
            for i in range(300):
                params, state = step(i, params, state, kappa)
        logits_fn = jax.tree_util.Partial(lambda params, x: apply(ModelState(params, {}), x)[0].logits, params)
        certificate = certification.intervals.certify(logits_fn, images, labels, epsilon=0.15)
        assert (logits_fn(batch.image).argmax(-1) == batch.label).mean() > 0.9
        share.append(float(certificate.verified.mean()))
    assert share[0] < 0.3
    assert share[1] > 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": -0.1}, "epsilon must be at least 0 and finite, got -0.1."),
        ({"kappa": 1.5}, "kappa must be at most 1, got 1.5."),
        ({"kappa": float("nan")}, "kappa must be at least 0 and finite, got nan."),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        losses.interval_training(**settings)
