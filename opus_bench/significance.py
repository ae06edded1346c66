"""Tests for few seeds and for many items, corrections for many comparisons, and what n seeds can show.

Two sources of noise, two sorts of pairs:
    seeds    ours[i] and base[i] trained with the same seed: `statistics.paired_interval` (Student's t), and here the
             bootstrap and the exact sign-flip test, which assume less
    items    ours[i] and base[i] the answers to the same benchmark item: `item_difference` (McNemar)

What n = 3 can show: there are 2^3 ways to flip the signs of three differences, so no test that assumes only symmetry
has a two-sided p below 2/8 = .25, however large the differences; the t test can, and pays by assuming normal ones.
A bootstrap of three values covers less than it says, as results/tables/coverage.md measures.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from opus_bench.statistics import CONFIDENCE, SMALLEST_N, Interval, binomial_stderr, mean_interval

ALPHA = 1 - CONFIDENCE
POWER = 0.8
BOOTSTRAPS = ("percentile", "basic", "BCa")
RESAMPLES = 9_999


# Seeds ----------------------------------------------------------------------------------------


def bootstrap_interval(
    differences: Sequence[float],
    rng: np.random.Generator,
    method: str = "BCa",
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> Interval:
    """Mean of paired differences and its bootstrap interval (scipy.stats.bootstrap); equal values give their point.

    Exactness: coverage tends to ``confidence`` as n grows and lies below it at the n of seeds; the percentile interval
        never leaves the range of the data.  Random by ``rng``: limits scatter by about 1 / sqrt(resamples).

    Raises:
        ValueError: as `statistics.mean_interval`, or an unknown method.
    """
    if method not in BOOTSTRAPS:
        raise ValueError(f"unknown bootstrap {method!r}; known: {', '.join(BOOTSTRAPS)}")
    plain = mean_interval(differences, confidence)
    if plain.low is None or plain.low == plain.high:
        return plain
    found = stats.bootstrap((np.asarray(differences, dtype=np.float64),), np.mean, n_resamples=resamples,
                            confidence_level=confidence, method=method, rng=rng).confidence_interval
    return Interval(plain.mean, float(found.low), float(found.high), plain.n)


def paired_t_test(differences: Sequence[float]) -> float:
    """Two-sided p of a mean difference of 0 by Student's t; below alpha exactly where the t interval excludes 0.

    Raises:
        ValueError: as `statistics.mean_interval`, or fewer than SMALLEST_N differences.
    """
    if mean_interval(differences).n < SMALLEST_N:
        raise ValueError(f"a t test needs at least {SMALLEST_N} differences, got {len(differences)}")
    values = np.asarray(differences, dtype=np.float64)
    if not values.std():
        return float(not values.any())  # all alike: 1 where there is no difference at all, 0 otherwise
    return float(stats.ttest_1samp(values, 0).pvalue)


def sign_flip_test(differences: Sequence[float], rng: np.random.Generator | None = None) -> float:
    """Two-sided p of the mean under flips of each difference's sign (scipy.stats.permutation_test).

    Exactness: with n differences symmetric about 0, P(p <= x) <= x for every n.  All 2^n flips are taken while
        2^n <= RESAMPLES + 1 (n <= 13); beyond that RESAMPLES random ones, for which ``rng`` is needed.

    Raises:
        ValueError: as `statistics.mean_interval`, a single difference, or too many of them without ``rng``.
    """
    n = mean_interval(differences).n
    if n < 2:
        raise ValueError(f"a sign-flip test needs at least 2 differences, got {n}")
    exact = 2**n <= RESAMPLES + 1
    if not exact and rng is None:
        raise ValueError(f"{n} differences have too many sign flips to take all; pass rng to draw {RESAMPLES:,}")
    values = np.asarray(differences, dtype=np.float64)
    return float(stats.permutation_test((values,), np.mean, permutation_type="samples", vectorized=True,
                                        n_resamples=math.inf if exact else RESAMPLES, rng=rng).pvalue)


def smallest_sign_flip_p(n: int) -> float:
    """The least two-sided p that n differences can have in `sign_flip_test`: 2 / 2^n."""
    if n < 1:
        raise ValueError(f"at least 1 difference is needed, got {n}")
    return min(1.0, 2.0 ** (1 - n))


# Power ----------------------------------------------------------------------------------------


def power(difference: float, sd: float, n: int, alpha: float = ALPHA) -> float:
    """Probability that the two-sided paired t test at ``alpha`` rejects, by the noncentral t distribution.

    Args:
        difference: true mean difference.  sd: standard deviation of a paired difference, in the same unit.

    Raises:
        ValueError: n below 2, an sd that is not positive, alpha outside (0, 1).
    """
    if n < 2 or not sd > 0 or not 0 < alpha < 1:
        raise ValueError(f"power needs n >= 2, sd > 0 and alpha in (0, 1), got n = {n}, sd = {sd}, alpha = {alpha}")
    critical, shift = stats.t.isf(alpha / 2, n - 1), abs(difference) / sd * math.sqrt(n)
    wrong_way = stats.nct.cdf(-critical, n - 1, shift) if shift < 8 else 0.0  # below 1e-15, where scipy gives NaN
    return float(stats.nct.sf(critical, n - 1, shift) + wrong_way)


def detectable_difference(sd: float, n: int, wanted: float = POWER, alpha: float = ALPHA) -> float:
    """The true difference that n pairs detect with probability ``wanted``: `power` solved for it.

    Raises:
        ValueError: as `power`, or a wanted power outside (alpha, 1).
    """
    if not alpha < wanted < 1:
        raise ValueError(f"the wanted power must lie in (alpha, 1) = ({alpha:g}, 1), got {wanted}")
    power(0.0, sd, n, alpha)
    highest = sd
    while power(highest, sd, n, alpha) < wanted:
        highest *= 2
    return float(optimize.brentq(lambda x: power(x, sd, n, alpha) - wanted, 0.0, highest, rtol=1e-10))


# Items ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ItemDifference:
    """Accuracy of ours minus base on the same n items; ``p_value`` is McNemar's, exact and two-sided."""

    difference: float
    stderr: float
    gained: int  # items that only ours answers
    lost: int  # items that only base answers
    n: int
    p_value: float


