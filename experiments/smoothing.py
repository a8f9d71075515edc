"""Trains a classifier with noise and certifies it by randomized smoothing (Cohen et al., arXiv:1902.02918).

Leaves results/smoothing/NAME with config.json, certificates.csv, metrics.json, report.md and a figure. The same command
continues a run that was interrupted, from its last checkpoint or certificate.

    python -m experiments.smoothing
    python -m experiments.smoothing --dataset mnist --data-dir DIR --sigma 0.5 --num-estimation 10000 --num-images 500
    python -m experiments.smoothing --dataset cifar10 --data-dir DIR --model resnet20 --skip 20
    python -m experiments.smoothing --checkpoint RUN --num-estimation 100000 --target-radius 0.5
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from typing import Literal

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from experiments import _certificates, _classifier, _run, _runtime, _smoothed
from robustjax import certification, data, losses, metrics, plotting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a run; radii and sigma are in units of [0, 1] pixels."""

    dataset: str = "digits"
    """digits (embedded), or any prepared TFDS data set with image and label."""
    data_dir: str | None = None
    """Folder of prepared TFDS data sets; None: $TFDS_DATA_DIR, else TFDS's own."""
    train_split: str = "train"
    """Images to train on, in TFDS syntax. To choose settings: 'train[:90%]' here and 'train[90%:]' to certify."""
    test_split: str | None = None
    """Images to certify, in TFDS syntax; None: the data set's test split."""
    model: str = "cnn"
    """mlp, lenet, cnn, resnet20, resnet56, resnet110, wide_resnet, resnet18 or resnet50."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in; parameters, noise and logits are float32."""
    sigma: float = 0.25
    """Standard deviation of the smoothing noise, in [0, 1] pixels."""
    noise: Literal["gaussian", "uniform", "laplace"] = "gaussian"
    """Distribution of each pixel's noise; radii are l2 for gaussian, l1 for the others."""
    norm: Literal["l1", "l2", "linf"] | None = None
    """Tell radii in this norm, by the largest ball of it that is inside the certified one; None: the noise's own."""
    train_sigma: float | None = None
    """Standard deviation of the training noise, in [0, 1] pixels; None: sigma; 0: no noise."""
    training: Literal["gaussian", "stability", "smoothadv", "macer", "consistency", "smoothmix"] = "gaussian"
    """How the base classifier is trained with the noise."""
    train_weight: float | None = None
    """Weight of what this training adds to cross-entropy; None, here and below: the objective's own."""
    train_epsilon: float | None = None
    """Radius of the attack in smoothadv training, l2, in [0, 1] pixels."""
    train_steps: int | None = None
    """Steps of the attack in smoothadv and smoothmix training."""
    train_draws: int | None = None
    """Noisy copies of each image in a step of training."""
    grid: int | None = None
    """Round noisy copies to so many steps to a grey level (1/255), such as 16; None: plain float32 addition."""
    checkpoint: str | None = None
    """Run folder of another experiment on the same data set, whose model is certified in place of a new one."""
    recipe: str | None = None
    """Training recipe: digits, mnist, mnist_short, cohen_cifar10 or cohen_imagenet; None: the one of the data set."""
    num_epochs: int | None = None
    """Passes over the training images; None: as the recipe; its schedule is scaled to fit."""
    learning_rate: float | None = None
    """At the start of training; None: as the recipe."""
    num_selection: int = 100
    """Noisy copies of each image that select its class."""
    num_estimation: int = 10_000
    """Noisy copies of each image that bound the probability of the class; the field's tables use 100000."""
    sequential: bool = False
    """Stop drawing for an image when its radius is within 5% of what num_estimation copies would give."""
    target_radius: float | None = None
    """Ask of each image only whether it is certified at this radius, and stop drawing when that is known."""
    alpha: float = 0.001
    """Probability, for each image, that its certificate is wrong."""
    batch_size: int | None = None
    """Noisy copies in one call of the model; None: 200 on a CPU, 1000 on an accelerator."""
    skip: int = 1
    """Certify every skip-th image; the field's habit is 20 on CIFAR-10 and 100 on ImageNet."""
    num_images: int | None = None
    """Certify at most so many images; None: all."""
    radii: tuple[float, ...] = ()
    """Radii of the table, in [0, 1] pixels; none given: up to the largest that can be certified."""
    seed: int = 0
    """Of initialisation, order of batches, training noise and smoothing noise."""
    results_dir: str = "results"
    """Where run folders go."""
    name: str | None = None
    """Name of the run folder; None: made of data set, model and noise."""
    overwrite: bool = False
    """Delete the run that is in the folder and start anew."""

    def measure(self, dimension: int) -> certification.Measure:
        """The smoothing measure of images with so many numbers."""
        return _smoothed.measure_of(self.noise, self.sigma, self.grid, self.norm, dimension)

    def objective(self, *, augment: bool) -> losses.Objective:
        """What the base classifier is trained with."""
        sigma = self.sigma if self.train_sigma is None else self.train_sigma
        settings = {name: getattr(self, name) for name in _smoothed.SETTINGS}
        return _smoothed.objective_of(self.noise, sigma, self.training, augment=augment, **settings)

    def is_sequential(self) -> bool:
        """Whether draws stop when the answer is known."""
        return self.sequential or self.target_radius is not None

    def folder(self) -> epath.Path:
        """The run folder."""
        train = "" if self.train_sigma is None else f"-trained-{self.train_sigma:g}"
        train += "" if self.training == "gaussian" else f"-{self.training}"
        dataset = self.dataset.replace("/", "-").replace(":", "-")
        of = "" if self.checkpoint is None else f"-of-{epath.Path(self.checkpoint).resolve().name}"
        noise = ("" if self.noise == "gaussian" else f"-{self.noise}") + ("" if self.norm is None else f"-{self.norm}")
        target = "" if self.target_radius is None else f"-at-{self.target_radius:g}"
        asked = target or ("-sequential" if self.sequential else "")
        name = self.name if self.name is not None else f"{dataset}-{self.model}-{self.sigma:g}{noise}{train}{of}{asked}"
        return epath.Path(self.results_dir) / "smoothing" / name


