"""Does the utility foretell what a real optimizer step does?  Predicted against true one-step changes of the loss.

    python -m reproduce.utility_validity --scale smoke   # both optimizers, one seed; 2 CPU cores
    python -m reproduce.utility_validity --scale ci      # under a minute; exercises the code

Writes results/tables/utility_validity.md, correlations by training stage, step size and size of the set, and two
figures.  Prints every run first and skips those already in results/runs/.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from opus_bench.figures import OPTIMIZERS, draw_panels
from opus_bench.tables import markdown
from opus_bench.validation.agreement import difference_stderr
from opus_bench.validation.utility_validity import PREDICTORS, TARGETS, Settings

from .measurement import Measurement, links, measurements, write_page
from .runner import main

EXPERIMENT = "utility_validity"
COMMAND = f"python -m reproduce.{EXPERIMENT}"
SETTINGS = {
    "ci": {"stages": [2, 8], "set_sizes": [1, 2], "factors": [0.1, 1.0], "sets": 6, "length": 32, "proxy_size": 4,
           "held_out": 4},
    "smoke": {"stages": [70, 280], "set_sizes": [1, 2, 4, 8], "factors": [0.02, 0.1, 0.3, 1.0], "sets": 24,
              "length": 64, "proxy_size": 8, "held_out": 16},
}
SIGNIFICANT = 3.0  # standard errors of the difference to "alignment"
ROUNDING = 1e-6  # of a sum of z: predictors that differ by no more are the same one
DEVIATIONS = ("not an experiment of the paper: single steps from one state, each discarded",)
LOOKS = {  # of the predictors drawn: colour, dashes, width
    "alignment": ("#0072b2", (), 2.2),
    "alignment, blocks": ("#0072b2", (2, 2), 1.4),
    "no P_t": ("#7f7f7f", (), 1.4),
    "adjoint": ("#009e73", (), 2.0),
    "paper's U": ("#cc79a7", (), 2.0),
    "H = I": ("#e69f00", (5, 2), 1.4),
    "measured h": ("#d55e00", (1.5, 1.5), 1.8),
    "real step, order 2": ("#000000", (4, 3), 1.2),
}


def runs(options: argparse.Namespace) -> list[Measurement]:
    """One measurement for each optimizer and seed."""
    settings = SETTINGS[options.scale]
    return measurements(options, EXPERIMENT, f"opus_bench.validation.{EXPERIMENT}:measure", settings,
                Settings(**settings).units, 1, DEVIATIONS)


class Estimate(NamedTuple):
    """One correlation over seeds, with its standard error."""

    value: float
    stderr: float
    differs: bool  # from that of "alignment", over the same sets


def pooled_correlation(rows: Sequence[dict], name: str, base: Sequence[dict]) -> Estimate:
    """Over seeds by the mean of Fisher's z; stderr is (1 - r^2) times that of the mean.

    Whether it differs from ``base``, the rows of "alignment", is asked of Pearson's alone, over the same sets.
    """
    r = math.tanh(math.fsum(_z(row[name]) for row in rows) / len(rows))
    variances = [(1 + row[name] ** 2 / 2 if name == "spearman" else 1) / (row["sets"] - 3) for row in rows]
    gap = math.fsum(_z(row["value"]) - _z(b["value"]) for row, b in zip(rows, base, strict=True))
    noise = math.fsum(difference_stderr(row["value"], b["value"], row["with_alignment"], row["sets"]) ** 2
                      for row, b in zip(rows, base, strict=True))
    differs = name == "value" and abs(gap) > max(SIGNIFICANT * math.sqrt(noise), ROUNDING)
    return Estimate(r, (1 - r**2) * math.sqrt(math.fsum(variances)) / len(rows), differs)


def _z(r: float) -> float:
    return math.atanh(max(-1 + 1e-12, min(1 - 1e-12, r)))


def correlations(records: Sequence[dict]) -> dict[tuple, list[dict]]:
    """Rows over seeds by (updates, set size, s, target, predictor), of one optimizer's records."""
    found = defaultdict(list)
    for row in _where(records, name="pearson"):
        found[row["step"], row["set_size"], row["factor"], row["target"], row["predictor"]].append(row)
    return found


def pearson(found: dict, step: int, size: int, s: float, target: str, name: str, which: str = "value") -> Estimate:
    """Pearson's correlation ("value") or "spearman", over seeds."""
    return pooled_correlation(found[step, size, s, target, name], which, found[step, size, s, target, "alignment"])


def grid(records: Sequence[dict], cell: Callable[[int, int, float, str], str]) -> str:
    """A table of stage, set size and step size by predictor."""
    return markdown(["updates", "set size", "s", *PREDICTORS],
                    [[*map(str, key), *(cell(*key, name) for name in PREDICTORS)] for key in _cells(records)])


def correlation_table(records: Sequence[dict], target: str) -> str:
    """Pearson +- standard error, and Spearman."""
    found = correlations(records)

    def cell(step: int, size: int, s: float, name: str) -> str:
        r, rank = (pearson(found, step, size, s, target, name, which) for which in ("value", "spearman"))
        return f"{r.value:.3f} ± {r.stderr:.3f}{'*' if r.differs else ''} / {rank.value:.2f}"

    return grid(records, cell)


