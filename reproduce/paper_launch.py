"""Plan and execution at the scales `small` and `paper`: what is printed, what is refused, what is started."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from opus_bench import provenance, results

from .paper_checks import check_lines, examine
from .paper_commands import shown
from .paper_cost import H100, UTILISATION, Rates, cost_lines
from .paper_scale import PaperRun, call, preparation
from .scales import SCALES

NOTES = {
    **{name: SCALES[name].note for name in ("ci", "smoke")},
    "small": "small scale: GPT-2 of 124 M parameters, or Qwen3 of 0.6 B, on one GPU; a trend at best, not the "
             "paper's claim.",
    "paper": "paper scale: the paper's models and tokens; deviations that its text leaves open are in every record.",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that these scales have beside those of all."""
    group = parser.add_argument_group("scales small and paper")
    group.add_argument("--data", type=Path, default=Path("data"), metavar="FOLDER",
                       help="gets text, scores and token shards (default: data)")
    group.add_argument("--models", nargs="+", default=None, metavar="NAME",
                       help="only these of the item's, as gpt2-xl (default: all)")
    group.add_argument("--gpus", type=int, default=None, metavar="N",
                       help="processes of torchrun, one GPU each (default: 1 at small, 8 at paper)")
    group.add_argument("--peak-tflops", type=float, default=None, metavar="X",
                       help="BF16 products of a GPU, for the estimate of hours; FP32 ones are taken in proportion "
                            f"(default: those of H100 SXM, dense: {H100['bfloat16'] / 1e12:g}; FP32: "
                            f"{H100['float32'] / 1e12:g})")
    group.add_argument("--utilisation", type=float, default=UTILISATION, metavar="X",
                       help="share of the peak at which all counted FLOPs are done, recomputation included, an "
                            "assumption (default: %(default)s)")


def launch(runs: list[PaperRun], options: argparse.Namespace, write: Callable[[Path], Sequence[Path]]) -> int:
    """Print everything; unless it is a dry run, start what is not done.  Exit code 2 where something is missing."""
    runs = chosen_models(runs, options.models)
    gpus = options.gpus or max(run.setting.gpus for run in runs)
    if options.gpus is not None and options.gpus < 1:
        raise ValueError(f"--gpus must be at least 1, got {options.gpus}")
    rates = Rates(None if options.peak_tflops is None else options.peak_tflops * 1e12, options.utilisation, gpus)
    records = options.results / "runs"
    done = {run.run_id for run in runs if results.done(records, run.run_id)}
    todo = [run for run in runs if run.run_id not in done]
    steps = preparation(todo, options.data) if todo else []
    print(NOTES[options.scale])
    print("\n".join(plan_lines(runs, done)))
    if todo:
        if not todo[0].setting.made_here:
            print("Of the runs to do:")
            print("\n".join(cost_lines(todo, rates)))
        print("Preparation, in this order; what is there already is left as it is")
        print("\n".join(f"  {'done ' if step.made.exists() else 'to do'}  {step}" for step in steps))
        print("Training, then evaluation, of each run")
        for run in todo:
            by_domain = run.domain_loss(options.data, options.results)
            commands = [run.command(options.data, options.results, gpus), *([by_domain] if by_domain else []),
                        *run.evaluations(options.data, options.results).values()]
            print("\n".join(f"  {run.run_id}  {shown(command)}" for command in commands))
        checks = examine(todo, options.data, options.results, rates)
        missing = [check for check in checks if check.required and check.state != "ok"]
        print("Checks\n" + "\n".join(check_lines(checks)))
        if options.dry_run:
            print(f"dry run: nothing was started; {len(missing)} of {len(checks)} checks are missing something")
            return 0
        if missing:
            print(f"refused: {len(missing)} of {len(checks)} checks are missing something; nothing was started")
            return 2
        results.check_writable(records)
        for step in steps:
            if not step.made.exists():
                call(step.command)
                if step.marks:
                    step.made.touch()
        for number, run in enumerate(todo, 1):
            print(f"run {number} of {len(todo)}: {run.describe()}", flush=True)
            run.execute(options.data, options.results, gpus)
    if not options.dry_run:
        for path in write(options.results):
            print(f"wrote {os.path.relpath(path)}")
    return 0


def chosen_models(runs: list[PaperRun], names: Sequence[str] | None) -> list[PaperRun]:
    """The runs of these models.

    Raises:
        ValueError: a model that the item does not have.
    """
    known = list(dict.fromkeys(run.setting.model for run in runs))
    for name in names or ():
        if name not in known:
            raise ValueError(f"unknown model {name!r}; this item has {', '.join(known)}")
    return [run for run in runs if names is None or run.setting.model in names]


def plan_lines(runs: Sequence[PaperRun], done: set[str]) -> list[str]:
    """The runs and what they add up to."""
    todo = [run for run in runs if run.run_id not in done]
    lines = [f"  {run.run_id}  {'done ' if run.run_id in done else 'to do'}  {run.describe()}" for run in runs]
    updates, read = sum(run.update_tokens for run in todo), sum(run.candidate_tokens for run in todo)
    lines.append(f"{len(runs)} runs, {len(done)} done; to go {updates / 1e9:,.1f}e9 update tokens, "
                 f"{read / 1e9:,.1f}e9 candidate tokens read; code {provenance.code_version()[:12]}: another version "
                 "makes new runs")
    return lines
