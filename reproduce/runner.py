"""Runs a list of runs: plans, skips what is done, works in parallel, resumes, reports.

A run is done when its record exists.  An unfinished one goes on from its checkpoint.  Each worker
is a process of its own with one thread of torch, so numbers do not depend on how many there are.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opus_bench import provenance, results, schema
from opus_bench.corpus import Corpus, build_corpus
from opus_bench.train import RunConfig

from .scales import SCALES, Scale

ROOT = Path(__file__).resolve().parent.parent
SUITE_SEED = 0
PRELOADED = ["baselines", "opus_bench.train", "opus_bench.evaluate", "lm_eval.models.huggingface"]


@dataclass(frozen=True)
class Run:
    """One run of an experiment: a row of its table, with a seed."""

    experiment: str  # reproduce/<experiment>.py
    item: str  # the paper's table or figure
    method: str  # row of our table
    paper_row: str | None  # row of the paper's, if it has one
    arm: str | None  # paper, released or calibrated, for OPUS
    config: RunConfig
    scale: str
    deviations: tuple[str, ...] = ()  # from the paper's setting
    paper_tasks: bool = False  # evaluate the paper's tasks too (needs a hub)

    @property
    def label(self) -> str:
        """The method with its arm."""
        return self.method if self.arm is None else f"{self.method} ({self.arm})"

    @property
    def settings(self) -> dict[str, Any]:
        """All that determines the numbers but data and code, as plain values."""
        scale = SCALES[self.scale]
        settings = dataclasses.asdict(self.config)
        settings["betas"] = list(self.config.betas)
        settings["window"] = self.config.selector_options.get("window")
        settings["suite_size"], settings["suite_seed"] = scale.suite_size, SUITE_SEED
        settings["paper_tasks"] = self.paper_tasks
        return settings

    @property
    def run_id(self) -> str:
        """Identity of the run: the name of its record."""
        spec = SCALES[self.scale].corpus.sha256
        return schema.run_id(self.experiment, self.settings, spec, provenance.code_version())


def arguments(description: str) -> argparse.Namespace:
    """The options that every script has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=list(SCALES), default="smoke",
                        help="size of the runs (default: smoke, about 17 minutes on 2 cores)")
    parser.add_argument("--results", type=Path, default=None,
                        help="folder for records, tables and figures "
                             "(default: results, or results/<scale> for other scales than smoke)")
    parser.add_argument("--seeds", type=int, default=None, help="seeds per method (default: the scale's)")
    parser.add_argument("--methods", nargs="+", default=None, metavar="NAME",
                        help="only these rows of the table (default: all)")
    parser.add_argument("--optimizers", nargs="+", default=None, choices=("adamw", "muon"),
                        help="default: adamw")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1),
                        help="processes side by side, one core each (default: %(default)s)")
    parser.add_argument("--paper-tasks", action="store_true",
                        help="evaluate the paper's own tasks as well; needs a hub and hours")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and their cost, and stop")
    options = parser.parse_args()
    if options.workers < 1:
        parser.error(f"--workers must be at least 1, got {options.workers}")
    if options.seeds is not None and options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    if options.results is None:
        options.results = ROOT / "results" if options.scale == "smoke" else ROOT / "results" / options.scale
    return options


def choose(runs: Sequence[Run], options: argparse.Namespace) -> list[Run]:
    """The runs that the options ask for."""
    known = list(dict.fromkeys(run.label for run in runs))
    for name in options.methods or []:
        if name not in known:
            raise ValueError(f"unknown method {name!r}; known: {', '.join(known)}")
    return [run for run in runs if options.methods is None or run.label in options.methods]


Write = Callable[[Path], Sequence[Path]]


def main(make_runs: Callable[[argparse.Namespace], list[Run]], description: str, write: Write) -> int:
    """Entry point of a script: exit code 0, 2 after one line about bad input, 130 on ctrl-C.

    ``write`` turns a results folder into the script's tables and figures and returns their paths.
    """
    options = arguments(description)
    try:
        return run_grid(choose(make_runs(options), options), options, write)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: nothing is lost, the same command goes on from here", file=sys.stderr)
        return 130


