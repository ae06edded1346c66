"""What ``opus-bench validate`` measures, on a model, an optimizer and text of the user's own.

The weights are loaded, real optimizer steps are taken in memory, and one batch is scored in every way.
The measures are those of validate.py; see there.  Here the layers are the user's choice, and the
oracle keeps one gradient per candidate and none per proxy sequence.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm import tqdm

from ..ghost import wide
from ..gradients import Factors, PerSampleGradient, exact_per_sample_grads, layer_names, mean_gradient, parameter_names
from ..preconditioner import Preconditioner, preconditioners
from ..train import set_determinism, update, weights_sha256
from .findings import ArmDraw, NoiseFloor, OracleError, SketchFidelity
from .own_inputs import file_sha256, read_model
from .own_optimizers import build_optimizers, read_optimizer_state
from .own_plan import Plan
from .own_settings import OwnSettings
from .problem import Optimizers, Scoring, float64_copy, rank_correlation, relative_error, scoring
from .validate import HASH_SEED_STEP, arm_draws, sketch_fidelity, verdict

CLIP = 1.0  # gradient norm of the updates [paper]


def oracle_errors(
    model: nn.Module, optimizers: Optimizers, candidates: Int[Tensor, "n t"], proxy: Int[Tensor, "m t"],
    layers: Sequence[str],
) -> tuple[OracleError, ...]:
    """As validate.oracle_errors, for the layers given; float64, then the model's dtype if another.

    The proxy is cut to a power of two: norms of transformers round to float32 inside, also going
    backwards, and a mean over a power of two changes no mantissa, so that both ways round alike.
    Cost: n + m forwards and backwards in float64; memory O((n + 2) o i) for the scored weights.
    """
    proxy = proxy[: 1 << (len(proxy).bit_length() - 1)]
    exact_model, exact_optimizers = float64_copy(model, optimizers)
    names = layer_names(exact_model, layers)
    p = preconditioners(exact_optimizers, parameter_names(exact_model, names))
    target: dict[str, Tensor] = {}
    for one in proxy.split(1):
        for k, g in exact_per_sample_grads(exact_model, one, names).items():
            target[k] = target.get(k, 0) + g[0] / len(proxy)
    grads = exact_per_sample_grads(exact_model, candidates, names)
    n = len(candidates)
    alignment, gram = torch.zeros(n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
    for k in list(grads):
        u, eta = p[k](grads.pop(k)).flatten(1), p[k].learning_rate
        alignment += eta * (u @ target[k].flatten())
        gram += eta**2 * u @ u.T
    errors = []
    states: list[tuple[nn.Module, Optimizers]] = [(exact_model, exact_optimizers)]
    if next(model.parameters()).dtype != torch.float64:
        states.append((model, optimizers))
    for some_model, some_optimizers in states:
        got = scoring(some_model, some_optimizers, candidates, proxy, layers).exact()
        assert got.gram is not None
        dtype = str(next(some_model.parameters()).dtype).removeprefix("torch.")
        errors.append(OracleError(dtype, n, relative_error(got.alignment, alignment), relative_error(got.gram, gram)))
    return tuple(errors)


def widened(problem: Scoring) -> Scoring:
    """The same problem with products in float32 at least, whatever the factors were computed in."""

    def wider(p: Preconditioner) -> Preconditioner:
        return dataclasses.replace(p, diagonal=None if p.diagonal is None else wide(p.diagonal))

    return Scoring(
        {k: PerSampleGradient(g.shape, tuple(Factors(wide(use.left), wide(use.right)) for use in g.uses))
         for k, g in problem.gradients.items()},
        {k: wide(g) for k, g in problem.proxy_gradient.items()},
        {k: wider(p) for k, p in problem.preconditioners.items()},
    )


def noise_floor(
    model: nn.Module, optimizers: Optimizers, candidates: Int[Tensor, "n t"],
    pairs: Sequence[tuple[Tensor, Tensor]], windows: Sequence[int], layers: Sequence[str],
) -> tuple[NoiseFloor, ...]:
    """As validate.noise_floor, for the layers given."""
    names = layer_names(model, layers)
    first, second = ([pair[i] for pair in pairs] for i in (0, 1))

    def alignments(window: int, *batches: Sequence[Tensor]) -> list[list[Tensor]]:
        problem = scoring(model, optimizers, candidates[:, :window], batches[0][0][:, :window], layers)
        return [[dataclasses.replace(problem, proxy_gradient=mean_gradient(model, proxy[:, :window], names)[0])
                 .exact(gram=False).alignment for proxy in batch] for batch in batches]

    def floor(change: str, others: list[Tensor]) -> NoiseFloor:
        values = [rank_correlation(a, b) for a, b in zip(whole, others, strict=True)]
        return NoiseFloor(change, len(values), sum(values) / len(values), min(values), max(values))

    length = candidates.shape[1]
    whole, others = alignments(length, first, second)
    return (floor("another proxy batch", others),
            *(floor(f"window of {window} of {length} tokens", alignments(window, first)[0]) for window in windows))


# The whole ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OwnValidation:
    """Everything that ``opus-bench validate --model`` prints, but for thresholds and versions."""

    plan: Plan
    weights_sha256: str  # of the model as it was read
    data_sha256: dict[str, str]  # of the files, and of the sequences used
    rates: dict[str, list[float]]  # learning rates of the groups, by optimizer
    training_loss: tuple[float, float] | None  # first and last update, nat/token; None: no update
    oracle: tuple[OracleError, ...]
    sketch: tuple[SketchFidelity, ...]
    arms: tuple[ArmDraw, ...]
    arms_reason: str | None  # why they were not run
    floor: tuple[NoiseFloor, ...]
    verdict: str
    seconds: float

    def plain(self) -> dict[str, Any]:
        """All of it as values that JSON knows."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "plan"}
        for name in ("oracle", "sketch", "arms", "floor"):
            content[name] = [dataclasses.asdict(x) for x in content[name]]
        return {**self.plan.plain, **content}


