"""Does the utility foretell what a real optimizer step does to the loss?

At stages of a training at random, sets S of k candidates are trained on for one real step each, from the
same state, with every learning rate multiplied by s, and the step is discarded.  What each predictor said
before of the decrease of the proxy's loss is compared with the decrease that came, across the sets:

    g_z, g          gradient of a candidate and of the proxy batch;  g_S the mean of g_z over S
    u_z = P_t g_z   effective update under the frozen P_t (preconditioner.py), which holds the rate once
    Phi(g_S)        what the optimizer's real step subtracts (optimizer_map.step_map), momentum and all
    true            L(theta) - L(theta - s Phi(clip(g_S))), of the proxy batch or of held-out text

Clipping is training's.  Phi, u and eta are proportional to the rates, so every prediction is a polynomial
in s (PREDICTORS).  What a step on momentum alone would do is the same for all sets of a state: a constant,
which no correlation or slope across sets can see.  So it is reported, not subtracted.

Everything is in float64 from the float32 state, so that small steps are resolved; torch.optim.Muon
orthogonalises in bfloat16, step_map does not.  Training's own step in its own arithmetic is taken beside it
(``real_decrease``), to see how much that matters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..corpus import Corpus
from ..gradients import capture, curvature, layer_names, mean_gradient, parameter_names, sample_losses
from ..optimizer_map import adjoint, step_map
from ..preconditioner import Preconditioner, preconditioners
from ..stream import CandidateStream, ProxyStream
from ..train import RunConfig, update
from ..utility import exact_utility
from .agreement import agreement, correlation
from .problem import Optimizers, float64_copy
from .trained import Stage, stages

PREDICTORS = {
    "alignment": "s/k sum_z <u_z, g>, all weights",
    "alignment, blocks": "the same over the linear layers of the blocks, as the paper scores",
    "no P_t": "s eta <g_S, g>: as for SGD",
    "adjoint": "s <g_S, V>, V the adjoint of Phi's derivative at the candidates' mean gradient",
    "paper's U": "U(S) as written, blocks: s^2 eta sum_z <u_z, g> - s^4 eta^2 sum_{z<y} <u_z, u_y>",
    "paper's U, all": "the same over all weights",
    "H = I": "alignment - s^2/k^2 sum_{z<y} <u_z, u_y>: the redundancy of a mean step, no second eta",
    "measured h": "alignment - h s^2/k^2 sum_{z<y} <u_z, u_y>: `selector.Opus` with redundancy='measured'",
    "real step, order 1": "s <Phi, g>",
    "real step, order 2": "s <Phi, g> - s^2/2 Phi^T H Phi",
}
TARGETS = ("proxy", "held-out")
DIFFERENCE = 1e-5  # of the second difference along a step: its length over that of all weights
Tokens = Int[Tensor, "n t"]
Tensors = dict[str, Tensor]
Polynomial = dict[int, float]  # power of s -> coefficient


@dataclass(frozen=True)
class Settings:
    """What is measured; plain values, as a record keeps them."""

    stages: Sequence[int]  # updates done before the step
    set_sizes: Sequence[int] = (1, 2, 4, 8)  # the smaller sets are the first samples of the largest
    factors: Sequence[float] = (0.02, 0.1, 0.3, 1.0)  # s, of every learning rate
    sets: int = 24  # disjoint
    length: int = 96  # tokens of every sequence here, all of them scored
    proxy_size: int = 8  # sequences
    held_out: int = 16  # sequences of the target's validation split

    def __post_init__(self) -> None:
        if not self.stages or min(self.stages) < 1:
            raise ValueError(f"stages must be at least 1 update (before it there is no P_t), got {list(self.stages)}")
        for name in ("set_sizes", "factors"):
            values = list(getattr(self, name))
            if not values or values != sorted(set(values)) or values[0] <= 0:
                raise ValueError(f"{name} must be positive and increase, got {values}")
        for name, least in (("sets", 4), ("length", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def units(self) -> int:
        """How often ``measure`` calls ``on_step``: once a training step, and once a set at each stage."""
        return max(self.stages) + len(self.stages) * self.sets


@dataclass(frozen=True)
class Problem:
    """A training state and its proxy, with all that is the same for every set."""

    model: nn.Module
    optimizers: Optimizers
    parameters: dict[str, nn.Parameter]  # all that is trained
    blocks: frozenset[str]  # names of those that the paper scores
    batches: tuple[Tokens, Tokens]  # proxy and held-out text
    before: Float[Tensor, " batch"]  # their losses, nat/token
    proxy_gradient: Tensors
    preconditioners: dict[str, Preconditioner]
    pulled: Tensors  # V
    curvature: dict[str, float]  # h of the proxy's loss along the candidates' mean update: all of it, and its "blocks"


def problem(
    model: nn.Module, optimizers: Optimizers, candidates: Sequence[Tokens], batches: tuple[Tokens, Tokens]
) -> Problem:
    """The state as it is; nothing is copied.  ``candidates``: sets of equal size.

    Cost: a forward and backward of all candidates and of the proxy, and two Hessian-vector products.
    """
    layers = layer_names(model, "all")
    parameters = parameter_names(model, layers)
    blocks = frozenset(parameter_names(model, layer_names(model, "blocks")))
    means = [mean_gradient(model, tokens, layers)[0] for tokens in candidates]
    mean = {k: sum((m[k] for m in means), torch.zeros_like(means[0][k])) / len(means) for k in parameters}
    target = mean_gradient(model, batches[0], layers)[0]
    p = preconditioners(optimizers, parameters)
    direction = {k: p[k](g) for k, g in mean.items()}
    bend = {"all": curvature(model, batches[0], direction),
            "blocks": curvature(model, batches[0], {k: direction[k] for k in blocks})}
    return Problem(model, optimizers, parameters, blocks, batches, losses(model, batches), target, p,
                   adjoint(optimizers, parameters, mean, target), bend)


@torch.no_grad()
def losses(model: nn.Module, batches: Sequence[Tokens]) -> Float[Tensor, " batch"]:
    """Mean loss of each batch, nat/token."""
    return torch.stack([sample_losses(model, tokens).mean() for tokens in batches])


@torch.no_grad()
def decreases(
    model: nn.Module, step: Tensors, factors: Sequence[float], batches: Sequence[Tokens], before: Tensor
) -> Float[Tensor, "factor batch"]:
    """L(theta) - L(theta - s step) of each batch, ``before`` being L(theta); the model is left as it is."""
    moved, rows = copy.deepcopy(model), []
    for s in factors:
        for name, p in model.named_parameters():
            moved.get_parameter(name).copy_(p - s * step[name].reshape(p.shape))
        rows.append(before - losses(moved, batches))
    return torch.stack(rows)


def real_decrease(
    model: nn.Module, optimizers: Optimizers, tokens: Tokens, factor: float, clip: float, batches: Sequence[Tokens]
) -> Float[Tensor, " batch"]:
    """The same by training's own step, `train.update`, on copies, in the dtypes that they have."""
    before = losses(model, batches)
    model, optimizers = copy.deepcopy((model, list(optimizers)))
    for group in (g for optimizer in optimizers for g in optimizer.param_groups):
        group["lr"] = group["lr"] * factor
    update(model, optimizers, tokens, clip)
    return before - losses(model, batches)


