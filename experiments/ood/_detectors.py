"""Detectors by the name that a command line gives them, and the classifiers whose outputs they read."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from etils import epath
from jaxtyping import Array, Float, Int
from rich.console import Console
from rich.table import Table

from experiments.common import classifiers
from experiments.ood import _foreign
from robustjax import attacks, losses, scoring, training
from robustjax.typing import AnyArray, LogitsFn, Outputs

TRAINING = ("standard", "logit_norm", "mixup", "cutmix", "outlier_exposure", "energy_bounded")
NEED_OUTLIERS = ("outlier_exposure", "energy_bounded")
FGSM_EPSILON = 0.05
"""Radius of the attack, in the max-norm, that stands in for outliers; as in the code of Lee et al."""


class Labelled(NamedTuple):
    """Images with their labels, and what the classifier gives for them."""

    image: AnyArray
    label: AnyArray
    outputs: Outputs


class Context(NamedTuple):
    """What detectors may be fitted on: the classifier, and known images that it was not tested on."""

    classifier: classifiers.Classifier
    train: Labelled
    validation: Labelled

    @property
    def head(self) -> scoring.Head:
        """The classifier's last layer."""
        head = self.classifier.state.params["head"]
        return scoring.Head(head["kernel"], head["bias"])


Scorer = Callable[[AnyArray, Outputs], jax.Array]
"""``(images, outputs) -> (batch,)`` scores, HIGHER = more out-of-distribution."""


PLAIN: dict[str, tuple[Callable[[], scoring.Detector], str]] = {
    "msp": (scoring.msp, "Hendrycks, Gimpel 2017, 1610.02136"),
    "temperature_scaling": (scoring.temperature_scaling, "Guo et al. 2017, 1706.04599"),
    "max_logit": (scoring.max_logit, "Hendrycks et al. 2022, 1911.11132"),
    "energy": (scoring.energy, "Liu et al. 2020, 2010.03759"),
    "entropy": (scoring.entropy, "Hendrycks, Gimpel 2017, 1610.02136"),
    "generalized_entropy": (scoring.generalized_entropy, "Liu, Lochman, Zach 2023, CVPR (GEN)"),
    "kl_matching": (scoring.kl_matching, "Hendrycks et al. 2022, 1911.11132"),
    "mahalanobis": (scoring.mahalanobis, "Lee et al. 2018, 1807.03888"),
    "relative_mahalanobis": (scoring.relative_mahalanobis, "Ren et al. 2021, 2106.09022"),
    "knn": (scoring.knn, "Sun et al. 2022, 2204.06507"),
    "vim": (scoring.vim, "Wang et al. 2022, 2203.10807"),
    "residual": (scoring.residual, "Wang et al. 2022, 2203.10807"),
    "nac": (scoring.nac, "Liu et al. 2024, 2306.02879"),
    "gradnorm": (scoring.gradnorm, "Huang, Geng, Li 2021, 2110.00218"),
    "she": (scoring.she, "Zhang et al. 2023, ICLR"),
    "nnguide": (scoring.nnguide, "Park, Jung, Teoh 2023, 2309.14888"),
    "fdbd": (scoring.fdbd, "Liu, Qin 2024, 2312.11536"),
    "nci": (scoring.nci, "Liu, Qin 2023, 2311.01479"),
}
COMBINATORS: dict[str, tuple[Callable[[scoring.Detector], scoring.Detector], str]] = {
    "react": (scoring.react, "Sun, Guo, Li 2021, 2111.12797"),
    "dice": (scoring.dice, "Sun, Li 2022, 2111.09805"),
    "ash_s": (functools.partial(scoring.ash, method="S"), "Djurisic et al. 2023, 2209.09858"),
    "ash_b": (functools.partial(scoring.ash, method="B"), "Djurisic et al. 2023, 2209.09858"),
    "ash_p": (functools.partial(scoring.ash, method="P"), "Djurisic et al. 2023, 2209.09858"),
    "scale": (scoring.scale, "Xu et al. 2024, 2310.00227"),
    "vra": (scoring.vra, "Xu et al. 2023, 2302.11716"),
    "feature_normalized": (scoring.feature_normalized, "Mueller, Hein 2025, 2505.18032"),
}


@jax.jit
def fast_gradient_sign(
    logits_fn: LogitsFn, images: Float[AnyArray, "batch ..."], labels: Int[AnyArray, " batch"]
) -> Float[Array, "batch ..."]:
    """Attacks images by one step of ``attacks.fgsm``, few at a time."""
    attack, key = attacks.fgsm(epsilon=FGSM_EPSILON), jax.random.key(0)  # without a random start, no key is used
    attacked = lambda row: attack(key, logits_fn, row[0][None], row[1][None])[0]
    return jax.lax.map(attacked, (images, labels), batch_size=128)


@functools.cache  # one function for each architecture, so that compiled programs are shared
def layers_of(activations: Callable) -> Callable:
    """Of the body of a model: the blocks of a ResNet, the convolutions and dense layers of a smaller one.

    The rectifier behind a layer is no layer of its own. Without it, the mean of a convolution over space would be
    linear in the image; what is rectified already stays as it is.
    """

    def layers(state, x):
        found = activations(state, x).items()
        return {name: jax.nn.relu(a) for name, a in found if re.fullmatch(r"body/(?!stem)\w+(/\d+)?", name)}

    return layers


def _odin(context: Context) -> Scorer:
    score: Callable = scoring.odin(context.classifier.logits_fn()).score
    return lambda images, _: score((), images)


