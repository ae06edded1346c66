"""Checkpoints that any number of processes writes and any other number reads (torch.distributed.checkpoint).

    FOLDER/step-00000050/          whole, since it has its name; its last file is progress.json
    FOLDER/step-00000100.tmp/      being written, or left by a process that was killed: never read
    FOLDER/step-00000100.damaged/  its bytes are no longer those that were written: never read

Every process writes its shards into the .tmp folder; when all are on disk, process 0 adds progress.json, with the
digest of every file, and renames the folder.  The one before is kept, and only older ones are deleted.  So at any
moment the newest folder with a final name is in force, and the one before where that turns out damaged.
torch.distributed.checkpoint keeps its table of contents (.metadata) as a pickle: it is read by an unpickler that knows
its classes alone, so that nothing in a checkpoint is executed.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
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

from opus_bench.archives import file_sha256
from opus_bench.distributed.world import ProcessError, World
from opus_bench.hashing import canonical, text_sha256
from opus_bench.preconditioner import owners
from opus_bench.selector import Selector

PROGRESS = "progress.json"


def newest(folder: Path) -> Path | None:
    """The newest checkpoint with a final name, None if there is none."""
    found = _named(folder)
    return found[-1] if found else None


def newest_whole(folder: Path, world: World) -> Path | None:
    """The newest checkpoint that is byte for byte what was written, None if there is none; all call this together.

    A damaged one is set aside (.damaged) with a warning.  Cost: every process reads 1 / size of the checkpoint.
    """
    while (path := newest(folder)) is not None:
        wrong = _damage(path, world)
        if not wrong:
            break
        world.together(lambda: _set_aside(path, wrong) if world.rank == 0 else None)
    # what a process left that was killed while it wrote or deleted
    world.together(lambda: _clear(folder) if world.rank == 0 else None)
    return path


def _set_aside(path: Path, wrong: str) -> None:
    aside = path.with_suffix(".damaged")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    warnings.warn(f"checkpoint {path} is damaged ({wrong}); it is not used and lies as {aside.name}; the run goes on "
                  "from an earlier checkpoint, or anew where there is none", RuntimeWarning, stacklevel=5)


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

    On disk: twice the state, three times while this writes.  For the digests every process reads 1 / size of it.

    Args:
        selector: its ``state_dict`` may hold plain values and dicts of tensors by parameter name.
        progress: plain values (JSON), the same on every process.

    Raises:
        OSError: on every process, if any cannot write its part; the checkpoint before stays in force.
    """
    final = folder / f"step-{step:08d}"
    if final.exists():
        return final
    temporary = final.with_suffix(".tmp")

    def prepare() -> tuple[dict[str, Tensor], dict[str, Any]]:
        if world.rank == 0:
            _clear(folder)
            temporary.mkdir(parents=True)
        tensors, plain = _split(selector.state_dict())
        return _tensors(model, optimizers) | tensors, plain

    try:
        tensors, plain = world.together(prepare)
        dcp.save(tensors, checkpoint_id=temporary)
        content = {"progress": dict(progress), "selector": plain, "files": _digests(temporary, world)}
        world.together(lambda: _put_in_force(temporary, final, content) if world.rank == 0 else None)
    except (dcp.api.CheckpointException, OSError, ValueError, ProcessError) as error:
        kept = newest(folder)
        raise OSError(f"the checkpoint of step {step} could not be written to {folder} ({_cause(error)}); "
                      f"{kept.name if kept else 'none'} stays in force; make room and give the same command") from error
    return final


def _put_in_force(temporary: Path, final: Path, content: dict[str, Any]) -> None:
    """Add the last file, give the folder its name, and delete what is no longer needed."""
    content["sha256"] = text_sha256(canonical(content))
    with open(temporary / PROGRESS, "w", encoding="utf-8") as file:
        json.dump(content, file, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, final)
    _sync(final.parent)
    _clear(final.parent)
    for damaged in final.parent.glob("step-*.damaged"):
        shutil.rmtree(damaged)


def read(
    path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], selector: Selector, world: World
) -> dict[str, Any]:
    """Put a checkpoint's state into the given objects, sharded as they are, and return its progress; all processes
    call this together.

    Raises:
        ValueError: on every process, for a checkpoint that is damaged or of another model or optimizer, naming it and
            the mend.
    """

    def prepare() -> tuple[dict[str, Any], dict[str, Tensor]]:
        content = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        with open(path / ".metadata", "rb") as file:
            saved = _Contents(file).load().state_dict_metadata
        named = dict(model.named_parameters())
        state: dict[str, Tensor] = {}
        for key, about in saved.items():
            if not isinstance(about, TensorStorageMetadata):
                raise ValueError(f"{key} is no tensor")
            state[key] = _empty(about, named[key.split("/")[1]])
        return content, state

    def put() -> None:
        _put(state, model, optimizers)
        tensors: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            kind, name, *rest = key.split("/")
            if kind == "selector":
                tensors.setdefault(rest[0], {})[name] = value
        selector.load_state_dict(content["selector"] | tensors)

    try:
        content, state = world.together(prepare)
        dcp.load(state, checkpoint_id=path)
        world.together(put)
        return content["progress"]
    except (Exception, dcp.api.CheckpointException) as error:
        raise ValueError(f"checkpoint {path} cannot be read ({_cause(error)}); delete it to start anew") from error


def _named(folder: Path) -> list[Path]:
    """Checkpoints with a final name, the newest last."""
    return sorted(path for path in folder.glob("step-*") if not path.suffix)


def _clear(folder: Path) -> None:
    """Delete what is half written, and all but the last checkpoint and the one before."""
    for left in [*folder.glob("step-*.tmp"), *_named(folder)[:-2]]:
        shutil.rmtree(left)


def _digests(path: Path, world: World) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint but PROGRESS, by name; each is read by one process."""

    def own() -> dict[str, str]:
        names = sorted(one.name for one in path.iterdir() if one.name != PROGRESS)
        return {name: _digest(path / name) for name in names[world.rank :: world.size]}

    everyones: list[Any] = [None] * world.size
    dist.all_gather_object(everyones, world.together(own))
    return {name: digest for one in everyones for name, digest in one.items()}


def _digest(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:  # a damage like others
        return f"cannot be read: {error.strerror}"


def _damage(path: Path, world: World) -> str:
    """In what a checkpoint is not what was written, the same on every process; empty if in nothing."""
    found = _digests(path, world)
    try:
        content = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        if content.pop("sha256") != text_sha256(canonical(content)):
            return f"{PROGRESS} has other content than was written"
        noted = content["files"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{PROGRESS} cannot be read: {_cause(error)}"
    others = sorted(name for name in {*noted, *found} if noted.get(name) != found.get(name))
    return f"{', '.join(others)} has other content than was written" if others else ""


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

