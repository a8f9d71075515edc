"""Adversarial trainings, compared by clean accuracy and by the accuracy that PGD leaves.

python -m experiments.claims.adversarial_training
python -m experiments.claims.adversarial_training --dataset mnist --data-dir DIR --model lenet --epsilon 0.3
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from robustjax import plotting

from .. import adversarial
from ..common import checks, settings
from . import _frame

Training = Literal["standard", "pgd", "trades", "mart", "awp", "logit_pairing", "entropy"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(settings.Training):
    """Settings of the measurement; epsilon is linf, in units of [0, 1] pixels."""

    num_epochs: int | None = 25
    trainings: tuple[Training, ...] = get_args(Training)
    """Trainings to compare."""
    epsilon: float = 0.15
    """Radius, in training and of the attack."""
    train_steps: int = 5
    """Steps of PGD in training."""
    num_images: int = 10_000
    """Maximum number of images to attack, evenly spaced."""

    def __post_init__(self):
        super().__post_init__()
        checks.distinct(self, "trainings")
        if not {"standard", "pgd"} <= set(self.trainings):
            raise ValueError(f"trainings must hold standard and pgd, the baselines, got {' '.join(self.trainings)}.")
        self.run_of("pgd", 0, "results")

    def run_of(self, training: Any, seed: int, results_dir: str) -> adversarial.Config:
        """One of the runs that are compared."""
        return adversarial.Config(
            **settings.shared(self, adversarial.Config), training=training, train_epsilon=self.epsilon,
            epsilons=(self.epsilon,), attacks=("pgd_20",), seed=seed, results_dir=results_dir, name=training,
        )  # fmt: skip


def measure(config: Config, seed: int, place: _frame.Place) -> _frame.Numbers:
    """Runs experiments.adversarial with each training."""
    found: dict[str, dict[str, float]] = {}
    for training in config.trainings:
        for row in adversarial.run(config.run_of(training, seed, str(place.folder)), place.runtime):
            found[training] = {"clean": row["clean_accuracy"], "PGD-20": row["robust_accuracy"]}
    return found


def accuracies(config: Config, results: _frame.Results) -> Any:
    """Clean and robust accuracy of each training."""
    title = f"{config.dataset} {config.model}, linf {config.epsilon:g}"
    return plotting.bar_chart(results, label="accuracy", title=title)


def _claim(functions: str, method: str, paper: str, arxiv: str | None, statement: str, *bars: _frame.Bar):
    named = tuple(f"losses.{name}" for name in functions.split())
    return _frame.Claim(method, paper, arxiv, named, statement, _frame.among("trainings", *bars))


STUDY = _frame.Study(
    measure=measure, config=Config(),
    tiny=Config(model="mlp", trainings=("standard", "pgd"), num_epochs=1, train_steps=1, num_images=8),
    numbers=[_frame.Column("clean", "clean"), _frame.Column("PGD-20", "PGD-20")],
    claims=(
        _claim("adversarial.adversarial_training", "Adversarial training", "Madry et al. 2018", "1706.06083",
               "Training on PGD examples makes robust.", _frame.Bar("PGD-20", "pgd", ">", "standard")),
        _claim("adversarial.trades kl_divergence", "TRADES", "Zhang et al. 2019", "1901.08573",
               "A better trade-off of accuracy and robustness than adversarial training.",
               _frame.Bar("PGD-20", "trades", ">", "pgd"), _frame.Bar("clean", "trades", ">=", "pgd", by=0.01)),
        _claim("adversarial.mart boosted_cross_entropy", "MART", "Wang et al. 2020, ICLR", None,
               "More weight on misclassified examples makes more robust than adversarial training.",
               _frame.Bar("PGD-20", "mart", ">", "pgd")),
        _claim("adversarial.awp", "AWP", "Wu, Xia, Wang 2020", "2004.05884",
               "Perturbed weights make more robust than adversarial training.",
               _frame.Bar("PGD-20", "awp", ">", "pgd")),
        _claim("adversarial.logit_pairing", "Logit pairing", "Kannan, Kurakin, Goodfellow 2018", "1803.06373",
               "Equal logits of clean and adversarial inputs make more robust than adversarial training; said to mask "
               "gradients (arXiv:1807.10272), so verify with AutoAttack.",
               _frame.Bar("PGD-20", "logit_pairing", ">", "pgd")),
        _claim("adversarial.entropy_regularization", "Entropy regularisation", "Cubuk et al. 2017", "1711.02846",
               "A penalty on entropy makes more robust than standard training.",
               _frame.Bar("PGD-20", "entropy", ">", "standard")),
    ),
    figure=accuracies, in_folder=True,
)  # fmt: skip

if __name__ == "__main__":
    _frame.main(STUDY, __doc__)
