"""Radii of prototypes: nothing within them by brute force or by attack, exact where geometry says what they must be."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import attacks, data, models
from robustjax.certification import prototypes

RNG = np.random.default_rng(1)
WITHIN = 1 - 1e-4


def network_of(*, absent, scales, squared):
    """Three classes with two reasonings each, from six points of the unit square."""
    weights = RNG.dirichlet(np.full(12 if absent else 6, 0.4), (3, 2))
    negative = weights[..., 6:] if absent else np.zeros_like(weights)
    arrays = (RNG.uniform(size=(6, 2)), np.full(6, 0.3) if scales is None else scales, weights[..., :6], negative)
    return models.prototypes.PrototypeNetwork(*(jnp.asarray(a, jnp.float32) for a in arrays), squared)


PLANE = {
    "rbf": network_of(absent=False, scales=None, squared=False),
    "cbc": network_of(absent=True, scales=None, squared=False),
    "cbc, a scale each": network_of(absent=True, scales=RNG.uniform(0.1, 0.5, 6), squared=False),
    "cbc, squared": network_of(absent=True, scales=None, squared=True),
}


@jax.jit
def answers(network, x):
    return models.prototypes.log_probabilities(network, models.prototypes.log_detections(network, x)).argmax(-1)


@pytest.mark.parametrize(("kind", "cancel"), [*((kind, True) for kind in PLANE), ("cbc", False)])
def test_no_point_of_the_disc_has_another_answer(kind, cancel):
    """Every label, on a grid of the disc: a positive radius keeps the answer, a negative one keeps it away."""
    network, x = PLANE[kind], jnp.asarray(RNG.uniform(size=(32, 2)), jnp.float32)
    angles, lengths = np.linspace(0, 2 * np.pi, 48, endpoint=False), np.linspace(0.05, WITHIN, 16)
    disc = np.stack([np.outer(lengths, np.cos(angles)), np.outer(lengths, np.sin(angles))], -1).reshape(-1, 2)
    reached = []
    for label in range(3):
        certificate = prototypes.radius(network, x, jnp.full(32, label, jnp.int32), cancel=cancel)
        radius = np.asarray(certificate.radius)
        moved = (np.asarray(x)[:, None] + np.abs(radius)[:, None, None] * disc).astype(np.float32)
        same = np.asarray(answers(network, moved.reshape(-1, 2))).reshape(32, -1) == label
        assert same[radius > 0].all()
        assert not same[radius < 0].any()
        beyond = (np.asarray(x)[:, None] + 20 * np.abs(radius)[:, None, None] * disc).astype(np.float32)
        reached.append((np.asarray(answers(network, beyond.reshape(-1, 2))).reshape(32, -1) == label)[radius > 0])
    assert not np.concatenate(reached).all()  # and the grid is able to find what is outside


def test_the_radius_of_one_prototype_for_each_class_is_the_distance_to_the_boundary():
    """On the line between two prototypes, where nothing larger can be true; and what cancels is all there is to it."""
    components = jnp.asarray([[0.0, 0.0], [1.0, 0.0]], jnp.float32)
    weights = jnp.eye(2)[:, None]
    network = models.prototypes.PrototypeNetwork(components, jnp.full(2, 0.2), weights, jnp.zeros_like(weights))
    x = jnp.stack([jnp.linspace(0, 1, 11), jnp.zeros(11)], 1)
    found = prototypes.radius(network, x, jnp.zeros(11, jnp.int32)).radius
    np.testing.assert_allclose(found, 0.5 - np.linspace(0, 1, 11), atol=1e-6)
    mixed = dataclasses.replace(network, positive=0.5 * weights + 0.25)
    ours, published = (prototypes.radius(mixed, x, jnp.zeros(11, jnp.int32), cancel=c).radius for c in (True, False))
    np.testing.assert_allclose(ours, found, atol=1e-6)
    assert (np.abs(published)[:5] < 0.7 * np.abs(ours)[:5]).all()


def test_squared_distances_have_a_larger_radius_than_published():
    network, x = PLANE["cbc, squared"], jnp.asarray(RNG.uniform(size=(32, 2)), jnp.float32)
    farthest = np.linalg.norm(np.asarray(x)[:, None] - np.asarray(network.components), axis=-1).max(-1)
    radius = np.asarray(prototypes.radius(network, x).radius)
    length = radius * (2 * farthest + radius)  # s ln z
    published = np.sqrt(farthest**2 / 9 + length / 3) - farthest / 3
    assert (radius > published).all()


@pytest.fixture(scope="module")
def digits():
    """A network of class means, and digits that it was not made of."""
    train, test = data.load("digits", "train")[:], data.load("digits", "test")[:48]
    means = np.stack([train.image[train.label == c].mean(0) for c in range(10)])
    state = models.functional(
        models.prototypes.classifier(jax.random.key(0), means, np.arange(10), reasoning="rbf")
    ).state
    return models.prototypes.network(state.params), test


def test_attacks_within_the_radius_find_nothing(digits):
    network, (image, label, _) = digits
    certificate = prototypes.radius(network, image, label)
    radius = np.asarray(certificate.radius)
    sure = radius > 0
    assert sure.mean() > 0.7

    @jax.jit
    def fooled(network, keys, image, label, epsilon):
        logits_fn = lambda x: models.prototypes.log_probabilities(network, models.prototypes.log_detections(network, x))
        attack = attacks.pgd(epsilon=0.0, norm="l2", steps=20, random_start=False)
        perturb = lambda key, x, y, e: attack.perturb(key[None], logits_fn, x[None], y[None], e)[0]
        return logits_fn(jax.vmap(perturb)(keys, image, label, epsilon)).argmax(-1) != label

    keys = jax.random.split(jax.random.key(1), len(image))
    at = lambda factor: np.asarray(fooled(network, keys, image, label, jnp.asarray(factor * np.abs(radius))))[sure]
    assert not at(WITHIN).any()
    assert at(3.0).mean() > 0.5  # the attack is no blank


def test_it_speaks_of_the_answers_where_no_labels_are_given(digits):
    network, (image, label, _) = digits
    answer = np.asarray(answers(network, image))
    own, given = prototypes.radius(network, image), prototypes.radius(network, image, jnp.asarray(answer))
    np.testing.assert_array_equal(own.label, answer)
    np.testing.assert_array_equal(own.radius, given.radius)
    assert (own.radius > 0).all()
    of_truth = np.asarray(prototypes.radius(network, image, label).radius)
    np.testing.assert_array_equal(of_truth > 0, answer == label)
    np.testing.assert_allclose(of_truth[answer == label], np.asarray(own.radius)[answer == label], rtol=1e-5)


def test_examples_do_not_depend_on_their_batch_and_it_is_traceable(digits):
    network, (image, label, _) = digits
    whole = prototypes.radius(network, image, label).radius
    parts = jax.jit(lambda n, x, y: prototypes.radius(n, x, y, batch_size=7).radius)(network, image, label)
    np.testing.assert_allclose(whole, parts, rtol=1e-4, atol=1e-5)  # blocks of another size round in another way


def test_a_radius_without_bound_ends_at_the_diagonal():
    """The first class is answered wherever nothing is detected, and nothing ever speaks against it."""
    weights = jnp.zeros((2, 1, 6))
    positive, negative = weights.at[1, 0, 0].set(0.5), weights.at[0, 0, 0].set(0.5).at[0, 0, 1].set(0.5)
    network = dataclasses.replace(PLANE["rbf"], positive=positive.at[1, 0, 1].set(0.5), negative=negative)
    far = jnp.full((3, 2), 60.0)
    radius = lambda label: (
        prototypes.radius(network, far, jnp.full(3, label, jnp.int32), input_range=(55.0, 60.0)).radius
    )
    radii = [radius(label) for label in (0, 1)]
    np.testing.assert_allclose(radii, np.full((2, 3), 5 * np.sqrt(2)) * [[1], [-1]], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": np.zeros((2, 3), np.float32)},
            "x must have 2 numbers in each row, as components have, got",
        ),
        ({"x": np.zeros((2, 2), int)}, "x must be a floating array (batch, ...), got int64"),
        ({"x": np.full((2, 2), np.nan, np.float32)}, "x must be finite, got NaN or infinity."),
        ({"labels": np.array([0, 3])}, "labels must be 0 to 2, got values from 0 to 3."),
        (
            {"labels": np.array([0.0, 1.0])},
            "labels must be an array of integers (batch,) or None, got float64",
        ),
        ({"labels": np.array([0])}, "labels must be (2,) integers, got int64 of shape (1,)."),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0."),
        ({"scale": jnp.zeros(6)}, "scale of the network must be positive, got 0.0."),
        ({"scale": jnp.ones(5)}, "network must have one scale, or one for each of 6, got (5,)."),
        ({"scale": jnp.full(6, jnp.nan)}, "scale of the network must be finite, got NaN or infinity."),
        ({"positive": jnp.ones((3, 2, 6))}, "for each reasoning, got weights from 0 to 1 and sums from 6 to 6."),
        ({"positive": jnp.ones((3, 2, 5))}, "got (6, 2), (3, 2, 5) and (3, 2, 6)."),
    ],
)
def test_bad_input_is_named(change, message, unchecked):
    arguments = {"x": np.zeros((2, 2), np.float32), "labels": None, "batch_size": 256}
    network = dataclasses.replace(PLANE["rbf"], **{k: v for k, v in change.items() if k not in arguments})
    arguments |= {k: v for k, v in change.items() if k in arguments}
    with pytest.raises(ValueError, match=re.escape(message)):
        prototypes.radius(network, **arguments)
