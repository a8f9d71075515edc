"""Detectors of several layers: brute-force twins, closed forms, and that one layer ranks as that layer alone."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import models, scoring
from robustjax.scoring._inputs import IMAGES
from robustjax.typing import Outputs

CLASSES = 3
LABELS = np.arange(60) % CLASSES


def as_they_are(layers):
    return layers


def layers_of(rows, seed, shift=0.0):
    """Two layers, the first of which tells the classes apart."""
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % CLASSES
    first = rng.normal(size=(rows, 4)) @ np.diag([1.0, 0.5, 2.0, 1.0]) + 4 * np.eye(CLASSES, 4)[labels] + shift
    second = rng.normal(size=(rows, 2, 2, 3))
    return {"first": first.astype(np.float32), "second": second.astype(np.float32)}


TRAIN, TEST = layers_of(60, 0), layers_of(IMAGES + 5, 1)
KNOWN = {"inliers": layers_of(30, 2), "outliers": layers_of(24, 3, shift=1.5)}


# Neuron activation coverage


def covered_by_hand(train, test, steepness, num_bins, share):
    """Loops over rows and neurons, with the edges of the authors' code: M = num_bins + 2 of them."""
    x = np.log(np.linspace(1, math.sqrt(1000), (num_bins + 2) // 2)) / math.log(1000)
    edges = np.concatenate([x[:-1], (1 - x)[::-1]])
    edges[-1] += 0.01
    assert len(edges) == num_bins + 1
    bin_of = lambda v: np.flatnonzero((edges[:-1] <= v) & (v < edges[1:]))[0]
    states = [1 / (1 + np.exp(-steepness * v.astype(np.float64))) for v in (train, test)]
    counts = np.zeros((num_bins, train.shape[1]))
    for row in states[0]:
        for neuron, value in enumerate(row):
            counts[bin_of(value), neuron] += 1
    covered = np.minimum(counts / (share * len(train)), 1)
    return np.array([np.mean([covered[bin_of(v), i] for i, v in enumerate(row)]) for row in states[1]])


@pytest.mark.parametrize(("settings", "block"), [({}, 1024), ({"steepness": 25.0, "num_bins": 10, "share": 0.3}, 16)])
def test_nac_equals_loops(settings, block, monkeypatch):
    monkeypatch.setattr("robustjax.scoring._layers.BLOCK", block)  # the last one repeats rows, which count once
    train, test = TRAIN["first"] / 50, TEST["first"] / 50
    detector = scoring.nac(as_they_are, **settings)
    got = detector.score(detector.fit({"a": train}), {"a": test})
    want = covered_by_hand(train, test, **{"steepness": 100.0, "num_bins": 48, "share": 0.05} | settings)
    np.testing.assert_allclose(got, -want, rtol=1e-5)
    assert len(np.unique(want.round(6))) > 5


SETTINGS = {"steepness": {"first": 0.3, "second": 4.0}, "num_bins": {"first": 6, "second": 20}}
NAC = scoring.nac(as_they_are, share=0.1, **SETTINGS)


def test_nac_is_the_mean_over_layers_each_with_its_settings():
    got = NAC.score(NAC.fit(TRAIN), TEST)
    parts = []
    for name in TRAIN:
        train, test = (a[name].mean((1, 2)) if a[name].ndim == 4 else a[name] for a in (TRAIN, TEST))
        parts.append(covered_by_hand(train, test, SETTINGS["steepness"][name], SETTINGS["num_bins"][name], 0.1))
    np.testing.assert_allclose(got, -np.mean(parts, 0), rtol=1e-5)


def test_states_that_training_rows_are_in_are_covered_and_others_are_not():
    detector = scoring.nac(as_they_are, steepness=1.0)
    state = detector.fit({"a": np.full((20, 3), 0.7, np.float32)})
    far = {"a": np.array([[0.7] * 3, [0.7, 0.7, -3.0], [9.0] * 3, [1e30, -1e30, 0.7]], np.float32)}
    np.testing.assert_allclose(detector.score(state, far), [-1, -2 / 3, 0, -1 / 3], rtol=1e-6)


def test_nac_of_the_features_is_that_of_their_layer_in_a_model():
    model = models.functional(models.mlp(jax.random.key(0), hidden=(5,), image_shape=(2, 2, 1), num_classes=CLASSES))
    settings = {"steepness": 30.0, "num_bins": 10, "share": 0.3}
    train, test = np.split(np.random.default_rng(5).uniform(size=(90, 2, 2, 1)).astype(np.float32), [60])

    def states(state, x):
        return scoring.neuron_states(functools.partial(model.activations, state), x, layers=("body",))

    layered = scoring.nac(jax.tree_util.Partial(states, model.state), **settings)
    want = layered.score(layered.fit(train), test)
    detector, head = scoring.nac(**settings), scoring.Head(**model.state.params["head"])
    outputs = jax.jit(model.outputs)
    got = detector.score(detector.fit(outputs(model.state, train), head=head), outputs(model.state, test))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert len(np.unique(got.round(6))) > 5
    assert scoring.nac(**settings) is detector


def test_neuron_states_are_a_product_of_sums_over_space():
    x = np.random.default_rng(6).normal(size=(3, 2, 2, 2)).astype(np.float32)
    kernel = np.random.default_rng(7).normal(size=(2, CLASSES)).astype(np.float32)

    def activations(x, offsets):
        z = jnp.square(x) + offsets.get("z", 0.0)
        return {"z": z, "logits": jnp.matmul(jnp.exp(-z).sum((1, 2)), kernel, precision="highest")}

    got = jax.jit(lambda x: scoring.neuron_states(activations, x, layers=["z"], logits="logits"))(x)
    z = x.astype(np.float64) ** 2
    logits = np.exp(-z).sum((1, 2)) @ kernel
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    gradient = -np.exp(-z) * ((p - 1 / CLASSES) @ kernel.T)[:, None, None]
    np.testing.assert_allclose(got["z"], z.sum((1, 2)) * gradient.sum((1, 2)), rtol=1e-4)
    assert list(got) == ["z"]


# Mahalanobis distances of several layers


@pytest.fixture(scope="module")
def fitted():
    detector = scoring.mahalanobis_ensemble(as_they_are)
    return detector, detector.fit(TRAIN, LABELS, **KNOWN)


def distances_by_hand(train, labels, test):
    train, test = (a.reshape(len(a), -1, a.shape[-1]).mean(1).astype(np.float64) for a in (train, test))
    means = np.stack([train[labels == c].mean(0) for c in range(CLASSES)])
    precision = np.linalg.inv((train - means[labels]).T @ (train - means[labels]) / len(train))
    apart = test[:, None] - means
    return np.einsum("bcd,de,bce->bc", apart, precision, apart), apart, precision


def test_ensemble_is_a_weighted_sum_of_distances(fitted):
    detector, state = fitted
    want = float(state.bias)
    for name in TRAIN:
        want = want + float(state.weights[name]) * distances_by_hand(TRAIN[name], LABELS, TEST[name])[0].min(1)
    np.testing.assert_allclose(detector.score(state, TEST), want, rtol=1e-3, atol=1e-4)


def test_weights_go_to_the_layer_that_tells_outliers(fitted):
    detector, state = fitted
    first, second = (
        float(state.weights[name]) * distances_by_hand(TRAIN[name], LABELS, TEST[name])[0].min(1).std()
        for name in ("first", "second")
    )
    assert first > 3 * abs(second)
    inside, outside = (detector.score(state, layers_of(40, 8 + i, shift=3.0 * i)) for i in (0, 1))
    assert (outside > 0).mean() > 0.9 > 0.1 > (inside > 0).mean()  # log-odds: the border is 0


def test_regression_is_that_of_the_definition(fitted):
    # At the maximum of the penalised likelihood its gradient is 0, for one of the ten strengths of the penalty.
    state = fitted[1]
    rows = [
        np.stack([distances_by_hand(TRAIN[n], LABELS, known[n])[0].min(1) for n in TRAIN], -1)
        for known in KNOWN.values()
    ]
    x, y = np.concatenate(rows), np.repeat([0, 1], [30, 24])
    standard = (x - x.mean(0)) / x.std(0)
    weights = np.array([float(state.weights[n]) for n in TRAIN]) * x.std(0)
    bias = float(state.bias) + weights @ (x.mean(0) / x.std(0))
    residual = 1 / (1 + np.exp(-(standard @ weights + bias))) - y
    np.testing.assert_allclose(residual.sum(), 0, atol=1e-3)
    penalties = -weights / (residual @ standard)
    strength = np.exp(np.log(penalties).mean())
    np.testing.assert_allclose(penalties, strength, rtol=0.05)
    assert np.abs(np.logspace(-4, 4, 10) / strength - 1).min() < 0.05


@pytest.mark.slow
def test_ensemble_of_one_layer_ranks_as_that_layer():
    detector, single = scoring.mahalanobis_ensemble(as_they_are), scoring.mahalanobis()
    one = lambda layers: {"first": layers["first"]}
    state = detector.fit(one(TRAIN), LABELS, **{name: one(layers) for name, layers in KNOWN.items()})
    got = detector.score(state, one(TEST))
    as_outputs = lambda layers: Outputs(np.zeros((len(layers["first"]), CLASSES), np.float32), layers["first"])
    want = single.score(single.fit(as_outputs(TRAIN), LABELS), as_outputs(TEST))
    np.testing.assert_array_equal(np.argsort(got), np.argsort(want))


def test_each_layer_has_its_own_step_down_its_gradient():
    """Two layers share coordinates along which their gradients differ: one common step would not lower both."""
    columns = {"left": slice(0, 3), "right": slice(1, 4)}
    detector = scoring.mahalanobis_ensemble(lambda x: {name: x[:, some] for name, some in columns.items()}, epsilon=0.1)
    train, test = TRAIN["first"], TEST["first"]
    state = detector.fit(train, LABELS, **{name: layers["first"] for name, layers in KNOWN.items()})
    want = float(state.bias)
    for name, some in columns.items():
        distance, apart, precision = distances_by_hand(train[:, some], LABELS, test[:, some])
        nearest = distance.argmin(1)
        gradient = 2 * apart[np.arange(len(nearest)), nearest] @ precision
        lowered = distances_by_hand(train[:, some], LABELS, test[:, some] - 0.1 * np.sign(gradient))[0].min(1)
        assert (lowered < distance.min(1)).mean() > 0.9
        want = want + float(state.weights[name]) * lowered
    np.testing.assert_allclose(detector.score(state, test), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["nac", "mahalanobis_ensemble"])
def test_a_row_does_not_see_its_batch(fitted, name):
    detector, state = fitted
    if name == "nac":
        detector, state = NAC, NAC.fit(TRAIN)
        shuffled = detector.fit(jax.tree.map(lambda a: a[::-1], TRAIN))
        jax.tree.map(np.testing.assert_array_equal, state, shuffled)
    scores = detector.score(state, TEST)
    assert scores.shape == (IMAGES + 5,)
    for rows in (slice(0, 7), slice(IMAGES - 1, None), slice(0, 0)):
        part = jax.tree.map(lambda a, rows=rows: a[rows], TEST)
        np.testing.assert_allclose(detector.score(state, part), scores[rows], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.jit(detector.score)(state, TEST), scores, rtol=1e-4, atol=1e-5)


def test_a_state_of_other_layers_is_refused(fitted):
    narrow = TEST | {"first": TEST["first"][..., :1]}
    with pytest.raises(ValueError, match="fitted channels for layer 'first', got 1"):
        NAC.score(NAC.fit(TRAIN), narrow)
    with pytest.raises(ValueError, match="outputs.features must be .*, as the state was fitted on"):
        fitted[0].score(fitted[1], narrow)
    for one in (NAC, fitted[0]):
        with pytest.raises(ValueError, match="state must come from fit of this detector, got NoneType"):
            one.score(None, TEST)


def fit_ensemble(x=TRAIN, labels=LABELS, **known):
    return scoring.mahalanobis_ensemble(as_they_are).fit(x, labels, **KNOWN | known)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scoring.nac(steepness=0.0), r"steepness must be positive and finite, got 0\.0"),
        (lambda: scoring.nac(num_bins=3), r"num_bins must be even, got 3"),
        (lambda: scoring.nac(num_bins=0), r"num_bins must be an integer of at least 2, got 0"),
        (lambda: scoring.nac(share=1.0), r"share must lie strictly between 0 and 1, got 1\.0"),
        (lambda: scoring.nac(share={"a": 0.1}), r"share must be a number without layers_fn, got one for each of a"),
        (
            lambda: scoring.nac(as_they_are, steepness={"first": 1.0}).fit(TRAIN),
            r"steepness must have an entry for layer 'second', got first",
        ),
        (
            lambda: scoring.nac().fit(Outputs(np.ones((2, 2), "f"), np.ones((2, 2), "f"))),
            r"head must be given to fit nac",
        ),
        (
            lambda: scoring.nac(lambda x: x["a"]).fit({"a": np.ones((2, 2), "f")}),
            r"must return a dictionary of arrays by layer, got",
        ),
        (
            lambda: scoring.nac(lambda x: {}).fit(TRAIN),
            r"layers_fn must return a dictionary of arrays by layer, got no layer",
        ),
        (
            lambda: scoring.nac(lambda x: {"a": x["first"].sum(-1)}).fit(TRAIN),
            r"layers_fn must return \(128, \.\.\., channels\), got \(128,\) for layer 'a'",
        ),
        (
            lambda: scoring.nac(lambda x: {"a": x["first"] / x["first"].std(0, keepdims=True)}).fit(TRAIN),
            r"layers_fn must answer each input by itself, got other answers",
        ),
        (
            lambda: NAC.score(NAC.fit(TRAIN), {"first": TEST["first"]}),
            r"layers_fn must return the fitted layers first, second, got first",
        ),
        (
            lambda: scoring.neuron_states(lambda x, offsets: {"head": x}, jnp.ones((1, 2)), layers=["hed"]),
            r"layers must be among head, got 'hed'",
        ),
        (lambda: scoring.mahalanobis_ensemble(as_they_are, epsilon=math.nan), r"epsilon must be at least 0 and finite"),
        (lambda: fit_ensemble(outliers=None), r"outliers must be given to fit mahalanobis_ensemble, got None"),
        (lambda: fit_ensemble(labels=None), r"labels must be given to fit mahalanobis_ensemble, got None"),
        (lambda: fit_ensemble(labels=LABELS[:9]), r"labels must be \(60,\) integers, got int64 \(9,\)"),
        (lambda: fit_ensemble(labels=LABELS - 1), r"labels must lie in 0, \.\.\."),
        (lambda: fit_ensemble(labels=2 * LABELS), r"class 1"),
        (lambda: fit_ensemble(inliers=layers_of(4, 0)), r"inliers must be at least 5 rows, got 4"),
        (
            lambda: fit_ensemble(x=TRAIN | {"first": TRAIN["first"] * np.inf}),
            r"x must be finite, 60 of 60 rows are not, the first",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
