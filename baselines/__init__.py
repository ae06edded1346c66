"""Selectors that OPUS is compared with, and the one place where a name becomes a selector."""

from __future__ import annotations

from typing import Any

from opus_bench.corpus import Corpus
from opus_bench.selector import Opus, Selector

from .greats import Greats
from .perplexity import Perplexity
from .quality import StaticQuality, classifier_scores
from .random import Random

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
            scores, seconds = classifier_scores(corpus, length)
            return StaticQuality(scores, scoring_s=seconds, **options)
        return Opus.arm(options.get("arm", "calibrated"),
                        **{k: v for k, v in options.items() if k != "arm"})
    except TypeError as error:
        raise ValueError(f"selector {name!r}: {error}") from error
