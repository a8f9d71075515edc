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
import math
import time
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from experiments.common import certificates, classifiers, command_line, folders, runtimes, smoothers
from experiments.smoothing import _report
from robustjax import certification, data, losses


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
    image_size: int | None = None
    """Resize images to so many pixels a side; None: as they are."""
    model: str = "cnn"
    """mlp, lenet, cnn, strided_cnn, resnet20, resnet56, resnet110, wide_resnet, resnet18 or resnet50."""
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
    train_warmup: float | None = None
    """Share of training in which the epsilon of smoothadv or the weight of smoothmix grows, or macer's weight is 0."""
    grid: int | None = None
    """Round noisy copies to so many steps to a grey level (1/255), such as 16; None: plain float32 addition."""
    dual: bool = False
    """Smooth and classify two halves of the pixels, a checkerboard, by themselves; they share the draws of an image."""
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
        return smoothers.measure_of(self.noise, self.sigma, self.grid, self.norm, dimension)

    def objective(self, *, num_steps: int) -> losses.Objective:
        """What the base classifier is trained with, in so many steps."""
        sigma = self.sigma if self.train_sigma is None else self.train_sigma
        settings = {name: getattr(self, name) for name in smoothers.SETTINGS}
        objective = smoothers.objective_of(self.noise, sigma, self.training, **settings)
        return smoothers.warmed_up(self.training, objective, self.train_warmup, num_steps)

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
        asked = target or ("-sequential" if self.sequential else "-dual" if self.dual else "")
        dataset += "" if self.image_size is None else f"-{self.image_size}px"
        name = self.name if self.name is not None else f"{dataset}-{self.model}-{self.sigma:g}{noise}{train}{of}{asked}"
        return epath.Path(self.results_dir) / "smoothing" / name


# With a checkpoint nothing is trained, so these would say what is not so.
OF_TRAINING = (
    "train_split", "train_sigma", "training", "train_weight", "train_epsilon", "train_steps", "train_draws",
    "train_warmup", "recipe", "num_epochs", "learning_rate",
)  # fmt: skip
# What may differ when a run is taken up: it changes no certificate.
SAME = ("results_dir", "name", "overwrite", "data_dir", "radii")


def certify_images(
    config: Config,
    key: jax.Array,
    certify: smoothers.Procedure,
    measure: certification.Measure,
    test: data.Dataset,
    ids: np.ndarray,
    *,
    mesh: Mesh,
    console: Console,
    watch: runtimes.Watch,
) -> None:
    """Certifies the images that have no certificate yet; each group is on disk before the next is begun.

    A group has an image for each step of the axis ``data`` of the mesh; of several processes each takes its share.
    """
    folder, size = config.folder(), mesh.shape["data"]
    process, processes = jax.process_index(), jax.process_count()
    log = lambda message: console.print(message, soft_wrap=True)
    if process == 0:
        certificates.merge(folder, log)
    runtimes.barrier("certificates of before")
    done, labels, certificate, *_ = certificates.read(folder)
    if not np.isin(done, ids).all():
        raise ValueError(
            f"{folder / 'certificates.csv'} is of other images than this run's; delete it to certify again, or pass "
            "--overwrite."
        )
    if 0 < len(done) < len(ids):
        log(f"Resuming after {len(done)} of {len(ids)} certificates in {folder / 'certificates.csv'}.")
    left = np.setdiff1d(ids, done)[process::processes]
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    radius_told = float(measure.radius(0.8413447460685429))  # of a Gaussian: sigma
    radius_told = round(radius_told, 9) if config.target_radius is None else config.target_radius
    certified = int(((certificate.label == labels) & (certificate.radius >= radius_told)).sum())
    compiled, last_line, count, total = False, time.perf_counter(), len(done), len(done) + len(left)
    with certificates.writer(folder, process, processes) as write, command_line.progress_bar(console) as bar:
        task = bar.add_task("", total=total, completed=len(done), task_name="certifying")
        for start in range(0, len(left), size):
            group = left[start : start + size]
            image, label, _ = test[np.resize(group, size)]  # the last group is filled up
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.resize(group, size))
            x = jax.device_put(image, sharding)
            if not compiled:  # so that the seconds below are those of sampling
                certify(keys, x, warm_up=True)
                compiled = True
            started = time.perf_counter()
            predicted, radius, probability, samples = certify(keys, x)
            seconds = (time.perf_counter() - started) / len(group)
            rows = list(zip(group, label, zip(predicted, radius, probability, samples)))
            write([certificates.line_of(*row, seconds) for row in rows])
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
    runtimes.barrier("certificates")
    if process == 0:
        certificates.merge(folder, log)
        missing = len(ids) - len(certificates.read(folder).ids)
        if missing:
            raise ValueError(
                f"{folder / 'certificates.csv'} lacks {missing} of {len(ids)} images: another process may have written "
                "to it; the same command certifies the rest."
            )


