"""Scores of detectors, each kept on disk."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from etils import epath

from robustjax import metrics
from robustjax.typing import Batch

from ..common import classifiers, detectors, files, foreign, runtimes, subsets

# Maximum number of rows that detectors are fitted on, and of images of each set that are scored.
MAX_TRAIN, MAX_IMAGES = 50_000, 10_000
SECONDS = ("fit_seconds", "score_seconds")


def score_sets(
    folder: epath.Path, classifier: classifiers.Classifier, sets: foreign.Sets, names: tuple[str, ...]
) -> dict[str, float]:
    """Fits and scores the detectors without scores in ``folder``; each is on disk before the next one begins.

    A detector that cannot be fitted to these data is left out with a message.

    Returns:
      Accuracy and calibration error on the in-distribution test images.
    """
    train = sets.train[subsets.evenly(len(sets.train), MAX_TRAIN)]
    tested = {"in": sets.test} | {name: of.dataset for name, of in sets.foreign.items()}
    images = {name: part[subsets.evenly(len(part), MAX_IMAGES)] for name, part in tested.items()}

    def outputs_of(rows: Batch) -> detectors.Labelled:
        outputs = jax.tree.map(classifier.place, classifiers.outputs_of(classifier, rows.image))
        return detectors.Labelled(classifier.place(rows.image), rows.label, outputs)

    context = detectors.context_of(classifier, outputs_of(train), outputs_of(sets.validation[:]))
    parts = {name: outputs_of(part) for name, part in images.items()}
    for name in names:
        path = folder / f"{name}.npz"
        if path.exists():
            continue
        started = time.perf_counter()
        try:
            score = detectors.fit(name, context)
            fitted = time.perf_counter()
            scores: dict[str, Any] = {part: np.asarray(score(rows.image, rows.outputs)) for part, rows in parts.items()}
        except ValueError as error:
            runtimes.log(f"{folder.parent.name}: {name} is left out: {error}")
            continue
        seconds = dict(zip(SECONDS, (fitted - started, time.perf_counter() - fitted), strict=True))
        files.write_arrays(path, scores | seconds)
        runtimes.log(f"{folder.parent.name}: {name}, {sum(seconds.values()):.1f} s")
    probabilities = np.asarray(jax.jit(jax.nn.softmax)(parts["in"].outputs.logits))
    return {
        "accuracy": float((probabilities.argmax(-1) == images["in"].label).mean()),
        "expected_calibration_error": float(metrics.expected_calibration_error(probabilities, images["in"].label)),
    }


def scores_of(folder: epath.Path, sets: Iterable[str]) -> dict[tuple[int, str], dict[str, np.ndarray]]:
    """All scores of a run on disk, by seed and detector, in order.

    Raises:
      ValueError: a file of scores is damaged, or lacks one of the ``sets``.
    """
    found, wanted = {}, ("in", *sets, *SECONDS)
    for place in files.files(folder, "seed-*"):
        if not re.fullmatch("seed-(0|[1-9][0-9]*)", place.name):
            runtimes.log(f"{place} is left out: seeds are in seed-0, seed-1, ...; move it away.")
            continue
        for path in files.files(place / "scores", "*.npz"):
            found[int(place.name.removeprefix("seed-")), path.stem] = files.read_arrays(path, *wanted)
    return dict(sorted(found.items(), key=lambda item: item[0]))


def finished(scores: dict[tuple[int, str], Any], seeds: int) -> list[str]:
    """Detectors with scores of every seed, of this call and of earlier ones, in the order of ``--list``."""
    names = {name for _, name in scores if all((seed, name) in scores for seed in range(seeds))}
    order = {name: place for place, name in enumerate(detectors.ALL)}
    return sorted(names, key=lambda name: (order.get(name, len(order)), name))
