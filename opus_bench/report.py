"""The page and the figures of an experiment: pure functions of its records and the paper's numbers.

    report("results", "reproduce/reported.csv")  ->  results/tables/table3.md, results/figures/*.svg

Nothing is trained, timed or dated here, so the same records give the same bytes. `sections` chooses
the records that are shown, `tables` prints them.
"""
from __future__ import annotations

import json
import math
import os
import shlex
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from opus_bench import figures, tables
from opus_bench.results import load
from opus_bench.schema import RecordError
from opus_bench.sections import Row, Section, arrange, domain_share, final_loss, loss_curve, pairs
from opus_bench.statistics import SMALLEST_N
from opus_bench.tables import HOLM_MARK, MARK, NONE, PAPER_CORPUS

PIPELINE_SCALES = ("smoke", "ci")
WORTH = {  # what results of a scale are worth
    **dict.fromkeys(PIPELINE_SCALES, "checks the pipeline; it is not evidence for or against the paper"),
    "cpu": "a small model on a small corpus, what this code does at that size; it is not evidence for or against the "
           "paper",
}
MARKERS = ("<!-- results -->", "<!-- end of results -->")
HEADLINE_MARKERS = ("<!-- headline -->", "<!-- end of headline -->")
SIZES = ("ci", "smoke", "cpu", "small", "paper")  # scales by size
EXACTNESS_MARKERS = ("<!-- exactness -->", "<!-- end of exactness -->")
WIDTH = 8192  # buckets of the paper's sketch
STEPS_DRAWN = 60  # most points of a line by step; of more every second, third, ... is drawn


def report(results_dir: str | Path, reported_csv: str | Path, experiment: str = "table3") -> list[Path]:
    """Write the experiment's table and figures, and the results of a README beside the folder.

    Returns the paths written, table first.

    Raises:
        RecordError: no record of the experiment, or a damaged one.
    """
    results_dir = Path(results_dir)
    sections = arrange(load(results_dir / "runs", experiment))
    if not sections:
        command = f"python -m reproduce.{experiment} --scale smoke"
        raise RecordError(f"{results_dir / 'runs'}: no records of {experiment}; make them with `{command}`")
    table = results_dir / "tables" / f"{experiment}.md"
    table.parent.mkdir(parents=True, exist_ok=True)
    drawn = _figures(sections, experiment, results_dir / "figures")
    reported = tables.paper_cells(reported_csv)
    text = page(sections, experiment, reported, drawn)
    table.write_text(text, encoding="utf-8", newline="\n")
    readme = results_dir.absolute().parent / "README.md"
    if readme.exists() and MARKERS[0] in readme.read_text(encoding="utf-8"):
        update_readme(readme, MARKERS, readme_block(sections, experiment, reported))
        update_readme(readme, HEADLINE_MARKERS, headline(sections, experiment))
        update_readme(readme, EXACTNESS_MARKERS, exactness_block(results_dir))
        drawn.append(readme)
    return [table, *drawn]


def scale_title(scale: str) -> str:
    """The scale in a figure's heading."""
    return f"{scale} scale: pipeline check" if scale in PIPELINE_SCALES else f"{scale} scale"


def caution(scale: str) -> list[str]:
    """What a scale is worth as a line of a page; nothing for a scale that needs none."""
    return [f"**{scale.capitalize()} scale: {WORTH[scale]}.**"] if scale in WORTH else []


def largest(sections: Sequence[Section]) -> list[Section]:
    """The sections of the largest scale whose optimizers all have an arm of OPUS with enough pairs for an interval."""
    def complete(scale: str) -> bool:
        of_scale = [section for section in sections if section.scale == scale]
        return all(any(row.label.startswith("OPUS") and len(_paired(row, section)) >= SMALLEST_N
                       for row in section.rows) for section in of_scale)

    scales = sorted({section.scale for section in sections}, key=SIZES.index, reverse=True)
    scale = next((scale for scale in scales if complete(scale)), scales[0])
    return [section for section in sections if section.scale == scale]


def _paired(row: Row, section: Section) -> list[float]:
    return pairs(row, section.base, final_loss)[0] if section.base else []


