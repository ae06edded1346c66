"""Perplexity under the model being trained, or under a fixed reference model.

`Perplexity` keeps the candidates of highest, middle or lowest loss of the live model, step by step;
`ReferenceLoss` scores texts once, under another model.

The paper's PPL baseline ("High-PPL") keeps the highest, scored online by the current model.  Middle
and lowest are the usual alternatives of perplexity filters (CCNet keeps the lowest; Marion et al.
2023 found the middle best), here with the same online score.  No paper that is compared with here names
a reference model, so one must be given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from opus_bench.distributed.world import World, shared_scores
from opus_bench.documents.embedding import in_batches
from opus_bench.errors import first_line
from opus_bench.gradients import scoring_mode
from opus_bench.sampling import check_size
from opus_bench.sequences import Sequences, as_sequences, sample_losses
from opus_bench.selector import Selection, Stateless, TrainState
from opus_bench.streamed import check_microbatch, microbatches
from opus_bench.utility import check_utilities


@dataclass
class Perplexity(Stateless):
    """Deterministic choice by mean loss (nat/token) of the first ``window`` tokens.

    keep "high": the largest losses; "low": the smallest; "mid": those nearest the buffer's median.
    Ties go to the lower index.

    microbatch: candidates in one forward; None: all.
    world: the processes that share the candidates, and call this together; None: all losses are computed here.

    Cost: one forward of the candidates over the window; of ceil(n / size) of them on each of ``size`` processes.
    """

    keep: Literal["high", "mid", "low"] = "high"
    window: int = 512
    microbatch: int | None = None
    world: World | None = None

    def __post_init__(self) -> None:
        if self.keep not in ("high", "mid", "low"):
            raise ValueError(f"keep must be high, mid or low, got {self.keep!r}")
        if self.window < 2:
            raise ValueError(f"window must be at least 2 tokens, got {self.window}")
        check_microbatch(self.microbatch)

    def select(
        self, candidates: Any, size: int, state: TrainState, generator: torch.Generator
    ) -> Selection:
        sequences = as_sequences(candidates)
        check_size(size, len(sequences))

        def losses_of(batch: Sequences) -> Tensor:
            return torch.cat([sample_losses(state.model, part).double().cpu()
                              for _, part in microbatches(batch, self.microbatch)])

        window = sequences.window(self.window)
        with scoring_mode(state.model), torch.no_grad():
            losses = losses_of(window) if self.world is None else shared_scores(losses_of, window, self.world)
        check_utilities(losses, f"perplexity ({self.keep}) at step {state.step}")
        score = {"high": losses, "low": -losses, "mid": -(losses - losses.median()).abs()}[self.keep]
        order = torch.sort(score, descending=True, stable=True).indices
        return Selection(order[:size], losses, {"utility_std": float(losses.std())})


class ReferenceLoss:
    """Texts by their mean loss (nat/token) under a causal language model, their first ``max_tokens`` tokens.

    model: folder or hub id.  keep "low": the score is minus the loss (CCNet's direction); "high": the loss
        (the direction of the OPUS paper's baseline).
    max_tokens: None: 1,024, or the model's context if that is shorter.
    """

    def __init__(self, model: str, keep: Literal["high", "low"] = "low", max_tokens: int | None = None,
                 batch_size: int = 32, device: str | None = None, trust_remote_code: bool = False):
        if keep not in ("high", "low"):
            raise ValueError(f"keep must be high or low, got {keep!r}")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
            loaded = AutoModelForCausalLM.from_pretrained(
                model, trust_remote_code=trust_remote_code, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot load {model} ({first_line(error)}); give --model FOLDER") from error
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.keep, self.batch_size = loaded.eval().to(self.device), keep, batch_size
        context = getattr(loaded.config, "max_position_embeddings", None) or 1024
        self.max_tokens = max_tokens or min(1024, context)

    def score(self, texts: list[str]) -> np.ndarray:
        """(n,) float64, higher is kept; -inf for a text of fewer than two tokens."""
        tokens = [ids[: self.max_tokens] for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        places = [n for n, ids in enumerate(tokens) if len(ids) > 1]
        found = np.full(len(texts), -np.inf)
        if places:
            losses = in_batches([tokens[n] for n in places], self.batch_size, self._losses).double().numpy()
            found[places] = losses if self.keep == "high" else -losses
        return found

    def _losses(self, tokens: list[list[int]]) -> Tensor:
        longest = max(map(len, tokens))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in tokens])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in tokens])
        with torch.no_grad():
            return sample_losses(self.model, Sequences(ids.to(self.device), mask.to(self.device))).cpu()
