"""Trains a classifier, attacks it and tells how much of its accuracy is left, at each radius and under each attack.

Leaves results/adversarial/NAME with config.json, the adversarial images of every attack, metrics.csv, report.md and
figures. The same command continues a run that was interrupted. With other attacks, radii or norms it makes what is not
there yet, and reports what it was asked for.

    python -m experiments.adversarial
    python -m experiments.adversarial --training trades --norms l2 --epsilons 0.25,0.5,1
    python -m experiments.adversarial --dataset cifar10 --data-dir DIR --model resnet20 --epsilons 2/255,8/255
    python -m experiments.adversarial --checkpoint results/smoothing/digits-cnn-0.5 --smoothed --sigma 0.5
    python -m experiments.adversarial --training intervals --certify-intervals
    python -m experiments.adversarial --list
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Literal

import jax
import numpy as np
from etils import epath
from rich.console import Console

from experiments.adversarial import _report, _sanity
from experiments.common import adversaries, classifiers, files, folders, runtimes, subsets
from experiments.common.targets import ALPHA, NUM_ESTIMATION, Target
from robustjax import certification

Norm = Literal["linf", "l2", "l1"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a run; every radius is in units of [0, 1] pixels and of its norm."""

    dataset: str = "digits"
    """digits (embedded), or any prepared TFDS data set with image and label."""
    data_dir: str | None = None
    """Folder of prepared TFDS data sets; None: $TFDS_DATA_DIR, else TFDS's own."""
    train_split: str = "train"
    """Images to train on, in TFDS syntax. To choose settings: 'train[:90%]' here and 'train[90%:]' to attack."""
    test_split: str | None = None
    """Images to attack, in TFDS syntax; None: the data set's test split."""
    model: str = "cnn"
    """mlp, lenet, cnn, strided_cnn, resnet20, resnet56, resnet110, wide_resnet, resnet18 or resnet50."""
    recipe: str | None = None
    """Training recipe, see experiments.smoothing; None: the one of the data set."""
    num_epochs: int | None = None
    """Passes over the training images; None: as the recipe, but 25 where digits are trained on adversarial images."""
    training: Literal[*adversaries.TRAINING] | None = None  # pyrefly: ignore
    """What is minimised; pgd is adversarial training. None: pgd, or gaussian (noise of --sigma) where smoothed."""
    train_norm: Norm | None = None
    """Norm of the adversarial images to train on; None: the first of --norms."""
    train_epsilon: str | None = None
    """Their radius, such as 0.15 or 8/255; None: by data set and norm."""
    train_steps: int = 10
    """Steps of PGD to make them."""
    beta: float = 6.0
    """Weight of the divergence between clean and adversarial predictions in trades and mart."""
    norms: tuple[Norm, ...] = ()
    """Norms of the attacks; none given: linf, or l2 where smoothed."""
    epsilons: str = ""
    """Comma-separated radii, such as 0.1,8/255, of the one norm; empty: by data set and norm."""
    attacks: str = ""
    """Comma-separated; empty: fgsm,pgd_20,pgd_40,autoattack, or fgsm,pgd_20 where smoothed. See --list."""
    num_images: int | None = None
    """Attack at most so many images, evenly spaced; None: all, but 64 of the digits."""
    batch_size: int | None = None
    """Images that are attacked at once; None: at most 250."""
    checkpoint: str | None = None
    """Run folder of another experiment on the same data set, whose model is attacked in place of a new one."""
    smoothed: bool = False
    """Attack the smoothed classifier, with gradients averaged over noise, and compare with what is certified."""
    sigma: float = 0.5
    """Standard deviation of the noise where smoothed, and of gaussian training."""
    samples: int = 16
    """Noisy copies behind each gradient where smoothed."""
    certify_intervals: bool = False
    """Verify by interval bounds too, within linf; they say little but of --training intervals."""
    seed: int = 0
    """Of initialisation, order of batches, training and attacks."""
    results_dir: str = "results"
    """Where run folders go."""
    name: str | None = None
    """Name of the run folder; None: made of data set, model and training."""
    overwrite: bool = False
    """Delete the run that is in the folder and start anew."""
    list: bool = False
    """Print every attack with its reference, and do nothing else."""


