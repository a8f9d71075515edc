r"""Training with interval bounds beside standard training, compared by the accuracy that interval bounds verify.

python -m experiments.claims.interval_training
python -m experiments.claims.interval_training --dataset mnist --data-dir DIR --model strided_cnn \
        --train-epsilon 0.2 --epsilon 0.1 --num-images 1000
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .. import adversarial
from ..common import checks, settings
from . import _frame

TRAININGS = ("standard", "intervals")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(settings.Model):
    """Settings of the measurement; radii are linf, in units of [0, 1] pixels."""

    model: str = "mlp"
    num_epochs: int | None = 20
    train_epsilon: float = 0.05
    """Radius of the balls in training."""
    epsilon: float = 0.05
    """Radius of the balls that are attacked and verified."""
    num_images: int = 64
    """Maximum number of images to attack and verify, evenly spaced."""
    least: float = 0.9
    """Verified accuracy that the bar asks for; published figures for MNIST at 0.1 are 0.978."""

    def __post_init__(self):
        super().__post_init__()
        checks.positive(self, "epsilon", "least")
        self.run_of("intervals", 0, "results")

    def run_of(self, training: Any, seed: int, results_dir: str) -> adversarial.Config:
        """One of the runs that are compared."""
        return adversarial.Config(
            **settings.shared(self, adversarial.Config), training=training, epsilons=(self.epsilon,),
            attacks=("pgd_20",), certify_intervals=True, seed=seed, results_dir=results_dir, name=training,
        )  # fmt: skip


def measure(config: Config, seed: int, place: _frame.Place) -> _frame.Numbers:
    """Runs experiments.adversarial with each training."""
    found = {}
    for training in TRAININGS:
        for row in adversarial.run(config.run_of(training, seed, str(place.folder)), place.runtime):
            names = {"clean": "clean_accuracy", "PGD-20": "robust_accuracy", "verified": "certified_accuracy"}
            found[training] = {name: row[of] for name, of in names.items()}
    return found


STUDY = _frame.Study(
    measure=measure, config=Config(),
    tiny=Config(num_epochs=1, num_images=8),
    numbers=[_frame.Column(name, name) for name in ("verified", "PGD-20", "clean")],
    claims=(
        _frame.Claim(
            "Interval bound propagation", "Gowal et al. 2018", "1810.12715",
            ("losses.interval_training", "certification.intervals.certify", "certification.intervals.bounds"),
            "A network trained with its interval bounds is verified in linf balls without search.",
            lambda config: (
                _frame.Bar("verified", "intervals", ">", "standard"),
                *((_frame.Bar("verified", "intervals", ">=", config.least),) if config.dataset == "mnist" else ()),
            ),
        ),
    ),
    in_folder=True,
)  # fmt: skip

if __name__ == "__main__":
    _frame.main(STUDY, __doc__)
