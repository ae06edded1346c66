"""Table 6 of OPUS (arXiv:2602.05400): validation loss by domain.

    python -m reproduce.table6 --scale smoke     # makes Table 3's runs where they are missing, then the page
    python -m reproduce.table6 --scale ci        # under a minute; exercises the code
    python -m reproduce.table6 --scale paper --dry-run    # GPT-2 Large and XL with Muon, FineWeb and FineWeb-Edu

The paper has nat/token on ten domains of web text, from Health to Computing; how documents were given their domain is
not in our sources, so at scale paper the user brings held-out documents of each (a check says where).  At ci and smoke
this is a view of Table 3's records: bits per byte on the held-out text of the offline corpus's domains.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from opus_bench.schema import NOT_RUN
from opus_bench.sections import Row, Section, evaluated, pairs
from opus_bench.tables import BITS_PER_BYTE, PAPER_CORPUS, bits, mean

from . import table3
from .paper_rows import Line, compared_lines, opus_lines
from .paper_scale import PaperRun, grid
from .paper_settings import EDU, GPT2_LARGE, GPT2_XL, Setting
from .runner import main
from .scales import SCALES
from .views import ours_and_papers, page

DOMAINS = ("Health", "Business", "Politics", "Education", "History", "Lifestyle", "Science", "Arts&Lit",
           "Entertainment", "Computing")
EDU_NAME = "FineWeb-Edu (score>=3)"
ABOUT = (
    "Loss on held-out text of each domain, whatever was chosen for training. The offline corpus's domains are sources "
    "of text, not topics of the web, and bits per byte are not nat/token: the two cannot be compared."
)
runs = table3.runs


def large_runs(options: argparse.Namespace) -> list[PaperRun]:
    """Table 3's runs with Muon on FineWeb, and at paper the same rows on FineWeb-Edu of score 3 to 5."""
    muon = argparse.Namespace(**{**vars(options), "optimizers": options.optimizers or ("muon",)})
    made = [run for run in table3.large_runs(muon) if run.line.times == 1]
    if options.scale == "small":
        return made

    def lines(setting: Setting) -> list[Line]:
        return [*compared_lines(setting, EDU.name, twice=False), *opus_lines(setting, pool=EDU.name)]

    return made + grid("table6", "Table 6", muon, lines, (GPT2_LARGE, GPT2_XL))


def domain_loss(row: Row, domain: str) -> str:
    """Its last loss on a domain, mean over seeds, where the run measured it."""
    found = []
    for record in row.records.values():
        rows = [m for m in record["metrics"] if m["split"] == f"val/{domain}" and m["name"] == "loss"]
        found += [max(rows, key=lambda m: m["step"])["value"]] if rows else []
    return mean(found, 3) if found else f"{NOT_RUN}no such text"


def section_page(section: Section) -> list[str]:
    """Bits per byte by domain, how many domains gained, and the paper's table beside our losses on its domains."""
    base = section.base
    names = [row["task"] for row in section.records[0]["evals"]
             if row["task"].startswith(BITS_PER_BYTE) and row.get("value") is not None]
    counts, seeds = [], sorted({len(row.records) for row in section.rows})
    for row in section.rows:
        if base is not None and row is not base:
            by_domain = (pairs(row, base, evaluated(name)) for name in names)
            less = sum(sum(ours) < sum(theirs) for ours, theirs in by_domain)
            counts.append(f"{row.label} {less}")
    return [
        f"Bits per byte by domain, n = {' or '.join(map(str, seeds))} seeds (difference to Random ± half-width of its "
        "95 % interval):",
        bits(section),
        f"Of {len(names)} domains, mean over seeds below Random's: {', '.join(counts) or 'nothing to compare'}; a "
        "count, no test, since domains are not independent.",
        *ours_and_papers(section, "6", (PAPER_CORPUS, EDU_NAME), DOMAINS, domain_loss, "nat/token",
                         "there is no text here with the paper's domains"),
    ]


def write(results_dir: Path) -> list[Path]:
    """The page, from Table 3's records alone."""
    return page(results_dir, "table6", "Table 6 of arXiv:2602.05400: loss by domain", ABOUT, section_page)


if __name__ == "__main__":
    sys.exit(main(runs, __doc__, write, large_runs, scales=tuple(SCALES)))
