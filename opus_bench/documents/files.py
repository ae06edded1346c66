"""A pool of documents: local files or a data set of a hub, read one document at a time.

A source is one of

    FILE.jsonl, FILE.jsonl.gz, FILE.parquet     one document a line or row
    FOLDER                                      all such files below it, by name
    hub:NAME, hub:NAME:CONFIG, hub:NAME:CONFIG:SPLIT
                                                a data set streamed by `datasets`; its shards are the files

and every document has a text and an id: of columns whose names can be given, or, without the id
column, file name and row.  Nothing is read before it is asked for, and one batch of rows at most is
held in memory.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
ROWS = 1000  # of a parquet file in memory at once


@dataclass(frozen=True)
class Fields:
    """Columns of a pool: text; id (may be absent); the number of tokens, if a column has it."""

    text: str = "text"
    id: str = "id"
    tokens: str | None = None


@dataclass(frozen=True)
class Document:
    """One text; ``row`` counts the rows of its file from 0, ``tokens`` is None without a column for it."""

    id: str
    text: str
    file: str
    row: int
    tokens: int | None = None


@dataclass(frozen=True)
class PoolFile:
    """A file of the pool under a name that does not depend on where the pool lies.

    path: the local file; or None, and ``hub`` is (data set, config or None, split, shard, shards).
    """

    name: str
    path: Path | None
    hub: tuple[str, str | None, str, int, int] | None = None

    def documents(self, fields: Fields = Fields()) -> Iterator[Document]:
        """The documents in order; rows whose text is blank are left out.

        Raises:
            ValueError: for a line that is no JSON object, a text that is no string and an absent
                column, naming the row and what is there.
        """
        for row, record in enumerate(self._records(fields)):
            text = record.get(fields.text)
            if not isinstance(text, str):
                raise ValueError(f"{self.name} row {row}: {fields.text!r} is {type(text).__name__}, not a text; "
                                 f"columns: {', '.join(map(str, record))}; name the right one")
            if not text.strip():
                continue
            tokens = record.get(fields.tokens) if fields.tokens else None
            if fields.tokens and (not isinstance(tokens, int) or tokens < 0):
                raise ValueError(f"{self.name} row {row}: {fields.tokens!r} is {tokens!r}, not a number of tokens; "
                                 f"columns: {', '.join(map(str, record))}; name the right one, or a tokenizer")
            name = record.get(fields.id)
            yield Document(f"{self.name}:{row}" if name is None else str(name), text, self.name, row, tokens)

    def _records(self, fields: Fields) -> Iterable[dict[str, Any]]:
        if self.hub is not None:
            name, config, split, shard, shards = self.hub
            return _stream(name, config, split).shard(num_shards=shards, index=shard)
        assert self.path is not None
        return _parquet(self.path, fields) if self.path.suffix == ".parquet" else _json_lines(self.path)


def pool_files(sources: Sequence[str | os.PathLike]) -> list[PoolFile]:
    """The files of the sources, by name.

    Raises:
        ValueError: for a source that does not exist or holds no file of a known kind, and for two
            files of one name.
    """
    files = sorted(itertools.chain.from_iterable(map(_files, sources)), key=lambda file: file.name)
    for one, two in itertools.pairwise(files):
        if one.name == two.name:
            raise ValueError(f"two files of the pool are named {one.name}; give the folder above them")
    if not files:
        raise ValueError("the pool is empty; give files, folders or hub:NAME")
    return files


def _files(source: str | os.PathLike) -> list[PoolFile]:
    if str(source).startswith("hub:"):
        name, config, split = (str(source)[4:].split(":") + ["", ""])[:3]
        split = split or "train"
        shards = _stream(name, config or None, split).num_shards
        label = "/".join(filter(None, (Path(name).name if Path(name).is_absolute() else name, config, split)))
        return [PoolFile(f"{label}/{n:05d}-of-{shards:05d}", None, (name, config or None, split, n, shards))
                for n in range(shards)]
    path = Path(source)
    if path.is_dir():
        below = [p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file()]
        if not below:
            raise ValueError(f"{path} holds no file in {', '.join(SUFFIXES)}")
        return [PoolFile(p.relative_to(path).as_posix(), p) for p in below]
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a file, a folder or hub:NAME")
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path} ends in none of {', '.join(SUFFIXES)}")
    return [PoolFile(path.name, path)]


def _stream(name: str, config: str | None, split: str) -> Any:
    import datasets  # slow to import

    return datasets.load_dataset(name, config, split=split, streaming=True)


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")
    with opened as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path} line {number + 1} is no JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path} line {number + 1} is no JSON object")
            yield record


def _parquet(path: Path, fields: Fields) -> Iterator[dict[str, Any]]:
    with pyarrow.parquet.ParquetFile(path) as file:
        wanted = [name for name in (fields.text, fields.id, fields.tokens) if name in file.schema_arrow.names]
        if fields.text not in wanted:
            wanted = file.schema_arrow.names  # for the message that names them
        for batch in file.iter_batches(batch_size=ROWS, columns=wanted):
            yield from batch.to_pylist()
