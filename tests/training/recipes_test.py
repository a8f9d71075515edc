import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robustjax import training


def torch_sgd(params, gradients, *, rates, momentum, weight_decay, nesterov=False):
    """PyTorch's documented update, in float64; one gradient and one learning rate per step."""
    velocity = None
    for gradient, rate in zip(gradients, rates, strict=True):
        gradient = gradient + weight_decay * params
        velocity = gradient if velocity is None else momentum * velocity + gradient
        params = params - rate * (gradient + momentum * velocity if nesterov else velocity)
    return params


@pytest.mark.parametrize("nesterov", [False, True])
def test_optimizer_is_pytorchs(nesterov):
    recipe = training.Recipe(
        learning_rate=0.1, weight_decay=0.01, batch_size=1, num_epochs=6, step_size=2, nesterov=nesterov
    )
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=5), rng.normal(size=(18, 5))
    want = torch_sgd(
        start, gradients, rates=[0.1 * 0.1 ** (step // 3 // 2) for step in range(18)],
        momentum=0.9, weight_decay=0.01, nesterov=nesterov,
    )  # fmt: skip
    optimizer = recipe.optimizer(steps_per_epoch=3)
    params = jnp.asarray(start, jnp.float32)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(jnp.asarray(gradient, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "rate", "batch_size", "augment"),
    [("mnist", 0.01, 256, False), ("cohen_cifar10", 0.1, 400, True), ("cohen_imagenet", 0.1, 400, True)],
)
def test_published_recipes(name, rate, batch_size, augment):
    recipe = training.RECIPES[name]
    assert (recipe.algorithm, recipe.momentum, recipe.nesterov, recipe.weight_decay) == ("sgd", 0.9, False, 1e-4)
    assert (recipe.batch_size, recipe.num_epochs, recipe.augment) == (batch_size, 90, augment)
    schedule = recipe.learning_rate_schedule(steps_per_epoch=10)
    got = [schedule(step) for step in (0, 299, 300, 599, 600, 899)]
    np.testing.assert_allclose(got, [rate, rate, rate / 10, rate / 10, rate / 100, rate / 100], rtol=1e-6)


def test_digits_recipe():
    recipe = training.RECIPES["digits"]
    assert (recipe.algorithm, recipe.batch_size, recipe.num_epochs, recipe.weight_decay) == ("adam", 128, 80, 0)
    schedule = recipe.learning_rate_schedule(steps_per_epoch=10)
    got = [schedule(step) for step in (0, 200, 400, 800)]
    want = [1e-3 * (1 + np.cos(np.pi * t)) for t in (0, 0.25, 0.5, 1)]
    np.testing.assert_allclose(got, want, atol=1e-9)


@pytest.mark.parametrize(("num_epochs", "boundaries"), [(9, (30, 60)), (3, (10, 20)), (180, (600, 1200))])
def test_milestones_move_with_the_length(num_epochs, boundaries):
    schedule = training.RECIPES["mnist"].learning_rate_schedule(steps_per_epoch=10, num_epochs=num_epochs)
    rates = np.asarray([schedule(step) for step in range(10 * num_epochs)])
    assert tuple(np.flatnonzero(np.diff(rates)) + 1) == boundaries
    np.testing.assert_allclose(rates[-1], 1e-4, rtol=1e-6)


def test_weight_decay_touches_every_parameter():
    optimizer = training.RECIPES["mnist"].optimizer(steps_per_epoch=1)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones(())}
    updates, _ = optimizer.update(optax.tree.zeros_like(params), optimizer.init(params), params)
    for update in updates.values():
        np.testing.assert_allclose(update, -0.01 * 1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": -0.1}, "learning_rate must be positive and finite, got -0.1"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        training.Recipe(**{"learning_rate": 0.1, "batch_size": 8, "num_epochs": 2, **settings})


def test_bad_length():
    with pytest.raises(ValueError, match="num_epochs must be an integer of at least 1, got 0"):
        training.RECIPES["mnist"].optimizer(10, num_epochs=0)
