import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from robustjax import data, losses, training
from robustjax.typing import Batch, ModelState, Outputs

K = 3
LABELS = jnp.asarray([0, -1, 2, 1, -1, -1, 1])


def apply(state, x, *, train=False):
    """A linear model that keeps the mean of what it last saw."""
    flat = x.reshape(x.shape[0], -1)
    stats = {"mean": flat.mean(0)} if train else state.batch_stats
    return Outputs(flat @ state.params["w"] + state.params["b"][None], flat), state._replace(batch_stats=stats)


RNG = np.random.default_rng(3)  # one of four labels is answered, so that the share of wrong answers differs
STATE = ModelState(
    {"w": jnp.asarray(3 * RNG.normal(size=(4, K)), jnp.float32), "b": jnp.zeros(K)}, {"mean": jnp.zeros(4)}
)
BATCH = Batch(jnp.asarray(RNG.uniform(size=(7, 2, 2, 1)), jnp.float32), LABELS, jnp.arange(7))
KNOWN, OUTLIERS = np.flatnonzero(LABELS >= 0), np.flatnonzero(LABELS < 0)
uniform_cross_entropy = jax.jit(losses.outliers.uniform_cross_entropy)


@functools.partial(jax.jit, static_argnums=0)
def run(objective, batch):
    """The loss with its aux, and the gradient, by one program for all tests of an objective."""
    loss = lambda params: objective(jax.random.key(0), apply, STATE._replace(params=params), batch)
    return jax.value_and_grad(loss, has_aux=True)(STATE.params)


def rows_of(*rows):
    return jax.tree.map(lambda a: np.asarray(a)[np.concatenate(rows)], BATCH)


def logits_of(batch):
    return np.asarray(batch.image, np.float64).reshape(7, 4) @ np.asarray(STATE.params["w"])


def logsumexp(logits):
    return np.log(np.exp(logits).sum(-1))


def test_outlier_exposure_per_example_matches_float64():
    logits = np.random.default_rng(0).normal(size=(7, K)).astype(np.float32) * 4
    wide, labels = logits.astype(np.float64), np.asarray(LABELS)
    want = logsumexp(wide) - np.where(labels < 0, wide.mean(-1), wide[np.arange(7), labels])
    np.testing.assert_allclose(uniform_cross_entropy(logits, LABELS), want, rtol=1e-5)


def test_outlier_exposure_is_least_at_equal_logits_where_it_is_the_log_of_the_number_of_classes():
    levels = np.asarray([[0.0], [1e6], [-1e30]], np.float32) + np.zeros((1, 10), np.float32)
    random = np.random.default_rng(0).normal(size=(500, 10)).astype(np.float32)
    found = np.asarray(uniform_cross_entropy(np.concatenate([levels, random]), np.full(503, -1)))
    np.testing.assert_allclose(found[:3], np.log(10), rtol=1e-6)
    assert (found[3:] > np.log(10)).all()


def test_the_gradient_of_outlier_exposure_is_the_distance_from_uniform():
    logits = np.random.default_rng(0).normal(size=(7, K)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda z: losses.outliers.uniform_cross_entropy(z, LABELS).sum()))(logits)
    target = np.where(np.asarray(LABELS)[:, None] < 0, 1 / K, np.eye(K)[LABELS])
    np.testing.assert_allclose(gradient, special.softmax(logits, -1) - target, atol=1e-6)


def test_energy_bounds_are_squares_beyond_the_margins():
    levels = np.asarray([1.0, 1.0, 3.0, 5.0, 3.0, 5.0, 4.0])  # energy is -level - ln K
    logits = np.repeat(levels[:, None] - np.log(K), K, 1).astype(np.float32)

    def hinge(logits):
        values = losses.outliers.energy_hinge(logits, LABELS, m_in=-4.0, m_out=-2.0)
        return values.sum(), values

    gradient, got = jax.jit(jax.grad(hinge, has_aux=True))(logits)
    # label: 0 at -1 misses -4 by 3; 2 at -3 by 1; 1 at -5 and at -4 by none. Outliers at -1: none; at -3: 1; at -5: 3.
    np.testing.assert_allclose(got, [9, 0, 1, 0, 1, 9, 0], atol=1e-5)
    np.testing.assert_allclose(gradient.sum(-1), [-6, 0, -2, 0, 2, 6, 0], atol=1e-5)  # towards the margins


def test_defaults_are_those_of_the_papers():
    assert losses.outliers.outlier_exposure().weight == 0.5
    assert (
        losses.outliers.energy_bounded().weight,
        losses.outliers.energy_bounded().m_in,
        losses.outliers.energy_bounded().m_out,
    ) == (0.1, -23, -5)


OBJECTIVES = {
    "outlier_exposure": losses.outliers.outlier_exposure(weight=0.7),
    "energy_bounded": losses.outliers.energy_bounded(m_in=-3.0, m_out=-1.0, weight=0.3),
}


