"""What could the paper's 4.7 % overhead mean?  Tokens and FLOPs of selection over those of training, counted.

    python -m reproduce.overhead                       # seconds: nothing is trained and nothing timed
    python -m reproduce.overhead --results results/ci  # another folder of records

Prints the table and writes results/tables/overhead.md.  Time ratios are shown where runs of the experiment
"scoring" have measured them.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from opus_bench import results
from opus_bench.model import SIZES
from opus_bench.schema import NOT_RUN, RecordError
from opus_bench.tables import markdown

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = "scoring"  # whose records hold time ratios
TITLE = "Overhead of selection: the paper's 4.7 % and what is counted"
COMMAND = "python -m reproduce.overhead"
PAPER_PERCENT = 4.7  # the paper's overhead; it gives no formula
LAUNCH_SCRIPT_RATIO = 1.5  # token ratio of the released launch script; no other number of its shape is used here
PROXY_EVERY = (1, 8)
ESTIMATORS = {  # as the records name them: what is done
    "CountSketch": "dense gradients formed, then hashed: the literal method",
    "exact alignment": "contraction with the preconditioned proxy gradient, no gradient formed",
    "exact alignment and Gram": "dense gradients formed in chunks, inner products of all pairs",
    "central difference": "losses at weights moved both ways along the preconditioned proxy gradient, no backward",
}
NONE = "–"


@dataclass(frozen=True)
class Shape:
    """A model and a selection step.  Widths in numbers, lengths in tokens, batches in sequences."""

    name: str
    source: str  # paper, released launch script, benchmark
    layers: int
    width: int
    vocabulary: int
    length: int  # L, tokens of a training sequence
    candidates: int  # N
    proxies: int  # M, sequences of a proxy batch
    selected: int  # K
    window: int  # W, tokens scored of candidates and proxies
    feed_forward: int | None = None  # None: four times the width
    kv_width: int | None = None  # None: the width; less with grouped queries
    gated: bool = False  # an MLP of three matrices instead of two

    @property
    def block_parameters(self) -> int:
        """Numbers in the matrices of all blocks: what is scored."""
        d, kv = self.width, self.width if self.kv_width is None else self.kv_width
        inner = 4 * d if self.feed_forward is None else self.feed_forward
        return self.layers * (2 * d * d + 2 * d * kv + (3 if self.gated else 2) * d * inner)

    @property
    def head_parameters(self) -> int:
        """Numbers in the matrix that makes logits; the embedding is a lookup and has no FLOPs."""
        return self.width * self.vocabulary


LARGE = Shape("GPT-2 Large", "paper", *SIZES["gpt2-large"][:2], 50304, 24576, 64, 8, 32, 512)
XL = Shape("GPT-2 XL", "paper", *SIZES["gpt2-xl"][:2], 50304, 6144, 32, 8, 16, 512)
SHAPES = (
    LARGE,
    XL,
    replace(XL, name="GPT-2 XL, N 64", candidates=64, selected=32),
    replace(XL, name="GPT-2 XL, M 16", source="paper, but for M", proxies=16),
    Shape("Qwen3-8B", "paper", 36, 4096, 151936, 4096, 16, 8, 8, 512, feed_forward=12288, kv_width=1024, gated=True),
    Shape("A", "benchmark", 6, 384, 4096, 512, 16, 8, 4, 128),
)


# Counting ---------------------------------------------------------------------------------------------


def token_ratio(shape: Shape) -> float:
    """Tokens scored over tokens trained on, (N + M) W / (K L)."""
    return (shape.candidates + shape.proxies) * shape.window / (shape.selected * shape.length)


def attention_flops(shape: Shape, n: int, t: int, causal: bool = False) -> int:
    """Products of queries with keys and of weights with values, forward: 4 n t^2 d a layer, the full square.

    The full square is what torch's counter counts; ``causal``: the half that a causal kernel needs.
    """
    return (2 if causal else 4) * n * t * t * shape.width * shape.layers


def matrix_flops(shape: Shape, n: int, t: int) -> int:
    """One product of n t positions with every matrix, 2 n t (P_blocks + P_head)."""
    return 2 * n * t * (shape.block_parameters + shape.head_parameters)


def forward_flops(shape: Shape, n: int, t: int, causal: bool = False) -> int:
    """Forward of n sequences of t tokens: 2 n t (P_blocks + P_head) + 4 n t^2 d layers.

    Exactness: equals torch's counter for `OpusGPT2` and transformers' Qwen3 with attention by plain matrix products.
        Counts products of matrices alone: no norm, activation, softmax, rotation, loss or lookup.
    """
    return matrix_flops(shape, n, t) + attention_flops(shape, n, t, causal)


def activation_flops(shape: Shape, n: int, t: int, causal: bool = False) -> int:
    """Backward to activations, down to the embedding: 2 n t (P_blocks + P_head) + 8 n t^2 d layers.

    Exactness: equals torch's counter where the embedding's output needs a gradient.  Where only outputs of linear
        layers do, the first block's q, k and v need no gradient of their input: 2 n t d (d + 2 d_kv) fewer.
        Fused attention computes its products with keys again, 2 n t^2 d a layer, which is not counted.
    """
    return matrix_flops(shape, n, t) + 2 * attention_flops(shape, n, t, causal)


def dense_flops(shape: Shape, n: int, t: int) -> int:
    """sum_t b_t a_t^T of every block matrix, one a sample or summed over samples alike: 2 n t P_blocks."""
    return 2 * n * t * shape.block_parameters


def training_flops(shape: Shape, causal: bool = False) -> int:
    """A step on K sequences of L tokens: forward, backward to activations, and 2 K L (P_blocks + P_head).

    Exactness: equals torch's counter.  The optimizer's own work is not counted.
    """
    n, t = shape.selected, shape.length
    return (forward_flops(shape, n, t, causal) + activation_flops(shape, n, t, causal) + matrix_flops(shape, n, t))


def proxy_flops(shape: Shape, causal: bool = False) -> int:
    """The gradient of the blocks for one proxy batch: forward, backward to activations, 2 M W P_blocks."""
    n, t = shape.proxies, shape.window
    return forward_flops(shape, n, t, causal) + activation_flops(shape, n, t, causal) + dense_flops(shape, n, t)


def candidate_flops(shape: Shape, estimator: str, causal: bool = False) -> int:
    """What an estimator does to score N windows of W tokens, given the proxy's gradient.

        CountSketch                forward, backward to activations, 2 N W P_blocks for the dense gradients
        exact alignment            forward, backward to activations, 2 N W P_blocks for the contraction
        exact alignment and Gram   as CountSketch, and 2 N^2 P_blocks
        central difference         two forwards

    Not counted: hashing, which moves N P_blocks numbers but multiplies no matrices; the sketches' own Gram;
    what P_t does, elementwise for AdamW and a product with a square matrix for Muon.

    Raises:
        ValueError: an unknown estimator.
    """
    n, t = shape.candidates, shape.window
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}; known: {', '.join(ESTIMATORS)}")
    if estimator == "central difference":
        return 2 * forward_flops(shape, n, t, causal)
    gram = 2 * n * n * shape.block_parameters if estimator == "exact alignment and Gram" else 0
    return (forward_flops(shape, n, t, causal) + activation_flops(shape, n, t, causal) + dense_flops(shape, n, t)
            + gram)


def flop_ratio(shape: Shape, estimator: str, proxy_every: int = 1, causal: bool = False) -> float:
    """FLOPs of scoring over those of the training step that it chooses the batch of.

    Args:
        proxy_every: steps for which a proxy gradient is kept; its cost is spread over them.
        causal: attention counted by the half that a causal kernel needs, in both.

    Raises:
        ValueError: an unknown estimator, a ``proxy_every`` below 1.
    """
    if proxy_every < 1:
        raise ValueError(f"proxy_every must be at least 1, got {proxy_every}")
    scoring = candidate_flops(shape, estimator, causal) + proxy_flops(shape, causal) / proxy_every
    return scoring / training_flops(shape, causal)


# The page ---------------------------------------------------------------------------------------------


Times = dict[tuple[str, str], dict[str, list[float]]]  # shape, estimator -> device -> time ratios


def time_ratios(records: Sequence[dict]) -> Times:
    """Measured time ratios, in order of the records.

    Raises:
        RecordError: a time ratio that does not say of what.
    """
    found: Times = defaultdict(lambda: defaultdict(list))
    for record in records:
        for row in record["metrics"]:
            if row["name"] == "time ratio":
                for key in ("shape", "estimator"):
                    if not isinstance(row.get(key), str):
                        raise RecordError(f"{record['run_id']}: a time ratio needs {key!r} as a string, got {row}")
                found[row["shape"], row["estimator"]][record["environment"]["device"]].append(row["value"])
    return {key: dict(devices) for key, devices in found.items()}


def percent(ratio: float) -> str:
    """As a cell: one digit, two where the paper's number is near."""
    return f"{100 * ratio:.2f} %" if ratio < 0.1 else f"{100 * ratio:.1f} %"


