import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.attacks import diagnose

KEY = jax.random.key(0)
X = np.random.default_rng(0).uniform(0.1, 0.9, (4, 2, 3, 1)).astype(np.float32)
LABELS = np.arange(4, dtype=np.int32) % 3
WEIGHTS = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)


def linear(x):
    return x.reshape(x.shape[0], 6) @ WEIGHTS


def test_nothing_is_odd_about_a_sound_model():
    """Nor about one that is certain: a loss that saturates is not a flat model."""
    model = jax.tree_util.Partial(lambda scale, x: scale * linear(x))
    for scale in (1, 1e6):
        found = diagnose(KEY, jax.tree_util.Partial(model, np.float32(scale)), X, LABELS)
        assert found.warnings == ()
        assert not found.no_gradient.any()
        assert found.zero_gradient.shape == found.non_finite_gradient.shape == (4,)


def test_zero_gradients_are_seen_where_they_are():
    flat_for_two = lambda x: jnp.where(jnp.arange(4)[:, None] < 2, jnp.round(8 * linear(x)), linear(x))
    found = diagnose(KEY, flat_for_two, X, LABELS)
    np.testing.assert_array_equal(found.zero_gradient, [True, True, False, False])
    assert not found.non_finite_gradient.any()
    [sentence] = found.warnings
    assert "masked or broken: zero at 2 and not finite at 0 of 4 inputs" in sentence


def test_gradients_that_are_not_finite_are_seen_where_they_are():
    x = X.copy()
    x[1, 0, 0, 0] = 0.0
    rooted = lambda x: linear(x) + jnp.sqrt(x[:, 0, 0]) * jnp.arange(3.0)[None]
    found = diagnose(KEY, rooted, x, LABELS)
    np.testing.assert_array_equal(found.non_finite_gradient, [False, True, False, False])
    np.testing.assert_array_equal(found.no_gradient, found.non_finite_gradient)
    assert "zero at 0 and not finite at 1 of 4 inputs" in found.warnings[0]


def test_randomness_is_seen():
    draws = np.random.default_rng(2)
    drawing = lambda x: linear(x) + draws.normal(size=(1, 3)).astype(np.float32)
    found = diagnose(KEY, drawing, X, LABELS)
    assert found.randomised
    assert "different logits for the same input" in found.warnings[0]

    noisy = lambda key, x: linear(x) + jax.random.normal(key, (1, 3))
    assert diagnose(KEY, noisy, X, LABELS, samples=2).randomised
    calm = lambda key, x: linear(x) * (1 + 1e-6 * jax.random.normal(key, (1, 3)))
    assert diagnose(KEY, calm, X, LABELS, samples=2).warnings == ()


def test_the_gradient_of_a_random_model_is_a_mean_over_draws():
    def mostly_flat(key, x):  # a gradient in one draw of four
        return jnp.where(jax.random.bernoulli(key, 0.25), linear(x), 0.0)

    few = diagnose(KEY, mostly_flat, X, LABELS, samples=1).zero_gradient
    many = diagnose(KEY, mostly_flat, X, LABELS, samples=40).zero_gradient
    assert few.any()
    assert not many.any()


def test_probabilities_are_seen():
    moved = lambda shift, x: jax.nn.softmax(linear(x)) + shift
    softmax = lambda shift: jax.tree_util.Partial(moved, np.float32([shift]))
    found = diagnose(KEY, softmax([0, 0, 0]), X, LABELS)
    assert found.probabilities
    assert "look like probabilities" in found.warnings[0]
    assert not diagnose(KEY, lambda x: jax.nn.sigmoid(linear(x)), X, LABELS).probabilities
    assert not diagnose(KEY, softmax([-0.5, 0, 0.5]), X, LABELS).probabilities


def test_works_inside_jit():
    found = jax.jit(lambda key, x, labels: diagnose(key, linear, x, labels))(KEY, X, LABELS)
    assert not found.no_gradient.any()
    assert found.randomised.shape == ()


def test_bad_input():
    with pytest.raises(ValueError, match="samples must be an integer of at least 1, got 0"):
        diagnose(KEY, linear, X, LABELS, samples=0)
    with pytest.raises(ValueError, match="labels must be 0 to 2, got values from 3 to 5"):
        diagnose(KEY, linear, X, LABELS + 3)
