"""Sequential certification beside certify, on models of experiments.smoothing."""

import csv
import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest

from experiments import smoothing
from experiments.common import files
from experiments.smoothing import sequential
from robustjax import certification


@pytest.fixture(scope="module")
def runs(smoothing_run, tmp_path_factory):
    """Run folders of two tiny models, with 300 draws of six images."""
    results = str(tmp_path_factory.mktemp("runs"))
    first, second = (dataclasses.replace(smoothing_run[0], seed=i, name=str(i), results_dir=results) for i in (0, 1))
    shutil.copytree(smoothing_run[0].folder(), first.folder())
    smoothing.run(second)
    return str(first.folder()), str(second.folder())


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(sequential, "BLOCK", 4)


def config_of(runs, folder, **settings):
    settings = {"radii": (0.1, 0.3), "max_samples": 300, "num_images": 6, "results_dir": str(folder)} | settings
    return sequential.Config(runs=runs, **settings)


def test_certify_is_that_of_the_runs(runs, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sequential, "FIRST", 100)
    config = config_of(runs, tmp_path)
    rows = sequential.run(config)
    assert [(row["run"], row["value"]) for row in rows] == [(run, r) for run in runs for r in (0.1, 0.3)]
    for row in rows:
        with open(f"{row['run']}/certificates.csv") as file:
            certificates = list(csv.DictReader(file))
        certified = [line["correct"] == "1" and float(line["radius"]) >= row["value"] for line in certificates]
        assert row["certify"] == np.mean(certified)
        assert abs(row["sequential"] - row["certify"]) * 6 <= row["lost"] + row["gained"] + 1e-9
        assert row["lost"] + row["gained"] <= 1
        assert 100 < row["median"] <= row["draws"] <= 400
    assert "lost" in capfd.readouterr().out
    monkeypatch.setattr(sequential, "answers_of", None)  # nothing is computed again
    assert sequential.run(config) == rows
    for run in runs:  # as if both had been made anew with other noise
        path = pathlib.Path(run, "config.json")
        path.write_text(path.read_text().replace('"sigma": 0.3', '"sigma": 0.25'))
    try:
        with pytest.raises(ValueError, match="has other settings than when this comparison began"):
            sequential.run(config)
    finally:
        for run in runs:
            path = pathlib.Path(run, "config.json")
            path.write_text(path.read_text().replace('"sigma": 0.25', '"sigma": 0.3'))


def test_all_draws_and_the_first_of_them_answer_alike(runs, tmp_path, monkeypatch):
    quick = sequential.run(config_of(runs[:1], tmp_path, name="quick"))
    monkeypatch.setattr(sequential, "FIRST", 100)
    assert sequential.run(config_of(runs[:1], tmp_path, name="doubtful")) == quick
    whole = sequential.run(config_of(runs[:1], tmp_path, name="whole", tolerances=(0.2,)))
    assert whole[:-1] == quick
    label = files.read_arrays(tmp_path / "sequential" / "whole" / "run-0" / "4.npz")["tolerance 0.2"][:, 0]
    assert 0 < whole[-1]["sequential"] <= whole[-1]["certify"]
    assert (label != certification.ABSTAIN).any()


def test_no_doubt_is_rightly_so():
    votes, targets = np.arange(0, 5001, 20), [0.0, 0.25, 0.5]
    settings = {"max_samples": 100_000, "alpha": 0.001}
    doubtful = sequential.doubtful(votes, 5000, certification.gaussian(0.5), targets, **settings)
    needed = [0.5, 0.6914624612740131, 0.8413447460685429]  # Phi(r / sigma)
    share = votes / 5000
    for target in needed:
        assert doubtful[np.abs(share - target) < 0.02].all()
    assert not doubtful[np.min([np.abs(share - target) for target in needed], axis=0) > 0.05].any()


def test_bad_settings_are_named(runs, tmp_path, tmp_path_factory):
    copies, of = tmp_path_factory.mktemp("copies"), json.loads(pathlib.Path(runs[0], "config.json").read_text())
    less = {name: value for name, value in of.items() if name != "norm"}
    changed = {
        "twin": of,
        "other": of | {"train_sigma": 1.0},
        "list": [],
        "old": less,
        "taken": of | {"checkpoint": "x"},
    }
    for name, content in changed.items():
        (copies / name).mkdir()
        (copies / name / "config.json").write_text(json.dumps(content))
    for settings, message in (
        ({"runs": ()}, "runs must name run folders, each once"),
        ({"runs": (runs[0], runs[0] + "/")}, "runs must name run folders, each once"),
        ({"runs": (runs[0], str(copies / "twin"))}, "runs must have different seeds, got 0, 0"),
        ({"runs": (runs[0], str(copies / "other"))}, "runs must differ only in the seed, got train_sigma None in"),
        ({"runs": (str(copies / "list"),)}, "runs must be the folder of a run, but .* holds no JSON object"),
        ({"runs": (str(copies / "old"),)}, "runs must be runs of experiments.smoothing, of this version"),
        ({"runs": (str(copies / "taken"),)}, "runs must have trained their own model"),
        ({"radii": (0.1, 0.1)}, "radii must be given once each"),
        ({"max_samples": 5}, "max_samples must be larger: 5 certify nothing at alpha 0.001"),
        ({"radii": ()}, "radii or tolerances must have an entry"),
        ({"radii": (9.0,)}, r"radii must lie between 0 and 0\.599"),
        ({"tolerances": (1.0,)}, "tolerances must lie strictly between 0 and 1"),
        ({"alpha": 0.0}, "alpha must lie strictly between 0 and 1"),
        ({"num_images": 0}, "num_images must be an integer of at least 1"),
        ({"name": "../x"}, "name must be the name of a folder"),
        ({"runs": (str(tmp_path),)}, "runs must be the folder of a run, but .* cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            sequential.run(config_of(**{"runs": runs, "folder": tmp_path} | settings))
    assert not list(tmp_path.iterdir())
