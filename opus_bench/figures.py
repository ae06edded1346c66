"""Figures as SVG files: pure functions of arrays, the same bytes for the same arrays.

Text stays text, the background is opaque white (readable on a dark page), colours are Okabe and
Ito's and never the only difference between lines. A band is the 95 % t interval over seeds, or the
range of the seeds (fewer than three, or a quantity that cannot leave [0, 1]); the figure says which.
"""
from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from opus_bench.site.values import describe
from opus_bench.statistics import SMALLEST_N, mean_interval

OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon", "sgd": "SGD"}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "opus-bench",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "text.color": "#1a1a1a",
}
# Pattern of a label, colour, dashes, width: a family shares a colour where its members differ by dashes.
LINES = (
    (r"^random$", "#000000", (4, 3), 1.5),
    (r"^(?=.*(ppl|perplex))(?!.*(mid|low))", "#e69f00", (), 1.4),
    (r"^(?=.*(ppl|perplex)).*mid", "#e69f00", (5, 2), 1.4),
    (r"^(?=.*(ppl|perplex)).*low", "#e69f00", (1.5, 1.5), 1.4),
    (r"^greats", "#d55e00", (), 1.4),
    (r"static|quality", "#009e73", (), 1.4),
    (r"opus.*paper", "#cc79a7", (), 1.6),
    (r"opus.*released", "#56b4e9", (), 2.2),
    (r"opus.*calibrated", "#0072b2", (), 2.4),
)
OTHER_COLOURS = ("#7f7f7f", "#8c6d1f", "#5e3c99")
BASE = "Random"


def title_of(key: str) -> str:
    """An optimizer, with what follows a comma, as a panel's title."""
    optimizer, *rest = key.split(", ", 1)
    return ", ".join([OPTIMIZERS.get(optimizer, optimizer), *rest])


LEVELS = (-3, -2, -1, -0.5, -0.25, 0.25, 0.5, 1, 2, 3)


@dataclass(frozen=True)
class Curves:
    """One line per seed: x (points) and y (seeds, points)."""

    x: np.ndarray
    y: np.ndarray


def draw_losses(
    losses: Mapping[str, Mapping[str, Curves | None]],
    gaps: Mapping[str, Mapping[str, Curves | None]],
    target: str,
    title: str,
    path: Path,
) -> Path:
    """Validation loss by update tokens, and beneath it the paired difference to Random.

    Args:
        losses, gaps: optimizer -> label -> curves, nat/token by update tokens.
    """

    def draw(figure: Figure, axes: np.ndarray) -> None:
        for column, optimizer in enumerate(losses):
            top, bottom = axes[0, column], axes[1, column]
            _lines(top, losses[optimizer], losses[optimizer])
            bottom.axhline(0, zorder=4, **look_of(BASE, [BASE]))
            _lines(bottom, gaps[optimizer], losses[optimizer], band=_interval)
            top.set_title(title_of(optimizer))
            bottom.set_xlabel("update tokens")
            bottom.xaxis.set_major_formatter(EngFormatter(sep=""))
            bottom.xaxis.set_major_locator(MaxNLocator(5))
        axes[0, 0].set_ylabel(f"validation loss on\n{target} (nat/token)")
        axes[1, 0].set_ylabel("minus Random's,\nsame seed (nat/token)")

    heading = f"Target loss by update tokens ({title})"
    return _figure(path, heading, _band_note(gaps), losses, draw, ratios=(1, 1.5), height=6.0)


