"""Mixes an accurate and a robust classifier, and tells what the mixture keeps of each.

Two mixtures, for each seed: with an adversarially trained classifier, by a fixed share and by a network, attacked as a
whole; and with a smoothed classifier, by a fixed share, certified. Leaves results/mixing/NAME with config.json, a
folder for each seed, metrics.json, metrics.csv, report.md and figures. The same command continues a run that was
interrupted: seeds that are done are not done again.

    python -m experiments.mixing
    python -m experiments.mixing --dataset mnist --data-dir DIR --num-images 200 --num-certified 200
    python -m experiments.mixing --train-split 'train[:80%]' --test-split 'train[80%:]' --robust-scale 0.5
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from rich.console import Console

from experiments import _mixing_certificates, _mixing_report
from experiments.common import adversaries, classifiers, command_line, files, folders, runtimes, subsets
from robustjax import attacks, data, losses, models, training
from robustjax.certification import mixing

BLOCK = 250
NETWORK = training.Recipe(algorithm="adam", learning_rate=1e-3, schedule="cosine", batch_size=128, num_epochs=20)
"""Of the mixing network; the authors' is AdamW at 5e-5 for 3 epochs of CIFAR-10."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a run; radii are in units of [0, 1] pixels, alpha is the share of the robust classifier."""

    dataset: str = "digits"
    """digits (embedded), or any prepared TFDS data set with image and label."""
    data_dir: str | None = None
    """Folder of prepared TFDS data sets; None: $TFDS_DATA_DIR, else TFDS's own."""
    train_split: str = "train"
    """Images to train on, in TFDS syntax. To choose settings: 'train[:80%]' here and 'train[80%:]' to test."""
    test_split: str | None = None
    """Images to test on, in TFDS syntax; None: the data set's test split."""
    model: str = "cnn"
    """All three classifiers: mlp, lenet, cnn, strided_cnn, resnet20 and others, see experiments.adversarial."""
    recipe: str | None = None
    """Training recipe, see experiments.smoothing; None: the one of the data set."""
    num_epochs: int | None = None
    """Passes over the training images, of all three; None: as the recipe, but 25 for adversarial training on digits."""
    epsilon: str | None = None
    """Linf radius of adversarial training and of the attacks, such as 0.15 or 8/255; None: by data set."""
    alphas: tuple[float, ...] = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
    """Fixed shares of the robust classifier."""
    low: float = 0.84
    """Least share that the network gives to the robust classifier."""
    high: float = 0.99
    """Its largest share."""
    standard_scale: float = 1.0
    """Multiplies the logits of the accurate classifier before they are mixed."""
    robust_scale: float = 1.0
    """And those of the robust one."""
    network_epochs: int = NETWORK.num_epochs
    """Passes over the training images for the mixing network."""
    gamma_weight: float = 0.0
    """Weight of gamma in what the adversary raises in training. With 0.2, the mean of the authors' draws, a network
    on digits could not tell attacked images from clean ones."""
    steps: int = 100
    """Of each APGD; those of training are 10."""
    autoattack: bool = True
    """Whether AutoAttack is run on the robust classifier and on the mixture by network."""
    num_images: int | None = None
    """Attack at most so many images, evenly spaced; None: all, but 64 of the digits."""
    sigma: float = 0.5
    """Standard deviation of the noise of the smoothed classifier, in training and in use."""
    certified_alpha: float = 0.76
    """Its share in the mixture that is certified, above 1/2."""
    num_selection: int = 100
    """Noisy copies that select the class."""
    num_estimation: int = 10_000
    """Noisy copies that bound its probability."""
    failure: float = 0.001
    """Probability, for each image, that its certificate is wrong."""
    num_certified: int | None = None
    """Certify at most so many images, evenly spaced; None: all, but 100 of the digits."""
    seeds: int = 3
    """Number of seeds."""
    seed: int = 0
    """The first of them."""
    results_dir: str = "results"
    """Where run folders go."""
    name: str | None = None
    """Name of the run folder; None: made of data set, model and epsilon."""
    overwrite: bool = False
    """Delete the run that is in the folder and start anew."""


SAME = ("results_dir", "name", "overwrite", "data_dir", "seeds")


def resolved(config: Config) -> Config:
    """The config with what its defaults stand for, after a check of all that can be checked without data."""
    least = {"num_epochs", "network_epochs", "steps", "num_images", "num_selection", "num_estimation", "num_certified"}
    for name in sorted(least | {"seeds"}):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value}.")
    if not config.alphas or not all(0 <= alpha <= 1 for alpha in config.alphas):
        raise ValueError(f"alphas must be one or more numbers in [0, 1], got {config.alphas}.")
    if not 0.5 < config.certified_alpha <= 1:
        raise ValueError(f"certified_alpha must be above 1/2 and at most 1, got {config.certified_alpha}.")
    if not 0 <= config.low <= config.high <= 1:
        raise ValueError(f"low and high must be 0 <= low <= high <= 1, got {config.low} and {config.high}.")
    for name in ("sigma", "standard_scale", "robust_scale"):
        if not 0 < getattr(config, name) < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {getattr(config, name)}.")
    if not 0 <= config.gamma_weight <= 1:
        raise ValueError(f"gamma_weight must lie in [0, 1], got {config.gamma_weight}.")
    if not 0 < config.failure < 1:
        raise ValueError(f"failure must lie strictly between 0 and 1, got {config.failure}.")
    if not 0 <= config.seed < 2**32 - config.seeds:
        raise ValueError(f"seed must lie in [0, 2**32), got {config.seed}.")
    digits = config.dataset == "digits"
    return dataclasses.replace(
        config,
        epsilon=adversaries.default("train_epsilon", config.epsilon, config.dataset, "linf"),
        num_images=config.num_images or (64 if digits else None),
        num_certified=config.num_certified or (100 if digits else None),
    )