def command(sections: Sequence[Section], experiment: str, labels: Sequence[str] | None = None) -> str:
    """The command that makes the sections of one scale; ``labels``: of these rows alone."""
    words = [f"python -m reproduce.{experiment} --scale {sections[0].scale} --optimizers"]
    words += dict.fromkeys(section.optimizer for section in sections)
    return " ".join([*words, *(["--methods", *map(shlex.quote, labels)] if labels else [])])


def headline(sections: Sequence[Section], experiment: str) -> str:
    """One measured sentence: OPUS's arms beside Random at the largest scale, with intervals and what they rest on."""
    chosen = largest(sections)
    found: dict[str, list[str]] = defaultdict(list)
    counts = set()
    for section in chosen:
        for row in section.rows:
            if section.base and row.label.startswith("OPUS"):
                gap = tables.difference(row, section.base, final_loss, 3)
                found[row.label].append(f"{gap} under {figures.title_of(section.key)}")
                counts.add(len(_paired(row, section)))
    record = chosen[0].records[0]
    tokens = max(row["tokens_seen"] for row in record["metrics"])
    seeds = " or ".join(map(str, sorted(counts))) or NONE
    worth = f" {record['scale'].capitalize()} scale: {WORTH[record['scale']]}." if record["scale"] in WORTH else ""
    said = "; ".join(f"{label} {' and '.join(gaps)}" for label, gaps in found.items())
    made = command(chosen, experiment, ["Random", *found] if found else None)
    return (f"**Final loss on {record['data']['target_domain']} minus that of Random, nat/token: {said or NONE}** "
            f"({record['scale']} scale, model {record['config']['model']}, {tokens:,} update tokens, n = {seeds} "
            f"paired seeds, 95 % t intervals, not corrected for their number; `{MARK}`: the interval does not "
            f"contain 0; `{made}`).{worth}")


def readme_block(sections: list[Section], experiment: str, reported: dict) -> str:
    """The README's result tables, one for each section; the largest scale first."""
    parts = []
    for section in sorted(sections, key=lambda section: -SIZES.index(section.scale)):
        seeds = max(len(row.records) for row in section.rows)
        name = figures.title_of(section.key)
        worth = f": {WORTH[section.scale]}" if section.scale in WORTH else ""
        parts += [
            (
                f"**{name}, {section.scale} scale, n = {seeds} seeds.** Made by `python -m reproduce.{experiment} "
                f"--scale {section.scale} --optimizers {section.optimizer}`{worth}."
            ),
            tables.brief(section, reported),
        ]
    return "\n\n".join(parts)


def exactness_block(results_dir: str | Path) -> str:
    """The README's table of measured errors, a column for each file that ``opus-bench validate`` wrote."""
    paths = sorted((Path(results_dir) / "validation").glob("*.json"))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    if not found:
        return "No file in results/validation/ yet."

    def sketch(one: dict) -> dict:
        return next(row for row in one["sketch"] if row["width"] == WIDTH)

    def floor(one: dict, start: str) -> str:
        return next(f"{row['spearman']:.3f}" for row in one["floor"] if row["change"].startswith(start))

    def oracle(one: dict, dtype: str) -> str:
        return next(f"{row['alignment']:.0e}, {row['gram']:.0e}" for row in one["oracle"] if row["dtype"] == dtype)

    rows: dict[str, Callable[[dict], str]] = {
        "factored against per-sample autograd, relative error of alignment and Gram, float64": lambda x: oracle(
            x, "float64"),
        "the same, float32": lambda x: oracle(x, "float32"),
        f"sketch of width {WIDTH:,}: Spearman of U with exact U": lambda x: f"{sketch(x)['utility_spearman']:.4f}",
        "its variance, measured / stated (standard error)": lambda x: (
            f"{sketch(x)['variance_ratio']:.2f} ({sketch(x)['variance_ratio_stderr']:.2f})"
        ),
        "another proxy batch: Spearman of exact alignments": lambda x: floor(x, "another proxy"),
        "half the score window: Spearman of exact alignments": lambda x: floor(x, "window of 64"),
        "effective sample size of a draw, share: paper, released, calibrated": lambda x: ", ".join(
            f"{arm['effective_share']:.4f}" for arm in x["arms"]
        ),
    }
    names = [figures.OPTIMIZERS.get(one["settings"]["optimizer"], one["settings"]["optimizer"]) for one in found]
    links = [f"[{name}](results/validation/{path.name})" for name, path in zip(names, paths, strict=True)]
    return tables.markdown(["", *links], ([what, *map(value, found)] for what, value in rows.items()))


