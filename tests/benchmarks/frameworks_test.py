"""The same weights in each framework are the same network."""

import jax.numpy as jnp
import numpy as np

from benchmarks import frameworks


def test_each_framework_computes_the_same_logits():
    rng, shapes = np.random.default_rng(0), {"kernel0": (64, 64), "bias0": 64, "kernel1": (64, 10), "bias1": 10}
    w = {name: rng.normal(size=shape).astype(np.float32) / 8 for name, shape in shapes.items()}
    x = jnp.asarray(rng.random((3, 8, 8, 1), np.float32))
    wanted = frameworks.model_of("function", w)(x)
    for name in ("robustjax", "nnx", "linen", "equinox", "haiku"):  # PyTorch is in tests/models
        np.testing.assert_allclose(frameworks.model_of(name, w)(x), wanted, rtol=1e-5, atol=1e-5, err_msg=name)
