"""What runs of the scales `small` and `paper` take: FLOPs, GPU hours, disk, downloads, memory; by formula.

Nothing is measured here: every number is printed with its formula and the numbers put in, and what is assumed is
called an assumption.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from opus_bench.pools.command import size_text as size

from . import counts
from .counts import Shape
from .paper_commands import SCORED_TOKENS, VALIDATION_TOKENS, at_once, opus_of
from .paper_scale import PaperRun, whole_pools
from .paper_settings import ENCODER, PROXY_TOKENS, REPOSITORIES, SCORERS
from .presets import preset_of

H100 = {"float32": 66.9e12, "bfloat16": 989.4e12}
"""Peak of an H100 SXM for dense products, FLOP/s, FP32 without tensor cores and BF16 [NVIDIA's data sheet]."""
TF32 = 494.7e12  # of the same, in FP32 products rounded to TF32, which nothing here switches on
UTILISATION = 0.4  # share of the peak at which all counted FLOPs are done, recomputation too: an assumption
SAMPLE_BYTES = {"sample-10BT": 27.6e9, "sample-100BT": 277.4e9}  # of FineWeb's files [its data set card]
BYTES_PER_TOKEN = 2.774  # of parquet files, 277.4 GB for about 100e9 GPT-2 tokens [FineWeb's data set card]
CHARACTERS_PER_TOKEN = 4.65  # of English prose under GPT-2's tokenizer, measured on 5.0 M characters of encyclopedia
CHECKPOINTS_KEPT = 3  # the last, the one before, and the one being written


@dataclass(frozen=True)
class Rates:
    """How fast a GPU works."""

    peak: float | None  # FLOP/s of BF16 products; None: of H100
    utilisation: float
    gpus: int

    def __post_init__(self) -> None:
        if self.peak is not None and self.peak <= 0:
            raise ValueError(f"--peak-tflops must be positive, got {self.peak / 1e12:g}")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"--utilisation must be in (0, 1], got {self.utilisation:g}")
        if self.gpus < 1:
            raise ValueError(f"--gpus must be at least 1, got {self.gpus}")

    def peak_of(self, precision: str) -> float:
        """FLOP/s; FP32 in the proportion that it has on H100."""
        return (self.peak or H100["bfloat16"]) * H100[precision] / H100["bfloat16"]

    def seconds(self, flops: float, precision: str) -> float:
        """GPU seconds: FLOPs over peak times utilisation."""
        return flops / (self.peak_of(precision) * self.utilisation)


def shape_of(run: PaperRun) -> Shape:
    """The setting's shape with the run's own buffer, choice, proxies and window."""
    f, window = run.fields, run.line.options.get("window", run.setting.shape.window)
    return replace(run.setting.shape, candidates=f["buffer"], selected=run.selected_size, proxies=f["proxy_size"],
                   window=window)


def training_flops(run: PaperRun) -> float:
    """Of all steps, attention by its causal half."""
    return run.fields["steps"] * counts.training_flops(shape_of(run), causal=True)


def selection_flops(run: PaperRun) -> float:
    """Of choosing in all steps, attention by its causal half."""
    return run.fields["steps"] * counts.scoring_flops(shape_of(run), run.line.selector, run.line.options, run.optimizer,
                                                      causal=True)


def float32_flops(run: PaperRun) -> float:
    """Of ``selection_flops``, what is multiplied in float32: P_t of Muon as it is made, and applied to one gradient.

    Forwards and backwards run under autocast, and what is formed of their factors is multiplied in bfloat16, the
    scoring_dtype of OPUS and GREATS: contractions, sketches, Gram, and P_t applied to candidates.
    """
    opus = opus_of(run.line.selector, run.line.options)
    if opus is None or run.optimizer != "muon" or opus.preconditioner != "frozen":
        return 0
    to_one = opus.estimator != "sketch" and opus.redundancy == 0
    return run.fields["steps"] * counts.muon_flops(run.setting.shape, None if to_one else 0)


def scored_weights(run: PaperRun) -> int:
    """Weights that GREATS and OPUS score: the blocks' matrices, or all, the head's too."""
    shape, opus = run.setting.shape, opus_of(run.line.selector, run.line.options)
    if run.line.selector not in ("opus", "greats"):
        return 0
    head = opus is not None and opus.layers != "blocks"
    return shape.block_parameters + (shape.head_parameters if head else 0)


