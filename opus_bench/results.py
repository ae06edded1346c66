"""Run records: one JSON file per run, append-only; every table and figure is a function of them.

A record's identity is what went in (experiment, config, data, code), never what came out:

    run_id = sha256(canonical JSON of [experiment, config, data.spec_sha256, code.version])[:12]

It is the file name, so a file that exists is a run that is done, and an interrupted grid goes on by
giving the same command again. A file carries `record_sha256`, the hash of its own content, so a
truncated or edited file is refused instead of entering a table.

Keys of a record (FIELDS has the types; keys may be added inside a block, not at the top):
    schema, run_id, experiment, scale, arm, method, paper, config, deviations, data, code,
    environment, timing, metrics, evals, selection, final; `write` adds written_utc, record_sha256.
"""
from __future__ import annotations

import ast
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

SCHEMA = 1
ARXIV = "2602.05400"
ARMS = ("paper", "released", "calibrated")
NOT_RUN = "not run: "
ROOT = Path(__file__).resolve().parent.parent
UNHASHED = frozenset({"report", "figures", "results", "statistics", "cli", "doctor", "validate"})


class RecordError(ValueError):
    """A run record that is malformed, damaged or in the way; names the file, the key and the value."""


def canonical(value: object) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN; what every hash here is taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# Identity -------------------------------------------------------------------------------------


def run_id(experiment: str, config: dict, data_spec_sha256: str, code: str) -> str:
    """The 12 hex digits that name a run: the start of sha256 of (experiment, config, data, code)."""
    _check_json(config, "config", "run_id")
    return _sha256(canonical([experiment, config, data_spec_sha256, code]))[:12]


def code_version(root: str | Path = ROOT, sources: Iterable[str] | None = None) -> str:
    """sha256 of the code that determines numbers, unmoved by edits of prose.

    Blank lines, full-line comments, docstrings and trailing blanks do not count; a comment at the
    end of a code line does, and task files (.yaml) count as they stand. Lines are dropped from the
    text (by the line numbers of `ast`), the tree itself is not hashed, so the same files give the
    same version under every Python.

    Args:
        root: folder that holds `opus_bench/` and `baselines/`.
        sources: the files to hash, relative to root; by default every module and task file of
            `opus_bench` but those in UNHASHED (they read records and make none), and all of `baselines`.

    Raises:
        RecordError: a source that is missing or is not Python.
    """
    root = Path(root)
    if sources is None:
        patterns = ("opus_bench/**/*.py", "opus_bench/**/*.yaml", "baselines/**/*.py")
        found = [path for pattern in patterns for path in root.glob(pattern)]
        paths = [path for path in found if path.stem not in UNHASHED]
    else:
        paths = [root / source for source in sources]
    digest = hashlib.sha256()
    for name, path in sorted({path.relative_to(root).as_posix(): path for path in paths}.items()):
        try:
            text = path.read_text(encoding="utf-8")
            code = _without_prose(text) if path.suffix == ".py" else text
        except (OSError, SyntaxError, ValueError) as error:
            raise RecordError(f"{path}: cannot hash this source ({error})") from error
        digest.update(f"{name}\0{code}\0".encode())
    return digest.hexdigest()


def _without_prose(source: str) -> str:
    source = source.replace("\r\n", "\n").replace("\r", "\n")
    lines = source.split("\n")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings, text = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and node.body and _is_string(node.body[0]):
            string = node.body[0].value
            before = lines[string.lineno - 1].encode()[: string.col_offset].strip()
            after = lines[string.end_lineno - 1].encode()[string.end_col_offset :].strip()
            if not before and (not after or after.startswith(b"#")):
                docstrings.update(range(string.lineno, string.end_lineno + 1))
        if isinstance(node, ast.JoinedStr) or isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
            if node.end_lineno > node.lineno:
                text.update(range(node.lineno, node.end_lineno + 1))
    kept = []
    for number, line in enumerate(lines, start=1):
        if number in docstrings:
            continue
        if number in text:
            kept.append(line)
        elif line.strip() and not line.lstrip().startswith("#"):
            kept.append(line.rstrip())
    return "\n".join(kept)


def _is_string(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def git_state(root: str | Path = ROOT, sources: Iterable[str] = ("opus_bench", "baselines", "reproduce")) -> dict:
    """{commit, dirty} of the checkout; dirty looks at the sources only; both None outside git."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain", "--", *(source for source in sources if (Path(root) / source).exists()))
    return {"commit": git("rev-parse", "--verify", "HEAD"), "dirty": None if status is None else bool(status)}


def environment(device: str = "cpu") -> dict:
    """Versions and machine that a record states: no user, no host name, no kernel build."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    if torch and str(device).startswith("cuda"):
        device = f"{device} ({torch.cuda.get_device_name(device)})"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__ if torch else version("torch"),
        "transformers": version("transformers"),
        "lm_eval": version("lm_eval"),
        "numpy": version("numpy"),
        "platform": "-".join(filter(None, (platform.system(), platform.machine(), *platform.libc_ver()))),
        "cpu": _cpu_model(),
        "device": str(device),
        "threads": threads,
    }


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


