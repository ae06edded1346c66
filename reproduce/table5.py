"""Table 5 of OPUS (arXiv:2602.05400): the models of Table 3 outside the distribution they were chosen for.

    python -m reproduce.table5 --scale smoke     # makes Table 3's runs where they are missing, then the page
    python -m reproduce.table5 --scale ci        # under a minute; exercises the code
    python -m reproduce.table5 --scale paper --dry-run    # GPT-2 XL with Muon; evaluates --suite ood

A view of Table 3's records.  The paper's six tasks need a hub and are not run here; what stands in for them at ci and
smoke are bits per byte on the domains other than the target, since the offline suite is made of the target's text.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from opus_bench.sections import Section, corrupted_domains, evaluated
from opus_bench.tables import BITS_PER_BYTE, FOREIGN, PAPER_CORPUS, markdown

from . import table3
from .paper_scale import PaperRun
from .paper_settings import GPT2_XL
from .runner import main
from .scales import SCALES
from .views import cells, ours_and_papers, page, status

TASKS = ("BBH", "RACE-M", "RACE-H", "AX-b", "AX-g", "StoryCloze")
ABOUT = (
    "Selection looks at the target alone. What does it cost, or bring, elsewhere? The paper asks with six tasks; here "
    "with bits per byte on held-out text of the other domains, damaged text left out."
)
runs = table3.runs


def large_runs(options: argparse.Namespace) -> list[PaperRun]:
    """Table 3's runs of GPT-2 XL with Muon but for Random at twice the tokens; at small, all of Table 3's."""
    made = table3.large_runs(options)
    if options.scale == "small":
        return made
    return [run for run in made if run.setting is GPT2_XL and run.optimizer == "muon" and run.line.times == 1]


def others(record: dict) -> list[str]:
    """Domains other than the target and the damaged ones of which there are bits per byte."""
    left = {record["data"]["target_domain"], *corrupted_domains(record)}
    names = [row["task"].removeprefix(BITS_PER_BYTE) for row in record["evals"]
             if row["task"].startswith(BITS_PER_BYTE) and row.get("value") is not None]
    return [name for name in names if name not in left]


def bits_elsewhere(record: dict) -> float | None:
    """Mean bits per byte over the other domains; None where they were not measured."""
    values = [evaluated(BITS_PER_BYTE + name)(record) for name in others(record)]
    found = [value for value in values if value is not None]
    return math.fsum(found) / len(found) if found else None


def section_page(section: Section) -> list[str]:
    """Bits per byte elsewhere and on the target, and the paper's tasks."""
    target = section.records[0]["data"]["target_domain"]
    domains = others(section.records[0])
    header = ["method", "n seeds", f"bits per byte, mean of {len(domains)} other domains", "difference to Random",
              f"bits per byte on {target}", "difference to Random"]
    lines = [[row.label + FOREIGN * row.foreign, str(len(row.records)), *cells(section, row, bits_elsewhere, 3),
              *cells(section, row, evaluated(BITS_PER_BYTE + target), 3)] for row in section.rows]
    return [
        markdown(header, lines),
        f"Other domains: {', '.join(domains) or 'none measured'}.",
        *ours_and_papers(section, "5", (PAPER_CORPUS,), TASKS, status, "accuracy in %",
                         "its six tasks are not in these records and need a hub"),
    ]


def write(results_dir: Path) -> list[Path]:
    """The page, from Table 3's records alone."""
    return page(results_dir, "table5", "Table 5 of arXiv:2602.05400: outside the target's distribution", ABOUT,
                section_page)


if __name__ == "__main__":
    sys.exit(main(runs, __doc__, write, large_runs, scales=tuple(SCALES)))
