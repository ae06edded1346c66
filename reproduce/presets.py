"""The settings of the paper's own training runs, by model: all in one place, and what had to be decided beside them.

[P] arXiv:2602.05400 v2; [C] the authors' released code; the rest is said in ``decided``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from opus_bench.distributed.pretrain import PretrainConfig
from opus_bench.model import SIZES

WINDOW = 512  # tokens scored per sequence [P]
SKETCH_WIDTH = 8192  # buckets per weight [P]
VOCABULARY = 50_304  # GPT-2's 50,257 padded [C]
CHECKPOINTS = 25  # of a long run


@dataclass(frozen=True)
class Preset:
    """A training setting of the paper."""

    model: str  # a size of model.SIZES, made anew, or a folder or hub id
    item: str  # the paper's table
    config: PretrainConfig
    tokens: int  # trained on in all; the steps of ``config`` follow
    processes: int | None  # GPUs [P]; None: not said
    decided: tuple[str, ...]  # what the paper leaves out, and what stands here


def steps_for(tokens: float, sequences: int, length: int) -> int:
    """Updates that train on at least so many tokens."""
    return math.ceil(tokens / (sequences * length))


def checkpoint_every(steps: int) -> int:
    """Steps between checkpoints: PretrainConfig's 500, and for more than 12,500 steps a 25th of them.

    At the paper's sizes that is one in 0.3 to 1.4 hours of eight GPUs.  Every 500 steps the 131 GB of Qwen3-8B's would
    be written 92 times.
    """
    return max(PretrainConfig.checkpoint_every, math.ceil(steps / CHECKPOINTS))


SCHEDULE = ("learning-rate schedule not published: constant, then linear to 0 in the last 40 % of the steps",)
BUFFER = ("buffer and proxy batch read as those of all processes together, which the paper does not say",)
PRECISION = ("bfloat16 products (autocast) on float32 weights, embedding included; the paper: FP32 modules, BF16 "
             "embedding",)

PRESETS = {
    "gpt2-large": Preset(
        model="gpt2-large",
        item="Table 3",
        config=PretrainConfig(
            steps=steps_for(30e9, 32, 24_576),
            length=24_576,  # [P]
            buffer=64,  # [P] Table 8's b=64
            selection_ratio=0.5,  # [P]
            proxy_size=8,  # [P] refreshed every step
            proxy_length=WINDOW,
            optimizer="adamw",
            adam_lr=0.004, muon_lr=0.015,  # [C]
            betas=(0.8, 0.95), eps=1e-8, weight_decay=0.0, clip=1.0,  # [P]
            warmup=0.0, cooldown=0.4,
            precision="bfloat16",
            validation_every=500,
            checkpointing=True, microbatch=1,
        ),
        tokens=30_000_000_000,  # [P]
        processes=None,
        decided=(*SCHEDULE, *BUFFER, *PRECISION,
                 "buffer of GPT-2 Large under AdamW not published: 64, that of Table 8 under Muon",
                 "validation sequences of the training length instead of 32,768 tokens"),
    ),
    "gpt2-xl": Preset(
        model="gpt2-xl",
        item="Table 3",
        config=PretrainConfig(
            steps=steps_for(30e9, 16, 6_144),
            length=6_144,  # [P]
            buffer=32,  # [P] text
            selection_ratio=0.5,  # [P]
            proxy_size=8,  # [P]
            proxy_length=WINDOW,
            optimizer="adamw",
            adam_lr=2e-3, muon_lr=1e-2,  # [P]
            betas=(0.8, 0.95), eps=1e-8, weight_decay=0.0, clip=1.0,  # [P]
            warmup=0.0, cooldown=0.4,
            precision="bfloat16",
            validation_every=2_000,
            checkpointing=True, microbatch=1,
        ),
        tokens=30_000_000_000,  # [P]
        processes=None,
        decided=(*SCHEDULE, *BUFFER, *PRECISION, "validation sequences of the training length instead of 8,192 tokens"),
    ),
    "qwen3-8b": Preset(
        model="Qwen/Qwen3-8B-Base",
        item="continued pre-training on SciencePedia",
        config=PretrainConfig(
            steps=steps_for(1.5e9, 8, 4_096),
            length=4_096,  # [P]
            buffer=16,  # [P]
            selection_ratio=0.5,  # [P]
            proxy_size=8,  # [P]
            proxy_length=WINDOW,
            optimizer="muon",
            adam_lr=1e-6, muon_lr=1e-5,  # [P]
            betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01, clip=1.0,  # betas, weight decay [P]
            warmup=0.01, cooldown=0.0,  # warm-up [P]
            selection="global",  # [P]
            precision="bfloat16",  # [P]
            validation_every=steps_for(0.5e9, 8, 4_096),  # [P] every .5B tokens
            checkpointing=True, microbatch=1,
        ),
        tokens=1_500_000_000,  # [P]
        processes=8,  # [P]
        decided=(*BUFFER, "schedule after the warm-up not published: constant",
                 "gradient clipping not published: norm 1",
                 "Adam's eps not published: 1e-8", "bfloat16 products (autocast) on float32 weights and state"),
    ),
}


def preset_of(model: str) -> Preset:
    """The settings of a model by what --model says: its own, or those of GPT-2 Large or of Qwen3."""
    return PRESETS[model if model in PRESETS else "gpt2-large" if model in SIZES else "qwen3-8b"]


@dataclass(frozen=True)
class Method:
    """A row: how candidates are chosen."""

    name: str  # in records
    row: str | None  # the paper's name of it
    arm: str | None
    selector: str  # in baselines.build_selector
    options: dict
    proxy_size: int | None = None  # sequences, where not the preset's
    deviations: tuple[str, ...] = ()


METHODS = {
    "random": Method("Random", "Random", None, "random", {}),
    "ppl-high": Method("PPL (high)", "PPL", None, "perplexity", {"keep": "high", "window": WINDOW},
                       deviations=("loss of the score window instead of the whole sequence",)),
    "ppl-mid": Method("PPL (mid)", None, None, "perplexity", {"keep": "mid", "window": WINDOW}),
    "ppl-low": Method("PPL (low)", None, None, "perplexity", {"keep": "low", "window": WINDOW}),
    "greats": Method("GREATS", "GREATS", None, "greats", {"window": WINDOW},
                     deviations=("greedy choice on the proxy batch and the score window of OPUS instead of validation "
                                 "data of its own",)),
    "opus-paper": Method("OPUS", "OPUS", "paper", "opus", {"arm": "paper", "window": WINDOW,
                                                           "sketch_width": SKETCH_WIDTH}),
    "opus-released": Method("OPUS", "OPUS", "released", "opus",
                            {"arm": "released", "window": WINDOW, "sketch_width": SKETCH_WIDTH},
                            deviations=("selects every optimizer step; the released code once per rho N steps",)),
    "opus-calibrated": Method("OPUS", "OPUS", "calibrated", "opus", {"arm": "calibrated", "window": WINDOW}, 32,
                              ("proxy four times as large, drawn every 8 steps instead of every step; all weights "
                               "scored",)),
}
