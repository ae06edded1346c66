"""Many processes do what one does.

The reference is one process without a group: plain model, torch.optim optimizers, ``Opus.select``.  In float64 sums in
another order differ by round-off, so losses, weights, utilities and P_t are compared to 1e-10 relative and choices
exactly; in float32 to some hundred units of its round-off.
"""

from functools import partial

import pytest
import shared_jobs as jobs
import torch
from processes import results
from small_models import tokens

from baselines.greats import Greats
from baselines.perplexity import Perplexity
from opus_bench.distributed.weights import receiver
from opus_bench.distributed.world import World, blocks_of, parallelize
from opus_bench.layers import layer_names, parameter_names
from opus_bench.gradients import mean_gradient
from opus_bench.preconditioner import preconditioners
from opus_bench.distributed.pretrain import PretrainConfig
from opus_bench.selector import TrainState
from opus_bench.distributed.state import LivePreconditioners
from opus_bench.distributed.selection import SharedOpus, check_scope, step_generator
from opus_bench.train import build_optimizers, set_schedule, update

EXACT = dict(rtol=1e-10, atol=1e-10)
MANY = (2, 4)

# options of the config, Opus, model; the sizes of the world (four processes share two cores, so they do a part)
RUNS = {
    "ddp adamw calibrated": ({"parallelism": "ddp"}, ("calibrated", {}), "paper", MANY),
    "ddp muon paper": ({"parallelism": "ddp", "optimizer": "muon"},
                       ("paper", {"sketch_width": 64, "temperature": 1e-4}), "gpt2", (2,)),
    "fsdp2 adamw released": ({}, ("released", {"sketch_width": 64, "temperature": 1e-5}), "gpt2", (2,)),
    "fsdp2 muon paper": ({"optimizer": "muon"}, ("paper", {"sketch_width": 64, "temperature": 1e-4}), "paper", MANY),
    "fsdp2 qwen3 checkpointing, accumulation": (
        {"optimizer": "muon", "checkpointing": True, "microbatch": 1, "proxy_size": 5, "weight_decay": 0.01,
         "warmup": 0.5}, ("calibrated", {"proxy_every": 4, "microbatch": 2}), "qwen3", (2,)),
    "ddp checkpointing, accumulation": (
        {"parallelism": "ddp", "checkpointing": True, "microbatch": 1}, ("calibrated", {"microbatch": 1}), "paper",
        (2,)),
    "fsdp2 forward": ({}, ("calibrated", {"estimator": "forward", "relative_step": 1e-4}), "paper", (2,)),
}
RECEIVED = {  # of a model that process 0 alone reads
    "fsdp2 received": ({}, ("calibrated", {}), "paper", (2,)),
    "ddp received": ({"parallelism": "ddp"}, ("calibrated", {}), "gpt2", (2,)),
    "fsdp2 received, tied": ({"optimizer": "muon"}, ("calibrated", {}), "qwen3 tied", (2,)),
    "fsdp2 received, untied": ({}, ("calibrated", {}), "qwen3", (4,)),
}
LOCAL = {"ddp local": ({"parallelism": "ddp", "selection": "local"}, ("calibrated", {}), "paper", MANY),
         "fsdp2 local": ({"selection": "local"}, ("paper", {"sketch_width": 64, "temperature": 1e-4}), "qwen3", (2,))}
UTILITIES = {  # arm, optimizer, parallelism, model, sizes of the world
    "alignment": (("calibrated", {"layers": "all"}), "adamw", "fsdp2", "gpt2", MANY),
    "alignment, muon": (("calibrated", {"microbatch": 1}), "muon", "fsdp2", "paper", (2,)),
    "sketch, muon": (("paper", {"sketch_width": 64}), "muon", "fsdp2", "paper", MANY),
    "sketch, adamw": (("paper", {"sketch_width": 64}), "adamw", "ddp", "paper", (2,)),
    "sketch, released": (("released", {"sketch_width": 64}), "adamw", "ddp", "paper", (2,)),
    "forward": (("calibrated", {"estimator": "forward", "relative_step": 1e-4, "layers": "all"}), "adamw", "fsdp2",
                "gpt2", (2,)),
    "identity": (("calibrated", {"preconditioner": "identity"}), "adamw", "fsdp2", "paper", (2,)),
}
GREATS = {
    "fsdp2": {"parallelism": "fsdp2"}, "ddp": {"parallelism": "ddp"},
    "all layers, microbatches": {"parallelism": "fsdp2", "model": "gpt2", "layers": "all", "microbatch": 1},
    "fewer than processes": {"parallelism": "ddp", "n": 1},
}
OTHERS = [("global", "tokens"), ("global", "attention_mask"), ("global", "loss_mask"), ("local", "tokens")]


