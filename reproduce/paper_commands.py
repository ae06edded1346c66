"""The commands of the scales `small` and `paper`: the one place that knows names and flags of other programs.

Every function returns a command as a list of words; `shlex.join` prints it.  Folders below ``data``:

    text/NAME            files of documents
    scores/NAME          chosen.jsonl of `opus-bench proxy` and `opus-bench score`
    pools/NAME           token shards of `opus-bench data`, with manifest.json
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opus_bench.selector import Opus

from .paper_settings import ENCODER, REPOSITORIES, Pool

PRETRAIN = "reproduce.pretrain"  # run by torchrun; leaves a record in <--results>/runs and the model in --save
PRETRAIN_OPTIONS = "reproduce.pretrain_plan"  # whose parser(description) has its options
SCORED_TOKENS = 16_384  # of candidates in one scoring pass of a process: bounds its activations and logits
SCORE = "baselines.score"
MODEL = "model"  # save_pretrained's folder; model-STEP for those before the end
FLAGS = ("optimizer", "seed", "steps", "length", "buffer", "selection_ratio", "proxy_size", "adam_lr", "muon_lr",
         "weight_decay", "clip", "warmup", "cooldown", "precision", "validation_every")  # of PRETRAIN, one a number
PLACES = ("data", "proxy", "validation", "results", "save")
OTHER_FLAGS = ("model", "method", "window", "sketch_width", "selector_options", "save_every")
BENCH = [sys.executable, "-m", "opus_bench.cli"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ITEM_TASKS = ("mmlu", "anli", "hellaswag", "piqa", "social_iqa", "winogrande", "arc_easy", "arc_challenge",
              "commonsense_qa", "wsc")  # of lm-eval, whose items BENCH-PROXY looks for
CPT_TASKS = ("sciq", "mmlu_stem")  # of Qwen3's proxy: the benchmarks of the paper have no split to spare [ours]
DOMAIN_TEXTS = Path("text", "domains")  # below data: DOMAIN.jsonl
VALIDATION_DUMP = "CC-MAIN-2024-10"  # held-out text; under 1 % of it can be in a sample of 100 of 15,000 billion tokens
VALIDATION_TOKENS = 10_000_000


@dataclass(frozen=True)
class Step:
    """A command that prepares data: done when ``made`` exists."""

    what: str
    command: list[str]
    made: Path
    marks: bool = False  # ``made`` is an empty file written after the command, which leaves nothing that says so itself

    def __str__(self) -> str:
        return shown(self.command)


def shown(command: list[str]) -> str:
    """The command as a shell would take it in this folder, the names of programs left short."""
    text = shlex.join(command).replace(shlex.join(TORCHRUN), "torchrun").replace(shlex.join(BENCH), "opus-bench")
    return text.replace(sys.executable, "python").replace(f"{Path.cwd()}/", "")


def download(repository: str, folder: str, place: Path) -> Step:
    """A folder of a data set's repository, through the hub's own client, which resumes.

    Interrupted, it leaves the files that it has in that folder, so the folder does not say that all are there.
    """
    command = ["hf", "download", repository, "--repo-type", "dataset", "--include", f"{folder}/*",
               "--local-dir", str(place)]
    return Step(f"text of {repository}, {folder}", command, place / f"{folder.replace('/', '-')}.whole", marks=True)


def fetch(pool: Pool, data: Path) -> Step:
    """The documents of a pool of the hub: a sample as it is, or those of some scores."""
    repository, out = REPOSITORIES[pool.source], text_of(pool, data)
    if not pool.buckets:
        return download(repository, sample_folder(pool), data / "text" / pool.name)
    command = [sys.executable, "-m", "reproduce.paper_text", "--repository", repository, "--subset", str(pool.subset),
               "--scores", *map(str, pool.buckets), "--tokens", str(pool.tokens), "--out", str(out)]
    return Step(f"documents of {repository} of score {', '.join(map(str, pool.buckets))}", command, out / "done.json")


def shards(source: str, place: Path | None, out: Path, tokens: int, tokenizer: str, subset: str | None = None) -> Step:
    """Documents to token shards."""
    command = [*BENCH, "data", "--source", source if place is None else f"{source}={place}", "--out", str(out),
               "--tokens", str(tokens), "--tokenizer", tokenizer]
    if subset is not None and place is None:
        command += ["--subset", subset]
    return Step(f"{tokens:,} tokens of {source}", command, out / "manifest.json")


def stand_ins(kind: str, data: Path) -> Step:
    """Model, text and items of the scales ci (words) and smoke (science)."""
    command = [sys.executable, "-m", "reproduce.stand_ins", "--kind", kind, "--out", str(data)]
    return Step("a model, text and items that stand for the real ones", command, items_of(kind, data) / "done.json")


def items_of(kind: str, data: Path) -> Path:
    """The folder of the items that are made here."""
    return data / f"items-{kind}"


def place_of(name: str, made_here: bool, data: Path) -> str:
    """A model or tokenizer as commands take it: by name, or the folder of one that is made here."""
    return str(data / "models" / name) if made_here else name


def proxy(kind: str, text: Path, out: Path, tokens: int, tokenizer: str, tasks: tuple[str, ...]) -> Step:
    """The documents most like benchmark items (bench), or a uniform sample (standard)."""
    command = [*BENCH, "proxy", "--pool", str(text), "--kind", kind, "--tokens", str(tokens),
               "--tokenizer", tokenizer, "--out", str(out)]
    if kind == "bench":
        command += ["--tasks", *tasks, "--encoder", ENCODER.name]
    return Step(f"{kind} proxy of {tokens:,} tokens", command, out / "chosen.jsonl")


def score(scorer: str, text: Path, tokens: int, out: Path, target: Path) -> Step:
    """The best documents by a static scorer; dsir is fitted to the proxy's documents."""
    command = [sys.executable, "-m", SCORE, "--pool", str(text), "--scorer", scorer, "--tokens", str(tokens),
               "--out", str(out)]
    if scorer == "dsir":
        command += ["--target", str(target)]
    return Step(f"{tokens:,} tokens by {scorer}", command, out / "chosen.jsonl")


