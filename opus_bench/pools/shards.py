"""Token shards on disk, in the `.bin` format of llm.c and modded-nanogpt.

    NAME.bin    256 little-endian int32: magic, version, tokens, zeros; then the tokens
                    20240520, 1    uint16: vocabularies of at most 65,536 entries (GPT-2)
                    20240801, 7    uint32: larger ones (Llama 3, Qwen3)
    NAME.mask   one byte a token, 1 where its prediction counts; only if some do not
    NAME.json   ours: tokens, documents, sha256 of the two files, where the text came from

The metadata is written last, so a shard that has it is whole; shards of others have none.
Source of the format: llm.c, dev/data/data_common.py.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from opus_bench.archives import CorpusError, file_sha256
from opus_bench.files import replacing

HEADER = 256
"""int32 numbers before the tokens."""
KINDS = {np.dtype("<u2"): (20240520, 1), np.dtype("<u4"): (20240801, 7)}
"""Magic and version by dtype of the tokens."""
MOST_TOKENS = 2**31 - 1
"""What an int32 can count."""


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest dtype of the format that holds the ids 0 to vocab_size - 1."""
    if not 1 <= vocab_size <= 2**32:
        raise CorpusError(f"vocab_size is {vocab_size}; a shard holds ids of at most 32 bits")
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def write_shard(
    path: Path, tokens: np.ndarray, mask: np.ndarray | None = None, about: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write a shard, its mask and its metadata, each whole or not at all.

    Args:
        path: ends in .bin; its folder is made.
        tokens: integers (n,) of dtype uint16 or uint32, which decides the kind.
        mask: boolean (n,), False where the token is no target; one that leaves nothing out is not written.
        about: more entries of the metadata, such as documents and source.

    Returns:
        The metadata.

    Raises:
        CorpusError: for tokens of another dtype, none or too many, and for a mask of another shape.
    """
    dtype = tokens.dtype.newbyteorder("<")
    if dtype not in KINDS or tokens.ndim != 1:
        raise CorpusError(f"{path}: tokens must be flat uint16 or uint32, got {tokens.dtype} of shape {tokens.shape}")
    if not 1 <= len(tokens) <= MOST_TOKENS:
        raise CorpusError(f"{path}: {len(tokens)} tokens; a shard holds 1 to {MOST_TOKENS}; make smaller shards")
    if mask is not None and (mask.shape != tokens.shape or mask.dtype != bool):
        raise CorpusError(f"{path}: mask is {mask.dtype} of shape {mask.shape}, the tokens have {tokens.shape}")
    header = np.zeros(HEADER, "<i4")
    header[:3] = *KINDS[dtype], len(tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {**(about or {}), "tokens": len(tokens), "dtype": dtype.name}
    metadata["sha256"] = write_whole(path, header.tobytes(), tokens.astype(dtype, copy=False).data)
    if mask is not None and not mask.all():
        metadata["mask_sha256"] = write_whole(path.with_suffix(".mask"), mask.astype(np.uint8).data)
    write_whole(path.with_suffix(".json"), json_bytes(metadata))
    return metadata


def read_shard(path: str | os.PathLike) -> np.ndarray:
    """The tokens of a shard, memory-mapped, after its header and size were checked.

    Returns:
        uint16 or uint32 (n,), read-only.

    Raises:
        CorpusError: for a file that is missing, of another format, or longer or shorter than it says.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start, size = file.read(4 * HEADER), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CorpusError(f"{path} cannot be read ({error.strerror}); restore it, or make the shards again") from error
    if len(start) < 4 * HEADER:
        raise CorpusError(f"{path} is no token shard: {size} bytes, the header alone has {4 * HEADER}; "
                          "give a .bin of llm.c's format, or delete it and make the shards again")
    header = np.frombuffer(start, "<i4")
    dtype = next((dtype for dtype, kind in KINDS.items() if kind == tuple(header[:2])), None)
    if dtype is None:
        raise CorpusError(f"{path} is no token shard: magic {header[0]}, version {header[1]}; known are "
                          f"{', '.join(f'{m} {v}' for m, v in KINDS.values())}; give a .bin of llm.c's format")
    want = 4 * HEADER + int(header[2]) * dtype.itemsize
    if size != want or header[2] < 1:
        raise CorpusError(f"{path} is cut short or damaged: {header[2]} tokens need {want} bytes, it has {size}; "
                          "delete it and make the shards again")
    return np.memmap(path, dtype, "r", offset=4 * HEADER)


def is_shard(path: str | os.PathLike) -> bool:
    """Whether the file starts as a shard does; a .bin of another kind does not."""
    with open(path, "rb") as file:
        start = np.frombuffer(file.read(8), "<i4") if os.stat(path).st_size >= 4 * HEADER else ()
    return tuple(start) in KINDS.values()


def read_mask(path: str | os.PathLike, tokens: int) -> np.ndarray | None:
    """The mask beside a shard of so many tokens as bool (n,), memory-mapped; None where all count."""
    path = Path(path).with_suffix(".mask")
    if not path.exists():
        return None
    if (size := path.stat().st_size) != tokens:
        raise CorpusError(f"{path} is cut short or damaged: {tokens} tokens, {size} bytes; "
                          "delete the shard and make it again")
    return np.memmap(path, bool, "r")


def check_shard(path: Path, metadata: Mapping[str, Any], digest: bool = True) -> None:
    """Compare a shard and its mask with their metadata: sizes, and with ``digest`` every byte (about 1 GB/s).

    Raises:
        CorpusError: naming the file that is missing, cut short, damaged or not the one described.
    """
    tokens = read_shard(path)
    if len(tokens) != metadata["tokens"] or tokens.dtype.name != metadata["dtype"]:
        raise CorpusError(f"{path} is another shard: it has {len(tokens)} {tokens.dtype} tokens, its metadata says "
                          f"{metadata['tokens']} {metadata['dtype']}; delete it and make the shards again")
    mask = read_mask(path, len(tokens))
    if (mask is None) != ("mask_sha256" not in metadata):
        raise CorpusError(f"{path.with_suffix('.mask')} is {'missing' if mask is None else 'of another shard'}; "
                          "delete the shard and make it again")
    if digest:
        for name, key in ((path, "sha256"), (path.with_suffix(".mask"), "mask_sha256")):
            if key in metadata and file_sha256(name) != metadata[key]:
                raise CorpusError(f"{name} is damaged (its sha256 is not that of its metadata); "
                                  "delete it and make the shards again")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a finished pool.

    Raises:
        CorpusError: if it is missing or is none.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        complete = all(key in manifest for key in ("format", "shards", "domains", "tokenizer", "sha256"))
    except FileNotFoundError as error:
        mend = ("run the same `opus-bench data` command again, it goes on" if (path.parent / "plan.json").exists()
                else "make it with `opus-bench data`, or give the shards to ShardPool.of_files")
        raise CorpusError(f"{path} is missing: the pool is unfinished or none; {mend}") from error
    except (OSError, ValueError, TypeError) as error:
        raise CorpusError(f"{path} is no readable manifest ({error}); make the pool again") from error
    if not complete or not manifest["shards"]:
        raise CorpusError(f"{path} is not the manifest of a pool; make it with `opus-bench data`")
    return manifest


def json_bytes(content: Any) -> bytes:
    """JSON the same on every machine: sorted, ASCII, a line end."""
    return (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def write_whole(path: Path, *parts: Any) -> str:
    """Write bytes under a temporary name, then give them theirs; returns their sha256."""
    digest = hashlib.sha256()
    with replacing(path) as temporary, open(temporary, "wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
    return digest.hexdigest()
