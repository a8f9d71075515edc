"""Mixes an accurate and a robust classifier, and measures what the mixture keeps of each.

Two mixtures, for each seed: with an adversarially trained classifier, by a fixed share and by a network, attacked as a
whole; and with a smoothed classifier, by a fixed share, certified.

    python -m experiments.claims.mixing
    python -m experiments.claims.mixing --dataset mnist --data-dir DIR --num-images 200 --num-certified 200
    python -m experiments.claims.mixing --train-split 'train[:80%]' --test-split 'train[80%:]' --robust-scale 0.5
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from robustjax import attacks, data, losses, models, plotting, training
from robustjax.certification import mixing

from .. import _small
from ..common import adversaries, checks, classifiers, settings, subsets, tables
from ..common.command_line import Number
from . import _frame
from ._mixing_parts import BETTER, PART, RADII, answers_of, certified, stands

NETWORK = training.Recipe(algorithm="adam", learning_rate=1e-3, schedule="cosine", batch_size=128, num_epochs=20)
"""Of the mixing network; the authors' is AdamW at 5e-5 for 3 epochs of CIFAR-10."""
CLEAN_LOST = 0.005
"""What a certified mixture may lose of the clean accuracy of its better part."""
ATTACKS = {
    "detached": "cross-entropy, alpha held constant",
    "attached": "cross-entropy",
    "gamma": "cross-entropy and gamma",
    "robust": "cross-entropy, targeted DLR (only with APGD)",
    "autoattack": "AutoAttack",
    "all": "all of them",
}
"""Numbers of the mixture by network: what it keeps under attacks that see more or less of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(settings.Training, settings.Splits):
    """Settings of the measurement; radii are in units of [0, 1] pixels, alpha is the share of the robust classifier.

    Without --num-epochs, adversarial training on digits takes 25 epochs.
    """

    epsilon: Number | None = None
    """Linf radius of adversarial training and of the attacks, such as 0.15 or 8/255. None: by data set."""
    alphas: tuple[float, ...] = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
    """Fixed shares of the robust classifier."""
    low: float = 0.84
    """Smallest share that the network gives to the robust classifier."""
    high: float = 0.99
    """Its largest share."""
    standard_scale: float = 1.0
    """Multiplies the logits of the accurate classifier before they are mixed."""
    robust_scale: float = 1.0
    """Multiplies the logits of the robust classifier before they are mixed."""
    network_epochs: int = NETWORK.num_epochs
    """Passes over the training images for the mixing network."""
    gamma_weight: float = 0.0
    """Weight of gamma in what the adversary raises in training. With 0.2, the mean of the authors' draws, a network
    on digits could not tell attacked images from clean ones."""
    attack: Literal["apgd", "pgd"] = "apgd"
    """apgd: APGD, plain and targeted; pgd: only PGD on cross-entropy, which is weaker and compiles sooner."""
    steps: int = 100
    """Steps of each attack; in training there are 10."""
    autoattack: bool = True
    """Also run AutoAttack on the robust classifier and on the mixture by network."""
    num_images: int | None = None
    """Maximum number of images to attack, evenly spaced. None: all, but 64 of the digits."""
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
    """Maximum number of images to certify, evenly spaced. None: all, but 100 of the digits."""

    def __post_init__(self):
        super().__post_init__()
        checks.at_least(1, self, "network_epochs", "steps", "num_images", "num_certified")
        checks.at_least(1, self, "num_selection", "num_estimation")
        if not self.alphas or not all(0 <= alpha <= 1 for alpha in self.alphas):
            raise ValueError(f"alphas must be one or more numbers in [0, 1], got {self.alphas}.")
        if not 0.5 < self.certified_alpha <= 1:
            raise ValueError(f"certified_alpha must be above 1/2 and at most 1, got {self.certified_alpha}.")
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"low and high must be 0 <= low <= high <= 1, got {self.low} and {self.high}.")
        checks.positive(self, "epsilon", "sigma", "standard_scale", "robust_scale")
        if not 0 <= self.gamma_weight <= 1:
            raise ValueError(f"gamma_weight must lie in [0, 1], got {self.gamma_weight}.")
        checks.probability(self, "failure")
        classifiers.recipe_of(self.dataset, self.recipe)
        self.radius()

    def radius(self) -> float:
        """Linf radius of adversarial training and of the attacks."""
        return adversaries.default("train_epsilon", self.epsilon, self.dataset, "linf")


def train(
    config: Config, seed: int, images: data.Dataset, key: jax.Array, place: _frame.Place
) -> tuple[dict[str, classifiers.Classifier], mixing.mixture, Any]:
    """The three classifiers by name, the mixture of the first two, and its trained state."""
    recipe = classifiers.recipe_of(config.dataset, config.recipe)
    attack = attacks.pgd(epsilon=config.radius(), steps=10, keep="last")
    objectives = {
        "standard": losses.standard(),
        "robust": losses.adversarial.adversarial_training(attack=attack),
        "smoothed": losses.smoothing.gaussian_augmentation(sigma=config.sigma),
    }
    keys = [jax.random.split(jax.random.fold_in(key, index)) for index in range(4)]  # of model and training
    fit, found = functools.partial(_small.train, place, seed, images), {}
    for (name, objective), (model_key, train_key) in zip(objectives.items(), keys):
        num_epochs = config.num_epochs or (25 if name == "robust" and config.dataset == "digits" else None)
        functional = classifiers.build(config.model, images, dtype="float32", key=model_key)
        found[name] = fit(name, functional, objective, recipe, train_key, num_epochs)
    standard, robust = found["standard"], found["robust"]
    seen = jax.eval_shape(standard.functional.outputs, standard.state, jnp.zeros((1, *images.image_shape)))
    num_inputs = 2 * sum(part.shape[-1] for part in seen)
    network = models.functional(models.mixing_network(keys[3][0], num_inputs=num_inputs))
    mixture = mixing.mixture(
        standard=standard.functional.apply,
        robust=robust.functional.apply,
        network=network.apply,
        **{name: getattr(config, name) for name in ("low", "high", "standard_scale", "robust_scale")},
    )
    network = network._replace(apply=mixture, state=mixture.init(standard.state, robust.state, network.state))
    adversary = dataclasses.replace(attack, loss=losses.adaptive_cross_entropy(weight=config.gamma_weight))
    objective, recipe = losses.mixing_training(attack=adversary), dataclasses.replace(NETWORK, augment=recipe.augment)
    return found, mixture, fit("network", network, objective, recipe, keys[3][1], config.network_epochs).state


def _fixed(parts: tuple[Callable, Callable], scales: tuple[float, float], alpha: Any, x: jax.Array) -> jax.Array:
    """The mixture by a fixed share."""
    return mixing.mix(*(scale * logits_fn(x) for scale, logits_fn in zip(scales, parts, strict=True)), alpha=alpha)


@functools.cache
def _blind(mixture: mixing.mixture) -> mixing.mixture:
    """The mixture as an attack sees it that takes alpha for a constant."""

    def network(state, x, *, train=False):
        return jax.lax.stop_gradient(mixture.network(state, x, train=train)[0]), state

    return dataclasses.replace(mixture, network=network)


def attacks_of(config: Config, num_classes: int) -> dict[str, Any]:
    """The attacks on the mixtures, by name."""
    make = attacks.apgd if config.attack == "apgd" else attacks.pgd
    both = {"epsilon": config.radius(), "steps": config.steps}
    plain, targeted = make(**both), attacks.apgd_targeted(**both, num_targets=min(9, num_classes - 1))
    return {
        "ce": plain,
        "robust": attacks.worst_of(plain, targeted) if config.attack == "apgd" else plain,
        "gamma": make(**both, loss=losses.adaptive_cross_entropy(weight=0.4)),
        "autoattack": attacks.autoattack(epsilon=config.radius()),
    }


def arm_of(alpha: float) -> str:
    """The name of the mixture by a fixed share."""
    return {0.0: "accurate", 1.0: "robust"}.get(alpha, f"alpha {alpha:g}")


def trade_off(
    config: Config, found: dict[str, classifiers.Classifier], mixture: mixing.mixture, state: Any, test: data.Dataset,
    key: jax.Array,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Accuracy on all test images, and what attacks leave of it on some, for each fixed share and for the network."""
    image, label, _ = (np.asarray(part) for part in test[np.arange(len(test))])
    chosen = subsets.evenly(len(test), config.num_images or (64 if config.dataset == "digits" else len(test)))
    left = functools.partial(stands, key, image=image[chosen], label=label[chosen])
    accuracy = lambda logits_fn: float((answers_of(logits_fn, image) == label).mean())
    attack, standard, robust = attacks_of(config, test.num_classes), found["standard"], found["robust"]
    parts, scales = (standard.logits_fn(), robust.logits_fn()), (config.standard_scale, config.robust_scale)
    arms: dict[str, dict[str, float]] = {}
    for alpha in config.alphas:
        logits_fn = jax.tree_util.Partial(_fixed, parts, scales, alpha)
        names = ["robust", "autoattack"] if config.autoattack and alpha == 1 else ["robust"]
        of_share = {name: float(left(attack[name], logits_fn).mean()) for name in names}
        arms[arm_of(alpha)] = {"clean": accuracy(logits_fn), **of_share}
    logits_fn, blind = mixture.logits_fn(state), _blind(mixture).logits_fn(state)
    names = ["robust", "gamma", "autoattack"] if config.autoattack else ["robust", "gamma"]
    correct = {name: left(attack[name], logits_fn) for name in names}
    correct |= {"all": np.all([*correct.values()], axis=0)}
    correct |= {"detached": left(attack["ce"], blind, whole=logits_fn), "attached": left(attack["ce"], logits_fn)}
    numbers = {"clean": accuracy(logits_fn)} | {name: float(of.mean()) for name, of in correct.items()}
    as_accurate = {"clean": numbers["clean"], "robust": at_accuracy(numbers["clean"], [*arms.values()])}
    return arms | {"network": numbers, "fixed, as accurate": as_accurate}


