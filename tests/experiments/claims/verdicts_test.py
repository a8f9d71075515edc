"""Verdicts against t tests worked out by hand, and where there is nothing to test."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments.claims import _verdicts
from experiments.claims._verdicts import ABSENT, APPEARS, UNCLEAR, UNMEASURED, Bar

GAIN, KEPT = Bar("accuracy", "a", ">", "b"), Bar("accuracy", "a", ">=", "b")


def test_slack_is_positive_inside_the_bar_and_by_is_a_least_gain_or_an_allowed_loss():
    left, right = np.array([0.5, 0.75]), np.array([0.25, 1.0])
    of = lambda relation, by=0.0: _verdicts.slack(Bar("n", "a", relation, "b", by), left, right).tolist()
    assert of(">") == of(">=") == [0.25, -0.25]
    assert of("<") == of("<=") == [-0.25, 0.25]
    assert of(">", 0.125) == [0.125, -0.375]  # a > b + by
    assert of(">=", 0.125) == [0.375, -0.125]  # a >= b - by
    assert of("<", 0.125) == [-0.375, 0.125]  # a < b - by
    assert of("<=", 0.125) == [-0.125, 0.375]  # a <= b + by
    assert str(Bar("n", "a", "<", "b", 0.125)) == "n: a < b - 0.125"
    assert str(Bar("n", "a", "<=", 0.5, 0.125)) == "n: a <= 0.5 + 0.125"


def test_rounding_is_no_slack_and_equal_infinities_differ_by_nothing():
    gain = Bar("n", "a", ">", "b", 0.05)
    assert 0.95 - 0.9 - 0.05 != 0
    assert _verdicts.slack(gain, np.array([0.95]), np.array([0.9])).tolist() == [0.0]
    of = _verdicts.slack(KEPT, np.array([np.inf, np.inf, 1.0]), np.array([np.inf, 1.0, np.inf]))
    assert of.tolist() == [0.0, np.inf, -np.inf]


def test_p_value_is_that_of_students_t():
    # Mean 2, standard error 1 / sqrt(3): t = 2 sqrt(3) with two degrees of freedom, whose tail has a closed form.
    t = 2 * math.sqrt(3)
    by_hand = 0.5 - t / (2 * math.sqrt(2 + t**2))
    assert _verdicts.p_value(np.array([1.0, 2.0, 3.0])) == pytest.approx(by_hand, rel=1e-12)
    slack = np.array([0.3, -0.1, 0.4, 0.25, 0.05])
    want = stats.ttest_1samp(slack, 0.0, alternative="greater").pvalue
    assert _verdicts.p_value(slack) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    ("slack", "gain", "kept"),
    [
        ([1.0, 2.0, 3.0], APPEARS, APPEARS),  # p = 0.037
        ([0.5, 2.0, 3.5], UNCLEAR, APPEARS),  # p = 0.074, but every seed keeps it
        ([-0.1, 2.0, 3.5], UNCLEAR, UNCLEAR),
        ([-3.0, -2.0, -1.0], ABSENT, ABSENT),
        ([-3.5, -2.0, -0.5], ABSENT, ABSENT),  # p = 0.074, but no seed gains
        ([-3.5, -2.0, 0.1], UNCLEAR, UNCLEAR),
        ([0.0, 0.0, 0.0], ABSENT, APPEARS),  # equal arms
        ([0.1, 0.1, 0.1], APPEARS, APPEARS),
        ([-0.1, -0.1, -0.1], ABSENT, ABSENT),
        ([0.0, 0.0, 1.0], UNCLEAR, APPEARS),
        ([0.0, 0.0, -1.0], ABSENT, ABSENT),  # one violation
        ([np.inf, np.inf, np.inf], APPEARS, APPEARS),
        ([-np.inf, -np.inf, -np.inf], ABSENT, ABSENT),
        ([np.inf, 0.1, -0.1], UNCLEAR, UNCLEAR),
        ([np.inf, -np.inf, 1.0], UNCLEAR, UNCLEAR),
        ([np.inf, 1.0, 1.0], APPEARS, APPEARS),
        ([0.0] * 19 + [-1.0], ABSENT, ABSENT),
        ([1.0] * 19 + [-0.5], APPEARS, APPEARS),
    ],
)
def test_verdict(slack, gain, kept):
    slack = np.asarray(slack)
    assert (_verdicts.verdict(GAIN, slack), _verdicts.verdict(KEPT, slack)) == (gain, kept)


def test_the_level_is_five_percent_on_one_side():
    at = lambda t: np.array([-1.0, 0.0, 1.0]) + t / math.sqrt(3)  # t statistic t, two degrees of freedom
    critical = stats.t.isf(0.05, 2)
    assert _verdicts.verdict(GAIN, at(critical * 1.001)) == APPEARS
    assert _verdicts.verdict(GAIN, at(critical * 0.999)) == UNCLEAR
    assert _verdicts.verdict(KEPT, at(-critical * 1.001)) == ABSENT


def test_one_or_two_seeds_are_counted():
    assert _verdicts.verdict(GAIN, np.array([0.5, 0.0])) == "holds in 1 of 2 seeds"
    assert _verdicts.verdict(KEPT, np.array([0.5, 0.0])) == "holds in 2 of 2 seeds"
    assert _verdicts.verdict(GAIN, np.array([-0.5])) == "holds in 0 of 1 seed"
    both = [np.array([1.0, -1.0]), np.array([-1.0, 1.0])]
    assert _verdicts.weakest((GAIN, KEPT), both) == "holds in 0 of 2 seeds"


def test_a_claim_is_as_weak_as_its_weakest_bar():
    up, middle, down = (np.array([1.0, 2.0, 3.0]) - shift for shift in (0.0, 2.0, 4.0))
    of = lambda *slacks: _verdicts.weakest((GAIN,) * len(slacks), slacks)
    assert (of(up), of(up, middle), of(up, middle, down)) == (APPEARS, UNCLEAR, ABSENT)
    assert of() == UNMEASURED


def test_json_holds_infinite_numbers_by_name():
    assert [_verdicts.plain(v) for v in (np.float32(0.5), np.inf, -np.inf, np.nan)] == [0.5, "inf", "-inf", None]
