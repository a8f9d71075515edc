import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import losses

K = 5
LABELS = np.asarray([0, 4, 2, 2, 1, 3, 0])
LOGITS = (4 * np.random.default_rng(0).normal(size=(7, K))).astype(np.float32)
EXTREME = np.asarray([[100, -100, -100], [-100, 100, -100], [100, 100, -100], [-100, -100, -100]], np.float32)
NAMES = "cross_entropy margin difference_of_logits_ratio targeted_difference_of_logits_ratio kl_divergence entropy"
compiled = types.SimpleNamespace(
    **{name: jax.jit(getattr(losses, name)) for name in (*NAMES.split(), "boosted_cross_entropy")}
)


def softmax(logits):
    logits = np.asarray(logits, np.float64)
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def wrong_of(values, labels):
    """The values of the wrong classes, row by row."""
    return np.stack([np.delete(row, label) for row, label in zip(values, labels)])


def test_margin_is_the_best_wrong_logit_less_the_right_one():
    got = compiled.margin(jnp.asarray(LOGITS), jnp.asarray(LABELS))
    np.testing.assert_array_equal(got, wrong_of(LOGITS, LABELS).max(-1) - LOGITS[range(7), LABELS])
    assert ((got > 0) == (LOGITS.argmax(-1) != LABELS)).all()


def test_difference_of_logits_ratio_by_hand_and_blind_to_scale_and_offset():
    logits, labels = jnp.asarray([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0], [3.0, 1.0, 0.0]]), jnp.arange(3)
    np.testing.assert_allclose(compiled.difference_of_logits_ratio(logits, labels), [-2 / 3, 2 / 3, 1], rtol=1e-6)
    moved = compiled.difference_of_logits_ratio(1e-3 * logits + 7e-3, labels)
    np.testing.assert_allclose(moved, [-2 / 3, 2 / 3, 1], rtol=1e-5)
    third = jax.jit(jax.grad(lambda z: compiled.difference_of_logits_ratio(z, labels)[2]))(logits)
    np.testing.assert_allclose(third, 0, atol=1e-6)


def test_ratios_of_equal_logits_are_0():
    equal, labels = jnp.full((2, 4), 3.0), jnp.asarray([0, 3])
    np.testing.assert_array_equal(compiled.difference_of_logits_ratio(equal, labels), 0)
    np.testing.assert_array_equal(compiled.targeted_difference_of_logits_ratio(equal, labels, labels[::-1]), 0)


def test_targeted_difference_of_logits_ratio_by_hand():
    logits = jnp.asarray([[4.0, 3.0, 1.0, 0.0]])
    got = compiled.targeted_difference_of_logits_ratio(logits, jnp.asarray([0]), jnp.asarray([2]))
    np.testing.assert_allclose(got, [-(4 - 1) / (4 - 0.5)], rtol=1e-6)


def test_ratios_of_logits_as_small_as_what_keeps_the_denominator_from_0():
    tiny = 1e-12 * jnp.asarray([[4.0, 3.0, 1.0, 0.0]])
    zero, two = jnp.asarray([0]), jnp.asarray([2])
    np.testing.assert_allclose(compiled.difference_of_logits_ratio(tiny, zero), [-1 / (3 + 1)], rtol=1e-5)
    np.testing.assert_allclose(compiled.targeted_difference_of_logits_ratio(tiny, zero, two), [-3 / 4.5], rtol=1e-5)


def test_a_label_outside_gives_nan_and_not_the_loss_of_another_class():
    logits, labels = jnp.asarray(LOGITS), jnp.asarray([-1, K, 2, -K, 1, 3, 0])
    outside = [True, True, False, True, False, False, False]
    for loss in (compiled.margin, compiled.difference_of_logits_ratio):
        np.testing.assert_array_equal(np.isnan(loss(logits, labels)), outside)
    right, targeted = jnp.asarray(LABELS), compiled.targeted_difference_of_logits_ratio
    np.testing.assert_array_equal(np.isnan(targeted(logits, labels, right)), outside)
    np.testing.assert_array_equal(np.isnan(targeted(logits, right, labels)), outside)


def test_kl_divergence_matches_float64_and_the_reference_is_the_distribution_that_weighs():
    reference = LOGITS[::-1].copy()
    p, q = softmax(reference), softmax(LOGITS)
    got = compiled.kl_divergence(jnp.asarray(LOGITS), jnp.asarray(reference))
    np.testing.assert_allclose(got, (p * np.log(p / q)).sum(-1), rtol=1e-5)
    assert abs(got - compiled.kl_divergence(jnp.asarray(reference), jnp.asarray(LOGITS))).max() > 0.1
    np.testing.assert_array_equal(compiled.kl_divergence(jnp.asarray(LOGITS), jnp.asarray(LOGITS)), 0)


