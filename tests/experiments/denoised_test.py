"""The experiment end to end on digits: what it leaves, what it does not do again, what it refuses."""

import csv
import dataclasses
import json
import os

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments import _denoisers, denoised
from experiments.common import classifiers, files, runtimes
from robustjax import certification, data, metrics

TINY = {
    "model": "mlp", "num_epochs": 2, "denoiser_epochs": 1, "denoiser_width": 4, "denoiser_depth": 2, "num_images": 6,
    "num_selection": 20, "num_estimation": 40, "num_attacked": 1, "seeds": 1, "batch_size": 20,
}  # fmt: skip
METHODS = "stability,rrcm"
ONE = runtimes.Runtime(mesh="data=1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = denoised.Config(**TINY, methods=METHODS, results_dir=str(tmp_path_factory.mktemp("results")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        for name, value in {"GROUP": 6, "PGD_STEPS": 2, "PGD_DRAWS": 2, "ANSWER_DRAWS": 40}.items():
            patch.setattr(denoised, name, value)
        rows = denoised.run(config, ONE)
    return config, rows, denoised.folder_of(config)


def times_of(folder):
    return {path: os.stat(path).st_mtime_ns for path in folder.glob("seed-*/*.npz")}


def test_a_run_leaves_its_folder(finished):
    _, rows, folder = finished
    assert folder.parts[-2:] == ("denoised", "digits-mlp-0.5")
    assert {path.name for path in times_of(folder)} == {f"{name}.npz" for name in METHODS.split(",")}
    assert (folder / "figures" / "certified_accuracy.png").read_bytes()[:4] == b"\x89PNG"
    written = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert [row["method"] for row in written] == [row["method"] for row in rows] == METHODS.split(",")
    assert json.loads((folder / "metrics.json").read_text())["rows"] == rows
    report = (folder / "report.md").read_text()
    assert "| method | ACR | 0 | 0.25 | 0.5 | 0.75 | 1 | abstain |" in report
    assert "changed the smoothed answer of 0 of" in report


def test_rows_are_those_of_the_certificates(finished):
    config, rows, folder = finished
    for row in rows:
        arrays = files.read_arrays(folder / "seed-0" / f"{row['method']}.npz")
        np.testing.assert_array_equal(arrays["true"], data.load("digits", "test")[arrays["id"]].label)
        certificate = certification.Certificate(*(arrays[name] for name in certification.Certificate._fields))
        assert row["average_certified_radius"] == metrics.average_certified_radius(certificate, arrays["true"])
        assert row["flops_per_copy"] > 0
        assert row["seconds_per_image"] > 0
    classifier = 2 * (64 * 128 + 128 * 128 + 128 * 10)
    of = {row["method"]: row["flops_per_copy"] for row in rows}
    assert of["rrcm"] == pytest.approx(classifier, rel=0.05)  # one forward pass, and little more
    assert of["stability"] > of["rrcm"]


def test_what_was_certified_is_the_classifier_behind_the_denoiser(finished):
    """The first noisy copies by hand, from the checkpoints: the votes that the certificate counted."""
    config, _, folder = finished
    trained = _denoisers.Trained(config, 0, data.load("digits", "train"), folder / "seed-0", *nobody())
    logits_fn, arrays = trained.logits_fn("stability"), files.read_arrays(folder / "seed-0" / "stability.npz")
    image = data.load("digits", "test")[arrays["id"]].image
    certify_key = jax.random.split(jax.random.fold_in(jax.random.key(0), 1), 3)[0]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(certify_key, arrays["id"])
    counts = certification.sample_counts(
        keys, logits_fn, image, certification.gaussian(0.5),
        num_samples=40, first_sample=20, batch_size=20,
    )  # fmt: skip
    top = np.asarray(counts).max(-1)
    decided = arrays["label"] >= 0
    bound = certification.binomial_lower_bound(top, 40, config.alpha)
    np.testing.assert_allclose(arrays["probability"][decided], bound[decided], rtol=1e-9)


def nobody():
    return Console(quiet=True), ONE, lambda *_: None


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_rrcm_has_the_passes_of_the_others(share, finished, tmp_path, monkeypatch):
    passes = []

    def train(folder, functional, *args, num_epochs, **settings):
        passes.append(num_epochs)
        return classifiers.Classifier(functional, functional.state, None), {}

    monkeypatch.setattr(classifiers, "train", train)
    config = dataclasses.replace(finished[0], pretraining_share=share)
    _denoisers.Trained(config, 0, data.load("digits", "train"), tmp_path, *nobody()).logits_fn("rrcm")
    assert passes == [1, 1]


def test_what_is_there_is_not_done_again(finished, monkeypatch):
    config, rows, folder = finished
    before = times_of(folder)
    monkeypatch.setattr(classifiers, "train", lambda *args, **settings: pytest.fail("trained again"))
    again = denoised.run(dataclasses.replace(config, methods="rrcm,stability", radii=(0.1,)))
    assert [row["method"] for row in again] == ["rrcm", "stability"]
    assert again[1]["average_certified_radius"] == rows[0]["average_certified_radius"]
    assert times_of(folder) == before
    with pytest.raises(ValueError, match=r"another config \(sigma: 0.5 there, 0.4 now\)"):
        denoised.run(dataclasses.replace(config, sigma=0.4, name=folder.name))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": "none,magic"}, "methods must be among none, denoising, .* got 'magic'"),
        ({"sigma": 0.0}, "sigma must be positive and finite, got 0.0"),
        ({"seeds": 0}, "seeds must be an integer of at least 1, got 0"),
        ({"num_attacked": -1}, "num_attacked must be at least 0, got -1"),
        ({"alpha": 1.0}, "alpha must lie strictly between 0 and 1, got 1.0"),
        ({"radii": (-0.5,)}, r"radii must be finite numbers of at least 0, got \(-0.5,\)"),
        ({"radii": (np.inf,)}, "radii must be finite numbers of at least 0"),
        ({"denoiser_depth": 1}, "denoiser_depth must be an integer of at least 2, got 1"),
        ({"num_epochs": 1}, "num_epochs must be at least 2 with rrcm, .* got 1"),
        ({"recipe": "none"}, "recipe must be one of digits, mnist"),
        ({"model": "alexnet"}, "must be one of mlp, lenet, cnn"),
        ({"consistency_weight": -1.0}, "weight must be at least 0"),
        ({"pretraining_share": 1.0}, "pretraining_share must lie strictly between 0 and 1, got 1.0"),
        ({"pretraining_sigma": 1e-4}, "largest must be above smallest=0.002, got 0.0002"),
        ({"name": "a/b"}, "name must be the name of a folder, got 'a/b'"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        denoised.run(denoised.Config(**TINY | settings, results_dir=str(tmp_path)))
    assert not any(tmp_path.iterdir())
