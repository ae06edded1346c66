"""Muon on many processes: its P_t and its step, each matrix's by one of them, over state that may lie in shards.

Both are chains of products of whole matrices, far dearer than what the rest of the step does with a weight, so they
are divided: ``shared_work`` deals matrices out by falling cost, the owner of one computes, and what it found is sent
to the others, hence the same bit for bit.  Where weights are sharded (FSDP2), rows of inputs are sent to the owner and
rows of the result back, no process but the owner holding a matrix whole; where every process has all weights (DDP)
only the result is sent.  One process owns all matrices and sends nothing.

torch.optim.Muon takes DTensors as they are, but then runs each of its five bfloat16 products over shards: several
gathers an iteration, and sums in another order, which five steps of Newton-Schulz amplify to some percent of an
update's smallest directions.  Hence ShardedMuon.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from opus_bench.ghost import full, outside_autocast, wide
from opus_bench.preconditioner import (
    Owned, Preconditioner, inner_flops, left_flops, muon_inner, owners, preconditioner_of,
)

Key = TypeVar("Key")
Inputs = TypeVar("Inputs")


class LivePreconditioners(Mapping[str, Preconditioner]):
    """``preconditioner.preconditioners`` of one step, one weight at a time, whole also where the state is sharded.

    All processes ask together.  P_t is made when it is asked for, from state gathered then, and not kept, but for the
    products that Muon's takes (``muon_inner``), which are made once, by ``build`` or when one is first asked for.
    ``plain`` gives the identity in place of every P_t.

    Memory: one weight's state, and min(o, i)^2 numbers of Muon's matrices: of all of them where every process has all
        weights, at most one number a weight; of this process's share where weights are sharded.
    """

    def __init__(self, optimizers: Any, parameters: dict[str, nn.Parameter], plain: bool = False) -> None:
        self._owned, self._plain = owners(optimizers, parameters), plain
        self._inner: dict[str, Tensor] | None = None  # those held here
        self._owner: dict[str, int] = {}  # of sharded matrices

    @outside_autocast
    def __getitem__(self, name: str) -> Preconditioner:
        one = self._owned[name]
        if self._plain:
            return Preconditioner(learning_rate=self.rates[name])
        if not has_momentum(one):
            return preconditioner_of(replace(one, state={k: full(v) for k, v in one.state.items()}))
        inner, momentum = self.build().get(name), one.state["momentum_buffer"]
        if name in self._owner:
            inner = inner_from(inner, self._owner[name], momentum)
        if momentum.shape[0] > momentum.shape[1]:
            one = replace(one, state={"momentum_buffer": full(momentum)})
        return preconditioner_of(one, inner)

    def __iter__(self) -> Iterator[str]:
        return iter(self._owned)

    def __len__(self) -> int:
        return len(self._owned)

    @property
    def rates(self) -> dict[str, float]:
        """eta_t of every parameter's group."""
        return {name: float(one.group["lr"]) for name, one in self._owned.items()}

    @outside_autocast
    def build(self) -> dict[str, Tensor]:
        """``muon_inner`` of the matrices that this process holds it of, made at the first call, by all together."""
        if self._inner is not None:
            return self._inner
        found: dict[str, Tensor] = {}
        momenta = {} if self._plain else {
            name: one.state["momentum_buffer"] for name, one in self._owned.items() if has_momentum(one)}

        def keep(name: str, inner: Tensor | None, owner: int) -> None:
            momentum = momenta[name]
            if isinstance(momentum, DTensor):
                self._owner[name] = owner
            else:
                inner = inner_from(inner, owner, momentum)
            if inner is not None:
                found[name] = inner

        shared_work({name: inner_flops(*momentum.shape) for name, momentum in momenta.items()},
                    lambda name, owner: on_owner(momenta[name], owner),
                    lambda name, momentum: muon_inner(momentum, self._owned[name].group), keep)
        self._inner = found
        return found

    @outside_autocast
    def directions(self, gradients: Mapping[str, Float[Tensor, "o i"]]) -> dict[str, Float[Tensor, "o i"]]:
        """P_t g of every weight given, in at least float32, sharded as its g is; all processes call this together.

        AdamW's P_t acts element by element, so on the shards, without communication.  Muon's of one matrix is applied
        by its owner, without forming S where that is dearer (``preconditioner.LeftPolynomial``).

        Cost: a process does its share of the flops.  Where weights are sharded it sends 2 o i / size numbers a matrix
            and its rows of the results come back; else the result, o i numbers, is broadcast.
        """
        found = {name: wide(g) for name, g in gradients.items()}
        if self._plain:
            return found
        divided = {name for name in found if has_momentum(self._owned[name])}
        for name in found.keys() - divided:
            found[name] = preconditioner_of(self._owned[name])(found[name])

        def gathered(name: str, owner: int) -> tuple[Tensor, Tensor] | None:
            momentum, g = (on_owner(x, owner) for x in (self._owned[name].state["momentum_buffer"], found[name]))
            return None if momentum is None or g is None else (momentum, g)

        def compute(name: str, inputs: tuple[Tensor, Tensor]) -> Tensor:
            momentum, g = inputs
            return preconditioner_of(replace(self._owned[name], state={"momentum_buffer": momentum}))(g)

        def keep(name: str, direction: Tensor | None, owner: int) -> None:
            found[name] = from_owner(direction, owner, found[name], found[name].dtype)

        shared_work({name: direction_flops(g) for name, g in found.items() if name in divided}, gathered, compute, keep)
        return found


