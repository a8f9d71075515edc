"""Out-of-distribution detectors by name, and what they are fitted on."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from robustjax import attacks, scoring
from robustjax.typing import AnyArray, LogitsFn, Outputs

from . import checks, classifiers, tables

FGSM_EPSILON = 0.05
"""Radius, in the max-norm, of the attack whose images stand in for outliers, as in the code of Lee et al."""


class Labelled(NamedTuple):
    """Images with their labels and the outputs of the classifier."""

    image: AnyArray
    label: AnyArray
    outputs: Outputs


class Context(NamedTuple):
    """What detectors may be fitted on: the classifier, and in-distribution images that are not tested."""

    classifier: classifiers.Classifier
    train: Labelled
    validation: Labelled
    head: scoring.Head | None  # the classifier's last layer; None where it has no linear one


def context_of(classifier: classifiers.Classifier, train: Labelled, validation: Labelled) -> Context:
    """The context; the last layer of a user's own model is the linear map from its features to its logits."""
    params = getattr(classifier.state, "params", None)
    head = params.get("head") if isinstance(params, Mapping) else None
    if head is not None:
        return Context(classifier, train, validation, scoring.Head(head["kernel"], head["bias"]))
    logits, features = (np.asarray(part, np.float64) for part in train.outputs)
    columns = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    solved, *_ = np.linalg.lstsq(columns, logits)
    # Of fewer rows than columns every answer is a linear map, but not the model's.
    linear = (
        len(columns) > 2 * columns.shape[1] > 2
        and np.abs(columns @ solved - logits).max() <= 1e-3 * np.abs(logits).max()
    )
    kernel, bias = np.split(solved.astype(np.float32), [-1])
    return Context(classifier, train, validation, scoring.Head(kernel, bias[0]) if linear else None)


Scorer = Callable[[AnyArray, Outputs], jax.Array]
"""``(images, outputs) -> (batch,)`` scores, HIGHER = more out-of-distribution."""


class Named(NamedTuple):
    """What can be named: a detector ``() -> Detector``, a combinator of one, or ``Context -> Scorer`` for images."""

    make: Callable[..., Any]
    paper: str
    arxiv: str | None = None
    about: str = ""  # what the paper calls it

    @property
    def reference(self) -> str:
        """Paper and arXiv id."""
        return ", ".join(filter(None, (self.paper, self.arxiv))) + (f" ({self.about})" if self.about else "")


PLAIN = {
    "msp": Named(scoring.msp, "Hendrycks, Gimpel 2017", "1610.02136"),
    "temperature_scaling": Named(scoring.temperature_scaling, "Guo et al. 2017", "1706.04599"),
    "max_logit": Named(scoring.max_logit, "Hendrycks et al. 2022", "1911.11132"),
    "energy": Named(scoring.energy, "Liu et al. 2020", "2010.03759"),
    "entropy": Named(scoring.entropy, "Hendrycks, Gimpel 2017", "1610.02136"),
    "generalized_entropy": Named(scoring.generalized_entropy, "Liu, Lochman, Zach 2023, CVPR", about="GEN"),
    "kl_matching": Named(scoring.kl_matching, "Hendrycks et al. 2022", "1911.11132"),
    "mahalanobis": Named(scoring.mahalanobis, "Lee et al. 2018", "1807.03888"),
    "relative_mahalanobis": Named(scoring.relative_mahalanobis, "Ren et al. 2021", "2106.09022"),
    "knn": Named(scoring.knn, "Sun et al. 2022", "2204.06507"),
    "vim": Named(scoring.vim, "Wang et al. 2022", "2203.10807"),
    "residual": Named(scoring.residual, "Wang et al. 2022", "2203.10807"),
    "nac": Named(scoring.nac, "Liu et al. 2024", "2306.02879"),
    "gradnorm": Named(scoring.gradnorm, "Huang, Geng, Li 2021", "2110.00218"),
    "she": Named(scoring.she, "Zhang et al. 2023, ICLR"),
    "nnguide": Named(scoring.nnguide, "Park, Jung, Teoh 2023", "2309.14888"),
    "fdbd": Named(scoring.fdbd, "Liu, Qin 2024", "2312.11536"),
    "nci": Named(scoring.nci, "Liu, Qin 2023", "2311.01479"),
}
COMBINATORS = {
    "react": Named(scoring.react, "Sun, Guo, Li 2021", "2111.12797"),
    "dice": Named(scoring.dice, "Sun, Li 2022", "2111.09805"),
    "ash_s": Named(functools.partial(scoring.ash, method="S"), "Djurisic et al. 2023", "2209.09858"),
    "ash_b": Named(functools.partial(scoring.ash, method="B"), "Djurisic et al. 2023", "2209.09858"),
    "ash_p": Named(functools.partial(scoring.ash, method="P"), "Djurisic et al. 2023", "2209.09858"),
    "scale": Named(scoring.scale, "Xu et al. 2024", "2310.00227"),
    "vra": Named(scoring.vra, "Xu et al. 2023", "2302.11716"),
    "feature_normalized": Named(scoring.feature_normalized, "Mueller, Hein 2025", "2505.18032"),
}


