"""The making of a pool: sources to token shards, in parallel, resumable, the same bytes every time.

    DIR/manifest.json               written last: settings, sources, tokenizer, every shard; see `ShardPool`
    DIR/tokenizer.json
    DIR/<domain>/FFFFF-BBBB.bin     and .json, .mask beside it (`shards`): block B of file F of the source
    DIR/plan.json, DIR/blocks/      only while unfinished: what was begun, and a record of each finished block

A domain's pool is the first blocks, in the order of files, that reach the goal, and what a block holds
depends on its file and the settings alone (`blocks`).  So neither the number of workers nor
interruptions change a byte of the finished folder.  Up to a file for each worker may be tokenised in
vain beyond the goal.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tokenizers import Tokenizer
from tqdm import tqdm

from opus_bench.archives import CorpusError, file_sha256
from opus_bench.pools.blocks import Job, records, write_blocks
from opus_bench.pools.spec import FORMAT, PoolSpec
from opus_bench.pools.shards import check_shard, json_bytes, write_whole
from opus_bench.pools.tokenizing import load_tokenizer, vocabulary_size
from opus_bench.pools.web import Source, list_files


def build_pool(
    spec: PoolSpec, out: str | os.PathLike, workers: int = 1, cache: str | os.PathLike | None = None,
    progress: bool = True,
) -> Path:
    """Make the pool, or go on with it.

    Of a finished one every byte is checked (about 1 GB/s), and damaged shards are made again.

    Args:
        workers: processes, at most one a file at a time; 1 makes none.

    Returns:
        Path of the manifest.

    Raises:
        CorpusError: for another pool in the folder, another run at work in it, and whatever cannot be
            read; finished blocks stay, and the same call goes on after them.
    """
    if workers < 1:
        raise CorpusError(f"workers is {workers}; it must be at least 1")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            if not (out / "manifest.json").exists():
                plan = _plan(spec, out, cache, progress)
                shards = [shard for source in plan["sources"]
                          for shard in _build_source(source, spec, out, workers, progress)]
                write_whole(out / "manifest.json", json_bytes(_manifest(plan, shards, spec, out)))
            manifest = _read_json(out / "manifest.json")
            _same_settings(manifest, spec, out / "manifest.json")
            _finish(manifest, out)
    except Timeout as error:
        raise CorpusError(f"another run is making a pool in {out}; wait for it, or give another --out") from error
    return out / "manifest.json"


def _plan(spec: PoolSpec, out: Path, cache: str | os.PathLike | None, progress: bool) -> dict[str, Any]:
    """The plan of the folder, made on first use: what was asked for, and the files, pinned."""
    path = out / "plan.json"
    if path.exists() and not any((out / "blocks").glob("*.json")):  # nothing is finished: other options may begin
        for planned in _read_json(path)["sources"]:
            for domain in _source(planned).domains:
                shutil.rmtree(out / domain, ignore_errors=True)
        shutil.rmtree(out / "blocks", ignore_errors=True)
        path.unlink()
    if not path.exists():
        stray = sorted(item.name for item in out.iterdir() if not item.name.startswith("."))
        if stray and stray != ["tokenizer.json"]:
            raise CorpusError(f"{out} holds {stray[0]!r} and no plan; give an empty folder")
        tokenizer = load_tokenizer(spec.tokenizer, cache, progress)
        if tokenizer.token_to_id(spec.end_of_text) is None:
            raise CorpusError(f"tokenizer {spec.tokenizer} has no token {spec.end_of_text!r}; give --end-of-text")
        sources, number = [], 0
        for source in spec.parsed:
            commit, files = list_files(source)
            sources.append({**dataclasses.asdict(source), "commit": commit, "files": files, "first": number})
            number += len(files)
        sha256 = write_whole(out / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
        write_whole(path, json_bytes({"format": FORMAT, "settings": spec.plain(), "tokenizer_sha256": sha256,
                                      "sources": sources}))
        return _read_json(path)
    plan = _read_json(path)
    _same_settings(plan, spec, path)
    for source in plan["sources"]:
        for file in source["files"] if source["commit"] is None else ():
            if not os.path.exists(file["url"]) or file_sha256(Path(file["url"])) != file["sha256"]:
                raise CorpusError(f"{file['url']} is missing or has changed since {out} was begun; restore it, or "
                                  "begin again in another --out")
    return plan


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorpusError(f"{path} cannot be read ({error}); begin again in another --out") from error


def _same_settings(begun: dict[str, Any], spec: PoolSpec, path: Path) -> None:
    settings = {"format": FORMAT, **spec.plain()}
    for name, before in {"format": begun["format"], **begun["settings"]}.items():
        if settings.get(name) != before:
            raise CorpusError(f"{path} was begun with {name} {before!r}, not {settings.get(name)!r}; "
                              "give the same options, or another --out")


class Prefix:
    """The finished blocks that stand before all unfinished ones, and what they hold of each domain."""

    def __init__(self, source: dict[str, Any], domains: tuple[str, ...], goal: int):
        self.at, self.end, self.goal = (source["first"], 0), source["first"] + len(source["files"]), goal
        self.waiting: dict[tuple[int, int], dict[str, Any]] = {}
        self.totals = dict.fromkeys(domains, 0)
        self.shards: list[dict[str, Any]] = []

    def note(self, record: dict[str, Any]) -> None:
        self.waiting[record["number"], record["block"]] = record
        while (here := self.waiting.pop(self.at, None)) is not None:
            wanted = self.wanted
            for shard in here["shards"]:
                if shard["domain"] in wanted:
                    self.shards.append(shard)
                    self.totals[shard["domain"]] += shard["tokens"]
            self.at = (here["number"] + 1, 0) if here["last"] else (here["number"], here["block"] + 1)

    @property
    def wanted(self) -> tuple[str, ...]:
        """Domains that are short of the goal; a block that is not in the prefix yet is not needed for others."""
        return tuple(domain for domain, total in self.totals.items() if total < self.goal)

    @property
    def done(self) -> bool:
        return not self.wanted or self.at[0] >= self.end


def _build_source(
    planned: dict[str, Any], spec: PoolSpec, out: Path, workers: int, progress: bool
) -> list[dict[str, Any]]:
    """The shards of a source that belong to the pool, in order, after making those that are lacking."""
    source = _source(planned)
    prefix = Prefix(planned, spec.kept(source), spec.tokens)
    (out / "blocks").mkdir(exist_ok=True)
    left = []
    for number, file in enumerate(planned["files"], start=planned["first"]):
        block, row, last = 0, 0, False
        for record in _finished_blocks(out, number):
            block, row, last = record["block"] + 1, record["stop"], record["last"]
            prefix.note(record)
        if not last:
            left.append((file, number, block, row))

    def jobs() -> Iterator[Job]:  # made when a worker asks, so that it is not given what is complete by then
        for file, number, block, row in left:
            if not prefix.done:
                yield Job(str(out), spec, source, file, number, block, row, prefix.wanted)

    goal = spec.tokens * len(prefix.totals)
    with tqdm(desc=source.name, total=goal, unit="token", unit_scale=True, disable=None if progress else True) as bar:
        bar.update(sum(prefix.totals.values()))
        with closing(records(jobs(), min(workers, len(left)), out / "tokenizer.json")) as made:
            while not prefix.done:
                prefix.note(next(made))
                bar.update(sum(prefix.totals.values()) - bar.n)
    return prefix.shards


def _source(planned: dict[str, Any]) -> Source:
    return Source(**{field.name: planned[field.name] for field in dataclasses.fields(Source)})


def _finished_blocks(out: Path, number: int) -> Iterator[dict[str, Any]]:
    """Records of a file's first blocks whose shards are all there."""
    for block in itertools.count():
        path = out / "blocks" / f"{number:05d}-{block:04d}.json"
        if not path.exists():
            return
        record = _read_json(path)
        try:
            for shard in record["shards"]:
                check_shard(out / shard["file"], shard, digest=False)
        except CorpusError:
            return
        yield record
        if record["last"]:
            return


