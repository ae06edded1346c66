"""The options of ``reproduce.pretrain`` and the plan that they settle: a preset of the paper and what overrides it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from torch import nn

from baselines import build_selector
from baselines.greats import Greats
from baselines.perplexity import Perplexity
from opus_bench.distributed.world import PARALLELISM
from opus_bench.layers import layer_names, parameter_names
from opus_bench.model import SIZES
from opus_bench.distributed.pretrain import PretrainConfig
from opus_bench.selector import Opus
from opus_bench.distributed.selection import SCOPES

from .presets import METHODS, PRESETS, Method, Preset, checkpoint_every, preset_of, steps_for

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
                     help="how candidates are chosen (default: %(default)s); each process scores its share of them, "
                          "with greats holding the factors of all its share at once; a pool that a static scorer has "
                          "cut is trained on with random")
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
    top.add_argument("--checkpoint-every", type=int, default=None, metavar="N",
                     help="steps between checkpoints (default: 500, or a 25th of all steps where that is more)")
    top.add_argument("--keep-checkpoints", action="store_true",
                     help="keep the last two checkpoints of a finished run (default: they are removed once its record, "
                          "and with --save its model, is written)")
    top.add_argument("--window", type=int, default=None, metavar="N",
                     help="tokens scored per sequence, and of a proxy sequence (default: 512)")
    top.add_argument("--sketch-width", type=int, default=None, metavar="N",
                     help="buckets per weight, of opus-paper and opus-released (default: 8192)")
    top.add_argument("--score-microbatch", type=int, default=None, metavar="N",
                     help="candidates in one scoring pass of a process, of all methods but random (default: all)")
    top.add_argument("--selector-options", type=json_object, default={}, metavar="JSON",
                     help="more knobs of the method's selector, as '{\"sampling\": \"greedy\"}': fields of "
                          "opus_bench.selector.Opus, baselines.greats.Greats or baselines.perplexity.Perplexity "
                          "(default: the method's)")
    top.add_argument("--seed", type=int, default=0, metavar="N",
                     help="of weights made anew, the order of the data and draws (default: %(default)s)")
    top.add_argument("--results", type=Path, default=ROOT / "results" / "pretrain", metavar="FOLDER",
                     help="gets runs/ with the record and work/ with checkpoints (default: results/pretrain)")
    top.add_argument("--save", type=Path, default=None, metavar="FOLDER",
                     help="also write the trained model, safetensors (default: none is written)")
    top.add_argument("--save-every", type=int, default=None, metavar="N",
                     help="steps between models that are kept in <save>-STEP beside the last (default: none is kept)")
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
    preset, method = preset_of(options.model), METHODS[options.method]
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
    if options.save_every is not None and (options.save is None or options.save_every < 1):
        raise ValueError(f"--save-every {options.save_every} needs at least 1 step and --save, which names the folders")
    if options.sketch_width is not None:
        if "sketch_width" not in method.options:
            raise ValueError(f"--sketch-width is of the opus methods with a sketch, not of {options.method}; "
                             "leave it out")
        selector_options["sketch_width"] = options.sketch_width
    if options.score_microbatch is not None:
        if method.selector not in SELECTORS:
            raise ValueError(f"--score-microbatch is of methods that score, not of {options.method}; leave it out")
        selector_options["microbatch"] = options.score_microbatch
    check_knobs(method, options)
    selector_options |= options.selector_options
    if "window" in selector_options:
        given["proxy_length"] = selector_options["window"]
    config = dataclasses.replace(preset.config, **given)
    if options.steps is not None and options.tokens is not None:
        raise ValueError("--steps and --tokens say the same; give one of them")
    steps = options.steps if options.steps is not None else steps_for(
        options.tokens if options.tokens is not None else preset.tokens, config.selected_size, config.length)
    every = options.checkpoint_every if options.checkpoint_every is not None else checkpoint_every(steps)
    config = dataclasses.replace(config, steps=steps, checkpoint_every=every)
    if method.selector in ("opus", "greats") and config.precision == "bfloat16":
        selector_options.setdefault("scoring_dtype", "bfloat16")
    build_selector(method.selector, dict(selector_options), None, config.length)  # refuses values before anything else
    changed = [f"{f.name} {getattr(config, f.name)} instead of {getattr(preset.config, f.name)}"
               for f in dataclasses.fields(config)
               if f.name not in ("seed", "optimizer", "checkpoint_every")
               and getattr(config, f.name) != getattr(preset.config, f.name)]
    knobs = [f"{name} {value} of the selector" for name, value in options.selector_options.items()]
    decided = [line for line in preset.decided if config.precision == "bfloat16" or not line.startswith("bfloat16")]
    other = [] if where == preset.model else [f"model {Path(where).name} instead of {preset.model}"]
    return Plan(preset, where, config, options.method, selector_options,
                (*other, *changed, *knobs, *method.deviations, *decided))


def refuse(name: str) -> NoReturn:
    """Of JSON's numbers NaN and the infinities are none, though Python's reader takes them."""
    raise ValueError(f"{name} is no number of JSON")


def json_object(text: str) -> dict[str, Any]:
    """The object that an option holds."""
    try:
        found = json.loads(text, parse_constant=refuse)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object; write '{{\"NAME\": VALUE}}'")
    return found


SELECTORS = {"opus": Opus, "greats": Greats, "perplexity": Perplexity}
FIXED = ("arm_name", "keep", "world", "gathered")  # by --method, --selection and torchrun
FLAGS = {"window": "window", "sketch_width": "sketch_width", "microbatch": "score_microbatch"}  # that say a knob too


def check_knobs(method: Method, options: argparse.Namespace) -> None:
    """Refuse knobs of --selector-options that the selector lacks, values of another type, and what is said twice.

    Raises:
        ValueError: naming the knob, and what is known.
    """
    kind = SELECTORS.get(method.selector)
    hints = get_type_hints(kind) if kind is not None else {}
    known = {name: hint for name, hint in hints.items() if not name.startswith("_") and name not in FIXED}
    for name, value in options.selector_options.items():
        if name not in known:
            raise ValueError(f"--selector-options: {options.method} has no knob {name!r}; "
                             f"known: {', '.join(known) or 'none'}")
        if not fits(value, known[name]):
            raise ValueError(f"--selector-options: {name} cannot be {json.dumps(value)}; see {kind.__name__}.{name}")
        if name in FLAGS and getattr(options, FLAGS[name]) is not None:
            raise ValueError(f"--{FLAGS[name].replace('_', '-')} and --selector-options {name} say the same; give one")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is of a field's type: numbers, text, null, one of several, a list of text."""
    if get_origin(hint) in (Union, UnionType):
        return any(fits(value, one) for one in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if hint in (str, bool, NoneType):
        return isinstance(value, hint)
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


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
    lines.append(f"checkpoints  every {c.checkpoint_every:,} steps, {-(-c.steps // c.checkpoint_every)} in all, of "
                 f"{checkpoint_bytes(plan, model) / 2**30:.2f} GiB; on disk two, three while one is written, none when "
                 "the run is done")
    for name, pool in pools.items():
        length = c.proxy_length if name == "proxy" else c.length
        lines.append(f"{name:12} {pool.token_count:,} tokens, {pool.sequence_count(length):,} sequences of {length:,}")
    offered = c.steps * c.buffer / pools["data"].sequence_count(c.length)
    lines += [f"             every candidate is offered {offered:.3g} times", f"run          {identity}"]
    return "\n".join([*lines, *(f"deviation    {d}" for d in plan.deviations)])


def bytes_held(config: PretrainConfig, model: nn.Module) -> int:
    """Bytes in float32 over all shards: weights, gradients, proxy gradient, direction; AdamW 2 states, Muon 1."""
    return 4 * (6 * sum(p.numel() for p in model.parameters()) - by_muon(config, model))


def checkpoint_bytes(plan: Plan, model: nn.Module) -> int:
    """Bytes of a checkpoint in float32: weights, AdamW's 2 states or Muon's 1, the proxy gradient of what is scored."""
    selector = build_selector(METHODS[plan.method].selector, dict(plan.options), None, plan.config.length)
    layers = getattr(selector, "layers", None)
    scored = {} if layers is None else parameter_names(model, layer_names(model, layers))
    return 4 * (3 * sum(p.numel() for p in model.parameters()) - by_muon(plan.config, model)
                + sum(p.numel() for p in scored.values()))


def by_muon(config: PretrainConfig, model: nn.Module) -> int:
    """Weights that Muon updates."""
    names = parameter_names(model, layer_names(model, "blocks")) if config.optimizer == "muon" else {}
    return sum(p.numel() for p in names.values() if p.ndim == 2)
