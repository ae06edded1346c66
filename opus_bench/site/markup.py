"""A page of results/tables as HTML whose cells know the run records behind them.

The markdown page is the one source: whatever an experiment writes there is shown here, with nothing to
register.  What a cell is made from is read from the page itself:

    records     those that the page links (``../runs/ID.json``)
    scale       the heading that names it; optimizer: a heading, column or cell that begins with its name
    method      a row or column that bears a record's label; a row that links runs is made from these
    seed        the cell of a column "seed"
    a column that names Random compares with it, so Random's records are behind the cell too

Where a table says less, its cells stand on all records of their section.  HTML in a page is shown as text.
"""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import PurePosixPath

from markdown_it import MarkdownIt
from markdown_it.token import Token

from opus_bench.figures import OPTIMIZERS
from opus_bench.schema import ARMS, NOT_RUN
from opus_bench.sections import BASE, FOREIGN, label_of
from opus_bench.tables import MARK, NONE

MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table")
RUN = re.compile(r"(?:\.\./)?runs/([0-9a-f]{12})\.json$")
COMMAND = re.compile(r"`(python -m [^`]+)`")
FOLDED = ("runs", "deviations", "formulas")
"""Headings that begin or end so are closed until asked for."""


class RunSets:
    """Numbers the sets of run ids that cells stand on, so that each is written once."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[str, ...], int] = {}

    def number(self, ids: Iterable[str]) -> int:
        """The set's number; the same for the same ids."""
        return self.numbers.setdefault(tuple(ids), len(self.numbers))


@dataclass
class Page:
    """One page: its markup without the title, and the facts of its head."""

    name: str
    title: str
    html: str
    records: list[dict]
    commands: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Place:
    """Where on a page: what its headings say."""

    scale: str | None = None
    optimizer: str | None = None

    def narrowed(self, heading: str, records: Sequence[dict]) -> Place:
        """The place under one more heading."""
        words = f" {re.sub(r'[^a-z0-9]+', ' ', heading.lower())} "
        scale = next((r["scale"] for r in records if f" {r['scale'].lower()} " in words), self.scale)
        return Place(scale, optimizer_of(heading) or self.optimizer)

    def of(self, records: Sequence[dict]) -> list[dict]:
        """The records of this scale and optimizer."""
        return [r for r in records if self.scale in (None, r["scale"])
                and self.optimizer in (None, r["config"]["optimizer"])]


def optimizer_of(text: str) -> str | None:
    """The optimizer that a heading, column or cell begins with."""
    return next((key for key, name in OPTIMIZERS.items() if re.match(rf"{name}\b", text)), None)


def render(name: str, text: str, records: Mapping[str, dict], figure: Callable[[str, str], str], sets: RunSets) -> Page:
    """The page as HTML; headings are one level deeper than in the file.

    Args:
        records: run id -> record, of all runs.
        figure: (file name, place's scale) -> markup of a figure.
    """
    tokens = MARKDOWN.parse(text)
    linked = dict.fromkeys(match.group(1) for token in tokens for child in token.children or []
                           if (match := RUN.search(str(child.attrs.get("href", "")))))
    mine = [records[run] for run in linked if run in records]
    title, parts, open_sections, place, at = name, [], [], Place(), 0
    while at < len(tokens):
        token = tokens[at]
        end = _end(tokens, at)
        if token.type == "heading_open" and token.tag == "h1":
            title = plain(tokens[at + 1])
        elif token.type == "heading_open":
            level, heading = int(token.tag[1]), plain(tokens[at + 1])
            while open_sections and open_sections[-1][0] >= level:
                _, closing, place = open_sections.pop()
                parts.append(closing)
            inner = place.narrowed(heading, mine)
            opening, closing = _section(name, level, heading, inner, MARKDOWN.renderer.render(
                [tokens[at + 1]], MARKDOWN.options, {}))
            open_sections.append((level, closing, place))
            parts.append(opening)
            place = inner
        elif token.type == "table_open":
            parts.append(_table(tokens[at:end], place, mine, records, sets, f"{title}: {_last_heading(tokens[:at])}"))
        elif (image := _only_image(tokens[at:end])) is not None:
            parts.append(figure(PurePosixPath(str(image.attrs["src"])).name, place.scale or ""))
        else:
            parts.append(_prose(tokens[at:end]))
        at = end
    parts += [closing for _, closing, _ in reversed(open_sections)]
    commands = list(dict.fromkeys(found for token in tokens if token.type == "inline" for found in
                                  COMMAND.findall(token.content) if "Made by" in token.content))
    return Page(name, title, "\n".join(parts), mine, commands)


