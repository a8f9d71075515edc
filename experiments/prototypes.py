"""Trains networks of prototypes with a margin and for their certified radius, certifies and attacks both.

The networks of Saralajew et al. (arXiv 2412.15499) answer by distances to prototypes in the space of images, and their
l2 radius is a formula: certifying takes one prediction. Leaves results/prototypes/NAME with config.json, what came of
each loss and seed, metrics.csv, metrics.json, report.md and figures: certified accuracy, and the prototypes with their
weights. The same command continues a run that was interrupted.

    python -m experiments.prototypes
    python -m experiments.prototypes --reasoning cbc --num-reasonings 2 --smoothing new
    python -m experiments.prototypes --dataset mnist --data-dir DIR --smoothing results/smoothing/mnist-cnn-0.5
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from rich.console import Console

from experiments import _prototypes_report, smoothing
from experiments._prototypes_report import BEYOND, RANDOM_DRAWS, WITHIN
from experiments.common import classifiers, command_line, files, folders, runtimes, subsets
from robustjax import attacks, certification, data, losses, models, training

ATTACK_LOSSES = ("cross_entropy", "margin")
"""What PGD raises; each has its own restarts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a run; radii are l2, in units of [0, 1] pixels."""

    dataset: str = "digits"
    """digits (embedded), or any prepared TFDS data set with image and label."""
    data_dir: str | None = None
    """Folder of prepared TFDS data sets; None: $TFDS_DATA_DIR, else TFDS's own."""
    train_split: str = "train"
    """Images to train on, in TFDS syntax. To choose settings: 'train[:80%]' here and 'train[80%:]' to certify."""
    test_split: str | None = None
    """Images to certify, in TFDS syntax; None: the data set's test split."""
    reasoning: Literal["rbf", "cbc"] = "rbf"
    """rbf: what is there speaks for a class; cbc: what is not there may, too."""
    num_components: int = 10
    """Prototypes for each class; they start as training images of it."""
    num_reasonings: int = 1
    """Sets of weights for each class, the best of which counts."""
    losses: tuple[Literal["margin", "radius", "published_radius"], ...] = ("margin", "radius", "published_radius")
    """What is minimised: a hinge on probabilities, or minus the certified radius, ours or as published."""
    margin: float = 0.3
    """Of the hinge."""
    target: float | None = None
    """Radius beyond which more is not asked for; None: there is none."""
    num_epochs: int = 40
    """Passes over the training images."""
    learning_rate: float = 0.03
    """Of Adam, at the start; falls to 0 along half a cosine."""
    batch_size: int = 128
    """Images in a step of training."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of prototypes to start with, weights and order of batches; one network for each and each loss."""
    num_images: int = 500
    """Attack at most so many images, evenly spaced; all are certified."""
    attack_steps: int = 40
    """Of each of two restarts of PGD, on cross-entropy and again on the margin."""
    radii: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5)
    """Radii of the table."""
    smoothing: str | None = None
    """Run of experiments.smoothing to draw beside; new: make one, of 1,000 draws; None: none."""
    sigma: float = 0.5
    """Standard deviation of the noise of a new one, in [0, 1] pixels."""
    results_dir: str = "results"
    """Where run folders go."""
    name: str | None = None
    """Name of the run folder; None: made of data set and network."""
    overwrite: bool = False
    """Delete the run that is in the folder and start anew."""

    def folder(self) -> epath.Path:
        """The run folder."""
        dataset = self.dataset.replace("/", "-").replace(":", "-")
        name = self.name if self.name is not None else f"{dataset}-{self.reasoning}-{self.num_components}"
        if name in ("", ".", "..") or epath.Path(name).name != name:
            raise ValueError(f"name must be the name of a folder, got {name!r}.")
        return epath.Path(self.results_dir) / "prototypes" / name


SAME = ("results_dir", "name", "overwrite", "data_dir", "losses", "seeds", "radii", "smoothing", "sigma")


def objective_of(config: Config, loss: str) -> losses.Objective:
    """What a network is trained with."""
    if loss == "margin":
        return losses.prototype_margin(margin=config.margin)
    return losses.prototype_radius(target=config.target, cancel=loss == "radius")


