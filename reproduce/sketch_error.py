"""How far is a CountSketch from the exact utility, and does its stated variance say so?  By width and by weight.

    python -m reproduce.sketch_error --scale smoke   # both optimizers, two seeds; 2 CPU cores
    python -m reproduce.sketch_error --scale ci      # under a minute; exercises the code

Writes results/tables/sketch_error.md: error, predicted error and rank agreement with the exact utilities by sketch
width, training stage and kind of layer, and two figures.  Prints every run first and skips those already done.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from matplotlib.lines import Line2D

from opus_bench.figures import OPTIMIZERS, draw_panels
from opus_bench.model import SIZES
from opus_bench.tables import markdown
from opus_bench.validation.sketch_error import ALL, Settings
from opus_bench.validation.validate import FIVE_SIGMA, PAPER_WIDTH

from .measurement import Measurement, links, measurements, write_page
from .runner import main

EXPERIMENT = "sketch_error"
COMMAND = f"python -m reproduce.{EXPERIMENT}"
SETTINGS = {
    "ci": {"stages": [4, 12], "widths": [32, 512, 8192], "hash_seeds": 2, "candidates": 8, "proxy_size": 4},
    "smoke": {"stages": [16, 70, 280], "widths": [32, 128, 512, 2048, 8192, 32768], "hash_seeds": 8,
              "candidates": 32, "proxy_size": 8},
}
SEEDS = 2
XL = SIZES["gpt2-xl"][1] ** 2 / PAPER_WIDTH  # elements per bucket of GPT-2 XL's attention weights; MLP four times that
DEVIATIONS = ("not an experiment of the paper: utilities of one set of candidates at a few stages",
              "model of weights about as large as the sketch: smaller widths stand for GPT-2 XL's compression")
LOOKS = (("#56b4e9", "o"), ("#e69f00", "s"), ("#0072b2", "^"), ("#d55e00", "D"))  # of the stages


def runs(options: argparse.Namespace) -> list[Measurement]:
    """One measurement for each optimizer and seed."""
    settings = SETTINGS[options.scale]
    return measurements(options, EXPERIMENT, f"opus_bench.validation.{EXPERIMENT}:measure", settings,
                Settings(**settings).units, SEEDS, DEVIATIONS)


Cells = dict[tuple[int, int, str], list[dict]]  # updates, width, kind of weight -> rows


def kind(weight: str) -> str:
    """The kind of layer of a weight ("attention.q" for blocks.0.attention.q.weight); "all" for all together."""
    return weight.removeprefix("blocks.").split(".", 1)[-1].removesuffix(".weight")


def cells(records: Sequence[dict]) -> Cells:
    """Rows of one optimizer by stage, width and kind; a list over seeds and blocks."""
    found = defaultdict(list)
    for record in records:
        for row in record["metrics"]:
            found[row["step"], row["width"], kind(row["weight"])].append(row)
    return dict(found)


def mean(rows: Sequence[dict], name: str) -> float:
    """Mean of a field over rows."""
    return math.fsum(row[name] for row in rows) / len(rows)


def ratio(rows: Sequence[dict]) -> tuple[float, float]:
    """Measured over predicted variance, mean over rows, and its standard error for independent rows."""
    stderr = math.sqrt(math.fsum(row["variance_ratio_stderr"] ** 2 for row in rows)) / len(rows)
    return mean(rows, "variance_ratio"), stderr


def of_kinds(found: Cells, step: int, width: int) -> dict[str, list[dict]]:
    """Rows of single weights at a stage and width, by kind."""
    return {name: rows for (at, k, name), rows in found.items() if (at, k) == (step, width) and name != ALL}


def sizes(found: Cells) -> list[int]:
    """Elements of the weights, each size once."""
    return sorted({row["elements"] for (_, _, name), rows in found.items() if name != ALL for row in rows})


def per_bucket(found: Cells, width: int) -> str:
    """Elements per bucket, smallest to largest weight."""
    ends = [size / width for size in (sizes(found)[0], sizes(found)[-1])]
    return " to ".join(f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in dict.fromkeys(ends))


def _numbers(rows: Sequence[dict]) -> list[str]:
    return [f"{100 * mean(rows, 'value'):.2f}", f"{100 * mean(rows, 'predicted_scatter'):.2f}",
            "{:.2f} ± {:.2f}".format(*ratio(rows)),
            *(f"{mean(rows, name):.4f} ({min(r[f'{name}_lowest'] for r in rows):.4f})"
              for name in ("alignment_spearman", "utility_spearman"))]


NUMBERS = ["scatter (% of the alignment's norm)", "predicted (%)", "measured / predicted variance",
           "Spearman of alignment (lowest)", "Spearman of U (lowest)"]


def width_table(records: Sequence[dict]) -> str:
    """All weights together, by stage and width."""
    found, measured = cells(records), records[0]["config"]["measured"]
    rows = []
    for step in measured["stages"]:
        for width in measured["widths"]:
            numbers = [*_numbers(found[step, width, ALL]), f"{100 * mean(found[step, width, ALL], 'gram_error'):.2f}"]
            rows.append([str(step), f"{width:,}", per_bucket(found, width), *numbers])
    return markdown(["updates", "width (buckets per weight)", "elements per bucket", *NUMBERS, "Gram error (%)"], rows)


def weight_table(records: Sequence[dict]) -> str:
    """Weights by kind of layer at the last stage, at the width nearest to the paper's and at XL's compression."""
    found, measured = cells(records), records[0]["config"]["measured"]
    step, rows = measured["stages"][-1], []
    for width in dict.fromkeys((_paper_width(measured), _compressed(found, measured))):
        for name, here in of_kinds(found, step, width).items():
            size = here[0]["elements"]
            rows.append([f"{width:,}", name, f"{size:,}", f"{size / width:,.4g}", *_numbers(here)])
    return markdown(["width", "kind of layer", "elements of a weight", "elements per bucket", *NUMBERS], rows)


def _paper_width(measured: dict) -> int:
    return min(measured["widths"], key=lambda width: abs(math.log(width / PAPER_WIDTH)))


def _compressed(found: Cells, measured: dict) -> int:  # about as many elements per bucket as GPT-2 XL has
    return min(measured["widths"], key=lambda width: abs(math.log(sizes(found)[0] / width / XL)))


def sentences(records: Sequence[dict]) -> str:
    """What is seen in the numbers of one optimizer, computed from them."""
    found, measured = cells(records), records[0]["config"]["measured"]
    step, lines = measured["stages"][-1], []
    together = [rows for key, rows in found.items() if key[2] == ALL]
    pooled = [[row for rows in of_kinds(found, at, width).values() for row in rows]
              for at in measured["stages"] for width in measured["widths"]]
    for what, chosen in (("all weights together", together), ("weight by weight, mean over them", pooled)):
        ratios = [ratio(rows) for rows in chosen]
        far, stderr = max(ratios, key=lambda r: abs(r[0] - 1) / r[1])
        beyond = sum(abs(value - 1) > FIVE_SIGMA * error for value, error in ratios)
        lines.append(f"- Measured over predicted variance, {what}: {min(ratios)[0]:.2f} to {max(ratios)[0]:.2f} over "
                     f"{len(ratios)} stages and widths; {beyond} are more than five standard errors from 1, "
                     f"the furthest is {far:.2f} ± {stderr:.2f}.")
    for width, why in ((_paper_width(measured), f"nearest to the paper's {PAPER_WIDTH:,}"),
                       (_compressed(found, measured), "nearest to GPT-2 XL's elements per bucket")):
        here = found[step, width, ALL]
        single = [row for rows in of_kinds(found, step, width).values() for row in rows]
        worst = min(single, key=lambda row: row["alignment_spearman"])
        lines.append(f"- {width:,} buckets, {why}: {per_bucket(found, width)} elements per bucket; after {step} "
                     f"updates Spearman {mean(here, 'alignment_spearman'):.4f} of the alignment, "
                     f"{mean(here, 'utility_spearman'):.4f} of U; weight by weight "
                     f"{mean(single, 'alignment_spearman'):.4f} on average, lowest {worst['alignment_spearman']:.4f} "
                     f"({worst['weight'].removesuffix('.weight')}).")
    return "\n".join(lines)


def draw_widths(groups: dict[str, list[dict]], scale: str, path: Path) -> Path:
    """Scatter with its prediction, and Spearman, by width; a column an optimizer."""
    first = next(iter(groups.values()))
    measured = first[0]["config"]["measured"]
    widths, stages = measured["widths"], measured["stages"]

    def draw(figure, axes) -> None:
        for (top, bottom), (optimizer, records) in zip(axes.T, groups.items(), strict=True):
            found = cells(records)
            for step, (colour, marker) in zip(stages, LOOKS, strict=False):
                at = [found[step, width, ALL] for width in widths]
                predicted = [100 * mean(rows, "predicted_scatter") for rows in at]
                bands = [[p * math.sqrt(max(0.0, 1 + side * ratio(rows)[1])) for p, rows in zip(predicted, at)]
                         for side in (-2, 2)]
                top.plot(widths, predicted, color=colour, linewidth=1, linestyle=(0, (4, 2)))
                top.fill_between(widths, *bands, color=colour, alpha=0.15, linewidth=0)
                top.plot(widths, [100 * mean(rows, "value") for rows in at], marker, color=colour, markersize=5)
                for name, dashes in (("alignment_spearman", "-"), ("utility_spearman", (0, (2, 1.5)))):
                    bottom.plot(widths, [mean(rows, name) for rows in at], marker=marker, color=colour, markersize=4,
                                linestyle=dashes, linewidth=1.3, markerfacecolor="white" if "util" in name else colour)
            top.set_yscale("log")
            for axis in (top, bottom):
                axis.set_xscale("log", base=2)
                axis.set_xticks(widths, [f"{width:,}" for width in widths])
                axis.axvline(PAPER_WIDTH, color="#7f7f7f", linewidth=0.8, linestyle=(0, (1, 2)))
            top.set_title(OPTIMIZERS[optimizer], loc="left")
            bottom.set_xlabel("sketch width (buckets per weight)")
        axes[0, 0].set_ylabel("scatter of the alignment\n(% of its norm)")
        axes[1, 0].set_ylabel("Spearman with the exact values")
        line = {"color": "#1a1a1a", "linewidth": 1.2}
        handles = [Line2D([], [], color=colour, marker=marker, linestyle="", label=f"after {step} updates")
                   for step, (colour, marker) in zip(stages, LOOKS, strict=False)]
        handles.append(Line2D([], [], linestyle=(0, (4, 2)), label="predicted", **line))
        axes[0, -1].legend(handles=handles, frameon=False)
        both = (Line2D([], [], label="alignment", **line),
                Line2D([], [], label="U", linestyle=(0, (2, 1.5)), marker="o", markerfacecolor="white", **line))
        axes[1, -1].legend(handles=both, frameon=False, loc="lower right")

    here = per_bucket(cells(first), PAPER_WIDTH)
    note = (f"Weights of all blocks; {measured['hash_seeds']} hash seeds, {len(first)} model(s) each. Dashed: by the "
            "stated variance; band: ± two standard errors.\nDotted line: the paper's width, at which weights here have "
            f"{here} elements per bucket and GPT-2 XL's {XL:.0f} to {4 * XL:,.0f}.")
    return draw_panels(path, f"Error of the sketched utility by sketch width ({scale} scale)", note, draw, 2,
                       len(groups), (1.5 + 4.2 * len(groups), 6.2), sharex=True, sharey="row")


def draw_weights(groups: dict[str, list[dict]], scale: str, path: Path) -> Path:
    """Spearman of the alignment of single weights at the width nearest to the paper's, by kind of layer."""
    first = next(iter(groups.values()))
    measured = first[0]["config"]["measured"]
    width, stages = _paper_width(measured), measured["stages"]

    def draw(figure, axes) -> None:
        for column, (optimizer, records) in enumerate(groups.items()):
            axis, found = axes[0, column], cells(records)
            kinds = list(of_kinds(found, stages[-1], width))
            for place, (step, (colour, marker)) in enumerate(zip(stages, LOOKS, strict=False)):
                for x, name in enumerate([*kinds, ALL]):
                    values = [row["alignment_spearman"] for row in found[step, width, name]]
                    axis.plot([x + 0.22 * (place - (len(stages) - 1) / 2)] * len(values), values, marker, color=colour,
                              markersize=4.5, alpha=0.75, markeredgewidth=0,
                              label=f"after {step} updates" if not x else None)
            axis.set_xticks(range(len(kinds) + 1), [*kinds, ALL], rotation=30, ha="right", rotation_mode="anchor")
            axis.set_title(OPTIMIZERS[optimizer], loc="left")
        axes[0, 0].set_ylabel("Spearman with the exact alignment")
        axes[0, -1].set_axis_off()
        axes[0, -1].legend(*axes[0, 0].get_legend_handles_labels(), loc="upper left", frameon=False)

    note = (f"Width {width:,}: {per_bucket(cells(first), width)} elements per bucket. A point: one weight of one "
            f"model, mean over {measured['hash_seeds']} hash seeds;\n{ALL}: all weights together.")
    return draw_panels(path, f"Rank agreement of sketched alignments, weight by weight ({scale} scale)", note, draw, 1,
                       len(groups) + 1, (2.4 + 4.2 * len(groups), 4.2), sharey=True,
                       width_ratios=[1] * len(groups) + [0.35])


