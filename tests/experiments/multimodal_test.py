"""The experiment end to end on a few digits: what it leaves, what it does not make again, what it refuses."""

import csv
import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import multimodal
from robustjax.typing import Outputs

TINY = {"hidden": 8, "num_epochs": 2, "num_images": 12, "steps": 4, "epsilons": "0.2", "test_split": "test[:60]"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = multimodal.Config(**TINY, seeds=1, results_dir=str(tmp_path_factory.mktemp("results")))
    multimodal.run(config)
    folder = multimodal.folder_of(config)
    before = os.stat(folder / "seeds" / "0.npz").st_mtime_ns
    return config, multimodal.run(config), folder, before


def test_it_leaves_its_folder_and_makes_no_seed_twice(finished):
    _, rows, folder, before = finished
    assert os.stat(folder / "seeds" / "0.npz").st_mtime_ns == before
    written = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert [(row["training"], int(row["seed"])) for row in written] == [(arm, 0) for arm in multimodal.ARMS]
    summary = json.loads((folder / "metrics.json").read_text())["summary"]
    assert summary["step 1"]["clean"]["mean"] == rows[2]["clean"]
    assert (folder / "figures" / "accuracy.png").is_file()
    report = (folder / "report.md").read_text()
    assert "of one seed. PGD and FAB, l2, found 0 wrong answers inside a certified radius" in report
    assert f"| clean | {rows[0]['clean']:.3f} | " in report


def test_rows_say_what_was_measured(finished):
    _, rows, _, _ = finished
    for row in rows:
        assert row["violations"] == 0
        assert row["nearest attack"] >= 1
        assert {row["stronger half"]} < {"left", "right"}
        for name in ("without stronger", "without weaker", "PGD 0.2 both", "PGD 0.2 stronger"):
            assert 0 <= row[name] <= 1
        assert row["certified radius both"] >= row["radius both"]
        assert row["certified radius stronger"] > row["certified radius both"] > 0
    of_arm = {row["training"]: row for row in rows}
    for first, second in zip(multimodal.ARMS[::2], multimodal.ARMS[1::2]):
        assert of_arm[second]["radius both"] > of_arm[first]["radius both"]
    assert of_arm["step 1"]["radius both"] != of_arm["cross-entropy"]["radius both"]


def test_gradients_go_through_what_is_free():
    outputs = lambda state, x: Outputs(state * x.reshape(x.shape[0], -1), x)
    x, free = jnp.ones((1, 2, 4, 1)), jnp.array([False, True, True, False])
    logits = multimodal._logits_of(outputs)
    assert logits(2.0, free, x).sum() == 16
    gradient = jax.grad(lambda x: logits(2.0, free, x).sum())(x)
    np.testing.assert_array_equal(gradient[0, :, :, 0], [[0, 2, 2, 0]] * 2)


def test_a_half_is_black():
    image = np.ones((3, 2, 4, 1), np.float32)
    np.testing.assert_array_equal(multimodal.without(image, 0)[0, 0, :, 0], [0, 0, 1, 1])
    np.testing.assert_array_equal(multimodal.without(image, 1)[0, 0, :, 0], [1, 1, 0, 0])
    assert image.all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": 0}, "seeds must be an integer of at least 1, got 0"),
        ({"dataset": "cifar10"}, "dataset must be one of digits, mnist, got 'cifar10'"),
        ({"step_2_rate": 0.0}, "step_2_rate must be positive and finite, got 0.0"),
        ({"num_epochs": 0}, "num_epochs must be an integer of at least 1, got 0"),
        ({"epsilons": "x"}, "epsilons must"),
        ({"rho": -1.0}, "rho must be at least 0 and finite, got -1.0"),
        ({"step_2_decay": float("nan")}, "step_2_decay must be at least 0 and finite, got nan"),
        ({"hidden": 1}, "hidden must be an integer of at least 2, got 1"),
        ({"test_split": "exam"}, "exam"),
    ],
)
def test_bad_settings_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        multimodal.run(multimodal.Config(**settings, results_dir=str(tmp_path)))
    assert not any(tmp_path.iterdir())


def test_another_config_is_refused(finished):
    config, *_ = finished
    with pytest.raises(ValueError, match="belongs to a run with another config"):
        multimodal.run(dataclasses.replace(config, rho=1.0))
