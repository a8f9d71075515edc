"""The objective of a mixing network and the loss of its adversary, beside their equations; what each of them is for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from robustjax import attacks, losses, models, training
from robustjax.certification import mixing
from robustjax.typing import Batch, ModelState, Outputs

RNG = np.random.default_rng(0)
KEY = jax.random.key(7)
LOGITS = RNG.normal(size=(6, 4)).astype(np.float32) * 3
LABELS = np.array([0, 1, 2, 3, 0, 1])


def bce(gamma, s):
    return np.logaddexp(0, gamma) - s * gamma


def linear(state, x, *, train=False):
    """A model without features of its own."""
    features = x.reshape(x.shape[0], -1)
    return Outputs(features @ state.params["weights"], features), state


@pytest.fixture(scope="module")
def whole():
    image = jnp.asarray(RNG.uniform(0.4, 0.5, (64, 2, 2, 1)), jnp.float32)
    states = [ModelState({"weights": jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)}, {}) for _ in range(2)]
    network = models.functional(models.mixing_network(jax.random.key(0), num_inputs=14, hidden=(8,)))
    mixture = mixing.mixture(standard=linear, robust=linear, network=network.apply)
    batch = Batch(image, jnp.asarray(RNG.integers(0, 3, 64)), jnp.arange(64))
    return mixture, mixture.init(*states, network.state), batch


@dataclasses.dataclass(frozen=True)
class Marked:
    """What is attacked is a little brighter in one pixel."""

    def __call__(self, key, logits_fn, x, labels):
        return x.at[:, 0, 1].add(0.2)


def test_the_adversary_raises_its_equation():
    gamma = special.logsumexp(LOGITS, -1)
    ce = -special.log_softmax(LOGITS, -1)[np.arange(6), LABELS]
    found = jax.jit(losses.adaptive_cross_entropy(weight=0.3))(LOGITS, LABELS)
    np.testing.assert_allclose(found, 0.7 * ce + 0.3 * bce(gamma, 1), rtol=1e-5)
    alone = jax.jit(losses.adaptive_cross_entropy(weight=0.0))(LOGITS, LABELS)
    np.testing.assert_allclose(alone, ce, rtol=1e-5)


def test_the_objective_is_its_equation():
    def apply(state, x, *, train=False):
        assert train
        return Outputs(x.reshape(12, 4), x), state

    both = RNG.normal(size=(12, 2, 2, 1)).astype(np.float32) * 3
    examples = losses.adversarial.Examples(jnp.asarray(both[:6]), jnp.asarray(both[6:]), jnp.asarray(LABELS))
    objective = losses.mixing_training(attack=attacks.fgsm(epsilon=0.1), classes=0.7)
    loss, aux = jax.jit(lambda examples: objective.loss(apply, ModelState({}, {}), examples))(examples)
    logits, s = both.reshape(12, 4), np.repeat([0, 1], 6)
    gamma, ce = special.logsumexp(logits, -1), -special.log_softmax(logits, -1)[np.arange(12), np.tile(LABELS, 2)]
    b = bce(gamma, s)
    assert float(loss) == pytest.approx((1.5 * b + 0.7 * ce + 0.3 * b * ce).mean(), rel=1e-5)
    right = logits.argmax(-1) == np.tile(LABELS, 2)
    metrics = {name: float(value) for name, value in aux.metrics.items()}
    assert metrics["accuracy"] == pytest.approx(right[:6].mean())
    assert metrics["robust_accuracy"] == pytest.approx(right[6:].mean())
    assert metrics["told_apart"] == pytest.approx(((gamma > 0) == (s > 0)).mean())


def test_each_perturbation_is_shortened_or_stretched(whole):
    mixture, state, batch = whole
    run = jax.jit(lambda batch: losses.mixing_training(attack=Marked()).examples(KEY, mixture, state, batch))
    examples = run(batch)
    change = np.asarray(examples.adversarial - batch.image).reshape(64, 4)
    np.testing.assert_array_equal(change[:, [0, 2, 3]], 0)
    assert 0.08 - 1e-6 <= change[:, 1].min() < 0.1
    assert 0.2 < change[:, 1].max() <= 0.22 + 1e-6
    bright = batch._replace(image=batch.image + 0.45)
    examples = run(bright)
    assert float(examples.adversarial.max()) == 1.0


def test_training_tells_apart_and_moves_the_network_alone(whole):
    mixture, before, batch = whole
    optimizer = optax.adam(0.02)
    step = training.make_step(losses.mixing_training(attack=Marked()), optimizer)
    run = training.init(KEY, before, optimizer)
    told_apart = []
    for _ in range(30):
        run, metrics = step(mixture, run, batch)
        told_apart.append(float(metrics["told_apart"]))
    assert told_apart[0] < 0.6
    assert min(told_apart[-3:]) > 0.85
    for name in ("standard", "robust"):
        jax.tree.map(np.testing.assert_array_equal, run.model.batch_stats[name], before.batch_stats[name])
    assert not np.array_equal(run.model.params["head"]["kernel"], before.params["head"]["kernel"])
    ask = jax.jit(lambda images: mixture(run.model, images)[0].logits)
    told = [special.logsumexp(ask(images), -1) for images in (batch.image, Marked()(KEY, None, batch.image, None))]
    assert (told[1] > told[0]).mean() > 0.9  # at inference too


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: losses.adaptive_cross_entropy(weight=1.5), r"weight must lie in \[0, 1\], got 1.5"),
        (lambda: losses.mixing_training(attack=attacks.fgsm(epsilon=1), binary=-1), "binary must be at least 0"),
        (lambda: losses.mixing_training(attack=len, factors=(1.0, 0.5)), r"factors must be .*got \(1.0, 0.5\)"),
    ],
)
def test_bad_settings_are_named(make, message, unchecked):
    with pytest.raises(ValueError, match=message):
        make()
