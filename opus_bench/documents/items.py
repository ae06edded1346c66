"""Benchmark items as texts: what BENCH-PROXY compares documents with.

An item is its question and its right answer, one text.  The paper (arXiv:2602.05400) says that items are
embedded and neither how they are written, nor of which split they are: both are decided here.

    task_items(["hellaswag", "piqa"])       # lm-eval's tasks, their training split where there is one
    task_items(["paper"])                   # the paper's ten tasks
    file_items(["cloze.jsonl"])             # lines with "text", or "context", "choices" and "answer"

A proxy that is retrieved with the items on which the model is then evaluated leaks the evaluation into
the training; `LeakageWarning` says so loudly, and the proxy's manifest keeps the sentence.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lm_eval.tasks import TaskManager

from opus_bench.archives import file_sha256
from opus_bench.errors import first_line
from opus_bench.evaluation.evaluate import TEMPLATES
from opus_bench.evaluation.paper_suite import PAPER_TASKS
from opus_bench.documents.scored import gumbel

Split = Literal["auto", "train", "validation", "fewshot", "test"]


class LeakageWarning(UserWarning):
    """The items that select the training data are those of the evaluation."""


@dataclass(frozen=True)
class Items:
    """Texts of benchmark items, where they come from, and the leakage they bring (empty: none known)."""

    texts: tuple[str, ...]
    sources: tuple[str, ...]
    leakage: tuple[str, ...]


def task_items(
    tasks: Sequence[str], split: Split = "auto", limit: int | None = None, manager: Any = None
) -> Items:
    """The items of lm-eval's tasks and groups of tasks; "paper" stands for the paper's ten tasks.

    Args:
        limit: items of a task at most, drawn at random, always the same ones (None: all).
        split: auto takes the training split; of a task that has none the validation split; of one that
            has neither, as MMLU, the split that few-shot examples come from.
        manager: lm-eval's TaskManager; None: one of all its tasks and this project's.

    Raises:
        ValueError: for a task that cannot be loaded or has no such split.
    """
    if manager is None:
        manager = TaskManager(include_path=str(TEMPLATES))
    texts: list[str] = []
    sources, leakage = [], []
    paper = [name for task in PAPER_TASKS for name in task.lm_eval]
    for wanted in itertools.chain.from_iterable(paper if task == "paper" else [task] for task in tasks):
        try:
            loaded = manager.load([wanted])["tasks"]
        except Exception as error:  # lm-eval and datasets raise anything for a task out of reach
            raise ValueError(f"benchmark {wanted} cannot be loaded ({first_line(error)}); give local items "
                             "instead") from error
        for name, task in loaded.items():
            chosen = _split(name, task, split)
            documents = list({"train": task.training_docs, "validation": task.validation_docs,
                              "fewshot": task.fewshot_docs, "test": task.test_docs}[chosen]())
            source, drawn = f"{name} {chosen}", list(range(len(documents)))
            if limit is not None and limit < len(documents):
                drawn = sorted(sorted(drawn, key=lambda n: gumbel(0, f"{name} {n}"))[-limit:])
                source += f" {limit} of {len(documents)}"
            texts += [item_text(task, documents[n]) for n in drawn]
            sources.append(source)
            if chosen == ("test" if task.has_test_docs() else "validation"):
                leakage.append(f"the items of {name} are of its {chosen} split, on which it is evaluated: the proxy "
                               "leaks the evaluation; choose --item-split train, or other items")
    return _warned(Items(tuple(texts), tuple(sources), tuple(leakage)))


def _split(name: str, task: Any, split: Split) -> str:
    shots = task.config.fewshot_split not in (None, task.config.test_split, task.config.validation_split)
    there = [kind for kind, has in (("train", task.has_training_docs()), ("validation", task.has_validation_docs()),
                                    ("fewshot", shots), ("test", task.has_test_docs())) if has]
    if split == "auto":
        if there and there[0] != "test":
            return there[0]
        raise ValueError(f"benchmark {name} has a test split alone; give --item-split test, which leaks the "
                         "evaluation, or leave it out")
    if split not in there:
        raise ValueError(f"benchmark {name} has no {split} split; it has: {', '.join(there) or 'none'}")
    return split


def item_text(task: Any, document: dict[str, Any]) -> str:
    """Question and right answer as the task writes them."""
    question, target = task.doc_to_text(document), task.doc_to_target(document)
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(document)
        if task.multiple_input:  # the choices are the questions, as in WinoGrande
            return f"{choices[question]} {target}"
        target = target[0] if isinstance(target, list) else target
        target = choices[target] if isinstance(target, int) else target
    return f"{question} {target[0] if isinstance(target, list) else target}".strip()


def file_items(paths: Sequence[str | Path]) -> Items:
    """The items of JSONL files, whose lines have ``text``, or ``context``, ``choices`` and ``answer``.

    The second form is that of this project's offline suite (items.Item); since its items are what models
    are evaluated on, a file that lies beside a suite.json is leakage.

    Raises:
        ValueError: for a line of neither form, naming file and line.
    """
    texts: list[str] = []
    leakage = []
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"items {path} are no file; give one in JSON lines")
        for number, line in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n")):
            try:
                row = json.loads(line)
                texts.append(row["text"] if "text" in row else
                             f"{row['context']} {row['choices'][row['answer']]}".strip())
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise ValueError(f"items {path} line {number + 1} has neither text, nor context, choices and "
                                 f"answer: {error!r}") from error
        if (path.parent / "suite.json").exists():
            leakage.append(f"the items of {path.name} are of an evaluation suite: the proxy leaks the evaluation; "
                           "make other items from other documents")
    sources = tuple(f"{Path(path).name} {file_sha256(Path(path))[:12]}" for path in paths)
    return _warned(Items(tuple(texts), sources, tuple(leakage)))


def merged(*several: Items) -> Items:
    """All items, sources and leakages, in order.

    Raises:
        ValueError: if there is no item.
    """
    together = Items(*(sum((getattr(one, name) for one in several), ()) for name in ("texts", "sources", "leakage")))
    if not together.texts:
        raise ValueError("no benchmark items; give --tasks or --items")
    return together


def _warned(items: Items) -> Items:
    for sentence in items.leakage:
        warnings.warn(f"LEAKAGE: {sentence}", LeakageWarning, stacklevel=3)
    return items
