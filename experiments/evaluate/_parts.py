"""What is measured of a model; each measurement is kept on disk and not made again."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.special
from etils import epath

from robustjax import certification, data, metrics
from robustjax.certification import conformal
from robustjax.typing import Outputs

from .. import smoothing
from ..common import adversaries, classifiers, detectors, files, foreign, runtimes, sanity, smoothers, subsets
from ..common.targets import Target
from ._config import Settings
from ._plan import MAX_IMAGES as MAX_IMAGES
from ._plan import SELECTION, Plan, first

OF_LOGITS = ("msp", "energy", "generalized_entropy")
DETECTORS = (*OF_LOGITS, "knn", "mahalanobis", "vim", "react+energy")
"""Detectors that need no choice; those that read features are left out where the model has none."""
RESERVED = ("in", "seconds", "inputs", "file")
"""Names in a file of scores that are not of foreign sets."""
NO_HEAD = (
    "it needs the last layer of the model, which was not found: logits are no linear map of the features, or there are "
    "too few images to tell."
)
SCORES = {"THR": conformal.thr, "APS": conformal.aps}


class Subject(NamedTuple):
    """A model and its images."""

    classifier: classifiers.Classifier
    target: Target  # the images to evaluate on, in random order
    test: data.Dataset  # all of them, by their ids
    train: data.Dataset | None  # images that the model was trained on, to fit detectors; None: half of the others
    foreign: dict[str, foreign.Foreign]  # out-of-distribution sets by name
    most: int = MAX_IMAGES  # images of each set that are looked at


Arrays = dict[str, np.ndarray]


def kept(path: epath.Path, measure: Callable[[], dict[str, Any]]) -> Arrays:
    """What a file holds; if there is none, it is measured, with its ``seconds``, and written."""
    if not path.exists():
        started = time.perf_counter()
        arrays = measure()
        files.write_arrays(path, arrays | {"seconds": time.perf_counter() - started})
    return files.read_arrays(path, "seconds")


def keep_inputs(path: epath.Path, digest: int) -> None:
    """Binds an evaluation to all of its images and labels; ValueError for others."""
    if not path.exists():
        files.write_whole(path, json.dumps({"crc32": digest}) + "\n")
    if files.read_json(path, "crc32", advice="pass --overwrite to start again")["crc32"] != digest:
        raise ValueError(
            f"images and labels must be those that the evaluation in {path.parent} began with, but some differ; choose "
            "another --name, or pass --overwrite to start again."
        )


def calibration(outputs: Outputs, label: np.ndarray) -> dict[str, Any]:
    """Accuracy, scores of the probabilities, and the points of a reliability diagram."""
    probabilities = scipy.special.softmax(np.asarray(outputs.logits, np.float64), axis=-1)
    points = metrics.reliability(probabilities, label)
    correct, classes = outputs.logits.argmax(-1) == label, outputs.logits.shape[1]
    return {
        "num_images": len(label),
        "correct": int(correct.sum()),
        "class_images": np.bincount(label, minlength=classes),
        "class_correct": np.bincount(label[correct], minlength=classes),
        "expected_calibration_error": metrics.expected_calibration_error(probabilities, label),
        "brier_score": metrics.brier_score(probabilities, label),
        "negative_log_likelihood": metrics.negative_log_likelihood(probabilities, label),
        **points._asdict(),
    }


def conformal_sets(outputs: Outputs, label: np.ndarray, *, coverage: float, seed: int) -> dict[str, Any]:
    """Prediction sets of the second half of the images, by thresholds from the first half."""
    if len(label) < 2:
        raise ValueError("images must be at least 2, of which half calibrate the sets, got 1.")
    half = len(label) // 2
    probabilities = scipy.special.softmax(np.asarray(outputs.logits, np.float64), axis=-1)
    uniforms = np.random.default_rng(seed).random(len(label))
    found: dict[str, Any] = {"calibrated_on": half, "num_images": len(label) - half}
    for name, score in SCORES.items():
        scores = np.asarray(score(probabilities, uniforms))
        sets = conformal.split_conformal(scores[:half], label[:half], scores[half:], alpha=1 - coverage)
        found[f"{name}_covered"] = int(sets[np.arange(len(sets)), label[half:]].sum())
        found[f"{name}_size"] = sets.sum(-1)
    return found


def out_of_distribution(
    folder: epath.Path, subject: Subject, outputs: Outputs
) -> tuple[dict[str, Arrays], dict[str, str]]:
    """Scores of each detector on the in-distribution images and on each foreign set; each detector has a file.

    Returns:
      The scores by detector, and why a detector has none.
    """
    if not subject.foreign:
        raise ValueError("near or far must name a set of foreign images, got none.")
    target, half = subject.target, len(subject.target.id) // 2
    apart = subject.train is None  # else all of the images are new to the detectors
    if apart and not half:
        raise ValueError("images must be at least 2, on half of which detectors are fitted without train, got 1.")
    known = detectors.Labelled(target.image, target.label, outputs)
    fitted_on, tested = _rows(known, slice(half)), _rows(known, slice(half if apart else 0, None))
    validation = fitted_on
    if subject.train is not None:
        rows = subject.train[subsets.evenly(len(subject.train), subject.most)]
        if rows.label.max() >= (classes := outputs.logits.shape[1]):
            raise ValueError(
                f"train must have labels from 0 to {classes - 1}, as many classes as the model has logits, got "
                f"{rows.label.max()}."
            )
        fitted_on = detectors.Labelled(rows.image, rows.label, classifiers.outputs_of(subject.classifier, rows.image))
    context = detectors.context_of(subject.classifier, fitted_on, validation)
    parts = {"in": tested}
    for name, of in subject.foreign.items():
        image = of.dataset[subsets.evenly(len(of.dataset), subject.most)].image
        none = np.zeros(len(image), np.int32)
        parts[name] = detectors.Labelled(image, none, classifiers.outputs_of(subject.classifier, image))
    inputs = classifiers.digest([fitted_on.image, fitted_on.label, *(part.image for part in parts.values())])
    found, left_out = {}, {}
    for name in DETECTORS if outputs.features.shape[1] else OF_LOGITS:
        path = folder / f"{name}.npz"
        if path.exists() and not (
            {*parts} <= {*(there := files.read_arrays(path))} and there.get("inputs") == np.asarray(inputs)
        ):
            path.unlink()  # of other images
        try:
            found[name] = kept(path, functools.partial(_scores, name, context, parts, inputs))
        except ValueError as error:
            left_out[name] = NO_HEAD if context.head is None and str(error).startswith("head ") else str(error)
            runtimes.log(f"{name} is left out: {left_out[name]}")
    if not found:
        raise ValueError(f"no detector could be fitted: {next(iter(left_out.values()))}")
    return found, left_out


def _scores(name: str, context: detectors.Context, parts: dict[str, detectors.Labelled], inputs: int) -> Arrays:
    score = detectors.fit(name, context)
    scores = {part: np.asarray(score(rows.image, rows.outputs)) for part, rows in parts.items()}
    return scores | {"inputs": np.asarray(inputs)}


def _rows(labelled: detectors.Labelled, rows: slice) -> detectors.Labelled:
    return jax.tree.map(lambda a: a[rows], labelled)


def certificates(
    folder: epath.Path, subject: Subject, settings: Settings, plan: Plan, key: jax.Array, watch: runtimes.Watch
) -> None:
    """Certifies as many images as planned, with sequential draws; each certificate is on disk before the next."""
    assert plan.draws is not None
    measure = certification.gaussian(settings.sigma)
    certify = smoothers.procedure(
        (subject.classifier.logits_fn(),), measure, num_selection=SELECTION, num_estimation=plan.draws,
        alpha=settings.alpha, batch_size=None, sequential=True,
    )  # fmt: skip
    ids = np.sort(subject.target.id[: plan.certified])
    mesh = subject.classifier.mesh
    assert mesh is not None
    smoothing.certify_images(folder, key, certify, subject.test, ids, radius=settings.sigma, mesh=mesh, watch=watch)


def attack(folder: epath.Path, subject: Subject, settings: Settings, epsilon: float, plan: Plan, key: jax.Array):
    """AutoAttack on as many images as planned, and the sanity checks of what it left."""
    assert plan.attacked is not None
    target, path = first(subject.target, plan.attacked), folder / "attack.npz"
    made = adversaries.make("autoattack", epsilon, settings.norm)
    arrays = kept(path, lambda: target.attacked(jax.random.fold_in(key, 0), made, path))
    correct = arrays["part_correct"][-1] if len(arrays["part_correct"]) else arrays["answer"] == target.label
    found: Any = {(settings.norm, epsilon, "autoattack"): {**arrays, "correct": correct}}

    def checks():
        findings = sanity.check(target, found, {}, None, jax.random.fold_in(key, 1))
        made = [finding for finding in findings if finding.passed is not None]
        return {"passed": [each.passed for each in made], "text": np.asarray([each.text for each in made], np.str_)}

    checked = kept(folder / "attack_checks.npz", checks)
    findings = map(sanity.Finding, checked["passed"].tolist(), checked["text"].tolist())
    seconds = arrays["seconds"] + checked["seconds"]
    return {**arrays, "correct": correct, "seconds": seconds}, list(findings)
