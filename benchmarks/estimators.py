"""Estimators of the utilities, complete: proxy gradient, P_t and candidates, as a selector pays for them each step.

Those of the product are an `Opus` with its knobs; the rest are what was tried beside them.  Each is a function
``score(problem, candidates, proxy) -> Utility`` with a line that says what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from opus_bench.gradients import PerSampleGradient, capture, mean_gradient, sample_losses, stream
from opus_bench.layers import layer_names, parameter_names
from opus_bench.preconditioner import preconditioners
from opus_bench.selector import Opus, TrainState
from opus_bench.utility import Utility

from .literal import LiteralSketch


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


_literal = LiteralSketch()


def literal(problem: Problem, candidates: Tensor, proxy: Tensor) -> Utility:
    """The paper's algorithm as written: factors of all layers captured, rows made dense, scattered by cached tables."""
    names, parameters = problem.scored()
    p = preconditioners(problem.optimizers, parameters)
    gradient, _ = mean_gradient(problem.model, proxy, names)
    eta = {k: one.learning_rate for k, one in p.items()}
    return _literal(capture(problem.model, candidates, names), gradient, p, eta, {k: x**2 for k, x in eta.items()})


def forward_mode(problem: Problem, candidates: Tensor, proxy: Tensor) -> Utility:
    """Alignment by forward-mode derivative along V: exact, no backward for candidates, attention in plain form."""
    _, parameters, directions = problem.weighted(proxy)

    def losses(values: dict[str, Tensor]) -> Tensor:
        # detached leaves under functional_call: no graph for a backward is made
        return _functional_losses(problem.model, values, candidates)

    primal = {k: p.detach() for k, p in parameters.items()}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, slope = torch.func.jvp(losses, (primal,), (directions,))
    return Utility(slope.double().cpu(), None, 0.0)


class _Functional(nn.Module):
    """The model with some parameters replaced, as a callable that `sample_losses` takes."""

    def __init__(self, model: nn.Module, values: dict[str, Tensor]) -> None:
        super().__init__()
        self._call = lambda **inputs: torch.func.functional_call(model, values, (), inputs, tie_weights=True)

    def forward(self, **inputs: Any) -> Any:
        return self._call(**inputs)


def _functional_losses(model: nn.Module, values: dict[str, Tensor], tokens: Tensor) -> Tensor:
    return sample_losses(_Functional(model, values), tokens)


