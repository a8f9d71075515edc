"""Attacks on a model that is certain, and on a model that answers in half precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import attacks

KEY, X, LABELS = jax.random.key(0), jnp.full((1, 1, 3, 1), 0.5), jnp.asarray([0])
KERNEL = np.array([[80, 5, 0], [-20, -5, 0], [20, 5, 0]], np.float32)
AWAY = KERNEL[:, 1] - KERNEL[:, 0]  # what lowers the lead; the gradient of the other logits alone points back


def certain(x):
    """Class 0 leads by 40, and by 62."""
    return x.reshape(len(x), -1) @ jnp.asarray(KERNEL) + jnp.asarray([[2.5, 0, -20]])


def coarse(x):
    return certain(x).astype(jnp.bfloat16)


@pytest.mark.parametrize(
    ("attack", "step"),
    [
        (attacks.fgsm(epsilon=0.1), 0.1 * np.sign(AWAY)),
        (attacks.momentum_iterative(epsilon=0.1, steps=2), 0.1 * np.sign(AWAY)),
        (attacks.pgd(epsilon=0.1, norm="l2", steps=2, random_start=False), 0.1 * AWAY / np.linalg.norm(AWAY)),
    ],
)
def test_the_true_class_moves_an_attack_on_a_certain_model(attack, step):
    np.testing.assert_allclose(np.asarray(attack(KEY, certain, X, LABELS) - X).ravel(), step, atol=1e-6)


@pytest.mark.parametrize("attack", [attacks.fgsm(epsilon=0.1), attacks.deepfool()])
def test_answers_in_half_precision_are_raised(attack):
    found, raised = (attack(KEY, f, X, LABELS) for f in (coarse, lambda x: coarse(x).astype(jnp.float32)))
    assert (jax.tree.leaves(found)[0] != X).all()
    jax.tree.map(np.testing.assert_array_equal, found, raised)
