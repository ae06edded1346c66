"""Weights that one process reads and all receive, a part of the model at a time.

Every process has the outline of the model on the meta device, without memory; process 0 also has the model itself on
the CPU, which the others receive part by part.  Where each part is sharded before the next one is received, no device
holds more than its shards and the largest part.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opus_bench.distributed.world import World


def held(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Qualified name, module, attribute and value of every tensor of a model, a shared one once for every place.

    Parameters, buffers (persistent or not) and tensors that modules keep as plain attributes.
    """
    for prefix, module in model.named_modules():
        for kind in (module._parameters, module._buffers, vars(module)):
            for key, value in kind.items():
                if isinstance(value, Tensor):
                    yield f"{prefix}.{key}".removeprefix("."), module, key, value


def receiver(
    model: nn.Module, read: Callable[[], nn.Module] | None, world: World
) -> Callable[[nn.Module], None] | None:
    """What gives parts of an outline their values, read by process 0 now; None for a model that has its weights.

    All processes call this together, and then what it returns.

    Raises:
        ValueError: on every process, if there is nothing to read, or it has other tensors than the outline, naming
            them.  What ``read`` raises is raised on every process too.
    """
    if not any(value.is_meta for _, _, _, value in held(model)):
        return None

    def values() -> dict[str, Tensor]:
        if world.rank != 0:
            return {}
        if read is None:
            raise ValueError("the model is on the meta device, and nothing says how its weights are read")
        found = {name: value.detach() for name, _, _, value in held(read())}
        kinds = {name: (value.shape, value.dtype) for name, value in found.items()}
        lacking = [name for name, _, _, value in held(model)
                   if value.is_meta and kinds.get(name) != (value.shape, value.dtype)]
        if lacking:
            raise ValueError(f"what was read lacks, or has in another shape or type, {', '.join(lacking)}")
        return found

    return functools.partial(_receive, model, world.together(values), world)


def _receive(model: nn.Module, values: dict[str, Tensor], world: World, part: nn.Module) -> None:
    """Put process 0's values in place of a part's tensors on the meta device, on every process' own device.

    Tensors that places of the model share stay shared.
    """
    places: dict[int, list[tuple[str, nn.Module, str, Tensor]]] = defaultdict(list)
    for place in held(model):
        places[id(place[3])].append(place)
    for outline in {id(value): value for _, _, _, value in held(part) if value.is_meta}.values():
        if world.rank == 0:
            value = values[places[id(outline)][0][0]].to(world.device).contiguous()
        else:
            value = torch.empty(outline.shape, dtype=outline.dtype, device=world.device)
        if world.size > 1:
            dist.broadcast(value, src=0)
        if isinstance(outline, nn.Parameter):
            value = nn.Parameter(value, outline.requires_grad)
        for _, module, key, _ in places[id(outline)]:
            setattr(module, key, value)
