"""What ``opus-bench validate --model`` will do, found out before any weight is loaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..layers import layer_names, parameter_names
from .own_inputs import model_outline, sequences
from .own_settings import OwnSettings

LENGTH = 512  # tokens; the paper's score window


@dataclass(frozen=True)
class Plan:
    """What will be done: settings with nothing left open, sequences, and memory in bytes."""

    settings: OwnSettings
    architecture: str
    parameters: int
    scored_layers: int
    scored_parameters: int
    candidates: Int[Tensor, "n t"]
    training: Int[Tensor, "s t"]  # optimizer_steps times batch_size sequences
    proxies: tuple[tuple[Tensor, Tensor], ...]  # pairs without a sequence in common
    sequences: dict[str, int]  # in the data, and in the proxy's data
    memory: dict[str, int]  # bytes that are held at least, by what for
    free: int  # bytes
    oracle_reason: str | None  # why the oracle is not run

    @property
    def plain(self) -> dict[str, Any]:
        """What a report says of it, as values that JSON knows."""
        s = self.settings
        return {
            "settings": s.plain(),
            "model": {"architecture": self.architecture, "parameters": self.parameters,
                      "scored_layers": self.scored_layers, "scored_parameters": self.scored_parameters},
            "sequences": self.sequences, "tokens_trained_on": self.training.numel(),
            "hashed_numbers": len(s.widths) * s.hash_seeds * s.candidates * self.scored_parameters,
            "memory_at_least": self.memory, "memory_free": self.free, "oracle_reason": self.oracle_reason,
        }


def prepare(settings: OwnSettings) -> Plan:
    """Read config and data of files that were checked; no weights are loaded.

    Raises:
        ValueError: for a model that cannot be had or scored, too few tokens, ids outside the vocabulary, and
            memory that cannot suffice.
    """
    import psutil

    model = model_outline(settings)
    settings = _settled(settings, model)
    names = layer_names(model, list(settings.layers))
    scored = parameter_names(model, names)
    assert settings.length is not None
    data = sequences(settings.data, settings, settings.length)
    other = None if settings.proxy_data is None else sequences(settings.proxy_data, settings, settings.length)
    candidates, training, proxies = _drawn(data, other, settings)
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    used = [(settings.data, candidates), (settings.data, training)]
    used += [(settings.proxy_data or settings.data, p) for pair in proxies for p in pair]
    for path, batch in used:
        if len(batch) and not 0 <= int(batch.min()) <= int(batch.max()) < vocabulary:
            raise ValueError(f"{path} has token ids from {int(batch.min())} to {int(batch.max())}, the model's "
                             f"vocabulary {vocabulary}; was it made with this model's tokenizer?")
    memory, free = memory_needed(model, names, settings), psutil.virtual_memory().available
    scoring_needs = max(memory["optimizer steps"], memory["scoring"])
    if scoring_needs > free:
        raise ValueError(f"at least {scoring_needs / 1e9:.1f} GB of memory are needed, {free / 1e9:.1f} are free; "
                         "lower --candidates, --batch-size or --length, or name fewer --layers")
    reason = None
    if not settings.oracle_candidates:
        reason = "oracle_candidates is 0"
    elif memory["oracle"] > free:
        reason = (f"needs at least {memory['oracle'] / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free; lower "
                  "--oracle-candidates")
    counts = {"data": len(data)} | ({} if other is None else {"proxy_data": len(other)})
    return Plan(settings, type(model).__name__, sum(p.numel() for p in model.parameters()), len(names),
                sum(p.numel() for p in scored.values()), candidates, training, proxies, counts, memory, free, reason)


def _settled(settings: OwnSettings, model: nn.Module) -> OwnSettings:
    """The settings with length and windows filled in and checked."""
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    length = settings.length or int(min(LENGTH, context))
    if length > context:
        raise ValueError(f"length {length} is longer than the model's context of {context} tokens; lower --length")
    windows = settings.windows
    if windows is None:
        windows = tuple(window for window in (length // 4, length // 2) if window > 1)
    for window in windows:
        if not 1 < window < length:
            raise ValueError(f"a shorter window must have 2 to {length - 1} tokens, fewer than length, got {window}")
    return dataclasses.replace(settings, length=length, windows=windows, optimizer_steps=settings.steps)


def _drawn(
    data: np.ndarray, proxy_data: np.ndarray | None, s: OwnSettings
) -> tuple[Tensor, Tensor, tuple[tuple[Tensor, Tensor], ...]]:
    """Candidates, sequences to train on and pairs of proxies: no sequence of a file serves two purposes."""
    own = s.candidates + s.steps * s.batch_size
    shared = 0 if s.proxy_data else 2 * s.proxy_size
    needs = [(s.data, data, own + shared)]
    if s.proxy_data and proxy_data is not None:
        needs.append((s.proxy_data, proxy_data, 2 * s.proxy_size))
    for path, array, want in needs:
        count, length = array.shape
        if count < want:
            raise ValueError(f"{path} has {count * length:,} tokens in whole sequences of {length}, "
                             f"{want * length:,} are needed ({want} sequences); give more, or lower --length, "
                             "--candidates, --optimizer-steps, --batch-size or --proxy-size")
    rng = np.random.default_rng([s.seed, 0])
    order = rng.permutation(len(data))
    source, pool = (data, order[own:]) if proxy_data is None else (proxy_data, np.arange(len(proxy_data)))

    def taken(array: np.ndarray, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(array[rows]).astype(np.int64))

    pairs = []
    for _ in range(s.proxy_pairs):
        batch = taken(source, rng.choice(pool, 2 * s.proxy_size, replace=False))
        pairs.append((batch[: s.proxy_size], batch[s.proxy_size :]))
    return taken(data, order[: s.candidates]), taken(data, order[s.candidates : own]), tuple(pairs)


def memory_needed(model: nn.Module, names: Sequence[str], s: OwnSettings) -> dict[str, int]:
    """Bytes held at once by each phase, from below: activations inside layers are not counted."""
    assert s.length is not None
    item = getattr(torch, s.dtype).itemsize
    modules = dict(model.named_modules())
    parameters = sum(p.numel() for p in model.parameters())
    scored = sum(p.numel() for p in parameter_names(model, names).values())
    state = {"sgd": 1, "adamw": 2, "muon": 1}[s.optimizer] * parameters
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]

    def factors(module: nn.Module) -> int:
        """Numbers of a layer's input and output gradient per token."""
        shape = tuple(next(module.parameters(recurse=False)).shape)  # the weight's
        if isinstance(module, nn.Linear | Conv1D):
            return sum(shape)
        return shape[-1] * (1 if isinstance(module, nn.Embedding) else 2)

    per_token = sum(factors(modules[name]) for name in names)
    held = (parameters + state) * item
    per_candidate = s.length * (per_token + 2 * vocabulary) * item  # with logits and their gradient
    double = 8 * (parameters + state + (s.oracle_candidates + 2) * scored)
    return {
        "optimizer steps": held + parameters * item + s.batch_size * s.length * 2 * vocabulary * item,
        "scoring": held + 2 * scored * item + s.candidates * per_candidate,
        "oracle": held + double + s.oracle_candidates * per_candidate * 8 // item,
    }
