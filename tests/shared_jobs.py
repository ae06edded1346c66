"""What the processes of test_distributed.py and test_pretrain.py do: small models in float64, invented tokens."""

from __future__ import annotations

import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from small_models import VOCABULARY, perturbed, small_paper_gpt2, tokens
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen3Config

import baselines.greats as greats_module
import opus_bench.distributed.checkpoint as checkpoints
import opus_bench.distributed.pretrain as pretraining
import opus_bench.distributed.world as spreading
from baselines.greats import Greats
from baselines.perplexity import Perplexity
from opus_bench import preconditioner as of_preconditioner
from opus_bench import utility
from opus_bench.distributed import selection as shared_selection
from opus_bench.distributed import state as shared_state
from opus_bench.distributed.world import World, parallelize, shared_mean_gradient
from opus_bench.ghost import full
from opus_bench.gradients import layer_names, parameter_names
from opus_bench.distributed.pretrain import PretrainConfig, pretrain
from opus_bench.preconditioner import preconditioners
from opus_bench.selector import Opus, Selection, Stateless, TrainState
from opus_bench.sequences import Sequences, sample_losses
from opus_bench.distributed.state import LivePreconditioners, ShardedMuon
from opus_bench.distributed.selection import SharedOpus, select_shared
from opus_bench.train import build_optimizers, set_schedule

CONFIG = dict(steps=5, length=12, buffer=8, proxy_size=4, proxy_length=10, adam_lr=1e-2, muon_lr=1e-2,
              validation_every=3, validation_sequences=5, checkpoint_every=2, seed=3)


class FakePool:
    """Invented tokens, a function of the sequence's id; two domains."""

    def __init__(self, seed: int):
        self.seed = seed

    def ids(self, step, size, length, seed):
        return torch.randint(10_000, (size,), generator=torch.Generator().manual_seed(self.seed + 100 * seed + step))

    def sequences(self, ids, length):
        rows = [torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(self.seed + int(i)))
                for i in ids]
        return Sequences(torch.stack(rows))

    def domain_names(self, ids, length):
        return tuple("ab"[int(i) % 2] for i in ids)


def small_qwen3(tied=False):
    return AutoModelForCausalLM.from_config(Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=32, tie_word_embeddings=tied))


def small_gpt2():
    """With biases and norms; without dropout, which is no process's but its own."""
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, bos_token_id=0, eos_token_id=0))


MODELS = {"paper": small_paper_gpt2, "gpt2": small_gpt2, "qwen3": small_qwen3,
          "qwen3 tied": lambda: small_qwen3(tied=True)}


