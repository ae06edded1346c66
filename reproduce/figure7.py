"""Figure 7 of OPUS (arXiv:2602.05400): what choosing costs, in time and in FLOPs, and what is left at equal cost.

    python -m reproduce.figure7 --scale smoke     # makes Table 3's runs where they are missing, then page and figure
    python -m reproduce.figure7 --scale ci        # under a minute; exercises the code
    python -m reproduce.figure7 --scale paper --dry-run

A view of Table 3's records.  Time is measured in the runs, in units of each run's own
training time; FLOPs are counted by formula (counts.py).  Equal tokens,
equal time and equal FLOPs: a method's loss at its end, and where it stood when Random's whole time, or FLOPs, were
spent, its own being taken as even over its steps; a method that ended before keeps its last loss.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from opus_bench import figures
from opus_bench.model import SIZES
from opus_bench.report import scale_title
from opus_bench.sections import Row, Section, final_loss, loss_curve
from opus_bench.tables import FOREIGN, NONE, difference, markdown, mean

from . import table3
from .counts import Shape, scoring_flops, training_flops
from .paper_scale import GPU_SCALES
from .paper_settings import QWEN
from .runner import main
from .scales import SCALES
from .views import optimizer, page

ABOUT = (
    "Selection does more work per update token, so a fair comparison is also one at equal time and at equal FLOPs. A "
    "static score of the whole pool, made once for all seeds, is in no column but its own. On CPU scales a window of "
    "a fifth to a quarter of the sequence and a buffer of twice the batch make choosing dear; the shares at the "
    "paper's sizes are in [overhead](overhead.md). Seconds are wall clock, one thread a run, on a machine that other "
    "work may share: training, the same in all rows, takes longer in some for that alone, so equal time is in units of "
    "the run's own training time."
)
runs, large_runs = table3.runs, table3.large_runs
Cost = Callable[[dict], float]


def relative_time(record: dict) -> float:
    """Time of training and choosing over that of the run's own training, without evaluation.

    All runs of a section train on the same tokens with the same model, so their training times differ by the load of
    the machine alone, which this takes out.
    """
    return 1 + record["timing"]["select_s"] / record["timing"]["train_s"]


def shape_of(record: dict) -> Shape:
    """The record's model and step."""
    c = record["config"]
    selected = round(c["selection_ratio"] * c["buffer"])
    if c["model"] not in SIZES:
        base, width, layers, vocabulary = QWEN, QWEN.width, QWEN.layers, QWEN.vocabulary
    else:
        layers, width = SIZES[c["model"]][:2]
        vocabulary = 50304 if record["scale"] in GPU_SCALES else SCALES[record["scale"]].corpus.vocab_size
        base = Shape(c["model"], record["scale"], layers, width, vocabulary, 1, 1, 1, 1, 1)
    return Shape(c["model"], record["scale"], layers, width, vocabulary, c["length"], c["buffer"], c["proxy_size"],
                 selected, c.get("window") or c["length"], base.feed_forward, base.kv_width, base.gated,
                 base.query_width, base.tied)


def step_flops(record: dict) -> tuple[float, float]:
    """(training, choosing) of a step, full square of attention."""
    c, shape = record["config"], shape_of(record)
    return training_flops(shape), scoring_flops(shape, c["selector"], c["selector_options"], c["optimizer"])


def flops(record: dict) -> float:
    """Training and choosing in all steps."""
    return record["config"]["steps"] * sum(step_flops(record))


def loss_when(record: dict, share: float) -> float | None:
    """The loss at a share of the run's update tokens, linear between points; beyond its end, its last."""
    tokens, losses = loss_curve(record)
    return float(np.interp(share * tokens[-1], tokens, losses)) if tokens else None


def matched(row: Row, base: Row | None, cost: Cost) -> str:
    """The row's loss when Random's whole cost is spent, minus Random's final loss, paired by seed."""
    if base is None or row is base:
        return NONE
    def ended(record: dict) -> float | None:
        return loss_when(record, cost(base.records[record["config"]["seed"]]) / cost(record))

    seeds = row.records.keys() & base.records.keys()
    return difference(Row(row.label, None, {seed: row.records[seed] for seed in seeds}), base, ended, 4)


def section_page(section: Section) -> list[str]:
    """Cost by method, and differences to Random at equal tokens, time and FLOPs."""
    header = ["method", "n seeds", "train (s)", "select (s)", "scoring the pool, once (s)", "train (FLOPs)",
              "select / train (FLOPs)", "at equal tokens: loss minus Random's (nat/token)",
              "at equal time, in units of the run's own training", "at equal FLOPs"]
    lines = []
    for row in section.rows:
        first = next(iter(row.records.values()))
        training, choosing = step_flops(first)
        once = row.values(lambda record: record["timing"].get("static_scoring_s"))
        lines.append([row.label + FOREIGN * row.foreign, str(len(row.records)),
                      mean(row.values(lambda record: record["timing"]["train_s"]), 1),
                      mean(row.values(lambda record: record["timing"]["select_s"]), 1),
                      mean(once, 1) if any(once) else NONE, f"{first['config']['steps'] * training:.3g}",
                      f"{100 * choosing / training:.0f} %", difference(row, section.base, final_loss, 4),
                      matched(row, section.base, relative_time), matched(row, section.base, flops)])
    return [markdown(header, lines)]


def draw(sections: list[Section], path: Path) -> Path:
    """Loss against time above, against FLOPs below; Random's end is a dotted line."""
    def panels(figure, axes) -> None:
        for column, section in enumerate(sections):
            labels = [row.label for row in section.rows]
            costs = ((relative_time, "time over that of training alone"), (flops, "FLOPs"))
            for axis, (cost, name) in zip(axes[:, column], costs, strict=True):
                for row in section.rows:
                    curves = [loss_curve(record) for record in row.records.values()]
                    whole = math.fsum(map(cost, row.records.values())) / len(row.records)
                    shares = np.array(curves[0][0]) / curves[0][0][-1]
                    losses = np.mean([losses for _, losses in curves], axis=0)
                    axis.plot(whole * shares, losses, label=row.label, **figures.look_of(row.label, labels))
                    if row is section.base:
                        axis.axvline(whole, color="#7f7f7f", linewidth=0.8, linestyle=":")
                axis.set_xlabel(f"training and choosing: {name}")
            axes[0, column].set_title(optimizer(section))
        for axis in axes[:, 0]:
            axis.set_ylabel("validation loss on\nthe target (nat/token)")
        axes[0, -1].legend(frameon=False, fontsize=8)

    note = ("Line: mean over seeds; all lines have the same update tokens. Dotted: where Random ends; what lies left "
            "of it is had at equal cost.\nFLOPs by formula; evaluation and static scores of the pool are left out.")
    return figures.draw_panels(path, f"Loss by time and by FLOPs ({scale_title(sections[0].scale)})", note, panels,
                               rows=2, columns=len(sections), size=(max(7.5, 4.2 * len(sections)), 6.4), sharey=False)


def write(results_dir: Path) -> list[Path]:
    """The page and a figure for each scale, from Table 3's records alone."""
    return page(results_dir, "figure7", "Figure 7 of arXiv:2602.05400: time and FLOPs", ABOUT, section_page, draw)


if __name__ == "__main__":
    sys.exit(main(runs, __doc__, write, large_runs, scales=tuple(SCALES)))
