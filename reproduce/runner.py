"""Runs a list of runs: plans, skips what is done, works in parallel, resumes, reports.

A run is done when its record exists.  An unfinished one goes on from its checkpoint, or begins again
if it keeps none.  Each worker is a process of its own with one thread of torch, so numbers do not
depend on how many there are.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol, TypeVar

from opus_bench import results
from opus_bench.checkpoint import remove_checkpoints
from opus_bench.corpus import Corpus, build_corpus
from opus_bench.report import PIPELINE_SCALES
from opus_bench.train import RunConfig

from . import paper_launch
from .paper_scale import GPU_SCALES, PaperRun
from .scales import SCALES
from .training import CHECKPOINT

ROOT = Path(__file__).resolve().parent.parent


class Job(Protocol):
    """What the runner knows of a run: `training.Run` and `measurement.Measurement` have all of it."""

    scale: str
    config: RunConfig
    run_id: str  # name of the record, which says that the run is done
    label: str  # row of the table
    units: int  # length in the progress bar
    amount: int  # what the plan counts, in ``unit``
    unit: str
    preloaded: tuple[str, ...]  # modules imported once for all workers

    def describe(self) -> str:
        """The run in the plan, without its id."""

    def cost(self, records: Sequence[dict]) -> float | None:
        """Seconds that the run will take by these records, None if they do not say."""

    def prepare(self, corpus: Corpus) -> None:
        """Build, once and cached, what workers share."""

    def execute(self, results_dir: Path, on_progress: Callable[[int], None]) -> dict:
        """Make the record, or return it if it is there."""


def arguments(description: str, large: bool, scales: Sequence[str] = PIPELINE_SCALES) -> argparse.Namespace:
    """The options that every script has; ``scales``: its own on CPUs; ``large``: those on GPUs too."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=[*scales, *(GPU_SCALES if large else ())], default="smoke",
                        help="size of the runs (default: smoke); how long each takes is said above" +
                             (", and for small (one GPU) and paper by --dry-run" if large else ""))
    parser.add_argument("--results", type=Path, default=None,
                        help="folder for records, tables and figures "
                             "(default: results for smoke and cpu, results/<scale> for the others)")
    parser.add_argument("--seeds", type=int, default=None, help="number of seeds (default: the script's for the scale)")
    parser.add_argument("--methods", nargs="+", default=None, metavar="NAME",
                        help="only these rows of a table of methods (default: all)")
    parser.add_argument("--optimizers", nargs="+", default=None, choices=("adamw", "muon"),
                        help="default: adamw where methods are compared, both where something is measured")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1),
                        help="processes side by side, one core each (default: %(default)s)")
    parser.add_argument("--paper-tasks", action="store_true",
                        help="training runs: evaluate the paper's own tasks as well; needs a hub and hours")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and their cost, and stop")
    if large:
        paper_launch.add_options(parser)
    options = parser.parse_args()
    if options.workers < 1:
        parser.error(f"--workers must be at least 1, got {options.workers}")
    if options.seeds is not None and options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    if options.results is None:
        options.results = ROOT / "results" / ("" if options.scale in ("smoke", "cpu") else options.scale)
    return options


Labelled = TypeVar("Labelled", Job, PaperRun)


def choose(runs: Sequence[Labelled], options: argparse.Namespace) -> list[Labelled]:
    """The runs that the options ask for."""
    known = list(dict.fromkeys(run.label for run in runs))
    for name in options.methods or []:
        if name not in known:
            raise ValueError(f"unknown method {name!r}; known: {', '.join(known)}")
    return [run for run in runs if options.methods is None or run.label in options.methods]


Write = Callable[[Path], Sequence[Path]]


