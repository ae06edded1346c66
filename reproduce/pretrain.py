"""Pre-training with online selection at the paper's sizes, on one or many GPUs (or CPU processes).

    torchrun --nproc-per-node 8 -m reproduce.pretrain --model gpt2-xl --data POOL --proxy PROXY --method opus-calibrated
    torchrun --nproc-per-node 8 -m reproduce.pretrain --model qwen3-8b --data POOL --proxy PROXY --method opus-paper
    python -m reproduce.pretrain --model FOLDER --data POOL --proxy PROXY --method random --dry-run    # the plan alone

POOL, PROXY and VALIDATION are folders of token shards with a manifest.json.  The paper's settings are presets
(reproduce/presets.py); any is overridden by an option, which the record then names as a deviation.  Each process
scores its share of the candidates, and all train on what process 0 chose by everybody's scores.  A folder with a model
(safetensors) takes the settings of qwen3-8b; gpt2, tiny and ci, sizes of the paper's architecture, those of gpt2-large.

Killed at any moment, the same command goes on from the last checkpoint, also on another number of processes; given
while the run is at work, it waits for its end.  A run whose record lies in RESULTS/runs is done; its checkpoints are
then removed, but with --keep-checkpoints.  Process 0 alone reads the model, into the memory of its machine; the others
receive their weights.

Exit codes: 0; 2 after one line about bad input; 130 on ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from tqdm import tqdm

from baselines import build_selector
from opus_bench import hashing, provenance, results, schema
from opus_bench.distributed.world import World
from opus_bench.layers import layer_names
from opus_bench.model import SIZES, OpusGPT2, OpusGPT2Config
from opus_bench.pools.pool import ShardPool
from opus_bench.distributed.pretrain import SharedProgress, pretrain
from opus_bench.selector import Opus, Selector
from opus_bench.distributed.selection import SharedOpus, check_scope
from opus_bench.train import set_determinism, weights_sha256
from opus_bench.validation.own_inputs import model_outline, read_model
from opus_bench.validation.own_settings import OwnSettings

from .presets import METHODS, VOCABULARY
from .pretrain_plan import Plan, parser, settle, text
from .training import locked


POLL = 10  # seconds between two looks at a run's lock


def outline(plan: Plan, options: argparse.Namespace) -> nn.Module:
    """The model without memory, for its parameters' shapes."""
    if plan.where in SIZES:
        with torch.device("meta"):
            return OpusGPT2(OpusGPT2Config.from_size(plan.where, VOCABULARY))
    return model_outline(own_settings(plan, options))


def load(plan: Plan, options: argparse.Namespace) -> nn.Module:
    """The model on the CPU in float32: made anew from the seed, or read."""
    if plan.where in SIZES:
        torch.manual_seed(plan.config.seed)
        return OpusGPT2(OpusGPT2Config.from_size(plan.where, VOCABULARY))
    return read_model(own_settings(plan, options))


def own_settings(plan: Plan, options: argparse.Namespace) -> OwnSettings:
    return OwnSettings(plan.where, "", dtype="float32", trust_remote_code=options.trust_remote_code)


def selector_for(plan: Plan, world: World) -> Selector:
    """The method's selector; each process scores its share of all candidates, or its own in local selection.

    Raises:
        ValueError: for an Opus whose terms processes cannot share.
    """
    method = METHODS[plan.method]
    gathered = plan.config.selection == "global"
    shared = {"greats": {"world": world, "gathered": gathered}, "perplexity": {"world": world if gathered else None}}
    selector = build_selector(
        method.selector, {**plan.options, **shared.get(method.selector, {})}, None, plan.config.length)
    return SharedOpus(selector, world, gathered) if isinstance(selector, Opus) else selector


def check_tokens(pools: dict[str, Any], model: nn.Module, length: int) -> None:
    """Refuse sequences longer than the model's context, and pools of a larger vocabulary than it has."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and length > context:
        raise ValueError(f"sequences of {length:,} tokens do not fit the model's context of {context:,}; "
                         "lower --length")
    rows = model.get_input_embeddings().weight.shape[0]
    for name, pool in pools.items():
        if pool.vocab_size is not None and pool.vocab_size > rows:
            raise ValueError(f"--{name} has tokens of a vocabulary of {pool.vocab_size}, the model one of {rows}; make "
                             "the pool with the model's tokenizer")


def check_memory(model: nn.Module) -> None:
    """Refuse to read weights that this machine's memory cannot hold."""
    need, free = sum(p.numel() * p.element_size() for p in model.parameters()), psutil.virtual_memory().available
    if need > free:
        raise ValueError(f"the weights take {need / 1e9:.1f} GB of memory where they are read, {free / 1e9:.1f} are "
                         "free; free some, or start on a machine with more")


def record_of(
    plan: Plan, world: World, identity: str, pools: dict[str, Any], progress: SharedProgress, weights: str
) -> dict:
    """The run's record (opus_bench/schema.py)."""
    method = METHODS[plan.method]
    return {
        "schema": schema.SCHEMA,
        "run_id": identity,
        "experiment": "pretrain",
        "scale": "paper" if plan.where == plan.preset.model else "own",
        "arm": method.arm,
        "method": method.name,
        "paper": {"arxiv": schema.ARXIV, "item": plan.preset.item, "row": method.row},
        "config": plan.settings(world.size),
        "deviations": list(plan.deviations),
        "data": {
            "spec_sha256": data_sha256(pools),
            "train_sha256": pools["data"].sha256, "proxy_sha256": pools["proxy"].sha256, "tokenizer_sha256": None,
            "suite_sha256": None, "selected_sha256": progress.selected_sha256,
            "target_domain": ", ".join(pools["proxy"].domains),
        },
        "code": {"version": provenance.code_version(), **provenance.git_state()},
        "environment": {**provenance.environment(str(world.device)), "world_size": world.size,
                        "parallelism": plan.config.parallelism},
        "timing": {name: getattr(progress, name) for name in ("wall_s", "train_s", "select_s", "eval_s", "peak_bytes")},
        "metrics": progress.metrics,
        "evals": [],
        "selection": {"offered": progress.offered, "chosen": progress.chosen, "per_step": progress.per_step,
                      "notes": progress.notes},
        "final": {"weights_sha256": weights},
    }


