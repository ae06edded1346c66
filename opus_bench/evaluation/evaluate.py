"""Evaluation of a model in memory with lm-eval, without a network and without a trace.

    rows = evaluate(model, tokenizer, suite)                # a suite of `suite.write_suite`

Rows are the `evals` of a run record. The model's training mode, the caller's tokenizer and every
global random state are left as they were, and nothing is printed but one progress bar. A
log-likelihood that is not a number is an error, never a wrong answer. `undisturbed`, `quiet`,
`run_tasks` and `loglikelihoods` serve `paper_suite` too.
"""

from __future__ import annotations

import copy
import logging
import math
import random
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from tqdm import tqdm

from opus_bench.evaluation.suite import Suite

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "tasks"


# Running lm-eval without a trace.


@contextmanager
def undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Restore the training mode of every module and the random state of Python, numpy and torch."""
    training = [(module, module.training) for module in model.modules()]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


class _Bar:
    """Stands in for tqdm inside lm-eval: iterables pass through, counts go to one shared bar."""

    def __init__(self, shared: tqdm, iterable: Any = None, **_: Any):
        self.shared, self.iterable = shared, iterable

    def __iter__(self) -> Iterator[Any]:
        return iter(self.iterable)

    def update(self, n: int = 1) -> None:
        self.shared.update(n)

    def close(self) -> None:
        pass


@contextmanager
def quiet(description: str, total: int | None = None) -> Iterator[None]:
    """Silence lm-eval, datasets and transformers below errors; one bar, shown on a terminal only."""
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers")]
    levels = [logger.level for logger in loggers]
    bars_were_shown = not datasets.are_progress_bars_disabled()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        shared = stack.enter_context(tqdm(total=total, desc=description, leave=False, disable=None))
        for module in (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface):
            stack.callback(setattr, module, "tqdm", module.tqdm)
            module.tqdm = partial(_Bar, shared)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
            if bars_were_shown:
                datasets.enable_progress_bars()


def run_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, loaded: dict, batch_size: int, limit: int | None
) -> dict:
    """lm-eval's results on loaded tasks, samples included, every log-likelihood finite.

    Log-probabilities of a model in half precision are taken in float32, where bfloat16 would make options tie.
    """
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no bos_token and no eos_token: set one to score a text's first token after")
    for task in loaded["tasks"].values():
        if task.config.num_fewshot is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=0)
    softmax_dtype = torch.float32 if model.dtype in (torch.bfloat16, torch.float16) else None
    generates = any(task.OUTPUT_TYPE == "generate_until" for task in loaded["tasks"].values())
    if generates and not getattr(model, "left_padding", True):
        batch_size = 1  # lm-eval pads prompts of several lengths on the left
    lm = HFLM(
        pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, softmax_dtype=softmax_dtype
    )
    try:
        results = evaluator.evaluate(lm, loaded, limit=limit, log_samples=True, bootstrap_iters=1)
    except AssertionError as error:
        message = (
            f"an option is empty or longer than the {lm.max_length} tokens the model takes: give it more positions"
        )
        raise ValueError(message) from error
    for name, samples in results["samples"].items():
        for sample in samples if loaded["tasks"][name].OUTPUT_TYPE != "generate_until" else ():
            values = loglikelihoods(sample)
            if not all(map(math.isfinite, values)):
                raise ValueError(
                    f"task {name}, item {sample['doc_id']}: the model gave log-likelihoods {values}; "
                    "its logits are not finite, so there is no accuracy: check the weights and the learning rate"
                )
    results["lm"] = lm
    return results


def loglikelihoods(sample: dict) -> list[float]:
    """One number an option, or one for a rolling task."""
    first = [responses[0] for responses in sample["resps"]]
    return [response[0] if isinstance(response, (tuple, list)) else response for response in first]


def _row(results: dict, name: str, metric: str, batch_size: int, limit: int | None) -> dict:
    """An `evals` row of lm-eval's own value of a metric."""
    scores = results["results"][name]
    stderr = scores[f"{metric}_stderr,none"]
    return {
        "task": name,
        "task_version": results["versions"].get(name),
        "metric": metric,
        "higher_is_better": results["higher_is_better"][name][metric],
        "n_shot": results["n-shot"][name],
        "n_samples": results["n-samples"][name]["effective"],
        "limit": limit,
        "batch_size": batch_size,
        "value": float(scores[f"{metric},none"]),
        "stderr": None if stderr == "N/A" else float(stderr),
    }


