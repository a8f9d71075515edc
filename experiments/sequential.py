"""How few draws sequential certification takes: beside certify with all of them, on the same models, images and draws.

The models are those of runs of experiments.smoothing, one for each seed, alike but for the seed. Leaves
results/sequential/NAME with config.json, what was found of each block of images, metrics.csv and report.md. The same
command continues a run that was interrupted.

    python -m experiments.sequential results/smoothing/digits-cnn-0.5
    python -m experiments.sequential RUN RUN RUN --data-dir DIR --radii 0.25 0.5 0.75 --num-images 500
    python -m experiments.sequential RUN --tolerances 0.05 0.1 0.2 --num-images 200
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from etils import epath
from rich.console import Console
from rich.table import Table
from scipy import stats

from experiments import smoothing
from experiments.common import classifiers, command_line, files, folders, smoothers
from robustjax import certification, data

BLOCK = 50
FIRST, DOUBT = 5000, 1e-6
"""An image is given no more draws for certify when the first of them leave no doubt, at this level, of its answers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a comparison; data set, model and noise are those of the runs."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders of experiments.smoothing."""
    data_dir: str | None = None
    """Folder of prepared TFDS data sets; None: $TFDS_DATA_DIR, else TFDS's own."""
    radii: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Targets, in [0, 1] pixels."""
    tolerances: tuple[float, ...] = ()
    """Ask for the radius too, within such shares of what all draws give; then certify takes all draws of all images."""
    max_samples: int = 100_000
    """Draws of certify, and the most that a sequential certificate takes."""
    num_selection: int = 100
    """Draws that select the class, of both."""
    alpha: float = 0.001
    """Probability, for each image, that a certificate is wrong."""
    num_images: int | None = 500
    """Certify at most so many images, the first of the test split; None: all."""
    batch_size: int | None = None
    """Noisy copies in one call of the model; None: 200 on a CPU, 1000 on an accelerator."""
    results_dir: str = "results"
    """Where run folders go."""
    name: str | None = None
    """Name of the run folder; None: that of the first run."""
    overwrite: bool = False
    """Delete the comparison that is in the folder and start anew."""

    def folder(self) -> epath.Path:
        """The run folder."""
        name = self.name if self.name is not None else epath.Path(self.runs[0]).resolve().name
        if name in ("", ".", "..") or epath.Path(name).name != name:
            raise ValueError(f"name must be the name of a folder, got {name!r}.")
        return epath.Path(self.results_dir) / "sequential" / name


ALIKE = (
    "dataset", "model", "dtype", "sigma", "noise", "grid", "norm", "image_size", "test_split", *smoothing.OF_TRAINING,
)  # fmt: skip
SAME = ("results_dir", "name", "overwrite", "data_dir")
COLUMNS = (
    "run", "question", "value", "images", "draws", "standard_error", "median", "sequential", "certify", "lost",
    "gained",
)  # fmt: skip
_QUESTIONS = {"target_radius": "radii", "tolerance": "tolerances"}


def check(config: Config) -> list[dict[str, Any]]:
    """The settings of each run; ValueError for what is out of its range."""
    places = [epath.Path(folder).resolve() for folder in config.runs]
    if not places or len(set(places)) < len(places):
        raise ValueError(f"runs must name run folders, each once, got {config.runs}.")
    if not config.radii and not config.tolerances:
        raise ValueError("radii or tolerances must have an entry.")
    for name in ("radii", "tolerances"):
        if len(set(values := getattr(config, name))) < len(values):
            raise ValueError(f"{name} must be given once each, got {values}.")
    for name in ("max_samples", "num_selection", "num_images", "batch_size"):
        if (value := getattr(config, name)) is not None and value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value}.")
    if not 0 < config.alpha < 1:
        raise ValueError(f"alpha must lie strictly between 0 and 1, got {config.alpha}.")
    if not all(0 < tolerance < 1 for tolerance in config.tolerances):
        raise ValueError(f"tolerances must lie strictly between 0 and 1, got {config.tolerances}.")
    if config.alpha ** (1 / config.max_samples) <= 0.5:
        raise ValueError(f"max_samples must be more: {config.max_samples} certify nothing at alpha {config.alpha:g}.")
    settings, known = [folders.settings_of(folder, flag="runs") for folder in config.runs], (*ALIKE, "seed", "dual")
    for folder, theirs in zip(config.runs, settings, strict=True):
        if theirs.get("run") != "smoothing" or not set(known) <= theirs.keys():
            raise ValueError(f"runs must be runs of experiments.smoothing, of this version, got {folder}.")
        if theirs["dual"] or theirs.get("checkpoint") is not None:
            raise ValueError(f"runs must have trained a model of their own, without dual, got {folder}.")
        for name in ALIKE:
            if theirs[name] != settings[0][name]:
                raise ValueError(
                    f"runs must be alike but for the seed, got {name} {settings[0][name]} in {config.runs[0]} and "
                    f"{theirs[name]} in {folder}."
                )
    seeds = [theirs["seed"] for theirs in settings]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"runs must have a seed each, got {', '.join(map(str, seeds))}.")
    return settings


def run(config: Config) -> list[dict]:
    """Does what is left of the comparison, prints the tables and writes the report.

    Returns:
      The rows of metrics.csv: a run and what was asked, a target or a tolerance.
    """
    console, of_runs = Console(), check(config)
    settings = of_runs[0]
    train = data.load(settings["dataset"], settings["train_split"], config.data_dir)
    test = data.load(
        settings["dataset"], settings["test_split"] or data.splits(settings["dataset"]).test, config.data_dir
    )
    if settings["image_size"] is not None:
        shape = (settings["image_size"], settings["image_size"], train.image_shape[-1])
        train, test = data.match_images(train, shape), data.match_images(test, shape)
    noise, sigma, grid, norm = (settings[name] for name in ("noise", "sigma", "grid", "norm"))
    measure = smoothers.measure_of(noise, sigma, grid, norm, math.prod(train.image_shape))
    largest = float(measure.radius(certification.binomial_lower_bound(*(config.max_samples,) * 2, config.alpha)))
    if not all(0 <= radius <= largest for radius in config.radii):
        raise ValueError(
            f"radii must lie between 0 and {largest:g}, the largest that {config.max_samples:,} draws can certify, got "
            f"{config.radii}."
        )
    functional = classifiers.build(settings["model"], train, dtype=settings["dtype"], key=jax.random.key(0))
    trained = [classifiers.restored(folder, functional, console) for folder in config.runs]
    folder = config.folder()
    folders.open_run(folder, config, same=SAME, overwrite=config.overwrite)
    ids, rows = np.arange(len(test))[: config.num_images], []
    with command_line.progress_bar(console) as bar:
        task = bar.add_task("", total=len(ids) * len(config.runs), task_name="certifying")
        for i, classifier in enumerate(trained):
            _keep_to(of_runs[i], folder / f"run-{i}", config.runs[i])
            classifiers.keep_to(classifier, folder / f"run-{i}")
            key, found = jax.random.split(jax.random.key(of_runs[i]["seed"]), 3)[2], []  # the draws of the run itself
            for start in range(0, len(ids), BLOCK):
                path = folder / f"run-{i}" / f"{start}.npz"
                if not path.exists():
                    block = ids[start : start + BLOCK]
                    files.write_arrays(path, of_block(config, classifier, measure, key, test, block))
                found.append(files.read_arrays(path))
                bar.update(task, advance=len(found[-1]["label"]))
            rows += _rows(config, i, {name: np.concatenate([part[name] for part in found]) for name in found[0]})
    report(config, settings, measure, rows)
    return rows


def _keep_to(settings: dict[str, Any], folder: epath.Path, run: str) -> None:
    """Notes what noise and images a run has; ValueError where the comparison began with others."""
    path, ours = folder / "settings.json", {name: settings[name] for name in (*ALIKE, "seed")}
    if not path.exists():
        files.write_whole(path, json.dumps(ours) + "\n")
    elif json.loads(path.read_bytes()) != ours:
        raise ValueError(f"{run} has other settings than when this comparison began; pass --overwrite to start anew.")


def of_block(
    config: Config,
    classifier: classifiers.Classifier,
    measure: certification.Measure,
    key: jax.Array,
    test: data.Dataset,
    ids: np.ndarray,
) -> dict[str, np.ndarray]:
    """For each image its label, and for each question (a target radius, a tolerance) both answers and the draws."""
    size = min(BLOCK, len(test), config.num_images or BLOCK)
    filled = np.resize(ids, size)  # one compilation
    keys, (x, label, _) = jax.vmap(jax.random.fold_in, (None, 0))(key, filled), test[filled]
    logits_fn, n, offset = classifier.logits_fn(), config.max_samples, config.num_selection

    def counts(rows, begin, end):
        draws = {"num_samples": end - begin, "first_sample": begin, "batch_size": config.batch_size}
        found = np.asarray(certification.sample_counts(keys[rows], logits_fn, x[rows], measure, **draws))
        if (found.sum(-1) != end - begin).any():
            raise ValueError("the model gave logits that are not finite.")
        return found

    first, rows = n if config.tolerances else min(n, FIRST), np.arange(size)
    chosen = counts(rows, 0, offset).argmax(-1)
    votes, drawn = counts(rows, offset, offset + first)[rows, chosen], np.full(size, first)
    if first < n:
        for i in np.flatnonzero(_doubtful(config, measure, votes, first)[: len(ids)]):
            votes[i] += counts(np.asarray([i]), offset + first, offset + n)[0, chosen[i]]
            drawn[i] = n
    probability = certification.binomial_lower_bound(votes, drawn, config.alpha)
    found = {"label": label, "chosen": chosen, "radius": _radius(measure, probability)}
    common: Any = {"alpha": config.alpha, "max_samples": n, "num_selection": offset, "batch_size": config.batch_size}
    for kind, values in _QUESTIONS.items():
        for value in getattr(config, values):
            got = certification.certify_sequential(keys, logits_fn, x, measure, **{kind: value}, **common)
            found[f"{kind} {value}"] = np.stack([got.label, got.radius, got.num_samples], axis=-1)
    return {name: np.asarray(array)[: len(ids)] for name, array in found.items()}


def _radius(measure: certification.Measure, probability: np.ndarray) -> np.ndarray:
    return np.where(probability > 0.5, measure.radius(np.maximum(probability, 0.5)), -1.0)


def _doubtful(config: Config, measure: certification.Measure, votes: np.ndarray, first: int) -> np.ndarray:
    """Whether all draws may still decide a target differently than the first of them."""
    n, level = config.max_samples, min(DOUBT, config.alpha)
    low = certification.binomial_lower_bound(votes, first, level)
    high = 1 - certification.binomial_lower_bound(first - votes, first, level)
    radii = _radius(measure, certification.binomial_lower_bound(np.arange(n + 1), n, config.alpha))
    doubtful = np.zeros(len(votes), bool)
    for target in config.radii:
        least = int(np.searchsorted(radii, target))  # votes that certify it
        doubtful |= (stats.binom.sf(least - 1, n, low) <= 1 - level) & (stats.binom.sf(least - 1, n, high) >= level)
    return doubtful


def _rows(config: Config, i: int, found: dict[str, np.ndarray]) -> list[dict]:
    """What one run answers to each question."""
    rows = []
    for kind, values in _QUESTIONS.items():
        for value in getattr(config, values):
            label, radius, draws = found[f"{kind} {value}"].T
            ours, right = label != certification.ABSTAIN, found["chosen"] == found["label"]
            if kind == "target_radius":
                theirs = found["radius"] >= value
                measured = (ours & right).mean(), (theirs & right).mean()
            else:
                theirs = found["radius"] >= 0
                measured = (radius * (ours & right)).mean(), (found["radius"] * (theirs & right)).mean()
            error = stats.sem(draws) if len(draws) > 1 else math.nan
            numbers = (draws.mean(), error, np.median(draws), *measured, (theirs & ~ours).sum(), (ours & ~theirs).sum())
            row = {"run": config.runs[i], "question": kind, "value": value, "images": len(label)}
            rows.append(row | dict(zip(COLUMNS[4:], map(float, numbers), strict=True)))
    return rows


def report(config: Config, settings: dict[str, Any], measure: certification.Measure, rows: list[dict]) -> None:
    """Prints the tables; writes metrics.csv and report.md."""
    folder, console = config.folder(), Console()
    files.write_rows(folder / "metrics.csv", COLUMNS, rows)
    title = f"{settings['dataset']} {settings['model']}, {settings['noise']} noise, sigma {settings['sigma']:g}"
    text = [f"# Draws of sequential certification: {title}", ""]
    several = len(config.runs) > 1
    for kind, (asked, measured) in {
        "target_radius": (f"{measure.norm} radius", "certified"),
        "tolerance": ("tolerance", "ACR"),
    }.items():
        values = getattr(config, _QUESTIONS[kind])
        if not values:
            continue
        headers = [asked, f"draws ({'sd' if several else 'se'})", "median", measured, "certify", "lost", "gained"]
        table = Table(title=title, title_justify="left")
        for header in headers:
            table.add_column(header, justify="right", no_wrap=True)
        text += [f"| {' | '.join(headers)} |", f"|{'---|' * len(headers)}"]
        for value in values:
            chosen = [row for row in rows if (row["question"], row["value"]) == (kind, value)]
            of = {name: np.asarray([row[name] for row in chosen]) for name in COLUMNS[4:]}
            bracket = of["draws"].std(ddof=1) if several else of["standard_error"][0]
            cells = [f"{value:g}", f"{of['draws'].mean():,.0f} ({bracket:,.0f})", f"{of['median'].mean():,.0f}"]
            cells += [f"{of[name].mean():.3f}" for name in ("sequential", "certify")]
            cells += [f"{of[name].sum():.0f}" for name in ("lost", "gained")]
            table.add_row(*cells)
            text.append(f"| {' | '.join(cells)} |")
        console.print(table)
        text.append("")
    spread = "deviation over runs" if several else "error of the mean"
    text.append(
        f"{len(config.runs)} run(s), {rows[0]['images']} images each; at most {config.max_samples:,} draws besides the "
        f"{config.num_selection:,} that select the class, alpha {config.alpha:g}. Draws are means over images; in "
        f"brackets the standard {spread}. Lost are images, of all runs, that certify certifies and the sequential test "
        "does not; gained the other way round."
    )
    files.write_whole(folder / "report.md", "\n".join(text) + "\n")
    console.print(f"Run folder: {folder}", soft_wrap=True)


if __name__ == "__main__":
    command_line.command_line(Config, run, __doc__)
