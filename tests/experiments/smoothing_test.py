"""The smoothing experiment as a user meets it: a run, the same again, interrupted, changed, and badly set."""

import csv
import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from scipy import special

from experiments import smoothing, smoothing_report
from experiments.common import certificates, classifiers, command_line, smoothers
from experiments.smoothing import _report
from robustjax import certification, data, losses, metrics

ROOT = pathlib.Path(__file__).parents[2]
TINY = {"num_epochs": 2, "num_images": 6, "skip": 50, "num_estimation": 300, "sigma": 0.3}


def certifying(config: smoothing.Config) -> dict:
    """Settings of a run that certifies the model of another."""
    return {**TINY, "num_epochs": None, "checkpoint": str(config.folder())}


def without_seconds(folder) -> list[list[str]]:
    return [row[:-2] for row in csv.reader((folder / "certificates.csv").read_text().splitlines())]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = smoothing.Config(results_dir=str(tmp_path_factory.mktemp("results")), **TINY)
    return config, smoothing.run(config)


def test_a_run_leaves_its_folder(finished):
    config, summary = finished
    folder = config.folder()
    assert folder.parts[-2:] == ("smoothing", "digits-cnn-0.3")
    assert json.loads((folder / "metrics.json").read_text()) == summary
    rows = list(csv.DictReader((folder / "certificates.csv").read_text().splitlines()))
    assert tuple(rows[0]) == certificates.COLUMNS
    assert [int(row["index"]) for row in rows] == [0, 50, 100, 150, 200, 250]
    assert all(int(row["correct"]) == (row["label"] == row["predicted"]) for row in rows)
    assert (folder / "figures" / "certified_accuracy.png").read_bytes()[:4] == b"\x89PNG"
    assert "average certified radius" in (folder / "report.md").read_text()


def test_the_numbers_are_those_of_the_certificates(finished):
    config, summary = finished
    ids, labels, certificate, num_samples, _ = certificates.read(config.folder())
    assert set(num_samples) == {100 + 300}
    np.testing.assert_allclose(
        certificate.radius,
        np.where(certificate.abstained, 0, certification.gaussian(0.3).radius(certificate.probability)),
    )
    assert summary["average_certified_radius"] == metrics.average_certified_radius(certificate, labels)
    assert summary["radii"] == [0.0, 0.25, 0.5]  # the largest that 300 draws certify is 0.3 * 2.0
    np.testing.assert_array_equal(labels, data.load("digits", "test")[ids].label)


def test_what_is_known_early_costs_few_samples(finished, tmp_path, capfd):
    """The same model and draws: the certificates of a fixed number, less what the looks cost, at a target or in all."""
    config, _ = finished
    _, labels, fixed, *_ = certificates.read(config.folder())
    again = certifying(config) | {"results_dir": str(tmp_path), "batch_size": 50}
    asked = smoothing.Config(**again, target_radius=0.25)
    summary = smoothing.run(asked)
    _, _, certificate, num_samples, _ = certificates.read(asked.folder())
    assert asked.folder().name == "digits-cnn-0.3-of-digits-cnn-0.3-at-0.25"
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
    with pytest.raises(ValueError, match="has model cnn, got mlp; pass --model cnn"):
        smoothing.run(dataclasses.replace(asked, model="mlp"))


def test_other_noise_certifies_in_its_norm_and_any_run_in_a_smaller_one(finished, tmp_path):
    config, summary = finished
    trained = smoothing.Config(**{**TINY, "num_epochs": 1, "num_images": 2}, results_dir=str(tmp_path), noise="uniform")
    found = smoothing.run(trained)
    assert trained.folder().name == "digits-cnn-0.3-uniform"
    assert (found["norm"], found["radii"]) == ("l1", [0.0, 0.1, 0.2, pytest.approx(0.3), 0.4])  # below 0.52
    again = certifying(config) | {"results_dir": str(tmp_path)}
    found = smoothing.run(smoothing.Config(**again, norm="linf", radii=(0.0, 0.5 / 8)))
    assert found["average_certified_radius"] == pytest.approx(summary["average_certified_radius"] / 8)
    assert found["certified_accuracy"] == summary["certified_accuracy"][::2]