def slope_table(records: Sequence[dict]) -> str:
    """Slope of the true decrease of the proxy's loss on the predicted, mean over seeds, +- standard error."""
    found = correlations(records)

    def cell(step: int, size: int, s: float, name: str) -> str:
        rows = found[step, size, s, "proxy", name]
        stderr = math.sqrt(math.fsum(row["slope_stderr"] ** 2 for row in rows)) / len(rows)
        return f"{_mean(rows, 'slope'):.3g} ± {stderr:.2g}"

    return grid(records, cell)


def steps_table(records: Sequence[dict]) -> str:
    """What the real steps do to the losses, and how training's own step agrees; means over seeds."""
    rows = []
    for step, size, s in _cells(records):
        for target in TARGETS:
            keys = {"step": step, "set_size": size, "factor": s, "target": target}
            done, own = (_where(records, name=name, **keys) for name in ("decrease", "as trained"))
            cells = [*(f"{_mean(done, name):.3g}" for name in ("value", "spread", "momentum_alone")),
                     f"{100 * _mean(done, 'clipped'):.0f} %"]
            cells.append(f"{_mean(own, 'value'):.4f}, {_mean(own, 'error'):.2g}" if own else "–")
            rows.append([str(step), str(size), f"{s:g}", target, *cells])
    return markdown(["updates", "set size", "s", "loss of", "mean decrease (nat/token)", "spread over sets (nat/token)",
                     "by momentum alone (nat/token)", "sets clipped", "step as trained: Pearson, error / spread"], rows)


def curvature_table(records: Sequence[dict]) -> str:
    """d^T H d / |d|^2 of the proxy's loss by stage and direction; means over seeds."""
    rows = []
    for step in _measured(records)["stages"]:
        for layers in ("all", "blocks"):
            h = _mean(_where(records, name="curvature", step=step, along="mean update", layers=layers), "value")
            rows.append([str(step), f"candidates' mean update P_t g, {layers}", f"{h:.3g}", "–"])
        for size in _measured(records)["set_sizes"]:
            own = _where(records, name="curvature", step=step, along="real step", set_size=size)
            rows.append([str(step), f"real steps of sets of {size}", f"{_mean(own, 'value'):.3g}",
                         f"{min(r['lowest'] for r in own):.3g} to {max(r['highest'] for r in own):.3g}"])
    return markdown(["updates", "direction", "curvature (H = I: 1)", "range over sets"], rows)


def sentences(records: Sequence[dict]) -> str:
    """The questions that the tables answer, with the last stage's numbers."""
    found, cells = correlations(records), _cells(records)
    (_, one, low), (step, most, high) = cells[0], cells[-1]

    def say(names: Sequence[str], target: str) -> str:
        said = [(name, pearson(found, step, most, high, target, name)) for name in names]
        return "; ".join(f"{name} {r.value:.2f} ± {r.stderr:.2f}{'*' if r.differs else ''}" for name, r in said)

    ranks = [pearson(found, step, k, s, "proxy", "alignment", "spearman") for k in (one, most) for s in (low, high)]
    spearman = [f"{e.value:.2f} ± {e.stderr:.2f}" for e in ranks]
    names = list(PREDICTORS)
    return f"""\
After {step} updates:

- Step size. Spearman of alignment with the true decrease of the proxy's loss, sets of {one}: {spearman[0]}
  at s = {low:g} and {spearman[1]} at s = {high:g}; sets of {most}: {spearman[2]} and {spearman[3]}.
- First-order term. Pearson with the same, sets of {most}, s = {high:g}: {say(names[:4], "proxy")}.
- With redundancy: {say(names[4:8], "proxy")}.
- From the real step itself: {say(names[8:], "proxy")}.
- The same for held-out text: {say(names, "held-out")}."""


