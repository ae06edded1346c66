"""The schema of a run record: what a record must hold, and the hash that names it.

A record's identity is what went in (experiment, config, data, code), never what came out:

    run_id = sha256(canonical JSON of [experiment, config, data.spec_sha256, code.version])[:12]

Keys of a record (FIELDS has the types; keys may be added inside a block, not at the top):
    schema, run_id, experiment, scale, arm, method, paper, config, deviations, data, code,
    environment, timing, metrics, evals, selection, final; `results.write` adds written_utc,
    record_sha256.
"""
from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

from opus_bench.hashing import canonical, text_sha256

SCHEMA = 1
ARXIV = "2602.05400"
ARMS = ("paper", "released", "calibrated")
NOT_RUN = "not run: "


class RecordError(ValueError):
    """A run record that is malformed, damaged or in the way; names the file, the key and the value."""


def run_id(experiment: str, config: dict, data_spec_sha256: str, code: str) -> str:
    """The 12 hex digits that name a run: the start of sha256 of (experiment, config, data, code)."""
    _check_json(config, "config", "run_id")
    return text_sha256(canonical([experiment, config, data_spec_sha256, code]))[:12]


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
    check_fields(record, FIELDS, "", source)
    want = run_id(record["experiment"], record["config"], record["data"]["spec_sha256"], record["code"]["version"])
    if record["run_id"] != want:
        raise RecordError(f"{source}: run_id {record['run_id']} is not the hash of its inputs, {want}")
    for index, row in enumerate(record["metrics"]):
        check_fields(row, METRIC, f"metrics[{index}]", source)
    for index, row in enumerate(record["evals"]):
        check_eval(row, f"evals[{index}]", source)
    _check_selection(record["selection"], source)


def _fail(source: str | Path, key: str, want: str, got: object) -> None:
    shown = repr(got)
    raise RecordError(f"{source}: {key} must be {want}, got {shown if len(shown) <= 80 else shown[:77] + '...'}")


def check_fields(block: object, fields: dict, prefix: str, source: str | Path) -> None:
    """Refuse a block that lacks one of the fields or has it of a wrong type; keys beside them are allowed."""
    if not isinstance(block, dict):
        _fail(source, prefix, "an object", block)
    for name, field in fields.items():
        key = f"{prefix}.{name}" if prefix else name
        if name not in block:
            raise RecordError(f"{source}: {key} is missing")
        if isinstance(field, dict):
            check_fields(block[name], field, key, source)
        elif not field[0](block[name]):
            _fail(source, key, field[1], block[name])


def check_eval(row: object, key: str, source: str | Path) -> None:
    """Refuse a row of `evals` that is neither a result nor a task that was not run."""
    if isinstance(row, dict) and str(row.get("status", "")).startswith(NOT_RUN):
        check_fields(row, {"task": TEXT}, key, source)
        if row.get("value") is not None:
            _fail(source, f"{key}.value", "null for a task that was not run", row["value"])
        return
    check_fields(row, EVAL, key, source)
    check_fields(row, {name: EVAL_OPTIONAL[name] for name in EVAL_OPTIONAL if name in row}, key, source)


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
