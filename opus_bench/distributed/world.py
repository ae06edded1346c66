"""Work shared by processes: who computes what, what is gathered, and weights that lie on one process each or in shards.

    World         the processes of a run; rank r of ``size``
    share         samples are split in order, as evenly as they go; every process makes the same number of forwards,
                  since a sharded model's forward is a collective
    parallelize   DDP (every process has all weights) or FSDP2 (``fully_shard``: every process has 1 / size of each)

What is gathered (utilities, sketches, losses) is the same bit for bit on every process; what is summed over
processes (gradients) differs from one process's sum by rounding.  What every process computes for itself, be it from
the same numbers, need not be the same on GPUs, whose sums take another order from one time to the next.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from opus_bench.gradients import sample_losses, scoring_mode
from opus_bench.layers import parameter_names
from opus_bench.sequences import Sequences

PARALLELISM = ("ddp", "fsdp2")
MINUTES = 30  # that a process waits for the others before it gives up

T = TypeVar("T")


class ProcessError(RuntimeError):
    """What failed on some process, as all are told; not that a process was lost, which is torch's RuntimeError."""


@dataclass(frozen=True)
class World:
    """The processes of a run, this one being ``rank`` of ``size``, and the device that it computes on."""

    rank: int
    size: int
    device: torch.device

    @staticmethod
    def start() -> World:
        """Join the processes that torchrun started, or be the only one.

        One GPU a process where there are any (nccl, and gloo for what lies on the CPU), else the CPU (gloo).

        Raises:
            ValueError: for more processes on this machine than it has GPUs.
        """
        cuda = torch.cuda.is_available()
        local = int(os.environ.get("LOCAL_RANK", 0))
        if cuda and local >= torch.cuda.device_count():
            raise ValueError(f"process {local} of this machine has no GPU, there are {torch.cuda.device_count()}; "
                             "lower --nproc-per-node")
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        options: dict[str, Any] = {"backend": "cpu:gloo,cuda:nccl" if cuda else "gloo",
                                   "timeout": timedelta(minutes=MINUTES)}
        if "WORLD_SIZE" not in os.environ:
            options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(**options)
        return World(dist.get_rank(), dist.get_world_size(), device)

    def stop(self) -> None:
        """Leave the group."""
        dist.destroy_process_group()

    def counts(self, n: int) -> list[int]:
        """Samples of n that each process works on; the first n mod size have one more."""
        return [n // self.size + (rank < n % self.size) for rank in range(self.size)]

    def share(self, n: int) -> tuple[Int[Tensor, " m"], int]:
        """Places in 0..n-1 that this process works on, and how many of them count.

        Every process gets the same number of places; one that has fewer repeats its last (or the first of all),
        and that repetition does not count.
        """
        counts = self.counts(n)
        start, mine = sum(counts[: self.rank]), counts[self.rank]
        return (start + torch.arange(max(counts))).clamp(max=max(0, start + mine - 1)), mine

    def gather(self, mine: Float[Tensor, "m *k"], n: int) -> Float[Tensor, "n *k"]:
        """All processes' rows of a sample-wise quantity, in the samples' order, the same everywhere.

        Args:
            mine: this process's rows, those that count: ``counts(n)[rank]`` of them.
        """
        counts = self.counts(n)
        if self.size == 1:
            return mine
        padded = mine.new_zeros(max(counts), *mine.shape[1:])
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts)])

    def sum(self, x: Tensor) -> Tensor:
        """The sum over processes."""
        if self.size > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def each(self, x: float) -> list[float]:
        """One number of every process, by rank."""
        return self.gather(torch.tensor([x], dtype=torch.float64), self.size).tolist()

    def together(self, act: Callable[[], T]) -> T:
        """What this process's act returns, once all have acted; what fails on any of them fails on all.

        For what may fail on one process alone and is no collective: without this the others would wait in their next.

        Raises:
            OSError, ValueError: what failed, by process.
            ProcessError: of any other exception.
        """
        failed: Exception | None = None
        try:
            found = act()
        except Exception as error:
            failed = error
        everyones: list[Any] = [failed and _said(failed)] * self.size
        if self.size > 1:
            dist.all_gather_object(everyones, everyones[self.rank])
        bad = [(rank, *said) for rank, said in enumerate(everyones) if said]
        if bad:
            raise bad[0][1]("; ".join(f"{text} on process {rank}" for rank, _, text in bad)) from failed
        return found

    def first(self, x: Tensor) -> Tensor:
        """Process 0's x on every process, on the CPU; shape and dtype are the same on all."""
        x = x.cpu().clone()
        if self.size > 1:
            dist.broadcast(x, 0)
        return x

    def check_equal(self, what: str, values: Int[Tensor, " n"]) -> None:
        """Refuse to go on when processes that must agree do not.

        Raises:
            RuntimeError: naming the processes that differ from the first.
        """
        rows = self.gather(values.cpu().long()[None], self.size)
        others = [rank for rank, row in enumerate(rows) if not torch.equal(row, rows[0])]
        if others:
            raise RuntimeError(f"processes {others} have other {what} than process 0; the processes must run the same "
                               "code with the same settings on the same data")


