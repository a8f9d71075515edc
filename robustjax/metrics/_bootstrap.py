"""Confidence intervals of any metric by resampling."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from robustjax import _arguments, _validate
from robustjax.typing import ArrayLike

_BATCH_SIZE = 2**21  # numbers resampled at once: tens of MB, and no slower than all at once


class BootstrapInterval(NamedTuple):
    """An estimate with its confidence interval; each field has the structure that the metric returns.

    Attributes:
      estimate: the metric of the samples as they are.
      lower: lower end of the interval.
      upper: upper end of the interval.
    """

    estimate: Any
    lower: Any
    upper: Any


@_arguments.checked
def bootstrap_interval(
    key: Key[Array, ""],
    metric: Callable[..., Any],
    *samples: ArrayLike,
    num_resamples: int = 1000,
    alpha: float = 0.05,
) -> BootstrapInterval:
    """Computes percentile bootstrap confidence intervals of a metric of one or several samples.

    Each sample is resampled separately, rows with replacement, so sizes stay the same. For out-of-distribution
    detection::

        bootstrap_interval(key, detection_metrics_on_device, *ranks(scores_in, scores_out))

    gives an interval for each of the metrics. Ranks are used because samples are rounded to float32, which could tie
    scores. To compare two detectors on the same inputs, pass scores of shape ``(m, 2)`` and a metric that returns a
    difference of its columns.

    Args:
      key: one typed key.
      metric: ``metric(*samples)`` to a floating scalar or a pytree of them; traceable by JAX, and hashable: calls with
        the same function share a compilation, a new lambda compiles again.
      *samples: ``(rows, ...)`` arrays; rows are taken to be independent.
      num_resamples: number of resamples; the first r do not change when more are drawn.
      alpha: the interval has level 1 - alpha, per metric and not jointly.

    Returns:
      The estimate and both ends. The level holds in the limit of many rows; with few rows the interval is too short,
      and a metric at its bound (an AUROC of 1) has an interval of length zero.

    Raises:
      ValueError: if ``key`` is not a key, there are no samples, a sample has no rows or a NaN, ``num_resamples`` is
        below 2, or ``alpha`` is outside (0, 1).

    Example:
      >>> correct = jnp.arange(50) % 5 > 0  # 80 % are right
      >>> interval = metrics.bootstrap_interval(jax.random.key(0), jnp.mean, correct.astype(jnp.float32))
      >>> f"{interval.estimate:.2f}, between {interval.lower:.2f} and {interval.upper:.2f}"
      '0.80, between 0.68 and 0.90'

    Reference:
      Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13.
    """
    _validate.key(key)
    _validate.at_least(2, num_resamples=num_resamples)
    _validate.probability(alpha=alpha)
    if not samples:
        raise ValueError("samples must be one or more arrays, got none.")
    arrays = tuple(map(jnp.asarray, samples))
    for number, sample in enumerate(arrays):
        if not sample.ndim or not sample.shape[0]:
            raise ValueError(f"samples[{number}] must have rows, got shape {sample.shape}.")
        if not isinstance(sample, jax.core.Tracer) and jnp.issubdtype(sample.dtype, jnp.floating):
            bad = int(jnp.isnan(sample).sum())
            if bad:
                raise ValueError(f"samples[{number}] must have no NaN, got {bad} among {sample.size} values.")
    estimate, resampled = _resampled(key, metric, arrays, num_resamples)
    lower = jax.tree.map(lambda values: jnp.quantile(values, alpha / 2, axis=0), resampled)
    upper = jax.tree.map(lambda values: jnp.quantile(values, 1 - alpha / 2, axis=0), resampled)
    return BootstrapInterval(estimate, lower, upper)


@functools.partial(jax.jit, static_argnames=("metric", "num_resamples"))
def _resampled(key: Array, metric: Callable[..., Any], samples: tuple[Array, ...], num_resamples: int):
    def resample(number):
        keys = jax.random.split(jax.random.fold_in(key, number), len(samples))
        rows = [jax.random.randint(k, sample.shape[:1], 0, sample.shape[0]) for k, sample in zip(keys, samples)]
        return metric(*(sample[index] for sample, index in zip(samples, rows)))

    # Batches of one size: a remainder would compile the metric once more.
    fewest = min(num_resamples, math.ceil(num_resamples * sum(sample.size for sample in samples) / _BATCH_SIZE))
    batches = next(number for number in range(fewest, num_resamples + 1) if num_resamples % number == 0)
    resampled = jax.lax.map(jax.vmap(resample), jnp.arange(num_resamples).reshape(batches, -1))
    return metric(*samples), jax.tree.map(lambda values: values.reshape(-1, *values.shape[2:]), resampled)
