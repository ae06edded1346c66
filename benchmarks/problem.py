"""What an estimator of the utilities is: a function of a live training state, candidates and a proxy batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opus_bench.gradients import mean_gradient
from opus_bench.layers import layer_names, parameter_names
from opus_bench.preconditioner import preconditioners
from opus_bench.selector import Opus, TrainState
from opus_bench.utility import Utility


@dataclass(frozen=True)
class Problem:
    """A live training state; estimators leave it as it was."""

    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]

    def scored(self) -> tuple[list[str], dict[str, nn.Parameter]]:
        names = layer_names(self.model, "blocks")
        return names, parameter_names(self.model, names)

    def weighted(self, proxy: Tensor) -> tuple[list[str], dict[str, nn.Parameter], dict[str, Tensor]]:
        """Layers, parameters and the directions eta P_t g_proxy of this proxy batch."""
        names, parameters = self.scored()
        p = preconditioners(self.optimizers, parameters)
        gradient, _ = mean_gradient(self.model, proxy, names)
        return names, parameters, {k: p[k].learning_rate * p[k](g) for k, g in gradient.items()}


Score = Callable[[Problem, Tensor, Tensor], Utility]


@dataclass(frozen=True)
class Estimator:
    """One point of the frontier."""

    name: str
    about: str
    dtype: str  # of scoring
    score: Score
    in_product: bool = True
    gpt2_only: bool = False  # takes the paper's GPT-2 apart


def opus(**options: Any) -> Score:
    """An `Opus` over the blocks' matrices with fresh caches: alignment weight eta, redundancy as in the paper."""

    def score(problem: Problem, candidates: Tensor, proxy: Tensor) -> Utility:
        selector = Opus(window=candidates.shape[1], **options)
        return selector.utilities(candidates, 1, TrainState(problem.model, problem.optimizers, 0, proxy))

    return score


def bf16(score: Score) -> Score:
    """The same with forward and backward under bfloat16 autocast."""

    def narrow(problem: Problem, candidates: Tensor, proxy: Tensor) -> Utility:
        with torch.autocast(candidates.device.type, torch.bfloat16):
            return score(problem, candidates, proxy)

    return narrow
