"""Run records: one JSON file per run, append-only; every table and figure is a function of them.

A record's file name is its run_id, so a file that exists is a run that is done, and an interrupted
grid goes on by giving the same command again. A file carries `record_sha256`, the hash of its own
content, so a truncated or edited file is refused instead of entering a table. What a record holds
is said in `schema`; where its numbers come from, in `provenance`.
"""
from __future__ import annotations

import datetime
import json
import os
import tempfile
from pathlib import Path

from opus_bench.hashing import canonical, text_sha256
from opus_bench.schema import FIELDS, WRITTEN, RecordError, check_fields, validate


def outcome(record: dict) -> dict:
    """What two runs of one run_id must agree on bit for bit: all but clock, machine, git and file stamps."""
    return {key: value for key, value in record.items() if key not in ("timing", "environment", "code", *WRITTEN)}


def record_path(directory: str | Path, identity: str) -> Path:
    """Where the record of a run_id lies, whether or not it exists."""
    return Path(directory) / f"{identity}.json"


def write(record: dict, directory: str | Path) -> Path:
    """Validate a record and put it into the directory in one step; returns its path.

    A reader sees the whole file or none (temporary file, fsync, link), also after kill -9. Writing
    the same record again is allowed and changes nothing.

    Raises:
        RecordError: an invalid record, one that cannot be written (a full disk), or another record under the
            same run_id: nothing is overwritten.
    """
    validate(record)
    path = record_path(directory, record["run_id"])
    stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    content = {key: record[key] for key in FIELDS} | {"written_utc": stamp}
    content["record_sha256"] = text_sha256(canonical(content))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(_layout(content))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        if path.exists() or not _place(temporary, path):
            existing = read(path)
            if any(canonical(existing[key]) != canonical(record[key]) for key in FIELDS):
                raise RecordError(f"{path}: holds another record of this run; delete it to run again")
    except OSError as error:
        raise RecordError(f"{path}: cannot be written ({error.strerror}); make room and run again") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
    _sync_directory(path.parent)
    return path


def _place(temporary: str, path: Path) -> bool:
    """Move the file to its name unless the name is taken, also when two processes try at once."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:
        os.replace(temporary, path)
    return True


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def _layout(content: dict) -> str:
    """JSON with one line per key and per row, so that a record can be read and compared by eye."""

    def compact(value: object) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    lines = []
    for key, value in content.items():
        if isinstance(value, list) and value:
            rows = ",\n".join(f"    {compact(row)}" for row in value)
            lines.append(f"  {compact(key)}: [\n{rows}\n  ]")
        elif isinstance(value, dict) and value:
            rows = ",\n".join(f"    {compact(name)}: {compact(item)}" for name, item in value.items())
            lines.append(f"  {compact(key)}: {{\n{rows}\n  }}")
        else:
            lines.append(f"  {compact(key)}: {compact(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read(path: str | Path) -> dict:
    """The record in a file, after its hash, its schema and its name have been checked.

    Raises:
        RecordError: one message that names the file, what is wrong, and the mend.
    """
    path = Path(path)
    mend = "delete it to run again"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise RecordError(f"{path}: truncated or not JSON ({error}); {mend}") from error
    if not isinstance(record, dict) or "record_sha256" not in record:
        raise RecordError(f"{path}: not a finished run record (no record_sha256); {mend}")
    try:
        validate(record, path)
        check_fields(record, WRITTEN, "", path)
    except RecordError as error:
        raise RecordError(f"{error}; {mend}") from error
    content = {key: value for key, value in record.items() if key != "record_sha256"}
    if text_sha256(canonical(content)) != record["record_sha256"]:
        raise RecordError(f"{path}: content does not match its record_sha256, so it was changed; {mend}")
    if path.stem != record["run_id"]:
        raise RecordError(f"{path}: holds run {record['run_id']}; rename it to {record['run_id']}.json")
    return record


def load(directory: str | Path, experiment: str | None = None, scale: str | None = None) -> list[dict]:
    """All records of a directory, sorted by experiment, scale, optimizer, method, arm, seed, run_id."""
    records = [read(path) for path in sorted(Path(directory).glob("*.json"))]
    chosen = [
        record
        for record in records
        if experiment in (None, record["experiment"]) and scale in (None, record["scale"])
    ]
    return sorted(
        chosen,
        key=lambda record: (
            record["experiment"],
            record["scale"],
            record["config"]["optimizer"],
            record["method"],
            record["arm"] or "",
            record["config"]["seed"],
            record["run_id"],
        ),
    )


def done(directory: str | Path, identity: str) -> bool:
    """Whether the run has its record; a damaged record is an error, not a run to repeat silently."""
    path = record_path(directory, identity)
    return path.exists() and bool(read(path))


def check_writable(directory: str | Path) -> None:
    """Find out before the computing, not after it, that records cannot be written.

    Raises:
        RecordError: names the directory and the reason.
    """
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".writable.", suffix=".tmp", dir=directory) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        raise RecordError(f"{directory}: records cannot be written here ({error}); choose another directory") from error
