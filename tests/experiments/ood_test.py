"""The experiment end to end on digits: what it leaves, what it re-uses, what it refuses."""

import csv
import dataclasses
import io
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
from rich.console import Console

from experiments import ood
from experiments.common import classifiers
from experiments.ood import _detectors, _foreign
from robustjax import data, metrics, models, training

NOT_TESTED = "outliers must not be tested"
TINY = {"num_epochs": 1, "seeds": 2, "detectors": "msp,energy,knn,react+energy"}


def read(path):
    with np.load(path) as scores:
        return dict(scores)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = ood.Config(**TINY, results_dir=str(tmp_path_factory.mktemp("results")))
    rows = ood.run(config)
    return config, rows, ood.folder_of(ood.resolved(config))


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Most of a small run would go into drawing; ``finished``, which is made before, has its figures."""
    monkeypatch.setattr(ood, "figures", lambda *_: None)


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
    assert ood.resolved(config).classes == (0, 1, 2, 3, 4, 5)
    sizes = {r["set"]: r["num_out"] for r in rows}
    assert rows[0]["num_in"] + sizes["held_out"] == 500


def test_groups_are_unweighted_means():
    rows = [
        {"seed": s, "detector": "d", "set": part, "group": "far", "auroc": value + s}
        for s in (0, 1)
        for part, value in (("a", 0.2), ("b", 0.6))
    ]
    np.testing.assert_allclose(ood.over_seeds(rows, "d", "auroc", group="far"), [0.4, 1.4])
    np.testing.assert_allclose(ood.over_seeds(rows, "d", "auroc", part="b"), [0.6, 1.6])


def test_tables_are_cut_where_columns_do_not_fit():
    headers, body = ["detector", *(f"a_far_set_{i}" for i in range(6))], [["d" * 24, *["**0.912 ±.004**"] * 6]]
    console = Console(width=80, record=True, file=io.StringIO())
    ood.print_table(console, "AUROC", headers, body)
    lines = console.export_text().splitlines()
    assert [sum(header in line.split() for line in lines) for header in headers] == [2, *[1] * 6]
    assert sum(line.count("0.912 ±.004") for line in lines) == 6
    assert ood.spread(np.array([0.908, 0.912, 0.916])) == "0.912 ±.004"


def test_more_detectors_join_what_is_there(finished):
    config, _, folder = finished
    before = {path: os.stat(path).st_mtime_ns for path in folder.glob("seed-*/scores/*.npz")}
    ood.run(dataclasses.replace(config, detectors="msp,entropy", seeds=1))
    assert {path: os.stat(path).st_mtime_ns for path in before} == before
    assert (folder / "seed-0/scores/entropy.npz").is_file()
    assert not (folder / "seed-1/scores/entropy.npz").exists()
    written = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert len(written) == 2 * 4 * 4 + 4  # of the other seed and of the new detector's one
    assert read(folder / "scores" / "in.npz")["msp"].shape[0] == 2


def test_another_config_is_refused(finished):
    config, _, folder = finished
    with pytest.raises(ValueError, match="num_epochs: 1 there, 2 now"):
        ood.run(dataclasses.replace(config, num_epochs=2, name=folder.name))


def test_a_model_of_another_experiment_is_scored(finished, tmp_path):
    config, rows, folder = finished
    scored = ood.run(ood.Config(checkpoint=str(folder), detectors="energy", results_dir=str(tmp_path)))
    want = [r["auroc"] for r in rows if r["seed"] == 0 and r["detector"] == "energy"]
    np.testing.assert_allclose([r["auroc"] for r in scored], want)


def test_killed_at_random_it_ends_with_the_same_scores(finished, tmp_path):
    config, _, folder = finished
    ours_folder = tmp_path / "ood" / folder.name
    command = [sys.executable, "-m", "experiments.ood", "--num-epochs", "1", "--seeds", "1", "--name", folder.name]
    command += ["--detectors", "msp,energy", "--results-dir", str(tmp_path)]
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
    ood.run(dataclasses.replace(config, detectors="msp,energy", seeds=1, results_dir=str(tmp_path), name=folder.name))
    for part in ("in", "held_out"):
        ours = read(ours_folder / "scores" / f"{part}.npz")
        for name in ("msp", "energy"):
            theirs = read(folder / "seed-0" / "scores" / f"{name}.npz")[part]
            np.testing.assert_allclose(ours[name][0], theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", _detectors.TRAINING)
def test_every_training_runs(training, tmp_path):
    outliers = "gaussian_noise" if training in _detectors.NEED_OUTLIERS else None
    config = ood.Config(
        training=training, outliers=outliers, num_epochs=1, seeds=1, detectors="msp", results_dir=str(tmp_path)
    )
    rows = ood.run(config)
    assert all(0 <= row["auroc"] <= 1 for row in rows)
    summary = json.loads((ood.folder_of(ood.resolved(config)) / "metrics.json").read_text())
    assert summary["accuracy"][0] > 0.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"detectors": "mahalanobs"}, r"got 'mahalanobs'. Did you mean .*mahalanobis"),
        ({"detectors": ","}, "detectors must be names with commas between, got ','"),
        ({"detectors": "react"}, r"must end in what scores, such as react\+energy"),
        ({"detectors": "msp+energy"}, r"must have only react, .* before \+"),
        ({"detectors": "react+odin"}, "outputs behind"),
        ({"detectors": "msp,msp"}, "each one once"),
        ({"seeds": 0}, "seeds must be an integer of at least 1, got 0"),
        ({"open_set": 0}, "open_set must be 0 to 4, of mnist or cifar10"),
        ({"training": "outlier_exposure"}, "outliers must be given"),
        ({"outliers": "textures"}, "outliers must be given for outlier_exposure"),
        ({"dataset": "mnist", "open_set": 0, "training": "energy_bounded"}, "outliers must be given"),
        ({"training": "outlier_exposure", "outliers": "textures", "far": ("textures",)}, NOT_TESTED),
        ({"training": "outlier_exposure", "outliers": "uniform_noise"}, NOT_TESTED),  # which is there by default
        ({"training": "outlier_exposure", "outliers": "held_out"}, NOT_TESTED),
        ({"training": "outlier_exposure", "outliers": "digits@test[:9]"}, NOT_TESTED),
        ({"training": "outlier_exposure", "outliers": "omniglot@small1", "far": ("omniglot",)}, NOT_TESTED),
        ({"far": ("textures@train",)}, "textures has no splits to choose from, got 'textures@train'"),
        ({"far": ("omniglot@",)}, "must be NAME or NAME@SPLIT, such as omniglot@small1, got 'omniglot@'"),
        ({"far": ("@small1",)}, "must be NAME or NAME@SPLIT"),
        ({"far": ("digits@half",)}, "split must be one of the data set's"),
        ({"detectors": "react+mahalanobis_ensemble"}, "outputs behind"),
        ({"near": ("held_out",)}, "held_out needs classes"),
        ({"far": ("textures", "textures")}, "name each set once"),
        ({"classes": (0, 12)}, r"classes must lie in 0, \.\.\., 9"),
        ({"name": "a/b"}, "name must be the name of a folder"),
    ],
)
def test_bad_settings_are_named_before_anything_is_written(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ood.run(ood.Config(**settings, results_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [
        ("omniglot", "omniglot", True),
        ("omniglot@small1", "omniglot", True),
        ("omniglot@small1", "omniglot:3.0.0@small1", True),
        ("omniglot@small1", "omniglot@small2", False),
        ("omniglot@train", "omniglot", False),
        ("mnist@train[:50%]", "mnist@test + train[50%:]", True),
        ("mnist@all", "mnist", True),
        ("mnist", "fashion_mnist", False),
        ("cifar10_corrupted/fog_1", "cifar10_corrupted/fog_2", False),
        ("textures", "textures", True),
        ("textures", "uniform_noise", False),
    ],
)
def test_which_sets_share_images(one, other, share):
    pair = [_foreign.parsed(name) for name in (one, other)]
    assert _foreign.overlap(*pair) == _foreign.overlap(*pair[::-1]) == share


def test_slices_have_files_of_their_own():
    splits = ["[:5]", "[5:]", "[:-5]", "[-5:]", "[:5%]", "[5%:]", "[5:6]", ""]
    files = {f"a/b:1@c{split}".translate(ood.UNSAFE) for split in splits}
    assert len(files) == len(splits)
    assert all(re.fullmatch(r"[\w@+-]+", name) for name in files), files


def test_parts_of_a_set_are_tested_under_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(_foreign, "overlap", lambda *_: False)  # digits stand in for a foreign set
    far = ("digits@train[:20]", "digits@train[20:50]")
    rows = ood.run(ood.Config(far=far, num_epochs=1, seeds=1, detectors="energy", results_dir=str(tmp_path)))
    sizes = {row["set"]: row["num_out"] for row in rows}
    assert [sizes[name] for name in far] == [20, 30]
    assert len(list(tmp_path.glob("ood/*/scores/digits@train_*.npz"))) == 2


def linear(kernel, x):
    return jnp.matmul(x.reshape(x.shape[0], -1), kernel, precision="highest")


def test_the_attack_is_one_signed_step_within_the_images():
    images = np.array([[0.5, 0.02, 0.99, 0.5], [0.5, 0.5, 0.5, 0.5]], np.float32)[..., None, None]
    kernel = np.array([[1, -1], [1, -1], [-1, 1], [0, 0]], np.float32)
    attacked = _detectors.fast_gradient_sign(jax.tree_util.Partial(linear, kernel), images, np.array([0, 1], np.int32))
    want = [[0.45, 0, 1, 0.5], [0.55, 0.55, 0.45, 0.5]]  # towards the other class; no gradient, no step
    np.testing.assert_allclose(attacked[..., 0, 0], want, atol=1e-6)


def test_the_last_layer_is_the_features():
    made = models.create("cnn", jax.random.key(0), dtype=jnp.float32, image_shape=(8, 8, 1), num_classes=3)
    functional, x = models.functional(made), jax.random.uniform(jax.random.key(1), (2, 8, 8, 1))
    layers = _detectors.layers_of(functional.activations)(functional.state, x)
    assert list(layers) == ["body/conv1", "body/conv2", "body/dense"]
    np.testing.assert_allclose(layers["body/dense"], functional.outputs(functional.state, x).features, rtol=1e-5)


def test_layers_are_blocks_without_their_parts():
    blocks = [f"body/blocks/{i}" for i in range(2)]
    parts = [
        "body",
        "body/stem",
        "body/blocks/0/convs/0",
        "body/blocks/1/shortcut",
        "body/blocks/1/shortcut/conv",
        "head",
    ]
    layers_fn = _detectors.layers_of(lambda state, x: dict.fromkeys((*parts, *blocks, "body/norm"), x))
    layers = layers_fn((), jnp.array([[-1.0, 2.0]]))
    assert list(layers) == [*blocks, "body/norm"]
    np.testing.assert_array_equal(layers["body/norm"], [[0, 2]])


@pytest.mark.data
def test_outliers_are_another_part_of_the_set_that_is_tested(data_dir):
    settings = {"classes": (), "near": ("omniglot@small2",), "far": ("omniglot@small2[:100]",)}
    sets = _foreign.open_sets("mnist", data_dir, **settings, outliers="omniglot@small1[:50]", max_images=10, seed=0)
    assert sets.outliers is not None
    assert len(sets.outliers) == 50
    assert {name: (foreign.dataset.split, len(foreign.dataset)) for name, foreign in sets.foreign.items()} == {
        "omniglot@small2": ("small2", 3120),
        "omniglot@small2[:100]": ("small2[:100]", 100),
    }
    with pytest.raises(ValueError, match="split must be one of the data set's.*got 'small3'.*omniglot has small1"):
        _foreign.open_sets(
            "mnist", data_dir, **{**settings, "far": ("omniglot@small3",)}, outliers=None, max_images=10, seed=0
        )


@pytest.mark.data
def test_tfds_sets_are_opened(data_dir, tmp_path, monkeypatch):
    splits = data.splits
    few = data.Splits("train[:1000]", "train[90%:91%]", "test[:500]")
    monkeypatch.setattr(data, "splits", lambda name: few if name == "mnist" else splits(name))
    monkeypatch.setattr(ood, "MAX_IMAGES", 200)
    config = ood.Config(
        dataset="mnist", data_dir=data_dir, near=("fashion_mnist",), far=("omniglot", "cifar10"), model="mlp",
        num_epochs=1, seeds=1, detectors="energy", results_dir=str(tmp_path),
    )  # fmt: skip
    rows = ood.run(config)
    assert {row["set"]: row["num_out"] for row in rows} == {"fashion_mnist": 200, "omniglot": 200, "cifar10": 200}
    report = (ood.folder_of(config) / "report.md").read_text()
    for line in ("fashion_mnist (near): 8,000", "omniglot (far): 5,840", "cifar10 (far): 10,000"):
        assert f"- {line} images\n" in report


def test_more_detectors_join_and_what_cannot_be_fitted_is_left_out(tmp_path, capsys, monkeypatch):
    settings = {"num_epochs": 1, "seeds": 1, "results_dir": str(tmp_path)}
    ood.run(ood.Config(detectors="energy", **settings))
    fit = _detectors.fit

    def unfit(name, context):
        if name == "she":
            raise ValueError("no row of class 3.")
        return fit(name, context)

    monkeypatch.setattr(_detectors, "fit", unfit)
    rows = ood.run(ood.Config(detectors="she,msp", **settings))
    assert {row["detector"] for row in rows} == {"msp", "energy"}
    assert "she is left out: no row of class 3." in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match="none of she could"):
        ood.run(ood.Config(detectors="she", name="other", **settings))


@pytest.mark.parametrize("near", ["digits", "digits@train", "digits@train[:10]"])
def test_known_images_are_not_foreign(near, tmp_path):
    with pytest.raises(ValueError, match="near and far must be foreign to digits"):
        ood.run(ood.Config(near=(near,), results_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_brings_its_classes(tmp_path):
    (tmp_path / "config.json").write_text('{"dataset": "digits", "model": "cnn", "classes": [6, 7, 8]}')
    config = ood.Config(checkpoint=str(tmp_path))
    assert ood.resolved(config).classes == (6, 7, 8)
    assert ood.folder_of(config).name.endswith(f"-of-{tmp_path.name}")
    with pytest.raises(ValueError, match=r"classes must be those of checkpoint .*, \(6, 7, 8\), got \(0, 1\)"):
        ood.resolved(ood.Config(checkpoint=str(tmp_path), classes=(0, 1)))
    with pytest.raises(ValueError, match="has model cnn, got mlp; pass --model cnn"):
        ood.resolved(ood.Config(checkpoint=str(tmp_path), model="mlp"))
    with pytest.raises(ValueError, match="classes must be at least two"):
        ood.resolved(ood.Config(classes=(3,)))


def test_the_fine_tuned_model_is_the_one_of_its_run(tmp_path, monkeypatch):
    for name in ("checkpoints", "fine_tuning"):
        (tmp_path / "seed-0" / name).mkdir(parents=True)
    seen = []
    monkeypatch.setattr(training, "restore_model", lambda folder, state, log: seen.append(folder.name))
    made = models.functional(models.create("mlp", jax.random.key(0), image_shape=(8, 8, 1)))
    classifiers.restored(str(tmp_path), made, Console())
    assert seen == ["fine_tuning"]
