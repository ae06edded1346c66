"""What could the paper's 4.7 % overhead mean?  Tokens and FLOPs of selection over those of training, counted.

    python -m reproduce.overhead                       # seconds: nothing is trained and nothing timed
    python -m reproduce.overhead --results results/ci  # another folder of records

Prints the table and writes results/tables/overhead.md.  Time ratios are shown where runs of the experiment
"scoring" have measured them.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from opus_bench import results
from opus_bench.schema import NOT_RUN, RecordError
from opus_bench.tables import markdown

from .counts import ESTIMATORS, LARGE, SHAPES, XL, flop_ratio, kept_bytes, token_ratio
from .written import say_written

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = "scoring"  # whose records hold time ratios
TITLE = "Overhead of selection: the paper's 4.7 % and what is counted"
COMMAND = "python -m reproduce.overhead"
PAPER_PERCENT = 4.7  # the paper's overhead; it gives no formula
LAUNCH_SCRIPT_RATIO = 1.5  # token ratio of the released launch script; no other number of its shape is used here
PROXY_EVERY = (1, 8)
NONE = "–"


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


def bytes_table() -> str:
    """What scoring keeps, in GB."""
    names = list(kept_bytes(LARGE))
    return markdown(["shape", *(f"{name} (GB)" for name in names)],
                    [[s.name, *(f"{x / 1e9:.3g}" for x in kept_bytes(s).values())] for s in SHAPES])


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
BYTES = """\
Beside model, optimizer state and the activations of one microbatch, by formula, float32; hashes are computed on the
fly here, so the first column is what the literal method alone keeps."""
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
              overhead_table(times), "## Bytes kept", BYTES, bytes_table(), "## Formulas", FORMULAS, "## Estimators",
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

    def make() -> list[Path]:
        if not options.results.is_dir():
            raise ValueError(f"{options.results} is not a folder; --results names the one that holds runs/")
        paths = write(options.results)
        print(overhead_table(time_ratios(results.load(options.results / "runs", EXPERIMENT))))
        return paths

    return say_written(make)


if __name__ == "__main__":
    sys.exit(main())
