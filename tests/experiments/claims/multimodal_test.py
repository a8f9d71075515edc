"""The study of two halves of an image: its attacks, its parts, what it measures and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.claims import multimodal


def test_numbers_say_what_was_measured():
    found = multimodal.measure(multimodal.STUDY.tiny, 0)
    assert tuple(found) == multimodal.ARMS
    for numbers in found.values():
        assert numbers["violations"] == 0
        assert numbers["nearest attack"] >= 1
        for name in ("without stronger", "without weaker", "PGD 0.2 both", "PGD 0.2 stronger"):
            assert 0 <= numbers[name] <= 1
        assert numbers["certified radius both"] >= numbers["radius both"]
        assert numbers["certified radius stronger"] > numbers["certified radius both"] > 0
    for first, second in zip(multimodal.ARMS[::2], multimodal.ARMS[1::2]):
        assert found[second]["radius both"] > found[first]["radius both"]
    assert found["step 1"]["radius both"] != found["cross-entropy"]["radius both"]


def test_gradients_go_through_what_is_free():
    logits_fn = lambda x: 2.0 * x.reshape(x.shape[0], -1)
    x, free = jnp.ones((1, 2, 4, 1)), jnp.array([False, True, True, False])
    logits = lambda x: multimodal._through(logits_fn, free, x)
    assert logits(x).sum() == 16
    gradient = jax.grad(lambda x: logits(x).sum())(x)
    np.testing.assert_array_equal(gradient[0, :, :, 0], [[0, 2, 2, 0]] * 2)


def test_a_half_is_black():
    image = np.ones((3, 2, 4, 1), np.float32)
    np.testing.assert_array_equal(multimodal.without(image, 0)[0, 0, :, 0], [0, 0, 1, 1])
    np.testing.assert_array_equal(multimodal.without(image, 1)[0, 0, :, 0], [1, 1, 0, 0])
    assert image.all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "cifar10"}, "dataset must be one of digits, mnist, got 'cifar10'"),
        ({"step_2_rate": 0.0}, "step_2_rate must be positive and finite, got 0.0"),
        ({"num_epochs": 0}, "num_epochs must be an integer of at least 1, got 0"),
        ({"epsilons": ()}, r"epsilons must be one or more positive finite numbers, got \(\)"),
        ({"rho": -1.0}, "rho must be at least 0 and finite, got -1.0"),
        ({"step_2_decay": float("nan")}, "step_2_decay must be at least 0 and finite, got nan"),
        ({"hidden": 1}, "hidden must be an integer of at least 2, got 1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        multimodal.Config(**settings)
