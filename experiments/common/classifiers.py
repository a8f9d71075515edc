"""Classifiers of the experiments: their images, training, checkpoints and outputs."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from robustjax import _paths, _validate, data, losses, models, perturbations, training
from robustjax.typing import AnyArray, ModelState, Outputs

from . import checks, files, runtimes, subsets

RECIPE_OF = {"digits": "digits", "mnist": "mnist", "cifar10": "cohen_cifar10", "imagenet2012": "cohen_imagenet"}
CACHED_BYTES = 2 * 2**30
"""Training sets up to this size are decoded once and kept as uint8; larger ones stream."""
BLOCK_BYTES = 2**24
"""Largest batch of images on a device, in float32, outside training."""


class Classifier(NamedTuple):
    """A model and its trained arrays, on the devices of this process that share what goes through it; None: one."""

    functional: models.Functional
    state: ModelState
    mesh: Mesh | None = None

    def logits_fn(self) -> jax.tree_util.Partial:
        """``x -> logits``, with the arrays as arguments of whatever is compiled around it."""
        return jax.tree_util.Partial(_logits_of(self.functional.outputs), self.state)

    def place(self, rows: AnyArray) -> AnyArray:
        """Rows split over the devices of the mesh; as they are, where there is none or they do not divide.

        For a single CPU they stay on the host, where rows can be picked and joined without a program for each shape.
        """
        if self.mesh is None or len(rows) % self.mesh.size:
            return rows
        if self.mesh.size == 1 and self.mesh.devices.flat[0].platform == "cpu":
            return rows
        return jax.device_put(rows, NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names)))

    def accuracy(self, dataset: data.Dataset, ids: np.ndarray, batch_size: int = 500) -> float:
        """Share of the images with these ids that are classified correctly, without noise.

        Reads a batch at a time, of at most ``BLOCK_BYTES``.
        """
        size, forward = _in_batches(self, dataset.image_shape, min(batch_size, len(ids)))
        correct = 0
        for start in range(0, len(ids), size):
            block = dataset[ids[start : start + size]]
            correct += int((forward(block.image).logits.argmax(-1) == block.label).sum())
        return correct / len(ids)


@functools.cache  # one function for each architecture, so that compiled programs are shared
def _logits_of(outputs: Callable) -> Callable:
    return lambda state, x: outputs(state, x).logits


def recipe_of(dataset: str, recipe: str | None, learning_rate: float | None = None) -> training.Recipe:
    """The recipe of that name, for None the literature's for the data set; with ``learning_rate`` if it is given."""
    known = ", ".join(training.RECIPES)
    name = RECIPE_OF.get(dataset.split(":")[0]) if recipe is None else recipe
    if name is None:
        raise ValueError(f"recipe must be named for the data set {dataset!r}, one of {known}.")
    if name not in training.RECIPES:
        raise ValueError(f"recipe must be one of {known}, got {recipe!r}.")
    found = training.RECIPES[name]
    return found if learning_rate is None else dataclasses.replace(found, learning_rate=learning_rate)


def build(model: str, dataset: data.Dataset, *, dtype: str, key: jax.Array) -> models.Functional:
    """The untrained model for a data set's images, classes and normalisation."""
    if not dataset.num_classes:
        raise ValueError(
            f"dataset {dataset.name!r} must have labels with a known number of classes to train a classifier."
        )
    mean, std = data.channel_statistics(dataset)
    settings = {"image_shape": dataset.image_shape, "num_classes": dataset.num_classes, "mean": mean, "std": std}
    with checks.renamed("name", "model"):
        return models.functional(models.create(model, key, dtype=jnp.dtype(dtype), **settings))


def outputs_of(classifier: Classifier, images: AnyArray, batch_size: int = 500) -> Outputs:
    """Logits and features of all images, on the host; one compilation, the last batch filled up.

    A batch takes at most ``BLOCK_BYTES`` of each device.
    """
    size, forward = _in_batches(classifier, images.shape[1:], batch_size)
    parts = [forward(images[start : start + size]) for start in range(0, len(images), size)]
    columns: Any = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Outputs(*columns)


