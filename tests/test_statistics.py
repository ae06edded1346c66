"""Intervals are checked by coverage on synthetic normals within five standard errors, curves by hand."""
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opus_bench.statistics import (
    Interval,
    binomial_stderr,
    mean_interval,
    paired_interval,
    paired_ratio_interval,
    tokens_to_reach,
)

FIVE_SIGMA = 5.0
T_2 = 0.95 / math.sqrt(2 * 0.975 * 0.025)  # the .975 quantile of Student t with 2 degrees of freedom


def test_an_interval_by_hand():
    got = mean_interval([1.0, 2.0, 3.0])
    half = T_2 / math.sqrt(3)
    assert got.n == 3 and got.mean == 2.0
    assert (got.low, got.high) == pytest.approx((2 - half, 2 + half), rel=1e-12)


@pytest.mark.parametrize("n,confidence", [(3, 0.95), (5, 0.95), (5, 0.8), (12, 0.95)])
def test_the_interval_covers_as_often_as_it_says(n, confidence, trials=4_000):
    rng = np.random.default_rng(n)
    base = rng.normal(3.0, 2.0, size=(trials, n))
    ours = base + rng.normal(-0.3, 0.7, size=(trials, n))
    intervals = [paired_interval(a, b, confidence) for a, b in zip(ours, base, strict=True)]
    covered = sum(not interval.excludes(-0.3) for interval in intervals) / trials
    assert abs(covered - confidence) < FIVE_SIGMA * binomial_stderr(confidence, trials)


def test_the_ratio_interval_covers_as_often_as_it_says(n=4, trials=4_000):
    rng = np.random.default_rng(0)
    base = np.exp(rng.normal(3.0, 2.0, size=(trials, n)))
    ours = base * np.exp(rng.normal(math.log(0.8), 0.3, size=(trials, n)))
    intervals = [paired_ratio_interval(a, b) for a, b in zip(ours, base, strict=True)]
    covered = sum(not interval.excludes(0.8) for interval in intervals) / trials
    assert abs(covered - 0.95) < FIVE_SIGMA * binomial_stderr(0.95, trials)


def test_pairing_removes_the_spread_between_seeds():
    base = [1.0, 5.0, 9.0]
    paired = paired_interval([value - 0.5 for value in base], base)
    assert (paired.mean, paired.low, paired.high) == (-0.5, -0.5, -0.5)
    assert paired.excludes(0.0)


@pytest.mark.parametrize("values", [[1.0], [1.0, 2.0]])
def test_below_three_seeds_there_is_no_interval(values):
    got = mean_interval(values)
    assert got == Interval(sum(values) / len(values), None, None, len(values))
    assert not got.excludes(1e9)


def test_a_ratio_by_hand_and_swapped():
    got = paired_ratio_interval([1.0, 2.0, 4.0], [2.0, 2.0, 2.0])
    assert got.mean == pytest.approx(1.0, rel=1e-12)
    half = T_2 * math.log(2) / math.sqrt(3)
    assert (got.low, got.high) == pytest.approx((math.exp(-half), math.exp(half)), rel=1e-12)
    back = paired_ratio_interval([2.0, 2.0, 2.0], [1.0, 2.0, 4.0])
    assert (back.low, back.high) == pytest.approx((1 / got.high, 1 / got.low), rel=1e-12)


@pytest.mark.parametrize(
    "target,want",
    [
        (9.0, 0.0),  # met at the start
        (8.0, 0.0),
        (7.0, 50.0),  # half way down the first segment
        (6.0, 100.0),
        (5.5, 225.0),  # the rise to 7 at 200 is ignored: from 6 at 200 to 4 at 300
        (4.0, 300.0),
        (3.999, math.inf),
    ],
)
def test_tokens_to_reach_by_hand(target, want):
    assert tokens_to_reach([0, 100, 200, 300], [8.0, 6.0, 7.0, 4.0], target) == pytest.approx(want)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 10), min_size=2, max_size=12), st.floats(0, 10), st.floats(0, 10))
def test_a_lower_target_never_takes_fewer_tokens(loss, first, second):
    tokens = [100 * step for step in range(len(loss))]
    easy, hard = max(first, second), min(first, second)
    assert tokens_to_reach(tokens, loss, easy) <= tokens_to_reach(tokens, loss, hard)
    assert (tokens_to_reach(tokens, loss, hard) == math.inf) == (min(loss) > hard)


def test_binomial_stderr_by_hand_and_by_simulation(trials=20_000):
    assert binomial_stderr(0.5, 100) == 0.05
    shares = np.random.default_rng(0).binomial(50, 0.3, size=trials) / 50
    want = binomial_stderr(0.3, 50)
    assert abs(shares.std(ddof=1) - want) < FIVE_SIGMA * want / math.sqrt(2 * (trials - 1))


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: mean_interval([]), "at least one value"),
        (lambda: mean_interval([1.0, math.inf]), "got inf"),
        (lambda: mean_interval([1.0], confidence=95), "got 95"),
        (lambda: paired_interval([1.0], [1.0, 2.0]), "got 1 and 2"),
        (lambda: paired_ratio_interval([1.0, -2.0], [1.0, 1.0]), r"ours = \[1.0, -2.0\]"),
        (lambda: tokens_to_reach([0, 1], [1.0], 0.5), "got 2 and 1"),
        (lambda: tokens_to_reach([0, 0], [1.0, 1.0], 0.5), "tokens must increase"),
        (lambda: binomial_stderr(30.0, 100), "got 30.0 of 100"),
        (lambda: binomial_stderr(0.3, 0), "of 0"),
    ],
)
def test_errors_name_the_offending_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