def has_momentum(one: Owned) -> bool:
    """Whether P_t of a parameter takes products of whole matrices: Muon's, after its first step."""
    return isinstance(one.optimizer, torch.optim.Muon) and "momentum_buffer" in one.state


def inner_from(inner: Tensor | None, owner: int, momentum: Tensor) -> Float[Tensor, "k k"]:
    """The owner's ``muon_inner`` of a momentum on every process."""
    side = min(momentum.shape)
    return broadcast(inner, owner, (side, side), torch.promote_types(momentum.dtype, torch.float32), momentum.device)


def direction_flops(g: Float[Tensor, "o i"]) -> int:
    """Of Muon's P_t made and applied to g: 6 o i^2 + 2 i^3 where o > i, else 4 o^2 i + 2 o^3."""
    o, i = g.shape
    return inner_flops(o, i) + left_flops(o, i, i)


def newton_schulz_flops(o: int, i: int, steps: int) -> int:
    """Of Newton-Schulz: each iteration X X^T, its square, and their product with X, on the shorter side k."""
    k = min(o, i)
    return steps * (4 * k * o * i + 2 * k**3)


# Division of work ---------------------------------------------------------------------------------


def place() -> tuple[int, int]:
    """(rank, size) among the processes of the run."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def shared_work(
    costs: Mapping[Key, int],
    gathered: Callable[[Key, int], Inputs | None],
    compute: Callable[[Key, Inputs], Tensor],
    keep: Callable[[Key, Tensor | None, int], None],
) -> None:
    """Compute something for every key, each on one process; all processes call this together.

    Keys are taken by falling cost, ties in the order given, as many at a time as there are processes, the k-th by
    process k.  No process does more than the mean of all plus one key's cost, and each holds one key's inputs at a
    time.

    Args:
        costs: the same on every process.
        gathered: (key, owner) -> the inputs on the owner, None elsewhere; may communicate.
        compute: (key, inputs) -> the result; on the owner alone.
        keep: (key, result on the owner and None elsewhere, owner); may communicate.
    """
    rank, size = place()
    order = sorted(costs, key=costs.__getitem__, reverse=True)
    for start in range(0, len(order), size):
        turn = order[start : start + size]
        everyones = [gathered(key, owner) for owner, key in enumerate(turn)]
        results = [compute(turn[rank], mine) for mine in everyones if mine is not None]
        for owner, key in enumerate(turn):
            keep(key, results[0] if owner == rank else None, owner)


def broadcast(
    x: Tensor | None, owner: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The owner's x, which is of that shape and dtype, on every process."""
    whole = torch.empty(shape, dtype=dtype, device=device) if x is None else x.contiguous()
    if place()[1] > 1:
        dist.broadcast(whole, src=owner)
    return whole


def on_owner(x: Float[Tensor, "o i"], owner: int) -> Float[Tensor, "o i"] | None:
    """x whole on its owner, None elsewhere.  Sends o i / size numbers a process if x is sharded, else nothing.

    Raises:
        ValueError: for shards that are not those of ``fully_shard`` over all processes.
    """
    rank, size = place()
    if not isinstance(x, DTensor):
        return x if rank == owner else None
    part = padded(x.to_local(), rows_of(x))
    parts = [torch.empty_like(part) for _ in range(size)] if rank == owner else None
    dist.gather(part, parts, dst=owner)
    return None if parts is None else torch.cat(parts)[: len(x)]