def folder_of(config: Config) -> epath.Path:
    """The run folder."""
    parts = (config.dataset.replace("/", "-").replace(":", "-"), config.model, str(config.epsilon).replace("/", "_"))
    name = config.name if config.name is not None else "-".join(parts)
    if name in ("", ".", "..") or epath.Path(name).name != name:
        raise ValueError(f"name must be the name of a folder, got {name!r}.")
    return epath.Path(config.results_dir) / "mixing" / name


def train(
    config: Config, seed: int, images: data.Dataset, key: jax.Array, console: Console
) -> tuple[dict[str, classifiers.Classifier], mixing.mixture, Any]:
    """The three classifiers by name, the mixture of the first two, and its trained state."""
    folder, recipe = folder_of(config) / f"seed-{seed}", classifiers.recipe_of(config.dataset, config.recipe)
    (epsilon,) = adversaries.epsilons_of(str(config.epsilon))
    attack = attacks.pgd(epsilon=epsilon, steps=10, keep="last")
    objectives = {
        "standard": losses.standard(),
        "robust": losses.adversarial.adversarial_training(attack=attack),
        "smoothed": losses.smoothing.gaussian_augmentation(sigma=config.sigma),
    }
    log, found = (lambda message: console.print(message, soft_wrap=True)), {}
    for index, (name, objective) in enumerate(objectives.items()):
        model_key, train_key = jax.random.split(jax.random.fold_in(key, index))
        found[name], _ = classifiers.train(
            folder / name,
            classifiers.build(config.model, images, dtype="float32", key=model_key),
            images,
            key=train_key,
            objective=objective,
            recipe=recipe,
            num_epochs=config.num_epochs or (25 if name == "robust" and config.dataset == "digits" else None),
            seed=seed,
            log=log,
        )
    standard, robust = found["standard"], found["robust"]
    seen = jax.eval_shape(standard.functional.outputs, standard.state, jnp.zeros((1, *images.image_shape)))
    model_key, train_key = jax.random.split(jax.random.fold_in(key, len(objectives)))
    num_inputs = 2 * sum(part.shape[-1] for part in seen)
    network = models.functional(models.mixing_network(model_key, num_inputs=num_inputs))
    mixture = mixing.mixture(
        standard=standard.functional.apply,
        robust=robust.functional.apply,
        network=network.apply,
        low=config.low,
        high=config.high,
        standard_scale=config.standard_scale,
        robust_scale=config.robust_scale,
    )
    adversary = dataclasses.replace(attack, loss=losses.adaptive_cross_entropy(weight=config.gamma_weight))
    trained, _ = classifiers.train(
        folder / "network",
        network._replace(apply=mixture, state=mixture.init(standard.state, robust.state, network.state)),
        images,
        key=train_key,
        objective=losses.mixing_training(attack=adversary),
        recipe=dataclasses.replace(NETWORK, augment=recipe.augment),
        num_epochs=config.network_epochs,
        seed=seed,
        log=log,
    )
    return found, mixture, trained.state


@functools.cache  # one function for all shares
def _fixed(standard: Callable, robust: Callable, standard_scale: float, robust_scale: float) -> Callable:
    def logits(states, alpha, x):
        parts = (outputs(state, x).logits for outputs, state in zip((standard, robust), states))
        return mixing.mix(*parts, alpha=alpha, standard_scale=standard_scale, robust_scale=robust_scale)

    return logits


@functools.cache
def _blind(mixture: mixing.mixture) -> mixing.mixture:
    """The mixture as an attack sees it that takes alpha for a constant."""

    def network(state, x, *, train=False):
        return jax.lax.stop_gradient(mixture.network(state, x, train=train)[0]), state

    return dataclasses.replace(mixture, network=network)


def answers_of(logits_fn: Callable, image: np.ndarray) -> np.ndarray:
    """The classes of images, in blocks of one size."""
    parts = []
    for start in range(0, len(image), BLOCK):
        rows = np.minimum(np.arange(start, start + BLOCK), len(image) - 1)
        logits = np.asarray(_logits(logits_fn, image[rows]))
        if not np.isfinite(logits).all():
            raise ValueError(f"logits are not finite at {int((~np.isfinite(logits)).any(-1).sum())} of {BLOCK} images.")
        parts.append(logits.argmax(-1))
    return np.concatenate(parts)[: len(image)]