def run_grid(runs: list[Run], options: argparse.Namespace, write: Write) -> int:
    """Print the plan, execute what is not done, write tables and figures."""
    scale = SCALES[options.scale]
    records = options.results / "runs"
    results.check_writable(records)
    done = {run.run_id for run in runs if results.done(records, run.run_id)}
    todo = [run for run in runs if run.run_id not in done]
    print(scale.note)
    _print_plan(runs, done, results.load(records), options.workers)
    if options.dry_run:
        return 0
    if todo:
        started = time.perf_counter()
        corpus = build_corpus(scale.corpus)
        _suite(corpus, scale)  # built once, before workers need it
        peak = _work(todo, options)
        print(f"{len(todo)} runs in {(time.perf_counter() - started) / 60:.1f} min; "
              f"peak memory of all processes {peak / 1e9:.1f} GB")
    for path in write(options.results):
        print(f"wrote {os.path.relpath(path)}")
    return 0


def _print_plan(runs: list[Run], done: set[str], records: list[dict], workers: int) -> None:
    tokens = 0
    for run in runs:
        c = run.config
        state = "done" if run.run_id in done else "to do"
        tokens += 0 if state == "done" else c.update_tokens
        print(f"  {run.run_id}  {state:5}  {run.label:18} {c.optimizer:6} seed {c.seed}  "
              f"{c.steps} steps x {c.selected_size} of {c.buffer} x {c.length} tokens")
    todo = [run for run in runs if run.run_id not in done]
    print(f"{len(runs)} runs, {len(done)} done, {tokens:,} update tokens to go{_estimate(todo, records, workers)}")


def _estimate(todo: list[Run], records: list[dict], workers: int) -> str:
    """What the records at hand say that the rest will take: seconds per step and per evaluation."""
    seconds = 0.0
    for run in todo:
        like = [r for r in records if r["scale"] == run.scale]
        like = [r for r in like if (r["method"], r["arm"]) == (run.method, run.arm)] or like
        if not like:
            return "; no record here says how long they take"
        each = [run.config.steps * (r["timing"]["wall_s"] - r["timing"]["eval_s"]) / r["config"]["steps"]
                + r["timing"]["eval_s"] for r in like]
        seconds += sum(each) / len(each)
    return f"; about {seconds / workers / 60:.0f} min going by the records here" if todo else ""


def _work(todo: list[Run], options: argparse.Namespace) -> int:
    """Execute runs in worker processes with one progress bar; returns the peak of their memory."""
    from tqdm import tqdm

    os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when a worker starts
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context("forkserver")  # imports once, then a fresh process a run
    context.set_forkserver_preload(PRELOADED)
    queue = context.SimpleQueue()
    units = {run.run_id: run.config.steps + evaluation_units(run.config) for run in todo}
    bar = tqdm(total=sum(units.values()), unit="step", desc="runs", smoothing=0.05, mininterval=1)
    seen: dict[str, int] = {}
    memory = _Memory()

    def listen() -> None:
        while (message := queue.get()) is not None:
            run_id, done = message
            bar.update(done - seen.get(run_id, 0))
            seen[run_id] = done

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    # a fresh process for each run, so that its peak memory is its own
    pool = ProcessPoolExecutor(options.workers, mp_context=context, initializer=_start_worker,
                               initargs=(queue,), max_tasks_per_child=1)
    try:
        futures = {pool.submit(_execute_in_worker, run, options.results): run for run in todo}
        for future in as_completed(futures):
            run = futures[future]
            try:
                future.result()
            except Exception as error:
                raise ValueError(f"run {run.run_id} ({run.label}, seed {run.config.seed}): {error}") from error
            bar.set_postfix_str(f"{run.label} seed {run.config.seed} done")
    except BaseException:
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        queue.put(None)
        listener.join()
        bar.close()
        memory.stop()
    return memory.peak