def check(config: Config) -> None:
    """Raises ValueError for a setting that is out of its range, before anything is written."""
    positive = (
        "num_selection",
        "num_estimation",
        "skip",
        "num_images",
        "num_epochs",
        "batch_size",
        "grid",
        "image_size",
    )
    for name in positive:
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
    config.objective(num_steps=1)
    if config.checkpoint is not None:
        defaults = Config()
        given = [name for name in OF_TRAINING if getattr(config, name) != getattr(defaults, name)]
        if given:
            raise ValueError(f"{', '.join(given)} must be left out with checkpoint, whose model is trained.")
    if config.dual:
        alone = {
            "noise": "gaussian",
            "norm": None,
            "grid": None,
            "checkpoint": None,
            "sequential": False,
            "target_radius": None,
        }
        for name, value in alone.items():
            if getattr(config, name) != value:
                raise ValueError(f"{name} must be {value} with dual, got {getattr(config, name)}.")
        for name in ("num_selection", "num_estimation"):
            if getattr(config, name) < 2:
                raise ValueError(
                    f"{name} must be at least 2 with dual, one for each half, got {getattr(config, name)}."
                )
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed must lie in [0, 2**32), got {config.seed}.")
    if not all(0 <= radius < float("inf") for radius in config.radii):
        raise ValueError(f"radii must be at least 0 and finite, got {config.radii}.")
    target = config.target_radius
    if target is not None and not 0 <= target < float("inf"):
        raise ValueError(f"target_radius must be 0 or positive and finite, got {target}.")
    if target is not None and any(radius > target for radius in config.radii):
        raise ValueError(
            f"radii must be at most target_radius={target:g}: nothing is known beyond, got {config.radii}."
        )


def run(config: Config, runtime: runtimes.Runtime = runtimes.HERE) -> dict:
    """Trains, certifies and reports, or does what is left of it.

    Returns:
      The summary that is written to ``metrics.json``; empty in all processes but the first.
    """
    stopwatch, console = runtimes.Stopwatch(), runtimes.console()
    check(config)
    theirs: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    if config.checkpoint is not None:
        theirs = folders.settings_of(config.checkpoint, dataset=config.dataset, model=config.model)
    runtime.local_mesh()  # whether there are so many devices
    # The model of a checkpoint normalises as the images say that it was trained on.
    train = data.load(config.dataset, theirs.get("train_split", config.train_split), config.data_dir)
    test = data.load(config.dataset, config.test_split or data.splits(config.dataset).test, config.data_dir)
    ids = np.arange(0, len(test), config.skip)[: config.num_images]
    model_key, train_key, certify_key = jax.random.split(jax.random.key(config.seed), 3)
    if config.image_size is not None:
        shape = (config.image_size, config.image_size, train.image_shape[-1])
        train, test = data.match_images(train, shape), data.match_images(test, shape)
    if config.checkpoint is None:
        recipe = classifiers.recipe_of(config.dataset, config.recipe, config.learning_rate)
        num_steps = classifiers.num_steps(recipe, config.num_epochs, len(train))
        objective = config.objective(num_steps=num_steps)
        settings = {"objective": objective, "recipe": recipe, "num_epochs": config.num_epochs}
    measure = config.measure(math.prod(train.image_shape))
    largest = _report.largest_radius(config, measure)
    if config.target_radius is not None and config.target_radius > largest:
        raise ValueError(
            f"target_radius must be at most {largest:g}, the largest that {config.num_estimation:,} draws can certify "
            f"with {config.noise} noise of sigma {config.sigma:g}, got {config.target_radius:g}."
        )
    functional = classifiers.build(config.model, train, dtype=config.dtype, key=model_key)
    folder = config.folder()
    log = lambda message: console.print(message, soft_wrap=True)
    restored = config.checkpoint and classifiers.restored(config.checkpoint, functional, console, runtime)
    folders.open_run(folder, config, same=SAME, overwrite=config.overwrite)
    parts = {"checkpoints": functional}
    if config.dual:
        parts = dict(zip(("checkpoints-0", "checkpoints-1"), smoothers.halves_of(functional), strict=True))
    with runtimes.watching(runtime, folder, dataclasses.asdict(config)) as watch:
        if restored:
            classifiers.keep_to(restored, folder)
            bases, trained = (restored,), {}
        else:
            found = [
                classifiers.train(
                    folder / name,
                    part,
                    train,
                    key=jax.random.fold_in(train_key, i) if i else train_key,
                    seed=config.seed,
                    runtime=runtime,
                    log=log,
                    watch=functools.partial(watch, "training"),
                    **settings,
                )
                for i, (name, part) in enumerate(parts.items())
            ]
            bases, trained = tuple(classifier for classifier, _ in found), found[-1][1]
        certify = smoothers.procedure_of(config, bases, measure)
        certify_images(
            config, certify_key, certify, measure, test, ids, mesh=runtime.local_mesh(), console=console, watch=watch
        )
    if jax.process_index() != 0:
        return {}
    classifier = smoothers.joined(bases) if config.dual else bases[0]
    summary = _report.summarize(config, measure, classifier.accuracy(test, ids), trained, stopwatch)
    _report.report(config, summary, stopwatch, console)
    return summary
