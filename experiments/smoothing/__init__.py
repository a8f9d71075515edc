"""Trains a classifier with noise and certifies it by randomized smoothing (Cohen et al., arXiv:1902.02918).

Writes results/smoothing/NAME with config.json, certificates.csv, metrics.json, report.md and a figure. The same command
resumes an interrupted run from its last checkpoint or certificate.

    python -m experiments.smoothing
    python -m experiments.smoothing --dataset mnist --data-dir DIR --sigma 0.5 --num-estimation 10000 --num-images 500
    python -m experiments.smoothing --dataset cifar10 --data-dir DIR --model resnet20 --skip 20
    python -m experiments.smoothing --checkpoint RUN --num-estimation 100000 --target-radius 0.5
    python -m experiments.smoothing --model my_module:build --dataset mnist --data-dir DIR
    python -m experiments.smoothing --compare RUN RUN
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import numpy as np

from robustjax import _paths

from ..common import classifiers, folders, own_models, runtimes, settings, smoothers
from . import _report
from ._certify import certify_images as certify_images
from ._config import OF_TRAINING as OF_TRAINING
from ._config import SAME as SAME
from ._config import Config as Config


def run(config: Config, runtime: runtimes.Runtime = runtimes.HERE) -> dict:
    """Trains, certifies and reports, or does what is left of it; or compares finished runs.

    Returns:
      The summary that is written to ``metrics.json``; empty for a comparison, and in all processes but the first.
    """
    stopwatch, mesh = runtimes.Stopwatch(), runtime.local_mesh()
    if config.compare:
        results = _paths.path_of(results_dir=config.results_dir) / "smoothing"
        _report.compare(config.compare, results / f"certified_accuracy.{config.figure_format}", config.radii)
        return {}

    # Data.
    train, test = config.images()
    ids = np.arange(0, len(test), config.skip)[: config.num_images]

    # Noise, and how far it can certify.
    measure = config.measure(math.prod(train.image_shape))
    largest = smoothers.largest_radius(
        measure, num_estimation=config.num_estimation, alpha=config.alpha, dual=config.dual
    )
    if config.target_radius is not None and config.target_radius > largest:
        raise ValueError(
            f"target_radius must be at most {largest:g}, the largest that {config.num_estimation:,} draws can certify "
            f"with {config.noise} noise of sigma {config.sigma:g}, got {config.target_radius:g}."
        )

    # Model: of another run, or trained; dual smoothing has one for each half of the pixels.
    model_key, train_key, certify_key = jax.random.split(jax.random.key(config.seed), 3)
    functional, given = own_models.model_of(config, train, key=model_key, runtime=runtime, dtype=config.dtype)
    recipe = None
    if given is None:
        recipe = classifiers.recipe_of(config.dataset, config.recipe, config.learning_rate)
    parts = [("checkpoints", functional, train_key)]
    if config.dual:
        first, second = smoothers.halves_of(functional)
        first_key, second_key = jax.random.split(train_key)
        parts = [("checkpoints-0", first, first_key), ("checkpoints-1", second, second_key)]
    folder, bases, trained = config.folder(), [], {}
    folders.open_run(folder, config, same=SAME, overwrite=config.overwrite)
    with runtimes.watching(runtime, folder, dataclasses.asdict(config)) as watch:
        for place, part, key in parts:
            if given is not None:
                base = given
            else:
                assert recipe is not None
                num_steps = classifiers.num_steps(recipe, config.num_epochs, len(train))
                objective = config.objective(num_steps=num_steps)
                base, trained = classifiers.train(
                    folder / place, part, train, key=key, objective=objective, recipe=recipe,
                    num_epochs=config.num_epochs, seed=config.seed, runtime=runtime,
                    watch=functools.partial(watch, "training"),
                )  # fmt: skip
            bases.append(base)
        classifiers.keep_to(folder, [base.state for base in bases], [train, test])
        if settings.is_own(config.model):
            own_models.keep_to(folder, classifiers.outputs_of(bases[0], test[:16].image).logits)

        # Certificates.
        certify = smoothers.procedure(
            tuple(base.logits_fn() for base in bases), measure, num_selection=config.num_selection,
            num_estimation=config.num_estimation, alpha=config.alpha, batch_size=config.batch_size,
            sequential=config.sequential, target_radius=config.target_radius,
        )  # fmt: skip
        # By default progress is reported where probability 0.84 certifies: of Gaussian noise, at sigma.
        shown = round(float(measure.radius(0.8413447460685429)), 9)
        certify_images(
            folder, certify_key, certify, test, ids, mesh=mesh, watch=watch,
            radius=shown if config.target_radius is None else config.target_radius,
        )  # fmt: skip

    # Report.
    if jax.process_index() != 0:
        return {}
    target = () if config.target_radius is None else (config.target_radius,)
    radii = config.radii or target or smoothers.default_radii(largest)
    classifier = smoothers.joined(tuple(bases)) if config.dual else bases[0]
    summary = _report.summarize(folder, norm=measure.norm, radii=radii, at_target=bool(target)) | {
        "standard_accuracy": classifier.accuracy(test, ids),
        "training": trained,
        "seconds": stopwatch.seconds(),
        "machine": runtimes.machine(),
        "jax": jax.__version__,
    }
    noise = "" if config.noise == "gaussian" else f"{config.noise} "
    noise = f"{'dual, ' if config.dual else ''}{noise}sigma {config.sigma:g}"
    _report.report(folder, config, summary, stopwatch, about=f"{config.dataset} {config.model}", noise=noise)
    return summary