def method_text(records: Sequence[dict]) -> str:
    """What is measured, in words, with the settings of the records."""
    config, measured, found = records[0]["config"], records[0]["config"]["measured"], cells(records)
    elements = sizes(found)
    wider = " and ".join(f"{width:,}" for width in measured["widths"] if width > elements[0])
    beyond = f"Widths of {wider} exceed the smallest" if wider else "No width exceeds the smallest"
    return f"""\
A small model is trained on a random half of every buffer. At each stage the utilities of the same candidates
({measured["candidates"]} of {config["length"]} tokens, which training has not come to) for one proxy batch of
{measured["proxy_size"]} are taken exactly and by CountSketch, {measured["hash_seeds"]} hash seeds for each width,
over the linear layers of the blocks. Scatter: root mean square over seeds of the error of the alignments, over the
norm of the exact ones. Predicted: the same from the variance that `sketch.count_sketch` states. Measured / predicted
variance has a standard error for normal errors that knows that candidates share the proxy's sketch and that each
weight and each model has hashes of its own; squares of few errors have a longer tail than that. U: with a quarter of
the candidates already selected, over those left, weighted as in the paper. Lowest: of all hash seeds. Gram error:
Frobenius norm over norm.

**Read with care.** Weights here have {" and ".join(f"{size:,}" for size in elements)} elements. {beyond}: a sketch
wider than its weight compresses nothing, and its error is still that of collisions. GPT-2 XL has {XL:.0f} to
{4 * XL:,.0f} elements per bucket at the paper's width {PAPER_WIDTH:,}; here that is so at a width near
{elements[0] / XL:.0f}. The stated variance knows the width and the angle between update and proxy gradient, not the
weight's size: the paper's width stands for GPT-2 XL if its angles are these, the narrow one if the cosine falls as
one over the root of the size, as for unrelated directions."""


def chapter(groups: dict[str, list[dict]], scale: str, folder: Path) -> tuple[list[Path], list[str]]:
    """Figures and text of one scale (`measurement.Chapter`)."""
    figures = [draw(groups, scale, folder / f"{EXPERIMENT}_{name}_{scale}.svg")
               for name, draw in (("width", draw_widths), ("weight", draw_weights))]
    parts = [method_text(next(iter(groups.values()))), *links(figures)]
    for optimizer, group in groups.items():
        name, step = OPTIMIZERS[optimizer], group[0]["config"]["measured"]["stages"][-1]
        parts += [f"### {name}", sentences(group),
                  f"**{name}: all weights together.** Means over {len(group)} seed(s) of the model.",
                  width_table(group),
                  f"**{name}: single weights** after {step} updates, means over blocks and seeds.",
                  weight_table(group)]
    return figures, parts


def write(results_dir: Path) -> list[Path]:
    """The page and its figures, from the records alone."""
    return write_page(results_dir, EXPERIMENT, "How far is a sketch from the exact utility?", COMMAND, chapter)


if __name__ == "__main__":
    sys.exit(main(runs, __doc__, write))
