"""Adversarial training with the learning rate of AccelAT, beside a constant rate.

Robust accuracy under PGD-20 is measured on the test images after each epoch, in means of five epochs. AccelAT follows
the robust accuracy on the last tenth of the training images, on which neither rule trains.

    python -m experiments.claims.accelat
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from robustjax import attacks, data, losses, models, plotting, training
from robustjax.typing import Batch

from ..common import checks, classifiers
from . import _frame

WINDOW = 5
"""Epochs in a mean, and so the resolution of the epochs that are counted."""
RULES = ("constant", "accelat")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the measurement; epsilon is linf, in units of [0, 1] pixels."""

    model: str = "cnn"
    """Classifier of the digits."""
    epsilon: float = 0.15
    """Radius, in training and of the attack."""
    epochs: int = 40
    """Passes over the training images, a multiple of 5."""
    batch_size: int = 128
    """Images in a step."""
    learning_rate: float = 2e-3
    """Constant rate, and the rate that AccelAT begins with."""
    train_steps: int = 5
    """Steps of PGD in training."""
    target: float = 0.65
    """Robust accuracy whose first epoch is counted."""

    def __post_init__(self):
        checks.positive(self, "epsilon", "learning_rate")
        checks.at_least(1, self, "epochs", "batch_size", "train_steps")
        checks.probability(self, "target")
        if self.epochs % WINDOW:
            raise ValueError(f"epochs must be a multiple of {WINDOW}, got {self.epochs}.")


def measure(config: Config, seed: int) -> _frame.Numbers:
    """Trains by both rules from the same weights, in the same order."""
    digits, test = data.load("digits", "train").arrays(), data.load("digits", "test").arrays()
    rows = len(digits.label) * 9 // 10
    train, validation = Batch(*(a[:rows] for a in digits)), Batch(*(a[rows:] for a in digits))
    model_key, train_key, attack_key = jax.random.split(jax.random.key(seed), 3)
    functional = models.functional(models.create(config.model, model_key, image_shape=(8, 8, 1)))
    attack = attacks.pgd(epsilon=config.epsilon, steps=config.train_steps, keep="last")
    evaluation, optimizer = attacks.pgd(epsilon=config.epsilon, steps=20), _optimizer(config.learning_rate)
    step = training.make_step(losses.adversarial.adversarial_training(attack=attack), optimizer)

    def accuracy(model, batch):
        logits_fn = classifiers.Classifier(functional, model).logits_fn()
        return attacks.robust_accuracy(attack_key, evaluation, logits_fn, batch.image, batch.label)

    def curve(rule):
        state = training.init(train_key, functional.state, optimizer)
        accelat = training.accelat(learning_rate=config.learning_rate)
        update = jax.jit(accelat.update)
        controller, rate, order, found = accelat.init(), config.learning_rate, np.random.default_rng(seed), []
        for _ in range(config.epochs):
            state = state._replace(opt_state=optax.tree.set(state.opt_state, learning_rate=jnp.float32(rate)))
            used = order.permutation(rows)[: rows // config.batch_size * config.batch_size]
            for index in used.reshape(-1, config.batch_size):
                state = step(functional.apply, state, Batch(*(jnp.asarray(a[index]) for a in train)))[0]
            if rule == "accelat":
                controller, rate = update(controller, accuracy(state.model, validation))
            found.append(accuracy(state.model, test))
        return np.reshape(found, (-1, WINDOW)).mean(1)

    return {rule: numbers_of(curve(rule), config) for rule in RULES}


_optimizer = functools.cache(optax.inject_hyperparams(optax.adam))  # one for all seeds, which share a compiled step


def numbers_of(curve: np.ndarray, config: Config) -> dict[str, float | np.ndarray]:
    """Robust accuracy at the end, and the epochs until it first passes the target; one window more if it never does."""
    passed = np.append(curve > config.target, True).argmax()
    return {"robust accuracy": curve[-1], "epochs": WINDOW * (1 + int(passed)), "curve": curve}


def curves(config: Config, results: _frame.Results):
    """Robust accuracy over the epochs."""
    epochs = WINDOW * (1 + np.arange(config.epochs // WINDOW))
    measured = {rule: (epochs, results[rule]["curve"].T) for rule in RULES}
    labels = ("epoch", "accuracy under PGD-20, mean of five epochs")
    return plotting.spread_curve(measured, labels=labels, xscale="linear")


STUDY = _frame.Study(
    measure=measure, config=Config(),
    tiny=Config(model="mlp", epochs=5, train_steps=1, batch_size=512),
    numbers=[
        _frame.Column("robust accuracy", "PGD-20, last 5 epochs"),
        _frame.Column("epochs", "epochs to the target", ".1f"),
    ],
    claims=(
        _frame.Claim(
            "AccelAT", "Nikfam et al. 2022, IEEE Access 10", None, ("training.accelat",),
            "About the same robustness in fewer epochs.",
            (
                _frame.Bar("robust accuracy", "accelat", ">=", "constant", by=0.02),
                _frame.Bar("epochs", "accelat", "<", "constant"),
            ),
        ),
    ),
    figure=curves,
)  # fmt: skip

if __name__ == "__main__":
    _frame.main(STUDY, __doc__)
