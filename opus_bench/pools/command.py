"""The commands `opus-bench data` and `opus-bench contamination`: options, dry run and tables."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opus_bench.pools.spec import PoolSpec

SAMPLE = 256
"""Documents of a source's first file from which a dry run estimates."""


def number(text: str) -> int:
    """A count that may be written 30e9."""
    try:
        value = float(text)
    except ValueError:
        value = 0.5
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number; write 1000 or 30e9")
    return int(value)


def data_options(command: argparse.ArgumentParser) -> None:
    """Options of `opus-bench data`."""
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.epilog = ("a source is fineweb, fineweb-edu (domains fineweb-edu-3 and fineweb-edu-4-5, by score), "
                      "sciencepedia,\na .parquet or .jsonl file, a folder of them, hf://datasets/OWNER/NAME[@REVISION]"
                      "[/FOLDER],\nor NAME=PLACE to take a named one from elsewhere.  Interrupted, the same command "
                      "goes on;\non a finished pool it checks every byte.")

    def add(name: str, what: str, **options: Any) -> None:
        command.add_argument(name, help=what, **options)

    add("--source", "what to tokenise; see below", nargs="+", required=True, metavar="SOURCE")
    add("--tokenizer", "gpt2, a tokenizer.json or its folder, or a hub id (default: %(default)s)", default="gpt2",
        metavar="WHERE")
    add("--out", "folder that gets the pool", type=Path, required=True, metavar="DIR")
    add("--tokens", "goal of each domain, tokens; the last shard is kept whole (default: 30e9, the paper's)",
        type=number, default=30_000_000_000, metavar="N")
    add("--workers", "processes, at most one a file of the source (default: %(default)s)", type=int, default=1,
        metavar="N")
    add("--domains", "keep these domains alone (default: all of the sources)", nargs="+", default=(), metavar="NAME")
    add("--subset", "of fineweb and fineweb-edu on the hub: sample-10BT, sample-100BT, sample-350BT, default or a dump "
        "(default: %(default)s)", default="sample-100BT", metavar="NAME")
    add("--revision", "branch, tag or commit on the hub; a branch is pinned to its commit (default: %(default)s)",
        default="main", metavar="NAME")
    add("--text-field", "column of the text (default: %(default)s)", default="text", metavar="NAME")
    add("--prompt-field", "column of a text before it that does not count in the loss (default: none)", metavar="NAME")
    add("--end-of-text", "token after each document (default: <|endoftext|>)", default="<|endoftext|>", metavar="TOKEN")
    add("--shard-characters", "text of a shard, characters (default: 4e8, about 90 million tokens)", type=number,
        default=400_000_000, metavar="N")
    add("--dry-run", "reach the sources, print tokens, downloads and disk, estimated from the first "
        f"{SAMPLE} documents, and stop", action="store_true")


def contamination_options(command: argparse.ArgumentParser) -> None:
    """Options of `opus-bench contamination`."""
    add = command.add_argument
    add("--pool", type=Path, required=True, metavar="DIR", help="folder that `opus-bench data` made")
    add("--items", type=Path, nargs="+", default=(), metavar="FILE.jsonl",
        help="evaluation items, a file a task, an object a line")
    add("--tasks", nargs="+", default=(), metavar="NAME", help="tasks of lm-eval, loaded from the hub")
    add("--fields", nargs="+", default=(), metavar="NAME", help="of --items: fields that make the text, in order; a "
        "list stands for options (default: context and choices, or text)")
    add("--ngram", type=int, default=13, metavar="N", help="words in a run (default: %(default)s)")
    add("--workers", type=int, default=1, metavar="N", help="processes (default: %(default)s)")
    add("--output", type=Path, default=None, metavar="FILE.json", help="also write the report, as JSON (default: none)")
    add("--force", action="store_true", help="replace the file of --output (default: refuse)")


def data(options: argparse.Namespace) -> int:
    """Run `opus-bench data`."""
    import datasets

    from opus_bench.pools.build import build_pool
    from opus_bench.pools.spec import PoolSpec
    from opus_bench.pools.shards import read_manifest
    from opus_bench.validation.own_report import table

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # our own error says it, in one line
    spec = PoolSpec(tuple(options.source), options.tokenizer, options.tokens, options.subset, options.revision,
                    tuple(options.domains), options.text_field, options.prompt_field, options.end_of_text,
                    options.shard_characters)
    if options.dry_run:
        print(dry_run(spec, options.out))
        return 0
    manifest = read_manifest(build_pool(spec, options.out, options.workers))
    domains = manifest["domains"]
    print(table(("domain", "tokens", "documents", "shards"),
                [(name, f"{d['tokens']:,}", f"{d['documents']:,}", d["shards"]) for name, d in domains.items()]))
    for name, domain in domains.items():
        if domain["tokens"] < domain["goal"]:
            print(f"{name}: {domain['tokens']:,} of {domain['goal']:,} tokens, the source has no more")
    print(f"pool {manifest['sha256'][:12]}: {options.out / 'manifest.json'}")
    return 0


