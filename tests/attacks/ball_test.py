import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats

from robustjax.attacks import _ball, _box

NORMS = ("linf", "l2", "l1")
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}
ORDER = {"linf": np.inf, "l2": 2, "l1": 1}
RNG = np.random.default_rng(0)
X = RNG.random((50, 6)).astype(np.float32)
X[0], X[1], X[2, :3] = 0.0, 1.0, 1e-30
UNIT = _box.of(_box.IMAGES, X)
project = jax.jit(functools.partial(_ball.project, box=UNIT), static_argnames="norm")
settle = jax.jit(functools.partial(_ball.settle, box=UNIT), static_argnames="norm")
random_start = jax.jit(functools.partial(_ball.random_start, box=UNIT), static_argnames=("norm", "sigma"))


@pytest.mark.parametrize("norm", NORMS)
def test_norms_are_numpys(norm):
    z = RNG.standard_normal((7, 2, 3, 1)).astype(np.float32)
    expected = np.linalg.norm(z.reshape(7, -1), ORDER[norm], axis=-1)
    np.testing.assert_allclose(_ball.norms_of(jnp.asarray(z), norm), expected, rtol=1e-6)


def test_l2_norm_neither_overflows_nor_vanishes():
    z = jnp.array([[3e30, 4e30], [3e-30, 4e-30], [0.0, 0.0]])
    np.testing.assert_allclose(_ball.norms_of(z, "l2"), [5e30, 5e-30, 0.0], rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_direction_reaches_the_dual_norm(norm):
    gradient = RNG.standard_normal((20, 5)).astype(np.float32)
    gradient[0] = 0.0
    direction = np.asarray(_ball.steepest(jnp.asarray(gradient), norm))
    np.testing.assert_allclose((gradient * direction).sum(-1), np.linalg.norm(gradient, DUAL[norm], axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(direction[0], 0.0)


@pytest.mark.parametrize("epsilon", [0.0, 1e-9, 8 / 255, 0.1, 0.3, 1.0])
def test_linf_bounds_are_the_outermost_floats_of_the_ball(epsilon):
    epsilon = np.float32(epsilon)
    low, high = (np.asarray(bound) for bound in jax.jit(_ball.linf_bounds)(X, epsilon, UNIT))
    for x, a, b in zip(X.ravel().tolist(), low.ravel().tolist(), high.ravel().tolist(), strict=True):
        assert Fraction(x) - Fraction(a) <= Fraction(float(epsilon)) >= Fraction(b) - Fraction(x)
        assert 0 <= a <= x <= b <= 1
        if a > 0:
            assert Fraction(x) - Fraction(float(np.nextafter(np.float32(a), np.float32(0)))) > Fraction(float(epsilon))
        if b < 1:
            assert Fraction(float(np.nextafter(np.float32(b), np.float32(1)))) - Fraction(x) > Fraction(float(epsilon))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.4, 3.0])
def test_projection_is_inside_and_leaves_what_is_inside(norm, epsilon):
    z = X + RNG.standard_normal(X.shape).astype(np.float32)
    moved = np.asarray(settle(z, X, np.float32(epsilon), norm), np.float64)
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert np.linalg.norm(moved - X, ORDER[norm], axis=-1).max() <= epsilon + 1e-6
    if epsilon < 0.5 and norm != "l2":  # what was outside goes as far as the ball does
        outside = (z > 0) & (z < 1) if norm == "linf" else np.ones_like(z, bool)
        far = np.linalg.norm(np.where(outside, np.clip(z, 0, 1) - X, 0), ORDER[norm], axis=-1) >= epsilon
        assert far.any()
        np.testing.assert_allclose(np.linalg.norm(moved - X, ORDER[norm], axis=-1)[far], epsilon, atol=2e-6)
    inside = (X + 0.9 * (moved - X)).astype(np.float32)
    np.testing.assert_allclose(project(inside, X, np.float32(epsilon), norm), inside, atol=1e-6)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_many_small_changes_do_not_round_out_of_the_ball(norm):
    x = RNG.random((2, 150528)).astype(np.float32)  # an image of 224 x 224 x 3
    for epsilon in (0.001, 0.1, 1.0, 12.0):
        for size in (1.0, epsilon / 1000):
            z = x + size * RNG.standard_normal(x.shape).astype(np.float32)
            change = np.asarray(settle(z, x, np.float32(epsilon), norm), np.float64) - x
            assert np.linalg.norm(change, ORDER[norm], axis=-1).max() <= float(np.float32(epsilon))


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_projection_is_the_nearest_point(norm):
    epsilon = 0.4
    for row in range(8):
        x, z = X[row + 2 : row + 3, :3].astype(np.float64), X[row : row + 1, :3] + RNG.standard_normal((1, 3))
        bounds = optimize.Bounds(np.maximum(0, x[0] - epsilon), np.minimum(1, x[0] + epsilon))
        inside = {"type": "ineq", "fun": lambda u, x=x: epsilon - np.linalg.norm(u - x[0], ORDER[norm])}
        best = min(
            (
                optimize.minimize(
                    lambda u, z=z: ((u - z[0]) ** 2).sum(), start, bounds=bounds, constraints=[inside], method="SLSQP"
                )
                for start in (x[0], np.clip(z[0], bounds.lb, bounds.ub))
            ),
            key=lambda found: found.fun if inside["fun"](found.x) > -1e-6 else np.inf,
        )
        ours = np.asarray(project(z.astype(np.float32), x.astype(np.float32), np.float32(epsilon), norm))[0]
        assert ((ours - z[0]) ** 2).sum() <= best.fun + 1e-4


def test_random_starts_are_uniform_in_the_ball():
    x, epsilon = jnp.full((4000, 3), 0.5), jnp.float32(0.4)
    keys = jax.random.split(jax.random.key(0), 4000)
    cube = np.asarray(random_start(keys, x, epsilon, "linf") - x)
    assert stats.kstest(cube.ravel(), stats.uniform(-epsilon, 2 * epsilon).cdf).pvalue > 1e-3
    for norm in ("l2", "l1"):
        displacement = np.asarray(random_start(keys, x, epsilon, norm) - x)
        radius = np.linalg.norm(displacement, ORDER[norm], axis=-1) / epsilon
        assert stats.kstest(radius**3, "uniform").pvalue > 1e-3
        assert abs(displacement.mean()) < 0.01


def test_gaussian_start_has_its_standard_deviation():
    keys = jax.random.split(jax.random.key(0), 4000)
    start = random_start(keys, jnp.full((4000, 3), 0.5), jnp.float32(0.4), "linf", sigma=0.001)
    assert float((start - 0.5).std()) == pytest.approx(0.001, rel=0.05)


def test_unknown_norm_is_named():
    with pytest.raises(ValueError, match="norm must be one of linf, l2, l1, got 'l3'"):
        _ball.check_norm("l3")
