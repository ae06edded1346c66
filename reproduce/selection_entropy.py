"""Is temperature .9 a choice at all?  Effective sample size and choices of OPUS by temperature and by its unit.

    python -m reproduce.selection_entropy --scale smoke   # both optimizers, two seeds; 2 CPU cores
    python -m reproduce.selection_entropy --scale ci      # under a minute; exercises the code

Writes results/tables/selection_entropy.md: for the three arms of the selector at several stages of a training at
random, how far from uniform they draw at the paper's raw temperature, and how far, and what, at others: raw, in units
of the utilities' spread, and set by the effective sample size.  Beside it the limits for the scores that the paper
prints.  Two figures show the same.  Prints every run first and skips those already in results/runs/.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from opus_bench.figures import OPTIMIZERS, draw_panels, look_of
from opus_bench.selector import ARMS
from opus_bench.tables import NONE, markdown
from opus_bench.validation.selection_entropy import PAPER_SCORES, PAPER_TEMPERATURE, bound, units

from .measurement import Measurement, links, measurements, write_page
from .runner import main
from .scales import SCALES

EXPERIMENT = "selection_entropy"
COMMAND = f"python -m reproduce.{EXPERIMENT}"
SETTINGS = {
    "ci": {"stages": [2, 8], "buffers": 2, "repeats": 2,
           "temperatures": {"raw": [1e-6, 1e-3, PAPER_TEMPERATURE], "spread": [0.5, 2.0], "share": [0.25, 0.75]}},
    "smoke": {"stages": [20, 70, 280], "buffers": 24, "repeats": 4,
              "temperatures": {"raw": [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, PAPER_TEMPERATURE],
                               "spread": [0.125, 0.25, 0.5, 1.0, 2.0, 4.0], "share": [0.125, 0.25, 0.5, 0.75, 0.9]}},
}
SEEDS = {"ci": 1, "smoke": 2}
SHARE = 0.25  # the calibrated arm's; among the shares of every scale
DEVIATIONS = (
    "a small model and a constant learning rate of .02, which the paper's utilities carry twice: their size is its own",
    "the calibrated arm has a proxy of four times the sequences",
)
LABEL = {arm: f"OPUS ({arm})" for arm in ARMS}
PRINTED = "the paper's printed scores"
MEANS = ("value", "total_variation", "log_ratio", "same_as_uniform", "target_gain", "corrupted_gain")
SPREADS = ("target_gain_stderr", "corrupted_gain_stderr")


def runs(options: argparse.Namespace) -> list[Measurement]:
    """One measurement for each optimizer and seed."""
    scale = SCALES[options.scale]
    size = scale.run["proxy_size"]
    settings = {**SETTINGS[options.scale], "window": scale.window, "sketch_width": scale.sketch_width,
                "proxy_sizes": {arm: 4 * size if arm == "calibrated" else size for arm in ARMS}}
    return measurements(options, EXPERIMENT, "opus_bench.validation.selection_entropy:measure", settings,
                        units(settings), SEEDS[options.scale], DEVIATIONS)


def pooled(records: Sequence[dict], step: int, arm: str) -> dict[tuple[str, float], dict[str, float]]:
    """(unit, temperature) -> means over seeds; standard errors of independent seeds: sqrt(sum e^2) / n."""
    found: dict[tuple[str, float], list[dict]] = defaultdict(list)
    for row in (row for record in records for row in record["metrics"]):
        if (row["name"], row["step"], row.get("arm")) == ("effective_share", step, arm):
            found[row["temperature_unit"], row["temperature"]].append(row)
    return {key: {name: math.fsum(row[name] for row in rows) / len(rows) for name in MEANS}
            | {name: math.sqrt(math.fsum(row[name] ** 2 for row in rows)) / len(rows) for name in SPREADS}
            for key, rows in found.items()}


def mean_of(records: Sequence[dict], name: str, **keys: object) -> float:
    """Mean of a named row over seeds."""
    values = [row["value"] for record in records for row in record["metrics"]
              if row["name"] == name and all(row.get(key) == value for key, value in keys.items())]
    return math.fsum(values) / len(values)


def share_cell(share: float) -> str:
    """A share near 1 by what it lacks."""
    return f"1 − {1 - share:.1e}" if 1 - share < 1e-3 else f"{share:.3f}"


def ratio_cell(log_ratio: float) -> str:
    """A ratio of probabilities near 1, from its natural logarithm."""
    return f"1 + {math.expm1(log_ratio):.1e}" if log_ratio < 1e-3 else f"{math.exp(log_ratio):.5g}"


def gain_cell(at: dict[str, float], name: str) -> str:
    """A difference of shares in points, with its standard error."""
    return f"{round(100 * at[name], 1) + 0.0:+.1f} ± {100 * at[name + '_stderr']:.1f}"


def paper_table(groups: dict[str, list[dict]]) -> str:
    """Every optimizer, stage and arm at the paper's temperature, under the limits for the scores it prints."""
    limit = bound(*PAPER_SCORES, PAPER_TEMPERATURE)
    rows = [[PRINTED, NONE, f"{PAPER_SCORES[0]} to {PAPER_SCORES[1]}", f"at most {ratio_cell(limit.log_ratio)}",
             f"at least {share_cell(limit.effective_share)}", f"at most {limit.total_variation:.1e}", NONE]]
    for optimizer, records in groups.items():
        for step in stages_of(records):
            for arm in ARMS:
                at = pooled(records, step, arm)["raw", PAPER_TEMPERATURE]
                rows.append([f"{OPTIMIZERS[optimizer]}, {arm}", str(step),
                             f"spread {mean_of(records, 'utility_std', step=step, arm=arm):.1e}",
                             ratio_cell(at["log_ratio"]), share_cell(at["value"]), f"{at['total_variation']:.1e}",
                             f"{100 * at['same_as_uniform']:.0f} %"])
    header = ["scores of", "updates", "utilities", "largest / smallest probability", "effective sample size, share",
              "total variation from uniform", "selections that uniform draws make too"]
    return markdown(header, rows)


