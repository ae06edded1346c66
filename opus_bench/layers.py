"""Which weights are scored: layers by name, by pattern or by kind.

    linear      Linear and Conv1D but the output head
    head        the output head
    embedding   token and position embeddings
    norm        LayerNorm, RMSNorm and their kin: a weight, perhaps a bias, per feature

    blocks      = linear, the choice of the paper and of its released code
    matrices    = linear, head, embedding
    all         = matrices, norm; an error if a trainable parameter is left out
Only what is trained is scored: a frozen module is not chosen by kind and is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

LINEAR_KINDS = (nn.Linear, Conv1D)
KINDS = ("linear", "head", "embedding", "norm")
PRESETS = {"blocks": ("linear",), "matrices": ("linear", "head", "embedding"), "all": KINDS}


def kind_of(module: nn.Module, head: nn.Module | None = None) -> str | None:
    """One of KINDS, or None for a module whose own parameters cannot be scored.

    A norm is known by its class or by its name (transformers has one RMSNorm class a model) and a
    weight per feature; that its output is weight * f(input) + bias is checked when it is observed.
    """
    if isinstance(module, LINEAR_KINDS):
        return "head" if module is head else "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    weight = getattr(module, "weight", None)
    named_so = type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
    if named_so and isinstance(weight, nn.Parameter) and weight.ndim == 1:
        return "norm"
    return None


def layer_names(model: nn.Module, layers: str | Sequence[str] = "blocks") -> list[str]:
    """Names of the modules whose weights are scored, in the model's order.

    Args:
        layers: "blocks", "matrices", "all" or a kind (module docstring); the name of a module; a
            pattern such as "*.mlp.*"; or several of these.

    Raises:
        ValueError: for an unknown name, a module of a kind that cannot be scored or that is frozen, a
            compiled model, and for "all" when a trainable parameter belongs to no module that can be
            scored (it is named).
    """
    refuse_compiled(model)
    modules = dict(model.named_modules())
    output_embeddings: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = output_embeddings()
    kinds = {name: kind_of(module, head) for name, module in modules.items()}
    trained = {name for name, kind in kinds.items() if kind and _trainable(modules[name])}
    chosen: set[str] = set()
    for wanted in [layers] if isinstance(layers, str) else layers:
        if wanted in PRESETS or wanted in KINDS:
            chosen |= {name for name in trained if kinds[name] in PRESETS.get(wanted, (wanted,))}
        elif any(letter in wanted for letter in "*?["):
            found = {name for name in trained if fnmatchcase(name, wanted)}
            if not found:
                raise ValueError(f"no layer that can be scored matches {wanted!r}")
            chosen |= found
        else:
            chosen.add(_checked(wanted, modules, kinds, trained))
        if wanted == "all":
            _refuse_leaving_out(model, modules, trained)
    if not chosen:
        raise ValueError(f"layers={layers!r} selects no layer of {type(model).__name__}")
    return [name for name in modules if name in chosen]


def _trainable(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))


def _checked(name: str, modules: dict, kinds: dict, trained: set[str]) -> str:
    if name not in modules:
        raise ValueError(f"no layer named {name!r}; {', '.join(map(repr, (*PRESETS, *KINDS)))}, names of modules "
                         "or patterns such as '*.mlp.*'")
    if kinds[name] is None:
        raise ValueError(f"layer {name!r} is a {type(modules[name]).__name__}; only Linear, Conv1D, Embedding, "
                         "LayerNorm and RMSNorm modules can be scored")
    if name not in trained:
        raise ValueError(f"layer {name!r} is frozen (requires_grad is False); nothing of it is trained")
    return name


def _refuse_leaving_out(model: nn.Module, modules: dict, trained: set[str]) -> None:
    covered = {id(p) for name in trained for p in modules[name].parameters(recurse=False)}
    missed = [k for k, p in model.named_parameters() if p.requires_grad and id(p) not in covered]
    if missed:
        raise ValueError(f"layers='all' cannot score {', '.join(missed)}: no Linear, Conv1D, Embedding, LayerNorm "
                         "or RMSNorm module owns it; use layers='matrices' to leave it out")


def parameter_names(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """The trainable parameters of the named modules under their canonical names, tied ones once."""
    canonical = {id(p): name for name, p in model.named_parameters()}
    modules = dict(model.named_modules())
    return {
        canonical[id(p)]: p
        for name in names for p in modules[name].parameters(recurse=False) if p.requires_grad
    }


def refuse_compiled(model: nn.Module) -> None:
    """Raise ValueError for a compiled model, whose hooks would silently see nothing."""
    if any(isinstance(m, torch._dynamo.OptimizedModule) or m._compiled_call_impl is not None
           for m in model.modules()):
        raise ValueError("the model is compiled, so its layers cannot be observed; "
                         "give the selector the plain model and compile a copy that shares its weights")