def update_readme(path: str | Path, markers: tuple[str, str], block: str) -> None:
    """Put the block between two marker lines of the README.

    Raises:
        ValueError: the markers are not there.
    """
    before, start, rest = Path(path).read_text(encoding="utf-8").partition(markers[0])
    _, end, after = rest.partition(markers[1])
    if not end:
        raise ValueError(f"{path} lacks the lines {markers[0]} and {markers[1]}, between which results go")
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")  # what is not ours in the file must not be lost
    temporary.write_text(f"{before}{start}\n{block}\n{end}{after}", encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def page(sections: list[Section], experiment: str, reported: dict, drawn: Sequence[Path] = ()) -> str:
    """The experiment's page as markdown, with the figures drawn put at the head of their scale."""
    records = [record for section in sections for record in section.records]
    scales = list(dict.fromkeys(section.scale for section in sections))
    by_scale = {scale: [section for section in sections if section.scale == scale] for scale in scales}
    commands = ", ".join(f"`{command(of_scale, experiment)}`" for of_scale in by_scale.values())
    versions = "; ".join(f"{scale} scale: code {tables.versions(of_scale)}" for scale, of_scale in by_scale.items())
    compared = " and ".join(f"{sum(max(0, len(section.rows) - 1) for section in of_scale if section.base)} at {scale}"
                            for scale, of_scale in by_scale.items())
    parts = [
        f"# {records[0]['paper']['item']} of arXiv:{records[0]['paper']['arxiv']}",
        (
            f"Made by {commands} from {len(records)} runs; {versions}. "
            "Do not edit: the same records give the same bytes."
        ),
        (
            "How to read it. Runs are paired by seed (same initial weights, same candidate stream). [low, high] is the "
            "95 % paired t interval; {a, b} are the seeds themselves where fewer than three pairs allow no interval. "
            f"`{MARK}` marks an interval that excludes no difference (0, or 1 for a share of tokens). Compared are "
            f"{compared}, methods of both optimizers: if none differed, one in twenty would be marked in each column. "
            f"`{HOLM_MARK}`, in the column of differences in loss: excluded also after Holm's correction over all "
            "methods and optimizers of that scale. Every mark takes the differences of pairs to be normal: a test that "
            "assumes symmetry alone has no p below .0625 with 5 seeds, .25 with 3 ([coverage](coverage.md)). "
            f"`{NONE}`: does not apply or was not measured."
        ),
    ]
    for scale in scales:
        parts.append(f"## Scale: {scale}")
        parts += caution(scale)
        parts.extend(
            f"![{path.stem.rsplit('_', 1)[1]}](../figures/{path.name})"
            for path in drawn
            if path.stem.startswith(f"{experiment}_{scale}_")
        )
        for section in by_scale[scale]:
            parts.extend(_section_page(section, reported, by_scale[scale]))
    return "\n\n".join(parts) + "\n"


def _section_page(section: Section, reported: dict, family: Sequence[Section]) -> list[str]:
    name = figures.title_of(section.key)
    selection_notes = sorted({note for record in section.records for note in record["selection"]["notes"]})
    notes = [f"- {note}" for note in section.notes + selection_notes]
    parts = [f"### {name}: summary", tables.summary(section, reported, family), tables.power_line(section)]
    parts += tables.odd_averages(reported, tables.paper_model(section), section.optimizer,
                                 (row.paper_row for row in section.rows))
    parts += ["\n".join(notes)] if notes else []
    parts += [
        f"### {name}: offline tasks, accuracy in % (standard error over items)",
        f"`{MARK}`: the paired difference to Random over seeds excludes zero.",
        tables.offline(section),
        f"### {name}: bits per byte by domain (difference to Random ± half-width of its 95 % interval)",
        tables.bits(section),
        (f"### {name}: the paper's ten tasks, ours | the paper's ({tables.paper_model(section)}, {PAPER_CORPUS}), "
         "accuracy in %"),
        tables.paper_tasks(section, reported),
        f"### {name}: runs",
        tables.runs(section),
        f"### {name}: deviations from the paper",
        tables.deviations(section),
    ]
    return parts


# The figures ----------------------------------------------------------------------------------


def _figures(sections: list[Section], experiment: str, directory: Path) -> list[Path]:
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for scale in dict.fromkeys(section.scale for section in sections):
        chosen = [section for section in sections if section.scale == scale]
        title = scale_title(scale)
        stem = directory / f"{experiment}_{scale}"
        target = chosen[0].records[0]["data"]["target_domain"]
        losses = {s.key: {r.label: _curves(r, loss_curve) for r in s.rows} for s in chosen}
        gaps = {s.key: {r.label: _gap(r, s.base) for r in s.rows if s.base and r is not s.base} for s in chosen}
        shares = {s.key: _shares(s) for s in chosen}
        steps = {
            s.key: {
                name: {r.label: _curves(r, lambda record, name=name: _per_step(record, name)) for r in s.rows}
                for name in ("effective_sample_size", "total_variation")
            }
            for s in chosen
        }
        paths.append(figures.draw_losses(losses, gaps, target, title, Path(f"{stem}_loss.svg")))
        paths.append(figures.draw_domains(shares, title, Path(f"{stem}_domains.svg")))
        paths.append(figures.draw_uniformity(steps, title, Path(f"{stem}_uniformity.svg")))
    return paths


def _curves(row: Row, curve: Callable[[dict], tuple[list, list]]) -> figures.Curves | None:
    """The curves of all seeds on the points that all have; None where there are none."""
    by_seed = [dict(zip(*curve(row.records[seed]), strict=True)) for seed in sorted(row.records)]
    shared = sorted(set.intersection(*(set(points) for points in by_seed)))
    if not shared:
        return None
    return figures.Curves(np.array(shared), np.array([[points[x] for x in shared] for points in by_seed]))


def _gap(row: Row, base: Row) -> figures.Curves | None:
    """The curves of row - base at the seeds and points that both have."""
    seeds = sorted(row.records.keys() & base.records.keys())
    if not seeds:
        return None
    ours = _curves(Row(row.label, None, {seed: row.records[seed] for seed in seeds}), loss_curve)
    theirs = _curves(Row(base.label, None, {seed: base.records[seed] for seed in seeds}), loss_curve)
    if ours is None or theirs is None:
        return None
    _, left, right = np.intersect1d(ours.x, theirs.x, return_indices=True)
    return figures.Curves(ours.x[left], ours.y[:, left] - theirs.y[:, right]) if left.size else None


def _per_step(record: dict, name: str) -> tuple[list, list]:
    per_step = record["selection"]["per_step"]
    every = max(1, math.ceil(len(per_step["step"]) / STEPS_DRAWN))  # the same in all seeds of a row
    drawn = zip(per_step["step"][::every], per_step[name][::every], strict=True)
    points = [(x, y) for x, y in drawn if y is not None]
    return [x for x, _ in points], [y for _, y in points]


def _shares(section: Section) -> tuple[list[str], dict[str, list[float]], dict[str, list[float]]]:
    """(domains, offered share by method, chosen share by method), domains by share offered."""
    counts = defaultdict(int)
    for record in section.records:
        for domain, count in record["selection"]["offered"].items():
            counts[domain] += count
    domains = sorted(counts, key=lambda domain: (-counts[domain], domain))

    def mean(row: Row, which: str) -> list[float]:
        found = [row.values(domain_share(which, lambda record, domain=domain: [domain])) for domain in domains]
        return [float(np.mean(values)) if values else math.nan for values in found]

    offered, chosen = ({row.label: mean(row, which) for row in section.rows} for which in ("offered", "chosen"))
    return domains, offered, chosen
