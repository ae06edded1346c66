"""How well the estimators do on a real training state: exact, sketched, and what noise allows.

A small GPT-2 of the paper's is trained for some steps on real text chosen at random.  Then one
batch of candidates is scored with the live optimizer's P_t in every way that the suite knows:

    oracle     per-sample gradients by torch.func in float64, against the factored ones
    sketch     CountSketch against exact utilities by width, over hash seeds, and the scatter that
               the variance in ``sketch.count_sketch`` predicts
    arms       how far from uniform each arm of the selector draws
    floor      how much the ranking changes for reasons that no estimator removes: another proxy
               batch, a shorter score window

Functions return plain dataclasses; cli.py prints them.  Axes as in gradients.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import sampling
from ..corpus import Corpus
from ..ghost import row_chunks
from ..gradients import capture, exact_per_sample_grads, layer_names, mean_gradient, parameter_names
from ..preconditioner import preconditioners
from ..selector import ARMS, Opus, TrainState
from ..stream import CandidateStream, ProxyStream
from ..utility import Utility
from .findings import ArmDraw, NoiseFloor, OracleError, Settings, SketchFidelity, Validation
from .problem import Optimizers, Scoring, float64_copy, rank_correlation, relative_error, scoring
from .trained import stages

PAPER_WIDTH = 8192
# Every weight's hash has the seed plus a checksum of its name; far apart, two such sums do not meet.
HASH_SEED_STEP = 10_000_019
NEARLY_UNIFORM = 0.9  # effective sample size / candidates above which a draw is called uniform
FIVE_SIGMA = 5.0

# Pieces -----------------------------------------------------------------------------------------


def oracle_errors(
    model: nn.Module, optimizers: Optimizers, candidates: Int[Tensor, "n t"], proxy: Int[Tensor, "m t"]
) -> tuple[OracleError, ...]:
    """Error of the factored utilities, in float64 and in the model's dtype, against torch.func.

    In float64 what is left is the algebra; in the model's dtype, rounding too.
    Cost: n + m forwards and backwards in float64 and O(n o i) memory for every weight.
    """
    exact_model, exact_optimizers = float64_copy(model, optimizers)
    names = layer_names(exact_model)
    p = preconditioners(exact_optimizers, parameter_names(exact_model, names))
    updates = {k: p[k](g) for k, g in exact_per_sample_grads(exact_model, candidates, names).items()}
    target = {k: g.mean(0) for k, g in exact_per_sample_grads(exact_model, proxy, names).items()}
    eta = {k: p[k].learning_rate for k in updates}
    alignment = sum(eta[k] * (updates[k] * target[k]).sum((1, 2)) for k in eta)
    gram = sum(eta[k] ** 2 * updates[k].flatten(1) @ updates[k].flatten(1).T for k in eta)
    errors = []
    for some_model, some_optimizers in ((exact_model, exact_optimizers), (model, optimizers)):
        got = scoring(some_model, some_optimizers, candidates, proxy).exact()
        dtype = str(next(some_model.parameters()).dtype).removeprefix("torch.")
        errors.append(OracleError(dtype, len(candidates), relative_error(got.alignment, alignment),
                                  relative_error(got.gram, gram)))
    return tuple(errors)


def alignment_covariance(problem: Scoring, width: int) -> Float[Tensor, "n n"]:
    """Covariance over hashes of the candidates' sketched alignments.

        sum_l eta_l^2 (<u_n,u_m> |g|^2 + <u_n,g> <u_m,g> - 2 sum_j u_nj u_mj g_j^2)_l / width

    The diagonal is the variance that ``sketch.count_sketch`` states, summed over weights l, each
    of which has hashes of its own; off it stands what polarisation makes of that variance.
    Exact, in float64; O(n o i + n^2 o i) flops.
    """
    n = len(next(iter(problem.gradients.values())).uses[0].right)
    total = torch.zeros(n, n, dtype=torch.float64)
    for name, gradient in problem.gradients.items():
        p = problem.preconditioners[name]
        target = problem.proxy_gradient[name].double()
        gram, shared = torch.zeros_like(total), torch.zeros_like(total)
        dot = torch.zeros(n, dtype=torch.float64)
        for start, dense in row_chunks(p.on_left(gradient)):
            u = p.on_rows(dense, start).double()
            g = target[start : start + u.shape[1]].flatten()
            u = u.flatten(1)
            gram += u @ u.T
            dot += u @ g
            shared += (u * g) @ (u * g).T
        total += p.learning_rate**2 * (gram * (target**2).sum() + torch.outer(dot, dot) - 2 * shared) / width
    return total


def sketch_fidelity(
    problem: Scoring, width: int, seeds: Sequence[int], exact: Utility | None = None,
    on_sketch: Callable[[], Any] = lambda: None,
) -> SketchFidelity:
    """Compare the sketched utilities of every hash seed with the exact ones.

    ``utility`` is U given the first quarter of the candidates as already selected, over the rest.
    """
    exact = exact or problem.exact()
    n = len(exact.alignment)
    half, selected = n // 2, list(range(n // 4))
    exact_top = set(sampling.top_k(exact.marginal, half).indices)
    exact_greedy = set(sampling.greedy(exact.marginal, half).indices)
    left = slice(len(selected), n)
    rows = []
    squares = []
    for seed in seeds:
        got = problem.sketched(width, seed)
        top, greedy = (set(f(got.marginal, half).indices) for f in (sampling.top_k, sampling.greedy))
        rows.append((
            rank_correlation(got.alignment, exact.alignment),
            rank_correlation(got.marginal(selected)[left], exact.marginal(selected)[left]),
            relative_error(got.alignment, exact.alignment),
            relative_error(got.gram, exact.gram),
            len(top & exact_top) / half,
            len(greedy & exact_greedy) / half,
        ))
        squares.append(((got.alignment - exact.alignment) ** 2).sum())
        on_sketch()
    table, square = torch.tensor(rows, dtype=torch.float64), torch.stack(squares)
    mean, lowest = table.mean(0).tolist(), table.min(0).values.tolist()
    covariance = alignment_covariance(problem, width)
    predicted = covariance.trace()
    norm = exact.alignment.norm()
    return SketchFidelity(
        width=width,
        hash_seeds=len(seeds),
        alignment_spearman=mean[0],
        alignment_spearman_lowest=lowest[0],
        utility_spearman=mean[1],
        utility_spearman_lowest=lowest[1],
        alignment_error=mean[2],
        gram_error=mean[3],
        scatter=float(square.mean().sqrt() / norm),
        predicted_scatter=float(predicted.sqrt() / norm),
        variance_ratio=float(square.mean() / predicted),
        variance_ratio_stderr=float(covariance.norm() / predicted * (2 / len(seeds)) ** 0.5),
        top_overlap=mean[4],
        greedy_overlap=mean[5],
    )


def arm_draws(
    model: nn.Module, optimizers: Optimizers, candidates: Int[Tensor, "n t"], proxy: Int[Tensor, "m t"],
    step: int, seed: int,
) -> tuple[ArmDraw, ...]:
    """Let every arm choose half of the same candidates for the same proxy."""
    draws = []
    for name in ARMS:
        selection = Opus.arm(name, window=candidates.shape[1]).select(
            candidates, len(candidates) // 2, TrainState(model, optimizers, step, proxy),
            torch.Generator().manual_seed(seed),
        )
        d = selection.diagnostics
        draws.append(ArmDraw(name, d["utility_std"], d["temperature"], d["effective_sample_size"],
                             d["total_variation"]))
    return tuple(draws)


def noise_floor(
    model: nn.Module, optimizers: Optimizers, candidates: Int[Tensor, "n t"],
    pairs: Sequence[tuple[Tensor, Tensor]], windows: Sequence[int],
) -> tuple[NoiseFloor, ...]:
    """Rank agreement of exact alignments between the proxies of a pair, and between windows.

    Windows cut candidates and proxy alike and are compared with whole sequences, for the first
    proxy of every pair.
    """
    names = layer_names(model)
    p = preconditioners(optimizers, parameter_names(model, names))

    def alignments(window: int, proxies: Sequence[Tensor]) -> list[Tensor]:
        gradients = capture(model, candidates[:, :window], names)
        return [Scoring(gradients, mean_gradient(model, proxy[:, :window], names)[0], p).exact(gram=False).alignment
                for proxy in proxies]

    length = candidates.shape[1]
    first, second = ([pair[i] for pair in pairs] for i in (0, 1))
    whole = alignments(length, first)
    floors = [_floor("another proxy batch", whole, alignments(length, second))]
    floors += [_floor(f"window of {window} of {length} tokens", whole, alignments(window, first))
               for window in windows]
    return tuple(floors)


def _floor(change: str, x: Sequence[Tensor], y: Sequence[Tensor]) -> NoiseFloor:
    values = [rank_correlation(a, b) for a, b in zip(x, y, strict=True)]
    return NoiseFloor(change, len(values), sum(values) / len(values), min(values), max(values))


def disjoint_proxies(corpus: Corpus, length: int, size: int, seed: int, pairs: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs of proxy batches of ``size`` sequences; the two of a pair share no sequence."""
    stream = ProxyStream(corpus, length, 2 * size, seed)
    batches = [stream.proxy(step) for step in range(pairs)]
    return [(batch[:size], batch[size:]) for batch in batches]


