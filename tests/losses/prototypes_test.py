"""Objectives of prototype networks beside their equations, and what a few steps of them do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import certification, losses, models
from robustjax.typing import Batch, ModelState, Outputs

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.uniform(size=(12, 2, 2, 1)).astype(np.float32))
LABELS = jnp.asarray(np.arange(12, dtype=np.int32) % 3)
BATCH = Batch(IMAGES, LABELS, LABELS)
PROBABILITIES = jnp.asarray(RNG.uniform(size=(12, 3)).astype(np.float32))


@functools.cache
def model():
    network = models.prototypes.classifier(jax.random.key(0), IMAGES[:6], np.asarray(LABELS[:6]), num_classes=3)
    return models.functional(network)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(objective, apply, state):
    return objective(jax.random.key(0), apply, state, BATCH)


def said(state, x, *, train=False):
    """A model of given probabilities, moved by the mean of its images."""
    return Outputs(jnp.log(PROBABILITIES) + x.mean() * state.params, x.reshape(12, -1)), state


def test_the_margin_is_between_probabilities():
    loss, aux = run(losses.prototype_margin(margin=0.2), said, ModelState(jnp.float32(0), {}))
    wanted = []
    for p, label in zip(np.asarray(PROBABILITIES, np.float64), LABELS):
        wanted.append(max(0, max(p[c] for c in range(3) if c != label) - p[label] + 0.2))
    assert min(wanted) == 0 < max(wanted)
    assert loss == pytest.approx(np.mean(wanted), rel=1e-5)
    assert aux.metrics["accuracy"] == pytest.approx(np.mean(np.asarray(PROBABILITIES).argmax(-1) == LABELS))


@pytest.mark.parametrize(("cancel", "target"), [(True, None), (False, 0.05)])
def test_the_radius_is_the_certified_one(cancel, target):
    objective = losses.prototype_radius(target=target, cancel=cancel)
    loss, aux = run(objective, model().apply, model().state)
    certified = functools.partial(certification.prototypes.radius, cancel=cancel)
    radius = np.asarray(jax.jit(certified)(models.prototypes.network(model().state.params), IMAGES, LABELS).radius)
    assert (radius > 0.05).any()
    wanted = -radius if target is None else np.maximum(target - radius, 0)
    assert loss == pytest.approx(wanted.mean(), rel=1e-4)
    assert aux.metrics["radius"] == pytest.approx(radius.mean(), rel=1e-4)
    assert aux.metrics["accuracy"] == pytest.approx((radius > 0).mean())


@pytest.mark.parametrize("cancel", [True, False])
def test_classes_that_tie_have_no_radius_and_are_not_right(cancel):
    params = model().state.params
    alike = model().state._replace(params={**params, "reasoning": jnp.zeros_like(params["reasoning"])})
    _, aux = run(losses.prototype_radius(cancel=cancel), model().apply, alike)
    assert (aux.metrics["radius"], aux.metrics["accuracy"]) == (0, 0)


def test_steps_down_the_loss_make_the_radius_larger():
    objective = losses.prototype_radius()

    @jax.jit
    def step(state):
        value, gradients = jax.value_and_grad(lambda s: objective(jax.random.key(0), model().apply, s, BATCH)[0])(state)
        return jax.tree.map(lambda p, g: p - 0.2 * g, state, gradients), value

    state, values = model().state, []
    for _ in range(20):
        state, value = step(state)
        values.append(float(value))
    assert values[-1] < values[0] - 0.01
    assert np.isfinite(values).all()


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda: losses.prototype_margin(margin=0.0), "margin must lie strictly between 0 and 1, got 0.0"),
        (lambda: losses.prototype_margin(margin=1.5), "margin must lie strictly between 0 and 1, got 1.5"),
        (lambda: losses.prototype_radius(target=-1.0), "target must be positive and finite, got -1.0"),
    ],
)
def test_bad_settings_are_named(objective, message):
    with pytest.raises(ValueError, match=message):
        objective()
