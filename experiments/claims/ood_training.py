r"""Trainings that should help to notice foreign inputs, compared by the scores of MSP and energy.

python -m experiments.claims.ood_training
python -m experiments.claims.ood_training --dataset mnist --data-dir DIR --far fashion_mnist cifar10 \
        --outliers omniglot@small1
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal, get_args

from robustjax import plotting

from .. import ood
from ..common import checks
from . import _frame, detectors

Training = Literal["standard", "logit_norm", "mixup", "cutmix", "outlier_exposure", "energy_bounded"]
EXPOSED = ("outlier_exposure", "energy_bounded")
NUMBERS = tuple(f"{detector} {group}" for detector in ("MSP", "energy") for group in detectors.GROUPS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(detectors.Config):
    """Settings of the measurement; the images are those of experiments.ood."""

    detectors: tuple[str, ...] = ("msp", "energy")
    """Detectors to compare; MSP and energy are needed."""
    trainings: tuple[Training, ...] = get_args(Training)
    """Trainings to compare; a claim is left out where its training is."""
    outliers: str = "gaussian_noise"
    """Outliers to train on: a synthetic set, NAME or NAME@SPLIT; never from a stored split that is tested."""

    def __post_init__(self):
        super().__post_init__()
        checks.distinct(self, "trainings")
        if "standard" not in self.trainings or not {"msp", "energy"} <= set(self.detectors):
            raise ValueError(
                "trainings must hold standard, and detectors msp and energy, got trainings "
                f"{' '.join(self.trainings)} and detectors {' '.join(self.detectors)}."
            )


def measure(config: Config, seed: int, place: _frame.Place) -> _frame.Numbers:
    """Adds a seed to a run of experiments.ood for each training."""
    found: dict[str, dict[str, float]] = {}
    for training in config.trainings:
        outliers = config.outliers if training in EXPOSED else None
        run = config.run_of(seed + 1, str(place.folder.parent / "runs"), training, outliers)
        rows = ood.run(run, place.runtime)
        if not rows:  # the first process has them
            continue
        of = detectors.numbers_of([row for row in rows if row["seed"] == seed])
        numbers = {"accuracy": json.loads((run.folder() / "metrics.json").read_text())["accuracy"][seed]}
        for name, shown in (("msp", "MSP"), ("energy", "energy")):
            numbers |= {f"{shown} {key.split()[1]}": v for key, v in of[name].items() if key.startswith("AUROC")}
        found[training] = numbers
    return found


def aurocs(config: Config, results: _frame.Results) -> Any:
    """AUROC of both detectors on near and far sets."""
    shown = lambda of_arm: {name: values for name, values in of_arm.items() if name in NUMBERS}
    return plotting.bar_chart({arm: shown(of_arm) for arm, of_arm in results.items()}, label="AUROC", start=0.5)


def _claim(training: str, method: str, paper: str, arxiv: str, statement: str, *numbers: str) -> _frame.Claim:
    bars = [_frame.Bar(number, training, ">", "standard") for number in numbers]
    bars += [_frame.Bar("accuracy", training, ">=", "standard", by=0.01)] if training in EXPOSED else []
    functions = {
        "logit_norm": ("losses.logit_norm", "losses.normalized_cross_entropy"),
        "mixup": ("losses.mixup", "perturbations.mixup"),
        "cutmix": ("losses.cutmix", "perturbations.cutmix"),
        "outlier_exposure": ("losses.outliers.outlier_exposure", "losses.outliers.uniform_cross_entropy"),
        "energy_bounded": ("losses.outliers.energy_bounded", "losses.outliers.energy_hinge"),
    }
    return _frame.Claim(method, paper, arxiv, functions[training], statement, _frame.among("trainings", *bars))


STUDY = _frame.Study(
    measure=measure, config=Config(),
    tiny=Config(model="mlp", num_epochs=1, far=("uniform_noise",), trainings=("standard", "logit_norm")),
    numbers=[_frame.Column("accuracy", "accuracy"), *(_frame.Column(name, name) for name in NUMBERS)],
    claims=(
        _claim("logit_norm", "LogitNorm", "Wei et al. 2022", "2205.09310",
               "Training on the direction of the logits makes MSP a better detector.", "MSP near", "MSP far"),
        _claim("mixup", "Mixup", "Zhang et al. 2018", "1710.09412",
               "Training on mixtures of two images generalises better.", "accuracy"),
        _claim("cutmix", "CutMix", "Yun et al. 2019", "1905.04899",
               "Better accuracy and detection than standard training.", "accuracy", "MSP near", "MSP far"),
        _claim("outlier_exposure", "Outlier exposure", "Hendrycks, Mazeika, Dietterich 2019", "1812.04606",
               "Training on some outliers helps against others.", "MSP near", "MSP far"),
        _claim("energy_bounded", "Energy-bounded fine-tuning", "Liu et al. 2020", "2010.03759",
               "Fine-tuning that separates energies makes energy a better detector.", "energy near", "energy far"),
    ),
    figure=aurocs, in_folder=True,
)  # fmt: skip

if __name__ == "__main__":
    _frame.main(STUDY, __doc__)
