"""Intervals over seeds, paired wherever the design is paired, and token counts to a loss.

Runs of one seed see the same model start and the same candidate stream, so methods are compared
seed by seed: the spread between seeds, which is larger than most effects, cancels.

The interval is Student's t. With n = 3 to 5 seeds the percentile bootstrap has no room: it can
draw only 10 distinct multisets at n = 3, its 95 % interval covers about three quarters of the time,
and it lies inside the data. The t interval is exact for normal differences at every n >= 2. Below
n = 3 no interval is given (at n = 2 its half-width is 9 standard errors): show the points.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95
SMALLEST_N = 3


@dataclass(frozen=True)
class Interval:
    """A mean over n seeds with its confidence limits; low and high are None below SMALLEST_N."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def excludes(self, value: float) -> bool:
        """Whether an interval exists and the value lies outside it: the rule behind every mark."""
        return self.low is not None and not self.low <= value <= self.high


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Mean and t interval:  mean +- t_{n-1} s / sqrt(n),  s^2 with n - 1.

    Exactness: coverage is `confidence` for independent normal values.

    Raises:
        ValueError: no values, a value that is not finite, or a confidence outside (0, 1).
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"an interval needs a list of at least one value, got {values!r}")
    if not np.isfinite(array).all():
        raise ValueError(f"an interval needs finite values, got {array[~np.isfinite(array)][0]}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    n, mean = array.size, float(array.mean())
    if n < SMALLEST_N:
        return Interval(mean, None, None, n)
    half = float(stdtrit(n - 1, 0.5 + confidence / 2) * array.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def paired_interval(ours: Sequence[float], base: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Mean and t interval of ours - base, element i of both being the same seed.

    Raises:
        ValueError: as `mean_interval`, or lists of different length.
    """
    if len(ours) != len(base):
        raise ValueError(f"pairs need equal lengths, got {len(ours)} and {len(base)}")
    return mean_interval(np.asarray(ours, dtype=np.float64) - np.asarray(base, dtype=np.float64), confidence)


def paired_ratio_interval(ours: Sequence[float], base: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Geometric mean and interval of ours / base, by the t interval of its logarithm.

    The logarithm, because a ratio of token counts or of times is multiplicative: the interval stays
    positive and swapping ours and base inverts it exactly, which the plain ratio's does not.

    Raises:
        ValueError: as `paired_interval`, or a value that is not positive.
    """
    for name, values in (("ours", ours), ("base", base)):
        if any(not value > 0 for value in values):
            raise ValueError(f"a ratio needs positive values, got {name} = {list(values)}")
    log = paired_interval(np.log(ours), np.log(base), confidence)
    low, high = (None if limit is None else math.exp(limit) for limit in (log.low, log.high))
    return Interval(math.exp(log.mean), low, high, log.n)


def tokens_to_reach(tokens: Sequence[float], loss: Sequence[float], target: float) -> float:
    """Tokens at which the best loss so far first reaches the target; math.inf when it never does.

    Linear interpolation between evaluation points of the running minimum, so a later rise does not
    count against a run, and the answer is no finer than the evaluation grid deserves. Infinity means
    "not within tokens[-1]": a censored value, to be shown as such and never averaged.

    Raises:
        ValueError: no points, unequal lengths, or tokens that do not increase.
    """
    tokens, loss = np.asarray(tokens, dtype=np.float64), np.asarray(loss, dtype=np.float64)
    if tokens.shape != loss.shape or not tokens.size:
        raise ValueError(f"a curve needs as many tokens as losses, got {tokens.size} and {loss.size}")
    if (np.diff(tokens) <= 0).any():
        raise ValueError(f"tokens must increase, got {tokens.tolist()}")
    best = np.minimum.accumulate(loss)
    reached = np.flatnonzero(best <= target)
    if not reached.size:
        return math.inf
    first = reached[0]
    if first == 0:
        return float(tokens[0])
    share = (best[first - 1] - target) / (best[first - 1] - best[first])
    return float(tokens[first - 1] + share * (tokens[first] - tokens[first - 1]))


def binomial_stderr(share: float, n: int) -> float:
    """Standard error of a share of n independent yes-no items: sqrt(p (1 - p) / n).

    Raises:
        ValueError: a share outside [0, 1] or n below 1.
    """
    if not 0 <= share <= 1 or n < 1:
        raise ValueError(f"a share in [0, 1] of at least 1 item is needed, got {share} of {n}")
    return math.sqrt(share * (1 - share) / n)
