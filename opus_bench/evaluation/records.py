"""`opus-bench evaluate`: a model on one of the suites, its record, and the outcome of every item.

    settings = EvaluationSettings(model="path/or/hub-id", suite="paper", dtype="bfloat16")
    for line in plan(settings): ...              # items and requests, and what cannot be loaded; no model is read
    record = evaluate_model(settings, Path("results/runs"))

A record's identity is that of the weights, the tokenizer, the suite, its local files, the settings and the code. Each
task is put on disk when it is done (`samples`), so an interrupted evaluation loses the current task at most: the same
command goes on. A task that could not be run is tried again by the next call; a record of which every task was run is
done.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opus_bench import hashing, provenance, results, schema
from opus_bench.archives import file_sha256
from opus_bench.evaluation.command import OFFLINE, EvaluationSettings
from opus_bench.evaluation.paper_tasks import SUITES
from opus_bench.evaluation.samples import read_samples, samples_folder, samples_path, write_samples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

OFFLINE_SIZE, OFFLINE_SEED = 250, 0  # items a task


# The plan --------------------------------------------------------------------------------------------------------


def plan(settings: EvaluationSettings) -> list[dict]:
    """One line a task: parts, splits, items, the paper's items, requests, and where from or why not.

    Loads (and so fetches) the data, not the model. Keys: task, parts, splits, n, n_paper, requests, source, status
    (None, or "not run: ...").
    """
    from opus_bench.evaluation.evaluate import quiet

    if settings.suite == OFFLINE:
        suite = offline_suite(settings.data)
        return [{"task": name, "parts": 1, "splits": "test", "n": limited(part.n, settings.limit), "n_paper": None,
                 "requests": limited(part.n, settings.limit) * (round(1 / part.chance) if part.chance else 1),
                 "source": "built here", "status": None} for name, part in (suite.tasks | suite.domains).items()]
    from opus_bench.evaluation import paper_suite
    from opus_bench.evaluation.paper_items import Loader

    tasks = SUITES[settings.suite]
    with tempfile.TemporaryDirectory() as cache, quiet("loading", len(tasks)):
        loader = Loader(tasks, settings.data, cache, lambda: paper_suite.hub_problem())
        return [_planned(task, loader, settings.limit) for task in tasks]


def _planned(task: Any, loader: Any, limit: int | None) -> dict:
    from opus_bench.evaluation.paper_items import CannotLoad, options, split_of

    line = {"task": task.name, "parts": None, "splits": None, "n": None, "n_paper": task.n, "requests": None,
            "source": None, "status": None}
    try:
        parts = loader.load(task)["tasks"]
    except CannotLoad as error:
        return line | {"status": error.status, "source": str(error)}
    return line | {
        "parts": len(parts),
        "splits": ", ".join(dict.fromkeys(map(split_of, parts.values()))),
        "n": sum(limited(len(part.eval_docs), limit) for part in parts.values()),
        "requests": sum(options(name, part, limit) for name, part in parts.items()),
        "source": "local files" if set(parts) <= set(loader.files) else next(iter(parts.values())).config.dataset_path,
    }


def limited(n: int, limit: int | None) -> int:
    """Items left of n."""
    return n if limit is None else min(n, limit)


def offline_suite(folder: str | None = None) -> Any:
    """The suite of a folder, or the offline one of the corpus that training runs use, built the first time."""
    from opus_bench.corpus import build_corpus
    from opus_bench.corpus_spec import CorpusSpec
    from opus_bench.evaluation.suite import corpus_suite, load_suite

    if folder is not None:
        return load_suite(folder)
    return corpus_suite(build_corpus(CorpusSpec()), OFFLINE_SIZE, OFFLINE_SEED)


# The evaluation --------------------------------------------------------------------------------------------------


def evaluate_model(
    settings: EvaluationSettings, output: Path, on_row: Callable[[dict, bool], None] = lambda row, kept: None
) -> dict:
    """The record of an evaluation, written to `output`/<run_id>.json; tasks already on disk are not run again.

    Args:
        on_row: told each row as it is there, and whether it was on disk.

    Raises:
        ValueError: a model or tokenizer that cannot be read, logits that are not finite, a file of `data` that
            belongs to no task.
        RecordError: an output that cannot be written, or a damaged file in it.
    """
    from filelock import FileLock

    results.check_writable(output)
    model, tokenizer = read_model_and_tokenizer(settings)
    suite = offline_suite(settings.data) if settings.suite == OFFLINE else None
    identity, config, data = _identity(settings, model, tokenizer, suite)
    folder = samples_folder(output, identity)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        path = results.record_path(output, identity)
        if path.exists():
            record = results.read(path)
            if all(row.get("value") is not None for row in record["evals"]):
                for row in record["evals"]:
                    on_row(row, True)
                return record
        rows, seconds = _all_rows(settings, suite, model, tokenizer, folder, on_row)
        record = _record(settings, identity, config, data, rows, seconds, model)
        schema.validate(record)
        path.unlink(missing_ok=True)  # one whose tasks were not all run
        results.write(record, output)
    return record


def read_model_and_tokenizer(settings: EvaluationSettings) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model in its dtype on its device, and its tokenizer."""
    import torch

    import opus_bench.model  # noqa: F401 makes the paper's GPT-2 known to transformers
    from opus_bench.validation.own_inputs import read_model, read_tokenizer

    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return read_model(settings).to(device).eval(), read_tokenizer(settings)


