"""BENCH-PROXY: the documents of a pool that are most like benchmark items, as a proxy of the benchmark.

    score of a document = max over items of cos(embedding of the document, embedding of the item)

What the paper (arXiv:2602.05400) says: embeddings by Arctic-Embed-L v2, the maximum above, sort all
documents, keep the top 30 million tokens.  What it does not say, decided here: items are the queries and
get the model's query prefix, documents none; an item is question and right answer; a document is read up
to the model's own limit (8,192 tokens) unless max_tokens says less; tokens are counted by GPT-2's
tokenizer; the document that reaches the budget is the last; ties go by id.

Two rules of selection: `PAPER`, and `released_rule`, after the released code, which keeps the top share
within every file of the pool.  Not known of the latter: the share itself (so it must be given), whether it
is one of documents or tokens (here: documents, rounded up), and what is a file (here: a file or hub shard).

A standard proxy is a uniform sample of held-out documents: `standard_rule`, with the score 0 for all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from opus_bench.documents.embedding import Encoder
from opus_bench.documents.items import Items
from opus_bench.documents.scored import Rule
from opus_bench.errors import first_line

TOKENS = 30_000_000
"""Tokens of the paper's proxy pool."""
PAPER = Rule(tokens=TOKENS)
BLOCK = 4096  # items whose cosines with a batch of documents are in memory at once


def released_rule(share: float) -> Rule:
    """The top share of the documents of every file (module docstring: what is not known)."""
    return Rule(share=share, per_file=True)


def standard_rule(tokens: int = TOKENS, seed: int = 0) -> Rule:
    """A uniform sample of documents without replacement, up to ``tokens``."""
    return Rule(tokens=tokens, temperature=1.0, seed=seed)


class MaxCosine:
    """The score of BENCH-PROXY, a function of texts.

    Cost: one embedding a document and O(items d) flops; memory of all item embeddings (items d 4 bytes)
        and of BLOCK cosines a document.
    Exactness: the maximum is exact; a cosine has the rounding of the encoder's dtype, float32 as a rule.
        How texts are batched moves a transformer's embedding by about as much.
    """

    def __init__(self, encoder: Encoder, items: Items, progress: bool = True):
        unique = sorted(set(items.texts))
        self.encoder = encoder
        parts = [encoder.embed(unique[start : start + 1024], query=True)
                 for start in tqdm(range(0, len(unique), 1024), desc="embedding items", disable=not progress)]
        self.items = np.concatenate(parts)

    def __call__(self, texts: list[str]) -> np.ndarray:
        """(n,) float64 scores in [-1, 1], up to rounding."""
        documents = self.encoder.embed(texts, query=False)
        best = np.full(len(texts), -np.inf)
        for start in range(0, len(self.items), BLOCK):
            best = np.maximum(best, (documents @ self.items[start : start + BLOCK].T).max(1))
        return best


def no_preference(texts: list[str]) -> np.ndarray:
    """0 for every text: the score of the standard proxy."""
    return np.zeros(len(texts))


def items_sha256(items: Items) -> str:
    return hashlib.sha256("\0".join(sorted(set(items.texts))).encode("utf-8", "surrogatepass")).hexdigest()


def token_counter(tokenizer: str) -> Callable[[list[str]], list[int]]:
    """Counts the tokens of texts, special tokens left out.

    tokenizer: a tokenizer.json, a folder that holds a tokenizer, or a hub id.

    Raises:
        ValueError: if it cannot be loaded, with the mend.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if Path(tokenizer).is_file():
            loaded = PreTrainedTokenizerFast(tokenizer_file=tokenizer)
        else:
            loaded = AutoTokenizer.from_pretrained(tokenizer)
    except Exception as error:  # the hub's client and the parsers of a tokenizer raise anything
        raise ValueError(f"cannot load tokenizer {tokenizer} ({first_line(error)}); give --tokenizer FILE or FOLDER, "
                         "or --token-field with the column that holds the number of tokens") from error
    loaded.model_max_length = 10**12  # texts are counted, not fed to a model; no warning
    return lambda texts: [len(ids) for ids in loaded(texts, add_special_tokens=False)["input_ids"]]