def draw(groups: dict[str, list[dict]], scale: str, by: str, path: Path) -> Path:
    """Pearson by "factor" (largest sets) or by "set_size" (largest s); a row an optimizer, a column a target."""
    first = next(iter(groups.values()))
    measured, (step, size, high) = _measured(first), _cells(first)[-1]
    across = measured["factors" if by == "factor" else "set_sizes"]

    def panels(figure, axes) -> None:
        for row, (optimizer, records) in enumerate(groups.items()):
            found = correlations(records)
            for axis, target in zip(axes[row], TARGETS, strict=False):
                for shift, (name, (colour, dashes, width)) in enumerate(LOOKS.items()):
                    cells = [pearson(found, step, *((size, x) if by == "factor" else (x, high)), target, name)
                             for x in across]
                    at = [x * 1.012 ** (shift - len(LOOKS) / 2) for x in across]  # so that bars stand side by side
                    axis.errorbar(at, *([e[i] for e in cells] for i in (0, 1)), label=name, color=colour,
                                  linestyle=(0, dashes) if dashes else "-", linewidth=width, elinewidth=0.7)
                axis.set_xscale("log")
                axis.set_xticks(across, [f"{x:g}" for x in across])
                axis.minorticks_off()
                axis.axhline(0, color="#1a1a1a", linewidth=0.8)
                axis.set_title(f"{OPTIMIZERS[optimizer]}, {target} loss")
                if row == len(groups) - 1:
                    axis.set_xlabel("step size s (share of the rate)" if by == "factor" else "samples in the set")
            axes[row, 0].set_ylabel("Pearson of predicted\nand true decrease")
            axes[row, -1].set_axis_off()
        axes[0, -1].legend(*axes[0, 0].get_legend_handles_labels(), loc="upper left", frameon=False, handlelength=2.6)

    fixed = f"Sets of {size}" if by == "factor" else f"s = {high:g}"
    note = (f"{fixed}, after {step} updates. Over {measured['sets'] * len(first)} sets; bars: one standard error. "
            "All predictors see the same sets.")
    heading = f"Does the utility foretell a real step? By {'step' if by == 'factor' else 'set'} size ({scale} scale)"
    return draw_panels(path, heading, note, panels, len(groups), 3, (11.0, 0.8 + 2.8 * len(groups)), sharey="row",
                       width_ratios=(1, 1, 0.6))


def method_text(record: dict) -> str:
    """What is measured, in words, with the settings of a record."""
    config, measured = record["config"], record["config"]["measured"]
    lines = "\n".join(f"- {name}: {formula}" for name, formula in PREDICTORS.items())
    return f"""\
A small model is trained on a random half of every buffer, sequences of {config["length"]} tokens. At each stage
{measured["sets"]} disjoint sets of candidates, {measured["length"]} tokens each that training has not met, are
trained on for one step of the real optimizer with its live momentum, the gradient clipped at norm {config["clip"]:g}
as in training and all learning rates multiplied by s; the step is then discarded. True decreases are of the mean loss
(nat/token) of the proxy batch ({measured["proxy_size"]} sequences) and of {measured["held_out"]} held-out sequences of
the target. Predictors, with g_S the set's mean gradient, k its size, g the proxy's gradient, u_z = P_t g_z, Phi what
the real step subtracts, h the measured curvature along P_t g:

{lines}

"All weights" are all that is trained, embedding and head too. Steps are taken in float64, Muon's orthogonalisation
too; the last column of the table of steps compares training's own step, in float32 and for Muon bfloat16. What a step
on momentum alone would do is the same for every set: it changes no correlation and no slope, and is listed."""


def section(name: str, records: Sequence[dict]) -> list[str]:
    """What one optimizer's records say."""
    count = _measured(records)["sets"] * len(records)
    caption = (f"Pearson ± standard error / Spearman over {count} sets, {len(records)} seed(s); Fisher's z. A star: "
               f"differs from alignment by more than {SIGNIFICANT:g} standard errors (Meng, Rosenthal and Rubin).")
    size = ("Slope of the true decrease of the proxy's loss on the predicted one: 1 where the size is right. The "
            "paper's U is not in nat/token of a mean step.")
    steps = ("What the real steps do; spread: standard deviation over sets. Last column, largest sets: Pearson of the "
             "decreases with those of training's own step, and their root mean square difference over the spread.")
    return [
        f"### {name}", sentences(records),
        f"**{name}: decrease of the proxy's loss.** {caption}", correlation_table(records, "proxy"),
        f"**{name}: decrease of the held-out loss.** {caption}", correlation_table(records, "held-out"),
        f"**{name}: size.** {size}", slope_table(records), f"**{name}: steps.** {steps}", steps_table(records),
        f"**{name}: curvature** d^T H d / |d|^2 of the proxy's loss; H = I says 1.", curvature_table(records),
    ]


def chapter(groups: dict[str, list[dict]], scale: str, folder: Path) -> tuple[list[Path], list[str]]:
    """Figures and text of one scale (`measurement.Chapter`)."""
    figures = [draw(groups, scale, by, folder / f"{EXPERIMENT}_{by}_{scale}.svg") for by in ("factor", "set_size")]
    return figures, [method_text(next(iter(groups.values()))[0]), *links(figures),
                     *(part for optimizer, group in groups.items() for part in section(OPTIMIZERS[optimizer], group))]


def write(results_dir: Path) -> list[Path]:
    """The page and its figures, from the records alone."""
    return write_page(results_dir, EXPERIMENT, "Does the utility foretell what a real optimizer step does?",
                      COMMAND, chapter)


def _measured(records: Sequence[dict]) -> dict:
    return records[0]["config"]["measured"]


def _cells(records: Sequence[dict]) -> list[tuple[int, int, float]]:
    return list(itertools.product(*(_measured(records)[name] for name in ("stages", "set_sizes", "factors"))))


def _where(records: Sequence[dict], **keys: object) -> list[dict]:
    return [row for record in records for row in record["metrics"]
            if all(row.get(key) == value for key, value in keys.items())]


def _mean(rows: Sequence[dict], name: str) -> float:
    return math.fsum(row[name] for row in rows) / len(rows)


if __name__ == "__main__":
    sys.exit(main(runs, __doc__, write))