def _identity(settings: EvaluationSettings, model: Any, tokenizer: Any, suite: Any) -> tuple[str, dict, dict]:
    from opus_bench.train import weights_sha256

    config = {"selector": "none", "optimizer": "none", "seed": 0, "weights_sha256": weights_sha256(model),
              "suite": settings.suite, "limit": settings.limit, "batch_size": settings.batch_size,
              "dtype": settings.dtype}
    files = {} if settings.data is None else {
        path.name: file_sha256(path) for path in sorted(Path(settings.data).iterdir()) if path.is_file()}
    tasks = [suite.sha256] if suite else [[task.name, *task.lm_eval] for task in SUITES[settings.suite]]
    spec = [tasks, files, provenance.environment()["lm_eval"]]
    tokens = hashing.text_sha256(tokenizer.backend_tokenizer.to_str())
    data = {"spec_sha256": hashing.text_sha256(hashing.canonical([*spec, tokens])), "train_sha256": None,
            "proxy_sha256": None, "tokenizer_sha256": tokens, "suite_sha256": suite.sha256 if suite else None,
            "selected_sha256": None, "target_domain": "none"}
    return schema.run_id("evaluate", config, data["spec_sha256"], provenance.code_version()), config, data


def _all_rows(settings: EvaluationSettings, suite: Any, model: Any, tokenizer: Any, folder: Path,
              on_row: Callable[[dict, bool], None]) -> tuple[list[dict], float]:
    """Every row in the suite's order, and the seconds that the evaluation took in all calls."""
    names = [OFFLINE] if suite else [task.name for task in SUITES[settings.suite]]
    found: dict[str, list[dict]] = {}
    seconds = 0.0
    for name in names:
        path = samples_path(folder, name)
        if path.exists():
            header, _ = read_samples(path)
            found[name] = header["rows"]
            seconds += header["seconds"]
            for row in header["rows"]:
                on_row(row, True)
    left = [name for name in names if name not in found]
    started = time.perf_counter()
    for name, rows, samples in _evaluate(settings, suite, model, tokenizer, left):
        took, started = time.perf_counter() - started, time.perf_counter()
        seconds += took
        if samples:
            write_samples(samples_path(folder, name), rows, samples, took)
        found[name] = rows
        for row in rows:
            on_row(row, False)
    return [row for name in names for row in found[name]], seconds


def _evaluate(settings: EvaluationSettings, suite: Any, model: Any, tokenizer: Any, left: list[str]):
    """(name, rows, items) of each task that is left."""
    from opus_bench.evaluation.evaluate import evaluate_items
    from opus_bench.evaluation.paper_suite import evaluate_tasks

    if suite:
        if left:
            yield OFFLINE, *evaluate_items(model, tokenizer, suite, settings.batch_size, settings.limit)
        return
    wanted = [task for task in SUITES[settings.suite] if task.name in left]
    for row, samples in evaluate_tasks(model, tokenizer, wanted, settings.limit, settings.batch_size, settings.data):
        yield row["task"], [row], samples


def _record(settings: EvaluationSettings, identity: str, config: dict, data: dict, rows: list[dict], seconds: float,
            model: Any) -> dict:
    from opus_bench.train import peak_bytes

    counted = [row for row in rows if row.get("n_paper") is not None]
    deviations = [f"{row['task']}: {row['count']}" for row in counted if not row["count"].endswith("in the paper")]
    if settings.limit is not None:
        deviations.append(f"only the first {settings.limit} items of each part")
    return {
        "schema": schema.SCHEMA,
        "run_id": identity,
        "experiment": "evaluate",
        "scale": "evaluation",
        "arm": None,
        "method": settings.model,
        "paper": {"arxiv": schema.ARXIV, "item": f"evaluation suite: {settings.suite}", "row": None},
        "config": config,
        "deviations": deviations,
        "data": data,
        "code": {"version": provenance.code_version(), **provenance.git_state()},
        "environment": provenance.environment(str(model.device)),
        "timing": {"wall_s": seconds, "train_s": 0.0, "select_s": 0.0, "eval_s": seconds, "peak_bytes": peak_bytes()},
        "metrics": [],
        "evals": rows,
        "selection": {"offered": {}, "chosen": {}, "notes": [], "per_step": {name: [] for name in schema.PER_STEP}},
        "final": {"weights_sha256": config["weights_sha256"]},
    }
