"""Learns half-spaces from noisy labels, and counts on which distributions of inputs the tests accept the answer.

python -m experiments.claims.halfspaces
python -m experiments.claims.halfspaces --seeds 5 --dimension 20 --num-samples 200000
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np

from robustjax import plotting
from robustjax.certification import halfspaces

from ..common import checks, tables
from . import _frame

GAP, FLAT = 0.1, 0.03
"""Distances from the true half-space up to which two of the distributions have no inputs, or flat ones."""
TESTS = {"T1": ("moments",), "T2": ("band_mass",), "T3": ("band_covariance", "band_kurtosis"), "T4": ("disagreement",)}
PARTS = halfspaces.Statistics._fields
Distribution = Literal["normal", "mixture", "whitened", "student", "hypercube", "gap", "flat"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the measurement."""

    distributions: tuple[Distribution, ...] = get_args(Distribution)
    """Of the inputs."""
    dimension: int = 10
    """Of the inputs, at least 2."""
    num_samples: int = 50_000
    """Labelled inputs of a seed; a third each to learn, to test and to choose."""
    num_fresh: int = 100_000
    """Inputs on which the error above the best is measured; the probability of a flip is known for each label."""
    eta: float = 0.2
    """Probability that a label is flipped, on one side of a random direction; on the other side no label is."""
    epsilon: float = 0.05
    """How far the error of an accepted half-space may be above the best, given enough rows."""
    delta: float = 0.02
    """Probability that normal inputs are rejected, at most."""

    def __post_init__(self):
        if "normal" not in self.distributions or len(set(self.distributions)) < len(self.distributions):
            raise ValueError(f"distributions must hold normal, and each at most once, got {self.distributions}.")
        checks.at_least(2, self, "dimension")
        checks.at_least(3 * (self.dimension + 1), self, "num_samples")
        checks.at_least(1, self, "num_fresh")
        checks.probability(self, "epsilon", "delta")
        if not 0 <= self.eta < 0.5:
            raise ValueError(f"eta must lie in [0, 1/2), got {self.eta}.")


def normal(rng: np.random.Generator, n: int, w: np.ndarray) -> np.ndarray:
    """Standard normal."""
    return rng.normal(size=(n, w.size))


def mixture(rng: np.random.Generator, n: int, w: np.ndarray, variance: float = 10) -> np.ndarray:
    """Two normal distributions, at 3 and -3 on the first axis, brought to this variance."""
    x = normal(rng, n, w)
    x[:, 0] += rng.choice([-3.0, 3.0], n)
    x[:, 0] /= np.sqrt(10 / variance)
    return x


def gap(rng: np.random.Generator, n: int, w: np.ndarray) -> np.ndarray:
    """Standard normal, but no input within GAP of the true half-space: those are put there."""
    x = normal(rng, n, w)
    margin = x @ w
    return x + np.outer(np.copysign(np.maximum(np.abs(margin), GAP), margin) - margin, w)


def flat(rng: np.random.Generator, n: int, w: np.ndarray) -> np.ndarray:
    """Standard normal, but within FLAT of the true half-space inputs do not vary along one direction in it."""
    x, u = normal(rng, n, w), rng.normal(size=w.size)
    u -= (u @ w) * w
    u /= np.linalg.norm(u)
    return x - np.outer((np.abs(x @ w) < FLAT) * (x @ u), u)


DISTRIBUTIONS = {
    "normal": normal,
    "mixture": mixture,
    "whitened": functools.partial(mixture, variance=1),
    "student": lambda rng, n, w: rng.standard_t(3, size=(n, w.size)) / np.sqrt(3),  # of variance 1
    "hypercube": lambda rng, n, w: rng.choice([-1.0, 1.0], size=(n, w.size)),
    "gap": gap,
    "flat": flat,
}
"""``(rng, n, w) -> (n, d)`` inputs, for the true half-space ``w``."""


