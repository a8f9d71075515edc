"""The smoothing experiment as a user meets it: a run, the same again, interrupted, damaged, compared."""

import csv
import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy import special

from experiments import smoothing
from experiments.common import certificates, runtimes
from robustjax import certification, data, metrics

ROOT = pathlib.Path(__file__).parents[3]
TINY = {"model": "mlp", "num_epochs": 10, "num_images": 6, "num_estimation": 300, "sigma": 0.3}
ONE = runtimes.Runtime(mesh="data=1")  # programs for one device compile sooner


def certifying(config: smoothing.Config) -> dict:
    """Settings of a run that certifies the model of another."""
    return {**TINY, "num_epochs": None, "checkpoint": str(config.folder())}


def without_seconds(folder) -> list[list[str]]:
    return [row[:-2] for row in csv.reader((folder / "certificates.csv").read_text().splitlines())]


def test_a_run_leaves_its_folder(smoothing_run):
    config, summary = smoothing_run
    folder = config.folder()
    assert folder.parts[-2:] == ("smoothing", "digits-mlp-0.3")
    assert json.loads((folder / "metrics.json").read_text()) == summary
    rows = list(csv.DictReader((folder / "certificates.csv").read_text().splitlines()))
    assert tuple(rows[0]) == certificates.COLUMNS
    assert [int(row["index"]) for row in rows] == [0, 1, 2, 3, 4, 5]
    assert all(int(row["correct"]) == (row["label"] == row["predicted"]) for row in rows)
    assert (folder / "figures" / "certified_accuracy.png").read_bytes()[:4] == b"\x89PNG"
    assert "average certified radius" in (folder / "report.md").read_text()


def test_the_numbers_are_those_of_the_certificates(smoothing_run):
    config, summary = smoothing_run
    ids, labels, certificate, num_samples, _ = certificates.read(config.folder())
    assert set(num_samples) == {100 + 300}
    np.testing.assert_allclose(
        certificate.radius,
        np.where(certificate.abstained, 0, certification.gaussian(0.3).radius(certificate.probability)),
    )
    assert summary["average_certified_radius"] == metrics.average_certified_radius(certificate, labels)
    assert summary["radii"] == [0.0, 0.25, 0.5]  # the largest that 300 draws certify is 0.3 * 2.0
    np.testing.assert_array_equal(labels, data.load("digits", "test")[ids].label)


def test_what_is_known_early_costs_few_samples(smoothing_run, tmp_path, capfd):
    """The same model and draws: the certificates of a fixed number, less what the looks cost, at a target or in all."""
    config, _ = smoothing_run
    _, labels, fixed, *_ = certificates.read(config.folder())
    again = certifying(config) | {"results_dir": str(tmp_path), "batch_size": 50}
    asked = smoothing.Config(**again, target_radius=0.25)
    summary = smoothing.run(asked)
    _, _, certificate, num_samples, _ = certificates.read(asked.folder())
    assert asked.folder().name == "digits-mlp-0.3-of-digits-mlp-0.3-at-0.25"
    assert set(certificate.radius) == {0.0, 0.25}
    certified = certificate.radius == 0.25
    assert not (certified & (fixed.radius < 0.25)).any()
    assert certified[fixed.radius > 0.3].all()
    assert summary["samples_per_image"] == num_samples.mean() < 300
    assert (summary["radii"], summary["average_certified_radius"]) == ([0.25], None)
    assert summary["certified_accuracy"] == [(certified & (certificate.label == labels)).mean()]
    sequential = smoothing.Config(**again, sequential=True)
    smoothing.run(sequential)
    _, _, certificate, num_samples, _ = certificates.read(sequential.folder())
    assert (fixed.radius - 0.05 < certificate.radius).all()
    assert (certificate.radius <= fixed.radius).all()
    assert num_samples.min() < num_samples.max() == 400
    assert "average certified radius" in capfd.readouterr().out
    with pytest.raises(ValueError, match="has model mlp, not cnn; pass --model mlp"):
        smoothing.run(dataclasses.replace(asked, model="cnn"))


def test_other_noise_certifies_in_its_norm_and_any_run_in_a_smaller_one(smoothing_run, tmp_path):
    config, summary = smoothing_run
    again = certifying(config) | {"results_dir": str(tmp_path)}
    other = smoothing.Config(**again, noise="uniform")
    found = smoothing.run(other)
    assert other.folder().name == "digits-mlp-0.3-uniform-of-digits-mlp-0.3"
    assert (found["norm"], found["radii"]) == ("l1", [0.0, 0.1, 0.2, pytest.approx(0.3), 0.4])  # below 0.52
    found = smoothing.run(smoothing.Config(**again, norm="linf", radii=(0.0, 0.5 / 8)))
    assert found["average_certified_radius"] == pytest.approx(summary["average_certified_radius"] / 8)
    assert found["certified_accuracy"] == summary["certified_accuracy"][::2]


def test_dual_smoothing_certifies_the_sum_of_two_halves(tmp_path):
    tiny = {**TINY, "num_epochs": 1, "num_images": 3, "num_selection": 20, "num_estimation": 200}
    config = smoothing.Config(**tiny, dual=True, results_dir=str(tmp_path))
    assert config.folder().name == "digits-mlp-0.3-dual"
    summary = smoothing.run(config, ONE)
    assert summary["num_images"] == 3
    assert summary["samples_per_image"] == 220
    _, _, certificate, *_ = certificates.read(config.folder())
    largest = 0.3 * np.sqrt(2) * special.ndtri(0.0005 ** (1 / 100))
    assert (certificate.radius <= largest + 1e-9).all()
    before = (config.folder() / "certificates.csv").read_bytes()
    assert smoothing.run(config, ONE)["certified_accuracy"] == summary["certified_accuracy"]
    assert (config.folder() / "certificates.csv").read_bytes() == before
    with pytest.raises(ValueError, match="noise must be gaussian with dual, got laplace"):
        dataclasses.replace(config, noise="laplace")