# What may differ when a run is taken up: it changes no certificate.
SAME = ("results_dir", "name", "overwrite", "data_dir", "radii")


def certify_images(
    config: Config,
    key: jax.Array,
    classifier: _classifier.Classifier,
    measure: certification.Measure,
    test: data.Dataset,
    ids: np.ndarray,
    *,
    mesh: Mesh,
    console: Console,
    watch: _runtime.Watch,
) -> None:
    """Certifies the images that have no certificate yet; each group is on disk before the next is begun.

    A group has an image for each step of the axis ``data`` of the mesh; of several processes each takes its share.
    """
    folder, size = config.folder(), mesh.shape["data"]
    process, processes = jax.process_index(), jax.process_count()
    log = lambda message: console.print(message, soft_wrap=True)
    if process == 0:
        _certificates.merge(folder, log)
    _runtime.barrier("certificates of before")
    done, labels, certificate, *_ = _certificates.read(folder)
    if not np.isin(done, ids).all():
        raise ValueError(
            f"{folder / 'certificates.csv'} is of other images than this run's; delete it to certify again, or pass "
            "--overwrite."
        )
    if 0 < len(done) < len(ids):
        log(f"Resuming after {len(done)} of {len(ids)} certificates in {folder / 'certificates.csv'}.")
    left = np.setdiff1d(ids, done)[process::processes]
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    certify = functools.partial(
        certification.certify_sequential if config.is_sequential() else certification.certify,
        logits_fn=classifier.logits_fn(),
        measure=measure,
        alpha=config.alpha,
        batch_size=config.batch_size,
    )
    few = {"num_selection": 1, "num_estimation": 100}
    all_ = {"num_selection": config.num_selection, "num_estimation": config.num_estimation}
    if config.is_sequential():
        few = all_ = {
            "num_selection": config.num_selection,
            "max_samples": config.num_estimation,
            "target_radius": config.target_radius,
        }
    radius_told = float(measure.radius(0.8413447460685429))  # of a Gaussian: sigma
    radius_told = round(radius_told, 9) if config.target_radius is None else config.target_radius
    certified = int(((certificate.label == labels) & (certificate.radius >= radius_told)).sum())
    compiled, last_line, count, total = False, time.perf_counter(), len(done), len(done) + len(left)
    with _certificates.writer(folder, process, processes) as write, _run.progress_bar(console) as bar:
        task = bar.add_task("", total=total, completed=len(done), task_name="certifying")
        for start in range(0, len(left), size):
            group = left[start : start + size]
            image, label, _ = test[np.resize(group, size)]  # the last group is filled up
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.resize(group, size))
            x = jax.device_put(image, sharding)
            if not compiled:  # so that the seconds below are those of sampling
                certify(keys, x=x, **few)
                compiled = True
            started = time.perf_counter()
            predicted, radius, probability, _, *samples = certify(keys, x=x, **all_)
            samples = samples[0] if samples else np.full(size, config.num_selection + config.num_estimation)
            seconds = (time.perf_counter() - started) / len(group)
            rows = list(zip(group, label, zip(predicted, radius, probability, samples)))
            write([_certificates.line_of(*row, seconds) for row in rows])
            certified += int(((predicted == label) & (radius >= radius_told))[: len(group)].sum())
            count += len(group)
            rate = samples[: len(group)].mean() / seconds
            running = {f"certified at {radius_told:g}": certified / count, "samples/s": rate}
            watch("certifying", total, count, running)
            description = f"{certified / count:.3f} certified at {radius_told:g}, {rate:,.0f} samples/s"
            bar.update(task, completed=count, description=description)
            if bar.disable and time.perf_counter() - last_line >= 60:
                last_line = time.perf_counter()
                log(f"Certified {count:,} of {total:,}: {description}")
    _runtime.barrier("certificates")
    if process == 0:
        _certificates.merge(folder, log)