def draw_uniformity(
    steps: Mapping[str, Mapping[str, Mapping[str, Curves | None]]], title: str, path: Path
) -> Path:
    """Effective sample size and total variation by step: how far from uniform each selector chose.

    Args:
        steps: optimizer -> "effective_sample_size" | "total_variation" -> label -> curves by step.
    """
    sizes = {optimizer: panels["effective_sample_size"] for optimizer, panels in steps.items()}
    absent = [label for label in _labels(sizes) if all(panel.get(label) is None for panel in sizes.values())]

    def draw(figure: Figure, axes: np.ndarray) -> None:
        for column, (optimizer, panels) in enumerate(steps.items()):
            top, bottom = axes[0, column], axes[1, column]
            _lines(top, panels["effective_sample_size"], sizes[optimizer], band=_range)
            _lines(bottom, panels["total_variation"], sizes[optimizer], band=_range)
            for axis in (top, bottom):
                axis.set_ylim(-0.04, 1.06)
            top.set_title(title_of(optimizer))
            bottom.set_xlabel("step")
            bottom.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes[0, 0].set_ylabel("effective sample size\n(share of the buffer)")
        axes[1, 0].set_ylabel("total variation\nfrom uniform")

    note = "Line: mean over seeds. Band: their range. Of many steps some are drawn."
    if absent:
        note += f"\nNo probabilities, so no line (they choose deterministically): {', '.join(absent)}."
    heading = f"How far from uniform each selector chose ({title})"
    return _figure(path, heading, note, sizes, draw, ratios=(1, 1), height=5.2, hidden=absent)


def draw_domains(
    shares: Mapping[str, tuple[list[str], Mapping[str, list[float]], Mapping[str, list[float]]]],
    title: str,
    path: Path,
) -> Path:
    """What each selector chose by domain: the number is the share chosen, the colour its ratio to the share offered.

    Args:
        shares: optimizer -> (domains, offered share by label, chosen share by label).
    """
    widest = max(len(domains) for domains, _, _ in shares.values())
    tallest = max(len(chosen) for _, _, chosen in shares.values())
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(max(7.0, 2.6 + 0.72 * widest), 1.9 + len(shares) * (1.25 + 0.34 * tallest)))
        axes = figure.subplots(len(shares), 1, squeeze=False)[:, 0]
        colours = matplotlib.colormaps["PuOr_r"].resampled(len(LEVELS) + 1)
        norm = BoundaryNorm(LEVELS, colours.N, extend="both")
        for axis, (optimizer, (domains, offered, chosen)) in zip(axes, shares.items(), strict=True):
            labels = list(chosen)
            names = ["offered", *labels]
            first = np.nanmean(np.array([offered[label] for label in labels]), axis=0)
            share = np.array([chosen[label] for label in labels])
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = np.log2(share / np.array([offered[label] for label in labels]))
            ratio = np.nan_to_num(np.vstack([np.zeros_like(first), ratio]), nan=0.0, neginf=-9.0, posinf=9.0)
            mesh = axis.pcolormesh(ratio, cmap=colours, norm=norm, edgecolors="white", linewidth=1.5)
            for row, values in enumerate([first, *share]):
                for column, value in enumerate(values):
                    dark = not -1 <= ratio[row, column] <= 2
                    text = "" if math.isnan(value) else f"{100 * value:.1f}" if value < 0.0995 else f"{100 * value:.0f}"
                    axis.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=9,
                              color="white" if dark else "#1a1a1a")
            axis.axhline(1, color="#1a1a1a", linewidth=1.2)
            axis.set_yticks(np.arange(len(names)) + 0.5, names)
            axis.set_xticks(np.arange(len(domains)) + 0.5, domains, rotation=25, ha="right", rotation_mode="anchor")
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
            axis.invert_yaxis()
            axis.set_title(title_of(optimizer), loc="left")
        figure.suptitle(f"What each selector chose, % of its samples by domain ({title})", fontsize=11)
        figure.tight_layout()
        bar = figure.colorbar(mesh, ax=axes, extend="both", shrink=0.85, pad=0.02, aspect=32)
        bar.set_ticks(list(LEVELS), labels=[_times(level) for level in LEVELS])
        bar.set_label("chosen share over offered share")
        return _save(figure, path)


def _times(level: float) -> str:
    return f"{2.0**level:.2g}×"


