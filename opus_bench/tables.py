"""The tables of a section as markdown: pure functions of its records and of the paper's cells.

A mean over seeds stands alone; a difference to Random is paired by seed and carries its interval,
or the seeds themselves where there are too few for one (`statistics`).
"""
from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from opus_bench.figures import OPTIMIZERS
from opus_bench.schema import NOT_RUN
from opus_bench.sections import (
    BASE,
    FOREIGN,
    Row,
    Section,
    corrupted_domains,
    domain_share,
    evaluated,
    final_loss,
    loss_curve,
    pairs,
    step_mean,
    time_ratio,
)
from opus_bench.significance import ALPHA, POWER, detectable_difference, holm, paired_t_test
from opus_bench.statistics import (
    SMALLEST_N,
    Interval,
    binomial_stderr,
    paired_interval,
    paired_ratio_interval,
    tokens_to_reach,
)

PAPER_MODEL, PAPER_CORPUS = "GPT-2 XL", "FineWeb"
PAPER_MODELS = ("GPT-2 Large", "GPT-2 XL")
PAPER_TASKS = ("MMLU", "ANLI", "HellaSwag", "PIQA", "SIQA", "WinoGrande", "ARC-E", "ARC-C", "CommonsenseQA", "WSC")
TASK_NAMES = {"socialiqa": "SIQA", "arceasy": "ARC-E", "arcchallenge": "ARC-C", "csqa": "CommonsenseQA"}
MEAN_ACCURACY = "mean_accuracy"
BITS_PER_BYTE = "bits_per_byte_"
REASON_LENGTH = 48
MARK, HOLM_MARK, NONE = "*", "**", "–"


# Cells ----------------------------------------------------------------------------------------


def mean(values: Sequence[float], digits: int, factor: float = 1.0, unit: str = "") -> str:
    """The mean as a cell; a dash where there are no values."""
    return f"{factor * math.fsum(values) / len(values):.{digits}f}{unit}" if values else NONE


def _limits(interval: Interval, points: Sequence[float], none: float, style: str, mark: str = MARK) -> str:
    if interval.low is None:
        return f"{interval.mean:{style}} {{{', '.join(f'{point:{style}}' for point in points)}}}"
    mark = mark if interval.excludes(none) else ""
    return f"{interval.mean:{style}} [{interval.low:{style}}, {interval.high:{style}}]{mark}"


def difference(
    row: Row, base: Row | None, value: Callable, digits: int, factor: float = 1.0, mark: str = MARK
) -> str:
    """Row minus base, paired by seed, as a cell: with its interval, or the seeds where there are too few for one.

    ``mark`` stands behind an interval that excludes 0.
    """
    if base is None or row is base:
        return NONE
    ours, theirs = ([factor * item for item in side] for side in pairs(row, base, value))
    if not ours:
        return NONE
    points = [a - b for a, b in zip(ours, theirs, strict=True)]
    return _limits(paired_interval(ours, theirs), points, 0.0, f"+.{digits}f", mark)


def _short_difference(row: Row, base: Row | None, value: Callable, digits: int) -> str:
    if base is None or row is base:
        return ""
    ours, theirs = pairs(row, base, value)
    if not ours:
        return ""
    interval = paired_interval(ours, theirs)
    half = "" if interval.low is None else f" ± {interval.high - interval.mean:.{digits}f}"
    return f" ({interval.mean:+.{digits}f}{half}{MARK if interval.excludes(0.0) else ''})"


def token_share(row: Row, base: Row | None) -> str:
    """Update tokens to random's final loss over random's tokens; seeds that never get there stay visible."""
    if base is None:
        return NONE
    if row is base:
        return "1 by definition"
    reached, available, censored = [], [], []
    for seed in sorted(row.records.keys() & base.records.keys()):
        (tokens, losses), (base_tokens, base_losses) = loss_curve(row.records[seed]), loss_curve(base.records[seed])
        if tokens and base_tokens:
            needed = tokens_to_reach(tokens, losses, base_losses[-1])
            if math.isfinite(needed):
                reached.append(needed)
                available.append(base_tokens[-1])
            else:
                censored.append(tokens[-1])
    if not reached and not censored:
        return NONE
    shares = [ours / theirs for ours, theirs in zip(reached, available, strict=True)]
    if censored:
        short = f"not reached in {max(censored):,} tokens"
        if not reached:
            return short
        shown = ", ".join(f"{share:.3f}" for share in shares)
        return f"{{{shown}}}; {short} by {len(censored)} of {len(censored) + len(reached)} seeds"
    if min(shares) <= 0:
        return f"{{{', '.join(f'{share:.3f}' for share in shares)}}}"
    return _limits(paired_ratio_interval(reached, available), shares, 1.0, ".3f")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; bars inside cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