def separable(size: int, products: torch.dtype) -> Score:
    """Alignment and Gram from two-sided projections of u: (A b) (B a)^T of size x size, P_t's diagonal factored.

    A, B are random signs over sqrt(size); the diagonal of AdamW's P_t is replaced by the outer product of its row
    and column means over its mean (Adafactor's form), since an elementwise P_t does not pass through projections.
    """

    def score(problem: Problem, candidates: Tensor, proxy: Tensor) -> Utility:
        names, parameters = problem.scored()
        p = preconditioners(problem.optimizers, parameters)
        gradient, _ = mean_gradient(problem.model, proxy, names)
        n = len(candidates)
        features: dict[str, Tensor] = {}
        sides: dict[str, tuple[Tensor, Tensor]] = {}
        generator = torch.Generator().manual_seed(42)
        for name in parameters:
            o, i = gradient[name].shape
            a, b = (torch.randint(2, (d, size), generator=generator).mul(2).sub(1).to(gradient[name]) / size**0.5
                    for d in (o, i))
            sides[name] = a, b
        factored = {}
        for name in parameters:
            diagonal = p[name].diagonal
            factored[name] = (None if diagonal is None else
                              (diagonal.mean(1) / diagonal.mean(), diagonal.mean(0)))

        def consume(name: str, g: PerSampleGradient) -> None:
            (use,) = g.uses
            a, b = sides[name]
            scales = factored[name]
            if scales is not None:
                a, b = a * scales[0][:, None], b * scales[1][:, None]
            left, right = use.left.to(products) @ a.to(products), use.right.to(products) @ b.to(products)
            features[name] = torch.einsum("ntp,ntq->npq", left, right).reshape(n, -1).to(gradient[name].dtype) * p[name].scale

        stream(problem.model, candidates, names, consume)
        alignment, gram = torch.zeros(n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
        for name, x in features.items():
            a, b = sides[name]
            target = (a.T @ gradient[name] @ b).flatten()
            eta = p[name].learning_rate
            alignment += eta * (x @ target).double().cpu()
            gram += eta**2 * (x @ x.T).double().cpu()
        return Utility(alignment, gram)

    return score


def gram_of_some_rows(share: float) -> Score:
    """Exact alignment by contraction, and the Gram from a random share of each weight's rows, over the share."""

    def score(problem: Problem, candidates: Tensor, proxy: Tensor) -> Utility:
        from opus_bench.ghost import contract

        names, parameters, directions = problem.weighted(proxy)
        p = preconditioners(problem.optimizers, parameters)
        n = len(candidates)
        alignment, gram = torch.zeros(n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
        generator = torch.Generator().manual_seed(42)

        def consume(name: str, g: PerSampleGradient) -> None:
            (use,) = g.uses
            o = g.shape[0]
            chosen = torch.randperm(o, generator=generator)[: max(1, round(share * o))]
            rows = torch.einsum("nto,nti->noi", use.left[:, :, chosen].bfloat16(), use.right.bfloat16())
            diagonal = p[name].diagonal
            if diagonal is not None:
                rows = rows * diagonal[chosen].bfloat16()
            flat = rows.flatten(1) * p[name].scale
            alignment.add_(contract(g, directions[name], torch.bfloat16).double().cpu())
            gram.add_(p[name].learning_rate ** 2 * o / len(chosen) * (flat @ flat.T).double().cpu())

        stream(problem.model, candidates, names, consume)
        return Utility(alignment, gram)

    return score


def top_blocks(share: float) -> Score:
    """Exact alignment of the upper blocks alone: the backward stops where they begin."""

    def score(problem: Problem, candidates: Tensor, proxy: Tensor) -> Utility:
        depth = sum(1 for name, _ in problem.model.named_modules() if name.endswith((".up", ".up_proj")))
        first = depth - max(1, round(share * depth))
        names = [name for name in layer_names(problem.model, "blocks")
                 if int(next(part for part in name.split(".") if part.isdigit())) >= first]
        return opus(layers=names, estimator="exact", redundancy=0.0, scoring_dtype="bfloat16")(
            problem, candidates, proxy)

    return score


EXACT: dict[str, Any] = dict(estimator="exact", redundancy=0.0)
ESTIMATORS = (
    Estimator("literal CountSketch", "as written in the paper, tables cached", "float32", literal, False),
    Estimator("CountSketch", "hashed on the fly, layer by layer", "float32", opus()),
    Estimator("CountSketch, bf16", "the same, forward and backward in bfloat16", "bfloat16",
              opus(scoring_dtype="bfloat16")),
    Estimator("exact alignment and Gram", "both from dense rows in chunks", "float32", opus(estimator="exact")),
    Estimator("exact alignment and Gram, bf16", "the same, products in bfloat16", "bfloat16",
              opus(estimator="exact", scoring_dtype="bfloat16")),
    Estimator("exact alignment", "contraction with P g_proxy", "float32", opus(**EXACT)),
    Estimator("exact alignment, bf16", "the same, products in bfloat16", "bfloat16",
              opus(scoring_dtype="bfloat16", **EXACT)),
    Estimator("exact alignment, bf16, microbatches of 4", "the same in bounded memory", "bfloat16",
              opus(scoring_dtype="bfloat16", microbatch=4, **EXACT)),
    Estimator("central difference", "two forwards, step 1e-3", "float32",
              opus(estimator="forward", redundancy=0.0, relative_step=1e-3)),
    Estimator("central difference, bf16", "two forwards, step 1e-2", "bfloat16",
              opus(estimator="forward", redundancy=0.0, relative_step=1e-2, scoring_dtype="bfloat16")),
    Estimator("forward-mode derivative", "torch.func.jvp", "float32", forward_mode, False),
    Estimator("two-sided projection 96 x 96, bf16", "second moments factored", "bfloat16",
              bf16(separable(96, torch.bfloat16)), False),
    Estimator("exact alignment, Gram of a quarter of rows, bf16", "random rows", "bfloat16",
              bf16(gram_of_some_rows(0.25)), False),
    Estimator("alignment of the upper half, bf16", "backward through half of the blocks", "bfloat16",
              top_blocks(0.5), False),
)
