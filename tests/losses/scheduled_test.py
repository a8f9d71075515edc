"""Settings that follow the step: the ramp beside its equation, and training steps beside the objective of that step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robustjax import losses, training
from robustjax.typing import Batch, ModelState, Outputs

IMAGES = np.random.default_rng(0).uniform(0.3, 0.7, (6, 2, 2, 1)).astype(np.float32)
BATCH = Batch(jnp.asarray(IMAGES), jnp.asarray([0, 1, 2, 0, 1, 2]), jnp.arange(6))
STATE = ModelState({"kernel": jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32)}, {})
WARM = losses.scheduled(
    losses.smoothing.smoothadv(sigma=0.1, epsilon=0.5, steps=2, num_noise=2), epsilon=losses.ramp(end=0.5, steps=4)
)


def apply(state, x, *, train=False):
    features = x.reshape(x.shape[0], -1)
    return Outputs(features @ state.params["kernel"], features), state


def test_a_ramp_is_its_equation():
    ramp = losses.ramp(start=1.0, end=3.0, begin=2, steps=4)
    steps = np.arange(9)
    values = jax.jit(jax.vmap(ramp))(steps)
    np.testing.assert_allclose(values, np.interp(steps, [2, 6], [1, 3]), rtol=1e-6)


def test_a_ramp_of_no_steps_jumps():
    values = jax.jit(jax.vmap(losses.ramp(end=16.0, begin=3, steps=0)))(np.arange(5))
    np.testing.assert_array_equal(values, [0, 0, 0, 16, 16])


def test_a_training_step_uses_the_settings_of_its_step():
    objective, optimizer = (
        losses.scheduled(losses.smoothing.stability(sigma=0.1), weight=losses.ramp(end=2.0, steps=4)),
        optax.sgd(1.0),
    )
    step, state = training.make_step(objective, optimizer), training.init(jax.random.key(0), STATE, optax.sgd(1.0))
    at = lambda weight, params, key: losses.smoothing.stability(sigma=0.1, weight=weight)(
        key, apply, ModelState(params, {}), BATCH
    )[0]
    gradient = jax.jit(jax.grad(at, argnums=1), static_argnums=0)
    for weight in (0.0, 0.5):
        key, before = jax.random.fold_in(state.key, state.step), jax.tree.map(np.asarray, state.model.params)
        expected = before["kernel"] - gradient(weight, before, key)["kernel"]
        state, _ = step(apply, state, BATCH)
        np.testing.assert_allclose(state.model.params["kernel"], expected, rtol=1e-5)
    assert np.abs(gradient(2.0, before, key)["kernel"] - (before["kernel"] - expected)).max() > 1e-3


def test_a_ball_may_begin_as_a_point():
    run = jax.jit(lambda step: losses.at_step(WARM, step)(jax.random.key(0), apply, STATE, BATCH)[0])
    assert np.isfinite(run(np.int32(0)))


def test_by_itself_it_is_its_end():
    run = jax.jit(lambda objective: objective(jax.random.key(2), apply, STATE, BATCH)[0], static_argnums=0)
    end = losses.smoothing.smoothadv(sigma=0.1, epsilon=0.5, steps=2, num_noise=2)
    assert run(WARM) == run(end)


def test_an_augmented_objective_follows_its_schedule_either_way_round():
    negative = lambda key, images: 1 - images
    objective, weight = losses.smoothing.stability(sigma=0.1), losses.ramp(end=2.0, steps=4)
    inside = losses.augmented(negative, losses.scheduled(objective, weight=weight))
    assert losses.scheduled(losses.augmented(negative, objective), weight=weight) == inside
    now = losses.at_step(inside, jnp.int32(2))
    assert now.augment is negative
    assert now.objective.weight == 1.0
    assert losses.at_step(objective, jnp.int32(2)) is objective


@pytest.mark.parametrize(
    ("ramps", "words"),
    [
        ({"radius": losses.ramp(end=1.0, steps=1)}, "float settings of SmoothAdv .sigma, epsilon., got 'radius'"),
        ({"steps": losses.ramp(end=1.0, steps=1)}, "got 'steps'"),
        ({"epsilon": losses.ramp(end=-1.0, steps=1)}, "epsilon must be positive and finite, got -1.0"),
        ({"epsilon": 0.5}, "epsilon must be a losses.ramp, got 0.5"),
    ],
)
def test_bad_schedules_are_named(ramps, words):
    with pytest.raises(ValueError, match=words):
        losses.scheduled(losses.smoothing.smoothadv(), **ramps)


def test_bad_ramps_are_named():
    with pytest.raises(ValueError, match="end must be finite, got nan"):
        losses.ramp(end=float("nan"), steps=1)
    with pytest.raises(ValueError, match="steps must be an integer of at least 0, got -1"):
        losses.ramp(end=1.0, steps=-1)
