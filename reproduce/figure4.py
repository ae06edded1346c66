"""Figure 4 of OPUS (arXiv:2602.05400): the paper's figure 4 is not in our sources.

    python -m reproduce.figure4 --scale smoke     # makes Table 3's runs where they are missing, then page and figure
    python -m reproduce.figure4 --scale ci        # under a minute; exercises the code
    python -m reproduce.figure4 --scale paper --dry-run

This draws validation loss against update tokens by method, from Table 3's records, as a ratio that can be read off:
how many times the tokens of Random's curve a method is worth at each point of its own.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np

from opus_bench import figures
from opus_bench.report import scale_title
from opus_bench.sections import Row, Section, loss_curve
from opus_bench.statistics import tokens_to_reach
from opus_bench.tables import FOREIGN, difference, markdown, mean

from . import table3
from .runner import main
from .scales import SCALES
from .views import optimizer, page

SHARES = (0.25, 0.5, 1.0)
ABOUT = (
    "The paper's figure 4 is not in our sources; this is validation loss on the target against update tokens by "
    "method. The figure's upper panels are the losses, the lower ones the update tokens that Random needs to the same "
    "loss over the method's own: 2 means half of Random's tokens; where Random never gets there, the line ends."
)
runs, large_runs = table3.runs, table3.large_runs


def loss_at(share: float):
    """The loss at the last point up to a share of the run's tokens, as a function of a record."""
    def value(record: dict) -> float | None:
        tokens, losses = loss_curve(record)
        found = [loss for at, loss in zip(tokens, losses, strict=True) if tokens and at <= share * tokens[-1]]
        return found[-1] if found else None

    return value


def section_page(section: Section) -> list[str]:
    """Loss at shares of the tokens, and the difference to Random."""
    header = ["method", "n seeds", *(text for share in SHARES for text in
                                     (f"loss at the last evaluation up to {100 * share:g} % of the tokens (nat/token)",
                                                   "difference to Random"))]
    lines = [[row.label + FOREIGN * row.foreign, str(len(row.records)),
              *(cell for share in SHARES for cell in (mean(row.values(loss_at(share)), 4),
                                                      difference(row, section.base, loss_at(share), 4)))]
             for row in section.rows]
    return [markdown(header, lines)]


def worth(row: Row, base: Row) -> tuple[list[float], list[float]]:
    """(update tokens, Random's tokens to the same loss over them): geometric mean, where all seeds have one."""
    by_tokens: dict[float, list[float]] = {}
    seeds = row.records.keys() & base.records.keys()
    for seed in seeds:
        theirs = loss_curve(base.records[seed])
        for tokens, loss in zip(*loss_curve(row.records[seed]), strict=True):
            needed = tokens_to_reach(*theirs, loss) if tokens else math.inf
            if math.isfinite(needed) and needed > 0:
                by_tokens.setdefault(tokens, []).append(math.log(needed / tokens))
    kept = sorted(tokens for tokens, values in by_tokens.items() if len(values) == len(seeds))
    return kept, [math.exp(math.fsum(by_tokens[tokens]) / len(seeds)) for tokens in kept]


def draw(sections: list[Section], path: Path) -> Path:
    """Losses above, what they are worth in Random's tokens below."""
    def panels(figure, axes) -> None:
        for column, section in enumerate(sections):
            top, bottom = axes[:, column]
            labels = [row.label for row in section.rows]
            for row in section.rows:
                look = figures.look_of(row.label, labels)
                curves = [loss_curve(record) for record in row.records.values()]
                shared = sorted(set.intersection(*(set(tokens) for tokens, _ in curves)))
                losses = np.mean([[dict(zip(*curve, strict=True))[at] for at in shared] for curve in curves], axis=0)
                top.plot(shared, losses, label=row.label, **look)
                if section.base is not None and row is not section.base:
                    bottom.plot(*worth(row, section.base), **look)
            bottom.axhline(1, **figures.look_of("Random", labels))
            top.set_title(optimizer(section))
            bottom.set_xlabel("update tokens")
            bottom.xaxis.set_major_locator(figures.MaxNLocator(5))
            bottom.xaxis.set_major_formatter(figures.EngFormatter(sep=""))
        axes[0, 0].set_ylabel("validation loss on\nthe target (nat/token)")
        axes[1, 0].set_ylabel("Random's tokens to the\nsame loss, over these")
        axes[0, -1].legend(frameon=False, fontsize=8)

    note = ("Line: mean over seeds (losses), geometric mean (tokens), where every seed has a value; intervals "
            "of the losses are in the tables, the ratio has none.")
    return figures.draw_panels(path, f"Loss by update tokens ({scale_title(sections[0].scale)})", note, panels, rows=2,
                               columns=len(sections), size=(max(7.5, 4.2 * len(sections)), 6.0), sharex="col",
                               sharey="row")


def write(results_dir: Path) -> list[Path]:
    """The page and a figure for each scale, from Table 3's records alone."""
    return page(results_dir, "figure4", "Validation loss against update tokens", ABOUT, section_page, draw)


if __name__ == "__main__":
    sys.exit(main(runs, __doc__, write, large_runs, scales=tuple(SCALES)))
