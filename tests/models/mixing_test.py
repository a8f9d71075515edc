"""The mixing network beside its equation, at inference and in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import models

RNG = np.random.default_rng(0)
Z = RNG.normal(3, 5, (64, 7)).astype(np.float32)


@pytest.fixture(scope="module")
def network():
    return models.functional(models.mixing_network(jax.random.key(0), num_inputs=7, hidden=(6, 5)))


def by_hand(params, z, mean, variance):
    """Before the second normalisation, in float64."""
    features = (z - mean) / np.sqrt(variance + 1e-5)
    for layer in ("0", "1"):
        weights = params["dense"][layer]
        features = np.maximum(features @ np.asarray(weights["kernel"], np.float64) + np.asarray(weights["bias"]), 0)
    return features, features @ np.asarray(params["head"]["kernel"], np.float64)


def test_inference_is_its_equation(network):
    moved = {
        "input_norm": {"mean": jnp.asarray(Z.mean(0)), "var": jnp.asarray(Z.var(0))},
        "gamma_norm": {"mean": jnp.asarray([0.3]), "var": jnp.asarray([2.0])},
    }
    state = network.state._replace(batch_stats=moved)
    outputs = jax.jit(network.outputs)(state, jnp.asarray(Z))
    features, gamma = by_hand(state.params, Z, Z.mean(0), Z.var(0))
    np.testing.assert_allclose(outputs.features, features, atol=1e-4)
    np.testing.assert_allclose(outputs.logits, 2 * (gamma - 0.3) / np.sqrt(2 + 1e-5) + 1.3, atol=1e-4)


def test_training_clips_to_six_tenths_of_a_deviation(network):
    outputs, state = jax.jit(network.apply, static_argnames="train")(network.state, jnp.asarray(Z), train=True)
    _, gamma = by_hand(network.state.params, Z, Z.mean(0), Z.var(0))
    clipped = np.clip(gamma, gamma.mean() - 0.6 * gamma.std(), gamma.mean() + 0.6 * gamma.std())
    assert (clipped != gamma).mean() > 0.3
    expected = 2 * (clipped - clipped.mean()) / np.sqrt(clipped.var() + 1e-5) + 0.4
    np.testing.assert_allclose(outputs.logits, expected, atol=1e-3)
    np.testing.assert_allclose(state.batch_stats["input_norm"]["mean"], 0.1 * Z.mean(0), rtol=1e-4)
    np.testing.assert_allclose(state.batch_stats["gamma_norm"]["mean"], 0.1 * clipped.mean(0), atol=1e-5)
    assert set(state.batch_stats["gamma_norm"]) == {"mean", "var"}  # without parameters
    assert set(network.state.params) == {"dense", "head"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_inputs": 0}, "num_inputs must be an integer of at least 1, got 0"),
        ({"hidden": ()}, r"hidden must be one or more positive widths, got \(\)"),
        ({"hidden": (3, 0)}, r"hidden must be one or more positive widths, got \(3, 0\)"),
        ({"scale": 0.0}, "scale must be positive and finite, got 0.0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        models.mixing_network(jax.random.key(0), **{"num_inputs": 7} | settings)
