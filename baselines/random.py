"""Random: every candidate is as likely as any other.  The reference of every comparison."""

from __future__ import annotations

from typing import Any

import torch

from opus_bench.sampling import check_size
from opus_bench.sequences import as_sequences
from opus_bench.selector import Selection, Stateless, TrainState


class Random(Stateless):
    """Uniform choice without replacement, from the run's own generator; no cost."""

    def select(
        self, candidates: Any, size: int, state: TrainState, generator: torch.Generator
    ) -> Selection:
        n = len(as_sequences(candidates))
        check_size(size, n)
        indices = torch.randperm(n, generator=generator)[:size]
        return Selection(indices, None, {"effective_sample_size": 1.0, "total_variation": 0.0})
