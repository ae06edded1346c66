"""What does scoring cost, and how well does it rank?  Every estimator beside one plain step, in one process.

    python -m benchmarks.scoring              # shape A: 6 x 384, CPU, about 10 minutes on 2 cores
    python -m benchmarks.scoring --shape B    # GPT-2 Large on a GPU; C: GPT-2 XL; D: Qwen3-8B
    python -m benchmarks.scoring --shape ci   # under a minute; exercises the code

A model is trained at random on real text.  Estimators are compared with the exact utilities in float64, then timed
in turns with a plain training step; what is kept is the median.  Writes a record to results/runs, the page
results/tables/scoring.md and the frontier, cost against Spearman.  Nothing is timed by the tests.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from opus_bench import hashing, provenance, results, schema
from opus_bench.corpus import Corpus, build_corpus
from opus_bench.corpus_spec import CorpusSpec
from opus_bench.gradients import mean_gradient
from opus_bench.streamed import streamed_alignment
from opus_bench.train import peak_bytes
from opus_bench.utility import Utility
from opus_bench.validation.problem import float64_copy, rank_correlation
from reproduce.training import corpus_hashes

from .bench import Bench
from .counting import peak_allocated
from .estimators import ESTIMATORS
from .problem import Estimator, Problem, opus
from .shapes import SHAPES, Shape
from .variants import PROXY_EVERY, STALE, aged_proxies, alignment_along, reuse, staleness

EXPERIMENT = "scoring"
COMMAND = f"python -m benchmarks.{EXPERIMENT}"
ROOT = Path(__file__).resolve().parent.parent
CORPUS = CorpusSpec(vocab_size=4096)


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is measured."""

    buffers: int = 8  # sets of candidates on which estimators are compared
    repeats: int = 7  # turns of timing
    factors: tuple[int, ...] = (1, 2, 4, 8)  # of candidates, and of tokens, for the check of linearity


def exact_of(bench: Bench, windows: Tensor, proxy: Tensor) -> Utility:
    """Alignment and Gram in float64; in float32 on a GPU, where float64 copies of large models do not fit."""
    score = opus(estimator="exact")
    if bench.shape.device == "cuda":
        return score(bench.problem, windows, proxy)
    model, optimizers = float64_copy(bench.model, [bench.optimizer])
    return score(Problem(model, optimizers), windows, proxy)


