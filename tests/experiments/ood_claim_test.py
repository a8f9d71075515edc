"""Claims on MNIST with a small training set: medians of three seeds, for which safe bars are known."""

import jax
import numpy as np
import pytest

from experiments.common import classifiers
from experiments.ood import _detectors, _foreign
from robustjax import data, losses, metrics, training

# 12,000 images and two epochs, where single seeds vary a lot: hence medians.
RECIPE = training.Recipe(algorithm="adam", learning_rate=2e-3, schedule="cosine", batch_size=128, num_epochs=2)
DETECTORS = ("knn", "energy", "max_logit", "msp", "mahalanobis")
BARS = {
    ("knn", "fashion_mnist"): 0.92,
    ("knn", "omniglot"): 0.90,
    ("knn", "uniform_noise"): 0.96,
    ("energy", "fashion_mnist"): 0.88,
    ("energy", "omniglot"): 0.92,
    ("energy", "uniform_noise"): 0.90,
    ("max_logit", "fashion_mnist"): 0.88,
    ("max_logit", "omniglot"): 0.92,
    ("max_logit", "uniform_noise"): 0.90,
    ("mahalanobis", "uniform_noise"): 0.95,
}
pytestmark = [pytest.mark.slow, pytest.mark.data]


@pytest.fixture(scope="module")
def sets(data_dir):
    foreign = [("fashion_mnist", "test"), ("omniglot", "small2")]
    opened = {
        name: data.match_images(data.load(name, split, data_dir), (28, 28, 1), invert=name == "omniglot").cached()
        for name, split in foreign
    }
    opened["uniform_noise"] = data.synthetic("uniform_noise", (28, 28, 1), 3000, seed=0)
    train, test = (data.load("mnist", split, data_dir).cached() for split in ("train[:20%]", "test"))
    outliers = data.match_images(data.load("omniglot", "small1", data_dir), (28, 28, 1), invert=True)
    far = {name: _foreign.Foreign("far", dataset) for name, dataset in opened.items()}
    return _foreign.Sets(train, data.load("mnist", "train[90%:]", data_dir), test, far, outliers.cached())


@pytest.fixture(scope="module")
def trained(sets, tmp_path_factory):
    """Classifiers by objective and seed, and how many test images each gets right."""

    def train(name, seed):
        model_key, train_key = jax.random.split(jax.random.key(seed))
        exposed = name == "outlier_exposure"
        classifier, _ = classifiers.train(
            tmp_path_factory.mktemp(f"{name}-{seed}"),
            classifiers.build("cnn", sets.train, dtype="float32", key=model_key),
            sets.train,
            key=train_key,
            objective=losses.outliers.outlier_exposure() if exposed else losses.standard(),
            recipe=RECIPE,
            num_epochs=None,
            seed=seed,
            log=lambda message: None,
            outliers=sets.outliers if exposed else None,
        )
        return classifier, classifier.accuracy(sets.test, np.arange(len(sets.test)))

    return {(name, seed): train(name, seed) for name in ("standard", "outlier_exposure") for seed in range(3)}


@pytest.fixture(scope="module")
def aurocs(sets, trained):
    """AUROC by objective, detector and set: one for each seed."""
    found = {}
    for (name, _), (classifier, _) in trained.items():
        rows = [_detectors.Labelled(p.image, p.label, classifiers.outputs_of(classifier, p.image)) for p in
                (sets.train[:10_000], sets.validation[:1000])]  # fmt: skip
        context = _detectors.Context(classifier, *rows)
        parts = {"in": sets.test[:]} | {part: foreign.dataset[:] for part, foreign in sets.foreign.items()}
        for detector in DETECTORS:
            score = _detectors.fit(detector, context)
            scores = {
                part: np.asarray(score(batch.image, classifiers.outputs_of(classifier, batch.image)))
                for part, batch in parts.items()
            }
            for part in sets.foreign:
                found.setdefault((name, detector, part), []).append(metrics.auroc(scores["in"], scores[part]))
    return found


def test_training_covers_all_classes(sets):
    assert np.bincount(sets.train[:].label, minlength=10).min() > 1000


@pytest.mark.parametrize(("detector", "part"), BARS, ids=["-".join(key) for key in BARS])
def test_median_auroc_reaches_its_bar(aurocs, detector, part):
    assert np.median(aurocs["standard", detector, part]) >= BARS[detector, part], aurocs["standard", detector, part]


@pytest.mark.parametrize("part", ["fashion_mnist", "omniglot"])
def test_energy_is_better_than_msp(aurocs, part):
    assert np.median(aurocs["standard", "energy", part]) >= np.median(aurocs["standard", "msp", part])


def test_outlier_exposure_notices_held_out_outliers_and_keeps_its_accuracy(aurocs, trained):
    assert np.median(aurocs["outlier_exposure", "msp", "omniglot"]) >= 0.98
    accuracy = {
        name: np.mean([trained[name, seed][1] for seed in range(3)]) for name in ("standard", "outlier_exposure")
    }
    assert accuracy["outlier_exposure"] > accuracy["standard"] - 0.01
