"""Pre-training with online selection on one or many processes: DDP or FSDP2, resumed on any number of them.

Every step all processes see the same buffer of candidates and choose from it together (selection.py), each
trains on an equal part of the choice, and the gradient is the mean over all chosen sequences.  Candidates, proxy
and draws are functions of (seed, step), so a resumed run needs only its weights, optimizer state and step.

What is equal under 1, 2, 4 ... processes with the same seed and global selection: candidates and proxies exactly;
utilities, losses and weights to rounding; choices, but where rounding moves a draw across a threshold.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from opus_bench.distributed.world import PARALLELISM, World, autocast, parallelize, shared_scores
from opus_bench.gradients import scoring_mode
from opus_bench.ghost import full
from opus_bench.selector import Selector, TrainState
from opus_bench.sequences import Sequences, sample_losses
from opus_bench.distributed.selection import SharedOpus, check_scope, select_shared, step_seed
from opus_bench.distributed.checkpoint import newest_whole, read, write
from opus_bench.distributed.state import ShardedMuon
from opus_bench.distributed.weights import receiver
from opus_bench.train import (
    OPTIMIZERS, STEP_DIAGNOSTICS, Progress, StepSettings, build_optimizers, finite, named_step, note_selection,
    peak_bytes, set_schedule,
)

HOW = ("parallelism", "checkpointing", "microbatch", "checkpoint_every")  # leave the numbers as they are, to rounding


class Pool(Protocol):
    """Where candidates and proxies come from: a pure function of step and seed."""

    def ids(self, step: int, size: int, length: int, seed: int) -> Tensor: ...
    def sequences(self, ids: Any, length: int) -> Sequences: ...
    def domain_names(self, ids: Any, length: int) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class PretrainConfig(StepSettings):
    """Settings of a run; sizes are those of all processes together.  Presets of the paper: reproduce/presets.py."""

    steps: int  # optimizer updates
    length: int  # tokens per training sequence
    buffer: int  # candidate sequences per step, N
    selection_ratio: float = 0.5  # chosen / candidates, rho [paper]
    proxy_size: int = 8  # proxy sequences per step [paper]
    proxy_length: int = 512  # tokens of a proxy sequence [paper: the score length]
    optimizer: str = "adamw"  # adamw, or muon for block matrices with adamw for the rest
    adam_lr: float = 2e-3  # peak rate of AdamW
    muon_lr: float = 1e-2  # peak rate of Muon
    betas: tuple[float, float] = (0.8, 0.95)  # of AdamW
    eps: float = 1e-8  # of AdamW
    weight_decay: float = 0.0  # of both
    clip: float = 1.0  # norm of the gradient
    warmup: float = 0.0  # first share of the steps, in which the rate rises linearly
    cooldown: float = 0.4  # last share of the steps, in which it falls linearly to 0
    selection: Literal["global", "local"] = "global"  # see selection.py
    precision: Literal["float32", "bfloat16"] = "float32"  # of matrix products; weights and state keep their dtype
    seed: int = 0  # of the order of the data, proxies and draws
    validation_every: int = 1000  # steps
    validation_sequences: int = 32
    parallelism: Literal["ddp", "fsdp2"] = "fsdp2"
    checkpointing: bool = False  # recompute activations block by block
    microbatch: int | None = None  # sequences in one forward and backward of a process; None: all
    checkpoint_every: int = 500  # steps

    def __post_init__(self) -> None:
        self.check({"optimizer": OPTIMIZERS, "precision": ("float32", "bfloat16"), "parallelism": PARALLELISM},
                   ("steps", "length", "buffer", "proxy_size", "proxy_length", "validation_every",
                    "validation_sequences", "checkpoint_every"))
        if self.microbatch is not None and self.microbatch < 1:
            raise ValueError(f"microbatch must be at least 1 sequence, got {self.microbatch}")
        for name in ("warmup", "cooldown"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share in [0, 1], got {getattr(self, name)}")

    def identity(self, processes: int) -> dict[str, Any]:
        """What determines the numbers, as plain values: all but HOW, and the processes where selection is local."""
        settings = {k: v for k, v in dataclasses.asdict(self).items() if k not in HOW}
        settings["betas"] = list(self.betas)
        settings["shares"] = processes if self.selection == "local" else None
        return settings


@dataclass
class SharedProgress(Progress):
    """Progress of all processes."""

    wall_s: float = 0.0  # from the first loss to the last, over all starts: the clocks, data, checkpoints and the rest
    notes: list[str] = field(default_factory=list)  # what was out of the ordinary


@dataclass(frozen=True)
class Offered:
    """Sequences of a pool by id, for the record."""

    ids: Tensor
    domains: tuple[str, ...]


def pretrain(
    config: PretrainConfig,
    model: nn.Module,
    pool: Pool,
    proxies: Pool,
    selector: Selector,
    world: World,
    folder: Path | None = None,
    validation: Pool | None = None,
    on_step: Callable[[int, float], None] | None = None,
    keep: Callable[[int], None] | None = None,
    weights: Callable[[], nn.Module] | None = None,
) -> SharedProgress:
    """Train the model in place to the end of the config, from the checkpoint in ``folder`` if there is one.

    All processes call this together with the same arguments; the model is spread over them (``world.parallelize``).
    It has the same initial weights everywhere, or lies on the meta device: then process 0 calls ``weights`` for the
    whole of it on the CPU, and the others receive theirs (weights.py).  ``on_step`` gets the number of steps done and
    the step's loss (nat/token).  ``keep`` gets the number of steps done before that step's checkpoint is written:
    what it leaves of a step is there whenever a run goes on after that step.

    Raises:
        ValueError: for a selection that the processes cannot share, weights that are not the model's, and a checkpoint
            of other settings.
        FloatingPointError: for a loss or gradient that is not finite, naming step and process, before weights change;
            for a validation loss that is not, naming the step, before anything of that step is kept or written.
        OSError: for a checkpoint that cannot be written; the one before stays in force.
    """
    check_scope(config.selection, config.buffer, config.selected_size, world.size)
    training_module = parallelize(model, config.parallelism, config.checkpointing, world,
                                  receiver(model, weights, world))
    model.train()
    optimizers = build_optimizers(model, config, ShardedMuon)
    progress, identity = SharedProgress(), config.identity(world.size)
    start = newest_whole(folder, world) if folder is not None else None
    if start is not None:
        saved = read(start, model, optimizers, selector, world)
        refuse_other_settings(start, saved.pop("config"), identity)
        progress = SharedProgress(**saved)
    begun = time.perf_counter() - progress.wall_s

    def evaluate() -> None:
        if validation is not None:
            held_out = validation.sequences(range(config.validation_sequences), config.length)
            with progress.clock("eval_s"), named_step(progress.step):
                progress.note_loss(config, "val", validation_loss(model, held_out, config, world))

    if start is None:
        evaluate()
    while progress.step < config.steps:
        step = progress.step
        torch.manual_seed(step_seed(config.seed, step, world.rank))  # of dropout, if the model has any
        set_schedule(optimizers, step, config)
        ids = pool.ids(step, config.buffer, config.length, config.seed)
        candidates = pool.sequences(ids, config.length).to(world.device)
        proxy = proxies.sequences(proxies.ids(step, config.proxy_size, config.proxy_length, config.seed),
                                  config.proxy_length).to(world.device)
        with progress.clock("select_s"), autocast(world, config.precision):
            state = TrainState(model, optimizers, step, proxy)
            chosen, mine, selection = select_shared(
                selector, candidates, config.selected_size, state, world, config.selection, config.seed)
        with progress.clock("train_s"):
            loss = update(model, training_module, optimizers, candidates[mine], config, world, step)
        names = pool.domain_names(ids, config.length)
        note_selection(progress, Offered(ids, names), Offered(ids[chosen], tuple(names[i] for i in chosen.tolist())),
                       mean_diagnostics(selection.diagnostics, world))
        progress.step += 1
        if progress.step % config.validation_every == 0 or progress.step == config.steps:
            progress.note_loss(config, "train", loss)
            evaluate()
        if keep is not None:
            keep(progress.step)
        if folder is not None and (progress.step % config.checkpoint_every == 0 or progress.step == config.steps):
            gather_notes(progress, selector, world)
            progress.wall_s = time.perf_counter() - begun
            write(folder, progress.step, model, optimizers, selector, vars(progress) | {"config": identity}, world)
        if on_step is not None:
            on_step(progress.step, loss)
    gather_notes(progress, selector, world)
    progress.wall_s = time.perf_counter() - begun
    return progress


def update(
    model: nn.Module, training_module: nn.Module, optimizers: list[torch.optim.Optimizer], mine: Sequences,
    config: PretrainConfig, world: World, step: int,
) -> float:
    """One optimizer step on the mean loss of all processes' sequences, of which each has as many; that loss.

    Microbatches are accumulated.  DDP averages gradients in the last one; FSDP2 reduces them in each, which keeps
    them sharded.

    Raises:
        FloatingPointError: on every process, before weights change.
    """
    size = config.microbatch or len(mine)
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(mine), size):
        part = mine[start : start + size]
        last = start + size >= len(mine)
        waits = isinstance(training_module, DistributedDataParallel) and not last
        with cast(DistributedDataParallel, training_module).no_sync() if waits else nullcontext():
            with autocast(world, config.precision):
                loss = sample_losses(training_module, part).sum() / len(mine)
            loss.backward()
        total += loss.detach().double().cpu()
    losses = world.each(total.item())
    bad = [rank for rank, value in enumerate(losses) if not torch.isfinite(torch.tensor(value))]
    if bad:
        raise FloatingPointError(f"step {step}: the training loss of process {', '.join(map(str, bad))} is "
                                 f"{losses[bad[0]]}; lower the learning rate; the last checkpoint stays as it is")
    norm = full(nn.utils.clip_grad_norm_(model.parameters(), config.clip))
    if not torch.isfinite(norm):
        raise FloatingPointError(f"step {step}: the norm of the gradient is {norm.item()} on process {world.rank}; "
                                 "lower the learning rate; the last checkpoint stays as it is")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return sum(losses) / world.size


def validation_loss(model: nn.Module, held_out: Sequences, config: PretrainConfig, world: World) -> float:
    """Mean loss of the sequences in nat/token, each computed by one process.

    Raises:
        FloatingPointError: on every process, if it is NaN or infinite.
    """

    def score(part: Sequences) -> Tensor:
        size = config.microbatch or len(part)
        return torch.cat([sample_losses(model, part[start : start + size].to(world.device)).double().cpu()
                          for start in range(0, len(part), size)])

    with scoring_mode(model), torch.no_grad(), autocast(world, config.precision):
        return finite(shared_scores(score, held_out, world).mean().item())


def mean_diagnostics(diagnostics: dict[str, Any], world: World) -> dict[str, float]:
    """Means over processes, which differ where selection is local."""
    return {name: sum(world.each(float(diagnostics[name]))) / world.size
            for name in STEP_DIAGNOSTICS if diagnostics.get(name) is not None}


def gather_notes(progress: SharedProgress, selector: Selector, world: World) -> None:
    """Move what processes noted into the progress of all, and the largest memory of any."""
    everyones: list[Any] = [None] * world.size
    own = selector.notes if isinstance(selector, SharedOpus) else []
    dist.all_gather_object(everyones, list(own))
    own.clear()
    progress.notes += [note for notes in everyones for note in notes]
    used = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else peak_bytes()
    progress.peak_bytes = max(progress.peak_bytes, *map(int, world.each(used)))


def refuse_other_settings(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ValueError unless a checkpoint was written under the settings of this run, naming what differs."""
    differ = [f"{name} {saved.get(name)!r}, now {wanted.get(name)!r}"
              for name in sorted({*saved, *wanted}) if saved.get(name) != wanted.get(name)]
    if differ:
        raise ValueError(f"checkpoint {path} is of a run with other settings ({'; '.join(differ)}); give the same, or "
                         "another folder")
