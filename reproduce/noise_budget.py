"""What moves the order of the candidates?  Spearman lost to each source of noise or approximation, ranked.

    python -m reproduce.noise_budget --scale smoke   # both optimizers, two seeds; 2 CPU cores
    python -m reproduce.noise_budget --scale smoke --seeds 1   # as results/ has it: half of that
    python -m reproduce.noise_budget --scale ci      # under a minute; exercises the code

Writes results/tables/noise_budget.md and a figure: for the sketch, the proxy batch, the score window, the labels, the
choice of layers, the preconditioner and the arithmetic, how far the exact order of the candidates moves when that
alone is changed.  Prints every run first and skips those already in results/runs/.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from opus_bench.figures import OPTIMIZERS, draw_panels
from opus_bench.model import SIZES
from opus_bench.statistics import SMALLEST_N, Interval, mean_interval
from opus_bench.tables import markdown
from opus_bench.validation.noise_budget import GROUPS, Settings
from opus_bench.validation.validate import PAPER_WIDTH

from .measurement import Measurement, links, measurements, write_page
from .runner import main

EXPERIMENT = "noise_budget"
COMMAND = f"python -m reproduce.{EXPERIMENT}"
SETTINGS = {
    "ci": {"stages": [4, 8], "staleness": [2], "replicates": 2, "candidates": 8, "proxy_size": 2,
           "large_proxy_size": 4, "windows": [2], "widths": [32]},
    "smoke": {"stages": [70, 280], "staleness": [1, 8, 64], "replicates": 4, "candidates": 32, "proxy_size": 8,
              "large_proxy_size": 32, "windows": [2, 4, 12], "widths": [32, 512, 8192]},
}
SEEDS = 2
DEVIATIONS = ("not an experiment of the paper: orders of candidates at a few stages, nothing is selected",
              "weights about as large as a sketch of the paper's width: a narrow one stands for GPT-2 XL's compression")
COLOURS = dict(zip(GROUPS, ("#d55e00", "#0072b2", "#e69f00", "#cc79a7", "#009e73", "#56b4e9", "#7f7f7f"), strict=True))
GLOSSES = {
    "sketch": "CountSketch instead of the exact utility; the alignment's order, and U's with a quarter selected",
    "proxy": "another proxy batch of the same size; two larger batches against each other; the gradient of the same "
             "proxy taken some updates ago",
    "window": "candidates and proxy cut to the first tokens; the paper's windows are 1/12 of the sequence for GPT-2 XL "
              "and 1/48 for Large",
    "labels": "the token after next is the label, as in the released code",
    "layers": "some of the scored weights, or embedding and head as well; each weight's term divided by the root of "
              "its size, as in the released code",
    "P_t": "P_t of some updates ago; none at all; in its place the adjoint of the optimizer's real step, which is "
           "nearer to what the step does (`optimizer_map`)",
    "arithmetic": "training's float32; bfloat16 autocast; weights in bfloat16 as well",
}


def runs(options: argparse.Namespace) -> list[Measurement]:
    """One measurement for each optimizer and seed."""
    settings = SETTINGS[options.scale]
    return measurements(options, EXPERIMENT, f"opus_bench.validation.{EXPERIMENT}:measure", settings,
                Settings(**settings).units, SEEDS, DEVIATIONS)


def label(row: dict) -> str:
    """The source as it is shown."""
    return row["source"] + (", U" if row["score"] == "utility" else "")


def lost(records: Sequence[dict]) -> dict[tuple[int, str], Interval]:
    """Mean and 95 % interval over seeds and replicates of what each source loses, by stage and label."""
    values = defaultdict(list)
    for record in records:
        for row in record["metrics"]:
            values[row["step"], label(row)].append(row["value"])
    return {key: mean_interval(found) for key, found in values.items()}


def groups_of(records: Sequence[dict]) -> dict[str, str]:
    """Label -> group of every source."""
    return {label(row): row["group"] for record in records for row in record["metrics"]}


def ranked(by_optimizer: dict[str, list[dict]]) -> list[str]:
    """Labels by the mean over optimizers of what is lost at the last stage, largest first."""
    found = [(lost(records), last_stage(records)) for records in by_optimizer.values()]
    sources = groups_of(next(iter(by_optimizer.values())))
    return sorted(sources, key=lambda name: -sum(values[step, name].mean for values, step in found))


def last_stage(records: Sequence[dict]) -> int:
    """Updates of the last stage."""
    return max(records[0]["config"]["measured"]["stages"])


def _cell(interval: Interval) -> str:
    limits = "" if interval.low is None else f" [{interval.low:.4f}, {interval.high:.4f}]"
    return f"{interval.mean:.4f}{limits}"


def budget_table(by_optimizer: dict[str, list[dict]]) -> str:
    """Every source, largest loss first; a column for each optimizer and stage."""
    sources = groups_of(next(iter(by_optimizer.values())))
    columns = [(name, step, lost(records)) for name, records in by_optimizer.items()
               for step in records[0]["config"]["measured"]["stages"]]
    header = ["source", "group", *(f"{OPTIMIZERS[name]}, after {step} updates" for name, step, _ in columns)]
    return markdown(header, [[source, sources[source], *(_cell(found[step, source]) for _, step, found in columns)]
                             for source in ranked(by_optimizer)])


def sentences(records: Sequence[dict]) -> str:
    """What is seen in the numbers of one optimizer at its last stage, computed from them."""
    found, step, sources = lost(records), last_stage(records), groups_of(records)
    measured = records[0]["config"]["measured"]
    at = {name: found[step, name].mean for name in sources}
    widest, base = f"sketch of {max(measured['widths']):,} buckets", f"another proxy of {measured['proxy_size']}"
    others = [at[name] for name in sources if sources[name] != "sketch"]
    largest = {group: max((n for n in sources if sources[n] == group), key=at.__getitem__)
               for group in sources.values()}
    order = sorted(largest, key=lambda group: -at[largest[group]])
    listed = "; ".join(f"{group} {at[largest[group]]:.4f} ({largest[group]})" for group in order)
    times = f", {at[base] / at[widest]:.1f} times as much" if at[widest] > 0 else ""
    return (f"- The largest loss of each group: {listed}.\n"
            f"- A {widest} loses {at[widest]:.4f}; {sum(value > at[widest] for value in others)} of the {len(others)} "
            f"sources that are no sketch lose more. {base.capitalize()} loses {at[base]:.4f}{times}.")


def draw(by_optimizer: dict[str, list[dict]], scale: str, path: Path) -> Path:
    """Bars of what is lost at the last stage, largest first, interval over replicates; a panel an optimizer."""
    order = ranked(by_optimizer)

    def panels(figure, axes) -> None:
        for axis, (optimizer, records) in zip(axes[0], by_optimizer.items(), strict=True):
            found, last, sources = lost(records), last_stage(records), groups_of(records)
            for y, name in enumerate(order):
                bar = found[last, name]
                axis.barh(y, bar.mean, color=COLOURS[sources[name]], height=0.72, zorder=2)
                if bar.low is not None:
                    axis.plot([max(0.0, bar.low), bar.high], [y, y], color="#1a1a1a", linewidth=1, zorder=3)
                for step in records[0]["config"]["measured"]["stages"][:-1]:
                    axis.plot(found[step, name].mean, y, "o", markersize=4, markerfacecolor="white",
                              markeredgecolor="#1a1a1a", markeredgewidth=0.8, zorder=4)
            axis.set_yticks(range(len(order)), order)
            axis.set_ylim(len(order) - 0.4, -0.6)
            axis.grid(False, axis="y")
            axis.set_xlim(left=0)
            axis.set_title(OPTIMIZERS[optimizer], loc="left")
            axis.set_xlabel("Spearman lost (1 − rank correlation)")
        handles = [Patch(color=colour, label=group) for group, colour in COLOURS.items()]
        handles.append(Line2D([], [], marker="o", linestyle="", markerfacecolor="white", markeredgecolor="#1a1a1a",
                              markersize=4, label="earlier stage"))
        axes[0, -1].legend(handles=handles, frameon=False, loc="lower right")

    first = next(iter(by_optimizer.values()))
    n = lost(first)[last_stage(first), order[0]].n
    line = "Line: 95 % t interval" if n >= SMALLEST_N else "Too few for an interval"
    note = (f"After {last_stage(first)} updates: means over {n} sets of {first[0]['config']['measured']['candidates']} "
            f"candidates ({len(first)} model(s) per optimizer). {line}. U: with a quarter selected.\n"
            "0: no candidate changes its rank. A loss says that the order differs, not which order is the better one.")
    size = (3.2 + 3.4 * len(by_optimizer), 1.2 + 0.25 * len(order))
    return draw_panels(path, f"What moves the order of the candidates ({scale} scale)", note, panels, 1,
                       len(by_optimizer), size, sharey=True)


def method_text(records: Sequence[dict]) -> str:
    """What is measured, in words, with the settings of the records."""
    config, measured = records[0]["config"], records[0]["config"]["measured"]
    glosses = "\n".join(f"- {group}: {gloss}." for group, gloss in GLOSSES.items())
    narrow = min(measured["widths"])
    here, xl = SIZES[config["model"]][1] ** 2 / narrow, SIZES["gpt2-xl"][1] ** 2 / PAPER_WIDTH
    return f"""\
