"""Table 3 of OPUS (arXiv:2602.05400): pre-training GPT-2 from scratch on a mixed pool.

    python -m reproduce.table3 --scale smoke     # about 17 min, 2 CPU cores; checks the pipeline
    python -m reproduce.table3 --scale cpu       # five seeds of a larger model: some hours, 2 CPU cores
    python -m reproduce.table3 --scale ci        # under a minute; exercises the code
    python -m reproduce.table3 --dry-run         # prints the runs and stops
    python -m reproduce.table3 --scale paper --dry-run    # GPT-2 Large and XL on FineWeb: runs, cost, what is missing

Prints every run it will make, skips those already in results/runs/, then writes
results/tables/table3.md and the figures beside it.  Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from opus_bench.report import report
from opus_bench.train import RunConfig

from .paper_rows import DEVIATIONS, compared_lines, opus_lines
from .paper_scale import PaperRun, grid
from .paper_settings import GPT2_LARGE, GPT2_XL
from .runner import main
from .scales import SCALES
from .training import Run


def methods(window: int, sketch_width: int) -> list[tuple[str, str | None, str | None, str, dict]]:
    """Rows of the table: (method, the paper's row, arm, selector, its options)."""
    opus = {"window": window, "sketch_width": sketch_width}
    return [
        ("Random", "Random", None, "random", {}),
        ("PPL (high)", "PPL", None, "perplexity", {"keep": "high", "window": window}),
        ("PPL (mid)", None, None, "perplexity", {"keep": "mid", "window": window}),
        ("PPL (low)", None, None, "perplexity", {"keep": "low", "window": window}),
        ("GREATS", "GREATS", None, "greats", {"window": window}),
        ("Static quality", "DCLM-FastText", None, "quality", {}),
        ("OPUS", "OPUS", "paper", "opus", {"arm": "paper", **opus}),
        ("OPUS", "OPUS", "released", "opus", {"arm": "released", **opus}),
        ("OPUS", "OPUS", "calibrated", "opus", {"arm": "calibrated", **opus}),
    ]


def runs(options: argparse.Namespace) -> list[Run]:
    """Every run of the table, seeds outermost so that a part of the grid is already paired."""
    scale = SCALES[options.scale]
    # four times the paper's batch but drawn every 8 steps: half the sequences, a less noisy direction
    proxy = {"calibrated": {"proxy_size": scale.run["proxy_size"] * 4}}
    return [
        Run("table3", "Table 3", method, row, arm,
            RunConfig(selector, selector_options, optimizer=optimizer, seed=seed,
                      **{**scale.run, **proxy.get(arm, {})}),
            scale.name, (*scale.deviations, *DEVIATIONS.get(arm or selector, ())), options.paper_tasks)
        for optimizer in options.optimizers or ("adamw",)
        for seed in range(options.seeds or scale.seeds)
        for method, row, arm, selector, selector_options in methods(scale.window, scale.sketch_width)
    ]


def large_runs(options: argparse.Namespace) -> list[PaperRun]:
    """The paper's rows with OPUS in its three arms, GPT-2 Large and XL, AdamW and Muon, on FineWeb."""
    return grid("table3", "Table 3", options, lambda setting: [*compared_lines(setting), *opus_lines(setting)],
                (GPT2_LARGE, GPT2_XL), ("adamw", "muon"))


def write(results_dir: Path) -> list[Path]:
    """The table, its figures and the README's results."""
    return report(results_dir, Path(__file__).with_name("reported.csv"))


if __name__ == "__main__":
    sys.exit(main(runs, __doc__, write, large_runs, scales=tuple(SCALES)))
