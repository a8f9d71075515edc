"""The classifiers whose outputs are scored."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from etils import epath

from robustjax import losses, models, training

from ..common import classifiers, foreign


def objective_of(name: str, num_classes: int) -> losses.Objective:
    """The objective by name; the model of ``energy_bounded`` is fine-tuned afterwards."""
    if name in ("mixup", "cutmix"):
        return getattr(losses, name)(num_classes=num_classes)
    others = {"logit_norm": losses.logit_norm, "outlier_exposure": losses.outliers.outlier_exposure}
    return others.get(name, losses.standard)()


def classifier_of(
    objective: str,
    functional: models.Functional,
    sets: foreign.Sets,
    folder: epath.Path,
    *,
    recipe: training.Recipe,
    num_epochs: int | None,
    **settings: Any,
) -> classifiers.Classifier:
    """A classifier trained by name of the objective; ``settings`` as in ``classifiers.train``."""
    classifier, _ = classifiers.train(
        folder / "checkpoints", functional, sets.train, objective=objective_of(objective, sets.train.num_classes),
        recipe=recipe, num_epochs=num_epochs,
        outliers=sets.outliers if objective == "outlier_exposure" else None, **settings,
    )  # fmt: skip
    if sets.outliers is None or objective != "energy_bounded":
        return classifier
    # Margins as the paper chooses them, around the mean energies before: training lowers the energy of in-distribution
    # images and raises the energy of outliers.
    known, outlying = (mean_energy(classifier, part[:5000].image) for part in (sets.train, sets.outliers))
    margins = losses.outliers.energy_bounded(m_in=min(known, outlying - 1), m_out=outlying)
    tuning = dataclasses.replace(recipe, algorithm="sgd", learning_rate=1e-3, schedule="cosine", num_epochs=10)
    functional = functional._replace(state=classifier.state)
    classifier, _ = classifiers.train(
        folder / "fine_tuning", functional, sets.train, objective=margins, recipe=tuning, num_epochs=None,
        outliers=sets.outliers, **settings,
    )  # fmt: skip
    return classifier


def mean_energy(classifier: classifiers.Classifier, images: Any) -> float:
    """Mean of -logsumexp of the logits."""
    return float(-jax.nn.logsumexp(classifiers.outputs_of(classifier, images).logits, axis=-1).mean())