SAME = (
    "results_dir", "name", "overwrite", "data_dir", "norms", "epsilons", "attacks", "batch_size", "list",
    "certify_intervals",
)  # fmt: skip
INTERVAL_BATCH = 250


def resolved(config: Config) -> Config:
    """The config with what its defaults stand for, after a check of all that can be checked without data."""
    for name in ("num_epochs", "train_steps", "num_images", "batch_size", "samples"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value}.")
    if not 0 < config.sigma < float("inf"):
        raise ValueError(f"sigma must be positive and finite, got {config.sigma}.")
    if not 0 <= config.beta < float("inf"):
        raise ValueError(f"beta must be at least 0 and finite, got {config.beta}.")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed must lie in [0, 2**32), got {config.seed}.")
    norms = config.norms or (("l2",) if config.smoothed else ("linf",))
    if len(set(norms)) < len(norms) or not set(norms) <= set(adversaries.NORMS):
        raise ValueError(f"norms must name each of {', '.join(adversaries.NORMS)} at most once, got {norms}.")
    if config.smoothed and norms != ("l2",):
        raise ValueError(f"norms must be l2 for a model smoothed with Gaussian noise, got {', '.join(norms)}.")
    if config.certify_intervals and (config.smoothed or norms != ("linf",)):
        what = "a smoothed model" if config.smoothed else ", ".join(norms)
        raise ValueError(f"certify_intervals must be for linf and a model as it is, got {what}.")
    trained = config.training or ("gaussian" if config.smoothed else "pgd")
    if trained not in adversaries.TRAINING:
        raise ValueError(f"training must be one of {', '.join(adversaries.TRAINING)}, got {trained!r}.")
    adversarial = trained in adversaries.ADVERSARIAL and config.checkpoint is None
    config = dataclasses.replace(
        config,
        norms=norms,
        training=trained,
        num_epochs=config.num_epochs or (25 if adversarial and config.dataset == "digits" else None),
        num_images=config.num_images or (64 if config.dataset == "digits" else None),
    )
    if trained in adversaries.WITHIN and config.checkpoint is None:
        norm = config.train_norm or norms[0]
        if trained == "intervals" and norm != "linf":
            raise ValueError(f"train_norm must be linf for intervals training, got {norm}.")
        epsilon = adversaries.default("train_epsilon", config.train_epsilon, config.dataset, norm)
        config = dataclasses.replace(config, train_norm=norm, train_epsilon=epsilon)
    adversaries.names_of(config.attacks, norms, smoothed=config.smoothed)
    epsilons_of(config)
    return config


def epsilons_of(config: Config) -> dict[str, tuple[float, ...]]:
    """The radii of each norm."""
    if config.epsilons and len(config.norms) > 1:
        raise ValueError(f"epsilons must be left out with several norms, got {config.epsilons!r} for {config.norms}.")
    texts = {norm: adversaries.default("epsilons", config.epsilons, config.dataset, norm) for norm in config.norms}
    return {norm: adversaries.epsilons_of(text) for norm, text in texts.items()}


def folder_of(config: Config) -> epath.Path:
    """The run folder."""
    parts = [config.dataset.replace("/", "-").replace(":", "-"), config.model]
    if config.checkpoint is not None:
        parts.append(f"of-{epath.Path(config.checkpoint).resolve().name}")
    elif config.training in adversaries.WITHIN:
        parts.append(f"{config.training}-{config.train_norm}-{config.train_epsilon}".replace("/", "_"))
    else:
        parts.append(f"gaussian-{config.sigma:g}" if config.training == "gaussian" else str(config.training))
    if config.smoothed:
        parts.append(f"smoothed-{config.sigma:g}")
    name = config.name if config.name is not None else "-".join(parts)
    if name in ("", ".", "..") or epath.Path(name).name != name:
        raise ValueError(f"name must be the name of a folder, got {name!r}.")
    return epath.Path(config.results_dir) / "adversarial" / name


