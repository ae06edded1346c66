"""The selectors that look for injected noise: how each of them judges one buffer, clean and spoilt sequences at once.

Everything that costs is done once for all sequences of a buffer; what is chosen at each kind and share of
noise is then each selector's own choice from what it made of the sequences concerned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from baselines.greats import Greats
from baselines.perplexity import Perplexity
from baselines.quality import StaticQuality, classifier_scores, target_classifier
from baselines.random import Random
from opus_bench.corpus import Corpus
from opus_bench.sampling import top_k
from opus_bench.selector import ARMS, Opus, TrainState
from opus_bench.stream import Batch, ProxyStream
from opus_bench.train import RunConfig
from opus_bench.utility import Utility
from opus_bench.validation import noise_injection
from opus_bench.validation.noise_injection import Buffer, Judge, Settings
from opus_bench.validation.trained import Stage

LABELS = ("Random", "PPL (high)", "PPL (mid)", "PPL (low)", "Static quality", "GREATS",
          *(f"OPUS ({arm})" for arm in ARMS))


def preference(losses: Tensor, keep: str) -> Tensor:
    """What `baselines.perplexity.Perplexity` ranks by, from losses in nat/token; higher is chosen first."""
    return {"high": losses, "low": -losses, "mid": -(losses - losses.median()).abs()}[keep]


def by_loss(losses: Tensor, keep: str) -> Judge:
    """Perplexity's choice among sequences of known loss."""

    def judge(members: list[int], size: int, generator: torch.Generator) -> tuple[list[int], Tensor]:
        score = preference(losses[members], keep)
        return top_k(lambda selected: score, size).indices, score

    return judge


def by_utility(selector: Opus | Greats, utility: Utility, tokens: Tensor, state: TrainState) -> Judge:
    """The selector's own choice among sequences whose utilities it has computed.

    Alignment and Gram entries of some sequences do not depend on which others are scored beside them, so
    those of the candidates are a part of those of all.
    """
    selector = dataclasses.replace(selector)

    def judge(members: list[int], size: int, generator: torch.Generator) -> tuple[list[int], Tensor]:
        at = torch.tensor(members)
        gram = None if utility.gram is None else utility.gram[at[:, None], at]
        part = dataclasses.replace(utility, alignment=utility.alignment[at], gram=gram)
        selector.utilities = lambda *_: part
        selection = selector.select(tokens[at], size, state, generator)
        return selection.indices.tolist(), selection.utilities

    return judge


class Judges:
    """Builds the judges of a buffer; what does not change with the model is made once."""

    def __init__(self, config: RunConfig, options: Mapping[str, Any], corpus: Corpus):
        """``options``: window, sketch_width, and calibrated_proxy: proxy sequences of the calibrated arm."""
        self.options, length = options, config.length
        classify = target_classifier(corpus, length)
        self.classify = lambda tokens: classify(tokens).astype(np.float32)  # as the pool's scores are kept
        self.pool_scores, _ = classifier_scores(corpus, length)
        self.proxy = ProxyStream(corpus, length, config.proxy_size, config.seed)
        self.calibrated_proxy = ProxyStream(corpus, length, options["calibrated_proxy"], config.seed)

    def __call__(self, stage: Stage, buffer: Buffer, number: int) -> dict[str, Judge]:
        """All of LABELS, in that order."""
        tokens, window = buffer.tokens, self.options["window"]

        def state(stream: ProxyStream) -> TrainState:
            return TrainState(stage.model, stage.optimizers, stage.step, stream.proxy(number))

        paper, calibrated = state(self.proxy), state(self.calibrated_proxy)
        losses = Perplexity(window=window).select(tokens, 1, paper, torch.Generator()).utilities
        # ids are places in the buffer; the threshold stays the pool's, set before anything is injected
        quality = StaticQuality(self.pool_scores)
        quality.scores = self.classify(tokens)
        batch = Batch(tokens, torch.arange(len(tokens)), ("",) * len(tokens), torch.ones(len(tokens), dtype=torch.long))
        found: dict[str, Judge] = {"Random": _own(Random(), batch, paper)}
        for keep in ("high", "mid", "low"):
            found[f"PPL ({keep})"] = by_loss(losses, keep)
        found["Static quality"] = _own(quality, batch, paper)
        greats = Greats(window=window)
        found["GREATS"] = by_utility(greats, greats.utilities(tokens, paper), tokens, paper)
        for arm in ARMS:
            opus = Opus.arm(arm, window=window, sketch_width=self.options["sketch_width"])
            seen = calibrated if arm == "calibrated" else paper
            found[f"OPUS ({arm})"] = by_utility(opus, opus.utilities(tokens, 1, seen), tokens, seen)
        return found


def _own(selector: Any, batch: Batch, state: TrainState) -> Judge:
    def judge(members: list[int], size: int, generator: torch.Generator) -> tuple[list[int], Tensor | None]:
        selection = selector.select(batch.take(members), size, state, generator)
        return selection.indices.tolist(), selection.utilities

    return judge


def measure(
    config: RunConfig, settings: dict[str, Any], corpus: Corpus, on_step: Callable[[], Any] = lambda: None
) -> list[dict[str, Any]]:
    """`opus_bench.validation.noise_injection.measure` of every selector of LABELS.

    Raises:
        ValueError: bad settings, before the model is trained.
    """
    checked = Settings(**settings)
    options = checked.selectors or {}
    for name in ("window", "sketch_width", "calibrated_proxy"):
        if name not in options:
            raise ValueError(f"selectors must give {name!r}, got {sorted(options)}")
    if not 2 < options["window"] <= config.length:
        raise ValueError(f"window must be 3 tokens to the {config.length} of a sequence, got {options['window']}")
    return noise_injection.measure(config, checked, corpus, on_step, Judges(config, options, corpus))