def small(name: str, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    return perturbed(MODELS[name]()).to(dtype)


def arm(name: str, **overrides) -> Opus:
    return Opus.arm(name, window=10, **overrides)


def train(world: World, options: dict, opus: Opus, model: str = "paper", folder=None, stop: int | None = None,
          dtype: torch.dtype = torch.float64, weights=None) -> dict:
    """A run; its losses, choices and weights.  ``stop``: leave after so many steps, as if killed there.  ``weights``:
    what process 0 reads the model by, in place of a model on every process."""
    config = PretrainConfig(**CONFIG | options)
    found: dict = {"losses": [], "chosen": []}
    if weights is None:
        trained = small(model, dtype)
    else:
        with torch.device("meta"):
            trained = MODELS[model]().to(dtype)

    def on_step(done: int, loss: float) -> None:
        found["losses"].append(loss)
        if done == stop:
            raise StopIteration

    noted = pretraining.note_selection

    def note(progress, offered, chosen, diagnostics):
        found["chosen"].append(chosen.ids.tolist())
        noted(progress, offered, chosen, diagnostics)

    pretraining.note_selection = note
    try:
        selector = SharedOpus(opus, world, config.selection == "global")
        progress = pretrain(config, trained, FakePool(1), FakePool(2), selector, world, folder, FakePool(3), on_step,
                            weights=weights)
        found |= {"metrics": progress.metrics, "sha": progress.selected_sha256, "notes": progress.notes,
                  "per_step": progress.per_step, "offered": progress.offered, "wall_s": progress.wall_s,
                  "clocks_s": progress.train_s + progress.select_s + progress.eval_s}
    except StopIteration:
        pass
    finally:
        pretraining.note_selection = noted
    found["weights"] = {k: full(p.detach()).clone() for k, p in trained.named_parameters()}
    found["sharded"] = all(isinstance(p, DTensor) for p in trained.parameters())
    return found


def received(world: World, options: dict, opus: Opus, model: str) -> dict:
    """A run of a model that process 0 alone reads; how often this process did, and how many parameters it held
    unsharded whenever it sharded a part."""
    read, unsharded, parallelize_, shard = [], [], pretraining.parallelize, spreading.fully_shard

    def weights():
        read.append(world.rank)
        return small(model)

    def watched(spread, *arguments):
        def counted(part, **how):
            unsharded.append(sum(
                p.numel() for p in spread.parameters() if not p.is_meta and not isinstance(p, DTensor)))
            return shard(part, **how)

        spreading.fully_shard = counted
        return parallelize_(spread, *arguments)

    pretraining.parallelize = watched
    try:
        return train(world, options, opus, model, weights=weights) | {"read": read, "unsharded": unsharded}
    finally:
        pretraining.parallelize, spreading.fully_shard = parallelize_, shard


def unreadable(world: World) -> str:
    """What is said where process 0 cannot read its weights."""
    def weights():
        raise ValueError("no such file")

    with pytest.raises(ValueError) as found:
        train(world, {}, arm("calibrated"), weights=weights)
    return str(found.value)


def stepped(model, optimizer: str, world: World, parallelism: str = "fsdp2"):
    """The model spread over the processes, and its optimizers, after three steps on global batches of four."""
    config = PretrainConfig(**CONFIG | {"optimizer": optimizer})
    forward = parallelize(model, parallelism, False, world)
    optimizers = build_optimizers(model, config, ShardedMuon)
    for step in range(3):
        set_schedule(optimizers, step, config)
        mine = Sequences(tokens(4, 10, seed=100 + step).chunk(world.size)[world.rank])
        pretraining.update(model, forward, optimizers, mine, config, world, step)
    return optimizers


def preconditioners_of(world: World, optimizer: str) -> dict:
    """Of every matrix: P_t as found from the state, and P_t g and the mean gradient g of five sequences."""
    model = small("paper")
    optimizers = stepped(model, optimizer, world)
    names = layer_names(model, "matrices")
    p = LivePreconditioners(optimizers, parameter_names(model, names))
    gradient = shared_mean_gradient(model, Sequences(tokens(5, 10)), names, world)
    sharded = all(isinstance(s, DTensor) for o in optimizers for one in o.state.values()
                  for s in one.values() if s.ndim)
    return {"p": {k: (one.scale, one.diagonal, None if one.left is None else one.left.dense(), one.learning_rate)
                  for k, one in p.items()},
            "direction": {k: full(v) for k, v in p.directions(gradient).items()},
            "gradient": {k: full(g) for k, g in gradient.items()},
            "sharded": sharded, "grads": [x.grad is None for x in model.parameters()]}


SHAPES = ((5, 3), (3, 7), (4, 4), (9, 2), (1, 6), (6, 6), (2, 8), (3, 7), (12, 3), (3, 12), (4, 5))
SILENT = 5  # has no gradient


def matrices_of(world: World, sharded: bool) -> tuple[list, list]:
    """Parameters of SHAPES, whole or by rows, in float32; and what they are, whole."""
    torch.manual_seed(0)
    whole = [torch.randn(shape) for shape in SHAPES]
    mesh = torch.distributed.init_device_mesh("cpu", (world.size,))
    spread = [distribute_tensor(x, mesh, [Shard(0)]) if sharded else x.clone() for x in whole]
    return [torch.nn.Parameter(x) for x in spread], [torch.nn.Parameter(x) for x in whole]


def give_gradients(parameters: list, seed: int) -> None:
    torch.manual_seed(seed)
    for k, p in enumerate(parameters):
        x = torch.randn(p.shape)
        p.grad = None if k == SILENT else sharded_as(x, p)


def sharded_as(x, like):
    if not isinstance(like, DTensor):
        return x
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


def groups_of(parameters: list) -> list[dict]:
    return [{"params": parameters[:4], "lr": 0.1, "weight_decay": 0.1},
            {"params": parameters[4:], "lr": 0.2, "nesterov": False, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 3}]


@contextmanager
def counting(module, name: str):
    """Shapes of the first argument of every call of a function."""
    shapes, real = [], getattr(module, name)

    def counted(x, *arguments):
        shapes.append(tuple(x.shape))
        return real(x, *arguments)

    setattr(module, name, counted)
    try:
        yield shapes
    finally:
        setattr(module, name, real)


def muon_divided(world: World, sharded: bool) -> dict:
    """Three steps of ShardedMuon, then P_t; what this process computed, and whether all is as by one process."""
    parameters, whole = matrices_of(world, sharded)
    ours, plain = ShardedMuon(groups_of(parameters)), torch.optim.Muon(groups_of(whole))
    for step in range(3):
        with counting(shared_state, "_zeropower_via_newtonschulz") as stepped:
            for optimizer, some in ((ours, parameters), (plain, whole)):
                give_gradients(some, step)
                optimizer.step()
    names = [f"w{k}" for k in range(len(SHAPES))]
    p = LivePreconditioners([ours], dict(zip(names, parameters)))
    want = preconditioners([plain], dict(zip(names, whole)))
    gradients = {name: torch.randn(shape) for name, shape in zip(names, SHAPES)}
    spread = {name: sharded_as(g, x) for (name, g), x in zip(gradients.items(), parameters)}
    with counting(of_preconditioner, "muon_inner") as directed:
        directions = p.directions(spread)
    with counting(of_preconditioner, "muon_inner") as rebuilt, counting(shared_state, "muon_inner") as built:
        twice = [{name: p[name](gradients[name]) for name in names} for _ in range(2)]
    return {
        "stepped": stepped, "directed": directed, "built": built, "rebuilt": rebuilt,
        "kept": sum(x.numel() for x in p.build().values()),
        "weights": [torch.equal(full(x.detach()), y.detach()) for x, y in zip(parameters, whole)],
        "directions": [torch.equal(full(directions[k]), want[k](gradients[k])) for k in names],
        "p": [torch.equal(found[k], want[k](gradients[k])) for found in twice for k in names],
        "spread": all(isinstance(x, DTensor) == sharded for x in directions.values()),
        "untouched": all(torch.equal(full(spread[k]), gradients[k]) for k in names)}


def torn(world: World, sharded: bool) -> tuple[str, bool]:
    """What is said where one process lacks a gradient, and whether all is as it was."""
    parameters, whole = matrices_of(world, sharded)
    give_gradients(parameters, 0)
    if world.rank == world.size - 1:
        parameters[2].grad = None
    optimizer = ShardedMuon(parameters)
    with pytest.raises(RuntimeError) as found:
        optimizer.step()
    same = all(torch.equal(full(x.detach()), y) for x, y in zip(parameters, whole))
    return str(found.value), same and not optimizer.state


def columns(world: World) -> str:
    """What is said of a matrix sharded by columns."""
    mesh = torch.distributed.init_device_mesh("cpu", (world.size,))
    p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]))
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError) as found:
        ShardedMuon([p]).step()
    return str(found.value)