# The offline suite.


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    suite: Suite,
    batch_size: int = 64,
    limit: int | None = None,
) -> list[dict]:
    """Accuracy on each multiple-choice task, their mean, and bits per byte of each domain.

    The metric is `acc` throughout, chosen before any model was run: the option of the highest total
    log-likelihood. The options of an item differ in one word of nearly the same length, or in order,
    so the sentence's probability is the question asked; a mean over tokens, the paper's rule for
    answers of different length, would favour words that split into many tokens.

    Args:
        limit: only the first items of each task, and documents of each domain.

    Returns:
        Rows of the results schema. Accuracy rows carry `chance` and `surface`, the accuracy of the
        best rule that needs no model, on all items of the task (`surface_name` says which).
        `mean_accuracy` is the unweighted mean over tasks; its standard error is binomial in each
        task, tasks being independent because no sentence serves two of them. The standard error of
        bits per byte is that of a ratio of sums over documents, to first order; lm-eval gives none.

    Raises:
        ValueError: if a log-likelihood is not finite, or the tokenizer has no bos and no eos token.
    """
    return evaluate_items(model, tokenizer, suite, batch_size, limit)[0]


def evaluate_items(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    suite: Suite,
    batch_size: int = 64,
    limit: int | None = None,
) -> tuple[list[dict], list[dict]]:
    """`evaluate`'s rows, and the outcome of every item.

    Items have `part` (the task), `doc` (their place), `sha` (of the item), `nll` (nat, total of each option) and
    `gold`, `correct`, or `bytes` where the item is a text for bits per byte.
    """
    from lm_eval.tasks import TaskManager

    parts = {**suite.tasks, **{f"bits_per_byte_{domain}": part for domain, part in suite.domains.items()}}
    counts = {name: part.n if limit is None else min(limit, part.n) for name, part in parts.items()}
    total = sum(n * (round(1 / parts[name].chance) if parts[name].chance else 1) for name, n in counts.items())
    with undisturbed(model), quiet("evaluating", total), tempfile.TemporaryDirectory() as cache:
        configs = [_local_config(name, suite.directory / part.file, cache) for name, part in parts.items()]
        loaded = TaskManager(include_path=str(TEMPLATES), include_defaults=False).load(configs)
        results = run_tasks(model, tokenizer, loaded, batch_size, limit)
    rows = []
    for name, task in suite.tasks.items():
        surface, surface_name = task.best_surface
        row = _row(results, name, "acc", batch_size, limit)
        rows.append(row | {"chance": task.chance, "surface": surface, "surface_name": surface_name})
    rows.append(_mean_row(rows))
    for domain in suite.domains:
        name = f"bits_per_byte_{domain}"
        row = _row(results, name, "bits_per_byte", batch_size, limit)
        pairs = [sample["bits_per_byte"] for sample in results["samples"][name]]
        rows.append(row | {"stderr": _ratio_stderr(pairs), "unit": "bit/byte", "domain": domain})
    return rows, [_item(name, sample) for name in parts for sample in results["samples"][name]]


def _item(name: str, sample: dict) -> dict:
    found = {"part": name, "doc": sample["doc_id"], "sha": sample["doc_hash"][:16]}
    found["nll"] = [-value for value in loglikelihoods(sample)]
    if "bits_per_byte" in sample:
        return found | {"bytes": sample["bits_per_byte"][1]}
    return found | {"gold": sample["doc"]["answer"], "correct": float(sample["acc"])}


def _local_config(name: str, path: Path, cache: str) -> dict[str, Any]:
    """The template of a task with its name and its data filled in."""
    template = "bits_per_byte" if name.startswith("bits_per_byte_") else name
    config = yaml.safe_load((TEMPLATES / f"{template}.yaml").read_text())
    data = {"data_files": {"test": str(path.resolve())}, "cache_dir": cache}
    return {**config, "task": name, "dataset_kwargs": data}


def _mean_row(rows: Sequence[dict]) -> dict:
    variances = [row["value"] * (1 - row["value"]) / row["n_samples"] for row in rows]
    return {
        **rows[0],
        "task": "mean_accuracy",
        "n_samples": sum(row["n_samples"] for row in rows),
        "value": sum(row["value"] for row in rows) / len(rows),
        "stderr": math.sqrt(sum(variances)) / len(rows),
        "chance": sum(row["chance"] for row in rows) / len(rows),
        "surface": sum(row["surface"] for row in rows) / len(rows),
        "surface_name": "mean of the best of each task",
    }


def _ratio_stderr(pairs: Sequence[tuple[float, int]]) -> float | None:
    """Standard error of bits per byte from (log-likelihood, bytes) of each document.

    r = sum l_i / sum b_i,   Var r ~ n / (n - 1) sum (l_i - r b_i)^2 / (sum b_i)^2
    """
    n = len(pairs)
    if n < 2:
        return None
    loglikelihoods, sizes = np.array(pairs, dtype=float).T
    residuals = loglikelihoods - loglikelihoods.sum() / sizes.sum() * sizes
    return float(math.sqrt(n / (n - 1) * (residuals**2).sum()) / sizes.sum() / math.log(2))