@pytest.mark.parametrize(
    ("training", "settings"),
    [
        ("stability", {}),
        ("consistency", {"train_weight": 2.0}),
        ("macer", {"train_draws": 2}),
        ("smoothadv", {"train_draws": 2, "train_steps": 2, "train_epsilon": 0.5}),
        ("smoothmix", {"train_steps": 2}),
    ],
)
def test_every_training_has_its_settings(training, settings):
    config = smoothing.Config(**settings, sigma=0.25, training=training)
    assert config.folder().name == f"digits-cnn-0.25-{training}"
    objective = config.objective(num_steps=4)  # of which the usual warm-up, a ninth, is none
    assert type(objective) is smoothers.TRAINING[training]
    assert objective.sigma == 0.25
    assert all(getattr(objective, smoothers.SETTINGS[name]) == value for name, value in settings.items())


def test_training_for_smoothing_runs(tmp_path):
    tiny = {**TINY, "model": "mlp", "num_epochs": 1, "num_images": 2, "num_estimation": 100}
    config = smoothing.Config(**tiny, training="smoothmix", train_steps=2, results_dir=str(tmp_path))
    assert smoothing.run(config)["num_images"] == 2


@pytest.mark.parametrize(
    ("training", "name", "at_start", "half_way"),
    [("smoothadv", "epsilon", 0.0, 1.0), ("smoothmix", "weight", 0.0, 5.0), ("macer", "weight", 0.0, 12.0)],
)
def test_what_is_warmed_up_reaches_its_setting(training, name, at_start, half_way):
    config = smoothing.Config(training=training, train_warmup=0.5)
    objective = config.objective(num_steps=100)
    at = lambda step: float(getattr(losses.at_step(objective, jax.numpy.int32(step)), name))
    assert (at(0), at(50), at(100)) == (at_start, half_way, half_way)
    assert at(25) == (0.0 if training == "macer" else half_way / 2)


def test_a_warm_up_out_of_place_is_refused():
    with pytest.raises(ValueError, match="train_warmup is no setting of consistency training, got 0.5"):
        smoothing.check(smoothing.Config(training="consistency", train_warmup=0.5))
    with pytest.raises(ValueError, match=r"train_warmup must lie in \[0, 1\), got 1.0"):
        smoothing.check(smoothing.Config(training="macer", train_warmup=1.0))


def test_dual_smoothing_certifies_the_sum_of_two_halves(tmp_path):
    tiny = {**TINY, "model": "mlp", "num_epochs": 1, "num_images": 3, "num_selection": 20, "num_estimation": 200}
    config = smoothing.Config(**tiny, dual=True, image_size=12, results_dir=str(tmp_path))
    assert config.folder().name == "digits-12px-mlp-0.3-dual"
    summary = smoothing.run(config)
    assert summary["num_images"] == 3
    assert summary["samples_per_image"] == 220
    _, _, certificate, *_ = certificates.read(config.folder())
    largest = 0.3 * np.sqrt(2) * special.ndtri(0.0005 ** (1 / 100))
    assert (certificate.radius <= largest + 1e-9).all()
    before = (config.folder() / "certificates.csv").read_bytes()
    assert smoothing.run(config)["certified_accuracy"] == summary["certified_accuracy"]
    assert (config.folder() / "certificates.csv").read_bytes() == before
    with pytest.raises(ValueError, match="noise must be gaussian with dual, got laplace"):
        smoothing.check(dataclasses.replace(config, noise="laplace"))