def test_boosted_cross_entropy_matches_float64():
    p = softmax(LOGITS)
    want = -np.log(p[range(7), LABELS]) - np.log(1 - wrong_of(p, LABELS).max(-1))
    got = compiled.boosted_cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABELS))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_boosted_cross_entropy_keeps_its_digits_beside_an_offset():
    coarse = np.round(LOGITS * 256) / 256  # exact with the offset too
    near, far = (compiled.boosted_cross_entropy(jnp.asarray(z), jnp.asarray(LABELS)) for z in (coarse, coarse + 4096))
    np.testing.assert_array_equal(far, near)


def test_boosted_cross_entropy_is_twice_the_cross_entropy_for_two_classes():
    logits, labels = jnp.asarray(LOGITS[:, :2]), jnp.asarray(LABELS % 2)
    got = compiled.boosted_cross_entropy(logits, labels)
    np.testing.assert_allclose(got, 2 * compiled.cross_entropy(logits, labels), rtol=1e-5, atol=1e-6)


def test_boosted_cross_entropy_is_finite_and_pulls_where_the_answer_is_surely_wrong():
    labels = jnp.zeros(4, jnp.int32)
    summed = lambda z: compiled.boosted_cross_entropy(z, labels).sum()
    value, gradient = jax.jit(jax.value_and_grad(summed))(jnp.asarray(EXTREME))
    assert jnp.isfinite(value)
    # Row 1 is wrong for sure: each of its two terms pulls the answer down by 1; ln(1 - p_wrong) by the other two.
    np.testing.assert_allclose(gradient[1], [-1.5, 2.0, -0.5], atol=1e-6)
    np.testing.assert_allclose(gradient[0], 0, atol=1e-6)
    values = compiled.boosted_cross_entropy(jnp.asarray(EXTREME), labels)
    np.testing.assert_allclose(values, [0, 400 - np.log(2), 2 * np.log(2), np.log(3) + np.log(1.5)], atol=1e-4)


def test_entropy_matches_float64_from_certain_to_uniform():
    p = softmax(LOGITS)
    np.testing.assert_allclose(compiled.entropy(jnp.asarray(LOGITS)), -(p * np.log(p)).sum(-1), rtol=1e-4, atol=1e-6)
    value, gradient = jax.jit(jax.vmap(jax.value_and_grad(lambda z: compiled.entropy(z[None])[0])))(
        jnp.asarray(EXTREME)
    )
    np.testing.assert_allclose(value, [0, 0, np.log(2), np.log(3)], atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_kl_divergence_of_extreme_logits():
    """From uniform to certain, from (1/2, 1/2, 0) to certain on another class, and back."""
    summed = lambda z, reference: compiled.kl_divergence(z, reference).sum()
    value, gradient = jax.jit(jax.value_and_grad(summed))(jnp.asarray(EXTREME), jnp.asarray(EXTREME[::-1].copy()))
    got = compiled.kl_divergence(jnp.asarray(EXTREME), jnp.asarray(EXTREME[::-1].copy()))
    want = [400 / 3 - np.log(3), 100 - np.log(2), np.log(2), np.log(3)]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: losses.boosted_cross_entropy(jnp.zeros((2, 1)), jnp.zeros(2, int)),
            "boosted_cross_entropy needs logits of at least 2 classes, got 1",
        ),
        (
            lambda: losses.boosted_cross_entropy(jnp.zeros((2, 3)), jnp.zeros(2)),
            "labels must be integers, got float32",
        ),
        (
            lambda: losses.difference_of_logits_ratio(jnp.zeros((2, 2)), jnp.zeros(2, int)),
            "difference_of_logits_ratio needs logits of at least 3 classes, got 2: use cross_entropy or margin",
        ),
        (
            lambda: losses.targeted_difference_of_logits_ratio(jnp.zeros((1, 3)), jnp.zeros(1, int), jnp.ones(1, int)),
            "targeted_difference_of_logits_ratio needs logits of at least 4 classes, got 3",
        ),
        (
            lambda: losses.kl_divergence(jnp.zeros((2, 3)), jnp.zeros((2, 4))),
            r"logits and reference_logits must be \(batch, classes\), got \(2, 3\) and \(2, 4\)",
        ),
        (lambda: losses.entropy(jnp.zeros(3)), r"logits must be \(batch, classes\), got shape \(3,\)"),
        (
            lambda: losses.margin(jnp.zeros((2, 3)), jnp.zeros(3, int)),
            r"labels must be \(2,\) to match the logits, got shape \(3,\)",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
