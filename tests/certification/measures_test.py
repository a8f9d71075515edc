"""Smoothing measures: radii in float64 against closed forms, their noise, the lattice, other norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from robustjax import certification, perturbations

sample = jax.jit(lambda measure, key, x: measure.sample(key, x), static_argnums=0)


def test_radius_is_sigma_times_the_quantile():
    probability = np.array([0.0, 0.3, 0.5, 0.6, 0.99, 1 - 2**-18])
    expected = [0, 0, 0, *(0.25 * stats.norm.ppf(probability[3:]))]
    np.testing.assert_allclose(certification.gaussian(0.25).radius(probability), expected, rtol=1e-9)


def test_noise_is_gaussian_in_float32_whatever_the_input():
    x = jnp.full((100, 100), 0.5, jnp.bfloat16)
    noisy = sample(certification.gaussian(0.25), jax.random.key(0), x)
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
    steps = [np.asarray(sample(measure, key, jnp.asarray(g / 255, jnp.float32))) * 4080 for g in grey]
    whole = [np.rint(s).astype(int) for s in steps]
    np.testing.assert_allclose(steps[0], whole[0], atol=2e-3)
    np.testing.assert_array_equal(whole[0] - 16 * grey[0], whole[1] - 16 * grey[1])
    assert stats.kstest((whole[0] - 16 * grey[0]).ravel() / 4080 / 0.5, "norm").pvalue > 0.01
    # Plain float32 addition does leave a trace of the image, which is what the lattice is for.
    plain = [np.asarray(sample(certification.gaussian(0.5), key, jnp.asarray(g / 255, jnp.float32))) for g in grey]
    exact = [p.astype(np.float64) - np.float32(g / 255).astype(np.float64) for p, g in zip(plain, grey)]
    assert (exact[0] != exact[1]).any()


def test_no_radius_is_longer_than_the_noise():
    """The largest 64 of the 2^23 values of each noise: a pixel stays below one as often as there are values below."""
    index = np.arange(2**23 - 64, 2**23)
    float32 = lambda low, high: (index / 2**23).astype(np.float32) * np.float32(high - low) + np.float32(low)
    values = {
        certification.gaussian(1.0): np.sqrt(2) * special.erfinv(float32(-1 + 2**-24, 1).astype(np.float64)),
        certification.laplace(1.0): -np.log1p(-float32(-1 + 2**-23, 1).astype(np.float64)),
        certification.uniform(1.0): float32(-1, 1).astype(np.float64),
    }
    chances = np.linspace(1 - 2**-17, 1, 4097)  # 64 to each value: below it, at it, and beyond the last one
    for measure, noise in values.items():
        quantiles = noise[np.maximum(np.ceil(chances * 2**23).astype(int) - 1 - index[0], 0)]
        tail = chances > 1 - 2**-18
        radii = measure.radius(chances)
        assert (radii <= quantiles * (1 + 1e-12))[tail].all()
        np.testing.assert_allclose(radii[tail], quantiles[tail], rtol=0.011)
        assert (np.diff(radii) >= 0).all()
        assert certification.in_norm(measure, "linf", 4).radius(1.0) < measure.radius(1.0) <= noise.max()
    both = certification.dual_radius([1 - 1e-12, 1 - 1e-12], certification.gaussian(1.0))
    assert both == pytest.approx(np.sqrt(2) * certification.gaussian(1.0).radius(1.0))
    all_agree = certification.certificate_from_counts(
        np.array([[100, 0]]), np.array([[2**31 - 1, 0]]), certification.gaussian(1.0)
    )
    assert all_agree.radius[0] < 5.2201


def test_the_largest_normal_draw(monkeypatch):
    """Random words of all ones, and of all zeros."""
    ends = lambda key, count: (jnp.full_like(count[0], 2**32 - 1), jnp.zeros_like(count[0]))
    monkeypatch.setattr(perturbations._normal, "threefry_2x32", ends)
    draws = certification.gaussian(1.0).sample(jax.random.key(0), jnp.zeros(2))
    np.testing.assert_allclose(draws, [5.220113, -5.419983], rtol=1e-6)


@given(st.one_of(st.floats(max_value=0), st.just(float("inf")), st.just(float("nan"))))
def test_sigma_must_be_positive_and_finite(sigma):
    with pytest.raises(ValueError, match="sigma must be positive and finite, got"):
        certification.gaussian(sigma)


@pytest.mark.parametrize("grid", [0.0, -1.0, 0.6, 1e-8])
def test_grid_must_be_positive_and_resolved(grid):
    with pytest.raises(ValueError, match="grid must .*, got"):
        certification.gaussian(0.5, grid=grid)


def test_the_finest_grid_is_what_float32_resolves_six_sigma_out():
    """Noisy images lie below 1 + 6 sigma = 4, where floats are 2^-22 apart: copies keep their place on the lattice."""
    finest = 2.0**-22
    certification.gaussian(0.5, grid=finest)
    with pytest.raises(ValueError, match="at least 2.4e-07"):
        certification.gaussian(0.5, grid=finest * (1 - 1e-9))
    steps = np.arange(2**24 - 100, 2**24 + 1)
    assert len(np.unique((steps * finest).astype(np.float32))) == len(steps)


def test_the_lattice_does_not_hide_what_is_not_finite():
    x = jnp.array([0.5, jnp.nan, jnp.inf], jnp.float32)
    np.testing.assert_array_equal(
        jnp.isfinite(sample(certification.gaussian(0.5, grid=1 / 4080), jax.random.key(0), x)), [True, False, False]
    )


@pytest.mark.parametrize("measure", [certification.uniform(0.4), certification.laplace(0.4)])
def test_l1_radii_are_exact_where_one_pixel_decides(measure):
    """P(noise of a pixel <= distance) is the probability of a half-space at this l1 distance: none is larger."""
    law = {"Uniform": stats.uniform(-0.4, 0.8), "Laplace": stats.laplace(scale=0.4)}[type(measure).__name__]
    distance = np.array([0.0, 0.01, 0.2, 0.39])
    np.testing.assert_allclose(measure.radius(law.cdf(distance)), distance, atol=1e-15)
    np.testing.assert_array_equal(measure.radius([0.0, 0.3, 0.5]), 0)
    assert not np.signbit(measure.radius(0.5))
    noisy = sample(measure, jax.random.key(0), jnp.full((100, 100), 0.5, jnp.bfloat16))
    assert noisy.dtype == jnp.float32
    assert stats.kstest(np.asarray(noisy).ravel() - 0.5, law.cdf).pvalue > 0.01


@pytest.mark.parametrize("measure", [certification.uniform(0.4), certification.laplace(0.4)])
def test_l1_certificates_hold_as_often_as_they_say(measure):
    """1,000 inputs at an l1 distance of 0.1 from a half-space: at most alpha of the radii are larger."""
    x, alpha = jnp.full((1000, 2, 1, 1), 0.1), 0.05
    half_space = lambda x: jnp.stack([0 * x[:, 0, 0, 0], x[:, 0, 0, 0]], axis=-1)
    keys = jax.random.split(jax.random.key(3), 1000)
    certificate = certification.certify(keys, half_space, x, measure, num_estimation=200, alpha=alpha)
    wrong = (certificate.label == 1) & (certificate.radius > 0.1)
    assert 0 < wrong.mean() <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / 1000)
    sequential = certification.certify_sequential(
        keys, half_space, x, measure, target_radius=0.1, max_samples=200, alpha=alpha
    )
    assert 0 < (sequential.label == 1).mean() <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / 1000)


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
@pytest.mark.parametrize("measure", [certification.gaussian(0.5), certification.uniform(0.5)])
def test_the_ball_in_another_norm_is_the_largest_inside(measure, norm):
    orders = {"l1": 1, "l2": 2, "linf": np.inf}
    theirs, ours = orders[measure.norm], orders[norm]
    radius, inside = measure.radius(0.9), certification.in_norm(measure, norm, 6).radius(0.9)
    directions = np.random.default_rng(0).normal(size=(1000, 6))
    directions = np.concatenate([directions, np.ones((1, 6)), np.eye(6)])
    surface = inside * directions / np.linalg.norm(directions, ours, axis=1)[:, None]
    assert np.linalg.norm(surface, theirs, axis=1).max() == pytest.approx(radius, rel=1e-12)


def test_a_measure_in_another_norm_draws_as_before():
    inner, x = certification.gaussian(0.5), jnp.full((2, 3, 1), 0.5)
    measure = certification.in_norm(inner, "linf", dimension=6)
    assert isinstance(measure, certification.Measure)
    assert measure.norm == "linf"
    assert measure == certification.in_norm(certification.gaussian(0.5), "linf", 6)
    np.testing.assert_array_equal(sample(measure, jax.random.key(0), x), sample(inner, jax.random.key(0), x))
    with pytest.raises(ValueError, match=r"dimension=6 must be the size of an input, got inputs of shape \(3,\)"):
        sample(measure, jax.random.key(0), jnp.zeros(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: certification.uniform(0.0), "half_width must be positive and finite, got 0.0"),
        (lambda: certification.laplace(float("nan")), "scale must be positive and finite, got nan"),
        (
            lambda: certification.in_norm(certification.gaussian(1.0), "l3", 4),
            "norm must be one of l1, l2, linf, got 'l3'",
        ),
        (
            lambda: certification.in_norm(certification.gaussian(1.0), "linf", 0),
            "dimension must be .* at least 1, got 0",
        ),
        (lambda: jax.jit(lambda scale: certification.laplace(scale).scale)(1.0), "scale must be a number, not traced"),
    ],
)
def test_bad_settings_are_named(make, message, unchecked):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "measure", [certification.gaussian(0.5), certification.uniform(0.5), certification.laplace(0.5)]
)
@pytest.mark.parametrize("probability", [1.5, -0.1, float("nan")])
def test_a_radius_is_of_a_probability(measure, probability):
    with pytest.raises(ValueError, match=r"probability must lie in \[0, 1\], got"):
        measure.radius(probability)
