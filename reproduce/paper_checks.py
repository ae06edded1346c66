"""Is all that the scales `small` and `paper` need reachable?  Looked at before anything is started.

A check is a line, ok or missing with its mend.  Slow only where the network is: each data set and model of the hub
is asked for once.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from opus_bench.doctor import Check
from opus_bench.evaluation.paper_suite import hub_problem

from . import paper_commands as commands
from .paper_cost import Rates, disk, host_memory, memory_per_gpu, size
from .paper_scale import PaperRun
from .paper_settings import ENCODER, REPOSITORIES, SCORERS


def examine(runs: Sequence[PaperRun], data: Path, results_dir: Path, rates: Rates) -> list[Check]:
    """Every check of the runs that are not done."""
    scale = runs[0].scale
    if all(run.setting.made_here for run in runs):  # on the CPU, without a hub
        return [_disk(scale, runs, data), *_programs(scale, runs)]
    checks = [_gpus(scale, runs, rates), _host_memory(scale, runs), _disk(scale, runs, data), *_programs(scale, runs)]
    checks += _texts(scale, runs, data)
    if not all(run.setting.from_hub for run in runs):
        checks.append(_domains(scale, data))
    checks += _hub(scale, runs)
    return checks


def check_lines(checks: Sequence[Check]) -> list[str]:
    """A line for each check."""
    def state(check: Check) -> str:
        return "ok" if check.state == "ok" else "missing" if check.required else "optional"

    return [f"  {state(check):8} {check.what}: {check.found}"
            + (f"; {check.mend}" if check.state != "ok" else "") for check in checks]


def _gpus(scale: str, runs: Sequence[PaperRun], rates: Rates) -> Check:
    import torch

    need = max(sum(memory_per_gpu(run, rates.gpus).values()) for run in runs)
    wanted = f"{rates.gpus} of {size(need)} each"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [torch.cuda.get_device_properties(index).total_memory for index in range(count)]
    text = f"{count} here, {wanted} needed" if not found else f"{count} of {size(min(found))}, {wanted} needed"
    if count < rates.gpus:
        return Check(scale, "GPUs", text, "missing", "use a machine that has them, or give --gpus")
    if min(found) < need:
        return Check(scale, "GPUs", text, "missing", "use larger ones, or more with --gpus")
    return Check(scale, "GPUs", text, "ok")


def _host_memory(scale: str, runs: Sequence[PaperRun]) -> Check:
    import psutil

    free, need = psutil.virtual_memory().available, max(map(host_memory, runs))
    found = f"{size(free)} free, {size(need)} needed by process 0"
    if free < need:
        return Check(scale, "host memory", found, "missing", "free some, or use a machine with more")
    return Check(scale, "host memory", found, "ok")


def _disk(scale: str, runs: Sequence[PaperRun], data: Path) -> Check:
    there = next(folder for folder in (data, *data.absolute().parents) if folder.exists())
    free, need = shutil.disk_usage(there).free, sum(disk(runs).values())
    found = f"{size(free)} free in {there}, {size(need)} needed"
    if free < need:
        return Check(scale, "disk", found, "missing", "give --data a folder with more, and --results beside it")
    return Check(scale, "disk", found, "ok")


def _programs(scale: str, runs: Sequence[PaperRun]) -> Iterator[Check]:
    """Sub-commands and modules that the commands call: a plan must not name what is not there."""
    needed = {word for run in runs for word in run.command(Path(), Path(), 1) if word.startswith("--")}
    methods = {commands.method_of(run.line.selector, run.line.options) for run in runs}
    lacks = training_lacks(needed - {"--standalone", "--nproc-per-node"}, methods)
    programs = {f"python -m {commands.PRETRAIN}": lacks}
    programs |= {f"opus-bench {name}": "" if _has_command(name) else "not there"
                 for name in ("data", "proxy", "evaluate")}
    if any(run.pool.static for run in runs):
        there = importlib.util.find_spec(commands.SCORE) is not None
        programs[f"python -m {commands.SCORE}"] = "" if there else "not there"
    programs["hf, the hub's client"] = "" if shutil.which("hf", path=_paths()) else "not there"
    for what, lack in programs.items():
        mend = "this version cannot do it; take one that can" if lack else ""
        yield Check(scale, what, lack or "there", "missing" if lack else "ok", mend)


def training_lacks(flags: set[str], methods: set[str]) -> str:
    """What the training command does not have of these flags and values of --method; "" if it has all."""
    if any(importlib.util.find_spec(name) is None for name in (commands.PRETRAIN, commands.PRETRAIN_OPTIONS)):
        return "not there"
    known = importlib.import_module(commands.PRETRAIN_OPTIONS).parser("")._option_string_actions
    missing = sorted(flags - set(known))
    choices = getattr(known.get("--method"), "choices", None)
    missing += [f"--method {name}" for name in sorted(methods) if choices is not None and name not in choices]
    return f"lacks {', '.join(missing)}" if missing else ""


def _paths() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _has_command(name: str) -> bool:
    from opus_bench.cli import parser

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            parser().parse_args([name, "--help"])
        except SystemExit as done:
            return done.code == 0
    return True


def _texts(scale: str, runs: Sequence[PaperRun], data: Path) -> Iterator[Check]:
    """Text that no public repository is known to have, which the user brings."""
    for source in dict.fromkeys(run.pool.source for run in runs if run.pool.source not in REPOSITORIES):
        for folder in (data / "text" / source, data / "text" / f"validation-{source}"):
            there = folder.is_dir() and any(folder.iterdir())
            state, mend = ("ok", "") if there else (
                "missing", f"no public copy is known to us; put its files (.parquet or .jsonl) into {folder}")
            yield Check(scale, f"text of {source}", str(folder) if there else "not there", state, mend)


def _domains(scale: str, data: Path) -> Check:
    """Table 6's documents, without which its losses by domain are not run."""
    folder = data / commands.DOMAIN_TEXTS
    found = sorted(path.stem for path in folder.glob("*.jsonl"))
    if found:
        return Check(scale, "documents by domain", ", ".join(found), "ok", required=False)
    return Check(scale, "documents by domain", "not there", "missing",
                 f"Table 6's losses by domain are then not run; put held-out documents into {folder}/DOMAIN.jsonl "
                 "(the paper does not say how it labels them)", required=False)