def temperature_table(records: Sequence[dict], step: int) -> str:
    """Every arm, unit and temperature at one stage."""
    rows = [[arm, unit, f"{value:g}", share_cell(at["value"]), f"{at['total_variation']:.2g}",
             f"{100 * at['same_as_uniform']:.0f} %", gain_cell(at, "target_gain"), gain_cell(at, "corrupted_gain")]
            for arm in ARMS for (unit, value), at in pooled(records, step, arm).items()]
    return markdown(["arm", "unit", "temperature", "effective sample size, share", "total variation", "as uniform",
                     "target gain, points", "corrupted gain, points"], rows)


def sentences(groups: dict[str, list[dict]]) -> str:
    """What the rows at the paper's temperature say, which raw temperatures choose at all, and what is gained."""
    limit = bound(*PAPER_SCORES, PAPER_TEMPERATURE)
    lines = [(f"- Scores as the paper prints them, {PAPER_SCORES[0]} to {PAPER_SCORES[1]}, however many and wherever "
             f"between: no candidate is more than {100 * math.expm1(limit.log_ratio):.2f} % likelier than another, and "
             f"no set of candidates has a probability over {100 * limit.total_variation:.3f} points from uniform.")]
    for arm in ARMS:
        tables = {optimizer: [pooled(records, step, arm) for step in stages_of(records)]
                  for optimizer, records in groups.items()}
        paper = [table["raw", PAPER_TEMPERATURE] for of_stage in tables.values() for table in of_stage]
        parts = [(f"at {PAPER_TEMPERATURE:g} the effective sample size is never below "
                 f"{share_cell(min(at['value'] for at in paper))} of the candidates, and at least "
                 f"{100 * min(at['same_as_uniform'] for at in paper):.0f} % of the selections are uniform draws'")]
        for optimizer, (*_, table) in tables.items():
            below = [value for (unit, value), at in table.items() if unit == "raw" and at["value"] < 0.5]
            raw = gain_cell(table["raw", PAPER_TEMPERATURE], "target_gain")
            share = gain_cell(table["share", SHARE], "target_gain")
            parts.append(f"{OPTIMIZERS[optimizer]}, last stage: it is below half "
                         + (f"from raw {max(below):g} down" if below else "at no raw temperature tried")
                         + f", target gain {raw} points at {PAPER_TEMPERATURE:g}, {share} at a share of {SHARE:g}")
        lines.append(f"- {arm}: {'; '.join(parts)}.")
    return "\n".join(lines)


