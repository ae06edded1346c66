"""What do the paper's own numbers support?  Its averages, item counts, noise, ranks and headline numbers, recomputed.

    python -m reproduce.audit                          # seconds: nothing is trained, only reported.csv is read
    python -m reproduce.audit --reported other.csv     # another file of the same columns

Prints what disagrees, and writes results/tables/audit.md and results/figures/audit.svg.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from matplotlib.lines import Line2D
from scipy import stats

from opus_bench.figures import draw_panels
from opus_bench.significance import ALPHA, smallest_sign_flip_p

from .audit_tables import (
    arms_of,
    average_table,
    cell_table,
    claim_table,
    count,
    headline_table,
    hundredths,
    item_table,
    lead_table,
    named,
    noise_table,
    odd_cells,
    rank_table,
)
from .claims import BELOW, BEYOND, DEPENDS, WITHIN, Comparison, comparisons, largest_part, verdicts
from .printed import ITEMS, LOSS_TABLES, PARTS, Block, average_stderr, averages, read_blocks, repeated_rows
from .written import say_written

ROOT = Path(__file__).resolve().parent.parent
REPORTED = Path(__file__).with_name("reported.csv")
TITLE = "Audit of the paper's own numbers"
COMMAND = "python -m reproduce.audit"
Z = stats.norm.isf(ALPHA / 2)


def findings(blocks: Sequence[Block]) -> str:
    """What the numbers support, in words; every number is computed."""
    family = comparisons(blocks)
    parts = [of_averages(blocks), of_items(blocks), of_noise(blocks, family), of_ranks(blocks)]
    heavy = [over_random(c) for c in family if c.baseline == random_of(c.block, c.opus) and carries_most(c)]
    if heavy:
        parts += ["In these rows one benchmark carries more than half of OPUS's lead over Random:", "\n".join(heavy)]
    return "\n\n".join([*parts, of_comparisons(family), MISSING])


MISSING = """\
**Not in the tables.** No seed is repeated, so the spread between training runs, which adds to every noise above, is
unknown: a difference beyond the noise of items may still be one of seeds. Nor are there answers item by item, which
would turn the bounds into a number."""


def of_averages(blocks: Sequence[Block]) -> str:
    """Printed averages and rows that two tables print."""
    checked = averages(blocks)
    wrong = [a for a in checked if a.disagrees]
    listed = "; ".join(f"{a.method} in {a.block.title} is printed {hundredths(a.printed)} where its cells give "
                       f"{hundredths(a.recomputed)}" for a in wrong)
    alike, unlike = repeated_rows(blocks)
    return (f"**Averages.** Of {count(len(checked), 'printed average')}, {len(wrong)} cannot be the mean of the "
            f"printed cells, however those were rounded{': ' + listed if wrong else ''}. Comparisons below use the "
            f"recomputed means. {count(len(alike), 'row')} that two tables print are alike in every cell and "
            f"{count(len(unlike), 'is', 'are')} not.")


def of_items(blocks: Sequence[Block]) -> str:
    """Printed values as shares of items."""
    return (f"**Items.** {count(len(odd_cells(blocks)), 'cell')} cannot be a share of the stated number of items in "
            "two decimals (another number of items, another split or a slip; the tables do not say which); all others "
            "can, where the number of items is small enough for that to mean anything.")


def of_noise(blocks: Sequence[Block], family: Sequence[Comparison]) -> str:
    """Standard errors from items alone."""
    errors = [average_stderr(b, o) for b, o in arms_of(blocks)]
    return (f"**Noise of items.** If each benchmark is a sample of items, an average of OPUS's rows has a standard "
            f"error of {min(errors):.2f} to {max(errors):.2f} points, so the difference of two such averages one of "
            f"{min(c.unpaired for c in family):.2f} to {max(c.unpaired for c in family):.2f} if answers are "
            "independent. Two models that answer the same items agree on many of them, so the true one is smaller; how "
            "much smaller the tables cannot say.")


def of_ranks(blocks: Sequence[Block]) -> str:
    """Where OPUS is first, and without which benchmarks it is not."""
    arms, losses = arms_of(blocks), arms_of(blocks, loss=True)
    first = [(b, o) for b, o in arms if b.rank(o) == 1]
    moved = [(b, o) for b, o in first if any(b.rank(o, name) > 1 for name in b.benchmarks)]
    text = (f"**Ranks.** OPUS has the best mean at equal tokens in {len(first)} of {len(arms)} rows of accuracies "
            f"({sum(b.rank(o) == 1 for b, o in losses)} of {len(losses)} of losses), and keeps it in "
            f"{len(first) - len(moved)} of those {len(first)} whichever one benchmark is left out.")
    for block, opus in moved:
        without = [f"{name} (then rank {block.rank(opus, name)}; first: {block.best_baseline(name)})"
                   for name in block.benchmarks if block.rank(opus, name) > 1]
        text += f"\n- {named(block, opus)}: first, but not without {', or '.join(without)}."
    return text


def random_of(block: Block, opus: str) -> str:
    """Name of the row of Random on the same corpus as a row of OPUS."""
    return "Random" + opus.removeprefix("OPUS")


def carries_most(c: Comparison) -> bool:
    """Whether one benchmark makes more than half of OPUS's lead."""
    lead = c.block.mean(c.opus) - c.block.mean(c.baseline)
    return lead > 0 and 200 * largest_part(c.block, c.opus, c.baseline)[1] > lead