def measured(times: Times, shape: str, estimator: str) -> str:
    """Time ratios of each device as a cell: mean, range and number; or why there is none."""
    if (shape, estimator) not in times:
        run_here = shape == "A" or any(name == shape for name, _ in times)
        return NOT_RUN + ("no record" if run_here else "no GPU")
    cells = []
    for device, values in sorted(times[shape, estimator].items()):
        mean = math.fsum(values) / len(values)
        ends = f", {percent(min(values))} to {percent(max(values))}" if len(values) > 1 else ""
        cells.append(f"{percent(mean)} ({device}, n = {len(values)}{ends})")
    return "; ".join(cells)


def rows(times: Times) -> Iterator[list[str]]:
    """A row each shape and estimator: counted, and measured beside it where the names match."""
    for shape in SHAPES:
        paper = f"{PAPER_PERCENT} %" if shape.source == "paper" else NONE
        others = [name for at, name in times if at == shape.name and name not in ESTIMATORS]
        for name in ESTIMATORS:
            ratios = [percent(flop_ratio(shape, name, every, causal)) for causal in (False, True)
                      for every in PROXY_EVERY]
            yield [shape.name, name, paper, percent(token_ratio(shape)), *ratios, measured(times, shape.name, name)]
        for name in others:
            yield [shape.name, name, NONE, NONE, *[NONE] * 4, measured(times, shape.name, name)]
    yield ["released launch script", "any", NONE, percent(LAUNCH_SCRIPT_RATIO), *["not known"] * 4,
           f"{NOT_RUN}shape not known"]
    for at, name in times:
        if at not in {shape.name for shape in SHAPES}:
            yield [at, name, NONE, NONE, *["not known"] * 4, measured(times, at, name)]


