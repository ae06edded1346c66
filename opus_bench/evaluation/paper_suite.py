"""The paper's suites with lm-eval, from a hub, its cache, or local files.

    rows = evaluate_paper_suite(model, tokenizer)           # one row a task, or why it was not run
    for row, samples in evaluate_tasks(model, tokenizer, SUITES["ood"], data="items"):    # with every item's outcome

A file `data/NAME.SPLIT.jsonl` (or .parquet) stands in for that split of lm-eval's task NAME; prompts, options and
judging stay those of the task. The same promises as `evaluate.evaluate`: no trace, no output but one progress bar.
"""

from __future__ import annotations

import math
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opus_bench.errors import first_line
from opus_bench.evaluation.evaluate import loglikelihoods, quiet, run_tasks, undisturbed
from opus_bench.hashing import canonical, text_sha256
from opus_bench.evaluation.paper_items import CannotLoad, Loader, count_note, describe, gold_option
from opus_bench.evaluation.paper_tasks import PAPER_TASKS, PaperTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

HUB_TIMEOUT = 5.0
"""Seconds to wait for one answer of the hub."""
MAX_NEW_TOKENS = 256  # lm-eval's, where a task says nothing


def hub_problem() -> str | None:
    """Why data sets cannot be loaded, or None: at most HUB_TIMEOUT seconds and a little.

    With HF_HUB_OFFLINE set, a cache of data sets that is there counts as a hub.
    """
    import datasets
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        cache = Path(datasets.config.HF_DATASETS_CACHE)
        full = cache.is_dir() and any(cache.iterdir())
        return None if full else f"HF_HUB_OFFLINE is set and {cache} holds no data sets"
    outcome: list[str | None] = []

    def ask() -> None:
        try:
            huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_TIMEOUT)
            outcome.append(None)
        except Exception as error:  # noqa: BLE001 any failure to reach the hub is the answer
            outcome.append(f"{type(error).__name__}: {first_line(error)}")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT + 1)
    return outcome[0] if outcome else f"no answer within {HUB_TIMEOUT:g} s"


def download_problem() -> str | None:
    """Why nothing can be fetched from the hub, or None: its libraries are told not to ask it, or it does not answer."""
    import huggingface_hub

    return "HF_HUB_OFFLINE is set" if huggingface_hub.constants.HF_HUB_OFFLINE else hub_problem()


def evaluate_paper_suite(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tasks: Sequence[PaperTask] = PAPER_TASKS,
    limit: int | None = None,
    batch_size: int = 16,
    data: str | Path | None = None,
) -> list[dict]:
    """The rows of `evaluate_tasks`, without the items."""
    return [row for row, _ in evaluate_tasks(model, tokenizer, tasks, limit, batch_size, data)]


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tasks: Sequence[PaperTask],
    limit: int | None = None,
    batch_size: int = 16,
    data: str | Path | None = None,
) -> Iterator[tuple[dict, list[dict]]]:
    """Each task's row and the outcome of each of its items, as soon as the task is done.

    Multiple choice is judged by the paper's rule: the option of the lowest mean negative log-likelihood over its
    tokens (`acc_mean_nll`; the first of equals), from the log-likelihoods lm-eval computed. `acc` (lowest total) and
    `acc_norm` (lowest per character) of lm-eval stand beside it under `other_rules`. Generated answers are judged by
    the task. What is known of items and prompts is said in `paper_tasks`.

    Args:
        limit: only the first items of each part.
        data: folder of local files in place of the hub.

    Yields:
        A row of the results schema with, beyond it, `n_paper` and `count`, the comparison of the item counts;
        `parts`, the item set (lm-eval's task, data set, config, split, revision, fingerprint, files' sha256, items,
        accuracy); `items_sha256`, of all questions, options and answers as they were asked; `notes`; or a row with
        `status` "not run: ..." and the details under `reason`. Items have `part`, `doc`, `sha` (of the item), and
        `nll` (nat, total of each option), `tokens` (of each option), `gold`, `correct`, or `response`, `correct`.

    Raises:
        ValueError: a file of `data` that belongs to no task; a log-likelihood that is not finite.
    """
    with tempfile.TemporaryDirectory() as cache:
        with quiet("preparing"):
            loader = Loader(tasks, data, cache, hub_problem)
        for task in tasks:
            with undisturbed(model), quiet(task.name):
                try:
                    loaded = loader.load(task)
                    check_generation(model, loaded["tasks"])
                except CannotLoad as error:
                    row, samples = {"task": task.name, "status": error.status, "reason": str(error)}, []
                else:
                    results = run_tasks(model, tokenizer, loaded, batch_size, limit)
                    samples = [
                        _outcome(name, loaded["tasks"][name], sample, results["lm"])
                        for name in loaded["tasks"] for sample in results["samples"][name]
                    ]
                    row = _row(task, loader, loaded["tasks"], results, samples, batch_size, limit)
            yield row, samples


