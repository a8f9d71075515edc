"""When to stop drawing: integer thresholds at fixed look times, computed on the host in float64.

Counts are checked after 100, 125, 157, ... draws (each look a quarter later), and a level is spent in equal parts over
the looks. With a target, the exact distribution of the count gives the thresholds. For a radius, where no single
probability is to be excluded, each look has a Clopper-Pearson bound at its part of alpha. Both need fewer draws than a
beta mixture martingale checked as often, which also pays for the draws between the looks.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from robustjax.certification._binomial import binomial_lower_bound
from robustjax.certification._measures import Measure


class Rule(NamedTuple):
    """When draws of one input stop: at the first look where its count c has c <= low or first <= c <= last.

    Attributes:
      looks: ``(k,)`` numbers of draws, increasing; at the last of them every count stops.
      low: ``(k,)`` counts up to which the input is given up.
      first: ``(k,)`` smallest count that meets the goal.
      last: ``(k,)`` largest count that meets the goal.
    """

    looks: np.ndarray
    low: np.ndarray
    first: np.ndarray
    last: np.ndarray


def stops(count: Any, low: Any, first: Any, last: Any) -> Any:
    """Whether draws stop at counts ``(..., k)``, one for each look; NumPy's arrays or JAX's."""
    return (count <= low) | ((first <= count) & (count <= last))


def look_times(max_samples: int) -> np.ndarray:
    """Numbers of draws at which counts are checked: from 100, each a quarter more, to ``max_samples``."""
    times = [min(100, max_samples)]
    while times[-1] < max_samples:
        times.append(min(-(-5 * times[-1] // 4), max_samples))
    return np.asarray(times)


def lower_boundary(probability: float, looks: np.ndarray, level: float) -> np.ndarray:
    r"""Computes the group-sequential boundary that a binomial count rarely falls to.

    .. math:: P[\exists i:\ X_{n_i} \le c_i] \le \mathrm{level},\qquad X_n \sim \mathrm{Binomial}(n, p)

    At look i, ``c_i`` is the largest integer that keeps the probability of a fall by then within i parts of k of the
    level. By coupling, the same holds for every larger p.

    Args:
      probability: p of one draw, in [0, 1].
      looks: ``(k,)`` increasing numbers of draws.
      level: in (0, 1).

    Returns:
      ``(k,)`` integers, -1 where no count is low enough.
    """
    from scipy import stats

    # What lies outside the windows of all looks and increments, together, has less than the reserve of 0.1%, which is
    # also for rounding: the sums have only positive terms.
    tail = 1e-5 * level / len(looks)

    def window(n):
        return int(stats.binom.ppf(tail, n, probability)), int(stats.binom.isf(tail, n, probability))

    boundary, spent, alive, least, before = [], 0.0, np.ones(1), 0, 0  # alive[j] = P(no stop yet, X = least + j)
    for i, n in enumerate(looks):
        low, high = window(n - before)
        alive = np.convolve(alive, stats.binom.pmf(np.arange(low, high + 1), n - before, probability))
        least += low
        low, high = window(n)
        low = max(low, least)
        alive, least = alive[low - least : high + 1 - least], low
        cumulative = spent + np.cumsum(alive)
        crossed = int(np.searchsorted(cumulative, 0.999 * level * (i + 1) / len(looks), side="right"))
        spent = cumulative[crossed - 1] if crossed else spent
        alive, least, before = alive[crossed:], least + crossed, n
        boundary.append(least - 1)
    return np.asarray(boundary)


def _futility(least: int, looks: np.ndarray, alpha: float, futility: float) -> np.ndarray:
    """Counts at which to give up, if the last look certifies from ``least`` votes on.

    The mirrored test: a class that the last look certifies with probability 1 - alpha or more falls to one of these
    counts before the last look with probability at most ``futility``.
    """
    from scipy import stats

    n = looks[-1]
    probability = float(stats.beta.ppf(1 - alpha, least, n - least + 1)) if least <= n else 1.0
    low = lower_boundary(probability, looks, futility)
    low[-1] = n
    return low


def _rule(*columns: np.ndarray) -> Rule:
    columns = tuple(np.array(column, np.int32) for column in columns)
    for column in columns:
        column.setflags(write=False)  # the caches below hand out the same arrays again
    return Rule(*columns)


@functools.cache
def target_rule(needed: float, alpha: float, futility: float, max_samples: int) -> Rule:
    """Rule for "is q > needed?": yes from ``first`` on, with probability at most alpha if q <= needed.

    Giving up is not part of the guarantee: alpha holds as if nothing were ever given up.
    """
    looks = look_times(max_samples)
    first = looks - lower_boundary(1 - needed, looks, alpha)  # few failures are rare where q <= needed
    low = _futility(int(first[-1]), looks, alpha, futility)
    return _rule(looks, np.minimum(low, first - 1), first, looks)


@functools.cache
def radius_rule(measure: Measure, alpha: float, futility: float, max_samples: int, tolerance: float) -> Rule:
    """Rule for the radius: enough once it is almost the radius that a fixed number of ``max_samples`` draws gives.

    A count is enough if its bound at this look gives at least ``1 - tolerance`` times the radius of a Clopper-Pearson
    bound at ``max_samples`` draws with the same share of votes. It is given up as in ``target_rule``, for q = 1/2.
    """
    from scipy import stats

    looks = look_times(max_samples)
    low = _futility(int(stats.binom.isf(alpha / len(looks), max_samples, 0.5)) + 1, looks, alpha, futility)
    first, last = looks + 1, looks.copy()
    for i, n in enumerate(looks[:-1]):
        failures = np.unique(np.geomspace(1, n / 2 + 1, 200).astype(int)) - 1  # a grid: this is no part of a guarantee
        counts = n - failures
        here = measure.radius(binomial_lower_bound(counts, n, alpha / len(looks)))
        there = measure.radius(binomial_lower_bound(counts * max_samples // n, max_samples, alpha))
        enough = counts[(there > 0) & (here >= (1 - tolerance) * there)]
        if enough.size:
            first[i], last[i] = enough.min(), enough.max()
    return _rule(looks, low, first, last)


def lower_bounds(counts: np.ndarray, rule: Rule, alpha: float) -> np.ndarray:
    r"""Computes a confidence sequence: bounds at all looks that hold together with probability 1 - alpha.

    .. math:: P[\exists i:\ L_i > q] \le \alpha,\qquad L_i = \text{Clopper-Pearson at level } \alpha / k

    Args:
      counts: ``(..., k)`` votes at each look.
      rule: its looks.
      alpha: in (0, 1).

    Returns:
      ``(..., k)`` float64.
    """
    return binomial_lower_bound(counts, rule.looks, alpha / len(rule.looks))


def needed_probability(measure: Measure, radius: float) -> float:
    """Returns the least float64 probability, at least 1/2, whose ``measure.radius`` is at least ``radius``.

    Raises:
      ValueError: there is none below 1: the noise does not reach that far.
    """
    low, high = 0.5, float(np.nextafter(1.0, 0.0))
    if not measure.radius(high) >= radius:
        largest = float(measure.radius(high))
        raise ValueError(f"target_radius must be at most {largest:.6g}, the reach of {measure!r}, got {radius!r}.")
    if measure.radius(low) >= radius:
        return low
    while (middle := low + (high - low) / 2) not in (low, high):
        low, high = (low, middle) if measure.radius(middle) >= radius else (middle, high)
    return high
