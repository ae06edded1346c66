"""Muon's step and P_t on several processes: each matrix by one of them, the result the one process's bit for bit.

The reference is torch.optim.Muon and ``preconditioners`` on whole matrices, run by every process for itself, so that
kernels are the same and equality is exact.
"""

import pytest
import shared_jobs as jobs
import torch
from processes import results
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.utils.flop_counter import FlopCounterMode

from opus_bench.distributed.state import ShardedMuon, direction_flops, newton_schulz_flops, shared_work
from opus_bench.preconditioner import inner_flops

SIZES = (1, 2, 4)


@pytest.fixture(scope="module")
def of():
    """What every process of a world found, by the world's size; each world is started once."""
    started = {}

    def found(size):
        if size not in started:
            todo = {f"{kind} {sharded}": (getattr(jobs, kind), (sharded,))
                    for kind in ("muon_divided", "torn")[: 1 + (size > 1)] for sharded in (True, False)}
            if size > 1:
                todo["columns"] = (jobs.columns, ())
            started[size] = results(jobs.many, size, todo)
        return started[size]

    return found


def check_shares(calls, flops, wanted):
    """Every matrix on one process, and no process with more than the mean and one matrix."""
    assert sorted(shape for one in calls for shape in one) == sorted(wanted)
    costs = [sum(flops(*shape) for shape in one) for one in calls]
    assert max(costs) <= sum(costs) / len(costs) + max(flops(*shape) for shape in wanted)
    assert max(map(len, calls)) == -(-len(wanted) // len(calls))


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_every_process_computes_its_share_and_all_have_one_processs_result(of, size, sharded):
    """Eleven matrices, some of fewer rows than processes, one without a gradient and so without momentum."""
    everyone = [found[f"muon_divided {sharded}"] for found in of(size)]
    moved = [shape for k, shape in enumerate(jobs.SHAPES) if k != jobs.SILENT]
    check_shares([found["stepped"] for found in everyone], lambda o, i: newton_schulz_flops(o, i, 1), moved)
    check_shares([found["directed"] for found in everyone], lambda *o_i: direction_flops(torch.empty(o_i)), moved)
    check_shares([found["built"] for found in everyone], inner_flops, moved)  # once, though asked for twice
    held = sum(min(shape) ** 2 for shape in moved)
    for found in everyone:
        assert found["rebuilt"] == []
        assert found["kept"] == (sum(min(shape) ** 2 for shape in found["built"]) if sharded else held)
        assert all(found["weights"]) and all(found["directions"]) and all(found["p"])
        assert found["spread"] and found["untouched"]


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("size", SIZES[1:])
def test_a_gradient_on_some_processes_alone_is_refused_before_anything_changes(of, size, sharded):
    for found in of(size):
        message, same = found[f"torn {sharded}"]
        assert message.startswith("parameters [2] of Muon have a gradient on some processes and none on others")
        assert same


def test_other_shards_than_fully_shards_are_refused(of):
    for found in of(2):
        assert found["columns"].startswith("a matrix of Muon must be sharded by rows over all 2 processes")


@pytest.mark.parametrize("o,i", [(4, 3), (3, 4), (5, 5), (1, 7)])
def test_newton_schulzs_flops_are_those_of_torchs_counter(o, i):
    with FlopCounterMode(display=False) as counter:
        _zeropower_via_newtonschulz(torch.randn(o, i), (3.0, -4.0, 2.0), 5, 1e-7)
    assert counter.get_total_flops() == newton_schulz_flops(o, i, 5)


def test_work_is_dealt_by_falling_cost_and_kept_by_all(monkeypatch):
    costs = {"a": 1, "b": 5, "c": 3, "d": 5, "e": 2}
    for rank, share in ((0, ["b", "c", "a"]), (1, ["d", "e"])):
        monkeypatch.setattr("opus_bench.distributed.state.place", lambda rank=rank: (rank, 2))
        asked, kept = [], []

        def gathered(key, owner):
            asked.append((key, owner))
            return key.upper() if owner == rank else None

        shared_work(costs, gathered, lambda key, inputs: key + inputs, lambda *given: kept.append(given))
        order = [("b", 0), ("d", 1), ("c", 0), ("e", 1), ("a", 0)]
        assert asked == order
        assert kept == [(key, key + key.upper() if key in share else None, owner) for key, owner in order]


def test_one_process_steps_as_torchs_muon_without_a_group():
    torch.manual_seed(0)
    whole = [torch.randn(shape) for shape in jobs.SHAPES]
    ours, plain = ([torch.nn.Parameter(x.clone()) for x in whole] for _ in range(2))
    optimizers = ShardedMuon(jobs.groups_of(ours)), torch.optim.Muon(jobs.groups_of(plain))
    for step in range(3):
        for parameters, optimizer in zip((ours, plain), optimizers):
            jobs.give_gradients(parameters, step)
            assert optimizer.step(lambda: torch.tensor(float(step))) == step
    assert all(torch.equal(x, y) for x, y in zip(ours, plain))
    for x, y in zip(ours, plain):
        if y.grad is not None:
            assert torch.equal(optimizers[0].state[x]["momentum_buffer"], optimizers[1].state[y]["momentum_buffer"])


def test_the_step_leaves_a_bfloat16_momentum_as_it_is():
    """Newton-Schulz divides what it is given in place, which without Nesterov is the momentum itself."""
    p = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.bfloat16))
    optimizer = ShardedMuon([p], momentum=0.5, nesterov=False)
    p.grad = torch.full_like(p, 2.0)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["momentum_buffer"], torch.ones_like(p))
