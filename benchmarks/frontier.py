"""The page of `benchmarks.scoring`: every estimator's cost and fidelity, and the frontier as a figure.

Pure functions of the records: the same records give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opus_bench import results
from opus_bench.figures import draw_panels
from opus_bench.schema import RecordError
from opus_bench.tables import markdown

EXPERIMENT = "scoring"
COMMAND = "python -m benchmarks.scoring"
NEARLY_ONE = 3e-4  # where a Spearman of 1 is drawn, as 1 - Spearman
TARGETS = (  # of shape A: what, bound of cost, bound of Spearman, bound of peak memory
    ("utilities at the cost of one plain step", 1.0, 0.995, 1.2),
    ("a cheap point", 0.35, 0.9, math.inf),
)
Rows = list[dict[str, Any]]


def newest(records: Sequence[dict]) -> list[dict]:
    """The last record of each shape, in the order of shapes."""
    last: dict[str, dict] = {}
    for record in sorted(records, key=lambda r: r["written_utc"]):
        last[record["scale"]] = record
    return [last[scale] for scale in sorted(last)]


def named(record: dict, name: str) -> Rows:
    """The record's rows of a name."""
    return [row for row in record["metrics"] if row["name"] == name]


def frontier(rows: Rows) -> list[str]:
    """Names of the estimators that no other beats in both cost and Spearman of the alignment, cheapest first."""
    kept, best = [], -math.inf
    for row in sorted(rows, key=lambda r: (r["value"], -r["alignment"])):
        if row["alignment"] > best:
            kept.append(row["estimator"])
            best = row["alignment"]
    return kept


def cost_table(record: dict) -> str:
    """A row each estimator, cheapest first; those on the frontier are marked."""
    rows = named(record, "time ratio")
    on = frontier(rows)
    reference = next(row["value"] for row in rows if row["estimator"] == "literal CountSketch")
    body = []
    for row in sorted(rows, key=lambda r: r["value"]):
        u = "–" if row["utility"] is None else f"{row['utility']:.4f} ({row['utility_lowest']:.4f})"
        body.append([
            ("**{}**" if row["estimator"] in on else "{}").format(row["estimator"]), row["dtype"],
            f"{row['value']:.3f} ({row['lowest']:.3f} to {row['highest']:.3f})", f"{reference / row['value']:.2f}",
            f"{row['alignment']:.4f} ({row['alignment_lowest']:.4f})", u, f"{row['peak_ratio']:.2f}",
            "yes" if row["in_product"] else "benchmark only"])
    return markdown(["estimator", "dtype of scoring", "cost / plain step (range)", "times faster than the literal",
                     "Spearman of alignment (lowest)", "Spearman of U (lowest)", "peak memory / plain step",
                     "in the product"], body)


def verdicts(record: dict) -> list[str]:
    """The targets of shape A against what was measured: reached by which, or missed by how much."""
    rows = named(record, "time ratio")
    said = []
    for what, cost, rank, memory in TARGETS:
        good = [r for r in rows if r["alignment"] >= rank and r["peak_ratio"] <= memory]
        best = min(good, key=lambda r: r["value"], default=None)
        bound = f"Spearman >= {rank}" + ("" if memory == math.inf else f" and peak <= {memory} of a plain step's")
        if best is None:
            said.append(f"- {what}, cost <= {cost} with {bound}: **missed**, no estimator ranks so well.")
        else:
            state = "reached" if best["value"] <= cost else "**missed**"
            said.append(f"- {what}, cost <= {cost} with {bound}: {state}; the cheapest is {best['estimator']} at "
                        f"{best['value']:.3f}, Spearman {best['alignment']:.4f}, peak {best['peak_ratio']:.2f} "
                        f"({best['dtype']} scoring over a {best['step_dtype']} step).")
    literal = next(r["value"] for r in rows if r["estimator"] == "literal CountSketch")
    exact = [r for r in rows if r["alignment"] >= 0.995]
    if exact:
        best = min(exact, key=lambda r: r["value"])
        state = "reached" if literal >= 2 * best["value"] else "**missed**"
        said.append(f"- twice as fast as the literal algorithm with Spearman >= 0.995: {state}; "
                    f"{best['estimator']} is {literal / best['value']:.2f} times as fast.")
    return [*said, where_time_goes(record)]