def test_each_half_sees_its_own_pixels_alone():
    functional = classifiers.build("mlp", data.load("digits", "test"), dtype="float32", key=jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (2, 8, 8, 1))
    mask = certification.checkerboard(8, 8)[None, :, :, None]
    for half, seen in zip(smoothers.halves_of(functional), (mask, ~mask), strict=True):
        logits = half.outputs(functional.state, x).logits
        np.testing.assert_array_equal(logits, half.outputs(functional.state, jax.numpy.where(seen, x, 7.0)).logits)
        np.testing.assert_array_equal(
            logits, functional.outputs(functional.state, jax.numpy.where(seen, x, 0.0)).logits
        )


def test_the_table_of_draws_that_can_certify_nothing_has_no_radii():
    config = smoothing.Config(num_estimation=5)
    assert _report.default_radii(config, config.measure(1)) == ()
    summary = {"num_images": 1, "norm": "l2", "standard_accuracy": 1.0, "radii": [], "certified_accuracy": []}
    summary |= {"average_certified_radius": 0.0, "abstained": 1.0, "samples_per_image": 105, "samples_per_second": 1}
    names = [name for name, _ in _report.rows_of(summary)]
    assert names[:3] == ["images", "standard accuracy", "average certified radius (ACR)"]


@pytest.mark.parametrize(
    ("radii", "told"),
    [
        ((0.25, 0.375), ["0.25", "0.375"]),
        ((0.0, 0.1, 3 * 0.1), ["0.00", "0.10", "0.30"]),
        ((0.0, 0.005), ["0", "0.005"]),
    ],
)
def test_no_radius_is_told_larger_than_it_is(radii, told):
    summary = {"num_images": 1, "norm": "l2", "standard_accuracy": 1.0, "radii": radii, "certified_accuracy": radii}
    summary |= {"average_certified_radius": None, "abstained": 1.0, "samples_per_image": 1, "samples_per_second": 1}
    names = [name.split()[-1] for name, _ in _report.rows_of(summary)]
    assert names[2:-3] == told


def test_the_table_of_dual_smoothing_goes_as_far_as_it_certifies():
    plain, dual = (smoothing.Config(sigma=0.5, dual=dual) for dual in (False, True))
    assert _report.largest_radius(plain, plain.measure(1)) == pytest.approx(0.5 * special.ndtri(0.001 ** (1 / 10_000)))
    assert _report.largest_radius(dual, dual.measure(1)) == pytest.approx(
        0.5 * np.sqrt(2) * special.ndtri(0.0005 ** (1 / 5000))
    )
    assert _report.default_radii(plain, plain.measure(1))[-1] == 1.5
    assert _report.default_radii(dual, dual.measure(1))[-1] == 2.0


def test_the_same_run_again_reuses_what_is_there(finished, capfd):
    config, summary = finished
    before = (config.folder() / "certificates.csv").read_bytes()
    again = smoothing.run(config)
    assert (config.folder() / "certificates.csv").read_bytes() == before
    # Where another test of this worker has certified an image again, its seconds are others too.
    of_this_call = dict.fromkeys(("training", "seconds", "seconds_per_image", "samples_per_second"))
    assert again | of_this_call == summary | of_this_call
    assert "Re-using the finished training of 20 steps" in capfd.readouterr().out


def test_a_line_cut_short_is_done_again(finished):
    config, _ = finished
    path = config.folder() / "certificates.csv"
    whole = without_seconds(config.folder())
    path.write_text(path.read_text()[:-25])
    smoothing.run(config)
    assert without_seconds(config.folder()) == whole


def test_damaged_lines_are_told_and_done_again(finished, capfd):
    config, _ = finished
    path = config.folder() / "certificates.csv"
    whole, lines = without_seconds(config.folder()), path.read_text().split("\n")
    for number, (pattern, instead) in enumerate([("^", "x"), (r"\d\.\d", "9.9")], 2):  # one still looks like a line
        lines[number] = re.sub(pattern, instead, lines[number], count=1)
    path.write_text("\n".join(lines))
    smoothing.run(config)
    assert without_seconds(config.folder()) == whole
    assert "certificates.csv has 2 damaged line(s); their images are certified again." in capfd.readouterr().out


