"""The study of mixtures: its attacks, its arithmetic, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.claims import _mixing_parts, mixing
from robustjax import attacks, certification, losses


def test_attacks_are_those_that_the_config_names():
    found = mixing.attacks_of(mixing.Config(epsilon=8 / 255, steps=7), 5)
    assert found["ce"] == attacks.apgd(epsilon=8 / 255, steps=7)
    assert found["robust"].attacks == (found["ce"], attacks.apgd_targeted(epsilon=8 / 255, steps=7, num_targets=4))
    assert found["gamma"].loss == losses.adaptive_cross_entropy(weight=0.4)
    quick = mixing.attacks_of(mixing.Config(epsilon=8 / 255, steps=7, attack="pgd"), 5)
    assert quick["robust"] == quick["ce"] == attacks.pgd(epsilon=8 / 255, steps=7)
    assert found["autoattack"] == attacks.autoattack(epsilon=8 / 255)


def test_an_attack_that_takes_alpha_for_a_constant_sees_its_value_and_no_gradient():
    network = lambda state, x, *, train=False: (state * x, state)
    mixture = certification.mixing.mixture(standard=network, robust=network, network=network)
    blind = lambda state: mixing._blind(mixture).network(state, jnp.float32(3.0))[0]
    value, gradient = jax.value_and_grad(blind)(2.0)
    assert (value, gradient) == (6.0, 0.0)


def test_a_fixed_mixture_of_the_same_accuracy():
    fixed = [{"clean": clean, "robust": robust} for clean, robust in ((0.9, 0.4), (0.8, 0.6), (1.0, 0.0))]
    at = lambda clean: mixing.at_accuracy(clean, fixed)
    assert at(0.9) == 0.4
    assert at(0.85) == pytest.approx(0.5)
    assert at(0.95) == pytest.approx(0.2)
    assert at(0.7) == 0.6  # one that is more accurate has it


def test_what_stands_is_right_before_and_after():
    # The sign of one pixel decides; an attack within 0.1 changes those near 0.
    value = np.array([-0.5, -0.05, 0.05, 0.5], np.float32)
    logits_fn = jax.tree_util.Partial(lambda x: jnp.stack([-x[:, 0, 0, 0], x[:, 0, 0, 0]], axis=-1))
    label = np.array([0, 0, 1, 0])  # the last answer is wrong
    attack = lambda key, seen, image, label: image + 0.1 * np.where(label == 0, 1, -1)[:, None, None, None]
    image = value[:, None, None, None]
    found = _mixing_parts.stands(jax.random.key(0), attack, logits_fn, image, label)
    assert found.tolist() == [True, False, False, False]
    blind = lambda key, seen, image, label: image
    found = _mixing_parts.stands(jax.random.key(0), blind, logits_fn, image, label, whole=logits_fn)
    assert found.tolist() == [True, True, True, False]


def test_certified_numbers_are_those_of_the_certificates():
    arms = _mixing_parts.arms_of(
        {"accurate": 0.75, "smoothed": 0.5, "mixture": 0.75},
        np.arange(4, 8),
        np.arange(4),
        smoothed=(np.array([0, 1, 0, 3]), np.array([0.5, 0.25, 0.9, 0.1])),
        mixture=(np.array([0, 1, certification.ABSTAIN, 3]), np.array([0.3, 0.2, 0.0, 0.05])),
    )
    clean = {arm: numbers["clean"] for arm, numbers in arms.items() if "clean" in numbers}
    assert clean == {
        "certified: accurate": 0.75, "certified: smoothed": 0.5, "certified: mixture": 0.75, mixing.BETTER: 0.75,
    }  # fmt: skip
    of = lambda arm: [arms[arm][f"at_{r}"] for r in ("0", "0.25", "0.5", "0.75")]
    assert of("certified: smoothed") == [0.75, 0.5, 0.25, 0.0]
    assert of("certified: mixture") == [0.75, 0.25, 0.0, 0.0]
    assert of(mixing.PART) == pytest.approx([0.45, 0.3, 0.15, 0.0])
    assert arms["certified: mixture"]["right"].tolist() == [True, True, False, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"alphas": ()}, r"alphas must be one or more numbers in \[0, 1\], got \(\)"),
        ({"alphas": (0.5, 1.2)}, r"alphas must be one or more numbers in \[0, 1\], got \(0.5, 1.2\)"),
        ({"certified_alpha": 0.5}, "certified_alpha must be above 1/2 and at most 1, got 0.5"),
        ({"low": 0.9, "high": 0.8}, "low and high must be 0 <= low <= high <= 1, got 0.9 and 0.8"),
        ({"sigma": 0.0}, "sigma must be positive and finite, got 0.0"),
        ({"epsilon": -0.1}, "epsilon must be positive and finite, got -0.1"),
        ({"robust_scale": -1.0}, "robust_scale must be positive and finite, got -1.0"),
        ({"gamma_weight": 2.0}, r"gamma_weight must lie in \[0, 1\], got 2.0"),
        ({"failure": 1.0}, "failure must lie strictly between 0 and 1, got 1.0"),
        ({"dataset": "svhn"}, "recipe must be named for the data set 'svhn'"),
        ({"dataset": "svhn", "recipe": "digits"}, "train_epsilon must be given for the data set 'svhn' in linf"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        mixing.Config(**settings)
