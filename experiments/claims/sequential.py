"""Certifies the same images of the same models by sequential tests and with a fixed number of draws.

Each seed trains a model by experiments.smoothing and compares by experiments.smoothing.sequential, whose run folders
are kept in that of the seed.

    python -m experiments.claims.sequential
    python -m experiments.claims.sequential --dataset mnist --data-dir DIR --model lenet --num-images 100
    python -m experiments.claims.sequential --radii 0.5 --tolerances 0.05 0.1 0.2 --num-images 80
"""

from __future__ import annotations

import dataclasses

import jax

from .. import smoothing
from ..common import settings, smoothers
from ..smoothing import sequential
from . import _frame

FEWER, LOST = 10, 0.01
"""How many times fewer draws are claimed, and how much certified accuracy may be lost."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(sequential.Questions, settings.Training, settings.Splits):
    """Settings of the measurement; radii and sigma are in units of [0, 1] pixels."""

    sigma: float = 0.5
    """Standard deviation of the noise, in training and of the certificates."""

    def __post_init__(self):
        settings.Training.__post_init__(self)
        sequential.Questions.__post_init__(self)
        trained = self.training(0, "results")
        largest = smoothers.largest_radius(trained.measure(1), num_estimation=self.max_samples, alpha=self.alpha)
        if max(self.radii, default=0.0) > largest:
            raise ValueError(
                f"radii must be at most {largest:g}, the largest that {self.max_samples:,} draws can certify, got "
                f"{max(self.radii):g}."
            )

    def training(self, seed: int, results_dir: str) -> smoothing.Config:
        """The run that trains a model; its own certificate, of one image, is not used."""
        given = settings.shared(self, smoothing.Config) | {"num_images": 1, "num_selection": 1, "radii": ()}
        return smoothing.Config(**given, num_estimation=100, seed=seed, results_dir=results_dir)

    def comparison(self, run: str, results_dir: str) -> sequential.Config:
        """The comparison on the model of a run."""
        return sequential.Config(**settings.shared(self, sequential.Config), runs=(run,), results_dir=results_dir)


def measure(config: Config, seed: int, place: _frame.Place) -> _frame.Numbers:
    """Trains a model and certifies its answers both ways, or does what is left of it."""
    trained = config.training(seed, str(place.folder))
    smoothing.run(trained, dataclasses.replace(place.runtime, log=(), profile=False))
    if jax.process_index() != 0:
        return {}
    arms: dict[str, dict[str, float]] = {}
    for row in sequential.run(config.comparison(str(trained.folder()), str(place.folder))):
        kind, number = ("radius", "certified") if row["question"] == "target_radius" else ("tolerance", "acr")
        asked = f"{kind} {row['value']:g}"
        arms[f"sequential, {asked}"] = {
            number: row["sequential"], **{name: row[name] for name in ("draws", "median", "lost", "gained", "images")}
        }  # fmt: skip
        arms[f"certify, {asked}"] = {number: row["certify"], "draws": config.max_samples + config.num_selection}
    return arms


def bars(config: Config) -> tuple[_frame.Bar, ...]:
    """Fewer draws, and nearly the certified accuracy, at each radius."""
    draws = (config.max_samples + config.num_selection) / FEWER
    return tuple(
        bar
        for radius in config.radii
        for bar in (
            _frame.Bar("draws", f"sequential, radius {radius:g}", "<", draws),
            _frame.Bar("certified", f"sequential, radius {radius:g}", ">=", f"certify, radius {radius:g}", by=LOST),
        )
    )


STUDY = _frame.Study(
    measure=measure, config=Config(),
    tiny=Config(
        train_split="train[:64]", model="mlp", sigma=0.25, num_epochs=1, radii=(0.1,), tolerances=(0.2,),
        max_samples=1000, num_images=4,
    ),
    numbers=[
        _frame.Column("draws", "draws", ",.0f"),
        _frame.Column("median", "median", ",.0f"),
        _frame.Column("certified", "certified"),
        _frame.Column("acr", "ACR"),
        _frame.Column("lost", "lost", lambda v: f"{v.sum():.0f}"),
        _frame.Column("gained", "gained", lambda v: f"{v.sum():.0f}"),
    ],
    claims=(
        _frame.Claim(
            "Sequential certification", "Voracek 2024", "2406.17830", ("certification.certify_sequential",),
            "Draws that stop when the answer is known certify nearly as much as a fixed number of draws, with the same "
            "guarantee.",
            bars,
        ),
    ),
    details=lambda config, results: [
        "Draws: mean over images, with those that select the class. Certified: accuracy at the radius. ACR: average "
        "certified radius. Lost: images, of all seeds, that only certify certifies; gained: that only the sequential "
        "test certifies."
    ],
    in_folder=True,
)  # fmt: skip

if __name__ == "__main__":
    _frame.main(STUDY, __doc__)
