"""How few draws sequential certification takes, beside certify with all of them on the same models, images and draws.

The models come from runs of experiments.smoothing that differ only in the seed. Writes results/sequential/NAME with
config.json, the answers for each block of images, metrics.csv and report.md. The same command resumes an interrupted
run.

    python -m experiments.smoothing.sequential results/smoothing/digits-cnn-0.5
    python -m experiments.smoothing.sequential RUN_0 RUN_1 RUN_2 --data-dir DIR --radii 0.25 0.5 0.75 --num-images 500
    python -m experiments.smoothing.sequential RUN --tolerances 0.05 0.1 0.2 --num-images 200
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
from scipy import stats

from robustjax import _paths, certification, data

from .. import smoothing
from ..common import checks, classifiers, command_line, files, folders, runtimes, smoothers, tables

BLOCK = 50
FIRST, DOUBT = 5000, 1e-6
"""certify takes no more draws of an image when the first of them leave no doubt, at this level, of its answers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Questions:
    """What is asked of each image, and with how many draws; radii are in [0, 1] pixels."""

    radii: tuple[command_line.Number, ...] = (0.25, 0.5, 0.75)
    """Target radii."""
    tolerances: tuple[command_line.Number, ...] = ()
    """Also certify the radius itself, within these shares of the radius of all draws; certify then takes all draws."""
    max_samples: int = 100_000
    """Draws of certify, and the maximum of a sequential certificate."""
    num_selection: int = 100
    """Draws that select the class, for both."""
    alpha: float = 0.001
    """Probability, for each image, that a certificate is wrong."""
    num_images: int | None = 500
    """Maximum number of images, the first of the test split. None: all."""
    batch_size: int | None = None
    """Noisy copies per call of the model. None: 200 on a CPU, 1000 on an accelerator."""

    def __post_init__(self):
        if not self.radii and not self.tolerances:
            raise ValueError("radii or tolerances must have an entry.")
        checks.distinct(self, "radii", "tolerances")
        checks.at_least(1, self, "max_samples", "num_selection", "num_images", "batch_size")
        checks.probability(self, "alpha", "tolerances")
        if self.alpha ** (1 / self.max_samples) <= 0.5:
            raise ValueError(f"max_samples must be larger: {self.max_samples} certify nothing at alpha {self.alpha:g}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Questions):
    """Settings of a comparison; the runs determine data set, model and noise."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders of experiments.smoothing."""
    data_dir: str | None = None
    """Folder of prepared TFDS data sets. None: $TFDS_DATA_DIR, else TFDS's default folder."""
    results_dir: str = "results"
    """Parent folder of all runs."""
    name: str | None = None
    """Name of the run folder. None: the name of the first run."""
    overwrite: bool = False
    """Delete the comparison in the folder and start again."""

    def folder(self) -> epath.Path:
        """The run folder."""
        name = self.name if self.name is not None else _paths.path_of(runs=self.runs[0]).resolve().name
        return folders.run_folder(self.results_dir, "sequential", name)


ALIKE = (
    "dataset", "model", "dtype", "sigma", "noise", "grid", "norm", "image_size", "test_split", *smoothing.OF_TRAINING,
)  # fmt: skip
COLUMNS = (
    "run", "question", "value", "images", "draws", "standard_error", "median", "sequential", "certify", "lost",
    "gained",
)  # fmt: skip


def settings_of(runs: tuple[str, ...]) -> list[dict[str, Any]]:
    """The settings of each run; ValueError for runs that cannot be compared."""
    places = {_paths.path_of(runs=folder).resolve() for folder in runs}
    if not places or len(places) < len(runs):
        raise ValueError(f"runs must name run folders, each once, got {runs}.")
    settings, known = [folders.settings_of(folder, flag="runs") for folder in runs], (*ALIKE, "seed", "dual")
    for folder, theirs in zip(runs, settings, strict=True):
        if theirs.get("run") != "smoothing" or not set(known) <= theirs.keys():
            raise ValueError(f"runs must be runs of experiments.smoothing, of this version, got {folder}.")
        if theirs["dual"] or theirs.get("checkpoint") is not None:
            raise ValueError(f"runs must have trained their own model, without dual, got {folder}.")
        for name in ALIKE:
            if theirs[name] != settings[0][name]:
                raise ValueError(
                    f"runs must differ only in the seed, got {name} {settings[0][name]} in {runs[0]} and "
                    f"{theirs[name]} in {folder}."
                )
    seeds = [theirs["seed"] for theirs in settings]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"runs must have different seeds, got {', '.join(map(str, seeds))}.")
    return settings


