"""The tables of `reproduce.audit` as markdown: pure functions of the blocks of printed numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from opus_bench.significance import holm
from opus_bench.tables import NONE, markdown

from . import headlines
from .claims import Comparison, largest_part, verdicts
from .overhead import PAPER_PERCENT
from .printed import (
    ITEMS,
    PARTS,
    TWICE,
    Block,
    average_stderr,
    averages,
    cell_stderr,
    fit_by_chance,
    fits,
    fitting_counts,
    items_of,
    printed_values,
)

MOST_ITEMS = 5_000  # item counts are searched up to here
NO_POWER = 0.99  # an item count that prints this share of all values is not tested by them


def hundredths(value: object, style: str = ".2f") -> str:
    """Hundredths as a number of the table's unit."""
    return f"{float(value) / 100:{style}}"


def count(n: int, one: str, many: str | None = None) -> str:
    """A number with its noun."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def arms_of(blocks: Sequence[Block], loss: bool = False) -> list[tuple[Block, str]]:
    """Every block and row of OPUS in it, of accuracies or of losses."""
    return [(block, opus) for block in blocks if block.is_loss == loss for opus in block.opus]


def named(block: Block, opus: str) -> str:
    """The block, and the row where the block has several of OPUS."""
    return block.title + (f", {opus}" if len(block.opus) > 1 else "")


def average_table(blocks: Sequence[Block]) -> str:
    """The printed averages that rounding cannot explain, and what they change."""
    lines = []
    for found in averages(blocks):
        if found.disagrees:
            block = found.block
            before = 1 + sum(value > found.printed for value in block.printed.values())
            after = 1 + sum(block.mean(other) > found.recomputed for other in block.cells)
            lines.append([block.title, found.method, hundredths(found.printed), hundredths(found.recomputed, ".3f"),
                          hundredths(found.gap, "+.3f"), f"{before} -> {after} of {len(block.cells)}"])
    if not lines:
        return "None disagrees."
    return markdown(["block", "row", "printed", "recomputed", "printed - recomputed", "rank in the block"], lines)


def item_table(blocks: Sequence[Block]) -> str:
    """Can the printed values be shares of the stated numbers of items?"""
    lines = []
    for name in dict.fromkeys(b for block in blocks if not block.is_loss for b in block.benchmarks):
        values = printed_values(blocks, name)
        possible = fitting_counts(values, MOST_ITEMS)
        shown = ", ".join(f"{n:,}" for n in possible[:4]) + (f", ... ({len(possible)})" if len(possible) > 4 else "")
        if name in ITEMS:
            n = ITEMS[name]
            odd = [value for value in values if not fits(value, n)]
            chance = fit_by_chance(n)
            verdict = "not tested: any value fits" if chance > NO_POWER and not odd else (
                f"{len(odd)} do not fit: {', '.join(hundredths(v) for v in odd)}" if odd else "all fit")
            lines.append([name, f"{n:,}", f"{100 / n:.3f}", str(len(values)), f"{100 * chance:.0f} %", verdict,
                          shown or "none"])
        else:
            parts, smallest = PARTS[name]
            lines.append([name, f"{parts} parts, each at least {smallest:,}", NONE, str(len(values)), NONE,
                          "not tested: a mean of parts", shown or "none"])
    return markdown(["benchmark", "items stated", "one item (points)", "distinct values printed",
                     "values that fit by chance", "printed values as shares of that many items",
                     f"item counts up to {MOST_ITEMS:,} that fit them all"], lines)


def odd_cells(blocks: Sequence[Block]) -> list[str]:
    """Where the values that are no share of the stated number of items stand, with the nearest shares."""
    said = []
    for block in blocks:
        for method, row in block.cells.items() if not block.is_loss else ():
            for name, value in row.items():
                if name in ITEMS and not fits(value, ITEMS[name]):
                    n = ITEMS[name]
                    below = value * n // 10_000
                    said.append(f"- {name} {hundredths(value)} ({block.title}, {method}): {below} and {below + 1} of "
                                f"{n} are {100 * below / n:.3f} and {100 * (below + 1) / n:.3f}")
    return list(dict.fromkeys(said))


def noise_table(blocks: Sequence[Block]) -> str:
    """Standard errors of averages of OPUS's rows, and what they are made of."""
    lines = []
    for block, opus in arms_of(blocks):
        total = average_stderr(block, opus)
        parts = {name: (cell_stderr(block, opus, name) / len(block.benchmarks) / total) ** 2
                 for name in block.benchmarks}
        most = max(parts, key=lambda name: parts[name])
        lines.append([named(block, opus), hundredths(block.mean(opus)), f"{total:.2f}",
                      f"{most}: {100 * parts[most]:.0f} % from {items_of(most)} items"])
    return markdown(["block", "OPUS's mean (%)", "standard error (points)", "largest part of its variance"], lines)