def _hub(scale: str, runs: Sequence[PaperRun]) -> Iterator[Check]:
    """The hub with each data set and model."""
    problem = hub_problem()
    if problem is not None:
        yield Check(scale, "hub", f"not reachable ({problem})", "missing",
                    "connect to it, or set HF_ENDPOINT to a mirror")
    scorers = {scorer.name: scorer.repository for scorer in SCORERS}
    models = [ENCODER.repository, *(scorers[run.pool.static] for run in runs if run.pool.static),
              *(run.setting.model for run in runs if run.setting.from_hub)]
    sources = [REPOSITORIES[run.pool.source] for run in runs if run.pool.source in REPOSITORIES]
    suites = dict.fromkeys(suite for run in runs for suite in run.setting.suites)
    for kind, names in (("data set", sources), ("model", models)):
        for name in dict.fromkeys(name for name in names if name):
            yield _reached(scale, f"{kind} {name}", name, kind, problem)
    for suite in suites:
        yield _suite(scale, suite, problem)


def _reached(scale: str, what: str, name: str, kind: str, problem: str | None) -> Check:
    if problem is not None:
        return Check(scale, what, "the hub is not reachable", "missing", "as the hub")
    from huggingface_hub import HfApi

    ask: Callable[..., object] = HfApi().dataset_info if kind == "data set" else HfApi().model_info
    try:
        ask(name, timeout=10)
    except Exception as error:  # any failure to reach it is the answer
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        return Check(scale, what, f"not reachable ({reason})", "missing",
                     "look at its name and whether it asks for a login (`hf auth login`)")
    return Check(scale, what, "reachable", "ok")


def _suite(scale: str, suite: str, problem: str | None) -> Check:
    """The evaluation's own plan, which loads every task's items and no model."""
    what = f"tasks of the suite {suite}"
    if problem is not None:
        return Check(scale, what, "the hub is not reachable", "missing", "as the hub")
    command = [*commands.BENCH, "evaluate", "--model", "none", "--suite", suite, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return Check(scale, what, "all can be loaded", "ok")
    last = (done.stdout.strip() or done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
    return Check(scale, what, last, "missing", f"`{commands.shown(command)}` says which and why")
