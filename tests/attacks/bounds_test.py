"""Attacks on inputs of any range: tables and embeddings, with bounds for each feature, on one side, or none."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from robustjax import attacks
from robustjax.attacks import _attack, _ball, _box
from robustjax.attacks._fab import to_hyperplane

NORMS = ("linf", "l2", "l1")
ORDER = {"linf": np.inf, "l2": 2, "l1": 1}
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
LOW, HIGH = (-2.0, 0.0, 5.0, -np.inf), (-1.0, 3.0, np.inf, 0.5)  # the width of one feature is 1
ROWS = np.stack([[-2.0, 0.1, 5.0, -7.0], [-1.2, 2.9, 6.0, 0.5], [-1.5, 1.5, 9.0, 0.2]]).astype(np.float32)
BOX = _box.of((LOW, HIGH), ROWS)
project = jax.jit(_ball.project, static_argnames="norm")
settle = jax.jit(_ball.settle, static_argnames="norm")
to_plane = jax.jit(to_hyperplane, static_argnames="norm")


@functools.cache
def table(size=8, dim=4, classes=3, middle=0.5, spread=0.05):
    """Rows, a linear model, and the answers."""
    rng = np.random.default_rng(3)
    x = rng.normal(middle, spread, (size, dim)).astype(np.float32)
    weights = rng.normal(size=(dim, classes)).astype(np.float32)
    bias = (-middle * weights.sum(0) + 0.1 * rng.normal(size=classes)).astype(np.float32)
    return x, weights, bias, (x @ weights + bias).argmax(-1).astype(np.int32)


def linear(weights, bias, x):
    return x.reshape(x.shape[0], -1) @ weights + bias[None]


def distances(x, weights, bias, labels, norm):
    """Distance of each row to the nearest boundary of a linear model, without bounds."""
    logits = x.astype(np.float64) @ weights + bias
    gaps = logits[np.arange(len(x)), labels][:, None] - logits
    slopes = np.linalg.norm((weights[:, None, :] - weights[:, :, None]).astype(np.float64), DUAL[norm], axis=0)[labels]
    return np.where(slopes > 0, gaps / np.where(slopes > 0, slopes, 1), np.inf).min(-1)


def nearest(z, x, epsilon, norm, low, high):
    """The nearest point of ball and box, by a general solver, started at x and at the clipped point."""
    free = optimize.Bounds(low, high)
    if norm == "l1":  # u = x + p - m, so that all constraints are smooth
        dim = len(x)
        far = lambda v: ((x + v[:dim] - v[dim:] - z) ** 2).sum()
        inside = {"type": "ineq", "fun": lambda v: epsilon - v.sum()}
        sides = optimize.Bounds(np.zeros(2 * dim), np.concatenate([np.minimum(high - x, 99), np.minimum(x - low, 99)]))
        return optimize.minimize(far, np.zeros(2 * dim), bounds=sides, constraints=[inside], method="SLSQP").fun
    if norm == "linf":
        free = optimize.Bounds(np.maximum(low, x - epsilon), np.minimum(high, x + epsilon))
    inside = [{"type": "ineq", "fun": lambda u: epsilon**2 - ((u - x) ** 2).sum()}] if norm == "l2" else []
    return optimize.minimize(lambda u: ((u - z) ** 2).sum(), x, bounds=free, constraints=inside, method="SLSQP").fun


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("epsilon", [0.3, 2.5])
def test_projections_stay_in_ball_and_box_and_go_to_the_nearest_point(norm, epsilon):
    for _ in range(3):
        z = (ROWS + 2 * RNG.standard_normal(ROWS.shape)).astype(np.float32)
        moved = np.asarray(settle(z, ROWS, np.float32(epsilon), norm, BOX))
        assert (moved >= LOW).all()
        assert (moved <= HIGH).all()
        change = moved.astype(np.float64) - ROWS
        assert (np.linalg.norm(change, ORDER[norm], axis=-1) <= np.float32(epsilon)).all()
        if norm == "l2":  # the point of the ball, clipped, which is not the nearest of the box
            ball = ROWS + (z - ROWS) * np.minimum(1, epsilon / np.linalg.norm(z - ROWS, axis=-1, keepdims=True))
            np.testing.assert_allclose(moved, np.clip(ball, LOW, HIGH), atol=1e-5)
            continue
        for i, row in enumerate(ROWS.astype(np.float64)):
            best = nearest(z[i].astype(np.float64), row, epsilon, norm, np.array(LOW), np.array(HIGH))
            assert ((moved[i] - z[i].astype(np.float64)) ** 2).sum() <= best + 1e-3


def test_the_l2_projection_without_bounds_is_the_nearest_point():
    z = ROWS + np.float32(3.0)
    moved = np.asarray(project(z, ROWS, np.float32(0.5), "l2", _box.of(None, ROWS)))
    np.testing.assert_allclose(moved - ROWS, np.full_like(ROWS, 0.25), atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_the_shortest_way_to_a_plane_is_that_of_a_general_solver(norm):
    for seed in range(4):
        rng = np.random.default_rng(seed)
        normal = rng.normal(size=ROWS.shape).astype(np.float32)
        normal[:, seed] = 0.0 if seed < 2 else normal[:, seed]
        value = rng.normal(size=len(ROWS)).astype(np.float32)
        moves = np.asarray(to_plane(ROWS, normal, value, norm=norm, box=BOX), np.float64)
        assert np.isfinite(moves).all()
        assert ((ROWS + moves >= np.array(LOW) - 1e-5) & (ROWS + moves <= np.array(HIGH) + 1e-5)).all()
        for i, x in enumerate(ROWS.astype(np.float64)):
            w, v = normal[i].astype(np.float64), float(value[i])
            sides = [(a - b, c - b) for a, b, c in zip(LOW, x, HIGH, strict=True)]
            sides = [tuple(None if np.isinf(s) else s for s in side) for side in sides]
            reached = abs(w @ moves[i] + v) < 1e-4
            exists = optimize.linprog(np.zeros(4), A_eq=w[None], b_eq=[-v], bounds=sides)
            assert reached == exists.success
            if not reached:
                continue
            if norm == "l2":
                box = optimize.Bounds(
                    [s[0] or -99.0 if s[0] is None else s[0] for s in sides],
                    [99.0 if s[1] is None else s[1] for s in sides],
                )
                plane = {"type": "eq", "fun": lambda d, w=w, v=v: w @ d + v}
                found = optimize.minimize(
                    lambda d: (d**2).sum(), exists.x, bounds=box, constraints=[plane], method="SLSQP"
                )
                least = np.sqrt(found.fun)
            else:  # a linear program in the displacement and its size
                eye = np.eye(4)
                sizes = np.eye(4) if norm == "l1" else np.ones((4, 1))
                lines = np.block([[eye, -sizes], [-eye, -sizes]])
                cost = np.concatenate([np.zeros(4), np.ones(sizes.shape[1])])
                equal = np.concatenate([w, np.zeros(sizes.shape[1])])[None]
                ends = [*sides, *[(0, None)] * sizes.shape[1]]
                least = optimize.linprog(cost, lines, np.zeros(8), equal, [-v], ends).fun
            assert np.linalg.norm(moves[i], ORDER[norm]) == pytest.approx(least, rel=1e-3, abs=1e-5)


IN_A_BALL = {
    "pgd": lambda **ball: attacks.pgd(**ball, steps=5),
    "fgsm": attacks.fgsm,
    "momentum": lambda **ball: attacks.momentum_iterative(**ball, steps=3),
    "apgd": lambda **ball: attacks.apgd(**ball, steps=5),
    "apgd_targeted": lambda **ball: attacks.apgd_targeted(**ball, steps=4, num_targets=1),
    "square": lambda **ball: attacks.square(**ball, queries=12),
}
NEAREST = {
    "fab": lambda **bounds: attacks.fab(norm="l1", steps=6, num_targets=2, **bounds),
    "deepfool": lambda **bounds: attacks.deepfool(norm="l2", steps=5, **bounds),
    "carlini_wagner": lambda **bounds: attacks.carlini_wagner(
        steps=30, learning_rate=0.05, initial_c=0.1, binary_search_steps=3, **bounds
    ),
}


def images():
    x = np.clip(np.random.default_rng(7).normal(0.5, 0.3, (6, 5, 5, 1)), 0, 1).astype(np.float32)
    weights = np.random.default_rng(8).normal(size=(25, 4)).astype(np.float32)
    return x, weights, (-0.5 * weights.sum(0)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "norm", "low"),
    [
        ("pgd", "linf", -8.0),
        ("pgd", "l2", -8.0),
        ("fgsm", "l1", -8.0),
        ("apgd", "l1", 0.0),  # exactly, because rounding decides which pixels it changes
        ("apgd_targeted", "l2", -8.0),
        ("square", "linf", -8.0),
        ("square", "l1", -8.0),
        *((name, None, -8.0) for name in NEAREST),
    ],
)
def test_a_rescaled_problem_has_the_rescaled_answer(name, norm, low):
    width = 16.0
    x, weights, bias = images()
    labels = linear(weights, bias, x).argmax(-1)
    keys = jax.random.split(KEY, len(x))  # the key of an input depends on its numbers
    there = np.float32(low) + np.float32(width) * x
    scaled = functools.partial(linear, weights / np.float32(width), bias - np.float32(low / width) * weights.sum(0))
    ball = {} if norm is None else {"norm": norm, "epsilon": {"linf": 0.05, "l2": 0.3, "l1": 1.2}[norm]}
    make = {**IN_A_BALL, **NEAREST}[name]
    unit = make(**ball)(keys, functools.partial(linear, weights, bias), x, labels)
    wide = {**ball, "epsilon": ball["epsilon"] * width} if ball else {}
    rescaled = make(**wide, bounds=(low, low + width))(keys, scaled, there, labels)
    if norm is None:
        assert np.asarray(unit.success).any()
        np.testing.assert_array_equal(unit.success, rescaled.success)
        np.testing.assert_allclose(rescaled.distance, width * np.asarray(unit.distance), rtol=2e-3)
        unit, rescaled = unit.x, rescaled.x
    assert np.abs(np.asarray(unit) - x).max() > 0.01
    np.testing.assert_allclose((np.asarray(rescaled) - low) / width, unit, atol=2e-3)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["pgd", "fgsm"])
def test_without_bounds_a_linear_margin_of_two_classes_falls_by_epsilon_times_the_dual_norm(name, norm):
    x, weights, bias, _ = table(middle=40.0, spread=9.0, classes=2)
    labels = (x @ weights + bias).argmax(-1)
    settings = {"epsilon": 3.0, "norm": norm, "bounds": None, "loss": "margin"}
    attack = (
        attacks.fgsm(**settings)
        if name == "fgsm"
        else attacks.pgd(**settings, steps=5, random_start=False, keep="last")
    )
    x_adv = np.asarray(attack(KEY, functools.partial(linear, weights, bias), x, labels))
    normal = (weights[:, 1] - weights[:, 0]).astype(np.float64)
    rise = (x_adv.astype(np.float64) - x) @ normal * np.where(labels == 0, 1, -1)
    np.testing.assert_allclose(rise, 3.0 * np.linalg.norm(normal, DUAL[norm]), rtol=1e-3)
    assert x_adv.min() < 0 or x_adv.max() > 1


@pytest.mark.parametrize(
    ("attack", "norm"),
    [(attacks.fab(norm=norm, steps=20, num_targets=2, bounds=None), norm) for norm in NORMS]
    + [(attacks.deepfool(norm=norm, overshoot=1e-3, bounds=None), norm) for norm in ("l2", "linf")]
    + [
        (attacks.carlini_wagner(steps=300, learning_rate=0.05, initial_c=1.0, binary_search_steps=8, bounds=None), "l2")
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_without_bounds_minimum_norm_attacks_find_the_distance_to_a_linear_boundary(attack, norm):
    classes = 2 if isinstance(attack, attacks.carlini_wagner) else 3  # it goes to the class with the largest logit
    x, weights, bias, labels = table(middle=20.0, spread=2.0, classes=classes)
    found = attack(KEY, functools.partial(linear, weights, bias), x, labels)
    assert np.asarray(found.success).all()
    expected = distances(x, weights, bias, labels, norm)
    np.testing.assert_allclose(found.distance, expected, rtol=0.03, atol=1e-3)
    assert (np.asarray(found.distance) >= expected * (1 - 1e-4)).all()


EVERY = [
    *(
        make(epsilon=0.5, norm=norm, bounds=(LOW, HIGH))
        for name, make in IN_A_BALL.items()
        if name != "square"
        for norm in NORMS
        if (name, norm)
        in {("pgd", "l1"), ("fgsm", "l1"), ("momentum", "l2"), ("apgd", "linf"), ("apgd_targeted", "l1")}
    ),
    *(make(bounds=(LOW, HIGH)) for make in NEAREST.values()),
]


@pytest.mark.parametrize("attack", EVERY, ids=lambda attack: type(attack).__name__)
def test_results_lie_within_the_bounds_of_each_feature(attack):
    weights = 2 * np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32)
    model = functools.partial(linear, weights, -ROWS.mean(0) @ weights)
    labels = np.asarray(model(ROWS)).argmax(-1)
    result = attack(KEY, model, ROWS, labels)
    x_adv = np.asarray(getattr(result, "x", result))
    assert ((x_adv >= LOW) & (x_adv <= HIGH)).all()
    assert (x_adv != ROWS).any()
    if hasattr(result, "success"):
        assert np.asarray(result.success).any()
        assert np.isfinite(np.asarray(result.distance)[np.asarray(result.success)]).all()
    else:
        assert np.linalg.norm(x_adv.astype(np.float64) - ROWS, ORDER[attack.norm], axis=-1).max() <= 0.5


def test_bounds_of_channels_broadcast_to_images():
    x = np.full((2, 2, 2, 3), 5.0, np.float32)
    attack = attacks.fgsm(epsilon=4.0, loss="margin", bounds=([5.0, 0.0, 4.0], [6.0, 9.0, 6.0]))
    weights = np.ones((12, 2), np.float32) * np.array([[1.0, -1.0]], np.float32)
    x_adv = attack(KEY, lambda x: x.reshape(len(x), -1) @ weights, x, np.array([0, 1]))
    np.testing.assert_array_equal(x_adv[0], np.broadcast_to([5.0, 1.0, 4.0], (2, 2, 3)))
    np.testing.assert_array_equal(x_adv[1], np.broadcast_to([6.0, 9.0, 6.0], (2, 2, 3)))


def test_equal_bounds_make_equal_attacks_and_another_range_compiles_nothing():
    as_array = attacks.pgd(epsilon=0.1, bounds=(np.array(LOW), jnp.array(HIGH)))
    as_list = attacks.pgd(epsilon=0.1, bounds=(list(LOW), list(HIGH)))
    assert as_array == as_list
    assert hash(as_array) == hash(as_list)
    assert attacks.pgd(epsilon=0.1, bounds=(0, 1)) == attacks.pgd(epsilon=0.1)
    x, weights, bias, labels = table()
    model = jax.tree_util.Partial(linear, weights, bias)
    attacks.pgd(epsilon=0.1, steps=5)(KEY, model, x, labels)
    before = _attack._perturb._cache_size()
    attacks.pgd(epsilon=0.1, steps=5, bounds=(-3.0, 4))(KEY, model, x, labels)
    assert _attack._perturb._cache_size() == before
    attacks.pgd(epsilon=0.1, steps=5, bounds=([-3.0] * 4, 4.0))(KEY, model, x, labels)
    attacks.pgd(epsilon=0.1, steps=5, bounds=(-2.0, [9.0] * 4))(KEY, model, x, labels)
    assert _attack._perturb._cache_size() == before + 1


@pytest.mark.filterwarnings("ignore:AutoAttack. a model of 3 classes")
def test_autoattack_on_rows_runs_without_square_and_says_so():
    x, weights, bias, labels = table(middle=20.0, spread=2.0)
    model = functools.partial(linear, weights, bias)
    with pytest.raises(ValueError, match=r"got \(8, 4\): Square changes .*version='gradient' runs the other attacks"):
        attacks.autoattack(epsilon=0.2, bounds=None)(KEY, model, x, labels)
    with pytest.warns(UserWarning, match="Square, which needs no gradients, does not run"):
        found = attacks.autoattack(epsilon=0.2, version="gradient", bounds=None).evaluate(KEY, model, x, labels)
    assert list(found.per_attack) == ["apgd-ce", "apgd-dlr", "fab-t"]
    assert "Square, which needs no gradients, does not run." in found.warnings
    np.testing.assert_array_equal(found.correct, distances(x, weights, bias, labels, "linf") > 0.2)
    assert 0 < found.robust_accuracy < 1


def test_robust_accuracy_at_budget_and_worst_of_follow_the_bounds():
    x, weights, bias, labels = table(middle=20.0, spread=2.0)
    model = functools.partial(linear, weights, bias)
    inside = attacks.fab(norm="l2", steps=20, num_targets=2, bounds=None)
    both = attacks.worst_of(attacks.at_budget(inside, 0.3), attacks.fgsm(epsilon=0.3, norm="l2", bounds=None))
    assert both.bounds is None
    expected = float((distances(x, weights, bias, labels, "l2") > 0.3).mean())
    assert 0 < expected < 1
    assert attacks.robust_accuracy(KEY, both, model, x, labels) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"x must lie in \[0, 1\], got values from"):
        attacks.robust_accuracy(KEY, lambda key, model, x, labels: x, model, x, labels)
    with pytest.raises(ValueError, match="attacks must have the same bounds, got None and"):
        attacks.worst_of(inside, attacks.fgsm(epsilon=0.1))
    depends = lambda x: model(x) - model(x).mean(0, keepdims=True)
    with pytest.raises(ValueError, match="must answer each input by itself"):
        attacks.robust_accuracy(KEY, attacks.fgsm(epsilon=0.1, bounds=(0.0, 40.0)), depends, x, labels)


def test_diagnose_and_random_models_take_inputs_of_any_range():
    x, weights, bias, labels = table(middle=20.0, spread=2.0)
    model = functools.partial(linear, weights, bias)
    assert attacks.diagnose(KEY, model, x, labels, bounds=None).warnings == ()
    with pytest.raises(ValueError, match=r"x must lie in \[0, 1\]"):
        attacks.diagnose(KEY, model, x, labels)
    attack = attacks.expectation_over_transformation(attacks.fgsm(epsilon=2.0, bounds=(0.0, 99.0)), samples=2)
    x_adv = np.asarray(attack(KEY, lambda key, x: model(x + 0.1 * jax.random.normal(key, x.shape)), x, labels))
    np.testing.assert_allclose(np.abs(x_adv - x), 2.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("bounds", "x", "message"),
    [
        ((0.0, 1.0), 2.0, "x must lie in [0, 1], got values from 2.0 to 2.0: bounds= says another range"),
        ((-3.0, 1.0), 2.0, "x must lie in [-3, 1], got values from 2.0 to 2.0"),
        ((0.0, (9.0, 9.0, 1.5, 9.0)), 2.0, "x must lie within bounds, got 2 at x[0, 2], which is in [0, 1.5]"),
        (None, np.inf, "x must be finite, got values from inf to inf"),
        (None, np.nan, "x must be finite, got values from nan to nan and NaN"),
        (([0.0, 0.0], 1.0), 0.5, "bounds must be numbers, or broadcast against one input of shape (4,)"),
    ],
)
@pytest.mark.filterwarnings("ignore:All-NaN")
def test_inputs_out_of_bounds_are_named(bounds, x, message):
    attack = attacks.fgsm(epsilon=0.1, bounds=bounds)
    with pytest.raises(ValueError, match=re.escape(message)):
        attack(KEY, lambda x: x, np.full((2, 4), x, np.float32), np.zeros(2, np.int32))


@pytest.mark.parametrize("bounds", [(1.0, 0.0), (0.0, 0.0), (0.0, np.nan), (0.0,), ([0.0, 1.0], [1.0] * 3), "01", 3.0])
def test_what_is_no_box_is_refused(bounds, unchecked):
    with pytest.raises(ValueError, match="bounds must be "):
        attacks.pgd(epsilon=0.1, bounds=bounds)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: attacks.pgd(epsilon=8.0),
            "at most 1, the largest linf distance of inputs in [0, 1], got 8.0: 8 looks like 8/255",
        ),
        (lambda: attacks.pgd(epsilon=1.5), "got 1.5: bounds= says another range of inputs, and None none."),
        (
            lambda: attacks.pgd(epsilon=8.0, bounds=(0.0, 7.0)),
            "at most 7, the largest linf distance of inputs in [0, 7], got 8.0: bounds=",
        ),
        (lambda: _box.check_epsilon(5.1, "l2", ((0.0, 1.0), (3.0, 5.0)), (2,)), "at most 5, the largest l2"),
        (lambda: _box.check_epsilon(7.1, "l1", ((0.0, 1.0), (3.0, 5.0)), (2,)), "at most 7, the largest l1"),
        (lambda: _box.check_epsilon(15.0, "l1", ((0.0, 1.0), (3.0, 5.0)), (2, 2)), "at most 14, the largest l1"),
    ],
)
def test_epsilon_reaches_no_farther_than_the_bounds(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_without_bounds_epsilon_has_no_limit():
    assert attacks.pgd(epsilon=800.0, bounds=None).epsilon == 800.0
    assert attacks.pgd(epsilon=255.0, bounds=(0, 255)).bounds == (0.0, 255.0)
    _box.check_epsilon(0.1, "linf", (0.9, 1.0))  # 1.0 - 0.9 is a little less


def test_traced_bounds_are_refused():
    with pytest.raises(ValueError, match="bounds must be numbers that are known, got traced"):
        jax.jit(lambda low: dataclasses.replace(attacks.fgsm(epsilon=0.1), bounds=(low, 1.0)).bounds[0])(0.0)