def test_another_config_is_refused_and_overwrite_starts_anew(finished, tmp_path):
    config, _ = finished
    with pytest.raises(ValueError, match="another config .*alpha: 0.001 there, 0.01 now.*--overwrite to start anew"):
        smoothing.run(dataclasses.replace(config, alpha=0.01))
    settings = {**TINY, "num_images": 2, "results_dir": str(tmp_path)}
    smoothing.run(smoothing.Config(**settings))
    summary = smoothing.run(smoothing.Config(**settings, alpha=0.01, overwrite=True))
    assert summary["num_images"] == 2
    assert json.loads((tmp_path / "smoothing" / "digits-cnn-0.3" / "config.json").read_text())["alpha"] == 0.01
    itself = {**TINY, "num_epochs": None, "results_dir": str(tmp_path), "name": "digits-cnn-0.3", "overwrite": True}
    with pytest.raises(ValueError, match="checkpoint must be another run than the one in"):
        smoothing.run(smoothing.Config(**itself, checkpoint=str(tmp_path / "smoothing" / "digits-cnn-0.3")))


def test_a_config_of_something_else_is_left_alone_even_by_overwrite(tmp_path):
    folder = tmp_path / "smoothing" / "mine"
    folder.mkdir(parents=True)
    for content in ('{"model_type": "bert"}', "null", "{", "\x00"):
        (folder / "config.json").write_text(content)
        with pytest.raises(ValueError, match="is no run of this experiment; use another name|cannot be read"):
            smoothing.run(smoothing.Config(name="mine", results_dir=str(tmp_path), overwrite=True, **TINY))
        assert (folder / "config.json").read_text() == content


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    folder = tmp_path / "smoothing" / "mine"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("text")
    with pytest.raises(ValueError, match=r"holds files but no config.json"):
        smoothing.run(smoothing.Config(name="mine", results_dir=str(tmp_path), overwrite=True, **TINY))
    assert (folder / "thesis.tex").read_text() == "text"