def at_accuracy(clean: float, fixed: Sequence[dict[str, float]]) -> float:
    """Robust accuracy of the fixed mixture of this clean accuracy: interpolated, 0 beyond the curve."""
    points = sorted((row["clean"], row["robust"]) for row in fixed)
    best = [max(robust for other, robust in points if other >= at) for at, _ in points]  # a more accurate one has it
    return float(np.interp(clean, [at for at, _ in points], best, right=0.0))


def measure(config: Config, seed: int, place: _frame.Place) -> _frame.Numbers:
    """Trains, attacks and certifies with one seed; trainings that were interrupted resume."""
    images, test = config.images()
    train_key, attack_key, certify_key = jax.random.split(jax.random.key(seed), 3)
    found, mixture, state = train(config, seed, images, train_key, place)
    if jax.process_index() != 0:
        return {}
    arms = trade_off(config, found, mixture, state, test, attack_key)
    return arms | certified(config, found, test, certify_key)


def figures(config: Config, results: _frame.Results) -> dict[str, Any]:
    """Robust accuracy against clean accuracy, and certified accuracy against the radius."""
    joined = lambda arm, name: np.concatenate([*results[f"certified: {arm}"][name]])
    curves = {arm: (joined(arm, "radius"), joined(arm, "right")) for arm in ("smoothed", "mixture")}
    return {"trade_off": _trade_off(config, results), "certified_accuracy": plotting.certified_accuracy_curve(curves)}


