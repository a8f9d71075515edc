"""Trainings of the base classifier for randomized smoothing, compared by what their smoothed classifiers certify.

python -m experiments.claims.smoothing_training
python -m experiments.claims.smoothing_training --sigma 0.25 --trainings clean gaussian stability consistency
python -m experiments.claims.smoothing_training --dataset mnist --data-dir DIR --model lenet --recipe mnist_short
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import numpy as np
from etils import epath

from robustjax import plotting

from .. import smoothing
from ..common import certificates, checks, settings
from . import _frame

Training = Literal["clean", "gaussian", "stability", "consistency", "macer", "smoothmix", "smoothadv"]
SETTINGS: dict[str, dict[str, Any]] = {
    "clean": {"train_sigma": 0.0},
    "consistency": {"train_weight": 5.0},
    "macer": {"train_weight": 6.0},
    "smoothadv": {"train_epsilon": 1.0, "train_steps": 4, "train_warmup": 0.25},
}
"""What differs from the objectives' defaults; all trainings but clean have the noise of the certificates."""
BARS = {0.25: (0.46, 0.07, 0.96), 0.5: (0.37, 0.15, 0.92)}
"""For digits, by sigma: the ACR and clean accuracy of Gaussian augmentation, and its gain in ACR over clean training.
They were set beforehand, from runs of another network in another framework: ACR, gain, accuracy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(settings.Training):
    """Settings of the measurement; sigma and radii are l2, in units of [0, 1] pixels."""

    train_split: str = "train"
    """Images to train on, in TFDS syntax."""
    sigma: float = 0.5
    """Standard deviation of the noise, in training and in the certificates."""
    trainings: tuple[Training, ...] = get_args(Training)
    """Trainings to compare; clean has no noise."""
    num_estimation: int = 5000
    """Noisy copies of each image that bound the probability of its class."""
    num_images: int | None = 200
    """Maximum number of images to certify. None: all."""
    radii: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Radii of the table."""

    def __post_init__(self):
        super().__post_init__()
        checks.distinct(self, "trainings", "radii")
        if "gaussian" not in self.trainings:
            raise ValueError(f"trainings must hold gaussian, the baseline, got {' '.join(self.trainings)}.")
        for training in self.trainings:
            self.run_of(training, 0, "results")

    def run_of(self, training: str, seed: int, results_dir: str) -> smoothing.Config:
        """One of the runs that are compared."""
        given = settings.shared(self, smoothing.Config) | SETTINGS.get(training, {})
        given |= {"training": "gaussian" if training == "clean" else training, "name": training}
        return smoothing.Config(**given, seed=seed, results_dir=results_dir)


def measure(config: Config, seed: int, place: _frame.Place) -> _frame.Numbers:
    """Runs experiments.smoothing with each training."""
    found: dict[str, dict[str, Any]] = {}
    for training in config.trainings:
        run = config.run_of(training, seed, str(place.folder))
        summary = smoothing.run(run, place.runtime)
        if summary:  # the first process has it
            found[training] = numbers_of(summary, config.radii, run.folder())
    return found


def numbers_of(summary: dict[str, Any], radii: tuple[float, ...], folder: epath.Path) -> dict[str, Any]:
    """The numbers of a run of experiments.smoothing, and the radii of the images it has right, -1 for the others."""
    table = certificates.read(folder)
    right = (table.certificate.label == table.labels) & ~table.certificate.abstained
    numbers = {"accuracy": summary["standard_accuracy"], "ACR": summary["average_certified_radius"]}
    numbers |= {f"at {r:g}": value for r, value in zip(radii, summary["certified_accuracy"], strict=True)}
    return numbers | {"radius": np.where(right, table.certificate.radius, -1.0)}


def curves(config: Any, results: _frame.Results) -> Any:
    """Certified accuracy over the radius, all seeds together."""
    of_arms = {arm: np.ravel(of_arm["radius"]) for arm, of_arm in results.items()}
    title = f"{config.dataset} {config.model}, sigma {config.sigma:g}"
    return plotting.certified_accuracy_curve({arm: (r, r >= 0) for arm, r in of_arms.items()}, title=title)


def of_gaussian(config: Config) -> tuple[_frame.Bar, ...]:
    """Bars of Gaussian augmentation; their heights are known for digits only."""
    least, gain, clean = BARS.get(config.sigma, (0.0, 0.0, 0.0)) if config.dataset == "digits" else (0.0, 0.0, 0.0)
    against = (_frame.Bar("ACR", "gaussian", ">", "clean", by=gain),) if "clean" in config.trainings else ()
    return (*against, _frame.Bar("ACR", "gaussian", ">=", least), _frame.Bar("accuracy", "gaussian", ">=", clean))


def _claim(training: str, method: str, paper: str, arxiv: str) -> _frame.Claim:
    statement = "Certifies more on average (ACR) than Gaussian augmentation."
    bars = _frame.among("trainings", _frame.Bar("ACR", training, ">", "gaussian"))
    return _frame.Claim(method, paper, arxiv, (f"losses.smoothing.{training}",), statement, bars)


STUDY = _frame.Study(
    measure=measure, config=Config(),
    tiny=Config(
        train_split="train[:64]", model="mlp", sigma=0.25, trainings=("clean", "gaussian"), num_epochs=1,
        num_estimation=100, num_images=4,
    ),
    numbers=lambda config: [
        _frame.Column("accuracy", "accuracy"),
        _frame.Column("ACR", "ACR"),
        *(_frame.Column(f"at {r:g}", f"at {r:g}", lambda v: f"{v.mean():.3f}") for r in config.radii),
    ],
    claims=(
        _frame.Claim(
            "Gaussian augmentation", "Cohen, Rosenfeld, Kolter 2019", "1902.02918",
            ("losses.smoothing.gaussian_augmentation",),
            "Training on the noise that smooths the classifier certifies more than training on clean images.",
            of_gaussian,
        ),
        _claim("stability", "Stability training", "Li et al. 2019", "1809.03113"),
        _claim("consistency", "Consistency regularisation", "Jeong, Shin 2020", "2006.04062"),
        _claim("macer", "MACER", "Zhai et al. 2020", "2001.02378"),
        _claim("smoothmix", "SmoothMix", "Jeong et al. 2021", "2111.09277"),
        _claim("smoothadv", "SmoothAdv", "Salman et al. 2019", "1906.04584"),
    ),
    figure=curves, in_folder=True,
)  # fmt: skip

if __name__ == "__main__":
    _frame.main(STUDY, __doc__)
