"""Files to blocks: the tokenising of a pool, here or in worker processes.

A block is a run of a file's documents of about `shard_characters` characters, and gives one shard of each
domain.  It depends on the file and the settings alone; its record is written after its shards.
"""

import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from opus_bench.archives import CorpusError
from opus_bench.corpus_build import token_lists
from opus_bench.pools.spec import PoolSpec
from opus_bench.pools.shards import json_bytes, token_dtype, write_shard, write_whole
from opus_bench.pools.tokenizing import vocabulary_size
from opus_bench.pools.web import Source, read_batches


@dataclass(frozen=True)
class Job:
    """The rest of a file: what a worker is given."""

    out: str
    spec: PoolSpec
    source: Source
    file: dict[str, Any]
    number: int
    """Of the file, counted over all sources."""
    block: int
    row: int
    """First block and row that are not done."""
    wanted: tuple[str, ...]
    """Domains that are short of the goal."""


def write_blocks(job: Job, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """Tokenise the rest of a file; a record is yielded, and on disk, when its block is."""
    block, row, start = job.block, job.row, job.row
    kept, characters, rows = Block(job, tokenizer), 0, []
    for batch in read_batches(job.file["url"], job.source.columns, job.row):
        for values in batch:
            rows.append(values)
            row += 1
            characters += len(values[job.source.text] or "")
            if characters >= job.spec.shard_characters:
                kept.add(rows)
                yield _write_block(job, kept, block, start, row, last=False)
                block, start, kept, characters, rows = block + 1, row, Block(job, tokenizer), 0, []
        kept.add(rows)
        rows = []
    yield _write_block(job, kept, block, start, row, last=True)


class Block:
    """The tokens of a run of documents, by domain."""

    def __init__(self, job: Job, tokenizer: Tokenizer):
        self.job, self.tokenizer = job, tokenizer
        self.end = tokenizer.token_to_id(job.spec.end_of_text)
        self.dtype = token_dtype(vocabulary_size(tokenizer))
        self.tokens: dict[str, list[np.ndarray]] = {domain: [] for domain in job.wanted}
        self.masks: dict[str, list[np.ndarray]] = {domain: [] for domain in job.wanted}
        self.documents = dict.fromkeys(job.wanted, 0)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Tokenise documents: prompt, text and the end-of-text token; ones without text are left out."""
        source = self.job.source
        chosen = [(source.domain(row), row) for row in rows if row[source.text]]
        chosen = [(domain, row) for domain, row in chosen if domain in self.tokens]
        texts = token_lists(self.tokenizer, [row[source.text] for _, row in chosen])
        prompts = [row[source.prompt] or "" for _, row in chosen] if source.prompt else []
        before = list(token_lists(self.tokenizer, prompts)) if prompts else [[]] * len(chosen)
        for (domain, _), prompt, text in zip(chosen, before, texts, strict=True):
            ids = np.array([*prompt, *text, self.end], dtype=self.dtype)
            self.tokens[domain].append(ids)
            self.documents[domain] += 1
            if source.prompt:
                self.masks[domain].append(np.arange(len(ids)) >= len(prompt))


def _write_block(job: Job, kept: Block, block: int, start: int, stop: int, last: bool) -> dict[str, Any]:
    out, shards = Path(job.out), []
    for domain in job.wanted:
        if not kept.tokens[domain]:
            continue
        name = f"{domain}/{job.number:05d}-{block:04d}.bin"
        mask = np.concatenate(kept.masks[domain]) if kept.masks[domain] else None
        about = {"documents": kept.documents[domain], "source": job.source.name, "source_file": job.file["name"],
                 "rows": [start, stop]}
        metadata = write_shard(out / name, np.concatenate(kept.tokens[domain]), mask, about)
        shards.append({**metadata, "file": name, "domain": domain})
    record = {"number": job.number, "block": block, "stop": stop, "last": last, "shards": shards}
    write_whole(out / "blocks" / f"{job.number:05d}-{block:04d}.json", json_bytes(record))
    return record


def records(jobs: Iterator[Job], workers: int, tokenizer: Path) -> Generator[dict[str, Any]]:
    """Do the jobs, here or in worker processes, and yield the records of blocks as they are finished."""
    if workers <= 1:
        mine = Tokenizer.from_file(str(tokenizer))
        for job in jobs:
            yield from write_blocks(job, mine)
        return
    context = multiprocessing.get_context("spawn")  # forks share sockets and locks of the hub's client
    crew: dict[Connection, Any] = {}
    try:
        for job in itertools.islice(jobs, workers):
            ours, theirs = context.Pipe()
            crew[ours] = context.Process(target=work, args=(theirs, str(tokenizer)), daemon=True)
            crew[ours].start()
            theirs.close()
            ours.send(job)
        busy = set(crew)
        while busy:
            for connection in wait(list(busy)):
                try:
                    message = connection.recv()
                except EOFError as error:
                    crew[connection].join()
                    raise CorpusError(f"a worker ended with exit code {crew[connection].exitcode} (-9: the system ran "
                                      "out of memory); what is finished stays: run the same command again, with fewer "
                                      "--workers or a smaller --shard-characters") from error
                if isinstance(message, str):
                    raise CorpusError(message)
                yield message
                if message["last"]:
                    job = next(jobs, None)
                    if job is None:
                        busy.remove(connection)
                    else:
                        connection.send(job)
    finally:
        for process in crew.values():
            process.terminate()
        for process in crew.values():
            process.join()


def work(connection: Connection, tokenizer: str) -> None:
    """A worker: jobs come in, records or one message of error go out; ends when the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the parent's, which then ends its workers
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # in order: half-written files are removed
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # workers are the parallelism
    mine = Tokenizer.from_file(tokenizer)
    try:
        while True:
            for record in write_blocks(connection.recv(), mine):
                connection.send(record)
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:  # noqa: BLE001 told by the other side, in one line
        connection.send(str(error) if isinstance(error, CorpusError) else f"{type(error).__name__}: {error}")
