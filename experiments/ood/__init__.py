"""Trains a classifier, fits out-of-distribution detectors on its training data and compares them.

Writes results/ood/NAME with config.json, the scores of every detector, metrics.csv, report.md and figures. The same
command resumes an interrupted run; further detectors or seeds are added to an existing run.

    python -m experiments.ood
    python -m experiments.ood --dataset mnist --near fashion_mnist --far omniglot cifar10 --data-dir DIR
    python -m experiments.ood --training outlier_exposure --outliers omniglot@small1 --far omniglot@small2
    python -m experiments.ood --dataset cifar10 --model resnet20 --classes 0 1 8 9 --detectors energy knn react+energy
    python -m experiments.ood --model my_module:build --dataset cifar10 --data-dir DIR
    python -m experiments.ood --list
"""

from __future__ import annotations

import dataclasses
import functools

import jax

from ..common import classifiers, detectors, folders, foreign, own_models, runtimes, settings, tables
from . import _report, _score, _train
from ._config import SAME
from ._config import Config as Config


def run(config: Config, runtime: runtimes.Runtime = runtimes.HERE) -> list[dict]:
    """Trains, fits, scores and reports, or does what is left of it; all processes train, the first one scores.

    Returns:
      One row of metrics for each seed, detector and set; empty in all processes but the first.
    """
    stopwatch = runtimes.Stopwatch()
    if config.list:
        tables.show(runtimes.console(), detectors.listed())
        return []
    config = config.resolved()

    # Data: in-distribution classes, near and far sets, and perhaps outliers to train on.
    sets = foreign.open_sets(
        config.dataset, config.data_dir, classes=config.classes, near=config.near, far=config.far,
        outliers=config.outliers, max_images=_score.MAX_IMAGES, seed=0, image_size=config.image_size,
    )  # fmt: skip

    # Models: one for each seed, or the one of another run.
    build = functools.partial(classifiers.build, config.model, sets.train, dtype="float32")
    given = recipe = None
    if config.is_trained:
        _, given = own_models.model_of(config, sets.train, key=jax.random.key(0), runtime=runtime)
    else:
        recipe = classifiers.recipe_of(config.dataset, config.recipe)
    folder, trained = config.folder(), []
    folders.open_run(folder, config, same=SAME, overwrite=config.overwrite)
    with runtimes.watching(runtime, folder, dataclasses.asdict(config)) as watch:
        for seed in range(config.seeds):
            place = folder / f"seed-{seed}"
            model_key, train_key = jax.random.split(jax.random.key(seed))
            if given is not None:
                classifier = given
            else:
                assert recipe is not None
                classifier = _train.classifier_of(
                    config.training, build(key=model_key), sets, place, recipe=recipe, num_epochs=config.num_epochs,
                    key=train_key, seed=seed, runtime=runtime, watch=functools.partial(watch, f"training seed {seed}"),
                )  # fmt: skip
            images = [sets.train, sets.validation, sets.test, *(of.dataset for of in sets.foreign.values())]
            classifiers.keep_to(place, classifier.state, images)
            if settings.is_own(config.model):
                own_models.keep_to(place, classifiers.outputs_of(classifier, sets.test[:16].image).logits)
            trained.append(classifier)
        if jax.process_index() != 0:
            return []

        # Scores.
        names = config.detectors or detectors.ALL
        known = [
            _score.score_sets(folder / f"seed-{seed}" / "scores", classifier, sets, names)
            for seed, classifier in enumerate(trained)
        ]

    # Report: of all detectors that have scores of all seeds.
    scores = _score.scores_of(folder, sets.foreign)
    finished = _score.finished(scores, config.seeds)
    if not finished:
        raise ValueError(f"detectors could not be fitted, none of {' '.join(names)}; see the messages above.")
    rows = _report.tabulate(folder, scores, sets.foreign)
    rows = [row for row in rows if row["seed"] < config.seeds and row["detector"] in finished]
    _report.report(folder, config, scores, rows, finished, sets, known, stopwatch)
    return rows