def shared_scores(
    score: Callable[[Sequences], Float[Tensor, " m"]], batch: Sequences, world: World
) -> Float[Tensor, " n"]:
    """A score of every sample, each computed by one process and gathered."""
    own, counted = world.share(len(batch))
    return world.gather(score(batch[own])[:counted], len(batch))


def shared_mean_gradient(
    model: nn.Module, batch: Sequences, layers: Sequence[str], world: World, label_shift: int = 1
) -> dict[str, Float[Tensor, "o i"]]:
    """``gradients.mean_gradient`` of the whole batch, each process computing on its share.

    The mean is over all samples also where the shares are unequal.  Sharded parameters have sharded gradients
    (DTensors).  Cost: one forward and backward of a share; one all-reduce per weight, or FSDP2's reduce-scatter,
    for which every parameter's gradient is formed.  ``.grad`` is left as it was.

    Raises:
        ValueError: if the loss does not depend on a named parameter.
    """
    parameters = parameter_names(model, layers)
    own, counted = world.share(len(batch))
    with scoring_mode(model):
        losses = sample_losses(model, batch[own], label_shift)
        weights = torch.zeros_like(losses)
        weights[:counted] = 1 / len(batch)
        loss = (losses * weights).sum()
        if any(isinstance(p, DTensor) for p in parameters.values()):
            grads = _sharded_gradients(model, loss * world.size, parameters)  # FSDP2 takes the mean over processes
        else:
            found = torch.autograd.grad(loss, list(parameters.values()))
            grads = dict(zip(parameters, map(world.sum, found)))
    return {k: g if g.ndim == 2 else g[:, None] for k, g in grads.items()}


def _sharded_gradients(model: nn.Module, loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Gradients by a plain backward, which is what makes FSDP2 reduce them."""
    before = [(p, p.grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.grad = None
        loss.backward()
        silent = [name for name, p in parameters.items() if p.grad is None]
        if silent:
            raise ValueError(f"the loss does not depend on {', '.join(silent)}")
        return {name: p.grad for name, p in parameters.items() if p.grad is not None}
    finally:
        for p, grad in before:
            p.grad = grad


def _said(error: Exception) -> tuple[type[Exception], str]:
    """An exception as it is told to other processes: its kind, and what it says."""
    for kind in (OSError, ValueError):
        if isinstance(error, kind):
            return kind, str(getattr(error, "strerror", None) or error)
    return ProcessError, f"{type(error).__name__}: {error}"


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The model's repeated blocks, as transformers names them in ``_no_split_modules``.

    Raises:
        ValueError: for a model that names none or has none of them.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        raise ValueError(f"{type(model).__name__} does not say which modules are its blocks (_no_split_modules), "
                         "so it cannot be sharded or checkpointed block by block")
    return found


def parallelize(
    model: nn.Module, parallelism: str, checkpointing: bool, world: World,
    receive: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """Spread a model over the processes in place; returns the module to call in training.

    "ddp": every process keeps all weights; the returned wrapper averages gradients.  "fsdp2": blocks, and what
    is outside them, are sharded; parameters become DTensors, gathered block by block in forwards and backwards
    and given back after each, so that a change of the shards is always seen.  ``checkpointing`` recomputes each
    block's activations in the backward.

    All processes must hold the same weights, or none yet (the meta device): then ``receive`` is called with every
    part before it is sharded, or with the model, and gives it its weights on the device (weights.py).  Names of
    modules and parameters stay as they are.

    Raises:
        ValueError: for an unknown parallelism.
    """
    if parallelism not in PARALLELISM:
        raise ValueError(f"parallelism must be {' or '.join(PARALLELISM)}, got {parallelism!r}")
    if receive is None:
        model.to(world.device)
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.use_cache = False  # a cache would be filled twice by recomputation
    blocks = blocks_of(model) if checkpointing or parallelism == "fsdp2" else []
    if checkpointing:
        for block in blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if parallelism == "ddp":
        if receive is not None:
            receive(model)
        return DistributedDataParallel(model, forward_sync_buffers=False) if world.size > 1 else model
    # logits may be a view of the last layer's output; nothing here writes into them
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    mesh = dist.init_device_mesh(world.device.type, (world.size,))
    for module in [*blocks, model]:
        if receive is not None:
            receive(module)
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return model


def autocast(world: World, precision: Literal["float32", "bfloat16"]) -> Any:
    """bfloat16 products on float32 weights, or nothing.  No narrow copies of weights are kept, which would undo
    sharding."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(world.device.type, torch.bfloat16, cache_enabled=False)
