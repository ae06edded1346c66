"""What this machine lacks for each scale: packages, memory, disk, archives, GPUs, hub, folders to write to.

    opus-bench doctor                        # every scale
    opus-bench doctor --scale cpu            # can this one run here?
    python -m opus_bench.doctor              # the same where packages are missing

No package is imported before all have been found; hence the imports in functions.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .validation.own_report import table  # needs no package

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTION = "opus_bench"
EXTRAS = ("proxy", "baselines")  # of pyproject.toml: what the large scales need beside the dependencies
ALL = "all"
EXPECTED = ("ci", "smoke")  # scales that any machine should run


@dataclass(frozen=True)
class Need:
    """What the scripts of a scale ask for; a test holds GPU scales to the plans of Table 3 and Figures 5 and 6."""

    disk: float  # GB free
    memory: float = 0.0  # GB free, two workers with room; 0: not looked at
    gpus: int = 0  # 0: runs on the CPU, on text from pinned archives
    gpu_memory: float = 0.0  # GB each


NEEDS = {
    "ci": Need(disk=1, memory=2),
    "smoke": Need(disk=1, memory=6),
    "cpu": Need(disk=1, memory=4),
    "small": Need(disk=160, gpus=1, gpu_memory=48),
    "paper": Need(disk=1800, gpus=8, gpu_memory=48),
}


@dataclass(frozen=True)
class Check:
    """One finding; ``mend`` is empty when the state is ok."""

    scale: str  # who needs it
    what: str
    found: str
    state: str  # ok, missing, or "to fetch"
    mend: str = ""
    required: bool = True  # for the scales that were asked about


SUMMARY = "show what this machine has and lacks for each scale, with the mend; exit code 1 if something is missing"


def add_options(command: argparse.ArgumentParser) -> None:
    """Options of the command doctor."""
    command.add_argument("--scale", choices=tuple(NEEDS), nargs="+", default=None, metavar="NAME",
                         help=f"{', '.join(NEEDS)}: look at these alone, and all of them must be able to run (default: "
                              f"show all; {' and '.join(EXPECTED)} must)")
    command.add_argument("--results", type=Path, default=ROOT / "results", metavar="FOLDER",
                         help="folder that records will be written to (default: results of the repository)")


def run(options: argparse.Namespace) -> int:
    """Print findings, mends and a verdict by scale; 1 if a scale that was asked about cannot run."""
    scales = tuple(options.scale or NEEDS)
    checks = examine(options.results, scales, options.scale or EXPECTED)
    mends = dict.fromkeys(f"{check.what}: {check.mend}" for check in checks if check.mend)
    print(table(("for", "what", "found", ""), [(c.scale, c.what, c.found, c.state) for c in checks]))
    print("\n".join(["", *mends, ""] if mends else [""]))
    print(table(("scale", ""), summary(checks, scales)))
    return int(any(check.required and check.state == "missing" for check in checks))


def examine(results: Path, scales: Sequence[str] = (), required: Sequence[str] = EXPECTED) -> list[Check]:
    """Every check of ``scales`` (all if empty); slow only where the network is (a few seconds).

    ``required`` scales, and what all need, make ``required`` true.
    """
    scales = scales or tuple(NEEDS)
    checks = [Check(ALL, "python", platform.python_version(), "ok"), Check(ALL, "cores", str(os.cpu_count()), "ok"),
              _packages(ALL)]
    if checks[-1].state == "ok":
        checks += [_cache(), _results(results)]
        checks += _of_cpu_scales([scale for scale in scales if not NEEDS[scale].gpus])
        checks += _of_gpu_scales([scale for scale in scales if NEEDS[scale].gpus], results)
    return [Check(c.scale, c.what, c.found, c.state, c.mend, c.scale in (ALL, *required)) for c in checks]


def summary(checks: Sequence[Check], scales: Sequence[str] = ()) -> list[tuple[str, str]]:
    """(scale, what stands between it and a run) for each scale."""
    lines = []
    for scale in scales or NEEDS:
        mine = [check for check in checks if check.scale in (ALL, scale)]
        lacks = [check.what for check in mine if check.state == "missing"]
        fetched = any(check.state == "to fetch" for check in mine)
        ready = "ready" + (", archives are fetched on first use" if fetched else "")
        lines.append((scale, f"lacks {', '.join(lacks)}" if lacks else ready))
    return lines


def requirements(extras: Sequence[str] = ()) -> list[tuple[str, str]]:
    """(package, lowest version) of the dependencies, or of ``extras`` in their place.

    From pyproject.toml in a checkout, else from what the installed distribution declares.

    Raises:
        importlib.metadata.PackageNotFoundError: neither is there.
    """
    if (ROOT / "pyproject.toml").is_file():
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        declared = [(line, "") for line in project["dependencies"]]
        declared += [(line, extra) for extra in extras for line in project["optional-dependencies"][extra]]
    else:
        parts = [line.partition(";") for line in importlib.metadata.requires(DISTRIBUTION) or []]
        declared = [(line, marker.partition("==")[2].strip(" \"'")) for line, _, marker in parts]
    wanted = extras or ("",)
    return [re.match(r"([\w.-]+)(?:\[\w+\])?\s*>=\s*([\d.]+)", line).groups()  # as all are written
            for line, extra in declared if extra in wanted]


def _packages(scale: str, extras: Sequence[str] = ()) -> Check:
    try:
        wanted = requirements(extras)
    except importlib.metadata.PackageNotFoundError:
        return Check(scale, "packages", f"{DISTRIBUTION} is not installed", "missing",
                     "pip install . in the repository")
    lacks = [(name, bound, version) for name, bound in wanted
             if (version := _version(name)) is None or _numbers(version) < _numbers(bound)]
    found = f"{len(wanted) - len(lacks)} of {len(wanted)}"
    if not lacks:
        return Check(scale, "packages", found, "ok")
    names = ", ".join(f"{name} {version or 'none'}" for name, _, version in lacks)
    command = " ".join(f"'{name}>={bound}'" for name, bound, _ in lacks)
    return Check(scale, "packages", found, "missing", f"{names}; pip install {command}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> list[int]:
    """Of a release: 2.13.0+cpu is [2, 13, 0]."""
    return [int(part) for part in re.match(r"[\d.]*\d", version)[0].split(".")]


def _cache() -> Check:
    from .archives import cache_directory

    cache = cache_directory()
    if os.access(_existing(cache), os.W_OK):
        return Check(ALL, "cache", str(cache), "ok")
    return Check(ALL, "cache", str(cache), "missing", "not writable: set OPUS_BENCH_CACHE to another folder")


def _results(folder: Path) -> Check:
    from .results import check_writable

    try:
        check_writable(folder)
    except ValueError as error:
        return Check(ALL, "results folder", str(folder), "missing", str(error))
    return Check(ALL, "results folder", str(folder), "ok")


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def _disk(scale: str, folder: Path, mend: str) -> Check:
    free, need = shutil.disk_usage(_existing(folder)).free / 1e9, NEEDS[scale].disk
    found = f"{free:,.1f} GB free, {need:,g} needed"
    return Check(scale, "disk", found, *(("ok",) if free >= need else ("missing", mend)))


# On the CPU -------------------------------------------------------------------------------------------


def _of_cpu_scales(scales: Sequence[str]) -> Iterator[Check]:
    from .archives import cache_directory
    from .corpus_spec import CorpusSpec

    reached: dict[tuple[str, ...], tuple[str, str]] = {}
    for scale in scales:
        yield _memory(scale)
        yield _disk(scale, cache_directory(), "set OPUS_BENCH_CACHE to a folder with more")
        yield _archives(scale, (CorpusSpec.ci() if scale == "ci" else CorpusSpec()).sources, reached)


def _memory(scale: str) -> Check:
    import psutil

    free, need = psutil.virtual_memory().available / 1e9, NEEDS[scale].memory
    state = ("ok",) if free >= need else ("missing", "run with --workers 1, or free some")
    return Check(scale, "memory", f"{free:.1f} GB free, {need:g} needed", *state)


def _archives(scale: str, sources: tuple[str, ...], reached: dict[tuple[str, ...], tuple[str, str]]) -> Check:
    """The pinned packages of text; what is absent is asked for once, and remembered in ``reached``."""
    from . import archives

    folder = archives.cache_directory() / "archives"
    absent = tuple(key for key in sources if not (folder / archives.ARCHIVES[key].filename).is_file())
    found = f"{len(sources) - len(absent)} of {len(sources)} cached"
    if not absent:
        return Check(scale, "archives", found, "ok")
    if absent not in reached:
        reached[absent] = "to fetch", f"{', '.join(absent)}: fetched on first use"
        try:
            archives.locate(archives.ARCHIVES[absent[0]])
        except Exception as error:  # any failure of the index or of the way to it
            reached[absent] = "missing", f"{absent[0]}: " + " ".join(str(error).split())[:300]
    return Check(scale, "archives", found, *reached[absent])


# On GPUs ----------------------------------------------------------------------------------------------


def _of_gpu_scales(scales: Sequence[str], results: Path) -> Iterator[Check]:
    if not scales:
        return
    from .evaluation.paper_suite import hub_problem

    problem = hub_problem()
    hub: tuple[Any, ...] = ("reachable", "ok") if problem is None else ("not reachable", "missing", (
        f"{problem}; connect to it, or set HF_ENDPOINT to a mirror; the paper's tasks, texts and weights come from it"))
    for scale in scales:
        yield _packages(scale, EXTRAS)
        yield _gpus(scale)
        yield _disk(scale, results, "give --data and --results folders with more")
        yield Check(scale, "hub", *hub)


def _gpus(scale: str) -> Check:
    import torch

    need = NEEDS[scale]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    each = min((torch.cuda.get_device_properties(index).total_memory / 1e9 for index in range(count)), default=0.0)
    found = f"{count}{f' of {each:.0f} GB' * bool(count)}, {need.gpus} of {need.gpu_memory:g} GB needed"
    if count < need.gpus:
        return Check(scale, "GPUs", found, "missing", "use a machine that has them, or give the scripts --gpus")
    if each < need.gpu_memory:
        return Check(scale, "GPUs", found, "missing", "use larger ones, or more of them with --gpus")
    return Check(scale, "GPUs", found, "ok")


if __name__ == "__main__":
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(top)
    sys.exit(run(top.parse_args()))