def recomputation_flops(run: PaperRun) -> tuple[float, float]:
    """What checkpointed activations cost in training and in scoring: the blocks' forward again in every backward."""
    shape, steps = shape_of(run), run.fields["steps"]
    if not preset_of(run.setting.preset).config.checkpointing:
        return 0, 0
    training = counts.recomputed_flops(shape, shape.selected, shape.length, causal=True)
    if run.line.selector not in ("opus", "greats"):
        return steps * training, 0
    window, opus = min(shape.window, shape.length), opus_of(run.line.selector, run.line.options)
    every = run.line.options.get("proxy_every", 1) if opus is None else opus.proxy_every
    scoring = counts.recomputed_flops(shape, shape.proxies, window, causal=True) / every
    if opus is None or opus.estimator != "forward":
        scoring += counts.recomputed_flops(shape, shape.candidates, window, causal=True, observed=True)
    return steps * training, steps * scoring


def optimizer_flops(run: PaperRun) -> float:
    """Newton-Schulz of Muon in all steps."""
    return run.fields["steps"] * counts.muon_step_flops(run.setting.shape) if run.optimizer == "muon" else 0


def work(run: PaperRun) -> dict[tuple[str, str], float]:
    """(what, precision of its products) -> FLOPs of all GPUs; each counted once, as it is divided over them."""
    precision, wide, again = run.setting.precision, float32_flops(run), recomputation_flops(run)
    return {("training", precision): training_flops(run),
            ("training, recomputation of checkpointed activations", precision): again[0],
            ("training, optimizers' own work (Newton-Schulz of Muon)", "bfloat16"): optimizer_flops(run),
            ("selection, under autocast", precision): selection_flops(run) - wide,
            ("selection, recomputation of checkpointed activations", precision): again[1],
            ("selection, in float32 outside autocast", "float32"): wide}


def selection_share(run: PaperRun, rates: Rates) -> float:
    """Time of selection over that of training, by FLOPs and peaks."""
    spent = {"training": 0.0, "selection": 0.0}
    for (name, precision), flops in work(run).items():
        spent[name.partition(",")[0]] += rates.seconds(flops, precision)
    return spent["selection"] / spent["training"]


def parameters(run: PaperRun) -> int:
    """Weights: block matrices and embedding, and the head where it is not the embedding."""
    shape = run.setting.shape
    return shape.block_parameters + shape.head_parameters * (1 if shape.tied else 2)


def encoders(runs: Sequence[PaperRun]) -> dict[tuple[str, str], float]:
    """(source, what reads it) -> FLOPs of reading the pool once; an upper bound, as if every token were read."""
    known = {scorer.name: scorer for scorer in SCORERS}
    found = {}
    for run in runs:
        tokens = next(pool.tokens for pool in whole_pools(runs) if pool.name == run.pool.origin)
        for scorer in (ENCODER, *([known[run.pool.static]] if run.pool.static else [])):
            found[run.pool.origin, scorer.row] = counts.encoder_flops(scorer.parameters, tokens)
    return found


