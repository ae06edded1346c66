"""Figures 5 and 6 of OPUS (arXiv:2602.05400): continued pre-training of Qwen3-8B-Base on SciencePedia.

    python -m reproduce.figure5_6 --scale paper --dry-run    # runs, cost, preparation, what is missing
    python -m reproduce.figure5_6 --scale paper              # 8 GPUs
    python -m reproduce.figure5_6 --scale small              # 1 GPU, about 5 H100 hours, counted, and evaluation
    python -m reproduce.figure5_6 --scale ci                 # 1 to 2 min, 1 CPU core: exercises the code

Accuracy on OlympicArena and on SciAssess against update tokens, at .5, 1 and 1.5 billion, Random beside OPUS in its
three arms.  Which other methods the paper's figures hold is not in our sources.  SciencePedia has no public copy that
we know of: its files go into <data>/text/sciencepedia and held-out ones into <data>/text/validation-sciencepedia.

At small Qwen3-0.6B-Base goes on for 90 million tokens, with Muon and three seeds; all else is as at paper.  It is a
smaller model on less text, which knows less of what is asked: its numbers are not the paper's.  Files of 200 million
tokens are enough for it.

Not run at the scale smoke: there is no text of which a model of that size knows the questions.  At ci the same commands train and evaluate a Qwen3 of two layers on text and items that reproduce/stand_ins.py invents, with a
uniform proxy; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from opus_bench import figures
from opus_bench.results import load
from opus_bench.report import scale_title
from opus_bench.schema import NOT_RUN, RecordError
from opus_bench.sections import Row, Section, arrange
from opus_bench.tables import NONE, markdown, mean

from .paper_rows import ARMS, Line, opus_lines
from .paper_scale import GPU_SCALES, PaperRun, grid
from .paper_settings import QWEN3_8B, QWEN3_CI, QWEN3_SMALL, Setting
from .runner import main
from .training import Run
from .views import optimizer

EXPERIMENT = "figure5_6"
SCALES = ("ci", *GPU_SCALES)  # whose runs large_runs makes
TASKS = ("OlympicArena", "SciAssess biology", "SciAssess chemistry", "SciAssess material", "SciAssess medicine")


def runs(options: argparse.Namespace) -> list[Run]:
    """None: raises ValueError, as the module says."""
    raise ValueError(f"{NOT_RUN}{EXPERIMENT} has no scale {options.scale}; give --scale paper, --dry-run for its plan, "
                     "or --scale ci")


def large_runs(options: argparse.Namespace) -> list[PaperRun]:
    """Random and OPUS on SciencePedia, AdamW and Muon; at scale small Muon; at scale ci one arm, Muon, invented text."""
    ci = options.scale == "ci"

    def lines(setting: Setting) -> list[Line]:
        found = [Line("Random", paper_row="Random", pool="sciencepedia"),
                 *opus_lines(setting, ARMS[:1] if ci else ARMS, pool="sciencepedia")]
        return [replace(line, config=line.config | {"proxy": "pool"}) for line in found] if ci else found

    return grid(EXPERIMENT, "Figures 5 and 6", options, lines, (QWEN3_CI if ci else QWEN3_8B,),
                ("muon",) if ci else ("adamw", "muon"), small=QWEN3_SMALL)


def accuracy(row: Row, task: str) -> dict[int, list[float]]:
    """Update tokens -> accuracy of each seed (%)."""
    found: dict[int, list[float]] = {}
    for record in row.records.values():
        for metric in record["metrics"]:
            if metric["split"] == "suite" and metric["name"] == task:
                found.setdefault(metric["tokens_seen"], []).append(100 * metric["value"])
    return dict(sorted(found.items()))


def table(section: Section) -> str:
    """Accuracy by method, task and tokens."""
    tokens = sorted({at for row in section.rows for task in TASKS for at in accuracy(row, task)})
    header = ["method", "task", *(f"{at:.3g} tokens (%)" for at in tokens)]
    lines = [[row.label, task, *(mean(accuracy(row, task).get(at, []), 2) for at in tokens)]
             if accuracy(row, task) else [row.label, task, *[NONE] * len(tokens)]
             for row in section.rows for task in TASKS]
    return markdown(header, lines)


def draw(section: Section, path: Path) -> Path:
    """OlympicArena left, the mean of SciAssess's fields right."""
    def panels(figure, axes) -> None:
        labels = [row.label for row in section.rows]
        titles = ("OlympicArena", "SciAssess, mean of its fields")
        for axis, tasks, title in zip(axes[0], (TASKS[:1], TASKS[1:]), titles, strict=True):
            for row in section.rows:
                by_task = [accuracy(row, task) for task in tasks]
                shared = sorted(set.intersection(*map(set, by_task)))
                if shared:
                    values = [np.mean([math.fsum(one[at]) / len(one[at]) for one in by_task]) for at in shared]
                    axis.plot(shared, values, marker="o", label=row.label, **figures.look_of(row.label, labels))
            axis.set_title(title)
            axis.set_xlabel("update tokens")
            if axis.lines:
                axis.legend(frameon=False, fontsize=8)
        axes[0, 0].set_ylabel("accuracy (%)")

    return figures.draw_panels(path, f"Continued pre-training, {optimizer(section)} ({scale_title(section.scale)})",
                               "Mean over seeds.", panels, columns=2, size=(9.0, 3.6))


def write(results_dir: Path) -> list[Path]:
    """The page and a figure for each optimizer, from the records alone.

    Raises:
        RecordError: no records.
    """
    sections = arrange(load(Path(results_dir) / "runs", EXPERIMENT))
    if not sections:
        raise RecordError(f"{Path(results_dir) / 'runs'}: no records of {EXPERIMENT}; `python -m "
                          f"reproduce.{EXPERIMENT} --scale paper --dry-run` says what it takes to make them")
    parts, drawn = ["# Figures 5 and 6 of arXiv:2602.05400: continued pre-training"], []
    for section in sections:
        path = Path(results_dir) / "figures" / f"{EXPERIMENT}_{section.scale}_{section.optimizer}.svg"
        drawn.append(draw(section, path))
        parts += [f"## {optimizer(section)}, {section.scale} scale", f"![accuracy](../figures/{path.name})",
                  table(section)]
    path = Path(results_dir) / "tables" / f"{EXPERIMENT}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8", newline="\n")
    return [path, *drawn]


if __name__ == "__main__":
    sys.exit(main(runs, __doc__, write, large_runs, SCALES))
