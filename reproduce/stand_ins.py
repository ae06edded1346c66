"""Stand-ins of what Figures 5 and 6 need without a hub, for their scales ci and smoke: model, text, items.

    python -m reproduce.stand_ins --kind words --out data      # ci
    python -m reproduce.stand_ins --kind science --out data    # smoke

words    Words in a random order, a Qwen3 of two layers with random weights, invented items of the suite `cpt`: numbers
         that are measured with them mean nothing.
science  Real text of the smoke scale's corpus.  Science: openings of encyclopedia articles on the sciences, with the
         documentation of mathematics software in the pool; held out are openings alone, one split for the proxy, two
         for losses and items.  General: openings of other articles, a dictionary, recipes.  Items: those of the
         offline suite, made from held-out openings.  The Qwen3 of four layers is untrained.

Folders below ``out``: text/NAME and text/validation-NAME, with science text/general and text/held-out-proxy-science;
models; items-NAME, which gets done.json at last.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config

from opus_bench.archives import fetch, members
from opus_bench.corpus import Corpus, build_corpus
from opus_bench.evaluation.paper_tasks import CPT_TASKS
from opus_bench.evaluation.suite import write_suite
from opus_bench.sources import END_OF_TEXT

from .counts import Shape
from .paper_commands import items_of, place_of
from .paper_settings import GENERAL, QWEN3_CI, QWEN3_SMOKE, QWEN3_SMOKE_BASE
from .scales import SCALES

CONTEXT = 2560  # tokens: the longest answer of the suite `cpt` and its question
WORDS = ("acid atom bond cell charge crystal decay energy enzyme field force gene heat ion light mass metal orbit "
         "phase proton salt spin star tissue virus wave").split()
SCIENCES = ("Biology and health sciences", "Mathematics", "Physical sciences")  # topics of the encyclopedia
ITEMS = 64  # a task


def model(shape: Shape, seed: int = 0) -> torch.nn.Module:
    """A Qwen3 with random weights and one head of keys and values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(Qwen3Config(
            vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.inner,
            num_hidden_layers=shape.layers, num_attention_heads=shape.queries // shape.keys, num_key_value_heads=1,
            head_dim=shape.keys, max_position_embeddings=CONTEXT, tie_word_embeddings=shape.tied, bos_token_id=0,
            eos_token_id=0))


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_text(out: Path, name: str, texts: Sequence[str]) -> None:
    """A folder of documents."""
    write_lines(out / "text" / name / "documents.jsonl",
                [{"id": f"{name}-{n}", "text": text} for n, text in enumerate(texts)])


# Words --------------------------------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator([" ".join(WORDS)] * 3, trainers.BpeTrainer(
        vocab_size=QWEN3_CI.shape.vocabulary, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END_OF_TEXT)


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


def write_words(out: Path) -> None:
    """Every second token ends an answer: an untrained model would go on to its longest."""
    draw = random.Random(0)
    for name in ("words", "validation-words"):
        write_text(out, name, [" ".join(draw.choices(WORDS, k=40)) for _ in range(400)])
    write_items(items_of("words", out), draw)
    made = model(QWEN3_CI.shape)
    made.generation_config = GenerationConfig(eos_token_id=list(range(0, QWEN3_CI.shape.vocabulary, 2)), pad_token_id=0)
    for part in (made, tokenizer()):
        part.save_pretrained(place_of(QWEN3_CI.model, True, out))


# Science ------------------------------------------------------------------------------------------------


def topics() -> dict[str, str]:
    """Title of an article of the encyclopedia -> its topic."""
    found = members(fetch("wiki"), lambda name: name.endswith("/summaries_en-us.json"))
    return {title: article["topic"] for _, content in found for title, article in json.loads(content).items()}


def science_texts(corpus: Corpus, topic: dict[str, str]) -> dict[str, list[str]]:
    """Name of a folder of text -> its documents; no document of one split is near one of another."""
    def openings(*splits: str, sciences: bool = True) -> list[str]:
        return [record["text"] for split in splits for record in corpus.records(split, "encyclopedia")
                if (topic[record["source"].partition("#")[2]] in SCIENCES) == sciences]

    return {
        "science": openings("train") + corpus.documents("train", "mathematics"),
        "held-out-proxy-science": openings("proxy"),
        "validation-science": openings("validation", "evaluation"),
        GENERAL.name: (openings("train", sciences=False) + corpus.documents("train", "dictionary")
                       + corpus.documents("train", "recipes")),
    }


def write_science(out: Path) -> None:
    corpus = build_corpus(SCALES["smoke"].corpus)
    texts = science_texts(corpus, topics())
    for name, documents in texts.items():
        write_text(out, name, documents)
    write_suite(items_of("science", out), texts["validation-science"], texts["science"], {}, ITEMS)
    corpus.tokenizer().save_pretrained(place_of(QWEN3_SMOKE.tokenizer, True, out))
    model(QWEN3_SMOKE_BASE.shape).save_pretrained(place_of(QWEN3_SMOKE_BASE.model, True, out))


KINDS = {"words": write_words, "science": write_science}


def write(kind: str, out: Path) -> Path:
    """All of it; the file is there when all is."""
    KINDS[kind](out)
    done = items_of(kind, out) / "done.json"
    done.touch()
    return done


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=tuple(KINDS), required=True, help="said above")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="gets all of it")
    options = parser.parse_args(arguments)
    print(f"wrote {write(options.kind, options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