def cases(table):
    return [(name, size) for name, row in table.items() for size in row[-1]]


def opus(arm):
    return jobs.arm(arm[0], **arm[1])


def all_jobs(size):
    found = {name: (jobs.train, (options, opus(arm), model))
             for name, (options, arm, model, sizes) in (RUNS | LOCAL).items() if size in sizes}
    found |= {name: (jobs.received, (options, opus(arm), model))
              for name, (options, arm, model, sizes) in RECEIVED.items() if size in sizes}
    found |= {f"u {name}": (jobs.utilities, (opus(arm), *rest))
              for name, (arm, *rest, sizes) in UTILITIES.items() if size in sizes}
    found |= {f"p {optimizer}": (jobs.preconditioners_of, (optimizer,)) for optimizer in ("adamw", "muon")}
    found |= {f"g {name}": (partial(jobs.greats, **options), ()) for name, options in GREATS.items()}
    found |= {f"l {parallelism}": (jobs.perplexity, (parallelism,)) for parallelism in ("ddp", "fsdp2")}
    found |= {f"c {method} {scope}": (jobs.choices, (method, scope))
              for method in ("greats", "perplexity") for scope in ("global", "local")}
    found["few"] = (jobs.utilities, (jobs.arm("calibrated"), "adamw", "fsdp2", "paper", size - 1))
    if size == 2:
        found["unreadable"] = (jobs.unreadable, ())
        found["whims"] = (jobs.whims, ())
        found |= {f"other {scope} {of}": (jobs.other_candidates, (scope, of)) for scope, of in OTHERS}
        found["unsteady"] = (jobs.unsteady, ())
        found["starved"] = (jobs.starved, ("ddp", 1, {"optimizer": "muon"}))
        rest = ("paper", None, None, torch.float32)
        found["float32"] = (jobs.train, ({}, jobs.arm("calibrated"), *rest))
        narrow = jobs.arm("calibrated", scoring_dtype="bfloat16")
        for parallelism in ("ddp", "fsdp2"):
            options = {"precision": "bfloat16", "parallelism": parallelism}
            found[f"bfloat16 {parallelism}"] = (jobs.train, (options, narrow, *rest))
    return found


@pytest.fixture(scope="module")
def of():
    """What every process of a world found, by the world's size; each world is started once."""
    started = {}

    def found(size):
        if size not in started:
            started[size] = results(jobs.many, size, all_jobs(size))
        return started[size]

    return found


def plain_run(options, arm, model, shares=1, dtype=torch.float64):
    """The same run by one process without a group; with ``shares`` local selection's, one share after the other."""
    config = PretrainConfig(**jobs.CONFIG | {k: v for k, v in options.items() if k not in ("parallelism", "selection")})
    trained, chooser = jobs.small(model, dtype), opus(arm)
    optimizers = build_optimizers(trained, config)
    pool, proxies = jobs.FakePool(1), jobs.FakePool(2)
    losses, everyone = [], []
    for step in range(config.steps):
        set_schedule(optimizers, step, config)
        ids = pool.ids(step, config.buffer, config.length, config.seed)
        candidates = pool.sequences(ids, config.length)
        proxy = proxies.sequences(proxies.ids(step, config.proxy_size, 0, config.seed), config.proxy_length)
        state = TrainState(trained, optimizers, step, proxy)
        chosen = []
        for share, places in enumerate(torch.arange(config.buffer).chunk(shares)):
            picked = chooser.select(candidates[places], config.selected_size // shares, state,
                                    step_generator(config.seed, step, share)).indices
            chosen += places[picked.sort().values].tolist()
        losses.append(update(trained, optimizers, candidates[chosen], config.clip))
        everyone.append(ids[chosen].tolist())
    return losses, everyone, {k: p.detach() for k, p in trained.named_parameters()}


def compare(found, want, tolerance=EXACT):
    losses, chosen, weights = want
    assert found["chosen"] == chosen
    torch.testing.assert_close(found["losses"], losses, **tolerance)
    torch.testing.assert_close(found["weights"], weights, **tolerance)


