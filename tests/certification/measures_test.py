"""Gaussian smoothing: its radius in float64, its noise, its lattice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from robustjax import certification


def test_radius_is_sigma_times_the_quantile():
    probability = np.array([0.0, 0.3, 0.5, 0.6, 0.99, 1 - 1e-12])
    expected = [0, 0, 0, *(0.25 * stats.norm.ppf(probability[3:]))]
    np.testing.assert_allclose(certification.gaussian(0.25).radius(probability), expected, rtol=1e-9)


def test_noise_is_gaussian_in_float32_whatever_the_input():
    x = jnp.full((100, 100), 0.5, jnp.bfloat16)
    noisy = certification.gaussian(0.25).sample(jax.random.key(0), x)
    assert noisy.dtype == jnp.float32
    assert stats.kstest((np.asarray(noisy).ravel() - 0.5) / 0.25, "norm").pvalue > 0.01
    assert np.unique(np.asarray(noisy)).size > 9_000  # bfloat16 noise would repeat itself


def test_equal_settings_are_one_value():
    assert certification.gaussian(0.5) == certification.gaussian(sigma=0.5)
    assert hash(certification.gaussian(0.5)) == hash(certification.gaussian(sigma=0.5))
    assert certification.gaussian(0.5) != certification.gaussian(0.5, grid=1 / 4080)


def test_on_the_lattice_noise_does_not_depend_on_the_image():
    measure, key = certification.gaussian(0.5, grid=1 / 4080), jax.random.key(1)
    grey = np.random.default_rng(0).integers(0, 256, (2, 64, 64))
    steps = [np.asarray(measure.sample(key, jnp.asarray(g / 255, jnp.float32))) * 4080 for g in grey]
    whole = [np.rint(s).astype(int) for s in steps]
    np.testing.assert_allclose(steps[0], whole[0], atol=2e-3)
    np.testing.assert_array_equal(whole[0] - 16 * grey[0], whole[1] - 16 * grey[1])
    assert stats.kstest((whole[0] - 16 * grey[0]).ravel() / 4080 / 0.5, "norm").pvalue > 0.01
    # Plain float32 addition does leave a trace of the image, which is what the lattice is for.
    plain = [np.asarray(certification.gaussian(0.5).sample(key, jnp.asarray(g / 255, jnp.float32))) for g in grey]
    exact = [p.astype(np.float64) - np.float32(g / 255).astype(np.float64) for p, g in zip(plain, grey)]
    assert (exact[0] != exact[1]).any()


@given(st.one_of(st.floats(max_value=0), st.just(float("inf")), st.just(float("nan"))))
def test_sigma_must_be_positive_and_finite(sigma):
    with pytest.raises(ValueError, match="sigma must be positive and finite, got"):
        certification.gaussian(sigma)


@pytest.mark.parametrize("grid", [0.0, -1.0, 0.6, 1e-8])
def test_grid_must_be_positive_and_resolved(grid):
    with pytest.raises(ValueError, match="grid must .*, got"):
        certification.gaussian(0.5, grid=grid)


def test_the_lattice_does_not_hide_what_is_not_finite():
    x = jnp.array([0.5, jnp.nan, jnp.inf], jnp.float32)
    np.testing.assert_array_equal(
        jnp.isfinite(certification.gaussian(0.5, grid=1 / 4080).sample(jax.random.key(0), x)), [True, False, False]
    )