def table(text: str, place: Place, mine: Sequence[dict], records: Mapping[str, dict], sets: RunSets,
          caption: str) -> str:
    """One markdown table as HTML, its cells made from some of ``mine``."""
    return _table(MARKDOWN.parse(text), place, mine, records, sets, caption)


def plain(token: Token) -> str:
    """The text of an inline token without its marks."""
    return "".join(child.content for child in token.children or [])


def label_in(text: str) -> str:
    """A cell's text as a label: without the mark of another code version."""
    return text.removesuffix(FOREIGN).strip()


def arm_in(text: str) -> str | None:
    """The arm that a cell names: alone, or in brackets."""
    found = re.search(rf"\(({'|'.join(ARMS)})\b[^)]*\)|^({'|'.join(ARMS)})(?: arm)?$", text)
    return None if found is None else found.group(1) or found.group(2)


def slug(text: str) -> str:
    """A heading as the tail of a link."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60]


def _end(tokens: Sequence[Token], start: int) -> int:
    """Index after the block that starts here."""
    depth = 0
    for at in range(start, len(tokens)):
        depth += tokens[at].nesting
        if depth == 0:
            return at + 1
    return len(tokens)


def _last_heading(tokens: Sequence[Token]) -> str:
    return next((plain(tokens[i]) for i in range(len(tokens) - 1, 0, -1) if tokens[i - 1].type == "heading_open"), "")


def _only_image(tokens: Sequence[Token]) -> Token | None:
    if len(tokens) != 3 or tokens[0].type != "paragraph_open":
        return None
    children = tokens[1].children or []
    return children[0] if len(children) == 1 and children[0].type == "image" else None


def _section(name: str, level: int, heading: str, place: Place, inner: str) -> tuple[str, str]:
    facts = "".join(f' data-{key}="{escape(value)}"' for key, value in
                    (("scale", place.scale), ("optimizer", place.optimizer)) if value)
    whole = heading if place.scale is None or place.scale in heading.lower() else f"{place.scale} {heading}"
    identity, tag = f"{name}--{slug(whole)}", f"h{level + 1}"
    said = heading.lower()
    if said.startswith(FOLDED) or said.endswith(FOLDED):
        opening = f'<details class="part" id="{identity}"{facts}><summary><{tag}>{inner}</{tag}></summary>'
        return opening, "</details>"
    return f'<section class="part" id="{identity}"{facts}><{tag}>{inner}</{tag}>', "</section>"


def _prose(tokens: Sequence[Token]) -> str:
    for token in tokens:
        for child in token.children or []:
            if child.type == "link_open":
                child.attrs["href"] = _target(str(child.attrs["href"]))
    return MARKDOWN.renderer.render(list(tokens), MARKDOWN.options, {}).strip()


def _target(href: str) -> str:
    """A link of results/tables as one of results/index.html."""
    if run := RUN.search(href):
        return f"#run-{run.group(1)}"
    if re.fullmatch(r"[\w-]+\.md", href):
        return f"#{href.removesuffix('.md')}"
    if re.match(r"[a-z]+:|#", href):
        return href
    return href[3:] if href.startswith("../") else f"tables/{href}"


# Tables ---------------------------------------------------------------------------------------


def _table(tokens: Sequence[Token], place: Place, mine: Sequence[dict], records: Mapping[str, dict], sets: RunSets,
           caption: str) -> str:
    lines: list[list[Token]] = []
    for before, token in zip(tokens, tokens[1:], strict=False):
        if before.type == "tr_open":
            lines.append([])
        if token.type == "inline" and before.type in ("th_open", "td_open"):
            lines[-1].append(token)
    header, body = [plain(cell) for cell in lines[0]], lines[1:]
    labels = {label_of(record): record for record in records.values()}
    here = place.of(mine)
    wide = (' class="wide"' if len(text) > 24 else "" for text in header)
    head = "".join(_cell("th", cell, ' scope="col"' + width + _method(label_in(text), labels))
                   for cell, text, width in zip(lines[0], header, wide, strict=True))
    rows = [_row(cells, header, here, labels, sets) for cells in body]
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>")


def _method(text: str, labels: Mapping[str, dict]) -> str:
    """Attributes that filters look at."""
    known = labels.get(text)
    arm = known["arm"] if known else arm_in(text)
    method = f' data-method="{escape(text)}"' if known and text not in OPTIMIZERS.values() else ""
    return method + (f' data-arm="{arm}"' if arm else "")


def _row(cells: Sequence[Token], header: Sequence[str], here: Sequence[dict], labels: Mapping[str, dict],
         sets: RunSets) -> str:
    texts = [plain(cell) for cell in cells]
    named = next((label_in(text) for text in texts if label_in(text) in labels), label_in(texts[0]))
    linked = [match.group(1) for cell in cells for child in cell.children or []
              if (match := RUN.search(str(child.attrs.get("href", ""))))]
    behind = [_behind(text, column, texts, header, here, linked) for text, column in zip(texts, header, strict=True)]
    numbers = [sets.number(ids) if ids else None for ids in behind]
    common = Counter(n for n in numbers if n is not None).most_common(1)
    usual = common[0][0] if common else None
    shown = []
    for at, (cell, number) in enumerate(zip(cells, numbers, strict=True)):
        own = "" if number == usual else f' data-runs="{"" if number is None else number}"'
        tag, scope = ("td", "") if at else ("th", ' scope="row"')
        shown.append(_cell(tag, cell, scope + own + _kind(texts[at], header[at])))
    runs = "" if usual is None else f' data-runs="{usual}"'
    return f"<tr{_method(named, labels)}{runs}>{''.join(shown)}</tr>"


def _cell(tag: str, cell: Token, attributes: str) -> str:
    return f"<{tag}{attributes}>{_prose([cell])}</{tag}>"


def _kind(text: str, column: str) -> str:
    kinds = [name for name, holds in (
        ("not-run", text.startswith(NOT_RUN)),
        ("paper", column.startswith("the paper's")),
        ("marked", text.endswith(MARK)),
        ("number", re.match(r"[+\-−{]?\d", text) is not None or text == NONE),
        ("long", len(text) > 48),
    ) if holds]
    return f' class="{" ".join(kinds)}"' if kinds else ""


def _behind(text: str, column: str, texts: Sequence[str], header: Sequence[str], here: Sequence[dict],
            linked: Sequence[str]) -> list[str]:
    """Run ids that a cell is made from (module docstring); none where it holds no number of ours."""
    if text in ("", NONE) or text.startswith(NOT_RUN) or column.startswith("the paper's"):
        return []
    if linked:
        return list(linked)
    optimizer = optimizer_of(column) or next((found for cell in texts if (found := optimizer_of(cell))), None)
    chosen = [r for r in here if optimizer in (None, r["config"]["optimizer"])]
    if "seed" in header and (seed := texts[header.index("seed")]).isdigit():
        chosen = [r for r in chosen if r["config"]["seed"] == int(seed)] or chosen
    wanted = {label_in(column), *map(label_in, texts)}
    bearing = [r for r in chosen if label_of(r) in wanted]
    if not bearing and header[0] == "method":  # a row of no run: chance, a method that was not run
        return []
    found = bearing or chosen
    if bearing and re.search(rf"\b{BASE}\b", column):
        found = [*found, *(r for r in chosen if r["method"].startswith(BASE) and r not in found)]
    return [r["run_id"] for r in found]
