"""Trains a classifier, attacks it and reports its robust accuracy, at each radius and under each attack.

Writes results/adversarial/NAME with config.json, the adversarial images of every attack, metrics.csv, report.md and
figures. The same command resumes an interrupted run. With other attacks, radii or norms it runs only what is missing,
and reports the attacks of this command.

    python -m experiments.adversarial
    python -m experiments.adversarial --training trades --norms l2 --epsilons 0.25 0.5 1
    python -m experiments.adversarial --dataset cifar10 --data-dir DIR --model resnet20 --epsilons 2/255 8/255
    python -m experiments.adversarial --checkpoint results/smoothing/digits-cnn-0.5 --smoothed --sigma 0.5
    python -m experiments.adversarial --training intervals --certify-intervals
    python -m experiments.adversarial --model my_module:build --epsilons 8/255 --dataset cifar10 --data-dir DIR
    python -m experiments.adversarial --list
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from robustjax import _blocks, certification

from ..common import (
    adversaries,
    classifiers,
    folders,
    own_models,
    runtimes,
    sanity,
    settings,
    subsets,
    tables,
)
from ..common.targets import Target
from . import _attack, _report
from ._config import SAME
from ._config import Config as Config


def run(config: Config, runtime: runtimes.Runtime = runtimes.HERE) -> list[dict]:
    """Trains, attacks, checks and reports, or does what is left of it; all processes train, the first one attacks.

    Returns:
      The rows of metrics.csv; empty in all processes but the first.
    """
    stopwatch = runtimes.Stopwatch()
    if config.list:
        tables.show(runtimes.console(), adversaries.listed())
        return []
    config = config.resolved()
    jobs, radii = config.jobs(), config.radii()

    # Data.
    train, test = config.images()

    # Model: of another run, or trained.
    train_key, attack_key, check_key, certify_key, steps_key = jax.random.split(jax.random.key(config.seed), 5)
    model_key, train_key = jax.random.split(train_key)
    functional, given = own_models.model_of(config, train, key=model_key, runtime=runtime)
    recipe = classifiers.recipe_of(config.dataset, config.recipe) if given is None else None
    folder = config.folder()
    folders.open_run(folder, config, same=SAME, overwrite=config.overwrite)
    with runtimes.watching(runtime, folder, dataclasses.asdict(config)) as watch:
        if given is not None:
            classifier = given
        else:
            assert recipe is not None
            objective = adversaries.objective_of(
                str(config.training), norm=config.train_norm, epsilon=config.train_epsilon, steps=config.train_steps,
                beta=config.beta, sigma=config.sigma,
                num_steps=classifiers.num_steps(recipe, config.num_epochs, len(train)),
            )  # fmt: skip
            classifier, _ = classifiers.train(
                folder / "checkpoints", functional, train, key=train_key, objective=objective, recipe=recipe,
                num_epochs=config.num_epochs, seed=config.seed, runtime=runtime,
                watch=functools.partial(watch, "training"),
            )  # fmt: skip
        classifiers.keep_to(folder, classifier.state, [train, test])
        if settings.is_own(config.model):
            own_models.keep_to(folder, classifiers.outputs_of(classifier, test[:16].image).logits)
        if jax.process_index() != 0:
            return []

        # Attacks, certificates and checks.
        chosen = test[subsets.evenly(len(test), config.num_images or len(test))]
        image, label, ids = (np.asarray(part) for part in chosen)
        devices = runtime.local_mesh().size
        most = config.batch_size or _blocks.at_once(image.shape[1:], backward=True)
        size = min(most, len(ids)) if config.batch_size else _blocks.evenly(len(ids), most)
        target = Target(classifier, ids, image, label, -(-size // devices) * devices)
        measure = certification.gaussian(config.sigma)
        if config.smoothed:
            target = target._replace(measure=measure, samples=config.samples)
        clean, found = _attack.attack(folder / "adversarial", target, jobs, attack_key, watch)
        if config.smoothed:
            steps = {}
            certificate = _attack.certificate_of(folder / "certificates.npz", target, measure, certify_key)
        else:
            steps = _attack.steps_of(folder / "checks", target, radii, steps_key)
            certificate = _attack.verified_of(target, radii["linf"]) if config.certify_intervals else None
        findings = sanity.check(target, found, steps, certificate, check_key)

    # Report.
    evaluation = _report.Evaluation(target, clean, found, steps, certificate, findings)
    return _report.report(folder, config, evaluation, stopwatch)