def check_generation(model: PreTrainedModel, parts: dict) -> None:
    """Refuse tasks whose answers are generated where the model cannot generate them.

    Raises:
        CannotLoad: a model without `generate`, or one whose context the longest answer fills.
    """
    lengths = [(part.config.generation_kwargs or {}).get("max_gen_toks", MAX_NEW_TOKENS)
               for part in parts.values() if part.OUTPUT_TYPE == "generate_until"]
    if not lengths:
        return
    if not model.can_generate():
        raise CannotLoad("the model cannot generate", f"{type(model).__name__} has no `generate`")
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and context <= max(lengths):
        raise CannotLoad("the model's context is too short",
                         f"answers may have {max(lengths):,} tokens, the model takes {context:,} in all")


def _row(task: PaperTask, loader: Loader, parts: dict, results: dict, samples: list[dict], batch_size: int,
         limit: int | None) -> dict:
    first = next(iter(parts.values()))
    generated = first.OUTPUT_TYPE != "multiple_choice"
    described = [describe(name, part, loader, [s["correct"] for s in samples if s["part"] == name])
                 for name, part in parts.items()]
    shares = [part["value"] for part in described]
    variances = [p * (1 - p) / part["n"] for p, part in zip(shares, described, strict=True)]
    n = len(samples)
    if task.by_part:
        value, stderr = math.fsum(shares) / len(shares), math.sqrt(math.fsum(variances)) / len(shares)
    else:
        value = sum(s["correct"] for s in samples) / n
        stderr = math.sqrt(value * (1 - value) / n)
    asked = [[s["doc_hash"], s["arguments"], str(s["target"])] for name in parts for s in results["samples"][name]]
    return {
        "task": task.name,
        "task_version": f"{','.join(task.lm_eval)} {results['versions'].get(next(iter(parts)))}",
        "metric": _metric(first) if generated else "acc_mean_nll",
        "higher_is_better": True,
        "n_shot": results["n-shot"][next(iter(parts))],
        "n_samples": n,
        "limit": limit,
        "batch_size": batch_size,
        "value": value,
        "stderr": stderr,
        "n_paper": task.n,
        "count": count_note(task, sum(part["n_available"] for part in described)),
        "by_part": task.by_part,
        "other_rules": {} if generated else _other_rules(results["samples"]),
        "items_sha256": text_sha256(canonical(asked)),
        "parts": described,
        "notes": list(task.notes),
    }


def _metric(part: Any) -> str:
    return part.config.metric_list[0]["metric"]


def _other_rules(samples: dict[str, list[dict]]) -> dict[str, float]:
    """lm-eval's own accuracies where it has them for every item."""
    items = [sample for part in samples.values() for sample in part]
    return {rule: sum(item[rule] for item in items) / len(items)
            for rule in ("acc", "acc_norm") if all(rule in item for item in items)}


def _outcome(name: str, part: Any, sample: dict, lm: Any) -> dict:
    found = {"part": name, "doc": sample["doc_id"], "sha": sample["doc_hash"][:16]}
    if part.OUTPUT_TYPE != "multiple_choice":
        return found | {"response": sample["resps"][0][0], "correct": float(sample[_metric(part)])}
    nll = [-value for value in loglikelihoods(sample)]
    tokens = [_continuation_tokens(lm, *arguments[:2]) for arguments in sample["arguments"]]
    means = [total / length for total, length in zip(nll, tokens, strict=True)]
    gold = gold_option(part, sample["doc"])
    return found | {"nll": nll, "tokens": tokens, "gold": gold, "correct": float(means.index(min(means)) == gold)}


def _continuation_tokens(lm: Any, context: str, continuation: str) -> int:
    encoded = lm._encode_pair(context, continuation)[1] if context else lm.tok_encode(continuation)
    return len(encoded)