def memory_per_gpu(run: PaperRun, gpus: int) -> dict[str, float]:
    """Bytes on one GPU in the backward of one sequence, an estimate that leaves out temporaries and fragmentation.

        state          weights, gradients, optimizer state in FP32, sharded: 16 bytes a weight, and 12 where Muon keeps
                       one number
        gathered       what FSDP2 holds whole in FP32: embedding and head from the forward to the end of the backward,
                       with their gradients, 8 bytes a weight; two blocks, one of them fetched ahead, with theirs
        activations    4 T d a layer at block borders, FP32, and T (40 d + 4 inner, or 8 inner of a gated MLP) of the
                       block that is computed again, mostly BF16; twice that part in FP32.  T: tokens of a sequence,
                       or, where more, of a scoring pass (SCORED_TOKENS, or all of the GPU's share of the candidates
                       where they are needed at once) or of its share of the proxies
        logits         three of T V in FP32: themselves, their cap and their gradient
        scoring        proxy gradient and direction of what is scored, FP32, sharded
        factors        GREATS's a and b: (o + i) a matrix and token of the GPU's share of the windows, BF16, and of one
                       matrix those of all candidates
    """
    s, whole, selector = shape_of(run), parameters(run), run.line.selector
    block, window = s.block_parameters, min(s.window, s.length)
    tokens = s.length
    if selector in ("opus", "greats", "perplexity"):
        share = -(-s.candidates // gpus) * window
        undivided = at_once(selector, run.line.options)
        tokens = max(tokens, share if undivided else min(share, max(SCORED_TOKENS, window)))
    if selector in ("opus", "greats"):
        tokens = max(tokens, -(-s.proxies // gpus) * window)
    matrices, number = s.matrices, 2 if run.setting.precision == "bfloat16" else 4
    inner = matrices[-1][1] * (2 if s.gated else 1)
    numbers = 4 * whole - (block if run.optimizer == "muon" else 0)
    kept = -(-s.candidates // gpus) * s.layers * sum(map(sum, matrices)) + s.candidates * max(map(sum, matrices))
    return {"state": 4 * numbers / gpus, "gathered": 8 * (whole - block) + 16 * block / s.layers,
            "activations": tokens * (4 * s.width * s.layers + number / 2 * (40 * s.width + 4 * inner)),
            "logits": 3 * 4.0 * tokens * s.vocabulary,
            "scoring": 8 * scored_weights(run) / gpus,
            "factors": number * window * kept if selector == "greats" else 0}


def host_memory(run: PaperRun) -> int:
    """Bytes in FP32 that process 0 holds on the CPU: the whole model, twice where it is read from files."""
    return 4 * parameters(run) * (2 if run.setting.from_hub else 1)


def checkpoint_bytes(run: PaperRun) -> int:
    """Of one checkpoint, FP32: weights, AdamW's two numbers or Muon's one, the proxy gradient of what is scored."""
    by_muon = run.setting.shape.block_parameters if run.optimizer == "muon" else 0
    return 4 * (3 * parameters(run) - by_muon + scored_weights(run))


def checkpoints(run: PaperRun) -> int:
    """Written over a run, of which it keeps two and at its end none."""
    return -(-run.fields["steps"] // run.checkpoint_every)


def token_bytes(run: PaperRun) -> int:
    """Bytes of a token in a shard: 2 up to 65,536 entries of the vocabulary, else 4."""
    return 2 if run.setting.shape.vocabulary <= 2**16 else 4


def disk(runs: Sequence[PaperRun]) -> dict[str, float]:
    """Bytes on disk by what holds them."""
    found: dict[str, float] = defaultdict(float)
    for pool in whole_pools(runs):
        run = next(run for run in runs if run.pool.origin == pool.name)
        found["token shards"] += token_bytes(run) * (pool.tokens + 2 * PROXY_TOKENS + VALIDATION_TOKENS)
        if pool.source in REPOSITORIES:
            found["documents"] += SAMPLE_BYTES.get(pool.subset or "", BYTES_PER_TOKEN * pool.tokens)
        found["proxy documents"] += CHARACTERS_PER_TOKEN * PROXY_TOKENS
    for pool, run in {run.pool: run for run in runs if run.pool.static}.items():
        found["token shards"] += token_bytes(run) * pool.tokens
        found["documents kept by static scorers"] += CHARACTERS_PER_TOKEN * pool.tokens
    largest = max(map(checkpoint_bytes, runs))
    found[f"checkpoints, {CHECKPOINTS_KEPT} of the run in progress"] = CHECKPOINTS_KEPT * largest
    found["models of all runs"] = sum(4.0 * parameters(run) * len(run.kept_steps) for run in runs)
    return dict(found)


def downloads(runs: Sequence[PaperRun]) -> dict[str, float]:
    """Bytes fetched: samples once, what is too large to store once for its tokens."""
    found = {}
    for pool in whole_pools(runs):
        if pool.source in REPOSITORIES:
            name = f"{REPOSITORIES[pool.source]} {pool.subset}"
            if pool.buckets:
                name += f", at least: score {', '.join(map(str, pool.buckets))} alone"
            found[name] = SAMPLE_BYTES.get(pool.subset or "", BYTES_PER_TOKEN * pool.tokens)
    return found | {run.setting.model: 2.0 * parameters(run) for run in runs if run.setting.from_hub}


# In words ---------------------------------------------------------------------------------------------


def derivation(run: PaperRun) -> str:
    """The training FLOPs of a run with the numbers put in, checked by the sum itself."""
    s, tokens = run.setting.shape, run.update_tokens
    matrices = 6 * (s.block_parameters + s.head_parameters) * tokens
    attention = training_flops(run) - matrices
    each = attention / tokens
    d = f"{tokens / 1e9:.2f}e9"
    return (f"{run.setting.title}: 6 (P_blocks + P_head) D + 6 L d layers D = 6 x ({s.block_parameters / 1e9:.3f}e9 + "
            f"{s.head_parameters / 1e9:.3f}e9) x {d} + 6 x {s.length:,} x {s.queries:,} x {s.layers} x {d} = "
            f"{matrices:.3g} + {attention:.3g} ({each / 1e9:.2f}e9 a token, causal half)")


def cost_lines(runs: Sequence[PaperRun], rates: Rates) -> list[str]:
    """FLOPs, hours, disk, downloads and memory of the runs in words."""
    flops: dict[tuple[str, str], float] = defaultdict(float)
    for run in runs:
        for key, value in work(run).items():
            flops[key] += value
    flops = {key: value for key, value in flops.items() if value}
    read = encoders(runs)
    hours = {key: rates.seconds(value, key[1]) / 3600 for key, value in flops.items()}
    total, scoring = sum(hours.values()), sum(rates.seconds(value, "bfloat16") for value in read.values()) / 3600
    firsts = list({run.setting: run for run in runs if run.line.times == 1}.values())
    peaks = ", ".join(f"{rates.peak_of(p) / 1e12:.1f} TFLOP/s ({p})" for p in dict.fromkeys(p for _, p in flops))
    heaviest = {(run.setting, run.optimizer): run for run in sorted(runs, key=checkpoint_bytes)}.values()
    kept, fetched, gpus = disk(runs), downloads(runs), f"{rates.gpus} GPU{'s' if rates.gpus > 1 else ''}"
    lines = ["FLOPs"]
    lines += [f"  {derivation(run)}" for run in firsts]
    lines += [f"  {name}, all runs: {value:.3g}" for (name, _), value in flops.items()]
    lines.append(f"  each once for all GPUs: sequences and Muon's matrices are divided over {gpus}, and in selection "
                 "candidates, proxies and the rows of GREATS's Gram")
    for label in dict.fromkeys(run.label for run in runs):
        mine = [run for run in runs if run.label == label and run.line.selector != "random"]
        if mine:
            hours_of = spread([selection_share(run, rates) for run in mine])
            flops_of = spread([selection_flops(run) / training_flops(run) for run in mine])
            lines.append(f"  selection over training, {label}: {hours_of} in hours; in FLOPs without recomputation "
                         f"{flops_of}")
    for (source, name), value in read.items():
        what = "negligible: sums of hashed words" if value == 0 else (
            f"at most 2 x parameters x tokens = {value:.3g}, once")
        lines.append(f"  reading {source} by {name}: {what}")
    lines += [
        "GPU hours",
        (f"  FLOPs / (peak x utilisation x 3600); peak {peaks}: "
         f"{'by --peak-tflops' if rates.peak else 'H100 SXM, dense'}; utilisation {rates.utilisation:g} "
         f"({'an assumption' if rates.utilisation == UTILISATION else 'as given'}) of all counted FLOPs, those of "
         "recomputation included"),
        *(f"  {name}: {value:,.0f}" for (name, _), value in hours.items()),
        f"  in all: {total:,.0f} GPU hours = {total / rates.gpus / 24:,.1f} days on {gpus}",
        *([] if rates.peak or any(run.setting.from_hub for run in runs) else [float32_line(flops, rates)]),
        f"  scoring of pools and proxies, BF16: at most {scoring:,.0f} GPU hours",
        ("  not counted, so at least: norms, softmax and other elementwise work (AdamW's step, clipping, hashing), "
         "evaluation and validation losses, communication, reading of data, writing of checkpoints"),
        "Disk", *(f"  {name}: {size(value)}" for name, value in kept.items()),
        f"  in all: {size(sum(kept.values()))}",
        *(f"  written over a run of {run.setting.title}, {run.optimizer}: {checkpoints(run)} checkpoints of "
          f"{size(checkpoint_bytes(run))}, one every {run.checkpoint_every:,} steps = "
          f"{size(checkpoints(run) * checkpoint_bytes(run))}; a finished run keeps none" for run in heaviest),
        "Downloads", *(f"  {name}: {size(value)}" for name, value in fetched.items()),
    ]
    if any("at least" in name for name in fetched):
        lines.append(f"  {BYTES_PER_TOKEN} bytes a token, as of FineWeb; documents of other scores are read and "
                     "dropped, so it is more by one over their share, which is not in our sources")
    lines.append(f"Memory per GPU of {rates.gpus}, one sequence at a time, activations checkpointed (estimate)")
    largest = sorted(runs, key=lambda run: sum(memory_per_gpu(run, rates.gpus).values()))
    for run in {(run.setting, run.optimizer): run for run in largest}.values():
        parts = memory_per_gpu(run, rates.gpus)
        named = ", ".join(f"{name} {size(value)}" for name, value in parts.items() if value)
        lines.append(f"  {run.setting.title}, {run.optimizer}, {run.label}: {size(sum(parts.values()))} ({named})")
    host = max(runs, key=host_memory)
    lines.append(f"Host memory of process 0: {size(host_memory(host))}, the weights of {host.setting.title} in FP32"
                 f"{', twice while they are read' if host.setting.from_hub else ''}")
    return lines


def spread(ratios: Sequence[float]) -> str:
    """The smallest and the largest in percent."""
    return " to ".join(dict.fromkeys(f"{100 * ratio:.1f} %" for ratio in (min(ratios), max(ratios))))


def float32_line(flops: dict[tuple[str, str], float], rates: Rates) -> str:
    """What the runs would take with every product in float32, as the paper's "FP32 modules" can be read."""
    total = sum(flops.values()) / rates.utilisation / 3600
    return (f"  with all in FP32 products, as the paper's FP32 modules can be read: {total / H100['float32']:,.0f}; in "
            f"TF32 ({TF32 / 1e12:.1f} TFLOP/s), which nothing here switches on: {total / TF32:,.0f}")