def overhead_table(times: Times) -> str:
    """The paper's number, the token ratio, FLOP ratios and time ratios."""
    each = [f"FLOPs{of}, proxy every {'step' if every == 1 else f'{every} steps'}"
            for of in ("", " with causal half of attention") for every in PROXY_EVERY]
    return markdown(["shape", "estimator", "the paper's overhead", "token ratio", *each, "measured time ratio"],
                    rows(times))


def shape_table() -> str:
    """What is counted: the shapes."""
    lines = [[s.name, s.source, f"{s.layers} x {s.width}", f"{s.vocabulary:,}", f"{s.block_parameters:,}",
              f"{s.head_parameters:,}", *(f"{x:,}" for x in (s.length, s.window, s.candidates, s.proxies, s.selected))]
             for s in SHAPES]
    lines.append(["released launch script", "released launch script", *["not known"] * 9])
    return markdown(["shape", "source", "layers x width", "vocabulary", "P_blocks", "P_head", "L (tokens)",
                     "W (tokens)", "N", "M", "K"], lines)


def readings() -> str:
    """Which counted ratios round to the paper's number, in words."""
    def fits(ratio: float) -> bool:
        return f"{100 * ratio:.1f}" == f"{PAPER_PERCENT:.1f}"

    tokens = [s.name for s in SHAPES if fits(token_ratio(s))]
    counted = {(s.name, name, every, causal): flop_ratio(s, name, every, causal) for s in SHAPES
               for name in ESTIMATORS for every in PROXY_EVERY for causal in (False, True)}
    flops = [f"{at}, {name}, proxy every {every}{', causal half' if causal else ''}"
             for (at, name, every, causal), ratio in counted.items() if fits(ratio)]
    fewer = replace(LARGE, candidates=32, selected=16)
    of_xl = [f"{percent(token_ratio(s))} (N {s.candidates}, M {s.proxies}, K {s.selected})"
             for s in SHAPES if s.name.startswith(XL.name)]
    full, half = (percent(flop_ratio(LARGE, "CountSketch", 1, causal)) for causal in (False, True))
    return f"""\
The paper states an overhead of {PAPER_PERCENT} % and no formula, so it is shown below beside each of its shapes. The
reading that fits is the token ratio of GPT-2 Large with N = {LARGE.candidates}: {percent(token_ratio(LARGE))}.
With N = 32 and K = 16 that is {percent(token_ratio(fewer))}; for GPT-2 XL it is {", ".join(of_xl)}.

- Token ratios that round to {PAPER_PERCENT} %: {"; ".join(tokens) or "none"}.
- FLOP ratios that do, of {len(counted)} counted: {"; ".join(flops) or "none"}.
- GPT-2 Large, FLOPs of the literal method: {full} with the full square of attention, {half} with its causal half.
  Attention to {LARGE.length:,} tokens is much of a training step there and that to {LARGE.window} little of scoring.
- Without attention and head the FLOP ratio of CountSketch and of exact alignment is the token ratio; the two forwards
  of the central difference cost two thirds of what they replace."""


