"""Figures inside the results page: a matplotlib SVG as inline markup that follows the page's colours.

Only drawing elements and attributes are let through (no script, style sheet, link or handler), names
are made unique to the figure, coordinates rounded to a hundredth of a point, and black, white and the
greys of `figures.STYLE` become the page's own, so that a figure reads on a dark ground.  A heat map
keeps its colours and its white ground: its numbers are printed on them.
"""
from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

ELEMENTS = {"svg", "g", "path", "use", "text", "tspan", "defs", "clipPath", "rect", "image"}
ATTRIBUTES = {"id", "d", "x", "y", "width", "height", "viewBox", "transform", "style", "clip-path", "href",
              "preserveAspectRatio"}
GROUNDS = {"#ffffff": "var(--paper)", "#000000": "var(--ink)", "#1a1a1a": "var(--ink)", "#444444": "var(--soft)",
           "#e4e4e4": "var(--grid)"}
LIT = ("#0072b2", "#009e73", "#5e3c99", "#8c6d1f", "#7f7f7f")
"""Line colours that are too dark on a dark ground; the page's style sheet has a lighter one of each."""
REFERENCE = re.compile(r"url\(#([^)]+)\)")


@dataclass(frozen=True)
class InlineFigure:
    """A figure as markup, with what `values` put into it."""

    svg: str
    title: str = ""
    note: str = ""
    panels: list[dict] = field(default_factory=list)
    heat_map: bool = False


def inline(path: str | Path) -> InlineFigure:
    """The SVG file as inline markup.

    Raises:
        ValueError: the file is no SVG.
    """
    path = Path(path)
    try:
        root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: not an SVG ({error}); make the figures again") from error
    if _name(root.tag) != "svg":
        raise ValueError(f"{path}: not an SVG but <{_name(root.tag)}>; make the figures again")
    heat_map = any("QuadMesh" in element.get("id", "") for element in root.iter())
    found = _described(root)
    used = {name for element in root.iter() for name in _references(element)}
    title = found.get("title") or path.stem.replace("_", " ")
    parts: list[str] = []
    _write(root, f"{path.stem}-", used, not heat_map, title, parts)
    return InlineFigure("".join(parts), title, found.get("note", ""), found.get("panels", []), heat_map)


def _described(root: ElementTree.Element) -> dict:
    text = next((element.text for element in root.iter() if _name(element.tag) == "description"), None)
    try:
        found = json.loads(text or "{}")
    except ValueError:  # another figure's prose
        return {}
    return found if isinstance(found, dict) else {}


def _name(qualified: object) -> str:
    return qualified.rpartition("}")[2] if isinstance(qualified, str) else ""


def _references(element: ElementTree.Element) -> set[str]:
    names = {name for value in element.attrib.values() for name in REFERENCE.findall(value)}
    return names | {value[1:] for key, value in element.attrib.items() if _name(key) == "href" and value[:1] == "#"}


def _write(element: ElementTree.Element, prefix: str, used: set[str], themed: bool, title: str,
           parts: list[str]) -> None:
    tag = _name(element.tag)
    if tag not in ELEMENTS:
        return
    attributes = {}
    for key, value in element.attrib.items():
        name = _name(key)
        if name not in ATTRIBUTES or name == "id" and value not in used:
            continue
        if name == "id":
            value = prefix + value
        elif name == "href":
            if value[:1] != "#" and not (tag == "image" and value.startswith("data:image/png;base64,")):
                continue
            value = f"#{prefix}{value[1:]}" if value[:1] == "#" else value
        elif name in ("d", "x", "y", "transform"):
            value = _rounded(value)
        elif name == "style":
            value = _style(value, themed)
        value = REFERENCE.sub(rf"url(#{prefix}\1)", value)
        if value:
            attributes[name] = value
    if tag == "svg":
        attributes = {"viewBox": attributes["viewBox"], "role": "img", "aria-label": title}
    parts.append(f"<{tag}{''.join(f' {name}={_quoted(value)}' for name, value in attributes.items())}>")
    if tag in ("text", "tspan"):
        parts.append(escape(element.text or "", quote=False))
    for child in element:
        _write(child, prefix, used, themed, title, parts)
        if tag in ("text", "tspan"):
            parts.append(escape((child.tail or "").strip(), quote=False))
    parts.append(f"</{tag}>")


def _quoted(value: str) -> str:
    return f'"{escape(value)}"'


def _rounded(value: str) -> str:
    short = re.sub(r"-?\d+\.\d+", lambda m: f"{round(float(m.group()), 2):g}", " ".join(value.split()))
    return re.sub(r"rotate\(-?0(?: [\d. -]+)?\)", "", short).strip()


def _style(value: str, themed: bool) -> str:
    kept = [part.strip() for part in value.split(";") if part.strip() and "url(" not in part.replace("url(#", "")]
    text = ";".join(re.sub(r":\s+", ":", part) for part in kept if not part.startswith("font-family"))
    if not themed:
        return text
    for colour, ground in GROUNDS.items():
        text = text.replace(colour, ground)
    for colour in LIT:
        text = text.replace(colour, f"var(--c{colour[1:]},{colour})")
    return text
