import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.attacks import _attack, expectation_over_transformation, square
from robustjax.attacks._square import _bump, _square

KEY = jax.random.key(0)
NORMS = {"linf": (0.05, np.inf), "l2": (0.4, 2), "l1": (2.0, 1)}
SHAPE = (6, 5, 7, 2)
QUERIES = {"linf": 3000, "l2": 1000, "l1": 1000}  # the same in many tests, which share the compiled programs


def linear(weights, bias, x):
    score = x.reshape(x.shape[0], -1) @ weights + bias
    return jnp.stack([jnp.zeros_like(score), score], -1)


@pytest.fixture(scope="module")
def problem():
    """A linear model, inputs of class 1, some pixels at the border of the box, and their labels."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=70).astype(np.float32)
    x = np.clip(rng.normal(0.5, 0.4, SHAPE), 0, 1).astype(np.float32)
    scores = x.reshape(6, 70) @ weights
    return jax.tree_util.Partial(linear, weights, np.float32(1.0 - scores.min())), x, np.ones(6, np.int32)


def sizes(change, norm):
    return np.linalg.norm(np.asarray(change, np.float64).reshape(len(change), -1), NORMS[norm][1], axis=-1)


@pytest.mark.parametrize("norm", NORMS)
def test_contract(norm, problem):
    logits_fn, x, labels = problem
    epsilon = NORMS[norm][0]
    attack = square(epsilon=epsilon, norm=norm, queries=QUERIES[norm])
    found = np.asarray(attack(KEY, logits_fn, x, labels))
    assert (found.shape, found.dtype) == (x.shape, x.dtype)
    assert np.isfinite(found).all()
    assert ((found >= 0) & (found <= 1)).all()
    assert (sizes(found - x, norm) <= epsilon + 1e-6).all()
    assert (sizes(found - x, norm) > 0.9 * epsilon).any()

    other = attack(jax.random.key(1), logits_fn, x, labels)
    assert (found != np.asarray(other)).any()
    turned = np.asarray(attack(KEY, logits_fn, x[::-1].copy(), labels))
    np.testing.assert_allclose(found, turned[::-1], atol=1e-6)

    compiled = _attack._perturb._cache_size()
    np.testing.assert_array_equal(dataclasses.replace(attack, epsilon=0.0)(KEY, logits_fn, x, labels), x)
    assert _attack._perturb._cache_size() == compiled


def test_finds_the_corner_of_a_linear_model(problem):
    logits_fn, x, labels = problem
    weights = logits_fn.args[0]
    never_fooled = jax.tree_util.Partial(linear, weights, np.float32(1000))
    found = square(epsilon=0.05, queries=QUERIES["linf"])(KEY, never_fooled, x, labels)
    corner = np.clip(x - 0.05 * np.sign(weights).reshape(1, 5, 7, 2), 0, 1)
    np.testing.assert_allclose(found, corner, atol=1e-6)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_comes_near_the_best_change_of_a_linear_model(norm, problem):
    logits_fn, _, labels = problem
    weights = logits_fn.args[0]
    x, epsilon = np.full(SHAPE, 0.5, np.float32), NORMS[norm][0] / 8  # far from the border
    never_fooled = jax.tree_util.Partial(linear, weights, np.float32(1000))
    found = np.asarray(square(epsilon=epsilon, norm=norm, queries=QUERIES[norm])(KEY, never_fooled, x, labels))
    gain = -(found - x).reshape(6, 70) @ weights
    best = epsilon * np.linalg.norm(weights, {"l2": 2, "l1": np.inf}[norm])
    assert (gain <= best * (1 + 1e-4)).all()
    assert (gain >= 0.6 * best).all(), gain / best
    np.testing.assert_allclose(sizes(found - x, norm), epsilon, rtol=1e-4)


asked = []


def counted(inner, x):
    jax.debug.callback(lambda x: asked.append(x.shape[0]), x)
    return inner(x)


def test_asks_as_often_as_it_says(problem):
    logits_fn, x, labels = problem

    def count(bias, epsilon=0.05, **settings):
        asked.clear()
        model = jax.tree_util.Partial(counted, jax.tree_util.Partial(linear, logits_fn.args[0], np.float32(bias)))
        jax.block_until_ready(square(epsilon=epsilon, **settings)(KEY, model, x, labels))
        jax.effects_barrier()
        assert set(asked) == {6}
        return len(asked)

    assert count(1000.0, queries=37) == 37
    assert count(-1000.0, queries=37) == 1  # all are fooled at the start
    highest = logits_fn(x)[:, 1].max() - logits_fn.args[1]
    assert 1 < count(0.1 - highest, epsilon=0.008, queries=37) < 37  # one is not fooled as it is
    assert count(1000.0, queries=37, restarts=3) == 3 * 37


def test_more_restarts_never_help_the_defender(problem):
    logits_fn, x, labels = problem
    model = jax.tree_util.Partial(counted, logits_fn)
    margins = [
        np.asarray(logits_fn(square(epsilon=0.01, queries=37, restarts=restarts)(KEY, model, x, labels)))[:, 1]
        for restarts in (1, 3)
    ]
    assert ((margins[1] <= margins[0]) | (margins[1] < 0)).all()
    assert (margins[1] < margins[0]).any()


def test_aims_at_a_class(problem):
    logits_fn, x, labels = problem
    attack = square(epsilon=1.0, targeted=True, queries=37)
    assert (np.asarray(logits_fn(attack(KEY, logits_fn, x, 1 - labels)).argmax(-1)) == 0).all()


def test_random_model(problem):
    logits_fn, x, labels = problem
    noisy = lambda key, z: logits_fn(z) + 0.1 * jax.random.normal(key, (1, 2))
    attack = expectation_over_transformation(square(epsilon=0.1, queries=100), samples=3)
    found = attack(KEY, noisy, x, labels)
    assert (logits_fn(found)[:, 1] < logits_fn(x)[:, 1]).all()


def test_squares_shrink_on_schedule():
    sides = square(epsilon=0.1)._sides(28, 28)
    values, counts = np.unique(sides, return_counts=True)
    np.testing.assert_array_equal(values[::-1], [25, 18, 13, 9, 6, 4, 3, 2])
    np.testing.assert_array_equal(counts[::-1], [11, 40, 150, 300, 500, 1000, 2000, 999])
    assert (np.diff(sides) <= 0).all()

    stretched = square(epsilon=0.1, rescale_schedule=True, queries=20000)._sides(28, 28)
    assert np.unique(stretched, return_counts=True)[1][-1] == 22  # changes 0 to 21, where 10 of 10000 are over
    assert (square(epsilon=0.1, norm="l2")._sides(28, 28) % 2 == 1).all()
    assert square(epsilon=0.1, norm="l2")._sides(28, 28).min() == 3
    assert square(epsilon=0.1)._sides(5, 90).max() == 5


@pytest.mark.parametrize("side", [1, 2, 3, 5])
def test_squares_are_uniform_over_all_places(side):
    x, n = jnp.zeros((4000, 5, 7, 1)), 4000
    inside, corner = jax.jit(_square)(jax.random.uniform(KEY, (n, 2)), side, x)
    np.testing.assert_array_equal(inside.sum((1, 2, 3)), side**2)
    places = np.zeros((6 - side, 8 - side))
    np.add.at(places, tuple(np.asarray(corner).T), 1)
    expected = n / places.size
    assert abs(places - expected).max() < 6 * np.sqrt(expected)
    row, column = corner[7]
    assert bool(inside[7, row : row + side, column : column + side].all())


@pytest.mark.parametrize("power", [2, 4])
@pytest.mark.parametrize("side", [1, 2, 3, 6, 9])
def test_bumps_are_two_pyramids(side, power):
    def pyramid(rows, columns):
        total = np.zeros((rows, columns))
        for k in range(max(rows // 2, columns // 2) + 1):  # rectangles around the middle, clipped
            top, left = rows // 2 - k, columns // 2 - k
            total[max(top, 0) : top + 2 * k + 1, max(left, 0) : left + 2 * k + 1] += 1 / (k + 1) ** power
        return total

    def scaled(a):
        return a / (np.sqrt((a**2).sum()) if power == 2 else abs(a).sum())

    halves = [pyramid(side // 2, side), pyramid(side - side // 2, side)]
    halves = [scaled(half) if half.size else half for half in halves]
    expected = scaled(np.concatenate([halves[0], -halves[1]]))
    np.testing.assert_allclose(_bump(side, power), expected, rtol=1e-12)


def test_bad_input(problem, monkeypatch):
    monkeypatch.setattr(square, "__init__", inspect.unwrap(square.__init__))  # past the type checker of the tests
    logits_fn, x, labels = problem
    for settings, message in [
        ({"epsilon": -1.0}, "epsilon must be at least 0 and finite, got -1.0"),
        ({"epsilon": 0.1, "norm": "l3"}, "norm must be one of linf, l2, l1, got 'l3'"),
        ({"epsilon": 0.1, "queries": 0}, "queries must be an integer of at least 1, got 0"),
        ({"epsilon": 0.1, "restarts": 0}, "restarts must be an integer of at least 1, got 0"),
        ({"epsilon": 0.1, "initial_fraction": "a"}, "initial_fraction must be above 0 and at most 1, got 'a'"),
        ({"epsilon": 0.1, "initial_fraction": 0.0}, "initial_fraction must be above 0 and at most 1, got 0.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            square(**settings)
    flat = lambda z: logits_fn(z.reshape(6, 5, 7, 2))
    with pytest.raises(ValueError, match=r"x must be \(batch, height >= 1, width >= 1, channels\), got \(6, 70\)"):
        square(epsilon=0.1)(KEY, flat, x.reshape(6, 70), labels)
    with pytest.raises(ValueError, match=r"height >= 5, width >= 5, channels\), got \(6, 4, 7, 2\)"):
        square(epsilon=0.1, norm="l2")(KEY, lambda z: z.reshape(6, -1)[:, :2], x[:, :4], labels)
