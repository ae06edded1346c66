"""What the paper's headline numbers can be made from: 8x, 6x, 2.2 % and 4.7 %.

Each is tried against every formula below that the tables and the stated settings allow.  With many formulas some fit by
accident, so the number that would is given beside those that do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from opus_bench.figures import OPTIMIZERS

from .counts import SHAPES, token_ratio
from .overhead import PAPER_PERCENT
from .printed import TWICE, Block

COMPUTE, DATA, POINTS = 8, 6, 2.2  # "8x" less computation, 6 times less data, "2.2 %" better accuracy
TOKENS = {  # billions, as the paper states them
    "update tokens of every run": 30, "Random at twice the tokens": 60, "the longest run it names": 200,
    "Qwen3-8B with OPUS": 0.5, "Qwen3-8B on everything": 3,
}
WINDOW = 10  # the number by accident is counted in a window so many times as wide


@dataclass(frozen=True)
class Arm:
    """A row of OPUS and what it may be compared with; averages as printed, in hundredths of a percent."""

    block: Block
    opus: str

    def references(self) -> dict[str, float]:
        """Reference -> its printed average, for those that the block has."""
        tag = self.opus.removeprefix("OPUS")  # the quality tier it was trained on
        printed, usual = self.block.printed, [m for m in self.block.baselines if not m.startswith(TWICE)]
        values = {m.split("(")[0]: printed[m] for m in usual if not m.startswith("Random") or m.endswith(tag)}
        others = [value for method, value in values.items() if method != "Random"]
        found = {"mean of the baselines": math.fsum(values.values()) / len(values),
                 "mean of the baselines but Random": math.fsum(others) / len(others),
                 "best baseline": max(values.values())}
        twice = [printed[m] for m in self.block.baselines if m.startswith(TWICE)]
        return values | found | ({"Random at twice the tokens": twice[0]} if twice else {})


def arms(blocks: Sequence[Block], tables: Sequence[str]) -> list[Arm]:
    """Every row of OPUS in tables of accuracies."""
    return [Arm(block, opus) for block in blocks if block.table in tables and not block.is_loss for opus in block.opus]


def improvements(blocks: Sequence[Block]) -> dict[str, float]:
    """Formula -> percent: OPUS's lead in points and relative, over each reference, in each block and on average."""
    groups = {f"{arm.block.title}, {arm.opus}": [arm] for arm in arms(blocks, ("3", "4", "5"))}
    main = arms(blocks, ("3",))
    groups["mean of Table 3"] = main
    for name in dict.fromkeys(arm.block.model for arm in main):
        groups[f"mean of Table 3, {name}"] = [arm for arm in main if arm.block.model == name]
    for name in dict.fromkeys(arm.block.optimizer for arm in main):
        named = OPTIMIZERS.get(name, name)
        groups[f"mean of Table 3, {named}"] = [arm for arm in main if arm.block.optimizer == name]
    groups["mean of Table 4"] = arms(blocks, ("4",))
    groups["mean of Tables 3 and 4"] = arms(blocks, ("3", "4"))
    found = {}
    for (where, group), relative in product(groups.items(), (False, True)):
        sides = [(arm.block.printed[arm.opus], arm.references()) for arm in group]
        for reference in sides[0][1] if sides else ():
            if all(reference in values for _, values in sides):
                leads = [100 * (ours / values[reference] - 1) if relative else (ours - values[reference]) / 100
                         for ours, values in sides]
                kind = "relative, %" if relative else "points"
                found[f"{where}: over {reference} ({kind})"] = math.fsum(leads) / len(leads)
    return found


def rounds_to(value: float, wanted: float, digits: int = 1) -> bool:
    """Whether a value prints as the wanted one."""
    return f"{value:.{digits}f}" == f"{wanted:.{digits}f}"


def fitting_improvements(blocks: Sequence[Block]) -> tuple[list[tuple[str, float]], int, float]:
    """(formulas whose value prints as 2.2 with the value, number tried, number expected by accident)."""
    tried = improvements(blocks)
    half = WINDOW * 0.05
    near = sum(abs(value - POINTS) <= half for value in tried.values())
    return [(name, v) for name, v in tried.items() if rounds_to(v, POINTS)], len(tried), near / WINDOW


def token_factors() -> dict[str, float]:
    """Ratios of the stated token counts that exceed 1."""
    return {f"{a} / {b}": TOKENS[a] / TOKENS[b] for a, b in product(TOKENS, TOKENS)
            if TOKENS[a] > TOKENS[b] and ("Qwen" in a) == ("Qwen" in b)}


def fitting_shapes() -> list[str]:
    """Shapes of `counts` whose token ratio prints as the paper's overhead."""
    return [shape.name for shape in SHAPES if rounds_to(100 * token_ratio(shape), PAPER_PERCENT)]


def beats_twice(blocks: Sequence[Block]) -> list[tuple[Arm, bool]]:
    """Of each arm with Random at twice the tokens in its block, whether OPUS's printed average is above it."""
    return [(arm, arm.block.printed[arm.opus] > arm.references()["Random at twice the tokens"])
            for arm in arms(blocks, ("3", "4")) if "Random at twice the tokens" in arm.references()]
