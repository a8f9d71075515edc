"""Trains a classifier, fits out-of-distribution detectors on its training data and compares what they notice.

Leaves results/ood/NAME with config.json, the scores of every detector, metrics.csv, report.md and figures. The same
command continues a run that was interrupted; more detectors or seeds are added to what is there.

    python -m experiments.ood
    python -m experiments.ood --dataset mnist --near fashion_mnist --far omniglot cifar10 --data-dir DIR
    python -m experiments.ood --training outlier_exposure --outliers omniglot@small1 --far omniglot@small2
    python -m experiments.ood --dataset cifar10 --model resnet20 --classes 0 1 8 9 --detectors energy,knn,react+energy
    python -m experiments.ood --list
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

from experiments.common import classifiers, files, folders, runtimes, subsets
from experiments.ood import _detectors, _foreign
from robustjax import metrics, plotting
from robustjax.typing import Batch

GROUPS = ("near", "far")
# How many rows detectors are fitted on, and how many of each set are scored, at most.
MAX_TRAIN, MAX_IMAGES = 50_000, 10_000
# In the names of files; so that the slices [:5], [5:], [:-5], [:5%] are still four names.
UNSAFE = str.maketrans({"/": "-", ":": "-", "[": "_", "]": "", "%": "pct", " ": ""})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a run."""

    dataset: str = "digits"
    """In-distribution data: digits (embedded), or any prepared TFDS data set with image and label."""
    data_dir: str | None = None
    """Folder of prepared TFDS data sets; None: $TFDS_DATA_DIR, else TFDS's own."""
    classes: tuple[int, ...] = ()
    """Labels that are in-distribution, the others are held_out; none given: 0 to 5 for digits, else all."""
    open_set: int | None = None
    """Use published open-set split 0 to 4 of mnist or cifar10, six known classes, in place of --classes."""
    near: tuple[str, ...] = ()
    """Near out-of-distribution sets: held_out or TFDS names; none given: held_out where classes are left out.
    NAME is the test split; NAME@SPLIT another part in the TFDS syntax, such as omniglot@small1 or mnist@train[:50%]."""
    far: tuple[str, ...] = ()
    """Far sets: textures, uniform_noise, gaussian_noise, permuted_pixels, NAME or NAME@SPLIT; none: 1, 2 and 4."""
    detectors: str = ""
    """Comma-separated, combinators with +, such as energy,knn,react+energy; empty: all. See --list."""
    model: str = "cnn"
    """mlp, lenet, cnn, strided_cnn, resnet20, resnet56, resnet110, wide_resnet, resnet18 or resnet50."""
    recipe: str | None = None
    """Training recipe, see experiments.smoothing; None: the one of the data set."""
    num_epochs: int | None = None
    """Passes over the training images; None: as the recipe."""
    training: Literal[*_detectors.TRAINING] = "standard"  # pyrefly: ignore
    """What is minimised; outlier_exposure and energy_bounded need --outliers."""
    outliers: str | None = None
    """Auxiliary outliers to train on: a synthetic set, NAME or NAME@SPLIT; never a stored split that is tested."""
    checkpoint: str | None = None
    """Run folder of another experiment on the same data set, whose model is scored in place of a new one."""
    seeds: int = 3
    """Number of models, from seeds 0, 1, ...; means and standard deviations are over these."""
    positive: Literal["ood", "id"] = "ood"
    """Which side is positive in the FPR@95TPR that is printed; both are in metrics.csv."""
    results_dir: str = "results"
    """Where run folders go."""
    name: str | None = None
    """Name of the run folder; None: made of data set, model and training."""
    overwrite: bool = False
    """Delete the run that is in the folder and start anew."""
    list: bool = False
    """Print every detector with its reference, and do nothing else."""


SAME = ("results_dir", "name", "overwrite", "data_dir", "detectors", "seeds", "positive", "list")
METRICS = metrics.DetectionMetrics._fields
COLUMNS = ("seed", "detector", "set", "group", "num_in", "num_out", *METRICS, "fit_seconds", "score_seconds")


