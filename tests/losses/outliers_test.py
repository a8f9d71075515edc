import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robustjax import data, losses, training
from robustjax.typing import Batch, ModelState, Outputs

K = 3
LABELS = jnp.asarray([0, -1, 2, 1, -1, -1, 1])


def apply(state, x, *, train=False):
    """A linear model that keeps the mean of what it last saw."""
    flat = x.reshape(x.shape[0], -1)
    stats = {"mean": flat.mean(0)} if train else state.batch_stats
    return Outputs(flat @ state.params["w"] + state.params["b"][None], flat), state._replace(batch_stats=stats)


@pytest.fixture
def state():
    params = {"w": 3 * jax.random.normal(jax.random.key(1), (4, K)), "b": jnp.zeros(K)}
    return ModelState(params, {"mean": jnp.zeros(4)})


@pytest.fixture
def batch():
    return Batch(jax.random.uniform(jax.random.key(2), (7, 2, 2, 1)), LABELS, jnp.arange(7))


def logits_of(state, batch):
    return np.asarray(apply(state, batch.image)[0].logits, np.float64)


def logsumexp(logits):
    return np.log(np.exp(logits).sum(-1))


def test_outlier_exposure_per_example_matches_float64():
    logits = np.random.default_rng(0).normal(size=(7, K)).astype(np.float32) * 4
    wide, labels = logits.astype(np.float64), np.asarray(LABELS)
    want = logsumexp(wide) - np.where(labels < 0, wide.mean(-1), wide[np.arange(7), labels])
    np.testing.assert_allclose(losses.outliers.uniform_cross_entropy(jnp.asarray(logits), LABELS), want, rtol=1e-5)


def test_outlier_exposure_is_least_at_equal_logits_where_it_is_the_log_of_the_number_of_classes():
    outliers = jnp.full(500, -1)
    for level in (0.0, 1e6, -1e30):
        got = losses.outliers.uniform_cross_entropy(jnp.full((1, 10), level), outliers[:1])
        np.testing.assert_allclose(got, np.log(10), rtol=1e-6)
    random = losses.outliers.uniform_cross_entropy(jax.random.normal(jax.random.key(0), (500, 10)), outliers)
    assert (random > np.log(10)).all()


def test_the_gradient_of_outlier_exposure_is_the_distance_from_uniform():
    logits = jax.random.normal(jax.random.key(0), (7, K))
    gradient = jax.grad(lambda z: losses.outliers.uniform_cross_entropy(z, LABELS).sum())(logits)
    target = jnp.where(LABELS[:, None] < 0, 1 / K, jax.nn.one_hot(LABELS, K))
    np.testing.assert_allclose(gradient, jax.nn.softmax(logits) - target, atol=1e-6)


def test_energy_bounds_are_squares_beyond_the_margins():
    levels = jnp.asarray([1.0, 1.0, 3.0, 5.0, 3.0, 5.0, 4.0])  # energy is -level - ln K
    logits = jnp.broadcast_to(levels[:, None] - np.float32(np.log(K)), (7, K))
    got = losses.outliers.energy_hinge(logits, LABELS, m_in=-4.0, m_out=-2.0)
    # label: 0 at -1 misses -4 by 3; 2 at -3 by 1; 1 at -5 and at -4 by none. Outliers at -1: none; at -3: 1; at -5: 3.
    np.testing.assert_allclose(got, [9, 0, 1, 0, 1, 9, 0], atol=1e-5)
    gradient = jax.grad(lambda z: losses.outliers.energy_hinge(z, LABELS, m_in=-4.0, m_out=-2.0).sum())(logits)
    np.testing.assert_allclose(gradient.sum(-1), [-6, 0, -2, 0, 2, 6, 0], atol=1e-5)  # towards the margins


def test_defaults_are_those_of_the_papers():
    assert losses.outliers.outlier_exposure().weight == 0.5
    assert (
        losses.outliers.energy_bounded().weight,
        losses.outliers.energy_bounded().m_in,
        losses.outliers.energy_bounded().m_out,
    ) == (0.1, -23, -5)