def over_random(c: Comparison) -> str:
    """How much of the lead one benchmark carries, and what is left without it."""
    name, points, items = largest_part(c.block, c.opus, c.baseline)
    rest = c.block.mean(c.opus, name) - c.block.mean(c.baseline, name)
    of_all = f", {count(round(items), 'item')} of {ITEMS[name]:,}" if name in ITEMS else ""
    return (f"- {named(c.block, c.opus)}: {name} adds {float(points):+.2f} of the {c.difference:+.2f} points{of_all}; "
            f"the mean of the other {len(c.block.benchmarks) - 1} differs by {hundredths(rest, '+.2f')}.")


def of_comparisons(family: Sequence[Comparison]) -> str:
    """Which claims of superiority exceed the noise, under each reading."""
    said = Counter(verdicts(family))
    above = [c for c in family if c.difference > 0]
    sizes = sorted({len(c.block.benchmarks) for c in family})
    where = Counter(named(c.block, c.opus) for c, verdict in zip(family, verdicts(family), strict=True)
                    if verdict == BEYOND)
    listed = f" ({'; '.join(f'{n} in {name}' for name, n in where.items())})" if where else ""
    floors = " and ".join(f"{k} allow no p below {smallest_sign_flip_p(k):.4f}" for k in sizes)
    return (f"**Comparisons.** Of {count(len(family), 'comparison')} of OPUS with a baseline, OPUS's mean is higher in "
            f"{len(above)}. After Holm's correction over all of them, {said[BEYOND]} exceed the noise of items even if "
            f"answers are independent{listed}, {said[DEPENDS]} do or do not depending on how many answers differ, "
            f"{said[WITHIN]} do not under any pairing, and in {said[BELOW]} OPUS is not above. Without correction "
            f"{sum(c.unpaired_p <= ALPHA for c in above)} exceed it with independent answers. With benchmarks as the "
            f"sample (is its mean lead more than signs at random would give?) {sum(c.tasks_p <= ALPHA for c in above)} "
            f"have p <= {ALPHA:.2f} without correction. With it so few benchmarks can hardly show anything: {floors}, "
            f"and Holm asks for {ALPHA / len(family):.4f} of the first of {len(family)}.")


ASSUMPTIONS = """\
- Rounding: a printed number is within half a unit of its last decimal of what was rounded, up or down alike. The mean
  of k printed cells is then within half a unit of the mean of the cells, and the printed average within another half:
  a gap of more than one unit, .01, is no rounding.
- Binomial: a benchmark of n items has the standard error sqrt(p (1 - p) / n); an average of k benchmarks that of
  independent parts. Multiple choice with lowest mean NLL has no other noise on a fixed model.
- {parts}: means of parts whose sizes are not stated. Their standard errors take the number of parts times the smallest
  published size, so they are upper bounds.
- Unpaired standard error: answers of the two models independent; an upper bound unless they are anticorrelated.
- Least standard error: sqrt((|d| - d^2) / n) in each benchmark, nothing for means of parts: every answer that changes
  changes in one direction. A lower bound, which no real pair of models reaches.
- Answers that may differ: the share of items, the same in every benchmark, on which the two models may disagree before
  the paired p of that comparison alone exceeds {alpha:.2f}. Independent answers at 40 % accuracy disagree on 48 %.
- p over benchmarks: exact sign-flip test of the differences, benchmarks equally likely to go either way.
- Family: OPUS against every baseline in every block of accuracies with a row of that name; a pair of rows that two
  tables print counts once. Holm's correction holds whatever the dependence. Table {loss} has no counts, so no noise.
- Ranks leave out Random at twice the tokens; comparisons do not."""


