"""Prediction sets that hold under attack: RSCP+ with and without PTT and RCT (Yan et al., arXiv:2404.19651).

Trains classifiers under noise, attacks them within an l2 ball, and measures over random splits into calibration and
test images how often the true label is in the set, and how many labels are. Leaves results/conformal/NAME with
config.json, metrics.csv, metrics.json, report.md and figures. The same command continues a run that was interrupted.

    python -m experiments.conformal
    python -m experiments.conformal --dataset mnist --data-dir DIR --num-images 2500 --rct
    python -m experiments.conformal --checkpoint RUN --scores aps --num-samples 1024
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
from etils import epath
from rich.console import Console

from experiments import _conformal_report
from experiments.common import classifiers, command_line, files, folders, runtimes, smoothers, subsets
from robustjax import attacks, certification, data, losses, training
from robustjax.certification import conformal

SCORES = {"thr": conformal.thr, "aps": conformal.aps, "raps": conformal.raps}
ATTACK_BATCH = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a run; sigma and epsilon are l2, in units of [0, 1] pixels."""

    dataset: str = "digits"
    """digits (embedded), or any prepared TFDS data set with image and label."""
    data_dir: str | None = None
    """Folder of prepared TFDS data sets; None: $TFDS_DATA_DIR, else TFDS's own."""
    train_split: str = "train"
    """Images to train on, in TFDS syntax."""
    test_split: str | None = None
    """Images for holdout, calibration and test, in TFDS syntax; None: the data set's test split."""
    model: str = "cnn"
    """mlp, lenet, cnn, strided_cnn, resnet20, resnet56, resnet110, wide_resnet, resnet18 or resnet50."""
    recipe: str | None = None
    """Training recipe, see experiments.smoothing; None: the one of the data set."""
    num_epochs: int | None = None
    """Passes over the training images; None: as the recipe."""
    checkpoint: str | None = None
    """Run folder of another experiment on the same data set, whose model is used in place of new ones."""
    sigma: float = 0.25
    """Standard deviation of the noise, in training and in the scores."""
    epsilon: float = 0.125
    """l2 norm of the attack that the sets have to withstand."""
    alpha: float = 0.1
    """How often the true label may be missed."""
    beta: float = 0.001
    """Probability that each of the two bounds of RSCP+ fails; it is taken from alpha."""
    scores: tuple[Literal["thr", "aps", "raps"], ...] = ("thr", "aps", "raps")
    """What sets are made of."""
    num_samples: int = 256
    """Noisy copies behind each score."""
    num_images: int | None = None
    """Use at most so many images for holdout, calibration and test, evenly spaced; None: all."""
    num_holdout: int | None = None
    """Images for PTT, which methods without it calibrate with; None: a fifth of the images, at most 500."""
    splits: int = 50
    """Random halves of the other images, to calibrate and to test."""
    rct: bool = False
    """Fine-tune the last layer by robust conformal training, and compare."""
    rct_epochs: int = 20
    """Passes over the training images in RCT."""
    rct_learning_rate: float = 0.005
    """Of RCT, divided by 10 after two, three and four fifths of it."""
    attack_steps: int = 20
    """Steps of PGD."""
    attack_samples: int = 8
    """Noisy copies behind each of its gradients."""
    seeds: int = 1
    """Number of models, from seeds 0, 1, ...; means and standard deviations are over these."""
    results_dir: str = "results"
    """Where run folders go."""
    name: str | None = None
    """Name of the run folder; None: made of data set, model and sigma."""
    overwrite: bool = False
    """Delete the run that is in the folder and start anew."""

    def folder(self) -> epath.Path:
        """The run folder."""
        dataset = self.dataset.replace("/", "-").replace(":", "-")
        of = "" if self.checkpoint is None else f"-of-{epath.Path(self.checkpoint).resolve().name}"
        name = self.name if self.name is not None else f"{dataset}-{self.model}-{self.sigma:g}-{self.epsilon:g}{of}"
        return epath.Path(self.results_dir) / "conformal" / name


