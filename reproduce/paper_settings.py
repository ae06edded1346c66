"""Settings of the scales `small` and `paper`, each written once: models, pools of text, static scorers.

Where a number comes from: [paper], [code] the released code, [ours] decided here, as neither says.  All of the
first two are of arXiv:2602.05400.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from opus_bench.corpus_spec import CorpusSpec

from .counts import LARGE, SHAPES, XL, Shape
from .scales import Scale

SKETCH_WIDTH = 8192  # m [paper]
QWEN = next(shape for shape in SHAPES if shape.name == "Qwen3-8B")
MILLION, BILLION = 10**6, 10**9


@dataclass(frozen=True)
class Setting:
    """A model and how it is trained.  Rates are peaks, lengths tokens; N, M, K, W and L are those of ``shape``."""

    model: str  # size in model.SIZES, or a hub id whose weights training starts from
    preset: str  # the name of its settings in the training command
    title: str  # as in reported.csv
    shape: Shape
    update_tokens: int
    adam_lr: float
    muon_lr: float
    validation_length: int  # of losses by domain; those along the run are on the training length
    betas: tuple[float, float] = (0.8, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup: float = 0.0  # share of the steps
    cooldown: float = 0.4  # share of the steps; the schedule of the GPT-2 runs is not published [ours]
    precision: str = "bfloat16"  # of matrix products; weights, gradients and optimizer state are float32
    gpus: int = 8  # [paper] for Qwen3-8B, [ours] for GPT-2
    tokenizer: str = "gpt2"
    suites: tuple[str, ...] = ("paper", "ood")  # of `opus-bench evaluate`
    evaluations: int = 30  # points of the validation curve [ours]
    evaluate_every: int | None = None  # update tokens between models that are kept and evaluated; None: the last alone
    deviations: tuple[str, ...] = ()
    made_here: bool = False  # model, tokenizer, text and items are of reproduce.stand_ins
    base: Setting | None = None  # of the training on `GENERAL` that makes the model here; None: nothing comes before

    @property
    def from_hub(self) -> bool:
        """Whether training starts from published weights."""
        return "/" in self.model

    def scale(self, name: str) -> Scale:
        """What the rows of a comparison are made from, as for ci and smoke.  The corpus of these is not used."""
        s = self.shape
        return Scale(name, CorpusSpec.ci(), dict(length=s.length, buffer=s.candidates, proxy_size=s.proxies),
                     s.window, SKETCH_WIDTH, 0, 1, "")


COMMON = (
    "the learning-rate schedule is not published: constant, then linear to 0 over the last 40 % of the steps",
    "attention is full and causal; whether the paper's is windowed is not known",
)
PRECISION = "BF16 products on FP32 weights, embedding included; the paper has FP32 modules and a BF16 embedding"
VALIDATION = "validation sequences along the run of the training length instead of {} tokens"
GPT2_LARGE = Setting("gpt2-large", "gpt2-large", "GPT-2 Large", LARGE, 30 * BILLION,
                     0.004, 0.015, 32_768,  # rates [code]
                     deviations=(*COMMON, PRECISION, VALIDATION.format("32,768"),
                                 "buffer under AdamW 64, as Table 8's under Muon; that under AdamW is not known"))
GPT2_XL = Setting("gpt2-xl", "gpt2-xl", "GPT-2 XL", XL, 30 * BILLION, 2e-3, 1e-2, 8_192,  # rates [paper]
                  deviations=(*COMMON, PRECISION, VALIDATION.format("8,192")))
QWEN3_8B = Setting(
    "Qwen/Qwen3-8B-Base", "qwen3-8b", "Qwen3-8B-Base", QWEN, 3 * BILLION // 2, 1e-6, 1e-5, 4_096, betas=(0.9, 0.95),
    weight_decay=0.01, warmup=0.01, cooldown=0.0, tokenizer="Qwen/Qwen3-8B-Base", suites=("cpt",),
    evaluate_every=BILLION // 2,
    deviations=("the buffer and the proxy batch are read as those of all GPUs together, which the paper does not say",
                "proxy by BENCH-PROXY from items of SciQ and of MMLU's STEM tasks; the paper does not say from which",
                "the rate after warm-up is constant; the paper's decay is not known",
                "eps 1e-8 and clip 1.0, as for GPT-2; the paper's are not known",
                "BF16 products on FP32 weights and optimizer state"))
# 0.6 B of Qwen3, whose heads together are wider than it [its config.json]; --dry-run counts its hours
QWEN3_SMALL = replace(
    QWEN3_8B, model="Qwen/Qwen3-0.6B-Base", preset="Qwen/Qwen3-0.6B-Base", tokenizer="Qwen/Qwen3-0.6B-Base",
    title="Qwen3-0.6B-Base",
    shape=replace(QWEN, name="Qwen3-0.6B", source="small scale", layers=28, width=1024, feed_forward=3072,
                  query_width=2048, tied=True),
    update_tokens=90 * MILLION, evaluate_every=30 * MILLION, gpus=1,
    deviations=("Qwen3-0.6B-Base on 90 million tokens instead of Qwen3-8B-Base on 1.5 billion", *QWEN3_8B.deviations))
QWEN3_CI = replace(
    QWEN3_8B, model="qwen3-ci", preset="qwen3-ci", tokenizer="qwen3-ci", title="Qwen3 of two layers",
    shape=Shape("Qwen3", "ci scale", layers=2, width=16, vocabulary=300, length=32, candidates=4, proxies=4, selected=2,
                window=16, feed_forward=24, kv_width=8, gated=True, tied=False),
    update_tokens=256, evaluate_every=128, evaluations=2, adam_lr=1e-3, muon_lr=1e-2, precision="float32", gpus=1,
    made_here=True, deviations=("a few steps of a toy model on words in a random order",))
# a model of 0.58 M parameters that is first trained here, then goes on; rates of the second a quarter of the first
QWEN3_SMOKE_BASE = replace(
    QWEN3_CI, model="qwen3-smoke-untrained", preset="qwen3-smoke-untrained", tokenizer="qwen3-smoke",
    title="Qwen3 of four layers",
    shape=Shape("Qwen3", "smoke scale", layers=4, width=96, vocabulary=2048, length=192, candidates=8, proxies=8,
                selected=8, window=48, feed_forward=256, kv_width=24, gated=True),
    update_tokens=400 * 8 * 192, evaluate_every=None, evaluations=6, adam_lr=4e-3, muon_lr=2e-2, weight_decay=0.0,
    deviations=())
QWEN3_SMOKE = replace(
    QWEN3_SMOKE_BASE, model="qwen3-smoke", preset="qwen3-smoke", base=QWEN3_SMOKE_BASE,
    shape=replace(QWEN3_SMOKE_BASE.shape, candidates=16), update_tokens=150 * 8 * 192, evaluate_every=50 * 8 * 192,
    evaluations=6, adam_lr=1e-3, muon_lr=5e-3, weight_decay=0.01, suites=("offline",),
    deviations=(
        "a Qwen3 of 0.58 M parameters, trained here on 0.6 million tokens of general text, instead of Qwen3-8B-Base",
        "openings of encyclopedia articles on the sciences, and documentation of mathematics software, instead of "
        "SciencePedia; 0.23 million tokens instead of 1.5 billion",
        "proxy drawn from held-out openings instead of BENCH-PROXY retrieval",
        "items made of held-out openings instead of OlympicArena and SciAssess"))
# the 124 M model on one GPU: about 20 tokens a parameter, windows of an eighth of a sequence, rates of GPT-2 Large
GPT2 = Setting(
    "gpt2", "gpt2", "GPT-2 (124M)", Shape("GPT-2", "small scale", 12, 768, 50304, 2048, 64, 8, 32, 256),
    5 * BILLION // 2, 0.004, 0.015, 2_048, gpus=1,
    deviations=("GPT-2 of 124 M parameters on 2.5 billion tokens instead of Large and XL on 30 billion",
                "sequences of 2,048 tokens, score window 256", PRECISION, *COMMON))


@dataclass(frozen=True)
class Pool:
    """Text that candidates come from, and the name of its folder of token shards."""

    name: str
    source: str  # key of REPOSITORIES, or text that the user brings
    subset: str | None  # of the repository
    tokens: int  # goal
    buckets: tuple[int, ...] = ()  # of FineWeb-Edu's int_score; none: all
    static: str | None = None  # scorer whose best documents these are
    whole: str | None = None  # name of the pool that they are the best of

    @property
    def origin(self) -> str:
        """Name of the pool as it was before a static scorer chose from it."""
        return self.whole or self.name


REPOSITORIES = {"fineweb": "HuggingFaceFW/fineweb", "fineweb-edu": "HuggingFaceFW/fineweb-edu"}
FINEWEB = Pool("fineweb", "fineweb", "sample-100BT", 100 * BILLION)
EDU_3 = Pool("fineweb-edu-3", "fineweb-edu", "default", 60 * BILLION, (3,))
EDU_4_5 = Pool("fineweb-edu-4-5", "fineweb-edu", "default", 60 * BILLION, (4, 5))
EDU = Pool("fineweb-edu-3-5", "fineweb-edu", "default", 60 * BILLION, (3, 4, 5))
SCIENCEPEDIA = Pool("sciencepedia", "sciencepedia", None, 3 * BILLION)  # 3B [paper]
POOLS = {pool.name: pool for pool in (FINEWEB, EDU_3, EDU_4_5, EDU, SCIENCEPEDIA)}
SMALL_POOLS = {"fineweb": replace(FINEWEB, subset="sample-10BT", tokens=10 * BILLION),
               **{pool.name: replace(pool, tokens=5 * BILLION) for pool in (EDU_3, EDU_4_5, EDU)},
               "sciencepedia": replace(SCIENCEPEDIA, tokens=200 * MILLION)}
CI_POOLS = {SCIENCEPEDIA.name: Pool("words", "words", None, 4_000)}  # of reproduce.stand_ins, as the next two
SMOKE_POOLS = {SCIENCEPEDIA.name: Pool("science", "science", None, MILLION)}
GENERAL = Pool("general", "general", None, 3 * MILLION)  # what a model made here is trained on before
POOLS_OF = {"ci": CI_POOLS, "smoke": SMOKE_POOLS, "small": SMALL_POOLS, "paper": POOLS}  # by scale
PROXY_TOKENS = 30_000_000  # [paper]


@dataclass(frozen=True)
class Scorer:
    """A static scorer of `opus-bench score`; the paper does not say which share of the pool it keeps."""

    name: str
    row: str  # in reported.csv
    repository: str | None  # on the hub; None: fitted here
    parameters: int | None  # that multiply each token it reads; None: a bag of hashed words, negligible FLOPs


SCORERS = (
    Scorer("qurating", "QuRating", "princeton-nlp/QuRater-1.3B", 1_300_000_000),
    Scorer("dsir", "DSIR", None, None),
    Scorer("dclm", "DCLM-FastText", "mlfoundations/fasttext-oh-eli5", None),
    Scorer("fineweb-edu", "FineWeb-Edu", "HuggingFaceFW/fineweb-edu-classifier", 109_000_000),
    Scorer("ultra-fineweb", "UltraFineweb", "openbmb/Ultra-FineWeb-classifier", None),
)
# Arctic-Embed-L v2: 568 M parameters, 303 M of them outside the embedding [its model card]
ENCODER = Scorer("arctic", "BENCH-PROXY", "Snowflake/snowflake-arctic-embed-l-v2.0", 303_000_000)


def static_pool(pool: Pool, scorer: Scorer, tokens: int) -> Pool:
    """The best documents of a pool by a scorer, up to a number of tokens."""
    return replace(pool, name=f"{pool.name}-by-{scorer.name}", tokens=tokens, static=scorer.name, whole=pool.name)
