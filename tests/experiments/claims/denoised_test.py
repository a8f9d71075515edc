"""The study of denoisers: what is smoothed, what is certified and attacked, and what it refuses."""

import dataclasses

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments.claims import _frame, denoised
from experiments.common import certificates, classifiers, runtimes
from robustjax import certification, data

TINY = dataclasses.replace(denoised.STUDY.tiny, num_epochs=2)
KERNEL = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)


@pytest.fixture
def place(tmp_path):
    return _frame.Place(tmp_path, runtimes.HERE, Console(quiet=True), runtimes.Watch([], None))


@pytest.fixture
def trainings(monkeypatch):
    """Traces a step in place of a training, notes passes and network, and moves denoisers away from the identity."""
    found = {}

    def train(folder, functional, dataset, *, key, objective, num_epochs, **settings):
        state = functional.state
        loss, _ = jax.eval_shape(
            lambda key, state, batch: objective(key, functional.apply, state, batch), key, state, dataset[:4]
        )
        assert loss.shape == ()
        if folder.name in ("denoising", "stability", "diffusion"):
            state = state._replace(params=jax.tree.map(lambda a: a + 0.03, state.params))
        found[folder.name] = num_epochs, functional, state
        return classifiers.Classifier(functional, state), {}

    monkeypatch.setattr(classifiers, "train", train)
    return found


def test_methods_are_what_they_say(place, trainings):
    trained = denoised.Trained(TINY, 0, data.load("digits", "train[:64]"), place)
    x = jax.random.uniform(jax.random.key(0), (4, 8, 8, 1))
    answers = {
        method: denoised._forward(trained.logits_fn(method), x)
        for method in ("none", "gaussian", "rrcm", "stability", "diffusion")
    }
    classify = lambda x: denoised._forward(trained.standard.logits_fn(), x)
    np.testing.assert_array_equal(answers["none"], classify(x))
    np.testing.assert_array_equal(answers["gaussian"], classify(x))  # all begin with the same parameters
    contrast = 1 / np.sqrt((2 * TINY.sigma) ** 2 + 0.25)
    np.testing.assert_allclose(answers["rrcm"], classify(0.5 + contrast * (x - 0.5)), atol=1e-4)
    _, network, state = trainings["stability"]
    assert {*state.batch_stats} == {"classifier"}  # whose answers are its targets
    denoised_x = jax.jit(network.outputs)(state._replace(batch_stats={}), x)
    assert np.abs(denoised_x - x).max() > 0.01
    np.testing.assert_allclose(answers["stability"], classify(denoised_x), atol=1e-4)
    assert np.abs(answers["diffusion"] - answers["none"]).max() > 1e-3


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_rrcm_has_the_passes_of_the_others(share, place, trainings):
    config = dataclasses.replace(TINY, pretraining_share=share)
    denoised.Trained(config, 0, data.load("digits", "train[:64]"), place).logits_fn("rrcm")
    assert {name: passes for name, (passes, *_) in trainings.items()} == {"rrcm_pretraining": 1, "rrcm": 1}


def test_certificates_are_those_of_the_votes(place):
    test = data.load("digits", "test")
    config = dataclasses.replace(TINY, sigma=0.1, alpha=0.05, num_images=6, num_attacked=0)
    logits_fn = jax.tree_util.Partial(lambda kernel, x: x.reshape(len(x), -1) @ kernel, KERNEL)
    key = jax.random.key(0)
    numbers = denoised.certified(config, key, logits_fn, test, place, "linear")
    ids, label, certificate, *_ = certificates.read(place.folder / "certificates" / "linear")
    assert len(ids) == 6
    np.testing.assert_array_equal(label, test[ids].label)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.split(key, 3)[0], ids)
    counts = certification.sample_counts(
        keys, logits_fn, test[ids].image, certification.gaussian(0.1), num_samples=40, first_sample=20, batch_size=20
    )
    decided = certificate.label >= 0
    assert decided.any()
    bound = certification.binomial_lower_bound(np.asarray(counts).max(-1), 40, config.alpha)
    np.testing.assert_allclose(certificate.probability[decided], bound[decided], rtol=1e-9)
    assert numbers["flops_per_copy"] == pytest.approx(2 * KERNEL.size, rel=0.1)
    correct = certificate.label == label
    assert numbers[denoised.ACR] == pytest.approx((certificate.radius * correct).mean())
    assert numbers["certified_accuracy_0.25"] == (correct & (certificate.radius >= 0.25)).mean()


def test_attacks_break_a_radius_that_is_too_large():
    # Half-spaces: the border is as far away as the first pixel is above 1 / 2.
    sides, image = np.array([[100.0, -100.0]], np.float32), np.full((1, 2, 2, 1), 0.5, np.float32)
    linear = jax.tree_util.Partial(lambda sides, x: sides * (x[:, 0, 0] - 0.5), sides)
    config = dataclasses.replace(TINY, sigma=0.05, alpha=0.01)
    keys, few = jax.random.split(jax.random.key(0)), {"steps": 4, "draws": 2, "answer_draws": 40}
    for distance, broken in ((0.25, True), (0.5, False)):
        image[0, 0, 0] = 0.5 + distance
        assert denoised.is_broken(config, keys, linear, image, np.array([0]), 0.4, **few) == broken


def test_certificates_that_are_there_are_not_made_again(place, trainings, monkeypatch):
    config = dataclasses.replace(TINY, methods=("none", "gaussian"))
    monkeypatch.setattr(denoised, "certified", lambda *_: {denoised.ACR: 0.25, "attacked": 1, "broken": 0})
    first = denoised.measure(config, 0, place)
    assert {*trainings} == {"standard", "gaussian"}
    monkeypatch.setattr(denoised, "certified", lambda *_: pytest.fail("certified again"))
    again = denoised.measure(config, 0, place)
    assert again["gaussian"][denoised.ACR] == first["gaussian"][denoised.ACR] == 0.25
    with pytest.raises(ValueError, match="checkpoint must hold the model that the run in .*none began with"):
        denoised.measure(config, 1, place)  # trainings of another seed in this place


def test_a_broken_certificate_is_reported():
    of = {"broken": np.array([0.0, 1.0]), "attacked": np.array([2.0, 2.0]), "radius": np.zeros((2, 6))}
    config = dataclasses.replace(TINY, methods=("none",))
    text = denoised.details(config, {"none": of | {denoised.ACR: np.array([0.5, 0.25])}})
    assert "WARNING: PGD inside certified radii changed the smoothed answer of 1 of 4 images." in text
    assert text[0].rows == [["none", "0.000 (0.000)"]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ()}, "methods must name one or more of none, denoising"),
        ({"sigma": 0.0}, "sigma must be positive and finite, got 0.0"),
        ({"num_attacked": -1}, "num_attacked must be an integer of at least 0, got -1"),
        ({"alpha": 1.0}, "alpha must lie strictly between 0 and 1, got 1.0"),
        ({"radii": (0.0, -0.5)}, "radii must be at least 0 and finite, got -0.5"),
        ({"denoiser_depth": 1}, "denoiser_depth must be an integer of at least 2, got 1"),
        ({"num_epochs": 1}, "num_epochs must be at least 2 with rrcm, .* got 1"),
        ({"recipe": "none"}, "recipe must be one of digits, mnist"),
        ({"consistency_weight": -1.0}, "weight must be at least 0"),
        ({"pretraining_share": 1.0}, "pretraining_share must lie strictly between 0 and 1, got 1.0"),
        ({"pretraining_sigma": 1e-4}, "largest must be above smallest=0.002, got 0.0002"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        denoised.Config(**settings)
