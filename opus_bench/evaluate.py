"""Evaluation with lm-eval: the paper's tasks where there is a hub, and a suite of its own without one.

    suite = write_suite(directory, documents, reference_texts, bpb_documents)
    rows = evaluate(model, tokenizer, suite)                # local JSON tasks, no network
    rows = evaluate_paper_suite(model, tokenizer)           # the paper's ten tasks, or why not

Rows are the `evals` of a run record. Both functions take a model in memory, leave its training
mode, the caller's tokenizer and every global random state as they found them, and print nothing
but one progress bar. A log-likelihood that is not a number is an error, never a wrong answer.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import os
import random
import re
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from tqdm import tqdm

from opus_bench import items as item_rules

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "tasks"
BITS_DOCUMENTS = 20
"""Documents a domain for bits per byte: the first so many given."""
BITS_CHARACTERS = 1000
"""Characters kept of each of them."""
RULES_VERSION = 1
"""Raised when the rules of `items` change, so that an old suite is not taken for a new one."""


# The offline suite on disk.


@dataclass(frozen=True)
class SuiteTask:
    """One JSONL file of the suite; `surface` is empty and `chance` None for bits per byte."""

    file: str
    sha256: str
    n: int
    chance: float | None
    surface: dict[str, float]

    @property
    def best_surface(self) -> tuple[float | None, str | None]:
        """The accuracy and the name of the best rule that needs no model; chance is one of them."""
        if self.chance is None:
            return None, None
        name = max(("chance", *self.surface), key=lambda rule: {"chance": self.chance, **self.surface}[rule])
        return {"chance": self.chance, **self.surface}[name], name


@dataclass(frozen=True)
class Suite:
    """Multiple-choice tasks and bits-per-byte domains in a directory, each file hashed."""

    directory: Path
    tasks: dict[str, SuiteTask]
    domains: dict[str, SuiteTask]
    size: int
    seed: int
    inputs_sha256: str

    @property
    def sha256(self) -> str:
        """Hash of every file of the suite: equal suites have equal items."""
        files = {part.file: part.sha256 for part in (*self.tasks.values(), *self.domains.values())}
        return _sha256(json.dumps(files, sort_keys=True))


def write_suite(
    directory: str | Path,
    documents: Sequence[str],
    reference_texts: Sequence[str],
    bpb_documents: dict[str, Sequence[str]],
    size: int = 250,
    seed: int = 0,
) -> Suite:
    """The suite in `directory`: read back and verified if it is there, otherwise built.

    Written to a directory beside it and renamed, so an interrupted call leaves nothing behind and
    two processes may call it at once.

    Args:
        documents: held-out encyclopedic texts that the multiple-choice items are made from.
        reference_texts: texts for word frequencies, not among the documents.
        bpb_documents: held-out texts of each domain for bits per byte.
        size: items a multiple-choice task.

    Raises:
        ValueError: if the directory holds a suite of other inputs, a changed file or anything else,
            a domain is empty or badly named, or the documents are too few for the size.
    """
    directory = Path(directory)
    for domain, texts in bpb_documents.items():
        if not re.fullmatch(r"\w+", domain):
            raise ValueError(f"domain '{domain}' names a file and a task: use letters, digits and _")
        if not any(texts):
            raise ValueError(f"domain '{domain}' has no text for bits per byte: give documents or drop it")
    domains = {
        domain: [text[:BITS_CHARACTERS] for text in texts if text][:BITS_DOCUMENTS]
        for domain, texts in bpb_documents.items()
    }
    inputs = [RULES_VERSION, list(documents), list(reference_texts), domains, size, seed]
    inputs_sha256 = _sha256(json.dumps(inputs, sort_keys=True))
    if not directory.exists() or not any(directory.iterdir()):
        _build_suite(directory, documents, reference_texts, domains, size, seed, inputs_sha256)
    suite = load_suite(directory)
    if suite.inputs_sha256 != inputs_sha256:
        raise ValueError(
            f"{directory} holds a suite of size {suite.size}, seed {suite.seed} made from other inputs than "
            f"size {size}, seed {seed}: give another directory or remove this one"
        )
    return suite


def _build_suite(
    directory: Path, documents, reference_texts, domains, size: int, seed: int, inputs_sha256: str
) -> None:
    counts = item_rules.word_counts(reference_texts)
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        manifest: dict[str, Any] = {
            "size": size,
            "seed": seed,
            "inputs_sha256": inputs_sha256,
            "tasks": {},
            "domains": {},
        }
        for name, items in item_rules.build_items(documents, reference_texts, size, seed).items():
            part = _write_part(scratch, name, item_rules.to_jsonl(items), len(items))
            part |= {"chance": item_rules.chance(items), "surface": item_rules.surface_baselines(items, counts)}
            manifest["tasks"][name] = part
        for domain, texts in domains.items():
            lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
            part = _write_part(scratch, f"bits_per_byte_{domain}", lines, len(texts))
            manifest["domains"][domain] = part | {"chance": None, "surface": {}}
        (scratch / "suite.json").write_text(json.dumps(manifest, indent=1))
        scratch.chmod(0o755)
        try:
            os.rename(scratch, directory)
        except OSError:
            if not (directory / "suite.json").exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_part(directory: Path, name: str, text: str, n: int) -> dict[str, Any]:
    (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {"file": f"{name}.jsonl", "sha256": _sha256(text), "n": n}


def load_suite(directory: str | Path) -> Suite:
    """The suite in a directory, every file compared with its hash.

    Raises:
        ValueError: if there is no manifest, or a file is missing or differs from it.
    """
    directory = Path(directory)
    try:
        manifest = json.loads((directory / "suite.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{directory} has no suite.json: give an empty or a new directory") from None
    tasks = {name: SuiteTask(**part) for name, part in manifest.pop("tasks").items()}
    domains = {name: SuiteTask(**part) for name, part in manifest.pop("domains").items()}
    for part in (*tasks.values(), *domains.values()):
        path = directory / part.file
        if not path.exists() or _sha256(path.read_text(encoding="utf-8")) != part.sha256:
            raise ValueError(f"{path} is missing or differs from its hash in suite.json: remove {directory} to rebuild")
    return Suite(directory, tasks, domains, **manifest)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# Running lm-eval without a trace.


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
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
def _quiet(description: str, total: int | None = None) -> Iterator[None]:
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


def _run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, loaded: dict, batch_size: int, limit: int | None
) -> dict:
    """lm-eval's results on loaded tasks, samples included, every log-likelihood finite."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no bos_token and no eos_token: set one to score a text's first token after")
    for task in loaded["tasks"].values():
        if task.config.num_fewshot is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=0)
    lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
    try:
        results = evaluator.evaluate(lm, loaded, limit=limit, log_samples=True, bootstrap_iters=1)
    except AssertionError as error:
        message = (
            f"an option is empty or longer than the {lm.max_length} tokens the model takes: give it more positions"
        )
        raise ValueError(message) from error
    for name, samples in results["samples"].items():
        for sample in samples:
            values = _loglikelihoods(sample)
            if not all(map(math.isfinite, values)):
                raise ValueError(
                    f"task {name}, item {sample['doc_id']}: the model gave log-likelihoods {values}; "
                    "its logits are not finite, so there is no accuracy: check the weights and the learning rate"
                )
    results["lm"] = lm
    return results


