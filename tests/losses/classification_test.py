import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import losses


def test_cross_entropy_matches_float64():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(20, 5)).astype(np.float32) * 4, rng.integers(0, 5, 20)
    wide = logits.astype(np.float64)
    want = np.log(np.exp(wide).sum(-1)) - wide[np.arange(20), labels]
    np.testing.assert_allclose(losses.cross_entropy(jnp.asarray(logits), jnp.asarray(labels)), want, rtol=1e-5)


def test_cross_entropy_of_equal_logits_is_the_log_of_the_number_of_classes():
    np.testing.assert_allclose(losses.cross_entropy(jnp.zeros((3, 10)), jnp.arange(3)), np.log(10), rtol=1e-6)


def test_cross_entropy_stays_finite_for_large_logits():
    logits = jnp.asarray([[1e30, -1e30, 0.0]])
    assert losses.cross_entropy(logits, jnp.asarray([0])) == 0
    assert jnp.isfinite(losses.cross_entropy(logits, jnp.asarray([1]))).all()


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
