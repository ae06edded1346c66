"""Checkpoints: written whole or not at all, read without executing anything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .selector import Selector


def write_checkpoint(
    path: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    generator: torch.Generator,
    selector: Selector,
    progress: dict[str, Any],
) -> None:
    """Write all state of a run to ``path``: a temporary file beside it, fsync, rename."""
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "generator": generator.get_state(),
        "torch_rng": torch.get_rng_state(),
        "selector": selector.state_dict(),
        "progress": progress,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_checkpoint(
    path: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    generator: torch.Generator,
    selector: Selector,
) -> dict[str, Any]:
    """Put a checkpoint's state into the given objects and return its progress.

    Raises:
        ValueError: for a truncated or foreign file, naming it and the mend.
    """
    try:
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_rng"])
        selector.load_state_dict(state["selector"])
        return state["progress"]
    except Exception as error:
        raise ValueError(f"checkpoint {path} cannot be read ({type(error).__name__}); "
                         "delete it to start this run again") from error
