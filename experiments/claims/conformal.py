"""Prediction sets that hold under attack: RSCP+ with and without PTT and RCT.

Trains classifiers under noise, attacks them within an l2 ball, and measures over random splits into calibration and
test images how often the true label is in the set, and how many labels are.

    python -m experiments.claims.conformal
    python -m experiments.claims.conformal --dataset mnist --data-dir DIR --num-images 2500
    python -m experiments.claims.conformal --checkpoint RUN --scores aps --num-samples 1024 --no-rct
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np
import optax

from robustjax import attacks, certification, data, losses, plotting, training
from robustjax.certification import conformal

from .. import _small
from ..common import checks, classifiers, files, settings, subsets, tables
from . import _frame

Score = Literal["thr", "aps", "raps"]
SCORES = {name: getattr(conformal, name) for name in get_args(Score)}
WHERE = ("clean", "attacked")
METHODS = ("conformal", "rscp", "rscp+ hoeffding", "rscp+")
GUARANTEED = METHODS[2:]
LOW = "coverage - 2 errors"
"""Two standard errors over splits below the mean, clean or attacked, whichever is less."""
ATTACK_BATCH = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(settings.Training, settings.Splits):
    """Settings of the measurement; sigma and epsilon are l2, in units of [0, 1] pixels."""

    checkpoint: str | None = None
    """Run folder of another experiment on the same data set, whose one model serves all seeds."""
    sigma: float = 0.25
    """Standard deviation of the noise, in training and in the scores."""
    epsilon: float = 0.125
    """l2 norm of the attack that the sets have to withstand."""
    alpha: float = 0.1
    """How often the true label may be missed."""
    beta: float = 0.001
    """Probability that each of the two bounds of RSCP+ fails; it is taken from alpha."""
    scores: tuple[Score, ...] = get_args(Score)
    """What sets are made of."""
    num_samples: int = 256
    """Noisy copies behind each score."""
    num_images: int | None = None
    """Use at most N images for holdout, calibration and test, evenly spaced; None: all."""
    num_holdout: int | None = None
    """Images for PTT, which methods without it calibrate with; None: a fifth of the images, at most 500."""
    splits: int = 50
    """Random halves of the other images, to calibrate and to test."""
    rct: bool = True
    """Also fine-tune the last layer by robust conformal training."""
    rct_epochs: int = 20
    """Passes over the training images in RCT."""
    rct_learning_rate: float = 0.005
    """Of RCT, divided by 10 after two, three and four fifths of it."""
    attack_steps: int = 20
    """Steps of PGD."""
    attack_samples: int = 8
    """Noisy copies behind each of its gradients."""

    def __post_init__(self):
        super().__post_init__()
        checks.at_least(1, self, "num_samples", "num_images", "num_holdout", "splits", "rct_epochs")
        checks.at_least(1, self, "attack_steps", "attack_samples")
        checks.positive(self, "sigma", "epsilon", "rct_learning_rate")
        checks.probability(self, "alpha")
        if not 0 < self.beta < self.alpha / 2:
            raise ValueError(f"beta must lie strictly between 0 and alpha / 2 = {self.alpha / 2:g}, got {self.beta}.")
        checks.distinct(self, "scores")
        if not self.scores:
            raise ValueError(f"scores must name one or more of {', '.join(SCORES)}.")
        classifiers.recipe_of(self.dataset, self.recipe)

    @property
    def trainings(self) -> tuple[str, ...]:
        """How models are trained."""
        return ("gaussian", "rct") if self.rct else ("gaussian",)

    @property
    def names(self) -> tuple[str, ...]:
        """The scores as they are and transformed."""
        return tuple(f"{score}{ptt}" for score in self.scores for ptt in ("", "+ptt"))


class Images(NamedTuple):
    """Images and labels of PTT, and the others, which are also attacked."""

    holdout: tuple[np.ndarray, np.ndarray]
    pool: tuple[np.ndarray, np.ndarray]


def arm_of(trained: str, score: str, method: str) -> str:
    """Name of an arm; ``gaussian``, the training of most, is left out."""
    return f"{score} {method}" if trained == "gaussian" else f"{trained} {score} {method}"


def images_of(config: Config, test: data.Dataset) -> Images:
    """Holdout and pool, drawn at random, the same for all seeds."""
    image, label, _ = test[subsets.evenly(len(test), config.num_images or len(test))]
    order = np.random.default_rng(0).permutation(len(label))
    size = min(len(label) // 5, 500) if config.num_holdout is None else config.num_holdout
    if not 1 <= size <= len(label) - 4:
        raise ValueError(f"num_holdout must leave images to calibrate and test, got {size} of {len(label)}.")
    part = lambda rows: (np.asarray(image)[rows], np.asarray(label)[rows])
    return Images(part(order[:size]), part(order[size:]))


class _OfHead(training.Recipe):
    def optimizer(self, steps_per_epoch: int, num_epochs: int | None = None) -> optax.GradientTransformation:
        """Trains the last layer only."""
        drops = {round(steps_per_epoch * self.num_epochs * share): 0.1 for share in (0.4, 0.6, 0.8)}
        rate = optax.piecewise_constant_schedule(self.learning_rate, drops)
        sgd = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9, nesterov=True))
        which = lambda params: {name: "head" if name == "head" else "body" for name in params}
        return optax.partition({"head": sgd, "body": optax.set_to_zero()}, which)


@functools.cache  # one function for each architecture, so that compiled programs are shared
def _noisy_logits_of(outputs: Any, sigma: float) -> Any:
    return lambda state, key, x: outputs(state, x + sigma * jax.random.normal(key, x.shape)).logits


def attacked(config: Config, classifier: classifiers.Classifier, pool: tuple, key: jax.Array) -> np.ndarray:
    """The images of the pool after PGD on the mean gradient over noise."""
    pgd = attacks.pgd(epsilon=config.epsilon, norm="l2", steps=config.attack_steps, keep="last", random_start=False)
    attack = attacks.expectation_over_transformation(pgd, samples=config.attack_samples)
    noisy = jax.tree_util.Partial(_noisy_logits_of(classifier.functional.outputs, config.sigma), classifier.state)
    size = min(ATTACK_BATCH, len(pool[0]))
    return subsets.in_blocks(lambda image, label: attack(key, noisy, image, label), size, *pool)


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


def covered(
    config: Config, seed: int, arrays: dict[str, np.ndarray], images: Images, score: str
) -> dict[str, dict[str, float]]:
    """Coverage and size of each method, means over the splits, on clean and on attacked images.

    Without PTT the holdout images join the calibration: all methods have as many labelled images.
    """
    measure, label = certification.gaussian(config.sigma), images.pool[1]
    part = lambda of: conformal.SmoothedScores(*(arrays[f"{of}_{k}"] for k in conformal.SmoothedScores._fields))
    pick = lambda scores, rows: jax.tree.map(lambda a: a[rows], scores)
    robust = {"epsilon": config.epsilon, "alpha": config.alpha}
    values: dict[tuple[str, str], list[tuple[float, float]]] = {}
    rng = np.random.default_rng(seed)
    for _ in range(config.splits):
        calibration, test = np.split(rng.permutation(len(label)), [len(label) // 2])
        scores, labels = pick(part("clean"), calibration), label[calibration]
        if not score.endswith("+ptt"):
            scores = jax.tree.map(lambda *both: np.concatenate(both), scores, part("holdout"))
            labels = np.concatenate([labels, images.holdout[1]])
        for where in WHERE:
            new = pick(part(where), test)
            plus = functools.partial(conformal.rscp_plus, scores, labels, new, measure, beta=config.beta, **robust)
            sets = (
                conformal.split_conformal(scores.mean, labels, new.mean, alpha=config.alpha),
                conformal.rscp(scores, labels, new, measure, **robust),
                plus(bound="hoeffding"),
                plus(),
            )
            for method, chosen in zip(METHODS, sets, strict=True):
                hit = chosen[np.arange(len(test)), label[test]].mean()
                values.setdefault((method, where), []).append((hit, chosen.sum(-1).mean()))
    found = {method: {"num_images": float(len(label))} for method in METHODS}
    for (method, where), pairs in values.items():
        error = np.std(pairs, 0, ddof=min(1, config.splits - 1)) / np.sqrt(config.splits)
        for name, mean, e in zip(("coverage", "size"), np.mean(pairs, 0), error, strict=True):
            found[method] |= {f"{name}, {where}": float(mean), f"{name} error, {where}": float(e)}
    for of in found.values():
        of[LOW] = min(of[f"coverage, {where}"] - 2 * of[f"coverage error, {where}"] for where in WHERE)
    return found


def measure(config: Config, seed: int, place: _frame.Place) -> _frame.Numbers:
    """Trains, fine-tunes, attacks and scores with one seed, or does what is left of it."""
    train, test = config.images()
    images, recipe = images_of(config, test), classifiers.recipe_of(config.dataset, config.recipe)
    model_key, train_key, attack_key, score_key, tune_key = jax.random.split(jax.random.key(seed), 5)
    functional = classifiers.build(config.model, train, dtype="float32", key=model_key)
    trained = functools.partial(_small.train, place, seed, train)
    if config.checkpoint is None:
        objective = losses.smoothing.gaussian_augmentation(sigma=config.sigma)
        base = trained("checkpoints", functional, objective, recipe, train_key, config.num_epochs)
    else:
        base = classifiers.restored(config.checkpoint, functional, place.runtime)
    models = {"gaussian": base}
    if config.rct:
        mesh = place.runtime.global_mesh()
        size = min(500, len(train)) // mesh.size * mesh.size
        head = _OfHead(learning_rate=config.rct_learning_rate, batch_size=size, num_epochs=config.rct_epochs)
        objective = losses.conformal_training(sigma=config.sigma, epsilon=config.epsilon, alpha=config.alpha)
        before = functional._replace(state=base.state)
        models["rct"] = trained("rct", before, objective, head, tune_key)
    classifiers.keep_to(place.folder, [of.state for of in models.values()], [train, test])
    found: dict[str, dict[str, float]] = {}
    if jax.process_index() != 0:
        return found
    for kind, classifier in models.items():
        path = place.folder / f"attacked-{kind}.npz"
        if not path.exists():
            files.write_arrays(path, {"x_adv": attacked(config, classifier, images.pool, attack_key)})
        paths = {name: place.folder / f"scores-{kind}-{name}.npz" for name in config.names}
        if not all(path.exists() for path in paths.values()):
            adversarial = files.read_arrays(path)["x_adv"]
            for name, arrays in smoothed(config, classifier, images, adversarial, score_key):
                files.write_arrays(paths[name], arrays)
                place.log(f"seed {seed}: {kind}, {name}")
        for name, path in paths.items():
            for method, numbers in covered(config, seed, files.read_arrays(path), images, name).items():
                found[arm_of(kind, name, method)] = numbers
        for name in config.scores:
            plain, ptt = (found[arm_of(kind, f"{name}{ptt}", "rscp+")] for ptt in ("", "+ptt"))
            ptt["size over that without PTT"] = ptt["size, clean"] / plain["size, clean"]
    low = min(numbers[LOW] for arm, numbers in found.items() if arm.endswith(GUARANTEED))
    return found | {"all rscp+": {LOW: low}}


def sizes(config: Config, results: _frame.Results):
    """Mean sizes of the sets of clean images, a group for each training and score."""
    of = lambda trained, score: {name: results[arm_of(trained, score, name)]["size, clean"] for name in METHODS}
    bars = {arm_of(*names, "").strip(): of(*names) for names in itertools.product(config.trainings, config.names)}
    return {"sizes": plotting.bar_chart(bars, label="mean size of the sets, clean images")}


def details(config: Config, results: _frame.Results) -> Sequence[tables.Table | str]:
    """Whether RSCP+ held its guarantee, and what PTT and RCT did to the size of its sets."""
    arms = [arm_of(*names) for names in itertools.product(config.trainings, config.names, GUARANTEED)]
    lowest, arm, seed = min((value, arm, seed) for arm in arms for seed, value in enumerate(results[arm][LOW]))
    size = lambda trained, score: tables.mean_and_sd(results[arm_of(trained, score, "rscp+")]["size, clean"], ".2f")
    headers = ["score", "plain", "PTT", "RCT", "RCT and PTT"][: 1 + 2 * len(config.trainings)]
    rows = [
        [score, *(size(trained, f"{score}{ptt}") for trained in config.trainings for ptt in ("", "+ptt"))]
        for score in config.scores
    ]
    note = f"{config.splits} random halves of {results[arm]['num_images'][0]:,.0f} images to calibrate and to test."
    if config.checkpoint is not None:
        note += " All seeds share one model; they differ in noise, attack and splits."
    return [
        f"The guarantee of RSCP+, {1 - config.alpha:g}, is {'held' if lowest >= 1 - config.alpha else 'VIOLATED'}: at "
        f"worst {lowest:.3f}, two standard errors below the mean over splits ({arm}, seed {seed}).",
        tables.Table("Mean size of RSCP+ sets, clean images", headers, rows),
        note,
    ]


STUDY = _frame.Study(
    measure=measure, config=Config(),
    tiny=Config(
        train_split="train[:64]", model="mlp", num_epochs=1, num_images=64, num_holdout=32, num_samples=16, splits=4,
        scores=("thr",), rct_epochs=1, attack_steps=2, attack_samples=1,
    ),
    numbers=[
        _frame.Column("coverage, clean", "coverage, clean"),
        _frame.Column("coverage, attacked", "attacked"),
        _frame.Column("size, clean", "size, clean", ".2f"),
        _frame.Column("size, attacked", "attacked", ".2f"),
    ],
    claims=(
        _frame.Claim(
            "Provably robust conformal prediction (RSCP+)",
            "Yan, Romano, Weng 2024; RSCP: Gendler et al. 2022, ICLR (not on arXiv)", "2404.19651",
            tuple(f"certification.conformal.{name}" for name in ("rscp_plus", "rscp", "split_conformal")),
            "Sets hold the true label with probability 1 - alpha under any l2 attack, although smoothed scores are "
            "estimated.",
            lambda config: (_frame.Bar(LOW, "all rscp+", ">=", 1 - config.alpha),),
        ),
        _frame.Claim(
            "Post-training transformation (PTT)", "Yan, Romano, Weng 2024", "2404.19651",
            ("certification.conformal.ptt",), "A transformation of scores makes the sets of RSCP+ small.",
            lambda config: tuple(
                _frame.Bar("size over that without PTT", f"{score}+ptt rscp+", "<", 0.7) for score in config.scores
            ),
        ),
        _frame.Claim(  # smaller than before RCT, with and without PTT
            "Robust conformal training (RCT)", "Yan, Romano, Weng 2024", "2404.19651", ("losses.conformal_training",),
            "Fine-tuning the last layer for small sets makes the sets of RSCP+ smaller.",
            lambda config: tuple(
                _frame.Bar("size, clean", arm_of("rct", name, "rscp+"), "<", arm_of("gaussian", name, "rscp+"))
                for name in config.names * config.rct
            ),
        ),
    ),
    figure=sizes, details=details, in_folder=True,
)  # fmt: skip

if __name__ == "__main__":
    _frame.main(STUDY, __doc__)
