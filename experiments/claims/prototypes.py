"""Trains networks of prototypes with a margin and for their certified radius, certifies and attacks both.

The networks of Saralajew et al. (arXiv 2412.15499) answer by distances to prototypes in the space of images, and their
l2 radius is a formula: certifying takes one prediction.

    python -m experiments.claims.prototypes
    python -m experiments.claims.prototypes --reasoning cbc --num-reasonings 2 --smoothing new
    python -m experiments.claims.prototypes --dataset mnist --data-dir DIR --num-components 10 --num-epochs 10
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from robustjax import _paths, attacks, certification, data, losses, metrics, models, plotting, training

from .. import _small, smoothing
from ..common import certificates, checks, classifiers, files, settings, subsets, tables
from . import _frame

Loss = Literal["margin", "radius", "published_radius"]
OWN = {"radius": "mean_radius", "published_radius": "mean_published_radius"}
"""The certificate that each loss trains for."""
ATTACK_LOSSES = ("cross_entropy", "margin")
"""What PGD raises; each has its own restarts."""
WITHIN = 1 - 1e-4
"""Share of the radius that attacks get; the rest is for rounding."""
BEYOND = (1.5, 2.0)
"""Multiples of the radius at which attacks should succeed if attacks and radius are any good."""
RANDOM_DRAWS = 100
SHOWN = 6
"""Prototypes in a row of the figure."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(settings.Splits):
    """Settings of the measurement; radii are l2, in units of [0, 1] pixels."""

    reasoning: Literal["rbf", "cbc"] = "rbf"
    """rbf: detected prototypes count for a class; cbc: the absence of a prototype may count, too."""
    num_components: int = 10
    """Prototypes for each class; they start as training images of it."""
    num_reasonings: int = 1
    """Sets of weights for each class, the best of which counts."""
    losses: tuple[Loss, ...] = get_args(Loss)
    """What is minimised: a hinge on probabilities, or minus the certified radius, ours or as published."""
    margin: float = 0.3
    """Of the hinge."""
    target: float | None = None
    """Radius up to which the radius losses push. None: without bound."""
    num_epochs: int = 40
    """Passes over the training images."""
    learning_rate: float = 0.03
    """Initial learning rate of Adam; falls to 0 along half a cosine."""
    batch_size: int = 128
    """Images in a training step."""
    num_images: int = 500
    """Maximum number of images to attack, evenly spaced; all are certified."""
    attack_steps: int = 40
    """Steps of each of two restarts of PGD, on cross-entropy and again on the margin."""
    radii: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5)
    """Radii of the table."""
    smoothing: str | None = None
    """Run folder of experiments.smoothing to compare with; new: a run for each seed, of 1,000 draws. None: no run."""
    sigma: float = 0.5
    """Standard deviation of the noise of new runs, in [0, 1] pixels."""

    def __post_init__(self):
        checks.at_least(1, self, "num_components", "num_reasonings", "num_epochs", "batch_size", "num_images")
        checks.at_least(1, self, "attack_steps")
        checks.positive(self, "learning_rate", "sigma")
        checks.not_negative(self, "radii")
        for name in ("losses", "radii"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must hold at least one value, and each once, got {values}.")
        given = None if self.smoothing in (None, "new") else _paths.path_of(smoothing=self.smoothing)
        if given is not None and not (given / "certificates.csv").exists():
            raise ValueError(
                f"smoothing must be a run of experiments.smoothing, but {self.smoothing} has no certificates.csv."
            )
        for loss in self.losses:
            objective_of(self, loss)


def objective_of(config: Config, loss: str) -> losses.Objective:
    """The training objective of a network."""
    if loss == "margin":
        return losses.prototype_margin(margin=config.margin)
    return losses.prototype_radius(target=config.target, cancel=loss == "radius")


class _Recipe(training.Recipe):
    def optimizer(self, steps_per_epoch: int, num_epochs: int | None = None) -> optax.GradientTransformation:
        return optax.chain(super().optimizer(steps_per_epoch, num_epochs), _within_images)


@optax.stateless
def _within_images(updates: Any, params: Any) -> Any:
    """Keeps components images: cuts each step short where it would leave [0, 1]."""
    old = params["components"]
    return {**updates, "components": jnp.clip(old + updates["components"], 0.0, 1.0) - old}


def untrained(config: Config, train: data.Dataset, seed: int, key: jax.Array) -> models.Functional:
    """The network before training, from some images of each class."""
    labels, rng = np.asarray(train[:].label), np.random.default_rng(seed)
    members = [np.flatnonzero(labels == c) for c in range(train.num_classes)]
    if (least := min(map(len, members))) < config.num_components:
        raise ValueError(
            f"num_components must be at most {least}, the images of the smallest class, got {config.num_components}."
        )
    start = train[np.concatenate([rng.choice(ids, config.num_components, replace=False) for ids in members])]
    kind = {"reasoning": config.reasoning, "num_reasonings": config.num_reasonings, "num_classes": train.num_classes}
    return models.functional(models.prototypes.classifier(key, start.image, start.label, **kind))


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
    pgd_keys, random_keys = jax.random.split(pgd_key, len(image)), jax.random.split(random_key, RANDOM_DRAWS)
    at = lambda keys, factor: (keys, logits_fn, image, label, (factor * radius).astype(np.float32))
    pgd = [attacks.pgd(epsilon=0.0, norm="l2", steps=steps, restarts=2, loss=loss) for loss in ATTACK_LOSSES]
    by_pgd = lambda factor: np.any([_fooled(attack, *at(pgd_keys, factor)) for attack in pgd], axis=0)
    fooled = {f"pgd_{factor:g}": by_pgd(factor) for factor in (WITHIN, *BEYOND)}
    return fooled | {"random": np.asarray(_fooled_at_random(*at(random_keys, WITHIN)))}


def certified(config: Config, classifier: classifiers.Classifier, test: data.Dataset, key: jax.Array) -> dict[str, Any]:
    """The numbers of a network: answers and radii of all images, and what attacks did to some; arrays for figures."""
    network = models.prototypes.network(classifier.state.params)
    image, label, ids = (np.asarray(part) for part in test[:])
    certify = functools.partial(certification.prototypes.radius, network, image, label)
    certify()  # compiled
    started = time.perf_counter()
    radius = np.asarray(certify().radius)
    milliseconds = 1000 * (time.perf_counter() - started) / len(ids)
    published = np.asarray(certify(cancel=False).radius)
    right = np.asarray(classifiers.outputs_of(classifier, image).logits).argmax(-1) == label
    rows = subsets.evenly(len(ids), config.num_images)
    # Of one size for all networks, so that one program serves; those without a radius are left out of what it gives.
    at = (image[rows], label[rows], np.maximum(radius[rows], 0.0))
    fooled = attacked(key, classifier.logits_fn(), *at, config.attack_steps)
    fooled = {name: values[radius[rows] > 0] for name, values in fooled.items()}
    return numbers_of(right, radius, published, fooled, config.radii) | {
        "certifying_milliseconds_per_image": milliseconds,
        "scale": np.mean(network.scale),
        "components": network.components.reshape(-1, *test.image_shape),
        "positive": network.positive,
        "negative": network.negative,
    }


def numbers_of(
    right: np.ndarray, radius: np.ndarray, published: np.ndarray, fooled: dict[str, np.ndarray], radii: Sequence[float]
) -> dict[str, Any]:
    """Accuracies, mean radii, and which attacks on the images with a radius fooled the network."""
    inside = fooled[f"pgd_{WITHIN:g}"] | fooled["random"]
    beyond = {f"fooled_at_{factor:g}": fooled[f"pgd_{factor:g}"] for factor in BEYOND}
    return {
        "accuracy": right.mean(),
        "mean_radius": np.maximum(radius, 0).mean(),
        "mean_published_radius": np.maximum(published, 0).mean(),
        **{f"certified_at_{r:g}": ((radius >= r) & right).mean() for r in radii},
        "attacked": inside.size,
        "violations": inside.sum() + ((radius > 0) & ~right).sum(),
        **{name: of.mean() if of.size else 0.0 for name, of in beyond.items()},
        "radius": np.maximum(radius, 0),
        "right": right & (radius > 0),
    }


def gains_of(found: _frame.Numbers) -> dict[str, float]:
    """How much longer the mean radius of each loss is than that of the margin loss, by the loss's own certificate."""
    radii = {loss: radius for loss, radius in OWN.items() if {loss, "margin"} <= {*found}}
    pairs = {loss: [float(found[of][radius]) for of in (loss, "margin")] for loss, radius in radii.items()}
    return {loss: ours / theirs - 1 if theirs > 0 else math.inf for loss, (ours, theirs) in pairs.items()}


def smoothed(config: Config, seed: int, place: _frame.Place) -> dict[str, Any]:
    """The numbers of a run of randomized smoothing, which is made or resumed where a new one is asked for."""
    folder = _paths.path_of(smoothing=config.smoothing)
    if config.smoothing == "new":
        given = settings.shared(config, settings.Splits) | {"sigma": config.sigma, "num_images": config.num_images}
        new = smoothing.Config(**given, num_estimation=1000, seed=seed, results_dir=str(place.folder))
        smoothing.run(new, dataclasses.replace(place.runtime, log=(), profile=False))
        folder = new.folder()
    _, label, certificate, *_ = certificates.read(folder)
    at = metrics.certified_accuracy(certificate, label, config.radii)
    return {
        "mean_radius": metrics.average_certified_radius(certificate, label),
        **{f"certified_at_{r:g}": value for r, value in zip(config.radii, at, strict=True)},
        "images": len(label),
        "radius": certificate.radius,
        "right": (certificate.label == label) & ~certificate.abstained,
    }


def measure(config: Config, seed: int, place: _frame.Place) -> _frame.Numbers:
    """Trains, certifies and attacks a network for each loss, or does what is left of it."""
    train, test = (images.cached() for images in config.images())
    train_key, attack_key, model_key = jax.random.split(jax.random.key(seed), 3)
    recipe = _Recipe(
        algorithm="adam", learning_rate=config.learning_rate, schedule="cosine", batch_size=config.batch_size,
        num_epochs=config.num_epochs,
    )  # fmt: skip
    trained = {}
    for loss in config.losses:
        began = time.perf_counter()
        functional, objective = untrained(config, train, seed, model_key), objective_of(config, loss)
        classifier = _small.train(place, seed, train, f"{loss}/checkpoints", functional, objective, recipe, train_key)
        classifiers.keep_to(place.folder / loss, classifier.state, [train, test])
        trained[loss] = classifier, time.perf_counter() - began
    beside = {"smoothing": smoothed(config, seed, place)} if config.smoothing is not None else {}
    if jax.process_index() != 0:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for loss, (classifier, seconds) in trained.items():
        path = place.folder / loss / "numbers.npz"
        if not path.exists():
            files.write_arrays(path, {**certified(config, classifier, test, attack_key), "seconds": seconds})
        found[loss] = files.read_arrays(path)
        place.log(f"seed {seed}, {loss}: mean certified radius {found[loss]['mean_radius']:.3f}")
    for loss, gain in gains_of(found).items():
        found[loss]["gain"] = gain
    return found | beside


def figures(config: Config, results: _frame.Results) -> dict[str, Any]:
    """Certified accuracy of all seeds, and the prototypes of the first seed with their weights."""
    curves = {arm: (np.concatenate([*of["radius"]]), np.concatenate([*of["right"]])) for arm, of in results.items()}
    title = f"{config.dataset}, {config.reasoning}, {config.num_components} components per class"
    drawn = {"certified_accuracy": plotting.certified_accuracy_curve(curves, title=title)}
    for loss in config.losses:
        first = (results[loss][name][0] for name in ("components", "positive", "negative"))
        drawn[f"prototypes_{loss}"] = weights_figure(*first)
    return drawn


def weights_figure(components: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> Any:
    """The prototypes that weigh most for each reasoning: required ones (+), and in cbc unrequired ones (-)."""
    both = negative.any()
    chosen, titles = [], []
    for c, r in np.ndindex(*positive.shape[:2]):
        parts = [("+", positive[c, r], SHOWN // 2 if both else SHOWN)]
        parts += [("-", negative[c, r], SHOWN - SHOWN // 2)] if both else []
        for sign, weights, count in parts:
            for k in np.argsort(-weights, kind="stable")[:count]:
                titles.append(f"{c}: {sign}{weights[k]:.2g}")
                chosen.append(components[k])
    title = "Prototypes that weigh most for each class: required (+)" + (", unrequired (-)" if both else "")
    columns = min(SHOWN, len(components))
    return plotting.image_grid(np.stack(chosen), titles=titles, columns=columns, title=title, image_inches=0.7)


def details(config: Config, results: _frame.Results) -> Sequence[str]:
    """What attacks did within the radius, and what the columns mean."""
    count, wrong = (
        int(sum(results[loss][name].sum() for loss in config.losses)) for name in ("attacked", "violations")
    )
    texts = [
        f"{count:,} attacks within the radius (PGD and {RANDOM_DRAWS} random points each): {wrong} violations.",
        "Gain: of the mean certified radius over the margin loss, each loss by the certificate that it trains for. "
        "Fooled: share of the attacked images that PGD changes at a multiple of their radius.",
    ]
    if config.smoothing is not None:
        texts.append(f"Smoothing ({config.smoothing}) certified {results['smoothing']['images'][0]:,.0f} images.")
    return texts


def bars(config: Config, loss: str) -> tuple[_frame.Bar, ...]:
    """Larger radii at nearly the accuracy of the margin loss, and no violation by any network."""
    if loss not in config.losses:
        return ()
    gained = (_frame.Bar("gain", loss, ">", 0.2), _frame.Bar("accuracy", loss, ">=", "margin", by=0.03))
    violations = tuple(_frame.Bar("violations", name, "<=", 0) for name in config.losses)
    return (*gained, *violations) if "margin" in config.losses else violations


STUDY = _frame.Study(
    measure=measure, config=Config(),
    tiny=Config(
        train_split="train[:64]", test_split="test[:64]", reasoning="cbc", num_components=2,
        losses=("margin", "radius"), num_epochs=1, batch_size=32, num_images=12, attack_steps=3, radii=(0.25,),
    ),
    numbers=lambda config: [
        _frame.Column("accuracy", "accuracy"),
        _frame.Column("mean_radius", "mean radius"),
        _frame.Column("mean_published_radius", "as published"),
        _frame.Column("gain", "gain, %", lambda v: tables.mean_and_sd(100 * v, ".1f")),
        *(_frame.Column(f"certified_at_{r:g}", f"at {r:g}") for r in config.radii),
        _frame.Column("violations", "violations", lambda v: f"{v.sum():.0f}"),
        *(_frame.Column(f"fooled_at_{factor:g}", f"fooled at {factor:g}") for factor in BEYOND),
        _frame.Column("scale", "scale"),
        _frame.Column("seconds", "seconds", ".1f"),
        _frame.Column("certifying_milliseconds_per_image", "ms per image"),
    ],
    claims=tuple(
        _frame.Claim(
            f"Robust prototypes (RBF, CBC){text}", "Saralajew et al. 2024", "2412.15499",
            ("models.prototypes.classifier", "losses.prototype_margin", "losses.prototype_radius",
             "certification.prototypes.radius"),
            "A network of distances to prototypes has an l2 radius by a formula; training for it makes the radius "
            "larger, without accuracy lost.",
            functools.partial(bars, loss=loss),
        )
        for loss, text in (("radius", ""), ("published_radius", ", radius as published"))
    ),
    figure=figures, details=details, in_folder=True,
)  # fmt: skip

if __name__ == "__main__":
    _frame.main(STUDY, __doc__)