def check(config: Config) -> None:
    """Raises ValueError for what can be told without data."""
    for name in ("num_components", "num_reasonings", "num_epochs", "batch_size", "num_images", "attack_steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {getattr(config, name)}.")
    if not 0 < config.learning_rate < math.inf:
        raise ValueError(f"learning_rate must be positive and finite, got {config.learning_rate}.")
    for name in ("losses", "seeds", "radii"):
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} must hold at least one value, and each once, got {values}.")
    if not all(0 <= seed < 2**32 for seed in config.seeds):
        raise ValueError(f"seeds must lie in [0, 2**32), got {config.seeds}.")
    if not all(0 <= radius < math.inf for radius in config.radii):
        raise ValueError(f"radii must be at least 0 and finite, got {config.radii}.")
    if config.smoothing not in (None, "new") and not (epath.Path(config.smoothing) / "certificates.csv").exists():
        raise ValueError(
            f"smoothing must be a run of experiments.smoothing, {config.smoothing} has no certificates.csv."
        )
    for loss in config.losses:
        objective_of(config, loss)


class _Recipe(training.Recipe):
    def optimizer(self, steps_per_epoch: int, num_epochs: int | None = None) -> optax.GradientTransformation:
        return optax.chain(super().optimizer(steps_per_epoch, num_epochs), _within_images())


