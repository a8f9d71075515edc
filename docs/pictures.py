"""The pictures of the concepts, made of the embedded digits within two minutes: ``python docs/pictures.py``."""

import functools
import pathlib
import sys

import jax
import numpy as np
import optax

from robustjax import attacks, certification, data, losses, metrics, models, plotting, scoring, training
from robustjax.certification import conformal

MODEL_KEY, TRAINING_KEY, KEY = jax.random.split(jax.random.key(0), 3)
FOLDER = pathlib.Path(__file__).parent / "pictures"


def trained(digits, *, objective=None, epochs=20):
    """A small network as a function of its images, trained on digits, and its logits alone."""
    classes = digits.num_classes
    model = models.functional(models.mlp(MODEL_KEY, hidden=(128,), image_shape=digits.image_shape, num_classes=classes))
    optimizer = optax.adam(0.003)
    result = training.fit(
        model.apply, training.init(TRAINING_KEY, model.state, optimizer), data.batches(digits, 64, seed=0),
        objective=objective or losses.standard(), optimizer=optimizer, num_steps=epochs * len(digits) // 64,
        progress=False,
    )  # fmt: skip
    outputs_fn = jax.tree_util.Partial(model.outputs, result.state.model)
    return outputs_fn, jax.tree_util.Partial(lambda state, x: model.outputs(state, x).logits, result.state.model)


def certify():
    """Two sigmas, and two numbers of draws."""
    test, curves, keys = data.load("digits", "test")[:100], {}, iter(jax.random.split(KEY, 3))
    for sigma, numbers in {0.12: (10_000, 100), 0.25: (10_000,)}.items():
        objective = losses.smoothing.gaussian_augmentation(sigma=sigma)
        _, logits_fn = trained(data.load("digits", "train"), objective=objective)
        for n in numbers:
            measure = certification.gaussian(sigma)
            found = certification.certify(next(keys), logits_fn, test.image, measure, num_estimation=n)
            curves[f"sigma {sigma}, n = {n:,}"] = found.radius, found.label == test.label
    return plotting.certified_accuracy_curve(curves)


def score():
    """Digits 0 to 5 are known; 6 to 9 are near, textures far."""
    known = [data.select_classes(data.load("digits", split), range(6)) for split in ("train", "test")]
    train, test = (part.arrays() for part in known)
    sets = {
        "digits 0 to 5": test.image,
        "digits 6 to 9": data.select_classes(data.load("digits", "test"), range(6, 10)).arrays().image,
        "textures": data.synthetic("textures", test.image.shape[1:], 300).arrays().image,
    }
    outputs_fn, _ = trained(known[0])
    scores = {}
    for name, detector in {"energy": scoring.energy(), "k-NN": scoring.knn(k=10)}.items():
        state = detector.fit(outputs_fn(train.image), train.label)
        scores[name] = {label: np.asarray(detector.score(state, outputs_fn(x))) for label, x in sets.items()}
    return plotting.score_histograms(scores, columns=2)


def attack():
    """One network, and the same answers from a network whose cross-entropy saturates."""
    test = data.load("digits", "test")[:100]
    _, logits_fn = trained(data.load("digits", "train"))
    masked_fn = jax.tree_util.Partial(lambda fn, x: 1000 * fn(x), logits_fn)
    epsilons, keys = [0.05, 0.1, 0.15], iter(jax.random.split(KEY, 12))

    def accuracies(attack, model):
        return epsilons, [
            float(attacks.robust_accuracy(next(keys), attack(epsilon=epsilon), model, test.image, test.label))
            for epsilon in epsilons
        ]

    strongest = [
        attacks.autoattack(epsilon=epsilon).evaluate(next(keys), masked_fn, test.image, test.label).robust_accuracy
        for epsilon in epsilons
    ]
    curves = {
        "FGSM": accuracies(attacks.fgsm, logits_fn),
        "PGD": accuracies(attacks.pgd, logits_fn),
        "PGD, logits times 1000": accuracies(attacks.pgd, masked_fn),
        "AutoAttack, logits times 1000": (epsilons, strongest),
    }
    return plotting.robust_accuracy_curve(curves, clean=float((logits_fn(test.image).argmax(-1) == test.label).mean()))


def calibrate():
    """A network that saw few images and is too sure; its temperature comes from images that it never saw."""
    _, logits_fn = trained(data.load("digits", "train[:150]"), epochs=200)
    held_out, test = (data.load("digits", split).arrays() for split in ("train[150:500]", "train[500:]+test"))
    temperature = scoring.fit_temperature(logits_fn(held_out.image), held_out.label).temperature
    curves = {}
    for name, t in {"as trained": 1.0, f"temperature {temperature:.1f}": temperature}.items():
        probabilities = jax.nn.softmax(logits_fn(test.image) / t)
        error = metrics.expected_calibration_error(probabilities, test.label)
        curves[f"{name}: ECE {error:.3f}"] = metrics.reliability(probabilities, test.label, num_bins=10)
    return plotting.reliability_diagram(curves)


def sets():
    """Coverage of two kinds of sets over 20 divisions of the test images, clean and attacked."""
    measure, epsilon = certification.gaussian(0.25), 0.125
    attack_key, *keys = jax.random.split(KEY, 3)
    _, logits_fn = trained(data.load("digits", "train"), objective=losses.smoothing.gaussian_augmentation(sigma=0.25))
    test = data.load("digits", "test").arrays()
    attack = attacks.pgd(epsilon=epsilon, norm="l2", keep="last", steps=20)
    images = {"clean": test.image, "attacked": attack(attack_key, logits_fn, test.image, test.label)}
    plain = {name: np.asarray(conformal.thr(jax.nn.softmax(logits_fn(x)))) for name, x in images.items()}
    smoothed = {
        name: jax.device_get(conformal.smoothed_scores(key, logits_fn, x, measure, num_samples=256))
        for key, (name, x) in zip(keys, images.items(), strict=True)
    }
    alphas, rng = np.array([0.05, 0.1, 0.15, 0.2, 0.25, 0.3]), np.random.default_rng(0)

    def coverages(form, scores, kind, divisions):
        """One row for each alpha, one column for each division."""

        def part(name, rows):
            return jax.tree.map(lambda field: field[rows], scores[name])

        def covered(fit, new, alpha):
            found = form(part("clean", fit), test.label[fit], part(kind, new), alpha=alpha)
            return found[np.arange(len(new)), test.label[new]].mean()

        return alphas, [[covered(fit, new, alpha) for fit, new in divisions] for alpha in alphas]

    divisions = [np.split(rng.permutation(500), 2) for _ in range(20)]
    robust = functools.partial(conformal.rscp_plus, measure=measure, epsilon=epsilon)
    curves = {
        "split conformal, clean": coverages(conformal.split_conformal, plain, "clean", divisions),
        "split conformal, attacked": coverages(conformal.split_conformal, plain, "attacked", divisions),
        "RSCP+, attacked": coverages(robust, smoothed, "attacked", divisions),
    }
    return plotting.spread_curve(
        curves, {"1 - alpha": (alphas, 1 - alphas)}, labels=("alpha", "coverage"), xscale="linear"
    )


PICTURES = {"certify": certify, "score": score, "attack": attack, "calibrate": calibrate, "conformal": sets}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or PICTURES:
        PICTURES[name]().savefig(FOLDER / f"{name}.png", dpi=120)
