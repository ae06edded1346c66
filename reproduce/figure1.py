"""Figure 1 of OPUS (arXiv:2602.05400): mean accuracy at equal update tokens, and the paper's headline numbers.

    python -m reproduce.figure1 --scale smoke     # makes Table 3's runs where they are missing, then page and figure
    python -m reproduce.figure1 --scale ci        # under a minute; exercises the code
    python -m reproduce.figure1 --scale paper --dry-run

A view of Table 3's records.  The paper claims 2.2 points over Random, Random's accuracy with an eighth of its tokens,
and an overhead of 4.7 %; each stands beside what our records say: points at equal tokens, update tokens to Random's
final loss, and time of choosing over time of training.  The paper draws accuracy against tokens; ours is measured at
the end of a run alone, so each run is a point.
"""

from __future__ import annotations

import sys
from pathlib import Path

from opus_bench import figures
from opus_bench.report import scale_title
from opus_bench.sections import Section, evaluated, loss_curve, time_ratio
from opus_bench.tables import (FOREIGN, MEAN_ACCURACY, PAPER_CORPUS, markdown, mean, odd_averages, paper_cells,
                               paper_model, suite_title, token_share)

from . import table3
from .runner import main
from .scales import SCALES
from .views import REPORTED, cells, optimizer, page

POINTS, TIMES, OVERHEAD = 2.2, 8, 4.7  # the paper's claims: points, fewer tokens, percent
ABOUT = (
    f"The paper's claims for OPUS: {POINTS} points over Random on average, Random's accuracy with {TIMES} times fewer "
    f"tokens, that is a share of {1 / TIMES:g}, and an overhead of {OVERHEAD} % (which it gives no formula for: "
    "[overhead](overhead.md)). Our accuracy is that of the offline suite, at the end of each run; tokens are counted "
    "to Random's final loss on the target."
)
runs, large_runs = table3.runs, table3.large_runs


def section_page(section: Section) -> list[str]:
    """The headline numbers by method."""
    reported = paper_cells(REPORTED)
    header = ["method", "n seeds", f"mean accuracy, {suite_title(section)}", "difference to Random (points)",
              "update tokens to Random's final loss (share of its own)", "select / train time",
              f"the paper's mean (%), {paper_model(section)}", "the paper's points over its Random"]
    lines = []
    for row in section.rows:
        values = [reported.get(("3", paper_model(section), section.optimizer, PAPER_CORPUS, name, "Avg"))
                  for name in (row.paper_row, "Random")]
        theirs = ["–", "–"] if None in values else [f"{values[0]:.2f}", f"{values[0] - values[1]:+.2f}"]
        lines.append([row.label + FOREIGN * row.foreign, str(len(row.records)),
                      *cells(section, row, evaluated(MEAN_ACCURACY), 2, 100), token_share(row, section.base),
                      mean(row.values(time_ratio), 0, 100, " %"), *theirs])
    return [markdown(header, lines), *odd_averages(reported, paper_model(section), section.optimizer,
                                                   (row.paper_row for row in section.rows))]


def draw(sections: list[Section], path: Path) -> Path:
    """Accuracy at the end of every run, by method."""
    labels = list(dict.fromkeys(row.label for section in sections for row in section.rows))  # one axis for all panels

    def panels(figure, axes) -> None:
        for axis, section in zip(axes[0], sections, strict=True):
            for row in section.rows:
                colour = figures.look_of(row.label, labels)["color"]
                points = [(loss_curve(record)[0][-1], evaluated(MEAN_ACCURACY)(record))
                          for record in row.records.values() if loss_curve(record)[0]]
                points = [(tokens, 100 * value) for tokens, value in points if value is not None]
                if points:
                    place = labels.index(row.label)
                    axis.plot([value for _, value in points], [place] * len(points), "|", color=colour, markersize=9)
                    axis.plot(sum(value for _, value in points) / len(points), place, "o", color=colour, markersize=6)
            axis.set_ylim(len(labels) - 0.5, -0.5)
            axis.set_title(optimizer(section))
            axis.set_xlabel(f"mean accuracy (%) after\n{points_at(section):,} update tokens")
        axes[0, 0].set_yticks(range(len(labels)), labels)

    note = "Dot: mean over seeds; ticks: the seeds. Accuracy is measured at the end of a run, so each run is one point."
    size = (max(7.5, 3.2 + 3.6 * len(sections)), 1.9 + 0.26 * len(labels))
    heading = f"Mean accuracy at equal update tokens ({scale_title(sections[0].scale)})"
    return figures.draw_panels(path, heading, note, panels, columns=len(sections), size=size, sharey=True)


def points_at(section: Section) -> int:
    """Update tokens of the section's runs."""
    return max(loss_curve(record)[0][-1] for record in section.records)


def write(results_dir: Path) -> list[Path]:
    """The page and a figure for each scale, from Table 3's records alone."""
    title = "Figure 1 of arXiv:2602.05400: the headline numbers"
    return page(results_dir, "figure1", title, ABOUT, section_page, draw)


if __name__ == "__main__":
    sys.exit(main(runs, __doc__, write, large_runs, scales=tuple(SCALES)))
