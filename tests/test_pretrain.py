"""Runs that end, stop, are killed and go on, on another number of processes than before.

Losses after a resume are compared with those of the run that was never interrupted to 1e-10 relative in float64.
"""

import io
import itertools
import json
import os
import pickle
import shutil
import threading
import time
from contextlib import ExitStack, redirect_stdout

import pytest
import shared_jobs as jobs
import torch
from processes import results, run

from opus_bench import schema
from opus_bench.distributed.world import ProcessError, World
from opus_bench.distributed.pretrain import PretrainConfig, pretrain, update
from opus_bench.sequences import Sequences
from opus_bench.distributed.checkpoint import newest, newest_whole, read
from opus_bench.train import build_optimizers, rate_factor
from reproduce import pretrain as command
from reproduce.training import locked

# a proxy gradient that serves two steps, from the third of which the resumed run goes on
RUN = ({"optimizer": "muon", "checkpoint_every": 3}, jobs.arm("calibrated", proxy_every=2), "gpt2")
DDP = ({"optimizer": "muon", "checkpoint_every": 3, "parallelism": "ddp"}, *RUN[1:])


@pytest.fixture(scope="module")
def alone():
    """A world of this process alone."""
    world = World.start()
    yield world
    world.stop()


def first_half(world, folder):
    """A run by two processes that ends after step 3, and what goes wrong in others."""
    jobs.train(world, *RUN, folder / "fsdp2", 3)
    jobs.train(world, *DDP, folder / "ddp", 3)
    return {"queue": queue(world, folder), "broken": jobs.broken(world, 1, folder / "broken"),
            "nan": jobs.divide(world, 1, "fsdp2", folder / "nan"),
            "nan ddp": jobs.divide(world, 0, "ddp"),
            "nan held out": jobs.divide(world, 1, "fsdp2", folder / "nan held out", held_out=True)}


def queue(world, folder):
    """What is said, and whether the run was held then, by a start that meets another, and one with no folder."""
    command.POLL, said, blocked, taken = 0.05, io.StringIO(), folder / "file", threading.Event()
    blocked.touch()

    def other():
        with locked(folder, "run"):
            taken.set()
            time.sleep(0.5)

    with ExitStack() as held, redirect_stdout(said):
        if world.rank == 1:
            threading.Thread(target=other).start()
            taken.wait()
        world.check_equal("starts", torch.zeros(1))
        command.hold(held, folder, "run", world)
        with pytest.raises(TimeoutError), locked(folder, "run", 0):
            pass
        world.check_equal("ends", torch.zeros(1))
    with ExitStack() as held, pytest.raises(OSError) as found:
        command.hold(held, blocked, "run", world)
    return said.getvalue(), str(found.value)


