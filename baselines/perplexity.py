"""Perplexity under the model being trained: keep the candidates of highest, middle or lowest loss.

The paper's PPL baseline ("High-PPL") keeps the highest, scored online by the current model.  Middle
and lowest are the usual alternatives of perplexity filters (CCNet keeps the lowest; Marion et al.
2023 found the middle best), here with the same online score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from opus_bench.gradients import scoring_mode
from opus_bench.sampling import check_size
from opus_bench.sequences import as_sequences, sample_losses
from opus_bench.selector import Selection, Stateless, TrainState
from opus_bench.utility import check_utilities


@dataclass
class Perplexity(Stateless):
    """Deterministic choice by mean loss (nat/token) of the first ``window`` tokens.

    keep "high": the largest losses; "low": the smallest; "mid": those nearest the buffer's median.
    Ties go to the lower index.  Cost: one forward of the candidates over the window.
    """

    keep: Literal["high", "mid", "low"] = "high"
    window: int = 512

    def __post_init__(self) -> None:
        if self.keep not in ("high", "mid", "low"):
            raise ValueError(f"keep must be high, mid or low, got {self.keep!r}")
        if self.window < 2:
            raise ValueError(f"window must be at least 2 tokens, got {self.window}")

    def select(
        self, candidates: Any, size: int, state: TrainState, generator: torch.Generator
    ) -> Selection:
        sequences = as_sequences(candidates)
        check_size(size, len(sequences))
        with scoring_mode(state.model), torch.no_grad():
            losses = sample_losses(state.model, sequences.window(self.window)).double().cpu()
        check_utilities(losses, f"perplexity ({self.keep}) at step {state.step}")
        score = {"high": losses, "low": -losses, "mid": -(losses - losses.median()).abs()}[self.keep]
        order = torch.sort(score, descending=True, stable=True).indices
        return Selection(order[:size], losses, {"utility_std": float(losses.std())})
