"""The options of ``reproduce.pretrain`` and the plan that they settle: a preset of the paper and what overrides it."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from opus_bench.distributed import PARALLELISM
from opus_bench.layers import layer_names, parameter_names
from opus_bench.model import SIZES
from opus_bench.pretrain import PretrainConfig
from opus_bench.shared_selection import SCOPES

from .presets import METHODS, PRESETS, Preset, steps_for

ROOT = Path(__file__).resolve().parent.parent
# options that stand for a field of PretrainConfig: (option, type, metavar, help)
FIELDS = [
    ("length", int, "N", "tokens per training sequence"),
    ("buffer", int, "N", "candidate sequences per step, of all processes together"),
    ("selection-ratio", float, "X", "share of the candidates that is trained on, in (0, 1]"),
    ("proxy-size", int, "N", "proxy sequences per step, of all processes together"),
    ("adam-lr", float, "X", "peak learning rate of AdamW"),
    ("muon-lr", float, "X", "peak learning rate of Muon"),
    ("weight-decay", float, "X", "of both optimizers"),
    ("clip", float, "X", "largest norm of the gradient"),
    ("warmup", float, "X", "first share of the steps, in which the rate rises"),
    ("cooldown", float, "X", "last share of the steps, in which the rate falls to 0"),
    ("validation-every", int, "N", "steps between validation losses"),
    ("validation-sequences", int, "N", "sequences of a validation loss"),
    ("checkpoint-every", int, "N", "steps between checkpoints"),
    ("microbatch", int, "N", "sequences in one forward and backward of a process"),
]
CHOICES = [
    ("optimizer", ("adamw", "muon"), "muon: block matrices by Muon, the rest by AdamW"),
    ("selection", SCOPES, "global: from all candidates; local: each process from its own share of them"),
    ("parallelism", PARALLELISM, "fsdp2: weights in shards; ddp: all weights on every process"),
    ("precision", ("float32", "bfloat16"), "of matrix products"),
]


def parser(description: str) -> argparse.ArgumentParser:
    """The options."""
    top = argparse.ArgumentParser(prog="python -m reproduce.pretrain", description=description,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--model", required=True, metavar="NAME",
                     help=f"{', '.join(PRESETS)}; a size ({', '.join(SIZES)}); or a folder or hub id of a causal "
                          "language model in safetensors")
    top.add_argument("--data", required=True, metavar="POOL", help="token shards that candidates are drawn from")
    top.add_argument("--proxy", required=True, metavar="POOL", help="token shards of the proxy")
    top.add_argument("--validation", default=None, metavar="POOL", help="held-out token shards (default: no such loss)")
    top.add_argument("--method", choices=tuple(METHODS), default="opus-calibrated",
                     help="how candidates are chosen (default: %(default)s)")
    top.add_argument("--tokens", type=float, default=None, metavar="N",
                     help="tokens to train on (default: the preset's)")
    top.add_argument("--steps", type=int, default=None, metavar="N",
                     help="optimizer updates, in place of --tokens (default: from the tokens)")
    for name, kind, metavar, what in FIELDS:
        top.add_argument(f"--{name}", type=kind, default=None, metavar=metavar, help=f"{what} (default: the preset's)")
    for name, known, what in CHOICES:
        top.add_argument(f"--{name}", choices=known, default=None, help=f"{what} (default: the preset's)")
    top.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=None,
                     help="recompute activations block by block (default: the preset's)")
    top.add_argument("--window", type=int, default=None, metavar="N",
                     help="tokens scored per sequence, and of a proxy sequence (default: 512)")
    top.add_argument("--sketch-width", type=int, default=None, metavar="N",
                     help="buckets per weight, of opus-paper and opus-released (default: 8192)")
    top.add_argument("--score-microbatch", type=int, default=None, metavar="N",
                     help="candidates in one scoring pass of a process, of the opus methods (default: all)")
    top.add_argument("--seed", type=int, default=0, metavar="N",
                     help="of weights made anew, the order of the data and draws (default: %(default)s)")
    top.add_argument("--results", type=Path, default=ROOT / "results" / "pretrain", metavar="FOLDER",
                     help="gets runs/ with the record and work/ with checkpoints (default: results/pretrain)")
    top.add_argument("--save", type=Path, default=None, metavar="FOLDER",
                     help="also write the trained model, safetensors (default: none is written)")
    top.add_argument("--trust-remote-code", action="store_true",
                     help="run code that comes with the model (default: refuse)")
    top.add_argument("--dry-run", action="store_true", help="print the plan and stop (default: go on)")
    return top


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run, settled but for its pools and model."""

    preset: Preset
    where: str  # a size of SIZES, a folder or a hub id
    config: PretrainConfig
    method: str
    options: dict[str, Any]  # of the selector
    deviations: tuple[str, ...]

    def settings(self, processes: int) -> dict[str, Any]:
        """The record's config: all that determines the numbers but data and code."""
        return {**self.config.identity(processes), "model": self.where, "method": self.method,
                "selector": METHODS[self.method].selector, "selector_options": self.options}