# The tables -----------------------------------------------------------------------------------


def paper_cells(path: str | Path) -> dict[tuple[str, ...], float]:
    """The paper's cells: (table, model, optimizer, corpus, method, benchmark) -> value, optimizer in lower case."""
    with open(path, encoding="utf-8", newline="") as file:
        keys = ("table", "model", "optimizer", "corpus", "method", "benchmark")
        lines = [line | {"optimizer": line["optimizer"].lower()} for line in csv.DictReader(file)]
    return {tuple(line[key] for key in keys): float(line["value"]) for line in lines}


def paper_model(section: Section) -> str:
    """The paper's model whose numbers stand beside the section's."""
    return section.setting if section.setting in PAPER_MODELS else PAPER_MODEL


def _paper_value(reported: dict, section: Section, method: str | None, benchmark: str) -> str:
    value = reported.get(("3", paper_model(section), section.optimizer.lower(), PAPER_CORPUS, method, benchmark))
    return NONE if value is None else f"{value:.2f}"


def odd_averages(reported: dict, model: str, optimizer: str, methods: Iterable[str | None]) -> list[str]:
    """A sentence on each of the paper's printed means that its ten cells, however rounded, do not have.

    Two numbers of two decimals that are rounded from one may differ by 0.01; `reproduce.audit` looks at all tables.
    """
    def both(method: str | None) -> tuple[float, float] | None:
        found = [reported.get(("3", model, optimizer.lower(), PAPER_CORPUS, method, name))
                 for name in ("Avg", *PAPER_TASKS)]
        return None if None in found else (found[0], math.fsum(found[1:]) / len(PAPER_TASKS))

    said, random = [], both(BASE)
    for method in dict.fromkeys(methods):
        means = both(method)
        if means and random and abs(means[0] - means[1]) > 0.01 + 1e-9:
            printed, cells = means
            said.append(f"The paper prints {printed:.2f} as the mean of {method} under {model}, "
                        f"{OPTIMIZERS.get(optimizer.lower(), optimizer)}; its own ten cells average {cells:.2f}, which "
                        f"is {cells - random[1]:+.2f} against Random's, not {printed - random[0]:+.2f}.")
    return said


def suite_title(section: Section) -> str:
    """The offline suite's column, with its items."""
    items = sorted({row["n_samples"] for record in section.records for row in record["evals"]
                    if row["task"] == MEAN_ACCURACY and row.get("value") is not None})
    return "offline suite (%)" + (f", n = {' or '.join(f'{n:,}' for n in items)} items" if items else "")


def _paired_differences(section: Section, value: Callable) -> dict[str, list[float]]:
    """Label -> differences to the base by seed, for the rows that have enough of them for an interval."""
    if section.base is None:
        return {}
    found = {row.label: pairs(row, section.base, value) for row in section.rows if row is not section.base}
    return {label: [a - b for a, b in zip(ours, theirs, strict=True)] for label, (ours, theirs) in found.items()
            if len(ours) >= SMALLEST_N}


def surviving(section: Section, value: Callable, family: Sequence[Section]) -> set[str]:
    """Labels whose paired difference to the base excludes 0 also after Holm's correction over the family's rows."""
    differences = {(one.key, label): of_row for one in family
                   for label, of_row in _paired_differences(one, value).items()}
    adjusted = holm([paired_t_test(of_row) for of_row in differences.values()])
    return {label for (key, label), p in zip(differences, adjusted, strict=True) if key == section.key and p <= ALPHA}


def versions(sections: Sequence[Section]) -> str:
    """The code that made the records of sections."""
    return ", ".join(sorted({record["code"]["version"][:12] for section in sections for record in section.records}))


def power_line(section: Section) -> str:
    """What the seeds can show: the difference to the base in loss that would be detected, by each row's own spread."""
    differences = _paired_differences(section, final_loss)
    found = {label: detectable_difference(sd, len(differences[label])) for label, sd in
             ((label, float(np.std(of_row, ddof=1))) for label, of_row in differences.items()) if sd > 0}
    if not found:
        return f"Fewer than {SMALLEST_N} pairs of seeds that differ: no statement of what they could detect."
    least, most = min(found, key=lambda label: found[label]), max(found, key=lambda label: found[label])
    seeds = sorted({len(differences[label]) for label in found})
    return (f"What n = {' or '.join(map(str, seeds))} seeds can show: a difference to {section.base.label} of "
            f"{np.median(list(found.values())):.3f} nat/token (median over methods; {found[least]:.3f} for {least} to "
            f"{found[most]:.3f} for {most}) is detected with {100 * POWER:g} % power at .05, two-sided, if the paired "
            "differences are normal with the standard deviation seen, which so few seeds know only roughly.")