def resolved(config: Config) -> Config:
    """The config with the classes that it stands for, after a check of all that can be checked without data."""
    for name in ("num_epochs", "seeds"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value}.")
    if (config.training in _detectors.NEED_OUTLIERS) != (config.outliers is not None):
        raise ValueError(f"outliers must be given for {', '.join(_detectors.NEED_OUTLIERS)}, got {config.outliers!r}.")
    if len(config.classes) == 1:
        raise ValueError(f"classes must be at least two, got {config.classes}.")
    if config.open_set is not None:
        splits = _foreign.OPEN_SET_CLASSES.get(config.dataset.split(":")[0], ())
        if config.classes or not 0 <= config.open_set < len(splits):
            raise ValueError(
                f"open_set must be 0 to 4, of mnist or cifar10 and without classes, got {config.open_set} for "
                f"{config.dataset} with classes {config.classes}."
            )
        return dataclasses.replace(config, classes=splits[config.open_set])
    if config.checkpoint is not None:
        theirs = folders.settings_of(config.checkpoint, dataset=config.dataset, model=config.model)
        known = tuple(theirs.get("classes") or ())
        if config.classes not in ((), known):
            raise ValueError(f"classes must be those of checkpoint {config.checkpoint}, {known}, got {config.classes}.")
        return dataclasses.replace(config, classes=known, seeds=1)
    if not config.classes and config.dataset == "digits" and not config.near:
        return dataclasses.replace(config, classes=tuple(range(6)))
    return config


def folder_of(config: Config) -> epath.Path:
    """The run folder."""
    dataset = config.dataset.translate(UNSAFE)
    known = f"-{''.join(map(str, config.classes))}" if config.classes else ""
    trained = "" if config.training == "standard" else f"-{config.training}"
    of = "" if config.checkpoint is None else f"-of-{epath.Path(config.checkpoint).resolve().name}"
    name = config.name if config.name is not None else f"{dataset}{known}-{config.model}{trained}{of}"
    if name in ("", ".", "..") or epath.Path(name).name != name:
        raise ValueError(f"name must be the name of a folder, got {name!r}.")
    return epath.Path(config.results_dir) / "ood" / name


def score_sets(
    config: Config,
    seed: int,
    classifier: classifiers.Classifier,
    sets: _foreign.Sets,
    names: list[str],
    console: Console,
) -> dict[str, float]:
    """Fits and scores the detectors that are not on disk yet; each is there before the next is begun.

    A detector that cannot be fitted to these data is left out, and said so.

    Returns:
      Accuracy and calibration error on the known test images.
    """
    train = sets.train[subsets.evenly(len(sets.train), MAX_TRAIN)]
    tested = {"in": sets.test} | {name: foreign.dataset for name, foreign in sets.foreign.items()}
    images = {name: part[subsets.evenly(len(part), MAX_IMAGES)] for name, part in tested.items()}

    def spread(rows: Batch) -> _detectors.Labelled:
        outputs = jax.tree.map(classifier.place, classifiers.outputs_of(classifier, rows.image))
        return _detectors.Labelled(classifier.place(rows.image), rows.label, outputs)

    context = _detectors.Context(classifier, spread(train), spread(sets.validation[:]))
    parts = {name: spread(part) for name, part in images.items()}
    for name in names:
        path = scores_path(config, seed, name)
        if path.exists():
            continue
        started = time.perf_counter()
        try:
            score = _detectors.fit(name, context)
            fitted = time.perf_counter()
            scores: dict[str, Any] = {part: np.asarray(score(rows.image, rows.outputs)) for part, rows in parts.items()}
        except ValueError as error:
            console.print(f"seed {seed}: {name} is left out: {error}", soft_wrap=True, highlight=False)
            continue
        seconds = {"fit_seconds": fitted - started, "score_seconds": time.perf_counter() - fitted}
        files.write_arrays(path, scores | seconds)
        console.print(f"seed {seed}: {name}, {sum(seconds.values()):.1f} s", soft_wrap=True, highlight=False)
    probabilities = np.asarray(jax.nn.softmax(parts["in"].outputs.logits))
    return {
        "accuracy": float((probabilities.argmax(-1) == images["in"].label).mean()),
        "expected_calibration_error": float(metrics.expected_calibration_error(probabilities, images["in"].label)),
    }