def second_half(world, folder):
    return {name: jobs.train(world, *RUN, folder / f"{name}-{world.size}") for name in ("fsdp2", "ddp")}


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A folder with the checkpoints of two processes, and what they said of NaN."""
    folder = tmp_path_factory.mktemp("half")
    return folder, results(first_half, 2, folder)


@pytest.fixture(scope="module")
def whole(alone):
    """The run that is never interrupted."""
    return jobs.train(alone, *RUN)


def check_resumed(found, whole):
    assert len(whole["losses"]) == 5 and len(found["losses"]) == 2
    torch.testing.assert_close(found["losses"], whole["losses"][3:], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found["weights"], whole["weights"], rtol=1e-10, atol=1e-10)
    assert found["sha"] == whole["sha"]  # a chain over the choices of all steps
    assert [m["step"] for m in found["metrics"]] == [m["step"] for m in whole["metrics"]]
    torch.testing.assert_close([m["value"] for m in found["metrics"]], [m["value"] for m in whole["metrics"]],
                               rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [1, 4])
def test_a_checkpoint_of_two_processes_resumes_on_one_and_on_four(half, whole, alone, size):
    folder, _ = half
    for name in ("fsdp2", "ddp"):
        shutil.copytree(folder / name, folder / f"{name}-{size}")
    found = [second_half(alone, folder)] if size == 1 else results(second_half, size, folder)
    for one in found:
        for name in ("fsdp2", "ddp"):
            check_resumed(one[name], whole)


def test_a_loss_that_is_nan_stops_every_process_and_leaves_the_checkpoint(half):
    folder, found = half
    for said in found:
        assert said["nan"][0].startswith("step 2: the training loss of process 1 is nan")
        assert said["nan ddp"][0].startswith("step 2: the training loss of process 0 is nan")
        assert said["nan held out"] == (
            "step 3: the validation loss is nan; the weights have diverged, lower the learning rate", 2)
    for name in ("nan", "nan held out"):
        assert newest(folder / name).name == "step-00000002"


def test_a_second_start_of_a_run_waits_for_the_first_on_all_processes(half):
    folder, found = half
    waits = f"another start of run run is at work in {folder}; waiting for its end\n"
    assert [said["queue"] for said in found] == [(waits, "Not a directory on process 0"),
                                                 ("", "Not a directory on process 0")]


def test_a_fault_of_one_process_that_is_none_of_the_disk_ends_all_and_the_former_checkpoint_stays(half):
    folder, found = half
    for said in found:
        said = said["broken"]
        assert said.startswith("the checkpoint of step 4 could not be written to ")
        assert "(ProcessError: RuntimeError: unexpected pos 64 vs 0 on process 1); step-00000002 stays in force" in said
    assert newest(folder / "broken").name == "step-00000002"


@pytest.mark.parametrize("error, kind, text", [
    (OSError(28, "No space left on device"), OSError, "No space left on device on process 0"),
    (OSError("half a disk"), OSError, "half a disk on process 0"),
    (json.JSONDecodeError("no JSON", "", 0), ValueError, "no JSON: line 1 column 1 .char 0. on process 0"),
    (KeyError("step"), ProcessError, "KeyError: 'step' on process 0")])
def test_what_fails_is_told_by_kind_and_process(error, kind, text):
    def act():
        raise error

    with pytest.raises(kind, match=f"^{text}$"):
        World(0, 1, torch.device("cpu")).together(act)


def test_a_gradient_that_is_not_finite_stops_before_weights_change(alone):
    model = jobs.small("paper")
    config = PretrainConfig(**jobs.CONFIG)
    optimizers = build_optimizers(model, config)
    next(model.parameters()).register_hook(lambda g: g * float("inf"))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match="step 7: the norm of the gradient is (inf|nan) on process 0"):
        update(model, model, optimizers, Sequences(jobs.tokens(2, 8)), config, alone, 7)
    assert all(torch.equal(x, p) for x, p in zip(before, model.parameters()))


@pytest.mark.parametrize("moment, in_force, size", [("half of the data", 2, 2), ("all data, no name", 2, 1),
                                                    ("named, the oldest not deleted", 5, 1)])
def test_killed_while_a_checkpoint_is_written_the_former_is_in_force(alone, tmp_path, moment, in_force, size):
    found = run(jobs.killed, size, tmp_path, moment)
    assert -9 in found  # killed, not failed
    assert newest(tmp_path).name == f"step-{in_force:08d}"
    assert bool(list(tmp_path.glob("*.tmp"))) == (in_force == 2)
    whole = jobs.train(alone, {}, jobs.arm("calibrated"))
    resumed = jobs.train(alone, {}, jobs.arm("calibrated"), folder=tmp_path)
    torch.testing.assert_close(resumed["losses"], whole["losses"][in_force:], rtol=1e-10, atol=1e-10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]  # none half written


class Harmful:
    """A pickle that makes a folder when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_of_other_settings_is_refused(half, alone, tmp_path):
    folder, _ = half
    shutil.copytree(folder / "ddp", tmp_path / "run")
    with pytest.raises(ValueError, match=r"other settings \(buffer 8, now 6; seed 3, now 4\)"):
        jobs.train(alone, {**RUN[0], "buffer": 6, "seed": 4}, *RUN[1:], folder=tmp_path / "run")
    with pytest.raises(ValueError, match="cannot be read .*is not in it|cannot be read .*KeyError"):
        jobs.train(alone, *RUN[:2], "paper", tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000003"]


def test_a_table_of_contents_with_a_payload_is_refused_and_not_executed(half, tmp_path):
    """Also where its digest was made to fit."""
    path = tmp_path / "step-00000003"
    shutil.copytree(newest(half[0] / "ddp"), path)
    (path / ".metadata").write_bytes(pickle.dumps(Harmful(tmp_path / "executed")))
    with pytest.raises(ValueError, match="cannot be read .*names .*mkdir"):
        read(path, jobs.small("gpt2"), [], None, World(0, 1, torch.device("cpu")))
    assert not (tmp_path / "executed").exists()


def turned(content):
    """One byte in the middle of the tensors."""
    return content[:len(content) // 2] + bytes([content[len(content) // 2] ^ 255]) + content[len(content) // 2 + 1:]


@pytest.mark.parametrize("name, damage", [
    ("progress.json", lambda content: content[:-5]),
    ("progress.json", lambda content: content.replace(b"3", b"4", 1)),
    ("progress.json", None), (".metadata", turned), (".metadata", None),
    ("__0_0.distcp", lambda content: content[:-100]), ("__0_0.distcp", turned), ("__0_0.distcp", None)])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_in_force(half, alone, tmp_path, name, damage):
    """A file that is cut, altered or (None) lost."""
    before, last = tmp_path / "step-00000002", tmp_path / "step-00000003"
    for path in (before, last):
        shutil.copytree(newest(half[0] / "ddp"), path)
    (tmp_path / "step-00000004.tmp").mkdir()
    assert newest_whole(tmp_path, alone) == last and not (tmp_path / "step-00000004.tmp").exists()
    if damage is None:
        (last / name).unlink()
    else:
        (last / name).write_bytes(damage((last / name).read_bytes()))
    with pytest.warns(RuntimeWarning, match=f"step-00000003 is damaged .*{name}.*lies as step-00000003.damaged"):
        assert newest_whole(tmp_path, alone) == before
    assert newest_whole(tmp_path, alone) == newest(tmp_path) == before
    assert (last.with_suffix(".damaged") / name).exists() == (damage is not None)


@pytest.mark.parametrize("where", ["torch.distributed.checkpoint.filesystem.FileSystemWriter.write_data",
                                   "opus_bench.distributed.checkpoint._put_in_force"])
def test_a_checkpoint_that_cannot_be_written_says_so_and_the_former_stays(alone, tmp_path, monkeypatch, where):
    def full_disk(*arguments, **options):
        raise OSError(28, "No space left on device")

    jobs.train(alone, {}, jobs.arm("calibrated"), folder=tmp_path, stop=2)
    monkeypatch.setattr(where, full_disk)
    with pytest.raises(OSError, match="checkpoint of step 4 .*No space left on device.*step-00000002 stays in"
                                      " force; make room"):
        jobs.train(alone, {}, jobs.arm("calibrated"), folder=tmp_path)
    assert newest(tmp_path).name == "step-00000002"


def test_sharded_weights_cannot_be_scored_again_after_running_out_of_memory(alone):
    said = jobs.starved(alone, "fsdp2", 3, {})
    assert said == ("out of GPU memory at step 0, scoring 8 candidates at a time on process 0; give a smaller scoring "
                    "microbatch or window")
    assert jobs.starved(alone, "ddp", 0, {}).startswith("out of GPU memory at step 0, scoring 1 candidates at a time")


def test_progress_is_plain_json_and_a_run_that_is_done_is_not_trained_again(alone, tmp_path):
    found = jobs.train(alone, {}, jobs.arm("calibrated"), folder=tmp_path)
    content = json.loads((newest(tmp_path) / "progress.json").read_text())
    assert content["progress"]["selected_sha256"] == found["sha"]
    assert sum(content["progress"]["offered"].values()) == 5 * 8
    again = jobs.train(alone, {}, jobs.arm("calibrated"), folder=tmp_path)
    assert again["losses"] == [] and again["sha"] == found["sha"]
    for name, p in found["weights"].items():
        assert torch.equal(p, again["weights"][name])


def test_the_wall_clock_runs_on_over_all_starts_of_a_run(alone, tmp_path, monkeypatch):
    """A second passes whenever time is read: twice a clock, once at a start, a checkpoint and the end."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    whole = jobs.train(alone, {}, jobs.arm("calibrated"), folder=tmp_path / "whole")
    readings = 2 * (5 + 5 + 3)  # of clocks: steps, selections, validation losses
    assert (whole["clocks_s"], whole["wall_s"]) == (readings / 2, readings + 3 + 1)  # checkpoints at 2, 4, 5; end
    jobs.train(alone, {}, jobs.arm("calibrated"), folder=tmp_path / "stopped", stop=2)
    next(itertools.islice(ticks, 1000, None))  # a thousand seconds in which nothing runs
    resumed = jobs.train(alone, {}, jobs.arm("calibrated"), folder=tmp_path / "stopped")
    assert (resumed["clocks_s"], resumed["wall_s"]) == (whole["clocks_s"], whole["wall_s"])


@pytest.mark.parametrize("options, message", [
    ({"selection_ratio": 0.0}, "selection_ratio must be in"),
    ({"buffer": 1, "selection_ratio": 0.4}, "selects nothing"),
    ({"optimizer": "sgd"}, "optimizer must be adamw or muon, got 'sgd'"),
    ({"microbatch": 0}, "microbatch must be at least 1 sequence, got 0"),
    ({"precision": "float16"}, "precision must be"), ({"warmup": 2.0}, "warmup must be a share in"),
    ({"steps": 0}, "steps must be at least 1, got 0"), ({"parallelism": "tp"}, "parallelism must be ddp or fsdp2"),
])
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PretrainConfig(**jobs.CONFIG | options)


def test_the_buffer_must_fall_evenly_to_the_processes(alone):
    world = World(0, 3, alone.device)
    with pytest.raises(ValueError, match="4 selected sequences cannot be trained on by 3 processes"):
        pretrain(PretrainConfig(**jobs.CONFIG), jobs.small("paper"), jobs.FakePool(1), jobs.FakePool(2), None, world)


def test_the_rate_rises_in_the_first_share_and_falls_in_the_last():
    rates = [rate_factor(step, 10, 0.2, 0.4) for step in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.5])


def test_only_local_selection_is_another_run_on_another_number_of_processes():
    shared, local = (PretrainConfig(**jobs.CONFIG, selection=scope) for scope in ("global", "local"))
    assert shared.identity(2) == shared.identity(4) and local.identity(2) != local.identity(4)
    spread = PretrainConfig(**jobs.CONFIG | {"parallelism": "ddp", "microbatch": 3, "checkpoint_every": 7})
    assert spread.identity(1) == shared.identity(1)


def test_the_run_id_of_fixed_settings_stays_as_it_is():
    """A setting that is renamed, or whose default moves, would part old records from their commands."""
    config = PretrainConfig(steps=10, length=64, buffer=8, seed=3)
    assert schema.run_id("pretrain", config.identity(2), "0" * 64, "0" * 64) == "7b6a41707fc7"
