"""results/index.html: every page, figure and run record of a results folder as one file.

    write("results", "reproduce/reported.csv")  ->  results/index.html

A pure function of the folder (tables/*.md, figures/*.svg, runs/*.json, validation/*.json) and of the
paper's numbers: nothing is timed or dated, so the same folder gives the same bytes.  It binds the pages
that experiments have written and knows none of them by name, so the core needs no script, and what a
script adds is shown.  Tables are HTML when the file is made; its own script only filters, shows values
and opens records.  Nothing is fetched: the file's policy forbids it.

Size: `LARGEST` bytes at most.  Records are inside but for two long lists, which the dialog says and links:
`metrics` and `selection.per_step` stay in runs/ID.json.
"""
from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path

from opus_bench.figures import OPTIMIZERS
from opus_bench.files import replacing
from opus_bench.report import exactness_block
from opus_bench.results import load
from opus_bench.schema import ARXIV, NOT_RUN, RecordError
from opus_bench.sections import label_of
from opus_bench.site.figures import InlineFigure, inline
from opus_bench.site.markup import Page, RunSets, render
from opus_bench.site.summary import summary
from opus_bench.tables import NONE, paper_cells

ASSETS = Path(__file__).parent
LARGEST = 4_000_000
LEFT_OUT = ("metrics", "selection.per_step")
FILTERS = ("scale", "optimizer", "method", "arm")
REPLAY = "replay"
"""Folder of the command that makes a run again: a new one, or the run would be found done."""


def write(results_dir: str | Path, reported_csv: str | Path) -> Path:
    """Write index.html into the folder; the whole file or none.

    Raises:
        RecordError: no pages, a damaged record, or a page larger than LARGEST.
    """
    path = Path(results_dir) / "index.html"
    text = site(results_dir, reported_csv)
    if len(text.encode()) > LARGEST:
        raise RecordError(f"{path} would have {len(text.encode()):,} bytes, more than {LARGEST:,}; "
                          "draw figures of fewer points or split a page")
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return path


def site(results_dir: str | Path, reported_csv: str | Path) -> str:
    """The page as text.

    Raises:
        RecordError: no pages in tables/, or a damaged record.
    """
    results_dir, reported = Path(results_dir), paper_cells(reported_csv)
    loaded = load(results_dir / "runs")
    records, sets, values = {r["run_id"]: r for r in loaded}, RunSets(), {}

    def figure(name: str, scale: str) -> str:
        path = results_dir / "figures" / name
        if not path.exists():
            return f'<p class="not-run">{escape(NOT_RUN)}no file figures/{escape(name)}</p>'
        drawn = inline(path)
        values[path.stem] = drawn.panels
        return _figure(path, drawn)

    sources = {path.stem: path.read_text(encoding="utf-8") for path in (results_dir / "tables").glob("*.md")}
    if any((results_dir / "validation").glob("*.json")):
        sources["exactness"] = _exactness(results_dir)
    if not sources:
        raise RecordError(f"{results_dir / 'tables'}: no pages; make them with `python -m reproduce.pages`")
    pages = [render(name, sources[name], records, figure, sets) for name in sorted(sources, key=_order)]
    commands = {page.name: page.commands[0] for page in pages if page.commands}
    parts = {
        "css": (ASSETS / "page.css").read_text(encoding="utf-8"),
        "js": (ASSETS / "page.js").read_text(encoding="utf-8"),
        "arxiv": ARXIV,
        "summary": summary(loaded, reported, sets),
        "links": "".join(f'<li><a href="#{page.name}">{escape(_short(page))}</a></li>' for page in pages),
        "contents": _contents(pages, loaded, reported),
        "filters": _filters(pages, loaded),
        "pages": "\n".join(_article(page, results_dir) for page in pages),
        "runs": _runs(loaded, pages),
    }
    content = {"records": {run: _kept(record) for run, record in records.items()},
               "replay": {r["run_id"]: replay(r, commands) for r in loaded},
               "sets": list(sets.numbers), "figures": values}
    parts["data"] = _script_safe(json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
    digest = base64.b64encode(hashlib.sha256(parts["js"].encode()).digest()).decode()
    parts["policy"] = (f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; "
                       "base-uri 'none'; form-action 'none'")
    template = (ASSETS / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match.group(1)], template)