SAME = ("results_dir", "name", "overwrite", "data_dir", "beta", "scores", "splits", "rct", "seeds")


class Images(NamedTuple):
    """What sets are made for.

    Attributes:
      holdout: images of PTT, and their labels.
      pool: the others, in place of which attacked ones may stand.
    """

    holdout: tuple[np.ndarray, np.ndarray]
    pool: tuple[np.ndarray, np.ndarray]


def check(config: Config) -> None:
    """Raises ValueError for a setting that is out of its range, before anything is written."""
    for name in ("num_samples", "splits", "rct_epochs", "attack_steps", "attack_samples", "seeds", "num_epochs"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value}.")
    for name in ("sigma", "epsilon", "rct_learning_rate"):
        if not 0 < getattr(config, name) < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {getattr(config, name)}.")
    if not 0 < config.alpha < 1:
        raise ValueError(f"alpha must lie strictly between 0 and 1, got {config.alpha}.")
    if not 0 < config.beta < config.alpha / 2:
        raise ValueError(f"beta must lie strictly between 0 and alpha / 2 = {config.alpha / 2:g}, got {config.beta}.")
    if not config.scores or len(set(config.scores)) < len(config.scores):
        raise ValueError(f"scores must name each of {', '.join(SCORES)} at most once, got {config.scores}.")
    if config.name is not None and (config.name in ("", ".", "..") or epath.Path(config.name).name != config.name):
        raise ValueError(f"name must be the name of a folder, got {config.name!r}.")
    if config.checkpoint is not None and config.seeds > 1:
        raise ValueError(f"seeds must be 1 with a checkpoint, whose model is one, got {config.seeds}.")