def test_the_same_run_again_reuses_what_is_there(smoothing_run, capfd):
    config, summary = smoothing_run
    before = (config.folder() / "certificates.csv").read_bytes()
    again = smoothing.run(config)
    assert (config.folder() / "certificates.csv").read_bytes() == before
    # Where another test of this worker has certified an image again, its seconds are others too.
    of_this_call = dict.fromkeys(("training", "seconds", "seconds_per_image", "samples_per_second"))
    assert again | of_this_call == summary | of_this_call
    assert "Re-using the finished training of 100 steps" in capfd.readouterr().out


def test_damaged_lines_are_reported_and_certified_again(smoothing_run, capfd):
    config, _ = smoothing_run
    path = config.folder() / "certificates.csv"
    whole, lines = without_seconds(config.folder()), path.read_text().split("\n")
    for number, (pattern, instead) in enumerate([("^", "x"), (r"\d\.\d", "9.9")], 2):  # one still looks like a line
        lines[number] = re.sub(pattern, instead, lines[number], count=1)
    path.write_text("\n".join(lines)[:-25])  # and the last line is cut short
    smoothing.run(config)
    assert without_seconds(config.folder()) == whole
    assert "certificates.csv has 2 damaged line(s); their images are certified again." in capfd.readouterr().out


def test_another_config_is_refused_and_overwrite_starts_again(smoothing_run, tmp_path):
    config = dataclasses.replace(smoothing_run[0], results_dir=str(tmp_path))
    folder = config.folder()
    shutil.copytree(smoothing_run[0].folder(), folder)
    with pytest.raises(ValueError, match="another config .*alpha: 0.001 there, 0.01 now.*--overwrite to start again"):
        smoothing.run(dataclasses.replace(config, alpha=0.01))
    itself = {**TINY, "num_epochs": None, "results_dir": str(tmp_path), "name": "digits-mlp-0.3", "overwrite": True}
    with pytest.raises(ValueError, match="checkpoint must not be the run folder itself"):
        smoothing.run(smoothing.Config(**itself, checkpoint=str(folder)))
    damaged = tmp_path / "damaged"  # a run without a checkpoint: the old run is not deleted for it
    damaged.mkdir()
    (damaged / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        smoothing.run(smoothing.Config(**itself, checkpoint=str(damaged)))
    assert (folder / "metrics.json").exists()
    (folder / "of_before").touch()
    assert smoothing.run(dataclasses.replace(config, alpha=0.01, overwrite=True))["num_images"] == 6
    assert json.loads((folder / "config.json").read_text())["alpha"] == 0.01
    assert not (folder / "of_before").exists()


def test_killed_at_a_random_moment_it_ends_with_the_same_certificates(smoothing_run, tmp_path):
    """SIGKILL while training or while certifying, then resumed here; benchmarks.faults does it many times."""
    config, _ = smoothing_run
    ours = dataclasses.replace(config, results_dir=str(tmp_path))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    command = [sys.executable, "-m", "experiments.smoothing", f"--results-dir={tmp_path}", *flags]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}  # as in this process: training then rounds alike
    seed = random.randrange(10**6)
    generator, folder = random.Random(seed), tmp_path / "smoothing" / "digits-mlp-0.3"
    # After the run has begun, somewhere in training; or after a number of certificates.
    moments = ((folder / "config.json", 0, 4), (folder / "certificates.csv", generator.randrange(6), 0.05))
    path, lines, delay = generator.choice(moments)
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and path.read_text().count("\n") > lines:
            time.sleep(generator.uniform(0, delay))
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert ours.folder() == folder
    smoothing.run(ours)
    assert without_seconds(folder) == without_seconds(config.folder()), f"seed {seed}"


def test_runs_are_compared(smoothing_run, tmp_path, capfd):
    config, summary = smoothing_run
    folder = str(config.folder())
    smoothing.run(smoothing.Config(compare=(folder, folder), results_dir=str(tmp_path), figure_format="pdf"))
    assert (tmp_path / "smoothing" / "certified_accuracy.pdf").read_bytes()[:4] == b"%PDF"
    assert f"{summary['average_certified_radius']:.3f}" in capfd.readouterr().out
    with pytest.raises(FileNotFoundError, match="is not a finished run"):
        smoothing.run(smoothing.Config(compare=(str(tmp_path),)))
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"run": "ood"}')
    with pytest.raises(ValueError, match=r"compare must name runs of experiments\.smoothing, got "):
        smoothing.run(smoothing.Config(compare=(str(tmp_path),)))


@pytest.mark.data
def test_a_tfds_data_set_runs_the_same(data_dir, tmp_path):
    settings = {**TINY, "num_epochs": 1, "num_images": 2, "train_split": "train[:512]"}
    config = smoothing.Config(dataset="mnist", data_dir=data_dir, results_dir=str(tmp_path), **settings)
    summary = smoothing.run(config, ONE)
    assert summary["num_images"] == 2
