"""The experiment end to end on digits: what it leaves, what it re-uses, what it refuses, what it warns of."""

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
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from experiments import adversarial
from experiments.adversarial import _sanity
from experiments.common import adversaries, classifiers, files
from experiments.common.targets import Target
from robustjax import attacks, losses, models

TINY = {"model": "mlp", "num_epochs": 2, "num_images": 12, "epsilons": "0.05,0.3"}
ATTACKS = "fgsm,pgd_20,autoattack"


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_sanity, "STEPS", (1, 4))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = adversarial.Config(**TINY, attacks=ATTACKS, results_dir=str(tmp_path_factory.mktemp("results")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        rows = adversarial.run(config)
    return config, rows, adversarial.folder_of(adversarial.resolved(config))


def files_of(folder):
    return {path: os.stat(path).st_mtime_ns for path in folder.glob("adversarial/*.npz")}


def test_a_run_leaves_its_folder(finished):
    _, rows, folder = finished
    assert folder.parts[-2:] == ("adversarial", "digits-mlp-pgd-linf-0.15")
    for name in ("config.json", "metrics.csv", "metrics.json", "report.md", "adversarial/clean.npz"):
        assert (folder / name).is_file(), name
    names = {f"linf-{epsilon}-{name}.npz" for epsilon in (0.05, 0.3) for name in ATTACKS.split(",")}
    assert {path.name for path in files_of(folder)} == {"clean.npz", *names}
    pictures = {path.name for path in (folder / "figures").iterdir()}
    assert pictures == {"robust_accuracy_linf.png", "images_linf.png", "loss_over_steps_linf.png"}
    written = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert len(written) == len(rows) == 2 * (3 + 4)  # attacks, and those of AutoAttack
    checks = json.loads((folder / "metrics.json").read_text())["checks"]
    assert [check["result"] for check in checks] == ["pass"] * 4
    report = (folder / "report.md").read_text()
    assert "| all of them |" in report
    assert "## AutoAttack, linf, left after" in report
    assert "- pass: PGD-20 at linf 1, where every image is within reach, leaves 0.000." in report


def test_a_run_keeps_to_the_model_it_began_with(tmp_path):
    made = [models.create("mlp", jax.random.key(i), image_shape=(4, 4, 1), hidden=(3,)) for i in (0, 1)]
    one, other = (classifiers.Classifier(of, of.state, None) for of in map(models.functional, made))
    for _ in range(2):
        classifiers.keep_to(one, epath.Path(tmp_path))
    with pytest.raises(ValueError, match="checkpoint must hold the model that the run in .* began with"):
        classifiers.keep_to(other, epath.Path(tmp_path))
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(ValueError, match=r"model.json cannot be read \(.*\); pass --overwrite"):
        classifiers.keep_to(one, epath.Path(tmp_path))


def test_rows_are_those_of_the_images(finished):
    config, rows, folder = finished
    clean = files.read_arrays(folder / "adversarial" / "clean.npz")
    train, test = adversaries.parts_of(adversarial.resolved(config))
    image = np.asarray(test[clean["id"]].image)
    functional = classifiers.build("mlp", train, dtype="float32", key=jax.random.key(1))
    logits_fn = classifiers.restored(str(folder), functional, None).logits_fn()
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
    assert [row["attack"] for row in parts] == [f"autoattack: {p}" for p in ("apgd-ce", "apgd-t", "fab-t", "square")]
    accuracies = [row["robust_accuracy"] for row in parts]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[-1] == whole["robust_accuracy"]
    assert sum(row["queries"] for row in parts) == whole["queries"]


def test_it_fits_a_narrow_terminal(finished, capfd, monkeypatch):
    config, _, _ = finished
    monkeypatch.setenv("COLUMNS", "80")
    adversarial.run(config)
    adversarial.run(adversarial.Config(list=True))
    printed = [line for line in capfd.readouterr().out.splitlines() if not line.startswith(("Run folder", "Re-using"))]
    assert max(len(line) for line in printed) <= 80
    assert not any("…" in line for line in printed)


def test_more_attacks_and_radii_join_what_is_there(finished):
    config, _, folder = finished
    before = files_of(folder)
    (folder / "figures" / "images_l2.png").write_bytes(b"of an earlier command")
    rows = adversarial.run(dataclasses.replace(config, attacks="fgsm", epsilons="0.05,0.1"))
    assert [(row["epsilon"], row["attack"]) for row in rows] == [(0.05, "fgsm"), (0.1, "fgsm")]
    assert set(files_of(folder)) - set(before) == {folder / "adversarial" / "linf-0.1-fgsm.npz"}
    assert {path: files_of(folder)[path] for path in before} == before
    assert "l2" not in (folder / "report.md").read_text()


def test_another_config_is_refused(finished):
    config, _, folder = finished
    with pytest.raises(ValueError, match="num_images: 12 there, 13 now"):
        adversarial.run(dataclasses.replace(config, num_images=13, name=folder.name))


def test_a_damaged_file_is_named(finished):
    config, _, folder = finished
    path = folder / "adversarial" / "linf-0.05-fgsm.npz"
    content = path.read_bytes()
    path.write_bytes(content[:100])
    try:
        with pytest.raises(ValueError, match=r"linf-0.05-fgsm.npz is damaged .*; delete it to make it again"):
            adversarial.run(dataclasses.replace(config, attacks="fgsm"))
    finally:
        path.write_bytes(content)


def test_a_model_of_another_run_is_attacked(finished, tmp_path):
    _, rows, folder = finished
    settings = {**TINY, "num_epochs": None, "checkpoint": str(folder), "results_dir": str(tmp_path)}
    again = adversarial.run(adversarial.Config(**settings, attacks="fgsm"))
    want = [row["robust_accuracy"] for row in rows if row["attack"] == "fgsm"]
    assert [row["robust_accuracy"] for row in again] == want
    with pytest.raises(ValueError, match=r"has model mlp, got cnn; pass --model mlp"):
        adversarial.run(adversarial.Config(**{**settings, "model": "cnn"}))


def test_a_smoothed_model_is_right_where_it_is_certified(finished, tmp_path):
    _, _, folder = finished
    settings = {**TINY, "num_epochs": None, "num_images": 6, "checkpoint": str(folder), "epsilons": "0.1,5"}
    config = adversarial.Config(**settings, smoothed=True, sigma=0.25, samples=4, results_dir=str(tmp_path))
    rows = adversarial.run(config)
    assert [(row["norm"], row["attack"]) for row in rows] == [("l2", "fgsm")] * 2 + [("l2", "pgd_20")] * 2
    assert all(row["certified_accuracy"] <= row["robust_accuracy"] for row in rows)
    assert rows[0]["certified_accuracy"] > 0.3
    assert rows[-1]["robust_accuracy"] < rows[0]["robust_accuracy"]
    assert [row["queries"] for row in rows] == [4, 4, 80, 80]
    report = (adversarial.folder_of(adversarial.resolved(config)) / "report.md").read_text()
    assert "| certified |" in report
    assert "- pass: Robust accuracy is nowhere below what is certified: of" in report


def test_killed_while_it_attacks_it_ends_with_the_same_images(finished, tmp_path):
    """Here, after the death of another process."""
    config, _, folder = finished
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    command = [sys.executable, "-m", "experiments.adversarial", *flags, "--attacks=fgsm,pgd_20"]
    command += ["--results-dir", str(tmp_path)]
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
    adversarial.run(dataclasses.replace(config, attacks="fgsm,pgd_20", results_dir=str(tmp_path)))
    assert os.stat(awaited).st_mtime_ns == written
    for name in ("clean", "linf-0.05-fgsm", "linf-0.3-pgd_20"):
        one, other = (
            files.read_arrays(f / "adversarial" / f"{name}.npz", leave_out=("seconds",)) for f in (folder, ours)
        )
        assert one.keys() == other.keys()
        for array in one:
            np.testing.assert_allclose(one[array], other[array], atol=1e-6, err_msg=f"{name} {array}")


def an_evaluation(n, **parts):
    return attacks.Evaluation(
        clean_accuracy=1.0, robust_accuracy=0.5, per_attack=parts, correct=np.arange(n) % 2 == 0,
        x_adv=np.zeros((n, 8, 8, 1), np.float32), queries=dict.fromkeys(parts, 100),
        seconds=dict.fromkeys(parts, 1.0), warnings=("a sentence.",),
    )  # fmt: skip


def test_what_a_part_of_autoattack_has_found_is_kept(monkeypatch, tmp_path):
    @dataclasses.dataclass
    class Interrupted:
        batch_size: int | None = None

        def evaluate(self, key, logits_fn, x, labels, on_attack=None, resume=None):
            assert self.batch_size == 4
            if resume is None:
                on_attack("one", an_evaluation(4, one=0.75))
                raise KeyboardInterrupt
            assert resume.per_attack == {"one": 0.75}
            assert resume.robust_accuracy == 0.75
            assert resume.warnings == ("a sentence.",)
            on_attack("two", an_evaluation(4, one=0.75, two=0.5))
            return an_evaluation(4, one=0.75, two=0.5)

    monkeypatch.setattr(adversaries, "make", lambda *_, **__: Interrupted())
    monkeypatch.setattr(Target, "answers", lambda self, key, images: np.zeros(len(images), int))
    classifier: Any = types.SimpleNamespace(logits_fn=lambda: None, place=lambda rows: rows)
    target = Target(classifier, np.arange(4), np.zeros((4, 8, 8, 1), np.float32), np.zeros(4, np.int32), 4)
    path = tmp_path / "linf-0.1-autoattack.npz"
    settings = (target, "autoattack", 0.1, "linf", jax.random.key(0), path)
    with pytest.raises(KeyboardInterrupt):
        adversarial.attack_once(*settings)
    assert [p.name for p in tmp_path.iterdir()] == ["linf-0.1-autoattack.parts.npz"]
    arrays = adversarial.attack_once(*settings)
    assert not list(tmp_path.iterdir())
    assert arrays["part"].tolist() == ["one", "two"]
    assert arrays["queries"] == 200
    assert arrays["part_correct"].tolist() == [[True, False, True, False]] * 2


def test_objectives_are_those_of_the_papers():
    attack = attacks.pgd(epsilon=0.15, norm="linf", steps=10, keep="last")
    beside = dataclasses.replace(attack, random_start=0.001)
    wanted = {
        "standard": losses.standard(),
        "gaussian": losses.smoothing.gaussian_augmentation(sigma=0.5),
        "entropy": losses.adversarial.entropy_regularization(),
        "pgd": losses.adversarial.adversarial_training(attack=attack),
        "trades": losses.adversarial.trades(attack=dataclasses.replace(beside, loss=losses.kl_divergence), beta=6.0),
        "mart": losses.adversarial.mart(attack=beside, beta=6.0),
        "awp": losses.adversarial.awp(objective=losses.adversarial.adversarial_training(attack=attack)),
        "logit_pairing": losses.adversarial.logit_pairing(attack=attack),
        "intervals": losses.scheduled(
            losses.interval_training(epsilon=0.15),
            epsilon=losses.ramp(end=0.15, begin=2, steps=10),
            kappa=losses.ramp(start=1.0, end=0.5, begin=2, steps=10),
        ),
    }
    assert set(wanted) == set(adversaries.TRAINING)
    for training, objective in wanted.items():
        config = adversarial.resolved(adversarial.Config(training=training))
        assert adversaries.objective_of(config, num_steps=60) == objective


def test_what_intervals_verify_is_certified_and_no_attack_breaks_it(tmp_path, capfd):
    config = adversarial.Config(
        model="mlp", training="intervals", train_epsilon="0.05", num_epochs=20, num_images=40, epsilons="0.02,0.05,0.5",
        attacks="fgsm,pgd_20", certify_intervals=True, results_dir=str(tmp_path),
    )  # fmt: skip
    rows = adversarial.run(config)
    certified = {row["epsilon"]: row["certified_accuracy"] for row in rows}
    assert certified[0.02] >= certified[0.05] > 0.2
    assert certified[0.5] == 0
    assert all(row["robust_accuracy"] >= row["certified_accuracy"] for row in rows)
    shown = capfd.readouterr().out
    assert "certified" in shown
    assert re.search(r"of [1-9]\d* certified images, 0 are", " ".join(shown.split()))


def test_every_attack_can_be_made():
    queries = {"fgsm": 1, "momentum_iterative": 10, "pgd_20": 20, "pgd_40": 200, "apgd_ce": 100, "apgd_dlr": 100}
    queries |= {"apgd_targeted": 900, "fab": 900, "deepfool": 50, "carlini_wagner": 9000, "square": 5000}
    for name, attack in adversaries.ATTACKS.items():
        for norm in attack.norms:
            made = adversaries.make(name, 0.1, norm)
            assert getattr(made, "attack", made).__dict__.get("norm", "l2") == norm
            assert name not in queries or attacks.queries_of(made) == queries[name]
        if attack.averages:
            assert adversaries.make(name, 0.1, attack.norms[0], samples=7).samples == 7
    for names, smoothed in ((adversaries.DEFAULT, False), (adversaries.DEFAULT_SMOOTHED, True)):
        assert adversaries.names_of("", ("l2",), smoothed=smoothed) == list(names)


def test_radii_are_numbers_or_fractions():
    assert adversaries.epsilons_of("0.3, 8/255,0.1") == (8 / 255, 0.1, 0.3)
    assert [adversaries.text_of(epsilon) for epsilon in (8 / 255, 0.15, 1.0)] == ["8/255", "0.15", "1"]
    for (dataset, norm), text in adversaries.EPSILONS.items():
        assert adversaries.epsilons_of(text)
        assert adversaries.epsilons_of(adversaries.TRAIN_EPSILON[dataset, norm])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"certify_intervals": True, "norms": ("l2",)},
            "certify_intervals must be for linf and a model as it is, got l2",
        ),
        ({"training": "intervals", "norms": ("l2",)}, "train_norm must be linf for intervals training, got l2"),
        ({"attacks": "pdg_20"}, r"attacks must be known names, got 'pdg_20'. Did you mean pgd_20"),
        ({"attacks": "fgsm,fgsm"}, "attacks must name each one once"),
        ({"attacks": "carlini_wagner"}, "must be defined for linf, got 'carlini_wagner', which is for l2"),
        ({"attacks": "square", "smoothed": True}, "must follow a mean over noise for a smoothed model .*got 'square'"),
        ({"smoothed": True, "norms": ("linf",)}, "norms must be l2 for a model smoothed with Gaussian noise"),
        ({"norms": ("l2", "l2")}, "norms must name each of linf, l2, l1 at most once"),
        ({"norms": ("l3",)}, "norms must name each of linf, l2, l1 at most once"),
        ({"norms": ("l2", "l1"), "epsilons": "0.1"}, "epsilons must be left out with several norms, got '0.1'"),
        ({"epsilons": "-0.1"}, "epsilons must be positive, got '-0.1'"),
        ({"epsilons": "0"}, "epsilons must be positive, got '0'"),
        ({"epsilons": "small"}, "epsilons must be numbers or fractions, such as 0.1 or 8/255, got 'small'"),
        ({"epsilons": "0.1,1/10"}, "epsilons must differ, got '0.1,1/10'"),
        ({"epsilons": "1/0"}, "epsilons must be numbers or fractions"),
        ({"dataset": "svhn", "train_epsilon": "0.1"}, "epsilons must be given for the data set 'svhn' in linf"),
        ({"dataset": "svhn", "epsilons": "0.1"}, "train_epsilon must be given for the data set 'svhn' in linf"),
        ({"train_epsilon": "0.1,0.2"}, "train_epsilon must be one number, got '0.1,0.2'"),
        ({"train_epsilon": "nan"}, "train_epsilon must be numbers or fractions"),
        ({"training": "magic"}, "training must be one of standard, pgd, trades"),
        ({"train_steps": 0}, "train_steps must be an integer of at least 1, got 0"),
        ({"num_images": 0}, "num_images must be an integer of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"samples": 0}, "samples must be an integer of at least 1, got 0"),
        ({"num_epochs": 0}, "num_epochs must be an integer of at least 1, got 0"),
        ({"sigma": 0.0}, "sigma must be positive and finite, got 0.0"),
        ({"beta": -1.0}, "beta must be at least 0 and finite, got -1.0"),
        ({"seed": -1}, "seed must lie in"),
        ({"name": "a/b"}, "name must be the name of a folder"),
        ({"model": "alexnet"}, "must be one of mlp, lenet, cnn"),
        ({"recipe": "none"}, "recipe must be one of digits, mnist"),
        ({"checkpoint": "no/such/run"}, r"checkpoint must be the folder of a run, but no/such/run/config.json cannot"),
    ],
)
def test_a_bad_setting_is_named_and_nothing_is_written(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        adversarial.run(adversarial.Config(**settings, results_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_an_attack_that_fails_is_named_and_the_others_are_kept(finished, tmp_path, monkeypatch):
    _, _, folder = finished
    make = adversaries.make

    def broken(name, *args, **kwargs):
        if name == "pgd_20":
            raise ValueError("the reason.")
        return make(name, *args, **kwargs)

    monkeypatch.setattr(adversaries, "make", broken)
    settings = {**TINY, "num_epochs": None, "checkpoint": str(folder), "results_dir": str(tmp_path), "epsilons": "0.05"}
    config = adversarial.Config(**settings, attacks="fgsm,pgd_20")
    with pytest.raises(ValueError, match="pgd_20 at linf 0.05: the reason. Attacks before it are kept."):
        adversarial.run(config)
    kept = adversarial.folder_of(adversarial.resolved(config)) / "adversarial"
    assert {path.name for path in kept.iterdir()} == {"clean.npz", "linf-0.05-fgsm.npz"}


def test_every_norm_has_its_own_radii():
    config = adversarial.resolved(adversarial.Config(norms=("l2", "linf")))
    assert adversarial.epsilons_of(config) == {"l2": (0.25, 0.5, 1.0), "linf": (0.1, 0.2, 0.3)}
    assert (config.train_norm, config.train_epsilon) == ("l2", "0.75")
    assert adversarial.resolved(adversarial.Config(smoothed=True)).norms == ("l2",)


@pytest.mark.data
def test_a_tfds_data_set_runs_the_same(data_dir, tmp_path):
    config = adversarial.Config(
        dataset="mnist", data_dir=data_dir, model="mlp", train_split="train[:512]", training="standard", num_epochs=1,
        norms=("l2",), num_images=8, attacks="fgsm", results_dir=str(tmp_path),
    )  # fmt: skip
    rows = adversarial.run(config)
    assert [row["epsilon"] for row in rows] == [1.0, 1.5, 2.0]
    assert {row["num_images"] for row in rows} == {8}