def _labels(panels: Mapping[str, Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(label for panel in panels.values() for label in panel))


def look_of(label: str, labels: Iterable[str]) -> dict:
    """Colour, dashes and width of a label; those of no known method take the spare colours in order."""
    known = {
        name: next((line for line in LINES if re.search(line[0], name.lower())), None) for name in labels
    }
    if known.get(label):
        _, colour, dashes, width = known[label]
    else:
        spare = [name for name, line in known.items() if line is None]
        position = spare.index(label) if label in spare else 0
        colour, dashes, width = OTHER_COLOURS[position % len(OTHER_COLOURS)], (3, 1, 1, 1), 1.4
    return {"color": colour, "linewidth": width, "linestyle": (0, dashes) if dashes else "-"}


def _lines(
    axis: Axes, curves: Mapping[str, Curves | None], labels: Iterable[str], band: Callable | None = None
) -> None:
    for label, curve in curves.items():
        if curve is None:
            continue
        look = look_of(label, labels)
        axis.plot(curve.x, curve.y.mean(axis=0), zorder=4 if label == BASE else 3, label=label, **look)
        if band and len(curve.y) > 1:
            axis.fill_between(curve.x, *band(curve.y), color=look["color"], alpha=0.13, linewidth=0)


def _range(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return y.min(axis=0), y.max(axis=0)


def _interval(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(y) < SMALLEST_N:
        return _range(y)
    intervals = [mean_interval(column) for column in y.T]
    return np.array([interval.low for interval in intervals]), np.array([interval.high for interval in intervals])


def _band_note(panels: Mapping[str, Mapping[str, Curves | None]]) -> str:
    seeds = sorted({len(curve.y) for panel in panels.values() for curve in panel.values() if curve is not None})
    if not seeds:
        return ""
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    if seeds[-1] == 1:
        return "One seed: no band."
    if seeds[0] >= SMALLEST_N:
        return f"Line: mean of {count} seeds. Band: 95 % t interval over seeds."
    if seeds[-1] < SMALLEST_N:
        return f"Line: mean of {count} seeds. Band: their range (too few for an interval)."
    return f"Line: mean of {count} seeds. Band: 95 % t interval over seeds, range where fewer than {SMALLEST_N}."


def _figure(
    path: Path,
    heading: str,
    note: str,
    panels: Mapping[str, Mapping[str, object]],
    draw: Callable[[Figure, np.ndarray], None],
    ratios: tuple[float, ...],
    height: float,
    hidden: Iterable[str] = (),
) -> Path:
    """A grid of panels, one column per optimizer, with the legend at the right and the note beneath."""
    with matplotlib.rc_context(STYLE):
        legend, foot = 1.9, 0.08 + 0.17 * (note.count("\n") + 1)
        width = max(7.5, 1.0 + 3.3 * len(panels) + legend)
        figure = Figure(figsize=(width, height + foot))
        axes = figure.subplots(
            len(ratios), len(panels), squeeze=False, sharex="col", sharey="row", height_ratios=ratios
        )
        draw(figure, axes)
        labels = _labels(panels)
        shown = [label for label in labels if label not in set(hidden)]
        handles = [Line2D([], [], label=label, **look_of(label, labels)) for label in shown]
        figure.suptitle(heading, fontsize=11)
        figure.tight_layout(rect=(0, foot / (height + foot), 1 - legend / width, 1))
        figure.legend(handles=handles, loc="center left", bbox_to_anchor=(1 - legend / width, 0.55), frameon=False,
                      handlelength=2.6)
        figure.text(0.012, 0.015, note, fontsize=8.5, color="#444444", va="bottom")
        return _save(figure, path)


def draw_panels(
    path: Path,
    heading: str,
    note: str,
    draw: Callable[[Figure, np.ndarray], None],
    rows: int = 1,
    columns: int = 1,
    size: tuple[float, float] = (7.5, 4.0),
    **subplots: object,
) -> Path:
    """A figure in the house's style: ``draw(figure, axes)`` fills a (rows, columns) array of axes.

    Args:
        heading: title; name the scale in it.  note: small print beneath, may have several lines.
        size: inches without the note.  subplots: options of ``Figure.subplots`` (sharex, width_ratios).

    The same draws give the same bytes.
    """
    with matplotlib.rc_context(STYLE):
        foot = 0.08 + 0.17 * (note.count("\n") + 1)
        figure = Figure(figsize=(size[0], size[1] + foot))
        axes = figure.subplots(rows, columns, squeeze=False, **subplots)
        draw(figure, axes)
        figure.suptitle(heading, fontsize=11)
        figure.tight_layout(rect=(0, foot / (size[1] + foot), 1, 1))
        figure.text(0.012, 0.015, note, fontsize=8.5, color="#444444", va="bottom")
        return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", facecolor="white",
                   metadata={"Date": None, "Creator": None, "Description": describe(figure)})
    return path
