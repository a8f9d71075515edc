"""Warnings of inputs that are possible and hardly meant: probabilities, 256 levels, channels first."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import _validate, attacks, certification, models, perturbations
from robustjax.certification import conformal, intervals

KEY = jax.random.key(0)
X = np.random.default_rng(0).uniform(size=(4, 8, 8, 1)).astype(np.float32)
LABELS = np.arange(4) % 3
KERNEL = jnp.asarray(np.random.default_rng(1).normal(size=(64, 3)), jnp.float32)
MEASURE = certification.gaussian(0.5)
SHOULD = "logits_fn should return logits, got rows that are at least 0 and sum to 1"


def linear(x):
    return x.reshape(len(x), -1) @ KERNEL


def probabilities(x):
    return jax.nn.softmax(linear(x))


@pytest.mark.parametrize(
    ("rows", "seen"),
    [
        ([[0.2, 0.8], [1.0, 0.0]], True),
        ([[0.2, 0.8005]], True),
        ([[0.2, 0.81]], False),
        ([[0.2, 0.8], [0.5, 0.4]], False),
        ([[-0.1, 1.1]], False),
        ([[np.nan, 1.0]], False),
        (np.zeros((0, 2)), False),
    ],
)
def test_probabilities_are_seen(rows, seen):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        _validate.not_probabilities(logits_fn=np.asarray(rows, np.float32))
    assert [str(w.message).startswith(SHOULD) for w in found] == [True] * seen


def test_probabilities_of_a_low_precision_are_seen():
    rows = jax.nn.softmax(jnp.array([0.0, 1.0, 0.3])).astype(jnp.bfloat16)[None]
    assert abs(float(rows.astype(jnp.float32).sum()) - 1) > 1e-3
    with pytest.warns(UserWarning, match=SHOULD):
        _validate.not_probabilities(logits_fn=rows)


ATTACKED = {
    "an attack": lambda f: attacks.fgsm(epsilon=0.1)(KEY, f, X, LABELS),
    "several attacks": lambda f: attacks.worst_of(attacks.fgsm(epsilon=0.1))(KEY, f, X, LABELS),
    "the accuracy under one": lambda f: attacks.robust_accuracy(KEY, attacks.fgsm(epsilon=0.1), f, X, LABELS),
    "a random model": lambda f: attacks.fgsm(epsilon=0.1, samples=2)(KEY, lambda key, x: f(x), X, LABELS),
    "smoothed scores": lambda f: conformal.smoothed_scores(KEY, f, X, MEASURE, num_samples=4, batch_size=4),
}


@pytest.mark.usefixtures("unchecked")  # the checker's own frames lie between ours and the caller's
@pytest.mark.parametrize("name", ATTACKED)
def test_a_model_of_probabilities_is_named_once(name):
    with pytest.warns(UserWarning, match=SHOULD) as found:
        ATTACKED[name](probabilities)
    assert len(found) == 1
    assert found[0].filename == __file__


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.exp(jax.nn.log_softmax(linear(x))),
        lambda x: jnp.clip(jax.nn.softmax(linear(x)), 1e-6, 1.0),
        jax.checkpoint(probabilities),
        jax.jit(lambda x: probabilities(x).astype(jnp.bfloat16)),
        lambda x: (probabilities(x) + probabilities(-x)) / 2,
    ],
)
def test_probabilities_are_seen_however_they_are_made(function):
    with pytest.warns(UserWarning, match=SHOULD):
        attacks.fgsm(epsilon=0.1)(KEY, function, X, LABELS)


def test_logits_warn_of_nothing_and_a_model_that_cannot_make_probabilities_is_not_asked():
    asked = []

    def counting(x):
        jax.debug.callback(lambda: asked.append(1))
        return linear(x)

    attacks.fgsm(epsilon=0.1)(KEY, counting, X, LABELS)
    jax.effects_barrier()
    alone = len(asked)
    attacks.fgsm(epsilon=0.1)(KEY, lambda x: counting(x) / 2, X, LABELS)
    jax.effects_barrier()
    assert len(asked) == 2 * alone + 1  # a division may be the end of a softmax
    jax.jit(lambda x: attacks.fgsm(epsilon=0.1)(KEY, probabilities, x, LABELS))(X)  # a traced value cannot be read
    certification.predict(KEY, probabilities, X, MEASURE, num_samples=20, alpha=0.1)  # the largest is the same class


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("epsilon", "norm", "hint"),
    [
        (8, "linf", "got 8: 8 looks like 8/255"),
        (4.0, "linf", "got 4.0: 4 looks like 4/255"),
        (1.5, "linf", "got 1.5: bounds= says another range of inputs"),
        (300, "linf", "got 300: bounds= says another range of inputs"),
        (128, "l2", "got 128: 128 looks like 128/255"),
    ],
)
def test_an_epsilon_in_256_levels_is_named(epsilon, norm, hint):
    with pytest.raises(ValueError, match=f"epsilon must be at most .*{hint}"):
        attacks.pgd(epsilon=epsilon, norm=norm)(KEY, linear, X, LABELS)


SMOOTHED = {
    "certify": lambda m, **k: certification.certify(KEY, linear, X, m, num_estimation=100, **k),
    "certify_sequential": lambda m, **k: certification.certify_sequential(KEY, linear, X, m, max_samples=100, **k),
    "predict": lambda m, **k: certification.predict(KEY, linear, X, m, num_samples=20, alpha=0.1, **k),
    "smoothed_scores": lambda m, **k: conformal.smoothed_scores(KEY, linear, X, m, num_samples=4, **k),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", SMOOTHED)
def test_a_sigma_in_256_levels_is_named(name):
    with pytest.warns(UserWarning, match=r"sigma=12.0 is more than 1, the range of x: 12 looks like 12/255") as found:
        SMOOTHED[name](certification.gaussian(12))
    assert found[0].filename == __file__


@pytest.mark.usefixtures("unchecked")
def test_a_sigma_within_the_range_of_the_inputs_is_not():
    certify = SMOOTHED["predict"]
    certify(certification.gaussian(12), input_range=(0, 255))
    certify(certification.gaussian(12), input_range=None)
    certify(certification.gaussian(1.5), input_range=(-1, 1))
    intervals.certify(linear, X, epsilon=1.5, input_range=(-1, 1))
    certify(certification.uniform(3.5))
    with pytest.warns(UserWarning, match="sigma=1.5 is more than 1, .*: a number in 256 levels is divided by 255"):
        certify(certification.in_norm(certification.gaussian(1.5), "linf", 64))
    with pytest.warns(UserWarning, match="epsilon=8 is more than 1, the range of x: 8 looks like 8/255"):
        assert not intervals.certify(linear, X, epsilon=8).verified.any()


TOLD = {
    "certify": lambda: certification.certify(KEY, linear, X, MEASURE, num_estimation=9),
    "predict": lambda: certification.predict(KEY, linear, X, MEASURE, num_samples=10),
    "certify_sequential": lambda: certification.certify_sequential(KEY, linear, X, MEASURE, max_samples=9),
    "conformal": lambda: conformal.conformal_quantile(np.zeros(8), alpha=0.1),
    "pgd": lambda: attacks.pgd(epsilon=0.1, steps=2, step_size=0.01),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", TOLD)
def test_a_warning_names_the_line_of_the_caller(name):
    with pytest.warns(UserWarning, match="draws can never|too few for|cannot reach") as found:
        TOLD[name]()
    assert found[0].filename == __file__


FIRST = X.reshape(4, 1, 8, 8)
LAYOUTS = {
    "square": lambda x: attacks.square(epsilon=0.1, queries=2)(KEY, linear, x, LABELS),
    "dual": lambda x: certification.dual(KEY, (linear, linear), x, MEASURE, num_selection=10, num_estimation=10),
    "random_crop": lambda x: perturbations.random_crop(KEY, x),
    "random_horizontal_flip": lambda x: perturbations.random_horizontal_flip(KEY, x),
    "cutmix": lambda x: perturbations.cutmix(KEY, jnp.asarray(x), jnp.asarray(LABELS), num_classes=3),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", LAYOUTS)
def test_channels_that_come_first_are_named(name):
    with pytest.warns(
        UserWarning, match=r"\(4, 1, 8, 8\), which looks like \(batch, channels, height, width\)"
    ) as found:
        LAYOUTS[name](FIRST)
    assert found[0].filename == __file__


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (2, 3, 3, 3), (2, 1, 8, 4), (2, 2, 8, 8), (2, 8)])
def test_other_shapes_are_not(shape, recwarn):
    _validate.channels_last(x=np.zeros(shape))
    assert not recwarn.list


def test_normalisation_names_the_channels_that_it_misses():
    logits_fn = models.normalized(linear, mean=[0.1, 0.2, 0.3], std=0.5)
    with pytest.raises(ValueError, match=r"x must have 3 channels as its last axis, .*, got shape \(2, 3, 8, 8\)"):
        logits_fn(jnp.ones((2, 3, 8, 8)))