def replay(record: dict, commands: dict[str, str]) -> str:
    """Shell lines that make a record's run again, in a folder of its own.

    Args:
        commands: experiment -> the command that its page names.

    A grid begins at seed 0, so the seeds before the record's are made as well.
    """
    experiment, config = record["experiment"], record["config"]
    given = commands.get(experiment, f"python -m reproduce.{experiment}").split()[:3]
    options = []
    if given[-1].startswith("reproduce.") and config["optimizer"] != "none":  # a run of a grid
        options = ["--scale", record["scale"], "--optimizers", config["optimizer"], "--seeds", str(config["seed"] + 1)]
        if record["method"] not in OPTIMIZERS.values():
            options += ["--methods", label_of(record)]
    elif "shape" in config:
        options = ["--shape", config["shape"]["name"]]
    commit, lines = record["code"]["commit"], []
    if commit:
        changed = "  # with changes that were not committed" if record["code"]["dirty"] else ""
        lines.append(f"git checkout {commit}{changed}")
    return "\n".join([*lines, shlex.join([*given, *options, "--results", REPLAY])])


# Parts of the page ----------------------------------------------------------------------------


def _script_safe(text: str) -> str:
    """JSON that cannot end the script element it stands in."""
    return text.replace("<", r"\u003c").replace("\u2028", r"\u2028").replace("\u2029", r"\u2029")


def _kept(record: dict) -> dict:
    """The record without the lists of LEFT_OUT; the dialog says how long they are."""
    steps = len(record["selection"]["per_step"]["step"])
    kept = {key: value for key, value in record.items() if key != "metrics"}
    kept["selection"] = {key: value for key, value in record["selection"].items() if key != "per_step"}
    return kept | {"left_out": {LEFT_OUT[0]: len(record["metrics"]), LEFT_OUT[1]: steps}}


def _order(name: str) -> tuple[int, str]:
    """The paper's tables first, by number, then the others by name."""
    number = re.fullmatch(r"(?:table|figure)(\d+)\w*", name)
    return (int(number.group(1)) if number else 1000), name


def _short(page: Page) -> str:
    number = re.fullmatch(r"table(\d+)", page.name)
    return f"Table {number.group(1)}" if number else page.name.replace("_", " ").capitalize()


def _exactness(results_dir: Path) -> str:
    block = exactness_block(results_dir).replace("](results/", "](../")
    return ("# How exact is each approximation?\n\nMade by `opus-bench validate` on a small model of the paper's "
            f"architecture after 60 steps on real text; orders of magnitude carry over at best.\n\n{block}\n")


def _figure(path: Path, drawn: InlineFigure) -> str:
    live, kind = " data-live" if drawn.panels else "", " heat-map" if drawn.heat_map else ""
    return (f'<figure class="figure{kind}" id="figure-{escape(path.stem)}" data-figure="{escape(path.stem)}"{live}>'
            f'<div class="scroll">{drawn.svg}</div><figcaption>'
            f'<a href="figures/{escape(path.name)}">figures/{escape(path.name)}</a></figcaption></figure>')


def _facts(page: Page) -> list[tuple[str, str]]:
    """What the head of a page says of its runs."""
    records = page.records
    if not records:
        return [("runs", "none: counted or measured without a record")]
    scales, versions = ({r["scale"] for r in records}, {r["code"]["version"][:12] for r in records})
    seeds = {scale: len({r["config"]["seed"] for r in records if r["scale"] == scale}) for scale in sorted(scales)}
    said = [f"{n} seed{'s' * (n > 1)}" + (f" ({scale})" if len(seeds) > 1 else "") for scale, n in seeds.items()]
    return [("scale", ", ".join(seeds)), ("n", ", ".join(said)),
            ("runs", str(len(records))), ("code", ", ".join(sorted(versions)))]