def _manifest(plan: dict[str, Any], shards: list[dict[str, Any]], spec: PoolSpec, out: Path) -> dict[str, Any]:
    if not shards:
        raise CorpusError(f"the sources hold no text of {', '.join(d for s in spec.parsed for d in spec.kept(s))}; "
                          "look at --text-field and --domains")
    domains = {domain: {"tokens": 0, "documents": 0, "shards": 0, "goal": spec.tokens}
               for source in spec.parsed for domain in spec.kept(source)}
    for shard in shards:
        total = domains[shard["domain"]]
        total["tokens"] += shard["tokens"]
        total["documents"] += shard["documents"]
        total["shards"] += 1
    used = {(shard["source"], shard["source_file"]) for shard in shards}
    sources = [{**source, "files": [file for file in source["files"] if (source["name"], file["name"]) in used]}
               for source in plan["sources"]]
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    digests = [f"{shard['file']} {shard['sha256']} {shard.get('mask_sha256')}" for shard in shards]
    return {
        "format": FORMAT,
        "settings": plan["settings"],
        "tokenizer": {"file": "tokenizer.json", "sha256": plan["tokenizer_sha256"],
                      "vocab_size": vocabulary_size(tokenizer), "end_of_text": tokenizer.token_to_id(spec.end_of_text)},
        "sources": sources,
        "domains": domains,
        "shards": shards,
        "sha256": hashlib.sha256("\n".join([*digests, plan["tokenizer_sha256"]]).encode()).hexdigest(),
    }


def _finish(manifest: dict[str, Any], out: Path) -> None:
    """Check every byte of the pool, make again what is damaged, and remove what does not belong to it."""
    source_of = {source["name"]: source for source in manifest["sources"]}
    for shard in tqdm(manifest["shards"], desc="checking shards", unit="shard", disable=None, leave=False):
        try:
            check_shard(out / shard["file"], shard)
        except CorpusError:
            _make_again(shard, source_of[shard["source"]], manifest, out)
    known = {out / shard["file"] for shard in manifest["shards"]}
    for domain in manifest["domains"]:
        for path in (out / domain).glob("*") if (out / domain).is_dir() else ():
            if path.with_suffix(".bin") not in known or path.suffix not in (".bin", ".json", ".mask"):
                path.unlink()
        if (out / domain).is_dir() and not any((out / domain).iterdir()):
            (out / domain).rmdir()
    for path in out.glob(".*.tmp"):  # of interrupted writes
        path.unlink()
    shutil.rmtree(out / "blocks", ignore_errors=True)
    (out / "plan.json").unlink(missing_ok=True)


def _make_again(shard: dict[str, Any], planned: dict[str, Any], manifest: dict[str, Any], out: Path) -> None:
    file = next(file for file in planned["files"] if file["name"] == shard["source_file"])
    number, block = map(int, Path(shard["file"]).stem.split("-"))
    (out / "blocks").mkdir(exist_ok=True)
    job = Job(str(out), PoolSpec.of_plain(manifest["settings"]), _source(planned), file, number, block,
              shard["rows"][0], (shard["domain"],))
    next(write_blocks(job, Tokenizer.from_file(str(out / "tokenizer.json"))))
    try:
        check_shard(out / shard["file"], shard)
    except CorpusError as error:
        raise CorpusError(f"{shard['file']} of {out} is damaged and {file['url']} does not give it again: it has "
                          "changed; restore the shard, or make the pool anew in another --out") from error
