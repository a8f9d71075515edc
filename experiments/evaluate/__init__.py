"""Evaluates a trained model: accuracy, calibration, prediction sets, foreign inputs, certificates and attacks.

Writes results/evaluate/NAME with report.html, report.md, metrics.json, config.json and what each part has measured. The
same command resumes an interrupted evaluation.

    python -m experiments.evaluate --model my_module:build --dataset mnist --data-dir DIR
    python -m experiments.evaluate --model my_module:build --dataset arrays:FILE.npz --epsilon 8/255 --budget 5
    python -m experiments.evaluate --checkpoint results/smoothing/digits-cnn-0.25
    python -m experiments.evaluate --checkpoint RUN --parts calibration ood --near fashion_mnist --data-dir DIR

From a notebook: evaluate.run(logits_fn, images, labels, budget=5).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from robustjax import _blocks, data
from robustjax.typing import AnyArray

from ..common import classifiers, folders, foreign, own_models, runtimes, subsets
from ..common.images import UNSAFE, is_whole, opened, short
from ..common.targets import Target
from . import _parts, _plan, _report
from ._config import PARTS, SAME, Settings
from ._config import Config as Config

FAR = ("textures", "uniform_noise", foreign.PERMUTED)


def run(
    model: Any,
    images: AnyArray,
    labels: AnyArray,
    *,
    train: tuple[AnyArray, AnyArray] | None = None,
    near: Mapping[str, AnyArray] | None = None,
    far: Mapping[str, AnyArray] | None = None,
    about: str = "model",
    **settings: Any,
) -> dict[str, Any]:
    """Evaluates a model on images in memory, or does what is left of it.

    Args:
      model: a function of images ``(n, height, width, channels)`` in [0, 1] that returns logits ``(n, classes)`` or
        ``robustjax.typing.Outputs``; a pair ``(module, variables)``; or a PyTorch module.
      images: ``(n, height, width, channels)`` test images, uint8 or floating in [0, 1].
      labels: ``(n,)`` integer classes.
      train: images and labels of the training, on which detectors are fitted; None: half of the test images.
      near: near out-of-distribution images by name, of the same shape.
      far: far ones; None: synthetic textures, uniform noise and the test images with permuted pixels.
      about: what the report calls the model; also the name of the run folder, unless ``name`` is given.
      **settings: as on the command line: ``parts``, ``budget``, ``norm``, ``epsilon``, ``sigma``, ``alpha``,
        ``coverage``, ``num_images``, ``seed``, ``results_dir``, ``name``, ``overwrite``.

    Returns:
      The numbers of ``metrics.json``.
    """
    config = Settings(**settings)
    test = data.from_arrays(images, labels, name=about)
    known = None if train is None else data.from_arrays(*train, name=f"{about}, train")
    classifier = own_models.classifier_of(model, test[:2].image)
    of_user = lambda of, group: {
        name: foreign.Foreign(group, data.from_arrays(part, np.zeros(len(part), np.int32), name=name))
        for name, part in (of or {}).items()
    }
    named = [*(near or ()), *(FAR if far is None else far)]
    if clash := [name for name in named if named.count(name) > 1 or name in _parts.RESERVED]:
        raise ValueError(
            f"near and far must name each set once, other than {', '.join(_parts.RESERVED)}, got {clash[0]!r}."
        )
    sets = of_user(near, "near") | (of_user(far, "far") if far is not None else _synthetic(test))
    folder = config.folder(about.translate(UNSAFE))
    return _evaluate(config, folder, classifier, test, known, sets, about=about, dataset="arrays")


def from_config(config: Config, runtime: runtimes.Runtime = runtimes.HERE) -> dict[str, Any]:
    """Evaluates the model and the images that the command line names, or does what is left of it.

    Returns:
      The numbers of ``metrics.json``.
    """
    given = config.checkpoint if config.model is None else own_models.imported(config.model)
    classifier, theirs = None, {}
    if isinstance(given, str):
        classifier, theirs = own_models.of_run(given, runtime, data_dir=config.data_dir)
    dataset = config.dataset or theirs["dataset"]
    sets = foreign.open_sets(
        dataset, config.data_dir, classes=theirs.get("classes") or (), near=config.near, far=config.far, outliers=None,
        max_images=_parts.MAX_IMAGES, seed=0, image_size=config.image_size or theirs.get("image_size"),
    )  # fmt: skip
    whole = is_whole(dataset)
    test_split = config.test_split or ("all" if whole and config.train_split in (None, "none") else None)
    train_split = config.train_split or ("none" if whole else "train")
    test = sets.test if test_split is None else _part(config, dataset, test_split, theirs)
    train = None if train_split == "none" else _part(config, dataset, train_split, theirs)
    if classifier is None:
        classifier = own_models.classifier_of(given, test[:2].image, runtime)
    about = config.model or epath.Path(str(given)).resolve().name
    folder = config.folder(about if config.model is None else f"{short(dataset)}-{about.translate(UNSAFE)}")
    return _evaluate(config, folder, classifier, test, train, sets.foreign, about=about, dataset=dataset)


def _part(config: Config, dataset: str, split: str, theirs: Mapping[str, Any]) -> data.Dataset:
    part = opened(dataset, split, config.data_dir, config.image_size or theirs.get("image_size"))
    return data.select_classes(part, theirs["classes"]) if theirs.get("classes") else part


def _synthetic(test: data.Dataset) -> dict[str, foreign.Foreign]:
    count = min(len(test), _parts.MAX_IMAGES)
    made = {name: data.synthetic(name, test.image_shape, count, seed=0) for name in FAR if name != foreign.PERMUTED}
    made[foreign.PERMUTED] = data.permute_pixels(test, seed=0)
    return {name: foreign.Foreign("far", made[name]) for name in FAR}


def _evaluate(
    config: Settings,
    folder: epath.Path,
    classifier: classifiers.Classifier,
    test: data.Dataset,
    train: data.Dataset | None,
    sets: dict[str, foreign.Foreign],
    *,
    about: str,
    dataset: str,
) -> dict[str, Any]:
    stopwatch = runtimes.Stopwatch()
    certify_key, attack_key = jax.random.split(jax.random.key(config.seed))

    # Images, in random order.
    chosen = subsets.evenly(len(test), _parts.MAX_IMAGES)
    ids = np.random.default_rng(config.seed).permutation(chosen)
    image, label = (np.asarray(part) for part in test[ids][:2])
    size = _blocks.evenly(min(len(ids), config.num_images or len(ids)), _blocks.at_once(image.shape[1:], backward=True))
    target = Target(classifier, ids, image, label, size)
    outputs = classifiers.outputs_of(classifier, image)
    own_models.check_logits(outputs.logits, label)
    folders.open_run(folder, config, same=SAME, overwrite=config.overwrite)
    classifiers.keep_to(folder, classifier.state, [test])
    own_models.keep_to(folder, outputs.logits[:16])
    _parts.keep_inputs(folder / "inputs.json", classifiers.digest([image, label]))
    plan = _plan.plan(
        folder, target, parts=config.parts, minutes=config.budget, norm=config.norm, epsilon=config.radius(dataset),
        most=config.num_images,
    )  # fmt: skip
    subject = _parts.Subject(classifier, target, test, train, sets)

    # Parts: each is on disk before the next one begins, and one that fails does not take the others with it.
    epsilon = config.radius(dataset)

    def calibration():
        arrays = _parts.kept(folder / "calibration.npz", lambda: _parts.calibration(outputs, label))
        return _report.of_calibration(arrays), float(arrays["seconds"])

    def conformal():
        measure = lambda: _parts.conformal_sets(outputs, label, coverage=config.coverage, seed=config.seed)
        arrays = _parts.kept(folder / "conformal.npz", measure)
        return _report.of_conformal(arrays, config.coverage), float(arrays["seconds"])

    def ood():
        scores = _parts.out_of_distribution(folder / "scores", subject, outputs)
        groups = {name: of.group for name, of in sets.items()}
        return _report.of_foreign(scores, groups), sum(float(of["seconds"]) for of in scores.values())

    def certify():
        _parts.certificates(folder, subject, config, plan, certify_key, watch)
        return _report.of_certificates(folder, config, plan), _parts.seconds_of_certificates(folder)

    def attack():
        arrays, findings = _parts.attack(folder, subject, config, epsilon, plan, attack_key)
        return _report.of_attack(arrays, findings, config, epsilon), float(arrays["seconds"])

    measures = {"calibration": calibration, "conformal": conformal, "ood": ood, "certify": certify, "attack": attack}
    sections, seconds, failed = {}, {}, {}
    with runtimes.watching(runtimes.HERE, folder, dataclasses.asdict(config)) as watch:
        for name in (name for name in PARTS if name in config.parts):
            try:
                sections[name], seconds[name] = measures[name]()
            except ValueError as error:
                failed[name] = str(error)
                runtimes.log(f"WARNING: {name} is not measured: {error}")
    if not sections:
        raise ValueError(f"none of the parts could be measured: {next(iter(failed.values()))}")

    # Report.
    missing = _report.not_measured(config.parts, failed, features=bool(outputs.features.shape[1]))
    return _report.report(folder, config, sections, missing, seconds, stopwatch, about=about, plan=plan)