def dry_run(spec: PoolSpec, out: Path) -> str:
    """What the pool would take, after reaching every source; nothing is written."""
    from opus_bench.validation.own_report import table

    rows, notes, disk = [], [], 0.0
    for source, estimates, note in estimate(spec):
        notes.append(note)
        for domain, found in estimates.items():
            disk += found["disk_bytes"]
            rows.append((domain, f"{spec.tokens:,}", f"{found['available']:.3g}" if found["known"] else "not known",
                         f"{found['files']:,}", size_text(found["read_bytes"]), size_text(found["disk_bytes"])))
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    verdict = "enough" if free >= disk else "NOT ENOUGH: give another --out, or fewer --tokens"
    header = ("domain", "goal, tokens", "available", "files", "to read", "shards on disk")
    room = f"disk: {size_text(disk)} needed, {size_text(free)} free in {there}: {verdict}"
    return "\n".join([table(header, rows), *notes, room, "dry run: nothing was written"])


def estimate(spec: PoolSpec) -> list[tuple[str, dict[str, dict[str, Any]], str]]:
    """(source, by domain: available tokens, files, read_bytes, disk_bytes; a note) of every source.

    Tokens a byte are those of the first documents of the first file; what cannot be known before reading
    (compressed lines) is given for all files.
    """
    from opus_bench.pools.blocks import Block, Job
    from opus_bench.pools.shards import token_dtype
    from opus_bench.pools.tokenizing import load_tokenizer, vocabulary_size
    from opus_bench.pools.web import count_rows, list_files, read_batches

    made = []
    listed = [(source, *list_files(source, digest=False)) for source in spec.parsed]  # every source is reached first
    tokenizer = load_tokenizer(spec.tokenizer)
    width = token_dtype(vocabulary_size(tokenizer)).itemsize
    for source, commit, files in listed:
        job = Job("", spec, source, files[0], 0, 0, 0, spec.kept(source))
        block, sample = Block(job, tokenizer), next(read_batches(files[0]["url"], source.columns), [])[:SAMPLE]
        block.add(sample)
        rows = count_rows(files[0]["url"], files[0]["bytes"])
        total = sum(file["bytes"] for file in files)
        found = {}
        for domain, parts in block.tokens.items():
            tokens = sum(map(len, parts))
            density = tokens / len(sample) * rows / files[0]["bytes"] if rows and sample else 0.0  # tokens a byte
            read = count = 0
            for file in files:
                if density and read * density >= spec.tokens:
                    break
                read, count = read + file["bytes"], count + 1
            reached = min(spec.tokens, read * density) if density else spec.tokens
            found[domain] = {"available": total * density, "known": bool(density), "files": count, "read_bytes": read,
                             "disk_bytes": reached * width}
        where = f"commit {commit}" if commit else "local"
        note = (f"{source.name}: {source.place} ({where}), {len(files):,} files, {size_text(total)}; estimated from "
                f"{len(sample)} documents of {files[0]['name']}")
        made.append((source.name, found, note))
    return made


def size_text(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def contamination(options: argparse.Namespace) -> int:
    """Run `opus-bench contamination`."""
    from opus_bench.cli import check_output, write_json
    from opus_bench.pools.contamination import contamination as look
    from opus_bench.pools.contamination import read_items, task_items
    from opus_bench.validation.own_report import table

    if options.output is not None:
        check_output(options.output, options.force)
    items = read_items(options.items, options.fields) + (task_items(options.tasks) if options.tasks else [])
    report = look(options.pool, items, options.ngram, options.workers)

    def row(name: str, counts: dict[str, Any]) -> tuple[str, ...]:
        share = "none checked" if counts["share"] is None else f"{100 * counts['share']:.2f} %"
        return name, f"{counts['items']:,}", f"{counts['too_short']:,}", f"{counts['hit']:,}", share

    rows = [row(task, counts) for task, counts in report["tasks"].items()]
    print(table(("task", "items", "too short", "hit", "share of those checked"), [*rows, row("all", report["all"])]))
    pool = report["pool"]
    print(f"runs of {report['ngram']} words; pool {pool['sha256'][:12]}: {pool['tokens']:,} tokens, "
          f"{pool['documents']:,} documents")
    if options.output is not None:
        write_json(report, options.output, options.force)
        print(f"wrote {os.path.relpath(options.output)}")
    return 0