def _mahalanobis_ensemble(context: Context) -> Scorer:
    """Without foreign data: the weights of the layers are those that tell validation images from attacked ones."""
    classifier, (train, validation) = context.classifier, (context.train, context.validation)
    layers_fn = jax.tree_util.Partial(layers_of(classifier.functional.activations), classifier.state)
    detector: Any = scoring.mahalanobis_ensemble(layers_fn)
    attacked = fast_gradient_sign(classifier.logits_fn(), validation.image, validation.label)
    state = detector.fit(train.image, train.label, inliers=validation.image, outliers=attacked)
    return lambda images, _: detector.score(state, images)


OF_IMAGES: dict[str, tuple[Callable[[Context], Scorer], str]] = {
    "odin": (_odin, "Liang, Li, Srikant 2018, 1706.02690"),
    "mahalanobis_ensemble": (_mahalanobis_ensemble, "Lee et al. 2018, 1807.03888"),
}
NAMES = (*PLAIN, *OF_IMAGES, *COMBINATORS)
DEFAULT = (*PLAIN, *OF_IMAGES, *(f"{name}+energy" for name in COMBINATORS))
ON_VALIDATION = ("temperature_scaling",)


def names_of(detectors: str) -> list[str]:
    """The names in a comma-separated text, all of ``DEFAULT`` for an empty one; each is one that can be made."""
    names = [name.strip() for name in detectors.split(",") if name.strip()] if detectors else list(DEFAULT)
    if not names:
        raise ValueError(f"detectors must be names with commas between, got {detectors!r}.")
    if len(set(names)) < len(names):
        raise ValueError(f"detectors must name each one once, got {detectors!r}.")
    for name in names:
        *combinators, base = name.split("+")
        for part in (*combinators, base):
            if part not in NAMES:
                close = difflib.get_close_matches(part, NAMES)
                hint = f" Did you mean {' or '.join(close)}?" if close else f" There are {', '.join(NAMES)}."
                raise ValueError(f"detectors must be known names, got {part!r}.{hint}")
        if base in COMBINATORS:
            raise ValueError(f"detectors must end in what scores, such as {name}+energy, got {name!r}.")
        if any(part not in COMBINATORS for part in combinators) or (combinators and base in OF_IMAGES):
            raise ValueError(
                f"detectors must have only {', '.join(COMBINATORS)} before +, and outputs behind, got {name!r}."
            )
    return names


def fit(name: str, context: Context) -> Scorer:
    """Fits the detector of that name, one of ``names_of``."""
    *combinators, base = name.split("+")
    if base in OF_IMAGES:
        return OF_IMAGES[base][0](context)
    detector = PLAIN[base][0]()
    for combinator in reversed(combinators):
        detector = COMBINATORS[combinator][0](detector)
    rows = context.validation if base in ON_VALIDATION else context.train
    state = detector.fit(rows.outputs, rows.label, context.head)
    return lambda _, outputs: detector.score(state, outputs)


def print_list(console: Console) -> None:
    """Prints every name with its reference."""
    table = Table("detector", "paper (arXiv)", title="Detectors", title_justify="left")
    for name, (_, reference) in {**PLAIN, **OF_IMAGES}.items():
        table.add_row(name, reference)
    table.add_section()
    for name, (_, reference) in COMBINATORS.items():
        table.add_row(f"{name}+...", reference)
    console.print(table)


def classifier_of(
    config: Any,
    seed: int,
    sets: _foreign.Sets,
    recipe: training.Recipe,
    folder: epath.Path,
    console: Console,
    **place: Any,
) -> classifiers.Classifier:
    """The classifier of a seed: that of another run, or one trained as ``config.training`` says, with ``place``."""
    log = lambda message: console.print(message, soft_wrap=True)
    model_key, train_key = jax.random.split(jax.random.key(seed))
    functional = classifiers.build(config.model, sets.train, dtype="float32", key=model_key)
    if config.checkpoint is not None:
        classifier = classifiers.restored(config.checkpoint, functional, console, place["runtime"])
        classifiers.keep_to(classifier, folder)
        return classifier
    num_classes = sets.train.num_classes
    objectives = {
        "standard": lambda: losses.standard(),
        "logit_norm": lambda: losses.logit_norm(),
        "mixup": lambda: losses.mixup(num_classes=num_classes),
        "cutmix": lambda: losses.cutmix(num_classes=num_classes),
        "outlier_exposure": lambda: losses.outliers.outlier_exposure(),
        "energy_bounded": lambda: losses.standard(),  # and then fine-tuned
    }
    settings: dict[str, Any] = {
        "key": train_key,
        "recipe": recipe,
        "num_epochs": config.num_epochs,
        "seed": seed,
        "log": log,
    }
    settings |= place
    outliers = sets.outliers
    exposed = outliers if config.training == "outlier_exposure" else None
    classifier, _ = classifiers.train(
        folder / "checkpoints", functional, sets.train, objective=objectives[config.training](), outliers=exposed,
        **settings,
    )  # fmt: skip
    if outliers is None or config.training != "energy_bounded":
        return classifier
    # Margins as the paper chooses them, around the mean energies before: those of known images go down, of outliers up.
    known, foreign = (
        float(-jax.nn.logsumexp(classifiers.outputs_of(classifier, part[:5000].image).logits, axis=-1).mean())
        for part in (sets.train, outliers)
    )
    tuning = dataclasses.replace(recipe, algorithm="sgd", learning_rate=1e-3, schedule="cosine", num_epochs=10)
    margins = losses.outliers.energy_bounded(m_in=min(known, foreign - 1), m_out=foreign)
    settings |= {"recipe": tuning, "num_epochs": None}
    functional = functional._replace(state=classifier.state)
    classifier, _ = classifiers.train(
        folder / "fine_tuning", functional, sets.train, objective=margins, outliers=outliers, **settings
    )
    return classifier