def main(make_runs: Callable[[argparse.Namespace], Sequence[Job]], description: str, write: Write,
         large_runs: Callable[[argparse.Namespace], Sequence[PaperRun]] | None = None,
         large_scales: Sequence[str] = GPU_SCALES, scales: Sequence[str] = PIPELINE_SCALES) -> int:
    """Entry point of a script: exit code 0, 2 after one line about bad input, 130 on ctrl-C.

    ``write`` turns a results folder into the script's tables and figures and returns their paths; ``large_runs``
    makes the runs of ``large_scales``, small and paper, which a script without it does not have; ``scales`` are those
    that it has on CPUs.
    """
    options = arguments(description, large_runs is not None, scales)

    def act() -> int:
        if large_runs is not None and options.scale in large_scales:
            return paper_launch.launch(choose(large_runs(options), options), options, write)
        return run_grid(choose(make_runs(options), options), options, write)

    return ended(act, "what is done is kept, the same command goes on from here")


def ended(act: Callable[[], int], interrupted: str) -> int:
    """What ``act`` returns; 2 after one line about bad input, 130 on ctrl-C after a line that says ``interrupted``."""
    try:
        return act()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted: {interrupted}", file=sys.stderr)
        return 130


def run_grid(runs: list[Job], options: argparse.Namespace, write: Write, known: Sequence[dict] = ()) -> int:
    """Print the plan, execute what is not done, write tables and figures.

    ``known``: records of another folder, by which the time of the runs is estimated as well.
    """
    scale = SCALES[options.scale]
    records = options.results / "runs"
    results.check_writable(records)
    done = {run.run_id for run in runs if results.done(records, run.run_id)}
    todo = [run for run in runs if run.run_id not in done]
    print(scale.note)
    _print_plan(runs, done, [*known, *results.load(records)], options.workers)
    if options.dry_run:
        return 0
    for identity in done:  # left by who was killed just after writing the record
        remove_checkpoints(options.results / "work" / identity / CHECKPOINT)
    if todo:
        started = time.perf_counter()
        corpus = build_corpus(scale.corpus)
        for run in todo:
            run.prepare(corpus)
        peak = _work(todo, options)
        print(f"{len(todo)} runs in {(time.perf_counter() - started) / 60:.1f} min; "
              f"peak memory of all processes {peak / 1e9:.1f} GB")
    for path in write(options.results):
        print(f"wrote {os.path.relpath(path)}")
    return 0


def _print_plan(runs: list[Job], done: set[str], records: list[dict], workers: int) -> None:
    left = Counter()
    for run in runs:
        state = "done" if run.run_id in done else "to do"
        left[run.unit] += 0 if state == "done" else run.amount
        print(f"  {run.run_id}  {state:5}  {run.describe()}")
    todo = [run for run in runs if run.run_id not in done]
    to_go = ", ".join(f"{amount:,} {unit} to go" for unit, amount in left.items())
    print(f"{len(runs)} runs, {len(done)} done, {to_go}{_estimate(todo, records, workers)}")


def _estimate(todo: list[Job], records: list[dict], workers: int) -> str:
    """What the records at hand say that the rest will take."""
    seconds = [run.cost(records) for run in todo]
    if None in seconds:
        return "; no record here says how long they take"
    return f"; about {sum(seconds) / workers / 60:.0f} min going by the records here" if todo else ""


def _work(todo: list[Job], options: argparse.Namespace) -> int:
    """Execute runs in worker processes with one progress bar; returns the peak of their memory."""
    from tqdm import tqdm

    os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when a worker starts
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context("forkserver")  # imports once, then a fresh process a run
    context.set_forkserver_preload(list(dict.fromkeys(module for run in todo for module in run.preloaded)))
    queue = context.SimpleQueue()
    bar = tqdm(total=sum(run.units for run in todo), unit="step", desc="runs", smoothing=0.05, mininterval=1)
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


def _execute_in_worker(run: Job, results_dir: Path) -> None:
    def on_progress(done: int) -> None:
        if not multiprocessing.parent_process().is_alive():
            os._exit(1)  # killed: leave the run to whoever resumes it
        _worker["queue"].put((run.run_id, done))

    run.execute(results_dir, on_progress)
