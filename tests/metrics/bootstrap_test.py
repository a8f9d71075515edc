"""Bootstrap intervals against theory: of a mean, of an AUROC, and how often they hold the truth."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import metrics
from robustjax.metrics import _bootstrap


def normal(*shape: int, seed: int = 0, shift: float = 0.0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(shift, size=shape), jnp.float32)


def auroc_of(scores_in, scores_out):
    return metrics.detection_metrics_on_device(scores_in, scores_out).auroc


def test_interval_of_a_mean_is_that_of_theory():
    sample = normal(400)
    found = metrics.bootstrap_interval(jax.random.key(0), jnp.mean, sample, num_resamples=2000, alpha=0.1)
    half = 1.6449 * sample.std() / math.sqrt(400)
    assert float(found.estimate) == pytest.approx(float(sample.mean()))
    np.testing.assert_allclose([found.lower, found.upper], [sample.mean() - half, sample.mean() + half], atol=0.01)
    _, means = _bootstrap._resampled(jax.random.key(0), jnp.mean, (sample,), 2000)
    np.testing.assert_allclose([found.lower, found.upper], np.quantile(means, [0.05, 0.95]), rtol=1e-4)


@pytest.fixture(scope="module")
def detection():
    scores_in, scores_out = normal(300), normal(200, seed=1, shift=1.0)
    return (
        scores_in,
        scores_out,
        metrics.bootstrap_interval(
            jax.random.key(0), metrics.detection_metrics_on_device, scores_in, scores_out, num_resamples=500
        ),
    )


def test_intervals_of_all_detection_metrics_at_once(detection):
    scores_in, scores_out, found = detection
    np.testing.assert_allclose(found.estimate, metrics.detection_metrics(scores_in, scores_out), atol=1e-6)
    for estimate, lower, upper in zip(*found):
        assert lower < estimate < upper


def test_interval_of_an_auroc_has_the_width_of_delong(detection):
    scores_in, scores_out, found = detection
    wins = np.asarray(scores_out)[:, None] > np.asarray(scores_in)
    deviation = math.sqrt(wins.mean(1).var(ddof=1) / 200 + wins.mean(0).var(ddof=1) / 300)
    assert float(found.upper.auroc - found.lower.auroc) == pytest.approx(2 * 1.96 * deviation, rel=0.15)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """80% intervals of 300 data sets; the standard error of the share is 2.3%, and percentile intervals are short."""
    scores_in, scores_out = normal(300, 50), normal(300, 50, seed=1, shift=1.0)
    interval = lambda key, a, b: metrics.bootstrap_interval(key, auroc_of, a, b, num_resamples=100, alpha=0.2)
    found = jax.jit(jax.vmap(interval))(jax.random.split(jax.random.key(0), 300), scores_in, scores_out)
    truth = 0.76025
    share = float(((found.lower <= truth) & (truth <= found.upper)).mean())
    assert 0.72 < share < 0.86


def test_rows_are_drawn_whole():
    """The difference of equal columns is 0 in each resample, as of two detectors on the same inputs."""
    difference = lambda a, b: a[:, 0].max() - a[:, 1].max() + b[:, 0].max() - b[:, 1].max()
    samples = (np.tile(np.asarray(s)[:, None], (1, 2)) for s in (normal(30), normal(20, seed=1)))
    assert metrics.bootstrap_interval(jax.random.key(0), difference, *samples, num_resamples=200) == (0, 0, 0)


def test_every_row_is_drawn_alike():
    which = jnp.eye(4)
    shares = [_bootstrap._resampled(jax.random.key(0), jnp.mean, (which[:, i],), 500)[1].mean() for i in range(4)]
    np.testing.assert_allclose(shares, 1 / 4, atol=0.04)  # a standard error of 0.01


def test_samples_are_drawn_apart():
    both = lambda a, b: jnp.mean(a) - jnp.mean(b)
    sample = normal(100)
    found = metrics.bootstrap_interval(jax.random.key(0), both, sample, sample, num_resamples=200)
    assert abs(found.estimate) < 1e-6
    assert found.lower < -0.1 < 0.1 < found.upper


def test_resamples_depend_on_the_key_and_not_on_their_number_or_batches(monkeypatch):
    sample = normal(50)
    few, other = (_bootstrap._resampled(jax.random.key(seed), jnp.mean, (sample,), 7)[1] for seed in (0, 1))
    monkeypatch.setattr(
        _bootstrap, "_BATCH_SIZE", 150
    )  # 20 resamples in 10 batches of 2, seven would do but not divide them
    _, many = _bootstrap._resampled(jax.random.key(0), jnp.mean, (sample,), 20)
    assert many.shape == (20,)
    resampled = lambda: _bootstrap._resampled(jax.random.key(0), jnp.mean, (sample,), 20)
    assert "length=10" in str(jax.make_jaxpr(resampled)())  # what is in memory at once
    assert len(np.unique(many)) == 20
    np.testing.assert_allclose(few, many[:7], rtol=1e-5)
    assert not np.isclose(few[:, None], other).any()


def test_as_many_resamples_are_made_as_asked(monkeypatch):
    monkeypatch.setattr(_bootstrap, "_BATCH_SIZE", 10)  # a sample of 50 is more than a batch by itself
    drawn = []
    noted = lambda a: jax.debug.callback(drawn.append, a[0]) or jnp.mean(a)
    _, resampled = _bootstrap._resampled(jax.random.key(0), noted, (normal(50),), 6)
    jax.effects_barrier()
    assert resampled.shape == (6,)
    assert len(drawn) == 6 + 1  # and the sample itself


def test_float64_scores_that_float32_would_tie_are_ranked():
    scores_in, scores_out = 1 + 1e-12 * np.arange(300), 1 + 1e-12 * np.arange(200, 400)
    ranks = metrics.ranks(scores_in, scores_out)
    found = metrics.bootstrap_interval(
        jax.random.key(0), metrics.detection_metrics_on_device, *ranks, num_resamples=500
    )
    assert float(found.estimate.auroc) == pytest.approx(metrics.auroc(scores_in, scores_out), abs=1e-6)
    assert 0.5 < found.lower.auroc < found.upper.auroc < 1


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("key", "samples", "settings", "message"),
    [
        (0, [jnp.ones(3)], {}, "key must be a typed key from jax.random.key, of shape .., got 0"),
        (None, [], {}, "samples must be one or more arrays, got none"),
        (None, [jnp.ones(3), jnp.ones(0)], {}, r"samples\[1\] must have rows, got shape \(0,\)"),
        (None, [jnp.float32(3.0)], {}, r"samples\[0\] must have rows, got shape \(\)"),
        (None, [np.array([1, np.nan])], {}, r"samples\[0\] must have no NaN, got 1 among 2 values"),
        (None, [[1.0, math.nan]], {}, r"samples\[0\] must have no NaN, got 1 among 2 values"),
        (None, [jnp.ones(3)], {"num_resamples": 1}, "num_resamples must be an integer of at least 2, got 1"),
        (None, [jnp.ones(3)], {"alpha": 1.0}, "alpha must lie strictly between 0 and 1, got 1.0"),
    ],
)
def test_bad_input_is_named(key, samples, settings, message):
    with pytest.raises(ValueError, match=message):
        metrics.bootstrap_interval(jax.random.key(0) if key is None else key, jnp.mean, *samples, **settings)
