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
from .paper_commands import VALIDATION_TOKENS
from .paper_scale import PaperRun, whole_pools
from .paper_settings import ENCODER, PROXY_TOKENS, REPOSITORIES, SCORERS

H100 = {"float32": 494.7e12, "bfloat16": 989.4e12}
"""Peak of an H100 SXM for dense products, FLOP/s, TF32 and BF16 [NVIDIA's data sheet, without sparsity]."""
UTILISATION = 0.4  # share of the peak that training reaches: an assumption
SAMPLE_BYTES = {"sample-10BT": 27.6e9, "sample-100BT": 277.4e9}  # of FineWeb's files [its data set card]
BYTES_PER_TOKEN = 2.774  # of parquet files, 277.4 GB for about 100e9 GPT-2 tokens [FineWeb's data set card]
CHARACTERS_PER_TOKEN = 4.65  # of English prose under GPT-2's tokenizer, measured on 5.0 M characters of encyclopedia
CHECKPOINTS_KEPT = 3  # the last, the one before, and the one being written


@dataclass(frozen=True)
class Rates:
    """How fast a GPU works."""

    peak: float | None  # FLOP/s; None: of H100 at the setting's precision
    utilisation: float
    gpus: int

    def __post_init__(self) -> None:
        if self.peak is not None and self.peak <= 0:
            raise ValueError(f"--peak-tflops must be positive, got {self.peak / 1e12:g}")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"--utilisation must be in (0, 1], got {self.utilisation:g}")
        if self.gpus < 1:
            raise ValueError(f"--gpus must be at least 1, got {self.gpus}")

    def seconds(self, flops: float, precision: str) -> float:
        """GPU seconds: FLOPs over peak times utilisation."""
        return flops / ((self.peak or H100[precision]) * self.utilisation)


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
    """Bytes on one GPU while it trains one sequence at a time, an estimate.

        state        weights, gradients, optimizer state in FP32, sharded: 16 bytes a weight, and 12 where Muon keeps
                     one number
        activations  in BF16, checkpointed: layers L d at block borders, and 16 L d of the block that is computed again
        logits       three of L V in FP32: themselves, their cap and their gradient
        scoring      proxy gradient and direction of the blocks, FP32, sharded
    """
    shape, whole = run.setting.shape, parameters(run)
    block, length = shape.block_parameters, shape.length
    numbers = 4 * whole - (block if run.optimizer == "muon" else 0)
    activation = 2 if run.setting.precision == "bfloat16" else 4
    scored = 8 * block / gpus if run.line.selector in ("opus", "greats") else 0
    return {"state": 4 * numbers / gpus, "activations": activation * length * shape.width * (shape.layers + 16),
            "logits": 3 * 4.0 * length * shape.vocabulary, "scoring": scored}


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
    largest = max(runs, key=parameters)
    found[f"checkpoints, {CHECKPOINTS_KEPT} of the run in progress"] = CHECKPOINTS_KEPT * 16.0 * parameters(largest)
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
    return (f"{run.setting.title}: 6 (P_blocks + P_head) D + 6 L d layers D = 6 x ({s.block_parameters / 1e9:.3f}e9 + "
            f"{s.head_parameters / 1e9:.3f}e9) x {tokens / 1e9:.2f}e9 + 6 x {s.length:,} x {s.queries:,} x {s.layers} x "
            f"{tokens / 1e9:.2f}e9 = {matrices:.3g} + {attention:.3g} ({each / 1e9:.2f}e9 a token, causal half)")


def cost_lines(runs: Sequence[PaperRun], rates: Rates) -> list[str]:
    """FLOPs, hours, disk, downloads and memory of the runs in words."""
    of_sum = {"training": sum(map(training_flops, runs)), "selection": sum(map(selection_flops, runs))}
    read = encoders(runs)
    hours = sum(rates.seconds(training_flops(run) + selection_flops(run), run.setting.precision) for run in runs) / 3600
    scoring = sum(rates.seconds(flops, "bfloat16") for flops in read.values()) / 3600
    firsts = list({run.setting: run for run in runs if run.line.times == 1}.values())
    peaks = {run.setting.precision: rates.peak or H100[run.setting.precision] for run in runs}
    kept, fetched = disk(runs), downloads(runs)
    lines = ["FLOPs"]
    lines += [f"  {derivation(run)}" for run in firsts]
    lines += [f"  {name}, all runs: {value:.3g}" for name, value in of_sum.items()]
    for label in dict.fromkeys(run.label for run in runs):
        mine = [run for run in runs if run.label == label and run.line.selector != "random"]
        if mine:
            ratios = sorted(selection_flops(run) / training_flops(run) for run in mine)
            ends = dict.fromkeys(f"{100 * ratio:.1f} %" for ratio in (ratios[0], ratios[-1]))
            lines.append(f"  selection over training, {label}: {' to '.join(ends)}")
    for (source, name), flops in read.items():
        what = "negligible: sums of hashed words" if flops == 0 else (
            f"at most 2 x parameters x tokens = {flops:.3g}, once")
        lines.append(f"  reading {source} by {name}: {what}")
    lines += [
        "  not counted: optimizers' own work, norms, softmax, evaluation, recomputation of checkpointed activations",
        "GPU hours",
        *(f"  peak {peak / 1e12:.1f} TFLOP/s ({precision}: {'--peak-tflops' if rates.peak else 'H100 SXM, dense'}) x "
          f"utilisation {rates.utilisation:g} ({'an assumption' if rates.utilisation == UTILISATION else 'as given'})"
          for precision, peak in peaks.items()),
        (f"  training and selection: {sum(of_sum.values()):.3g} FLOPs / (peak x utilisation x 3600) = {hours:,.0f} GPU "
         f"hours = {hours / rates.gpus / 24:,.1f} days on {rates.gpus} GPU{'s' if rates.gpus > 1 else ''}"),
        *([] if rates.peak or any(run.setting.from_hub for run in runs) else [
            f"  with TF32 products ({H100['float32'] / 1e12:.1f} TFLOP/s), as FP32 modules can be read: "
            f"{sum(of_sum.values()) / (H100['float32'] * rates.utilisation) / 3600:,.0f} GPU hours"]),
        f"  scoring of pools and proxies, BF16: at most {scoring:,.0f} GPU hours",
        "Disk", *(f"  {name}: {size(value)}" for name, value in kept.items()),
        f"  in all: {size(sum(kept.values()))}",
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
        lines.append(f"  {run.setting.title}, {run.optimizer}: {size(sum(parts.values()))} ({named})")
    return lines