def draw_entropy(groups: dict[str, list[dict]], scale: str, path: Path) -> Path:
    """Effective sample size and total variation against the temperature, raw and in spreads; a row an optimizer."""
    limit, last = bound(*PAPER_SCORES, PAPER_TEMPERATURE), next(iter(groups.values()))
    measured, size = _measured(last), "effective sample size\n(share of candidates left)"
    panels = (("raw", "value", size), ("raw", "total_variation", "total variation\nfrom uniform"),
              ("spread", "value", size))

    def draw(figure, axes) -> None:
        for row, (optimizer, records) in enumerate(groups.items()):
            for column, (unit, name, label) in enumerate(panels):
                axis = axes[row, column]
                for arm in ARMS:
                    x, look = measured["temperatures"][unit], look_of(LABEL[arm], LABEL.values())
                    y = np.array([[pooled(records, step, arm)[unit, value][name] for value in x]
                                  for step in stages_of(records)])
                    axis.plot(x, y[-1], label=f"{arm} arm", marker="o", markersize=2.5, **look)
                    axis.fill_between(x, y.min(0), y.max(0), color=look["color"], alpha=0.15, linewidth=0)
                axis.set_xscale("log")
                if unit == "raw":
                    axis.axvline(PAPER_TEMPERATURE, color="#1a1a1a", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
                    mark = limit.effective_share if name == "value" else limit.total_variation
                    axis.plot([PAPER_TEMPERATURE], [mark], marker="D", markersize=6, color="#1a1a1a", linestyle="",
                              label=PRINTED, zorder=6, clip_on=False)
                if name == "value":
                    axis.set_ylim(0, 1.04)
                else:
                    axis.set_yscale("log")
                    axis.axhspan(axis.get_ylim()[0], limit.total_variation, color="#1a1a1a", alpha=0.08, linewidth=0)
                if unit == "spread":
                    axis.set_xticks(x, [f"{value:g}" for value in x])
                    axis.minorticks_off()
                axis.set_title(OPTIMIZERS[optimizer], loc="left")
                axis.set_ylabel(label)
                if row == len(groups) - 1:
                    axis.set_xlabel(f"temperature, {'raw' if unit == 'raw' else 'in spreads'} (of the utility)")
            axes[row, -1].set_axis_off()
        axes[0, -1].legend(*axes[0, 0].get_legend_handles_labels(), loc="upper left", frameon=False, handlelength=2.6)

    note = (f"Line: after {stages_of(last)[-1]} updates; band: range over {_listed(stages_of(last))} updates. Means of "
            f"{_buffers(last)} buffers. Dashes: the paper's temperature.\nDiamond and grey band: limits at "
            f"{PAPER_TEMPERATURE:g} for any scores of {PAPER_SCORES[0]} to {PAPER_SCORES[1]}, as printed.")
    return draw_panels(path, f"How far from uniform OPUS draws, by temperature ({scale} scale)", note, draw,
                       len(groups), 4, (13.5, 0.8 + 2.7 * len(groups)), width_ratios=(1, 1, 1, 0.62), sharex="col")


def draw_gain(groups: dict[str, list[dict]], scale: str, path: Path) -> Path:
    """What is chosen against the effective sample size; a row an optimizer, a column a kind of text."""
    kinds = (("target_gain", "target domain, chosen\nminus uniform (points)"),
             ("corrupted_gain", "corrupted text, chosen\nminus uniform (points)"))

    def draw(figure, axes) -> None:
        for row, (optimizer, records) in enumerate(groups.items()):
            for column, (name, label) in enumerate(kinds):
                axis = axes[row, column]
                for place, arm in enumerate(ARMS):
                    table, look = pooled(records, stages_of(records)[-1], arm), look_of(LABEL[arm], LABEL.values())
                    found = [at for (unit, _), at in sorted(table.items()) if unit == "share"]
                    axis.errorbar([at["value"] + 0.006 * (place - 1) for at in found], [100 * at[name] for at in found],
                                  [100 * at[f"{name}_stderr"] for at in found], label=f"{arm} arm",
                                  marker="o", markersize=3, elinewidth=0.8, **look)
                    at = table["raw", PAPER_TEMPERATURE]
                    axis.plot([at["value"]], [100 * at[name]], marker="*", markersize=10, linestyle="",
                              color=look["color"], label=f"{arm} arm, raw {PAPER_TEMPERATURE:g}", clip_on=False)
                axis.axhline(0, color="#1a1a1a", linewidth=1, zorder=1)
                axis.set_xlim(0, 1.03)
                axis.set_title(OPTIMIZERS[optimizer], loc="left")
                axis.set_ylabel(label)
                if row == len(groups) - 1:
                    axis.set_xlabel("effective sample size (share of candidates left)")
            axes[row, -1].set_axis_off()
        axes[0, -1].legend(*axes[0, 0].get_legend_handles_labels(), loc="upper left", frameon=False, handlelength=2.6)

    last = next(iter(groups.values()))
    note = (f"After {stages_of(last)[-1]} updates. Share of the chosen minus that of uniform draws with the same "
            f"random numbers.\nMeans of {_buffers(last)} buffers; bars: one standard error. "
            "Points of the three arms are set apart sideways.")
    return draw_panels(path, f"What OPUS chooses, by how far from uniform it draws ({scale} scale)", note, draw,
                       len(groups), 3, (11.5, 0.8 + 2.7 * len(groups)), width_ratios=(1, 1, 0.5))


def _measured(records: Sequence[dict]) -> dict:
    return records[0]["config"]["measured"]


def stages_of(records: Sequence[dict]) -> list[int]:
    return _measured(records)["stages"]


def _buffers(records: Sequence[dict]) -> int:
    return len(records) * _measured(records)["buffers"]


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(str(number) for number in numbers)


def method_text(records: Sequence[dict]) -> str:
    """What is measured, in words, with the settings of the records."""
    config, measured = records[0]["config"], _measured(records)
    size = round(config["selection_ratio"] * config["buffer"])
    sizes = "; ".join(f"{arm} {n}" for arm, n in measured["proxy_sizes"].items())
    return f"""\
A small model is trained on a random half of every buffer. After {_listed(measured['stages'])} updates each arm scores
the same {measured['buffers']} buffers of {config['buffer']} candidates, which training has not come to, over the first
{measured['window']} of {config['length']} tokens (proxy sequences: {sizes}). From each buffer {size} are drawn,
{measured['repeats']} times at every temperature. Shares and distances are of single draws among the candidates left
(one pick), means over all picks; the ratio of probabilities is that of the first draw (with a redundancy term the
utilities move apart once something is selected). "As uniform": share of the selections that are, pick for pick, those
of uniform draws with the same random numbers. Gains: share of the chosen minus share of those uniform draws, in points,
± one standard error over buffers; rows share their random numbers. Temperatures are raw (the temperature divides the
utility, as in the paper), in spreads (standard deviation of a buffer's utilities before anything is selected), or set
in every draw so that the effective sample size is a share of the candidates left."""


def chapter(groups: dict[str, list[dict]], scale: str, folder: Path) -> tuple[list[Path], list[str]]:
    """Figures and text of one scale (`measurement.Chapter`)."""
    figures = [draw(groups, scale, folder / f"{EXPERIMENT}_{name}_{scale}.svg")
               for name, draw in (("temperature", draw_entropy), ("gain", draw_gain))]
    parts = [method_text(next(iter(groups.values()))), *links(figures),
             f"### At the paper's temperature, {PAPER_TEMPERATURE:g}",
             ("Means over buffers and seeds. Spread: standard deviation of a buffer's utilities, in the arm's own "
              "units. The first row holds for any candidates with scores in that range."),
             paper_table(groups), sentences(groups)]
    for optimizer, group in groups.items():
        target, corrupted = (100 * mean_of(group, f"{name}_offered") for name in ("target", "corrupted"))
        parts += [f"### {OPTIMIZERS[optimizer]}, by temperature, after {stages_of(group)[-1]} updates",
                  (f"Means over {_buffers(group)} buffers (seeds: {len(group)}). Of the candidates offered "
                   f"{target:.1f} % are of the target domain and {corrupted:.1f} % corrupted."),
                  temperature_table(group, stages_of(group)[-1])]
    return figures, parts


def write(results_dir: Path) -> list[Path]:
    """The page and its figures, from the records alone."""
    return write_page(results_dir, EXPERIMENT, "Is temperature .9 a choice at all?", COMMAND, chapter)


if __name__ == "__main__":
    sys.exit(main(runs, __doc__, write))