def attack(
    config: Config, target: Target, key: jax.Array, console: Console, watch: Callable[..., None]
) -> dict[tuple[str, float, str], dict]:
    """Runs the attacks that are not on disk yet; each is there before the next is begun.

    Returns:
      The arrays of each norm, radius and attack, without the images.
    """
    folder, found = folder_of(config) / "adversarial", {}
    if not (folder / "clean.npz").exists():
        answers = target.answers(key, target.image)
        clean = {"id": target.id, "label": target.label, "answer": answers, "correct": answers == target.label}
        files.write_arrays(folder / "clean.npz", clean)
    clean = files.read_arrays(folder / "clean.npz")["correct"]
    names, epsilons = adversaries.names_of(config.attacks, config.norms, smoothed=config.smoothed), epsilons_of(config)
    jobs = [
        (n, norm, e) for n in names for norm in epsilons if norm in adversaries.ATTACKS[n].norms for e in epsilons[norm]
    ]
    for number, (name, norm, epsilon) in enumerate(jobs, 1):
        path = folder / f"{norm}-{epsilon:g}-{name}.npz"
        if not path.exists():
            attack_key = jax.random.fold_in(key, zlib.crc32(f"{norm} {name}".encode()))
            try:
                arrays = attack_once(target, name, epsilon, norm, attack_key, path)
            except ValueError as error:
                where = f"{name} at {norm} {adversaries.text_of(epsilon)}"
                raise ValueError(f"{where}: {error} Attacks before it are kept.") from error
            correct = clean & (arrays["answer"] == target.label)
            files.write_arrays(path, {**arrays, "epsilon": epsilon, "correct": correct})
            line = f"{norm} {adversaries.text_of(epsilon)}: {name}, robust accuracy {correct.mean():.3f}"
            console.print(f"{line}, {arrays['seconds']:.1f} s", soft_wrap=True, highlight=False)
            watch("attacking", len(jobs), number, {"robust accuracy": float(correct.mean())})
        found[norm, epsilon, name] = files.read_arrays(path, leave_out=("x_adv",))
    return found


def attack_once(
    target: Target, name: str, epsilon: float, norm: str, key: jax.Array, path: epath.Path
) -> dict[str, np.ndarray]:
    """The arrays of one attack; the parts of AutoAttack are kept one by one, beside ``path``, until it is whole."""
    configured = adversaries.make(name, epsilon, norm, samples=target.samples)
    if not hasattr(configured, "evaluate"):
        return target.under(key, configured)
    parts = path.with_suffix(".parts.npz")
    kept = files.read_arrays(parts) if parts.exists() else None
    arrays = target.under_autoattack(key, configured, kept=kept, keep=lambda a: files.write_arrays(parts, a))
    parts.unlink(missing_ok=True)
    return arrays


def steps_of(config: Config, target: Target, key: jax.Array) -> dict[str, dict[str, np.ndarray]]:
    """PGD with more and more steps, for each norm; what is on disk is not done again."""
    found = {}
    for norm, epsilons in epsilons_of(config).items():
        path = folder_of(config) / "checks" / f"steps-{norm}.npz"
        if not path.exists() or files.read_arrays(path)["epsilon"].tolist() != list(epsilons):
            files.write_arrays(path, _sanity.over_steps(target, key, norm, epsilons))
        found[norm] = files.read_arrays(path)
    return found


def certificate_of(
    config: Config, target: Target, measure: certification.Measure, key: jax.Array
) -> certification.Certificate:
    """Certificates of the smoothed model; those on disk are not made again."""
    path = folder_of(config) / "certificates.npz"
    if not path.exists():
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, target.id)
        settings = {"num_estimation": NUM_ESTIMATION, "alpha": ALPHA}
        image = target.classifier.place(target.image)
        certificate = certification.certify(keys, target.classifier.logits_fn(), image, measure, **settings)
        files.write_arrays(path, certificate._asdict())
    return certification.Certificate(**files.read_arrays(path))


def verified_of(config: Config, target: Target) -> certification.Certificate:
    """What interval bounds show: as radius the largest of those asked in which the class of an image is verified."""
    logits_fn, image = target.classifier.logits_fn(), target.image
    radius, label = np.zeros(len(image)), np.zeros(len(image), np.int32)
    for epsilon in epsilons_of(config)["linf"]:
        found = certification.intervals.certify(logits_fn, image, epsilon=epsilon, batch_size=INTERVAL_BATCH)
        radius, label = np.where(found.verified, epsilon, radius), np.asarray(found.label)
    return certification.Certificate(label, radius, np.where(radius > 0, 1.0, 0.0), np.zeros(len(image), bool))


