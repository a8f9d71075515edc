"""The evaluation of a user's model: what it measures, what it leaves, what it resumes and what it refuses."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import evaluate
from experiments.common import certificates, files, own_models, runtimes
from experiments.common.targets import Target
from experiments.evaluate import _parts, _plan, _report
from robustjax import attacks, data
from robustjax.typing import Outputs
from tests.experiments.conftest import three_parts

DIGITS = data.load("digits", "train[:400]").cached()[:]
POOLED = DIGITS.image.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16)
MEANS = np.stack([POOLED[DIGITS.label == c].mean(0) for c in range(10)])
SMALL = {"budget": 0.05, "num_images": 12, "epsilon": 0.1}
FOREIGN = {"noise": np.random.default_rng(0).random((30, 8, 8, 1), np.float32)}


def nearest_mean(x):
    """The class with the nearest mean: linear in the features, which are pixels of half the resolution."""
    flat = x.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16)
    return Outputs(40 * (flat @ MEANS.T - (MEANS**2).sum(-1)[None] / 2), flat)


@pytest.fixture(scope="module", autouse=True)
def short_autoattack():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attacks.autoattack, "attacks", three_parts)
        yield


@pytest.fixture(scope="module")
def images():
    return data.load("digits", "test[:120]")[:]


def _json(path):
    return json.loads(path.read_text())


def run(model, images, folder, **settings):
    settings = {"results_dir": str(folder), "far": FOREIGN, **SMALL, **settings}
    return evaluate.run(model, images.image, images.label, **settings)


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    return run(nearest_mean, images, folder), folder


def test_numbers_are_those_of_the_model(finished, images):
    numbers, _ = finished
    logits = nearest_mean(jnp.asarray(images.image)).logits
    assert numbers["calibration"]["accuracy"] == pytest.approx((logits.argmax(-1) == images.label).mean())
    assert numbers["conformal"]["calibrated_on"] == numbers["conformal"]["num_images"] == 60
    for name in ("THR", "APS"):
        assert numbers["conformal"][name]["coverage"] >= 0.75  # 0.9, by chance with 60 images
    assert set(numbers["ood"]) == set(_parts.DETECTORS)  # the model shows its features, and its head is found
    assert numbers["ood"]["mahalanobis"]["noise"]["auroc"] > 0.9
    assert numbers["certify"]["num_images"] == 12
    assert numbers["certify"]["certified_accuracy"][0] >= numbers["certify"]["certified_accuracy"][-1]
    attack = numbers["attack"]
    assert attack["clean_accuracy"] >= attack["robust_accuracy"] == list(attack["left_after"].values())[-1]
    assert attack["epsilon"] == 0.1


def test_the_report_tells_what_each_number_is_worth(finished):
    numbers, folder = finished
    text = (folder / "evaluate" / "model" / "report.md").read_text()
    page = (folder / "evaluate" / "model" / "report.html").read_text()
    told = ("Guarantee: the sets hold", "Guarantee: no change of an image", "An upper bound", "## Not measured")
    worth = ("guaranteed: the certificate of each image, at 99.9 % confidence; measured: the share of these images",)
    for words in (*told, *worth, "Evaluated on 120 images; the model has 10 classes."):
        assert words in text
        assert words.lstrip("# ") in page
    assert f"accuracy {numbers['calibration']['accuracy']:.3f}" in text
    assert page.count("data:image/png;base64,") == text.count("](figures/") == 3
    assert "12 images with at most" in text


def test_nothing_is_measured_twice_and_what_is_lost_is_measured_again(finished, images, monkeypatch):
    numbers, folder = finished
    place = folder / "evaluate" / "model"
    (place / "conformal.npz").unlink()
    monkeypatch.setattr(_parts, "calibration", None)
    monkeypatch.setattr(_parts, "_scores", lambda *_: 1 / 0)
    monkeypatch.setattr(_plan, "_seconds_per_image", None)
    again = run(nearest_mean, images, folder)
    assert {**again, "seconds": 0} == {**numbers, "seconds": 0}
    report = (place / "report.md").read_text()
    fewer = run(nearest_mean, images, folder, parts=("calibration",))
    assert {**fewer, "seconds": 0} == {**numbers, "seconds": 0} == {**_json(place / "metrics.json"), "seconds": 0}
    text = (place / "report.md").read_text()
    assert "An earlier call measured, with the same settings: conformal, ood, certify, attack." in text
    assert all(line in text for line in report.splitlines() if line.startswith(("#", "- ", "![", "| l2 radius")))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sigma": 0.5}, "sigma: 0.25 there, 0.5 now"),
        ({"model": lambda x: nearest_mean(1 - x)}, "model must be the one that the run in .* began with"),
        (
            {"reverse": True},
            "images that the run in .* began with|images and labels must be those|model must be the one",
        ),
    ],
)
def test_other_settings_models_and_images_are_refused(finished, images, changed, message):
    _, folder = finished
    changed = dict(changed)
    if changed.pop("reverse", False):
        images = jax.tree.map(lambda a: a[::-1], images)
    with pytest.raises(ValueError, match=message):
        run(changed.pop("model", nearest_mean), images, folder, **changed)


def test_results_belong_to_all_labels_to_code_and_to_foreign_images(images, tmp_path):
    kernel = jnp.asarray(MEANS.T)
    code = lambda kernel, x: nearest_mean(x).features @ kernel
    other = lambda kernel, x: -nearest_mean(x).features @ kernel
    settings = {"parts": ("ood",), "about": "bound"}
    first = run(jax.tree_util.Partial(code, kernel), images, tmp_path, **settings)
    with pytest.raises(ValueError, match="model must be the one that the run in .* began with"):
        run(jax.tree_util.Partial(other, kernel), images, tmp_path, **settings)
    labels = np.asarray(images.label).copy()
    labels[5] = (labels[5] + 1) % 10
    with pytest.raises(ValueError, match="images and labels must be those that the evaluation in .* began with"):
        run(jax.tree_util.Partial(code, kernel), images._replace(label=labels), tmp_path, **settings)
    others = {"noise": 1 - images.image}  # of the same name
    again = run(jax.tree_util.Partial(code, kernel), images, tmp_path, **settings, far=others)
    assert again["ood"]["energy"]["noise"] != first["ood"]["energy"]["noise"]
    assert run(jax.tree_util.Partial(code, kernel), images, tmp_path, **settings)["ood"] == first["ood"]


@pytest.mark.parametrize(
    "sets", [{"near": FOREIGN}, {"near": {"in": FOREIGN["noise"]}}, {"far": {"seconds": FOREIGN["noise"]}}]
)
def test_names_of_foreign_sets_are_distinct(sets, images, tmp_path):
    with pytest.raises(
        ValueError, match="near and far must name each set once, other than in, seconds, inputs, file, got "
    ):
        run(nearest_mean, images, tmp_path, **sets)


def test_logits_alone_are_enough(images, tmp_path):
    logits_fn = lambda x: nearest_mean(x).logits
    numbers = run(logits_fn, images, tmp_path, parts=("ood",), about="a/b")
    assert set(numbers["ood"]) == {"msp", "energy", "generalized_entropy"}
    assert "Return robustjax.typing.Outputs" in (tmp_path / "evaluate" / "a-b" / "report.md").read_text()


def test_a_part_that_fails_is_told_and_the_others_are_measured(images, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise ValueError("logits_fn must be deterministic.")

    monkeypatch.setattr(_plan.adversaries, "make", fails)  # already of the attack that plans the part
    numbers = run(nearest_mean, images, tmp_path, parts=("calibration", "attack"))
    assert set(numbers) == {"calibration", "seconds"}
    text = (tmp_path / "evaluate" / "model" / "report.md").read_text()
    assert "- Accuracy under attack: logits_fn must be deterministic." in text
    assert "| attack | not measured | logits_fn must be deterministic. | - |" in text
    assert "for certificates" not in text  # which were not asked for
    assert "images for the attack" not in text
    with pytest.raises(ValueError, match="none of the parts could be measured: logits_fn must be deterministic"):
        run(nearest_mean, images, tmp_path, parts=("attack",))


def test_the_command_line_takes_a_module_and_a_run(tmp_path, monkeypatch, smoothing_run):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_evaluated_module.py").write_text(
        "def build():\n    return lambda x: 9 * x.reshape(len(x), -1)[:, :10]\n"
    )
    settings = {"results_dir": str(tmp_path), "parts": ("calibration",), "test_split": "test[:50]"}
    config = evaluate.Config(model="my_evaluated_module:build", dataset="digits", **settings)
    assert evaluate.from_config(config)["calibration"]["num_images"] == 50
    assert (tmp_path / "evaluate" / "digits-my_evaluated_module-build" / "report.html").exists()
    of_run, summary = smoothing_run
    config = evaluate.Config(checkpoint=str(of_run.folder()), results_dir=str(tmp_path), parts=("calibration",))
    assert evaluate.from_config(config)["calibration"]["num_images"] == 500
    settings = json.loads((tmp_path / "evaluate" / of_run.folder().name / "config.json").read_text())
    assert settings["checkpoint"] == str(of_run.folder())
    ours = data.load("digits", "test")[:]
    given = {"results_dir": tmp_path, "name": "memory", "parts": "calibration"}
    again = evaluate.run(of_run.folder(), ours.image, ours.label, **given)
    assert again["calibration"] == evaluate.from_config(config)["calibration"]


def test_all_images_of_a_file_without_splits_are_evaluated(tmp_path, monkeypatch, images):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_whole_module.py").write_text(
        "def build():\n    return lambda x: 9 * x.reshape(len(x), -1)[:, :10]\n"
    )
    files.write_arrays(tmp_path / "mine.npz", {"images": images.image, "labels": images.label})
    config = evaluate.Config(
        model="my_whole_module:build", dataset="arrays:mine.npz", results_dir=str(tmp_path), parts=("calibration",)
    )
    assert evaluate.from_config(config)["calibration"]["num_images"] == 120


def test_a_file_with_only_a_test_split_needs_no_other(tmp_path, monkeypatch, images):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_test_module.py").write_text(
        "def build():\n    return lambda x: 9 * x.reshape(len(x), -1)[:, :10]\n"
    )
    files.write_arrays(tmp_path / "mine.npz", {"test_images": images.image, "test_labels": images.label})
    settings = {"model": "my_test_module:build", "dataset": "arrays:mine.npz", "results_dir": str(tmp_path)}
    found = evaluate.from_config(evaluate.Config(**settings, parts=("ood",)))  # pyrefly: ignore
    assert set(found["ood"]["energy"]) == {"textures", "uniform_noise", "permuted_pixels"}
    report = tmp_path / "evaluate" / "arrays-mine-my_test_module-build" / "report.md"
    assert "Detectors are fitted on the other half of the images." in report.read_text()
    with pytest.raises(ValueError, match="train_split must be one of .* got 'train': There is no split 'train'"):
        evaluate.from_config(evaluate.Config(**settings, train_split="train", name="b"))  # pyrefly: ignore
    with pytest.raises(ValueError, match="test_split must be one of .* got 'exam'"):
        evaluate.from_config(evaluate.Config(**settings, test_split="exam", name="b"))  # pyrefly: ignore


def test_a_model_that_depends_on_the_batch_is_refused_before_anything_is_written(images, tmp_path):
    def centred(x):
        logits = nearest_mean(x).logits
        return logits - logits.mean(0, keepdims=True)

    with pytest.raises(ValueError, match="model must answer each input by itself, got other answers for the same inpu"):
        run(centred, images, tmp_path, parts=("calibration",))
    assert not list(tmp_path.iterdir())


OTHER_SHAPE = np.zeros((10, 6, 6, 1), np.float32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"parts": ()}, "parts must be one or more of calibration, conformal, ood, certify, attack, got none"),
        ({"parts": None}, "parts must be names, got None"),
        ({"seed": "1"}, "seed must be an integer, got '1'"),
        ({"budget": None}, "budget must be a number, got None"),
        ({"norm": None}, "norm must be text, got None"),
        ({"overwrite": "yes"}, "overwrite must be True or False, got 'yes'"),
        ({"norm": "l0"}, "norm must be known names, got 'l0'. Known are linf, l2, l1"),
        ({"epsilon": "far"}, "epsilon must be a number or a fraction, such as 0.1 or 8/255, got 'far'"),
        ({"epsilon": 8.0}, "epsilon must be at most 1, the largest linf distance .*: 8 looks like 8/255"),
        ({"epsilonn": 0.1}, "settings must be known names, got 'epsilonn'. Did you mean epsilon"),
        ({"near": [OTHER_SHAPE]}, "near must be images by name, such as {'name': images}, got"),
        ({"near": {"b": OTHER_SHAPE}}, r"near\['b'\] must have images of the shape .*\(8, 8, 1\), got \(6, 6, 1\)"),
        ({"far": {"b": 3}}, r"far\['b'\]: images must have shape"),
        ({"train": OTHER_SHAPE}, r"train must be \(images, labels\), a Batch or a data.Dataset, got float32 of shape"),
        (
            {"train": (OTHER_SHAPE, np.arange(10))},
            r"train must have images of the shape .*\(8, 8, 1\), got \(6, 6, 1\)",
        ),
        ({"train": (DIGITS.image, DIGITS.label[:9])}, "train: labels must be as many as images, got 9"),
    ],
)
def test_an_argument_that_is_wrong_is_named_and_nothing_is_written(given, message, images, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(nearest_mean, images, tmp_path, **given)
    assert not list(tmp_path.iterdir())


def test_settings_are_taken_as_the_command_line_takes_them():
    config = evaluate.Config(model="a:b", dataset="digits", parts="ood", epsilon="8/255", near=["textures"])  # pyrefly: ignore
    assert (config.parts, config.epsilon, config.near) == (("ood",), 8 / 255, ("textures",))
    assert type(evaluate.Config(model="a:b", dataset="digits", sigma=np.float32(0.5)).sigma) is float  # pyrefly: ignore


@pytest.mark.filterwarnings("ignore:.*calibration scores are too few")
def test_few_images_are_evaluated_and_what_they_do_not_allow_is_told(images, tmp_path):
    one = jax.tree.map(lambda a: a[:1], images)
    numbers = run(nearest_mean, one, tmp_path, parts=("calibration", "conformal", "ood"))
    assert set(numbers) == {"calibration", "seconds"}
    text = (tmp_path / "evaluate" / "model" / "report.md").read_text()
    assert "- Prediction sets: images must be at least 2, of which half calibrate the sets, got 1." in text
    three = jax.tree.map(lambda a: a[:3], images)
    numbers = run(nearest_mean, three, tmp_path, parts=("conformal", "ood"), about="three")
    assert set(numbers["ood"]) == {"msp", "energy", "generalized_entropy"}
    text = (tmp_path / "evaluate" / "three" / "report.md").read_text()
    assert "- Detector knn: k must be at most the number of training rows, 1, got 50." in text
    assert "- Detector vim: it needs the last layer of the model, which was not found" in text
    assert "With 1 images to calibrate on, only sets of all labels have this guarantee." in text
    labels = np.full(400, 12)
    with pytest.raises(ValueError, match="train must have labels from 0 to 9, as many classes as .*, got 12"):
        run(nearest_mean, three, tmp_path, parts=("ood",), train=(DIGITS.image, labels), about="labels")
    with pytest.raises(ValueError, match="near or far must name a set of foreign images, got none"):
        run(nearest_mean, three, tmp_path, parts=("ood",), train=DIGITS, far={}, about="none")


def test_numbers_of_the_budget_are_told_in_units_that_show_them():
    told = [_report.duration(seconds) for seconds in (2.44e-6, 3.2e-4, 0.0148, 7.249, 42.4, 600.0)]
    assert told == ["2.4 us", "320 us", "15 ms", "7.2 s", "42 s", "10 min"]
    plan = _plan.Plan(1e-6, 50, attacked=20, withstood=0.5, attack_share=7.2)
    section = _report.Section({}, "", "", [], 26.1)
    text = _report._budget(evaluate.Settings(budget=0.3), {"attack": section}, plan)
    assert "at most 50 images of each set; 20 images for the attack" in text
    assert text.endswith("Accuracy under attack took 26 s, with compiling, longer than its share of 7.2 s.")
    said = _report.images_of("folder:pets", 100, 50, ("cat", "dog"), 2)
    assert said == "Evaluated on 50 of the 100 images of folder:pets (cat, dog); the model has 2 classes."


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "model or checkpoint must be given, one of them, got model None and checkpoint None"),
        ({"model": "a:b", "checkpoint": "run"}, "model or checkpoint must be given"),
        ({"model": "a:b"}, "dataset must be given with model, got None"),
        ({"model": "a:b", "dataset": "digits", "parts": ("attak",)}, "got 'attak'. Did you mean attack"),
        ({"model": "a:b", "dataset": "digits", "budget": 0}, "budget must be positive"),
        ({"model": "a:b", "dataset": "digits", "coverage": 1.0}, "coverage must lie strictly between 0 and 1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate.Config(**settings)


def test_a_budget_sets_images_and_draws(tmp_path, images, monkeypatch):
    classifier = own_models.classifier_of(nearest_mean, images.image)
    target = Target(classifier, np.arange(120), images.image, images.label, 40)
    found = {}
    for seconds, minutes in ((1e-5, 10.0), (1e-3, 10.0), (1e-2, 1.0)):
        monkeypatch.setattr(_plan, "_seconds_per_image", lambda *_, seconds=seconds: seconds)
        folder = runtimes._paths.path_of(folder=str(tmp_path / f"{seconds}"))
        begun = _plan.begin(folder, classifier, images.image, sets=4, minutes=minutes)
        assert (begun.certified, begun.attacked) == (None, None)
        settings = {"norm": "linf", "epsilon": 0.1, "most": None}
        plan = _plan.complete(folder, begun, target, "certify", shares=1, minutes=minutes, **settings)
        assert plan.certified * plan.draws * seconds <= 60 * minutes
        found[seconds] = (plan.looked_at, plan.certified, plan.draws)
        assert _plan.begin(folder, classifier, images.image, sets=1, minutes=99.0) == plan
        if seconds == 1e-5:  # what is planned stays, and a further part has its share
            assert _plan.complete(folder, plan, target, "certify", shares=2, minutes=1.0, **settings) == plan
            both = _plan.complete(folder, plan, target, "attack", shares=2, minutes=minutes, **settings)
            assert both[:5] == plan[:5]
            assert (both.attacked, both.attack_share) == (120, 24 * minutes)
    assert found == {1e-5: (10_000, 120, 100_000), 1e-3: (10_000, 120, 1000), 1e-2: (300, 4, 1000)}


def test_copies_that_choose_the_answer_are_among_those_that_are_told(tmp_path):
    folder = runtimes._paths.path_of(folder=str(tmp_path))
    with certificates.writer(folder, 0, 1) as append:
        append([certificates.line_of(0, 1, (1, 0.5, 0.9, 1100), 0.1)])
    plan = _plan.Plan(1e-3, 1, certified=1, draws=1000, certify_share=1.0)
    shown = _report.of_certificates(folder, evaluate.Settings(), plan).shown
    assert "At most 1,100 noisy copies of an image were drawn, on average 1,100." in shown[1]


def test_few_images_are_attacked_in_small_blocks(images):
    target = Target(own_models.classifier_of(nearest_mean, images.image), np.arange(120), *images[:2], 100)
    for count, size in ((7, 7), (100, 100), (120, 60)):
        few = _plan.first(target, count)
        assert (len(few.id), few.batch_size) == (count, size)
        np.testing.assert_array_equal(few.image, images.image[:count])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to draw the page")
def test_the_page_is_drawn_for_a_phone_and_a_screen(finished, tmp_path):
    import subprocess

    _, folder = finished
    page = folder / "evaluate" / "model" / "report.html"
    for width in (390, 1280):
        picture = tmp_path / f"{width}.png"
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command += [f"--window-size={width},2000", f"--screenshot={picture}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        assert picture.stat().st_size > 20_000  # not a blank page