# Schema ---------------------------------------------------------------------------------------


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _optional(check: Callable) -> Callable:
    return lambda value: value is None or check(value)


def _hexadecimal(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{8,64}", value) is not None


def _dictionary(value: object) -> bool:
    return isinstance(value, dict)


def _counts(value: object) -> bool:
    return isinstance(value, dict) and all(_count(item) for item in value.values())


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(_text(item) for item in value)


def _seconds(value: object) -> bool:
    return _number(value) and value >= 0


NUMBER = (_number, "a finite number")
COUNT = (_count, "an integer of at least 0")
TEXT = (_text, "a string that is not empty")
HEX = (_hexadecimal, "lower-case hexadecimal")
HEX_OR_NULL = (_optional(_hexadecimal), "lower-case hexadecimal or null")
TEXT_OR_NULL = (_optional(_text), "a string or null")
NUMBER_OR_NULL = (_optional(_number), "a finite number or null")
SECONDS = (_seconds, "seconds, at least 0")
BOOLEAN = (lambda value: isinstance(value, bool), "true or false")
DICTIONARY = (_dictionary, "an object")
LIST = (lambda value: isinstance(value, list), "a list")
COUNTS = (_counts, "an object of integers of at least 0")
TEXTS = (_texts, "a list of strings")

FIELDS = {
    "schema": (lambda value: value == SCHEMA and _count(value), f"{SCHEMA}"),
    "run_id": (lambda value: isinstance(value, str) and re.fullmatch(r"[0-9a-f]{12}", value), "12 hex digits"),
    "experiment": TEXT,
    "scale": TEXT,
    "arm": (lambda value: value is None or value in ARMS, f"one of {', '.join(ARMS)} or null"),
    "method": TEXT,
    "paper": {"arxiv": TEXT, "item": TEXT, "row": TEXT_OR_NULL},
    "config": {"selector": TEXT, "optimizer": TEXT, "seed": COUNT},
    "deviations": TEXTS,
    "data": {
        "spec_sha256": HEX,
        "train_sha256": HEX_OR_NULL,
        "proxy_sha256": HEX_OR_NULL,
        "tokenizer_sha256": HEX_OR_NULL,
        "suite_sha256": HEX_OR_NULL,
        "selected_sha256": HEX_OR_NULL,
        "target_domain": TEXT,
    },
    "code": {"version": HEX, "commit": HEX_OR_NULL, "dirty": (_optional(BOOLEAN[0]), "true, false or null")},
    "environment": {
        "python": TEXT,
        "torch": TEXT,
        "transformers": TEXT_OR_NULL,
        "lm_eval": TEXT_OR_NULL,
        "numpy": TEXT,
        "platform": TEXT,
        "cpu": TEXT,
        "device": TEXT,
        "threads": COUNT,
    },
    "timing": {
        "wall_s": SECONDS,
        "train_s": SECONDS,
        "select_s": SECONDS,
        "eval_s": SECONDS,
        "peak_bytes": (_optional(_count), "an integer of at least 0 or null"),
    },
    "metrics": LIST,
    "evals": LIST,
    "selection": {"offered": COUNTS, "chosen": COUNTS, "per_step": DICTIONARY, "notes": TEXTS},
    "final": {"weights_sha256": HEX_OR_NULL},
}
METRIC = {"step": COUNT, "tokens_seen": COUNT, "split": TEXT, "name": TEXT, "unit": TEXT, "value": NUMBER}
EVAL = {
    "task": TEXT,
    "task_version": (lambda value: True, "any value"),
    "metric": TEXT,
    "higher_is_better": BOOLEAN,
    "n_shot": COUNT,
    "n_samples": COUNT,
    "limit": NUMBER_OR_NULL,
    "batch_size": (lambda value: value is None or _count(value) or _text(value), "an integer, a string or null"),
    "value": NUMBER,
    "stderr": NUMBER_OR_NULL,
}
EVAL_OPTIONAL = {"chance": NUMBER_OR_NULL, "surface": NUMBER_OR_NULL, "surface_name": TEXT_OR_NULL, "status": TEXT}
PER_STEP = ("step", "effective_sample_size", "total_variation", "utility_std")
WRITTEN = {"written_utc": TEXT, "record_sha256": HEX}


def validate(record: dict, source: str | Path = "record") -> None:
    """Accept a well-formed record, refuse any other by file, key and value.

    A task that could not be run is a row of `evals` with only `task` and a `status` that starts
    with "not run: " and gives the reason (a `value`, if there, is null).

    Raises:
        RecordError: a key missing or unknown, a wrong type, NaN or infinity anywhere, a run_id that
            is not the hash of its inputs, per-step lists of unequal length.
    """
    if not isinstance(record, dict):
        raise RecordError(f"{source}: a record is an object, got {type(record).__name__}")
    _check_json(record, "", source)
    unknown = sorted(set(record) - set(FIELDS) - set(WRITTEN))
    if unknown:
        raise RecordError(f"{source}: unknown key {unknown[0]!r}; a record has {', '.join(FIELDS)}")
    _check_fields(record, FIELDS, "", source)
    want = run_id(record["experiment"], record["config"], record["data"]["spec_sha256"], record["code"]["version"])
    if record["run_id"] != want:
        raise RecordError(f"{source}: run_id {record['run_id']} is not the hash of its inputs, {want}")
    for index, row in enumerate(record["metrics"]):
        _check_fields(row, METRIC, f"metrics[{index}]", source)
    for index, row in enumerate(record["evals"]):
        _check_eval(row, f"evals[{index}]", source)
    _check_selection(record["selection"], source)


def _fail(source: str | Path, key: str, want: str, got: object) -> None:
    shown = repr(got)
    raise RecordError(f"{source}: {key} must be {want}, got {shown if len(shown) <= 80 else shown[:77] + '...'}")


def _check_fields(block: object, fields: dict, prefix: str, source: str | Path) -> None:
    if not isinstance(block, dict):
        _fail(source, prefix, "an object", block)
    for name, field in fields.items():
        key = f"{prefix}.{name}" if prefix else name
        if name not in block:
            raise RecordError(f"{source}: {key} is missing")
        if isinstance(field, dict):
            _check_fields(block[name], field, key, source)
        elif not field[0](block[name]):
            _fail(source, key, field[1], block[name])


def _check_eval(row: object, key: str, source: str | Path) -> None:
    if isinstance(row, dict) and str(row.get("status", "")).startswith(NOT_RUN):
        _check_fields(row, {"task": TEXT}, key, source)
        if row.get("value") is not None:
            _fail(source, f"{key}.value", "null for a task that was not run", row["value"])
        return
    _check_fields(row, EVAL, key, source)
    _check_fields(row, {name: EVAL_OPTIONAL[name] for name in EVAL_OPTIONAL if name in row}, key, source)


def _check_selection(selection: dict, source: str | Path) -> None:
    for domain in selection["chosen"]:
        if domain not in selection["offered"]:
            _fail(source, f"selection.chosen.{domain}", "a domain of selection.offered", domain)
    per_step = selection["per_step"]
    for name in PER_STEP:
        if name not in per_step:
            raise RecordError(f"{source}: selection.per_step.{name} is missing")
    for name, values in per_step.items():
        key = f"selection.per_step.{name}"
        if not isinstance(values, list) or not all(value is None or _number(value) for value in values):
            _fail(source, key, "a list of finite numbers or nulls", values)
        if len(values) != len(per_step["step"]):
            _fail(source, key, f"{len(per_step['step'])} long as selection.per_step.step is", len(values))
    for value in per_step["effective_sample_size"]:
        if value is not None and not 0 < value <= 1 + 1e-9:
            _fail(source, "selection.per_step.effective_sample_size", "a share of the buffer in (0, 1]", value)
    for value in per_step["total_variation"]:
        if value is not None and not -1e-9 <= value <= 1 + 1e-9:
            _fail(source, "selection.per_step.total_variation", "in [0, 1]", value)


def _check_json(value: object, key: str, source: str | Path) -> None:
    """Only what JSON keeps: string keys, finite numbers, no arrays or tensors."""
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                _fail(source, f"{key or 'record'} key", "a string", name)
            _check_json(item, f"{key}.{name}" if key else name, source)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, f"{key}[{index}]", source)
    elif isinstance(value, float) and not math.isfinite(value):
        _fail(source, key, "finite", value)
    elif not (value is None or isinstance(value, bool | int | float | str)):
        _fail(source, key, "a JSON value (convert arrays and tensors first)", value)


# Store ----------------------------------------------------------------------------------------


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
        RecordError: an invalid record, or another record under the same run_id: nothing is overwritten.
    """
    validate(record)
    path = record_path(directory, record["run_id"])
    stamp = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    content = {key: record[key] for key in FIELDS} | {"written_utc": stamp}
    content["record_sha256"] = _sha256(canonical(content))
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
        _check_fields(record, WRITTEN, "", path)
    except RecordError as error:
        raise RecordError(f"{error}; {mend}") from error
    content = {key: value for key, value in record.items() if key != "record_sha256"}
    if _sha256(canonical(content)) != record["record_sha256"]:
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