def rank_table(blocks: Sequence[Block]) -> str:
    """OPUS's rank with all benchmarks and with each left out, and the benchmark that carries its lead."""
    lines = []
    for block, opus in arms_of(blocks) + arms_of(blocks, loss=True):
        best = block.best_baseline()
        moved = [f"{name}: {block.rank(opus, name)}" for name in block.benchmarks
                 if block.rank(opus, name) != block.rank(opus)]
        lead = hundredths(block.mean(opus) - block.mean(best), "+.3f" if block.is_loss else "+.2f")
        part = NONE
        if not block.is_loss:
            name, points, items = largest_part(block, opus, best)
            part = f"{name}: {float(points):+.2f} ({count(round(items), 'item')})" if name in ITEMS else (
                f"{name}: {float(points):+.2f}")
        lines.append([named(block, opus), f"{block.rank(opus)} of {len(block.equal_tokens)}", f"{best} ({lead})", part,
                      "; ".join(moved) or "the same without any one"])
    return markdown(["block", "rank of OPUS", "best baseline (OPUS minus it)", "benchmark that adds most",
                     "rank with one benchmark left out, where it changes"], lines)


def claim_table(family: Sequence[Comparison]) -> str:
    """OPUS against each baseline under each reading of the noise."""
    said = verdicts(family)
    unpaired, least = (holm([getattr(c, name) for c in family]) for name in ("unpaired_p", "least_p"))
    lines = [[named(c.block, c.opus), c.baseline, f"{c.difference:+.2f}", f"{c.printed:+.2f}",
              f"{c.least:.2f} to {c.unpaired:.2f}", _p(c.unpaired_p), _p(high), _p(low), _p(c.tasks_p),
              _share(c.tolerated_disagreement()), verdict]
             for c, high, low, verdict in zip(family, unpaired, least, said, strict=True)]
    return markdown(["block", "OPUS against", "points, recomputed", "points, printed",
                     "standard error, least to unpaired", "p unpaired", "p unpaired, Holm", "p at the least, Holm",
                     "p over benchmarks", "answers that may differ", "noise of items"], lines)


def _p(value: float) -> str:
    return "< .0001" if value < 1e-4 else f"{value:.4f}"


def _share(value: float) -> str:
    return "< 1 %" if value < 0.01 else f"{100 * value:.0f} %"


def headline_table(blocks: Sequence[Block]) -> str:
    """The headline numbers and the formulas that give them."""
    fitting, tried, by_accident = headlines.fitting_improvements(blocks)
    factors = headlines.token_factors()
    beaten = headlines.beats_twice(blocks)
    above = sum(won for _, won in beaten)
    largest = max(v for name, v in factors.items() if "Qwen" not in name)
    lines = [[f"{headlines.COMPUTE}x less computation",
              f"not derivable from the tables: no curve, step or time is printed; ratios of stated token counts are "
              f"{', '.join(f'{v:.3g}' for name, v in factors.items() if 'Qwen' not in name)}; OPUS's printed average "
              f"is above {TWICE})'s in {above} of {len(beaten)} comparisons, which alone says more than 2; the largest "
              f"ratio, {largest:.3g}, is to a run in no table"],
             [f"{headlines.DATA}x less data",
              "; ".join(f"{name} = {v:.3g}" for name, v in factors.items() if v == headlines.DATA) +
              " as stated token counts; that the scores at the two are alike is not in the tables"],
             [f"{headlines.POINTS} % better",
              f"{len(fitting)} of {count(tried, 'formula')} tried print as {headlines.POINTS}, and about "
              f"{by_accident:.0f} would by accident, so none is singled out: "
              + ("; ".join(f"{name}: {v:.3f}" for name, v in fitting) or "none")],
             [f"{PAPER_PERCENT} % overhead",
              f"tokens scored over tokens trained on, in shape: {', '.join(headlines.fitting_shapes()) or 'none'}; "
              "not a measured time ([overhead](overhead.md))"]]
    return markdown(["the paper's number", "what gives it"], lines)


def lead_table(blocks: Sequence[Block]) -> str:
    """OPUS's printed lead over Random, the natural reading of an improvement."""
    groups = [(f"{arm.block.title}, {arm.opus}", [arm]) for arm in headlines.arms(blocks, ("3", "4", "5"))]
    groups += [(f"mean of Table {table}", headlines.arms(blocks, (table,))) for table in ("3", "4")]
    lines = []
    for name, group in groups:
        pairs = [(arm.block.printed[arm.opus], arm.references()["Random"]) for arm in group]
        if pairs:
            points = math.fsum(ours - base for ours, base in pairs) / len(pairs)
            relative = math.fsum(100 * (ours / base - 1) for ours, base in pairs) / len(pairs)
            lines.append([name, hundredths(points, "+.2f"), f"{relative:+.2f} %"])
    return markdown(["block and row", "points", "relative"], lines)


def cell_table(block: Block) -> str:
    """Every cell with its standard error."""
    lines = [[method, *(f"{hundredths(v)} ({cell_stderr(block, method, name):.2f})" for name, v in row.items()),
              f"{hundredths(block.mean(method))} ({average_stderr(block, method):.2f})"]
             for method, row in block.cells.items()]
    return markdown(["method", *block.benchmarks, "mean, recomputed"], lines)
