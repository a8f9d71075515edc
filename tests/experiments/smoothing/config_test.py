"""Settings of the smoothing experiment: what they mean, and what is refused before anything is written."""

import json
import sys

import jax
import numpy as np
import pytest
from scipy import special

from experiments import smoothing
from experiments.common import classifiers, command_line, smoothers
from experiments.smoothing import _report
from robustjax import data, losses


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
    assert loss_of(config.objective(num_steps=100)).shape == ()


def loss_of(objective):
    """Its shape, by tracing: the objective fits the models."""
    train = data.load("digits", "test")
    functional = classifiers.build("mlp", train, dtype="float32", key=jax.random.key(0))
    state, step, batch = functional.state, jax.numpy.int32(0), jax.tree.map(jax.numpy.asarray, train[:2])
    of = lambda key: losses.at_step(objective, step)(key, functional.apply, state, batch)[0]
    return jax.eval_shape(of, jax.random.key(0))


@pytest.mark.parametrize("noise", ["uniform", "laplace"])
def test_other_noise_trains_on_itself(noise):
    objective = smoothing.Config(noise=noise, sigma=0.5).objective(num_steps=1)
    assert loss_of(objective).shape == ()
    draws = objective.measure.sample(jax.random.key(0), jax.numpy.zeros(10_000))
    assert np.std(draws) == pytest.approx(0.5, rel=0.05)


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
    with pytest.raises(ValueError, match="train_warmup is not a setting of consistency training, got 0.5"):
        smoothing.Config(training="consistency", train_warmup=0.5)
    with pytest.raises(ValueError, match=r"train_warmup must lie in \[0, 1\), got 1.0"):
        smoothing.Config(training="macer", train_warmup=1.0)


def summary_of(**numbers):
    summary = {"num_images": 1, "norm": "l2", "standard_accuracy": 1.0, "certified_accuracy": numbers["radii"]}
    return summary | {"abstained": 1.0, "samples_per_image": 105, "samples_per_second": 1} | numbers


def test_the_table_of_draws_that_can_certify_nothing_has_no_radii():
    assert smoothers.default_radii(largest(smoothing.Config(num_estimation=5))) == ()
    names = [name for name, _ in _report.table_of(summary_of(radii=(), average_certified_radius=0.0)).rows]
    assert names[:3] == ["images", "standard accuracy", "average certified radius (ACR)"]


@pytest.mark.parametrize(
    ("radii", "shown"),
    [
        ((0.25, 0.375), ["0.25", "0.375"]),
        ((0.0, 0.1, 3 * 0.1), ["0.00", "0.10", "0.30"]),
        ((0.0, 0.005), ["0", "0.005"]),
    ],
)
def test_no_radius_is_shown_larger_than_it_is(radii, shown):
    rows = _report.table_of(summary_of(radii=radii, average_certified_radius=None)).rows
    names = [name.split()[-1] for name, _ in rows]
    assert names[2:-3] == shown


def largest(config):
    settings = {"num_estimation": config.num_estimation, "alpha": config.alpha, "dual": config.dual}
    return smoothers.largest_radius(config.measure(1), **settings)


def test_the_table_of_dual_smoothing_goes_as_far_as_it_certifies():
    plain, dual = (largest(smoothing.Config(sigma=0.5, dual=dual)) for dual in (False, True))
    assert plain == pytest.approx(0.5 * special.ndtri(0.001 ** (1 / 10_000)))
    assert dual == pytest.approx(0.5 * np.sqrt(2) * special.ndtri(0.0005 ** (1 / 5000)))
    assert smoothers.default_radii(plain)[-1] == 1.5
    assert smoothers.default_radii(dual)[-1] == 2.0


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
        ({"train_sigma": -1.0}, "train_sigma must be at least 0 and finite, got -1.0"),
        ({"grid": 0}, "grid must be an integer of at least 1, got 0"),
        ({"grid": 16, "noise": "laplace"}, "grid is for gaussian noise, got grid 16 with laplace noise"),
        ({"radii": (-0.5,)}, "radii must be at least 0"),
        ({"target_radius": -0.5}, "target_radius must be at least 0 and finite, got -0.5"),
        (
            {"target_radius": 0.5, "radii": (0.25, 0.75)},
            "radii must be at most target_radius=0.5, beyond which nothing is",
        ),
        ({"target_radius": 3.0}, r"target_radius must be at most 0.799\d*, the largest that 10,000 draws can .* got 3"),
        (
            {"target_radius": 0.9, "noise": "uniform"},
            "target_radius must be at most 0.43.* with uniform noise of sigma",
        ),
        ({"radii": (np.inf,)}, "radii must be at least 0 and finite"),
        (
            {"checkpoint": "run", "training": "macer", "num_epochs": 1, "train_split": "train[:9]"},
            "train_split, training, num_epochs cannot be combined with checkpoint",
        ),
        ({"checkpoint": "no_such_run"}, "checkpoint must be the folder of a run"),
        ({"training": "macer", "train_epsilon": 0.5}, "train_epsilon is not a setting of macer training, got 0.5"),
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


def test_an_error_of_the_user_leaves_no_trace(tmp_path, capsys, monkeypatch):
    def end_of(*flags):
        monkeypatch.setattr(sys, "argv", ["smoothing", *flags, f"--results-dir={tmp_path}"])
        with pytest.raises(SystemExit) as end:
            command_line.command_line(smoothing.Config, smoothing.run, smoothing.__doc__)
        return end.value.code

    assert end_of("--target-radius=3").startswith("error: target_radius must be at most 0.799")
    assert end_of("--sigma=0") == 2
    assert "sigma must be positive and finite, got 0.0." in capsys.readouterr().err