def predictions(
    problem: Problem, tokens: Tokens, gradient: Tensors, step: Tensors, second: float
) -> dict[str, Polynomial]:
    """What each of PREDICTORS says of the set ``tokens``: the decrease of the proxy's loss, nat/token, by s.

    Args:
        gradient, step, second: g_S before clipping, Phi after it, and Phi^T H Phi.
    """
    k, target, p = len(tokens), problem.proxy_gradient, problem.preconditioners
    captured = capture(problem.model, tokens, layer_names(problem.model, "all"))
    # per weight, so that any weights' sum is at hand:  sum_z <u_z, g>  and  sum_{z<y} <u_z, u_y>
    align, pairs = {}, {}
    for name, factors in captured.items():
        one = {name: 1.0}
        utility = exact_utility({name: factors}, target, p, one, one)
        assert utility.gram is not None
        align[name], pairs[name] = float(utility.alignment.sum()), float(utility.gram.triu(1).sum())
    eta = {name: one.learning_rate for name, one in p.items()}

    def paper(names: Sequence[str] | frozenset[str]) -> Polynomial:
        return {2: math.fsum(eta[n] * align[n] for n in names), 4: -math.fsum(eta[n] ** 2 * pairs[n] for n in names)}

    alignment, redundancy = math.fsum(align.values()) / k, math.fsum(pairs.values()) / k**2
    plain = math.fsum(eta[n] * float((gradient[n] * target[n]).sum()) for n in eta)
    first = _dot(step, target)
    return {
        "alignment": {1: alignment},
        "alignment, blocks": {1: math.fsum(align[n] for n in problem.blocks) / k},
        "no P_t": {1: plain},
        "adjoint": {1: _dot(gradient, problem.pulled)},
        "paper's U": paper(problem.blocks),
        "paper's U, all": paper(list(align)),
        "H = I": {1: alignment, 2: -redundancy},
        "measured h": {1: alignment, 2: -max(0.0, problem.curvature["all"]) * redundancy},
        "real step, order 1": {1: first},
        "real step, order 2": {1: first, 2: -second / 2},
    }


def at(polynomial: Polynomial, s: float) -> float:
    """Its value at s."""
    return math.fsum(c * s**power for power, c in polynomial.items())


@dataclass(frozen=True)
class Measured:
    """One set of one size."""

    said: dict[str, Polynomial]
    true: Float[Tensor, "factor target"]
    curvature: float  # Phi^T H Phi / |Phi|^2
    clipped: bool