def run(config: Config) -> list[dict]:
    """Does what is left of the comparison, prints the tables and writes the report.

    Returns:
      The rows of metrics.csv: a run and a question, which is a target radius or a tolerance.
    """
    stopwatch, of_runs = runtimes.Stopwatch(), settings_of(config.runs)
    settings = of_runs[0]
    of_images = {name: settings[name] for name in ("dataset", "train_split", "test_split", "image_size")}
    train, test = smoothing.Config(**of_images, data_dir=config.data_dir).images()
    noise, sigma, grid, norm = (settings[name] for name in ("noise", "sigma", "grid", "norm"))
    measure = smoothers.measure_of(noise, sigma, grid, norm, math.prod(train.image_shape))
    largest = smoothers.largest_radius(measure, num_estimation=config.max_samples, alpha=config.alpha)
    if not all(0 <= radius <= largest for radius in config.radii):
        raise ValueError(
            f"radii must lie between 0 and {largest:g}, the largest that {config.max_samples:,} draws can certify, got "
            f"{config.radii}."
        )
    functional = classifiers.build(settings["model"], train, dtype=settings["dtype"], key=jax.random.key(0))
    restored = [classifiers.restored(run_folder, functional) for run_folder in config.runs]
    folder = config.folder()
    folders.open_run(folder, config, overwrite=config.overwrite)
    ids, rows = np.arange(len(test))[: config.num_images], []
    questions = [("target_radius", radius) for radius in config.radii]
    questions += [("tolerance", tolerance) for tolerance in config.tolerances]
    common: Any = {"measure": measure, "questions": questions, "max_samples": config.max_samples}
    common |= {name: getattr(config, name) for name in ("num_selection", "alpha", "batch_size")}
    with command_line.progress_bar(runtimes.console()) as bar:
        task = bar.add_task("", total=len(ids) * len(config.runs), task_name="certifying")
        for i, (run_folder, classifier) in enumerate(zip(config.runs, restored, strict=True)):
            _keep_to(of_runs[i], folder / f"run-{i}", run_folder)
            classifiers.keep_to(folder / f"run-{i}", classifier.state, [train, test])
            key, found = jax.random.split(jax.random.key(of_runs[i]["seed"]), 3)[2], []  # the draws of the run itself
            for start in range(0, len(ids), BLOCK):
                path, block = folder / f"run-{i}" / f"{start}.npz", ids[start : start + BLOCK]
                if not path.exists():
                    filled = np.resize(block, min(BLOCK, len(ids)))  # one compilation
                    answers = answers_of(key, classifier, test, filled, **common)
                    files.write_arrays(path, {name: array[: len(block)] for name, array in answers.items()})
                found.append(files.read_arrays(path, "label", "chosen", "radius", *(f"{k} {v}" for k, v in questions)))
                bar.update(task, advance=len(block))
            arrays = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
            rows += [{"run": run_folder, **row_of(*question, arrays)} for question in questions]
    files.write_rows(folder / "metrics.csv", COLUMNS, rows)
    several = len(config.runs) > 1
    about = f"{settings['dataset']} {settings['model']}, {noise} noise, sigma {sigma:g}"
    note = (
        f"{len(config.runs)} run(s), {rows[0]['images']} images each; at most {config.max_samples:,} draws besides the "
        f"{config.num_selection:,} that select the class, alpha {config.alpha:g}. Draws are means over images; in "
        f"brackets is the standard {'deviation over runs' if several else 'error of the mean'}. Lost: images, of all "
        "runs, that certify certifies and the sequential test does not; gained: the other way round."
    )
    tables.report(
        folder, config, runtimes.console(), stopwatch, title=f"Draws of sequential certification: {about}",
        parts=[*tables_of(rows, measure.norm), note],
    )  # fmt: skip
    return rows


def _keep_to(settings: dict[str, Any], folder: epath.Path, run: str) -> None:
    """Records the noise and images of a run; ValueError if the comparison began with others."""
    path, ours = folder / "settings.json", {name: settings[name] for name in (*ALIKE, "seed")}
    if not path.exists():
        files.write_whole(path, json.dumps(ours) + "\n")
    elif files.read_json(path, advice="pass --overwrite to start again") != ours:
        raise ValueError(f"{run} has other settings than when this comparison began; pass --overwrite to start again.")