def test_killed_at_random_moments_it_ends_with_the_same_certificates(finished, tmp_path):
    """SIGKILL, several times, while training and while certifying."""
    config, _ = finished
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    command = [sys.executable, "-m", "experiments.smoothing", f"--results-dir={tmp_path}", *flags]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}  # as in this process: training then rounds alike
    seed = random.randrange(10**6)
    generator = random.Random(seed)
    folder = tmp_path / "smoothing" / "digits-cnn-0.3"
    # Once after the run has begun, somewhere in training; once after a number of certificates.
    for path, lines, delay in (
        (folder / "config.json", 0, 4),
        (folder / "certificates.csv", generator.randrange(6), 0.05),
    ):
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if path.exists() and path.read_text().count("\n") > lines:
                time.sleep(generator.uniform(0, delay))
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    assert without_seconds(folder) == without_seconds(config.folder()), f"seed {seed}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma": -0.25}, "sigma must be positive and finite, got -0.25"),
        ({"alpha": 1.0}, "alpha must lie strictly between 0 and 1, got 1.0"),
        ({"num_estimation": 0}, "num_estimation must be an integer of at least 1, got 0"),
        ({"num_selection": -1}, "num_selection must be an integer of at least 1, got -1"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"num_epochs": 0}, "num_epochs must be an integer of at least 1, got 0"),
        ({"learning_rate": -0.1}, "learning_rate must be positive and finite, got -0.1"),
        ({"skip": 0}, "skip must be an integer of at least 1, got 0"),
        ({"train_sigma": -1.0}, "train_sigma must be 0 or positive and finite, got -1.0"),
        ({"grid": 0}, "grid must be an integer of at least 1, got 0"),
        ({"grid": 16, "noise": "laplace"}, "grid is for gaussian noise, got grid 16 with laplace noise"),
        ({"radii": (-0.5,)}, "radii must be at least 0"),
        ({"target_radius": -0.5}, "target_radius must be 0 or positive and finite, got -0.5"),
        ({"target_radius": 0.5, "radii": (0.25, 0.75)}, "radii must be at most target_radius=0.5: nothing is known"),
        ({"target_radius": 3.0}, r"target_radius must be at most 0.799\d*, the largest that 10,000 draws can .* got 3"),
        (
            {"target_radius": 0.9, "noise": "uniform"},
            "target_radius must be at most 0.43.* with uniform noise of sigma",
        ),
        ({"radii": (np.inf,)}, "radii must be at least 0 and finite"),
        (
            {"checkpoint": "run", "training": "macer", "num_epochs": 1, "train_split": "train[:9]"},
            "train_split, training, num_epochs must be left out with checkpoint",
        ),
        ({"checkpoint": "no_such_run"}, "checkpoint must be the folder of a run"),
        ({"training": "macer", "train_epsilon": 0.5}, "train_epsilon is no setting of macer training, got 0.5"),
        ({"training": "consistency", "train_draws": 1}, "num_noise must be .* at least 2, got 1"),
        (
            {"training": "stability", "train_sigma": 0.0},
            "stability training needs gaussian noise, got gaussian noise with",
        ),
        ({"training": "smoothmix", "noise": "uniform"}, "smoothmix training needs gaussian noise, got uniform noise"),
        ({"seed": -1}, "seed must lie in"),
        ({"name": ""}, "name must be the name of a folder, got ''"),
        ({"name": "../other"}, "name must be the name of a folder"),
        ({"model": "alexnet"}, "must be one of mlp, lenet, cnn"),
        ({"recipe": "none"}, "recipe must be one of digits, mnist"),
        ({"dataset": "no_such_set"}, "Unknown data set 'no_such_set'"),
        ({"test_split": "exam"}, "exam"),
    ],
)
def test_a_bad_setting_is_named_and_nothing_is_written(settings, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        smoothing.run(smoothing.Config(results_dir=str(tmp_path), **settings))
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_normalised_by_the_images_that_it_was_trained_on(tmp_path):
    theirs = {"dataset": "digits", "model": "cnn", "train_split": "exam"}
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    with pytest.raises(ValueError, match="exam"):
        smoothing.run(smoothing.Config(checkpoint=str(tmp_path), results_dir=str(tmp_path / "results")))


def test_an_error_of_the_user_is_one_line(tmp_path):
    command = [sys.executable, "-m", "experiments.smoothing", "--sigma", "0", f"--results-dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: sigma must be positive and finite, got 0.0.\n"


def test_the_help_shows_every_setting(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["smoothing", "--help"])
    with pytest.raises(SystemExit, match="0"):
        command_line.command_line(smoothing.Config, smoothing.run, smoothing.__doc__)
    text = capsys.readouterr().out
    assert all(f"--{field.name.replace('_', '-')}" in text for field in dataclasses.fields(smoothing.Config))


def test_runs_are_compared(finished, tmp_path, capfd):
    config, summary = finished
    output = tmp_path / "both.png"
    smoothing_report.run(smoothing_report.Config(runs=(config.folder(), config.folder()), output=output))
    assert output.read_bytes()[:4] == b"\x89PNG"
    assert f"{summary['average_certified_radius']:.3f}" in capfd.readouterr().out
    with pytest.raises(FileNotFoundError, match="is no finished run"):
        smoothing_report.run(smoothing_report.Config(runs=(tmp_path,)))
    with pytest.raises(ValueError, match="runs must name at least one"):
        smoothing_report.run(smoothing_report.Config(runs=()))


@pytest.mark.data
def test_a_tfds_data_set_runs_the_same(data_dir, tmp_path):
    settings = {**TINY, "num_epochs": 1, "num_images": 2, "train_split": "train[:512]", "skip": 1}
    summary = smoothing.run(smoothing.Config(dataset="mnist", data_dir=data_dir, results_dir=str(tmp_path), **settings))
    assert summary["num_images"] == 2
