"""The model of several views beside its equation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from robustjax import models

X = np.random.default_rng(0).uniform(size=(5, 3, 4, 2)).astype(np.float32)


@pytest.mark.parametrize(("hidden", "modalities"), [(None, 2), (7, 1), (7, 4)])
def test_logits_are_their_equation(hidden, modalities):
    settings = {"hidden": hidden, "num_modalities": modalities, "image_shape": (3, 4, 2), "num_classes": 3}
    functional = models.functional(models.multimodal(jax.random.key(0), **settings))
    p = jax.tree.map(lambda a: np.asarray(a, np.float64) + 0.01, functional.state.params)
    state = functional.state._replace(params=jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), p))
    logits, wide = np.zeros((5, 3)) + p["bias"], 4 // modalities
    scores = np.zeros((5, modalities, 3))
    for m in range(modalities):
        phi = X[:, :, wide * m : wide * (m + 1)].reshape(5, -1)
        if hidden is not None:
            phi = np.maximum(phi @ p["kernel"][m] + p["hidden_bias"][m], 0)
        for k in range(3):
            row = p["rows"][m, k] - p["rows"][m, k].mean()
            scores[:, m, k] = phi @ row / np.linalg.norm(row)
        logits += p["weights"][m] * scores[:, m]
    outputs = jax.jit(functional.outputs)(state, jnp.asarray(X))
    np.testing.assert_allclose(outputs.logits, logits, atol=1e-5)
    np.testing.assert_allclose(outputs.features, scores.reshape(5, -1), atol=1e-5)


def test_parameters_have_the_names_that_are_told():
    state = models.functional(models.multimodal(jax.random.key(0), image_shape=(4, 4, 1), hidden=6)).state
    shapes = {name: value.shape for name, value in state.params.items()}
    assert shapes == {
        "kernel": (2, 8, 6), "hidden_bias": (2, 6), "rows": (2, 10, 6), "weights": (2, 10), "bias": (10,),
    }  # fmt: skip
    assert float(jnp.abs(state.params["kernel"]).max()) <= 1 / np.sqrt(8)
    assert float(jnp.abs(state.params["kernel"]).max()) > 0.9 / np.sqrt(8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_modalities": 3}, "num_modalities must divide the width 4 of the images, got 3"),
        ({"hidden": 1}, "hidden must be an integer of at least 2, got 1"),
        ({"image_shape": (4, 4)}, r"image_shape must be a positive \(height, width, channels\), got \(4, 4\)"),
        ({"num_classes": 0}, "num_classes must be an integer of at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(settings, message, unchecked):
    with pytest.raises(ValueError, match=message):
        models.multimodal(jax.random.key(0), **{"image_shape": (4, 4, 1)} | settings)


def test_images_of_another_shape_are_named():
    model = models.functional(nnx.eval_shape(lambda: models.multimodal(jax.random.key(0), image_shape=(4, 4, 1))))
    with pytest.raises(ValueError, match=r"x must be floating point of shape \(batch, 4, 4, 1\), got float32 of"):
        jax.eval_shape(model.outputs, model.state, jnp.zeros((2, 4, 6, 1)))