def summary(section: Section, reported: dict, family: Sequence[Section] | None = None) -> str:
    """One row a method: loss, tokens, accuracy, cost and what was chosen.

    Args:
        family: sections over whose rows Holm's correction goes; by default this one.
    """
    target = section.records[0]["data"]["target_domain"]
    survivors = surviving(section, final_loss, family or [section])
    header = [
        "method",
        "n seeds",
        f"validation loss on {target} (nat/token)",
        "difference to Random (nat/token)",
        "update tokens to Random's final loss (share of Random's)",
        suite_title(section),
        "difference to Random (points)",
        "select / train time",
        "effective sample size (share of buffer)",
        f"{target}: chosen / offered (%)",
        "corrupted: chosen / offered (%)",
        f"the paper's own: mean of its ten tasks, {paper_model(section)}, {PAPER_CORPUS} (%)",
    ]
    lines = []
    for row in section.rows:
        uniform = row.values(step_mean("effective_sample_size"))

        def shares(domains: Callable, row: Row = row) -> str:
            chosen = mean(row.values(domain_share("chosen", domains)), 1, 100)
            return f"{chosen} / {mean(row.values(domain_share('offered', domains)), 1, 100)}"

        lines.append(
            [
                row.label + FOREIGN * row.foreign,
                str(len(row.records)),
                mean(row.values(final_loss), 4),
                difference(row, section.base, final_loss, 4, mark=HOLM_MARK if row.label in survivors else MARK),
                token_share(row, section.base),
                mean(row.values(evaluated(MEAN_ACCURACY)), 2, 100),
                difference(row, section.base, evaluated(MEAN_ACCURACY), 2, 100),
                mean(row.values(time_ratio), 1, 100, " %"),
                mean(uniform, 4) if uniform else "none: deterministic",
                shares(lambda record: [record["data"]["target_domain"]]),
                shares(corrupted_domains),
                _paper_value(reported, section, row.paper_row, "Avg"),
            ]
        )
    return markdown(header, lines)


def brief(section: Section, reported: dict) -> str:
    """The columns of `summary` that fit a README."""
    target = section.records[0]["data"]["target_domain"]
    header = [
        "method",
        f"loss on {target} (nat/token)",
        "difference to Random",
        "update tokens to Random's final loss, share",
        suite_title(section),
        "select / train time",
        "effective sample size, share",
        f"the paper's mean (%), {paper_model(section)}",
    ]
    lines = [
        [
            row.label,
            mean(row.values(final_loss), 3),
            difference(row, section.base, final_loss, 3),
            token_share(row, section.base),
            mean(row.values(evaluated(MEAN_ACCURACY)), 1, 100),
            mean(row.values(time_ratio), 0, 100, " %"),
            mean(row.values(step_mean("effective_sample_size")), 4),
            _paper_value(reported, section, row.paper_row, "Avg"),
        ]
        for row in section.rows
    ]
    return markdown(header, lines)


def _task_rows(section: Section, wanted: Callable[[str], bool]) -> dict[str, list[dict]]:
    """The evaluation rows of each wanted task that has a value somewhere, tasks in order of appearance."""
    found = defaultdict(list)
    for record in section.records:
        for row in record["evals"]:
            if wanted(row["task"]) and row.get("value") is not None:
                found[row["task"]].append(row)
    return found


def _paper_task(task: str) -> str | None:
    plain = re.sub(r"[^a-z0-9]", "", task.lower().removeprefix("paper_"))
    names = {re.sub(r"[^a-z0-9]", "", name.lower()): name for name in PAPER_TASKS} | TASK_NAMES
    return names.get(plain)


def _is_offline(task: str) -> bool:
    return task != MEAN_ACCURACY and not task.startswith(BITS_PER_BYTE) and not _paper_task(task)