def test_outlier_exposure_takes_each_mean_over_its_own_rows():
    (loss, aux), _ = run(OBJECTIVES["outlier_exposure"], BATCH)
    logits, labels = logits_of(BATCH), np.asarray(LABELS)
    known = labels >= 0
    outlier = (logsumexp(logits) - logits.mean(-1))[~known].mean()
    want = (logsumexp(logits)[known] - logits[known, labels[known]]).mean() + 0.7 * outlier
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert aux.metrics["loss"] == loss
    np.testing.assert_allclose(aux.metrics["outlier_loss"], outlier, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["accuracy"], (logits.argmax(-1) == labels)[known].mean(), rtol=1e-6)
    np.testing.assert_allclose(aux.state.batch_stats["mean"], np.mean(BATCH.image, (0, 3)).reshape(4), rtol=1e-6)


def test_energy_bounded_takes_each_mean_over_its_own_rows():
    (loss, aux), _ = run(OBJECTIVES["energy_bounded"], BATCH)
    logits, labels = logits_of(BATCH), np.asarray(LABELS)
    known, energy = labels >= 0, -logsumexp(logits)
    bounds = np.square(np.maximum(energy + 3, 0)[known]).mean() + np.square(np.maximum(-1 - energy, 0)[~known]).mean()
    assert bounds > 0
    want = (logsumexp(logits)[known] - logits[known, labels[known]]).mean() + 0.3 * bounds
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["energy_loss"], bounds, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["accuracy"], (logits.argmax(-1) == labels)[known].mean(), rtol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_order_of_rows_and_more_of_the_same_rows_change_nothing(name):
    some, others = KNOWN[:3], OUTLIERS[:1]
    (want, _), _ = run(OBJECTIVES[name], rows_of(some, some, others))
    (got, _), _ = run(OBJECTIVES[name], rows_of(others, others, some[::-1], others, others))
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("absent", ["outliers", "labelled"])
def test_a_group_without_rows_adds_nothing(name, absent):
    rows = rows_of(np.resize(KNOWN if absent == "outliers" else OUTLIERS, 7))
    (loss, aux), gradient = run(OBJECTIVES[name], rows)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((loss, gradient)))
    if absent == "labelled":
        assert aux.metrics["accuracy"] == 0
    elif name == "outlier_exposure":
        logits = logits_of(rows)
        want = (logsumexp(logits) - logits[np.arange(7), rows.label]).mean()
        np.testing.assert_allclose(loss, want, rtol=1e-5)
        assert aux.metrics["outlier_loss"] == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: losses.outliers.outlier_exposure(weight=0.0), "weight must be positive and finite, got 0.0"),
        (lambda: losses.outliers.energy_bounded(weight=-1.0), "weight must be positive and finite, got -1.0"),
        (
            lambda: losses.outliers.energy_bounded(m_in=-5.0),
            "m_in must be less than m_out, got m_in=-5.0 and m_out=-5.0",
        ),
        (
            lambda: losses.outliers.energy_hinge(jnp.zeros((7, K)), LABELS, m_in=0.0, m_out=float("nan")),
            "m_in must be less than m_out, got m_in=0.0 and m_out=nan",
        ),
        (
            lambda: losses.outliers.energy_hinge(jnp.zeros((6, K)), LABELS),
            r"labels must be \(6,\) to match the logits, got shape \(7,\)",
        ),
        (
            lambda: losses.outliers.uniform_cross_entropy(jnp.zeros((7, K)), jnp.zeros(7)),
            "labels must be integers, got float32",
        ),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_one_loop_trains_on_joined_batches_and_outliers_become_uniform():
    images = (4, 4, 1)
    known = data.select_classes(data.load("digits", "train[:400]"), [0, 1, 4])
    known = data.match_images(known, images)
    noise = data.synthetic("uniform_noise", images, 64)

    def fit(objective, *, exposed):
        batches = data.batches(known, 16, seed=0, prefetch=0)
        if exposed:
            batches = data.with_outliers(batches, data.batches(noise, 8, seed=1, prefetch=0))
        params = {"w": jnp.zeros((16, K)), "b": jnp.zeros(K)}
        optimizer = optax.adam(0.06)
        initial = training.init(jax.random.key(0), ModelState(params, {"mean": jnp.zeros(16)}), optimizer)
        return training.fit(
            apply, initial, batches, objective=objective, optimizer=optimizer, num_steps=50, progress=False
        )

    plain, exposed = fit(losses.standard(), exposed=False), fit(losses.outliers.outlier_exposure(), exposed=True)
    to_uniform = []
    for result in (plain, exposed):
        params = jax.tree.map(np.asarray, result.state.model.params)
        logits = noise.arrays().image.reshape(64, 16) @ params["w"] + params["b"]
        to_uniform.append((logsumexp(logits) - logits.mean(-1)).mean())
    assert np.log(K) < to_uniform[1] < to_uniform[0] - 0.2
    np.testing.assert_allclose(exposed.history["outlier_loss"][-1], to_uniform[1], atol=0.2)
    assert exposed.history["accuracy"][-1] > 0.9