def utilities(world: World, opus: Opus, optimizer: str, parallelism: str, model: str = "paper", n: int = 7) -> tuple:
    """Alignment and Gram of n candidates for a proxy of five."""
    spread = small(model)
    optimizers = stepped(spread, optimizer, world, parallelism)
    before = [full(p.detach()).clone() for p in spread.parameters()]
    state = TrainState(spread, optimizers, 0, tokens(5, 12, seed=6))
    found = SharedOpus(opus, world).utilities(tokens(n, 12, seed=5), state)
    untouched = all(torch.equal(x, full(p.detach())) and p.grad is None for x, p in zip(before, spread.parameters()))
    return found.alignment, found.gram, untouched


def greats(world: World, parallelism: str, model: str = "paper", n: int = 7, **options) -> dict:
    """Alignment and Gram of n candidates for a proxy of five, and how many each process captured at once."""
    spread = small(model)
    state = TrainState(spread, stepped(spread, "muon", world, parallelism), 0, tokens(5, 12, seed=6))
    real, captured = greats_module.capture, []

    def counting(model, batch, names):
        captured.append(len(batch))
        return real(model, batch, names)

    greats_module.capture = counting
    try:
        found = Greats(window=10, world=world, **options).utilities(tokens(n, 12, seed=5), state)
    finally:
        greats_module.capture = real
    return {"alignment": found.alignment, "gram": found.gram, "captured": captured}


def perplexity(world: World, parallelism: str, n: int = 7) -> tuple:
    """Losses of n candidates, and how many of them this process had in each forward."""
    spread, seen = small("paper"), []
    state = TrainState(spread, stepped(spread, "adamw", world, parallelism), 0)
    handle = spread.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True)
    found = Perplexity(window=10, microbatch=2, world=world).select(tokens(n, 12, seed=5), 1, state, torch.Generator())
    handle.remove()
    return found.utilities, seen


def choices(world: World, method: str, scope: str) -> list[int]:
    """Of four of eight candidates, by GREATS or perplexity."""
    spread, gathered = small("paper"), scope == "global"
    selector = (Greats(window=10, learning_rate=3.0, world=world, gathered=gathered) if method == "greats" else
                Perplexity(window=10, world=world if gathered else None))
    state = TrainState(spread, stepped(spread, "muon", world), 0, tokens(5, 12, seed=6))
    return select_shared(selector, Sequences(tokens(8, 12, seed=5)), 4, state, world, scope, 0)[0].tolist()


class Whim(Stateless):
    """A selector that chooses something else on every process."""

    def __init__(self, rank: int):
        self.rank = rank

    def select(self, candidates, size, state, generator):
        return Selection(torch.arange(size).flip(0) + self.rank)