def _article(page: Page, results_dir: Path) -> str:
    facts = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in _facts(page))
    commands = "".join(f'<div class="command"><dt>command</dt><dd><code>{escape(command)}</code></dd></div>'
                       for command in page.commands)
    source = f'<a href="tables/{page.name}.md">as markdown</a>' if (
        results_dir / "tables" / f"{page.name}.md").exists() else ""
    runs = " ".join(record["run_id"] for record in page.records)
    return (f'<article id="{page.name}" data-page="{page.name}" data-made-from="{runs}" tabindex="-1">'
            f'<header><h2><a class="anchor" href="#{page.name}">{escape(page.title)}</a></h2>'
            f'<dl class="facts">{facts}{commands}</dl>{source}</header>\n{page.html}\n</article>')


def _contents(pages: Sequence[Page], loaded: Sequence[dict], reported: dict) -> str:
    rows = []
    for page in pages:
        facts = dict(_facts(page))
        command = f"<code>{escape(page.commands[0])}</code>" if page.commands else NONE
        rows.append(f'<tr><th scope="row"><a href="#{page.name}">{escape(page.title)}</a></th>'
                    f"<td>{escape(facts.get('scale', NONE))}</td><td>{escape(facts.get('n', NONE))}</td>"
                    f'<td class="number">{len(page.records) or NONE}</td><td>{command}</td></tr>')
    items = {record["paper"]["item"] for record in loaded}
    for number in sorted({cell[0] for cell in reported}, key=lambda number: (len(number), number)):
        if f"Table {number}" not in items and f"table{number}" not in {page.name for page in pages}:
            count = sum(cell[0] == number for cell in reported)
            rows.append(f'<tr><th scope="row">Table {escape(number)} of arXiv:{ARXIV}</th>'
                        f'<td colspan="4" class="not-run">{escape(NOT_RUN)}no record; the paper gives {count} numbers'
                        "</td></tr>")
    return "\n".join(rows)


def _filters(pages: Sequence[Page], loaded: Sequence[dict]) -> str:
    methods = [r for r in loaded if r["method"] not in OPTIMIZERS.values()]
    choices = {
        "table": [(page.name, _short(page)) for page in pages],
        "scale": [(scale, scale) for scale in sorted({r["scale"] for r in loaded})],
        "optimizer": [(key, OPTIMIZERS.get(key, key)) for key in sorted({r["config"]["optimizer"] for r in loaded})],
        "method": [(label, label) for label in dict.fromkeys(label_of(r) for r in methods)],
        "arm": [(arm, arm) for arm in sorted({r["arm"] for r in loaded if r["arm"]})],
    }
    return "".join(
        f'<label>{name.capitalize()}<select name="{name}"><option value="">all</option>'
        + "".join(f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in options)
        + "</select></label>" for name, options in choices.items())


def _runs(loaded: Sequence[dict], pages: Sequence[Page]) -> str:
    shown: dict[str, list[Page]] = {}
    for page in pages:
        for record in page.records:
            shown.setdefault(record["run_id"], []).append(page)
    rows = []
    for r in loaded:
        optimizer = r["config"]["optimizer"]
        where = ", ".join(f'<a href="#{page.name}">{escape(_short(page))}</a>' for page in shown.get(r["run_id"], []))
        state = where or '<span class="older">older, or of a less complete set: in no table</span>'
        method = f' data-method="{escape(label_of(r))}"' + (f' data-arm="{r["arm"]}"' if r["arm"] else "")
        rows.append(
            f'<tr id="run-{r["run_id"]}" data-run="{r["run_id"]}"{method} data-scale="{escape(r["scale"])}" '
            f'data-optimizer="{escape(optimizer)}"><th scope="row">'
            f'<a class="run" href="runs/{r["run_id"]}.json">{r["run_id"]}</a></th><td>{escape(r["experiment"])}</td>'
            f"<td>{escape(label_of(r))}</td><td>{escape(OPTIMIZERS.get(optimizer, optimizer))}</td>"
            f'<td>{escape(r["scale"])}</td><td class="number">{r["config"]["seed"]}</td><td>{state}</td>'
            f"<td>{escape(r['written_utc'][:10])}</td><td>{r['code']['version'][:12]}</td></tr>")
    return "\n".join(rows)