def _loglikelihoods(sample: dict) -> list[float]:
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
    from lm_eval.tasks import TaskManager

    parts = {**suite.tasks, **{f"bits_per_byte_{domain}": part for domain, part in suite.domains.items()}}
    counts = {name: part.n if limit is None else min(limit, part.n) for name, part in parts.items()}
    total = sum(n * (round(1 / parts[name].chance) if parts[name].chance else 1) for name, n in counts.items())
    with _undisturbed(model), _quiet("evaluating", total), tempfile.TemporaryDirectory() as cache:
        configs = [_local_config(name, suite.directory / part.file, cache) for name, part in parts.items()]
        loaded = TaskManager(include_path=str(TEMPLATES), include_defaults=False).load(configs)
        results = _run(model, tokenizer, loaded, batch_size, limit)
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
    return rows


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


# The paper's suite.


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
        except Exception as error:
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
    with _undisturbed(model), _quiet("the paper's tasks"):
        registry = TaskManager(include_path=str(TEMPLATES))
        for task in tasks:
            try:
                loaded = registry.load(list(task.lm_eval))
            except Exception as error:
                reason = f"{type(error).__name__}: {_first_line(error)}"
                rows.append({"task": task.name, "status": f"not run: {reason}", "reason": str(error)})
                continue
            results = _run(model, tokenizer, loaded, batch_size, limit)
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
    means = [value / length for value, length in zip(_loglikelihoods(sample), lengths)]
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