A small model is trained on a random half of every buffer. At each stage {measured["replicates"]} disjoint sets of
{measured["candidates"]} candidates of {config["length"]} tokens, which training has not come to, are ordered by the
exact alignment with a proxy batch of {measured["proxy_size"]}, in float64, over the linear layers of the blocks. Then
one thing is changed, and 1 − Spearman of the two orders is what it loses. Each set has proxies of its own. The larger
proxy is compared with another as large; the order by U with the exact order by U.

{glosses}

A sketch of {narrow} buckets has {here:.0f} to {4 * here:,.0f} elements of a weight per bucket here; GPT-2 XL's of
{PAPER_WIDTH:,} has {xl:.0f} to {4 * xl:,.0f} (`sketch_error` says what that means). Two noisy orders differ by more
than either does from the order that an endless proxy would give. How soon an old gradient of the proxy is of no use
depends on the learning rate, here {config["adam_lr"]:g} for AdamW and {config["muon_lr"]:g} for Muon. A loss says that
the order differs, not which one is the better."""


def chapter(groups: dict[str, list[dict]], scale: str, folder: Path) -> tuple[list[Path], list[str]]:
    """Figures and text of one scale (`measurement.Chapter`)."""
    figure = draw(groups, scale, folder / f"{EXPERIMENT}_{scale}.svg")
    first = next(iter(groups.values()))
    parts = [method_text(first), *links([figure])]
    for optimizer, group in groups.items():
        parts.append(f"**{OPTIMIZERS[optimizer]}**, after {last_stage(group)} updates:\n\n{sentences(group)}")
    n = lost(first)[last_stage(first), ranked(groups)[0]].n
    parts.append(f"Spearman lost: mean over {n} sets of candidates, {len(first)} seed(s) of the model, and 95 % t "
                 f"interval over the sets where there are {SMALLEST_N} or more. Sets of one seed share their "
                 "model, which the interval does not know.")
    return [figure], [*parts, budget_table(groups)]


def write(results_dir: Path) -> list[Path]:
    """The page and its figures, from the records alone."""
    return write_page(results_dir, EXPERIMENT, "What moves the order of the candidates?", COMMAND, chapter)


if __name__ == "__main__":
    sys.exit(main(runs, __doc__, write))
