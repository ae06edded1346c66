"""How much of the candidates' order is lost to each source of noise or approximation.

The reference is the exact alignment <P_t g_n, g_proxy>, in float64, of whole sequences with one proxy
batch under the live P_t, over the linear layers of the blocks (the paper's choice).  A source changes
one thing of it; what it loses is 1 - Spearman of the changed scores with the reference's over the
candidates: 0 when no rank moves, about 1 when nothing of the order is left, up to 2 when it is reversed.
For the sketch the same is said of U given the first quarter of the candidates as selected.

A loss says that the order differs, not which of the two is the better one.

Axes as in gradients.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..corpus import Corpus
from ..ghost import mean
from ..gradients import capture, layer_names, mean_gradient, parameter_names
from ..optimizer_map import adjoint
from ..preconditioner import Preconditioner, preconditioners
from ..train import RunConfig
from ..utility import Utility
from .problem import Optimizers, Scoring, float64_copy, rank_correlation, scoring
from .sketch_error import candidates_after, check_rates
from .trained import Stage, stages
from .validate import HASH_SEED_STEP, disjoint_proxies

GROUPS = ("sketch", "proxy", "window", "labels", "layers", "P_t", "arithmetic")
ATTENTION, MLP = "*.attention.*", ("*.up", "*.down")  # layers of model.OpusGPT2
Tokens = Int[Tensor, "n t"]


@dataclass(frozen=True)
class Settings:
    """What is measured; plain values, as a record keeps them.

    Raises:
        ValueError: staleness that reaches behind the start, a large proxy that is not larger, fewer than
            4 candidates, no replicate, no sketch width, a width or window divisor below 1, no stage or
            one before the first update.
    """

    stages: Sequence[int]  # updates after which is measured
    staleness: Sequence[int]  # updates by which P_t and the proxy's gradient are late
    replicates: int = 8  # disjoint sets of candidates, each with proxies of its own
    candidates: int = 32  # sequences of a set
    proxy_size: int = 8  # sequences per proxy batch
    large_proxy_size: int = 32  # of the larger proxy batch
    windows: Sequence[int] = (2, 4, 12)  # a window is the length divided by this; 12 is the paper's for XL
    widths: Sequence[int] = (32, 8192)  # buckets per weight of the sketch

    def __post_init__(self) -> None:
        if not self.stages or min(self.stages) < 1:
            raise ValueError(f"stages must be at least 1: no optimizer has state before; got {list(self.stages)}")
        if max(self.staleness, default=0) > min(self.stages):
            raise ValueError(f"staleness {max(self.staleness)} reaches behind the start of a model of "
                             f"{min(self.stages)} steps; lower it or raise stages")
        if self.large_proxy_size <= self.proxy_size:
            raise ValueError(f"large_proxy_size {self.large_proxy_size} must be larger than proxy_size "
                             f"{self.proxy_size}; raise it")
        if self.candidates < 4:
            raise ValueError(f"candidates must be at least 4, of which a quarter is selected; got {self.candidates}")
        if not self.widths:
            raise ValueError("widths must hold at least one sketch width, got []")
        for name, values, lowest in (("replicates", [self.replicates], 1), ("proxy_size", [self.proxy_size], 1),
                                     ("staleness", self.staleness, 0), ("windows", self.windows, 1),
                                     ("widths", self.widths, 1)):
            if min(values, default=lowest) < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {min(values)}")

    @property
    def units(self) -> int:
        """How often ``measure`` calls ``on_step``: once a training step, once a stage and replicate."""
        return max(self.stages) + len(self.stages) * self.replicates


@dataclass(frozen=True)
class Loss:
    """What one source loses in one replicate."""

    source: str  # what is changed
    group: str  # one of GROUPS
    lost: float  # 1 - Spearman
    score: str = "alignment"  # or "utility": U given the first quarter of the candidates


@dataclass(frozen=True)
class Past:
    """What an earlier training state would have scored with, in float64."""

    preconditioners: dict[str, Preconditioner]
    proxy_gradients: list[dict[str, Tensor]]  # one a replicate


def spearman_lost(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """1 - Spearman, and not below 0 by rounding."""
    return max(0.0, 1 - rank_correlation(x, y))


def remember(stage: Stage, proxies: Sequence[Tokens]) -> Past:
    """P_t and the gradient of every proxy at this stage; nothing of it changes as training goes on."""
    model, optimizers = float64_copy(stage.model, stage.optimizers)
    names = layer_names(model, "blocks")
    return Past(preconditioners(optimizers, parameter_names(model, names)),
                [mean_gradient(model, proxy, names)[0] for proxy in proxies])


def only(problem: Scoring, names: Sequence[str]) -> Scoring:
    """The problem restricted to some of its parameters."""
    return Scoring(*({k: field[k] for k in names} for field in
                     (problem.gradients, problem.proxy_gradient, problem.preconditioners)))


def identity(p: Mapping[str, Preconditioner]) -> dict[str, Preconditioner]:
    """P_t = 1 with the same learning rates: the geometry of SGD."""
    return {k: Preconditioner(learning_rate=one.learning_rate) for k, one in p.items()}


def losses(
    model: nn.Module, optimizers: Optimizers, candidates: Tokens, proxies: tuple[Tokens, Tokens],
    settings: Settings, past: Mapping[int, tuple[dict[str, Preconditioner], dict[str, Tensor]]], hash_seed: int,
) -> Iterator[Loss]:
    """What every source loses on one set of candidates.

    Args:
        model, optimizers: the live ones, in the dtype they train in; left as they are.
        proxies: two disjoint batches of ``large_proxy_size`` sequences; the first ``proxy_size`` of the
            first are the reference's.
        past: updates ago -> P_t and gradient of the reference's proxy then.

    Exactness: every score but the sketch's is exact for what it is the score of.  Two sources are not
        measured against the reference: the larger proxy against another of its size, and U.
    Cost: some eight passes forward and backward over the candidates, half of them in float64.
    """
    model64, optimizers64 = float64_copy(model, optimizers)
    layers = layer_names(model64, "blocks")
    parameters = parameter_names(model64, layers)
    proxy = proxies[0][: settings.proxy_size]
    everything = scoring(model64, optimizers64, candidates, proxy, "all")
    base = only(everything, list(parameters))
    p = base.preconditioners
    exact = base.exact()

    def lost(changed: Scoring, reference: Utility = exact) -> float:
        return spearman_lost(changed.exact(gram=False).alignment, reference.alignment)

    def rescored(some_model: nn.Module, tokens: Tokens, proxy_tokens: Tokens, label_shift: int = 1) -> Scoring:
        target = mean_gradient(some_model, proxy_tokens, layers, label_shift)[0]
        return replace(base, gradients=capture(some_model, tokens, layers, label_shift), proxy_gradient=target)

    selected = list(range(len(candidates) // 4))
    for width in settings.widths:
        sketched = base.sketched(width, hash_seed)
        source = f"sketch of {width:,} buckets"
        yield Loss(source, "sketch", spearman_lost(sketched.alignment, exact.alignment))
        left = [u.marginal(selected)[len(selected):] for u in (sketched, exact)]
        yield Loss(source, "sketch", spearman_lost(*left), "utility")

    small, larger, other_larger = (mean_gradient(model64, tokens, layers)[0]
                                   for tokens in (proxies[1][: settings.proxy_size], *proxies))
    yield Loss(f"another proxy of {settings.proxy_size}", "proxy", lost(replace(base, proxy_gradient=small)))
    reference = replace(base, proxy_gradient=larger).exact(gram=False)
    yield Loss(f"proxy of {settings.large_proxy_size} against another", "proxy",
               lost(replace(base, proxy_gradient=other_larger), reference))

    for divisor in settings.windows:
        window = max(2, candidates.shape[1] // divisor)
        yield Loss(f"window of 1/{divisor} of the sequence", "window",
                   lost(rescored(model64, candidates[:, :window], proxy[:, :window])))
    yield Loss("labels shifted twice", "labels", lost(rescored(model64, candidates, proxy, label_shift=2)))

    last_block = layers[-1].split(".")[1]
    for source, pattern in (("attention only", ATTENTION), ("MLP only", MLP),
                            ("last block only", f"blocks.{last_block}.*"), ("embedding and head as well", "all")):
        chosen = list(parameter_names(model64, layer_names(model64, pattern)))
        yield Loss(source, "layers", lost(only(everything, chosen)))
    scaled = {k: replace(one, scale=one.scale * base.proxy_gradient[k].numel() ** -0.5) for k, one in p.items()}
    yield Loss("each layer divided by sqrt(o i)", "layers", lost(replace(base, preconditioners=scaled)))

    for steps, (then, proxy_gradient) in past.items():
        yield Loss(f"P_t of {steps} steps ago", "P_t", lost(replace(base, preconditioners=then)))
        yield Loss(f"proxy's gradient of {steps} steps ago", "proxy",
                   lost(replace(base, proxy_gradient=proxy_gradient)))
    yield Loss("no P_t (SGD)", "P_t", lost(replace(base, preconditioners=identity(p))))
    direction = adjoint(optimizers64, parameters, {k: mean(g) for k, g in base.gradients.items()}, base.proxy_gradient)
    yield Loss("adjoint of the real step for P_t", "P_t", lost(Scoring(base.gradients, direction, identity(p))))

    live = preconditioners(optimizers, parameter_names(model, layers))
    yield Loss("float32", "arithmetic", lost(replace(rescored(model, candidates, proxy), preconditioners=live)))
    with torch.autocast("cpu", torch.bfloat16):
        half = rescored(model, candidates, proxy)
    yield Loss("bfloat16 autocast", "arithmetic", lost(replace(half, preconditioners=live)))
    half = rescored(copy.deepcopy(model).bfloat16(), candidates, proxy)
    half = replace(half, proxy_gradient={k: g.float() for k, g in half.proxy_gradient.items()}, preconditioners=live)
    yield Loss("bfloat16 weights as well", "arithmetic", lost(half))


def measure(
    config: RunConfig, settings: dict[str, Any], corpus: Corpus, on_step: Callable[[], Any] = lambda: None
) -> list[dict[str, Any]]:
    """Rows named "spearman lost" of every stage, replicate and source.

    Args:
        settings: fields of `Settings`.  Sequences have ``config.length`` tokens; candidates are those
            that training would be offered after its last step, another set for each replicate; the two
            proxies of a replicate share no sequence.

    Returns:
        A row for each `Loss`, with its fields and ``replicate``.  Equal settings give equal rows.

    Raises:
        ValueError: as `Settings` and `sketch_error.check_rates`.
    """
    s = Settings(**settings)
    check_rates(config, s.stages)
    sets = candidates_after(config, corpus, max(s.stages), s.replicates * s.candidates).split(s.candidates)
    proxies = disjoint_proxies(corpus, config.length, s.large_proxy_size, config.seed, s.replicates)
    early = {step - late for step in s.stages for late in s.staleness}
    seen: dict[int, Past] = {}
    rows = []
    for stage in stages(config, corpus, sorted(early | set(s.stages)), on_step):
        if stage.step in early:
            seen[stage.step] = remember(stage, [pair[0][: s.proxy_size] for pair in proxies])
        if stage.step not in s.stages:
            continue
        for i, (candidates, pair) in enumerate(zip(sets, proxies, strict=True)):
            past = {late: (seen[stage.step - late].preconditioners, seen[stage.step - late].proxy_gradients[i])
                    for late in s.staleness}
            hash_seed = HASH_SEED_STEP * (1 + config.seed * s.replicates + i)
            found = losses(stage.model, stage.optimizers, candidates, pair, s, past, hash_seed)
            rows += [stage.row("spearman lost", loss.lost, source=loss.source, group=loss.group, score=loss.score,
                               replicate=i) for loss in found]
            on_step()
    return rows