def images_of(config: Config, test: data.Dataset) -> Images:
    """Holdout and pool, drawn at random, the same for all seeds."""
    image, label, _ = test[subsets.evenly(len(test), config.num_images or len(test))]
    order = np.random.default_rng(0).permutation(len(label))
    size = min(len(label) // 5, 500) if config.num_holdout is None else config.num_holdout
    if not 1 <= size <= len(label) - 4:
        raise ValueError(f"num_holdout must leave images to calibrate and test, got {size} of {len(label)}.")
    part = lambda rows: (np.asarray(image)[rows], np.asarray(label)[rows])
    return Images(part(order[:size]), part(order[size:]))


def fine_tuned(
    config: Config, folder: epath.Path, base: classifiers.Classifier, train: data.Dataset, seed: int, console: Console,
    runtime: runtimes.Runtime,
) -> classifiers.Classifier:  # fmt: skip
    """The classifier after RCT of its last layer."""
    mesh = runtime.global_mesh()
    size = min(500, len(train)) // mesh.size * mesh.size
    steps = len(train) // size
    drops = {round(steps * config.rct_epochs * share): 0.1 for share in (0.4, 0.6, 0.8)}
    sgd = optax.sgd(optax.piecewise_constant_schedule(config.rct_learning_rate, drops), momentum=0.9, nesterov=True)
    parts: Any = {"head": optax.chain(optax.add_decayed_weights(5e-4), sgd), "body": optax.set_to_zero()}
    which = {name: "head" if name == "head" else "body" for name in base.state.params}
    labels = {name: jax.tree.map(lambda _, name=name: which[name], part) for name, part in base.state.params.items()}
    optimizer = optax.partition(parts, labels)
    with runtimes.deferred_sigterm() as stop:
        result = training.fit(
            base.functional.apply,
            training.init(jax.random.key(seed), base.state, optimizer),
            data.batches(train.cached(), size, seed=seed),
            objective=losses.conformal_training(sigma=config.sigma, epsilon=config.epsilon, alpha=config.alpha),
            optimizer=optimizer,
            num_steps=steps * config.rct_epochs,
            folder=folder,
            mesh=mesh,
            stop=stop,
            log=lambda message: console.print(message, soft_wrap=True),
        )
    local = runtime.local_mesh()
    return base._replace(state=runtimes.on_mesh(result.state.model, local), mesh=local)


@functools.cache  # one function for each architecture, so that compiled programs are shared
def _noisy_logits_of(outputs: Any, sigma: float) -> Any:
    return lambda state, key, x: outputs(state, x + sigma * jax.random.normal(key, x.shape)).logits


def attacked(config: Config, classifier: classifiers.Classifier, pool: tuple, key: jax.Array) -> np.ndarray:
    """The images of the pool after PGD on the mean gradient over noise, in blocks of one size."""
    pgd = attacks.pgd(epsilon=config.epsilon, norm="l2", steps=config.attack_steps, keep="last", random_start=False)
    attack = attacks.expectation_over_transformation(pgd, samples=config.attack_samples)
    noisy = jax.tree_util.Partial(_noisy_logits_of(classifier.functional.outputs, config.sigma), classifier.state)
    image, label = pool
    size = min(ATTACK_BATCH, len(label))
    blocks = [np.minimum(np.arange(i, i + size), len(label) - 1) for i in range(0, len(label), size)]
    return np.concatenate([np.asarray(attack(key, noisy, image[rows], label[rows])) for rows in blocks])[: len(label)]


def smoothed(
    config: Config, classifier: classifiers.Classifier, images: Images, adversarial: np.ndarray, key: jax.Array
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Smoothed scores of holdout, pool and attacked pool, for each score and its transformed one."""
    measure = certification.gaussian(config.sigma)
    holdout, labels = images.holdout
    of = lambda x, score, n: conformal.smoothed_scores(
        key, classifier.logits_fn(), x, measure, score=score, num_samples=n
    )
    for name in config.scores:
        one = np.asarray(of(holdout, SCORES[name], 1).mean)
        ptt = conformal.ptt(one[np.arange(len(labels)), labels], SCORES[name], bias=1 - config.alpha)
        for title, score in ((name, SCORES[name]), (f"{name}+ptt", ptt)):
            parts = {"holdout": holdout, "clean": images.pool[0], "attacked": adversarial}
            found = {part: of(x, score, config.num_samples) for part, x in parts.items()}
            yield title, {f"{part}_{k}": np.asarray(v) for part, s in found.items() for k, v in s._asdict().items()}


def measured(config: Config, seed: int, arrays: dict[str, np.ndarray], images: Images, name: str) -> list[dict]:
    """Coverage and size of each method over the splits, on clean and on attacked images.

    Without PTT the holdout images join the calibration: all methods have as many labelled images.
    """
    measure, label = certification.gaussian(config.sigma), images.pool[1]
    part = lambda of: conformal.SmoothedScores(*(arrays[f"{of}_{k}"] for k in conformal.SmoothedScores._fields))
    pick = lambda scores, rows: jax.tree.map(lambda a: a[rows], scores)
    join = lambda a, b: jax.tree.map(lambda *c: np.concatenate(c), a, b)
    robust = {"epsilon": config.epsilon, "alpha": config.alpha}
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    rng = np.random.default_rng(seed)
    for _ in range(config.splits):
        order = rng.permutation(len(label))
        calibration, test = order[: len(label) // 2], order[len(label) // 2 :]
        scores, labels = pick(part("clean"), calibration), label[calibration]
        if not name.endswith("+ptt"):
            scores, labels = join(scores, part("holdout")), np.concatenate([labels, images.holdout[1]])
        for where in ("clean", "attacked"):
            new = pick(part(where), test)
            sets = {
                "conformal": conformal.split_conformal(scores.mean, labels, new.mean, alpha=config.alpha),
                "rscp": conformal.rscp(scores, labels, new, measure, **robust),
                "rscp+ hoeffding": conformal.rscp_plus(
                    scores, labels, new, measure, beta=config.beta, bound="hoeffding", **robust
                ),
                "rscp+": conformal.rscp_plus(scores, labels, new, measure, beta=config.beta, **robust),
            }
            for method, chosen in sets.items():
                covered = chosen[np.arange(len(test)), label[test]].mean()
                found.setdefault((method, where), []).append((covered, chosen.sum(-1).mean()))
    rows = []
    for (method, where), values in found.items():
        (coverage, size), deviation = np.mean(values, 0), np.std(values, 0, ddof=min(1, config.splits - 1))
        error = deviation / np.sqrt(config.splits)
        row = {"method": method, "images": where, "coverage": float(coverage), "size": float(size)}
        rows.append(row | {"coverage_error": float(error[0]), "size_error": float(error[1])})
    return rows


def run_seed(
    config: Config, seed: int, train: data.Dataset, images: Images, recipe: training.Recipe, console: Console,
    runtime: runtimes.Runtime, watch: runtimes.Watch,
) -> list[dict]:  # fmt: skip
    """Trains, fine-tunes, attacks and scores with one seed, or does what is left of it.

    Returns:
      Rows of metrics.csv; none in all processes but the first.
    """
    folder = config.folder() / f"seed-{seed}"
    model_key, train_key, attack_key, score_key = jax.random.split(jax.random.key(seed), 4)
    functional = classifiers.build(config.model, train, dtype="float32", key=model_key)
    if config.checkpoint is None:
        base, _ = classifiers.train(
            folder / "checkpoints", functional, train, key=train_key,
            objective=smoothers.objective_of("gaussian", config.sigma, "gaussian"),
            recipe=recipe, num_epochs=config.num_epochs, seed=seed, runtime=runtime,
            log=lambda message: console.print(message, soft_wrap=True), watch=functools.partial(watch, "training"),
        )  # fmt: skip
    else:
        base = classifiers.restored(config.checkpoint, functional, console, runtime)
        classifiers.keep_to(base, folder)
    models = {"gaussian": base}
    if config.rct:
        models["rct"] = fine_tuned(config, folder / "rct", base, train, seed, console, runtime)
    if jax.process_index() != 0:
        return []
    rows = []
    for trained, classifier in models.items():
        path = folder / f"attacked-{trained}.npz"
        if not path.exists():
            files.write_arrays(path, {"x_adv": attacked(config, classifier, images.pool, attack_key)})
        names = [f"{name}{ptt}" for name in config.scores for ptt in ("", "+ptt")]
        paths = {name: folder / f"scores-{trained}-{name}.npz" for name in names}
        if not all(path.exists() for path in paths.values()):
            adversarial = files.read_arrays(path)["x_adv"]
            for name, arrays in smoothed(config, classifier, images, adversarial, score_key):
                files.write_arrays(paths[name], arrays)
                console.print(f"seed {seed}: {trained}, {name}", highlight=False)
        for name in names:
            found = measured(config, seed, files.read_arrays(paths[name]), images, name)
            rows += [{"seed": seed, "training": trained, "score": name, **row} for row in found]
    return rows


def run(config: Config, runtime: runtimes.Runtime = runtimes.HERE) -> list[dict]:
    """Trains, attacks, scores and reports, or does what is left of it; of many processes, all train and one scores.

    Returns:
      The rows of metrics.csv; none in all processes but the first.
    """
    stopwatch, console = runtimes.Stopwatch(), runtimes.console()
    check(config)
    if config.checkpoint is not None:
        folders.settings_of(config.checkpoint, dataset=config.dataset, model=config.model)
    train = data.load(config.dataset, config.train_split, config.data_dir)
    test = data.load(config.dataset, config.test_split or data.splits(config.dataset).test, config.data_dir)
    images, recipe = images_of(config, test), classifiers.recipe_of(config.dataset, config.recipe)
    folders.open_run(config.folder(), config, same=SAME, overwrite=config.overwrite)
    rows = []
    with runtimes.watching(runtime, config.folder(), dataclasses.asdict(config)) as watch:
        for seed in range(config.seeds):
            rows += run_seed(config, seed, train, images, recipe, console, runtime, watch)
    if jax.process_index() != 0:
        return []
    _conformal_report.report(config, rows, len(images.pool[1]), stopwatch, console)
    return rows


if __name__ == "__main__":
    command_line.command_line(Config, run, __doc__)
