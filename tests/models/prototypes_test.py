"""Networks of prototypes beside NumPy in float64, their radius beside a root that is searched for, and their start."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from robustjax import models

RNG = np.random.default_rng(0)
CLASSES, COUNT, DIM = 3, 5, 4
X = jnp.asarray(RNG.uniform(size=(7, DIM)), jnp.float32)
LABELS = jnp.arange(7, dtype=jnp.int32) % CLASSES
KINDS = {  # shapes are the same, so that all but the squared one share compiled programs
    "rbf": {},
    "cbc": {"absent": True},
    "cbc, a scale each": {"absent": True, "scale": RNG.uniform(0.2, 0.6, COUNT)},
    "cbc, squared": {"absent": True, "squared": True},
    "rbf, sharp": {"scale": 0.004},
    "cbc, sharp": {"absent": True, "scale": 0.004},
}
radius = jax.jit(models.prototypes.radius, static_argnames="cancel")


@jax.jit
def log_detections_and_probabilities(network, x):
    logs = models.prototypes.log_detections(network, x)
    return logs, models.prototypes.log_probabilities(network, logs)


def network_of(absent=False, scale=0.3, squared=False):
    weights = RNG.dirichlet(np.full((2 if absent else 1) * COUNT, 0.5), (CLASSES, 2))
    positive, negative = weights[..., :COUNT], weights[..., COUNT:] if absent else np.zeros_like(weights)
    arrays = (RNG.uniform(size=(COUNT, DIM)), np.broadcast_to(scale, (COUNT,)), positive, negative)
    return models.prototypes.PrototypeNetwork(*(jnp.asarray(a, jnp.float32) for a in arrays), squared)


NETWORKS = {kind: network_of(**settings) for kind, settings in KINDS.items()}


def in_float64(network):
    """Detections (batch, components), P and N, all the reasonings one behind the other, scales and distances."""
    components, scale, positive, negative = (
        np.asarray(a, np.float64) for a in (network.components, network.scale, network.positive, network.negative)
    )
    distances = np.linalg.norm(np.asarray(X, np.float64)[:, None] - components, axis=-1)
    detections = np.exp(-(distances ** (2 if network.squared else 1)) / scale)
    return detections, positive, negative, scale, distances


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_are_those_of_the_equation(kind):
    network = NETWORKS[kind]
    detections, positive, negative, _, _ = in_float64(network)
    logs, found = log_detections_and_probabilities(network, X)
    np.testing.assert_allclose(logs, np.log(detections), rtol=1e-4)
    said = np.einsum("bk,crk->bcr", detections, positive) + np.einsum("bk,crk->bcr", 1 - detections, negative)
    np.testing.assert_allclose(found, np.log(said.max(-1)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cancel", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_radius_is_where_the_bound_reaches_zero(kind, cancel):
    """The bound of p_y - p_j, written out, and its root in the length e; half of them are of classes not answered."""
    network = NETWORKS[kind]
    detections, positive, negative, scale, distances = in_float64(network)
    wanted = np.empty(7)
    for i in range(7):
        largest = distances[i].max()

        def root_of(y, j, i=i, largest=largest):
            shrinks, grows = positive[y] + negative[j], negative[y] + positive[j]
            if cancel:
                shrinks, grows = shrinks - np.minimum(shrinks, grows), grows - np.minimum(shrinks, grows)
            bias = negative[y].sum() - negative[j].sum()

            def bound(e):
                change = abs(e) * (2 * largest + abs(e)) if network.squared else abs(e)
                factor = np.exp(np.sign(e) * change / scale.min())
                return bias + shrinks @ detections[i] / factor - grows @ detections[i] * factor

            return optimize.brentq(bound, -2, 2, xtol=1e-14, rtol=1e-12)

        label = int(LABELS[i])
        of_label = [(label, r) for r in range(positive.shape[1])]
        others = [(c, r) for c, r in np.ndindex(*positive.shape[:2]) if c != label]
        wanted[i] = max(min(root_of(y, j) for j in others) for y in of_label)
    np.testing.assert_allclose(radius(network, X, LABELS, cancel=cancel), wanted, rtol=2e-4, atol=1e-6)
    assert (wanted < 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_sign_is_the_answer_and_what_cancels_only_helps(kind):
    network = NETWORKS[kind]
    answers = log_detections_and_probabilities(network, X)[1].argmax(-1)
    for label in range(CLASSES):
        ours, published = (
            np.asarray(radius(network, X, jnp.full(7, label, jnp.int32), cancel=cancel)) for cancel in (True, False)
        )
        np.testing.assert_array_equal(ours > 0, answers == label)
        np.testing.assert_array_equal(published > 0, answers == label)
        assert (np.abs(ours) >= np.abs(published) * (1 - 1e-5)).all()


def test_radial_basis_functions_have_half_the_logarithm_of_a_ratio():
    network = NETWORKS["rbf"]
    log_p = np.asarray(log_detections_and_probabilities(network, X)[1])
    of_label = log_p[np.arange(7), LABELS]
    others = np.where(np.arange(CLASSES) == np.asarray(LABELS)[:, None], -np.inf, log_p).max(-1)
    wanted = float(network.scale[0]) / 2 * (of_label - others)
    np.testing.assert_allclose(radius(network, X, LABELS, cancel=False), wanted, rtol=1e-4)


def test_a_sharp_network_is_that_of_the_nearest_prototype():
    """Where every detection underflows, the radius is half of how much farther the nearest wrong prototype is."""
    own = np.array([0, 0, 1, 1, 2]) == np.arange(CLASSES)[:, None]
    weights = jnp.asarray(np.repeat((own / own.sum(1, keepdims=True))[:, None], 2, axis=1), jnp.float32)
    components = NETWORKS["rbf"].components
    network = models.prototypes.PrototypeNetwork(components, jnp.full(COUNT, 1e-4), weights, jnp.zeros_like(weights))
    distances = np.linalg.norm(np.asarray(X, np.float64)[:, None] - np.asarray(components) - 3, axis=-1)
    to_class = np.where(own[None], distances[:, None], np.inf).min(-1)
    label = np.asarray(LABELS)[:, None] == np.arange(CLASSES)
    wanted = (np.where(label, np.inf, to_class).min(-1) - to_class[label]) / 2
    network = dataclasses.replace(network, components=components + 3)
    for cancel in (True, False):
        np.testing.assert_allclose(radius(network, X, LABELS, cancel=cancel), wanted, atol=1e-4)


def total(network, x, labels):
    logs = models.prototypes.log_detections(network, x)
    return models.prototypes.log_probabilities(network, logs).sum() + models.prototypes.radius(network, x, labels).sum()


total_and_gradients = jax.jit(jax.value_and_grad(total, (0, 1)))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_at_a_component_and_where_detections_underflow(kind):
    network = NETWORKS[kind]
    x = jnp.concatenate([network.components[:2], jnp.full((1, DIM), 100.0), X[:4]])
    value, gradients = total_and_gradients(network, x, LABELS)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("kind", ["rbf", "cbc", "cbc, squared"])
def test_gradients_are_those_of_the_values(kind):
    network, step = NETWORKS[kind], 1e-3
    direction = jax.tree.map(lambda a: jnp.asarray(RNG.normal(size=a.shape), jnp.float32) * a, network)
    moved = lambda step: jax.tree.map(lambda a, b: a + np.float32(step) * b, network, direction)
    after, before = (total_and_gradients(moved(sign * step), X, LABELS)[0] for sign in (1, -1))
    products = jax.tree.map(lambda a, b: (a * b).sum(), total_and_gradients(network, X, LABELS)[1][0], direction)
    assert sum(jax.tree.leaves(products)) == pytest.approx(float(after - before) / (2 * step), rel=2e-2)


@pytest.fixture(scope="module")
def start():
    images = RNG.uniform(size=(6, 2, 2, 1)).astype(np.float32)
    return images, np.array([0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize(("reasoning", "squared"), [("rbf", False), ("cbc", True)])
def test_a_module_is_its_network(start, reasoning, squared):
    settings = {"reasoning": reasoning, "squared": squared, "num_reasonings": 2, "scale_per_component": squared}
    model = models.functional(models.prototypes.classifier(jax.random.key(0), *start, num_classes=3, **settings))
    network = models.prototypes.network(model.state.params)
    assert network.squared == squared
    assert network.positive.shape == (3, 2, 6)
    assert network.scale.shape == ((6,) if squared else ())
    assert bool(network.negative.any()) == (reasoning == "cbc")
    np.testing.assert_allclose((network.positive + network.negative).sum(-1), 1, rtol=1e-6)
    outputs = jax.jit(model.outputs)(model.state, X.reshape(7, 2, 2, 1))
    logs, log_probabilities = log_detections_and_probabilities(network, X)
    np.testing.assert_allclose(outputs.features, np.exp(logs), rtol=1e-6)
    np.testing.assert_allclose(outputs.logits, log_probabilities, rtol=1e-6)


@pytest.mark.parametrize("squared", [False, True])
def test_the_start_is_the_images_faintly_detected_and_preferred_by_their_class(start, squared):
    images, labels = start
    module = models.prototypes.classifier(jax.random.key(0), images, labels, num_classes=3, squared=squared)
    network = models.prototypes.network(models.functional(module).state.params)
    np.testing.assert_array_equal(network.components, images.reshape(6, 4))
    distances = np.linalg.norm(images.reshape(6, 1, 4) - images.reshape(1, 6, 4), axis=-1)[~np.eye(6, dtype=bool)]
    mean = (distances ** (2 if squared else 1)).mean()
    assert np.exp(-mean / network.scale) == pytest.approx(0.01, rel=1e-4)
    own = labels == np.arange(3)[:, None]
    weights = np.asarray(network.positive)[:, 0]
    assert weights[own].min() > 10 * max(weights[~own].max(), network.negative.max())


def test_a_key_decides_the_weights(start):
    weights = [
        np.asarray(models.prototypes.classifier(jax.random.key(seed), *start, num_classes=3).reasoning[...])
        for seed in (0, 0, 1)
    ]
    assert (weights[0] == weights[1]).all()
    assert (weights[0] != weights[2]).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reasoning": "deep"}, "reasoning must be rbf or cbc, got 'deep'."),
        ({"num_classes": 0}, "num_classes must be an integer of at least 1, got 0."),
        ({"num_reasonings": 0}, "num_reasonings must be an integer of at least 1, got 0."),
        ({"num_classes": 2}, "labels must be (6,) classes from 0 to 1, got [0 0 1 1 2 2]."),
        ({"labels": np.zeros(5, int)}, "labels must be (6,) classes from 0 to 2"),
        ({"components": np.zeros((6, 4), np.float32)}, "components must be a floating array (components, height,"),
        ({"components": np.full((6, 2, 2, 1), np.nan, np.float32)}, "and finite, got (6, 2, 2, 1)"),
        ({"components": np.zeros((6, 2, 2, 1), np.float32)}, "components must differ, got the same image every time."),
    ],
)
def test_bad_settings_are_named(start, settings, message, unchecked):
    arguments = {"components": start[0], "labels": start[1], "num_classes": 3, **settings}
    with pytest.raises(ValueError, match=re.escape(message)):
        models.prototypes.classifier(jax.random.key(0), **arguments)


def test_an_image_of_another_shape_is_refused(start):
    model = models.functional(models.prototypes.classifier(jax.random.key(0), *start, num_classes=3))
    with pytest.raises(ValueError, match=re.escape("x must have shape (batch, 2, 2, 1), got (1, 4, 1, 1).")):
        model.outputs(model.state, jnp.zeros((1, 4, 1, 1)))
