"""Certificates of rows of a table, ``(batch, dim)``, in any range: those of the same problem in [0, 1]."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import certification
from robustjax._prototypes import PrototypeNetwork
from robustjax.certification import conformal, intervals

UNIT = np.random.default_rng(0).uniform(0.1, 0.9, (6, 4)).astype(np.float32)
WIDTH = 64.0  # a power of two, so that no number of the other problem rounds
ROWS = np.float32(WIDTH) * UNIT
WEIGHTS = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(0), 6)  # the key of an input would depend on its numbers


def linear(scale, x):
    return (x / scale - 0.5) @ WEIGHTS


HERE, THERE = (jax.tree_util.Partial(linear, np.float32(scale)) for scale in (1.0, WIDTH))
gaussian = lambda scale: certification.gaussian(0.25 * scale)
OUTSIDE = r"x must lie in \[0, 1\], got values from"


def smoothed(function, *, counts=(), **settings):
    """A function of smoothing in both units, and its error outside of [0, 1]."""
    unit = function(KEYS, HERE, UNIT, gaussian(1.0), **settings)
    rows = functools.partial(function, KEYS, THERE, ROWS, gaussian(WIDTH), **settings)
    with pytest.raises(ValueError, match=OUTSIDE):
        rows()
    return unit, rows(input_range=None)


def test_certify():
    unit, rows = smoothed(certification.certify, num_selection=20, num_estimation=200, batch_size=200)
    np.testing.assert_array_equal(rows.label, unit.label)
    np.testing.assert_allclose(rows.radius, WIDTH * unit.radius, rtol=1e-6)
    assert (rows.radius > 0).any()


def test_certify_sequential():
    unit, rows = smoothed(certification.certify_sequential, max_samples=200, batch_size=100)
    np.testing.assert_array_equal(rows.label, unit.label)
    np.testing.assert_allclose(rows.radius, WIDTH * unit.radius, rtol=1e-6)
    assert (rows.radius > 0).any()


def test_predict():
    unit, rows = smoothed(certification.predict, num_samples=200, batch_size=200)
    np.testing.assert_array_equal(rows, unit)
    assert (rows >= 0).any()


def test_smoothed_scores():
    unit, rows = smoothed(conformal.smoothed_scores, num_samples=8, batch_size=8)
    np.testing.assert_allclose(rows.mean, unit.mean, atol=1e-6)
    np.testing.assert_allclose(rows.mean.sum(-1), 2.0, atol=1e-5)  # 1 - p, of three classes


def test_sample_counts_reads_no_range_because_it_is_traceable():
    count = jax.jit(lambda x: certification.sample_counts(KEYS, THERE, x, gaussian(WIDTH), num_samples=16))
    np.testing.assert_array_equal(count(ROWS).sum(-1), 16)


@pytest.mark.parametrize("input_range", [(0.0, 1.0), None, (-np.inf, 1.0)])
def test_intervals(input_range):
    epsilon = 0.2
    unit = intervals.certify(HERE, UNIT, epsilon=epsilon, input_range=input_range)
    wide = None if input_range is None else (WIDTH * input_range[0], WIDTH * input_range[1])
    rows = intervals.certify(THERE, ROWS, epsilon=WIDTH * epsilon, input_range=wide)
    np.testing.assert_array_equal(rows.label, unit.label)
    low, high = (-np.inf, np.inf) if input_range is None else input_range
    slopes = (WEIGHTS.T[np.asarray(unit.label)][:, None] - WEIGHTS.T[None]).astype(np.float64)
    worst = np.where(slopes > 0, np.maximum(UNIT - epsilon, low)[:, None], np.minimum(UNIT + epsilon, high)[:, None])
    margins = (slopes * (worst - 0.5)).sum(-1)
    margins[np.arange(6), np.asarray(unit.label)] = np.inf
    for found in (unit, rows):
        np.testing.assert_allclose(found.margin, margins.min(-1), atol=1e-3)
        assert (np.asarray(found.margin) <= margins.min(-1)).all()


def test_intervals_out_of_range():
    with pytest.raises(ValueError, match=OUTSIDE):
        intervals.certify(THERE, ROWS, epsilon=1.0)
    with pytest.raises(ValueError, match="x must be finite"):
        intervals.certify(THERE, ROWS * np.float32(np.nan), epsilon=1.0, input_range=None)


def test_prototypes():
    components = jnp.stack([jnp.zeros(4), jnp.ones(4)])
    network = PrototypeNetwork(components, jnp.float32(1.0), jnp.eye(2)[:, None], jnp.zeros((2, 1, 2)), False)
    far = dataclasses.replace(network, components=WIDTH * components, scale=jnp.float32(WIDTH))
    unit = certification.prototypes.radius(network, UNIT)
    rows = certification.prototypes.radius(far, ROWS, input_range=(0.0, WIDTH))
    np.testing.assert_allclose(rows.radius, WIDTH * unit.radius, rtol=1e-5)
    free = certification.prototypes.radius(far, 4 * ROWS, input_range=None)
    assert np.isfinite(free.radius).all()
    with pytest.raises(ValueError, match=OUTSIDE):
        certification.prototypes.radius(far, ROWS)
