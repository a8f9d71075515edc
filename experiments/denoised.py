"""Certifies one classifier behind several denoisers, beside classifiers that were trained for the noise.

A classifier that never saw noise is smoothed as it is, behind a denoiser (Salman et al., arXiv:2003.01908) and behind
one step of a diffusion model (Carlini et al., arXiv:2206.10550); beside it classifiers that were trained for the noise,
one of them after rRCM's pre-training (Lei et al., arXiv:2501.13094). All see the same noisy copies. Leaves
results/denoised/NAME with config.json, the certificates of every seed, metrics.csv, metrics.json, report.md and a
figure. The same command continues a run that was interrupted; other methods join what is there.

    python -m experiments.denoised
    python -m experiments.denoised --methods none,denoising,gaussian --sigma 0.25
    python -m experiments.denoised --dataset mnist --data-dir DIR --recipe mnist_short --num-images 100
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

from experiments import _denoisers
from experiments.common import classifiers, command_line, files, folders, runtimes, subsets
from robustjax import attacks, certification, data, losses, metrics, plotting
from robustjax.typing import LogitsFn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a run; radii and sigma are in units of [0, 1] pixels, l2."""

    dataset: str = "digits"
    """digits (embedded), or any prepared TFDS data set with image and label."""
    data_dir: str | None = None
    """Folder of prepared TFDS data sets; None: $TFDS_DATA_DIR, else TFDS's own."""
    train_split: str = "train"
    """Images to train on, in TFDS syntax. To choose settings: 'train[:90%]' here and 'train[90%:]' to certify."""
    test_split: str | None = None
    """Images to certify, in TFDS syntax; None: the data set's test split."""
    methods: str = ""
    """Comma-separated; empty: all."""
    model: str = "cnn"
    """Classifier: mlp, lenet, cnn, strided_cnn, resnet20, resnet56, resnet110, wide_resnet, resnet18 or resnet50."""
    recipe: str | None = None
    """Training recipe of the classifiers, see experiments.smoothing; None: the one of the data set."""
    num_epochs: int | None = None
    """Passes over the training images for each classifier; None: as the recipe."""
    denoiser_epochs: int | None = None
    """Passes for each denoiser and the diffusion model; None: 200 for the digits, else 10."""
    denoiser_width: int = 32
    """Units of each of their hidden layers."""
    denoiser_depth: int = 6
    """Their layers."""
    consistency_weight: float = 5.0
    """Weight of the divergence between answers in consistency and rrcm."""
    pretraining_share: float = 0.25
    """Share of the passes of rrcm that are pre-training, without labels."""
    pretraining_sigma: float = 40.0
    """Largest noise of pre-training, in units of [0, 1] pixels."""
    sigma: float = 0.5
    """Standard deviation of the smoothing noise, and of that which denoisers and classifiers are trained with."""
    num_selection: int = 100
    """Noisy copies of each image that select its class."""
    num_estimation: int = 1000
    """Noisy copies of each image that bound the probability of the class."""
    alpha: float = 0.001
    """Probability, for each image, that its certificate is wrong."""
    batch_size: int | None = None
    """Noisy copies in one call of the model; None: 200 on a CPU, 1000 on an accelerator."""
    num_images: int = 200
    """Certify so many images, evenly spaced."""
    num_attacked: int = 10
    """Attack so many of the certified images inside their radii; not one may be fooled."""
    radii: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Radii of the table."""
    seeds: int = 3
    """Repetitions, with seeds 0, 1, ...: of initialisation, training and noise."""
    results_dir: str = "results"
    """Where run folders go."""
    name: str | None = None
    """Name of the run folder; None: made of data set, model and sigma."""
    overwrite: bool = False
    """Delete the run that is in the folder and start anew."""


SAME = ("results_dir", "name", "overwrite", "data_dir", "methods", "radii", "seeds")
GROUP = 20
"""Images that are certified at once, or more, so that devices share them."""
PGD_STEPS, PGD_DRAWS, ANSWER_DRAWS = 20, 16, 1000


def check(config: Config) -> tuple[str, ...]:
    """Raises ValueError for a setting out of its range, before anything is written; returns the methods."""
    for name in (
        "num_epochs", "denoiser_epochs", "denoiser_width", "num_selection", "num_estimation", "batch_size",
        "num_images", "seeds",
    ):  # fmt: skip
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value}.")
    if config.denoiser_depth < 2:
        raise ValueError(f"denoiser_depth must be an integer of at least 2, got {config.denoiser_depth}.")
    if config.num_attacked < 0:
        raise ValueError(f"num_attacked must be at least 0, got {config.num_attacked}.")
    if not 0 < config.alpha < 1:
        raise ValueError(f"alpha must lie strictly between 0 and 1, got {config.alpha}.")
    if not config.radii or not all(0 <= radius < float("inf") for radius in config.radii):
        raise ValueError(f"radii must be finite numbers of at least 0, got {config.radii}.")
    if config.name is not None and (config.name in ("", ".", "..") or epath.Path(config.name).name != config.name):
        raise ValueError(f"name must be the name of a folder, got {config.name!r}.")
    certification.gaussian(config.sigma)
    losses.smoothing.consistency(weight=config.consistency_weight)
    if not 0 < config.pretraining_share < 1:
        raise ValueError(f"pretraining_share must lie strictly between 0 and 1, got {config.pretraining_share}.")
    losses.rrcm.consistency_pretraining(largest=2 * config.pretraining_sigma)
    methods = tuple(map(str.strip, config.methods.split(","))) if config.methods else tuple(_denoisers.METHODS)
    unknown = [name for name in methods if name not in _denoisers.METHODS]
    if unknown:
        raise ValueError(f"methods must be among {', '.join(_denoisers.METHODS)}, got {unknown[0]!r}.")
    if "rrcm" in methods and config.num_epochs == 1:
        raise ValueError("num_epochs must be at least 2 with rrcm, which is pre-trained in some of them, got 1.")
    classifiers.recipe_of(config.dataset, config.recipe)
    return methods


def folder_of(config: Config) -> epath.Path:
    """The run folder."""
    dataset = config.dataset.replace("/", "-").replace(":", "-")
    name = config.name if config.name is not None else f"{dataset}-{config.model}-{config.sigma:g}"
    return epath.Path(config.results_dir) / "denoised" / name


def certify(
    config: Config, key: jax.Array, logits_fn: LogitsFn, test: data.Dataset, *, place: Callable, group: int
) -> dict:
    """Certifies the images, attacks some of them inside their radii, and measures what a copy costs.

    Args:
      config: of the run.
      key: the same for all that shall see the same noise.
      logits_fn: the base classifier.
      test: where the images come from.
      place: puts images where they are worked on.
      group: how many are certified at once.

    Returns:
      Arrays for an npz file.
    """
    measure = certification.gaussian(config.sigma)
    ids = subsets.evenly(len(test), min(config.num_images, len(test)))
    image, label, _ = test[ids]
    certify_key, attack_key, answer_key = jax.random.split(key, 3)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(certify_key, ids)
    settings = {"num_selection": config.num_selection, "alpha": config.alpha, "batch_size": config.batch_size}
    parts, seconds = [], 0.0
    for start in range(-group, len(ids), group):
        rows = np.minimum(np.arange(max(start, 0), max(start, 0) + group), len(ids) - 1)  # the last group is filled up
        draws = config.num_estimation if start >= 0 else min(config.num_estimation, 100)  # the first compiles
        began = time.perf_counter()
        found = certification.certify(
            keys[rows], logits_fn, place(image[rows]), measure, num_estimation=draws, **settings
        )
        if start >= 0:
            seconds += time.perf_counter() - began
            parts.append(found)
    certificate = certification.Certificate(*(np.concatenate(column)[: len(ids)] for column in zip(*parts)))
    attacked = np.flatnonzero(certificate.radius > 0)[: config.num_attacked]
    noisy = jax.tree_util.Partial(_noisy_logits_of(measure), logits_fn)
    broken = 0
    for row in attacked:
        epsilon, of_row = float(certificate.radius[row]) * 0.999, slice(row, row + 1)
        attack = attacks.pgd(epsilon=epsilon, norm="l2", steps=PGD_STEPS, samples=PGD_DRAWS)
        x_adv = attack(attack_key, noisy, image[of_row], certificate.label[of_row])
        answer = certification.predict(
            jax.random.fold_in(answer_key, ids[row]), logits_fn, x_adv, measure,
            num_samples=ANSWER_DRAWS, alpha=config.alpha, batch_size=config.batch_size,
        )  # fmt: skip
        broken += int(answer[0] not in (certification.ABSTAIN, certificate.label[row]))
    forward = jax.jit(lambda logits_fn, x: logits_fn(x))
    clean = np.asarray(forward(logits_fn, image)).argmax(-1)
    cost = forward.lower(logits_fn, image[:1]).cost_analysis() or {}
    return {
        **certificate._asdict(), "id": ids, "true": label, "clean_accuracy": (clean == label).mean(),
        "seconds_per_image": seconds / (group * len(parts)), "flops_per_copy": cost.get("flops", np.nan),
        "attacked": len(attacked), "broken": broken,
    }  # fmt: skip


@functools.cache  # one function, so that compiled programs are shared
def _noisy_logits_of(measure: certification.Measure) -> Callable:
    return lambda logits_fn, key, x: logits_fn(measure.sample(key, x[0])[None])


def path_of(config: Config, seed: int, method: str) -> epath.Path:
    """Where the certificates of a seed and method go."""
    return folder_of(config) / f"seed-{seed}" / f"{method}.npz"


def tabulate(config: Config, methods: tuple[str, ...]) -> list[dict]:
    """Computes a row for each seed and method from what is on disk."""
    rows = []
    for seed in range(config.seeds):
        for method in methods:
            arrays = files.read_arrays(path_of(config, seed, method))
            certificate = certification.Certificate(*(arrays[name] for name in certification.Certificate._fields))
            certified = metrics.certified_accuracy(certificate, arrays["true"], config.radii)
            row: dict[str, Any] = {"seed": seed, "method": method, "num_images": len(arrays["true"])}
            row["average_certified_radius"] = metrics.average_certified_radius(certificate, arrays["true"])
            row |= {f"certified_accuracy_{r:g}": float(value) for r, value in zip(config.radii, certified)}
            row |= {"abstained": float(certificate.abstained.mean())}
            rows.append(row | {name: float(arrays[name]) for name in SCALARS})
    return rows


SCALARS = ("clean_accuracy", "seconds_per_image", "flops_per_copy", "attacked", "broken")


def tables_of(config: Config, rows: list[dict], methods: tuple[str, ...]) -> list[tuple[str, list[str], list]]:
    """Titles, headers and cells: what is certified, what it costs, and the ACR beside that of other methods."""
    of = {method: [row for row in rows if row["method"] == method] for method in methods}
    values = lambda method, name: np.asarray([row[name] for row in of[method]])
    mean = lambda method, name, form: f"{values(method, name).mean():{form}}"
    acr = "average_certified_radius"
    certified = [
        [
            method,
            spread(values(method, acr)),
            *(mean(method, f"certified_accuracy_{r:g}", ".3f") for r in config.radii),
            mean(method, "abstained", ".3f"),
        ]
        for method in methods
    ]
    costs = [
        [
            method,
            mean(method, "clean_accuracy", ".3f"),
            f"{values(method, 'flops_per_copy').mean() / 1e6:.2f}",
            mean(method, "seconds_per_image", ".3f"),
            f"{values(method, 'broken').sum():.0f} of {values(method, 'attacked').sum():.0f}",
        ]
        for method in methods
    ]
    told = "mean over 1 seed" if config.seeds == 1 else f"mean over {config.seeds} seeds, sd"
    tables = [
        (f"Certified accuracy, {told}", ["method", "ACR", *(f"{r:g}" for r in config.radii), "abstain"], certified),
        ("Costs", ["method", "clean", "Mflop/copy", "s/image", "fooled inside"], costs),
    ]
    beside = [name for name in ("none", "gaussian") if name in methods]
    if beside:
        paired = [[m, *(spread(values(m, acr) - values(name, acr)) for name in beside)] for m in methods]
        tables.append((f"ACR less that of the same seed, {told}", ["method", *beside], paired))
    return tables


def spread(values: np.ndarray) -> str:
    """Mean and standard deviation; of one value, that value."""
    return f"{values.mean():.3f}" + (f" ±{values.std(ddof=1):.3f}" if len(values) > 1 else "")


def report(config: Config, methods: tuple[str, ...], stopwatch: runtimes.Stopwatch, console: Console) -> list[dict]:
    """Prints the tables; writes metrics.csv, metrics.json, report.md and the figure.

    Returns:
      The rows of metrics.csv.
    """
    folder, rows = folder_of(config), tabulate(config, methods)
    files.write_rows(folder / "metrics.csv", list(rows[0]), rows)
    title = f"{config.dataset} {config.model}, sigma {config.sigma:g}"
    text = [f"# Denoised smoothing: {title}", ""]
    text += [f"- {method}: {_denoisers.METHODS[method]}." for method in methods]
    text += ["", f"{rows[0]['num_images']} images, {config.num_estimation:,} copies of each, alpha {config.alpha:g}."]
    for name, headers, cells in tables_of(config, rows, methods):
        table = Table(*headers, title=f"{name}: {title}", title_justify="left")
        for column in table.columns[1:]:
            column.justify, column.no_wrap = "right", True
        for line in cells:
            table.add_row(*line)
        console.print(table)
        text += ["", f"## {name}", "", f"| {' | '.join(headers)} |", f"|{'---|' * len(headers)}"]
        text += [f"| {' | '.join(line)} |" for line in cells]
    broken, attacked = (sum(row[name] for row in rows) for name in ("broken", "attacked"))
    finding = (
        f"{'pass' if not broken else 'WARNING'}: PGD inside certified radii changed the smoothed answer of "
        f"{broken:.0f} of {attacked:.0f} images."
    )
    console.print(finding, highlight=False)
    console.print(f"Run folder: {folder}", soft_wrap=True)
    curves = {}
    for method in methods:
        parts = [files.read_arrays(path_of(config, seed, method)) for seed in range(config.seeds)]
        radius = np.concatenate([part["radius"] for part in parts])
        curves[method] = (radius, np.concatenate([part["label"] == part["true"] for part in parts]))
    figure = plotting.certified_accuracy_curve(curves, title=title)
    files.write_whole(folder / "figures" / "certified_accuracy.png", files.figure_bytes(figure))
    settings = [f"| {name} | {value} |" for name, value in dataclasses.asdict(config).items()]
    text += ["", finding, "", "![certified accuracy](figures/certified_accuracy.png)", "", stopwatch.told(), ""]
    text += ["| setting | value |", "|---|---|", *settings]
    files.write_whole(folder / "report.md", "\n".join(text) + "\n")
    summary = {"seconds": stopwatch.seconds(), "machine": runtimes.machine(), "rows": rows}
    files.write_whole(folder / "metrics.json", json.dumps(summary, indent=1) + "\n")
    return rows


def run(config: Config, runtime: runtimes.Runtime = runtimes.HERE) -> list[dict]:
    """Trains, certifies and reports, or does what is left of it; of many processes, all train and the first certifies.

    Returns:
      One row for each seed and method; none in all processes but the first.
    """
    stopwatch, console = runtimes.Stopwatch(), runtimes.console()
    methods = check(config)
    train = data.load(config.dataset, config.train_split, config.data_dir)
    test = data.load(config.dataset, config.test_split or data.splits(config.dataset).test, config.data_dir)
    classifiers.build(config.model, train, dtype="float32", key=jax.random.key(0))  # a model that is unknown ends here
    folder, devices = folder_of(config), runtime.local_mesh().size
    group = -(-GROUP // devices) * devices
    folders.open_run(folder, config, same=SAME, overwrite=config.overwrite)
    with runtimes.watching(runtime, folder, dataclasses.asdict(config)) as watch:
        for seed in range(config.seeds):
            trained = _denoisers.Trained(config, seed, train, folder / f"seed-{seed}", console, runtime, watch)
            for method in methods:
                path = path_of(config, seed, method)
                if path.exists():
                    continue
                logits_fn = trained.logits_fn(method)
                if jax.process_index() == 0:
                    key = jax.random.fold_in(jax.random.key(seed), 1)  # the same noise for all methods
                    found = certify(config, key, logits_fn, test, place=trained.place, group=group)
                    files.write_arrays(path, found)
                    console.print(f"Seed {seed}: {method} certified.", highlight=False)
                runtimes.barrier(f"{method} of seed {seed}")
    return report(config, methods, stopwatch, console) if jax.process_index() == 0 else []


if __name__ == "__main__":
    command_line.command_line(Config, run, __doc__)
