"""What else could make scoring cheaper: a proxy gradient kept for some steps, a larger one; a backward used twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opus_bench.ghost import mean
from opus_bench.gradients import Factors, PerSampleGradient, capture, mean_gradient
from opus_bench.layers import layer_names
from opus_bench.selector import Opus, TrainState
from opus_bench.streamed import streamed_alignment
from opus_bench.validation.problem import rank_correlation

from .bench import Bench

PROXY_EVERY = 8  # steps that a proxy gradient serves in the rows that say so
STALE: dict[str, dict[str, Any]] = {  # what is measured with such a gradient as well
    "exact alignment, bf16": dict(estimator="exact", redundancy=0.0, scoring_dtype="bfloat16"),
    "central difference, bf16": dict(estimator="forward", redundancy=0.0, scoring_dtype="bfloat16", relative_step=1e-2),
}
LARGER = 8  # times as many proxies, kept for PROXY_EVERY steps: as many proxy tokens a step as without
REFERENCE = 16  # batches of proxies, none of them scored with, whose mean gradient stands for the target


def alignment_along(bench: Bench, tokens: Tensor, proxy: Tensor) -> Tensor:
    """Exact alignment of sequences of any length, in microbatches."""
    names, _, directions = bench.problem.weighted(proxy)
    return streamed_alignment(bench.model, tokens, names, directions, microbatch=4)


def staleness(bench: Bench, tick: Callable[[], Any]) -> dict[str, list[float]]:
    """Spearman of STALE estimators, whose proxy gradient is 0, 1, ... steps old, with the exact alignment now.

    The proxy batch stays the same; P_t is always the live one.
    """
    proxy = bench.proxy(0)
    selectors = {name: Opus(window=bench.shape.window, proxy_every=PROXY_EVERY, **options)
                 for name, options in STALE.items()}
    found: dict[str, list[float]] = {name: [] for name in STALE}
    for age in range(PROXY_EVERY):
        windows = bench.candidates(age)[:, : bench.shape.window].contiguous()
        exact = alignment_along(bench, windows, proxy)
        for name, selector in selectors.items():
            got = selector.utilities(windows, 1, TrainState(bench.model, [bench.optimizer], age, proxy))
            found[name].append(rank_correlation(got.alignment, exact))
        bench.train(1)
        tick()
    return found


def aged_proxies(bench: Bench, tick: Callable[[], Any]) -> dict[int, list[float]]:
    """Spearman with the alignment along a fresh gradient of many other proxies, by size and age of the proxy batch.

    The usual batch, and one LARGER times as large; REFERENCE batches stand for what both estimate.  P_t is live.
    """
    def batches(first: int, count: int) -> Tensor:
        return torch.cat([bench.proxy(first + i) for i in range(count)])

    reference = batches(1000, REFERENCE)
    sizes = {bench.shape.proxies: batches(2000, 1), LARGER * bench.shape.proxies: batches(2000, LARGER)}
    selectors = {size: Opus(window=bench.shape.window, proxy_every=PROXY_EVERY, estimator="exact", redundancy=0.0)
                 for size in sizes}
    found: dict[int, list[float]] = {size: [] for size in sizes}
    for age in range(PROXY_EVERY):
        windows = bench.candidates(100 + age)[:, : bench.shape.window].contiguous()
        target = alignment_along(bench, windows, reference)
        for size, selector in selectors.items():
            state = TrainState(bench.model, [bench.optimizer], age, sizes[size])
            found[size].append(rank_correlation(selector.utilities(windows, 1, state).alignment, target))
        bench.train(1)
        tick()
    return found


def gradient_of(captured: dict[str, PerSampleGradient], chosen: list[int]) -> dict[str, Tensor]:
    """Training gradient of the chosen samples' mean loss from the factors that scoring captured; exact."""
    return {name: mean(PerSampleGradient(g.shape, tuple(Factors(use.left[chosen], use.right[chosen])
                                                        for use in g.uses)))
            for name, g in captured.items()}


def reuse(bench: Bench, repeats: int, tick: Callable[[], Any]) -> dict[str, list[float]]:
    """Seconds where whole sequences are scored, so that the chosen ones' backward need not be run again.

    Scoring keeps all candidates' factors of all layers, since it is not known yet which will be chosen; the
    gradient is then assembled from the chosen ones' factors instead of by their forward and backward.
    """
    names = layer_names(bench.model, "all")
    tokens = bench.candidates(0)
    chosen = list(range(bench.shape.selected))
    kept: dict[str, PerSampleGradient] = {}
    works: dict[str, Callable[[], Any]] = {
        "capture of whole candidates": lambda: kept.update(capture(bench.model, tokens, names)),
        "gradient from the chosen ones' factors": lambda: gradient_of(kept, chosen),
        "forward and backward of the chosen": lambda: mean_gradient(bench.model, tokens[: len(chosen)], names),
    }
    found: dict[str, list[float]] = {what: [] for what in works}
    for turn in range(repeats + 1):
        for what, work in works.items():
            seconds = bench.seconds(work)
            if turn:  # the first turn warms up
                found[what].append(seconds)
        if turn:
            tick()
    return found
