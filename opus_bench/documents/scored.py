"""Score every document of a pool once, in chunks that survive an interruption, and keep the best.

    <directory>/plan.json                          all that determines the scores
    <directory>/scores/<file>-<chunk>.parquet      id, file, row, tokens, score of ``chunk`` documents
    <directory>/scores/<file>.json                 written last: the file is scored; counts and digest
    <directory>/chosen.jsonl, manifest.json        what a rule kept, with texts; counts and digests

Every file appears whole under its name or not at all.  A second call of the same plan scores only what
is missing, so any number of processes may share the files of one pool; a chunk whose documents have
changed since is an error.  A rule reads scores alone, so another rule costs no scoring.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from tqdm import tqdm

from opus_bench.documents.files import Document, Fields, PoolFile
from opus_bench.files import replacing

SCHEMA = pa.schema([("id", pa.string()), ("file", pa.string()), ("row", pa.int64()), ("tokens", pa.int64()),
                    ("score", pa.float64())])
DIGEST = b"documents_sha256"
MERGED = 100_000  # documents collected before they are ranked with the best so far

Score = Callable[[list[str]], np.ndarray]
"""Texts to one number each, higher is kept; -inf: never kept; NaN is an error."""
Count = Callable[[list[str]], list[int]]
"""Texts to their numbers of tokens."""


@dataclass(frozen=True)
class Rule:
    """Which documents are kept, best first, ties by id, then file and row.

    tokens: keep documents until they hold so many tokens; the one that reaches the number is the last.
    share: or keep this share of the documents, rounded up.
    per_file: the share of each file instead of the whole pool.
    temperature: None keeps the best; else a sample without replacement, p proportional to
        exp(score / temperature), by Gumbel top-k.  The noise is a function of ``seed`` and the id.
    standardize: scores to mean 0 and standard deviation 1 over the pool before the temperature.

    Raises:
        ValueError: unless exactly one of tokens and share is given and in range.
    """

    tokens: int | None = None
    share: float | None = None
    per_file: bool = False
    temperature: float | None = None
    seed: int = 0
    standardize: bool = False

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.share is None):
            raise ValueError(f"give tokens or a share to keep, and not both; got {self.tokens} and {self.share}")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens to keep must be at least 1, got {self.tokens}")
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"share to keep must be in (0, 1], got {self.share}")
        if self.per_file and self.share is None:
            raise ValueError("the rule per file keeps a share of each file; give a share")
        if self.temperature is not None and not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be positive, got {self.temperature}")


def open_plan(directory: Path, plan: dict[str, Any]) -> None:
    """Make the directory the plan's, or find that it is; a plan of which nothing is scored gives way.

    Raises:
        ValueError: if it holds scores of another plan, naming what differs.
    """
    path = directory / "plan.json"
    plan = json.loads(json.dumps(plan))
    if path.exists() and any(not scored.name.startswith(".") for scored in (directory / "scores").iterdir()):
        there = json.loads(path.read_text())
        differing = [key for key in {**there, **plan} if there.get(key) != plan.get(key)]
        if differing:
            key = differing[0]
            raise ValueError(f"{directory} holds scores of another plan: {key} is {there.get(key)!r} there and "
                             f"{plan.get(key)!r} here; give another folder or remove this one")
        return
    (directory / "scores").mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(plan, indent=1) + "\n")


def score_files(
    directory: Path, files: Sequence[PoolFile], numbers: Iterable[int], score: Score, count: Count | None,
    fields: Fields, chunk: int, progress: bool = True,
) -> None:
    """Score the files of those numbers; what is scored already is left alone.

    Args:
        numbers: places in ``files`` of the files to score; all files are listed, so that a number is a name.
        count: of tokens; None where ``fields.tokens`` names a column that has it.
        chunk: documents per chunk; memory is that of one chunk and of what ``score`` needs.

    Raises:
        ValueError: for a score that is NaN, naming the document, and for a chunk whose documents changed.
    """
    with tqdm(desc="scoring", unit="document", disable=not progress) as bar:
        for number in numbers:
            summary = directory / "scores" / f"{number:05d}.json"
            if summary.exists():
                bar.update(json.loads(summary.read_text())["documents"])
                continue
            digests, documents, tokens = [], 0, 0
            for place, part in enumerate(_chunks(files[number].documents(fields), chunk)):
                path = directory / "scores" / f"{number:05d}-{place:06d}.parquet"
                digests.append(_digest(part))
                if not path.exists():
                    _write_chunk(path, part, score, count, digests[-1])
                table = parquet.read_table(path)
                if table.schema.metadata[DIGEST].decode() != digests[-1]:
                    raise ValueError(f"{files[number].name} has changed since {path} was scored; "
                                     "remove the folder and score again")
                documents, tokens = documents + len(table), tokens + sum(table["tokens"].to_pylist())
                bar.update(len(part))
            with replacing(summary) as temporary:
                temporary.write_text(json.dumps({
                    "file": files[number].name, "documents": documents, "tokens": tokens, "chunks": len(digests),
                    "sha256": hashlib.sha256("".join(digests).encode()).hexdigest()}) + "\n")


def _chunks(documents: Iterator[Document], size: int) -> Iterator[list[Document]]:
    while part := list(islice(documents, size)):
        yield part


def _digest(part: Sequence[Document]) -> str:
    digest = hashlib.sha256()
    for document in part:
        for field in (document.id, document.text):
            encoded = field.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8))
            digest.update(encoded)
    return digest.hexdigest()


def _write_chunk(path: Path, part: Sequence[Document], score: Score, count: Count | None, digest: str) -> None:
    texts = [document.text for document in part]
    scores = np.asarray(score(texts), dtype=np.float64)
    if scores.shape != (len(part),):
        raise ValueError(f"the scorer gave an array of shape {scores.shape} for {len(part)} texts")
    for document, value in zip(part, scores):
        if math.isnan(value) or value == math.inf:
            raise ValueError(f"the score of document {document.id} in {document.file} is {value}")
    tokens = [document.tokens for document in part] if count is None else count(texts)
    columns = {"id": [d.id for d in part], "file": [d.file for d in part], "row": [d.row for d in part],
               "tokens": tokens, "score": scores}
    with replacing(path) as temporary:
        parquet.write_table(pa.table(columns, SCHEMA.with_metadata({DIGEST: digest})), temporary)


def summaries(directory: Path, files: Sequence[PoolFile]) -> list[dict[str, Any] | None]:
    """Counts and digest of every file, None of one that is not scored yet."""
    paths = [directory / "scores" / f"{number:05d}.json" for number in range(len(files))]
    return [json.loads(path.read_text()) if path.exists() else None for path in paths]


def choose(directory: Path, files: Sequence[PoolFile], rule: Rule) -> pa.Table:
    """id, file, row, tokens and score of the documents that the rule keeps, best first.

    Memory: what is kept and a few hundred thousand rows more; with ``per_file`` the rows of one file.

    Raises:
        ValueError: while a file is not scored, where no score is finite, and where all scores are equal,
            so that the best are no better than the rest (a sample of equal scores is uniform and allowed).
    """
    counts = [summary["documents"] for summary in _complete(directory, files)]
    mean, spread = _moments(directory, files, rule)
    scale = (mean, spread) if rule.standardize else (0.0, 1.0)
    if rule.per_file:
        assert rule.share is not None
        kept = []
        for number, documents in enumerate(counts):
            tables = [_keyed(table, rule, scale) for table in _tables(directory, [number])]
            if tables:
                kept.append(_best(tables, None, _number(rule.share, documents)))
        best = _ranked(pa.concat_tables(kept))
    else:
        number = None if rule.share is None else _number(rule.share, sum(counts))
        best, waiting = None, []
        for table in _tables(directory, range(len(files))):
            waiting.append(_keyed(table, rule, scale))
            if sum(map(len, waiting)) >= max(MERGED, 0 if best is None else len(best)):
                best, waiting = _best([*([best] if best else []), *waiting], rule.tokens, number), []
        best = _best([*([best] if best else []), *waiting], rule.tokens, number)
    return best.drop_columns(["key"])


def _complete(directory: Path, files: Sequence[PoolFile]) -> list[dict[str, Any]]:
    found = summaries(directory, files)
    missing = [file.name for file, summary in zip(files, found) if summary is None]
    if missing:
        raise ValueError(f"{len(missing)} of {len(files)} files are not scored yet, {missing[0]} for one; "
                         "score them first")
    return [summary for summary in found if summary is not None]


def _tables(directory: Path, numbers: Iterable[int]) -> Iterator[pa.Table]:
    for number in numbers:
        chunks = json.loads((directory / "scores" / f"{number:05d}.json").read_text())["chunks"]
        for place in range(chunks):
            yield parquet.read_table(directory / "scores" / f"{number:05d}-{place:06d}.parquet")


def _moments(directory: Path, files: Sequence[PoolFile], rule: Rule) -> tuple[float, float]:
    """Mean and standard deviation of the finite scores."""
    n, total, squares, low, high = 0, 0.0, 0.0, math.inf, -math.inf
    shift = None
    for table in _tables(directory, range(len(files))):
        scores = table["score"].to_numpy()
        scores = scores[np.isfinite(scores)]
        if len(scores):
            shift = scores[0] if shift is None else shift  # so that the squares do not cancel
            n, total, squares = n + len(scores), total + (scores - shift).sum(), squares + ((scores - shift) ** 2).sum()
            low, high = min(low, scores.min()), max(high, scores.max())
    if not n:
        raise ValueError("no document of the pool has a finite score; nothing can be ranked")
    if low == high and n > 1 and (rule.temperature is None or rule.standardize):
        raise ValueError(f"all {n} scores are {low}; nothing can be ranked")
    return shift + total / n, math.sqrt(max(squares / n - (total / n) ** 2, 0.0))


def _number(share: float, documents: int) -> int:
    return math.ceil(round(share * documents, 6))  # 0.07 * 100 is above 7 by a rounding


def _keyed(table: pa.Table, rule: Rule, scale: tuple[float, float]) -> pa.Table:
    """The documents of finite score with the number that ranks them."""
    table = table.filter(pa.array(np.isfinite(table["score"].to_numpy())))
    key = (table["score"].to_numpy() - scale[0]) / scale[1]
    if rule.temperature is not None:
        noise = np.array([gumbel(rule.seed, name) for name in table["id"].to_pylist()])
        key = key / rule.temperature + noise
    return table.append_column("key", pa.array(key, pa.float64()))


def gumbel(seed: int, name: str) -> float:
    """A standard Gumbel variate that is a function of seed and name alone, so of no order or chunk."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    uniform = ((int.from_bytes(digest) >> 12) + 0.5) / 2**52
    return -math.log(-math.log(uniform))


