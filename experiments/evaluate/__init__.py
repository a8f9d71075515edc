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
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from robustjax import _blocks, _validate, data
from robustjax.attacks import _box
from robustjax.typing import AnyArray, Batch

from ..common import checks, classifiers, folders, foreign, own_models, runtimes, subsets
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
    train: tuple[AnyArray, AnyArray] | Batch | data.Dataset | None = None,
    near: Mapping[str, Any] | None = None,
    far: Mapping[str, Any] | None = None,
    about: str = "model",
    **settings: Any,
) -> dict[str, Any]:
    """Evaluates a model on images in memory, or does what is left of it.

    Args:
      model: a function of images ``(n, height, width, channels)`` in [0, 1] that returns logits ``(n, classes)`` or
        ``robustjax.typing.Outputs``; a pair ``(module, variables)``; a PyTorch module; or the run folder of another
        experiment.
      images: ``(n, height, width, channels)`` test images, uint8 or floating in [0, 1].
      labels: ``(n,)`` integer classes.
      train: images and labels of the training, on which detectors are fitted; None: half of the test images.
      near: near out-of-distribution images by name, of the same shape.
      far: far ones; None: synthetic textures, uniform noise and the test images with permuted pixels; ``{}``: none.
      about: what the report calls the model; also the name of the run folder, unless ``name`` is given.
      **settings: as on the command line: ``parts``, ``budget``, ``norm``, ``epsilon``, ``sigma``, ``alpha``,
        ``coverage``, ``num_images``, ``seed``, ``results_dir``, ``name``, ``overwrite``.

    Returns:
      The numbers of ``metrics.json``: of these parts, and of those that earlier calls with the same settings measured.

    Raises:
      ValueError: an argument is not as above, the model answers an image otherwise beside other images, or the folder
        holds an evaluation of another model, other images or other settings.
    """
    for setting in settings:
        checks.known("settings", setting, [field.name for field in dataclasses.fields(Settings)])
    config = Settings(**settings)
    test = data.from_arrays(images, labels, name=about)
    known = None if train is None else _dataset("train", train, like=test)
    if isinstance(model, (str, os.PathLike)):
        classifier, _ = own_models.of_run(os.fspath(model))
    else:
        classifier = own_models.classifier_of(model, test[:2].image)
    for argument, given in (("near", near), ("far", far)):
        if given is not None and not isinstance(given, Mapping):
            raise ValueError(
                f"{argument} must be images by name, such as {{'name': images}}, got {_validate.short(given)}."
            )
    named = [*(near or ()), *(FAR if far is None else far)]
    if clash := [
        name for name in named if not isinstance(name, str) or named.count(name) > 1 or name in _parts.RESERVED
    ]:
        raise ValueError(
            f"near and far must name each set once, other than {', '.join(_parts.RESERVED)}, got {clash[0]!r}."
        )
    sets = {
        name: foreign.Foreign(group, _dataset(f"{group}[{name!r}]", part, like=test, labelled=False))
        for group, given in (("near", near), ("far", far))
        for name, part in (given or {}).items()
    }
    sets |= {} if far is not None else _synthetic(test)
    folder = config.folder(about.translate(UNSAFE))
    return _evaluate(config, folder, classifier, test, known, sets, about=about, dataset="arrays")


def _dataset(argument: str, given: Any, *, like: data.Dataset, labelled: bool = True) -> data.Dataset:
    """Images of an argument, with labels where they are wanted, in the shape of others; an error names the argument."""
    if isinstance(given, Batch):
        given = (given.image, given.label) if labelled else given.image
    if not isinstance(given, data.Dataset):
        if labelled and not (isinstance(given, (tuple, list)) and len(given) == 2):
            raise ValueError(
                f"{argument} must be (images, labels), a Batch or a data.Dataset, got {_validate.short(given)}."
            )
        images, labels = given if labelled else (given, np.zeros(max(1, len(np.atleast_1d(given))), np.int32))
        try:
            given = data.from_arrays(np.asarray(images), np.asarray(labels), name=argument)
        except ValueError as error:
            raise ValueError(f"{argument}: {error}") from error
    if given.image_shape != like.image_shape:
        raise ValueError(
            f"{argument} must have images of the shape of those that are evaluated, {like.image_shape}, got "
            f"{given.image_shape}."
        )
    return given


def from_config(config: Config, runtime: runtimes.Runtime = runtimes.HERE) -> dict[str, Any]:
    """Evaluates the model and the images that the command line names, or does what is left of it.

    Returns:
      The numbers of ``metrics.json``.
    """
    given = config.checkpoint if config.model is None else own_models.imported(config.model)
    classifier, theirs = None, {}
    if isinstance(given, (str, os.PathLike)):
        classifier, theirs = own_models.of_run(os.fspath(given), runtime, data_dir=config.data_dir)
    dataset, classes = config.dataset or theirs["dataset"], tuple(theirs.get("classes") or ())
    size = config.image_size or theirs.get("image_size")
    with checks.renamed("name", "dataset"):
        whole = is_whole(dataset) and config.train_split in (None, "none")
        test_split = config.test_split or ("all" if whole else data.splits(dataset).test)
        with checks.renamed("split", "test_split"):
            everything = opened(dataset, test_split, config.data_dir, size)
    test = data.select_classes(everything, classes) if classes else everything
    if classifier is None:
        classifier = own_models.classifier_of(given, test[:2].image, runtime)
    train, sets = None, {}
    if "ood" in config.parts:
        train = _train(config, dataset, test_split, size, classes)
        sets, _ = foreign.open_foreign(
            everything, [test_split, *([] if train is None else [train.split])], config.data_dir, classes=classes,
            near=config.near, far=config.far, max_images=_parts.MAX_IMAGES, seed=0, image_size=size,
        )  # fmt: skip
    about = config.model or epath.Path(str(given)).resolve().name
    folder = config.folder(about if config.model is None else f"{short(dataset)}-{about.translate(UNSAFE)}")
    return _evaluate(config, folder, classifier, test, train, sets, about=about, dataset=dataset)


