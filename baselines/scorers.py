"""Static scorers behind one interface: score every document once, keep a fixed part of the pool.

    scorer = build_scorer("fineweb-edu")
    scorer.score(["a text", "another"])        # (2,) float64, higher is kept, -inf is never kept

`PUBLISHED` has for each its model, what it reads of a document, the convention of what is kept, the source,
and what is not known.  For none of them does the OPUS paper (arXiv:2602.05400) say which share is kept: it
scores the pool once and trains on a fixed subset.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from . import fast_text, perplexity, raters
from .dsir import Dsir
from .quality import TextClassifier


class Scorer(Protocol):
    """What gives every text a number."""

    def score(self, texts: list[str]) -> np.ndarray:
        """(n,) float64; higher is kept, -inf is never kept."""
        ...


@dataclass(frozen=True)
class Published:
    """What is known of a scorer; higher is always better, as scores come out of `Scorer`."""

    model: str
    reads: str
    keeps: str
    source: str
    unknown: str


PUBLISHED = {
    "classifier": Published("trained here on --target against the pool", "the whole text, hashed words",
                            "DCLM's recipe: the tenth of highest score", "this project, after arXiv:2406.11794",
                            "no published weights"),
    "dsir": Published("fitted here on --target against the pool, package data-selection",
                      "the whole text; fewer than 100 words are never kept", "a sample at temperature 1",
                      "arXiv:2302.03169", "the target text of the OPUS paper's baseline"),
    "dclm": Published("/".join(fast_text.DCLM), "the whole text", "the tenth of highest score; P(hq) above 0.018112",
                      "arXiv:2406.11794, its released configuration", "the share that the OPUS paper keeps"),
    "fineweb-edu": Published(raters.FINEWEB_EDU, "the first 512 tokens", "a rounded score of at least 3 of 5",
                             "arXiv:2406.17557, its model card", "the share that the OPUS paper keeps"),
    "qurating": Published(raters.QURATER, "all of it, in windows of 512 tokens",
                          "a sample at temperature 2 of standardised ratings",
                          "arXiv:2402.09739, its model card and code",
                          "the criterion and the share of the OPUS paper's baseline"),
    "ultra-fineweb": Published("/".join(fast_text.ULTRA_FINEWEB), "the whole text", "not in its model card",
                               "arXiv:2505.05427, its model card and scripts", "the threshold of its data set"),
    "perplexity": Published("--model, any causal language model", "the first 1,024 tokens, or the model's context",
                            "CCNet keeps the lowest third (head) by language", "arXiv:1911.00359",
                            "no reference model is named by the OPUS paper, whose perplexity is the trained model's"),
}
FITTED = ("classifier", "dsir")
"""Scorers without published weights: fitted to target texts and the pool, or loaded from an earlier fit."""


@dataclass(frozen=True)
class ScorerOptions:
    """Options of all scorers; each reads those it knows.

    model: folder, file or hub id in place of the published one; of a fitted scorer, its saved fit.
    criterion: of qurating.  keep: of perplexity.  classifier_tokenizer: of ultra-fineweb.
    shortest: words below which dsir never keeps a document.
    """

    model: str | None = None
    criterion: str = "educational_value"
    keep: Literal["high", "low"] = "low"
    classifier_tokenizer: str | None = None
    shortest: int = 100
    max_tokens: int | None = None
    batch_size: int = 32
    device: str | None = None
    trust_remote_code: bool = False


def check_scorer(name: str) -> None:
    """Raise a ValueError for an unknown name, with those that are known."""
    if name not in PUBLISHED:
        raise ValueError(f"unknown scorer {name!r}; known: {', '.join(PUBLISHED)}")


def fit_scorer(name: str, options: ScorerOptions, target: Iterable[str], pool: Iterable[str]) -> Dsir | TextClassifier:
    """One of `FITTED`, fitted; both texts are read once."""
    if name == "dsir":
        return Dsir.fit(target, pool, options.shortest)
    return TextClassifier.fit(target, pool)


def build_scorer(name: str, options: ScorerOptions = ScorerOptions()) -> Scorer:
    """A scorer with its weights in memory.

    Raises:
        ValueError: for an unknown name, weights that cannot be had, and an absent package, with the mend.
    """
    check_scorer(name)
    if name in FITTED:
        if options.model is None:
            raise ValueError(f"scorer {name} has no published weights; give target texts to fit it, or a saved fit")
        return (Dsir if name == "dsir" else TextClassifier).load(Path(options.model))
    if name == "dclm":
        return fast_text.dclm(options.model)
    if name == "ultra-fineweb":
        return fast_text.ultra_fineweb(options.model, options.classifier_tokenizer)
    names = ("max_tokens", "batch_size", "device", "trust_remote_code")
    reading: dict[str, Any] = {option: getattr(options, option) for option in names}
    if name == "fineweb-edu":
        return raters.FineWebEdu(options.model or raters.FINEWEB_EDU, **reading)
    if name == "qurating":
        return raters.QuRating(options.model or raters.QURATER, options.criterion, **reading)
    if options.model is None:
        raise ValueError("scorer perplexity needs a reference model; give --model")
    return perplexity.ReferenceLoss(options.model, options.keep, **reading)