def scores_path(config: Config, seed: int, detector: str) -> epath.Path:
    """Where the scores of a detector lie."""
    return folder_of(config) / f"seed-{seed}" / "scores" / f"{detector}.npz"


def finished(config: Config) -> list[str]:
    """Detectors with scores of every seed, of this and of earlier calls, in the order of ``--list``."""
    folders = [scores_path(config, seed, "").parent for seed in range(config.seeds)]
    names = set.intersection(*({path.stem for path in files.files(folder, "*.npz")} for folder in folders))
    order = {name: place for place, name in enumerate(_detectors.DEFAULT)}
    return sorted(names, key=lambda name: (order.get(name, len(order)), name))


def tabulate(config: Config, sets: _foreign.Sets, names: list[str]) -> list[dict]:
    """Computes one row of metrics for each seed, detector and set that is in the folder, and writes metrics.csv.

    Returns:
      The rows of these detectors and the seeds of ``config``.
    """
    seeds = files.files(folder_of(config), "seed-*")
    paths = [path for seed in seeds for path in files.files(seed / "scores", "*.npz")]
    scores = {(int(path.parts[-3].removeprefix("seed-")), path.stem): files.read_arrays(path) for path in paths}
    rows: list[dict[str, Any]] = []
    for (seed, name), of in sorted(scores.items(), key=lambda item: item[0]):
        seconds = {key: float(of[key]) for key in ("fit_seconds", "score_seconds")}
        for part, foreign in sets.foreign.items():
            values = metrics.detection_metrics(of["in"], of[part])
            sizes = {"num_in": of["in"].size, "num_out": of[part].size}
            row = {"seed": seed, "detector": name, "set": part, "group": foreign.group, **sizes}
            rows.append({**row, **values._asdict(), **seconds})
    files.write_rows(folder_of(config) / "metrics.csv", COLUMNS, rows)
    for part in ("in", *sets.foreign):
        together = {
            name: np.stack([scores[pair][part] for pair in sorted(scores) if pair[1] == name]) for _, name in scores
        }
        files.write_arrays(folder_of(config) / "scores" / f"{part.translate(UNSAFE)}.npz", together)
    return [row for row in rows if row["seed"] < config.seeds and row["detector"] in names]


def over_seeds(rows: list[dict], detector: str, metric: str, *, group: str | None = None, part: str | None = None):
    """The metric of each seed; over a group it is the unweighted mean of its sets, as in OpenOOD."""
    chosen = [r for r in rows if r["detector"] == detector and (r["set"] == part if part else r["group"] == group)]
    return np.asarray(
        [np.mean([r[metric] for r in chosen if r["seed"] == s]) for s in sorted({r["seed"] for r in chosen})]
    )


Section = tuple[str, list[str], list[list[str]]]
"""Title, headers and rows of a table."""


def tables_of(config: Config, rows: list[dict], names: list[str]) -> tuple[list[Section], list[Section]]:
    """What is printed, AUROC of groups and sets, other metrics of groups, and seconds; and all metrics of each set."""
    groups = [group for group in GROUPS if any(row["group"] == group for row in rows)]
    members = {row["set"]: row["group"] for row in rows}
    parts = [part for part, group in members.items() if list(members.values()).count(group) > 1]
    over = f"mean over {config.seeds} seed{'s' if config.seeds > 1 else ''}{', sd' if config.seeds > 1 else ''}"
    sides = {"ood": "out-of-distribution positive", "id": "in-distribution positive"}
    fpr = f"fpr_{config.positive}_positive"
    columns = {"AUROC": "auroc", "AUPR-in": "aupr_in", "AUPR-out": "aupr_out", "FPR@95TPR": fpr}
    with_side = f"FPR@95TPR with {sides[config.positive]}"

    def section(title: str, cells: list[tuple[str, str, dict[str, str]]]) -> Section:
        """Of columns (header, metric, where), the best of each in bold."""
        values = {name: [over_seeds(rows, name, metric, **where) for _, metric, where in cells] for name in names}
        means = np.asarray([[v.mean() for v in values[name]] for name in names])
        best = [c.min() if metric == fpr else c.max() for c, (_, metric, _) in zip(means.T, cells, strict=True)]
        body = []
        for name, row in zip(names, means, strict=True):
            texts = [spread(v) for v in values[name]]
            body.append([name, *(f"**{t}**" if m == b else t for t, m, b in zip(texts, row, best, strict=True))])
        return title, ["detector", *(header for header, _, _ in cells)], body

    printed = [section(f"AUROC, {over}", [(group, "auroc", {"group": group}) for group in groups])]
    if parts:
        printed.append(section(f"AUROC of each set, {over}", [(part, "auroc", {"part": part}) for part in parts]))
    for group in groups:
        cells = [(header, metric, {"group": group}) for header, metric in columns.items() if metric != "auroc"]
        printed.append(section(f"{group}; {with_side}", cells))
    seconds = []
    for name in names:
        spent = (over_seeds(rows, name, f"{task}_seconds", group=groups[0]).mean() for task in ("fit", "score"))
        seconds.append([name, *(f"{value:.2f}" for value in spent)])
    printed.append(("seconds, compilation included", ["detector", "fit", "score"], seconds))
    each = []
    for part in parts:
        cells = [(header, metric, {"part": part}) for header, metric in columns.items()]
        each.append(section(f"{part} ({members[part]}); {with_side}", cells))
    return printed, each


