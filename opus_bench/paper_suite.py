"""The paper's ten in-domain tasks with lm-eval, where there is a hub to load them from.

    rows = evaluate_paper_suite(model, tokenizer)           # one row a task, or why it was not run

The same promises as `evaluate.evaluate`: no trace, no output but one progress bar.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opus_bench.evaluate import TEMPLATES, loglikelihoods, quiet, run_tasks, undisturbed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class PaperTask:
    """One of the paper's in-domain tasks: lm-eval's names for it (several are pooled) and the number
    of items the paper states, None where it states none."""

    name: str
    lm_eval: tuple[str, ...]
    n: int | None


PAPER_TASKS = (
    PaperTask("MMLU", ("mmlu_continuation",), 14042),
    PaperTask("ANLI", ("anli_r1", "anli_r2", "anli_r3"), None),
    PaperTask("HellaSwag", ("hellaswag",), 10042),
    PaperTask("PIQA", ("piqa",), 1838),
    PaperTask("SIQA", ("social_iqa",), 1954),
    PaperTask("WinoGrande", ("winogrande",), 1267),
    PaperTask("ARC-E", ("paper_arc_easy",), 567),
    PaperTask("ARC-C", ("paper_arc_challenge",), 295),
    PaperTask("CommonsenseQA", ("paper_commonsense_qa",), 1221),
    PaperTask("WSC", ("wsc",), 104),
)
HUB_TIMEOUT = 5.0
"""Seconds to wait for one answer of the hub."""


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
            outcome.append(f"{type(error).__name__}: {_first_line(error)}")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT + 1)
    return outcome[0] if outcome else f"no answer within {HUB_TIMEOUT:g} s"


def evaluate_paper_suite(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tasks: Sequence[PaperTask] = PAPER_TASKS,
    limit: int | None = None,
    batch_size: int = 16,
) -> list[dict]:
    """The paper's zero-shot accuracies with lm-eval's prompts, one row a task.

    The metric is the paper's: the option of the lowest mean negative log-likelihood over its tokens
    (`acc_mean_nll`), from the log-likelihoods lm-eval computed; tasks of several parts pool items.
    MMLU, ARC and CommonsenseQA score full answers, ARC on its development split. The paper's prompts
    are not published, and the public ARC development splits have 570 and 299 items, not 567 and 295;
    a row carries `n_paper` beside `n_samples`.

    Returns:
        Rows of the results schema; a task that could not be loaded is a row with `status`
        "not run: no hub" or "not run: <reason>", and the details under `reason`.
    """
    problem = hub_problem()
    if problem is not None:
        return [{"task": task.name, "status": "not run: no hub", "reason": problem} for task in tasks]
    from lm_eval.tasks import TaskManager

    rows = []
    with undisturbed(model), quiet("the paper's tasks"):
        registry = TaskManager(include_path=str(TEMPLATES))
        for task in tasks:
            try:
                loaded = registry.load(list(task.lm_eval))
            except Exception as error:  # noqa: BLE001 any failure to load is the row's reason
                reason = f"{type(error).__name__}: {_first_line(error)}"
                rows.append({"task": task.name, "status": f"not run: {reason}", "reason": str(error)})
                continue
            results = run_tasks(model, tokenizer, loaded, batch_size, limit)
            rows.append(_paper_row(task, results, loaded["tasks"], batch_size, limit))
    return rows


def _paper_row(task: PaperTask, results: dict, leaves: dict, batch_size: int, limit: int | None) -> dict:
    correct = [
        _lowest_mean_nll(results["lm"], sample) == _gold(leaves[name], sample["doc"])
        for name, samples in results["samples"].items()
        for sample in samples
    ]
    n, value = len(correct), sum(correct) / len(correct)
    first = next(iter(leaves))
    return {
        "task": task.name,
        "task_version": f"{','.join(task.lm_eval)} {results['versions'].get(first)}",
        "metric": "acc_mean_nll",
        "higher_is_better": True,
        "n_shot": results["n-shot"][first],
        "n_samples": n,
        "limit": limit,
        "batch_size": batch_size,
        "value": value,
        "stderr": math.sqrt(value * (1 - value) / n),
        "n_paper": task.n,
    }


def _lowest_mean_nll(lm: Any, sample: dict) -> int:
    """The option whose tokens have the highest mean log-likelihood; the first of equals."""
    lengths = [_continuation_tokens(lm, *arguments[:2]) for arguments in sample["arguments"]]
    means = [value / length for value, length in zip(loglikelihoods(sample), lengths)]
    return max(range(len(means)), key=means.__getitem__)


def _continuation_tokens(lm: Any, context: str, continuation: str) -> int:
    encoded = lm._encode_pair(context, continuation)[1] if context else lm.tok_encode(continuation)
    return len(encoded)


def _gold(task: Any, doc: dict) -> int:
    """The index of the right option, from whichever field of the task holds it."""
    target: Any = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    return task.doc_to_choice(doc).index(target) if isinstance(target, str) else int(target)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