def _trade_off(config: Config, results: _frame.Results) -> Any:
    from matplotlib.figure import Figure

    point = lambda arm: [results[arm][name].mean() for name in ("clean", "robust")]
    curve = np.array([point(arm_of(alpha)) for alpha in config.alphas])
    figure = Figure(figsize=(5.0, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*curve.T, label="fixed share", **plotting.line_style(0))
    for alpha, place in zip(config.alphas, curve, strict=True):
        axes.annotate(f"{alpha:g}", place, textcoords="offset points", xytext=(4, 3), fontsize="x-small")
    star = plotting.line_style(1) | {"linestyle": "none", "marker": "*", "markersize": 11}
    axes.plot(*point("network"), label="by network", **star)
    text = adversaries.text_of(config.radius())
    axes.set(xlabel="clean accuracy", ylabel=f"robust accuracy ({config.attack.upper()}, linf {text})")
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    return figure


def details(config: Config, results: _frame.Results) -> Sequence[tables.Table | str]:
    """What attacks see of the network, what it gains and loses, and what attacks did within the certified radii."""
    network, mixture = results["network"], results["certified: mixture"]
    rows = [[text, tables.mean_and_sd(network[name])] for name, text in ATTACKS.items() if name in network]
    parts: list[tables.Table | str] = [tables.Table("Mixture by network, robust accuracy", ["attack", "left"], rows)]
    if 1.0 in config.alphas:
        strongest = "autoattack" if config.autoattack else "robust"
        gained = tables.mean_and_sd(network["clean"] - results["robust"]["clean"])
        lost = tables.mean_and_sd(results["robust"][strongest] - network[strongest])
        parts.append(f"The network gains {gained} clean accuracy over the robust classifier and loses {lost} robust.")
    changed, attacked = (int(mixture[name].sum()) for name in ("changed", "attacked"))
    return [
        *parts,
        f"Attacks within the certified radii change {changed} of {attacked} answers.",
        f"Accuracy under attack is at linf {adversaries.text_of(config.radius())}; certified radii are l2, at sigma "
        f"{config.sigma:g} and alpha {config.certified_alpha:g}.",
    ]


STUDY = _frame.Study(
    measure=measure, config=Config(),
    tiny=Config(
        train_split="train[:64]", test_split="test[:16]", model="mlp", num_epochs=1, network_epochs=1,
        alphas=(0.0, 1.0), attack="pgd", steps=2, autoattack=False, sigma=0.25, num_selection=1000,
        num_estimation=1000,
    ),
    numbers=lambda config: [
        _frame.Column("clean", "clean"),
        _frame.Column("robust", config.attack.upper()),
        *([_frame.Column("autoattack", "AutoAttack")] if config.autoattack else []),
        *(_frame.Column(f"at_{r:g}", f"certified at {r:g}") for r in RADII),
    ],
    claims=(
        _frame.Claim(
            "Mixed classifiers", "Bai et al. 2023", "2301.12554",
            tuple(f"certification.mixing.{name}" for name in ("mix", "smoothed_radius", "lipschitz_radius")),
            "A mixture keeps the class of its robust part in a certified radius, and the other's accuracy.",
            (
                _frame.Bar("clean", "certified: mixture", ">=", BETTER, by=CLEAN_LOST),
                _frame.Bar("at_0.25", "certified: mixture", ">=", PART),
                _frame.Bar("changed", "certified: mixture", "<=", 0),
            ),
        ),
        _frame.Claim(
            "Mixing network", "Bai et al. 2023", "2301.12554",
            ("certification.mixing.mixture", "models.mixing_network", "losses.mixing_training",
             "losses.adaptive_cross_entropy"),
            "A mixture whose shares a network chooses for each input is more robust than an equally accurate fixed "
            "mixture.",
            (_frame.Bar("robust", "network", ">", "fixed, as accurate"),),
        ),
    ),
    figure=figures, details=details, in_folder=True,
)  # fmt: skip

if __name__ == "__main__":
    _frame.main(STUDY, __doc__)
