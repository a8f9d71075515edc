import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import losses

cross_entropy, soft_cross_entropy = jax.jit(losses.cross_entropy), jax.jit(losses.soft_cross_entropy)
normalized_cross_entropy = jax.jit(losses.normalized_cross_entropy, static_argnames="tau")


def test_cross_entropy_matches_float64():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(20, 5)).astype(np.float32) * 4, rng.integers(0, 5, 20)
    wide = logits.astype(np.float64)
    want = np.log(np.exp(wide).sum(-1)) - wide[np.arange(20), labels]
    np.testing.assert_allclose(cross_entropy(jnp.asarray(logits), jnp.asarray(labels)), want, rtol=1e-5)


def test_cross_entropy_of_equal_logits_is_the_log_of_the_number_of_classes():
    np.testing.assert_allclose(cross_entropy(jnp.zeros((3, 10)), jnp.arange(3)), np.log(10), rtol=1e-6)


def test_cross_entropy_stays_finite_for_large_logits():
    right, wrong = np.asarray(cross_entropy(jnp.asarray([[1e30, -1e30, 0.0]] * 2), jnp.asarray([0, 1])))
    assert right == 0
    assert np.isfinite(wrong)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (jnp.zeros((4, 3)), jnp.zeros(5, int), r"labels must be \(4,\) to match the logits, got shape \(5,\)"),
        (jnp.zeros((4, 3)), jnp.zeros((4, 3), int), r"labels must be \(4,\) to match the logits, got shape \(4, 3\)"),
        (jnp.zeros(3), jnp.zeros(3, int), r"logits must be \(batch, classes\), got shape \(3,\)"),
        (jnp.zeros((4, 3)), jnp.zeros(4), "labels must be integers, got float32"),
    ],
)
def test_bad_arguments(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        losses.cross_entropy(logits, labels)


def test_a_label_outside_gives_nan_and_not_the_loss_of_another_class():
    logits, labels = jnp.asarray([[1.0, 2.0, 3.0]] * 5), jnp.asarray([-5, 0, -1, 3, 4])
    for loss in (cross_entropy, normalized_cross_entropy):
        np.testing.assert_array_equal(np.isnan(loss(logits, labels)), [True, False, True, True, True])


def test_soft_cross_entropy_matches_float64():
    rng = np.random.default_rng(1)
    logits, q = rng.normal(size=(20, 5)).astype(np.float32) * 4, rng.dirichlet(np.ones(5), 20).astype(np.float32)
    wide = logits.astype(np.float64)
    want = (q * (np.log(np.exp(wide).sum(-1, keepdims=True)) - wide)).sum(-1)
    np.testing.assert_allclose(soft_cross_entropy(jnp.asarray(logits), jnp.asarray(q)), want, rtol=1e-5)


def test_soft_cross_entropy_of_certain_labels_is_the_cross_entropy():
    logits, labels = np.random.default_rng(0).normal(0, 5, (20, 5)).astype(np.float32), np.arange(20) % 5
    soft = soft_cross_entropy(logits, np.eye(5, dtype=np.float32)[labels])
    np.testing.assert_allclose(soft, cross_entropy(logits, labels), rtol=1e-5, atol=1e-6)


def test_soft_cross_entropy_is_least_where_the_model_agrees():
    q = np.asarray([[0.7, 0.2, 0.1]], np.float32)
    loss = jax.jit(jax.value_and_grad(lambda logits: losses.soft_cross_entropy(logits, jnp.asarray(q)).sum()))
    value, gradient = loss(np.log(q) + np.float32(5))
    np.testing.assert_allclose(value, -(q * np.log(q)).sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, np.zeros((1, 3)), atol=1e-6)
    np.testing.assert_allclose(loss(np.log(q))[1], np.zeros((1, 3)), atol=1e-7)


def test_logit_norm_matches_float64():
    rng = np.random.default_rng(2)
    logits, labels = rng.normal(size=(20, 5)).astype(np.float32), rng.integers(0, 5, 20)
    wide = logits.astype(np.float64) / (0.04 * np.linalg.norm(logits.astype(np.float64), axis=-1, keepdims=True))
    want = np.log(np.exp(wide).sum(-1)) - wide[np.arange(20), labels]
    got = normalized_cross_entropy(logits, labels)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_logit_norm_knows_only_directions():
    rng, labels = np.random.default_rng(3), jnp.arange(6) % 4
    logits, shifted = (scale * rng.normal(size=(6, 4)).astype(np.float32) for scale in (1, np.float32(1e-4)))
    loss = lambda logits: np.asarray(normalized_cross_entropy(logits, labels, tau=0.5))
    for scale in (1e-30, 1e-3, 1e3, 1e30):
        np.testing.assert_allclose(loss(np.float32(scale) * logits), loss(logits), rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda logits: losses.normalized_cross_entropy(logits, labels, tau=0.5).sum()))(logits)
    np.testing.assert_allclose((gradient * logits).sum(-1), np.zeros(6), atol=1e-6)  # nothing along the logits
    numeric = (loss(logits + shifted) - loss(logits - shifted)) / 2
    np.testing.assert_allclose((gradient * shifted).sum(-1), numeric, atol=1e-6)


@pytest.mark.parametrize(("tau", "num_classes"), [(1.0, 2), (0.5, 10)])
def test_logit_norm_has_its_least_value_at_the_corners_of_a_simplex(tau, num_classes):
    corner = np.eye(num_classes, dtype=np.float32)[[1]] - np.float32(1 / num_classes)
    least = np.log1p((num_classes - 1) * np.exp(-np.sqrt(num_classes / (num_classes - 1)) / tau))
    others = np.random.default_rng(0).normal(size=(500, num_classes)).astype(np.float32) + 2 * corner
    found = normalized_cross_entropy(np.concatenate([3 * corner, others]), np.ones(501, np.int32), tau=tau)
    np.testing.assert_allclose(found[0], least, rtol=1e-5)
    assert (found >= least - 1e-6).all()


def test_logit_norm_of_zero_logits_has_a_finite_gradient():
    labels = jnp.asarray([0, 1])
    logits = jnp.asarray([[0.0, 0.0, 0.0], [0.5, -1.0, 2.0]])
    loss = lambda logits: losses.normalized_cross_entropy(logits, labels, tau=0.1)[0]
    value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
    np.testing.assert_allclose(value, np.log(3), rtol=1e-6)
    np.testing.assert_allclose(gradient, np.asarray([[-2 / 3, 1 / 3, 1 / 3], [0, 0, 0]]) / 0.1, rtol=1e-5)


@pytest.mark.parametrize("tau", [0.0, -0.04, float("nan")])
def test_bad_tau(tau):
    with pytest.raises(ValueError, match=f"tau must be positive and finite, got {tau}"):
        losses.normalized_cross_entropy(jnp.zeros((2, 3)), jnp.zeros(2, int), tau=tau)


@pytest.mark.parametrize(
    ("logits", "probabilities", "message"),
    [
        ((4, 3), (4, 2), r"label_probabilities must be \(4, 3\) to match the logits, got shape \(4, 2\)"),
        ((3,), (3,), r"logits must be \(batch, classes\), got shape \(3,\)"),
        ((4, 3), (4, 3), "label_probabilities must be >= 0 with rows that sum to 1, got row 0 with sum 0"),
    ],
)
def test_bad_soft_labels(logits, probabilities, message):
    with pytest.raises(ValueError, match=message):
        losses.soft_cross_entropy(jnp.zeros(logits), jnp.zeros(probabilities))