def text_of(pool: Pool, data: Path) -> Path:
    """The folder of a pool's documents before a static scorer chooses from them."""
    folder = data / "text" / pool.origin
    return folder / sample_folder(pool) if pool.source in REPOSITORIES and not pool.buckets else folder


def sample_folder(pool: Pool) -> str:
    """The folder of a sample in its repository: sample-100BT is sample/100BT."""
    assert pool.subset is not None
    return pool.subset.replace("sample-", "sample/")


def pretrain(preset: str, fields: dict[str, Any], selector: str, options: dict[str, Any], places: dict[str, Path],
             gpus: int) -> list[str]:
    """A training run.

    Args:
        preset: the entry's name of the model, from which it has what has no flag.
        fields: numbers by FLAGS, and save_every where models are kept on the way.
        selector, options: as in the records.
        places: folders by PLACES.
    """
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", str(gpus), "-m", PRETRAIN, "--model", preset]
    command += ["--method", method_of(selector, options)]
    rest = {name: value for name, value in options.items() if name not in ("arm", "keep", "window")}
    sketched = options.get("arm") in ("paper", "released")
    if sketched:
        command += ["--sketch-width", str(rest.pop("sketch_width"))]
    elif rest.get("estimator") != "sketch":
        rest.pop("sketch_width", None)  # of no use to an exact estimator
    command += ["--window", str(fields["proxy_length"])]  # of candidates too
    if selector != "random" and not at_once(selector, options):
        command += ["--score-microbatch", str(max(1, SCORED_TOKENS // fields["proxy_length"]))]
    if rest:
        command += ["--selector-options", json.dumps(rest)]
    for name in (*FLAGS, "save_every"):
        if name in fields:
            value = fields[name]
            command += [flag(name), f"{value:g}" if isinstance(value, float) else str(value)]
    return command + [word for name, place in places.items() for word in (flag(name), str(place))]


def opus_of(selector: str, options: dict[str, Any]) -> Opus | None:
    """The OPUS that a record's selector and options name, with the defaults of its arm; None for another selector."""
    if selector != "opus":
        return None
    return Opus.arm(options["arm"], **{name: value for name, value in options.items() if name != "arm"})


def at_once(selector: str, options: dict[str, Any]) -> bool:
    """Whether a selector scores all candidates in one pass, whatever it takes: OPUS with an exact Gram and the like."""
    opus = opus_of(selector, options)
    return opus is not None and opus.needs_all_at_once


def flag(name: str) -> str:
    """The option of a field."""
    return f"--{name.replace('_', '-')}"


def method_of(selector: str, options: dict[str, Any]) -> str:
    """The entry's name of a selector: random, ppl-high, greats, opus-paper, ..."""
    if selector == "perplexity":
        return f"ppl-{options['keep']}"
    return f"opus-{options['arm']}" if selector == "opus" else selector


def domain_loss(model: Path, tokenizer: str, length: int, data: Path, out: Path) -> list[str]:
    """Loss by domain of a finished run's model, on the documents that the user brings for Table 6."""
    return [sys.executable, "-m", "reproduce.domain_loss", "--model", str(model), "--tokenizer", tokenizer,
            "--text", str(data / DOMAIN_TEXTS), "--length", str(length), "--out", str(out)]


def evaluate(suite: str, model: Path, tokenizer: str, out: Path, items: Path | None) -> list[str]:
    """A suite on a finished run's model; its record goes to the folder ``out``.  ``items``: None for the hub's."""
    command = [*BENCH, "evaluate", "--model", str(model), "--tokenizer", tokenizer, "--suite", suite]
    return command + (["--data", str(items)] if items is not None else []) + ["--output", str(out)]
