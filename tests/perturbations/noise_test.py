import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import perturbations


def test_noise_is_standard_normal_times_sigma():
    n, sigma = 200_000, 0.25
    x = jnp.full((n // 100, 10, 10, 1), 0.5)
    noise = np.asarray(perturbations.gaussian_noise(jax.random.key(0), x, sigma=sigma) - x, np.float64).ravel()
    # Mean and variance of n Gaussians have standard errors sigma / sqrt(n) and sigma^2 sqrt(2 / n); 4 of them.
    assert abs(noise.mean()) < 4 * sigma / np.sqrt(n)
    assert abs(noise.var() - sigma**2) < 4 * sigma**2 * np.sqrt(2 / n)
    # Kolmogorov's distance exceeds 2 / sqrt(n) with probability 0.0007.
    from scipy import stats

    assert stats.kstest(noise / sigma, "norm").statistic < 2 / np.sqrt(n)


def test_noise_leaves_the_image_range():
    noisy = perturbations.gaussian_noise(jax.random.key(0), jnp.zeros((4, 8, 8, 1)), sigma=1.0)
    assert noisy.min() < -1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_noise_is_drawn_and_added_in_float32(dtype):
    x = jnp.linspace(0, 1, 64).reshape(1, 8, 8, 1).astype(dtype)
    noisy = perturbations.gaussian_noise(jax.random.key(3), x, sigma=0.5)
    want = perturbations.gaussian_noise(jax.random.key(3), x.astype(jnp.float32), sigma=0.5)
    assert noisy.dtype == jnp.float32
    assert (noisy == want).all()


def test_noise_is_the_same_under_jit_with_a_traced_sigma():
    x = jnp.ones((2, 4, 4, 3))
    jitted = jax.jit(lambda key, sigma: perturbations.gaussian_noise(key, x, sigma=sigma))
    eager = perturbations.gaussian_noise(jax.random.key(1), x, sigma=0.5)
    np.testing.assert_allclose(jitted(jax.random.key(1), 0.5), eager, atol=1e-6)  # jit may fuse to a multiply-add


@pytest.mark.parametrize("sigma", [-0.25, 0.0, float("inf"), float("nan")])
def test_bad_sigma(sigma):
    with pytest.raises(ValueError, match=f"sigma must be positive and finite, got {sigma}"):
        perturbations.gaussian_noise(jax.random.key(0), jnp.zeros((1, 2, 2, 1)), sigma=sigma)