def _within_images() -> optax.GradientTransformation:
    """Keeps components images: cuts each step short where it would leave [0, 1]."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        old = params["components"]
        new = jnp.clip(old + updates["components"], 0.0, 1.0)
        return {**updates, "components": new - old}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def build(config: Config, train: data.Dataset, labels: np.ndarray, seed: int) -> models.Functional:
    """The network before training, from some images of each class."""
    rng, members = np.random.default_rng(seed), [np.flatnonzero(labels == c) for c in range(train.num_classes)]
    if min(map(len, members)) < config.num_components:
        least = min(map(len, members))
        raise ValueError(
            f"num_components must be at most {least}, the images of the smallest class, got {config.num_components}."
        )
    start = train[np.concatenate([rng.choice(ids, config.num_components, replace=False) for ids in members])]
    module = models.prototypes.classifier(
        jax.random.key(seed), start.image, start.label,
        num_classes=train.num_classes, reasoning=config.reasoning, num_reasonings=config.num_reasonings,
    )  # fmt: skip
    return models.functional(module)


@jax.jit(static_argnames="attack")
def _fooled(attack, keys, logits_fn, image, label, epsilon):
    def one(key, x, y, epsilon):
        return attack.perturb(key[None], logits_fn, x[None], y[None], epsilon)[0]

    return logits_fn(jax.vmap(one)(keys, image, label, epsilon)).argmax(-1) != label  # each at a radius of its own


@jax.jit
def _fooled_at_random(keys, logits_fn, image, label, epsilon):
    def draw(key):
        noise = jax.random.normal(key, image.shape, image.dtype)
        length = jnp.sqrt(jnp.square(noise).sum((1, 2, 3), keepdims=True))
        return logits_fn(image + epsilon.reshape(-1, 1, 1, 1) * noise / length).argmax(-1) != label

    return jax.lax.map(draw, keys).any(0)


def attacked(
    key: jax.Array, logits_fn: Any, image: np.ndarray, label: np.ndarray, radius: np.ndarray, steps: int
) -> dict[str, np.ndarray]:
    """Whether attacks of l2 norm ``radius``, and of multiples, change the answers, ``(n,)`` each."""
    pgd_key, random_key = jax.random.split(key)
    keys = jax.random.split(pgd_key, len(image))
    fooled = {}
    for factor in (WITHIN, *BEYOND):
        at = (keys, logits_fn, image, label, (factor * radius).astype(np.float32))
        found = np.zeros(len(image), bool)
        for loss in ATTACK_LOSSES:
            attack = attacks.pgd(epsilon=0.0, norm="l2", steps=steps, restarts=2, loss=loss)
            found |= np.asarray(_fooled(attack, *at))
        fooled[f"pgd_{factor:g}"] = found
    at = (jax.random.split(random_key, RANDOM_DRAWS), logits_fn, image, label, (WITHIN * radius).astype(np.float32))
    return fooled | {"random": np.asarray(_fooled_at_random(*at))}


def network_of(
    config: Config, loss: str, seed: int, train: data.Dataset, labels: np.ndarray, test: data.Dataset, console: Console
) -> dict[str, np.ndarray]:
    """What came of a loss and a seed: what is on disk, or what training, certifying and attacking give now."""
    folder = config.folder() / f"{loss}-{seed}"
    path = folder / "certificates.npz"
    if path.exists():
        return files.read_arrays(path)
    train_key, attack_key = jax.random.split(jax.random.key(seed))
    recipe = _Recipe(
        algorithm="adam",
        learning_rate=config.learning_rate,
        schedule="cosine",
        batch_size=config.batch_size,
        num_epochs=config.num_epochs,
    )
    classifier, last = classifiers.train(
        folder / "checkpoints",
        build(config, train, labels, seed),
        train,
        key=train_key,
        objective=objective_of(config, loss),
        recipe=recipe,
        num_epochs=None,
        seed=seed,
        log=lambda message: console.print(message, soft_wrap=True),
    )
    network = models.prototypes.network(classifier.state.params)
    image, label, ids = (np.asarray(part) for part in test[:])
    certify = functools.partial(certification.prototypes.radius, network, image, label)
    certify()  # compiled
    started = time.perf_counter()
    radius = np.asarray(certify().radius)
    seconds = time.perf_counter() - started
    published = np.asarray(certify(cancel=False).radius)
    answer = classifiers.outputs_of(classifier, image).logits.argmax(-1)
    rows = subsets.evenly(len(ids), config.num_images)
    # Of one size for all networks, so that one program serves; those without a radius are left out of what it gives.
    at = (image[rows], label[rows], np.maximum(radius[rows], 0.0))
    found = attacked(attack_key, classifier.logits_fn(), *at, config.attack_steps)
    certified = radius[rows] > 0
    arrays = {"id": ids, "label": label, "answer": answer, "radius": radius, "published_radius": published}
    arrays |= {"attacked": ids[rows][certified]}
    arrays |= {f"fooled_{name}": values[certified] for name, values in found.items()}
    arrays |= {"scale": network.scale, "seconds": last["seconds"], "certifying_seconds": seconds}
    arrays |= {name: getattr(network, name) for name in ("components", "positive", "negative")}
    files.write_arrays(path, arrays)
    console.print(f"{loss}, seed {seed}: mean certified radius {np.maximum(radius, 0).mean():.3f}", highlight=False)
    return files.read_arrays(path)


def smoothing_run(config: Config) -> epath.Path | None:
    """The folder of the run of randomized smoothing, which is made or continued where a new one is asked for."""
    if config.smoothing != "new":
        return None if config.smoothing is None else epath.Path(config.smoothing)
    beside = smoothing.Config(
        **{name: getattr(config, name) for name in ("dataset", "data_dir", "train_split", "test_split", "sigma")},
        num_estimation=1000, num_images=config.num_images, results_dir=str(config.folder()),
    )  # fmt: skip
    smoothing.run(beside)
    return beside.folder()


def run(config: Config) -> list[dict[str, Any]]:
    """Trains, certifies and attacks, or does what is left of it, and reports.

    Returns:
      The rows of metrics.csv.
    """
    check(config)
    folder = config.folder()
    console = runtimes.console()
    train = data.load(config.dataset, config.train_split, config.data_dir).cached()
    test = data.load(config.dataset, config.test_split or data.splits(config.dataset).test, config.data_dir).cached()
    labels = np.asarray(train[:].label)
    build(config, train, labels, config.seeds[0])  # settings that do not fit the data end here
    folders.open_run(folder, config, same=SAME, overwrite=config.overwrite)
    beside = smoothing_run(config)
    results = {
        (loss, seed): network_of(config, loss, seed, train, labels, test, console)
        for seed in config.seeds
        for loss in config.losses
    }
    return _prototypes_report.report(config, results, train.image_shape, beside, console)


if __name__ == "__main__":
    command_line.command_line(Config, run, __doc__)
