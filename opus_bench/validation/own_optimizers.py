"""Optimizers of a user's model: new ones, or with the state that a training run saved."""

from __future__ import annotations

import pickle

import torch
from torch import nn

from ..layers import layer_names
from .own_settings import OPTIMIZERS, OwnSettings

BETAS, MOMENTUM = (0.9, 0.95), 0.95  # AdamW's [paper, 8B model]; Muon's and SGD's


def build_optimizers(model: nn.Module, settings: OwnSettings) -> list[torch.optim.Optimizer]:
    """SGD with momentum; AdamW; or Muon for matrices of linear layers (no head, no embedding) and AdamW.

    Without weight decay, which is no part of P_t.
    """
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    rate = settings.lr or OPTIMIZERS[settings.optimizer]
    if settings.optimizer == "sgd":
        return [torch.optim.SGD(named.values(), lr=rate, momentum=MOMENTUM)]
    if settings.optimizer == "adamw":
        return [torch.optim.AdamW(named.values(), lr=rate, betas=BETAS, weight_decay=0.0)]
    modules = dict(model.named_modules())
    linear = {id(modules[name].weight) for name in layer_names(model, "linear")}
    matrices = [p for p in named.values() if id(p) in linear]
    rest = [p for p in named.values() if id(p) not in linear]
    muon = torch.optim.Muon(matrices, lr=rate, momentum=MOMENTUM, weight_decay=0.0)
    adam_rate = settings.adam_lr or OPTIMIZERS["adamw"]
    return [muon] + ([torch.optim.AdamW(rest, lr=adam_rate, betas=BETAS, weight_decay=0.0)] if rest else [])


def read_optimizer_state(model: nn.Module, settings: OwnSettings) -> list[torch.optim.Optimizer]:
    """The optimizers of ``build_optimizers`` with the state of a file, rates of the file but where given.

    The file holds a state_dict(), or for Muon a list: Muon's, then AdamW's.  Parameters are in the
    model's order, or as transformers' Trainer groups them: with weight decay, then without.

    Raises:
        ValueError: for a state of other groups, sizes or shapes than the model's, and for a rate of zero.
    """
    path, optimizers = settings.optimizer_state, build_optimizers(model, settings)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"cannot read an optimizer's state of {path} ({error})") from error
    states = content if isinstance(content, list | tuple) else [content]
    if len(states) != len(optimizers) or not all(
            isinstance(s, dict) and {"state", "param_groups"} <= s.keys() for s in states):
        kinds = " then ".join(type(o).__name__ for o in optimizers)
        raise ValueError(f"{path} must hold the state_dict() of {kinds}" + " in a list" * (len(optimizers) > 1))
    names = {id(p): k for k, p in model.named_parameters()}
    for number, (optimizer, state) in enumerate(zip(optimizers, states)):
        if len(state["param_groups"]) == 2:
            optimizers[number] = optimizer = _grouped_as_trainer(model, optimizer)
        try:
            optimizer.load_state_dict(state)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path} does not fit {type(optimizer).__name__} of this model: {error}") from error
        rate = settings.adam_lr if number else settings.lr
        for group in optimizer.param_groups:
            group["lr"] = rate or group["lr"]
            if not float(group["lr"]) > 0:
                raise ValueError(f"the rate in {path} is {group['lr']:g}, which makes every utility 0; give --lr")
            for p in group["params"]:
                for key, value in optimizer.state[p].items():
                    if torch.is_tensor(value) and value.ndim and value.shape != p.shape:
                        raise ValueError(f"{key} of {names[id(p)]} in {path} has shape {tuple(value.shape)}, the "
                                         f"parameter {tuple(p.shape)}; was it saved for this model and optimizer?")
    return optimizers


def _grouped_as_trainer(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    from transformers import Trainer

    decayed = set(Trainer.get_decay_parameter_names(None, model))
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = [(k, p) for k, p in model.named_parameters() if id(p) in owned]
    groups = [p for k, p in named if k in decayed], [p for k, p in named if k not in decayed]
    return type(optimizer)([{"params": some} for some in groups], lr=1.0)  # all options come with the state
