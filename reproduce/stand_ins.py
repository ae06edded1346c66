"""Stand-ins of what Figures 5 and 6 need, for their ci scale: a Qwen3 of two layers, text, items of the suite `cpt`.

    python -m reproduce.stand_ins --out data

Words in a random order: numbers that are measured with them mean nothing.  Folders below ``out``: text/words,
text/validation-words, models/qwen3-ci, items-words, which gets done.json at last.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config

from opus_bench.evaluation.paper_tasks import CPT_TASKS
from opus_bench.sources import END_OF_TEXT

from .paper_commands import place_of
from .paper_settings import QWEN3_CI

SHAPE = QWEN3_CI.shape
CONTEXT = 2560  # tokens: the longest answer of the suite and its question
WORDS = ("acid atom bond cell charge crystal decay energy enzyme field force gene heat ion light mass metal orbit "
         "phase proton salt spin star tissue virus wave").split()


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator([" ".join(WORDS)] * 3, trainers.BpeTrainer(
        vocab_size=SHAPE.vocabulary, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END_OF_TEXT)


def model(seed: int = 0) -> torch.nn.Module:
    """Random weights.  Every second token ends an answer: an untrained model would go on to its longest."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = AutoModelForCausalLM.from_config(Qwen3Config(
            vocab_size=SHAPE.vocabulary, hidden_size=SHAPE.width, intermediate_size=SHAPE.feed_forward,
            num_hidden_layers=SHAPE.layers, num_attention_heads=2, num_key_value_heads=1, head_dim=SHAPE.kv_width,
            max_position_embeddings=CONTEXT, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0))
    made.generation_config = GenerationConfig(eos_token_id=list(range(0, SHAPE.vocabulary, 2)), pad_token_id=0)
    return made


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_items(folder: Path, draw: random.Random, count: int = 2) -> None:
    """Items of every part of the suite in the form of the benchmark's own data."""
    def phrase() -> str:
        return " ".join(draw.choices(WORDS, k=4))

    def question() -> dict:
        right = f"b) {phrase()}"
        return {"input": [{"role": "user", "content": f"{phrase()}\na) {phrase()}\n{right}"}], "ideal": right}

    for part in (part for task in CPT_TASKS for part in task.lm_eval):
        if part.startswith("opus_sciassess_"):
            write_lines(folder / f"{part}.test.jsonl", [question() for _ in range(count)])
            write_lines(folder / f"{part}.fewshot.jsonl", [question() | {"reasoning": phrase()} for _ in range(3)])
        else:
            write_lines(folder / f"{part}.val.jsonl", [
                {"prompt": phrase(), "answer": ["B"], "answer_type": "SC", "modality": "text-only"}
                for _ in range(count)])


def write(out: Path) -> Path:
    """All of it; the file is there when all is."""
    draw = random.Random(0)
    for name in ("words", "validation-words"):
        write_lines(out / "text" / name / "documents.jsonl",
                    [{"id": f"{name}-{n}", "text": " ".join(draw.choices(WORDS, k=40))} for n in range(400)])
    write_items(out / "items-words", draw)
    for part in (model(), tokenizer()):
        part.save_pretrained(place_of(QWEN3_CI.model, True, out))
    done = out / "items-words" / "done.json"
    done.touch()
    return done


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="gets all of it")
    print(f"wrote {write(parser.parse_args(arguments).out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