def compare(plan: Plan, progress: bool = True) -> OwnValidation:
    """Load, step, score in every way and compare.  Deterministic on one machine but for the seconds.

    The model's files are not written to.
    """
    started = time.perf_counter()
    s = plan.settings
    hide = None if progress else True  # None: hidden unless on a terminal
    set_determinism(torch.get_num_threads())
    model = read_model(s)
    sha256 = weights_sha256(model)
    layers, windows = list(s.layers), s.windows or ()
    optimizers = read_optimizer_state(model, s) if s.optimizer_state else build_optimizers(model, s)
    losses = []
    model.train()
    with tqdm(total=s.steps, desc="optimizer steps", unit="step", disable=hide) as bar, torch.random.fork_rng([]):
        torch.manual_seed(s.seed)  # dropout
        for batch in plan.training.split(s.batch_size) if len(plan.training) else ():
            losses.append(update(model, optimizers, batch, CLIP))
            bar.update()
    model.eval()
    candidates, proxy = plan.candidates, plan.proxies[0][0]
    seeds = [HASH_SEED_STEP * (i + 1) for i in range(s.hash_seeds)]
    with tqdm(total=len(s.widths) * len(seeds) + 3, desc="scoring", unit="comparison", disable=hide) as bar:
        oracle = () if plan.oracle_reason else oracle_errors(
            model, optimizers, candidates[: s.oracle_candidates], proxy, layers)
        bar.update()
        problem = widened(scoring(model, optimizers, candidates, proxy, layers))
        exact = problem.exact()
        sketch = tuple(sketch_fidelity(problem, width, seeds, exact, bar.update) for width in s.widths)
        del problem  # before the next factors are held
        arms, arms_reason = _arms(model, optimizers, candidates, proxy, s)
        bar.update()
        floor = noise_floor(model, optimizers, candidates, plan.proxies, windows, layers)
        bar.update()
    words = verdict(oracle, sketch, arms, floor)
    if plan.oracle_reason:
        words = f"factored utilities not compared with autograd's ({plan.oracle_reason}); {words.split('; ', 1)[1]}"
    return OwnValidation(
        plan, sha256, _hashes(plan), {type(o).__name__: [float(g["lr"]) for g in o.param_groups] for o in optimizers},
        (losses[0], losses[-1]) if losses else None, oracle, sketch, arms, arms_reason, floor, words,
        time.perf_counter() - started,
    )


def _arms(
    model: nn.Module, optimizers: Optimizers, candidates: Tensor, proxy: Tensor, s: OwnSettings
) -> tuple[tuple[ArmDraw, ...], str | None]:
    """The arms' draws, or why there are none: not every model can be sketched in half precision."""
    try:
        return arm_draws(model, optimizers, candidates, proxy, s.steps, s.seed), None
    except RuntimeError as error:
        if s.dtype != "bfloat16":
            raise
        return (), f"the selector cannot sketch this model in bfloat16 ({error}); give --dtype float32"


def _hashes(plan: Plan) -> dict[str, str]:
    s = plan.settings
    files = {path: file_sha256(path) for path in (s.data, s.proxy_data, s.optimizer_state) if path}
    used = hashlib.sha256()
    for batch in (plan.candidates, plan.training, *(p for pair in plan.proxies for p in pair)):
        used.update(batch.numpy().tobytes())
    return {**files, "sequences used": used.hexdigest()}
