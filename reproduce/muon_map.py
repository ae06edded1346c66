"""Is the paper's linear map of Muon a preconditioner, and is it Muon?  P_t beside the identity and the real update.

    python -m reproduce.muon_map --scale smoke   # Muon, two seeds; 2 CPU cores
    python -m reproduce.muon_map --scale ci      # under a minute; exercises the code

Writes results/tables/muon_map.md, by kind of matrix and stage of a training at random: the distance of S from a
multiple of the identity, how near S brings the update's direction to the real update, and how near P_t brings the
candidates' gradients and the ranking of the candidates to those under the derivative of the real update, each beside
what leaving S out would give.  A figure shows the same.  Prints every run first and skips those already in
results/runs/.  Muon only: --optimizers adamw is refused.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opus_bench.figures import draw_panels
from opus_bench.tables import markdown
from opus_bench.validation.muon_map import ALL, units

from .measurement import Measurement, links, measurements, write_page
from .runner import main

EXPERIMENT = "muon_map"
COMMAND = f"python -m reproduce.{EXPERIMENT}"
SETTINGS = {"ci": {"stages": [2, 8], "buffers": 2}, "smoke": {"stages": [10, 70, 280], "buffers": 6}}
SEEDS = {"ci": 1, "smoke": 2}
DEVIATIONS = (
    "a small model with a constant learning rate of .02",
    "gradients of whole sequences, as the step takes them, instead of a score window",
)
WHOLE = "all matrices"
# what is compared: without S, with S, and how the two agree
PAIRS = {
    "update": ("identity_update_cosine", "update_cosine", None),
    "direction": ("identity_direction_cosine", "direction_cosine", "frozen_identity_cosine"),
    "rank": ("identity_rank", "rank", "frozen_identity_rank"),
}
GREY, COLOUR = "#7f7f7f", "#0072b2"


def runs(options: argparse.Namespace) -> list[Measurement]:
    """One measurement for each seed.

    Raises:
        ValueError: another optimizer than Muon is asked for.
    """
    others = [name for name in options.optimizers or () if name != "muon"]
    if others:
        raise ValueError(f"muon_map measures under Muon alone, got --optimizers {' '.join(others)}; leave it out")
    settings = SETTINGS[options.scale]
    return measurements(options, EXPERIMENT, "opus_bench.validation.muon_map:measure", settings, units(settings),
                SEEDS[options.scale], DEVIATIONS, ("muon",))


@dataclass(frozen=True)
class Kind:
    """One kind of matrix at one stage: means over matrices and seeds, extremes over them."""

    matrices: int  # rows averaged: matrices of the kind times seeds
    distance: float
    worst: float  # largest distance
    smallest: float  # eigenvalue of S
    largest: float
    top: float  # largest singular value of the momentum over its norm, mean
    values: dict[str, float]  # cosines and rank correlations by name
    stderr: dict[str, float]  # of ALL only: sqrt(sum e^2) / seeds


def kinds(records: Sequence[dict], step: int) -> dict[str, Kind]:
    """Kind of matrix -> what was measured, ending with WHOLE: all matrices as one vector, spectra of all."""
    spectra, agreements = defaultdict(list), defaultdict(list)
    for row in (row for record in records for row in record["metrics"] if row["step"] == step):
        if row["name"] == "distance":
            for kind in (row["kind"], WHOLE):
                spectra[kind].append(row)
        else:
            agreements[WHOLE if row["weight"] == ALL else row["kind"]].append({**row, "direction_cosine": row["value"]})
    found = {}
    for kind in sorted(spectra, key=lambda name: (name == WHOLE, name)):
        parts, rows = spectra[kind], agreements[kind]
        names = rows[0]["stderr"]
        found[kind] = Kind(
            len(parts), _mean([part["value"] for part in parts]), max(part["value"] for part in parts),
            min(part["smallest"] for part in parts), max(part["largest"] for part in parts),
            _mean([part["singular"][-1] for part in parts]),
            {name: _mean([row[name] for row in rows]) for name in names},
            {name: math.sqrt(math.fsum(row["stderr"][name] ** 2 for row in rows)) / len(rows) for name in names},
        )
    return found


def table(records: Sequence[dict], step: int) -> str:
    """One row a kind of matrix."""
    rows = []
    for name, kind in kinds(records, step).items():
        cells = [f"{kind.values[without]:.2f} → {kind.values[with_s]:.2f}" for without, with_s, _ in PAIRS.values()]
        agree = [f"{kind.values[name]:.3f}" for *_, name in PAIRS.values() if name]
        rows.append([name, str(kind.matrices), f"{100 * kind.distance:.1f} % ({100 * kind.worst:.1f} %)",
                     f"{kind.smallest:.2f} to {kind.largest:.2f}", f"{kind.top:.2f}", *cells, *agree])
    header = ["matrices", "n", "distance of S from c I, mean (largest)", "eigenvalues of S", "top singular value of q",
              "update, cosine", "candidates, cosine", "candidates, rank",
              "P with identity, cosine", "P with identity, rank"]
    return markdown(header, rows)


def sentences(records: Sequence[dict]) -> str:
    """What the rows of all matrices say, stage by stage."""
    lines = []
    for step in stages_of(records):
        whole = kinds(records, step)[WHOLE]

        def value(name: str, whole: Kind = whole) -> str:
            return f"{whole.values[name]:.2f} ± {whole.stderr[name]:.2f}"

        lines.append(
            f"- After {step} updates S is {100 * whole.distance:.1f} % of its norm away from a multiple of the "
            f"identity (largest: {100 * whole.worst:.1f} %). On the candidates' gradients P and the identity have a "
            f"cosine of {value('frozen_identity_cosine')} and a rank correlation of {value('frozen_identity_rank')}. "
            f"With the derivative of the real update, P has a cosine of {value('direction_cosine')} (identity: "
            f"{value('identity_direction_cosine')}) and a rank correlation of {value('rank')} (identity: "
            f"{value('identity_rank')}).")
    return "\n".join(lines)


def draw(records: Sequence[dict], scale: str, path: Path) -> Path:
    """Distance of S from c I at every stage; cosines and rank correlations without and with S at the last."""
    steps = stages_of(records)
    last = kinds(records, steps[-1])
    places = range(len(last))
    labels = {"update": "cosine with the real update\nof S x, of x alone",
              "direction": "cosine with J g of a candidate's\nP g, of its g alone",
              "rank": "Spearman with alignments by J,\nof those by P, of plain ones"}

    def panels(figure, axes) -> None:
        first = axes[0, 0]
        for step, marker, shade in zip(steps, "vso^D", ("#9ecae1", "#4292c6", "#08306b", "#000000", "#6a51a3")):
            found = kinds(records, step)
            first.plot([100 * kind.distance for kind in found.values()], places, linestyle="", marker=marker,
                       color=shade, label=f"{step} updates", clip_on=False)
        first.set_xlim(left=0)
        first.set_xlabel("distance of S from c I\n(% of |S|)")
        first.set_yticks(list(places), list(last))
        first.invert_yaxis()
        first.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(steps), frameon=False, fontsize=8.5,
                     handletextpad=0.1, columnspacing=0.8)
        for axis, (name, (without, with_s, _)) in zip(axes[0, 1:], PAIRS.items(), strict=True):
            before, after = ([kind.values[key] for kind in last.values()] for key in (without, with_s))
            axis.hlines(places, before, after, color="#bbbbbb", linewidth=1.2, zorder=2)
            axis.plot(before, places, linestyle="", marker="o", markerfacecolor="white", color=GREY, label="without S")
            axis.plot(after, places, linestyle="", marker="D", markersize=5, color=COLOUR, label="with S")
            axis.set_xlim(min(0.0, *(x - 0.05 for x in (*before, *after))), 1.0)
            axis.set_xlabel(labels[name])
            axis.axvline(0, color="#1a1a1a", linewidth=0.8, zorder=1)
        axes[0, 2].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=8.5,
                          handletextpad=0.1, columnspacing=0.8)

    note = (f"Means over matrices of a kind and {_buffers(records)} buffers; cosines and rank correlations after "
            f"{steps[-1]} updates. {WHOLE}: their gradients as one vector, and the mean distance.\n"
            "x: what the real update orthogonalises; J: derivative of the real update; 1 would be Muon itself.")
    heading = f"The paper's linear map of Muon, beside the identity and Muon ({scale} scale)"
    return draw_panels(path, heading, note, panels, 1, 4, (12.5, 3.6), sharey=True)


def stages_of(records: Sequence[dict]) -> list[int]:
    return records[0]["config"]["measured"]["stages"]


def _buffers(records: Sequence[dict]) -> int:
    return len(records) * records[0]["config"]["measured"]["buffers"]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def method_text(records: Sequence[dict]) -> str:
    """What is measured, in words, with the settings of the records."""
    config, measured = records[0]["config"], records[0]["config"]["measured"]
    return f"""\
