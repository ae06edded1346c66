"""Formulas of a paper-scale plan against what small real models multiply, keep and write.

Counts are integers and equal, unless a tolerance is said beside them.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from test_overhead import GROUPED, TINY, counted, model_of, tokens
from test_paper_scale import one, options
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from baselines.greats import Greats
from opus_bench.distributed.selection import SharedOpus
from opus_bench.distributed.world import World, blocks_of, parallelize
from opus_bench.gradients import capture, mean_gradient, sample_losses, stream
from opus_bench.layers import layer_names
from opus_bench.selector import Opus, TrainState
from reproduce import counts, figure5_6, paper_cost, pretrain, pretrain_plan, table3
from reproduce.paper_cost import Rates
from reproduce.paper_settings import GPT2_LARGE, GPT2_XL
from reproduce.presets import checkpoint_every

SHAPES = pytest.mark.parametrize("shape", [TINY, GROUPED], ids=lambda shape: shape.name)
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def grid3():
    return table3.large_runs(options())


def block_weights(model):
    return [p for name, p in model.named_parameters() if p.ndim == 2 and ("blocks." in name or "layers." in name)]


# FLOPs --------------------------------------------------------------------------------------------------


@SHAPES
def test_the_work_of_muon_is_that_of_torchs_counter(shape):
    weights = block_weights(model_of(shape))
    assert sorted(shape.matrices * shape.layers) == sorted(tuple(p.shape) for p in weights)
    for p in weights:
        p.grad = torch.randn_like(p)
    flops, _ = counted(torch.optim.Muon(weights).step)
    assert flops == counts.muon_step_flops(shape)


@SHAPES
@pytest.mark.parametrize("what", ["training", "proxy", "streamed", "captured"])
def test_recomputation_is_what_checkpointing_adds_to_torchs_count(shape, what):
    def work(model):
        names, batch = layer_names(model, "blocks"), tokens(3, 16)
        if what == "training":
            sample_losses(model.train(), batch).sum().backward()
        elif what == "proxy":
            mean_gradient(model, batch, names)
        elif what == "streamed":
            stream(model, batch, names, lambda name, gradient: None)
        else:
            capture(model, batch, names)

    plain, again = model_of(shape), parallelize(model_of(shape), "ddp", True, ALONE)
    added = counted(lambda: work(again))[0] - counted(lambda: work(plain))[0]
    assert added == counts.recomputed_flops(shape, 3, 16, observed=what in ("streamed", "captured"))


def small_run(run, shape):
    """The run with a small shape in place of the paper's, its windows of 16 tokens."""
    line = replace(run.line, options={**run.line.options, **({"window": 16} if "window" in run.line.options else {})})
    return replace(run, setting=replace(run.setting, shape=shape), line=replace(line, config={}))


class ByType(TorchDispatchMode):
    """FLOPs of products by the type of their factors."""

    def __init__(self):
        super().__init__()
        self.flops = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if function._overloadpacket in flop_registry:
            first = next(x for x in reversed(args) if isinstance(x, torch.Tensor))
            self.flops[first.dtype] += flop_registry[function._overloadpacket](*args, **kwargs or {}, out_val=out)
        return out


@SHAPES
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("label", ["OPUS (paper)", "OPUS (calibrated)", "GREATS"])
def test_what_selection_multiplies_in_float32_is_what_is_priced_so(grid3, shape, label, optimizer):
    """Beside it stand the sketches' own products, 2 n (n + 1) width a matrix, which are not counted."""
    run, model = small_run(one(grid3, label, optimizer), shape), model_of(shape)
    n, width = run.fields["buffer"], 4
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    by_muon = {id(p) for p in block_weights(model)} if optimizer == "muon" else set()
    optimizers = [torch.optim.AdamW([p for p in model.parameters() if id(p) not in by_muon])]
    if by_muon:
        optimizers.append(torch.optim.Muon(block_weights(model)))
    for each in optimizers:
        each.step()
    state = TrainState(model, optimizers, 0, tokens(run.fields["proxy_size"], 16))
    selector = Greats(window=16, scoring_dtype="bfloat16") if label == "GREATS" else SharedOpus(
        Opus.arm(run.line.arm, window=16, sketch_width=width, scoring_dtype="bfloat16"), ALONE)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), ByType() as counter:
        selector.utilities(tokens(n, 16), state)
    priced = paper_cost.float32_flops(run) / run.fields["steps"]
    rest = 2 * n * (n + 1) * width * len(block_weights(model)) if label == "OPUS (paper)" else 0
    assert 0 <= counter.flops[torch.float32] - priced <= rest
    assert counter.flops[torch.bfloat16] > 0 and (priced > 0) == (optimizer == "muon" and label != "GREATS")


