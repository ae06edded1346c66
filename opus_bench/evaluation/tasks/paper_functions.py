"""What the task files of the paper's suites cannot say in YAML: which items, and judging of generated answers."""

from __future__ import annotations

import re
from typing import Any

CHOICES, SEVERAL, TRUTH, NUMBER = "SC", "MC", "TF", "NV"  # OlympicArena's names of answer types
TOLERANCE = 1e-5  # OlympicArena's, absolute
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
MARKUP = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}|\\left|\\right|[$%\\]")
LETTER = re.compile(r"\s*\(?([A-Za-z])\s*(?:[).:]|$)")


def four_options(dataset: Any) -> Any:
    """Items of ARC with four options, the rule that the paper's counts point to (`paper_tasks`)."""
    return dataset.filter(lambda doc: len(doc["choices"]["text"]) == 4)


def judged_problems(dataset: Any) -> Any:
    """OlympicArena's problems without figures whose type of answer `judge_problem` can judge."""
    return dataset.filter(lambda doc: doc["modality"] == "text-only" and bool(doc["answer"])
                          and doc["answer_type"] in (CHOICES, SEVERAL, TRUTH, NUMBER))


def judge_problem(doc: dict, results: list[str]) -> dict[str, float]:
    """Whether the first \\boxed{} of a response is the answer; no box is a wrong answer, as in OlympicArena.

    Choices are compared as sets of letters, truth values as words, numbers within 1e-5 (absolute). A number that is
    no plain decimal, a power of ten or a fraction is compared as a text, more strictly than OlympicArena's own judge.
    """
    boxed = BOXED.search(results[0])
    if boxed is None:
        return {"acc": 0.0}
    said, want = boxed.group(1), [str(answer) for answer in doc["answer"]]
    if doc["answer_type"] in (CHOICES, SEVERAL):
        right = _letters(said) == set().union(*map(_letters, want))
    elif doc["answer_type"] == TRUTH:
        right = _plain(said).lower() == _plain(want[0]).lower()
    else:
        ours, theirs = _value(said), _value(want[0])
        if ours is None or theirs is None:
            right = _plain(said) == _plain(want[0])
        else:
            right = abs(ours - theirs) <= TOLERANCE
    return {"acc": float(right)}


def _plain(text: str) -> str:
    return MARKUP.sub(lambda match: match.group(1) or "", text).strip()


def _letters(text: str) -> set[str]:
    """Letters of an answer such as "A", "[A, C]" or "A: the first": the first letter of each part."""
    parts = [part.strip() for part in _plain(text).strip("[](){}").split(",")]
    return {part[0] for part in parts if re.match(r"[A-Z](?![A-Za-z])", part)}


def _value(text: str) -> float | None:
    number = text.replace("\\times", "*").replace("\\cdot", "*").replace(" ", "").replace("$", "")
    fraction = re.fullmatch(r"(-?)\\d?frac\{(-?[\d.]+)\}\{(-?[\d.]+)\}", number)
    power = re.fullmatch(r"(-?[\d.]+)\*10\^\{?(-?\d+)\}?", number)
    try:
        if fraction:
            return float(f"{fraction[1]}1") * float(fraction[2]) / float(fraction[3])
        if power:
            return float(power[1]) * 10.0 ** int(power[2])
        return float(number)
    except (ValueError, ZeroDivisionError):
        return None


def questions(dataset: Any) -> Any:
    """SciAssess's questions, which carry no reasoning."""
    return dataset if "reasoning" in dataset.column_names else dataset.add_column("reasoning", [""] * len(dataset))


def worked_examples(dataset: Any) -> Any:
    """SciAssess's examples, which show theirs.

    Raises:
        ValueError: if there are none, or one lacks its reasoning.
    """
    if "reasoning" not in dataset.column_names or not all(dataset["reasoning"]):
        raise ValueError("each row of the fewshot file needs its `reasoning`: the examples are worked ones")
    return dataset


def judge_choice(doc: dict, results: list[str]) -> dict[str, float]:
    """Whether the letter after the last "Answer:" of a response is that of `ideal`."""
    said = LETTER.match(results[0].rpartition("Answer:")[2]) if "Answer:" in results[0] else None
    want = LETTER.match(doc["ideal"])
    if want is None:
        raise ValueError(f"ideal must begin with the letter of an option, as in 'b) ...', got {doc['ideal']!r}")
    return {"acc": float(said is not None and said[1].lower() == want[1].lower())}
