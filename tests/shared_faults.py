"""One pre-training run by two processes, any of which a test may kill, starve or misguide.

The processes are those that torchrun would start, with its environment variables, and end as it ends them; they come
from a server that has imported the heavy modules once.  The run is the command of `reproduce.pretrain`, on pools of
invented tokens and a model of two layers that lie in a folder of inputs.
"""

from __future__ import annotations

import errno
import inspect
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from fault_runs import CONTEXT, HEAVY
from processes import HEAVY as SHARED
from processes import free_port
from shared_jobs import small_qwen3

import opus_bench.distributed.pretrain as pretraining
from opus_bench import provenance
from opus_bench.pools.shards import write_shard
from opus_bench.results import load, outcome
from reproduce import pretrain as command

SIZE = 2
STEPS = 6
CONTEXT.set_forkserver_preload([*HEAVY, *SHARED, "pytest", "reproduce.pretrain"])
SETTINGS = ["--steps", str(STEPS), "--length", "12", "--buffer", "4", "--window", "10", "--proxy-size", "4",
            "--validation-every", "3", "--validation-sequences", "3", "--checkpoint-every", "2",
            "--precision", "float32", "--adam-lr", "0.01", "--muon-lr", "0.01"]
VARIANTS = {"fsdp2": ["--optimizer", "muon", "--method", "opus-paper", "--sketch-width", "64"],
            "ddp": ["--parallelism", "ddp", "--method", "opus-calibrated"]}


def write_pools(folder: Path) -> None:
    """Pools of tokens below 50 at folder/pool and folder/proxies."""
    for name in ("pool", "proxies"):
        tokens = np.random.default_rng(len(name)).integers(0, 50, 2_000).astype(np.uint16)
        about = write_shard(folder / name / "a" / "0.bin", tokens)
        manifest = {"format": 1, "domains": {"a": {}}, "tokenizer": {"vocab_size": 50}, "sha256": f"{len(name):064x}",
                    "shards": [{"file": "a/0.bin", "domain": "a", **about}]}
        (folder / name / "manifest.json").write_text(json.dumps(manifest))


def write_inputs(folder: Path) -> Path:
    """Pools and a Qwen3 of two layers."""
    write_pools(folder)
    torch.manual_seed(0)
    small_qwen3().save_pretrained(folder / "qwen3")
    return folder


@dataclass
class Rank:
    """One process of a run and what it suffers."""

    inputs: Path
    results: Path
    variant: str = "fsdp2"
    before: Callable[[Rank], None] | None = None  # called in the process ahead of the run
    options: dict = field(default_factory=dict)  # of that
    rank: int = 0
    size: int = SIZE
    port: int = 0
    version: str = field(default_factory=provenance.code_version)  # hashed once, not in every process

    def __call__(self) -> None:
        os.environ |= {"RANK": str(self.rank), "LOCAL_RANK": str(self.rank), "WORLD_SIZE": str(self.size),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port)}
        torch.set_num_threads(1)
        provenance.code_version = lambda: self.version
        with open(self.log, "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        if self.before is not None:
            self.before(self)
        sys.exit(command.main(self.arguments))

    @property
    def log(self) -> Path:
        return self.results.with_suffix(f".{self.rank}.log")

    @property
    def arguments(self) -> list[str]:
        """Of the command."""
        return ["--model", str(self.inputs / "qwen3"), "--data", str(self.inputs / "pool"),
                "--proxy", str(self.inputs / "proxies"), "--results", str(self.results), *SETTINGS,
                *VARIANTS[self.variant]]

    @property
    def said(self) -> str:
        """The last line on its terminal."""
        return self.log.read_text().strip().splitlines()[-1]


@dataclass
class Group:
    """All processes of a run; one of them, or all, suffer."""

    inputs: Path
    results: Path
    variant: str = "fsdp2"
    before: Callable[[Rank], None] | None = None
    options: dict = field(default_factory=dict)
    suffers: tuple[int, ...] = tuple(range(SIZE))  # ranks
    size: int = SIZE

    def __post_init__(self) -> None:
        port = free_port()
        self.ranks = [Rank(self.inputs, self.results, self.variant, self.before if rank in self.suffers else None,
                           self.options, rank, self.size, port) for rank in range(self.size)]

    def start(self) -> list[multiprocessing.Process]:
        started = [CONTEXT.Process(target=rank) for rank in self.ranks]
        for process in started:
            process.start()
        return started

    def end(self, started: list[multiprocessing.Process] | None = None, grace: float = 60) -> list[int]:
        """Exit codes, or minus the signals that ended the processes.

        Once one has failed the others have so many seconds to end by themselves before they get torchrun's SIGTERM.
        """
        started, deadline = started or self.start(), time.monotonic() + 120
        while any(p.exitcode is None for p in started) and not any(p.exitcode for p in started):
            assert time.monotonic() < deadline, "the processes hang"
            time.sleep(0.005)
        end = time.monotonic() + grace
        for process in started:
            process.join(max(0.0, end - time.monotonic()))
            if process.exitcode is None:
                process.terminate()
                process.join(30)
        codes = [process.exitcode for process in started]
        assert None not in codes, "a process is left"
        return codes

    def torchrun(self) -> subprocess.Popen:
        """The same run as a user starts it; its terminal is the log of rank 0."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.size)]
        with open(self.ranks[0].log, "a") as log:
            return subprocess.Popen([sys.executable, *launcher, "-m", "reproduce.pretrain", *self.ranks[0].arguments],
                                    cwd=Path(__file__).resolve().parent.parent, stdout=log, stderr=subprocess.STDOUT,
                                    env=os.environ | {"OMP_NUM_THREADS": "1"})

    @property
    def checkpoints(self) -> list[Path]:
        """Of the run, also damaged and half-written ones, by name."""
        return sorted(self.results.glob("work/*/checkpoints/*"))

    def outcome(self) -> dict:
        """That of the run's record; nothing half-written and no checkpoint is left."""
        (record,) = load(self.results / "runs")
        assert [path.name for path in (self.results / "runs").iterdir()] == [f"{record['run_id']}.json"]
        assert [path.name for path in (self.results / "work").iterdir()] == [record["run_id"]]
        assert [path.name for path in (self.results / "work" / record["run_id"]).iterdir()] == ["lock"]
        return outcome(record)


# Faults that a process puts upon itself ----------------------------------------------------------


def not_a_number(rank: Rank) -> None:
    """The gradient of this process alone is NaN, in the update of a step; its loss is not."""
    real, updates = pretraining.sample_losses, 0

    def poisoned(model: torch.nn.Module, part):
        nonlocal updates
        losses = real(model, part)
        if not torch.is_grad_enabled():
            return losses
        updates += 1
        return losses if updates <= rank.options["step"] else losses + (0 * losses).sqrt()

    pretraining.sample_losses = poisoned


def no_room_for_a_name(rank: Rank) -> None:
    """The disk is full when a file of a name is to be opened for writing."""
    def watch(event: str, arguments: tuple) -> None:
        if event == "open" and Path(str(arguments[0])).name == rank.options["name"] and arguments[2] & os.O_WRONLY:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sys.addaudithook(watch)


def at_step(rank: Rank) -> None:
    """Calls ``options["then"](rank, step)`` after every step."""
    real = command.pretrain

    def watched(*arguments):
        def after(done: int, loss: float) -> None:
            call["on_step"](done, loss)
            rank.options["then"](rank, done)

        call = inspect.signature(real).bind(*arguments).arguments
        return real(**call | {"on_step": after})

    command.pretrain = watched

