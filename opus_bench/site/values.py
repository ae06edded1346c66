"""The numbers behind a figure, beside its drawing: what the results page shows when a point is pointed at.

They go into the SVG's own description, so the figure stays one file and a function of the same arrays.
"""
from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator

MOST_POINTS = 60
"""Points of a series that are named; a longer one is thinned evenly, both ends kept."""
DIGITS = 5


def describe(figure: Figure) -> str:
    """JSON: the heading, the note, and of every panel the axis labels and the series of its lines and bars.

    A point is [across, down, x, y]: its place in the SVG's units (points, from the top left) and its values,
    in the units of the axis labels, five significant digits, or the name that the axis gives to the place.
    Reference lines that span the panel and error bars are left out.
    """
    notes = [text.get_text() for text in figure.texts if text is not figure._suptitle and text.get_text()]
    names = _colour_names(figure)
    panels = [_panel(axis, figure, names) for axis in figure.axes]
    found = {"title": figure.get_suptitle(), "note": "\n".join(notes), "panels": [p for p in panels if p["series"]]}
    return json.dumps(found, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _panel(axis: Axes, figure: Figure, names: Mapping[str, str]) -> dict:
    axis.get_xlim(), axis.get_ylim()  # settles limits that are still automatic
    groups = {id(group[0]): group.get_label() for group in axis.containers if len(group)}
    drawn = [(line, line.get_xydata(), to_hex(line.get_color())) for line in axis.get_lines()
             if line.get_transform() == axis.transData]
    drawn += [(bar, _tip(bar), to_hex(bar.get_facecolor())) for bar in axis.patches if isinstance(bar, Rectangle)]
    series = []
    for artist, points, colour in drawn:
        label = str(groups.get(id(artist), artist.get_label()))
        label = names.get(colour, "") if label.startswith("_") else label
        shown = _points(axis, figure, np.asarray(points, dtype=float))
        if shown:
            series.append({"label": label, "points": shown})
    title, x, y = (_shared(figure, axis, which) for which in ("title", "xlabel", "ylabel"))
    return {"title": title, "x": x, "y": y, "series": series}


def _tip(bar: Rectangle) -> list[tuple[float, float]]:
    """The end of a bar, as a point."""
    lying = abs(bar.get_height()) < 1 and bar.get_x() == 0
    if lying:
        return [(bar.get_width(), bar.get_y() + bar.get_height() / 2)]
    return [(bar.get_x() + bar.get_width() / 2, bar.get_y() + bar.get_height())]


def _points(axis: Axes, figure: Figure, data: np.ndarray) -> list[list]:
    data = data[np.isfinite(data).all(1)]
    if len(data) > MOST_POINTS:
        data = data[np.unique(np.linspace(0, len(data) - 1, MOST_POINTS).round().astype(int))]
    if not len(data):
        return []
    places = axis.transData.transform(data) * 72 / figure.dpi
    down = figure.get_figheight() * 72 - places[:, 1]
    return [[round(float(a), 1), round(float(d), 1), _value(axis.xaxis, x), _value(axis.yaxis, y)]
            for a, d, (x, y) in zip(places[:, 0], down, data, strict=True)]


def _value(axis: Axis, value: float) -> float | str:
    """The name of the place where the ticks have names (methods, matrices), else the number."""
    locator = axis.get_major_locator()
    if isinstance(locator, FixedLocator):
        places = [float(place) for place in locator.locs]
        names = axis.get_major_formatter().format_ticks(places)
        nearest = min(range(len(places)), key=lambda i: abs(places[i] - value), default=None)
        if nearest is not None and abs(places[nearest] - value) < 0.5 and any(c.isalpha() for c in names[nearest]):
            return " ".join(names[nearest].split())
    return float(f"{value:.{DIGITS}g}")


def _shared(figure: Figure, axis: Axes, which: str) -> str:
    """A panel's title or axis label; where it has none, that of the first panel in its column (ylabel: row)."""
    start = "y0" if which == "ylabel" else "x0"
    place = getattr(axis.get_position(), start)
    near = [other for other in figure.axes if abs(getattr(other.get_position(), start) - place) < 1e-6]
    said = [getattr(other, f"get_{which}")() or (which == "title" and other.get_title(loc="left"))
            for other in (axis, *near)]
    return " ".join(next((text for text in said if text), "").split())


def _colour_names(figure: Figure) -> dict[str, str]:
    """Colour -> name, of the legends' colours that name one thing only."""
    legends = [*figure.legends, *(child for axis in figure.axes for child in axis.get_children()
                                  if isinstance(child, Legend))]
    found: dict[str, set[str]] = {}
    for legend in legends:
        for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
            colour = handle.get_color() if isinstance(handle, Line2D) else getattr(handle, "get_facecolor", str)()
            if isinstance(colour, str | tuple) and colour:
                found.setdefault(to_hex(colour), set()).add(text.get_text())
    return {colour: names.pop() for colour, names in found.items() if len(names) == 1}
