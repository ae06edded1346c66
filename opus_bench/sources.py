"""Documents with known domain and quality, parsed from the pinned archives or made by corruption.

Quality is a tier, 1 the best:
    1  edited prose: encyclopedia, dictionary, recipes
    2  documentation: technical, mathematics
    3  program code
    4  text of no use to the target: translation catalogues, minified scripts and style sheets,
       other languages, and corrupted text, whose defect is known because it was put there
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opus_bench.archives import ARCHIVES, fetch, members

END_OF_TEXT = "<|endoftext|>"
DOCUMENT_CHARACTERS = (60, 20_000)
"""Shorter documents are dropped; longer ones are cut at the last line end before the limit."""

QUALITY = {
    "encyclopedia": 1,
    "dictionary": 1,
    "recipes": 1,
    "technical": 2,
    "mathematics": 2,
    "code": 3,
    "catalogues": 4,
    "minified": 4,
    "foreign": 4,
    "corrupted": 4,
}
"""Every domain with its tier, in the order used everywhere."""

PROVIDES = {
    "wiki": ("encyclopedia", "foreign"),
    "dictionary": ("dictionary",),
    "recipes": ("recipes",),
    "django": ("technical", "code", "catalogues", "minified"),
    "sympy": ("mathematics", "code"),
}
"""The domains each archive holds; `corrupted` is made from whatever the others give."""


@dataclass(frozen=True)
class Document:
    """One text with the labels that a selection method should discover."""

    text: str
    """The text, without the end-of-text marker."""
    domain: str
    """A key of `QUALITY`."""
    quality: int
    """Tier, 1 best to 4 worst."""
    source: str
    """``package==version:member``; a corrupted document names its defect before that."""


def read_documents(
    key: str, domains: Sequence[str], cache: str | Path | None = None, progress: bool = True
) -> list[Document]:
    """The documents of one archive that belong to `domains`, in the order of their sources."""
    pin = ARCHIVES[key].pin
    found = []
    for domain, member, text in READERS[key](fetch(key, cache, progress)):
        text = clean(text)
        if domain in domains and len(text) >= DOCUMENT_CHARACTERS[0]:
            found.append(Document(text, domain, QUALITY[domain], f"{pin}:{member}"))
    return found


def clean(text: str) -> str:
    """Unix line ends, no end-of-text marker, no outer blank space, at most the document limit."""
    text = text.encode("utf-8", "replace").decode().replace("\r\n", "\n").replace(END_OF_TEXT, "").strip()
    limit = DOCUMENT_CHARACTERS[1]
    if len(text) > limit:
        end = text.rfind("\n", 0, limit)
        text = text[: end if end > limit // 2 else limit].rstrip()
    return text


def read_wiki(path: Path) -> Iterator[tuple[str, str, str]]:
    """The opening paragraphs of encyclopedia articles in English, French and Spanish."""
    for name, content in members(path, lambda name: "/data/summaries_" in name):
        domain = "encyclopedia" if name.endswith("_en-us.json") else "foreign"
        for title, article in json.loads(content).items():
            yield domain, f"{name}#{title}", article["extract"]


def read_dictionary(path: Path) -> Iterator[tuple[str, str, str]]:
    """Entries: headword, part of speech, definitions with examples, phrases.

    Etymologies are left out: in this edition many belong to the neighbouring entry.
    """
    for name, content in members(path, lambda name: "/data/en/words_" in name):
        for word, entry in json.loads(content).items():
            parts = []
            for sense in entry["pos"]:
                parts.append(f"{entry['entry']}, {sense.get('part_of_speech') or ''}".rstrip(", "))
                for definition in sense["definitions"]:
                    parts.append(" ".join([definition["text"], *definition["examples"]]))
                if sense.get("cs"):
                    parts.append(sense["cs"])
            yield "dictionary", f"{name}#{word}", "\n".join(parts)


def read_recipes(path: Path) -> Iterator[tuple[str, str, str]]:
    """Recipes in English: title, ingredients, steps."""
    for name, content in members(path, lambda name: name.endswith("/recipes_en-us.json")):
        for key, recipe in json.loads(content).items():
            ingredients = "\n".join(f"- {item}" for item in recipe["ingredients"])
            text = f"{recipe['title']}\n\n{ingredients}\n\n" + "\n".join(recipe["steps"])
            yield "recipes", f"{name}#{key}", re.sub(r" ?\([\s/]*\)", "", text)


def read_django(path: Path) -> Iterator[tuple[str, str, str]]:
    """Documentation, code, translation catalogues, scripts and style sheets of a web framework."""
    domains = {".txt": "technical", ".py": "code", ".po": "catalogues", ".js": "minified", ".css": "minified"}

    def keep(name: str) -> bool:
        folder, suffix = name.partition("/")[2], Path(name).suffix
        if suffix == ".txt":
            return folder.startswith("docs/")
        if suffix == ".po":
            return "/LC_MESSAGES/" in name and "/en/" not in name
        return suffix in domains and folder.startswith("django/")

    for name, content in members(path, keep):
        text = content.decode("utf-8", errors="replace")
        suffix = Path(name).suffix
        yield domains[suffix], name, catalogue_entries(text) if suffix == ".po" else text


def read_sympy(path: Path) -> Iterator[tuple[str, str, str]]:
    """Documentation and code, without its tests, of a computer algebra system."""

    def keep(name: str) -> bool:
        folder, suffix = name.partition("/")[2], Path(name).suffix
        if folder.startswith("doc/src/"):
            return suffix in (".rst", ".md")
        return suffix == ".py" and folder.startswith("sympy/") and "/tests/" not in folder

    for name, content in members(path, keep):
        domain = "code" if name.endswith(".py") else "mathematics"
        yield domain, name, content.decode("utf-8", errors="replace")


def catalogue_entries(text: str) -> str:
    """The translated entries of a .po file, without its header (which names its translators)."""
    entries = [block.strip() for block in text.replace("\r\n", "\n").split("\n\n")[1:]]
    return "\n\n".join(entry for entry in entries if "msgid" in entry and not entry.endswith('msgstr ""'))


READERS = {
    "wiki": read_wiki,
    "dictionary": read_dictionary,
    "recipes": read_recipes,
    "django": read_django,
    "sympy": read_sympy,
}


def corrupt(documents: Sequence[Document], characters: int, seed: int) -> list[Document]:
    """About `characters` of text spoilt in a known way, a third of the documents each:

        shuffled   the words of a document in random order
        random     as many words drawn uniformly from the distinct words of all `documents`
        repeated   a phrase of 3 to 12 words, over and over, to the length of the document

    A pure function of its arguments. The defect stands before the source: ``shuffled:package...``.
    """
    rng = np.random.default_rng(seed)
    usable = [document for document in documents if len(document.text.split()) >= 12]
    vocabulary = sorted({word for document in usable for word in document.text.split()})
    made: list[Document] = []
    total = 0
    for turn, index in enumerate(rng.permutation(len(usable))):
        if total >= characters:
            break
        words = usable[index].text[:4_000].split()
        defect = ("shuffled", "random", "repeated")[turn % 3]
        if defect == "shuffled":
            words = [words[i] for i in rng.permutation(len(words))]
        elif defect == "random":
            words = [vocabulary[i] for i in rng.integers(len(vocabulary), size=len(words))]
        else:
            size = int(rng.integers(3, 13))
            start = int(rng.integers(max(1, len(words) - size)))
            words = (words[start : start + size] * len(words))[: len(words)]
        text = clean(" ".join(words))
        total += len(text)
        made.append(Document(text, "corrupted", QUALITY["corrupted"], f"{defect}:{usable[index].source}"))
    return made
