"""Moments of scores under noise beside draws in a Python loop and closed forms."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import special

from robustjax import certification, perturbations
from robustjax.certification import conformal

MEASURE = certification.gaussian(0.25)
X = np.random.default_rng(0).uniform(size=(8, 2, 2, 1)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
KEY = jax.random.key(0)


def logits_of(weights, x):
    return x.reshape(x.shape[0], -1) @ weights


linear = jax.tree_util.Partial(logits_of, WEIGHTS)


def scores(x=X, *, key=KEY, logits_fn=linear, num_samples=10, batch_size=4, **settings):
    found = conformal.smoothed_scores(
        key, logits_fn, x, MEASURE, num_samples=num_samples, batch_size=batch_size, **settings
    )
    return jax.tree.map(np.asarray, found)


def draws_by_hand(image, num_samples, score):
    """One copy at a time: ``(num_samples, classes)``."""
    return [draw_by_hand(image, i, score) for i in range(num_samples)]


@functools.partial(jax.jit, static_argnames="score")
def draw_by_hand(image, i, score):
    image_key = perturbations.image_keys(KEY, image[None])[0]
    uniform = jax.random.uniform(jax.random.fold_in(image_key, np.uint32(2**32 - 1)))
    noisy = MEASURE.sample(jax.random.fold_in(image_key, i), image)
    return score(jax.nn.softmax(linear(noisy[None])), uniform[None])[0]


def mixed(probabilities, uniform):
    return 0.5 * (probabilities + uniform[:, None])


def test_moments_by_hand():
    """10 copies in blocks of 4, 4 and 2."""
    found = scores(score=mixed)
    for row in (0, 5):
        drawn = np.asarray(draws_by_hand(X[row], 10, mixed), np.float64)
        np.testing.assert_allclose(found.mean[row], drawn.mean(0), atol=1e-6)
        np.testing.assert_allclose(found.variance[row], drawn.var(0, ddof=1), atol=1e-6)
    assert found.num_samples.tolist() == [10] * 8


def test_results_belong_to_the_image():
    """Three images at once, the last group filled up, and the keys that one key gives them, in another order."""
    whole, keys = scores(), perturbations.image_keys(KEY, X)
    for a, b in zip(scores(X[::-1], key=keys[::-1], batch_size=33), whole):
        np.testing.assert_allclose(a[::-1], b, atol=1e-6)
    assert np.abs(scores(key=jax.random.key(1)).mean - whole.mean).max() > 1e-3


def test_a_half_space_has_its_closed_form():
    normal = np.array([0.5, -0.5, 0.5, 0.5], np.float32)

    def half_space(x):
        distance = (x.reshape(x.shape[0], -1) - 0.5) @ normal
        return jnp.stack([jnp.zeros_like(distance), 1e6 * distance], -1)

    n = 4000
    found = scores(logits_fn=half_space, num_samples=n, batch_size=1000)
    p = special.ndtr(-(X.reshape(8, -1) - 0.5) @ normal / 0.25)  # THR of class 1 is 1 on the other side
    np.testing.assert_allclose(found.mean[:, 1], p, atol=4 * np.sqrt(0.25 / n))
    np.testing.assert_allclose(found.variance[:, 1], found.mean[:, 1] * (1 - found.mean[:, 1]) * n / (n - 1), rtol=1e-3)
    np.testing.assert_allclose(found.mean.sum(-1), 1, atol=1e-6)


def test_one_copy_tells_nothing_of_the_variance():
    found = scores(num_samples=1)
    assert np.isinf(found.variance).all()
    assert np.isfinite(found.mean).all()


def test_one_trace_serves_all_weights_and_settings():
    traces = []

    def traced(weights, x):
        traces.append(x.shape)
        return logits_of(weights, x)

    for scale in (1.0, 2.0):
        score = jax.tree_util.Partial(conformal.raps, weight=scale, k_reg=1)
        scores(logits_fn=jax.tree_util.Partial(traced, jnp.float32(scale) * WEIGHTS), score=score)
    assert set(traces) == {(4, 2, 2, 1)}
    assert len(traces) <= 3


def test_many_devices_and_jit_find_the_same():
    mesh = jax.make_mesh((4, 2), ("data", "noise"), axis_types=(AxisType.Auto,) * 2)
    spread = jax.device_put(X, NamedSharding(mesh, PartitionSpec("data")))
    alone = scores()
    for a, b in zip(scores(spread), alone):
        np.testing.assert_allclose(a, b, atol=1e-6)
    jitted = jax.jit(lambda x: conformal.smoothed_scores(KEY, linear, x, MEASURE, num_samples=10, batch_size=4).mean)
    np.testing.assert_allclose(jitted(X), alone.mean, atol=1e-6)
    bad = X.copy()
    bad[2] = np.nan
    assert np.isnan(jitted(bad)).all(-1).tolist() == [row == 2 for row in range(8)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples must be an integer of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"logits_fn": lambda x: x}, "logits_fn must map (4, 2, 2, 1) to logits (4, classes), got (4, 2, 2, 1)"),
        (
            {"logits_fn": jax.tree_util.Partial(logits_of, WEIGHTS * np.float32(np.inf))},
            "logits_fn must return finite logits, not so for noisy copies of x[0]",
        ),
        ({"logits_fn": lambda x: linear(x - x.mean(0, keepdims=True))}, "logits_fn must answer each input by itself"),
        ({"x": 2 * X}, "x must lie in [0, 1], got values from"),
        ({"score": lambda p, u: 2 * p}, "score must lie in [0, 1], not so for noisy copies of x["),
        ({"score": lambda p, u: p[:, 0]}, "score must return numbers of shape (4, 3), got (4,)"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        scores(**arguments)


def test_other_bad_arguments_are_named(unchecked):
    with pytest.raises(ValueError, match="key must have shape"):
        scores(key=jax.random.split(KEY, 3))
    with pytest.raises(ValueError, match=r"x must be a floating array \(batch, ...\), got int32"):
        scores(np.zeros((2, 3), np.int32))
    with pytest.raises(ValueError, match="measure must be a smoothing measure"):
        conformal.smoothed_scores(KEY, linear, X, 0.25)
