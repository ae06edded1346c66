"""What this machine has for each scale: versions, cores, memory, disk, archives, hub, results folder."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from .archives import ARCHIVES, cache_directory, locate
from .corpus_spec import CorpusSpec
from .results import check_writable

MEMORY_GB = 4.0  # two workers at smoke scale, with room
DISK_GB = 1.0  # archives, corpora and checkpoints of ci and smoke


@dataclass(frozen=True)
class Check:
    """One finding; ``mend`` is empty when the state is ok."""

    scale: str  # who needs it
    what: str
    found: str
    state: str  # ok, missing, or "to fetch"
    mend: str = ""
    required: bool = True  # for the ci and smoke scales


def examine(results: Path) -> list[Check]:
    """Every check; slow only where the network is (a few seconds)."""
    checks = [_version("all", name) for name in ("torch", "transformers", "lm_eval")]
    checks.insert(0, Check("all", "python", platform.python_version(), "ok"))
    checks += [Check("all", "cores", str(os.cpu_count()), "ok"), _memory(), _disk()]
    checks += _archives()
    checks.append(_results(results))
    checks += [_hub(), _accelerator()]
    return checks


def _version(scale: str, package: str) -> Check:
    try:
        return Check(scale, package, importlib.metadata.version(package), "ok")
    except importlib.metadata.PackageNotFoundError:
        return Check(scale, package, "none", "missing", "pip install . in the repository")


def _memory() -> Check:
    import psutil

    free = psutil.virtual_memory().available / 1e9
    state, mend = ("ok", "") if free >= MEMORY_GB else (
        "missing", f"{MEMORY_GB:g} GB are needed for two workers; run with --workers 1, or free some")
    return Check("smoke", "memory", f"{free:.1f} GB free", state, mend)


def _disk() -> Check:
    cache = cache_directory()
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free / 1e9
    found = f"{free:.1f} GB free, {cache}"
    if not os.access(there, os.W_OK):
        return Check("all", "cache", found, "missing", "not writable: set OPUS_BENCH_CACHE to another folder")
    state, mend = ("ok", "") if free >= DISK_GB else (
        "missing", f"{DISK_GB:g} GB are needed; set OPUS_BENCH_CACHE to a folder with more")
    return Check("all", "cache", found, state, mend)


def _archives() -> list[Check]:
    folder = cache_directory() / "archives"
    checks = []
    for scale, spec in (("ci", CorpusSpec.ci()), ("smoke", CorpusSpec())):
        absent = [key for key in spec.sources if not (folder / ARCHIVES[key].filename).is_file()]
        found = f"{len(spec.sources) - len(absent)} of {len(spec.sources)} cached"
        state, mend = "ok", ""
        if absent:
            state, mend = "to fetch", f"{', '.join(absent)}: fetched on first use"
            try:
                locate(ARCHIVES[absent[0]])
            except Exception as error:  # any failure of the index or of the way to it
                state, mend = "missing", " ".join(str(error).split())[:300]
        checks.append(Check(scale, f"archives ({scale})", found, state, mend))
    return checks


def _results(folder: Path) -> Check:
    try:
        check_writable(folder)
    except ValueError as error:
        return Check("all", "results folder", str(folder), "missing", str(error))
    return Check("all", "results folder", str(folder), "ok")


def _hub() -> Check:
    from .evaluation.paper_suite import hub_problem

    problem = hub_problem()
    what, scale = "hub", "paper tasks"
    if problem is None:
        return Check(scale, what, "reachable", "ok", required=False)
    mend = f"{problem}; the paper's tasks are then not run, all else is"
    return Check(scale, what, "not reachable", "missing", mend, required=False)


def _accelerator() -> Check:
    import torch

    if torch.cuda.is_available():
        return Check("paper scale", "accelerator", torch.cuda.get_device_name(), "ok", required=False)
    return Check("paper scale", "accelerator", "none", "missing",
                 "the paper's sizes need GPUs; ci and smoke run on CPU", required=False)
