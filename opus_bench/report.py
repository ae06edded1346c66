"""Tables and figures: pure functions of results/runs/*.json and the paper's numbers.

    report("results", "reproduce/reported.csv")  ->  results/tables/table3.md, results/figures/*.svg

Nothing is trained, timed or dated here, so the same records give the same bytes.

Which records make a section (one scale, one optimizer): records of one code version, data
specification, model and length of training are a set. The set that covers most methods is shown, of
those the one with most runs, of those the newest: an unfinished rerun does not displace a finished
grid. A method that this set lacks is filled in from a set that differs in code only, and marked.
"""
from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from opus_bench import figures
from opus_bench.results import NOT_RUN, RecordError, canonical, load
from opus_bench.statistics import Interval, binomial_stderr, paired_interval, paired_ratio_interval, tokens_to_reach

# Order of the rows: label pattern and the row of the paper it stands beside (its PPL is the highest-loss one).
METHODS = (
    (r"^random$", "Random"),
    (r"^(?=.*(ppl|perplex))(?!.*(mid|low))", "PPL"),
    (r"^(?=.*(ppl|perplex)).*mid", None),
    (r"^(?=.*(ppl|perplex)).*low", None),
    (r"static|quality", "DCLM-FastText"),
    (r"opus.*paper", "OPUS"),
    (r"opus.*released", "OPUS"),
    (r"opus.*calibrated", "OPUS"),
)
BASE = "Random"
PAPER_MODEL, PAPER_CORPUS = "GPT-2 XL", "FineWeb"
PIPELINE_SCALES = ("smoke", "ci")
PAPER_TASKS = ("MMLU", "ANLI", "HellaSwag", "PIQA", "SIQA", "WinoGrande", "ARC-E", "ARC-C", "CommonsenseQA", "WSC")
TASK_NAMES = {"socialiqa": "SIQA", "arceasy": "ARC-E", "arcchallenge": "ARC-C", "csqa": "CommonsenseQA"}
SUITES = ("offline_suite", "mean_accuracy")
BITS = ("bpb_", "bits_per_byte_")
REASON_LENGTH = 48
MARK, FOREIGN, NONE = "*", " †", "–"


@dataclass
class Row:
    """One method of one section: its records by seed."""

    label: str
    paper_row: str | None
    records: dict[int, dict]
    foreign: bool = False

    def values(self, value: Callable[[dict], float | None]) -> list[float]:
        """The value of each seed in order, without the seeds that lack it."""
        found = (value(self.records[seed]) for seed in sorted(self.records))
        return [item for item in found if item is not None]


@dataclass
class Section:
    """One scale and optimizer: the rows of its tables in order, and what a reader must know of them."""

    scale: str
    optimizer: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    @property
    def base(self) -> Row | None:
        return next((row for row in self.rows if row.label == BASE), None)

    @property
    def records(self) -> list[dict]:
        return [row.records[seed] for row in self.rows for seed in sorted(row.records)]


def report(results_dir: str | Path, reported_csv: str | Path, experiment: str = "table3") -> list[Path]:
    """Write the experiment's table and figures; returns their paths, table first.

    Raises:
        RecordError: no record of the experiment, or a damaged one.
    """
    results_dir = Path(results_dir)
    sections = arrange(load(results_dir / "runs", experiment))
    if not sections:
        command = f"python -m reproduce.{experiment} --scale smoke"
        raise RecordError(f"{results_dir / 'runs'}: no records of {experiment}; make them with `{command}`")
    table = results_dir / "tables" / f"{experiment}.md"
    table.parent.mkdir(parents=True, exist_ok=True)
    drawn = _figures(sections, experiment, results_dir / "figures")
    text = page(sections, experiment, paper_cells(reported_csv), drawn)
    table.write_text(text, encoding="utf-8", newline="\n")
    return [table, *drawn]


# Records to sections --------------------------------------------------------------------------


