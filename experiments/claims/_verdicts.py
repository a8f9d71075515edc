"""Bars of a claim, and the verdict of several seeds on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import stats

APPEARS, UNCLEAR, ABSENT, UNMEASURED = "appears", "unclear", "does not appear", "not measured"
LEVEL = 0.05
FEWEST = 3
"""Seeds without which no test is made."""
WORDS = """\
A claim is measured by *bars*, inequalities that are written down before the recorded run. The *slack* of a bar is how
far a seed is on the right side of it; both sides of a comparison come from the same seed. Over three or more seeds a
one-sided t test of the slack, at level 5 %, decides:

- **appears**: the mean slack is above zero. `>=` and `<=`, the relations of guarantees and of allowed losses, also
  appear where every seed keeps them, with slack zero or more.
- **does not appear**: the mean slack is below zero, or no seed has slack above zero (two equal arms are no gain).
- **unclear**: neither.

With one or two seeds no test is made: the bar *holds in k of n seeds*. A claim has the verdict of its weakest bar. What
must never happen is counted, as in `violations <= 0`: a single violation keeps such a bar from appearing."""


class Bar(NamedTuple):
    """An inequality between a number of an arm and the same number of another arm, or a value.

    Attributes:
      number: name of the number.
      arm: whose number stands on the left.
      relation: ``>`` or ``<`` for a gain, ``>=`` or ``<=`` for a guarantee or an allowed loss.
      other: the arm on the right, compared seed by seed, or a value.
      by: at least 0: how large a gain must be, or how large a loss may be.
    """

    number: str
    arm: str
    relation: Literal[">", "<", ">=", "<="]
    other: str | float
    by: float = 0.0

    @property
    def strict(self) -> bool:
        """Whether it asks for a gain."""
        return self.relation in (">", "<")

    @property
    def bound(self) -> str:
        """The relation and what is on its right."""
        return f"{self.relation} {self.other if isinstance(self.other, str) else format(self.other, 'g')}"

    @property
    def margin(self) -> str:
        """``by`` as it is added to the right side; empty for 0."""
        sign = "+" if self.relation in (">", "<=") else "-"
        return f" {sign} {self.by:g}" if self.by else ""

    def __str__(self) -> str:
        return f"{self.number}: {self.arm} {self.bound}{self.margin}"


class Claim(NamedTuple):
    """What a paper says of a method, and the bars that measure it.

    Attributes:
      method: its name.
      paper: authors and year; further papers with their ``arXiv:ID``.
      arxiv: id, or None for a paper that is not on arXiv.
      functions: names below ``robustjax``, such as ``certification.certify``.
      statement: the claim, in one sentence.
      bars: or a function of the config that makes them; none, where the settings leave them out.
    """

    method: str
    paper: str
    arxiv: str | None
    functions: tuple[str, ...]
    statement: str
    bars: tuple[Bar, ...] | Callable[[Any], tuple[Bar, ...]]

    def bars_of(self, config: Any) -> tuple[Bar, ...]:
        """The bars at these settings."""
        return self.bars(config) if callable(self.bars) else self.bars


def among(setting: str, *bars: Bar) -> Callable[[Any], tuple[Bar, ...]]:
    """Bars of the arms that a setting names, such as ``trainings``; those with another arm are left out."""

    def bars_of(config: Any) -> tuple[Bar, ...]:
        arms = getattr(config, setting)
        known = lambda arm: not isinstance(arm, str) or arm in arms
        return tuple(bar for bar in bars if known(bar.arm) and known(bar.other))

    return bars_of


def check(claim: Claim, config: Any) -> None:
    """Raises ValueError for bars that are none, before anything is measured."""
    bars = claim.bars_of(config)
    if not isinstance(bars, tuple) or not all(isinstance(bar, Bar) for bar in bars):
        raise ValueError(f"bars of {claim.method!r} must be a tuple of Bar, got {bars!r:.80}.")
    for bar in bars:
        number = not isinstance(bar.other, str)
        if bar.relation not in (">", "<", ">=", "<="):
            raise ValueError(f"relation of the bar {bar} must be >, <, >= or <=, got {bar.relation!r}.")
        if number and (not isinstance(bar.other, (int, float)) or math.isnan(bar.other)):
            raise ValueError(f"other of a bar on {bar.number} must be an arm or a number, got {bar.other!r}.")
        if not 0 <= bar.by < math.inf:
            raise ValueError(f"by of the bar {bar} must be at least 0 and finite, got {bar.by!r}.")


def slack(bar: Bar, left: np.ndarray, right: np.ndarray | float) -> np.ndarray:
    """How far each seed is on the right side of a bar.

    Rounding of float64 is no slack, and neither is the difference of two infinite numbers that are equal.

    Args:
      bar: the inequality.
      left: ``(seeds,)``, its number.
      right: ``(seeds,)`` or a value, what it is compared with.

    Returns:
      ``(seeds,)``, positive inside the bar.
    """
    left = np.asarray(left, np.float64)
    right = np.broadcast_to(np.asarray(right, np.float64), left.shape)
    with np.errstate(invalid="ignore"):  # inf - inf
        difference = np.where(left == right, 0.0, left - right)
    difference = difference if bar.relation[0] == ">" else -difference
    found = difference - bar.by if bar.strict else difference + bar.by
    rounding = 8 * np.finfo(np.float64).eps * (np.abs(left) + np.abs(right) + bar.by)
    return np.where(np.isfinite(rounding) & (np.abs(found) <= rounding), 0.0, found)


def holds(bar: Bar, slack: np.ndarray) -> np.ndarray:
    """Which seeds keep a bar, ``(seeds,)``."""
    return slack > 0 if bar.strict else slack >= 0


def p_value(slack: np.ndarray) -> float:
    """One-sided p-value of the t test against a mean slack of at most 0; infinite slack counts as the largest finite.

    Slack that is the same for all seeds decides by its sign.
    """
    finite = np.abs(slack[np.isfinite(slack)])
    largest = finite.max() if finite.any() else 1.0
    slack = np.clip(slack, -largest, largest)
    mean, error = slack.mean(), slack.std(ddof=1) / math.sqrt(slack.size)
    if error == 0:
        return 0.5 - 0.5 * float(np.sign(mean))
    return float(stats.t.sf(mean / error, slack.size - 1))


def verdict(bar: Bar, slack: np.ndarray) -> str:
    """The verdict of the seeds on a bar, see :data:`WORDS`."""
    if slack.size < FEWEST:
        return in_seeds(holds(bar, slack))
    p = p_value(slack)
    if p < LEVEL or (not bar.strict and (slack >= 0).all()):
        return APPEARS
    return ABSENT if 1 - p < LEVEL or not (slack > 0).any() else UNCLEAR


def weakest(bars: Sequence[Bar], slacks: Sequence[np.ndarray]) -> str:
    """The verdict on a claim: the weakest of its bars, or in how many seeds all of them hold."""
    if not bars:
        return UNMEASURED
    if len(slacks[0]) < FEWEST:
        return in_seeds(np.all([holds(*pair) for pair in zip(bars, slacks, strict=True)], axis=0))
    found = {verdict(*pair) for pair in zip(bars, slacks, strict=True)}
    return next(word for word in (ABSENT, UNCLEAR, APPEARS) if word in found)


def in_seeds(held: np.ndarray) -> str:
    """``holds in k of n seeds``."""
    return f"holds in {int(held.sum())} of {held.size} seed{'s' * (held.size > 1)}"


def plain(value: Any) -> float | str | None:
    """A number as JSON can hold it; an infinite one by its name, and NaN as None."""
    value = float(value)
    return value if math.isfinite(value) else None if math.isnan(value) else str(value)
