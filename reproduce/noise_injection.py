"""Which selectors keep bad text out?  Five kinds of noise are put into clean buffers, and what is kept is counted.

    python -m reproduce.noise_injection --scale smoke   # about 5 min, 2 CPU cores
    python -m reproduce.noise_injection --scale ci      # under a minute; exercises the code

Writes results/tables/noise_injection.md with the share of the choice that is noise and the detection AUC of every
selector's score, and two figures of the same.  Prints every run first and skips those already in results/runs/.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opus_bench.figures import OPTIMIZERS, draw_panels, look_of
from opus_bench.tables import markdown
from opus_bench.validation.noise_injection import Settings
from opus_bench.validation.noise_kinds import KINDS

from .measurement import Measurement, links, measurements, write_page
from .noise_selectors import LABELS
from .runner import main
from .scales import SCALES

EXPERIMENT = "noise_injection"
COMMAND = f"python -m reproduce.{EXPERIMENT}"
SETTINGS = {
    "ci": {"stages": [2, 8], "candidates": 10, "buffers": 2, "repeats": 2},
    "smoke": {"stages": [70, 280], "candidates": 20, "buffers": 16, "repeats": 4},
}
SEEDS = {"ci": 1, "smoke": 2}
SIGNIFICANT = 3.0  # standard errors: of 45 comparisons a page makes with each optimizer, .1 are beyond by chance
DEVIATIONS = (
    "not an experiment of the paper: noise of known kind and share is put into clean text",
    "the static classifier is trained here on the proxy split and reads whole sequences; others read the score window",
)
ARROWS = {1: " ↑", 0: "", -1: " ↓"}


def runs(options: argparse.Namespace) -> list[Measurement]:
    """One measurement for each optimizer and seed."""
    scale = SCALES[options.scale]
    selectors = {"window": scale.window, "sketch_width": scale.sketch_width,
                 "calibrated_proxy": 4 * scale.run["proxy_size"]}
    settings = {"shares": [0.1, 0.2, 0.3, 0.5], "kinds": list(KINDS), "span": 8, "gap": 4,
                **SETTINGS[options.scale], "selectors": selectors}
    return measurements(options, EXPERIMENT, "reproduce.noise_selectors:measure", settings, Settings(**settings).units,
                SEEDS[options.scale], DEVIATIONS)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds of means over buffers, with its standard error."""

    value: float
    stderr: float

    def beyond(self, reference: float) -> int:
        """+1 or -1 where it lies more than SIGNIFICANT standard errors above or below, else 0."""
        difference = self.value - reference
        return 0 if abs(difference) <= SIGNIFICANT * self.stderr else 1 if difference > 0 else -1


def pooled(rows: Sequence[dict]) -> Estimate:
    """Of independent estimates x_i +- e_i of different seeds: mean x_i +- sqrt(sum e_i^2) / n."""
    return Estimate(math.fsum(row["value"] for row in rows) / len(rows),
                    math.sqrt(math.fsum(row["stderr"] ** 2 for row in rows)) / len(rows))


def estimates(records: Sequence[dict], name: str, step: int) -> dict[tuple[str, str, float], Estimate]:
    """(selector, kind, share offered) -> estimate, of one optimizer's records at one stage."""
    found = defaultdict(list)
    for record in records:
        for row in record["metrics"]:
            if row["name"] == name and row["step"] == step:
                found[row["selector"], row["kind"], row["offered"]].append(row)
    return {key: pooled(rows) for key, rows in found.items()}


def stages_of(records: Sequence[dict]) -> list[int]:
    """Steps after which was measured."""
    return list(records[0]["config"]["measured"]["stages"])


def auc_table(records: Sequence[dict], step: int) -> str:
    """Selector by kind: detection AUC +- standard error."""
    found = estimates(records, "detection_auc", step)
    kinds = records[0]["config"]["measured"]["kinds"]
    by_cell = {(selector, kind): value for (selector, kind, _), value in found.items()}
    rows = []
    for selector in LABELS:
        cells = [by_cell.get((selector, kind)) for kind in kinds]
        rows.append([selector, *("no score: .5" if e is None else
                                 f"{e.value:.3f} ± {e.stderr:.3f}{'*' if e.beyond(0.5) else ''}" for e in cells)])
    return markdown(["selector", *kinds], rows)


