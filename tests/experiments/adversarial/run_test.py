"""The experiment end to end on digits: what it leaves, what it re-uses, what it warns of."""

import csv
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import adversarial
from experiments.adversarial import _attack
from experiments.common import adversaries, classifiers, files, runtimes, sanity, targets

TINY = {"model": "mlp", "num_epochs": 2, "num_images": 12, "epsilons": (0.05, 0.3)}
ATTACKS = ("fgsm", "pgd_20", "autoattack")
ONE = runtimes.Runtime(mesh="data=1")  # as the run that is there


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sanity, "STEPS", (1, 4))
        yield


@pytest.fixture(scope="module")
def finished(adversarial_run):
    config, rows = adversarial_run
    return config, rows, config.folder()


def files_of(folder):
    return {path: os.stat(path).st_mtime_ns for path in folder.glob("adversarial/*.npz")}


def test_a_run_leaves_its_folder(finished):
    _, rows, folder = finished
    assert folder.parts[-2:] == ("adversarial", "digits-mlp-pgd-linf-0.15")
    for name in ("config.json", "metrics.csv", "metrics.json", "report.md", "adversarial/clean.npz"):
        assert (folder / name).is_file(), name
    names = {f"linf-{epsilon}-{name}.npz" for epsilon in (0.05, 0.3) for name in ATTACKS}
    assert {path.name for path in files_of(folder)} == {"clean.npz", *names}
    pictures = {path.name for path in (folder / "figures").iterdir()}
    assert pictures == {"robust_accuracy_linf.png", "images_linf.png", "loss_over_steps_linf.png"}
    written = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert len(written) == len(rows) == 2 * (3 + 3)  # attacks, and those of AutoAttack
    checks = json.loads((folder / "metrics.json").read_text())["checks"]
    assert [check["result"] for check in checks] == ["pass"] * 4
    report = (folder / "report.md").read_text()
    assert "| all of them |" in report
    assert "## AutoAttack, linf, accuracy left after each part" in report
    assert "| pass | PGD-20 at linf 1, where every image is within reach, leaves an accuracy of 0.000. |" in report


def test_rows_are_those_of_the_images(finished):
    config, rows, folder = finished
    clean = files.read_arrays(folder / "adversarial" / "clean.npz")
    train, test = config.images()
    image = np.asarray(test[clean["id"]].image)
    functional = classifiers.build("mlp", train, dtype="float32", key=jax.random.key(1))
    logits_fn = classifiers.restored(str(folder), functional).logits_fn()
    for row in rows:
        if ":" in row["attack"]:
            continue
        arrays = files.read_arrays(folder / "adversarial" / f"linf-{row['epsilon']:g}-{row['attack']}.npz")
        assert np.abs(arrays["x_adv"].astype(np.float64) - image).max() <= row["epsilon"]
        answer = np.asarray(logits_fn(jnp.asarray(arrays["x_adv"]))).argmax(-1)
        np.testing.assert_array_equal(arrays["correct"], (answer == clean["label"]) & clean["correct"])
        assert row["robust_accuracy"] == arrays["correct"].mean() <= row["clean_accuracy"]


def test_parts_of_autoattack_have_rows(finished):
    _, rows, _ = finished
    parts = [row for row in rows if row["epsilon"] == 0.05 and ":" in row["attack"]]
    whole = next(row for row in rows if row["epsilon"] == 0.05 and row["attack"] == "autoattack")
    assert [row["attack"] for row in parts] == [f"autoattack: {p}" for p in ("apgd-ce", "apgd-t", "square")]
    accuracies = [row["robust_accuracy"] for row in parts]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[-1] == whole["robust_accuracy"]
    assert sum(row["queries"] for row in parts) == whole["queries"]


def test_it_fits_a_narrow_terminal(finished, capfd, monkeypatch):
    config, _, _ = finished
    monkeypatch.setenv("COLUMNS", "80")
    adversarial.run(config, ONE)
    adversarial.run(adversarial.Config(list=True))
    printed = [line for line in capfd.readouterr().out.splitlines() if not line.startswith(("Run folder", "Re-using"))]
    assert max(len(line) for line in printed) <= 80
    assert not any("…" in line for line in printed)


def test_more_attacks_and_radii_join_what_is_there(finished):
    config, _, folder = finished
    before = files_of(folder)
    (folder / "figures" / "images_l2.png").write_bytes(b"of an earlier command")
    rows = adversarial.run(dataclasses.replace(config, attacks=("fgsm",), epsilons=(0.05, 0.1)), ONE)
    assert [(row["epsilon"], row["attack"]) for row in rows] == [(0.05, "fgsm"), (0.1, "fgsm")]
    assert set(files_of(folder)) - set(before) == {folder / "adversarial" / "linf-0.1-fgsm.npz"}
    assert {path: files_of(folder)[path] for path in before} == before
    assert "l2" not in (folder / "report.md").read_text()


def test_another_config_is_refused(finished):
    config, _, folder = finished
    with pytest.raises(ValueError, match="num_images: 12 there, 13 now"):
        adversarial.run(dataclasses.replace(config, num_images=13, name=folder.name), ONE)


def test_a_damaged_file_is_named(finished):
    config, _, folder = finished
    path = folder / "adversarial" / "linf-0.05-fgsm.npz"
    content = path.read_bytes()
    path.write_bytes(content[:100])
    try:
        with pytest.raises(ValueError, match=r"linf-0.05-fgsm.npz is damaged .*; delete it to make it again"):
            adversarial.run(dataclasses.replace(config, attacks=("fgsm",)), ONE)
    finally:
        path.write_bytes(content)


