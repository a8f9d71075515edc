"""Programs are lowered for accelerators, which the machine of the tests may lack: lowering compiles nothing."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robustjax import attacks, certification, losses, models, training
from robustjax.certification import _counts, conformal
from robustjax.typing import Batch
from tests.scoring import contract_test

PLATFORMS = ("cuda", "tpu")
MEBIBYTE = 2**20
CLASSES = 4
IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
LABELS = jax.ShapeDtypeStruct((2,), jnp.int32)
MODEL = functools.cache(
    lambda: models.functional(models.mlp(jax.random.key(0), hidden=(5,), image_shape=(8, 8, 1), num_classes=CLASSES))
)
ATTACKS = {
    "apgd": lambda: attacks.apgd(epsilon=0.1),
    "apgd_targeted": lambda: attacks.apgd_targeted(epsilon=0.1, num_targets=2),
    "at_budget": lambda: attacks.at_budget(attacks.deepfool(), epsilon=0.1),
    "carlini_wagner": attacks.carlini_wagner,
    "deepfool": attacks.deepfool,
    "fab": lambda: attacks.fab(epsilon=0.1, num_targets=2),
    "fgsm": lambda: attacks.fgsm(epsilon=0.1),
    "momentum_iterative": lambda: attacks.momentum_iterative(epsilon=0.1),
    "pgd": lambda: attacks.pgd(epsilon=0.1),
    "square": lambda: attacks.square(epsilon=0.1),
    "worst_of": lambda: attacks.worst_of(attacks.fgsm(epsilon=0.1), attacks.apgd(epsilon=0.1, norm="l1")),
}
NO_PROGRAM = {"autoattack", "diagnose", "expectation_over_transformation", "queries_of", "robust_accuracy"}
"""Of attacks: what runs on the host, around the programs of others, or describes them."""


def faults_of(function, *arguments):
    """What an accelerator has no use for in the program of a function, as text."""
    traced = jax.jit(function).trace(*arguments)
    text = traced.lower(lowering_platforms=PLATFORMS).as_text()
    constants = [len(digits) // 2 for digits in re.findall(r'dense<"0x([0-9A-Fa-f]*)"', text)]
    return (
        [f"a {word}" for word in ("callback", "f64", "infeed") if re.search(rf"{word}\b", f"{text} {traced.jaxpr}")]
        + [f"a constant of {size} bytes" for size in constants if size > MEBIBYTE]
    )  # fmt: skip


def slow_but(few, names):
    """All names as parameters, of which only a few are tried by default."""
    return [pytest.param(name, marks=[] if name in few else pytest.mark.slow) for name in names]


def logits_fn():
    model = MODEL()
    return jax.tree_util.Partial(_logits_of, model.state)


def _logits_of(state, x):
    return MODEL().outputs(state, x).logits


def test_faults_are_seen():
    large = np.arange(MEBIBYTE // 4 + 1, dtype=np.float32)
    assert faults_of(lambda x: x + large, large) == [f"a constant of {large.nbytes} bytes"]
    with jax.enable_x64(True):
        assert faults_of(lambda x: x.astype(jnp.float64) + 1, large) == ["a f64"]
    with pytest.raises(NotImplementedError, match="callback"):  # a callback is of the platform that it runs on
        faults_of(lambda x: jax.pure_callback(np.sin, x, x), large)


@pytest.mark.parametrize("name", slow_but(("gaussian",), ("gaussian", "laplace")))
def test_certification(name):
    measure = getattr(certification, name)(0.5)
    rule = np.ones((3, 2), np.int32)
    for bounds, group in ((None, 3), (rule, 1)):
        edges = np.arange(2 if bounds is None else 4, dtype=np.int32) * 100
        votes = functools.partial(_counts._votes, measure=measure, batch_size=40, group=group, checked=True)
        assert not faults_of(votes, jax.random.key(0), logits_fn(), IMAGES, edges, bounds)
    scores = functools.partial(conformal.smoothed_scores, measure=measure, score=conformal.aps, num_samples=40)
    assert not faults_of(lambda key, f, x: scores(key, f, x).mean, jax.random.key(0), logits_fn(), IMAGES)


@pytest.mark.parametrize("name", slow_but(("apgd", "fab", "pgd", "square"), ATTACKS))
def test_attacks(name):
    assert not faults_of(ATTACKS[name](), jax.random.key(0), logits_fn(), IMAGES, LABELS)


def test_every_attack_is_here():
    public = {name for name, value in vars(attacks).items() if name.islower() and not name.startswith("_")}
    assert {name for name in public if not inspect.ismodule(getattr(attacks, name))} - NO_PROGRAM == set(ATTACKS)


@pytest.mark.parametrize("name", slow_but(("energy", "knn", "nac"), contract_test.DETECTORS))
def test_scores_of_detectors(name):
    detector, outputs = contract_test.DETECTORS[name](), contract_test.outputs(1, rows=8)
    assert not faults_of(detector.score, contract_test.fitted(name), outputs)


def test_training_step():
    model, optimizer = MODEL(), optax.sgd(0.1, momentum=0.9)
    state = training.init(jax.random.key(0), model.state, optimizer)
    step = training.make_step(losses.smoothing.gaussian_augmentation(sigma=0.5), optimizer)
    batch = Batch(image=IMAGES, label=LABELS, id=LABELS)
    assert not faults_of(lambda state, batch: step(model.apply, state, batch), state, batch)
