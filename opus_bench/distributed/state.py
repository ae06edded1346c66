"""Optimizer state that may lie in shards (FSDP2): P_t of the whole weight, and Muon's step on it.

torch.optim.Muon takes DTensors as they are, but then runs each of its five bfloat16 products over shards: several
gathers an iteration, and sums in another order, which five steps of Newton-Schulz amplify to some percent of an
update's smallest directions.  Hence ShardedMuon.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from opus_bench.ghost import full, outside_autocast
from opus_bench.preconditioner import Preconditioner, owners, preconditioner_of


class LivePreconditioners(Mapping[str, Preconditioner]):
    """``preconditioner.preconditioners``, one weight at a time, whole also where the state is sharded.

    P_t is built when it is asked for, from state gathered from all processes (which ask together), and not kept:
    memory is that of one weight's state.  ``plain`` gives the identity in place of every P_t.
    """

    def __init__(self, optimizers: Any, parameters: dict[str, nn.Parameter], plain: bool = False) -> None:
        self._owned, self._plain = owners(optimizers, parameters), plain

    def __getitem__(self, name: str) -> Preconditioner:
        one = self._owned[name]
        if self._plain:
            return Preconditioner(learning_rate=self.rates[name])
        whole = replace(one, state={k: full(v) for k, v in one.state.items()})
        return outside_autocast(preconditioner_of)(whole)

    def __iter__(self) -> Iterator[str]:
        return iter(self._owned)

    def __len__(self) -> int:
        return len(self._owned)

    @property
    def rates(self) -> dict[str, float]:
        """eta_t of every parameter's group."""
        return {name: float(one.group["lr"]) for name, one in self._owned.items()}

    def direction(self, name: str, gradient: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        """P_t g of one weight, sharded as g is.

        AdamW's P_t acts element by element, so on the shards, without communication.  Muon's needs the whole
        matrix: momentum and g are gathered (2 o i numbers), P_t g is formed by every process, as Newton-Schulz
        is in its step, and each keeps its shard.
        """
        one = self._owned[name]
        if self._plain:
            return gradient
        if isinstance(one.optimizer, torch.optim.Muon):
            return sharded_as(self[name](full(gradient)), gradient)
        return outside_autocast(preconditioner_of)(one)(gradient)


def sharded_as(x: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process holds whole, sharded as another is; no communication."""
    if not isinstance(like, DTensor):
        return x
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


class ShardedMuon(torch.optim.Muon):
    """torch.optim.Muon whose step on a sharded parameter is its step on the whole one (module docstring).

    Momentum stays sharded.  The direction of one matrix at a time is gathered in bfloat16, in which
    Newton-Schulz runs anyway, and orthogonalised by every process; each keeps its shard.
    Cost: o i numbers of 2 bytes gathered per matrix, and Newton-Schulz on every process, as under DDP.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if not any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_one(p, p.grad, group)
        return loss

    def _step_one(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum, rate = state["momentum_buffer"], float(group["lr"])
        momentum.lerp_(grad, 1 - group["momentum"])
        direction = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        whole = full(direction.to(torch.bfloat16, copy=True))
        update = _zeropower_via_newtonschulz(whole, group["ns_coefficients"], group["ns_steps"], group["eps"])
        p.mul_(1 - rate * group["weight_decay"])
        p.add_(sharded_as(update.to(p.dtype), p), alpha=-_adjust_lr(rate, group["adjust_lr_fn"], p.shape))
