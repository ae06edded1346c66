"""Do the intervals and tests keep their promise with few seeds?  Measured on synthetic values, beside what they say.

    python -m reproduce.coverage             # about a minute on one core; 1,000 trials a cell
    python -m reproduce.coverage --trials 50 # exercises the code
    python -m reproduce.coverage --dry-run   # prints what it would do and stops

Writes a run record and results/tables/coverage.md.  A record that is there is not made again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import scipy
from tqdm import tqdm

from opus_bench import hashing, provenance, results, schema
from opus_bench.schema import RecordError
from opus_bench.significance import (
    ALPHA,
    BOOTSTRAPS,
    POWER,
    bootstrap_interval,
    detectable_difference,
    item_difference,
    sign_flip_test,
    smallest_sign_flip_p,
)
from opus_bench.statistics import CONFIDENCE, Interval, binomial_stderr, mean_interval
from opus_bench.tables import MARK, NONE, markdown

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = "coverage"
TITLE = "Coverage of intervals and size of tests with few seeds"
COMMAND = f"python -m reproduce.{EXPERIMENT}"
SOURCES = ("opus_bench/statistics.py", "opus_bench/significance.py", "reproduce/coverage.py")
TRIALS, RESAMPLES, SEED = 1_000, 999, 0
FIVE_SIGMA = 5
SIZES = (3, 5, 10, 20)  # seeds, for intervals
FLIP_SIZES = (3, 5, 6, 10)  # seeds, for the sign-flip test: 6 is the least that can reject at .05
POWER_SIZES = (2, 3, 4, 5, 8, 10, 20)
DISTRIBUTIONS: dict[str, tuple[Callable[[np.random.Generator, int], np.ndarray], float]] = {  # draw, mean
    "normal": (lambda rng, n: rng.normal(size=n), 0.0),
    "heavy-tailed (t, 3 degrees)": (lambda rng, n: rng.standard_t(3, size=n), 0.0),
    "skewed (exponential)": (lambda rng, n: rng.exponential(size=n), 1.0),
}
ITEM_CASES = ((104, 0.2), (104, 0.5), (1000, 0.2))  # items, share of them that the two models answer differently
Cell = tuple[str, str, str, int]  # what, method, of what, n


def cells() -> list[Cell]:
    """Everything that is measured, in order."""
    intervals = [("interval", method, name, n) for method in ("Student's t", *BOOTSTRAPS) for name in DISTRIBUTIONS
                 for n in SIZES]
    flips = [("test", "sign flip", name, n) for name in DISTRIBUTIONS for n in FLIP_SIZES]
    return intervals + flips + [("test", "McNemar", f"{share:g} answered differently", n) for n, share in ITEM_CASES]


def interval_of(method: str, values: np.ndarray, rng: np.random.Generator) -> Interval:
    """The 95 % interval of a method."""
    return mean_interval(values) if method == "Student's t" else bootstrap_interval(values, rng, method,
                                                                                   resamples=RESAMPLES)


def measured(cell: Cell, trials: int) -> float:
    """Share of trials whose interval covers the mean, or whose test rejects a true null; a function of the cell."""
    rng = np.random.default_rng([SEED, cells().index(cell)])
    what, method, name, n = cell
    hits = 0
    for _ in range(trials):
        if method == "McNemar":
            share = next(share for items, share in ITEM_CASES if name.startswith(f"{share:g} ") and items == n)
            differ, ours = rng.random(n) < share, rng.random(n) < 0.5
            hits += item_difference(ours, ours ^ differ).p_value <= ALPHA
            continue
        draw, mean = DISTRIBUTIONS[name]
        values = draw(rng, n)
        if what == "interval":
            hits += not interval_of(method, values, rng).excludes(mean)
        else:
            hits += sign_flip_test(values - mean) <= ALPHA
    return hits / trials


def record_of(trials: int, rows: list[dict], wall_s: float) -> dict:
    """The run record."""
    config = {"selector": "none", "optimizer": "none", "seed": SEED, "trials": trials, "resamples": RESAMPLES}
    version, data = provenance.sources_sha256(ROOT, SOURCES), hashing.text_sha256("synthetic")
    return {
        "schema": schema.SCHEMA, "run_id": schema.run_id(EXPERIMENT, config, data, version), "experiment": EXPERIMENT,
        "scale": "synthetic", "arm": None, "method": "intervals and tests",
        "paper": {"arxiv": schema.ARXIV, "item": "no item of the paper", "row": None},
        "config": config, "deviations": ["synthetic values: nothing is trained"],
        "data": {"spec_sha256": data, "train_sha256": None, "proxy_sha256": None, "tokenizer_sha256": None,
                 "suite_sha256": None, "selected_sha256": None, "target_domain": "synthetic"},
        "code": {"version": version, **provenance.git_state()},
        "environment": {**provenance.environment(), "scipy": scipy.__version__},
        "timing": {"wall_s": wall_s, "train_s": 0.0, "select_s": 0.0, "eval_s": wall_s, "peak_bytes": None},
        "metrics": rows, "evals": [],
        "selection": {"offered": {}, "chosen": {}, "per_step": {name: [] for name in schema.PER_STEP}, "notes": []},
        "final": {"weights_sha256": None},
    }


def make(results_dir: Path, trials: int) -> dict:
    """The record: read if it is there, measured and written otherwise."""
    started = time.perf_counter()
    path = results.record_path(results_dir / "runs", record_of(trials, [], 0.0)["run_id"])
    if path.exists():
        return results.read(path)
    rows = []
    for cell in tqdm(cells(), unit="cell", disable=None):
        what, method, name, n = cell
        rows.append({"step": 0, "tokens_seen": 0, "split": "synthetic", "name": what, "unit": "share of trials",
                     "value": measured(cell, trials), "method": method, "of": name, "n": n,
                     "nominal": CONFIDENCE if what == "interval" else ALPHA})
    record = record_of(trials, rows, time.perf_counter() - started)
    results.write(record, results_dir / "runs")
    return record


def shown(row: dict, trials: int) -> str:
    """A measured share as a cell in percent; marked where it breaks the promise by more than five standard errors."""
    off = row["value"] - row["nominal"] if row["name"] == "test" else row["nominal"] - row["value"]
    broken = off > FIVE_SIGMA * binomial_stderr(row["nominal"], trials)
    return f"{100 * row['value']:.1f}{MARK if broken else ''}"


def share_table(rows: Sequence[dict], trials: int) -> str:
    """Measured shares by method and kind of values, a column for each n."""
    sizes = sorted({row["n"] for row in rows})
    lines = []
    for method, name in dict.fromkeys((row["method"], row["of"]) for row in rows):
        mine = {row["n"]: row for row in rows if (row["method"], row["of"]) == (method, name)}
        nominal = next(iter(mine.values()))["nominal"]
        lines.append([method, name, f"{100 * nominal:g}",
                      *(shown(mine[n], trials) if n in mine else NONE for n in sizes)])
    return markdown(["method", "values", "says (%)", *(f"n = {n:,} (%)" for n in sizes)], lines)


def power_table() -> str:
    """What n seeds can show: computed, not measured."""
    lines = [[str(n), f"{detectable_difference(1.0, n):.2f}", f"{smallest_sign_flip_p(n):.2g}"] for n in POWER_SIZES]
    return markdown(["seeds", f"difference detected with {100 * POWER:g} % power (sd of a paired difference)",
                     "least p of the sign-flip test"], lines)


def page(record: dict) -> str:
    """The page in markdown; the same record gives the same bytes."""
    trials = record["config"]["trials"]
    errors = [100 * binomial_stderr(nominal, trials) for nominal in (CONFIDENCE, ALPHA)]
    of = {what: [row for row in record["metrics"] if row["name"] == what] for what in ("interval", "test")}
    few, [least] = min(SIZES), [row for row in of["interval"] if row["method"] == "percentile"
                                and row["of"] == "normal" and row["n"] == min(SIZES)]
    first = next(n for n in range(1, 20) if smallest_sign_flip_p(n) <= ALPHA)
    parts = [
        f"# {TITLE}",
        f"Made by `{COMMAND}`: {trials:,} trials a cell, {record['config']['resamples']:,} bootstrap resamples, "
        f"synthetic values, seed {record['config']['seed']}.",
        f"A measured share has a standard error of {max(errors):.1f} points where the promise is kept; `{MARK}` marks "
        f"one that breaks it by more than {FIVE_SIGMA} of them (an interval that covers too seldom, a test that "
        f"rejects too often). Tables of this suite use Student's t.",
        f"With {few} values the percentile bootstrap can do no better than their range, which holds the mean of a "
        f"symmetric distribution in {100 * (1 - 0.5 ** (few - 1)):g} % of cases ({100 * least['value']:.1f} % here). "
        f"The sign-flip test assumes symmetry alone and never rejects at {ALPHA:.2g} below {first} seeds.",
        "## Intervals: share that covers the mean", share_table(of["interval"], trials),
        "## Tests: share of true nulls rejected",
        "Seeds for the sign-flip test, items for McNemar's. A discrete test may reject more seldom than it says.",
        share_table(of["test"], trials),
        "## What n seeds can show",
        f"By the paired t test, two-sided at {ALPHA:.2g}, from the noncentral t distribution.", power_table(),
        "## Run",
        markdown(["numpy", "scipy", "seconds", "code version", "run"],
                 [[record["environment"]["numpy"], record["environment"]["scipy"], f"{record['timing']['wall_s']:.0f}",
                   record["code"]["version"][:12], f"[{record['run_id']}](../runs/{record['run_id']}.json)"]]),
    ]
    return "\n\n".join(parts) + "\n"


def write(results_dir: Path) -> list[Path]:
    """results/tables/coverage.md from the record with most trials, of those the newest.

    Raises:
        RecordError: no record.
    """
    records = results.load(results_dir / "runs", EXPERIMENT)
    if not records:
        raise RecordError(f"no records of {EXPERIMENT}; make one with `{COMMAND}`")
    best = max(records, key=lambda r: (r["config"]["trials"], r["written_utc"], r["run_id"]))
    path = results_dir / "tables" / f"{EXPERIMENT}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(best), encoding="utf-8", newline="\n")
    return [path]


def main() -> int:
    """Exit code 0, 2 after one line about bad input, 130 on ctrl-C (nothing is written)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=TRIALS, help="trials of each cell (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="FOLDER",
                        help="folder that gets runs/ and tables/ (default: results)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be measured, and stop")
    options = parser.parse_args()
    try:
        if options.trials < 1:
            raise ValueError(f"--trials must be at least 1, got {options.trials}")
        print(f"{len(cells())} cells of {options.trials:,} trials")
        if options.dry_run:
            return 0
        results.check_writable(options.results / "runs")
        make(options.results, options.trials)
        paths = write(options.results)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        return 130
    for path in paths:
        print(f"wrote {os.path.relpath(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
