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
by token pairs; the same numbers come from dense rows in chunks (opus_bench/utility.py).

On several processes each captures the factors of its share of the candidates.  Then, one weight after
the other, the factors of all are gathered, and each process forms an equal part of the weight's rows
for all candidates and sums its inner products; n + n^2 numbers a process are gathered at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from opus_bench import sampling
from opus_bench.distributed.world import World, shared_mean_gradient
from opus_bench.ghost import full, row_slice
from opus_bench.gradients import Factors, PerSampleGradient, capture, mean_gradient
from opus_bench.layers import layer_names, parameter_names
from opus_bench.preconditioner import Preconditioner, owners
from opus_bench.selector import Selection, TrainState, products_of, scoring_autocast
from opus_bench.sequences import Sequences, as_sequences
from opus_bench.streamed import check_microbatch, microbatches
from opus_bench.utility import Utility, check_utilities, exact_utility


@dataclass
class Greats:
    """Greedy selection on the plain gradients of the live model (module docstring).

    window: tokens scored per sequence, from its start.
    layers: see layers.layer_names; by default all linear layers of the blocks.
    learning_rate: eta of every weight; None: of each weight the live rate of its optimizer group.
    proxy_every: steps that a proxy gradient serves, at least 1.
    scoring_dtype: "bfloat16": scoring under autocast, products included; "model": the model's, at least float32.
    microbatch: candidates in one forward and backward; None: all.  Bounds activations; the factors of all are kept.
    world: the processes, where the model is spread over several, which all call this together.  The proxy batch is
        that of all.
    gathered: candidates are those of all processes, who share the work (global selection); else each process has
        its own (local selection) and shares the proxy's gradient alone.

    Exactness: utilities are exact up to rounding in the scoring dtype, also of shares, and the same bit for bit on
        every process.
    Cost: one forward and backward-to-activations of the candidates and a full one of the proxy, over
        ``window`` tokens each; then 2 n t o i + 2 n^2 o i flops for the Gram matrix of every weight.  Memory: n t
        (o + i) numbers a weight for the factors, kept until the weight's turn.
        On ``size`` processes the share of each is 1 / size of all flops (of candidates ceil(n / size), of rows
        ceil(o / size)) and of the kept factors; n t (o + i) numbers are gathered a weight, in the dtype that the
        layer computed in, and o i of the proxy's gradient where weights are sharded, and dropped again.
    """

    window: int = 512
    layers: str | Sequence[str] = "blocks"
    learning_rate: float | None = None
    proxy_every: int = 1
    scoring_dtype: Literal["model", "bfloat16"] = "model"
    microbatch: int | None = None
    world: World | None = None
    gathered: bool = True
    _proxy_gradient: dict[str, Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ValueError(f"window must be at least 2 tokens, got {self.window}")
        if self.learning_rate is not None and not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.proxy_every < 1:
            raise ValueError(f"proxy_every must be at least 1 step, got {self.proxy_every}")
        products_of(self.scoring_dtype)
        check_microbatch(self.microbatch)

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
        window, products = as_sequences(candidates).window(self.window), products_of(self.scoring_dtype)
        world = self.world if self.world is not None and self.gathered else World(0, 1, window.tokens.device)
        alignment, gram = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        with scoring_autocast(products, window.tokens.device):
            if self._proxy_gradient is None or state.step % self.proxy_every == 0:
                self._proxy_gradient = (mean_gradient(state.model, proxy, names)[0] if self.world is None else
                                        shared_mean_gradient(state.model, proxy, names, self.world))
            for name, gradient in self._everyones(state.model, window, names, world):
                rows, counted = world.share(gradient.shape[0])
                start, stop = int(rows[0]), int(rows[0]) + counted
                found = exact_utility(
                    {name: row_slice(gradient, start, stop)}, {name: full(self._proxy_gradient[name])[start:stop]},
                    {name: Preconditioner()}, eta, {name: eta[name] ** 2}, products=products)
                assert found.gram is not None
                alignment, gram = alignment + found.alignment, gram + found.gram
        alignment, gram = (world.gather(x[None], world.size).sum(0) for x in (alignment, gram))
        return Utility(alignment, gram)

    def _everyones(
        self, model: nn.Module, window: Sequences, names: list[str], world: World
    ) -> Iterator[tuple[str, PerSampleGradient]]:
        """All candidates' factored gradients, one weight at a time; each process has captured those of its share."""
        own, counted = world.share(len(window))
        parts = [capture(model, part, names) for _, part in microbatches(window[own], self.microbatch)]

        def joined(factors: list[Tensor]) -> Tensor:
            mine = factors[0] if len(factors) == 1 else torch.cat(factors)
            return world.gather(mine[:counted], len(window))

        for name in list(parts[0]):
            mine = [part.pop(name) for part in parts]
            uses = tuple(Factors(joined([use.left for use in same]), joined([use.right for use in same]))
                         for same in zip(*(gradient.uses for gradient in mine), strict=True))
            yield name, PerSampleGradient(mine[0].shape, uses)

    def state_dict(self) -> dict[str, Any]:
        return {"proxy_gradient": self._proxy_gradient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._proxy_gradient = state["proxy_gradient"]