def label_of(record: dict) -> str:
    """The name of a record's row: its method, with its arm where it has one."""
    method, arm = record["method"], record["arm"]
    return method if arm is None or arm in method.lower() else f"{method} ({arm})"


def _rank(label: str) -> tuple[int, str]:
    return next((i for i, (pattern, _) in enumerate(METHODS) if re.search(pattern, label.lower())), len(METHODS)), label


def _paper_row(record: dict) -> str | None:
    rank = _rank(label_of(record))[0]
    return METHODS[rank][1] if rank < len(METHODS) else record["paper"]["row"]


def arrange(records: Iterable[dict]) -> list[Section]:
    """Sections in order of scale and optimizer, each from the set of records that the module names."""
    grids = defaultdict(list)
    for record in records:
        grids[record["scale"], record["config"]["optimizer"]].append(record)
    return [_section(scale, optimizer, grids[scale, optimizer]) for scale, optimizer in sorted(grids)]


def _section(scale: str, optimizer: str, records: list[dict]) -> Section:
    sets = defaultdict(list)
    for record in records:
        config = record["config"]
        shape = (record["data"]["spec_sha256"], *(repr(config.get(key)) for key in ("model", "steps", "length")))
        sets[shape, record["code"]["version"]].append(record)

    def completeness(key: tuple) -> tuple:
        cells = {(label_of(record), record["config"]["seed"]) for record in sets[key]}
        newest = max(record["written_utc"] for record in sets[key])
        return len({label for label, _ in cells}), len(cells), newest, key

    order = sorted(sets, key=completeness, reverse=True)
    (shape, version), notes, rows = order[0], [], {}
    for key in order:
        if key[0] != shape:
            continue
        fill = defaultdict(list)
        for record in sets[key]:
            fill[label_of(record)].append(record)
        for label in sorted(fill.keys() - rows.keys()):
            by_seed = _one_configuration(fill[label])
            rows[label] = Row(label, _paper_row(next(iter(by_seed.values()))), by_seed, foreign=key[1] != version)
            if key[1] != version:
                notes.append(f"{label}{FOREIGN}: run under code {key[1][:12]}, the other rows under {version[:12]}.")
    section = Section(scale, optimizer, sorted(rows.values(), key=lambda row: _rank(row.label)), notes)
    left_out = len(records) - len(section.records)
    if left_out:
        notes.append(
            f"{left_out} other records of this scale and optimizer are not shown (a less complete or older set, "
            "or a configuration run again): of the sets of records made by one code, data, model and length, the one "
            "with most methods is shown, then most runs, then the newest."
        )
    notes.extend(_unpaired(section))
    return section


def _one_configuration(records: list[dict]) -> dict[int, dict]:
    """The records by seed of the configuration with most seeds, of those the newest: a row never mixes two."""
    by_config = defaultdict(dict)
    for record in sorted(records, key=lambda record: (record["written_utc"], record["run_id"])):
        config = {name: item for name, item in record["config"].items() if name != "seed"}
        by_config[canonical(config)][record["config"]["seed"]] = record
    return max(by_config.values(), key=lambda found: (len(found), max(r["written_utc"] for r in found.values())))


def _unpaired(section: Section) -> list[str]:
    if section.base is None:
        return [f"No {BASE} runs: no differences can be given."]
    notes = []
    for row in section.rows:
        for seeds, place in ((row.records.keys() - section.base.records.keys(), BASE),
                             (section.base.records.keys() - row.records.keys(), row.label)):
            if seeds:
                named = ", ".join(str(seed) for seed in sorted(seeds))
                notes.append(f"{row.label}: seed {named} has no {place} run and is left out of its pairs.")
    return notes


# Values of a record ---------------------------------------------------------------------------


def loss_curve(record: dict, name: str = "loss") -> tuple[list[int], list[float]]:
    """(update tokens, nat/token) of the target domain's validation loss, in order of tokens."""
    split = f"val/{record['data']['target_domain']}"
    points = {
        row["tokens_seen"]: row["value"] for row in record["metrics"] if row["split"] == split and row["name"] == name
    }
    return sorted(points), [points[tokens] for tokens in sorted(points)]


