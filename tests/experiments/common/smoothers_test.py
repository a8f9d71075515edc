import jax
import numpy as np

from experiments.common import classifiers, smoothers
from robustjax import certification, data


def test_each_half_sees_its_own_pixels_alone():
    functional = classifiers.build("mlp", data.load("digits", "test"), dtype="float32", key=jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (2, 8, 8, 1))
    mask = certification.checkerboard(8, 8)[None, :, :, None]
    for half, seen in zip(smoothers.halves_of(functional), (mask, ~mask), strict=True):
        logits = half.outputs(functional.state, x).logits
        np.testing.assert_array_equal(logits, half.outputs(functional.state, jax.numpy.where(seen, x, 7.0)).logits)
        np.testing.assert_array_equal(
            logits, functional.outputs(functional.state, jax.numpy.where(seen, x, 0.0)).logits
        )
