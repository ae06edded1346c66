"""Which evaluation items stand in a pool: shared runs of n words, 13 by default.

    items = read_items(["items.jsonl"]) + task_items(["hellaswag"])
    report = contamination(pool_folder, items)

Words are compared without case and punctuation (`splits.normalise`).  An item is hit if the pool holds a run
of n of its words, question and any of its options taken together; one shorter than n words cannot be
checked and is counted apart.  Common practice since Brown et al. 2020 (GPT-3), appendix C, whose 13-grams
these are; a hit says that text is shared, not that a model profits from it.

Exactness: exact; hashes only find places, where the words themselves are then compared.
Cost: the pool is read once, shard by shard, and decoded: 1.7 million tokens a second and worker, measured with
GPT-2's tokenizer and 2,000 items.
"""

import json
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from opus_bench.archives import CorpusError
from opus_bench.pools.shards import check_shard, read_manifest, read_shard
from opus_bench.splits import Shingles, normalise

NGRAM = 13
DOCUMENTS = 512
"""Decoded together."""
EXAMPLES = 3
"""Shared runs of words that the report quotes of an item."""


@dataclass(frozen=True)
class EvaluationItem:
    """One question: `texts` holds it once with each of its options."""

    task: str
    id: str
    texts: tuple[str, ...]


def read_items(paths: Sequence[str | Path], fields: Sequence[str] = ()) -> list[EvaluationItem]:
    """The items of JSONL files, a file a task.

    Args:
        fields: names whose values make the text, joined in this order; a list stands for options, one at a
            time.  By default context and choices (the offline suite), or text.

    Raises:
        CorpusError: for a line that is no JSON object or lacks a field.
    """
    items = []
    for path in map(Path, paths):
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise CorpusError(f"cannot read items of {path} ({error}); give JSONL files") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                names = fields or (("context", "choices") if "choices" in record else ("text",))
                texts = _texts([record[name] for name in names])
            except (ValueError, TypeError, KeyError) as error:
                wanted = ", ".join(fields) or "text, or context and choices"
                raise CorpusError(f"{path}, line {number}: {type(error).__name__} {error}; give JSON objects that have "
                                  f"{wanted}, or name their --fields") from error
            items.append(EvaluationItem(path.stem, str(record.get("id", number)), texts))
    return items


def _texts(values: Sequence[Any]) -> tuple[str, ...]:
    texts = [""]
    for value in values:
        options = value if isinstance(value, list) else [value]
        texts = [f"{text} {option}" for text in texts for option in options]
    return tuple(texts)


def task_items(names: Sequence[str]) -> list[EvaluationItem]:
    """The documents of lm-eval's tasks (of the hub; the paper's own are among them), prompts and options.

    Raises:
        CorpusError: if a task cannot be loaded.
    """
    from lm_eval.tasks import TaskManager

    from opus_bench.evaluation.evaluate import TEMPLATES, quiet

    items = []
    with quiet("loading tasks", len(names)):
        manager = TaskManager(include_path=str(TEMPLATES))
        for name in names:
            try:
                loaded = manager.load([name])["tasks"]
            except Exception as error:  # any failure to load is the answer
                raise CorpusError(f"task {name!r} cannot be loaded ({type(error).__name__}: {error}); connect to the "
                                  "hub, or give its items as JSONL with --items") from error
            for leaf, task in loaded.items():
                items += [EvaluationItem(leaf, str(number), _document_texts(task, document))
                          for number, document in enumerate(task.eval_docs)]
    return items


def _document_texts(task: Any, document: Mapping[str, Any]) -> tuple[str, ...]:
    """Prompt, an option, and the target, those of them that are text (others are indices)."""
    options = task.doc_to_choice(document) if task.OUTPUT_TYPE == "multiple_choice" else [""]
    parts = [task.doc_to_text(document), list(options), task.doc_to_target(document)]
    return _texts([part for part in parts if isinstance(part, str | list)])


class RunIndex:
    """The runs of n words of all items, found in a text by their hashes and confirmed by their words."""

    def __init__(self, items: Sequence[EvaluationItem], size: int = NGRAM):
        if size < 2:
            raise CorpusError(f"ngram is {size}; runs of at least 2 words say something")
        self.size, self.shingles = size, Shingles(size)
        self.words = [[normalise(text).split() for text in item.texts] for item in items]
        ids, hashes = self.shingles.words, []
        for number, texts in enumerate(self.words):
            for text, words in enumerate(texts):
                found = self._hashes([ids.setdefault(word, len(ids) + 1) for word in words])
                hashes += [(value, number, text, place) for place, value in enumerate(found.tolist())]
        hashes.sort()
        self.hashes = np.array([entry[0] for entry in hashes], dtype=np.uint64)
        self.places = np.array([entry[1:] for entry in hashes], dtype=np.int64).reshape(-1, 3)

    def runs(self, number: int) -> set[tuple[str, ...]]:
        """The distinct runs of an item; empty for one that is too short."""
        shifted = ([words[k:] for k in range(self.size)] for words in self.words[number])
        return {run for words in shifted for run in zip(*words, strict=False)}

    def find(self, text: str) -> set[tuple[int, tuple[str, ...]]]:
        """(item, run) of every run of the items that the text holds."""
        words = normalise(text).split()
        found = self._hashes([self.shingles.words.get(word, 0) for word in words])
        left, right = (np.searchsorted(self.hashes, found, side) for side in ("left", "right"))
        shared = set()
        for start in np.flatnonzero(left < right).tolist():
            run = tuple(words[start : start + self.size])
            for number, which, place in self.places[left[start] : right[start]].tolist():
                if tuple(self.words[number][which][place : place + self.size]) == run:
                    shared.add((number, run))
        return shared

    def _hashes(self, ids: list[int]) -> np.ndarray:
        if len(ids) < self.size:
            return np.empty(0, dtype=np.uint64)
        windows = np.lib.stride_tricks.sliding_window_view(np.array(ids, dtype=np.uint64), self.size)
        return windows @ self.shingles.multipliers


