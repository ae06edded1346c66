"""Figures 5 and 6 of OPUS (arXiv:2602.05400): continued pre-training of Qwen3-8B-Base on SciencePedia.

    python -m reproduce.figure5_6 --scale paper --dry-run    # runs, cost, preparation, what is missing
    python -m reproduce.figure5_6 --scale paper              # 8 GPUs
    python -m reproduce.figure5_6 --scale small              # 1 GPU, about 5 H100 hours, counted, and evaluation
    python -m reproduce.figure5_6 --scale smoke              # 2 CPU cores; 10 min
    python -m reproduce.figure5_6 --scale ci                 # 1 to 2 min, 1 CPU core: exercises the code

Accuracy on OlympicArena and on SciAssess against update tokens, at .5, 1 and 1.5 billion, Random beside OPUS in its
three arms.  Which other methods the paper's figures hold is not in our sources.  SciencePedia has no public copy that
we know of: its files go into <data>/text/sciencepedia and held-out ones into <data>/text/validation-sciencepedia.

At small Qwen3-0.6B-Base goes on for 90 million tokens, with Muon and three seeds; all else is as at paper.  It is a
smaller model on less text, which knows less of what is asked: its numbers are not the paper's.  Files of 200 million
tokens are enough for it.

At smoke a Qwen3 of 0.58 M parameters is first trained here, by the same command, on general text, and then goes on with
Muon on text of the sciences that pinned packages hold; it is evaluated on held-out text of the sciences: its loss, and
the offline suite's items made from it.  Such a model knows no answers to questions: this checks the pipeline on real
text.  At ci a Qwen3 of two layers with random weights is trained and evaluated on text and items that are invented,
with a uniform proxy; its numbers mean nothing.  Both scales' text, models and items: reproduce/stand_ins.py.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from opus_bench import figures
from opus_bench.results import load
from opus_bench.report import caution, scale_title
from opus_bench.schema import NOT_RUN, RecordError
from opus_bench.sections import Row, Section, arrange
from opus_bench.tables import NONE, markdown, mean

from .paper_rows import ARMS, Line, opus_lines
from .paper_scale import GPU_SCALES, HELD_OUT, PaperRun, grid
from .paper_settings import QWEN3_8B, QWEN3_CI, QWEN3_SMALL, QWEN3_SMOKE, Setting
from .runner import main
from .training import Run
from .views import optimizer

EXPERIMENT = "figure5_6"
SCALES = ("ci", "smoke", *GPU_SCALES)  # whose runs large_runs makes
TASKS = ("OlympicArena", "SciAssess biology", "SciAssess chemistry", "SciAssess material", "SciAssess medicine")
MEAN = "mean_accuracy"  # of the offline suite


def runs(options: argparse.Namespace) -> list[Run]:
    """None: all runs are those of `large_runs`.

    Raises:
        ValueError: always, naming the scales.
    """
    raise ValueError(f"{NOT_RUN}{EXPERIMENT} has no scale {options.scale}; give one of {', '.join(SCALES)}")


def large_runs(options: argparse.Namespace) -> list[PaperRun]:
    """Random and OPUS on SciencePedia, AdamW and Muon at scale paper, Muon at the others; one arm at ci."""
    proxy = {"ci": {"proxy": "pool"}, "smoke": {"proxy": HELD_OUT}}.get(options.scale, {})
    arms = ARMS[:1] if options.scale == "ci" else ARMS

    def lines(setting: Setting) -> list[Line]:
        found = [Line("Random", paper_row="Random", pool="sciencepedia"),
                 *opus_lines(setting, arms, pool="sciencepedia")]
        return [replace(line, config=line.config | proxy) for line in found]

    setting = {"ci": QWEN3_CI, "smoke": QWEN3_SMOKE}.get(options.scale, QWEN3_8B)
    return grid(EXPERIMENT, "Figures 5 and 6", options, lines, (setting,),
                ("adamw", "muon") if options.scale == "paper" else ("muon",), small=QWEN3_SMALL)


def values(row: Row, split: str, name: str) -> dict[int, list[float]]:
    """Update tokens -> a metric of each seed; ``split``: its name, or what stands before a slash in it."""
    found: dict[int, list[float]] = {}
    for record in row.records.values():
        for metric in record["metrics"]:
            if metric["split"].partition("/")[0] == split and metric["name"] == name:
                found.setdefault(metric["tokens_seen"], []).append(metric["value"])
    return dict(sorted(found.items()))


def accuracy(row: Row, task: str) -> dict[int, list[float]]:
    """Update tokens -> accuracy of each seed (%)."""
    return {at: [100 * value for value in found] for at, found in values(row, "suite", task).items()}


def losses(row: Row) -> dict[int, list[float]]:
    """Update tokens -> loss of held-out text of each seed (nat/token)."""
    return values(row, "val", "loss")


def tasks_of(section: Section) -> tuple[str, ...]:
    """The paper's, or those of another suite where that was run."""
    found = dict.fromkeys(metric["name"] for row in section.rows for record in row.records.values()
                          for metric in record["metrics"] if metric["split"] == "suite")
    return TASKS if set(found) <= set(TASKS) else tuple(found)