def summarize(
    config: Config,
    measure: certification.Measure,
    standard_accuracy: float,
    training: dict[str, float],
    stopwatch: _runtime.Stopwatch,
) -> dict:
    """Computes the numbers of the table from the certificates on disk."""
    _, labels, certificate, num_samples, seconds = _certificates.read(config.folder())
    radii = config.radii or default_radii(config, measure)
    acr = metrics.average_certified_radius(certificate, labels)
    return {
        "num_images": len(labels),
        "norm": measure.norm,
        "standard_accuracy": standard_accuracy,
        "radii": list(radii),
        "certified_accuracy": metrics.certified_accuracy(certificate, labels, radii).tolist(),
        "average_certified_radius": acr if config.target_radius is None else None,
        "abstained": float(certificate.abstained.mean()),
        "samples_per_image": float(num_samples.mean()),
        "samples_per_second": float(num_samples.sum()) / max(float(seconds.sum()), 1e-9),
        "seconds_per_image": float(seconds.mean()),
        "training": training,
        "seconds": stopwatch.seconds(),
        "machine": _runtime.machine(),
        "jax": jax.__version__,
    }


def default_radii(config: Config, measure: certification.Measure) -> tuple[float, ...]:
    """The target; or multiples of a round number, 0.25 where that suits, up to what these draws can certify."""
    if config.target_radius is not None:
        return (config.target_radius,)
    n = config.num_estimation
    bound = certification.binomial_lower_bound(n, n, config.alpha)
    largest = float(measure.radius(bound))
    steps = [0.25, 0.5] if largest > 0.5 else [a * 10.0**b for b in range(-6, 0) for a in (1, 2, 5)]
    step = next((step for step in steps if largest <= 6 * step), steps[-1])
    return tuple((step * np.arange(math.ceil(largest / step))).tolist())


def rows_of(summary: dict) -> list[tuple[str, str]]:
    """The table of a run as pairs of texts."""
    certified = zip(summary["radii"], summary["certified_accuracy"], strict=True)
    acr = summary["average_certified_radius"]
    form = "g" if 0 < max(summary["radii"], default=0) < 0.25 else ".2f"
    return [
        ("images", f"{summary['num_images']:,}"),
        ("standard accuracy", f"{summary['standard_accuracy']:.3f}"),
        *(
            (f"certified accuracy at {summary['norm']} radius {r:{form}}", f"{accuracy:.3f}")
            for r, accuracy in certified
        ),
        *([] if acr is None else [("average certified radius (ACR)", f"{acr:{'.3f' if acr >= 0.1 else '.3g'}}")]),
        ("abstained", f"{summary['abstained']:.3f}"),
        ("samples per image", f"{summary['samples_per_image']:,.0f}"),
        ("samples per second", f"{summary['samples_per_second']:,.0f}"),
    ]


def curve_of(folder: epath.Path) -> tuple[np.ndarray, np.ndarray]:
    """Radii and marks for ``plotting.certified_accuracy_curve``."""
    _, labels, certificate, *_ = _certificates.read(folder)
    return certificate.radius, (certificate.label == labels) & ~certificate.abstained


