"""What follows from the paper's printed numbers alone: averages, item counts, standard errors and ranks.

Values are kept as whole hundredths, as they are printed, so that averages and ranks are exact.  A block is one table,
model, optimizer and corpus.  Accuracies are in percent, differences and standard errors of accuracies in points;
Table 6 is in nat/token, where lower is better.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from opus_bench.figures import OPTIMIZERS
from opus_bench.statistics import binomial_stderr
from opus_bench.tables import paper_cells

AVERAGE = "Avg"
LOSS_TABLES = ("6",)
TWICE = "Random(60B"  # start of the name of Random at twice the update tokens
ITEMS = {  # as the paper's evaluation has them
    "MMLU": 14042, "HellaSwag": 10042, "PIQA": 1838, "SIQA": 1954, "WinoGrande": 1267, "ARC-E": 567, "ARC-C": 295,
    "CommonsenseQA": 1221, "WSC": 104, "RACE-M": 1436, "RACE-H": 3498, "AX-b": 1104, "AX-g": 356, "StoryCloze": 1871,
}
PARTS = {"ANLI": (3, 1000), "BBH": (6, 146)}
"""Benchmarks that are means of parts, whose counts the paper leaves out: (parts, items of the smallest published one:
round 1 of ANLI; penguins in a table, the smallest of BBH's tasks, since the six are not named).  A mean over parts of
p_j has a variance of at most p (1 - p) / (parts x smallest), so standard errors from this product are upper bounds."""


@dataclass(frozen=True)
class Block:
    """The rows of one table, model, optimizer and corpus; values in hundredths of what the table's unit is."""

    table: str
    model: str
    optimizer: str
    corpus: str
    cells: dict[str, dict[str, int]]  # method -> benchmark -> value
    printed: dict[str, int]  # method -> the printed average

    @property
    def title(self) -> str:
        """Table, model, optimizer and corpus."""
        name = OPTIMIZERS.get(self.optimizer, self.optimizer)
        return f"Table {self.table}: {self.model}, {name}, {self.corpus}"

    @property
    def benchmarks(self) -> list[str]:
        """Benchmarks in the order of the table."""
        return list(next(iter(self.cells.values())))

    @property
    def is_loss(self) -> bool:
        """Whether lower is better."""
        return self.table in LOSS_TABLES

    @property
    def opus(self) -> list[str]:
        """Rows of OPUS: more than one where it was trained on several corpora."""
        return [method for method in self.cells if method.startswith("OPUS")]

    @property
    def baselines(self) -> list[str]:
        """All other rows."""
        return [method for method in self.cells if not method.startswith("OPUS")]

    @property
    def equal_tokens(self) -> list[str]:
        """Rows of the same number of update tokens: all but Random at twice as many."""
        return [method for method in self.cells if not method.startswith(TWICE)]

    def mean(self, method: str, without: str | None = None) -> Fraction:
        """Mean of a row's printed cells in hundredths, exact; of all benchmarks but one."""
        kept = [value for benchmark, value in self.cells[method].items() if benchmark != without]
        return Fraction(sum(kept), len(kept))

    def rank(self, method: str, without: str | None = None) -> int:
        """1 + how many rows of equal tokens have a strictly better mean."""
        sign = -1 if self.is_loss else 1
        mine = self.mean(method, without)
        return 1 + sum(sign * self.mean(other, without) > sign * mine for other in self.equal_tokens)

    def best_baseline(self, without: str | None = None) -> str:
        """The baseline of equal tokens with the best mean; the first of equals."""
        ours = [method for method in self.equal_tokens if method in self.baselines]
        return (min if self.is_loss else max)(ours, key=lambda method: self.mean(method, without))


def read_blocks(path: str | Path) -> list[Block]:
    """The blocks of a file of reported numbers, in its order.

    Raises:
        ValueError: another file, a value of more than two decimals, a row without its average or of other benchmarks
            than the one above it, no row of OPUS in a table of accuracies.
    """
    try:
        reported = paper_cells(path)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a file of reported numbers ({error}); its columns are table, model, optimizer, "
                         "corpus, method, benchmark, value") from error
    found: dict[tuple, dict[str, dict[str, int]]] = defaultdict(lambda: defaultdict(dict))
    for (*block, method, benchmark), value in reported.items():
        hundredths = round(100 * value)
        if abs(100 * value - hundredths) > 1e-6:
            raise ValueError(f"{path}: values have two decimals, got {value} for {method}, {benchmark} in {block}")
        found[tuple(block)][method][benchmark] = hundredths
    if not found:
        raise ValueError(f"{path}: no reported numbers in this file")
    blocks = []
    for block, rows in found.items():
        benchmarks = [name for name in next(iter(rows.values())) if name != AVERAGE]
        for method, row in rows.items():
            if set(row) != {*benchmarks, AVERAGE}:
                odd = sorted({*benchmarks, AVERAGE} ^ set(row))
                raise ValueError(f"{path}: {method} of {block} differs from the row above it in {odd}")
        cells = {method: {name: row[name] for name in benchmarks} for method, row in rows.items()}
        blocks.append(Block(*block, cells, {method: row[AVERAGE] for method, row in rows.items()}))
    if not any(block.opus for block in blocks if not block.is_loss):
        raise ValueError(f"{path}: no row of accuracies whose method starts with OPUS")
    return blocks


