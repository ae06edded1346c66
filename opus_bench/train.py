"""Training with online selection: one deterministic loop, exact resume, one record at the end.

Every update step draws a buffer of candidates, lets the selector choose ``selection_ratio`` of
them, and takes one optimizer step on the chosen ones.  The candidate stream, the proxy stream and
the initial weights depend on the seed alone, so methods are paired seed by seed.
"""

from __future__ import annotations

import hashlib
import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Int
from torch import Tensor, nn

from .checkpoint import read_checkpoint, write_checkpoint
from .corpus import Corpus
from .ghost import full
from .gradients import sample_losses
from .layers import layer_names, parameter_names
from .model import SIZES, OpusGPT2, OpusGPT2Config
from .selector import Selector, TrainState
from .stream import PROXIES, CandidateStream

OPTIMIZERS = ("adamw", "muon")  # muon: for block matrices, with adamw for the rest
STEP_DIAGNOSTICS = ("effective_sample_size", "total_variation", "utility_std")


class StepSettings:
    """What the settings of every run share, be it of one process or of many: the sizes of a step, and their checks.

    The annotations are fields of the dataclasses made of this, each in its own place and with its own default.
    """

    steps: int  # optimizer updates
    length: int  # tokens per sequence
    buffer: int  # candidate sequences per step, N
    selection_ratio: float  # chosen / candidates, rho

    def check(self, known: Mapping[str, Iterable[str]], counts: Iterable[str]) -> None:
        """Raise ValueError for a ratio that selects nothing, a name not ``known`` or one of ``counts`` below 1."""
        if not 0 < self.selection_ratio <= 1:
            raise ValueError(f"selection_ratio must be in (0, 1], got {self.selection_ratio}")
        if self.selected_size < 1:
            raise ValueError(f"selection_ratio {self.selection_ratio} of a buffer of {self.buffer} selects nothing; "
                             "raise either")
        for name, names in known.items():
            if getattr(self, name) not in names:
                raise ValueError(f"{name} must be {' or '.join(names)}, got {getattr(self, name)!r}")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def selected_size(self) -> int:
        """Sequences trained on per step, rho N."""
        return round(self.selection_ratio * self.buffer)

    @property
    def update_tokens(self) -> int:
        """Tokens trained on in the whole run."""
        return self.steps * self.selected_size * self.length


@dataclass(frozen=True)
class RunConfig(StepSettings):
    """Everything that determines one run, but for the corpus.  Defaults are of the smoke scale."""

    warmup: ClassVar[float] = 0.0  # share of the steps in which the rate rises; none here
    selector: str  # name in the registry of selectors
    selector_options: dict[str, Any] = field(default_factory=dict)  # fields of that selector
    model: str = "tiny"  # size in model.SIZES
    embedding_std: float = 1.0  # of the initial embedding
    optimizer: str = "adamw"  # adamw, or muon for block matrices with adamw for the rest
    adam_lr: float = 4e-3  # peak rate of AdamW [released code, GPT-2 Large]
    muon_lr: float = 1.5e-2  # peak rate of Muon [released code, GPT-2 Large]
    betas: tuple[float, float] = (0.8, 0.95)  # AdamW [paper]
    eps: float = 1e-8  # AdamW [paper]
    weight_decay: float = 0.0  # of both [paper]
    clip: float = 1.0  # gradient norm [paper]
    cooldown: float = 0.4  # last share of the steps, in which the rate falls linearly to 0
    steps: int = 150  # optimizer updates
    length: int = 256  # tokens per sequence
    buffer: int = 16  # candidate sequences per step, N
    selection_ratio: float = 0.5  # chosen / candidates, rho [paper]
    proxy_size: int = 8  # proxy sequences per step [paper], refreshed every step
    proxy: str = "target"  # text of the target's proxy split, or "pool": held-out text of the mixture itself
    domains: tuple[str, ...] | None = None  # of the candidates, in the shares of the corpus; None: all
    seed: int = 0  # of weights, data order, proxy order and sampling
    evaluations: int = 12  # points of the validation curve after step 0
    validation_sequences: int = 32  # of the target domain, ``length`` tokens each
    checkpoint_every: int = 25  # steps
    threads: int = 1  # of torch; sums on CPU depend on it

    def __post_init__(self) -> None:
        self.check({"optimizer": OPTIMIZERS, "proxy": PROXIES},
                   ("steps", "buffer", "proxy_size", "evaluations", "checkpoint_every", "threads"))
        if self.model not in SIZES:
            raise ValueError(f"unknown model size {self.model!r}; known: {', '.join(SIZES)}")
        if self.length > SIZES[self.model][3]:
            raise ValueError(f"length {self.length} is longer than the {SIZES[self.model][3]} tokens "
                             f"of model {self.model!r}")