def item_difference(ours: Sequence[bool], base: Sequence[bool]) -> ItemDifference:
    """Compare two models answer by answer; element i of both is the same item, 1 or True where it is right.

        difference = (gained - lost) / n,   stderr = sqrt(gained + lost - (gained - lost)^2 / n) / n
        p: gained is binomial(gained + lost, 1/2) when neither model is better (McNemar 1947, exact)

    Raises:
        ValueError: no items, unequal lengths, or an answer that is neither right nor wrong.
    """
    if len(ours) != len(base) or not len(ours):
        raise ValueError(f"the same items, at least one, are needed of both, got {len(ours)} and {len(base)}")
    right, other = (np.asarray(side, dtype=np.float64) for side in (ours, base))
    for values in (right, other):
        if not np.isin(values, (0, 1)).all():
            raise ValueError(f"an answer is 1 (right) or 0 (wrong), got {values[~np.isin(values, (0, 1))][0]}")
    n, gained, lost = len(right), int((right > other).sum()), int((right < other).sum())
    p = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return ItemDifference((gained - lost) / n, math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n, gained, lost, n,
                          float(p))


def stderr_bounds(ours: float, base: float, n: int) -> tuple[float, float]:
    """Least and unpaired standard error of a difference of two accuracies of which only the shares are known.

        least     sqrt((|d| - d^2) / n), d = ours - base: all items that change, change one way
        unpaired  sqrt(ours (1 - ours) / n + base (1 - base) / n): answers independent

    The paired standard error of `item_difference` lies between them unless the answers are anticorrelated.
    """
    d = ours - base
    return math.sqrt((abs(d) - d * d) / n), math.hypot(binomial_stderr(ours, n), binomial_stderr(base, n))


# Many comparisons -----------------------------------------------------------------------------


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Adjusted p: reject where it is <= alpha, and P(any false rejection) <= alpha (Holm 1979), dependent or not.

        p_(i) -> max over j <= i of min(1, (m - j + 1) p_(j)), p_(1) <= ... <= p_(m)
    """
    p = _checked(p_values)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def benjamini_hochberg(p_values: Sequence[float]) -> np.ndarray:
    """Adjusted p (scipy.stats.false_discovery_control): reject where <= alpha, expected share of false ones <= alpha.

    For independent or positively dependent tests (Benjamini and Hochberg 1995).
    """
    return stats.false_discovery_control(_checked(p_values))


def _checked(p_values: Sequence[float]) -> np.ndarray:
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values are a list of numbers in [0, 1], got {p_values!r}")
    return p