@jax.jit
def fast_gradient_sign(
    logits_fn: LogitsFn, images: Float[AnyArray, "batch ..."], labels: Int[AnyArray, " batch"]
) -> Float[Array, "batch ..."]:
    """Attacks images by one step of ``attacks.fgsm``, 128 at a time."""
    attack, key = attacks.fgsm(epsilon=FGSM_EPSILON), jax.random.key(0)  # without a random start, no key is used
    attacked = lambda row: attack(key, logits_fn, row[0][None], row[1][None])[0]
    return jax.lax.map(attacked, (images, labels), batch_size=128)


@functools.cache  # one function for each architecture, so that compiled programs are shared
def layers_of(activations: Callable) -> Callable:
    """Layers of the body of a model: the blocks of a ResNet, or the convolutions and dense layers of a smaller network.

    Each layer includes its rectifier, without which the spatial mean of a convolution would be linear in the image.
    """

    def layers(state, x):
        found = activations(state, x).items()
        return {name: jax.nn.relu(a) for name, a in found if re.fullmatch(r"body/(?!stem)\w+(/\d+)?", name)}

    return layers


def _odin(context: Context) -> Scorer:
    score: Callable = scoring.odin(context.classifier.logits_fn()).score
    return lambda images, _: score((), images)


def _mahalanobis_ensemble(context: Context) -> Scorer:
    """Without foreign data: the weights of the layers are fitted to tell validation images from attacked ones."""
    classifier, (train, validation) = context.classifier, (context.train, context.validation)
    layers_fn = jax.tree_util.Partial(layers_of(classifier.functional.activations), classifier.state)
    detector: Any = scoring.mahalanobis_ensemble(layers_fn)
    attacked = fast_gradient_sign(classifier.logits_fn(), validation.image, validation.label)
    state = detector.fit(train.image, train.label, inliers=validation.image, outliers=attacked)
    return lambda images, _: detector.score(state, images)


OF_IMAGES = {
    "odin": Named(_odin, "Liang, Li, Srikant 2018", "1706.02690"),
    "mahalanobis_ensemble": Named(_mahalanobis_ensemble, "Lee et al. 2018", "1807.03888"),
}
NAMED = PLAIN | OF_IMAGES | COMBINATORS
ALL = (*PLAIN, *OF_IMAGES, *(f"{name}+energy" for name in COMBINATORS))
ON_VALIDATION = ("temperature_scaling",)


def check(names: tuple[str, ...]) -> None:
    """Raises ValueError for a name that no detector can be made of."""
    for name in names:
        *combinators, base = name.split("+")
        for part in (*combinators, base):
            checks.known("detectors", part, NAMED)
        if base in COMBINATORS:
            raise ValueError(f"detectors must end in a detector, such as {name}+energy, got {name!r}.")
        if any(part not in COMBINATORS for part in combinators) or (combinators and base in OF_IMAGES):
            raise ValueError(
                f"detectors must have only {', '.join(COMBINATORS)} before +, and a detector that reads outputs at the "
                f"end, got {name!r}."
            )


def fit(name: str, context: Context) -> Scorer:
    """Fits the detector of that name."""
    *combinators, base = name.split("+")
    if base in OF_IMAGES:
        return OF_IMAGES[base].make(context)
    detector = PLAIN[base].make()
    for combinator in reversed(combinators):
        detector = COMBINATORS[combinator].make(detector)
    rows = context.validation if base in ON_VALIDATION else context.train
    state = detector.fit(rows.outputs, rows.label, context.head)
    return lambda _, outputs: detector.score(state, outputs)


def listed() -> tables.Table:
    """Every name with its reference."""
    rows = [(f"{name}+..." if name in COMBINATORS else name, found.reference) for name, found in NAMED.items()]
    return tables.Table("Detectors", ("detector", "paper (arXiv)"), rows)
