"""Scoring a pool as a datatrove pipeline: on this machine, on Slurm or on Ray.

Every task scores the files whose number is its rank modulo the number of tasks and writes what
`opus_bench.documents.scored` describes, so a task that is run again scores only what is missing, and results do
not depend on the number of tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datatrove.data import Document as PipelineDocument
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep

from opus_bench.documents.files import Fields, pool_files
from opus_bench.documents.scored import score_files, summaries

from .scorers import ScorerOptions, build_scorer

Executor = Literal["local", "slurm", "ray"]


class ScorePool(PipelineStep):
    """One step from a pool's files to their scores on disk; it yields no documents.

    Attributes are plain values, so that the step travels to other machines; a task loads its model itself,
    and only if one of its files is not scored yet.
    """

    name = "static scorer"
    type = "SCORER"

    def __init__(self, scorer: str, options: ScorerOptions, out: Path, sources: list[str], fields: Fields,
                 tokenizer: str | None, chunk: int):
        super().__init__()
        self.scorer, self.options = scorer, options
        self.out, self.sources, self.fields = out, sources, fields
        self.tokenizer, self.chunk = tokenizer, chunk

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[PipelineDocument]:
        """Score this rank's files."""
        files = pool_files(self.sources)
        done = summaries(self.out, files)
        numbers = [number for number in range(rank, len(files), world_size) if done[number] is None]
        if numbers:
            score = build_scorer(self.scorer, self.options).score
            score_files(self.out, files, numbers, score, self._counter(), self.fields, self.chunk, progress=rank == 0)
        for number, summary in enumerate(summaries(self.out, files)):
            if number in numbers and summary is not None:
                self.stat_update("documents", value=summary["documents"], unit="file")
        yield from ()

    def _counter(self) -> Callable[[list[str]], list[int]] | None:
        if self.tokenizer is None:
            return None
        from opus_bench.documents.proxy import token_counter

        return token_counter(self.tokenizer)


@dataclass(frozen=True)
class Resources:
    """Where and how tasks run; time ("HH:MM:SS") and partition are Slurm's and needed there.

    Raises:
        ValueError: for Slurm without time and partition, and for numbers below 1.
    """

    executor: Executor = "local"
    tasks: int = 1
    workers: int = 1
    time: str | None = None
    partition: str | None = None
    cpus: int = 1
    gpus: int = 0
    memory_gb: int = 8

    def __post_init__(self) -> None:
        for name in ("tasks", "workers", "cpus", "memory_gb"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.executor == "slurm" and (self.time is None or self.partition is None):
            raise ValueError("Slurm needs a time limit and a partition; give --time HH:MM:SS and --partition NAME")


def executor(step: PipelineStep, out: Path, resources: Resources) -> PipelineExecutor:
    """datatrove's executor of the step; logs go to ``out``/logs."""
    # the files of scores say what is done, not datatrove's list of completed tasks
    common: dict[str, Any] = {"tasks": resources.tasks, "workers": resources.workers, "logging_dir": str(out / "logs"),
                              "skip_completed": False}
    if resources.executor == "local":
        return LocalPipelineExecutor([step], **common)
    machine: dict[str, Any] = {"cpus_per_task": resources.cpus, "gpus_per_task": resources.gpus,
                               "mem_per_cpu_gb": max(1, resources.memory_gb // resources.cpus)}
    if resources.executor == "ray":
        return RayPipelineExecutor([step], **common, **machine)
    return SlurmPipelineExecutor([step], **common, **machine, time=resources.time, partition=resources.partition,
                                 job_name="opus_bench_score", slurm_logs_folder=str(out / "logs" / "slurm"))
