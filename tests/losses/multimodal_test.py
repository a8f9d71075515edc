"""The two steps of CRMT beside their equations, and what each of them moves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robustjax import losses, models, training
from robustjax.certification import multimodal
from robustjax.typing import Batch

RNG = np.random.default_rng(0)
LABELS = jnp.asarray(np.arange(30, dtype=np.int32) % 3)
# The class is written in either half.
IMAGES = RNG.uniform(0, 0.3, (30, 3, 4, 1))
IMAGES[np.arange(30), np.asarray(LABELS), 0] += 0.6
IMAGES[np.arange(30), np.asarray(LABELS), 3] += 0.4
BATCH = Batch(jnp.asarray(IMAGES.astype(np.float32)), LABELS, jnp.asarray(np.arange(30)))


@functools.cache
def model():
    return models.functional(models.multimodal(jax.random.key(0), hidden=8, image_shape=(3, 4, 1), num_classes=3))


@functools.cache
def constants():
    return tuple((float(c),) * 3 for c in multimodal.lipschitz_constants(model().state.params["kernel"]))


def test_the_margin_is_its_equation():
    scores, labels = RNG.normal(size=(7, 2, 4)), RNG.integers(0, 4, 7)
    for i, found in enumerate(np.asarray(jax.jit(losses.unimodal_margin)(np.float32(scores), labels))):
        terms = [
            np.exp(scores[i, m, k] - scores[i, m, labels[i]]) for m in range(2) for k in range(4) if k != labels[i]
        ]
        assert float(found) == pytest.approx(np.log(sum(terms) + 1e-5), rel=1e-5)


def test_the_margin_is_finite_for_certain_answers():
    margin = jax.jit(jax.value_and_grad(lambda s: losses.unimodal_margin(s, jnp.zeros(1, jnp.int32)).sum()))
    for certain in (1e4, -1e4):
        value, gradient = margin(np.float32([[[certain, 0, 0]] * 2]))
        assert np.isfinite(gradient).all()
        assert float(value) == pytest.approx(np.log(1e-5) if certain > 0 else 1e4 + np.log(4), rel=1e-5)


def test_the_first_step_is_its_equation():
    objective = losses.multimodal_margin(rho=0.7)

    @jax.jit
    def program(state):
        outputs = model().outputs(state, BATCH.image)
        margin = losses.unimodal_margin(outputs.features.reshape(30, 2, 3), LABELS).mean()
        cross_entropy = losses.cross_entropy(outputs.logits, LABELS).mean()
        accuracy = (outputs.logits.argmax(-1) == LABELS).mean()
        return objective(jax.random.key(1), model().apply, state, BATCH), margin, cross_entropy, accuracy

    (loss, aux), margin, cross_entropy, accuracy = program(model().state)
    assert float(aux.metrics["accuracy"]) == pytest.approx(float(accuracy))
    assert accuracy != 0.5
    assert float(loss) == pytest.approx(float(cross_entropy + 0.7 * margin), rel=1e-5)
    assert float(aux.metrics["unimodal_margin"]) == pytest.approx(float(margin), rel=1e-5)


def test_the_second_step_is_the_radius_and_moves_the_weights_alone():
    objective = losses.multimodal_radius(constants=constants())
    of_params = lambda p: objective(jax.random.key(1), model().apply, model().state._replace(params=p), BATCH)
    (loss, aux), gradient = jax.jit(jax.value_and_grad(of_params, has_aux=True))(model().state.params)
    params = model().state.params
    outputs = model().outputs(model().state, BATCH.image)
    scores = outputs.features.reshape(30, 2, 3)
    radius = multimodal.radius(scores, params["weights"], params["bias"], np.asarray(constants()), labels=LABELS)
    assert float(loss) == pytest.approx(-float(radius.mean()), rel=1e-4)
    assert float(aux.metrics["radius"]) == -float(loss)
    assert float(aux.metrics["accuracy"]) == pytest.approx(float((outputs.logits.argmax(-1) == LABELS).mean()))
    moved = {name for name, value in gradient.items() if float(jnp.abs(value).max()) > 0}
    assert moved == {"weights"}


def fit(state, objective, optimizer, steps):
    step, state = training.make_step(objective, optimizer), training.init(jax.random.key(2), state, optimizer)
    for _ in range(steps):
        state, metrics = step(model().apply, state, BATCH)
    return state.model, metrics


def test_training_makes_each_half_right_and_then_the_radius_larger():
    first, metrics = fit(model().state, losses.multimodal_margin(rho=2.0), optax.adam(0.02), 120)
    assert float(metrics["accuracy"]) > 0.95
    scores = model().outputs(first, BATCH.image).features.reshape(30, 2, 3)
    for m in range(2):
        assert (scores[:, m].argmax(-1) == LABELS).mean() > 0.8
    constants = multimodal.lipschitz_constants(first.params["kernel"])
    objective = losses.multimodal_radius(constants=tuple((float(c),) * 3 for c in constants))
    only = optax.masked(optax.adam(0.02), {name: name == "weights" for name in first.params})
    second, _ = fit(first, objective, only, 60)

    def mean_radius(state):
        scores = model().outputs(state, BATCH.image).features.reshape(30, 2, 3)
        return float(
            multimodal.radius(scores, state.params["weights"], state.params["bias"], constants, labels=LABELS).mean()
        )

    assert mean_radius(second) > 1.05 * mean_radius(first)
    for name, value in first.params.items():
        assert (name == "weights") != bool((value == second.params[name]).all())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: losses.multimodal_margin(rho=-1.0), "rho must be at least 0 and finite, got -1.0"),
        (lambda: losses.multimodal_margin(num_modalities=0), "num_modalities must be an integer of at least 1, got 0"),
        (lambda: losses.multimodal_radius(constants=((1.0, -1.0),)), "constants must be at least 0"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