def answers_of(
    key: jax.Array,
    classifier: classifiers.Classifier,
    test: data.Dataset,
    ids: np.ndarray,
    *,
    measure: certification.Measure,
    questions: list[tuple[str, float]],
    num_selection: int,
    max_samples: int,
    alpha: float,
    batch_size: int | None,
) -> dict[str, np.ndarray]:
    """For each image its label, and for each question both answers and the draws."""
    keys, (x, label, _) = jax.vmap(jax.random.fold_in, (None, 0))(key, ids), test[ids]
    logits_fn, targets = classifier.logits_fn(), [value for kind, value in questions if kind == "target_radius"]

    def counts(rows, begin, end):
        draws = {"num_samples": end - begin, "first_sample": begin, "batch_size": batch_size}
        found = np.asarray(certification.sample_counts(keys[rows], logits_fn, x[rows], measure, **draws))
        if (found.sum(-1) != end - begin).any():
            raise ValueError("the model gave logits that are not finite.")
        return found

    first = max_samples if len(targets) < len(questions) else min(max_samples, FIRST)
    rows = np.arange(len(ids))
    chosen = counts(rows, 0, num_selection).argmax(-1)
    votes, drawn = counts(rows, num_selection, num_selection + first)[rows, chosen], np.full(len(ids), first)
    if first < max_samples:
        doubts = doubtful(votes, first, measure, targets, max_samples=max_samples, alpha=alpha)
        for i in np.flatnonzero(doubts[: len(np.unique(ids))]):  # not for what fills up the last block
            votes[i] += counts(np.asarray([i]), num_selection + first, num_selection + max_samples)[0, chosen[i]]
            drawn[i] = max_samples
    probability = certification.binomial_lower_bound(votes, drawn, alpha)
    found = {"label": np.asarray(label), "chosen": chosen, "radius": _radius(measure, probability)}
    common: Any = {"alpha": alpha, "max_samples": max_samples, "num_selection": num_selection, "batch_size": batch_size}
    for kind, value in questions:
        got = certification.certify_sequential(keys, logits_fn, x, measure, **common | {kind: value})
        found[f"{kind} {value}"] = np.stack([got.label, got.radius, got.num_samples], axis=-1)
    return found


def _radius(measure: certification.Measure, probability: np.ndarray) -> np.ndarray:
    return np.where(probability > 0.5, measure.radius(np.maximum(probability, 0.5)), -1.0)


def doubtful(
    votes: np.ndarray,
    first: int,
    measure: certification.Measure,
    targets: list[float],
    *,
    max_samples: int,
    alpha: float,
) -> np.ndarray:
    """Whether all draws may still decide a target differently than the first of them."""
    level = min(DOUBT, alpha)
    low = certification.binomial_lower_bound(votes, first, level)
    high = 1 - certification.binomial_lower_bound(first - votes, first, level)
    every = np.arange(max_samples + 1)
    radii = _radius(measure, certification.binomial_lower_bound(every, max_samples, alpha))
    found = np.zeros(len(votes), bool)
    for target in targets:
        least = int(np.searchsorted(radii, target))  # votes that certify it
        above = lambda p, least=least: stats.binom.sf(least - 1, max_samples, p)
        found |= (above(low) <= 1 - level) & (above(high) >= level)
    return found


def row_of(kind: str, value: float, found: dict[str, np.ndarray]) -> dict[str, Any]:
    """What one run answers to one question."""
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
    row = {"question": kind, "value": value, "images": len(label)}
    return row | dict(zip(COLUMNS[4:], map(float, numbers), strict=True))


def tables_of(rows: list[dict], norm: str) -> list[tables.Table]:
    """A table for the target radii and one for the tolerances, means over runs."""
    found = []
    for kind, asked, measured in (("target_radius", f"{norm} radius", "certified"), ("tolerance", "tolerance", "ACR")):
        body = []
        for value in dict.fromkeys(row["value"] for row in rows if row["question"] == kind):
            chosen = [row for row in rows if (row["question"], row["value"]) == (kind, value)]
            of = {name: np.asarray([row[name] for row in chosen]) for name in COLUMNS[4:]}
            draws = tables.mean_and_sd(of["draws"], ",.0f")
            if len(chosen) == 1:
                draws += f" ({of['standard_error'][0]:,.0f})"
            cells = [f"{value:g}", draws, f"{of['median'].mean():,.0f}"]
            cells += [f"{of[name].mean():.3f}" for name in ("sequential", "certify")]
            body.append([*cells, *(f"{of[name].sum():.0f}" for name in ("lost", "gained"))])
        if body:
            bracket = "sd" if len({row["run"] for row in rows}) > 1 else "se"
            headers = [asked, f"draws ({bracket})", "median", measured, "certify", "lost", "gained"]
            found.append(tables.Table(f"Sequential beside certify, by {asked}", headers, body))
    return found


if __name__ == "__main__":
    command_line.command_line(Config, run, __doc__)
