"""Invented items in the form of each benchmark's own data, so that the task files are run as they are."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = ("river stone lamp green walks under seven quiet doors a the old sings near milk paper until cold gardens "
         "turn bright and slow wheels keep small birds").split()


class Items:
    """Rows of each data set, told by the name of lm-eval's task; equal seeds make equal rows."""

    def __init__(self, seed: int = 0):
        self.random = random.Random(seed)

    def phrase(self, low: int = 1, high: int = 5) -> str:
        return " ".join(self.random.choices(WORDS, k=self.random.randint(low, high)))

    def row(self, part: str, i: int) -> dict:
        p = self.phrase
        if part.startswith("mmlu_"):
            return {"question": p(), "choices": [p() for _ in range(4)], "answer": i % 4}
        if part.startswith("anli_"):
            return {"premise": p(), "hypothesis": p(), "label": i % 3}
        if part.startswith("opus_arc_"):
            names = "1234" if i % 2 else "ABCD"
            return {"question": p(), "choices": {"text": [p() for _ in names], "label": list(names)},
                    "answerKey": names[i % 4]}
        if part.startswith("opus_race_"):
            return {"article": p(9, 20), "question": p(), "options": [p() for _ in range(4)], "answer": "ABCD"[i % 4]}
        if part.startswith("opus_storycloze_"):
            story = {f"input_sentence_{k}": p() for k in (1, 2, 3, 4)}
            return story | {"sentence_quiz1": p(), "sentence_quiz2": p(), "answer_right_ending": 1 + i % 2}
        if part.startswith("bbh_"):
            return {"input": f"Is {p()} so?", "target": ("Yes", "No")[i % 2]}
        if part.startswith("opus_olympicarena_"):
            return {"prompt": p(), "answer": ["B"], "answer_type": "SC", "modality": "text-only"}
        if part.startswith("opus_sciassess_"):
            return {"input": [{"role": "user", "content": f"{p()}\na) {p()}\nb) {p()}"}], "ideal": f"b) {p()}"}
        return {
            "hellaswag": lambda: {"ctx_a": p(), "ctx_b": p(), "activity_label": p(1, 1), "label": str(i % 4),
                                  "endings": [p() for _ in range(4)]},
            "piqa": lambda: {"goal": p(), "sol1": p(), "sol2": p(), "label": i % 2},
            "social_iqa": lambda: {"context": p(), "question": p(), "answerA": p(), "answerB": p(), "answerC": p(),
                                   "label": str(1 + i % 3)},
            "winogrande": lambda: {"sentence": f"{p()} _ {p()}", "option1": p(1, 1), "option2": p(1, 2),
                                   "answer": str(1 + i % 2)},
            "opus_commonsense_qa": lambda: {"question": p(), "answerKey": "ABCDE"[i % 5], "choices": {
                "label": list("ABCDE"), "text": [p() for _ in range(5)]}},
            "wsc": lambda: {"text": "the old lamp sings when it turn", "span1_text": "lamp", "span2_text": "it",
                            "span2_index": 5, "label": i % 2},
            "opus_ax_b": lambda: {"sentence1": p(), "sentence2": p(), "label": i % 2},
            "opus_ax_g": lambda: {"premise": p(), "hypothesis": p(), "label": i % 2},
        }[part]()


def write_part(folder: Path, part: str, split: str, rows: list[dict]) -> Path:
    path = folder / f"{part}.{split}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_items(folder: Path, parts: dict[str, str], n: int = 4, seed: int = 0) -> Path:
    """n invented items for each part, whose evaluated split is given; and the worked examples of SciAssess."""
    folder.mkdir(parents=True, exist_ok=True)
    items = Items(seed)
    for part, split in parts.items():
        write_part(folder, part, split, [items.row(part, i) for i in range(n)])
        if part.startswith("opus_sciassess_"):
            examples = [items.row(part, i) | {"reasoning": items.phrase()} for i in range(3)]
            write_part(folder, part, "fewshot", examples)
    return folder