def offline(section: Section) -> str:
    """Accuracy on each task of the offline suite, below chance and the best rule without a model."""
    tasks = _task_rows(section, _is_offline)
    header = ["method", *(f"{task} (n = {rows[0]['n_samples']})" for task, rows in tasks.items())]

    def percent(value: float | None) -> str:
        return NONE if value is None else f"{100 * value:.1f}"

    lines = [
        ["chance", *(percent(rows[0].get("chance")) for rows in tasks.values())],
        ["best surface baseline"]
        + [f"{percent(rows[0].get('surface'))} {rows[0].get('surface_name') or ''}".strip() for rows in tasks.values()],
    ]
    for row in section.rows:
        line = [row.label + FOREIGN * row.foreign]
        for task in tasks:
            value = evaluated(task)
            errors = [_stderr(item) for record in row.records.values() for item in record["evals"]
                      if item["task"] == task and item.get("value") is not None]
            change = difference(row, section.base, value, 4)
            spread = f" ({mean(errors, 1, 100)})" if errors else ""
            line.append(mean(row.values(value), 1, 100) + spread + MARK * change.endswith(MARK))
        lines.append(line)
    return markdown(header, lines)


def _stderr(row: dict) -> float:
    return row["stderr"] if row["stderr"] is not None else binomial_stderr(row["value"], row["n_samples"])


def bits(section: Section) -> str:
    """Bits per byte of each domain, with the difference to Random."""
    tasks = sorted(_task_rows(section, lambda task: task.startswith(BITS_PER_BYTE)))
    header = ["domain", *(row.label + FOREIGN * row.foreign for row in section.rows)]
    lines = [
        [task.removeprefix(BITS_PER_BYTE)]
        + [
            mean(row.values(evaluated(task)), 3) + _short_difference(row, section.base, evaluated(task), 3)
            for row in section.rows
        ]
        for task in tasks
    ]
    return markdown(header, lines)


def paper_tasks(section: Section, reported: dict) -> str:
    """The paper's ten tasks, ours beside the paper's; what was not run says why."""
    columns = [(row.label, row.paper_row, row) for row in section.rows if row.paper_row]
    there = {paper_row for _, paper_row, _ in columns}
    key = ("3", paper_model(section), section.optimizer.lower(), PAPER_CORPUS)
    others = list(dict.fromkeys(cell[4] for cell in reported if cell[:4] == key and cell[4] not in there))
    columns += [(method, method, None) for method in others]
    lines = [
        [label + FOREIGN * bool(row and row.foreign)]
        + [f"{_ours(row, task)} | {_paper_value(reported, section, method, task)}" for task in PAPER_TASKS]
        for label, method, row in columns
    ]
    return markdown(["method", *PAPER_TASKS], lines)


def _ours(row: Row | None, task: str) -> str:
    if row is None:
        return f"{NOT_RUN}no run of this method"
    items = [item for record in row.records.values() for item in record["evals"] if _paper_task(item["task"]) == task]
    values = [item["value"] for item in items if item.get("value") is not None]
    if values:
        other = sorted({item["n_samples"] for item in items
                        if item.get("n_paper") not in (None, item.get("n_samples"))})
        return mean(values, 2, 100) + (f" ({', '.join(map(str, other))} items, not the paper's)" if other else "")
    status = next((item["status"] for item in items), f"{NOT_RUN}not in the records")
    return status if len(status) <= REASON_LENGTH else status[: REASON_LENGTH - 1] + "…"


def runs(section: Section) -> str:
    """Every run with its time, memory and code, and their sums."""
    header = ["run", "method", "seed", "wall s", "train s", "select s", "eval s", "peak MiB", "code", "commit"]
    lines = []
    for row in section.rows:
        for seed, record in sorted(row.records.items()):
            timing, code = record["timing"], record["code"]
            peak = timing["peak_bytes"]
            lines.append(
                [
                    f"[{record['run_id']}](../runs/{record['run_id']}.json)",
                    row.label + FOREIGN * row.foreign,
                    str(seed),
                    *(f"{timing[name]:.1f}" for name in ("wall_s", "train_s", "select_s", "eval_s")),
                    NONE if peak is None else f"{peak / 2**20:.0f}",
                    code["version"][:12],
                    f"{(code['commit'] or NONE)[:12]}{' + changes' if code['dirty'] else ''}",
                ]
            )
    wall = math.fsum(record["timing"]["wall_s"] for record in section.records)
    peaks = [record["timing"]["peak_bytes"] for record in section.records]
    peaks = [peak for peak in peaks if peak is not None]
    most = f"{max(peaks) / 2**20:.0f} MiB" if peaks else "not measured"
    return f"{markdown(header, lines)}\n\nTotal wall time {wall:.0f} s, highest peak memory {most}."


def deviations(section: Section) -> str:
    """What the runs did otherwise than the paper, as a list."""
    total, counts = len(section.records), defaultdict(int)
    for record in section.records:
        for deviation in dict.fromkeys(record["deviations"]):
            counts[deviation] += 1
    lines = [f"- {text}" + ("" if n == total else f" ({n} of {total} runs)") for text, n in sorted(counts.items())]
    return "\n".join(lines) or "- none stated"