# The whole --------------------------------------------------------------------------------------


def verdict(
    oracle: Sequence[OracleError], sketch: Sequence[SketchFidelity], arms: Sequence[ArmDraw],
    floor: Sequence[NoiseFloor],
) -> str:
    """The findings in one line of words."""
    rounding = {e.dtype: torch.finfo(getattr(torch, e.dtype)).eps ** 0.5 for e in oracle}
    exact = all(max(e.alignment, e.gram) < rounding[e.dtype] for e in oracle)
    stated = all(abs(s.variance_ratio - 1) < FIVE_SIGMA * s.variance_ratio_stderr for s in sketch)
    nearest = min(sketch, key=lambda s: abs(s.width - PAPER_WIDTH))
    width = "the paper's width" if nearest.width == PAPER_WIDTH else f"width {nearest.width:,}"
    better = nearest.alignment_spearman > floor[0].spearman
    uniform = [a.arm for a in arms if a.effective_share > NEARLY_UNIFORM]
    others = [a.arm for a in arms if a.arm not in uniform]
    parts = [
        "factored utilities equal autograd's to rounding" if exact
        else "factored utilities DIFFER from autograd's by more than rounding",
        "the sketch scatters as its stated variance says" if stated
        else "the sketch does NOT scatter as its stated variance says",
        f"at {width} it reorders candidates " + ("less than another proxy batch does, so the proxy is what limits"
                                                 if better else
                                                 "more than another proxy batch does, so the sketch is what limits"),
    ]
    if uniform:
        parts.append(f"{' and '.join(uniform)} {'draws' if len(uniform) == 1 else 'draw'} almost uniformly")
    if others:
        parts.append(f"{' and '.join(others)} {'prefers' if len(others) == 1 else 'prefer'} some candidates")
    return "; ".join(parts)


