"""The experiment end to end on digits: what it leaves, what it re-uses, what it leaves out."""

import csv
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath

from experiments import ood
from experiments.common import classifiers, detectors, foreign, runtimes
from experiments.ood import _config, _report, _score, _train
from robustjax import losses, metrics

SMALL = {"model": "mlp", "num_epochs": 2, "seeds": 1, "detectors": ("msp",)}


def read(path):
    with np.load(path) as scores:
        return dict(scores)


@pytest.fixture(scope="module")
def finished(ood_run):
    config, rows = ood_run
    return config, rows, config.folder()


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Most of a small run would go into drawing; ``finished``, which is made before, has its figures."""
    monkeypatch.setattr(_report, "figures_of", lambda *_, **__: {})


def test_a_run_leaves_its_folder(finished):
    _, rows, folder = finished
    for name in ("config.json", "metrics.csv", "metrics.json", "report.md", "scores/in.npz", "scores/held_out.npz"):
        assert (folder / name).is_file(), name
    pictures = {path.name for path in (folder / "figures").iterdir()}
    assert pictures == {"score_histograms.png", "roc_near.png", "roc_far.png", "auroc.png", "images.png"}
    written = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert len(written) == len(rows) == 2 * 4 * 4  # seeds, detectors, sets
    assert {row["group"] for row in written if row["set"] == "held_out"} == {"near"}
    report = (folder / "report.md").read_text()
    assert "## AUROC, mean (sd) over 2 seeds" in report
    for part in ("near", "far", "textures (far)", "uniform_noise (far)", "permuted_pixels (far)"):
        assert f"## {part}; FPR@95TPR with out-of-distribution positive" in report
    by_set = report.split("## textures (far)")[1].split("##")[0].splitlines()
    assert by_set[2] == "| detector | AUROC | AUPR-in | AUPR-out | FPR@95TPR |"
    of_msp = [r for r in rows if (r["detector"], r["set"]) == ("msp", "textures")]
    want = [np.mean([r[m] for r in of_msp]) for m in ("auroc", "aupr_in", "aupr_out", "fpr_ood_positive")]
    [found] = [line.replace("*", "").split("|")[2:-1] for line in by_set if "| msp |" in line]
    assert [float(cell.split()[0]) for cell in found] == pytest.approx(want, abs=6e-4)


def test_rows_are_the_metrics_of_the_scores(finished):
    _, rows, folder = finished
    inside, outside = (read(folder / "scores" / f"{part}.npz") for part in ("in", "textures"))
    row = next(r for r in rows if (r["seed"], r["detector"], r["set"]) == (1, "react+energy", "textures"))
    name = row["detector"]
    assert inside[name].shape[0] == outside[name].shape[0] == 2
    assert row["auroc"] == pytest.approx(metrics.auroc(inside[name][1], outside[name][1]))
    assert row["num_in"] == inside[name].shape[1]


def test_classes_are_those_of_the_split(finished):
    config, rows, _ = finished
    assert config.resolved().classes == (0, 1, 2, 3, 4, 5)
    sizes = {r["set"]: r["num_out"] for r in rows}
    assert rows[0]["num_in"] + sizes["held_out"] == 500


def test_groups_are_unweighted_means():
    rows = [
        {"seed": s, "detector": "d", "set": part, "group": "far", "auroc": value + s}
        for s in (0, 1)
        for part, value in (("a", 0.2), ("b", 0.6))
    ]
    np.testing.assert_allclose(_report.over_seeds(rows, "d", "auroc", group="far"), [0.4, 1.4])
    np.testing.assert_allclose(_report.over_seeds(rows, "d", "auroc", part="b"), [0.6, 1.6])


def test_more_detectors_join_what_is_there(finished):
    config, _, folder = finished
    before = {path: os.stat(path).st_mtime_ns for path in folder.glob("seed-*/scores/*.npz")}
    ood.run(dataclasses.replace(config, detectors=("msp", "entropy"), seeds=1))
    assert {path: os.stat(path).st_mtime_ns for path in before} == before
    assert (folder / "seed-0/scores/entropy.npz").is_file()
    assert not (folder / "seed-1/scores/entropy.npz").exists()
    written = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert len(written) == 2 * 4 * 4 + 4  # of the other seed and of the new detector's one
    assert read(folder / "scores" / "in.npz")["msp"].shape[0] == 2


def test_another_config_is_refused(finished):
    config, _, folder = finished
    with pytest.raises(ValueError, match="num_epochs: 5 there, 2 now"):
        ood.run(dataclasses.replace(config, num_epochs=2, name=folder.name))


def test_copies_and_scores_without_a_set_are_named(finished, tmp_path, capsys):
    config, rows, folder = finished
    config = dataclasses.replace(config, results_dir=str(tmp_path))
    shutil.copytree(folder, config.folder())
    shutil.copytree(folder / "seed-0", config.folder() / "seed-0 copy")
    scores = _score.scores_of(config.folder(), ("textures",))
    assert {seed for seed, _ in scores} == {0, 1}
    assert "seed-0 copy is left out: seeds are in seed-0" in capsys.readouterr().out.replace("\n", "")
    with pytest.raises(ValueError, match="energy.npz must hold in, near, .* got no near; delete it to make it again"):
        _score.scores_of(config.folder(), ("near",))
    shutil.copytree(folder / "seed-0", config.folder() / "seed-2")
    with pytest.raises(
        ValueError, match=r"seed-2.* another config \(seed: 0 there, 2 now\); use another folder, delete"
    ):
        ood.run(dataclasses.replace(config, seeds=3))


def test_a_model_of_another_experiment_is_scored(finished, tmp_path):
    config, rows, folder = finished
    scored = ood.run(ood.Config(model="mlp", checkpoint=str(folder), detectors=("energy",), results_dir=str(tmp_path)))
    want = [r["auroc"] for r in rows if r["seed"] == 0 and r["detector"] == "energy"]
    np.testing.assert_allclose([r["auroc"] for r in scored], want)


@pytest.mark.slow
def test_killed_at_random_it_ends_with_the_same_scores(finished, tmp_path):
    config, _, folder = finished
    ours_folder = tmp_path / "ood" / folder.name
    command = [sys.executable, "-m", "experiments.ood", "--model", "mlp", "--num-epochs", "5", "--seeds", "1"]
    command += ["--detectors", "msp", "energy", "--results-dir", str(tmp_path)]
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}
    # Not while it is importing: in training, while checkpoints are written, between two detectors.
    begun = ours_folder / random.choice(["config.json", "seed-0/checkpoints", "seed-0/scores/msp.npz"])
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not begun.exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    process.wait()
    ood.run(dataclasses.replace(config, detectors=("msp", "energy"), seeds=1, results_dir=str(tmp_path)))
    for part in ("in", "held_out"):
        ours = read(ours_folder / "scores" / f"{part}.npz")
        for name in ("msp", "energy"):
            theirs = read(folder / "seed-0" / "scores" / f"{name}.npz")[part]
            np.testing.assert_allclose(ours[name][0], theirs, rtol=1e-4, atol=1e-4)


def test_objectives_are_those_of_their_names():
    wanted = {
        "standard": losses.standard(),
        "logit_norm": losses.logit_norm(),
        "mixup": losses.mixup(num_classes=6),
        "cutmix": losses.cutmix(num_classes=6),
        "outlier_exposure": losses.outliers.outlier_exposure(),
        "energy_bounded": losses.standard(),
    }
    assert tuple(wanted) == _config.TRAINING
    assert all(_train.objective_of(name, 6) == objective for name, objective in wanted.items())


def test_training_with_outliers_runs(tmp_path):
    config = ood.Config(training="outlier_exposure", outliers="gaussian_noise", **SMALL, results_dir=str(tmp_path))
    assert all(0 <= row["auroc"] <= 1 for row in ood.run(config))
    assert json.loads((config.folder() / "metrics.json").read_text())["accuracy"][0] > 0.2


def test_a_model_with_bounded_energy_is_fine_tuned(tmp_path):
    names = {"near": (), "far": ("uniform_noise",), "outliers": "gaussian_noise"}
    sets = foreign.open_sets("digits", None, classes=range(6), **names, max_images=500, seed=0)
    functional = classifiers.build("mlp", sets.train, dtype="float32", key=jax.random.key(0))
    settings = {"recipe": classifiers.recipe_of("digits", None), "num_epochs": 2, "key": jax.random.key(1), "seed": 0}
    settings["runtime"] = runtimes.Runtime(mesh="data=1")  # programs for one device compile sooner
    tuned = _train.classifier_of("energy_bounded", functional, sets, epath.Path(tmp_path), **settings)
    before = classifiers.restored(str(tmp_path), functional)
    inside, outside = sets.test[:100].image, sets.outliers[:100].image
    gap = lambda classifier: _train.mean_energy(classifier, outside) - _train.mean_energy(classifier, inside)
    assert gap(tuned) > gap(before)
    assert tuned.accuracy(sets.test, np.arange(100)) > 0.2


def test_parts_of_a_set_are_tested_and_what_cannot_be_fitted_is_left_out(tmp_path, capsys, monkeypatch):
    fit = detectors.fit

    def unfit(name, context):
        if name == "she":
            raise ValueError("no row of class 3.")
        return fit(name, context)

    monkeypatch.setattr(detectors, "fit", unfit)
    monkeypatch.setattr(foreign, "overlap", lambda *_: False)  # digits stand in for a foreign set
    monkeypatch.setattr(_score, "MAX_IMAGES", 25)
    far = ("digits@train[:20]", "digits@train[20:50]")
    settings = {**SMALL, "far": far, "results_dir": str(tmp_path)}
    rows = ood.run(ood.Config(**settings | {"detectors": ("she", "msp")}))
    assert {row["detector"] for row in rows} == {"msp"}
    assert [{row["set"]: row["num_out"] for row in rows}[name] for name in far] == [20, 25]
    assert len(list(tmp_path.glob("ood/*/scores/digits@train_*.npz"))) == 2
    assert "she is left out: no row of class 3." in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match="detectors could not be fitted, none of she"):
        ood.run(ood.Config(**settings | {"detectors": ("she",), "name": "other"}))
