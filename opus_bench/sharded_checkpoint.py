"""Checkpoints that any number of processes writes and any other number reads (torch.distributed.checkpoint).

    FOLDER/step-00000050/        whole, since it has its name; its last file is progress.json
    FOLDER/step-00000100.tmp/    being written, or left by a process that was killed: never read

Every process writes its shards into the .tmp folder; when all are on disk, process 0 adds progress.json and renames
the folder, and only then deletes the one before.  So at any moment the newest folder with a final name is in force.
torch.distributed.checkpoint keeps its table of contents (.metadata) as a pickle: it is read by an unpickler that knows
its classes alone, so that nothing in a checkpoint is executed.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from .distributed import World
from .preconditioner import owners
from .selector import Selector

PROGRESS = "progress.json"


def newest(folder: Path) -> Path | None:
    """The checkpoint in force, None if there is none."""
    found = sorted(path for path in folder.glob("step-*") if path.suffix != ".tmp")
    return found[-1] if found else None


def write(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    selector: Selector,
    progress: Mapping[str, Any],
    world: World,
) -> Path:
    """Write all state of a run after ``step`` steps; all processes call this together.

    Args:
        selector: its ``state_dict`` may hold plain values and dicts of tensors by parameter name.
        progress: plain values (JSON), the same on every process.

    Raises:
        OSError: if it cannot be written; the checkpoint before stays in force.
    """
    final = folder / f"step-{step:08d}"
    if final.exists():
        return final
    temporary = final.with_suffix(".tmp")
    tensors, plain = _split(selector.state_dict())
    if world.rank == 0:
        for left in folder.glob("step-*.tmp"):
            shutil.rmtree(left)
        temporary.mkdir(parents=True)
    dist.barrier()
    try:
        dcp.save(_tensors(model, optimizers) | tensors, checkpoint_id=temporary)
    except dcp.api.CheckpointException as error:
        kept = newest(folder)
        raise OSError(f"the checkpoint of step {step} could not be written to {folder} ({_cause(error)}); "
                      f"{kept.name if kept else 'none'} stays in force") from error
    if world.rank == 0:
        with open(temporary / PROGRESS, "w", encoding="utf-8") as file:
            json.dump({"progress": dict(progress), "selector": plain}, file, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, final)
        _sync(folder)
        for older in folder.glob("step-*"):
            if older != final:
                shutil.rmtree(older)
    dist.barrier()
    return final


def read(
    path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], selector: Selector
) -> dict[str, Any]:
    """Put a checkpoint's state into the given objects, sharded as they are, and return its progress.

    Raises:
        ValueError: for a checkpoint that is damaged or of another model or optimizer, naming it and the mend.
    """
    try:
        content = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        with open(path / ".metadata", "rb") as file:
            saved = _Contents(file).load().state_dict_metadata
        named = dict(model.named_parameters())
        state: dict[str, Tensor] = {}
        for key, about in saved.items():
            if not isinstance(about, TensorStorageMetadata):
                raise ValueError(f"{key} is no tensor")
            state[key] = _empty(about, named[key.split("/")[1]])
        dcp.load(state, checkpoint_id=path)
        _put(state, model, optimizers)
        tensors: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            kind, name, *rest = key.split("/")
            if kind == "selector":
                tensors.setdefault(rest[0], {})[name] = value
        selector.load_state_dict(content["selector"] | tensors)
        return content["progress"]
    except (Exception, dcp.api.CheckpointException) as error:
        raise ValueError(f"checkpoint {path} cannot be read ({_cause(error)}); delete it to start anew") from error


def _sync(folder: Path) -> None:
    """Put a folder's new names on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _Contents(pickle.Unpickler):
    """Reads the table of contents; whatever is no class of it, torch's dtypes and shapes or a path is refused."""

    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) in (("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"))
        if module in ("torch", "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"):
            found = super().find_class(module, name)
            known = found is torch.Size or isinstance(found, torch.dtype) or (
                isinstance(found, type) and found.__module__ == module
                and (is_dataclass(found) or issubclass(found, Enum)))
        if not known:
            raise pickle.UnpicklingError(f"its .metadata names {module}.{name}, which no checkpoint does")
        return super().find_class(module, name)


def _cause(error: BaseException) -> str:
    """What went wrong, of all processes, without their stacks."""
    causes = [one for one, _ in error.failures.values()] if isinstance(error, dcp.api.CheckpointException) else [error]
    return "; ".join(sorted({f"{type(one).__name__}: {one}" for one in causes}))


def _tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """All tensors of model and optimizers, as model/NAME and optimizer/NAME/KEY."""
    named = dict(model.named_parameters())
    state: dict[str, Tensor] = {f"model/{name}": p.detach() for name, p in named.items()}
    for name, one in owners(optimizers, named).items():
        state |= {f"optimizer/{name}/{key}": value for key, value in one.state.items()}
    return state


def _put(state: Mapping[str, Tensor], model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    named = dict(model.named_parameters())
    owned = owners(optimizers, named)
    missing = [name for name in named if f"model/{name}" not in state]
    if missing:
        raise ValueError(f"{', '.join(missing)} is not in it")
    for key, value in state.items():
        kind, name, *rest = key.split("/")
        if kind == "model":
            with torch.no_grad():
                named[name].copy_(value)
        elif kind == "optimizer":
            one = owned[name]
            one.optimizer.state[one.parameter][rest[0]] = value


def _empty(about: TensorStorageMetadata, parameter: nn.Parameter) -> Tensor:
    """Room for a tensor: sharded as the parameter if it has its elements, else whole on the CPU (step counters)."""
    dtype = about.properties.dtype
    if about.size and about.size.numel() == parameter.numel():
        return torch.empty_like(parameter, dtype=dtype).detach().view(about.size)
    return torch.empty(about.size, dtype=dtype)


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A selector's state as tensors (selector/NAME/KEY) and plain values."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Mapping) and value and all(isinstance(x, Tensor) for x in value.values()):
            tensors |= {f"selector/{name}/{key}": x for name, x in value.items()}
        else:
            plain[key] = value
    return tensors, plain