def pool_documents(path: Path, tokenizer: Tokenizer, end: int) -> Iterator[str]:
    """The texts of a shard's documents, without special tokens."""
    tokens = read_shard(path)
    stops = np.flatnonzero(tokens == end)
    starts = np.concatenate([[0], stops[:-1] + 1])
    for first in range(0, len(stops), DOCUMENTS):
        part = zip(starts[first : first + DOCUMENTS], stops[first : first + DOCUMENTS], strict=True)
        yield from tokenizer.decode_batch([tokens[start:stop].tolist() for start, stop in part])


class Scan:
    """What a process needs to look through shards of a pool."""

    def __init__(self, folder: str, end: int, items: Sequence[EvaluationItem], size: int):
        self.folder, self.end, self.index = Path(folder), end, RunIndex(items, size)
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    def shard(self, shard: Mapping[str, Any]) -> dict[int, "Hit"]:
        """By item: what the shard holds of it."""
        path = self.folder / shard["file"]
        check_shard(path, shard, digest=False)
        hits: dict[int, Hit] = {}
        for number, text in enumerate(pool_documents(path, self.tokenizer, self.end)):
            shared = self.index.find(text)
            for item, run in shared:
                hits.setdefault(item, Hit(set(), 0, f"{shard['file']} document {number}")).runs.add(run)
            for item in {item for item, _ in shared}:
                hits[item].documents += 1
        return hits


@dataclass
class Hit:
    """An item in the pool: its runs there, the documents that hold any, and the first of these."""

    runs: set[tuple[str, ...]]
    documents: int
    first: str


_scan: Scan | None = None  # of a worker process, which makes its index once


def _start(*arguments: Any) -> None:
    global _scan
    _scan = Scan(*arguments)


def _work(shard: Mapping[str, Any]) -> dict[int, Hit]:
    assert _scan is not None
    return _scan.shard(shard)


def contamination(
    folder: str | Path, items: Sequence[EvaluationItem], size: int = NGRAM, workers: int = 1, progress: bool = True
) -> dict[str, Any]:
    """The report: counts and shares over all and by task, and every item that is hit.

    Args:
        folder: of a finished pool (`pool.read_manifest`).
        size: words in a run.
        workers: processes; a shard is one's at a time.

    Raises:
        CorpusError: without items, and for a pool that is unfinished or damaged.
    """
    if not items:
        raise CorpusError("no items to look for; give --items or --tasks")
    if workers < 1:
        raise CorpusError(f"workers is {workers}; it must be at least 1")
    folder = Path(folder)
    manifest = read_manifest(folder / "manifest.json")
    shards = manifest["shards"]
    setting = str(folder), manifest["tokenizer"]["end_of_text"], tuple(items), size
    index = RunIndex(items, size)
    hits: dict[int, Hit] = {}
    with tqdm(total=sum(shard["tokens"] for shard in shards), desc="looking for items", unit="token", unit_scale=True,
              disable=None if progress else True) as bar:
        for shard, found in zip(shards, _each(shards, workers, setting), strict=True):
            for item, new in found.items():
                hit = hits.setdefault(item, Hit(set(), 0, new.first))
                hit.runs |= new.runs
                hit.documents += new.documents
            bar.update(shard["tokens"])
    return {
        "ngram": size,
        "pool": {"sha256": manifest["sha256"], "tokens": sum(shard["tokens"] for shard in shards),
                 "documents": sum(shard["documents"] for shard in shards)},
        "all": _counts(range(len(items)), index, hits),
        "tasks": {task: _counts([n for n, item in enumerate(items) if item.task == task], index, hits)
                  for task in dict.fromkeys(item.task for item in items)},
        "hits": [
            {"task": items[n].task, "id": items[n].id, "runs": len(hits[n].runs), "runs_of_item": len(index.runs(n)),
             "documents": hits[n].documents, "first": hits[n].first,
             "examples": [" ".join(run) for run in sorted(hits[n].runs)[:EXAMPLES]]}
            for n in sorted(hits)
        ],
    }


def _each(shards: list[dict[str, Any]], workers: int, setting: tuple) -> Iterator[dict[int, Hit]]:
    if workers == 1:
        yield from map(Scan(*setting).shard, shards)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=setting) as crew:
        yield from crew.map(_work, shards)


def _counts(numbers: Sequence[int], index: RunIndex, hits: Mapping[int, Hit]) -> dict[str, Any]:
    short = sum(not index.runs(n) for n in numbers)
    found = sum(n in hits for n in numbers)
    checked = len(numbers) - short
    return {"items": len(numbers), "too_short": short, "hit": found, "share": found / checked if checked else None}
