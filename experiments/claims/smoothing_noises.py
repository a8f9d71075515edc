"""Uniform, Laplace and Gaussian smoothing of equal variance, compared by their certificates in the l1 norm.

python -m experiments.claims.smoothing_noises
python -m experiments.claims.smoothing_noises --dataset mnist --data-dir DIR --model lenet --sigma 0.5
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .. import smoothing
from ..common import settings
from . import _frame
from .smoothing_training import curves, numbers_of

NOISES = ("uniform", "laplace", "gaussian")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(settings.Model):
    """Settings of the measurement; radii are l1, in units of [0, 1] pixels."""

    sigma: float = 0.25
    """Standard deviation of the noise of each pixel."""
    num_estimation: int = 5000
    """Noisy copies of each image that bound the probability of its class."""
    num_images: int | None = 200
    """Maximum number of images to certify. None: all."""
    radii: tuple[float, ...] = (0.1, 0.25, 0.4)
    """Radii of the table and of the bars."""

    def __post_init__(self):
        super().__post_init__()
        self.run_of("uniform", 0, "results")

    def run_of(self, noise: Any, seed: int, results_dir: str) -> smoothing.Config:
        """One of the runs that are compared; an l2 ball holds the l1 ball of its radius."""
        given = settings.shared(self, smoothing.Config)
        return smoothing.Config(**given, noise=noise, norm="l1", seed=seed, results_dir=results_dir, name=noise)


def measure(config: Config, seed: int, place: _frame.Place) -> _frame.Numbers:
    """Runs experiments.smoothing with each noise."""
    runs = {noise: config.run_of(noise, seed, str(place.folder)) for noise in NOISES}
    summaries = {noise: smoothing.run(run, place.runtime) for noise, run in runs.items()}
    return {noise: numbers_of(of, config.radii, runs[noise].folder()) for noise, of in summaries.items() if of}


STUDY = _frame.Study(
    measure=measure, config=Config(),
    tiny=Config(model="mlp", num_epochs=1, num_estimation=100, num_images=4),
    numbers=lambda config: [
        _frame.Column("accuracy", "accuracy"),
        _frame.Column("ACR", "ACR"),
        *(_frame.Column(f"at {r:g}", f"l1 {r:g}") for r in config.radii),
    ],
    claims=(
        _frame.Claim(
            "Uniform and Laplace smoothing, other norms", "Yang et al. 2020", "2002.08118",
            ("certification.uniform", "certification.laplace", "certification.in_norm"),
            "Uniform noise certifies larger l1 balls than Laplace noise of the same variance.",
            lambda config: tuple(_frame.Bar(f"at {r:g}", "uniform", ">", "laplace") for r in config.radii),
        ),
    ),
    figure=curves, in_folder=True,
)  # fmt: skip

if __name__ == "__main__":
    _frame.main(STUDY, __doc__)