def final_loss(record: dict) -> float | None:
    """The last validation loss on the target domain, nat/token."""
    losses = loss_curve(record)[1]
    return losses[-1] if losses else None


def evaluated(*tasks: str) -> Callable[[dict], float | None]:
    """The value of the first of these tasks there is, as a function of a record; None where it was not run."""
    return lambda record: next((row.get("value") for row in record["evals"] if row["task"] in tasks), None)


def time_ratio(record: dict) -> float | None:
    """Seconds choosing over seconds training."""
    timing = record["timing"]
    return timing["select_s"] / timing["train_s"] if timing["train_s"] else None


def step_mean(name: str) -> Callable[[dict], float | None]:
    """The mean over steps of a per-step diagnostic, as a function of a record; None where all are null."""

    def mean(record: dict) -> float | None:
        values = [value for value in record["selection"]["per_step"][name] if value is not None]
        return math.fsum(values) / len(values) if values else None

    return mean


def corrupted_domains(record: dict) -> list[str]:
    """Domains of damaged text: data.corrupted_domains if the record has it, else those named corrupt..."""
    named = record["data"].get("corrupted_domains")
    if named is not None:
        return named
    return [name for name in record["selection"]["offered"] if "corrupt" in name.lower()]


def domain_share(which: str, domains: Callable[[dict], Sequence[str]]) -> Callable[[dict], float | None]:
    """The share of the offered or chosen samples that came from some domains, as a function of a record."""

    def share(record: dict) -> float | None:
        counts, wanted = record["selection"][which], domains(record)
        total = sum(counts.values())
        return sum(counts.get(domain, 0) for domain in wanted) / total if total and wanted else None

    return share


def pairs(row: Row, base: Row, value: Callable[[dict], float | None]) -> tuple[list[float], list[float]]:
    """The values of a row and of the base at the seeds that both have."""
    seeds = sorted(row.records.keys() & base.records.keys())
    both = [(value(row.records[seed]), value(base.records[seed])) for seed in seeds]
    both = [pair for pair in both if None not in pair]
    return [ours for ours, _ in both], [theirs for _, theirs in both]


# Cells ----------------------------------------------------------------------------------------


def _mean(values: Sequence[float], digits: int, factor: float = 1.0, unit: str = "") -> str:
    return f"{factor * math.fsum(values) / len(values):.{digits}f}{unit}" if values else NONE


def _limits(interval: Interval, points: Sequence[float], none: float, style: str) -> str:
    if interval.low is None:
        return f"{interval.mean:{style}} {{{', '.join(f'{point:{style}}' for point in points)}}}"
    mark = MARK if interval.excludes(none) else ""
    return f"{interval.mean:{style}} [{interval.low:{style}}, {interval.high:{style}}]{mark}"


def _difference(row: Row, base: Row | None, value: Callable, digits: int, factor: float = 1.0) -> str:
    if base is None or row is base:
        return NONE
    ours, theirs = ([factor * item for item in side] for side in pairs(row, base, value))
    if not ours:
        return NONE
    points = [a - b for a, b in zip(ours, theirs, strict=True)]
    return _limits(paired_interval(ours, theirs), points, 0.0, f"+.{digits}f")


def _short_difference(row: Row, base: Row | None, value: Callable, digits: int) -> str:
    if base is None or row is base:
        return ""
    ours, theirs = pairs(row, base, value)
    if not ours:
        return ""
    interval = paired_interval(ours, theirs)
    half = "" if interval.low is None else f" ± {interval.high - interval.mean:.{digits}f}"
    return f" ({interval.mean:+.{digits}f}{half}{MARK if interval.excludes(0.0) else ''})"


def _token_share(row: Row, base: Row | None) -> str:
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


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


# The tables -----------------------------------------------------------------------------------