@pytest.mark.parametrize("name, size", cases(RUNS))
def test_global_selection_chooses_and_trains_as_one_process(of, name, size):
    options, arm, model, _ = RUNS[name]
    # a difference of losses over 2 eps multiplies their round-off by 1 / eps
    tolerance = EXACT if "forward" not in name else dict(rtol=1e-7, atol=1e-7)
    want = plain_run(options, arm, model)
    assert len({tuple(ids) for ids in want[1]}) > 1
    for found in of(size):
        compare(found[name], want, tolerance)
        assert found[name]["sharded"] == name.startswith("fsdp2")


@pytest.mark.parametrize("name, size", cases(RECEIVED))
def test_weights_that_one_process_reads_train_as_those_that_all_read(of, name, size):
    options, arm, model, _ = RECEIVED[name]
    want = plain_run(options, arm, model)
    whole = jobs.small(model)
    total = sum(p.numel() for p in whole.parameters())
    blocks = [sum(p.numel() for p in block.parameters()) for block in blocks_of(whole)]
    for rank, found in enumerate(of(size)):
        compare(found[name], want)
        assert found[name]["read"] == [0] * (rank == 0)
        assert found[name]["sharded"] == name.startswith("fsdp2")
        if found[name]["sharded"]:  # never more than the part that is sharded next
            assert found[name]["unsharded"] == [*blocks, total - sum(blocks)]


def test_weights_that_cannot_be_read_end_every_process(of):
    assert [found["unreadable"] for found in of(2)] == ["no such file on process 0"] * 2


