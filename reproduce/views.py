"""What scripts that only look at Table 3's records share: which records, the head of a page, cells, files.

Table 5, Table 6 and Figures 1, 4 and 7 train nothing of their own: `python -m reproduce.table5 --scale ci` makes the
runs of Table 3 that are not there yet, under the very same run ids, and writes its own page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from opus_bench import figures, tables
from opus_bench.report import caution
from opus_bench.results import load
from opus_bench.schema import NOT_RUN, RecordError
from opus_bench.sections import Row, Section, arrange
from opus_bench.tables import MARK, NONE, paper_cells, paper_model

EXPERIMENT = "table3"
REPORTED = Path(__file__).with_name("reported.csv")
GUIDE = (
    "How to read it. Runs are paired by seed. [low, high] is the 95 % paired t interval, {a, b} are the seeds "
    f"themselves where fewer than three pairs allow none; `{MARK}` marks an interval that excludes no difference. "
    f"`{NONE}`: does not apply or was not measured."
)
Value = Callable[[dict], float | None]


def sections_of(results_dir: Path, name: str) -> list[Section]:
    """Table 3's records as its own page shows them.

    Raises:
        RecordError: there are none.
    """
    sections = arrange(load(Path(results_dir) / "runs", EXPERIMENT))
    if not sections:
        raise RecordError(f"{Path(results_dir) / 'runs'}: no records of {EXPERIMENT}, which {name} shows; make them "
                          f"with `python -m reproduce.{name} --scale smoke`")
    return sections


def page(results_dir: Path, name: str, title: str, about: str, section_page: Callable[[Section], list[str]],
         draw: Callable[[list[Section], Path], Path] | None = None) -> list[Path]:
    """Write the page of a view, and a figure for each scale: the same records give the same bytes."""
    results_dir, sections = Path(results_dir), sections_of(results_dir, name)
    drawn = {scale: draw(found, results_dir / "figures" / f"{name}_{scale}.svg")
             for scale, found in by_scale(sections).items()} if draw else {}
    records = [record for section in sections for record in section.records]
    versions = "; ".join(f"{scale} scale: code {tables.versions(found)}" for scale, found in by_scale(sections).items())
    parts = [
        f"# {title}",
        (f"Made by `python -m reproduce.{name}`, which trains nothing of its own, from {len(records)} runs of Table 3; "
         f"{versions}. Do not edit: the same records give the same bytes."),
        about,
        GUIDE,
    ]
    for scale, found in by_scale(sections).items():
        parts.append(f"## Scale: {scale}")
        parts += caution(scale)
        if scale in drawn:
            parts.append(f"![{title}](../figures/{drawn[scale].name})")
        for section in found:
            runs = ", ".join(f"[{record['run_id']}](../runs/{record['run_id']}.json)" for record in section.records)
            parts += [f"### {optimizer(section)}", *section_page(section), *(f"- {note}" for note in section.notes),
                      f"#### {optimizer(section)}: runs", runs]
    path = results_dir / "tables" / f"{name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8", newline="\n")
    return [path, *drawn.values()]


def by_scale(sections: Sequence[Section]) -> dict[str, list[Section]]:
    """Sections by their scale, in order."""
    return {scale: [section for section in sections if section.scale == scale]
            for scale in dict.fromkeys(section.scale for section in sections)}


def optimizer(section: Section) -> str:
    """Its name in prose, with the model where there are several."""
    return figures.title_of(section.key)


def cells(section: Section, row: Row, value: Value, digits: int, factor: float = 1.0) -> list[str]:
    """The mean of a value over seeds, and its difference to Random."""
    return [tables.mean(row.values(value), digits, factor), tables.difference(row, section.base, value, digits, factor)]


def status(row: Row, task: str) -> str:
    """A task's mean over seeds in %, or why there is none."""
    found = [item for record in row.records.values() for item in record["evals"] if item["task"] == task]
    values = [item["value"] for item in found if item.get("value") is not None]
    if values:
        return tables.mean(values, 2, 100)
    return next((item["status"] for item in found), f"{NOT_RUN}not in the records")


def ours_and_papers(section: Section, table: str, corpora: Sequence[str], benchmarks: Sequence[str],
                    ours: Callable[[Row, str], str], unit: str, absent: str) -> list[str]:
    """The paper's table beside our cells; where we have none at all, a sentence and the paper's numbers alone.

    Args:
        ours: a cell, which starts with "not run: " where there is no value.
        absent: why there is none.
    """
    reported, kind = paper_cells(REPORTED), section.optimizer
    keys = [key for key in reported if key[0] == table and key[1] == paper_model(section) and key[2] == kind]
    rows = list(dict.fromkeys(key[4] for key in keys))

    def cell(corpus: str, name: str | None, benchmark: str) -> str:
        value = reported.get((table, paper_model(section), kind, corpus, name, benchmark))
        return NONE if value is None else f"{value:.2f}"

    measured = any(not ours(row, benchmark).startswith(NOT_RUN) for row in section.rows for benchmark in benchmarks)
    if not keys and not measured:
        return [f"The paper's Table {table}: it has none for {optimizer(section)}; ours: {NOT_RUN}{absent}."]
    if not measured:
        lines = [[f"{name}, {corpus}", *(cell(corpus, name, benchmark) for benchmark in (*benchmarks, "Avg"))]
                 for corpus in corpora for name in rows]
        return [f"The paper's Table {table} ({paper_model(section)}, {unit}); ours: {NOT_RUN}{absent}.",
                tables.markdown(["the paper's own", *benchmarks, "mean"], lines)]
    lines = [[row.label, *(f"{ours(row, benchmark)} | " + " | ".join(
        cell(corpus, next((name for name in rows if name.partition("(30B)")[0] == row.paper_row), None), benchmark)
        for corpus in corpora) for benchmark in benchmarks)] for row in section.rows]
    return [f"Ours | the paper's Table {table} ({paper_model(section)}; {' | '.join(corpora)}), {unit}:",
            tables.markdown(["method", *benchmarks], lines)]