def where_time_goes(record: dict) -> str:
    """What bounds the cost from below: the proxy's fresh gradient and the tokens that must go forward."""
    rows = {row["estimator"]: row["value"] for row in named(record, "time ratio")}
    name, shape = "central difference, bf16", record["config"]["shape"]
    stale = next(row for row in named(record, "time ratio") if row["estimator"].startswith(f"{name}, proxy every"))
    proxy = (rows[name] - stale["value"]) * stale["proxy_every"] / (stale["proxy_every"] - 1)
    scored = (shape["candidates"] + shape["proxies"]) * shape["window"]
    return (f"- where the time goes: the proxy's fresh gradient alone takes {proxy:.2f} of a plain step in bfloat16, "
            f"two forwards of the candidates and moving the weights the other {rows[name] - proxy:.2f}. {scored:,} "
            f"tokens are scored for {shape['selected'] * shape['length']:,} trained on, and on this processor a "
            f"bfloat16 pass is less than twice as fast as float32. A proxy gradient that serves several steps is "
            f"cheaper; what that loses depends on the moment in training (the two tables below).")


def linear_table(record: dict) -> str:
    """Time of exact alignment over a factor of 8, and what a linear cost would be."""
    rows = named(record, "linearity")
    first = {r["axis"]: r["value"] for r in rows if r["factor"] == 1}
    body = [[r["axis"], f"{r['sequences']} x {r['tokens']}", f"{r['value'] * 1e3:.0f}",
             f"{r['value'] / first[r['axis']]:.2f}", str(r["factor"])] for r in rows]
    return markdown(["grows", "candidates x tokens", "ms", "times the smallest", "if linear"], body)


def stale_table(record: dict) -> str:
    """Spearman by age of the proxy's gradient."""
    rows = named(record, "stale proxy")
    ages = sorted({r["age"] for r in rows})
    body = [[name, *(f"{r['value']:.3f}" for r in rows if r["estimator"] == name)]
            for name in dict.fromkeys(r["estimator"] for r in rows)]
    return markdown(["estimator", *(f"{age} steps" for age in ages)], body)


def aged_table(record: dict) -> str:
    """Spearman by size and age of the proxy batch with what much more proxies say."""
    rows = named(record, "aged proxy")
    ages = sorted({r["age"] for r in rows})
    body = [[f"{size}, once in {len(ages)} steps", *(f"{r['value']:.3f}" for r in rows if r["proxies"] == size)]
            for size in dict.fromkeys(r["proxies"] for r in rows)]
    return markdown(["proxies", *(f"{age} steps" for age in ages)], body)


def reuse_line(record: dict) -> str:
    """What using the chosen samples' backward for training saves, beside what it costs to have it."""
    cost = {row["what"]: row["value"] for row in named(record, "reuse")}
    capture, assemble, plain = cost.values()
    return (f"Where whole sequences are scored, the chosen ones' backward need not be run again: their training "
            f"gradient, assembled from the factors that scoring kept, takes {assemble:.2f} of a plain step instead of "
            f"{plain:.2f}. But scoring all candidates whole and keeping their factors takes {capture:.2f}, and their "
            f"memory grows with the number of candidates; the {plain - assemble:.2f} saved do not pay for that.")


def draw(record: dict, path: Path) -> Path:
    """Cost against 1 - Spearman, logarithmic; down and to the left is better."""
    rows = sorted(named(record, "time ratio"), key=lambda r: r["value"])
    on = frontier(rows)
    best = [r for r in rows if r["estimator"] in on]

    def y(row: dict) -> float:
        return max(NEARLY_ONE, 1 - row["alignment"])

    def fill(figure, axes) -> None:
        axis = axes[0, 0]
        axis.plot([r["value"] for r in best], [y(r) for r in best], color="#0072b2", linewidth=1.2, zorder=1)
        for number, row in enumerate(rows, start=1):
            colour = "#0072b2" if row["estimator"] in on else "#7f7f7f"
            marker = "s" if row["dtype"] == "bfloat16" else "o"
            axis.plot(row["value"], y(row), marker, color=colour, zorder=2,
                      markerfacecolor=colour if row["in_product"] else "white")
            axis.annotate(str(number), (row["value"], y(row)), xytext=(4, 4), textcoords="offset points", fontsize=8)
        axis.set_yscale("log")
        axis.set_xlabel("cost of scoring / plain training step")
        axis.set_ylabel("1 - Spearman with exact alignment")
        axis.axvline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
        side = axes[0, 1]
        side.axis("off")
        side.text(0, 1, "\n".join(f"{i}  {r['estimator']}" for i, r in enumerate(rows, start=1)), fontsize=8, va="top")

    note = ("Squares: scored in bfloat16; open: only in the benchmark; blue: no other is cheaper and ranks better.\n"
            f"A Spearman above {1 - NEARLY_ONE:.4f} is drawn there. Mean over buffers; medians of turns.")
    return draw_panels(path, f"Cost against fidelity, {record['scale']}", note, fill, columns=2, size=(9.5, 4.4),
                       width_ratios=(3, 2))