def page(blocks: Sequence[Block]) -> str:
    """The page in markdown; the same numbers give the same bytes."""
    numbers = sum(len(row) + 1 for block in blocks for row in block.cells.values())
    family = comparisons(blocks)
    odd = odd_cells(blocks)
    parts = [
        f"# {TITLE}",
        f"Made by `{COMMAND}` from the {numbers:,} printed numbers in reproduce/reported.csv; nothing is trained or "
        "evaluated. It says what those numbers can and cannot support, not whether the method works.",
        "## What the numbers support", findings(blocks),
        "![OPUS minus the best baseline, and its rank with one benchmark left out](../figures/audit.svg)",
        "## The headline numbers", headline_table(blocks), "OPUS's printed lead over Random:", lead_table(blocks),
        "## Averages that rounding cannot explain", average_table(blocks),
        "## Item counts", item_table(blocks), *(["Cells that do not fit:", "\n".join(odd)] if odd else []),
        "## Standard errors of averages", noise_table(blocks),
        "## Ranks with one benchmark left out", rank_table(blocks),
        "## Comparisons", f"{len(family)} in one family; columns are explained under Assumptions.", claim_table(family),
        "## Assumptions",
        ASSUMPTIONS.format(parts=" and ".join(PARTS), alpha=ALPHA, loss=", ".join(LOSS_TABLES)),
        "## Every accuracy with its binomial standard error (%)",
    ]
    for block in blocks:
        if not block.is_loss:
            parts += [f"### {block.title}", cell_table(block)]
    return "\n\n".join(parts) + "\n"


# Figure ---------------------------------------------------------------------------------------


def draw(blocks: Sequence[Block], path: Path) -> Path:
    """OPUS minus the best baseline with its noise, and OPUS's rank with each benchmark left out."""
    arms = arms_of(blocks)
    best = {(c.block.title, c.opus): c for c in comparisons(blocks)
            if c.baseline == c.block.best_baseline()}

    def fill(figure, axes) -> None:
        left, right = axes[0]
        for y, (block, opus) in enumerate(arms):
            found = best[block.title, opus]
            left.plot([found.difference - Z * found.unpaired, found.difference + Z * found.unpaired], [y, y],
                      color="#7f7f7f", linewidth=1.4)
            left.plot([found.difference - Z * found.least, found.difference + Z * found.least], [y, y],
                      color="#0072b2", linewidth=4.5, solid_capstyle="butt")
            left.plot(found.difference, y, "o", color="#1a1a1a", markersize=5, zorder=4)
            ranks = Counter(block.rank(opus, name) for name in block.benchmarks)
            for rank, times in ranks.items():
                right.plot(rank, y, "o", color="#e69f00", markersize=4 + 1.4 * times, zorder=3)
                right.annotate(str(times), (rank, y), ha="center", va="center", fontsize=7, zorder=5)
            right.plot(block.rank(opus), y, "s", markerfacecolor="none", markeredgecolor="#1a1a1a", markersize=17,
                       zorder=4)
        left.axvline(0, color="#1a1a1a", linewidth=0.8)
        left.set_yticks(range(len(arms)), [named(*arm).replace(": ", "\n") for arm in arms], fontsize=8)
        left.set_ylim(len(arms) + 0.5, -0.6)
        left.set_xlabel("OPUS minus the best baseline\nat equal tokens (points)")
        handles = [Line2D([], [], color="#0072b2", linewidth=4.5, label="least noise"),
                   Line2D([], [], color="#7f7f7f", linewidth=1.4, label="answers independent")]
        left.legend(handles=handles, fontsize=8, loc="lower right", frameon=False)
        right.set_xlabel("rank of OPUS at equal tokens")
        ranks = [block.rank(opus, name) for block, opus in arms for name in (None, *block.benchmarks)]
        right.set_xlim(0.4, max(ranks) + 0.6)
        right.set_xticks(range(1, max(ranks) + 1))

    note = ("Left: 95 % intervals from items alone, whose width depends on how many answers differ; seeds are not "
            "repeated in the paper, so their noise is not in them.\n"
            "Right: square, with all benchmarks; circles, with one left out, and in how many such cases.")
    return draw_panels(path, "The paper's averages: leads, noise of items, and ranks", note, fill, columns=2,
                       size=(10.5, 1.6 + 0.48 * len(arms)), sharey=True, width_ratios=(3, 2))


def write(results_dir: Path, reported: Path = REPORTED) -> list[Path]:
    """results/tables/audit.md and results/figures/audit.svg, from the reported numbers."""
    blocks = read_blocks(reported)
    path = results_dir / "tables" / "audit.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = draw(blocks, results_dir / "figures" / "audit.svg")
    path.write_text(page(blocks), encoding="utf-8", newline="\n")
    return [path, figure]


def main() -> int:
    """Exit code 0, 2 after one line about a file or folder that is no good."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reported", type=Path, default=REPORTED, metavar="FILE",
                        help="the printed numbers (default: reproduce/reported.csv)")
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR",
                        help="folder that gets tables/ and figures/ (default: results)")
    options = parser.parse_args()

    def make() -> list[Path]:
        if not options.results.is_dir():
            raise ValueError(f"{options.results} is not a folder; --results names the one that gets the page")
        print(average_table(read_blocks(options.reported)))
        return write(options.results, options.reported)

    return say_written(make)


if __name__ == "__main__":
    sys.exit(main())