def paper_cells(path: str | Path) -> dict[tuple[str, ...], float]:
    """The paper's cells: (table, model, optimizer, corpus, method, benchmark) -> value, optimizer in lower case."""
    with open(path, encoding="utf-8", newline="") as file:
        return {
            (
                line["table"],
                line["model"],
                line["optimizer"].lower(),
                line["corpus"],
                line["method"],
                line["benchmark"],
            ): float(line["value"])
            for line in csv.DictReader(file)
        }


def _paper_value(reported: dict, optimizer: str, method: str | None, benchmark: str) -> str:
    value = reported.get(("3", PAPER_MODEL, optimizer.lower(), PAPER_CORPUS, method, benchmark))
    return NONE if value is None else f"{value:.2f}"


def _summary(section: Section, reported: dict) -> str:
    target = section.records[0]["data"]["target_domain"]
    header = [
        "method",
        "n seeds",
        f"validation loss on {target} (nat/token)",
        "difference to Random (nat/token)",
        "update tokens to Random's final loss (share of Random's)",
        "offline suite (%)",
        "difference to Random (points)",
        "select / train time",
        "effective sample size (share of buffer)",
        f"{target}: chosen / offered (%)",
        "corrupted: chosen / offered (%)",
        f"the paper's own: mean of its ten tasks, {PAPER_MODEL}, {PAPER_CORPUS} (%)",
    ]
    lines = []
    for row in section.rows:
        uniform = row.values(step_mean("effective_sample_size"))

        def shares(domains: Callable, row: Row = row) -> str:
            chosen = _mean(row.values(domain_share("chosen", domains)), 1, 100)
            return f"{chosen} / {_mean(row.values(domain_share('offered', domains)), 1, 100)}"

        lines.append(
            [
                row.label + FOREIGN * row.foreign,
                str(len(row.records)),
                _mean(row.values(final_loss), 4),
                _difference(row, section.base, final_loss, 4),
                _token_share(row, section.base),
                _mean(row.values(evaluated(*SUITES)), 2, 100),
                _difference(row, section.base, evaluated(*SUITES), 2, 100),
                _mean(row.values(time_ratio), 1, 100, " %"),
                _mean(uniform, 4) if uniform else "none: deterministic",
                shares(lambda record: [record["data"]["target_domain"]]),
                shares(corrupted_domains),
                _paper_value(reported, section.optimizer, row.paper_row, "Avg"),
            ]
        )
    return _markdown(header, lines)


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


def _offline(section: Section) -> str:
    tasks = _task_rows(section, lambda task: task not in SUITES and not task.startswith(BITS) and not _paper_task(task))
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
            difference = _difference(row, section.base, value, 4)
            spread = f" ({_mean(errors, 1, 100)})" if errors else ""
            line.append(_mean(row.values(value), 1, 100) + spread + MARK * difference.endswith(MARK))
        lines.append(line)
    return _markdown(header, lines)


def _stderr(row: dict) -> float:
    return row["stderr"] if row["stderr"] is not None else binomial_stderr(row["value"], row["n_samples"])


def _bits(section: Section) -> str:
    tasks = sorted(_task_rows(section, lambda task: task.startswith(BITS)))
    header = ["domain", *(row.label + FOREIGN * row.foreign for row in section.rows)]
    lines = [
        [re.sub(f"^({'|'.join(BITS)})", "", task)]
        + [
            _mean(row.values(evaluated(task)), 3) + _short_difference(row, section.base, evaluated(task), 3)
            for row in section.rows
        ]
        for task in tasks
    ]
    return _markdown(header, lines)


def _paper_tasks(section: Section, reported: dict) -> str:
    columns = [(row.label, row.paper_row, row) for row in section.rows if row.paper_row]
    there = {paper_row for _, paper_row, _ in columns}
    key = ("3", PAPER_MODEL, section.optimizer.lower(), PAPER_CORPUS)
    others = list(dict.fromkeys(cell[4] for cell in reported if cell[:4] == key and cell[4] not in there))
    columns += [(method, method, None) for method in others]
    lines = [
        [label + FOREIGN * bool(row and row.foreign)]
        + [f"{_ours(row, task)} | {_paper_value(reported, section.optimizer, method, task)}" for task in PAPER_TASKS]
        for label, method, row in columns
    ]
    return _markdown(["method", *PAPER_TASKS], lines)