def _best(tables: list[pa.Table], tokens: int | None, number: int | None) -> pa.Table:
    table = _ranked(pa.concat_tables(tables))
    if tokens is not None:
        number = int(np.searchsorted(np.cumsum(table["tokens"].to_numpy()), tokens)) + 1
    return table.slice(0, number)


def _ranked(table: pa.Table) -> pa.Table:
    return table.sort_by([("key", "descending"), ("id", "ascending"), ("file", "ascending"), ("row", "ascending")])


def write_chosen(
    directory: Path, files: Sequence[PoolFile], fields: Fields, rule: Rule, plan: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """Choose, write chosen.jsonl in the order of the pool and manifest.json, and return the manifest.

    A line has id, file, row, tokens, score and text.  The pool is read a second time, up to the last
    chosen document of each file, since texts are not kept while scoring.

    Raises:
        ValueError: as `choose`, and if a document is no longer where it was scored.
    """
    table = choose(directory, files, rule)
    in_order = table.sort_by([("file", "ascending"), ("row", "ascending")])
    counts = {found["values"]: found["counts"] for found in table["file"].value_counts().to_pylist()}
    manifest_path, chosen_path = directory / "manifest.json", directory / "chosen.jsonl"
    manifest_path.unlink(missing_ok=True)  # it must never describe another chosen.jsonl
    digest, start = hashlib.sha256(), 0
    with replacing(chosen_path) as temporary, open(temporary, "wb") as out:
        for file in files:
            records = in_order.slice(start, counts.get(file.name, 0)).to_pylist()
            start += len(records)
            for record, text in _texts(file, fields, records):
                line = json.dumps({**record, "text": text}).encode() + b"\n"
                digest.update(line)
                out.write(line)
    complete = _complete(directory, files)
    pool_sha256 = hashlib.sha256("".join(s["file"] + s["sha256"] for s in complete).encode()).hexdigest()
    scores = table["score"].to_pylist()
    manifest = {
        "plan": plan,
        "rule": asdict(rule),
        "pool": {"files": len(files), "documents": sum(s["documents"] for s in complete),
                 "tokens": sum(s["tokens"] for s in complete), "sha256": pool_sha256},
        "chosen": {"documents": len(table), "tokens": sum(table["tokens"].to_pylist()), "sha256": digest.hexdigest(),
                   "lowest_score": min(scores), "highest_score": max(scores)},
        **more,
    }
    with replacing(manifest_path) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _texts(
    file: PoolFile, fields: Fields, records: list[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], str]]:
    """The records, in the order of rows, each with its text."""
    left = iter(records)
    record = next(left, None)
    if record is None:
        return
    for document in file.documents(fields):
        if document.row < record["row"]:
            continue
        if (document.row, document.id) != (record["row"], record["id"]):
            break
        yield record, document.text
        record = next(left, None)
        if record is None:
            return
    raise ValueError(f"{file.name} has changed since it was scored; remove the folder and score again")