def test_an_outline_receives_all_that_a_module_holds():
    class Small(torch.nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.frozen = torch.nn.Parameter(torch.rand(2), requires_grad=False)
            self.register_buffer("table", torch.rand(4), persistent=False)
            self.kept, self.register = torch.rand(5), self.table  # plain, and another name of a buffer

    whole, world = Small(), World(0, 1, torch.device("cpu"))
    with torch.device("meta"):
        outline = Small()
    receiver(outline, lambda: whole, world)(outline)
    for name in ("weight", "bias", "frozen", "table", "kept"):
        got, want = getattr(outline, name), getattr(whole, name)
        assert torch.equal(got, want) and got.requires_grad == want.requires_grad
    assert outline.register is outline.table and "table" not in outline.state_dict()


def test_an_outline_refuses_weights_of_another_model():
    world = World(0, 1, torch.device("cpu"))
    assert receiver(jobs.small("qwen3"), None, world) is None
    with torch.device("meta"):
        outline = jobs.small_qwen3()
    with pytest.raises(ValueError, match="nothing says how its weights are read"):
        receiver(outline, None, world)
    with pytest.raises(ValueError, match="another shape or type, .*model.norm.weight.*lm_head.weight"):
        receiver(outline, lambda: jobs.small("qwen3"), world)  # float64
    with pytest.raises(ValueError, match="what was read lacks, .*model.layers.0"):
        receiver(outline, jobs.small_gpt2, world)


@pytest.mark.parametrize("name, size", cases(LOCAL))
def test_local_selection_is_that_of_one_process_share_by_share(of, name, size):
    want = plain_run(*LOCAL[name][:3], shares=size)
    for found in of(size):
        compare(found[name], want)


def plain_stepped(optimizer, model="paper"):
    model = jobs.small(model)
    config = PretrainConfig(**jobs.CONFIG | {"optimizer": optimizer})
    optimizers = build_optimizers(model, config)
    for step in range(3):
        set_schedule(optimizers, step, config)
        update(model, optimizers, tokens(4, 10, seed=100 + step), config.clip)
    return model, optimizers


@pytest.mark.parametrize("name, size", cases(UTILITIES))
def test_utilities_of_shares_are_those_of_one_process(of, name, size):
    """Seven candidates and a proxy of five sequences: neither falls evenly to two or four processes."""
    arm, optimizer, _, model, _ = UTILITIES[name]
    model, optimizers = plain_stepped(optimizer, model)
    want = opus(arm).utilities(tokens(7, 12, seed=5), 3, TrainState(model, optimizers, 0, tokens(5, 12, seed=6)))
    scale = want.alignment.abs().max()
    for found in of(size):
        alignment, gram, untouched = found[f"u {name}"]
        # of a difference: round-off of a loss over the step's length
        noise = 1e-10 if "forward" not in name else 1e-16 * 5 / 1e-6 / scale
        torch.testing.assert_close(alignment / scale, want.alignment / scale, rtol=0, atol=float(noise))
        assert untouched
        assert (gram is None) == (want.gram is None)
        if gram is not None:
            torch.testing.assert_close(gram, want.gram, rtol=1e-10, atol=1e-10 * float(want.gram.abs().max()))
        assert torch.equal(alignment, of(size)[0][f"u {name}"][0])  # bit for bit on every process


@pytest.mark.parametrize("size", MANY)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_sharded_state_gives_the_preconditioner_of_whole_state(of, optimizer, size):
    model, optimizers = plain_stepped(optimizer)
    names = layer_names(model, "matrices")
    want = preconditioners(optimizers, parameter_names(model, names))
    proxy, _ = mean_gradient(model, tokens(5, 10), names)
    for found in of(size):
        found = found[f"p {optimizer}"]
        assert found["sharded"] and all(found["grads"])  # the state in shards, and no gradient left behind
        assert set(found["p"]) == set(want)
        for name, p in want.items():
            scale, diagonal, left, rate = found["p"][name]
            assert (scale, rate) == (p.scale, p.learning_rate)
            for got, part in ((diagonal, p.diagonal), (left, None if p.left is None else p.left.dense())):
                assert (got is None) == (part is None)
                if part is not None:
                    torch.testing.assert_close(got, part, rtol=1e-8, atol=1e-10)  # 1 / sqrt(v) of elements near 0
            torch.testing.assert_close(found["gradient"][name], proxy[name], **EXACT)
            direction = p(proxy[name])
            torch.testing.assert_close(found["direction"][name], direction, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("size", MANY)
def test_fewer_candidates_than_processes(of, size):
    model, optimizers = plain_stepped("adamw")
    want = jobs.arm("calibrated").utilities(tokens(size - 1, 12, seed=5), 1,
                                            TrainState(model, optimizers, 0, tokens(5, 12, seed=6)))
    for found in of(size):
        torch.testing.assert_close(found["few"][0], want.alignment, **EXACT)


def test_float32_agrees_to_its_round_off_and_bfloat16_to_its_own(of):
    losses, chosen, _ = plain_run({}, ("calibrated", {}), "paper", dtype=torch.float32)
    for found in of(2):
        assert found["float32"]["chosen"] == chosen
        torch.testing.assert_close(found["float32"]["losses"], losses, atol=0,
                                   rtol=300 * torch.finfo(torch.float32).eps)
        for parallelism in ("ddp", "fsdp2"):
            narrow = found[f"bfloat16 {parallelism}"]["losses"]
            assert narrow != losses and narrow == of(2)[0][f"bfloat16 {parallelism}"]["losses"]
            assert abs(narrow[0] / losses[0] - 1) < 4 * torch.finfo(torch.bfloat16).eps


def test_the_preconditioner_is_the_optimizers_also_under_autocast():
    model = jobs.small("paper", torch.float32)
    config = PretrainConfig(**jobs.CONFIG | {"optimizer": "muon"})
    optimizers = build_optimizers(model, config)
    update(model, optimizers, tokens(4, 10), config.clip)
    parameters = parameter_names(model, layer_names(model, "matrices"))
    want, live = preconditioners(optimizers, parameters), LivePreconditioners(optimizers, parameters)
    gradients = {name: torch.randn_like(p) for name, p in parameters.items()}
    with torch.autocast("cpu", torch.bfloat16):
        live.build()
        found, directions = dict(live), live.directions(gradients)
    for name, p in want.items():
        if p.left is not None:
            assert torch.equal(found[name].left.dense(), p.left.dense())
        assert torch.equal(directions[name], p(gradients[name]))


def test_every_sample_is_somebodys_and_everybody_makes_as_many_forwards():
    for size in (1, 2, 3, 4):
        for n in range(1, 10):
            shares = [World(rank, size, torch.device("cpu")).share(n) for rank in range(size)]
            assert [i for own, counted in shares for i in own[:counted].tolist()] == list(range(n))
            assert len({len(own) for own, _ in shares}) == 1
            assert all(0 <= i < n for own, _ in shares for i in own.tolist())


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="3 selected sequences cannot be trained on by 2 processes evenly"):
        check_scope("global", 8, 3, 2)
    with pytest.raises(ValueError, match="6 candidates cannot be split evenly over 4"):
        check_scope("local", 6, 4, 4)
    with pytest.raises(ValueError, match="selection must be global or local, got 'all'"):
        check_scope("all", 8, 4, 2)
    world = World(0, 1, torch.device("cpu"))
    for options in ({"redundancy": 0.1}, {"preconditioner": "adjoint"}):
        with pytest.raises(ValueError, match="on one process"):
            SharedOpus(jobs.arm("calibrated", **options), world)
    with pytest.raises(ValueError, match="parallelism must be ddp or fsdp2, got 'dp'"):
        parallelize(torch.nn.Linear(2, 2), "dp", False, world)
    with pytest.raises(ValueError, match="Linear does not say which modules are its blocks"):
        parallelize(torch.nn.Linear(2, 2), "fsdp2", False, world)


def test_processes_with_other_candidates_stop(of):
    for found in of(2):
        for scope, kind in OTHERS:
            assert found[f"other {scope} {kind}"] == (
                "processes [1] have other candidates at step 3 than process 0; the processes must run the same code "
                "with the same settings on the same data")


def test_all_processes_train_on_what_process_0_chose(of):
    for rank, found in enumerate(of(2)):
        assert found["whims"] == ([0, 1, 2, 3], [2 * rank, 2 * rank + 1])


def test_utilities_by_sketches_are_the_same_everywhere_also_where_hashing_is_not(of):
    first, second = (found["unsteady"] for found in of(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    hashed_alike = of(2)[0]["u sketch, adamw"][0]
    differ = first[0] != hashed_alike
    assert differ.tolist() == [False] * 4 + [True] * 3  # process 1's share alone


@pytest.mark.parametrize("name", GREATS)
@pytest.mark.parametrize("size", MANY)
def test_greats_of_shares_is_that_of_one_process(of, name, size):
    """Seven candidates and a proxy of five fall unevenly to two and four; so do the rows of biases and vocabulary."""
    options = GREATS[name] | {"microbatch": None}
    spread, n = options.pop("model", "paper"), options.pop("n", 7)
    del options["parallelism"]
    model, optimizers = plain_stepped("muon", spread)
    want = Greats(window=10, **options).utilities(
        tokens(n, 12, seed=5), TrainState(model, optimizers, 0, tokens(5, 12, seed=6)))
    for found in of(size):
        one = found[f"g {name}"]
        scale = float(want.alignment.abs().max()), float(want.gram.abs().max())
        torch.testing.assert_close(one["alignment"], want.alignment, rtol=0, atol=1e-10 * scale[0])
        torch.testing.assert_close(one["gram"], want.gram, rtol=0, atol=1e-10 * scale[1])
        assert one["captured"] == ([1] * -(-n // size) if "microbatch" in GREATS[name] else [-(-n // size)])
        assert all(torch.equal(one[key], of(size)[0][f"g {name}"][key]) for key in ("alignment", "gram"))


@pytest.mark.parametrize("size", MANY)
def test_perplexity_of_shares_is_that_of_one_process(of, size):
    model, optimizers = plain_stepped("adamw")
    want = Perplexity(window=10).select(tokens(7, 12, seed=5), 1, TrainState(model, optimizers, 0), None).utilities
    for found in of(size):
        for parallelism in ("ddp", "fsdp2"):
            losses, seen = found[f"l {parallelism}"]
            torch.testing.assert_close(losses, want, **EXACT)
            assert torch.equal(losses, of(size)[0][f"l {parallelism}"][0])
            assert seen == {2: [2, 2], 4: [2]}[size]


@pytest.mark.parametrize("size", MANY)
@pytest.mark.parametrize("method", ["greats", "perplexity"])
@pytest.mark.parametrize("scope", ["global", "local"])
def test_greats_and_perplexity_choose_in_both_scopes_as_one_process_would(of, method, scope, size):
    model, optimizers = plain_stepped("muon")
    state, candidates = TrainState(model, optimizers, 0, tokens(5, 12, seed=6)), tokens(8, 12, seed=5)
    plain = Greats(window=10, learning_rate=3.0) if method == "greats" else Perplexity(window=10)
    want = []
    for places in torch.arange(8).chunk(size if scope == "local" else 1):
        picked = plain.select(candidates[places], len(places) // 2, state, None).indices
        want += places[picked.sort().values].tolist()
    for found in of(size):
        assert found[f"c {method} {scope}"] == want


def test_a_process_that_runs_out_of_memory_scores_in_smaller_parts_with_the_same_result(of):
    """It does alone again what it does alone, not P_t, which all processes make together."""
    want = plain_run({"optimizer": "muon"}, ("calibrated", {}), "paper")
    for found in of(2):
        compare(found["starved"], want)
        assert found["starved"]["notes"] == [
            "step 0, process 0: out of memory scoring 4 candidates at a time; 1 from here on"]