def measure_set(problem: Problem, tokens: Tokens, factors: Sequence[float], clip: float) -> Measured:
    """Predictions of one set, and what its real step does.

    Phi^T H Phi is a second difference of the proxy's loss, which is cheaper than `curvature`.
    """
    gradient = mean_gradient(problem.model, tokens, layer_names(problem.model, "all"))[0]
    cut = min(1.0, clip / (math.sqrt(_dot(gradient, gradient)) + 1e-6))  # as torch.nn.utils.clip_grad_norm_
    step = step_map(problem.optimizers, problem.parameters, {k: g * cut for k, g in gradient.items()})
    short = DIFFERENCE * math.sqrt(_dot(problem.parameters, problem.parameters) / _dot(step, step))
    near = decreases(problem.model, step, (short, -short), problem.batches[:1], problem.before[:1])
    second = -float(near.sum()) / short**2
    return Measured(predictions(problem, tokens, gradient, step, second),
                    decreases(problem.model, step, factors, problem.batches, problem.before),
                    second / _dot(step, step), cut < 1)


def measure(
    config: RunConfig, settings: Mapping[str, Any], corpus: Corpus, on_step: Callable[[], Any] = lambda: None
) -> list[dict[str, Any]]:
    """Rows of every stage, set size and step size s (``factor``); ``settings`` are fields of Settings.

    Returns:
        "pearson"     by predictor and target, with the other fields of Agreement, and ``with_alignment``: of the
                      predictor with "alignment" over the same sets
        "decrease"    by target: mean true decrease, its ``spread`` (standard deviation over sets), what a step on
                      momentum alone decreases, and the share of sets whose gradient was clipped
        "as trained"  by target, of the largest sets at the smallest and largest s: Pearson of the true decreases
                      with those of training's own step, and their root mean square difference over the spread
        "curvature"   d^T H d / |d|^2 of the proxy's loss, for which H = I says 1: along the candidates' mean update
                      P_t g, and along the real steps of each size (mean, lowest, highest over sets)
        Equal settings give equal rows.  Candidates are those that training would come to after its last stage.
    """
    s = Settings(**settings)
    size = max(s.set_sizes)
    buffer = s.sets * size
    unseen = math.ceil(max(s.stages) * config.buffer / buffer)  # positions of the stream do not depend on the buffer
    sets = CandidateStream(corpus, s.length, buffer, config.seed).candidates(unseen).tokens.split(size)
    batches = (ProxyStream(corpus, s.length, s.proxy_size, config.seed).proxy(0),
               corpus.sequences("validation", corpus.spec.target, s.length, s.held_out))
    ends, rows = sorted({s.factors[0], s.factors[-1]}), list[dict[str, Any]]()
    for stage in stages(config, corpus, list(s.stages), on_step):
        state = problem(*float64_copy(stage.model, stage.optimizers), sets, batches)
        found: dict[int, list[Measured]] = {k: [] for k in s.set_sizes}
        real = []
        for tokens in sets:
            for k in s.set_sizes:
                found[k].append(measure_set(state, tokens[:k], s.factors, config.clip))
            real.append(torch.stack([
                real_decrease(stage.model, stage.optimizers, tokens, factor, config.clip, batches) for factor in ends
            ]).double())
            on_step()
        still = step_map(state.optimizers, state.parameters, {k: torch.zeros_like(v) for k, v in state.pulled.items()})
        alone = decreases(state.model, still, s.factors, batches, state.before)
        for k, ones in found.items():
            rows += _rows(stage, s, k, ones, alone)
        for j, target in enumerate(TARGETS):
            for i, factor in enumerate(ends):
                true, trained = (torch.stack(x) for x in ([m.true[s.factors.index(factor), j] for m in found[size]],
                                                          [r[i, j] for r in real]))
                rows.append(stage.row("as trained", correlation(true, trained), set_size=size, factor=factor,
                                      target=target, error=float((trained - true).square().mean().sqrt() / true.std())))
        rows += [stage.row("curvature", h, along="mean update", layers=layers) for layers, h in state.curvature.items()]
    return rows


def _rows(stage: Stage, s: Settings, k: int, ones: list[Measured], alone: Tensor) -> list[dict[str, Any]]:
    rows = []
    true = torch.stack([m.true for m in ones])
    for i, factor in enumerate(s.factors):
        said = {name: torch.tensor([at(m.said[name], factor) for m in ones], dtype=true.dtype) for name in PREDICTORS}
        for j, target in enumerate(TARGETS):
            keys: dict[str, Any] = {"set_size": k, "factor": factor, "target": target, "sets": len(ones)}
            for name, predicted in said.items():
                found = vars(agreement(predicted, true[:, i, j])).copy()
                rows.append(stage.row("pearson", found.pop("pearson"), predictor=name, **keys, **found,
                                      with_alignment=correlation(predicted, said["alignment"])))
            rows.append(stage.row("decrease", float(true[:, i, j].mean()), "nat/token", **keys,
                                  spread=float(true[:, i, j].std()), momentum_alone=float(alone[i, j]),
                                  clipped=sum(m.clipped for m in ones) / len(ones)))
    bends = [m.curvature for m in ones]
    return [*rows, stage.row("curvature", sum(bends) / len(bends), along="real step", layers="all", set_size=k,
                             lowest=min(bends), highest=max(bends))]


def _dot(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> float:
    """Inner product over all that x names."""
    return math.fsum(float((v.detach() * y[k].detach()).sum()) for k, v in x.items())
