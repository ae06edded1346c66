"""Faults put upon a run of two processes that train one model: the same command then ends with the same record.

`python -m tests.faults` runs these tests and writes what it counted to docs/faults.md.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from fault_runs import kill_before_write, limit_files
from shared_faults import SIZE, VARIANTS, Group, at_step, no_room_for_a_name, not_a_number, write_inputs
from test_faults import cut, flip, note, wait_for

EVERY = tuple(range(SIZE))
ORDER = ("fsdp2", "ddp", "ddp", "ddp")  # of trials; the first is the slower
SURVIVED = (1, -signal.SIGTERM, 0)  # lost its group; hung, and was told to end; had no more to do


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """Uninterrupted runs: outcome, seconds and number of writes of each rank, by variant."""
    found = {}
    for variant in VARIANTS:
        for _ in range(1 if found else 2):  # the first of all starts the server of processes
            group = Group(inputs, tmp_path_factory.mktemp(variant) / "results", variant, kill_before_write, {"n": 0})
            started = group.start()
            for rank, process in zip(group.ranks, started):
                wait_for(rank.log, process)
            begun = time.monotonic()
            assert group.end(started) == [0, 0], group.ranks[0].said
            seconds = time.monotonic() - begun
        writes = [rank.log.with_suffix(".count").stat().st_size for rank in group.ranks]
        found[variant] = group.outcome(), seconds, writes
    return found


def resumed(group):
    """The outcome after the same command once more, without a fault."""
    again = Group(group.inputs, group.results, group.variant)
    assert again.end() == [0, 0], [rank.said for rank in again.ranks]
    return again.outcome()


def kill(group, ranks, moment):
    """kill -9 of ranks after so many seconds; exit codes."""
    started = group.start()
    for rank, process in zip(group.ranks, started):
        wait_for(rank.log, process)
    time.sleep(moment)
    for rank in ranks:
        started[rank].kill()
    return group.end(started, grace=0.3)


def test_killed_at_moments_spread_over_the_run(inputs, whole, tmp_path, record_property, trials=10):
    """Rank 0, rank 1 or both, so that each has its turn in each variant."""
    draw, recovered = random.Random(0), 0
    for number in range(trials):
        variant, ranks = ORDER[number % 4], [(0,), (1,), EVERY][number % 3]
        want, seconds, _ = whole[variant]
        moment, codes = seconds * (number + draw.random()) / trials, [0] * SIZE
        while any(codes[rank] != -signal.SIGKILL for rank in ranks):
            group = Group(inputs, tmp_path / f"{number} at {moment}", variant)
            codes, moment = kill(group, ranks, moment), 0.8 * moment  # 0: the run was faster than the one measured
        assert all(code in (*SURVIVED, -signal.SIGKILL) for code in codes)
        recovered += resumed(group) == want
    note(record_property, trials, recovered)


def kill_under_torchrun(group, rank, ready, moment):
    """kill -9 of one process so many seconds after ``ready(what the terminal says)``; torchrun ends the others."""
    launcher, children = group.torchrun(), []
    try:
        end = time.monotonic() + 120
        while not ready(group.ranks[0].log.read_text()) or len(children) < group.size:
            assert launcher.poll() is None and time.monotonic() < end, group.ranks[0].log.read_text()
            children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
            time.sleep(0.005)
        time.sleep(moment)
        os.kill(int(children[rank]), signal.SIGKILL)
        assert launcher.wait(60) == 1
    finally:
        launcher.terminate()
        launcher.wait()
    assert "Signal 9 (SIGKILL)" in group.ranks[0].log.read_text()
    assert not [pid for pid in children if Path("/proc", pid).exists()] and not list(group.results.glob("runs/*"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are found in /proc")
def test_killed_three_times_under_torchrun(inputs, whole, tmp_path, record_property):
    """Before the processes have joined, after the first checkpoint, and on the way back from a checkpoint."""
    draw, (want, seconds, _) = random.Random(3), whole["ddp"]
    group, plan = Group(inputs, tmp_path / "results", "ddp"), "\nrun  "  # which a process prints before it joins
    for rank, ready, span in ((0, lambda said: True, 2.0),
                              (1, lambda said: plan in said and group.checkpoints, 0.2 * seconds),
                              (0, lambda said: said.count(plan) == 2, 0.2 * seconds)):
        kill_under_torchrun(group, rank, ready, span * draw.random())
    assert group.checkpoints[0].name == "step-00000002"
    assert group.torchrun().wait(120) == 0, group.ranks[0].said
    note(record_property, 3, 3 * (group.outcome() == want))


def test_killed_just_before_a_file_is_opened_named_or_deleted(inputs, whole, tmp_path, record_property, trials=10):
    """Process 0, which names, deletes and records, twice as often as the other."""
    draw, recovered = random.Random(1), 0
    for number in range(trials):
        variant, rank = ORDER[number % 4], int(number % 3 == 2)
        want, _, writes = whole[variant]
        n = 1 + int(writes[rank] * (number + draw.random()) / trials)
        group = Group(inputs, tmp_path / str(number), variant, kill_before_write, {"n": n}, suffers=(rank,))
        codes = group.end(grace=0.3)
        assert codes[rank] == -signal.SIGKILL and codes[1 - rank] in SURVIVED
        recovered += resumed(group) == want
    note(record_property, trials, recovered)


def test_ended_in_the_middle_of_writing_a_shard(inputs, whole, tmp_path, record_property):
    """The kernel ends one process where its file reaches a size."""
    draw, recovered = random.Random(2), 0
    for rank in EVERY:
        size = draw.randrange(4_000, 30_000)
        group = Group(inputs, tmp_path / str(rank), "ddp", at_step,
                      {"then": limit_files, "step": 3, "size": size, "killed": True}, suffers=(rank,))
        codes = group.end(grace=0.3)
        assert codes[rank] == -signal.SIGXFSZ and codes[1 - rank]
        assert [path.name for path in group.checkpoints] == ["step-00000002", "step-00000004.tmp"]
        assert size in [path.stat().st_size for path in group.checkpoints[1].iterdir()]
        recovered += resumed(group) == whole[group.variant][0]
    note(record_property, 2, recovered)


@pytest.mark.parametrize("variant, rank", [("fsdp2", 1), ("ddp", 0)])
def test_no_room_for_a_shard_of_one_process(inputs, whole, tmp_path, record_property, variant, rank):
    group = Group(inputs, tmp_path / "results", variant, at_step,
                  {"then": limit_files, "step": 3, "size": 20_000, "killed": False}, suffers=(rank,))
    assert group.end() == [2, 2]
    for one in group.ranks:
        assert one.said.startswith("error: the checkpoint of step 4 could not be written to ")
        assert "step-00000002 stays in force; make room" in one.said
    note(record_property, 1, resumed(group) == whole[variant][0])


def test_no_room_for_the_last_file_of_a_checkpoint(inputs, whole, tmp_path, record_property):
    group = Group(inputs, tmp_path / "results", "ddp", no_room_for_a_name, {"name": "progress.json"})
    assert group.end() == [2, 2]
    for one in group.ranks:
        assert "the checkpoint of step 2 could not be written" in one.said
        assert "No space left on device on process 0); none stays in force" in one.said.replace("OSError: ", "")
    note(record_property, 1, resumed(group) == whole["ddp"][0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gradient_that_is_nan_on_one_process_is_one_error(inputs, whole, tmp_path, record_property, variant):
    group = Group(inputs, tmp_path / "results", variant, not_a_number, {"step": 3}, suffers=(1,))
    assert group.end() == [2, 2]
    for one in group.ranks:
        assert one.said.startswith(f"error: step 3: the norm of the gradient is nan on process {one.rank}; lower the ")
        assert one.log.read_text().count("error: ") == 1 and "Traceback" not in one.log.read_text()
    assert not list(group.results.glob("runs/*"))
    assert [path.name for path in group.checkpoints] == ["step-00000002"]
    note(record_property, 1, resumed(group) == whole[variant][0])


@pytest.fixture(scope="module")
def stopped(inputs, tmp_path_factory):
    """Runs whose processes were killed after step 5, with checkpoints of steps 2 and 4, by variant."""
    found = {}
    for variant in VARIANTS:
        found[variant] = Group(inputs, tmp_path_factory.mktemp(variant) / "results", variant, at_step,
                               {"then": die, "step": 5})
        assert -signal.SIGKILL in found[variant].end(grace=0.3)
        assert [path.name for path in found[variant].checkpoints] == ["step-00000002", "step-00000004"]
    return found


def die(rank, step):
    if step == rank.options["step"]:
        signal.raise_signal(signal.SIGKILL)


DAMAGES = {"shard cut": ("ddp", "__0_0.distcp", cut(0.9)), "shard altered": ("fsdp2", "__1_0.distcp", flip(0.5)),
           "contents cut": ("ddp", ".metadata", cut(0.5)), "progress cut": ("fsdp2", "progress.json", cut(0.5))}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(whole, stopped, tmp_path, record_property, damage):
    variant, name, spoil = DAMAGES[damage]
    group = Group(stopped[variant].inputs, tmp_path / "results", variant)
    shutil.copytree(stopped[variant].results, group.results)
    path = group.checkpoints[1] / name
    path.write_bytes(spoil(path.read_bytes()))
    same = resumed(group) == whole[variant][0]
    said = [one.log.read_text() for one in group.ranks]
    assert "step-00000004 is damaged" in said[0] and name in said[0] and "damaged" not in said[1]
    note(record_property, 1, same)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_of_two_killed_processes_goes_on_in_one(whole, stopped, tmp_path, record_property, variant):
    """To rounding: float32, some hundred units of it."""
    group = Group(stopped[variant].inputs, tmp_path / "results", variant, size=1)
    shutil.copytree(stopped[variant].results, group.results)
    assert group.end() == [0], group.ranks[0].said
    got, want = group.outcome(), whole[variant][0]
    assert got["data"] == want["data"] and got["selection"]["chosen"] == want["selection"]["chosen"]
    near = [m["value"] for m in got["metrics"]] == pytest.approx([m["value"] for m in want["metrics"]], rel=5e-5)
    note(record_property, 1, near and got["run_id"] == want["run_id"])


def test_the_same_run_started_twice_at_once_in_one_folder(inputs, whole, tmp_path, record_property):
    groups = [Group(inputs, tmp_path / "results", "ddp") for _ in range(2)]
    started = [group.start() for group in groups]
    assert [group.end(processes) for group, processes in zip(groups, started)] == [[0, 0], [0, 0]]
    note(record_property, 2, 2 * (groups[0].outcome() == whole["ddp"][0]))
