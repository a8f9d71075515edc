"""The pre-training of rRCM beside its equations, and what becomes of its state."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from robustjax import losses, training
from robustjax.typing import Batch, ModelState, Outputs

RNG = np.random.default_rng(0)
X = RNG.uniform(size=(6, 2, 2, 3)).astype(np.float32)
BATCH = Batch(jnp.asarray(X), jnp.zeros(6, jnp.int32), jnp.arange(6))
KEY = jax.random.key(4)
MODEL = ModelState({"kernel": jnp.asarray(RNG.normal(size=(12, 5)), jnp.float32)}, {"calls": jnp.zeros(())})


def apply(state, x, *, train=False):
    features = jnp.tanh(x.reshape(x.shape[0], -1) @ state.params["kernel"])
    return Outputs(features[:, :2], features), state._replace(batch_stats={"calls": state.batch_stats["calls"] + 1})


@pytest.fixture(scope="module")
def start():
    """A state whose moving average is not where its weights are."""
    state = losses.rrcm.pretraining_state(KEY, MODEL, num_features=5, width=7, dim=4)
    target = jax.tree.map(lambda a: jnp.asarray(RNG.normal(size=a.shape), jnp.float32), state.params)
    return ModelState(state.params, {**state.batch_stats, "target": target})


def test_levels_are_those_of_karras():
    levels = losses.rrcm.noise_levels(20)
    assert levels.shape == (20,)
    assert (np.diff(levels) < 0).all()
    np.testing.assert_allclose(levels[[0, -1]], [80, 0.002], rtol=1e-12)
    assert levels[7] == pytest.approx((80 ** (1 / 7) + 7 / 19 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7)
    np.testing.assert_allclose(losses.rrcm.noise_levels(2, smallest=0.1, largest=3.0), [3, 0.1])


def test_info_nce_is_its_equation():
    queries, keys = RNG.normal(size=(6, 4)), RNG.normal(size=(6, 4))
    cosine = np.asarray([[q @ k / np.linalg.norm(q) / np.linalg.norm(k) for k in keys] for q in queries])
    expected = -np.diagonal(special.log_softmax(cosine / 0.3, -1))

    @jax.jit
    def nce(queries, keys):
        values, pull = jax.vjp(lambda queries: losses.info_nce(queries, keys, temperature=0.3), queries)
        return values, pull(jnp.ones_like(values))[0]

    found, _ = nce(np.float32(queries), np.float32(1e3 * keys))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    zeros = np.zeros((6, 4), np.float32)
    found, gradient = nce(zeros, zeros)
    np.testing.assert_allclose(found, np.log(6), rtol=1e-6)
    assert np.isfinite(gradient).all()
    # Rows shorter than 1e-6 are divided by that.
    short = np.float32(1e-7 * queries / np.linalg.norm(queries, axis=-1, keepdims=True))
    expected = -np.diagonal(special.log_softmax(0.1 * cosine / 0.3, -1))
    np.testing.assert_allclose(nce(short, np.float32(keys))[0], expected, rtol=1e-5)


def test_projections_begin_with_the_variance_of_he():
    params = losses.rrcm.pretraining_state(KEY, MODEL, num_features=50, width=200, dim=30).params
    for name in ("contrast", "consistency"):
        for layer, inputs in (("hidden", 50), ("out", 200)):
            assert params[name][layer].std() == pytest.approx(np.sqrt(2 / inputs), rel=0.05)  # of 6,000 numbers or more


def test_what_the_network_sees_has_one_size_at_all_levels():
    x = 0.5 + RNG.choice([-0.25, 0.25], (3, 100, 100, 1))  # in [-1, 1] of standard deviation 1/2, as assumed
    t = np.asarray([0.002, 1.0, 50.0])
    noisy = x + t.reshape(3, 1, 1, 1) / 2 * RNG.normal(size=x.shape)
    seen = losses.rrcm.precondition(jnp.asarray(noisy, jnp.float32), jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(2 * np.std(seen, axis=(1, 2, 3)), 1, rtol=0.03)
    np.testing.assert_allclose(np.asarray(seen)[1], 0.5 + (noisy[1] - 0.5) / np.sqrt(1.25), rtol=1e-5, atol=1e-6)
    model = losses.rrcm.preconditioned(lambda state, x, scale: scale * x, 0.5)
    assert model == dataclasses.replace(model)
    assert hash(model) == hash(dataclasses.replace(model))
    np.testing.assert_allclose(model(MODEL, jnp.asarray(noisy[1:2], jnp.float32), scale=2.0)[0], 2 * seen[1], rtol=1e-5)


def brighten(key, images):
    return images + jax.random.uniform(key, (images.shape[0], 1, 1, 1))


def test_pretraining_is_its_equation(start):
    objective = losses.rrcm.consistency_pretraining(
        augment=brighten, num_levels=5, largest=2.0, temperature=0.3, decay=0.8
    )
    loss, aux = jax.jit(lambda start: objective(KEY, apply, start, BATCH))(start)
    keys = jax.random.split(KEY, 4)
    a, b = (np.asarray(brighten(key, BATCH.image), np.float64) for key in keys[:2])
    noise = np.asarray(jax.random.normal(keys[2], X.shape), np.float64)
    index = np.asarray(jax.random.randint(keys[3], (6,), 0, 4))
    t = losses.rrcm.noise_levels(5, largest=2.0)
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), start.params)
    target = jax.tree.map(lambda mean, new: 0.8 * np.asarray(mean) + 0.2 * new, start.batch_stats["target"], params)

    def projected(weights, name, x, level):
        level = np.broadcast_to(level, 6).reshape(6, 1, 1, 1)
        noisy = (2 * x - 1 + level * noise) / np.sqrt(level**2 + 0.25)  # in [-1, 1], as the paper has it
        features = np.tanh(((noisy + 1) / 2).reshape(6, -1) @ weights["model"]["kernel"])
        return np.maximum(features @ weights[name]["hidden"] + weights[name]["bias"], 0) @ weights[name]["out"]

    def nce(queries, others):
        queries, others = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (queries, others))
        return -np.diagonal(special.log_softmax(queries @ others.T / 0.3, -1)).mean()

    contrast = nce(projected(params, "contrast", a, t[-1]), projected(target, "contrast", b, t[-1]))
    contrast += nce(projected(params, "contrast", b, t[-1]), projected(target, "contrast", a, t[-1]))
    consistency = nce(projected(params, "consistency", a, t[index]), projected(params, "consistency", a, t[index + 1]))
    assert float(aux.metrics["contrast"]) == pytest.approx(contrast, rel=1e-4)
    assert float(aux.metrics["consistency"]) == pytest.approx(consistency, rel=1e-4)
    assert float(loss) == pytest.approx(contrast + consistency, rel=1e-4)
    for found, expected in zip(jax.tree.leaves(aux.state.batch_stats["target"]), jax.tree.leaves(target), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert aux.state.batch_stats["model"]["calls"] == 1  # of the weights of training, once


def test_gradients_flow_through_the_noisier_side_alone(start):
    """Of the consistency projection, beside the same with keys that are constants."""
    objective = losses.rrcm.consistency_pretraining(num_levels=5, largest=2.0)
    value = lambda out: objective(KEY, apply, with_out(start, out), BATCH)[0]
    out = start.params["consistency"]["out"]
    keys, t = jax.random.split(KEY, 4), jnp.asarray(losses.rrcm.noise_levels(5, largest=2.0), jnp.float32)
    noise, index = jax.random.normal(keys[2], X.shape) / 2, jax.random.randint(keys[3], (6,), 0, 4)

    def hidden(level):
        noisy = losses.rrcm.precondition(BATCH.image + level.reshape(6, 1, 1, 1) * noise, level)
        features = apply(ModelState(start.params["model"], {"calls": 0}), noisy)[0].features
        return jax.nn.relu(features @ start.params["consistency"]["hidden"] + start.params["consistency"]["bias"])

    @jax.jit
    def gradients(out):
        noisier, cleaner = hidden(t[index]), hidden(t[index + 1])
        of_constant = lambda moving: losses.info_nce(noisier @ moving, cleaner @ out).mean()
        of_free = lambda moving: losses.info_nce(noisier @ moving, cleaner @ moving).mean()
        return [jax.grad(loss)(out) for loss in (value, of_constant, of_free)]

    found, constant, free = map(np.asarray, gradients(out))
    assert np.abs(constant - free).max() > 0.01 * np.abs(constant).max()
    np.testing.assert_allclose(found, constant, rtol=1e-3, atol=1e-6)


def with_out(state, out):
    return state._replace(params={**state.params, "consistency": {**state.params["consistency"], "out": out}})


def test_training_makes_features_agree_along_the_path():
    """Two patterns under noise; the model that comes out is of the shape of the one that went in."""
    objective, optimizer = losses.rrcm.consistency_pretraining(largest=1.0, num_levels=4), optax.adam(0.01)
    state = losses.rrcm.pretraining_state(KEY, MODEL, num_features=5, width=16, dim=8)
    step, trained = training.make_step(objective, optimizer), training.init(KEY, state, optimizer)
    history = []
    for _ in range(60):
        trained, metrics = step(apply, trained, BATCH)
        history.append(float(metrics["loss"]))
    assert np.mean(history[-20:]) < 0.9 * np.mean(history[:20])
    model = losses.rrcm.pretrained_model(trained.model)
    assert jax.tree.structure(model) == jax.tree.structure(MODEL)
    assert np.abs(model.params["kernel"] - MODEL.params["kernel"]).max() > 0.1
    apart = jax.tree.map(
        lambda mean, new: jnp.abs(mean - new).max(), trained.model.batch_stats["target"], trained.model.params
    )
    assert 0 < apart["model"]["kernel"] < 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: losses.rrcm.consistency_pretraining(num_levels=1),
            "num_levels must be .* at least 2, got 1",
        ),
        (lambda: losses.rrcm.consistency_pretraining(smallest=80.0), "largest must be above smallest=80.0, got 80.0"),
        (
            lambda: losses.rrcm.consistency_pretraining(temperature=0.0),
            "temperature must be positive and finite, got 0.0",
        ),
        (lambda: losses.rrcm.consistency_pretraining(decay=1.5), "decay must be at most 1, got 1.5"),
        (lambda: losses.rrcm.consistency_pretraining()(KEY, apply, MODEL, BATCH), r"hold 'target', got \['calls'\]"),
        (lambda: losses.info_nce(jnp.zeros((2, 3)), jnp.zeros((3, 3))), r"one shape, got \(2, 3\) and \(3, 3\)"),
        (lambda: losses.rrcm.preconditioned(apply, 0.0), "sigma must be positive and finite, got 0.0"),
        (
            lambda: losses.rrcm.pretraining_state(KEY, MODEL, num_features=0),
            "num_features must be .* at least 1, got 0",
        ),
        (lambda: losses.rrcm.pretraining_state(KEY, MODEL, num_features=5, dim=0), "dim must be .* at least 1, got 0"),
    ],
)
def test_bad_input_is_named(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call()