def settle(options: argparse.Namespace) -> Plan:
    """The preset with what the options override.

    Raises:
        ValueError: for a value that makes no sense, naming it.
    """
    name = options.model if options.model in PRESETS else "gpt2-large" if options.model in SIZES else "qwen3-8b"
    preset, method = PRESETS[name], METHODS[options.method]
    where = preset.model if options.model in PRESETS else options.model
    given: dict[str, Any] = {"seed": options.seed}
    if method.proxy_size is not None:
        given["proxy_size"] = method.proxy_size
    for field in [*(f[0] for f in FIELDS), *(c[0] for c in CHOICES), "checkpointing"]:
        field = field.replace("-", "_")
        if getattr(options, field) is not None:
            given[field] = getattr(options, field)
    selector_options = dict(method.options)
    if options.window is not None:
        given["proxy_length"] = options.window
        if "window" in method.options:
            selector_options["window"] = options.window
    if options.sketch_width is not None:
        if "sketch_width" not in method.options:
            raise ValueError(f"--sketch-width is of the opus methods with a sketch, not of {options.method}; "
                             "leave it out")
        selector_options["sketch_width"] = options.sketch_width
    if options.score_microbatch is not None:
        if method.selector != "opus":
            raise ValueError(f"--score-microbatch is of the opus methods, not of {options.method}; leave it out")
        selector_options["microbatch"] = options.score_microbatch
    config = dataclasses.replace(preset.config, **given)
    if options.steps is not None and options.tokens is not None:
        raise ValueError("--steps and --tokens say the same; give one of them")
    steps = options.steps if options.steps is not None else steps_for(
        options.tokens if options.tokens is not None else preset.tokens, config.selected_size, config.length)
    config = dataclasses.replace(config, steps=steps)
    if method.selector == "opus" and config.precision == "bfloat16":
        selector_options["scoring_dtype"] = "bfloat16"
    changed = [f"{f.name} {getattr(config, f.name)} instead of {getattr(preset.config, f.name)}"
               for f in dataclasses.fields(config)
               if f.name not in ("seed", "optimizer") and getattr(config, f.name) != getattr(preset.config, f.name)]
    other = [] if where == preset.model else [f"model {Path(where).name} instead of {preset.model}"]
    return Plan(preset, where, config, options.method, selector_options,
                (*other, *changed, *method.deviations, *preset.decided))


def text(plan: Plan, processes: int, pools: dict[str, Any], identity: str, model: nn.Module) -> str:
    """The plan in lines: sizes, shares, memory, data."""
    c, count = plan.config, sum(p.numel() for p in model.parameters())
    lines = [
        f"model        {plan.where}, {count:,} parameters; settings of {plan.preset.item}",
        f"method       {plan.method}, {c.selection} selection",
        f"steps        {c.steps:,} x {c.selected_size} of {c.buffer} sequences x {c.length:,} tokens = "
        f"{c.update_tokens:,} tokens",
        f"optimizer    {c.optimizer}, rate of adamw {c.adam_lr:g}, of muon {c.muon_lr:g}",
        f"processes    {processes} ({c.parallelism}), each trains {c.selected_size // processes} sequences a step and "
        f"scores {-(-c.buffer // processes)}",
    ]
    if plan.preset.processes not in (None, processes):
        lines.append(f"             the paper: {plan.preset.processes}")
    share = processes if c.parallelism == "fsdp2" else 1
    lines.append(f"memory       {bytes_held(c, model) / share / 2**30:.2f} GiB a process for weights, gradients, "
                 "optimizer state, proxy gradient and direction, without activations")
    for name, pool in pools.items():
        length = c.proxy_length if name == "proxy" else c.length
        lines.append(f"{name:12} {pool.token_count:,} tokens, {pool.sequence_count(length):,} sequences of {length:,}")
    offered = c.steps * c.buffer / pools["data"].sequence_count(c.length)
    lines += [f"             every candidate is offered {offered:.3g} times", f"run          {identity}"]
    return "\n".join([*lines, *(f"deviation    {d}" for d in plan.deviations)])


def bytes_held(config: PretrainConfig, model: nn.Module) -> int:
    """Bytes in float32 over all shards: weights, gradients, proxy gradient, direction; AdamW 2 states, Muon 1."""
    by_muon = parameter_names(model, layer_names(model, "blocks")).values() if config.optimizer == "muon" else []
    return 4 * (6 * sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in by_muon if p.ndim == 2))
