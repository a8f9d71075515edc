"""The experiment end to end on few inputs: what it leaves, what it does not make again, what it refuses."""

import csv
import dataclasses
import json
import os

import numpy as np
import pytest

from experiments import halfspaces
from experiments.common import files

TINY = {"dimension": 2, "num_samples": 3000, "epsilon": 0.2, "delta": 0.1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halfspaces, "NUM_FRESH", 2000)
        patch.setattr(halfspaces, "DISTRIBUTIONS", {name: halfspaces.DISTRIBUTIONS[name] for name in ("normal", "gap")})
        config = halfspaces.Config(**TINY, seeds=1, results_dir=str(tmp_path_factory.mktemp("results")))
        halfspaces.run(config)
        folder = halfspaces.folder_of(config)
        before = {path: os.stat(path).st_mtime_ns for path in [*folder.glob("*.npz"), *folder.glob("*/*.npz")]}
        rows = halfspaces.run(dataclasses.replace(config, seeds=3))
        yield config, rows, folder, before


def test_it_leaves_its_folder_and_makes_no_seed_twice(finished):
    _, rows, folder, before = finished
    assert len(before) == 3  # thresholds, and a seed of each distribution
    assert {path: os.stat(path).st_mtime_ns for path in before} == before
    written = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert [(row["distribution"], int(row["seed"])) for row in written] == [
        (name, seed) for name in ("normal", "gap") for seed in range(3)
    ]
    assert len(rows) == 6
    summary = json.loads((folder / "metrics.json").read_text())["summary"]
    assert summary["gap"]["accepted"] == 0
    assert summary["gap"]["failed"]["T2"] == 3
    assert summary["normal"]["accepted"] >= 2
    assert (folder / "figures" / "statistics.png").is_file()
    assert "| normal |" in (folder / "report.md").read_text()


def test_rows_say_what_was_measured(finished):
    _, rows, folder, _ = finished
    limits = files.read_arrays(folder / "thresholds.npz")
    for row in rows:
        failed = any(row[name] > float(limit) for name, limit in limits.items())
        assert not (failed and row["accepted"])
        assert 0 <= row["excess"] <= 1
        if row["distribution"] == "normal":
            assert row["excess"] < TINY["epsilon"]
            assert row["error"] == pytest.approx(row["best_error"] + row["excess"], abs=0.05)


def test_distributions_are_what_they_say():
    w = np.array([0.6, 0.8, 0.0])
    rng = np.random.default_rng(0)
    assert np.abs(halfspaces.gap(rng, 500, w) @ w).min() >= halfspaces.GAP * (1 - 1e-9)
    flat = halfspaces.flat(rng, 5000, w)
    near = flat[np.abs(flat @ w) < halfspaces.FLAT]
    assert len(near) > 50
    assert np.linalg.matrix_rank(near - np.outer(near @ w, w), tol=1e-6) == 1
    for name in ("normal", "whitened", "student", "hypercube"):
        variance = getattr(halfspaces, name)(rng, 50_000, w).var(0)
        np.testing.assert_allclose(variance, 1, rtol=0.3 if name == "student" else 0.05)


def test_a_small_delta_has_the_draws_that_it_needs(tmp_path):
    tiny = TINY | {"num_samples": 30, "delta": 0.01}
    thresholds = halfspaces.thresholds_of(halfspaces.Config(**tiny, results_dir=str(tmp_path)))
    assert all(np.isfinite(limit) for limit in thresholds)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": 0}, "seeds must be an integer of at least 1, got 0"),
        ({"eta": 0.6}, r"eta must lie in \[0, 1/2\), got 0.6"),
        ({"epsilon": 0.0}, "epsilon must lie strictly between 0 and 1, got 0.0"),
        ({"delta": 1.0}, "delta must lie strictly between 0 and 1, got 1.0"),
        ({"dimension": 1}, "dimension must be an integer of at least 2, got 1"),
        ({"num_samples": 32}, "num_samples must be an integer of at least 33, got 32"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        halfspaces.run(halfspaces.Config(**settings, results_dir=str(tmp_path)))
    assert not any(tmp_path.iterdir())


def test_another_config_is_refused(finished):
    config, *_ = finished
    with pytest.raises(ValueError, match="belongs to a run with another config"):
        halfspaces.run(dataclasses.replace(config, eta=0.1))