def test_a_model_of_another_run_is_attacked(finished, tmp_path):
    _, rows, folder = finished
    settings = {**TINY, "num_epochs": None, "checkpoint": str(folder), "results_dir": str(tmp_path)}
    again = adversarial.run(adversarial.Config(**settings, attacks=("fgsm",)), ONE)
    want = [row["robust_accuracy"] for row in rows if row["attack"] == "fgsm"]
    assert [row["robust_accuracy"] for row in again] == want
    with pytest.raises(ValueError, match=r"has model mlp, not cnn; pass --model mlp"):
        adversarial.run(adversarial.Config(**{**settings, "model": "cnn"}), ONE)


def test_a_smoothed_model_is_right_where_it_is_certified(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "NUM_PREDICTION", 200)
    monkeypatch.setattr(_attack, "NUM_ESTIMATION", 1000)
    _, _, folder = finished
    settings = {**TINY, "num_epochs": None, "num_images": 6, "checkpoint": str(folder), "epsilons": (0.1, 5.0)}
    config = adversarial.Config(
        **settings, smoothed=True, sigma=0.25, samples=4, attacks=("pgd_20",), results_dir=str(tmp_path)
    )
    rows = adversarial.run(config, ONE)
    assert [(row["norm"], row["attack"]) for row in rows] == [("l2", "pgd_20")] * 2
    assert all(row["certified_accuracy"] <= row["robust_accuracy"] for row in rows)
    assert rows[0]["certified_accuracy"] > 0.3
    assert rows[-1]["robust_accuracy"] < rows[0]["robust_accuracy"]
    assert [row["queries"] for row in rows] == [80, 80]
    report = (config.folder() / "report.md").read_text()
    assert "| certified |" in report
    assert "| pass | Robust accuracy is nowhere below certified accuracy: of" in report


@pytest.mark.slow
def test_killed_while_it_attacks_it_ends_with_the_same_images(finished, tmp_path):
    """Here, after the death of another process."""
    config, _, folder = finished
    command = [sys.executable, "-m", "experiments.adversarial", "--model", "mlp", "--num-epochs", "2"]
    command += ["--num-images", "12", "--epsilons", "0.05", "0.3", "--attacks", "fgsm", "pgd_20"]
    command += ["--results-dir", str(tmp_path), "--mesh", "data=1"]
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}  # as in this process: training then rounds alike
    ours = tmp_path / "adversarial" / folder.name
    awaited = ours / "adversarial" / "linf-0.05-fgsm.npz"
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while process.poll() is None and not awaited.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = os.stat(awaited).st_mtime_ns
    adversarial.run(dataclasses.replace(config, attacks=("fgsm", "pgd_20"), results_dir=str(tmp_path)), ONE)
    assert os.stat(awaited).st_mtime_ns == written
    for name in ("clean", "linf-0.05-fgsm", "linf-0.3-pgd_20"):
        one, other = (
            files.read_arrays(f / "adversarial" / f"{name}.npz", leave_out=("seconds",)) for f in (folder, ours)
        )
        assert one.keys() == other.keys()
        for array in one:
            np.testing.assert_allclose(one[array], other[array], atol=1e-6, err_msg=f"{name} {array}")


def test_what_intervals_verify_is_certified_and_no_attack_breaks_it(finished, tmp_path, capfd):
    """Of any model, if the radius is small enough."""
    _, _, folder = finished
    settings = {**TINY, "num_epochs": None, "checkpoint": str(folder), "epsilons": (0.001, 0.01, 0.5)}
    attacks = {"attacks": ("fgsm", "pgd_20"), "certify_intervals": True}
    config = adversarial.Config(**settings | attacks, results_dir=str(tmp_path))
    rows = adversarial.run(config, ONE)
    certified = {row["epsilon"]: row["certified_accuracy"] for row in rows}
    assert certified[0.001] >= certified[0.01]
    assert certified[0.001] > 0.1
    assert certified[0.5] == 0
    assert all(row["robust_accuracy"] >= row["certified_accuracy"] for row in rows)
    shown = capfd.readouterr().out
    assert "certified" in shown
    assert re.search(r"of [1-9]\d* certified images, 0 are", " ".join(shown.split()))


def test_an_attack_that_fails_is_named_and_the_others_are_kept(finished, tmp_path, monkeypatch):
    _, _, folder = finished
    make = adversaries.make

    def broken(name, *args, **kwargs):
        if name == "pgd_20":
            raise ValueError("the reason.")
        return make(name, *args, **kwargs)

    monkeypatch.setattr(adversaries, "make", broken)
    settings = {
        **TINY,
        "num_epochs": None,
        "checkpoint": str(folder),
        "results_dir": str(tmp_path),
        "epsilons": (0.05,),
    }
    config = adversarial.Config(**settings, attacks=("fgsm", "pgd_20"))
    with pytest.raises(ValueError, match="pgd_20 at linf 0.05: the reason. Earlier attacks are kept."):
        adversarial.run(config)  # on eight devices
    kept = config.folder() / "adversarial"
    assert {path.name for path in kept.iterdir()} == {"clean.npz", "linf-0.05-fgsm.npz"}