def check(
    config: Config,
    target: Target,
    found: dict[tuple[str, float, str], dict],
    steps: dict[str, dict[str, np.ndarray]],
    certificate: certification.Certificate | None,
    key: jax.Array,
) -> list[_sanity.Finding]:
    """Makes the checks of ``_sanity`` that these attacks allow."""
    correct = {place: arrays["correct"] for place, arrays in found.items()}
    for (norm, epsilon, name), arrays in found.items():
        parts = arrays.get("part", np.zeros(0, np.str_)).tolist()
        correct |= {(norm, epsilon, f"{name}: {part}"): arrays["part_correct"][i] for i, part in enumerate(parts)}
    findings = [_sanity.whole_box(target, jax.random.fold_in(key, 0))]
    if certificate is not None:
        answers, chance = {place: arrays["answer"] for place, arrays in found.items()}, 2 * ALPHA * config.smoothed
        findings.append(_sanity.above_certified(answers, certificate, target.label, chance))
    if config.smoothed:
        return findings
    told = {
        f"AutoAttack at {norm} {adversaries.text_of(epsilon)}": tuple(arrays["warnings"].tolist())
        for (norm, epsilon, _), arrays in found.items()
        if "warnings" in arrays
    }
    findings += [_sanity.more_steps(correct, steps), _sanity.square_and_gradients(correct)]
    return [*findings, *_sanity.diagnosis(target, jax.random.fold_in(key, 1), told)]


def run(config: Config, runtime: runtimes.Runtime = runtimes.HERE) -> list[dict]:
    """Trains, attacks, checks and reports, or does what is left of it; of many processes, all train and one attacks.

    Returns:
      The rows of metrics.csv; none in all processes but the first.
    """
    stopwatch, console = runtimes.Stopwatch(), runtimes.console()
    if config.list:
        adversaries.print_list(console)
        return []
    config = resolved(config)
    folder = folder_of(config)
    train, test = adversaries.parts_of(config)
    recipe = classifiers.recipe_of(config.dataset, config.recipe)
    num_steps = classifiers.num_steps(recipe, config.num_epochs, len(train))
    train_key, attack_key, check_key, certify_key = jax.random.split(jax.random.key(config.seed), 4)
    model_key, train_key = jax.random.split(train_key)
    functional = classifiers.build(config.model, train, dtype="float32", key=model_key)
    restored = config.checkpoint and classifiers.restored(config.checkpoint, functional, console, runtime)
    folders.open_run(folder, config, same=SAME, overwrite=config.overwrite)
    if restored:
        classifiers.keep_to(restored, folder)
    with runtimes.watching(runtime, folder, dataclasses.asdict(config)) as watch:
        classifier = (
            restored
            or classifiers.train(
                folder / "checkpoints",
                functional,
                train,
                key=train_key,
                objective=adversaries.objective_of(config, num_steps=num_steps),
                recipe=recipe,
                num_epochs=config.num_epochs,
                seed=config.seed,
                log=lambda message: console.print(message, soft_wrap=True),
                runtime=runtime,
                watch=functools.partial(watch, "training"),
            )[0]
        )
        if jax.process_index() != 0:
            return []
        image, label, ids = (
            np.asarray(part) for part in test[subsets.evenly(len(test), config.num_images or len(test))]
        )
        devices = runtime.local_mesh().size
        batch_size = -(-min(config.batch_size or 250, len(ids)) // devices) * devices
        target = Target(classifier, ids, image, label, batch_size)
        if config.smoothed:
            measure = certification.gaussian(config.sigma)
            target = target._replace(measure=measure, samples=config.samples)
            found = attack(config, target, attack_key, console, watch)
            steps, certificate = {}, certificate_of(config, target, measure, certify_key)
        else:
            found = attack(config, target, attack_key, console, watch)
            steps = steps_of(config, target, check_key)
            certificate = verified_of(config, target) if config.certify_intervals else None
        findings = check(config, target, found, steps, certificate, check_key)
        return _report.report(config, folder, target, found, steps, certificate, findings, stopwatch, console)
