"""Selectors that OPUS is compared with, and the one place where a name becomes a selector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from opus_bench.corpus import Corpus
from opus_bench.selector import Opus, Selector

from .greats import Greats
from .perplexity import Perplexity
from .quality import StaticQuality, Texts, classifier_scores, scorer_scores
from .random import Random
from .scorers import FITTED, ScorerOptions, build_scorer, check_scorer, fit_scorer

NAMES = ("random", "perplexity", "greats", "quality", "opus")


def build_selector(name: str, options: dict[str, Any], corpus: Corpus, length: int) -> Selector:
    """A selector by name with its options (the fields of its class).

    Raises:
        ValueError: for an unknown name or option, naming it and what is known.
    """
    if name not in NAMES:
        raise ValueError(f"unknown selector {name!r}; known: {', '.join(NAMES)}")
    try:
        if name == "random":
            return Random(**options)
        if name == "perplexity":
            return Perplexity(**options)
        if name == "greats":
            return Greats(**options)
        if name == "quality":
            return static_quality(corpus, length, **options)
        return Opus.arm(options.get("arm", "calibrated"),
                        **{k: v for k, v in options.items() if k != "arm"})
    except TypeError as error:
        raise ValueError(f"selector {name!r}: {error}") from error


def static_quality(
    corpus: Corpus, length: int, scorer: str = "classifier", scorer_options: dict[str, Any] | None = None,
    **options: Any,
) -> StaticQuality:
    """StaticQuality by a scorer of `scorers.PUBLISHED` on the decoded sequences of the corpus.

    Scorers without published weights are fitted to the target's proxy split against the pool.
    """
    check_scorer(scorer)
    chosen = ScorerOptions(**(scorer_options or {}))

    def score(target: Texts, pool: Texts) -> Callable[[list[str]], np.ndarray]:
        if scorer in FITTED and chosen.model is None:
            return fit_scorer(scorer, chosen, target(), pool()).score
        return build_scorer(scorer, chosen).score

    if scorer == "classifier" and chosen == ScorerOptions():
        scores, seconds = classifier_scores(corpus, length)
    else:
        scores, seconds = scorer_scores(corpus, length, [scorer, asdict(chosen)], score)
    return StaticQuality(scores, scoring_s=seconds, **options)