def check_each_row(classifier: Classifier, images: AnyArray, logits: AnyArray) -> None:
    """Raises ValueError for a model whose logits of these images are others beside other images: one more batch."""
    size, forward = _in_batches(classifier, images.shape[1:], 500)
    rows = np.arange(-(-size // 2)) % len(images)
    beside_others = np.repeat(images[rows], 2, axis=0)[:size]
    beside_others[1::2] = _validate.unlike(beside_others[1::2])
    if not _validate.same_rows(logits[rows], forward(beside_others).logits[::2]).all():
        raise _validate.depends_on_batch("model")


def _in_batches(
    classifier: Classifier, image_shape: tuple[int, ...], batch_size: int
) -> tuple[int, Callable[[AnyArray], Outputs]]:
    """The batch size, and a function from at most that many images to outputs on the host."""
    devices = 1 if classifier.mesh is None else classifier.mesh.size
    at_most = max(1, BLOCK_BYTES // (4 * math.prod(image_shape)))
    size = min(-(-batch_size // devices), at_most) * devices
    outputs = jax.jit(classifier.functional.outputs)

    def forward(images: AnyArray) -> Outputs:
        filled = np.pad(images, ((0, size - len(images)), *((0, 0),) * 3))
        columns: Any = [np.asarray(a)[: len(images)] for a in outputs(classifier.state, classifier.place(filled))]
        return Outputs(*columns)

    return size, forward


def augmentation() -> losses.Augment:
    """Random crops and flips."""
    return perturbations.compose(perturbations.random_crop, perturbations.random_horizontal_flip)


def restored(checkpoint: str, functional: models.Functional, runtime: runtimes.Runtime = runtimes.HERE) -> Classifier:
    """The trained classifier of another run; the first where that run has several."""
    run = _paths.path_of(checkpoint=checkpoint)
    folders = [run / "checkpoints", run / "seed-0" / "fine_tuning", run / "seed-0" / "checkpoints"]
    found = next((folder for folder in folders if folder.is_dir()), folders[0])
    if found.is_dir() and not any((run / name).exists() for name in ("metrics.json", "metrics.csv")):
        runtimes.log(f"{run} has no results yet: its training may be unfinished.")
    state, mesh = training.restore_model(found, functional.state, log=runtimes.log), runtime.local_mesh()
    return Classifier(functional, runtimes.on_mesh(state, mesh), mesh)


def keep_to(folder: epath.Path, weights: Any, images: Sequence[data.Dataset]) -> None:
    """Records what the results in a folder are of: arrays, and data sets by their size and some of their images.

    The images include those of the training: a model normalises by their statistics, which are not among its weights.

    Raises:
      ValueError: the folder holds results of other weights or images.
    """
    if jax.process_index() != 0:
        return
    path, leaves = folder / "model.json", jax.tree.leaves(weights)
    some = [part for of in images for i in subsets.evenly(len(of), 4) for part in of[i : i + 1][:2]]  # one at a time
    ours = {"crc32": digest(leaves), "images": digest([*some, *(np.asarray(len(of)) for of in images)])}
    if not path.exists():
        files.write_whole(path, json.dumps(ours) + "\n")
        return
    theirs = files.read_json(path, advice="pass --overwrite to start again")
    if theirs.get("crc32") != ours["crc32"]:
        raise ValueError(
            f"checkpoint must hold the model that the run in {folder} began with, but its weights have changed: "
            "trained again, or the last checkpoint is damaged; choose another --name, or pass --overwrite."
        )
    if theirs.get("images", ours["images"]) != ours["images"]:
        source = "dataset" if any(of.name.startswith(("arrays:", "folder:")) for of in images) else "data_dir"
        raise ValueError(
            f"{source} must hold the images that the run in {folder} began with, but some have changed; choose another "
            "--name, or pass --overwrite to start again."
        )


def digest(arrays: Iterable[Any]) -> int:
    """CRC-32 of the bytes of all arrays."""
    plain = lambda a: jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a  # of dropout layers
    return functools.reduce(lambda found, array: zlib.crc32(np.asarray(plain(array)).tobytes(), found), arrays, 0)


@functools.cache  # equal ones share compiled steps
def optimizer_of(recipe: training.Recipe, steps_per_epoch: int, num_epochs: int) -> optax.GradientTransformation:
    """The optimizer of a recipe."""
    return recipe.optimizer(steps_per_epoch, num_epochs)


def num_steps(recipe: training.Recipe, num_epochs: int | None, size: int) -> int:
    """Steps of a training on ``size`` images; for None in as many epochs as the recipe has."""
    return size // min(recipe.batch_size, size) * (recipe.num_epochs if num_epochs is None else num_epochs)


def train(
    folder: epath.Path | None,
    functional: models.Functional,
    dataset: data.Dataset,
    *,
    key: jax.Array,
    objective: losses.Objective,
    recipe: training.Recipe,
    num_epochs: int | None,
    seed: int,
    log: Callable[[str], None] = runtimes.log,
    outliers: data.Dataset | None = None,
    optimizer: optax.GradientTransformation | None = None,
    runtime: runtimes.Runtime = runtimes.HERE,
    watch: Callable[[int, int, Mapping[str, float]], None] | None = None,
) -> tuple[Classifier, dict[str, float]]:
    """Trains by a recipe, or resumes the training whose checkpoints are in the folder; None keeps none.

    With ``outliers``, each batch is joined by as many of them, or by all if there are fewer; ``optimizer`` takes the
    place of the recipe's. ``watch`` receives the number of all steps, the step and its numbers.

    Returns:
      The classifier, on the devices of this process that ``runtime`` names; and the loss and accuracy of the last
      steps, with the seconds that this call took.
    """
    started = time.perf_counter()
    num_epochs = recipe.num_epochs if num_epochs is None else num_epochs
    batch_size = min(recipe.batch_size, len(dataset))
    steps_per_epoch = len(dataset) // batch_size
    if batch_size % (devices := runtime.global_mesh().size):
        raise ValueError(
            f"mesh must have a number of devices that divides the batch of {batch_size} images, got {devices}; choose "
            "it by --mesh data=N."
        )
    if recipe.augment:
        objective = losses.augmented(augmentation(), objective)
    optimizer = optimizer_of(recipe, steps_per_epoch, num_epochs) if optimizer is None else optimizer
    total = num_steps(recipe, num_epochs, len(dataset))
    if len(dataset) * math.prod(dataset.image_shape) <= CACHED_BYTES:
        dataset = dataset.cached()
    batches = data.batches(dataset, batch_size, seed=seed)
    if outliers is not None:
        outlier_batches = data.batches(outliers.cached(), min(batch_size, len(outliers)), seed=seed)
        batches = data.with_outliers(batches, outlier_batches)
    with runtimes.deferred_sigterm() as stop:
        result = training.fit(
            functional.apply,
            training.init(key, functional.state, optimizer),
            batches,
            objective=objective,
            optimizer=optimizer,
            num_steps=total,
            folder=folder,
            checkpoint_every=max(100, 2 * steps_per_epoch),
            mesh=runtime.global_mesh(),
            progress=folder is not None,
            stop=stop,
            on_metrics=None if watch is None else functools.partial(watch, total),
            log=log,
            config={"seed": seed},  # the checkpoints of a seed are of no use to another
        )
    last = {name: float(column[-1]) for name, column in result.history.items() if name != "step"}
    mesh = runtime.local_mesh()
    return Classifier(functional, runtimes.on_mesh(result.state.model, mesh), mesh), {
        **last,
        "seconds": time.perf_counter() - started,
    }
