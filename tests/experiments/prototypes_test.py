"""The experiment end to end on digits: what it leaves, what it does not do again, what it refuses."""

import csv
import dataclasses
import json
import os

import numpy as np
import pytest

from experiments import _prototypes_report, prototypes, smoothing
from experiments.common import certificates, files

TINY = {
    "reasoning": "cbc", "num_components": 2, "num_epochs": 1, "num_images": 12, "attack_steps": 3,
    "losses": ("radius",), "seeds": (0,), "test_split": "test[:64]",
}  # fmt: skip


def smoothed(folder):
    """A run of three certificates: one right, one wrong, one abstained."""
    folder.mkdir()
    rows = [(0, 3, (3, 0.4, 0.9, 100)), (1, 5, (6, 2.0, 0.9, 100)), (2, 5, (-1, 0.0, 0.4, 100))]
    lines = [",".join(certificates.COLUMNS), *(certificates.line_of(*row, 0.1) for row in rows)]
    (folder / "certificates.csv").write_text("\n".join(lines) + "\n")
    return str(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    config = prototypes.Config(**TINY, results_dir=str(folder), smoothing=smoothed(folder / "smoothed"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prototypes, "ATTACK_LOSSES", ("margin",))  # one program less to compile
        rows = prototypes.run(config)
    return config, rows, config.folder()


def test_a_run_leaves_its_folder(finished):
    _, rows, folder = finished
    assert folder.parts[-2:] == ("prototypes", "digits-cbc-2")
    written = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert [(row["loss"], row["seed"]) for row in written] == [("radius", "0")]
    figures = {path.name for path in (folder / "figures").iterdir()}
    assert figures == {"certified_accuracy.png", "prototypes_radius.png"}
    report = (folder / "report.md").read_text()
    assert f"| accuracy | {rows[0]['accuracy']:.3f} |\n" in report  # of one seed: no standard deviation
    assert f"- {rows[0]['attacked']} attacks within the radius" in report
    assert "Smoothing (smoothed), 3 images: ACR 0.133; certified 0.333 at 0.25, 0.000 at 0.5" in report
    assert json.loads((folder / "metrics.json").read_text())["rows"] == rows
    assert rows[0]["violations"] == 0


def test_rows_are_those_of_the_certificates(finished):
    _, [row], folder = finished
    arrays = files.read_arrays(folder / "radius-0" / "certificates.npz")
    radius, right = arrays["radius"], arrays["answer"] == arrays["label"]
    np.testing.assert_array_equal(radius > 0, right)
    assert len(radius) == 64
    assert row["accuracy"] == right.mean()
    assert row["mean_radius"] == pytest.approx(radius[right].sum() / 64)
    assert row["certified_at_0.25"] == ((radius >= 0.25) & right).mean()
    assert 0 < row["attacked"] == len(arrays["attacked"]) <= 12
    assert np.isin(arrays["attacked"], arrays["id"][right]).all()
    assert arrays["components"].min() >= 0
    assert arrays["components"].max() <= 1


def test_what_is_done_is_not_done_again(finished, monkeypatch):
    config, rows, folder = finished
    monkeypatch.setattr(prototypes._classifier, "train", None)
    before = {path: os.stat(path).st_mtime_ns for path in folder.glob("*/certificates.npz")}
    assert prototypes.run(dataclasses.replace(config, smoothing=None)) == rows
    assert {path: os.stat(path).st_mtime_ns for path in before} == before


def test_a_violation_is_counted(finished):
    _, _, folder = finished
    arrays = dict(files.read_arrays(folder / "radius-0" / "certificates.npz"))
    arrays["fooled_random"] = np.arange(len(arrays["attacked"])) == 0
    assert _prototypes_report.row_of("radius", 0, arrays, ())["violations"] == 1
    arrays["answer"] = np.where(arrays["id"] == arrays["attacked"][1], -1, arrays["answer"])
    assert _prototypes_report.row_of("radius", 0, arrays, ())["violations"] == 2


def test_gains_are_paired_by_seed_and_each_by_its_own_certificate():
    row = lambda loss, seed, accuracy, ours, published: {
        "loss": loss, "seed": seed, "accuracy": accuracy, "mean_radius": ours, "mean_published_radius": published
    }  # fmt: skip
    rows = [row("margin", 0, 0.5, 1.0, 0.5), row("margin", 1, 0.5, 2.0, 1.0)]
    rows += [row("radius", 0, 0.75, 1.5, 0.1), row("radius", 1, 0.25, 2.0, 0.1)]
    rows += [row("published_radius", 1, 0.5, 9.0, 1.25)]
    gains = _prototypes_report.gains_of(rows)
    assert gains["radius"] == {"radius": [0.5, 0.0], "accuracy": [0.25, -0.25]}
    assert gains["published_radius"] == {"radius": [0.25], "accuracy": [0.0]}
    assert _prototypes_report.gains_of(rows[:1]) == {}


def test_a_new_run_of_smoothing_is_of_the_same_images(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(smoothing, "run", made.append)
    config = prototypes.Config(**TINY, results_dir=str(tmp_path), smoothing="new", sigma=0.3)
    folder = prototypes.smoothing_run(config)
    assert folder == made[0].folder()
    assert (made[0].dataset, made[0].test_split, made[0].sigma) == ("digits", "test[:64]", 0.3)
    assert folder.parent.parent == config.folder()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_components": 0}, "num_components must be an integer of at least 1, got 0"),
        ({"num_components": 500}, "num_components must be at most 1.., the images of the smallest class, got 500"),
        ({"num_epochs": 0}, "num_epochs must be an integer of at least 1, got 0"),
        ({"attack_steps": 0}, "attack_steps must be an integer of at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
        ({"losses": ()}, "losses must hold at least one value"),
        ({"seeds": (1, 1)}, r"seeds must hold at least one value, and each once, got \(1, 1\)"),
        ({"seeds": (-1,)}, r"seeds must lie in \[0, 2\*\*32\), got \(-1,\)"),
        ({"radii": (-1.0,)}, "radii must be at least 0 and finite"),
        ({"margin": 2.0}, "margin must lie strictly between 0 and 1, got 2.0"),
        ({"target": 0.0}, "target must be positive and finite, got 0.0"),
        ({"name": "a/b"}, "name must be the name of a folder, got 'a/b'"),
        ({"smoothing": "no/such/run"}, "smoothing must be a run of experiments.smoothing, no/such/run has no"),
    ],
)
def test_a_bad_setting_is_named_and_nothing_is_written(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        prototypes.run(prototypes.Config(**settings, results_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())