# Averages -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Average:
    """A printed average beside the mean of the printed cells; in hundredths."""

    block: Block
    method: str
    printed: int
    recomputed: Fraction

    @property
    def gap(self) -> Fraction:
        """Printed minus recomputed."""
        return self.printed - self.recomputed

    @property
    def disagrees(self) -> bool:
        """Whether rounding cannot explain the gap: it exceeds one unit of the last printed decimal.

        A printed number is within half a unit of what was rounded.  So the mean of the printed cells is within half
        a unit of the mean of the cells, whatever their number, and the printed average within another half.
        """
        return abs(self.gap) > 1

    @property
    def needs_more_decimals(self) -> bool:
        """Whether the gap is explained only if cells with more decimals than those printed were averaged."""
        return Fraction(1, 2) < abs(self.gap) <= 1


def averages(blocks: Sequence[Block]) -> list[Average]:
    """Every printed average."""
    return [Average(block, method, block.printed[method], block.mean(method))
            for block in blocks for method in block.cells]


Row = tuple[Block, str]


def repeated_rows(blocks: Sequence[Block]) -> tuple[list[tuple[Row, Row]], list[tuple[Row, Row]]]:
    """Rows of one model, optimizer and corpus that two tables print: (equal in every cell, of one name but not equal).

    A row is known by its name or, where another table names it otherwise, by its cells.
    """
    alike, unlike = [], []
    for i, first in enumerate(blocks):
        for second in blocks[i + 1:]:
            same_run = (first.model, first.optimizer, first.corpus) == (second.model, second.optimizer, second.corpus)
            if not same_run or first.benchmarks != second.benchmarks:
                continue
            for a in first.cells:
                for b in second.cells:
                    if (first.cells[a], first.printed[a]) == (second.cells[b], second.printed[b]):
                        alike.append(((first, a), (second, b)))
                    elif a == b:
                        unlike.append(((first, a), (second, b)))
    return alike, unlike


# Item counts ----------------------------------------------------------------------------------


def fits(value: int, n: int) -> bool:
    """Whether some whole number of n items prints as this value, in hundredths of a percent: rounded either way."""
    return -(-(2 * value - 1) * n // 20_000) <= (2 * value + 1) * n // 20_000


def fitting_counts(values: Sequence[int], up_to: int) -> list[int]:
    """The numbers of items up to a limit of which every value can be a share."""
    n = np.arange(1, up_to + 1)
    v = np.array(sorted(set(values)))[:, None]
    return n[(-(-(2 * v - 1) * n // 20_000) <= (2 * v + 1) * n // 20_000).all(0)].tolist()


def fit_by_chance(n: int) -> float:
    """Share of all two-decimal percentages that some whole number of n items prints as; near 1 it tests nothing."""
    return sum(fits(value, n) for value in range(10_001)) / 10_001


def printed_values(blocks: Sequence[Block], benchmark: str) -> list[int]:
    """The distinct accuracies printed for a benchmark in any table, in hundredths, sorted."""
    return sorted({row[benchmark] for block in blocks if not block.is_loss for row in block.cells.values()
                   if benchmark in row})


# Standard errors ------------------------------------------------------------------------------


def items_of(benchmark: str) -> int:
    """Items of a benchmark, or a number that bounds its standard error from above (PARTS).

    Raises:
        ValueError: a benchmark of unknown size.
    """
    if benchmark in PARTS:
        return math.prod(PARTS[benchmark])
    if benchmark not in ITEMS:
        raise ValueError(f"no number of items known for {benchmark!r}; add it to ITEMS of reproduce/printed.py")
    return ITEMS[benchmark]


def cell_stderr(block: Block, method: str, benchmark: str) -> float:
    """Binomial standard error of an accuracy, in points."""
    return 100 * binomial_stderr(block.cells[method][benchmark] / 10_000, items_of(benchmark))


def average_stderr(block: Block, method: str) -> float:
    """Standard error of a row's average over independent benchmarks, in points."""
    errors = [cell_stderr(block, method, benchmark) for benchmark in block.benchmarks]
    return math.hypot(*errors) / len(errors)