def test_hours_by_hand(grid3):
    """A token: 6 of every weight, 6 L d a layer of attention; again 2 of the weights but the MLP's second matrix."""
    rates, tokens_of = Rates(None, 0.4, 8), 305_176 * 16 * 6144
    d, layers, window = 1600, 48, 32 * 512
    training = tokens_of * (6 * (12 * d * d * layers + 50304 * d) + 6 * 6144 * d * layers)
    again = tokens_of * (2 * 8 * d * d + 2 * 6144 * d) * layers
    muon = 305_176 * layers * 5 * (4 * 6 + 2 * (4 * 4 + 2)) * d**3
    random = paper_cost.work(one(grid3, "Random"))
    assert list(random.values()) == [training, again, muon, 0, 0, 0]
    assert sum(paper_cost.work(one(grid3, "Random", "adamw")).values()) == training + again
    assert paper_cost.float32_flops(one(grid3, "OPUS (paper)", "adamw")) == 0
    opus = paper_cost.work(one(grid3, "OPUS (paper)"))
    wide = opus["selection, in float32 outside autocast", "float32"]
    assert wide == 305_176 * (4 * 4 + 8 + 10) * d**3 * layers
    scored = (2 * 12 * d * d + 2 * 512 * d) * layers * window + (2 * 8 * d * d + 2 * 512 * d) * layers * 8 * 512
    assert opus["selection, recomputation of checkpointed activations", "bfloat16"] == 305_176 * scored
    runs = [one(grid3, "Random"), one(grid3, "OPUS (paper)")]
    narrow = training + again + muon + sum(opus.values()) - wide
    hours = (narrow / 989.4e12 + wide / 66.9e12) / 0.4 / 3600
    text = "\n".join(paper_cost.cost_lines(runs, rates))
    assert f"in all: {hours:,.0f} GPU hours = {hours / 8 / 24:,.1f} days on 8 GPUs" in text
    share = (sum(opus.values()) - training - again - muon - wide + wide * 989.4 / 66.9) / (training + again + muon)
    assert f"selection over training, OPUS (paper): {100 * share:.1f} % in hours; " in text
    total = (narrow + wide) / 0.4 / 3600
    assert f"can be read: {total / 66.9e12:,.0f}; in TF32 (494.7 TFLOP/s), which nothing here switches on: " \
           f"{total / 494.7e12:,.0f}" in text
    assert "each once for all GPUs: sequences and Muon's matrices are divided over 8 GPUs" in text


# Bytes --------------------------------------------------------------------------------------------------


@SHAPES
def test_activations_are_those_that_a_block_keeps(shape):
    """Borders are float32; what a block keeps is within a quarter of 40 d + 4 inner (8 of a gated MLP) a token."""
    model, length, given = model_of(shape), 48, {}
    block = blocks_of(model)[0]
    block.register_forward_pre_hook(lambda module, a, k: given.update(a=a, k=k), with_kwargs=True)
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        model(tokens(1, length))
        border = given["a"][0].detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            block(border, *given["a"][1:], **given["k"])
    assert border.dtype == torch.float32
    found = sum(x.untyped_storage().nbytes() for x in kept.values() if length in x.shape)
    inner = 4 * 64 if shape is TINY else 2 * 96
    assert found / length == pytest.approx(40 * 64 + 4 * inner, rel=0.25)


def test_embedding_and_head_are_whole_while_blocks_go_backward():
    """FSDP2 on one process, which shards and gathers as on many."""
    world = World.start()
    try:
        model, seen = model_of(GROUPED), []

        def look(module, *grads):
            outer = model.get_input_embeddings(), model.get_output_embeddings()
            seen.extend(isinstance(one.weight, DTensor) for one in outer)

        blocks_of(model)[0].register_full_backward_hook(look)
        parallelize(model, "fsdp2", True, world)
        sample_losses(model, tokens(2, 16)).sum().backward()
        assert seen == [False, False]
        assert all(isinstance(p, DTensor) for p in model.parameters())
    finally:
        world.stop()


@pytest.mark.parametrize("setting", [GPT2_LARGE, GPT2_XL], ids=lambda setting: setting.preset)
@pytest.mark.parametrize("label", ["Random", "GREATS", "OPUS (paper)", "OPUS (calibrated)"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_checkpoints_have_the_bytes_of_the_models_state(grid3, setting, label, optimizer, tmp_path):
    """By the plan of the training command, which has the model's own parameters."""
    run = one(grid3, label, optimizer, setting)
    words = run.command(tmp_path, tmp_path, 8)
    given = pretrain_plan.parser("").parse_args(words[words.index("reproduce.pretrain") + 1:])
    plan = pretrain_plan.settle(given)
    assert paper_cost.checkpoint_bytes(run) == pretrain_plan.checkpoint_bytes(plan, pretrain.outline(plan, given))
    assert plan.config.checkpoint_every == run.checkpoint_every and not any("checkpoint" in d for d in plan.deviations)


def test_long_runs_write_twenty_five_checkpoints_and_short_ones_every_500_steps(grid3):
    assert [checkpoint_every(steps) for steps in (1, 12_500, 12_501, 45_777)] == [500, 500, 501, 1832]
    for run in (*grid3, *figure5_6.large_runs(options())):
        assert 24 <= paper_cost.checkpoints(run) <= 25
    qwen = [run for run in figure5_6.large_runs(options()) if run.optimizer == "adamw"]
    text = "\n".join(paper_cost.cost_lines(qwen, Rates(None, 0.4, 8)))
    # 12 bytes of 8.19e9 weights and 4 of 7.57e9, the proxy gradient
    assert "Qwen3-8B-Base, adamw: 25 checkpoints of 129 GB, one every 1,832 steps = 3.21 TB; a finished run" in text