def data_sha256(pools: dict[str, Any]) -> str:
    return hashing.text_sha256(hashing.canonical({name: pool.sha256 for name, pool in pools.items()}))


def open_pools(options: argparse.Namespace, verify: bool) -> dict[str, Any]:
    """The pools by option; ``verify`` compares every byte."""
    named = {"data": options.data, "proxy": options.proxy, "validation": options.validation}
    return {name: ShardPool(where, verify=verify) for name, where in named.items() if where is not None}


def run(options: argparse.Namespace) -> None:
    """Plan, train, record."""
    plan = settle(options)
    processes, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    check_scope(plan.config.selection, plan.config.buffer, plan.config.selected_size, processes)
    pools = open_pools(options, verify=rank == 0 and not options.dry_run)
    model = outline(plan, options)
    check_tokens(pools, model, plan.config.length)
    selector_for(plan, World(rank, processes, torch.device("cpu")))
    if "layers" in plan.options:
        layer_names(model, plan.options["layers"])
    identity = schema.run_id("pretrain", plan.settings(processes), data_sha256(pools), provenance.code_version())
    if rank == 0:
        print(text(plan, processes, pools, identity, model), flush=True)
    if options.dry_run:
        return
    records = options.results / "runs"
    results.check_writable(records)
    world = World.start()
    if world.device.type == "cpu":
        set_determinism(torch.get_num_threads())
    with ExitStack() as held:
        hold(held, options.results, identity, world)
        if any(world.each(world.together(lambda: world.rank == 0 and results.done(records, identity)))):
            path = results.record_path(records, identity)
            if options.save is not None and not (options.save / "config.json").exists():
                raise ValueError(f"{path} is there, its model is not in {options.save}; move the record away to train "
                                 "again, or leave out --save")
            if world.rank == 0:
                remove_checkpoints(options, identity)  # of who was killed after writing the record
                print(f"{path} is there: done")
        else:
            train_and_record(plan, options, world, identity, pools)
    world.stop()


def hold(held: ExitStack, results_dir: Path, identity: str, world: World) -> None:
    """Lock the run's folder on process 0 until the stack ends; all wait while another start of the run has it.

    The processes meet after every POLL seconds, so none is taken for lost however long the other start takes.
    """

    def mine() -> bool:
        try:
            held.enter_context(locked(results_dir, identity, POLL))
        except TimeoutError:
            return False
        return True

    told = False
    while not any(world.each(world.together(lambda: world.rank == 0 and mine()))):
        if world.rank == 0 and not told:
            print(f"another start of run {identity} is at work in {results_dir}; waiting for its end", flush=True)
        told = True


def checkpoints_of(options: argparse.Namespace, identity: str) -> Path:
    """The folder of a run's checkpoints."""
    return options.results / "work" / identity / "checkpoints"


def remove_checkpoints(options: argparse.Namespace, identity: str) -> None:
    """Remove what a finished run no longer needs, unless it is to be kept; by process 0, its record being there."""
    folder = checkpoints_of(options, identity)
    if folder.exists() and not options.keep_checkpoints:
        shutil.rmtree(folder)


def train_and_record(
    plan: Plan, options: argparse.Namespace, world: World, identity: str, pools: dict[str, Any]
) -> None:
    """Train on all processes; process 0 writes the model where it is asked for, then the record."""
    model = outline(plan, options)

    def weights() -> nn.Module:
        check_memory(model)
        whole = load(plan, options)
        model.generation_config = whole.generation_config  # of the folder, where it has one
        return whole

    with tqdm(total=plan.config.steps, unit="step", disable=None if world.rank == 0 else True) as bar:

        def on_step(done: int, loss: float) -> None:
            bar.update(done - bar.n)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

        def keep(done: int) -> None:
            if options.save_every is not None and done % options.save_every == 0 and done < plan.config.steps:
                save(model, options.save.with_name(f"{options.save.name}-{done}"), world)

        progress = pretrain(plan.config, model, pools["data"], pools["proxy"], selector_for(plan, world), world,
                            checkpoints_of(options, identity), pools.get("validation"), on_step, keep,
                            weights)
    digest = weights_sha256(model)
    if options.save is not None:
        save(model, options.save, world)
    if world.rank == 0:
        record = record_of(plan, world, identity, pools, progress, digest)
        print(f"wrote {results.write(record, options.results / 'runs')}")
        remove_checkpoints(options, identity)


def save(model: nn.Module, folder: Path, world: World) -> None:
    """The whole model as save_pretrained writes it, gathered on process 0's CPU; whole if it has a config.json."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if world.rank == 0:
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary, state_dict=state)
        folder.mkdir(parents=True, exist_ok=True)
        for old in (folder / "config.json", *folder.glob("model*.safetensors*")):
            old.unlink(missing_ok=True)
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):  # which comes last
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # before the checkpoints that could make it again are removed
            os.replace(path, folder / path.name)
        temporary.rmdir()


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code (module docstring)."""
    options = parser(__doc__ or "").parse_args(arguments)
    try:
        run(options)
    except (ValueError, OSError, FloatingPointError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
