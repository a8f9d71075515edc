"""AccelAT on digits: about as robust as with a constant learning rate. Its claim, fewer epochs, does not appear."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robustjax import attacks, data, losses, models, training
from robustjax.typing import Batch

EPSILON, EPOCHS, BATCH_SIZE, LEARNING_RATE = 0.15, 40, 128, 2e-3
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def robust_accuracy():
    """Under PGD-20 on the test digits, by rule and seed: means of five epochs, ``(EPOCHS // 5,)``."""
    digits, test = data.load("digits", "train").arrays(), data.load("digits", "test").arrays()
    rows = len(digits.label) * 9 // 10
    train, validation = Batch(*(a[:rows] for a in digits)), Batch(*(a[rows:] for a in digits))
    objective = losses.adversarial.adversarial_training(attack=attacks.pgd(epsilon=EPSILON, steps=5, keep="last"))
    evaluation = attacks.pgd(epsilon=EPSILON, steps=20)
    optimizer = optax.inject_hyperparams(optax.adam)(LEARNING_RATE)
    step = training.make_step(objective, optimizer)
    made = [models.functional(models.create("cnn", jax.random.key(i), image_shape=(8, 8, 1))) for i in range(3)]
    apply, outputs = made[0].apply, made[0].outputs
    logits = lambda state, x: outputs(state, x).logits

    def accuracy(model, batch):
        logits_fn = jax.tree_util.Partial(logits, model)
        return attacks.robust_accuracy(jax.random.key(7), evaluation, logits_fn, batch.image, batch.label)

    def curve(rule, seed):
        state = training.init(jax.random.key(seed), made[seed].state, optimizer)
        accelat = training.accelat(learning_rate=LEARNING_RATE)
        controller, rate, order, found = accelat.init(), LEARNING_RATE, np.random.default_rng(seed), []
        for _ in range(EPOCHS):
            state = state._replace(opt_state=optax.tree.set(state.opt_state, learning_rate=jnp.float32(rate)))
            for index in order.permutation(rows)[: rows // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE):
                state = step(apply, state, Batch(*(jnp.asarray(a[index]) for a in train)))[0]
            if rule == "accelat":
                controller, rate = accelat.update(controller, accuracy(state.model, validation))
            found.append(accuracy(state.model, test))
        return np.reshape(found, (-1, 5)).mean(1)

    return {(rule, seed): curve(rule, seed) for rule in ("constant", "accelat") for seed in range(3)}


def test_as_robust_as_with_a_constant_rate_and_as_soon(robust_accuracy):
    curves = {rule: np.stack([robust_accuracy[rule, seed] for seed in range(3)]) for rule in ("constant", "accelat")}
    epochs = {rule: 5 * (1 + (of > 0.65).argmax(1)) for rule, of in curves.items()}
    assert all((of[:, -1] > 0.65).all() for of in curves.values())
    assert abs(curves["accelat"][:, -1].mean() - curves["constant"][:, -1].mean()) < 0.02
    # Five epochs are as fine as means of five are.
    assert abs(epochs["accelat"].mean() - epochs["constant"].mean()) <= 5
