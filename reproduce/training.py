"""A training run and its record: train, evaluate, write.

A run's identity is its settings, its corpus and the version of the code; this file enters none of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opus_bench import provenance, results, schema
from opus_bench.corpus import Corpus, build_corpus
from opus_bench.train import RunConfig

from .scales import SCALES

SUITE_SEED = 0
CHECKPOINT = "checkpoint.pt"  # in the working folder of a run


@dataclass(frozen=True)
class Run:
    """One training run of an experiment: a row of its table, with a seed.

    Raises:
        ValueError: the paper's tasks are asked for without the suite.
    """

    experiment: str  # reproduce/<experiment>.py
    item: str  # the paper's table or figure
    method: str  # row of our table
    paper_row: str | None  # row of the paper's, if it has one
    arm: str | None  # paper, released or calibrated, for OPUS
    config: RunConfig
    scale: str
    deviations: tuple[str, ...] = ()  # from the paper's setting
    paper_tasks: bool = False  # evaluate the paper's tasks too (needs a hub)
    suite: bool = True  # evaluate the offline suite; without it the record's losses are all there is

    unit = "update tokens"  # of ``amount``

    def __post_init__(self) -> None:
        if self.paper_tasks and not self.suite:
            raise ValueError(f"{self.experiment} compares losses only (suite=False), so paper_tasks=True cannot be "
                             "kept; leave out --paper-tasks")

    @property
    def preloaded(self) -> tuple[str, ...]:
        """Modules that are imported once for all workers."""
        evaluation = ("opus_bench.evaluation.evaluate", "lm_eval.models.huggingface")
        return ("baselines", "opus_bench.train", *(evaluation if self.suite else ()))

    @property
    def label(self) -> str:
        """The method with its arm."""
        return self.method if self.arm is None else f"{self.method} ({self.arm})"

    @property
    def suite_size(self) -> int:
        """Items per task of the offline suite; 0 without it."""
        return SCALES[self.scale].suite_size if self.suite else 0

    @property
    def settings(self) -> dict[str, Any]:
        """All that determines the numbers but data and code, as plain values."""
        settings = dataclasses.asdict(self.config)
        settings["betas"] = list(self.config.betas)
        settings["domains"] = None if self.config.domains is None else list(self.config.domains)
        settings["window"] = self.config.selector_options.get("window")
        settings["suite_size"], settings["suite_seed"] = self.suite_size, SUITE_SEED
        settings["paper_tasks"] = self.paper_tasks
        return settings

    @property
    def run_id(self) -> str:
        """Identity of the run: the name of its record."""
        spec = SCALES[self.scale].corpus.sha256
        return schema.run_id(self.experiment, self.settings, spec, provenance.code_version())

    @property
    def units(self) -> int:
        """Length of the run in the progress bar: its steps and what its evaluation counts for."""
        return self.config.steps + (evaluation_units(self.config) if self.suite else 0)

    @property
    def amount(self) -> int:
        """Tokens trained on."""
        return self.config.update_tokens

    def describe(self) -> str:
        """The run in the plan, without its id."""
        c = self.config
        return (f"{self.label:18} {c.optimizer:6} seed {c.seed}  "
                f"{c.steps} steps x {c.selected_size} of {c.buffer} x {c.length} tokens")

    def cost(self, records: Sequence[dict]) -> float | None:
        """Seconds that the run will take by the training records of its scale, None if there is none.

        Steps and evaluation are counted apart; records of the same method and arm go before others, and
        so do records that evaluate what this run evaluates.
        """
        like = [r for r in records if r["scale"] == self.scale and "measured" not in r["config"]]
        like = [r for r in like if (r["method"], r["arm"]) == (self.method, self.arm)] or like
        like = [r for r in like if bool(r["config"]["suite_size"]) == self.suite] or like
        each = [self.config.steps * (r["timing"]["wall_s"] - r["timing"]["eval_s"]) / r["config"]["steps"]
                + r["timing"]["eval_s"] for r in like]
        return sum(each) / len(each) if each else None

    def prepare(self, corpus: Corpus) -> None:
        """Build what all workers share, once, before they need it."""
        if self.suite:
            _suite(corpus, self.suite_size)

    def execute(self, results_dir: Path, on_progress: Callable[[int], None] = lambda done: None) -> dict:
        """Make the record, or return it if it is there.  Two processes never work on the same run.

        ``on_progress`` is told how many of ``units`` are done.  An unfinished run goes on from its checkpoint.
        """
        from baselines import build_selector
        from opus_bench.checkpoint import remove_checkpoints
        from opus_bench.train import train, weights_sha256

        config = self.config
        record_path = results.record_path(results_dir / "runs", self.run_id)
        with locked(results_dir, self.run_id) as work:
            checkpoint = work / CHECKPOINT
            if record_path.exists():
                remove_checkpoints(checkpoint)  # of who was killed after writing the record
                return results.read(record_path)
            corpus = build_corpus(SCALES[self.scale].corpus, progress=False)
            suite = _suite(corpus, self.suite_size) if self.suite else None
            selector = build_selector(config.selector, dict(config.selector_options), corpus, config.length)
            model, progress = train(config, corpus, selector, checkpoint, on_progress)
            with progress.clock("eval_s"):
                rows = self._evaluate(model, corpus, suite)
            record = {
                "schema": schema.SCHEMA,
                "run_id": self.run_id,
                "experiment": self.experiment,
                "scale": self.scale,
                "arm": self.arm,
                "method": self.method,
                "paper": {"arxiv": schema.ARXIV, "item": self.item, "row": self.paper_row},
                "config": self.settings,
                "deviations": list(self.deviations),
                "data": {
                    **corpus_hashes(corpus),
                    "suite_sha256": suite.sha256 if suite else None,
                    "selected_sha256": progress.selected_sha256,
                },
                "code": {"version": provenance.code_version(), **provenance.git_state()},
                "environment": provenance.environment(),
                "timing": {
                    "wall_s": progress.train_s + progress.select_s + progress.eval_s,
                    "train_s": progress.train_s,
                    "select_s": progress.select_s,
                    "eval_s": progress.eval_s,
                    "peak_bytes": progress.peak_bytes,
                    # a static score of the whole pool, made once for all seeds; not part of select_s
                    "static_scoring_s": getattr(selector, "scoring_s", 0.0),
                },
                "metrics": progress.metrics,
                "evals": rows,
                "selection": {"offered": progress.offered, "chosen": progress.chosen,
                              "per_step": progress.per_step, "notes": progress.notes},
                "final": {"weights_sha256": weights_sha256(model)},
            }
            results.write(record, results_dir / "runs")
            remove_checkpoints(checkpoint)
        on_progress(self.units)
        return record

    def _evaluate(self, model, corpus: Corpus, suite) -> list[dict]:
        from opus_bench.evaluation.evaluate import evaluate
        from opus_bench.evaluation.paper_suite import PAPER_TASKS, evaluate_paper_suite, hub_problem

        rows = evaluate(model, corpus.tokenizer(), suite) if suite else []
        if self.paper_tasks:
            return rows + evaluate_paper_suite(model, corpus.tokenizer())
        if not self.suite:
            reason = "this script compares losses"
        else:
            reason = "no hub" if hub_problem() else "--paper-tasks not given"
        return rows + [{"task": task.name, "status": f"{schema.NOT_RUN}{reason}"} for task in PAPER_TASKS]


def evaluation_units(config: RunConfig) -> int:
    """What the final evaluation counts for in the progress bar, in steps."""
    return max(1, config.steps // 5)


def corpus_hashes(corpus: Corpus) -> dict[str, str]:
    """The part of a record's ``data`` that the corpus determines."""
    return {
        "spec_sha256": corpus.spec.sha256,
        "train_sha256": corpus.train_sha256,
        "proxy_sha256": corpus.proxy_sha256,
        "tokenizer_sha256": corpus.manifest["files"]["tokenizer.json"],
        "target_domain": corpus.spec.target,
    }


@contextmanager
def locked(results_dir: Path, run_id: str, wait: float = -1) -> Iterator[Path]:
    """The working folder of a run, made and held by this process alone until the block ends.

    What a killed process left of writing the run's record is swept away.

    Raises:
        TimeoutError: if another process holds it for ``wait`` seconds more; by default it is waited for.
    """
    from filelock import FileLock

    work = results_dir / "work" / run_id
    work.mkdir(parents=True, exist_ok=True)
    with FileLock(work / "lock", timeout=wait):
        for half_written in (results_dir / "runs").glob(f".{run_id}.*.tmp"):
            half_written.unlink()
        yield work


@functools.lru_cache
def _suite(corpus: Corpus, size: int):
    from opus_bench.evaluation.suite import corpus_suite

    return corpus_suite(corpus, size, SUITE_SEED)