def fidelity(bench: Bench, effort: Effort, tick: Callable[[], Any]) -> dict[str, dict[str, list[float]]]:
    """Spearman of each estimator with the exact utilities, a value for each buffer of candidates.

    ``alignment``: with the exact alignment.  ``utility``: of U with the paper's weights, once the half of the
    selected with the best exact alignment is chosen, over the candidates left; only where there is a Gram.
    """
    found: dict[str, dict[str, list[float]]] = {e.name: {"alignment": [], "utility": []} for e in bench.estimators}
    whole: list[float] = []
    for buffer in range(effort.buffers):
        tokens, proxy = bench.candidates(buffer), bench.proxy(buffer)
        windows = tokens[:, : bench.shape.window].contiguous()
        exact = exact_of(bench, windows, proxy)
        first = exact.alignment.argsort(descending=True)[: max(1, bench.shape.selected // 2)].tolist()
        left = [n for n in range(len(tokens)) if n not in first]
        for e in bench.estimators:
            got = e.score(bench.problem, windows, proxy)
            found[e.name]["alignment"].append(rank_correlation(got.alignment, exact.alignment))
            if got.gram is not None:
                u = rank_correlation(got.marginal(first)[left], exact.marginal(first)[left])
                found[e.name]["utility"].append(u)
            tick()
        whole.append(rank_correlation(alignment_along(bench, tokens, proxy), exact.alignment))
        tick()
    return found | {"whole sequence": {"alignment": whole, "utility": []}}


def timings(bench: Bench, effort: Effort, tick: Callable[[], Any]) -> dict[str, list[float]]:
    """Seconds of each estimator, of the plain step and of the proxy's gradient alone, in turns."""
    tokens, proxy = bench.candidates(0), bench.proxy(0)
    windows = tokens[:, : bench.shape.window].contiguous()
    names, _ = bench.problem.scored()

    def narrow_proxy() -> None:
        with torch.autocast(bench.shape.device, torch.bfloat16):
            mean_gradient(bench.model, proxy, names)

    works: dict[str, Callable[[], Any]] = {
        "plain step": lambda: bench.plain_step(tokens[: bench.shape.selected]), "proxy gradient, bf16": narrow_proxy}
    for e in bench.estimators:
        works[e.name] = lambda e=e: e.score(bench.problem, windows, proxy)
    found: dict[str, list[float]] = {name: [] for name in works}
    order = list(works)
    for turn in range(effort.repeats + 1):
        for name in order[turn % len(order):] + order[: turn % len(order)]:
            seconds = bench.seconds(works[name])
            if turn:  # the first turn warms up
                found[name].append(seconds)
        tick()
    return found


def linearity(bench: Bench, effort: Effort, tick: Callable[[], Any]) -> list[dict[str, Any]]:
    """Seconds of exact alignment in bfloat16, candidates only, over a factor of candidates and of tokens."""
    names, _, directions = bench.problem.weighted(bench.proxy(0))
    base = max(1, bench.shape.candidates // 4)
    short = bench.shape.length // max(effort.factors)
    pool = torch.cat([bench.candidates(i) for i in range(2)])
    rows = []
    cases = [("candidates", f, pool[: base * f, : bench.shape.window]) for f in effort.factors]
    cases += [("tokens", f, pool[: base, : short * f]) for f in effort.factors]
    seconds: dict[tuple[str, int], list[float]] = {(axis, f): [] for axis, f, _ in cases}
    for _ in range(effort.repeats):
        for axis, factor, tokens in cases:
            def work(tokens: Tensor = tokens) -> None:
                with torch.autocast(bench.shape.device, torch.bfloat16):
                    streamed_alignment(bench.model, tokens.contiguous(), names, directions, microbatch=base,
                                       products=torch.bfloat16)
            seconds[axis, factor].append(bench.seconds(work))
        tick()
    for axis, factor, tokens in cases:
        rows.append({"axis": axis, "factor": factor, "value": statistics.median(seconds[axis, factor]),
                     "sequences": len(tokens), "tokens": tokens.shape[1]})
    return rows


def memories(bench: Bench, tick: Callable[[], Any]) -> dict[str, int]:
    """Counted peak bytes beyond model, optimizer state and data: of each estimator and of the plain step."""
    tokens, proxy = bench.candidates(0), bench.proxy(0)
    windows = tokens[:, : bench.shape.window].contiguous()
    found = {"plain step": peak_allocated(lambda: bench.plain_step(tokens[: bench.shape.selected]))}
    for e in bench.estimators:
        found[e.name] = peak_allocated(lambda e=e: e.score(bench.problem, windows, proxy))
        tick()
    return found


def measure(shape: Shape, effort: Effort, corpus: Corpus) -> list[dict[str, Any]]:
    """The record's rows; see the page for what each says."""
    bench = Bench(shape, corpus)
    count = len(bench.estimators)
    total = shape.updates + effort.buffers * (count + 1) + 2 * PROXY_EVERY + 3 * effort.repeats + 1 + count
    with tqdm(total=total, desc=f"shape {shape.name}", unit="unit") as bar:
        bench.train(shape.updates, bar.update)
        step = bench.updates
        ranks = fidelity(bench, effort, bar.update)
        bytes_ = memories(bench, bar.update)
        seconds = timings(bench, effort, bar.update)
        linear = linearity(bench, effort, bar.update)
        ages = staleness(bench, bar.update)
        small = shape.device == "cpu"  # whole candidates' factors, and many proxies at once, fit
        again = reuse(bench, effort.repeats, bar.update) if small else {}
        larger = aged_proxies(bench, bar.update) if small else {}
    plain = statistics.median(seconds["plain step"])

    def row(name: str, value: float, unit: str = "1", **keys: Any) -> dict[str, Any]:
        return {"step": step, "tokens_seen": step * shape.selected * shape.length, "split": "pool", "name": name,
                "unit": unit, "value": float(value), "shape": shape.name, **keys}

    rows = [row("plain step", plain, "s", dtype=shape.step_dtype, bytes=bytes_["plain step"],
                lowest=min(seconds["plain step"]), highest=max(seconds["plain step"])),
            row("whole sequence", statistics.fmean(ranks["whole sequence"]["alignment"]),
                lowest=min(ranks["whole sequence"]["alignment"]))]

    def cost(e: Estimator, ratio: float, **keys: Any) -> dict[str, Any]:
        a, u = ranks[e.name]["alignment"], ranks[e.name]["utility"]
        given = {"alignment": statistics.fmean(a), "alignment_lowest": min(a),
                 "utility": statistics.fmean(u) if u else None, "utility_lowest": min(u) if u else None,
                 "in_product": e.in_product, "dtype": e.dtype, "step_dtype": shape.step_dtype, "about": e.about,
                 "peak_ratio": bytes_[e.name] / bytes_["plain step"], "proxy_every": 1}
        return row("time ratio", ratio, **{"estimator": e.name, **given, **keys})

    for e in bench.estimators:
        ratios = [s / plain for s in seconds[e.name]]
        rows.append(cost(e, statistics.median(ratios), lowest=min(ratios), highest=max(ratios)))
    proxy = statistics.median(seconds["proxy gradient, bf16"])
    for e in bench.estimators:
        if e.name in STALE:
            saved = proxy * (1 - 1 / PROXY_EVERY) / plain
            ratios = [s / plain - saved for s in seconds[e.name]]
            rows.append(cost(e, statistics.median(ratios), lowest=min(ratios), highest=max(ratios),
                             estimator=f"{e.name}, proxy every {PROXY_EVERY} steps", proxy_every=PROXY_EVERY,
                             about=f"{(PROXY_EVERY - 1)}/{PROXY_EVERY} of the proxy's time taken off; mean over ages",
                             alignment=statistics.fmean(ages[e.name]), alignment_lowest=min(ages[e.name])))
    rows += [row("stale proxy", value, age=age, estimator=name)
             for name, values in ages.items() for age, value in enumerate(values)]
    rows += [row("aged proxy", value, age=age, proxies=size)
             for size, values in larger.items() for age, value in enumerate(values)]
    rows += [row("reuse", statistics.median(values) / plain, what=what) for what, values in again.items()]
    rows += [row("linearity", one.pop("value"), "s", **one) for one in linear]
    return rows


def record_of(shape: Shape, effort: Effort, corpus: Corpus, rows: list[dict[str, Any]], wall_s: float) -> dict:
    """The run record of a shape."""
    config = {"selector": "random", "optimizer": "adamw", "seed": 0, "shape": dataclasses.asdict(shape),
              "effort": {**dataclasses.asdict(effort), "factors": list(effort.factors)}}
    version = code_version()
    environment = provenance.environment(shape.device)
    return {
        "schema": schema.SCHEMA,
        "run_id": schema.run_id(EXPERIMENT, config, CORPUS.sha256, version),
        "experiment": EXPERIMENT, "scale": f"shape {shape.name}", "arm": None, "method": shape.about,
        "paper": {"arxiv": schema.ARXIV, "item": "overhead of 4.7 %", "row": None},
        "config": config,
        "deviations": ["text of pinned packages instead of FineWeb", f"model after {shape.updates} random updates"],
        "data": {**corpus_hashes(corpus), "suite_sha256": None, "selected_sha256": None},
        "code": {"version": version, **provenance.git_state()},
        "environment": environment,
        "timing": {"wall_s": wall_s, "train_s": 0.0, "select_s": 0.0, "eval_s": wall_s, "peak_bytes": peak_bytes()},
        "metrics": rows, "evals": [],
        "selection": {"offered": {}, "chosen": {}, "per_step": {name: [] for name in schema.PER_STEP}, "notes": []},
        "final": {"weights_sha256": None},
    }


def code_version() -> str:
    """Version of the core and of the benchmark's files but for the page's."""
    inside = [f"benchmarks/{path.name}" for path in sorted((ROOT / "benchmarks").glob("*.py"))
              if path.stem not in ("__init__", "frontier")]
    return hashing.text_sha256(f"{provenance.code_version()} {provenance.sources_sha256(ROOT, inside)}")


def write(results_dir: Path) -> list[Path]:
    """Page and figure from the records."""
    from .frontier import write as pages

    return pages(results_dir)


def main() -> int:
    """Exit code 0; 2 after one line about bad input; 130 on ctrl-C (nothing is written)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="A", help="what is scored (default: A)")
    parser.add_argument("--results", type=Path, default=None, metavar="FOLDER",
                        help="folder for the record, the page and the figure (default: results, results/ci for ci)")
    parser.add_argument("--repeats", type=int, default=Effort.repeats, help="turns of timing (default: %(default)s)")
    parser.add_argument("--buffers", type=int, default=Effort.buffers,
                        help="sets of candidates for the rank correlations (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch on a CPU (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be measured, and stop")
    options = parser.parse_args()
    for name in ("repeats", "buffers", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    shape = SHAPES[options.shape]
    folder = options.results or (ROOT / "results" / "ci" if shape.name == "ci" else ROOT / "results")
    try:
        results.check_writable(folder / "runs")
        print(f"shape {shape.name}: {shape.about}; {shape.updates} updates, {options.buffers} buffers of "
              f"{shape.candidates} candidates, {options.repeats} turns of {len(ESTIMATORS)} estimators")
        if options.dry_run:
            return 0
        shape.check_device()
        torch.set_num_threads(options.threads)
        effort = Effort(options.buffers, options.repeats)
        corpus = build_corpus(CORPUS)
        start = time.perf_counter()
        record = record_of(shape, effort, corpus, [], 0.0)
        if results.done(folder / "runs", record["run_id"]):
            print(f"{record['run_id']} is done; another number of repeats or buffers is another run")
        else:
            rows = measure(shape, effort, corpus)
            record = record_of(shape, effort, corpus, rows, time.perf_counter() - start)
            schema.validate(record)
            results.write(record, folder / "runs")
        for path in write(folder):
            print(f"wrote {path}")
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
