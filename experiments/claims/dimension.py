"""How certified radii change as images grow: plain and dual randomized smoothing with as many draws, on resized images.

The figure also has the upper bounds of arXiv:2404.09586: the radii of inputs of dimension d whose class has probability
p = 0.999 under noise of standard deviation s / sqrt(d). They are s q / sqrt(d) for plain smoothing, q = Phi^-1(p), and
for halves of m and n numbers s q (1 / sqrt(m) + 1 / sqrt(n)) / sqrt(2), twice as much. Here s makes the noise on the
smallest images sigma.

    python -m experiments.claims.dimension
    python -m experiments.claims.dimension --dataset mnist --data-dir DIR --sizes 28 56 --model lenet --num-epochs 3
"""

from __future__ import annotations

import dataclasses
import statistics

import numpy as np

from robustjax import data, plotting

from .. import smoothing
from ..common import checks, settings
from . import _frame

PROBABILITY = 0.999  # of the class, in the upper bounds
KINDS = {"plain": False, "dual": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(settings.Training):
    """Settings of the measurement; sigma is in units of [0, 1] pixels, whatever the size."""

    train_split: str = "train"
    """Images to train on, in TFDS syntax."""
    sizes: tuple[int, ...] = (8, 16, 32)
    """Pixels a side, in growing order."""
    sigma: float = 0.5
    """Standard deviation of the noise."""
    num_estimation: int = 10_000
    """Draws of each image, of both halves together where smoothing is dual."""
    num_images: int | None = 200
    """Certify at most N images."""

    def __post_init__(self):
        super().__post_init__()
        checks.at_least(2, self, "num_estimation")
        if not self.sizes or min(self.sizes) < 2 or any(a >= b for a, b in zip(self.sizes, self.sizes[1:])):
            raise ValueError(f"sizes must be at least 2 pixels, in growing order, got {self.sizes}.")
        for dual in KINDS.values():
            self.run_of(self.sizes[0], dual, 0, "results")

    def run_of(self, size: int, dual: bool, seed: int, results_dir: str) -> smoothing.Config:
        """One of the runs that are compared."""
        given = settings.shared(self, smoothing.Config)
        return smoothing.Config(**given, image_size=size, dual=dual, seed=seed, results_dir=results_dir)


def measure(config: Config, seed: int, place: _frame.Place) -> _frame.Numbers:
    """Runs plain and dual smoothing at every size, in the folder of the seed."""
    channels = data.load(config.dataset, config.train_split, config.data_dir).image_shape[-1]
    found: dict[str, dict[str, float]] = {}
    for size in config.sizes:
        for kind, dual in KINDS.items():
            summary = smoothing.run(config.run_of(size, dual, seed, str(place.folder)), place.runtime)
            if not summary:  # the first process has it
                continue
            names = ("standard_accuracy", "average_certified_radius", "abstained")
            numbers = {name: summary[name] for name in names} | {"dimension": channels * size**2}
            first = found.get(arm_of(config.sizes[0], kind), numbers)["average_certified_radius"]
            numbers["growth"] = numbers["average_certified_radius"] / first if first else 0.0
            found[arm_of(size, kind)] = numbers
    return found


def arm_of(size: int, kind: str) -> str:
    """Name of a size and a kind of smoothing."""
    return f"{size} x {size}, {kind}"


def radius_over_dimension(config: Config, results: _frame.Results):
    """Measured radii and upper bounds."""
    of = lambda kind, name: np.stack([results[arm_of(size, kind)][name] for size in config.sizes])
    d = of("plain", "dimension")[:, 0]
    measured = {f"{kind}, measured": (d, of(kind, "average_certified_radius")) for kind in KINDS}
    m, scale = np.ceil(d / 2), config.sigma * d[0] ** 0.5 * statistics.NormalDist().inv_cdf(PROBABILITY)
    bounds = {"plain": d**-0.5, "dual": (m**-0.5 + (d - m) ** -0.5) / 2**0.5}
    references = {f"{kind}, bound, falling noise": (d, scale * bound) for kind, bound in bounds.items()}
    labels = ("dimension", "average certified radius (ACR)")
    return plotting.spread_curve(
        measured, references, labels=labels, title=f"{config.dataset} {config.model}, sigma {config.sigma:g}"
    )


def details(config: Config, results: _frame.Results) -> list[str]:
    """What the columns and the bounds mean."""
    note = (
        f"{config.num_estimation:,} draws of each image in all, {config.num_images or 'all'} images. Growth: ACR as a "
        f"multiple of the ACR on the smallest images. Upper bounds: of inputs whose class has probability {PROBABILITY}"
        " under noise that falls with the root of the dimension; the runs keep their sigma."
    )
    return [note]


STUDY = _frame.Study(
    measure=measure, config=Config(),
    tiny=Config(
        sizes=(8,), train_split="train[:64]", model="mlp", sigma=0.25, num_epochs=1, num_images=4, num_estimation=100
    ),
    numbers=[
        _frame.Column("standard_accuracy", "accuracy"),
        _frame.Column("average_certified_radius", "ACR"),
        _frame.Column("growth", "growth"),
        _frame.Column("abstained", "abstained"),
    ],
    claims=(
        _frame.Claim(
            "Dual randomized smoothing", "Xia et al. 2024", "2404.09586",
            ("certification.dual", "certification.dual_radius", "certification.checkerboard"),
            "Two halves of the pixels, smoothed and classified by themselves, have a joint certificate that shrinks "
            "more slowly as images grow.",
            lambda config: (
                _frame.Bar("growth", arm_of(config.sizes[-1], "dual"), ">", arm_of(config.sizes[-1], "plain")),
            ),
        ),
    ),
    figure=radius_over_dimension, details=details, in_folder=True,
)  # fmt: skip

if __name__ == "__main__":
    _frame.main(STUDY, __doc__)