FORMULAS = """\
N candidates and M proxies of W tokens, K of the candidates trained on at L tokens; d the width, P_blocks the numbers
in the matrices of the blocks, P_head in that of the logits. A multiplication and an addition are 2 FLOPs.

- token ratio = (N + M) W / (K L)
- forward(n, t) = 2 n t (P_blocks + P_head) + 4 n t^2 d layers: the full square of attention, as torch's counter
  counts it. Columns "with causal half" take half of every attention term, in scoring and in training.
- backward to activations(n, t) = 2 n t (P_blocks + P_head) + 8 n t^2 d layers; attention's backward has four products
  where its forward has two. Where nothing before the first block's q, k and v needs a gradient it is
  2 n t d (d + 2 d_kv) less, which is not subtracted here.
- training step = forward(K, L) + backward to activations(K, L) + 2 K L (P_blocks + P_head)
- proxy = forward(M, W) + backward to activations(M, W) + 2 M W P_blocks, over the steps for which it is kept
- CountSketch = proxy + forward(N, W) + backward to activations(N, W) + 2 N W P_blocks to form dense gradients
- exact alignment = the same FLOPs: 2 N W P_blocks for the contraction in place of forming
- exact alignment and Gram = CountSketch + 2 N^2 P_blocks
- central difference = proxy + 2 forward(N, W)
- FLOP ratio = estimator / training step

Forward, backward to activations and training step are held against torch's counter by the tests, to the last FLOP.
Not counted: hashing (N P_blocks additions to scattered addresses, so memory rather than arithmetic), the Gram of
sketches, norms, activations, softmax, loss, the optimizer's update, and P_t: elementwise for AdamW; for Muon it
multiplies by a square matrix, which is left out, so under Muon the ratios are lower bounds. What is counted is not
what is measured: FLOPs of scoring run at another rate than those of training."""


MEASURED = """\
Over a plain training step on the selected batch. Measured: wall time of scoring over that of such a step, as the run
did it; mean and range over rows."""
LAUNCH_SCRIPT = f"""\
The released launch script: its token ratio is {100 * LAUNCH_SCRIPT_RATIO:.0f} % as read from the released code; the
rest of its shape is not stated here."""


def page(records: Sequence[dict]) -> str:
    """The page in markdown; the same records give the same bytes."""
    times = time_ratios(records)
    used = [r for r in records if any(row["name"] == "time ratio" for row in r["metrics"])]
    head = f"Made by `{COMMAND}`: counted, nothing is trained; " + (
        f"time ratios from {len(used)} run{'s' if len(used) > 1 else ''}, listed below." if used else
        "no run has measured a time ratio.")
    blocks = [f"# {TITLE}", head, "## What 4.7 % could be", readings(), "## Counted and measured",
              MEASURED,
              overhead_table(times), "## Formulas", FORMULAS, "## Estimators",
              "\n".join(f"- {name}: {what}" for name, what in ESTIMATORS.items()), "## Shapes", shape_table(),
              LAUNCH_SCRIPT]
    if used:
        lines = [[r["scale"], r["environment"]["device"], str(r["config"]["seed"]), r["code"]["version"][:12],
                  f"[{r['run_id']}](../runs/{r['run_id']}.json)"] for r in used]
        blocks += ["## Runs", markdown(["scale", "device", "seed", "code version", "run"], lines)]
    return "\n\n".join(blocks) + "\n"


def write(results_dir: Path) -> list[Path]:
    """The page, from the formulas and whatever records there are."""
    path = results_dir / "tables" / "overhead.md"
    text = page(results.load(results_dir / "runs", EXPERIMENT))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
    return [path]


def main() -> int:
    """Exit code 0, 2 after one line about a folder or a record that is no good."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR",
                        help="folder that holds runs/ and gets tables/ (default: results)")
    options = parser.parse_args()
    try:
        if not options.results.is_dir():
            raise ValueError(f"{options.results} is not a folder; --results names the one that holds runs/")
        paths = write(options.results)
        print(overhead_table(time_ratios(results.load(options.results / "runs", EXPERIMENT))))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in paths:
        print(f"wrote {os.path.relpath(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