def spread(values: np.ndarray) -> str:
    """Mean and standard deviation, as 0.912 ±.004; of one value, that value."""
    mean = f"{values.mean():.3f}"
    return f"{mean} ±{values.std(ddof=1):.3f}".replace("±0.", "±.") if len(values) > 1 else mean


def figures(config: Config, sets: _foreign.Sets, rows: list[dict], names: list[str]) -> None:
    """Draws histograms and ROC curves of seed 0, AUROC of all seeds, and the images at both ends of a detector."""
    folder = folder_of(config) / "figures"
    scores = {name: files.read_arrays(scores_path(config, 0, name)) for name in names}
    known = config.dataset if not config.classes else f"{config.dataset} {','.join(map(str, config.classes))}"
    shown = {name: {known: s["in"], **{part: s[part] for part in sets.foreign}} for name, s in scores.items()}
    drawn = {"score_histograms": plotting.score_histograms(shown)}
    groups = [group for group in GROUPS if any(foreign.group == group for foreign in sets.foreign.values())]
    for group in groups:
        members = [part for part, foreign in sets.foreign.items() if foreign.group == group]
        pairs = {name: (s["in"], np.concatenate([s[part] for part in members])) for name, s in scores.items()}
        drawn[f"roc_{group}"] = plotting.roc_curves(pairs, title=f"{group}: {', '.join(members)}")
    values = {name: {group: over_seeds(rows, name, "auroc", group=group) for group in groups} for name in names}
    drawn["auroc"] = plotting.bar_chart(values, label="AUROC", start=0.5)
    parts = {known: sets.test} | {part: foreign.dataset for part, foreign in sets.foreign.items()}
    images = [part[subsets.evenly(len(part), MAX_IMAGES)].image for part in parts.values()]
    labels = np.concatenate([[part] * len(block) for part, block in zip(parts, images, strict=True)])
    images, ranked = np.concatenate(images), np.concatenate([shown[names[0]][part] for part in parts])
    order = np.argsort(ranked, kind="stable")
    ends = np.concatenate([order[:16], order[-16:]])
    title = f"{names[0]}: the images with the lowest scores, then those with the highest"
    drawn["images"] = plotting.image_grid(images[ends], titles=labels[ends].tolist(), columns=8, title=title)
    for name, figure in drawn.items():
        files.write_whole(folder / f"{name}.png", files.figure_bytes(figure))


def print_table(console: Console, title: str, headers: list[str], body: list[list[str]]) -> None:
    """Prints a table, as several where its columns do not fit side by side."""
    widths = [max(len(cell.strip("*")) for cell in column) + 3 for column in zip(headers, *body, strict=True)]
    first = 1
    while first < len(headers):
        last = first + 1
        while last < len(headers) and widths[0] + sum(widths[first : last + 1]) < console.width:
            last += 1
        table = Table(headers[0], title=title, title_justify="left")
        for header in headers[first:last]:
            table.add_column(header, justify="right")
        for name, *cells in body:
            shown = (f"[bold]{c.strip('*')}[/bold]" if c.startswith("**") else c for c in cells[first - 1 : last - 1])
            table.add_row(name, *shown)
        console.print(table)
        first = last


