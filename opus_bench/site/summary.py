"""What holds, at which scale, with what certainty: the head of the results page.

Computed from the records of Table 3, so that a run changes it and an edit cannot.
"""
from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from html import escape

from opus_bench.figures import OPTIMIZERS
from opus_bench.report import WORTH
from opus_bench.schema import NOT_RUN
from opus_bench.sections import Row, Section, arrange, final_loss, pairs
from opus_bench.site.markup import Place, RunSets, table
from opus_bench.statistics import paired_interval
from opus_bench.tables import NONE, PAPER_CORPUS, PAPER_MODEL, difference, markdown, odd_averages

EXPERIMENT = "table3"
ENDS = {
    "less": "less target loss than Random",
    "more": "more target loss than Random",
    "same": "not told apart from Random",
    None: "too few seeds for an interval",
}


def summary(loaded: Sequence[dict], reported: dict, sets: RunSets) -> str:
    """Markup: a sentence and a table for each scale, what that scale is worth, and counts.

    Args:
        loaded: all records.  reported: the paper's cells.
    """
    sections = [s for s in arrange(r for r in loaded if r["experiment"] == EXPERIMENT) if s.base is not None]
    records, parts = {r["run_id"]: r for r in loaded}, []
    scales = list(dict.fromkeys(section.scale for section in sections))
    for scale in scales:
        chosen = [section for section in sections if section.scale == scale]
        parts.append(f'<p class="lead">{escape(finding(chosen))}</p>')
    for scale in (scale for scale in scales if scale in WORTH):
        parts.append(f'<p class="caution"><strong>{escape(scale.capitalize())} scale</strong>: {escape(WORTH[scale])}.'
                     "</p>")
    if scales and "paper" not in scales:
        parts.append('<p class="caution">No table has been run at the paper\'s scale.</p>')
    for scale in scales:
        chosen = [section for section in sections if section.scale == scale]
        mine = [record for section in chosen for record in section.records]
        parts.append(table(_verdicts(chosen, reported), Place(scale), mine, records, sets, f"Summary, {scale} scale"))
        parts += [f"<p>{escape(said)}</p>" for section in chosen for said in odd_averages(
            reported, PAPER_MODEL, section.optimizer, (row.paper_row for row in section.rows))]
    hours = math.fsum(record["timing"]["wall_s"] for record in loaded) / 3600
    versions = {record["code"]["version"] for record in loaded}
    stats = ((len(loaded), "run records"), (f"{hours:.1f} h", "of computing"), (len(versions), "versions of code"),
             (", ".join(sorted({record["scale"] for record in loaded})) or NONE, "scales"))
    counts = "".join(f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>" for value, name in stats)
    return "\n".join([*parts, f'<dl class="stats">{counts}</dl>'])


def verdict(row: Row, base: Row) -> str | None:
    """Target loss beside Random's by the 95 % paired interval: a key of ENDS, "same" if it holds 0, None without."""
    ours, theirs = pairs(row, base, final_loss)
    interval = paired_interval(ours, theirs) if ours else None
    if interval is None or interval.low is None:
        return None
    return ("less" if interval.mean < 0 else "more") if interval.excludes(0.0) else "same"


def finding(chosen: Sequence[Section]) -> str:
    """The sentences of one scale: where OPUS's arms stand beside Random under each optimizer, then all methods."""
    names = {section.optimizer: OPTIMIZERS.get(section.optimizer, section.optimizer) for section in chosen}
    stand: dict[str, dict[str, str | None]] = defaultdict(dict)
    arms = set()
    for section in chosen:
        for row in section.rows:
            if row is not section.base:
                stand[row.label][section.optimizer] = verdict(row, section.base)
                arms |= {row.label} if next(iter(row.records.values()))["arm"] else set()
    alike: dict[tuple, list[str]] = defaultdict(list)
    for label in sorted(arms):
        alike[tuple(stand[label].items())].append(label)
    said = []
    for found, labels in alike.items():
        by_end: dict[str | None, list[str]] = defaultdict(list)
        for optimizer, end in found:
            by_end[end].append(names[optimizer])
        ends = ", ".join(f"{ENDS[end]} under {_and(where)}" for end, where in by_end.items())
        said.append(f"{_and(labels)}: {ends}")
    counts = _and([f"{sum(found.get(optimizer) == 'less' for found in stand.values())} of "
                   f"{sum(optimizer in found for found in stand.values())} under {name}"
                   for optimizer, name in names.items()])
    seeds = " or ".join(map(str, sorted({len(section.base.records) for section in chosen})))
    return (f"{chosen[0].scale.capitalize()} scale, {seeds} paired seeds, 95 % intervals. "
            f"{'; '.join(said)}{'. ' if said else ''}Of all methods, {counts} end with less.")


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _verdicts(chosen: Sequence[Section], reported: dict) -> str:
    """Markdown: a row each method, ours beside the paper's for each optimizer."""
    header = ["method", "n"]
    for section in chosen:
        name = OPTIMIZERS.get(section.optimizer, section.optimizer)
        header += [f"{name}: target loss minus Random's (nat/token)",
                   f"the paper's, {name}: gain in accuracy (points)"]
    labels = dict.fromkeys(row.label for section in chosen for row in section.rows if row is not section.base)
    lines = []
    for label in labels:
        rows = [next((row for row in section.rows if row.label == label), None) for section in chosen]
        line = [label, " / ".join(dict.fromkeys(str(len(row.records)) for row in rows if row))]
        for section, row in zip(chosen, rows, strict=True):
            ours = f"{NOT_RUN}no record" if row is None else difference(row, section.base, final_loss, 3)
            line += [ours, _paper_gain(reported, section.optimizer, row)]
        lines.append([*line, chosen[0].scale, f"`python -m reproduce.{EXPERIMENT} --scale {chosen[0].scale}`"])
    return markdown([*header, "scale", "command"], lines)


def _paper_gain(reported: dict, optimizer: str, row: Row | None) -> str:
    """The paper's mean of ten tasks minus its Random's, points."""
    if row is None or row.paper_row is None:
        return NONE
    ours, base = (reported.get(("3", PAPER_MODEL, optimizer, PAPER_CORPUS, name, "Avg"))
                  for name in (row.paper_row, "Random"))
    return NONE if ours is None or base is None else f"{ours - base:+.2f}"