def kept_table(records: Sequence[dict], step: int) -> str:
    """Kind and share offered by selector: % of the chosen that is injected, +- standard error."""
    found = estimates(records, "kept_share", step)
    measured = records[0]["config"]["measured"]

    def cell(e: Estimate, share: float) -> str:
        return f"{100 * e.value:.1f} ± {100 * e.stderr:.1f}{ARROWS[e.beyond(share)]}"

    rows = [[kind, f"{100 * share:.0f} %", *(cell(found[selector, kind, share], share) for selector in LABELS)]
            for kind in measured["kinds"] for share in measured["shares"]]
    return markdown(["noise", "offered", *LABELS], rows)


def sentences(records: Sequence[dict], step: int) -> str:
    """For each selector the kinds that it lets through more, less and as much as offered, mean over the shares.

    Then those of the first and last sort that its score ranks below clean text all the same.
    """
    excess, area = ({key[:2]: value for key, value in estimates(records, name, step).items()}
                    for name in ("kept_excess", "detection_auc"))
    kinds = records[0]["config"]["measured"]["kinds"]
    lines = []
    for selector in LABELS:
        parts = []
        for sign, words in ((1, "more than offered"), (-1, "less than offered"),
                            (0, "not told apart from what is offered")):
            those = [f"{kind} ({round(100 * excess[selector, kind].value, 1) + 0.0:+.1f})" for kind in kinds
                     if excess[selector, kind].beyond(0.0) == sign]
            if those:
                parts.append(f"{words}: {', '.join(those)}")
        seen = [f"{kind} (AUC {area[selector, kind].value:.2f})" for kind in kinds
                if (selector, kind) in area and area[selector, kind].beyond(0.5) == 1
                and excess[selector, kind].beyond(0.0) >= 0]
        if seen:
            parts.append(f"seen by its score, but not kept out: {', '.join(seen)}")
        lines.append(f"- {selector}: {'; '.join(parts)}.")
    return "\n".join(lines)


def draw_kept(groups: dict[str, list[dict]], scale: str, path: Path) -> Path:
    """Share of the choice that is injected against the share offered; a row an optimizer, a panel a kind."""
    kinds = next(iter(groups.values()))[0]["config"]["measured"]["kinds"]

    def draw(figure, axes) -> None:
        for row, (optimizer, records) in enumerate(groups.items()):
            found = estimates(records, "kept_share", stages_of(records)[-1])
            shares = records[0]["config"]["measured"]["shares"]
            for column, kind in enumerate(kinds):
                axis = axes[row, column]
                for selector in LABELS:
                    cells = [found[selector, kind, share] for share in shares]
                    look = look_of(selector, LABELS)
                    axis.errorbar([100 * share for share in shares], [100 * e.value for e in cells],
                                  [100 * e.stderr for e in cells], label=selector, elinewidth=0.7,
                                  zorder=5 - look["linewidth"], **look)  # thin ones above, where they coincide
                axis.set_title(kind if row == 0 else "")
                axis.set_xticks([100 * share for share in shares])
                if row == len(groups) - 1:
                    axis.set_xlabel("offered (% of buffer)")
            axes[row, 0].set_ylabel(f"{OPTIMIZERS[optimizer]}\nnoise kept (% of choice)")
            axes[row, -1].set_axis_off()
        axes[0, -1].legend(*axes[0, 0].get_legend_handles_labels(), loc="upper left", frameon=False, handlelength=2.6)

    last = next(iter(groups.values()))
    count = last[0]["config"]["measured"]["buffers"] * len(last)
    note = (f"After {stages_of(last)[-1]} updates. Mean over {count} buffers; bars: one standard error. "
            "Random keeps what is offered; below it, noise is kept out.\n"
            "Selectors draw with the same random numbers: where two draw alike, their lines coincide.")
    return draw_panels(path, f"Injected noise that each selector keeps ({scale} scale)", note, draw, len(groups),
                       len(kinds) + 1, (14.5, 0.8 + 2.7 * len(groups)), sharey="row")


