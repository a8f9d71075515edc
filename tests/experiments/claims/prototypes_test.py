"""The study of prototypes: what it counts, what it compares, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from experiments import smoothing
from experiments.claims import _frame, prototypes
from experiments.common import certificates, runtimes
from robustjax import data


def numbers_of(radii=(), right=(True, True, True, False), **fooled):
    """Of a network that answers three of four images correctly and has a radius of those; two were attacked."""
    radius, published = np.array([0.5, 0.25, 1.0, -0.5]), np.array([0.25, 0.25, 0.5, -0.5])
    usual = {"pgd_0.9999": [False, False], "random": [False, False], "pgd_1.5": [True, False], "pgd_2": [True, True]}
    found = {name: np.array(values) for name, values in (usual | fooled).items()}
    return prototypes.numbers_of(np.array(right), radius, published, found, radii)


def place_of(folder):
    return _frame.Place(folder, runtimes.HERE, Console(quiet=True), runtimes.Watch([], None))


def test_numbers_are_those_of_the_certificates():
    numbers = numbers_of(radii=(0.0, 0.5, 0.75))
    assert numbers["accuracy"] == 0.75
    assert numbers["mean_radius"] == (0.5 + 0.25 + 1.0) / 4
    assert numbers["mean_published_radius"] == 0.25
    assert [numbers[f"certified_at_{r}"] for r in ("0", "0.5", "0.75")] == [0.75, 0.5, 0.25]
    assert (numbers["attacked"], numbers["violations"]) == (2, 0)
    assert (numbers["fooled_at_1.5"], numbers["fooled_at_2"]) == (0.5, 1.0)


def test_a_violation_is_counted():
    of = lambda **changes: numbers_of(**changes)["violations"]
    assert of(random=[True, False]) == 1
    assert of(**{"pgd_0.9999": [True, False], "random": [True, True]}) == 2
    assert of(right=(True, True, False, False)) == 1  # a radius of a wrong answer


def test_each_loss_gains_by_its_own_certificate():
    row = lambda ours, published: {"mean_radius": ours, "mean_published_radius": published}
    found = {"margin": row(1.0, 0.5), "radius": row(1.5, 0.1), "published_radius": row(9.0, 0.625)}
    assert prototypes.gains_of(found) == {"radius": 0.5, "published_radius": 0.25}
    assert prototypes.gains_of({"radius": row(1.5, 0.1)}) == {}


def test_bars_are_of_the_losses_that_are_measured():
    of = lambda losses: [str(bar) for bar in prototypes.bars(prototypes.Config(losses=losses), "radius")]
    violations = ["violations: margin <= 0", "violations: radius <= 0"]
    assert of(("margin", "radius")) == ["gain: radius > 0.2", "accuracy: radius >= margin - 0.03", *violations]
    assert of(("radius",)) == violations[1:]
    assert of(("margin",)) == []


def test_components_stay_images():
    keep = prototypes._within_images
    params = {"components": np.array([0.25, 0.5, 0.75], np.float32), "scale": np.float32(1.0)}
    updates = {"components": np.array([-0.5, 0.25, 0.5], np.float32), "scale": np.float32(9.0)}
    updates, _ = keep.update(updates, keep.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(new["components"], [0.0, 0.75, 1.0])
    assert new["scale"] == 10


def test_networks_start_with_images_of_each_class():
    train = data.load("digits", "train[:64]").cached()
    start = prototypes.untrained(prototypes.STUDY.tiny, train, 0, jax.random.key(0)).state.params["components"][...]
    images = np.asarray(train[:].image).reshape(64, -1)
    distance = np.abs(np.asarray(start)[:, None] - images[None]).max(-1)
    nearest = np.asarray(train[:].label)[distance.argmin(1)]
    assert distance.min(1).max() == 0
    np.testing.assert_array_equal(nearest, np.repeat(np.arange(10), 2))
    with pytest.raises(ValueError, match=r"num_components must be at most \d, the images of the smallest class, got 9"):
        prototypes.untrained(dataclasses.replace(prototypes.STUDY.tiny, num_components=9), train, 0, jax.random.key(0))


def test_attacks_find_what_is_beyond_the_radius_and_nothing_within(monkeypatch):
    monkeypatch.setattr(prototypes, "ATTACK_LOSSES", ("margin",))  # one program less to compile
    # A linear model: the distance to the boundary is the radius.
    image = np.random.default_rng(0).uniform(0.3, 0.7, (8, 2, 2, 1)).astype(np.float32)
    w = np.array([0.5, -0.5, 0.5, 0.5], np.float32)  # of length 1
    score = image.reshape(8, 4) @ w - 0.5
    scores = lambda x: x.reshape(-1, 4) @ w - 0.5
    logits_fn = jax.tree_util.Partial(lambda x: jnp.stack([-scores(x), scores(x)], axis=-1))
    found = prototypes.attacked(jax.random.key(0), logits_fn, image, (score > 0).astype(int), np.abs(score), 3)
    assert not found["pgd_0.9999"].any()
    assert not found["random"].any()
    assert found["pgd_1.5"].all()
    assert found["pgd_2"].all()


def test_smoothing_stands_beside(tmp_path, monkeypatch):
    """Three certificates: one right, one wrong, one abstained."""
    rows = [(0, 3, (3, 0.4, 0.9, 100)), (1, 5, (6, 2.0, 0.9, 100)), (2, 5, (-1, 0.0, 0.4, 100))]
    lines = [",".join(certificates.COLUMNS), *(certificates.line_of(*row, 0.1) for row in rows)]
    (tmp_path / "certificates.csv").write_text("\n".join(lines) + "\n")
    config = dataclasses.replace(prototypes.STUDY.tiny, smoothing=str(tmp_path), radii=(0.25, 0.5))
    numbers = prototypes.smoothed(config, 0, place_of(tmp_path))
    assert numbers["mean_radius"] == pytest.approx(0.4 / 3)
    assert (numbers["certified_at_0.25"], numbers["certified_at_0.5"], numbers["images"]) == (1 / 3, 0, 3)

    made = []

    def run(config, runtime):
        made.append(config)
        config.folder().mkdir(parents=True)
        (config.folder() / "certificates.csv").write_text("\n".join(lines) + "\n")

    monkeypatch.setattr(smoothing, "run", run)
    config = dataclasses.replace(config, smoothing="new", sigma=0.3)
    again = prototypes.smoothed(config, 2, place_of(tmp_path / "seed-2"))
    assert again["mean_radius"] == numbers["mean_radius"]
    assert (made[0].dataset, made[0].test_split, made[0].sigma, made[0].seed) == ("digits", "test[:64]", 0.3, 2)
    assert tmp_path / "seed-2" in made[0].folder().parents


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_components": 0}, "num_components must be an integer of at least 1, got 0"),
        ({"num_epochs": 0}, "num_epochs must be an integer of at least 1, got 0"),
        ({"attack_steps": 0}, "attack_steps must be an integer of at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
        ({"losses": ()}, "losses must hold at least one value"),
        ({"radii": (1.0, 1.0)}, r"radii must hold at least one value, and each once, got \(1.0, 1.0\)"),
        ({"radii": (-1.0,)}, "radii must be at least 0 and finite"),
        ({"margin": 2.0}, "margin must lie strictly between 0 and 1, got 2.0"),
        ({"target": 0.0}, "target must be positive and finite, got 0.0"),
        ({"smoothing": "no/such/run"}, "smoothing must be a run of experiments.smoothing, but no/such/run has no"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        prototypes.Config(**settings)