def report(
    config: Config, sets: _foreign.Sets, known: list[dict], names: list[str], stopwatch: runtimes.Stopwatch,
    console: Console,
) -> list[dict]:  # fmt: skip
    """Prints the tables; writes metrics.csv, metrics.json, report.md and figures.

    Returns:
      The rows that the tables are of.
    """
    rows = tabulate(config, sets, names)
    folder = folder_of(config)
    summary = {name: [entry[name] for entry in known] for name in known[0]}
    accuracy, error = (spread(np.asarray(summary[name])) for name in ("accuracy", "expected_calibration_error"))
    about = (
        f"{config.dataset}{f' classes {config.classes}' if config.classes else ''}, {config.model}, {config.training}"
    )
    line = f"In-distribution accuracy {accuracy}, ECE (15 bins) {error}."
    text = [f"# Out-of-distribution detection: {about}", "", line]
    printed, each = tables_of(config, rows, names)
    for section in printed:
        print_table(console, *section)
    for title, headers, body in (*printed, *each):
        text += ["", f"## {title}", "", f"| {' | '.join(headers)} |", f"|{'---|' * len(headers)}"]
        text += [f"| {' | '.join(cells)} |" for cells in body]
    console.print(line, highlight=False)
    console.print(f"Run folder: {folder}", soft_wrap=True)
    figures(config, sets, rows, names)
    pictures = [path.name for path in files.files(folder / "figures", "*.png")]
    sizes = [f"{part} ({foreign.group}): {len(foreign.dataset):,} images" for part, foreign in sets.foreign.items()]
    settings = [f"| {name} | {value} |" for name, value in dataclasses.asdict(config).items()]
    text += ["", f"In-distribution: {len(sets.test):,} test images; at most {MAX_IMAGES:,} of a set are scored.", ""]
    text += [*(f"- {size}" for size in sizes), ""]
    text += [f"Images: the least and the most outlying of {names[0]}, seed 0.", ""]
    text += [*(f"![{name}](figures/{name})" for name in pictures), ""]
    text += [stopwatch.told(), "", "| setting | value |", "|---|---|", *settings]
    files.write_whole(folder / "report.md", "\n".join(text) + "\n")
    summary |= {"seconds": stopwatch.seconds(), "rows": rows}
    files.write_whole(folder / "metrics.json", json.dumps(summary, indent=1) + "\n")
    return rows


def run(config: Config, runtime: runtimes.Runtime = runtimes.HERE) -> list[dict]:
    """Trains, fits, scores and reports, or does what is left of it; of many processes, all train and the first scores.

    Returns:
      One row of metrics for each seed, detector and set; none in all processes but the first.
    """
    stopwatch, console = runtimes.Stopwatch(), runtimes.console()
    if config.list:
        _detectors.print_list(console)
        return []
    config = resolved(config)
    names = _detectors.names_of(config.detectors)
    sets = _foreign.open_sets(
        config.dataset, config.data_dir, classes=config.classes, near=config.near, far=config.far,
        outliers=config.outliers, max_images=MAX_IMAGES, seed=0,
    )  # fmt: skip
    recipe = classifiers.recipe_of(config.dataset, config.recipe)
    folder = folder_of(config)
    folders.open_run(folder, config, same=SAME, overwrite=config.overwrite)
    trained = []
    with runtimes.watching(runtime, folder, dataclasses.asdict(config)) as watch:
        for seed in range(config.seeds):
            place = {"runtime": runtime, "watch": functools.partial(watch, f"training seed {seed}")}
            part = folder / f"seed-{seed}"
            trained.append(_detectors.classifier_of(config, seed, sets, recipe, part, console, **place))
        if jax.process_index() != 0:
            return []
        known = [score_sets(config, i, classifier, sets, names, console) for i, classifier in enumerate(trained)]
    names = finished(config)
    if not names:
        raise ValueError(f"detectors must be such as can be fitted, none of {config.detectors or 'all'} could.")
    return report(config, sets, known, names, stopwatch, console)