def _ours(row: Row | None, task: str) -> str:
    if row is None:
        return f"{NOT_RUN}no run of this method"
    items = [item for record in row.records.values() for item in record["evals"] if _paper_task(item["task"]) == task]
    values = [item["value"] for item in items if item.get("value") is not None]
    if values:
        return _mean(values, 2, 100)
    status = next((item["status"] for item in items), f"{NOT_RUN}not in the records")
    return status if len(status) <= REASON_LENGTH else status[: REASON_LENGTH - 1] + "…"


def _runs(section: Section) -> str:
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
    return f"{_markdown(header, lines)}\n\nTotal wall time {wall:.0f} s, highest peak memory {most}."


def _deviations(section: Section) -> str:
    total, counts = len(section.records), defaultdict(int)
    for record in section.records:
        for deviation in dict.fromkeys(record["deviations"]):
            counts[deviation] += 1
    lines = [f"- {text}" + ("" if n == total else f" ({n} of {total} runs)") for text, n in sorted(counts.items())]
    return "\n".join(lines) or "- none stated"


def page(sections: list[Section], experiment: str, reported: dict, drawn: Sequence[Path] = ()) -> str:
    """The experiment's page as markdown, with the figures drawn put at the head of their scale."""
    records = [record for section in sections for record in section.records]
    scales = list(dict.fromkeys(section.scale for section in sections))
    commands = ", ".join(f"`python -m reproduce.{experiment} --scale {scale}`" for scale in scales)
    versions = ", ".join(sorted({record["code"]["version"][:12] for record in records}))
    compared = sum(max(0, len(section.rows) - 1) for section in sections if section.base)
    parts = [
        f"# {records[0]['paper']['item']} of arXiv:{records[0]['paper']['arxiv']}",
        f"Made by {commands} from {len(records)} runs; scale {', '.join(scales)}; code {versions}. "
        "Do not edit: the same records give the same bytes.",
        f"How to read it. Runs are paired by seed (same initial weights, same candidate stream). [low, high] is the "
        f"95 % paired t interval; {{a, b}} are the seeds themselves where fewer than three pairs allow no interval. "
        f"`{MARK}` marks an interval that excludes no difference (0, or 1 for a share of tokens); of the {compared} "
        f"methods compared, one in twenty would be marked by chance in each column. `{NONE}`: does not apply or was "
        f"not measured.",
    ]
    for scale in scales:
        parts.append(f"## Scale: {scale}")
        if scale in PIPELINE_SCALES:
            line = "scale: checks the pipeline; it is not evidence for or against the paper."
            parts.append(f"**{scale.capitalize()} {line}**")
        parts.extend(
            f"![{path.stem.rsplit('_', 1)[1]}](../figures/{path.name})"
            for path in drawn
            if path.stem.startswith(f"{experiment}_{scale}_")
        )
        for section in (section for section in sections if section.scale == scale):
            parts.extend(_section_page(section, reported))
    return "\n\n".join(parts) + "\n"


def _section_page(section: Section, reported: dict) -> list[str]:
    name = figures.OPTIMIZERS.get(section.optimizer, section.optimizer)
    selection_notes = sorted({note for record in section.records for note in record["selection"]["notes"]})
    notes = [f"- {note}" for note in section.notes + selection_notes]
    parts = [f"### {name}: summary", _summary(section, reported)]
    parts += ["\n".join(notes)] if notes else []
    parts += [
        f"### {name}: offline tasks, accuracy in % (standard error over items)",
        f"`{MARK}`: the paired difference to Random over seeds excludes zero.",
        _offline(section),
        f"### {name}: bits per byte by domain (difference to Random ± half-width of its 95 % interval)",
        _bits(section),
        f"### {name}: the paper's ten tasks, ours | the paper's ({PAPER_MODEL}, {PAPER_CORPUS}), accuracy in %",
        _paper_tasks(section, reported),
        f"### {name}: runs",
        _runs(section),
        f"### {name}: deviations from the paper",
        _deviations(section),
    ]
    return parts


