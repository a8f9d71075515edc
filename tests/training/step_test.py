import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robustjax import losses, training


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_step_is_stochastic_gradient_descent_by_hand(problem):
    optimizer = optax.sgd(0.1)
    state = training.init(jax.random.key(0), problem.model, optimizer)
    batch = next(problem.Stream())
    w, b = (np.asarray(problem.model.params[name], np.float64) for name in ("w", "b"))
    flat = batch.image.reshape(8, -1).astype(np.float64)
    mean = 0.1 * flat.mean(0)
    probabilities = softmax((flat - mean) @ w + b)
    residual = (probabilities - np.eye(3)[batch.label]) / 8
    state, metrics = training.make_step(losses.standard(), optimizer)(problem.apply, state, batch)
    np.testing.assert_allclose(state.model.params["w"], w - 0.1 * (flat - mean).T @ residual, atol=1e-6)
    np.testing.assert_allclose(state.model.params["b"], b - 0.1 * residual.sum(0), atol=1e-6)
    np.testing.assert_allclose(state.model.batch_stats["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], -np.log(probabilities[np.arange(8), batch.label]).mean(), rtol=1e-6)
    assert metrics["accuracy"] == (probabilities.argmax(-1) == batch.label).mean()
    assert state.step == 1


def test_each_step_draws_its_own_noise_from_the_key_of_the_run(problem):
    optimizer, objective = optax.sgd(0.0), losses.smoothing.gaussian_augmentation(sigma=0.5)
    state = training.init(jax.random.key(4), problem.model, optimizer)
    step, batch = training.make_step(objective, optimizer), jax.device_put(next(problem.Stream()))
    for count in range(2):
        want, _ = objective(jax.random.fold_in(jax.random.key(4), count), problem.apply, state.model, batch)
        state, metrics = step(problem.apply, state, batch)
        np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)
    assert jax.random.key_data(state.key).tolist() == jax.random.key_data(jax.random.key(4)).tolist()


def test_the_state_is_donated_and_the_initial_model_is_not(problem):
    optimizer = optax.adam(1e-3)
    key = jax.random.key(0)
    state = training.init(key, problem.model, optimizer)
    new, _ = training.make_step(losses.standard(), optimizer)(problem.apply, state, next(problem.Stream()))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, problem.model, key)))


def test_equal_objectives_share_one_trace(problem):
    traces = []

    def counting(state, x, *, train=False):
        traces.append(x.shape)
        return problem.apply(state, x, train=train)

    optimizer = optax.sgd(0.1)
    state = training.init(jax.random.key(0), problem.model, optimizer)
    for _ in range(3):
        step = training.make_step(losses.smoothing.gaussian_augmentation(sigma=0.25), optimizer)
        state, _ = step(counting, state, next(problem.Stream()))
    assert len(traces) == 1


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1, momentum=0.9), optax.adam(1e-2)], ids=["sgd", "adam"])
def test_eight_devices_equal_one(problem, optimizer):
    results = []
    for devices in (1, 8):
        mesh = training.make_mesh({"data": devices})
        state = training.replicate(training.init(jax.random.key(0), problem.model, optimizer), mesh)
        step, stream = (
            training.make_step(losses.smoothing.gaussian_augmentation(sigma=0.25), optimizer),
            problem.Stream(16),
        )
        for _ in range(5):
            batch = training.shard_batch(next(stream), mesh)
            state, metrics = step(problem.apply, state, batch)
        assert len(batch.image.sharding.device_set) == devices
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves((state, metrics)))
        assert all(len(leaf.sharding.device_set) == devices for leaf in jax.tree.leaves(state))
        results.append((state.model, metrics))
    # Sums over the batch run in another order; Adam divides by small second moments and widens that.
    chex.assert_trees_all_close(*jax.device_get(results), rtol=1e-4, atol=1e-6)


def test_legacy_keys_are_refused(problem):
    with pytest.raises(ValueError, match="key must be a typed key from jax.random.key, got an array of uint32"):
        training.init(jnp.zeros(2, jnp.uint32), problem.model, optax.sgd(0.1))
