import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from robustjax.attacks import _box, at_budget, fab
from robustjax.attacks._fab import to_hyperplane

KEY = jax.random.key(0)
ORDER = {"linf": np.inf, "l2": 2, "l1": 1}
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}
SHAPE, CLASSES = (8, 2, 3, 1), 4
UNIT = _box.Box(np.float32(0), np.float32(1), np.float32(1))
to_plane = jax.jit(functools.partial(to_hyperplane, box=UNIT), static_argnames="norm")


def linear(weights, bias, x):
    return x.reshape(x.shape[0], -1) @ weights + bias[None]


def linear_problem(seed=0, *, spread=0.02):
    """A linear model, inputs around the middle of the box, their labels and the gaps and slopes to all classes."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(6, CLASSES)).astype(np.float32)
    x = np.clip(rng.normal(0.5, spread, SHAPE), 0, 1).astype(np.float32)
    bias = (rng.normal(size=CLASSES) * 0.1 - 0.5 * weights.sum(0)).astype(np.float32)
    model = jax.tree_util.Partial(linear, jnp.asarray(weights), jnp.asarray(bias))
    logits = x.reshape(8, 6).astype(np.float64) @ weights + bias
    labels = logits.argmax(-1).astype(np.int32)
    gaps = logits[np.arange(8), labels][:, None] - logits
    slopes = weights[:, labels].T[:, None] - weights.T[None]  # (batch, classes, pixels): of the gaps
    return model, x, labels, gaps, slopes


def distances(gaps, slopes, norm):
    sizes = np.linalg.norm(slopes, DUAL[norm], axis=-1)
    return np.where(sizes > 0, gaps / np.where(sizes > 0, sizes, 1), np.inf)


def attack(norm="linf", **settings):
    return fab(norm=norm, **{"steps": 12, **settings})


def shortest(x, normal, value, norm):
    """The norm of the shortest way to the plane within the box, by a solver; None if the plane is out of reach."""
    dim = len(x)
    if norm == "l2":
        solution = optimize.minimize(
            lambda d: d @ d,
            np.zeros(dim),
            jac=lambda d: 2 * d,
            bounds=list(zip(-x, 1 - x, strict=True)),
            constraints={"type": "eq", "fun": lambda d: normal @ d + value, "jac": lambda d: normal},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        return np.sqrt(solution.fun) if solution.success else None
    if norm == "linf":  # variables: displacement, its size
        sides = np.block([[np.eye(dim), -np.ones((dim, 1))], [-np.eye(dim), -np.ones((dim, 1))]])
        cost, equality = np.r_[np.zeros(dim), 1], np.r_[normal, 0]
        bounds = [*zip(-x, 1 - x, strict=True), (0, None)]
        solution = optimize.linprog(cost, sides, np.zeros(2 * dim), equality[None], [-value], bounds)
    else:  # variables: ways up and down
        bounds = [*zip(np.zeros(dim), 1 - x, strict=True), *zip(np.zeros(dim), x, strict=True)]
        solution = optimize.linprog(np.ones(2 * dim), A_eq=np.r_[normal, -normal][None], b_eq=[-value], bounds=bounds)
    return solution.fun if solution.success else None


@pytest.fixture(scope="module")
def planes():
    """Points and planes: some pixels at the border of the box, some slopes zero, one normal zero, one value zero."""
    rng = np.random.default_rng(1)
    x = np.where(rng.random((40, 5)) < 0.4, rng.integers(0, 2, (40, 5)), rng.random((40, 5))).astype(np.float32)
    normal = (rng.normal(size=(40, 5)) * (rng.random((40, 5)) < 0.8)).astype(np.float32)
    value = (rng.normal(size=40) * 1.5).astype(np.float32)
    normal[0], value[1] = 0, 0
    return x, normal, value


@pytest.mark.parametrize("norm", ORDER)
def test_projection_is_the_shortest_way_in_the_box(planes, norm):
    x, normal, value = planes
    got = np.asarray(to_plane(x, normal, value, norm))
    assert ((x + got >= 0) & (x + got <= 1)).all()
    reached = 0
    for i in range(len(x)):
        want = shortest(*(a[i].astype(np.float64) for a in planes), norm)
        if want is None:  # every coordinate that matters goes as far as it can
            corner = np.where(normal[i] * value[i] < 0, 1.0, 0.0).astype(np.float32)
            np.testing.assert_array_equal(got[i], np.where(normal[i] != 0, corner - x[i], 0))
        else:
            reached += 1
            assert abs(normal[i] @ got[i] + value[i]) < 1e-5
            np.testing.assert_allclose(np.linalg.norm(got[i], ORDER[norm]), want, rtol=1e-4, atol=1e-6)
    assert 10 < reached < 40
    assert not got[:2].any()


@pytest.mark.parametrize("norm", ORDER)
def test_projection_does_not_depend_on_the_scale_of_the_plane(planes, norm):
    x, normal, value = planes
    small = to_plane(x, normal * np.float32(2.0**-90), value * np.float32(2.0**-90), norm)  # squares underflow
    np.testing.assert_array_equal(small, to_plane(x, normal, value, norm))


@pytest.mark.parametrize("norm", ORDER)
def test_first_two_steps_on_a_linear_model(norm):
    model, x, labels, gaps, slopes = linear_problem()
    nearest = distances(gaps, slopes, norm).min(-1)
    if norm == "linf":
        one = attack(norm, steps=1)(KEY, model, x, labels).distance
        np.testing.assert_allclose(one, 1.05 * nearest, rtol=2e-5, atol=1e-7)
    start = 0.9 * 1.05
    alpha = (1 - start) / (2 - start)
    second = (1 - alpha) * (start + 1.05 * (1 - start)) + alpha * 1.05
    found = attack(norm)(KEY, model, x, labels)
    assert found.success.all()
    np.testing.assert_array_less(found.distance, second * nearest * (1 + 2e-5))
    np.testing.assert_array_less(nearest, found.distance)


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_exact_where_the_box_is_in_the_way(norm):
    model, x, labels, gaps, slopes = linear_problem(3, spread=0.5)
    found = attack(norm)(KEY, model, x, labels)
    flat = x.reshape(8, 6).astype(np.float64)
    solved = [
        [shortest(flat[i], -slopes[i, k], -gaps[i, k], norm) for k in range(CLASSES) if gaps[i, k]] for i in range(8)
    ]
    want = np.array([min((d for d in ways if d is not None), default=np.inf) for ways in solved])
    assert (want > distances(gaps, slopes, norm).min(-1) * 1.01).any()
    np.testing.assert_array_equal(found.success, np.isfinite(want))
    np.testing.assert_allclose(found.distance, want, rtol=0.01)
    assert (np.asarray(found.distance) >= want * (1 - 1e-5)).all()


def test_results_keep_their_promises():
    model, x, labels, gaps, slopes = linear_problem()
    labels[0] = (labels[0] + 1) % CLASSES
    search = attack(restarts=2)
    found = search(KEY, model, x, labels)
    assert (found.x.shape, found.x.dtype) == (x.shape, jnp.float32)
    assert ((found.x >= 0) & (found.x <= 1)).all()
    # To the last bit of an image: the program may subtract before it rounds.
    np.testing.assert_allclose(found.distance, np.abs(found.x - x).reshape(8, -1).max(-1), rtol=0, atol=2**-24)
    np.testing.assert_array_equal(model(found.x).argmax(-1) != labels, found.success)
    assert (found.distance[0], found.success[0]) == (0, True)
    jax.tree.map(np.testing.assert_array_equal, found, search(KEY, model, x, labels))
    others = x.copy()
    others[4:] = others[4:][::-1] * 0.5
    np.testing.assert_array_equal(search(KEY, model, others, labels).x[:4], found.x[:4])


def test_restarts_begin_elsewhere_and_keep_the_nearest():
    model, x, _, _, _ = linear_problem(spread=0.2)
    curved = jax.tree_util.Partial(lambda model, x: jnp.sin(3 * model(x)), model)
    labels = curved(x).argmax(-1)
    once = attack("l2", steps=5)(KEY, curved, x, labels).distance
    more = [attack("l2", steps=5, restarts=3)(jax.random.key(i), curved, x, labels).distance for i in range(2)]
    assert (more[0] <= once).all()
    assert (more[0] < once).any()
    assert (more[0] != more[1]).any()


@pytest.mark.parametrize("bias", [[9.0, 0, 0, 0], [np.nan, 0, 0, 0]])
def test_where_nothing_can_be_found(bias):
    _, x, _, _, _ = linear_problem()
    constant = jax.tree_util.Partial(linear, jnp.zeros((6, CLASSES)), jnp.asarray(bias, jnp.float32))
    found = attack()(KEY, constant, x, np.zeros(8, np.int32))
    np.testing.assert_array_equal(found.x, x)
    assert np.isinf(found.distance).all()
    assert not found.success.any()


def test_epsilon_ends_the_search_and_does_not_compile_again():
    model, x, labels, gaps, slopes = linear_problem(spread=0.05)
    traces = []

    def counted(x):
        traces.append(1)
        return model(x)

    nearest = distances(gaps, slopes, "linf").min(-1)
    counts = []
    for epsilon in (float(np.median(nearest)), float(nearest.max()) * 1.1):
        found = attack(epsilon=epsilon, restarts=2)(KEY, counted, x, labels)
        counts.append(len(traces))
        near = nearest * 1.006 < epsilon
        assert (found.distance[near] <= epsilon).all()
        assert (found.distance[nearest > epsilon] > epsilon).all()
    assert counts[0] == counts[1]
    far, full = attack(epsilon=epsilon)(KEY, model, x, labels), attack()(KEY, model, x, labels)
    assert (far.distance > full.distance * 1.01).any()  # the first point within epsilon was enough


def test_at_budget_keeps_what_is_near_enough():
    model, x, labels, gaps, slopes = linear_problem(spread=0.05)
    epsilon = float(np.median(distances(gaps, slopes, "linf").min(-1)))
    adversarial = at_budget(attack(), epsilon)(KEY, model, x, jnp.asarray(labels))
    found = attack()(KEY, model, x, labels)
    near = np.asarray(found.distance) <= epsilon
    assert 0 < near.sum() < 8
    assert np.abs(adversarial - x).max() <= np.float32(epsilon)
    np.testing.assert_array_equal(adversarial[near], found.x[near])
    np.testing.assert_array_equal(adversarial[~near], x[~near])
    np.testing.assert_array_equal(at_budget(attack(), 0.0)(KEY, model, x, jnp.asarray(labels)), x)


def test_targets_are_the_classes_ranked_next():
    model, x, labels, gaps, slopes = linear_problem(2)
    ways = distances(gaps, slopes, "linf")
    second = np.argsort(gaps, -1)[:, 1]
    assert (ways.argmin(-1) != second).any()
    found = attack(num_targets=1, steps=1)(KEY, model, x, labels)
    # One step to the class ranked second ends beyond its boundary, or beyond a nearer one on the way.
    np.testing.assert_allclose(found.distance, 1.05 * ways[np.arange(8), second], rtol=2e-5, atol=1e-7)


def test_equal_settings_are_equal():
    assert len({fab(norm="l2"), fab(norm="l2")}) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, got 0."),
        ({"num_targets": 0}, "num_targets must be an integer of at least 1, got 0."),
        ({"restarts": 0}, "restarts must be an integer of at least 1, got 0."),
        ({"alpha_max": 1.0}, "alpha_max must lie strictly between 0 and 1, got 1.0."),
        ({"beta": 0.0}, "beta must lie strictly between 0 and 1, got 0.0."),
        ({"eta": "a"}, "eta must be at least 1 and finite, got 'a'."),
        ({"eta": 0.9}, "eta must be at least 1 and finite, got 0.9."),
        ({"epsilon": -0.1}, "epsilon must be at least 0 and finite, got -0.1."),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_settings(settings, message):
    with pytest.raises(ValueError) as error:
        fab(**settings)
    assert str(error.value) == message
