"""GREATS: greedy choice by a second-order Taylor expansion of the proxy loss after an SGD step.

Wang et al., NeurIPS 2024, "GREATS: Online Selection of High-Quality Data for LLM Training in Every
Iteration".  An SGD step of rate eta on the selected samples S changes the validation loss, to second
order and with the Hessian taken as the identity, so that adding sample n to S gains

    U_n(S) = sum_l eta_l <g_n, g_val>_l  -  sum_l eta_l^2 <g_n, sum of selected g>_l

and the sample of highest gain is taken until enough are selected.  Deterministic: no generator.  The
step is on the sum of the selected gradients, as published; training here takes their mean.

From the OPUS paper, which compares with it: SGD geometry, that is gradients as they are, without the
optimizer's preconditioner.  Decided here: the proxy batch of the run stands for the validation data;
eta_l is the live learning rate of the optimizer group that owns weight l (one number for all, if
given); the scored window and the layers are those of OPUS.  Left out: GREATS's ghost inner products
by token pairs; the same numbers come from contraction and row chunks (opus_bench/utility.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opus_bench import sampling
from opus_bench.distributed.world import World, shared_mean_gradient
from opus_bench.ghost import full
from opus_bench.gradients import capture, mean_gradient
from opus_bench.layers import layer_names, parameter_names
from opus_bench.preconditioner import Preconditioner, owners
from opus_bench.selector import Selection, TrainState
from opus_bench.sequences import as_sequences
from opus_bench.utility import Utility, check_utilities, exact_utility


@dataclass
class Greats:
    """Greedy selection on the plain gradients of the live model (module docstring).

    window: tokens scored per sequence, from its start.
    layers: see layers.layer_names; by default all linear layers of the blocks.
    learning_rate: eta of every weight; None: of each weight the live rate of its optimizer group.
    proxy_every: steps that a proxy gradient serves, at least 1.
    world: the processes, where the model is spread over several: each computes the proxy gradient on its share of
        the proxy batch.  Every process scores all candidates: the Gram matrix is not shared.

    Exactness: utilities are exact up to rounding in the model's dtype.
    Cost: one forward and backward-to-activations of the candidates and a full one of the proxy, over
        ``window`` tokens each; then O(n t o i + n^2 o i) flops for the Gram matrix of every weight.
    """

    window: int = 512
    layers: str | Sequence[str] = "blocks"
    learning_rate: float | None = None
    proxy_every: int = 1
    world: World | None = None
    _proxy_gradient: dict[str, Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ValueError(f"window must be at least 2 tokens, got {self.window}")
        if self.learning_rate is not None and not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.proxy_every < 1:
            raise ValueError(f"proxy_every must be at least 1 step, got {self.proxy_every}")

    def select(
        self, candidates: Any, size: int, state: TrainState, generator: torch.Generator
    ) -> Selection:
        """Choose ``size`` candidates; ``generator`` is left alone.  See selector.Selector."""
        sampling.check_size(size, len(as_sequences(candidates)))
        utility = self.utilities(candidates, state)
        first = utility.marginal([])
        check_utilities(first, f"greats at step {state.step}")
        indices = sampling.greedy(utility.marginal, size).indices
        return Selection(torch.tensor(indices), first, {"utility_std": float(first.std())})

    def utilities(self, candidates: Any, state: TrainState) -> Utility:
        """Alignment (loss, nat/token) and Gram matrix of the candidates, eta included.

        Raises:
            ValueError: without a proxy batch, and for a weight that no optimizer owns.
        """
        proxy = None if state.proxy is None else as_sequences(state.proxy).window(self.window)
        if not proxy:
            raise ValueError("greats needs a proxy batch in TrainState.proxy, got none")
        names = layer_names(state.model, self.layers)
        owned = owners(state.optimizers, parameter_names(state.model, names))
        eta = {k: float(one.group["lr"]) if self.learning_rate is None else self.learning_rate
               for k, one in owned.items()}
        if self._proxy_gradient is None or state.step % self.proxy_every == 0:
            self._proxy_gradient = (mean_gradient(state.model, proxy, names)[0] if self.world is None else
                                    shared_mean_gradient(state.model, proxy, names, self.world))
        gradients = capture(state.model, as_sequences(candidates).window(self.window), names)
        identity = {k: Preconditioner() for k in eta}
        whole = {k: full(g) for k, g in self._proxy_gradient.items()}
        return exact_utility(gradients, whole, identity, eta, {k: e**2 for k, e in eta.items()})

    def state_dict(self) -> dict[str, Any]:
        return {"proxy_gradient": self._proxy_gradient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._proxy_gradient = state["proxy_gradient"]