def write(results_dir: Path) -> list[Path]:
    """results/tables/scoring.md and a figure for each shape.

    Raises:
        RecordError: no records.
    """
    records = newest(results.load(results_dir / "runs", EXPERIMENT))
    if not records:
        raise RecordError(f"no records of {EXPERIMENT}; make them with `{COMMAND}`")
    blocks = ["# Cost of scoring, and what it buys",
              f"Made by `{COMMAND}`; cost is the time of a whole scoring (proxy gradient, P_t, candidates) over that "
              "of one plain forward, backward, clipping and optimizer step of the selected sequences, in one process "
              "and in turns. Exact: float64, all tokens of the window, this step's proxy batch. U: once half of the "
              "selected are chosen, the paper's weights. Bold: on the frontier of cost and Spearman of alignment. "
              "Memory is counted from every allocation, beyond weights, optimizer state and data. Small models: "
              "costs depend on the machine, fidelity on the training state."]
    paths = []
    for record in records:
        shape = record["config"]["shape"]
        plain, whole = named(record, "plain step")[0], named(record, "whole sequence")[0]
        path = draw(record, results_dir / "figures" / f"scoring_{shape['name']}.svg")
        paths.append(path)
        blocks += [f"## Shape {shape['name']}: {shape['about']}",
                   f"{shape['layers']} layers of width {shape['width']}, vocabulary {shape['vocabulary']:,}; "
                   f"{shape['candidates']} candidates and {shape['proxies']} proxies of {shape['window']} tokens, "
                   f"{shape['selected']} sequences of {shape['length']:,} trained on. Plain step in {plain['dtype']}: "
                   f"{plain['value']:.3f} s ({plain['lowest']:.3f} to {plain['highest']:.3f}), counted peak "
                   f"{plain['bytes'] / 1e6:.0f} MB. {record['environment']['cpu']}, "
                   f"{record['environment']['device']}, {record['environment']['threads']} threads.",
                   f"![cost against fidelity](../figures/{path.name})", cost_table(record)]
        if shape["name"] == "A":
            blocks += ["Targets:", "\n".join(verdicts(record))]
        blocks += [f"The window is the larger error: exact alignment over whole sequences has Spearman "
                   f"{whole['value']:.3f} (lowest {whole['lowest']:.3f}) with that over the window.",
                   "### Age of the proxy's gradient",
                   "Spearman with the exact alignment along the fresh gradient of the same proxy batch:",
                   stale_table(record)]
        if named(record, "aged proxy"):
            blocks += ["Spearman with the alignment along the fresh gradient of sixteen other proxy batches together, "
                       "which stands for the target that a proxy batch samples; a batch eight times as large, kept for "
                       "eight steps, reads as many proxy tokens a step as the usual one taken anew (its first column):",
                       aged_table(record), "### A backward used twice", reuse_line(record)]
        blocks += ["### Is the cost linear?",
                   "Exact alignment in bfloat16, candidates only, microbatches of the smallest size:",
                   linear_table(record)]
    listed = [[r["scale"], r["code"]["version"][:12], f"[{r['run_id']}](../runs/{r['run_id']}.json)"] for r in records]
    blocks += ["## Runs", markdown(["shape", "code version", "run"], listed)]
    page = results_dir / "tables" / f"{EXPERIMENT}.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join(block.strip("\n") for block in blocks) + "\n", encoding="utf-8", newline="\n")
    return [page, *paths]