# The figures ----------------------------------------------------------------------------------


def _figures(sections: list[Section], experiment: str, directory: Path) -> list[Path]:
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for scale in dict.fromkeys(section.scale for section in sections):
        chosen = [section for section in sections if section.scale == scale]
        title = f"{scale} scale: pipeline check" if scale in PIPELINE_SCALES else f"{scale} scale"
        stem = directory / f"{experiment}_{scale}"
        target = chosen[0].records[0]["data"]["target_domain"]
        losses = {s.optimizer: {r.label: _curves(r, loss_curve) for r in s.rows} for s in chosen}
        gaps = {s.optimizer: {r.label: _gap(r, s.base) for r in s.rows if s.base and r is not s.base} for s in chosen}
        shares = {s.optimizer: _shares(s) for s in chosen}
        steps = {
            s.optimizer: {
                name: {r.label: _curves(r, lambda record, name=name: _per_step(record, name)) for r in s.rows}
                for name in ("effective_sample_size", "total_variation")
            }
            for s in chosen
        }
        paths.append(figures.draw_losses(losses, gaps, target, title, Path(f"{stem}_loss.svg")))
        paths.append(figures.draw_domains(shares, title, Path(f"{stem}_domains.svg")))
        paths.append(figures.draw_uniformity(steps, title, Path(f"{stem}_uniformity.svg")))
    return paths


def _curves(row: Row, curve: Callable[[dict], tuple[list, list]]) -> figures.Curves | None:
    """The curves of all seeds on the points that all have; None where there are none."""
    by_seed = [dict(zip(*curve(row.records[seed]), strict=True)) for seed in sorted(row.records)]
    shared = sorted(set.intersection(*(set(points) for points in by_seed)))
    if not shared:
        return None
    return figures.Curves(np.array(shared), np.array([[points[x] for x in shared] for points in by_seed]))


def _gap(row: Row, base: Row) -> figures.Curves | None:
    """The curves of row - base at the seeds and points that both have."""
    seeds = sorted(row.records.keys() & base.records.keys())
    if not seeds:
        return None
    ours = _curves(Row(row.label, None, {seed: row.records[seed] for seed in seeds}), loss_curve)
    theirs = _curves(Row(base.label, None, {seed: base.records[seed] for seed in seeds}), loss_curve)
    if ours is None or theirs is None:
        return None
    _, left, right = np.intersect1d(ours.x, theirs.x, return_indices=True)
    return figures.Curves(ours.x[left], ours.y[:, left] - theirs.y[:, right]) if left.size else None


def _per_step(record: dict, name: str) -> tuple[list, list]:
    per_step = record["selection"]["per_step"]
    points = [(x, y) for x, y in zip(per_step["step"], per_step[name], strict=True) if y is not None]
    return [x for x, _ in points], [y for _, y in points]


def _shares(section: Section) -> tuple[list[str], dict[str, list[float]], dict[str, list[float]]]:
    """(domains, offered share by method, chosen share by method), domains by share offered."""
    counts = defaultdict(int)
    for record in section.records:
        for domain, count in record["selection"]["offered"].items():
            counts[domain] += count
    domains = sorted(counts, key=lambda domain: (-counts[domain], domain))

    def mean(row: Row, which: str) -> list[float]:
        found = [row.values(domain_share(which, lambda record, domain=domain: [domain])) for domain in domains]
        return [float(np.mean(values)) if values else math.nan for values in found]

    offered, chosen = ({row.label: mean(row, which) for row in section.rows} for which in ("offered", "chosen"))
    return domains, offered, chosen
