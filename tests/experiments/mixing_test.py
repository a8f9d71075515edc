"""The experiment end to end on a few digits: what it leaves, what it re-uses, what it refuses, and its arithmetic."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from experiments import _mixing_report, mixing
from experiments.common import files
from robustjax import attacks, certification, losses

TINY = {
    "model": "mlp", "train_split": "train[:256]", "test_split": "train[256:272]", "num_epochs": 1, "network_epochs": 1,
    "alphas": (0.0, 1.0), "steps": 2, "autoattack": False, "sigma": 0.1, "num_selection": 20, "num_estimation": 200,
    "num_images": 8, "num_certified": 16, "seeds": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = mixing.Config(**TINY, results_dir=str(tmp_path_factory.mktemp("results")))
    attack = {name: attacks.fgsm(epsilon=0.15) for name in ("ce", "apgd", "gamma")}
    with pytest.MonkeyPatch.context() as patch:  # APGD takes its time to compile
        patch.setattr(mixing, "attacks_of", lambda config, num_classes: attack)
        content = mixing.run(config)
    return config, content, mixing.folder_of(mixing.resolved(config))


def test_a_run_leaves_its_folder(finished):
    _, content, folder = finished
    assert folder.parts[-2:] == ("mixing", "digits-mlp-0.15")
    for name in ("config.json", "metrics.json", "metrics.csv", "report.md", "seed-0/metrics.json"):
        assert (folder / name).is_file(), name
    assert {path.name for path in (folder / "figures").iterdir()} == {"trade_off.png", "certified_accuracy.png"}
    assert json.loads((folder / "metrics.json").read_text())["findings"] == content["findings"]
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert [(row["mixture"], row["alpha"]) for row in rows] == [("fixed", "0.0"), ("fixed", "1.0"), ("network", "")]
    for row in rows:
        assert 0 <= float(row["apgd"]) <= 1
    assert float(rows[-1]["all"]) <= min(float(rows[-1][name]) for name in ("apgd", "gamma"))
    report = (folder / "report.md").read_text()
    assert all(finding in report for finding in content["findings"])
    assert len(content["findings"]) == 5


def test_certificates_are_those_of_their_radii(finished):
    config, content, folder = finished
    found = files.read_arrays(folder / "seed-0" / "certificates.npz")
    assert len(found["label"]) == config.num_certified
    certified = found["mixture_radius"] > 0
    np.testing.assert_array_equal(found["mixture_label"] == certification.ABSTAIN, ~certified)
    assert len(found["changed"]) == certified.sum() > 0
    assert not found["changed"].any()
    assert (found["mixture_radius"] <= found["smoothed_radius"] + 0.02).all()  # more than it could not lend
    numbers = content["seeds"][0]["certified"]
    assert numbers["certified_mixture"][0] == (found["mixture_label"] == found["label"]).mean()
    assert len(found["answered_label"]) == 16
    assert numbers["clean_mixture"] == (found["answered_mixture"] == found["answered_label"]).mean()


def test_seeds_that_are_done_are_not_done_again(finished, monkeypatch):
    config, content, _ = finished

    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(mixing, "train", refuse)
    assert mixing.run(config)["seeds"] == content["seeds"]
    with pytest.raises(AssertionError):
        mixing.run(dataclasses.replace(config, seeds=2))
    with pytest.raises(ValueError, match="low: 0.84 there, 0.6 now"):
        mixing.run(dataclasses.replace(config, low=0.6))


def test_attacks_are_those_that_the_config_names():
    config = mixing.resolved(mixing.Config(epsilon="8/255", steps=7))
    found = mixing.attacks_of(config, 5)
    assert found["ce"] == attacks.apgd(epsilon=8 / 255, steps=7)
    assert found["apgd"].attacks == (found["ce"], attacks.apgd_targeted(epsilon=8 / 255, steps=7, num_targets=4))
    assert found["gamma"].loss == losses.adaptive_cross_entropy(weight=0.4)
    assert found["autoattack"] == attacks.autoattack(epsilon=8 / 255)


def test_a_fixed_mixture_of_the_same_accuracy():
    fixed = [{"mixture": "fixed", "clean": clean, "apgd": apgd} for clean, apgd in ((0.9, 0.4), (0.8, 0.6), (1.0, 0.0))]
    at = lambda clean: _mixing_report.at_its_accuracy([*fixed, {"mixture": "network", "clean": clean, "apgd": 0.5}])
    assert at(0.9) == 0.4
    assert at(0.85) == pytest.approx(0.5)
    assert at(0.95) == pytest.approx(0.2)
    assert at(0.7) == 0.6  # one that is more accurate has it


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": 0}, "seeds must be an integer of at least 1, got 0"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"alphas": ()}, r"alphas must be one or more numbers in \[0, 1\], got \(\)"),
        ({"alphas": (0.5, 1.2)}, r"alphas must be one or more numbers in \[0, 1\], got \(0.5, 1.2\)"),
        ({"certified_alpha": 0.5}, "certified_alpha must be above 1/2 and at most 1, got 0.5"),
        ({"low": 0.9, "high": 0.8}, "low and high must be 0 <= low <= high <= 1, got 0.9 and 0.8"),
        ({"sigma": 0.0}, "sigma must be positive and finite, got 0.0"),
        ({"robust_scale": -1.0}, "robust_scale must be positive and finite, got -1.0"),
        ({"gamma_weight": 2.0}, r"gamma_weight must lie in \[0, 1\], got 2.0"),
        ({"failure": 1.0}, "failure must lie strictly between 0 and 1, got 1.0"),
        ({"seed": -1}, "seed must lie in"),
        ({"epsilon": "0.1,0.2"}, "train_epsilon must be one number, got '0.1,0.2'"),
        ({"dataset": "svhn"}, "train_epsilon must be given for the data set 'svhn' in linf"),
        ({"name": "a/b"}, "name must be the name of a folder"),
    ],
)
def test_a_bad_setting_is_named_and_nothing_is_written(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        mixing.run(mixing.Config(**settings, results_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())