@jax.jit
def _logits(logits_fn, x):
    return logits_fn(x)


def stands(
    key: jax.Array, attack: Any, seen: Callable, image: np.ndarray, label: np.ndarray, whole: Callable | None = None
) -> np.ndarray:
    """Which answers of ``whole`` are right, of the images and of what an attack on ``seen`` makes of them."""
    whole, size, parts = whole or seen, min(BLOCK, len(image)), []
    for start in range(0, len(image), size):
        rows = np.minimum(np.arange(start, start + size), len(image) - 1)
        parts.append(np.asarray(attack(key, seen, image[rows], label[rows])))
    x_adv = np.concatenate(parts)[: len(image)]
    return (answers_of(whole, image) == label) & (answers_of(whole, x_adv) == label)


def attacks_of(config: Config, num_classes: int) -> dict[str, Any]:
    """What the mixtures are attacked with, by name."""
    (epsilon,) = adversaries.epsilons_of(str(config.epsilon))
    settings = {"epsilon": epsilon, "steps": config.steps}
    plain, targeted = attacks.apgd(**settings), attacks.apgd_targeted(**settings, num_targets=min(9, num_classes - 1))
    return {
        "ce": plain,
        "apgd": attacks.worst_of(plain, targeted),
        "gamma": attacks.apgd(**settings, loss=losses.adaptive_cross_entropy(weight=0.4)),
        "autoattack": attacks.autoattack(epsilon=epsilon),
    }


def trade_off(
    config: Config,
    found: dict[str, classifiers.Classifier],
    mixture: mixing.mixture,
    state: Any,
    test: data.Dataset,
    key: jax.Array,
) -> list[dict]:
    """Accuracy on all test images, and what attacks leave of it on some, for each fixed share and for the network."""
    image, label, _ = (np.asarray(part) for part in test[np.arange(len(test))])
    chosen = subsets.evenly(len(test), config.num_images or len(test))
    few = image[chosen], label[chosen]
    attack = attacks_of(config, test.num_classes)
    standard, robust = found["standard"], found["robust"]
    outputs = standard.functional.outputs, robust.functional.outputs
    fixed = _fixed(*outputs, config.standard_scale, config.robust_scale)
    rows = []
    for alpha in config.alphas:
        logits_fn = jax.tree_util.Partial(fixed, (standard.state, robust.state), jnp.float32(alpha))
        row = {"mixture": "fixed", "alpha": alpha, "clean": float((answers_of(logits_fn, image) == label).mean())}
        row["apgd"] = float(stands(key, attack["apgd"], logits_fn, *few).mean())
        if config.autoattack and alpha == 1:
            row["autoattack"] = float(stands(key, attack["autoattack"], logits_fn, *few).mean())
        rows.append(row)
    logits_fn = mixture.logits_fn(state)
    row = {"mixture": "network", "clean": float((answers_of(logits_fn, image) == label).mean())}
    left = {"apgd": stands(key, attack["apgd"], logits_fn, *few)}
    left["gamma"] = stands(key, attack["gamma"], logits_fn, *few)
    blind = _blind(mixture).logits_fn(state)
    row["detached"] = float(stands(key, attack["ce"], blind, *few, whole=logits_fn).mean())
    row["attached"] = float(stands(key, attack["ce"], logits_fn, *few).mean())
    if config.autoattack:
        left["autoattack"] = stands(key, attack["autoattack"], logits_fn, *few)
    row |= {name: float(correct.mean()) for name, correct in left.items()}
    return [*rows, row | {"all": float(np.all([*left.values()], axis=0).mean())}]


def run(config: Config) -> dict:
    """Trains, attacks, certifies and reports, or does what is left of it.

    Returns:
      The content of metrics.json.
    """
    stopwatch, console = runtimes.Stopwatch(), runtimes.console()
    config = resolved(config)
    folder = folder_of(config)
    test_split = config.test_split or data.splits(config.dataset).test
    images, test = (data.load(config.dataset, split, config.data_dir) for split in (config.train_split, test_split))
    folders.open_run(folder, config, same=SAME, overwrite=config.overwrite)
    of_seeds = {}
    for seed in range(config.seed, config.seed + config.seeds):
        path, arrays = folder / f"seed-{seed}" / "metrics.json", folder / f"seed-{seed}" / "certificates.npz"
        if not path.exists():
            train_key, attack_key, certify_key = jax.random.split(jax.random.key(seed), 3)
            found, mixture, state = train(config, seed, images, train_key, console)
            rows = trade_off(config, found, mixture, state, test, attack_key)
            files.write_arrays(arrays, _mixing_certificates.certify(config, found, test, certify_key))
            files.write_whole(path, json.dumps(rows, indent=1) + "\n")
            console.print(f"Seed {seed} is done, {stopwatch.seconds()['total']:,.0f} s since the start.")
        of_seeds[seed] = json.loads(path.read_text()), files.read_arrays(arrays)
    return _mixing_report.report(config, folder, of_seeds, stopwatch, console)


if __name__ == "__main__":
    command_line.command_line(Config, run, __doc__)