def test_outlier_exposure_takes_each_mean_over_its_own_rows(state, batch):
    loss, aux = losses.outliers.outlier_exposure(weight=0.7)(jax.random.key(0), apply, state, batch)
    logits, labels = logits_of(state, batch), np.asarray(LABELS)
    known = labels >= 0
    outlier = (logsumexp(logits) - logits.mean(-1))[~known].mean()
    want = (logsumexp(logits)[known] - logits[known, labels[known]]).mean() + 0.7 * outlier
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert aux.metrics["loss"] == loss
    np.testing.assert_allclose(aux.metrics["outlier_loss"], outlier, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["accuracy"], (logits.argmax(-1) == labels)[known].mean(), rtol=1e-6)
    np.testing.assert_allclose(aux.state.batch_stats["mean"], batch.image.reshape(7, 4).mean(0), rtol=1e-6)


def test_energy_bounded_takes_each_mean_over_its_own_rows(state, batch):
    loss, aux = losses.outliers.energy_bounded(m_in=-3.0, m_out=-1.0, weight=0.3)(
        jax.random.key(0), apply, state, batch
    )
    logits, labels = logits_of(state, batch), np.asarray(LABELS)
    known, energy = labels >= 0, -logsumexp(logits)
    bounds = np.square(np.maximum(energy + 3, 0)[known]).mean() + np.square(np.maximum(-1 - energy, 0)[~known]).mean()
    assert bounds > 0
    want = (logsumexp(logits)[known] - logits[known, labels[known]]).mean() + 0.3 * bounds
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["energy_loss"], bounds, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["accuracy"], (logits.argmax(-1) == labels)[known].mean(), rtol=1e-6)


OBJECTIVES = {
    "outlier_exposure": losses.outliers.outlier_exposure(),
    "energy_bounded": losses.outliers.energy_bounded(m_in=-3.0, m_out=-1.0),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_order_of_rows_and_more_of_the_same_outliers_change_nothing(state, batch, name):
    want, _ = OBJECTIVES[name](jax.random.key(0), apply, state, batch)
    order = np.asarray([3, 1, 6, 0, 5, 4, 2, 1, 4, 5, 1, 4, 5])  # outliers three times each
    rows = jax.tree.map(lambda rows: rows[order], batch)
    got, _ = OBJECTIVES[name](jax.random.key(0), apply, state, rows)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("absent", ["outliers", "labelled"])
def test_a_group_without_rows_adds_nothing(state, batch, name, absent):
    rows = jax.tree.map(lambda rows: rows[np.asarray(LABELS) >= 0 if absent == "outliers" else LABELS < 0], batch)
    run = lambda state: OBJECTIVES[name](jax.random.key(0), apply, state, rows)
    (loss, aux), gradient = jax.value_and_grad(run, has_aux=True, allow_int=True)(state)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((loss, gradient.params)))
    if absent == "labelled":
        assert aux.metrics["accuracy"] == 0
    elif name == "outlier_exposure":
        want, _ = losses.standard()(jax.random.key(0), apply, state, rows)
        np.testing.assert_allclose(loss, want, rtol=1e-6)
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
        optimizer = optax.adam(0.03)
        initial = training.init(jax.random.key(0), ModelState(params, {"mean": jnp.zeros(16)}), optimizer)
        return training.fit(
            apply, initial, batches, objective=objective, optimizer=optimizer, num_steps=100, progress=False
        )

    plain, exposed = fit(losses.standard(), exposed=False), fit(losses.outliers.outlier_exposure(), exposed=True)
    far = jnp.asarray(noise.arrays().image)
    to_uniform = [
        losses.outliers.uniform_cross_entropy(apply(result.state.model, far)[0].logits, jnp.full(64, -1)).mean()
        for result in (plain, exposed)
    ]
    assert np.log(K) < to_uniform[1] < to_uniform[0] - 0.2
    np.testing.assert_allclose(exposed.history["outlier_loss"][-1], to_uniform[1], atol=0.2)
    assert exposed.history["accuracy"][-1] > 0.9
