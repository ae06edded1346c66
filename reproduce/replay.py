"""Are the numbers of a record those that this checkout makes?  Records of training runs, made again and compared.

    python -m reproduce.replay --scale ci --results results/ci    # the first seed of every row
    python -m reproduce.replay --scale cpu 572fc45cd13d           # one run, by its id or the start of it
    python -m reproduce.replay --scale cpu --dry-run              # what would be made again, and how long it takes

A record names the code that made it.  Later code makes other records, beside which the old ones stay; this command
says whether it would still make the old one.  Every run is made from nothing in a folder of its own and compared with
its record bit for bit: losses, choices, evaluations, weights.  What was found goes into RESULTS/replays, one file a
run and version of the code, and onto RESULTS/tables/replay.md.  Only the machine's kind may make a difference that
is nobody's fault: another CPU may round otherwise.

Not for runs on GPUs and measurements, whose pages name the command.  A run takes as long as it took; killed, the same
command goes on.  Exit codes: 0 where all are the same, 1 where one is not, 2 after one line about bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opus_bench import provenance
from opus_bench.files import replacing
from opus_bench.results import load
from opus_bench.schema import RecordError
from opus_bench.sections import final_loss, label_of
from opus_bench.tables import NONE, markdown
from opus_bench.train import RunConfig

from .runner import ROOT, ended, run_grid
from .scales import SCALES
from .training import Run

FORMAT = "opus-bench-replay/1"
NUMBERS = ("data", "metrics", "evals", "selection", "final")  # of a record, which are compared
ABOUT = """\
Records of training runs that `python -m reproduce.replay` made again from nothing, and compared bit for bit with the
record: losses at every point, choices, evaluations and final weights. `made by` is the version of the code in the
record, `again by` that which made the run again."""


def run_of(record: dict) -> Run:
    """The run that a record is of, under this code.

    Raises:
        RecordError: a record that is not of a training run on CPU, or whose settings or corpus this code does not have.
    """
    config, identity = record["config"], record["run_id"]
    fields = {field.name for field in dataclasses.fields(RunConfig)}
    if record["scale"] not in SCALES or "suite_size" not in config or "measured" in config:
        raise RecordError(f"run {identity} of {record['experiment']} is no training run on CPU; the results page names "
                          "the command that makes it")
    own = {name: tuple(value) if isinstance(value, list) else value
           for name, value in config.items() if name in fields}
    run = Run(record["experiment"], record["paper"]["item"], record["method"], record["paper"]["row"], record["arm"],
              RunConfig(**own), record["scale"], tuple(record["deviations"]), config["paper_tasks"],
              bool(config["suite_size"]))
    now = json.loads(json.dumps(run.settings))  # a setting younger than the record is at its default
    differ = [f"{name} {value!r}, now {now.get(name)!r}" for name, value in config.items() if now.get(name) != value]
    if record["data"]["spec_sha256"] != SCALES[record["scale"]].corpus.sha256:
        differ.append("the corpus of its scale")
    if differ:
        raise RecordError(f"run {identity} has settings that this code does not have ({'; '.join(differ)}); "
                          f"git checkout {record['code']['commit']} has them")
    return run


def chosen(records: Sequence[dict], starts: Sequence[str]) -> list[dict]:
    """The records whose id starts so; without ``starts`` the newest of every row's first seed.

    Raises:
        RecordError: no record, or a start that is of none or of several.
    """
    if starts:
        found = []
        for start in starts:
            mine = [record for record in records if record["run_id"].startswith(start)]
            if len(mine) != 1:
                raise RecordError(f"{len(mine)} records of this scale have an id that starts with {start!r}; give the "
                                  "id of one")
            found += mine
        return found
    rows: dict[tuple, dict] = {}
    for record in sorted(records, key=lambda record: (-record["config"]["seed"], record["written_utc"])):
        if "suite_size" in record["config"] and "measured" not in record["config"]:
            rows[record["experiment"], record["config"]["optimizer"], label_of(record)] = record
    if not rows:
        raise RecordError("no record of a training run of this scale; make some with `python -m reproduce.table3`")
    return list(rows.values())


def compared(record: dict, again: dict) -> dict[str, Any]:
    """What a run made again says of its record, as it is stored.

    ``differ``: the parts of the record that are not the same bit for bit, none where it was replayed.
    """
    differ = [name for name in NUMBERS if record[name] != again[name]]
    return {
        "schema": FORMAT, "run_id": record["run_id"], "record_sha256": record["record_sha256"],
        "made_by": record["code"]["version"], "again_by": again["code"]["version"],
        "code": again["code"], "environment": again["environment"], "differ": differ,
        "final_loss": [final_loss(record), final_loss(again)],
        "wall_s": again["timing"]["wall_s"],
        "written_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def keep(found: dict[str, Any], results_dir: Path) -> Path:
    """Write what was found, the whole file or none."""
    path = results_dir / "replays" / f"{found['run_id']}-{found['again_by'][:12]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return path


def read(results_dir: Path) -> list[dict[str, Any]]:
    """All that was found, by run.

    Raises:
        RecordError: a file that is damaged or of another format.
    """
    found = []
    for path in sorted((Path(results_dir) / "replays").glob("*.json")):
        try:
            one = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RecordError(f"{path}: truncated or not JSON ({error}); delete it to replay again") from error
        if not isinstance(one, dict) or one.get("schema") != FORMAT:
            raise RecordError(f"{path}: not of format {FORMAT}; delete it to replay again")
        found.append(one)
    return found


def write(results_dir: Path) -> list[Path]:
    """The page of all replays; none where there are none.

    Raises:
        RecordError: a replay of a record that is not in the folder or was changed since.
    """
    found, rows = read(results_dir), []
    records = {record["run_id"]: record for record in load(results_dir / "runs")} if found else {}
    for one in found:
        record = records.get(one["run_id"])
        if record is None or record["record_sha256"] != one["record_sha256"]:
            raise RecordError(f"{results_dir / 'replays'}: run {one['run_id']} is not the record in "
                              f"{results_dir / 'runs'}; delete its replay")
        then, now = one["final_loss"]
        rows.append([
            f"[{one['run_id']}](../runs/{one['run_id']}.json)", f"{record['experiment']}, {record['scale']}",
            f"{label_of(record)}, {record['config']['optimizer']}, seed {record['config']['seed']}",
            one["made_by"][:12], one["again_by"][:12],
            f"differs: {', '.join(one['differ'])}" if one["differ"] else "the same, bit for bit",
            NONE if then is None or now is None else f"{then:.4f}, {now:.4f}",
        ])
    if not rows:
        return []
    same = sum(not one["differ"] for one in found)
    header = ["run", "experiment", "row", "made by", "again by", "outcome", "final loss then, again (nat/token)"]
    path = results_dir / "tables" / "replay.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = f"# Replays\n\n{ABOUT}\n\n{same} of {len(found)} are the same bit for bit.\n\n{markdown(header, rows)}\n"
    path.write_text(text, encoding="utf-8", newline="\n")
    return [path]


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("runs", nargs="*", metavar="RUN", help="ids of records, or the starts of them (default: the "
                      "newest record of every row's first seed)")
    made.add_argument("--scale", choices=sorted(SCALES), default="smoke", help="default: %(default)s")
    made.add_argument("--experiments", nargs="+", metavar="NAME", help="only records of these (default: all)")
    made.add_argument("--results", type=Path, default=ROOT / "results", metavar="FOLDER",
                      help="folder that holds runs/ and gets replays/ (default: results)")
    made.add_argument("--scratch", type=Path, default=None, metavar="FOLDER",
                      help="where the runs are made again; give it to go on after a kill (default: a folder of the "
                           "system's temporary files that is removed at the end)")
    made.add_argument("--workers", type=int, default=1, help="runs side by side (default: %(default)s)")
    made.add_argument("--dry-run", action="store_true", help="print the runs and how long they took, and stop")
    return made


def replay(options: argparse.Namespace, scratch: Path) -> int:
    """Make the chosen runs again below ``scratch``, compare and keep; the exit code."""
    records = [record for record in load(options.results / "runs", scale=options.scale)
               if not options.experiments or record["experiment"] in options.experiments]
    runs, originals = {}, []
    for record in chosen(records, options.runs):
        try:
            runs[record["run_id"]] = run_of(record)
            originals.append(record)
        except RecordError as error:
            if options.runs:  # asked for by name
                raise
            print(f"left out: {error}")
    if not runs:
        raise RecordError(f"{options.results / 'runs'}: no record of scale {options.scale} that this code can make "
                          "again")
    print(f"to make again under code {provenance.code_version()[:12]}:")
    differing: list[str] = []

    def compare(_: Path) -> Sequence[Path]:
        again = {record["run_id"]: record for record in load(scratch / "runs")}
        found = [compared(record, again[runs[record["run_id"]].run_id]) for record in originals]
        differing.extend(one["run_id"] for one in found if one["differ"])
        for one in found:
            print(f"{one['run_id']}  " + (f"differs: {', '.join(one['differ'])}" if one["differ"] else
                                          "the same, bit for bit"))
        return [*(keep(one, options.results) for one in found), *write(options.results)]

    grid = argparse.Namespace(scale=options.scale, results=scratch, workers=options.workers, dry_run=options.dry_run)
    return run_grid(list(runs.values()), grid, compare, originals) or int(bool(differing))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; exit codes as the module says, 130 on ctrl-C."""
    options = parser().parse_args(arguments)

    def act() -> int:
        if options.workers < 1:
            raise ValueError(f"--workers must be at least 1, got {options.workers}")
        if options.scratch is not None:
            return replay(options, options.scratch)
        with tempfile.TemporaryDirectory(prefix="opus-bench-replay-") as scratch:
            return replay(options, Path(scratch))

    return ended(act, "what is done is kept where --scratch names a folder")


if __name__ == "__main__":
    sys.exit(main())
