"""What the site adds to the pages of docs/: the repository's files that they link to, and included parts.

A page links to a file as it lies in the repository (``../opus_bench/ghost.py``), so its links work in a checkout and
on a code host.  For the site every linked file is added, with what it links to in turn: Markdown as a page, Python as
a page of its source, anything else as it is.  ``<!-- include FILE -->`` is replaced by the file, as code;
``<!-- include FILE#NAME -->`` by what stands between its markers ``<!-- NAME -->`` and ``<!-- end of NAME -->``.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCS = "docs/"
LINK = re.compile(r"(\]\()([^)#\s:]+)")
INCLUDE = re.compile(r"<!-- include ([\w./-]+)(?:#(\w+))? -->")


def site_path(path: str) -> str:
    """Where a file of the repository lies on the site, paths in the manner of URLs."""
    if path.startswith(DOCS):
        return path.removeprefix(DOCS)
    return f"{path}.md" if path.endswith(".py") else path


def target(path: str, link: str) -> str | None:
    """The file of the repository that a link of ``path`` means, None if there is none."""
    found = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    return found if not found.startswith("..") and (ROOT / found).is_file() else None


def relinked(text: str, path: str, moved: Callable[[str], str]) -> str:
    """``text`` of the file ``path`` with every link to a file of the repository replaced by ``moved`` of that file."""

    def link(match: re.Match[str]) -> str:
        found = target(path, match[2])
        return match[0] if found is None else match[1] + moved(found)

    return LINK.sub(link, text)


def included(path: str) -> str:
    """Markdown of a file of the repository with every include in its place, links as from ``path``.

    Raises:
        PluginError: naming a file or a marker that is not there.
    """

    def part(match: re.Match[str]) -> str:
        name, marker = match.groups()
        if not (ROOT / name).is_file():
            raise PluginError(f"include {name}: no such file")
        text = (ROOT / name).read_text(encoding="utf-8")
        if marker is None:
            return f"~~~~ {{.python}}\n{text}~~~~"
        found = re.search(rf"<!-- {marker} -->\n(.*?)<!-- end of {marker} -->", text, re.S)
        if found is None:
            raise PluginError(f"include {name}: it has no markers <!-- {marker} --> and <!-- end of {marker} -->")
        return relinked(found[1], name, lambda file: posixpath.relpath(file, posixpath.dirname(path) or "."))

    return INCLUDE.sub(part, (ROOT / path).read_text(encoding="utf-8"))


def page_text(path: str) -> str:
    """Markdown of a file of the repository, includes done, links for the site."""
    if path.endswith(".py"):
        return f"# {path}\n\n~~~~ {{.python}}\n{(ROOT / path).read_text(encoding='utf-8')}\n~~~~\n"
    here = posixpath.dirname(site_path(path)) or "."
    return relinked(included(path), path, lambda file: posixpath.relpath(site_path(file), here))


def linked(path: str) -> list[str]:
    """Files of the repository that a page links to."""
    return [found for _, link in LINK.findall(included(path)) if (found := target(path, link))]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Navigation may name files of the repository too."""
    config.nav = [{title: site_path(posixpath.normpath(DOCS + path)) for title, path in one.items()}
                  for one in config.nav or []]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to, and what those link to."""
    left = [DOCS + file.src_uri for file in files.documentation_pages()]
    left += [path for one in config.nav or [] for path in one.values()]
    done = set()
    while left:
        path = left.pop()
        if path in done:
            continue
        done.add(path)
        uri = site_path(path)
        if not (ROOT / path).is_file():
            continue
        if uri.endswith(".md"):
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, content=page_text(path)))
            left += linked(path) if path.endswith(".md") else []
        elif files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Pages of docs/ as page_text has them; the others are so already."""
    path = DOCS + page.file.src_uri
    return page_text(path) if (ROOT / path).is_file() else markdown
