"""Scales: what a script means by ``--scale``.  The only dial that a script has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from opus_bench.corpus_spec import CorpusSpec


@dataclass(frozen=True)
class Scale:
    """Sizes shared by all runs of a scale."""

    name: str
    corpus: CorpusSpec
    run: dict[str, Any]  # fields of train.RunConfig
    window: int  # tokens scored per sequence by online selectors
    sketch_width: int  # buckets per weight
    suite_size: int  # items per offline task
    seeds: int
    note: str  # printed wherever results are
    deviations: tuple[str, ...] = field(default=())



def _deviations(model: str, rate: str, tokens: str) -> tuple[str, ...]:
    """Those of a scale that trains the paper's architecture, smaller, on the offline corpus."""
    return (
        f"model of {model} instead of GPT-2 XL",
        f"constant learning rate{rate}, so that every point of a loss curve can be compared with every other",
        "corpus of encyclopedia, dictionary, recipes, documentation, code, catalogues, foreign and "
        "corrupted text from pinned packages instead of FineWeb, sequences of one domain each",
        "proxy drawn from held-out encyclopedia text instead of BENCH-PROXY retrieval",
        f"sequences of {tokens} instead of 6,144, 32 and 512",
        "initial embedding of standard deviation .5",
        "an offline suite instead of the paper's ten tasks",
        "FP32 embedding instead of BF16",
    )


SMOKE_DEVIATIONS = _deviations("0.64 M parameters (4 layers, width 96, vocabulary 2,048)", " of .02",
                               "192 tokens, buffer 16, score window 40")

SCALES = {
    "ci": Scale(
        name="ci",
        corpus=CorpusSpec.ci(),
        run=dict(model="ci", steps=24, length=64, buffer=8, proxy_size=4, evaluations=2,
                 validation_sequences=8, checkpoint_every=2),
        window=32,
        sketch_width=512,
        suite_size=20,
        seeds=1,
        note="ci scale: exercises the code; its numbers mean nothing.",
        deviations=("a few steps of a toy model",),
    ),
    "smoke": Scale(
        name="smoke",
        corpus=CorpusSpec(vocab_size=2048),
        run=dict(model="tiny", embedding_std=0.5, adam_lr=0.02, muon_lr=0.02, cooldown=0.0, steps=280,
                 length=192, buffer=16, proxy_size=8, evaluations=14, validation_sequences=64,
                 checkpoint_every=20),
        window=40,
        sketch_width=8192,
        suite_size=200,
        seeds=3,
        note="smoke scale: checks the pipeline; it is not evidence for or against the paper.",
        deviations=SMOKE_DEVIATIONS,
    ),
    "cpu": Scale(
        name="cpu",
        corpus=CorpusSpec(),
        run=dict(model="mini", embedding_std=0.5, adam_lr=0.02, muon_lr=0.02, cooldown=0.0, steps=320,
                 length=256, buffer=16, proxy_size=8, evaluations=16, validation_sequences=64,
                 checkpoint_every=20),
        window=64,
        sketch_width=8192,
        suite_size=200,
        seeds=5,
        note="cpu scale: some hours on two cores, a small model; it says what this code does at this size, not "
             "what the paper's model would.",
        deviations=_deviations("1.7 M parameters (6 layers, width 128, vocabulary 4,096)", " of .02",
                               "256 tokens, buffer 16, score window 64"),
    ),
}