class Labelled(Protocol):
    """Sequences as a record counts them."""

    @property
    def ids(self) -> Tensor: ...
    @property
    def domains(self) -> tuple[str, ...]: ...


class OptimizerSettings(Protocol):
    """The fields of a config that optimizers and their schedule are made of."""

    @property
    def optimizer(self) -> str: ...
    @property
    def adam_lr(self) -> float: ...
    @property
    def muon_lr(self) -> float: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def eps(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def steps(self) -> int: ...
    @property
    def warmup(self) -> float: ...
    @property
    def cooldown(self) -> float: ...


def rate_factor(step: int, steps: int, cooldown: float, warmup: float = 0.0) -> float:
    """Learning rate at a step over its peak: linear up in the first share, constant, linear to 0 in the last share."""
    up = 1.0 if warmup == 0 else min(1.0, (step + 1) / (warmup * steps))
    down = 1.0 if cooldown == 0 else min(1.0, (steps - step) / steps / cooldown)
    return min(up, down)


def muon_momentum(step: int) -> float:
    """The paper's warm-up of Muon's momentum: .85 to .95 over 300 steps."""
    return 0.85 + 0.10 * min(step / 300, 1.0)


def build_optimizers(
    model: nn.Module, config: OptimizerSettings, muon: type[torch.optim.Muon] = torch.optim.Muon
) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters, or Muon for the blocks' matrices and AdamW for the rest."""
    named = dict(model.named_parameters())
    matrices = [p for p in parameter_names(model, layer_names(model, "blocks")).values() if p.ndim == 2]
    optimizers: list[torch.optim.Optimizer] = []
    rest = list(named.values())
    if config.optimizer == "muon":
        inside = {id(p) for p in matrices}
        rest = [p for p in rest if id(p) not in inside]
        optimizers.append(muon(
            matrices, lr=config.muon_lr, weight_decay=config.weight_decay, momentum=muon_momentum(0)
        ))
    optimizers.append(torch.optim.AdamW(
        rest, lr=config.adam_lr, betas=config.betas, eps=config.eps,
        weight_decay=config.weight_decay,
    ))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_schedule(optimizers: list[torch.optim.Optimizer], step: int, config: OptimizerSettings) -> None:
    """Put the step's learning rate and momentum into the optimizers' groups."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate_factor(step, config.steps, config.cooldown, config.warmup)
            if isinstance(optimizer, torch.optim.Muon):
                group["momentum"] = muon_momentum(step)


def update(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], tokens: Int[Tensor, "n t"], clip: float
) -> float:
    """One optimizer step on the mean loss of the sequences; returns that loss (nat/token).

    Raises:
        FloatingPointError: for a loss or a gradient that is NaN or infinite, before a weight is changed.
    """
    loss = sample_losses(model, tokens).mean()
    value = loss.item()
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the training loss is {value}; lower the learning rate")
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip).item()
    if not math.isfinite(norm):
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        raise FloatingPointError(f"the gradient's norm is {norm} though the loss is {value:g}; the weights are "
                                 "probably about to diverge, lower the learning rate")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return value


@torch.no_grad()
def validation_loss(model: nn.Module, tokens: Int[Tensor, "n t"], batch: int = 16) -> float:
    """Mean loss of the sequences in nat/token.

    Raises:
        FloatingPointError: if it is NaN or infinite.
    """
    return finite(torch.cat([sample_losses(model, part) for part in tokens.split(batch)]).mean().item())


def finite(value: float) -> float:
    """A validation loss that is a number.

    Raises:
        FloatingPointError: if it is NaN or infinite.
    """
    if not math.isfinite(value):
        raise FloatingPointError(f"the validation loss is {value}; the weights have diverged, lower the learning rate")
    return value


def weights_sha256(model: nn.Module) -> str:
    """Hash of all parameters' bytes in their order."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(name.encode())
        digest.update(full(p.detach()).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def peak_bytes() -> int:
    """Peak resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def seconds() -> float:
    """Time of a clock that nobody sets, read when a GPU in use has done what it was asked for."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Progress:
    """What a run has done so far: the part of a checkpoint that ends in the record."""

    step: int = 0
    train_s: float = 0.0
    select_s: float = 0.0
    eval_s: float = 0.0
    peak_bytes: int = 0
    selected_sha256: str = ""  # chained over steps: sha256(previous + ids chosen)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what happened on the way that a reader should know
    offered: dict[str, int] = field(default_factory=dict)
    chosen: dict[str, int] = field(default_factory=dict)
    per_step: dict[str, list[Any]] = field(
        default_factory=lambda: {"step": [], **{name: [] for name in STEP_DIAGNOSTICS}}
    )

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Add what the block takes to a field, in seconds; a GPU's work counts where it was asked for."""
        start = seconds()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + seconds() - start)

    def note_loss(self, config: StepSettings, split: str, value: float) -> None:
        tokens = self.step * config.selected_size * config.length
        self.metrics.append({"step": self.step, "tokens_seen": tokens, "split": split,
                             "name": "loss", "unit": "nat/token", "value": value})


def train(
    config: RunConfig,
    corpus: Corpus,
    selector: Selector,
    checkpoint: Path | None = None,
    on_step: Callable[[int], None] | None = None,
) -> tuple[OpusGPT2, Progress]:
    """Run the config to its end, from its checkpoint if there is one; returns model and progress.

    Deterministic on CPU for a given number of threads.  Killed at any moment and called again with
    the same arguments, it ends with the same weights, losses and choices bit for bit.

    Raises:
        FloatingPointError: for a loss, gradient or utility that is NaN or infinite, naming the step.
        OSError: for a checkpoint that cannot be written.
        ValueError: for a checkpoint of another run.
    """
    set_determinism(config.threads)
    torch.manual_seed(config.seed)
    model = OpusGPT2(OpusGPT2Config.from_size(config.model, corpus.vocab_size,
                                              embedding_std=config.embedding_std))
    model.train()
    optimizers = build_optimizers(model, config)
    generator = torch.Generator().manual_seed(config.seed)
    stream = CandidateStream(corpus, config.length, config.buffer, config.seed, config.domains)
    proxy = PROXIES[config.proxy](corpus, config.length, config.proxy_size, config.seed)
    target = corpus.spec.target
    held_out = corpus.sequences("validation", target, config.length, config.validation_sequences)
    points = {round(config.steps * i / config.evaluations) for i in range(1, config.evaluations + 1)}

    progress = Progress()
    saved = None if checkpoint is None else read_checkpoint(checkpoint, model, optimizers, generator, selector)
    if saved is not None:
        progress = Progress(**saved)
    else:
        progress.note_loss(config, f"val/{target}", validation_loss(model, held_out))

    while progress.step < config.steps:
        set_schedule(optimizers, progress.step, config)
        candidates = stream.candidates(progress.step)
        with progress.clock("select_s"):
            state = TrainState(model, optimizers, progress.step, proxy.proxy(progress.step))
            selection = selector.select(candidates, config.selected_size, state, generator)
        chosen = candidates.take(selection.indices.sort().values)
        with progress.clock("train_s"), named_step(progress.step):
            loss = update(model, optimizers, chosen.tokens, config.clip)
        note_selection(progress, candidates, chosen, selection.diagnostics)
        progress.step += 1
        if progress.step in points:
            progress.note_loss(config, "train", loss)
            with progress.clock("eval_s"), named_step(progress.step):
                progress.note_loss(config, f"val/{target}", validation_loss(model, held_out))
        if checkpoint is not None and (
            progress.step % config.checkpoint_every == 0 or progress.step == config.steps
        ):
            progress.peak_bytes = max(progress.peak_bytes, peak_bytes())
            write_checkpoint(checkpoint, model, optimizers, generator, selector, vars(progress))
        if on_step is not None:
            on_step(progress.step)
    progress.peak_bytes = max(progress.peak_bytes, peak_bytes())
    return model, progress


@contextmanager
def named_step(step: int) -> Iterator[None]:
    """Say in which step a number ceased to be one."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"step {step}: {error}") from error


def set_determinism(threads: int) -> None:
    """Deterministic kernels only, and this many threads, for the whole process."""
    torch.use_deterministic_algorithms(True)
    # a debugging aid that costs 5 %
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_num_threads(threads)


def note_selection(progress: Progress, candidates: Labelled, chosen: Labelled, diagnostics: dict[str, Any]) -> None:
    """Add one step's candidates, choice and diagnostics to the progress."""
    ids = chosen.ids.numpy().tobytes()
    progress.selected_sha256 = hashlib.sha256(progress.selected_sha256.encode() + ids).hexdigest()
    for total, batch in ((progress.offered, candidates), (progress.chosen, chosen)):
        for domain, count in Counter(batch.domains).items():
            total[domain] = total.get(domain, 0) + count
    progress.per_step["step"].append(progress.step)
    for name in STEP_DIAGNOSTICS:
        value = diagnostics.get(name)
        progress.per_step[name].append(None if value is None else float(f"{value:.7g}"))
    note = diagnostics.get("out_of_memory")
    if note is not None and note not in progress.notes:
        progress.notes.append(note)
