"""OPUS against every baseline in the paper's tables: which differences exceed the noise, and under which reading of it.

Answers item by item are not published, so the standard error of a difference is known within bounds only
(`significance.stderr_bounds`), and each comparison is judged at both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from scipy import stats

from opus_bench.significance import ALPHA, holm, sign_flip_test, stderr_bounds

from .printed import PARTS, Block, items_of


@dataclass(frozen=True)
class Comparison:
    """OPUS against one baseline of its block: points of the average, and its noise under each reading."""

    block: Block
    opus: str
    baseline: str
    difference: float  # of the means of printed cells
    printed: float  # of the printed averages
    least: float  # standard error if every item that changes changes one way
    unpaired: float  # standard error if answers are independent
    tasks_p: float  # benchmarks as the sample: exact sign-flip test

    @property
    def least_p(self) -> float:
        """Two-sided p of the difference by the least standard error."""
        return _normal_p(self.difference, self.least)

    @property
    def unpaired_p(self) -> float:
        """Two-sided p of the difference by the unpaired standard error."""
        return _normal_p(self.difference, self.unpaired)

    def tolerated_disagreement(self, alpha: float = ALPHA) -> float:
        """Share of items that the two models may answer differently before p by itself exceeds ``alpha``.

        For one share q in all benchmarks the paired standard error of the average of k is
        sqrt(sum_b (q - d_b^2) / n_b) / k, solved for q.  Independent answers at a share p differ on 2 p (1 - p).
        """
        names = self.block.benchmarks
        ours, theirs = (self.block.cells[method] for method in (self.opus, self.baseline))
        squares = math.fsum(((ours[b] - theirs[b]) / 10_000) ** 2 / items_of(b) for b in names)
        noise = (len(names) * self.difference / 100 / stats.norm.isf(alpha / 2)) ** 2
        return min(1.0, (noise + squares) / math.fsum(1 / items_of(b) for b in names))


def _normal_p(difference: float, stderr: float) -> float:
    if not stderr:
        return 0.0 if difference else 1.0
    return float(2 * stats.norm.sf(abs(difference) / stderr))


def compare(block: Block, opus: str, baseline: str) -> Comparison:
    """A comparison of two rows of a block of accuracies.

    The least standard error takes that of `stderr_bounds` for each benchmark and nothing for means of parts.
    """
    names = block.benchmarks
    ours, theirs = ([block.cells[method][name] / 10_000 for name in names] for method in (opus, baseline))
    bounds = [stderr_bounds(a, b, items_of(name)) for a, b, name in zip(ours, theirs, names, strict=True)]
    least = [0.0 if name in PARTS else low for name, (low, _) in zip(names, bounds, strict=True)]
    return Comparison(
        block, opus, baseline, float(block.mean(opus) - block.mean(baseline)) / 100,
        (block.printed[opus] - block.printed[baseline]) / 100, 100 * math.hypot(*least) / len(names),
        100 * math.hypot(*(high for _, high in bounds)) / len(names),
        sign_flip_test([block.cells[opus][name] - block.cells[baseline][name] for name in names]),
    )


def comparisons(blocks: Sequence[Block]) -> list[Comparison]:
    """The family: OPUS against every baseline in every block of accuracies; a pair printed twice counts once."""
    found, seen = [], set()
    for block in blocks:
        for opus in block.opus if not block.is_loss else ():
            for baseline in block.baselines:
                rows = tuple((*block.cells[m].items(),) for m in (opus, baseline))
                key = (block.model, block.optimizer, block.corpus, rows)
                if key not in seen:
                    seen.add(key)
                    found.append(compare(block, opus, baseline))
    return found


BEYOND, DEPENDS, WITHIN, BELOW = "beyond noise", "depends on pairing", "within noise", "not above"


def verdicts(family: Sequence[Comparison], alpha: float = ALPHA) -> list[str]:
    """What noise of items alone allows to say of each comparison, after Holm's correction over the family.

        beyond noise         OPUS is above, significantly even if answers are independent
        depends on pairing   significant at the least standard error but not at the unpaired one: only answers item by
                             item could tell
        within noise         not significant at either
        not above            OPUS's mean is not above the baseline's
    """
    unpaired = holm([comparison.unpaired_p for comparison in family])
    least = holm([comparison.least_p for comparison in family])
    return [BELOW if c.difference <= 0 else BEYOND if high <= alpha else DEPENDS if low <= alpha else WITHIN
            for c, high, low in zip(family, unpaired, least, strict=True)]


def largest_part(block: Block, opus: str, baseline: str) -> tuple[str, Fraction, float]:
    """The benchmark that adds most to OPUS's lead: (name, points it adds to the average, items), signs as printed."""
    gaps = {name: block.cells[opus][name] - block.cells[baseline][name] for name in block.benchmarks}
    name = max(gaps, key=lambda benchmark: gaps[benchmark])
    return name, Fraction(gaps[name], 100 * len(gaps)), gaps[name] / 10_000 * items_of(name)