The paper replaces Muon's step by P = kappa S with one Newton-Schulz polynomial S = a I + b A + c A², A = q qᵀ, q the
momentum over its norm. The real step puts five such polynomials on x, the momentum with the gradient in it, over its
norm. A small model is trained with Muon on a random half of every buffer; after some updates every matrix is looked at,
with {measured['buffers']} buffers of {config['buffer']} candidates that training has not come to and proxies of
{config['proxy_size']} sequences. In float64.

- distance: |S - c I| / |S| with c = tr S / o, Frobenius. It is small whenever q has one large singular value among many
  small ones, however much S shrinks gradients along that one; the cosines see that.
- update: cosine of S x with the real update at the candidates' mean gradient; without S → with S.
- candidates, cosine: of P g with J g, g a candidate's gradient, J the derivative of the real update at the candidates'
  mean gradient; mean over candidates; without S → with S.
- candidates, rank: Spearman correlation over candidates of the alignments with the proxy's gradient by P with those by
  J; without S → with S.
- P with identity: the same two between P g and kappa g. At 1, S may as well be left out.

Rows are means over the matrices of a kind and seeds (n in all) and over buffers. "{WHOLE}" takes the gradients of all
matrices as one vector, as the utility does; what the real update divides out matrix by matrix, the norm of x, is a
difference there too. Its distance is the mean, eigenvalues are extremes."""


def chapter(groups: dict[str, list[dict]], scale: str, folder: Path) -> tuple[list[Path], list[str]]:
    """Figures and text of one scale (`measurement.Chapter`)."""
    (group,) = groups.values()
    figure = draw(group, scale, folder / f"{EXPERIMENT}_{scale}.svg")
    parts = [method_text(group), *links([figure]),
             f"Over all matrices, ± one standard error over {_buffers(group)} buffers given the models:",
             sentences(group)]
    for step in stages_of(group):
        parts += [f"### After {step} updates", table(group, step)]
    return [figure], parts


def write(results_dir: Path) -> list[Path]:
    """The page and its figures, from the records alone."""
    return write_page(results_dir, EXPERIMENT, "The paper's linear map of Muon: a preconditioner? Muon?",
                      COMMAND, chapter)


if __name__ == "__main__":
    sys.exit(main(runs, __doc__, write))
