"""The offline suite on disk: multiple-choice items and texts for bits per byte, every file hashed.

    suite = write_suite(directory, documents, reference_texts, bpb_documents)
    suite = load_suite(directory)

The rules that make items are in `items`; `evaluate` runs a suite. A suite of equal inputs has equal
files, so runs that name the same `Suite.sha256` answered the same questions.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opus_bench.evaluation import items as item_rules

if TYPE_CHECKING:
    from opus_bench.corpus import Corpus

BITS_DOCUMENTS = 20
"""Documents a domain for bits per byte: the first so many given."""
BITS_CHARACTERS = 1000
"""Characters kept of each of them."""
RULES_VERSION = 1
"""Raised when the rules of `items` change, so that an old suite is not taken for a new one."""


@dataclass(frozen=True)
class SuiteTask:
    """One JSONL file of the suite; `surface` is empty and `chance` None for bits per byte."""

    file: str
    sha256: str
    n: int
    chance: float | None
    surface: dict[str, float]

    @property
    def best_surface(self) -> tuple[float | None, str | None]:
        """The accuracy and the name of the best rule that needs no model; chance is one of them."""
        if self.chance is None:
            return None, None
        name = max(("chance", *self.surface), key=lambda rule: {"chance": self.chance, **self.surface}[rule])
        return {"chance": self.chance, **self.surface}[name], name


@dataclass(frozen=True)
class Suite:
    """Multiple-choice tasks and bits-per-byte domains in a directory, each file hashed."""

    directory: Path
    tasks: dict[str, SuiteTask]
    domains: dict[str, SuiteTask]
    size: int
    seed: int
    inputs_sha256: str

    @property
    def sha256(self) -> str:
        """Hash of every file of the suite: equal suites have equal items."""
        files = {part.file: part.sha256 for part in (*self.tasks.values(), *self.domains.values())}
        return _sha256(json.dumps(files, sort_keys=True))


def write_suite(
    directory: str | Path,
    documents: Sequence[str],
    reference_texts: Sequence[str],
    bpb_documents: dict[str, Sequence[str]],
    size: int = 250,
    seed: int = 0,
) -> Suite:
    """The suite in `directory`: read back and verified if it is there, otherwise built.

    Written to a directory beside it and renamed, so an interrupted call leaves nothing behind and
    two processes may call it at once.

    Args:
        documents: held-out encyclopedic texts that the multiple-choice items are made from.
        reference_texts: texts for word frequencies, not among the documents.
        bpb_documents: held-out texts of each domain for bits per byte.
        size: items a multiple-choice task.

    Raises:
        ValueError: if the directory holds a suite of other inputs, a changed file or anything else,
            a domain is empty or badly named, or the documents are too few for the size.
    """
    directory = Path(directory)
    for domain, texts in bpb_documents.items():
        if not re.fullmatch(r"\w+", domain):
            raise ValueError(f"domain '{domain}' names a file and a task: use letters, digits and _")
        if not any(texts):
            raise ValueError(f"domain '{domain}' has no text for bits per byte: give documents or drop it")
    domains = {
        domain: [text[:BITS_CHARACTERS] for text in texts if text][:BITS_DOCUMENTS]
        for domain, texts in bpb_documents.items()
    }
    inputs = [RULES_VERSION, list(documents), list(reference_texts), domains, size, seed]
    inputs_sha256 = _sha256(json.dumps(inputs, sort_keys=True))
    if not directory.exists() or not any(directory.iterdir()):
        _build_suite(directory, documents, reference_texts, domains, size, seed, inputs_sha256)
    suite = load_suite(directory)
    if suite.inputs_sha256 != inputs_sha256:
        raise ValueError(
            f"{directory} holds a suite of size {suite.size}, seed {suite.seed} made from other inputs than "
            f"size {size}, seed {seed}: give another directory or remove this one"
        )
    return suite


def _build_suite(
    directory: Path, documents, reference_texts, domains, size: int, seed: int, inputs_sha256: str
) -> None:
    counts = item_rules.word_counts(reference_texts)
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        manifest: dict[str, Any] = {
            "size": size,
            "seed": seed,
            "inputs_sha256": inputs_sha256,
            "tasks": {},
            "domains": {},
        }
        for name, items in item_rules.build_items(documents, reference_texts, size, seed).items():
            part = _write_part(scratch, name, item_rules.to_jsonl(items), len(items))
            part |= {"chance": item_rules.chance(items), "surface": item_rules.surface_baselines(items, counts)}
            manifest["tasks"][name] = part
        for domain, texts in domains.items():
            lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
            part = _write_part(scratch, f"bits_per_byte_{domain}", lines, len(texts))
            manifest["domains"][domain] = part | {"chance": None, "surface": {}}
        (scratch / "suite.json").write_text(json.dumps(manifest, indent=1))
        scratch.chmod(0o755)
        try:
            os.rename(scratch, directory)
        except OSError:
            if not (directory / "suite.json").exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_part(directory: Path, name: str, text: str, n: int) -> dict[str, Any]:
    (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {"file": f"{name}.jsonl", "sha256": _sha256(text), "n": n}


def load_suite(directory: str | Path) -> Suite:
    """The suite in a directory, every file compared with its hash.

    Raises:
        ValueError: if there is no manifest, or a file is missing or differs from it.
    """
    directory = Path(directory)
    try:
        manifest = json.loads((directory / "suite.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{directory} has no suite.json: give an empty or a new directory") from None
    tasks = {name: SuiteTask(**part) for name, part in manifest.pop("tasks").items()}
    domains = {name: SuiteTask(**part) for name, part in manifest.pop("domains").items()}
    for part in (*tasks.values(), *domains.values()):
        path = directory / part.file
        if not path.exists() or _sha256(path.read_text(encoding="utf-8")) != part.sha256:
            raise ValueError(f"{path} is missing or differs from its hash in suite.json: remove {directory} to rebuild")
    return Suite(directory, tasks, domains, **manifest)


def corpus_suite(corpus: Corpus, size: int, seed: int) -> Suite:
    """The suite of a corpus' held-out documents, beside it on disk: built the first time, then read back."""
    target = corpus.spec.target
    return write_suite(
        corpus.directory.parent / f"suite-{corpus.spec.sha256[:12]}-{size}-{seed}",
        documents=corpus.documents("evaluation", target),
        reference_texts=corpus.documents("train", target),
        bpb_documents={domain: corpus.documents("evaluation", domain) for domain in corpus.domains},
        size=size,
        seed=seed,
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