def from_owner(
    whole: Float[Tensor, "o i"] | None, owner: int, like: Float[Tensor, "o i"], dtype: torch.dtype
) -> Float[Tensor, "o i"]:
    """The owner's result, which is of that dtype, sharded as ``like`` is; errors as ``on_owner``."""
    if not isinstance(like, DTensor):
        return broadcast(whole, owner, like.shape, dtype, like.device)
    local, rows = like.to_local(), rows_of(like)
    part = local.new_empty(rows, like.shape[1], dtype=dtype)
    parts = None if whole is None else list(padded(whole, rows * place()[1]).split(rows))
    dist.scatter(part, parts, src=owner)
    return DTensor.from_local(part[: len(local)], like.device_mesh, like.placements, run_check=False,
                              shape=like.shape, stride=like.stride())


def padded(x: Float[Tensor, "r i"], rows: int) -> Float[Tensor, "rows i"]:
    """x with rows of zeros after it; x itself if it has as many."""
    return x.contiguous() if len(x) == rows else torch.cat([x, x.new_zeros(rows - len(x), x.shape[1])])


def rows_of(x: DTensor) -> int:
    """Rows of a matrix on each process but the last ones, which have fewer or none."""
    size = place()[1]
    if tuple(x.placements) != (Shard(0),) or x.device_mesh.size() != size:
        raise ValueError(f"a matrix of Muon must be sharded by rows over all {size} processes, as fully_shard does on "
                         f"a mesh of one dimension; got {x.placements} on {x.device_mesh}")
    return -(-x.shape[0] // size)


class ShardedMuon(torch.optim.Muon):
    """torch.optim.Muon on all processes of a run, each orthogonalising its share of the matrices (module docstring).

    All processes step together.  Momentum stays where the weights are, sharded or not.  One process's step is that of
    torch.optim.Muon bit for bit.

    Cost: a process's share of Newton-Schulz.  Directions and updates travel in bfloat16, in which Newton-Schulz runs
        anyway: o i / size numbers a matrix and process each way where weights are sharded, else the update, o i
        numbers, to every process.

    Raises:
        RuntimeError: on every process, before anything changes, for a parameter with a gradient on some of them alone.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        everything = [(p, group) for group in self.param_groups for p in group["params"]]
        check_gradients([p for p, _ in everything])
        todo = {k: one for k, one in enumerate(everything) if one[0].grad is not None}

        def gathered(k: int, owner: int) -> Tensor | None:
            return on_owner(self._direction(*todo[k]), owner)

        def compute(k: int, whole: Tensor) -> Tensor:
            group = todo[k][1]
            return _zeropower_via_newtonschulz(whole, group["ns_coefficients"], group["ns_steps"], group["eps"])

        def keep(k: int, update: Tensor | None, owner: int) -> None:
            p, group = todo[k]
            rate = float(group["lr"])
            step = from_owner(update, owner, p, torch.bfloat16)
            p.mul_(1 - rate * group["weight_decay"])
            p.add_(step.to(p.dtype), alpha=-_adjust_lr(rate, group["adjust_lr_fn"], p.shape))

        costs = {k: newton_schulz_flops(p.shape[0], p.shape[1], group["ns_steps"]) for k, (p, group) in todo.items()}
        shared_work(costs, gathered, compute, keep)
        return loss

    def _direction(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """What is orthogonalised, after the momentum has taken the gradient in; bfloat16, sharded as p."""
        state, grad = self.state[p], p.grad
        assert grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum = state["momentum_buffer"]
        momentum.lerp_(grad, 1 - group["momentum"])
        direction = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        return direction.to(torch.bfloat16, copy=True)  # Newton-Schulz writes into it


def check_gradients(parameters: list[Tensor]) -> None:
    """Refuse gradients that some processes have and others have not; as ``ShardedMuon``."""
    if place()[1] == 1:
        return
    there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    least = torch.stack([there, 1 - there])
    dist.all_reduce(least, dist.ReduceOp.MIN)
    torn = (least.sum(0) == 0).nonzero().flatten().tolist()
    if torn:
        raise RuntimeError(f"parameters {torn} of Muon have a gradient on some processes and none on others; all "
                           "processes must step on gradients of the same parameters")