def whims(world: World) -> tuple[list[int], list[int]]:
    """All that is chosen and what this process trains on, where processes choose otherwise."""
    chosen, mine, _ = select_shared(
        Whim(world.rank), Sequences(tokens(8, 12)), 4, TrainState(small("paper"), [], 0), world, "global", 0)
    return chosen.tolist(), mine.tolist()


def other_candidates(world: World, scope: str, of: str) -> str:
    """What is said where the last process has one token, or one place of a mask, that the others have not."""
    sequences = Sequences(tokens(8, 12), torch.ones(8, 12, dtype=torch.long), torch.ones(8, 12, dtype=torch.bool))
    if world.rank == world.size - 1:
        getattr(sequences, of)[5, 11] = 0
    with pytest.raises(RuntimeError) as found:
        select_shared(Whim(0), sequences, 4, TrainState(small("paper"), [], 3), world, scope, 0)
    return str(found.value)


def unsteady(world: World) -> tuple:
    """Utilities by sketches where no two processes hash the proxy to the same sums, as on GPUs."""
    real = utility.count_sketch

    def noisy(x, *rest):
        return real(x, *rest) * (1 + 1e-9 * world.rank)

    utility.count_sketch = noisy
    try:
        return utilities(world, arm("paper", sketch_width=64), "adamw", "ddp")
    finally:
        utility.count_sketch = real


def many(world: World, jobs: dict) -> dict:
    """Several of these functions one after the other: {name: (function, arguments)}."""
    return {name: function(world, *arguments) for name, (function, arguments) in jobs.items()}


def divide(world: World, rank: int, parallelism: str, folder: Path | None = None, held_out: bool = False) -> tuple:
    """What is said, and the last step kept, where one process's loss is NaN in the third of five steps; ``held_out``:
    the validation loss after it."""
    steps, kept = [], [0]

    def sick(model, part):
        losses = sample_losses(model, part)
        here = world.rank == rank and len(steps) == 2 and torch.is_grad_enabled() != held_out
        return losses * float("nan") if here else losses

    healthy, pretraining.sample_losses = pretraining.sample_losses, sick
    config = PretrainConfig(**CONFIG | {"parallelism": parallelism})
    chooser = SharedOpus(arm("calibrated"), world)
    model = small("paper")
    try:
        with pytest.raises(FloatingPointError) as found:
            pretrain(config, model, FakePool(1), FakePool(2), chooser, world, folder, FakePool(3),
                     lambda done, loss: steps.append(done), kept.append)
    finally:
        pretraining.sample_losses = healthy
    assert all(bool(torch.isfinite(full(p.detach())).all()) for p in model.parameters())
    return str(found.value), kept[-1]


def broken(world: World, rank: int, folder: Path) -> str:
    """What is said where the second checkpoint meets a fault on one process that is none of the disk."""
    healthy = checkpoints.file_sha256

    def sick(path):
        if world.rank == rank and path.parent.name == "step-00000004.tmp":
            raise RuntimeError("unexpected pos 64 vs 0")
        return healthy(path)

    checkpoints.file_sha256 = sick
    try:
        with pytest.raises(OSError) as found:
            train(world, {}, arm("calibrated"), folder=folder)
    finally:
        checkpoints.file_sha256 = healthy
    return str(found.value)


def starved(world: World, parallelism: str, most: int, options: dict) -> dict | str:
    """A run where process 0 has no memory to score more than ``most`` candidates at once."""
    ample = shared_selection.streamed_alignment

    def poor(model, batch, layers, directions, label_shift, microbatch, products):
        if world.rank == 0 and min(microbatch or len(batch), len(batch)) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ample(model, batch, layers, directions, label_shift, microbatch, products)

    shared_selection.streamed_alignment = poor
    try:
        return train(world, {"parallelism": parallelism, **options}, arm("calibrated"))
    except ValueError as error:
        return str(error)
    finally:
        shared_selection.streamed_alignment = ample


def killed(world: World, folder: Path, moment: str) -> None:
    """A run whose process dies by SIGKILL while the checkpoint of step 4, or 5, is written."""

    def die(*arguments, **options):
        os.kill(os.getpid(), signal.SIGKILL)

    def on_step(done: int, loss: float) -> None:
        if done < 3:
            return
        if moment == "half of the data" and world.rank == world.size - 1:
            FileSystemWriter.write_data = die
        elif moment == "all data, no name" and world.rank == 0:
            os.rename = die
        elif moment == "named, the oldest not deleted" and world.rank == 0:
            shutil.rmtree = die

    config = PretrainConfig(**CONFIG)
    pretrain(config, small("paper"), FakePool(1), FakePool(2), SharedOpus(arm("calibrated"), world), world, folder,
             on_step=on_step)
