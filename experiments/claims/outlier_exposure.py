r"""Detectors and outlier exposure after a short training, against fixed bars: MNIST with foreign data sets.

The bars on MNIST are for 12,000 images and two epochs, where single seeds vary a lot. Digits have bars only for
comparisons.

    python -m experiments.claims.outlier_exposure
    python -m experiments.claims.outlier_exposure --dataset mnist --data-dir DIR --train-split 'train[:20%]' \
        --far fashion_mnist omniglot@small2 uniform_noise --outliers omniglot@small1
"""

from __future__ import annotations

import dataclasses

import numpy as np

from robustjax import data, losses, metrics, training

from .. import _small
from ..common import checks, classifiers, detectors, foreign, settings
from . import _frame

RECIPE = training.Recipe(algorithm="adam", learning_rate=2e-3, schedule="cosine", batch_size=128, num_epochs=2)
NAMES = ("knn", "energy", "max_logit", "msp", "mahalanobis")
BARS = {
    ("knn", "fashion_mnist"): 0.92, ("knn", "omniglot@small2"): 0.90, ("knn", "uniform_noise"): 0.96,
    ("energy", "fashion_mnist"): 0.88, ("energy", "omniglot@small2"): 0.92, ("energy", "uniform_noise"): 0.90,
    ("max_logit", "fashion_mnist"): 0.88, ("max_logit", "omniglot@small2"): 0.92,
    ("max_logit", "uniform_noise"): 0.90, ("mahalanobis", "uniform_noise"): 0.95,
}  # fmt: skip
"""AUROC after standard training on MNIST, known to be safe."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(settings.Model):
    """Settings of the measurement; the data set is in distribution."""

    num_epochs: int | None = RECIPE.num_epochs
    train_split: str = "train"
    """Images to train on, in TFDS syntax."""
    far: tuple[str, ...] = ("textures", "uniform_noise")
    """Foreign sets: textures, uniform_noise, gaussian_noise, permuted_pixels, NAME or NAME@SPLIT."""
    outliers: str = "gaussian_noise"
    """Outliers to train on; never from a stored split that is tested."""
    num_images: int = 10_000
    """Maximum number of training images that detectors are fitted on, and of images that synthetic sets have."""

    def __post_init__(self):
        super().__post_init__()
        checks.at_least(1, self, "num_images")
        checks.distinct(self, "far")


def measure(config: Config, seed: int) -> _frame.Numbers:
    """Trains with and without outliers, and scores every set with every detector."""
    sets = foreign.open_sets(
        config.dataset, config.data_dir, classes=(), near=(), far=config.far, outliers=config.outliers,
        max_images=config.num_images, seed=0,
    )  # fmt: skip
    train = data.load(config.dataset, config.train_split, config.data_dir).cached()
    assert sets.outliers is not None
    found: dict[str, dict[str, float]] = {}
    for trained, objective, outliers in (
        ("standard", losses.standard(), None),
        ("exposed", losses.outliers.outlier_exposure(), sets.outliers.cached()),
    ):
        classifier = _small.fit(
            objective, RECIPE, train, seed, model=config.model, num_epochs=config.num_epochs, outliers=outliers
        )
        accuracy = classifier.accuracy(sets.test, np.arange(len(sets.test)))
        labelled = [
            detectors.Labelled(part.image, part.label, classifiers.outputs_of(classifier, part.image))
            for part in (train[: config.num_images], sets.validation[:1000])
        ]
        context = detectors.context_of(classifier, *labelled)
        tested = {"in": sets.test} | {name: of.dataset for name, of in sets.foreign.items()}
        images = {name: part[: config.num_images].image for name, part in tested.items()}
        outputs = {name: classifiers.outputs_of(classifier, image) for name, image in images.items()}
        for name in NAMES:
            score = detectors.fit(name, context)
            scores = {part: np.asarray(score(images[part], outputs[part])) for part in images}
            aurocs = {part: metrics.auroc(scores["in"], scores[part]) for part in sets.foreign}
            found[f"{trained}, {name}"] = {**aurocs, "accuracy": accuracy}
    return found


def _of_detectors(config: Config) -> tuple[_frame.Bar, ...]:
    known = {pair: least for pair, least in BARS.items() if pair[1] in config.far and config.dataset == "mnist"}
    bars = [_frame.Bar(part, f"standard, {name}", ">=", least) for (name, part), least in known.items()]
    return (*bars, *(_frame.Bar(part, "standard, energy", ">=", "standard, msp") for part in config.far))


def _of_exposure(config: Config) -> tuple[_frame.Bar, ...]:
    gains = [_frame.Bar(part, "exposed, msp", ">", "standard, msp") for part in config.far]
    held_out = [part for part in config.far if part.split("@")[0] == config.outliers.split("@")[0]]
    least = [_frame.Bar(part, "exposed, msp", ">=", 0.98) for part in held_out]
    return (*gains, *least, _frame.Bar("accuracy", "exposed, msp", ">=", "standard, msp", by=0.01))


STUDY = _frame.Study(
    measure=measure, config=Config(),
    tiny=Config(train_split="train[:64]", model="mlp", far=("uniform_noise",), num_epochs=1, num_images=64),
    numbers=lambda config: [
        _frame.Column("accuracy", "accuracy"),
        *(_frame.Column(part, part) for part in config.far),
    ],
    claims=(
        _frame.Claim(
            "Detectors after a short training", "Sun et al. 2022", "2204.06507", ("scoring.knn",),
            "Energy is at least as good as MSP, and detectors reach the AUROC known to be safe on MNIST.",
            _of_detectors,
        ),
        _frame.Claim(
            "Outlier exposure, held-out outliers", "Hendrycks, Mazeika, Dietterich 2019", "1812.04606",
            ("losses.outliers.outlier_exposure", "losses.outliers.uniform_cross_entropy"),
            "Training on some outliers helps against others, at the same accuracy.",
            _of_exposure,
        ),
    ),
)  # fmt: skip

if __name__ == "__main__":
    _frame.main(STUDY, __doc__)