def _train(
    config: Config, dataset: str, test_split: str, size: int | None, classes: tuple[int, ...]
) -> data.Dataset | None:
    """The images that the model was trained on; None where there are none beside those that are evaluated."""
    split, of_test = config.train_split or "train", (dataset, test_split)
    if split == "none" or (config.train_split is None and foreign.overlap((dataset, split), of_test)):
        return None
    try:
        with checks.renamed("split", "train_split"):
            part = opened(dataset, split, config.data_dir, size)
    except ValueError as error:
        if config.train_split is not None:
            raise
        runtimes.log(f"Detectors are fitted on half of the images: {error}")
        return None
    return data.select_classes(part, classes) if classes else part


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

    # The model answers some images as it should; nothing is written before that.
    chosen = subsets.evenly(len(test), _parts.MAX_IMAGES)
    ids = np.random.default_rng(config.seed).permutation(chosen)
    some = test[ids[:500]]
    logits = classifiers.outputs_of(classifier, some.image).logits
    own_models.check_logits(logits, some.label, class_names=test.class_names)
    classifiers.check_each_row(classifier, some.image, logits)
    epsilon = config.radius(dataset)
    if "attack" in config.parts:
        _box.check_epsilon(epsilon, config.norm, _box.IMAGES, test.image_shape)

    # Images, in random order, as many as the budget allows.
    folders.open_run(folder, config, same=SAME, overwrite=config.overwrite)
    looked_at = 1 + len(sets) + (train is not None)
    plan = _plan.begin(folder, classifier, some.image, sets=looked_at, minutes=config.budget)
    ids = ids[: plan.looked_at]
    image, label = (np.asarray(part) for part in test[ids][:2])
    size = _blocks.evenly(min(len(ids), config.num_images or len(ids)), _blocks.at_once(image.shape[1:], backward=True))
    target = Target(classifier, ids, image, label, size)
    outputs = classifiers.outputs_of(classifier, image)
    own_models.check_logits(outputs.logits, label, class_names=test.class_names, warn=False)
    classifiers.keep_to(folder, classifier.state, [test])
    own_models.keep_to(folder, outputs.logits[:16])
    _parts.keep_inputs(folder / "inputs.json", classifiers.digest([image, label]))
    subject = _parts.Subject(classifier, target, test, train, sets, plan.looked_at)

    # Parts: each is on disk before the next one begins, and one that fails does not take the others with it.
    def calibration():
        arrays = _parts.kept(folder / "calibration.npz", lambda: _parts.calibration(outputs, label))
        return _report.of_calibration(arrays, test.class_names)

    def conformal():
        measure = lambda: _parts.conformal_sets(outputs, label, coverage=config.coverage, seed=config.seed)
        return _report.of_conformal(_parts.kept(folder / "conformal.npz", measure), config.coverage)

    def ood():
        scores, left_out = _parts.out_of_distribution(folder / "scores", subject, outputs)
        groups = {name: of.group for name, of in sets.items()}
        fitted = "the other half of the images"
        if train is not None:
            fitted = f"{min(len(train), plan.looked_at):,} images of {train.name} {train.split}"
        features = bool(outputs.features.shape[1])
        return _report.of_foreign(scores, groups, left_out, features=features, fitted_on=fitted)

    def certify():
        _parts.certificates(folder, subject, config, plan, certify_key, watch)
        return _report.of_certificates(folder, config, plan)

    def attack():
        arrays, findings = _parts.attack(folder, subject, config, epsilon, plan, attack_key)
        return _report.of_attack(arrays, findings, config, epsilon)

    measures = {"calibration": calibration, "conformal": conformal, "ood": ood, "certify": certify, "attack": attack}
    sections, failed = {}, {}
    with runtimes.watching(runtimes.HERE, folder, dataclasses.asdict(config)) as watch:
        for name in PARTS:
            if name not in config.parts:
                if before := _report.of_before(folder, name):
                    sections[name] = before
                continue
            try:
                if name in _plan.HEAVY:
                    plan = _plan.complete(
                        folder, plan, target, name, shares=len({*_plan.HEAVY} & {*config.parts}),
                        minutes=config.budget, norm=config.norm, epsilon=epsilon, most=config.num_images,
                    )  # fmt: skip
                sections[name] = _report.kept(folder, name, measures[name]())
            except (ValueError, ArithmeticError, MemoryError, jax.errors.JaxRuntimeError) as error:
                failed[name] = " ".join(str(error).split()) or type(error).__name__
                runtimes.log(f"WARNING: {name} is not measured: {error}")
    if not set(sections) & set(config.parts):
        raise ValueError(f"none of the parts could be measured: {next(iter(failed.values()))}")

    # Report.
    images = _report.images_of(
        None if dataset == "arrays" else dataset, len(test), len(ids), test.class_names, outputs.logits.shape[1]
    )
    return _report.report(folder, config, sections, failed, stopwatch, about=about, images=images, plan=plan)