def validate(settings: Settings, corpus: Corpus, progress: bool = True) -> Validation:
    """Train, score in every way and compare.  Deterministic on one machine but for the seconds."""
    from tqdm import tqdm

    started = time.perf_counter()
    config = settings.run_config
    pairs = disjoint_proxies(corpus, settings.length, settings.proxy_size, settings.seed, settings.proxy_pairs)
    proxy = pairs[0][0]
    candidates = CandidateStream(corpus, settings.length, settings.candidates, settings.seed).candidates(settings.steps)
    tokens, few = candidates.tokens, candidates.tokens[: settings.oracle_candidates]
    seeds = [HASH_SEED_STEP * (i + 1) for i in range(settings.hash_seeds)]
    hide = None if progress else True  # None: hidden unless on a terminal
    with tqdm(total=settings.steps, desc="training", unit="step", disable=hide) as bar:
        (stage,) = stages(config, corpus, [settings.steps], bar.update)
    model, optimizers, losses = stage.model, stage.optimizers, (stage.losses[0], stage.losses[-1])
    total = len(settings.widths) * len(seeds)
    with tqdm(total=total + 3, desc="scoring", unit="comparison", disable=hide) as bar:
        oracle = oracle_errors(model, optimizers, few, proxy)
        bar.update()
        problem = scoring(model, optimizers, tokens, proxy)
        exact = problem.exact()
        sketch = tuple(sketch_fidelity(problem, width, seeds, exact, bar.update) for width in settings.widths)
        arms = arm_draws(model, optimizers, tokens, proxy, settings.steps, settings.seed)
        bar.update()
        floor = noise_floor(model, optimizers, tokens, pairs, settings.windows)
        bar.update()
    return Validation(
        settings, losses, sum(p.numel() for p in model.parameters()), oracle, sketch, arms, floor,
        verdict(oracle, sketch, arms, floor), time.perf_counter() - started,
    )