@functools.cache  # all seeds share them
def thresholds(config: Config) -> halfspaces.Statistics:
    """What each statistic may be at most."""
    geometry = {"sigma": (1 - 2 * config.eta) * config.epsilon, "theta": config.epsilon, "delta": config.delta}
    shape, num_draws = (config.num_samples // 3, config.dimension), max(300, math.ceil(len(PARTS) / config.delta))
    return halfspaces.null_thresholds(jax.random.key(0), *shape, **geometry, num_draws=num_draws)


def measure(config: Config, seed: int) -> _frame.Numbers:
    """Draws inputs of each distribution and labels, learns, tests, and measures the error above the best."""
    return {distribution: learned(config, seed, distribution) for distribution in config.distributions}


def learned(config: Config, seed: int, distribution: str) -> dict[str, Any]:
    """The numbers of one distribution."""
    rng = np.random.default_rng([seed, list(DISTRIBUTIONS).index(distribution)])
    w, side = rng.normal(size=(2, config.dimension))
    w /= np.linalg.norm(w)
    draw = lambda n: DISTRIBUTIONS[distribution](rng, n, w).astype(np.float32)
    answer = lambda x, v: np.where(x @ np.asarray(v, np.float32) >= 0, 1, -1)
    noise = lambda x: config.eta * (x @ side.astype(np.float32) > 0)
    x, fresh = draw(config.num_samples), draw(config.num_fresh)
    y = answer(x, w) * np.where(rng.random(len(x)) < noise(x), -1, 1)
    key, limits = jax.random.fold_in(jax.random.key(1), seed), thresholds(config)
    found = halfspaces.tester_learner(key, x, y, epsilon=config.epsilon, eta=config.eta, thresholds=limits)

    def excess(v):
        return ((1 - 2 * noise(fresh)) * (answer(fresh, v) != answer(fresh, w))).mean()

    numbers: dict[str, Any] = {"accepted": found.accepted, "error": found.error, "gradient_norm": found.gradient_norm}
    numbers |= {"best_error": noise(fresh).mean(), "excess": excess(found.weights)}
    numbers |= {"excess_of_average": excess((y[:, None] * x).mean(0)), **found.statistics._asdict()}
    over = {part: float(numbers[part]) > float(getattr(limits, part)) for part in PARTS}
    numbers |= {test: any(over[part] for part in parts) for test, parts in TESTS.items()}
    numbers["excess_if_accepted"] = numbers["excess"] * bool(found.accepted)
    return numbers | {"limits": np.asarray(limits, np.float64)}


def statistics(config: Config, results: _frame.Results):
    """How far each statistic is above its threshold."""
    ratio = lambda of_arm, i: np.log10(np.maximum(of_arm[PARTS[i]], 1e-6) / of_arm["limits"][:, i])
    bars = {arm: {PARTS[i]: ratio(of_arm, i) for i in range(len(PARTS))} for arm, of_arm in results.items()}
    return plotting.bar_chart(bars, label="log10 of statistic / threshold: above 0, the test fails", panel_width=7.0)


def details(config: Config, results: _frame.Results) -> Sequence[tables.Table | str]:
    """What the columns mean, and the thresholds."""
    note = (
        "Above the best: error minus the error of the true half-space, accepted or not; of averaging: the same for the "
        "mean of y x, which nothing tests. T1 to T4: in how many seeds each test fails."
    )
    limits = zip(PARTS, results["normal"]["limits"][0], strict=True)
    return [note, tables.Table("Thresholds", ["statistic", "threshold"], [[name, f"{v:.4g}"] for name, v in limits])]


STUDY = _frame.Study(
    measure=measure, config=Config(),
    tiny=Config(distributions=("normal", "gap"), dimension=2, num_samples=3000, num_fresh=2000, epsilon=0.2, delta=0.1),
    numbers=[
        _frame.Column("accepted", "accepted", lambda v: f"{v.sum():.0f} of {v.size}"),
        _frame.Column("excess", "above the best", ".4f"),
        _frame.Column("excess", "largest", lambda v: f"{v.max():.4f}"),
        _frame.Column("excess_of_average", "of averaging", ".4f"),
        *(_frame.Column(test, test, lambda v: f"{v.sum():.0f}") for test in TESTS),
    ],
    claims=(
        _frame.Claim(
            "Tester-learner of half-spaces", "Gollakota et al. 2023", "2302.14853",
            ("certification.halfspaces.tester_learner", "certification.halfspaces.disagreement_bound"),
            "Accepts normal inputs; where it accepts, the error is near the best, given enough rows.",
            lambda config: (
                _frame.Bar("accepted", "normal", ">=", 1 - config.delta),
                *(_frame.Bar("excess_if_accepted", name, "<=", config.epsilon) for name in config.distributions),
            ),
        ),
    ),
    figure=statistics, details=details,
    seeds=20,
)  # fmt: skip

if __name__ == "__main__":
    _frame.main(STUDY, __doc__)
