import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import scoring
from robustjax.scoring import _neighbours
from robustjax.typing import Outputs


def outputs(features):
    features = jnp.asarray(features, jnp.float32)
    return Outputs(jnp.zeros((features.shape[0], 2)), features)


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def scores(train, test, k):
    detector = scoring.knn(k=k)
    return np.asarray(detector.score(detector.fit(outputs(train)), outputs(test)))


def by_sorting(train, test, k):
    """All distances between unit vectors in float64, sorted."""
    train, test = (
        a.astype(np.float64) / np.linalg.norm(a.astype(np.float64), axis=1, keepdims=True) for a in (train, test)
    )
    return np.sort(np.linalg.norm(test[:, None] - train, axis=2), axis=1)[:, k - 1]


@pytest.mark.parametrize("rows", [1, 40, 1613])
def test_equals_sorting_all_distances(rows):
    train, test = random(0, rows, 6), random(1, 30, 6)
    for k in sorted({1, min(rows, 13), rows}):  # groups, no groups, all
        np.testing.assert_allclose(scores(train, test, k), by_sorting(train, test, k), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 5, 50])
@pytest.mark.parametrize("kind", ["few values", "ascending", "descending", "constant", "infinite"])
def test_largest_are_exact_whatever_the_order_and_the_ties(kind, k):
    values = random(2, 6, 1609)
    values = {
        "few values": np.round(values),
        "ascending": np.sort(values, axis=1),
        "descending": -np.sort(values, axis=1),
        "constant": np.ones_like(values),
        "infinite": np.where(values > 1, np.inf, np.where(values < -1, -np.inf, values)),
    }[kind]
    found = np.asarray(jax.jit(_neighbours._largest, static_argnums=1)(values, k))
    assert all(len(set(row)) == k for row in found.tolist())
    np.testing.assert_array_equal(np.take_along_axis(values, found, 1), -np.sort(-values, axis=1)[:, :k])


def test_many_queries_go_in_blocks_that_change_nothing():
    train, test = random(0, 500, 4), random(1, 2 * _neighbours._ROWS + 5, 4)
    find = jax.jit(_neighbours.nearest, static_argnums=2)
    by_row = np.argsort(-(test.astype(np.float64) @ train.T.astype(np.float64)), axis=1)[:, :3]
    np.testing.assert_array_equal(find(train, test, 3), by_row)
    np.testing.assert_array_equal(find(train, test[:9], 3), by_row[:9])


def test_memory_does_not_hold_all_similarities():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((5000, 8), (4096, 8))]
    memory = jax.jit(_neighbours.nearest, static_argnums=2).lower(*shapes, 50).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 5000 * 4096 * 4 / 4


def test_is_blind_to_scale_and_to_the_order_of_training_rows():
    train, test = random(0, 400, 5), random(1, 20, 5)
    wanted = scores(train, test, 10)
    lengths = np.exp(random(3, 420, 1) * 10)
    order = np.random.default_rng(4).permutation(400)
    np.testing.assert_allclose(scores((train * lengths[:400])[order], test * lengths[400:], 10), wanted, rtol=1e-5)
    np.testing.assert_allclose(scores(train * np.float32(1e30), test * np.float32(1e-30), 10), wanted, rtol=1e-5)


def test_near_duplicates_are_as_near_as_float32_can_tell():
    base = random(0, 1, 16)
    train = base + 1e-3 * random(1, 200, 16)
    np.testing.assert_allclose(scores(train, base, 50) ** 2, by_sorting(train, base, 50) ** 2, atol=5e-7)
    assert scores(np.concatenate([train, base]), base, 1) < 1e-6  # 2 - 2 cos may be 1e-7, and its root 3e-4


def test_a_feature_of_zeros_is_at_distance_one():
    np.testing.assert_allclose(scores(random(0, 60, 4), np.zeros((2, 4), np.float32), 3), 1, rtol=1e-6)


def test_more_neighbours_than_rows_are_refused():
    with pytest.raises(ValueError, match="k must be at most the number of training rows, 40, got 50"):
        scoring.knn().fit(outputs(random(0, 40, 3)))
    with pytest.raises(ValueError, match="k must be an integer of at least 1, got 0"):
        scoring.knn(k=0)


def test_queries_spread_over_devices_stay_there():
    train, test = random(0, 320, 4), random(1, 1024, 4)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(outputs(test), jax.NamedSharding(mesh, jax.P("data")))
    detector = scoring.knn(k=5)
    bank = jax.device_put(detector.fit(outputs(train)), jax.NamedSharding(mesh, jax.P()))
    compiled = jax.jit(detector.score).lower(bank, spread).compile().as_text()
    assert f"f32[{_neighbours._ROWS // 8},320]" in compiled  # each device compares its own rows
    assert f"f32[{_neighbours._ROWS},320]" not in compiled


@pytest.mark.parametrize("spread", [1e-3, 1e-2, 1.0])
def test_neighbours_at_small_angles_are_told_apart(spread):
    """Where cosines are all 1 in float32: against all distances in float64."""
    rng = np.random.default_rng(0)
    bank, queries = ((1 + spread * rng.standard_normal((n, 64))).astype(np.float32) for n in (2000, 50))
    unit = lambda z: z.astype(np.float64) / np.linalg.norm(z.astype(np.float64), axis=1, keepdims=True)
    distances = np.linalg.norm(unit(queries)[:, None] - unit(bank)[None], axis=-1)
    detector = scoring.knn(k=10)
    of = lambda z: Outputs(jnp.zeros((len(z), 2)), jnp.asarray(z))
    scores = detector.score(detector.fit(of(bank)), of(queries))
    np.testing.assert_allclose(scores, np.sort(distances, 1)[:, 9], rtol=1e-4)
