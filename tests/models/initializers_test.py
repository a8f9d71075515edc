import jax
import numpy as np
import pytest
from flax import nnx

from robustjax.models import _initializers


@pytest.mark.parametrize(
    ("mode", "distribution", "shape", "stacked"),
    [
        ("fan_out", "normal", (3, 3, 2, 5), False),  # of residual networks
        ("fan_in", "uniform", (3, 7), False),  # of all others
        ("fan_in", "uniform", (2, 3, 7), True),  # of several modalities
        ("fan_in", "truncated_normal", (3, 7), False),  # Flax's own
    ],
)
def test_parameters_are_those_of_flax_bit_for_bit(mode, distribution, shape, stacked):
    ours = _initializers.variance_scaling(1.7, mode, distribution, stacked=stacked)
    flax = nnx.initializers.variance_scaling(1.7, mode, distribution, batch_axis=(0,) if stacked else ())
    key = jax.random.key(3)
    drawn, wanted = np.asarray(ours(key, shape)), np.asarray(flax(key, shape, np.float32))
    if distribution == "normal":
        # JAX 0.12 has another order of the products in an initializer, which rounds otherwise; ours keeps the old one.
        np.testing.assert_allclose(drawn, wanted, rtol=3e-7)
        wanted = np.asarray(jax.random.normal(key, shape)) * np.sqrt(np.float32(1.7 / (3 * 3 * 5)))
    np.testing.assert_array_equal(drawn, wanted)
    assert np.ptp(drawn) > 0
