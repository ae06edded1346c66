"""Small training runs, each in a process of its own that a test may kill, starve or misguide.

Processes come from a server that has imported the heavy modules once.  A run is `reproduce.training.Run` as the
scripts make it, on a corpus of invented words and at a scale of its own.

    python tests/fault_runs.py CACHE RESULTS CLOCK [LOCALE]    # one run in a fresh interpreter
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import locale
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from fake_corpus import SPEC

from opus_bench import train
from opus_bench.archives import ARCHIVES, file_sha256
from opus_bench.results import load, outcome
from reproduce.runner import run_grid
from reproduce.scales import SCALES, Scale
from reproduce.training import Run

TOY = dict(model="ci", steps=8, length=24, buffer=6, proxy_size=3, evaluations=4, validation_sequences=4,
           checkpoint_every=2, adam_lr=0.01, muon_lr=0.01)
OPUS = {"adamw": {"arm": "calibrated", "window": 12, "proxy_every": 4, "microbatch": 2},
        "muon": {"arm": "paper", "window": 12, "sketch_width": 64}}
SCALE = Scale("toy", SPEC, TOY, window=12, sketch_width=64, suite_size=0, seeds=1, note="toy scale")
HEAVY = ("baselines", "reproduce.runner", "reproduce.training", "opus_bench.evaluation.evaluate")

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([*HEAVY, "pytest"])


def prepare(cache: str | Path) -> None:
    """Make this process know the invented archives of a cache, and the scale of the runs here."""
    os.environ["OPUS_BENCH_CACHE"] = str(cache)
    for key, archive in list(ARCHIVES.items()):
        ARCHIVES[key] = dataclasses.replace(archive, sha256=file_sha256(Path(cache) / "archives" / archive.filename))
    SCALES["toy"] = SCALE
    torch.set_num_threads(1)


@dataclass(frozen=True)
class ToyRun(Run):
    """A run that a worker of a grid can make without having been prepared."""

    cache: str = ""
    preloaded = HEAVY

    def execute(self, results_dir: Path, on_progress: Callable[[int], None] = lambda done: None) -> dict:
        prepare(self.cache)
        return super().execute(results_dir, on_progress)


def toy(cache: str | Path, optimizer: str = "adamw") -> ToyRun:
    """One run; a grid is a list of them."""
    config = train.RunConfig("opus", OPUS[optimizer], optimizer=optimizer, **TOY)
    return ToyRun("faults", "no item", "OPUS", None, OPUS[optimizer]["arm"], config, "toy", suite=False,
                  cache=str(cache))


@dataclass
class Trial:
    """A run in a process of its own and what it suffers there."""

    cache: Path
    results: Path
    optimizer: str = "adamw"
    before: Callable[[Trial], None] | None = None  # called in the process ahead of the run
    on_step: Callable[[Trial, int], None] | None = None  # and after every step
    options: dict = field(default_factory=dict)  # of these two

    def __call__(self) -> None:
        prepare(self.cache)
        with open(self.log, "a") as log:
            os.dup2(log.fileno(), 2)
        try:
            if self.before is not None:
                self.before(self)
            toy(self.cache, self.optimizer).execute(
                self.results, lambda step: None if self.on_step is None else self.on_step(self, step))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))  # for the log

    @property
    def log(self) -> Path:
        return self.results.with_suffix(".log")

    @property
    def work(self) -> Path:
        """The run's working folder."""
        return self.results / "work" / toy(self.cache, self.optimizer).run_id

    def start(self) -> multiprocessing.Process:
        process = CONTEXT.Process(target=self)
        process.start()
        return process

    def end(self) -> int:
        """Exit code, or minus the signal that ended the process."""
        process = self.start()
        process.join(120)
        assert process.exitcode is not None, "the process hangs"
        return process.exitcode

    def outcome(self) -> dict:
        """That of the run's record; nothing half-written and no checkpoint is left beside it."""
        (record,) = load(self.results / "runs")
        assert [path.name for path in (self.results / "runs").iterdir()] == [f"{record['run_id']}.json"]
        assert [path.name for path in (self.results / "work" / record["run_id"]).iterdir()] == ["lock"]
        return outcome(record)


# Faults that a process puts upon itself ----------------------------------------------------------


def kill_before_write(trial: Trial) -> None:
    """kill -9 just before a file of the results is opened, named or deleted for the n-th time; n = 0: count them.

    The trial may be a rank of shared_faults.py.
    """
    seen, named = 0, ("os.rename", "os.link", "os.remove", "shutil.rmtree")

    def watch(event: str, arguments: tuple) -> None:
        nonlocal seen
        opened = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        in_a_tree = event == "os.remove" and arguments[1] != -1  # of one that rmtree deletes
        if in_a_tree or (opened or event in named) and str(trial.results) in str(arguments[0]):
            seen += 1
            if seen == trial.options["n"]:
                os.kill(os.getpid(), signal.SIGKILL)
            if not trial.options["n"]:
                os.write(counter, b".")

    counter = os.open(trial.log.with_suffix(".count"), os.O_WRONLY | os.O_CREAT)
    sys.addaudithook(watch)


def limit_files(trial: Trial, step: int) -> None:
    """After a step no file may grow beyond a size; ``killed``: the kernel ends who tries, midway."""
    if step == trial.options["step"]:
        if trial.options["killed"]:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (trial.options["size"], resource.RLIM_INFINITY))


def full_device(trial: Trial) -> None:
    """The first checkpoint is written to a device that is full."""
    trial.work.mkdir(parents=True)
    (trial.work / "checkpoint.pt.tmp").symlink_to("/dev/full")


def not_a_number(trial: Trial) -> None:
    """The loss of an update, or its gradient alone, is NaN."""
    real, updates = train.sample_losses, 0

    def poisoned(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        nonlocal updates
        losses = real(model, tokens)
        if not torch.is_grad_enabled():
            return losses
        updates += 1
        if updates <= trial.options["step"]:
            return losses
        # the root of zero: its value is 0, its slope infinite, and infinity times 0 is NaN
        return losses * torch.nan if trial.options["what"] == "loss" else losses + (0 * losses).sqrt()

    train.sample_losses = poisoned


def shift_clock(seconds: float) -> None:
    """The wall clock is off by so much, and goes back an hour each time it is read."""
    real, reads = time.time, iter(range(10**9))

    class Shifted(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(time.time(), tz)

    time.time, datetime.datetime = (lambda: real() + seconds - 3600 * next(reads)), Shifted


def grid(cache: Path, results: Path) -> None:
    """Two runs with two workers, as a script makes them."""
    prepare(cache)
    runs = [toy(cache, optimizer) for optimizer in OPUS]
    options = argparse.Namespace(scale="toy", results=results, workers=2, dry_run=False)
    sys.exit(run_grid(runs, options, lambda folder: []))


if __name__ == "__main__":
    cache, results, clock, *language = sys.argv[1:]
    if language:
        locale.setlocale(locale.LC_ALL, language[0])
        assert locale.str(1.5) == "1,5"
    for module in HEAVY:  # C code that knows the size of a datetime
        importlib.import_module(module)
    shift_clock(float(clock))
    toy(cache).execute(Path(results))