class _Memory:
    """Samples the resident memory of this process and its children twice a second."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        import psutil

        me = psutil.Process()
        while not self._stop.wait(0.5):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.Error:
                    pass
            self.peak = max(self.peak, total)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


_worker: dict[str, Any] = {}


def _start_worker(queue) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers on ctrl-C
    _worker.update(queue=queue)


def _execute_in_worker(run: Run, results_dir: Path) -> None:
    def on_progress(done: int) -> None:
        if not multiprocessing.parent_process().is_alive():
            os._exit(1)  # killed: leave the run to whoever resumes it
        _worker["queue"].put((run.run_id, done))

    execute(run, results_dir, on_progress)


def evaluation_units(config: RunConfig) -> int:
    """What the final evaluation counts for in the progress bar, in steps."""
    return max(1, config.steps // 5)


def _suite(corpus: Corpus, scale: Scale):
    from opus_bench.suite import write_suite

    target = corpus.spec.target
    directory = corpus.directory.parent / f"suite-{corpus.spec.sha256[:12]}-{scale.suite_size}-{SUITE_SEED}"
    return write_suite(
        directory,
        documents=corpus.documents("evaluation", target),
        reference_texts=corpus.documents("train", target),
        bpb_documents={d: corpus.documents("evaluation", d) for d in corpus.domains},
        size=scale.suite_size,
        seed=SUITE_SEED,
    )


def execute(run: Run, results_dir: Path, on_progress: Callable[[int], None] = lambda done: None) -> dict:
    """Make one record, or return it if it is there.  Two processes never work on the same run."""
    from filelock import FileLock

    from baselines import build_selector
    from opus_bench.evaluate import evaluate
    from opus_bench.paper_suite import PAPER_TASKS, evaluate_paper_suite, hub_problem
    from opus_bench.train import train, weights_sha256

    scale, config = SCALES[run.scale], run.config
    work = results_dir / "work" / run.run_id
    work.mkdir(parents=True, exist_ok=True)
    record_path = results.record_path(results_dir / "runs", run.run_id)
    checkpoint = work / "checkpoint.pt"
    with FileLock(work / "lock"):
        if record_path.exists():
            return results.read(record_path)
        corpus = build_corpus(scale.corpus, progress=False)
        suite = _suite(corpus, scale)
        selector = build_selector(config.selector, dict(config.selector_options), corpus, config.length)
        model, progress = train(config, corpus, selector, checkpoint, on_progress)
        with progress.clock("eval_s"):
            rows = evaluate(model, corpus.tokenizer(), suite)
            if run.paper_tasks:
                rows += evaluate_paper_suite(model, corpus.tokenizer())
            else:
                reason = "no hub" if hub_problem() else "--paper-tasks not given"
                rows += [{"task": task.name, "status": f"not run: {reason}"} for task in PAPER_TASKS]
        selection = {"offered": progress.offered, "chosen": progress.chosen,
                     "per_step": progress.per_step, "notes": []}
        record = {
            "schema": schema.SCHEMA,
            "run_id": run.run_id,
            "experiment": run.experiment,
            "scale": run.scale,
            "arm": run.arm,
            "method": run.method,
            "paper": {"arxiv": schema.ARXIV, "item": run.item, "row": run.paper_row},
            "config": run.settings,
            "deviations": list(run.deviations),
            "data": {
                "spec_sha256": corpus.spec.sha256,
                "train_sha256": corpus.train_sha256,
                "proxy_sha256": corpus.proxy_sha256,
                "tokenizer_sha256": corpus.manifest["files"]["tokenizer.json"],
                "suite_sha256": suite.sha256,
                "selected_sha256": progress.selected_sha256,
                "target_domain": corpus.spec.target,
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
            "selection": selection,
            "final": {"weights_sha256": weights_sha256(model)},
        }
        results.write(record, results_dir / "runs")
        checkpoint.unlink(missing_ok=True)
    on_progress(config.steps + evaluation_units(config))
    return record
