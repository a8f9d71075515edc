"""The conformal experiment as a user meets it: a run, more of it, the same again, and badly set."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from experiments import _conformal_report, conformal
from experiments.common import files

TINY = {"model": "mlp", "num_epochs": 3, "num_images": 120, "num_samples": 16, "attack_steps": 2, "attack_samples": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = conformal.Config(
        **TINY, results_dir=str(tmp_path_factory.mktemp("results")), scores=("thr",), splits=4, rct=True, rct_epochs=1
    )
    return config, conformal.run(config)


def test_a_run_leaves_its_folder(finished):
    config, rows = finished
    folder = config.folder()
    assert folder.name == "digits-mlp-0.25-0.125"
    with (folder / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows) == 2 * 2 * 4 * 2
    told = json.loads((folder / "metrics.json").read_text())
    assert "The guarantee of RSCP+, 0.9, is" in told["findings"][0]
    assert "with PTT" in told["findings"][1]
    assert "with both" in told["findings"][1]
    assert len((folder / "figures" / "sizes.png").read_bytes()) > 5000
    assert "| rct | thr+ptt | rscp+ |" in (folder / "report.md").read_text()


def test_sets_that_count_with_more_are_larger(finished):
    _, rows = finished
    size = lambda method, **at: _conformal_report.over_seeds(rows, "size", method=method, images="clean", **at)
    for training in ("gaussian", "rct"):
        at = {"training": training, "score": "thr"}
        assert size("conformal", **at) < size("rscp", **at) <= size("rscp+", **at)
    covered = [row["coverage"] for row in rows if row["method"] == "rscp+"]
    assert min(covered) >= 0.9


def test_attacked_images_lie_in_the_ball_and_are_harder(finished):
    config, _ = finished
    from robustjax import data

    images = conformal.images_of(config, data.load("digits", "test"))
    x_adv = files.read_arrays(config.folder() / "seed-0" / "attacked-gaussian.npz")["x_adv"]
    lengths = np.linalg.norm((x_adv - images.pool[0]).reshape(len(x_adv), -1), axis=1)
    assert lengths.max() <= 0.125 + 1e-6
    assert lengths.min() > 0.1
    scores = files.read_arrays(config.folder() / "seed-0" / "scores-gaussian-thr.npz")
    rows = np.arange(len(x_adv)), images.pool[1]
    assert scores["attacked_mean"][rows].mean() > scores["clean_mean"][rows].mean() + 0.005


def test_the_same_run_again_computes_nothing_and_more_scores_join(finished, capfd):
    config, rows = finished
    assert conformal.run(config) == rows
    assert "seed 0: gaussian" not in capfd.readouterr().out
    more = dataclasses.replace(config, scores=("thr", "aps"), rct=False)
    assert {row["score"] for row in conformal.run(more)} == {"thr", "thr+ptt", "aps", "aps+ptt"}
    with pytest.raises(ValueError, match="sigma: 0.25 there, 0.5 now"):
        conformal.run(dataclasses.replace(config, sigma=0.5, name=config.folder().name))


def test_a_violated_guarantee_is_said():
    row = {"seed": 0, "training": "gaussian", "images": "clean", "coverage_error": 0.01, "size": 1.0}
    rows = [row | {"score": s, "method": "rscp+", "coverage": c} for s, c in (("thr", 0.91), ("thr+ptt", 0.95))]
    assert "is VIOLATED: at worst 0.910, 0.890 less two" in _conformal_report.findings_of(rows, 0.1)[0]
    assert "is held" in _conformal_report.findings_of(rows, 0.2)[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta": 0.05}, "beta must lie strictly between 0 and alpha / 2 = 0.05, got 0.05"),
        ({"alpha": 1.0}, "alpha must lie strictly between 0 and 1, got 1.0"),
        ({"epsilon": 0.0}, "epsilon must be positive and finite, got 0.0"),
        ({"scores": ()}, "scores must name each of thr, aps, raps at most once"),
        ({"splits": 0}, "splits must be an integer of at least 1, got 0"),
        ({"checkpoint": "run", "seeds": 2}, "seeds must be 1 with a checkpoint"),
        ({"num_holdout": 500}, "num_holdout must leave images to calibrate and test, got 500 of 500"),
    ],
)
def test_bad_settings_are_named(settings, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        conformal.run(conformal.Config(**settings, results_dir=str(tmp_path)))