def draw_auc(groups: dict[str, list[dict]], scale: str, path: Path) -> Path:
    """Detection AUC of each selector's score by kind, as a heat table; a row an optimizer, a column a stage."""
    first = next(iter(groups.values()))
    kinds, steps = first[0]["config"]["measured"]["kinds"], stages_of(first)
    names = LABELS[1:]

    def draw(figure, axes) -> None:
        for row, (optimizer, records) in enumerate(groups.items()):
            for column, step in enumerate(steps):
                axis = axes[row, column]
                found = {key[:2]: e.value for key, e in estimates(records, "detection_auc", step).items()}
                values = np.array([[found[selector, kind] for kind in kinds] for selector in names])
                axis.pcolormesh(values, cmap="PuOr", vmin=0, vmax=1, edgecolors="white", linewidth=1.5)
                for (y, x), value in np.ndenumerate(values):
                    axis.text(x + 0.5, y + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=9,
                              color="white" if abs(value - 0.5) > 0.28 else "#1a1a1a")
                axis.set_xticks(np.arange(len(kinds)) + 0.5, kinds, rotation=20, ha="right", rotation_mode="anchor")
                axis.set_yticks(np.arange(len(names)) + 0.5, names if column == 0 else [])
                axis.tick_params(length=0)
                axis.grid(False)
                axis.spines[:].set_visible(False)
                axis.invert_yaxis()
                axis.set_title(f"{OPTIMIZERS[optimizer]}, after {step} updates", loc="left")

    note = ("Probability that a random clean sequence scores higher than a random injected one: 1 (purple) noise is "
            "always last,\n.5 (white) the score does not see it, 0 (orange) noise is always first. "
            "Random has no score.")
    return draw_panels(path, f"Detection AUC of each selector's score ({scale} scale)", note, draw, len(groups),
                       len(steps), (2.0 + 4.2 * len(steps), 0.8 + 3.3 * len(groups)))


def chapter(groups: dict[str, list[dict]], scale: str, folder: Path) -> tuple[list[Path], list[str]]:
    """Figures and text of one scale (`measurement.Chapter`)."""
    figures = [draw(groups, scale, folder / f"{EXPERIMENT}_{name}_{scale}.svg")
               for name, draw in (("kept", draw_kept), ("auc", draw_auc))]
    return figures, [method_text(next(iter(groups.values()))[0]), *links(figures),
                     *(part for optimizer, group in groups.items() for part in section(OPTIMIZERS[optimizer], group))]


def write(results_dir: Path) -> list[Path]:
    """The page and its figures, from the records alone."""
    return write_page(results_dir, EXPERIMENT, "Noise put into clean text: who lets it through?", COMMAND, chapter)


def method_text(record: dict) -> str:
    """What is measured, in words, with the settings of a record."""
    config, measured = record["config"], record["config"]["measured"]
    options, size = measured["selectors"], round(config["selection_ratio"] * measured["candidates"])
    return f"""\
A small model is trained on a random half of every buffer. Then buffers of {measured["candidates"]} clean sequences of
{config["length"]} tokens (edited prose and documentation, of the candidates that training would come to next) have some
of their sequences replaced by noise, and each selector chooses {size}. Kinds of noise:

- random tokens: uniform over the vocabulary
- shuffled: the tokens of the sequence in random order
- repeated: {measured["span"]} consecutive tokens of the sequence, over and over
- markup: an HTML tag before every {measured["gap"]} tokens of the text, cut to length; inserted by rule, since not
  every corpus has a domain of markup
- foreign: a sequence of the corpus' foreign domain in its place

The model and the static classifier have met some of this: the training pool holds foreign text, and documents with
shuffled, random or repeated words. Online selectors score the first {options["window"]} tokens against proxies of
{config["proxy_size"]} sequences ({options["calibrated_proxy"]} for the calibrated arm); the static classifier reads the
whole sequence, and its threshold is the pool's median as it was before anything was injected."""


def section(name: str, records: Sequence[dict]) -> list[str]:
    """Tables of one optimizer, and the sentences that they bear out."""
    measured, steps = records[0]["config"]["measured"], stages_of(records)
    n, pool = len(records), len(records) * measured["buffers"]
    top = 100 * measured["shares"][-1]
    parts = [f"### {name}"]
    parts += [f"Share of noise in the choice minus share offered, in points, mean over the shares offered, after "
              f"{steps[-1]} updates; told apart where it is more than {SIGNIFICANT:g} standard errors from zero, as an "
              "AUC where it is that far from .5:",
              sentences(records, steps[-1])]
    for step in steps:
        parts += [f"Detection AUC after {step} updates, with {top:.0f} % injected: the probability that a random clean "
                  "sequence of a buffer scores higher than a random injected one of it, ties counting half; 1 is "
                  f"perfect, .5 blind, below .5 noise is preferred. Mean ± standard error over {pool} buffers "
                  f"({n} seed{'s' if n > 1 else ''}; given the models). `*`: more than {SIGNIFICANT:g} standard errors "
                  "from .5.", auc_table(records, step)]
    parts += [f"Share of each selector's choice that is noise, %, after {steps[-1]} updates, by the share offered. "
              f"Mean ± standard error over {pool} buffers, {measured['repeats']} choices from each (alike for "
              f"selectors that draw nothing). ↑, ↓: more than {SIGNIFICANT:g} standard errors above or below what is "
              "offered.",
              kept_table(records, steps[-1])]
    return parts


if __name__ == "__main__":
    sys.exit(main(runs, __doc__, write))
