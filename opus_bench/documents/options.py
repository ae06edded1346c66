"""Options and steps shared by the commands that score a pool of documents and keep a part of it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opus_bench.documents.files import Fields, PoolFile, pool_files

if TYPE_CHECKING:
    from opus_bench.documents.scored import Count

CHUNK, TOKENIZER = 1000, "gpt2"


def pool_options(command: argparse.ArgumentParser) -> None:
    """--pool, --out and how documents are read and counted."""
    group = command.add_argument_group("pool")
    group.add_argument("--pool", nargs="+", required=True, metavar="SOURCE",
                       help="files (.jsonl, .jsonl.gz, .parquet), folders of them, or hub:NAME[:CONFIG[:SPLIT]], "
                            "streamed (no default)")
    group.add_argument("--out", type=Path, required=True, metavar="FOLDER",
                       help="gets scores/, chosen.jsonl and manifest.json; a second call goes on where the first "
                            "stopped (no default)")
    group.add_argument("--text-field", default="text", metavar="NAME", help="column of the text (default: %(default)s)")
    group.add_argument("--id-field", default="id", metavar="NAME",
                       help="column of the id; without it file and row are the id (default: %(default)s)")
    group.add_argument("--token-field", default=None, metavar="NAME",
                       help="column of the number of tokens, as token_count of FineWeb (default: count them)")
    group.add_argument("--tokenizer", default=TOKENIZER, metavar="WHERE",
                       help="counts tokens: tokenizer.json, folder or hub id (default: %(default)s)")
    group.add_argument("--chunk", type=int, default=CHUNK, metavar="N",
                       help="documents scored between two writes; an interruption loses one such chunk at most "
                            "(default: %(default)s)")


def model_options(command: argparse._ActionsContainer) -> None:
    """How a model reads documents."""
    command.add_argument("--max-tokens", type=int, default=None, metavar="N",
                         help="tokens read of a document (default: those of the model)")
    command.add_argument("--batch-size", type=int, default=32, metavar="N",
                         help="texts that the model reads at once (default: %(default)s)")
    command.add_argument("--device", default=None, metavar="NAME",
                         help="cpu, cuda, ... (default: cuda where there is one)")
    command.add_argument("--trust-remote-code", action="store_true",
                         help="run code that comes with the model (default: refuse)")


def check_pool_options(options: argparse.Namespace) -> Fields:
    """The fields, once the numbers are sound.

    Raises:
        ValueError: naming the option that is not.
    """
    for name in ("chunk", "batch_size", "max_tokens", "item_limit"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out {options.out} is no folder")
    if options.out.is_dir() and any(options.out.iterdir()) and not (options.out / "plan.json").exists():
        raise ValueError(f"--out {options.out} holds other things; give a new or an empty folder")
    return Fields(options.text_field, options.id_field, options.token_field)


def open_pool(options: argparse.Namespace, fields: Fields) -> list[PoolFile]:
    """The files of --pool, once the first document of the first one could be read.

    Raises:
        ValueError: as pool_files and PoolFile.documents.
    """
    files = pool_files(options.pool)
    next(files[0].documents(fields), None)
    return files


def counter(options: argparse.Namespace) -> Count | None:
    """What counts tokens; None where a column has them."""
    if options.token_field is not None:
        return None
    from opus_bench.documents.proxy import token_counter

    return token_counter(options.tokenizer)


def pool_plan(options: argparse.Namespace, files: list[PoolFile]) -> dict[str, object]:
    """The part of a plan that says which documents are scored and how they are counted."""
    from opus_bench.documents.embedding import model_identity

    tokens = f"column {options.token_field}" if options.token_field else model_identity(options.tokenizer)
    return {"files": [file.name for file in files], "text_field": options.text_field, "id_field": options.id_field,
            "tokens_by": tokens, "chunk": options.chunk}


def pool_text(options: argparse.Namespace, files: list[PoolFile]) -> str:
    """A line on the pool for a plan that is printed."""
    size = sum(os.path.getsize(file.path) for file in files if file.path is not None)
    hub = sum(file.path is None for file in files)
    parts = [f"{len(files) - hub} local, {size / 1e6:.1f} MB"] * (hub < len(files)) + [f"{hub} of a hub"] * (hub > 0)
    return f"pool: {len(files)} files ({', '.join(parts)}), first {files[0].name}"


def outcome_text(out: Path, manifest: dict[str, Any]) -> str:
    """Lines on what was kept."""
    chosen, pool, asked = manifest["chosen"], manifest["pool"], manifest["rule"]["tokens"]
    lines = [f"kept {chosen['documents']:,} of {pool['documents']:,} documents, {chosen['tokens']:,} of "
             f"{pool['tokens']:,} tokens; scores {chosen['lowest_score']:.4g} to {chosen['highest_score']:.4g}"]
    if asked is not None and chosen["tokens"] < asked:
        lines.append(f"that is less than the {asked:,} tokens asked for: nothing more can be kept")
    return "\n".join([*lines, f"wrote {out / 'chosen.jsonl'} and {out / 'manifest.json'}"])
