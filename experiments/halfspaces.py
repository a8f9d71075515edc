"""Learns half-spaces from noisy labels, and counts on which distributions of inputs the tests accept the answer.

Leaves results/halfspaces/NAME with config.json, the numbers of every seed, metrics.csv, metrics.json, report.md and a
figure. Seeds that are there are not made again, so that more of them can join.

    python -m experiments.halfspaces
    python -m experiments.halfspaces --seeds 5 --dimension 20 --num-samples 200000
"""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import numpy as np
from etils import epath
from rich.table import Table

from experiments.common import command_line, files, folders, runtimes
from robustjax import plotting
from robustjax.certification import halfspaces

NUM_FRESH = 100_000
"""Inputs on which the error above the best is measured; how likely each label is to be flipped is known there."""
GAP, FLAT = 0.1, 0.03
"""Distances from the true half-space up to which two of the distributions have no inputs, or flat ones."""
TESTS = {"T1": ("moments",), "T2": ("band_mass",), "T3": ("band_covariance", "band_kurtosis"), "T4": ("disagreement",)}
PARTS = halfspaces.Statistics._fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a run."""

    dimension: int = 10
    """Of the inputs, at least 2."""
    num_samples: int = 50_000
    """Labelled inputs of a seed; a third each to learn, to test and to choose."""
    eta: float = 0.2
    """Probability with which labels are flipped on one side of a random direction; none are on the other."""
    epsilon: float = 0.05
    """How far the error of an accepted half-space may be above the best, given enough rows."""
    delta: float = 0.02
    """How often normal inputs may be rejected."""
    seeds: int = 20
    """Repetitions for each distribution, from seed 0."""
    results_dir: str = "results"
    """Where run folders go."""
    name: str | None = None
    """Name of the run folder; None: made of dimension and number of samples."""
    overwrite: bool = False
    """Delete the run that is in the folder and start anew."""


def normal(rng: np.random.Generator, n: int, w: np.ndarray) -> np.ndarray:
    """Standard normal."""
    return rng.normal(size=(n, w.size))


def mixture(rng: np.random.Generator, n: int, w: np.ndarray) -> np.ndarray:
    """Two normal distributions, at 3 and -3 on the first axis."""
    x = normal(rng, n, w)
    x[:, 0] += rng.choice([-3.0, 3.0], n)
    return x


def whitened(rng: np.random.Generator, n: int, w: np.ndarray) -> np.ndarray:
    """The mixture, brought to variance 1."""
    x = mixture(rng, n, w)
    x[:, 0] /= np.sqrt(10)
    return x


def student(rng: np.random.Generator, n: int, w: np.ndarray) -> np.ndarray:
    """Independent t with 3 degrees of freedom, of variance 1."""
    return rng.standard_t(3, size=(n, w.size)) / np.sqrt(3)


def hypercube(rng: np.random.Generator, n: int, w: np.ndarray) -> np.ndarray:
    """Corners of a cube."""
    return rng.choice([-1.0, 1.0], size=(n, w.size))


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


DISTRIBUTIONS = {f.__name__: f for f in (normal, mixture, whitened, student, hypercube, gap, flat)}


def folder_of(config: Config) -> epath.Path:
    """The run folder."""
    name = config.name if config.name is not None else f"d{config.dimension}-n{config.num_samples}"
    if name in ("", ".", "..") or epath.Path(name).name != name:
        raise ValueError(f"name must be the name of a folder, got {name!r}.")
    return epath.Path(config.results_dir) / "halfspaces" / name


def thresholds_of(config: Config) -> halfspaces.Statistics:
    """The thresholds, which all seeds share; those on disk are not simulated again."""
    path = folder_of(config) / "thresholds.npz"
    if not path.exists():
        geometry = {"sigma": (1 - 2 * config.eta) * config.epsilon, "theta": config.epsilon, "delta": config.delta}
        key, num_draws = jax.random.key(0), max(300, math.ceil(len(PARTS) / config.delta))
        shape = config.num_samples // 3, config.dimension
        found = halfspaces.null_thresholds(key, *shape, **geometry, num_draws=num_draws)
        files.write_arrays(path, found._asdict())
    return halfspaces.Statistics(**{name: jax.numpy.asarray(a) for name, a in files.read_arrays(path).items()})


def once(config: Config, distribution: str, seed: int, thresholds: halfspaces.Statistics) -> dict[str, np.ndarray]:
    """Draws inputs and labels, learns, tests, and measures the error above the best on fresh inputs."""
    rng = np.random.default_rng([seed, list(DISTRIBUTIONS).index(distribution)])
    w, side = rng.normal(size=(2, config.dimension))
    w /= np.linalg.norm(w)
    draw = lambda n: DISTRIBUTIONS[distribution](rng, n, w).astype(np.float32)
    answer = lambda x, v: np.where(x @ np.asarray(v, np.float32) >= 0, 1, -1)
    noise = lambda x: config.eta * (x @ side.astype(np.float32) > 0)
    x, fresh = draw(config.num_samples), draw(NUM_FRESH)
    y = answer(x, w) * np.where(rng.random(len(x)) < noise(x), -1, 1)
    key = jax.random.fold_in(jax.random.key(1), seed)
    found = halfspaces.tester_learner(key, x, y, epsilon=config.epsilon, eta=config.eta, thresholds=thresholds)

    def excess(v):
        return ((1 - 2 * noise(fresh)) * (answer(fresh, v) != answer(fresh, w))).mean()

    measured = {"accepted": found.accepted, "error": found.error, "gradient_norm": found.gradient_norm}
    measured |= {"best_error": noise(fresh).mean(), "excess": excess(found.weights)}
    measured |= {"excess_of_average": excess((y[:, None] * x).mean(0)), **found.statistics._asdict()}
    return {name: np.asarray(value, np.float64) for name, value in measured.items()}


def check(config: Config) -> None:
    """Raises ValueError for a setting that is out of its range, before anything is written."""
    least = 3 * (config.dimension + 1)
    for name, minimum in (("seeds", 1), ("dimension", 2), ("num_samples", least)):
        if getattr(config, name) < minimum:
            raise ValueError(f"{name} must be an integer of at least {minimum}, got {getattr(config, name)}.")
    if not 0 <= config.eta < 0.5:
        raise ValueError(f"eta must lie in [0, 1/2), got {config.eta}.")
    for name in ("epsilon", "delta"):
        if not 0 < getattr(config, name) < 1:
            raise ValueError(f"{name} must lie strictly between 0 and 1, got {getattr(config, name)}.")


def run(config: Config) -> list[dict]:
    """Makes the seeds that are not there, and reports on all that were asked for.

    Returns:
      The rows of metrics.csv.
    """
    stopwatch, console = runtimes.Stopwatch(), runtimes.console()
    check(config)
    folder = folder_of(config)
    folders.open_run(folder, config, same=("seeds", "results_dir", "name", "overwrite"), overwrite=config.overwrite)
    thresholds = thresholds_of(config)
    found: dict[str, list[dict]] = {distribution: [] for distribution in DISTRIBUTIONS}
    for seed in range(config.seeds):
        for distribution, runs in found.items():
            path = folder / "seeds" / f"{distribution}-{seed}.npz"
            if not path.exists():
                files.write_arrays(path, once(config, distribution, seed, thresholds))
            runs.append(files.read_arrays(path))
    return report(config, found, thresholds, stopwatch, console)


def report(config: Config, found: dict, thresholds: halfspaces.Statistics, stopwatch, console) -> list[dict]:
    """Prints the table, and writes it with the numbers of every seed."""
    folder = folder_of(config)
    rows = [
        {"distribution": distribution, "seed": seed, **{name: float(value) for name, value in run.items()}}
        for distribution, runs in found.items()
        for seed, run in enumerate(runs)
    ]
    files.write_rows(folder / "metrics.csv", list(rows[0]), rows)

    limits = {name: float(value) for name, value in thresholds._asdict().items()}
    headers = ["inputs", "accepted", "above the best", "largest", "of averaging", *TESTS]
    body, summary = [], {}
    told = lambda a: f"{a.mean():.4f}" + (f" ({a.std(ddof=1):.4f})" if a.size > 1 else "")
    for distribution, runs in found.items():
        columns = {name: np.array([float(run[name]) for run in runs]) for name in runs[0]}
        failed = {t: int(np.any([columns[p] > limits[p] for p in parts], 0).sum()) for t, parts in TESTS.items()}
        excess, average, accepted = columns["excess"], columns["excess_of_average"], int(columns["accepted"].sum())
        cells = [f"{accepted} of {len(runs)}", told(excess), f"{excess.max():.4f}"]
        body.append([distribution, *cells, told(average), *map(str, failed.values())])
        means = {name: float(column.mean()) for name, column in columns.items()}
        summary[distribution] = {"accepted": accepted, "failed": failed, "mean": means}
    content = {"thresholds": limits, "summary": summary, "seconds": stopwatch.seconds()}
    files.write_whole(folder / "metrics.json", json.dumps(content, indent=1) + "\n")

    bars = {
        distribution: {p: [np.log10(max(float(run[p]), 1e-6) / limits[p]) for run in runs] for p in PARTS}
        for distribution, runs in found.items()
    }
    figure = plotting.bar_chart(bars, label="log10 of statistic / threshold: above 0, the test fails", panel_width=7.0)
    files.write_whole(folder / "figures" / "statistics.png", files.figure_bytes(figure))

    title = f"Half-spaces in {config.dimension} dimensions, {config.num_samples:,} inputs, eta {config.eta:g}"
    table = Table(*headers, title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in table.columns:
        column.no_wrap = True
    for cells in body:
        table.add_row(*cells)
    console.print(table)
    over = "mean (sd) and largest over seeds" if config.seeds > 1 else "of one seed"
    note = (
        f"Above the best: error less that of the true half-space, {over}, accepted or not; of averaging: the same for "
        "the mean of y x, which nothing tests. T1 to T4: how often each test failed."
    )
    console.print(note, highlight=False)
    console.print(f"Run folder: {folder}", soft_wrap=True)
    text = [f"# {title}", "", f"| {' | '.join(headers)} |", f"|{'---|' * len(headers)}"]
    text += [f"| {' | '.join(cells)} |" for cells in body]
    text += ["", note, "", "![statistics](figures/statistics.png)", "", stopwatch.told(), ""]
    text += ["| threshold | value |", "|---|---|", *(f"| {name} | {value:.4g} |" for name, value in limits.items())]
    text += ["", "| setting | value |", "|---|---|"]
    text += [f"| {name} | {value} |" for name, value in dataclasses.asdict(config).items()]
    files.write_whole(folder / "report.md", "\n".join(text) + "\n")
    return rows


if __name__ == "__main__":
    command_line.command_line(Config, run, __doc__)
