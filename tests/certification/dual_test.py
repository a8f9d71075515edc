"""Two smoothed halves: a radius that no division of the attack breaks, and halves that do not see each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from robustjax import certification, metrics

SIGMA = 0.5
MEASURE = certification.gaussian(SIGMA)
MASK = certification.checkerboard(4, 4)


def mass(probability, a, b):
    """What two half-spaces leave to the class after changes of length a and b straight towards their planes."""
    return (special.ndtr(special.ndtri(probability) - np.stack([a, b], -1) / SIGMA)).sum(-1)


def test_the_radius_is_the_distance_to_the_nearest_way_out():
    rng, angle = np.random.default_rng(0), np.linspace(0, np.pi / 2, 401)[:, None]
    probability = np.concatenate([rng.uniform(0.01, 0.999, (200, 2)), [[0.99, 0.5], [0.999, 0.02]]])
    radius = certification.dual_radius(probability, MEASURE)
    assert (radius > 0).sum() > 50
    inside = mass(probability, np.cos(angle) * radius * (1 - 1e-9), np.sin(angle) * radius * (1 - 1e-9))
    assert (inside[:, radius > 0] > 1).all()
    np.testing.assert_allclose(mass(probability, radius / np.sqrt(2), radius / np.sqrt(2))[radius > 0], 1, atol=1e-9)
    assert (mass(probability, 0, 0)[radius == 0] <= 1).all()


def test_the_root_of_the_sum_of_squares_would_be_broken():
    """The formula of the authors' script for CIFAR-10, at its counter-example."""
    probability = np.array([0.99, 0.5])
    unsound = np.sqrt((np.maximum(MEASURE.radius(probability), 0) ** 2).sum())
    assert unsound == pytest.approx(2.326 * SIGMA, rel=1e-3)
    assert mass(probability, unsound / np.sqrt(2), unsound / np.sqrt(2)) < 0.81
    assert certification.dual_radius(probability, MEASURE) == pytest.approx(1.645 * SIGMA, rel=1e-3)
    clipped = SIGMA * special.ndtri(special.ndtr([2.0, -1.9])).clip(0).sum() / np.sqrt(2)  # that for ImageNet
    assert clipped > 10 * certification.dual_radius(special.ndtr([2.0, -1.9]), MEASURE)


@pytest.mark.parametrize("probability", [[0.5, np.nan], [1.0, 0.5], [-0.1, 0.5], [0.5]])
def test_no_probability_is_named(probability):
    with pytest.raises(ValueError, match="probability must"):
        certification.dual_radius(np.array(probability), MEASURE)


def linear(weights, distance, x):
    value = jnp.einsum("bhwc,hw->b", x, weights) + distance
    return jnp.stack([jnp.zeros_like(value), value], -1)


def half_space(pixels, distance):
    """Class 1 with probability Phi(distance / sigma) at x = 0, by the pixels alone."""
    weights = np.asarray(pixels, np.float32) / np.sqrt(pixels.sum(dtype=np.float32))
    return jax.tree_util.Partial(linear, weights, np.float32(distance))  # one program for all of them


HALVES = half_space(MASK, 0.4), half_space(~MASK, -0.1)


def test_certificates_hold_as_often_as_they_say():
    """1,000 runs on halves with a known radius, one of them below 1/2: some are larger, at most alpha."""
    truth, alpha = (0.4 - 0.1) / np.sqrt(2), 0.05
    x, keys = jnp.zeros((1000, 4, 4, 1)), jax.random.split(jax.random.key(0), 1000)
    found = certification.dual(keys, HALVES, x, MEASURE, num_estimation=300, alpha=alpha)
    wrong = (found.radius > truth) | (found.label == 0)
    assert 0 < wrong.mean() <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / 1000)
    assert (found.label == 1).mean() > 0.9
    np.testing.assert_array_equal(found.abstained, found.radius == 0)
    np.testing.assert_array_equal(found.label == certification.ABSTAIN, found.abstained)
    assert (found.probability[:, 0] > 0.6).all()
    assert (found.probability[:, 1] < 0.5).all()
    ones = np.ones(1000, int)
    assert metrics.average_certified_radius(found, ones) == pytest.approx(found.radius[found.label == 1].sum() / 1000)


def test_a_half_sees_its_own_pixels_alone():
    keys = jax.random.split(jax.random.key(1), 2)

    def others(pixels, x):
        return jnp.stack([jnp.abs(jnp.where(pixels[None, ..., None], 0.0, x)).sum((1, 2, 3)), 0 * x[:, 0, 0, 0]], -1)

    blind = lambda pixels: jax.tree_util.Partial(others, pixels)
    nothing = certification.dual(keys, (blind(MASK), blind(~MASK)), jnp.ones((2, 4, 4, 1)), MEASURE, num_estimation=20)
    # Logits of 0 and 0: nothing of the other half was there, and all agree. Each half has one half of alpha.
    np.testing.assert_allclose(nothing.probability, 0.0005 ** (1 / 20), rtol=1e-9)
    assert (nothing.label == 0).all()
    mask = np.zeros((4, 4), bool)
    mask[:2] = True
    x = np.zeros((2, 4, 4, 1), np.float32)
    x[0, 2:] = 0.7
    found = certification.dual(
        keys[np.zeros(2, int)],
        (half_space(mask, 0.3), half_space(~mask, 0.3)),
        x,
        MEASURE,
        mask=mask,
        num_estimation=500,
    )
    assert found.probability[0, 0] == found.probability[1, 0]
    assert found.probability[0, 1] > found.probability[1, 1]


def test_the_checkerboard():
    np.testing.assert_array_equal(certification.checkerboard(2, 3), [[True, False, True], [False, True, False]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measure": certification.uniform(0.5)}, r"measure must be gaussian.sigma., got Uniform\(half_width=0.5\)"),
        ({"mask": np.ones((3, 4), bool)}, r"mask must be bool of shape \(4, 4\), got bool of \(3, 4\)"),
        ({"mask": np.ones((4, 4))}, r"mask must be an array of bool \(height, width\) or None, got float64"),
        ({"logits_fns": HALVES[:1]}, "logits_fns must be 2 values, each a function"),
        ({"logits_fns": (HALVES[0], lambda x: jnp.zeros((x.shape[0], 3)))}, "the same number of classes, got 2 and 3"),
        (
            {"logits_fns": (HALVES[0], lambda x: HALVES[1](x) * jnp.nan)},
            r"finite logits, not so for 200 of 200 noisy copies of x\[0\]",
        ),
        ({"x": np.zeros((1, 16), np.float32)}, r"x must be .* \(batch, height, width, channels\), got .* \(1, 16\)"),
        ({"alpha": 0.0}, "alpha must"),
    ],
)
def test_bad_input_is_named(change, message, unchecked):
    given = {"logits_fns": HALVES, "x": np.zeros((1, 4, 4, 1), np.float32), "measure": MEASURE, "num_estimation": 20}
    given |= change
    with pytest.raises(ValueError, match=message):
        certification.dual(jax.random.key(0), **given)
