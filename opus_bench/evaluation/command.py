"""The command ``opus-bench evaluate``: its settings, options and output.  Light, so that --help is quick."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opus_bench.evaluation.paper_tasks import SUITES
from opus_bench.provenance import ROOT
from opus_bench.validation.own_report import table
from opus_bench.validation.own_settings import DTYPES

OFFLINE = "offline"
SUITE_NAMES = (*SUITES, OFFLINE)


@dataclass(frozen=True)
class EvaluationSettings:
    """What is evaluated and how; every field but the device and names is part of the record's identity."""

    model: str  # folder or hub id
    suite: str = "paper"
    tokenizer: str | None = None  # None: that of the model
    data: str | None = None  # folder of local files in place of the hub, or of a suite like the offline one
    limit: int | None = None  # first items of each part
    batch_size: int = 16  # requests
    dtype: str = "float32"  # of the weights
    device: str | None = None  # None: the first GPU, or the CPU
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.suite not in SUITE_NAMES:
            raise ValueError(f"suite must be one of {', '.join(SUITE_NAMES)}, got {self.suite!r}")
        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def evaluation_options(command: argparse.ArgumentParser) -> None:
    """Options of evaluate: the fields of EvaluationSettings, and where to."""
    d = EvaluationSettings("")

    def add(name: str, what: str, **options: Any) -> None:
        command.add_argument(name, help=what, **options)

    add("--model", "folder that save_pretrained wrote, or a hub id; safetensors", metavar="WHERE", required=True)
    add("--suite", "paper: its ten benchmarks; ood: six more; cpt: those after continued training; offline: items "
        f"made here of packages' text (default: {d.suite})", choices=SUITE_NAMES, default=d.suite)
    add("--tokenizer", "folder or hub id (default: that of --model)", metavar="WHERE")
    add("--data", "folder of NAME.SPLIT.jsonl or .parquet files in place of the hub, NAME being lm-eval's task "
        "(default: the hub, or its cache); with offline a folder that write_suite made (default: that of the corpus)",
        metavar="FOLDER")
    add("--limit", "only the first N items of each part (default: all)", type=int, metavar="N")
    add("--batch-size", f"requests at once (default: {d.batch_size})", type=int, metavar="N", default=d.batch_size)
    add("--dtype", f"of the weights (default: {d.dtype})", choices=DTYPES, default=d.dtype)
    add("--device", "as torch names it (default: the first GPU, or cpu)", metavar="NAME")
    add("--trust-remote-code", "run code that comes with the model (default: refuse)", action="store_true")
    add("--output", "folder for the record and, under samples/, every item (default: results/evaluations of the "
        "repository)", type=Path, default=ROOT / "results" / "evaluations", metavar="FOLDER")
    add("--dry-run", "list tasks, splits, items, requests and whether the data can be loaded, and stop",
        action="store_true")


def evaluate(options: argparse.Namespace) -> int:
    """Run the command; 1 if a task could not be run."""
    names = [field.name for field in dataclasses.fields(EvaluationSettings)]
    settings = EvaluationSettings(**{name: getattr(options, name) for name in names})
    from opus_bench.evaluation.records import evaluate_model, plan
    from opus_bench.results import record_path

    if options.dry_run:
        lines = plan(settings)
        print(table(("task", "parts", "split", "items", "the paper's", "requests", "data"), plan_rows(lines)))
        print(f"{sum(line['requests'] or 0 for line in lines):,} requests; "
              f"{sum(line['status'] is not None for line in lines)} of {len(lines)} tasks cannot be run here")
        return int(any(line["status"] for line in lines))
    record = evaluate_model(settings, options.output, lambda row, kept: print(row_text(row, kept), flush=True))
    print(f"record {record_path(options.output, record['run_id'])}")
    return int(any(row.get("value") is None for row in record["evals"]))


def plan_rows(lines: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The plan of an evaluation as rows of a table."""
    def cell(value: Any) -> str:
        return "–" if value is None else f"{value:,}" if isinstance(value, int) else value

    return [(*(cell(line[key]) for key in ("task", "parts", "splits", "n", "n_paper", "requests")),
             line["status"] or line["source"]) for line in lines]


def row_text(row: dict[str, Any], kept: bool) -> str:
    """A task's result in one line: value, standard error, items, and how they compare with the paper's."""
    if row.get("value") is None:
        return f"{row['task']:22} {row['status']}"
    factor, unit = (1, "bit/byte") if row.get("unit") == "bit/byte" else (100, "%")
    spread = "" if row["stderr"] is None else f" ± {factor * row['stderr']:.2f}"
    part = "" if row["limit"] is None else f"the first {row['n_samples']:,} of "
    items = row.get("count", f"{row['n_samples']:,} items")
    return f"{row['task']:22} {factor * row['value']:.2f}{spread} {unit}, {part}{items}{' (on disk)' * kept}"
