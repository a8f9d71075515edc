import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import detectors
from robustjax import models


def linear(kernel, x):
    return jnp.matmul(x.reshape(x.shape[0], -1), kernel, precision="highest")


def test_the_attack_is_one_signed_step_within_the_images():
    images = np.array([[0.5, 0.02, 0.99, 0.5], [0.5, 0.5, 0.5, 0.5]], np.float32)[..., None, None]
    kernel = np.array([[1, -1], [1, -1], [-1, 1], [0, 0]], np.float32)
    attacked = detectors.fast_gradient_sign(jax.tree_util.Partial(linear, kernel), images, np.array([0, 1], np.int32))
    want = [[0.45, 0, 1, 0.5], [0.55, 0.55, 0.45, 0.5]]  # towards the other class; no gradient, no step
    np.testing.assert_allclose(attacked[..., 0, 0], want, atol=1e-6)


def test_the_last_layer_is_the_features():
    made = models.create("cnn", jax.random.key(0), dtype=jnp.float32, image_shape=(8, 8, 1), num_classes=3)
    functional, x = models.functional(made), jax.random.uniform(jax.random.key(1), (2, 8, 8, 1))
    both = lambda state, x: (detectors.layers_of(functional.activations)(state, x), functional.outputs(state, x))
    layers, outputs = jax.jit(both)(functional.state, x)
    assert list(layers) == ["body/conv1", "body/conv2", "body/dense"]
    np.testing.assert_allclose(layers["body/dense"], outputs.features, rtol=1e-5)


def test_layers_are_blocks_without_their_parts():
    blocks = [f"body/blocks/{i}" for i in range(2)]
    parts = [
        "body",
        "body/stem",
        "body/blocks/0/convs/0",
        "body/blocks/1/shortcut",
        "body/blocks/1/shortcut/conv",
        "head",
    ]
    layers_fn = detectors.layers_of(lambda state, x: dict.fromkeys((*parts, *blocks, "body/norm"), x))
    layers = layers_fn((), jnp.array([[-1.0, 2.0]]))
    assert list(layers) == [*blocks, "body/norm"]
    np.testing.assert_array_equal(layers["body/norm"], [[0, 2]])
