"""Does the offline suite measure anything?  One small model, evaluated after more and more training.

    python -m reproduce.offline_suite --scale smoke   # about 8 min, 2 CPU cores
    python -m reproduce.offline_suite --scale ci      # exercises the code

The model of the scale is trained on the statically filtered pool for several numbers of steps, and
results/tables/offline_suite.md sets its accuracy on each task beside chance and beside the best rule
that needs no model.  A task is worth printing from the training on that lifts it above both.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from opus_bench.results import load
from opus_bench.tables import markdown
from opus_bench.train import RunConfig

from .runner import main
from .scales import SCALES
from .training import Run

EXPERIMENT = "offline_suite"
STEPS = {"ci": (1, 24), "smoke": (1, 280, 1000, 2500)}


def runs(options: argparse.Namespace) -> list[Run]:
    """One run for each number of steps and seed."""
    scale = SCALES[options.scale]
    return [
        Run(EXPERIMENT, "no item of the paper", f"{steps} steps", None, None,
            RunConfig("quality", seed=seed, **{**scale.run, "steps": steps, "evaluations": 1}),
            scale.name, scale.deviations)
        for seed in range(options.seeds or 1)
        for steps in STEPS[options.scale]
    ]


def write(results_dir: Path) -> list[Path]:
    """The table, from the records alone: one row a run, best rule and chance above."""
    lines = [
        "# The offline suite against training",
        "",
        "Accuracy in % (standard error over items); `*`: more than two standard errors above chance and",
        "above the best surface rule.  Made by `python -m reproduce.offline_suite`.",
    ]
    records = load(results_dir / "runs", EXPERIMENT)
    for scale in sorted({r["scale"] for r in records}):
        chosen = sorted((r for r in records if r["scale"] == scale),
                        key=lambda r: (r["config"]["steps"], r["config"]["seed"]))
        tasks = [row for row in chosen[0]["evals"] if row.get("chance") is not None]
        header = ["update tokens", "seed", *(f"{t['task']} (n = {t['n_samples']})" for t in tasks), "run"]
        rows = [["chance", "", *(f"{100 * t['chance']:.1f}" for t in tasks), ""],
                ["best surface rule", "", *(f"{100 * t['surface']:.1f}" for t in tasks), ""]]
        for r in chosen:
            cells = [_cell(row) for row in r["evals"] if row.get("chance") is not None]
            tokens = max(m["tokens_seen"] for m in r["metrics"])
            rows.append([f"{tokens:,}", str(r["config"]["seed"]), *cells,
                         f"[{r['run_id']}](../runs/{r['run_id']}.json)"])
        lines += ["", f"## Scale: {scale}", "", markdown(header, rows)]
    path = results_dir / "tables" / f"{EXPERIMENT}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    return [path]


def _cell(row: dict) -> str:
    above = row["value"] - 2 * row["stderr"] > max(row["chance"], row["surface"])
    return f"{100 * row['value']:.1f} ({100 * row['stderr']:.1f}){'*' if above else ''}"


if __name__ == "__main__":
    sys.exit(main(runs, __doc__, write))
