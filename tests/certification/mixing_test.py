"""Mixtures beside plain probabilities, their radii beside brute force and the worst that an attacker can do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from robustjax.certification import mixing

RNG = np.random.default_rng(0)
G, H = (jnp.asarray(RNG.normal(size=(6, 4)) * 5, jnp.float32) for _ in range(2))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.84, 1.0])
def test_a_mixture_of_probabilities(alpha):
    mixed = mixing.mix(G, H, alpha=alpha, standard_scale=1.2, robust_scale=0.5)
    expected = (1 - alpha) * special.softmax(1.2 * np.asarray(G), -1) + alpha * special.softmax(0.5 * np.asarray(H), -1)
    np.testing.assert_allclose(np.exp(mixed), expected, rtol=1e-5)
    np.testing.assert_allclose(np.exp(mixed).sum(-1), 1, rtol=1e-6)


def test_the_ends_are_one_classifier_and_have_gradients():
    np.testing.assert_array_equal(mixing.mix(G, H, alpha=1.0), jax.nn.log_softmax(H))
    np.testing.assert_array_equal(mixing.mix(G, H, alpha=0.0), jax.nn.log_softmax(G))
    each = jnp.array([0.0, 1.0, 0.5, 0.0, 1.0, 0.9])
    gradients = jax.grad(lambda g, h, a: mixing.mix(g, h, alpha=a)[:, 0].sum(), (0, 1, 2))(G, 100 * H, each)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    np.testing.assert_array_equal(mixing.mix(G, H, alpha=each)[1], jax.nn.log_softmax(H)[1])


def test_smoothed_radius_for_the_robust_part_alone_is_that_of_cohen():
    first, second = np.array([0.6, 0.9, 0.999, 1 - 1e-12]), np.array([0.3, 0.1, 1e-4, 1e-12])
    expected = 0.25 * (special.ndtri(first) - special.ndtri(second))
    np.testing.assert_allclose(mixing.smoothed_radius(first, second, alpha=1.0, sigma=0.5), expected, rtol=1e-9)


def test_smoothed_radius_is_larger_than_the_published_one():
    found = mixing.smoothed_radius(0.97, 0.02, alpha=0.76, sigma=0.5)
    official = 0.25 * (special.ndtri(0.76 * 0.97) - special.ndtri(0.76 * 0.02 + 0.24))
    assert found == pytest.approx(0.780, abs=1e-3)
    assert official == pytest.approx(0.323, abs=1e-3)


def test_radii_hold_at_every_step_of_the_worst_attack():
    """Three classes; the robust part moves as fast as it can, the accurate one is wholly for the runner-up."""
    sigma, lipschitz = 0.5, 1 / (0.5 * np.sqrt(2 * np.pi))
    for _ in range(200):
        first, second = np.sort(RNG.dirichlet([4, 1, 1]))[[-1, -2]]
        alpha = RNG.uniform(0.5, 1)
        smoothed = mixing.smoothed_radius(first, second, alpha=alpha, sigma=sigma)
        linear = mixing.lipschitz_radius(first, second, alpha=alpha, lipschitz=lipschitz)
        assert linear <= smoothed + 1e-12
        step = np.linspace(0, 1, 101) * smoothed * (1 - 1e-9)
        ours = alpha * special.ndtr(special.ndtri(first) - step / sigma)
        theirs = alpha * special.ndtr(special.ndtri(second) + step / sigma) + (1 - alpha)
        assert smoothed == 0 or (ours > theirs).all()
        if smoothed > 0:
            beyond = smoothed * (1 + 1e-6) / sigma
            assert alpha * special.ndtr(special.ndtri(first) - beyond) < alpha * special.ndtr(
                special.ndtri(second) + beyond
            ) + (1 - alpha)


def test_no_more_than_half_of_it_certifies_nothing():
    for alpha in (0.0, 0.3, 0.5):
        assert mixing.smoothed_radius(1.0, 0.0, alpha=alpha, sigma=0.5) == 0
        assert mixing.lipschitz_radius(1.0, 0.0, alpha=alpha, lipschitz=1.0) == 0
    assert np.isfinite(mixing.smoothed_radius(1.0, 0.0, alpha=0.9, sigma=0.5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mixing.mix(G, H, alpha=1.5), r"alpha must lie in \[0, 1\], got 1.5"),
        (lambda: mixing.mix(G, H[:, :3], alpha=0.5), r"must have one shape, got \(6, 4\) and \(6, 3\)"),
        (lambda: mixing.mix(G, H, alpha=0.5, robust_scale=0.0), "robust_scale must be positive and finite, got 0.0"),
        (lambda: mixing.smoothed_radius(1.2, 0.1, alpha=0.9, sigma=0.5), r"first must lie in \[0, 1\], got 1.2"),
        (lambda: mixing.smoothed_radius(0.8, np.nan, alpha=0.9, sigma=0.5), r"second must lie in \[0, 1\], got nan"),
        (lambda: mixing.smoothed_radius(0.8, 0.1, alpha=-1.0, sigma=0.5), r"alpha must lie in \[0, 1\], got -1"),
        (lambda: mixing.lipschitz_radius(0.8, 0.1, alpha=0.9, lipschitz=0.0), "lipschitz must be positive"),
    ],
)
def test_bad_input_is_named(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call()
