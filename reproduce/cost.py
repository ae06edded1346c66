"""What the runs cost that lie in results/runs: time and memory by scale and by experiment, from the records alone.

    python -m reproduce.cost                        # writes results/tables/cost.md; nothing is trained
    python -m reproduce.table3 --scale smoke --dry-run      # what a grid still to do will take, by these records
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from opus_bench import results
from opus_bench.tables import NONE, markdown

from .pages import ELSEWHERE, ROOT
from .paper_scale import GPU_SCALES
from .scales import SCALES
from .written import say_written

HEAD = """# What the runs cost

Made by `python -m reproduce.cost` from {n} records. Do not edit: the same records give the same bytes.

A run is one process with one thread of torch unless its row says more; in all is the sum over runs, so two side by
side take half of it; wall clock, with whatever else the machine did. Memory is the peak of one process."""
SCALE_COLUMNS = ["scale", "experiments", "runs", "hours in all", "longest run, minutes", "peak memory, GB"]
COLUMNS = ["experiment", "scale", "device, threads", "runs", "minutes a run, range", "hours in all", "peak memory, GB",
           "command"]


def scale_table(records: Sequence[dict]) -> str:
    """A row for each value of --scale."""
    rows = []
    for scale in (*SCALES, *GPU_SCALES):
        of_scale = [record for record in records if record["scale"] == scale]
        minutes = [record["timing"]["wall_s"] / 60 for record in of_scale]
        rows.append([scale, str(len({record["experiment"] for record in of_scale})), str(len(of_scale)),
                     f"{math.fsum(minutes) / 60:.2f}", f"{max(minutes):.1f}", _peak(of_scale)] if of_scale
                    else [scale, "no record here", *[NONE] * 4])
    return markdown(SCALE_COLUMNS, rows)


def cost_table(records: Sequence[dict]) -> str:
    """A row for each experiment, scale and kind of machine."""
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for record in records:
        machine = f"{record['environment']['device']}, {record['environment']['threads']}"
        groups.setdefault((record["experiment"], record["scale"], machine), []).append(record)
    return markdown(COLUMNS, [[*key, *_row(*key[:2], group)] for key, group in sorted(groups.items())])


def _row(experiment: str, scale: str, records: Sequence[dict]) -> list[str]:
    minutes = [record["timing"]["wall_s"] / 60 for record in records]
    module = ELSEWHERE.get(experiment, f"reproduce.{experiment}")
    module += f" --scale {scale}" if experiment not in ELSEWHERE and scale in (*SCALES, *GPU_SCALES) else ""
    return [str(len(records)), f"{min(minutes):.1f} to {max(minutes):.1f}", f"{math.fsum(minutes) / 60:.2f}",
            _peak(records), f"`python -m {module}`"]


def _peak(records: Sequence[dict]) -> str:
    peaks = [record["timing"]["peak_bytes"] for record in records if record["timing"]["peak_bytes"] is not None]
    return f"{max(peaks) / 1e9:.2f}" if peaks else NONE


def page(records: Sequence[dict]) -> str:
    """The page in markdown, from the records alone."""
    return f"{HEAD.format(n=len(records))}\n\n{scale_table(records)}\n\n## By experiment\n\n{cost_table(records)}\n"


def write(results_dir: Path) -> list[Path]:
    """The page, from all records.

    Raises:
        ValueError: no records.
    """
    records = results.load(results_dir / "runs")
    if not records:
        raise ValueError(f"{results_dir / 'runs'} holds no records; `python -m reproduce.table3` makes some")
    path = results_dir / "tables" / "cost.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(records), encoding="utf-8", newline="\n")
    return [path]


def main() -> int:
    """Exit code 0, 2 after one line about records that are damaged or not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="FOLDER",
                        help="folder that holds runs/ and gets tables/ (default: results)")
    options = parser.parse_args()
    return say_written(lambda: write(options.results))


if __name__ == "__main__":
    sys.exit(main())
