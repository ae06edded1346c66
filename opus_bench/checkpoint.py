"""Checkpoints: written whole or not at all, checked before they are used, read without executing anything.

The checkpoint before the last is kept beside it (name + ".previous") and takes its place when it turns out
damaged.  A damaged one is never used: it is set aside (name + ".damaged") with a warning.
"""

from __future__ import annotations

import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import first_line
from .selector import Selector


def beside(path: Path, suffix: str) -> Path:
    """A file that belongs to the checkpoint at ``path``."""
    return path.with_name(path.name + suffix)


def write_checkpoint(
    path: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    generator: torch.Generator,
    selector: Selector,
    progress: dict[str, Any],
) -> None:
    """Write all state of a run to ``path``: a temporary file beside it, fsync, rename; keep the one before.

    Killed at any moment, a whole checkpoint is left, the last or the one before.  On disk: twice the state, three
    times while this writes.

    Raises:
        OSError: for what cannot be written (a full disk), naming file and cause; the last checkpoint is untouched.
    """
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "generator": generator.get_state(),
        "torch_rng": torch.get_rng_state(),
        "selector": selector.state_dict(),
        "progress": progress,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path, ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.replace(path, beside(path, ".previous"))
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save may hide an OSError behind an error of its own
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        if not isinstance(cause, OSError):
            raise
        raise OSError(f"checkpoint {path} cannot be written ({cause.strerror}); make room and give the same command: "
                      "it goes on from the last checkpoint") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(
    path: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    generator: torch.Generator,
    selector: Selector,
) -> dict[str, Any] | None:
    """Put the state of the last checkpoint that is whole into the given objects and return its progress.

    None, and the objects as they were, where there is none.  Each damaged one is a warning that names it.

    Raises:
        ValueError: for a whole checkpoint of another run, naming it and the mend; it is left alone.
    """
    for one in (path, beside(path, ".previous")):
        if not one.exists():
            continue
        try:
            state = read_whole(one)
        except ValueError as error:
            aside = beside(path, ".damaged")
            os.replace(one, aside)
            warnings.warn(f"{error}; it is not used and lies as {aside.name}; the run goes on from an earlier "
                          "checkpoint, or anew where there is none", RuntimeWarning, stacklevel=2)
            continue
        try:
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            generator.set_state(state["generator"])
            torch.set_rng_state(state["torch_rng"])
            selector.load_state_dict(state["selector"])
            return state["progress"]
        except Exception as error:  # each of these objects refuses what is not its own in its own way
            raise ValueError(f"checkpoint {one} is not one of this run ({type(error).__name__}); give another path, or "
                             "delete it to start this run again") from error
    return None


def remove_checkpoints(path: Path) -> None:
    """Delete the checkpoint and all that belongs to it, of a run that is done."""
    for one in (path, *(beside(path, suffix) for suffix in (".previous", ".damaged", ".tmp"))):
        one.unlink(missing_ok=True)


def read_whole(path: Path) -> Any:
    """Content of a checkpoint whose every member has the checksum that torch.save wrote; no object but tensors.

    Raises:
        ValueError: for any other file.  ``torch.load`` alone reads altered weights without a word.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                altered = archive.testzip()
            if altered is not None:
                raise ValueError(f"checksum of {altered}")
            file.seek(0)
            return torch.load(file, weights_only=True)
        except Exception as error:  # damage shows in whatever reads it first
            raise ValueError(f"checkpoint {path} is damaged ({type(error).__name__}: {first_line(error)})") from error