def table(section: Section) -> str:
    """Accuracy by method, task and tokens; below it the loss at these tokens and at the start."""
    tasks = tasks_of(section)
    tokens = sorted({at for row in section.rows for task in tasks for at in accuracy(row, task)})
    header = ["method", "task", *(f"{at:.3g} tokens (%)" for at in tokens)]
    lines = [[row.label, task, *(mean(accuracy(row, task).get(at, []), 2) for at in tokens)]
             if accuracy(row, task) else [row.label, task, *[NONE] * len(tokens)]
             for row in section.rows for task in tasks]
    points = [0, *tokens]
    by_row = {row.label: losses(row) for row in section.rows}
    held_out = [[label, *(mean(found[at], 4) if at in found else NONE for at in points)]
                for label, found in by_row.items()]
    return "\n\n".join([markdown(header, lines), "Loss of held-out text:", markdown(
        ["method", *(f"{at:.3g} tokens (nat/token)" for at in points)], held_out)])


def curve(*parts: dict[int, list[float]]) -> dict[int, float]:
    """Update tokens -> the mean over parts of the mean over seeds, where all parts have one."""
    shared = sorted(set.intersection(*map(set, parts)))
    return {at: float(np.mean([math.fsum(part[at]) / len(part[at]) for part in parts])) for at in shared}


def panels_of(section: Section) -> list[tuple[str, str, Callable[[Row], dict[int, float]]]]:
    """Title, unit and curve of each of two panels."""
    if tasks_of(section) == TASKS:
        return [("OlympicArena", "accuracy (%)", lambda row: curve(accuracy(row, TASKS[0]))),
                ("SciAssess, mean of its fields", "accuracy (%)",
                 lambda row: curve(*(accuracy(row, task) for task in TASKS[1:])))]
    return [("Items of held-out text, mean of tasks", "accuracy (%)", lambda row: curve(accuracy(row, MEAN))),
            ("Loss of held-out text", "nat/token", lambda row: curve(losses(row)))]


def draw(section: Section, path: Path) -> Path:
    """Two panels side by side."""
    def panels(figure, axes) -> None:
        labels = [row.label for row in section.rows]
        for axis, (title, unit, of) in zip(axes[0], panels_of(section), strict=True):
            for row in section.rows:
                points = of(row)
                if points:
                    axis.plot(list(points), list(points.values()), marker="o", label=row.label,
                              **figures.look_of(row.label, labels))
            axis.set_title(title)
            axis.set_xlabel("update tokens")
            axis.set_ylabel(unit)
            if axis.lines:
                axis.legend(frameon=False, fontsize=8)

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
        first, *others = section.records
        shared = [text for text in first["deviations"] if all(text in record["deviations"] for record in others)]
        parts += [f"## {optimizer(section)}, {section.scale} scale", *caution(section.scale),
                  f"![accuracy](../figures/{path.name})", table(section),
                  "Deviations from the paper: " + "; ".join(shared) + "."]
    path = Path(results_dir) / "tables" / f"{EXPERIMENT}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8", newline="\n")
    return [path, *drawn]


if __name__ == "__main__":
    sys.exit(main(runs, __doc__, write, large_runs, SCALES))
