"""The outcome of every item of an evaluation, in one compressed file a task beside the record, and their pairing.

    runs/<run_id>.json                          the record
    runs/samples/<run_id>/<task>.jsonl.gz       a header (the task's rows), then one line an item

A file is written whole or not at all and carries the hash of its own items, so a file that is there is a task that is
done, and an evaluation that was interrupted goes on with the next one.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from opus_bench.files import replacing
from opus_bench.hashing import canonical, text_sha256
from opus_bench.schema import RecordError

MEND = "delete it to evaluate this task again"


def samples_folder(directory: str | Path, run_id: str) -> Path:
    """Where the items of a run lie, its record being `directory`/`run_id`.json."""
    return Path(directory) / "samples" / run_id


def samples_path(folder: Path, task: str) -> Path:
    """The file of a task in the folder of a run."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '_', task.lower())}.jsonl.gz"


def write_samples(path: Path, rows: Sequence[dict], samples: Sequence[dict], seconds: float) -> None:
    """Put the rows and items of a task into its file in one step: equal content makes equal bytes."""
    body = "".join(canonical(sample) + "\n" for sample in samples)
    header = {"rows": list(rows), "seconds": seconds, "n": len(samples), "sha256": text_sha256(body)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(gzip.compress(f"{canonical(header)}\n{body}".encode(), mtime=0))


def read_samples(path: Path) -> tuple[dict, list[dict]]:
    """The header and the items of a file.

    Raises:
        RecordError: a file that is truncated or was changed.
    """
    try:
        first, _, body = gzip.decompress(path.read_bytes()).decode().partition("\n")
        header = json.loads(first)
        intact = header["sha256"] == text_sha256(body)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{path}: cannot be read as items ({type(error).__name__}: {error}); {MEND}") from error
    if not intact:
        raise RecordError(f"{path}: content does not match its sha256, so it was changed; {MEND}")
    return header, [json.loads(line) for line in body.split("\n") if line]  # splitlines: U+2028 too


def paired_samples(run_a: str | Path, run_b: str | Path, tasks: Sequence[str] | None = None) -> pd.DataFrame:
    """Which items two runs got right, item by item: what McNemar's test or a paired bootstrap needs.

    Args:
        run_a, run_b: records, or their folders of items.
        tasks: the names of tasks to pair; None takes all, which both runs must have.

    Returns:
        A row an item: `task`, `part` (lm-eval's), `doc` (its place in the split), `correct_a`, `correct_b`. Items
        that are not judged right or wrong, as texts for bits per byte, are left out.

    Raises:
        ValueError: runs that differ in their tasks, or in the items of a task.
    """
    sides = [_outcomes(run) for run in (run_a, run_b)]
    lacking = sorted(sides[0].keys() ^ sides[1].keys()) if tasks is None else [
        task for task in tasks if any(task not in side for side in sides)]
    if lacking:
        raise ValueError(f"the runs {run_a} and {run_b} do not both have items of {', '.join(lacking)}; name the tasks "
                         "to pair, or evaluate the other run on them")
    rows = []
    for task in sides[0] if tasks is None else tasks:
        ours, theirs = (side[task] for side in sides)
        if ours.keys() != theirs.keys():
            key = sorted(map(str, ours.keys() ^ theirs.keys()))[0]
            raise ValueError(f"{task}: the runs answered other items (one alone has {key}); evaluate both on the same "
                             "data and limit")
        rows += [(task, part, doc, correct, theirs[part, doc, sha]) for (part, doc, sha), correct in ours.items()]
    return pd.DataFrame(rows, columns=["task", "part", "doc", "correct_a", "correct_b"])


def _outcomes(run: str | Path) -> dict[str, dict[tuple, float]]:
    """task -> (part, doc, sha of the item) -> whether it was right."""
    run = Path(run)
    folder = samples_folder(run.parent, run.stem) if run.suffix == ".json" else run
    found: dict[str, dict[tuple, float]] = {}
    for path in sorted(folder.glob("*.jsonl.gz")):
        header, samples = read_samples(path)
        judged = {(s["part"], s["doc"], s["sha"]): s["correct"] for s in samples if "correct" in s}
        found[header["rows"][0]["task"] if len(header["rows"]) == 1 else path.name.split(".")[0]] = judged
    if not found:
        raise ValueError(f"{folder} has no items; evaluate the model with `opus-bench evaluate`")
    return found
