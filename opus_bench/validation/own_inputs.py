"""A user's model and text as ``opus-bench validate --model`` takes them.

Nothing on disk is changed; what is downloaded lies in the hub's cache.  Weights are read of
safetensors and other tensors without objects, so that no file runs code but with ``trust_remote_code``.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..pools.shards import is_shard, read_shard
from .own_settings import TEXT, OwnSettings

DOCUMENTS = 256  # tokenised at once
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


# Models ------------------------------------------------------------------------------------------


@contextmanager
def quiet() -> Iterator[None]:
    """transformers below errors, without bars; put back as it was."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def hub_problem() -> str | None:
    """Why the hub cannot be asked, or None; a few seconds at most."""
    from ..evaluation.paper_suite import download_problem

    return download_problem()


def place(name: str, what: str) -> dict[str, Any]:
    """Where a model or tokenizer is read from, as options of ``from_pretrained``.

    A hub that answers is asked, since a part in the cache (its config, of a first look) is not the whole; one that
    does not leaves the cache.

    Raises:
        ValueError: for what is no folder, not in the hub's cache and not to be had.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return {"pretrained_model_name_or_path": str(folder), "local_files_only": True}
    problem = hub_problem()
    if problem is None:
        return {"pretrained_model_name_or_path": name}
    from huggingface_hub import try_to_load_from_cache

    keys = ("config.json",) if what == "model" else ("tokenizer_config.json", "tokenizer.json")
    if any(isinstance(try_to_load_from_cache(name, key), str) for key in keys):
        return {"pretrained_model_name_or_path": name, "local_files_only": True}
    raise ValueError(f"{what} {name!r} is no folder here and not in the hub's cache, and the hub cannot be "
                     f"reached ({problem}); give a folder that save_pretrained wrote")


def _loaded(what: str, name: str, read: Any, **options: Any) -> Any:
    """``read(**options)`` in silence, whatever goes wrong being one ValueError."""
    try:
        with quiet():
            return read(**options)
    except Exception as error:  # files of others fail in many ways; all mean that it cannot be read
        raise ValueError(f"cannot read the {what} of {name} ({type(error).__name__}: {error})") from error


def model_outline(settings: OwnSettings) -> nn.Module:
    """The model without its weights (on the meta device): names, shapes and config, no memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = {"trust_remote_code": settings.trust_remote_code}
    config = _loaded("config", settings.model, AutoConfig.from_pretrained, **place(settings.model, "model"), **trust)

    def build() -> nn.Module:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.dtype), **trust)

    return _loaded("architecture", settings.model, build)


def read_model(settings: OwnSettings) -> nn.Module:
    """The model with its weights, in ``settings.dtype`` on the CPU.

    Raises:
        ValueError: for one that cannot be read, and for weights that the files lack, which transformers
            would fill at random.
    """
    from transformers import AutoModelForCausalLM

    model, told = _loaded(
        "weights", settings.model, AutoModelForCausalLM.from_pretrained, **place(settings.model, "model"),
        dtype=getattr(torch, settings.dtype), use_safetensors=True, trust_remote_code=settings.trust_remote_code,
        output_loading_info=True)
    lacking = [*map(str, told["missing_keys"]), *(str(key[0]) for key in told["mismatched_keys"])]
    if lacking:
        raise ValueError(f"{settings.model} lacks weights, or has others in shape, for {', '.join(sorted(lacking))}")
    model.config.use_cache = False  # no keys and values are kept for a next token
    return model


# Data --------------------------------------------------------------------------------------------


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sequences(path: str, settings: OwnSettings, length: int) -> np.ndarray:
    """The file as integers (count, length): rows cut to ``length``, or flat tokens cut into sequences.

    Of text, documents are joined, each followed by the tokenizer's end-of-text token where it has
    one, up to ``text_tokens``.  Arrays stay on disk where they can.
    """
    suffix = Path(path).suffix
    ids = tokenised(path, settings) if suffix in TEXT else token_array(path, settings.token_dtype)
    if not np.issubdtype(ids.dtype, np.integer) or ids.ndim not in (1, 2):
        raise ValueError(f"{path} holds {ids.dtype} of shape {ids.shape}; token ids must be integers, flat or "
                         "(sequences, tokens)")
    if ids.ndim == 2:
        if ids.shape[1] < length:
            raise ValueError(f"the rows of {path} have {ids.shape[1]} tokens, {length} are needed; lower --length")
        return ids[:, :length]
    count = len(ids) // length
    return ids[: count * length].reshape(count, length)


def token_array(path: str, dtype: str) -> np.ndarray:
    """Token ids of a .npy, .pt or .bin (flat, or a shard with the header of llm.c) file."""
    try:
        if path.endswith(".npy"):
            return np.load(path, mmap_mode="r", allow_pickle=False)
        if path.endswith(".pt"):
            ids = torch.load(path, map_location="cpu", weights_only=True)
            if not torch.is_tensor(ids):
                raise ValueError(f"it holds a {type(ids).__name__}, not a tensor")
            return ids.numpy()
        if is_shard(path):
            return read_shard(path)
        return np.memmap(path, np.dtype(dtype).newbyteorder("<"), "r")
    except (ValueError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"cannot read token ids of {path} ({error})") from error


def documents(path: str, field: str) -> Iterator[str]:
    """Texts of a .txt (paragraphs between blank lines), .jsonl or .parquet file."""
    try:
        if path.endswith(".parquet"):
            import pandas

            table = pandas.read_parquet(path)
            if field not in table:
                raise ValueError(f"no column {field!r} but {', '.join(map(repr, table))}; give --text-field")
            yield from table[field].dropna().astype(str)
            return
        with open(path, encoding="utf-8") as file:
            if path.endswith(".txt"):
                yield from (part for part in re.split(r"\n\s*\n", file.read()) if part.strip())
                return
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number} is no JSON ({error})") from error
                if not isinstance(record, dict) or not isinstance(record.get(field), str):
                    raise ValueError(f"line {number} has no text under {field!r}; give --text-field")
                yield record[field]
    except ValueError as error:  # also of pyarrow and of decoding
        raise ValueError(f"cannot read text of {path}: {error}") from error


def read_tokenizer(settings: OwnSettings) -> Any:
    """The tokenizer named by the settings, or that of the model.

    Raises:
        ValueError: for a folder without one, and for one that cannot be read.
    """
    from transformers import AutoTokenizer

    name = settings.tokenizer or settings.model
    folder = Path(name).expanduser()
    if folder.is_dir() and not any((folder / file).exists() for file in TOKENIZER_FILES):
        # transformers would make one without a vocabulary from the model's config
        raise ValueError(f"{name} holds no tokenizer; give --tokenizer, or token ids as --data")
    return _loaded("tokenizer", name, AutoTokenizer.from_pretrained, **place(name, "tokenizer"),
                   trust_remote_code=settings.trust_remote_code)


def tokenised(path: str, settings: OwnSettings) -> np.ndarray:
    """Flat token ids of a text file's documents, up to ``text_tokens``."""
    tokenizer = read_tokenizer(settings)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    some: list[str] = []

    def flush() -> None:
        with quiet():
            for row in tokenizer(some, add_special_tokens=False)["input_ids"] if some else ():
                ids.extend(row + end)
        some.clear()

    for text in documents(path, settings.text_field):
        some.append(text)
        if len(some) == DOCUMENTS:
            flush()
            if len(ids) >= settings.text_tokens:
                break
    flush()
    return np.array(ids[: settings.text_tokens], dtype=np.int64)
