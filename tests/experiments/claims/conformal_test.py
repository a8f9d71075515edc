"""The study of prediction sets: what it attacks, what it counts, what it says and what it refuses."""

import jax
import numpy as np
import pytest
from rich.console import Console
from scipy.stats import norm

from experiments.claims import _frame, conformal
from experiments.common import classifiers, runtimes
from robustjax.typing import Outputs

TINY = conformal.STUDY.tiny


def scores_under_the_worst_attack(rng, num_images):
    """Arrays whose scores rise by as much as an attack can bring about, and the labels."""
    label = rng.integers(0, 3, num_images)
    clean = rng.uniform(0.3, 0.7, (num_images, 3)).astype(np.float32)
    clean[np.arange(num_images), label] -= 0.2
    worst = norm.cdf(norm.ppf(clean) + TINY.epsilon / TINY.sigma).astype(np.float32)
    arrays = {}
    for name, mean in (("clean", clean), ("attacked", worst), ("holdout", np.full((8, 3), 0.9, np.float32))):
        of_name = conformal.conformal.SmoothedScores(mean, np.full_like(mean, 0.01), np.full(len(mean), 10_000))
        arrays |= {f"{name}_{field}": value for field, value in of_name._asdict().items()}
    images = np.zeros((num_images, 1, 1, 1), np.float32)
    return arrays, conformal.Images((images[:8], np.zeros(8, int)), (images, label))


def test_the_worst_attack_undoes_the_radius_and_larger_corrections_make_larger_sets():
    arrays, images = scores_under_the_worst_attack(np.random.default_rng(0), 40)
    found = conformal.covered(TINY, 0, arrays, images, "thr+ptt")
    # RSCP counts with a shift of epsilon / sigma in terms of the normal quantile, which is what the attack does.
    assert found["rscp"]["coverage, attacked"] == found["conformal"]["coverage, clean"]
    assert found["rscp"]["size, attacked"] == found["conformal"]["size, clean"]
    assert found["conformal"]["coverage, attacked"] < found["conformal"]["coverage, clean"] - 0.1
    for where in ("clean", "attacked"):
        sizes = [found[name][f"size, {where}"] for name in ("conformal", "rscp", "rscp+", "rscp+ hoeffding")]
        assert sizes == sorted(sizes)
        assert sizes[0] < sizes[2]
    plus = found["rscp+"]
    assert plus[conformal.LOW] == min(
        plus[f"coverage, {where}"] - 2 * plus[f"coverage error, {where}"] for where in ("clean", "attacked")
    )


def test_holdout_images_join_the_calibration_without_ptt():
    arrays, images = scores_under_the_worst_attack(np.random.default_rng(0), 40)
    size = lambda score: conformal.covered(TINY, 0, arrays, images, score)["conformal"]["size, clean"]
    assert size("thr") == 3  # eight scores of 0.9 among 28 are more than a tenth
    assert size("thr+ptt") < 2


def test_attacked_images_lie_in_the_ball_and_are_harder():
    rng = np.random.default_rng(0)
    outputs = lambda state, x: Outputs(x.reshape(len(x), -1) @ state, x.reshape(len(x), -1))
    kernel, x = rng.normal(size=(4, 3)).astype(np.float32), rng.uniform(0.3, 0.7, (6, 2, 2, 1)).astype(np.float32)
    label = np.arange(6) % 3
    functional = type("Linear", (), {"outputs": staticmethod(outputs)})
    x_adv = conformal.attacked(TINY, classifiers.Classifier(functional, kernel), (x, label), jax.random.key(0))
    lengths = np.linalg.norm((x_adv - x).reshape(6, -1), axis=1)
    np.testing.assert_allclose(lengths, TINY.epsilon, rtol=1e-4)
    loss = lambda x: -np.asarray(jax.nn.log_softmax(x.reshape(6, -1) @ kernel))[np.arange(6), label]
    assert (loss(x_adv) > loss(x) + 0.05).all()


def test_a_run_continues_from_attacked_images_and_scores(tmp_path, monkeypatch):
    place = _frame.Place(tmp_path, runtimes.HERE, Console(quiet=True), runtimes.Watch([], None))
    config = conformal.Config(train_split="train[:64]", model="mlp", scores=("thr",), splits=2, rct=False)
    arrays, images = scores_under_the_worst_attack(np.random.default_rng(0), 40)
    monkeypatch.setattr(
        classifiers, "train", lambda *args, **settings: (classifiers.Classifier(args[1], args[1].state), {})
    )
    monkeypatch.setattr(conformal, "images_of", lambda *_: images)
    monkeypatch.setattr(conformal, "attacked", lambda *_: np.zeros(1))
    monkeypatch.setattr(conformal, "smoothed", lambda *_: iter([("thr", arrays), ("thr+ptt", arrays)]))
    first = conformal.measure(config, 0, place)
    of = lambda arm: first[arm]["size, clean"]
    assert first["thr+ptt rscp+"]["size over that without PTT"] == of("thr+ptt rscp+") / of("thr rscp+")
    assert first["all rscp+"][conformal.LOW] == min(of[conformal.LOW] for arm, of in first.items() if "rscp+" in arm)
    for name in ("attacked", "smoothed"):
        monkeypatch.setattr(conformal, name, lambda *_: pytest.fail("made again"))
    assert conformal.measure(config, 0, place) == first


@pytest.mark.parametrize(("alpha", "words"), [(0.1, "0.9, is VIOLATED: at worst 0.890, "), (0.2, "0.8, is held: ")])
def test_a_violated_guarantee_is_reported(alpha, words):
    config = conformal.Config(scores=("thr",), rct=False, alpha=alpha)
    numbers = {conformal.LOW: np.array([0.95, 0.93]), "size, clean": np.ones(2), "num_images": np.array([40, 40])}
    results = {f"{name} {method}": dict(numbers) for name in config.names for method in conformal.METHODS}
    results["thr rscp+"][conformal.LOW] = np.array([0.97, 0.89])
    results["thr rscp"][conformal.LOW] = np.array([0.5, 0.5])  # which guarantees nothing
    finding = conformal.details(config, results)[0]
    assert words in finding
    assert finding.endswith("(thr rscp+, seed 1).")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta": 0.05}, "beta must lie strictly between 0 and alpha / 2 = 0.05, got 0.05"),
        ({"alpha": 1.0}, "alpha must lie strictly between 0 and 1, got 1.0"),
        ({"epsilon": 0.0}, "epsilon must be positive and finite, got 0.0"),
        ({"scores": ()}, "scores must name one or more of thr, aps, raps"),
        ({"splits": 0}, "splits must be an integer of at least 1, got 0"),
        ({"recipe": "none"}, "recipe must be one of digits, mnist"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        conformal.Config(**settings)


def test_a_holdout_leaves_images():
    from robustjax import data

    test = data.load("digits", "test")
    with pytest.raises(ValueError, match="num_holdout must leave images to calibrate and test, got 500 of 500"):
        conformal.images_of(conformal.Config(num_holdout=500), test)
    images = conformal.images_of(conformal.Config(num_holdout=30, num_images=100), test)
    assert (len(images.holdout[1]), len(images.pool[1])) == (30, 70)