def report(config: Config, summary: dict, stopwatch: _runtime.Stopwatch, console: Console) -> None:
    """Prints the table; writes metrics.json, report.md and the figure."""
    folder = config.folder()
    norm, noise = summary["norm"], "" if config.noise == "gaussian" else f"{config.noise} "
    title = f"{config.dataset} {config.model}, {noise}sigma {config.sigma:g} ({norm}, [0, 1] pixels)"
    table = Table("", "value", title=title)
    table.columns[1].justify = "right"
    for row in rows_of(summary):
        table.add_row(*row)
    console.print(table)
    console.print(f"Run folder: {folder}", soft_wrap=True)
    lines = [f"| {name} | {value} |" for name, value in rows_of(summary)]
    settings = [f"| {name} | {value} |" for name, value in dataclasses.asdict(config).items()]
    text = [
        f"# {title}",
        "",
        f"Each certificate is wrong with probability at most {config.alpha:g}, image by image; radii in {norm} norm.",
        "",
        *("| | value |", "|---|---|", *lines),
        "",
        "![certified accuracy](figures/certified_accuracy.png)",
        "",
        stopwatch.told(),
        "",
        *("| setting | value |", "|---|---|", *settings),
    ]
    figure = plotting.certified_accuracy_curve({f"sigma {config.sigma:g}": curve_of(folder)}, title=title, norm=norm)
    _run.write_whole(folder / "figures" / "certified_accuracy.png", _run.png_of(figure))
    _run.write_whole(folder / "report.md", "\n".join(text) + "\n")
    _run.write_whole(folder / "metrics.json", json.dumps(summary, indent=1) + "\n")


def check(config: Config) -> None:
    """Raises ValueError for a setting that is out of its range, before anything is written."""
    for name in ("num_selection", "num_estimation", "skip", "num_images", "num_epochs", "batch_size", "grid"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value}.")
    config.measure(1)
    if config.name is not None and (config.name in ("", ".", "..") or epath.Path(config.name).name != config.name):
        raise ValueError(f"name must be the name of a folder, got {config.name!r}.")
    if not 0 < config.alpha < 1:
        raise ValueError(f"alpha must lie strictly between 0 and 1, got {config.alpha}.")
    if config.train_sigma is not None and not 0 <= config.train_sigma < float("inf"):
        raise ValueError(f"train_sigma must be 0 or positive and finite, got {config.train_sigma}.")
    config.objective(augment=False)
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed must lie in [0, 2**32), got {config.seed}.")
    if not all(radius >= 0 for radius in config.radii):
        raise ValueError(f"radii must be at least 0, got {config.radii}.")
    target = config.target_radius
    if target is not None and not 0 <= target < float("inf"):
        raise ValueError(f"target_radius must be 0 or positive and finite, got {target}.")
    if target is not None and any(radius > target for radius in config.radii):
        raise ValueError(
            f"radii must be at most target_radius={target:g}: nothing is known beyond, got {config.radii}."
        )


def run(config: Config, runtime: _runtime.Runtime = _runtime.HERE) -> dict:
    """Trains, certifies and reports, or does what is left of it.

    Returns:
      The summary that is written to ``metrics.json``; empty in all processes but the first.
    """
    stopwatch, console = _runtime.Stopwatch(), _runtime.console()
    check(config)
    if config.checkpoint is not None:
        _run.settings_of(config.checkpoint, dataset=config.dataset, model=config.model)
    runtime.local_mesh()  # whether there are so many devices
    train = data.load(config.dataset, config.train_split, config.data_dir)
    test = data.load(config.dataset, config.test_split or data.splits(config.dataset).test, config.data_dir)
    recipe = _classifier.recipe_of(config.dataset, config.recipe, config.learning_rate)
    ids = np.arange(0, len(test), config.skip)[: config.num_images]
    model_key, train_key, certify_key = jax.random.split(jax.random.key(config.seed), 3)
    functional = _classifier.build(config.model, train, dtype=config.dtype, key=model_key)
    folder = config.folder()
    restored = config.checkpoint and _classifier.restored(config.checkpoint, functional, console, runtime)
    _run.open_run(folder, config, same=SAME, overwrite=config.overwrite)
    measure = config.measure(math.prod(train.image_shape))
    with _runtime.watching(runtime, folder, dataclasses.asdict(config)) as watch:
        if restored:
            classifier, trained = restored, {}
        else:
            classifier, trained = _classifier.train(
                folder / "checkpoints",
                functional,
                train,
                key=train_key,
                objective=config.objective(augment=recipe.augment),
                recipe=recipe,
                num_epochs=config.num_epochs,
                seed=config.seed,
                runtime=runtime,
                log=lambda message: console.print(message, soft_wrap=True),
                watch=functools.partial(watch, "training"),
            )
        certify_images(
            config, certify_key, classifier, measure, test, ids, mesh=runtime.local_mesh(), console=console, watch=watch
        )
    if jax.process_index() != 0:
        return {}
    summary = summarize(config, measure, classifier.accuracy(test, ids), trained, stopwatch)
    report(config, summary, stopwatch, console)
    return summary


if __name__ == "__main__":
    _run.command_line(Config, run, __doc__)
