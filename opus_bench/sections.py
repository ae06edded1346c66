"""Records to sections: which records a table shows, in what order, and the values of each.

Which records make a section (one scale, one optimizer, and one model where config.setting names it): records of one
code version, data specification, model and length of training are a set. The set that covers most methods is shown, of
those the one with most runs, of those the newest: an unfinished rerun does not displace a finished
grid. A method that this set lacks is filled in from a set that differs in code only, and marked. Rows of one
setting may differ in their text and in how much they read: that is then what is compared.
"""
from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from opus_bench.hashing import canonical

# Order of the rows: label pattern and the row of the paper it stands beside (its PPL is the highest-loss one).
METHODS = (
    (r"^random$", "Random"),
    (r"^(?=.*(ppl|perplex))(?!.*(mid|low))", "PPL"),
    (r"^(?=.*(ppl|perplex)).*mid", None),
    (r"^(?=.*(ppl|perplex)).*low", None),
    (r"^greats", "GREATS"),
    (r"static|quality", "DCLM-FastText"),
    (r"opus.*paper", "OPUS"),
    (r"opus.*released", "OPUS"),
    (r"opus.*calibrated", "OPUS"),
)
BASE = "Random"
FOREIGN = " †"
"""Marks a row whose runs another code version made."""


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
    setting: str = ""  # config.setting of its records: the model, as in the paper's tables

    @property
    def key(self) -> str:
        """Its place beside others of the same scale: the optimizer, with the model where that is named."""
        return f"{self.optimizer}, {self.setting}" if self.setting else self.optimizer

    @property
    def base(self) -> Row | None:
        return next((row for row in self.rows if row.label == BASE), None)

    @property
    def records(self) -> list[dict]:
        return [row.records[seed] for row in self.rows for seed in sorted(row.records)]


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
        config = record["config"]
        grids[record["scale"], config["optimizer"], config.get("setting", "")].append(record)
    return [_section(*key, grids[key]) for key in sorted(grids)]


def _section(scale: str, optimizer: str, setting: str, records: list[dict]) -> Section:
    sets = defaultdict(list)
    for record in records:
        config = record["config"]
        shape = (setting,) if setting else (
            record["data"]["spec_sha256"], *(repr(config.get(key)) for key in ("model", "length")),
            _sequences_trained_on(config))
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
    section = Section(scale, optimizer, sorted(rows.values(), key=lambda row: _rank(row.label)), notes, setting)
    left_out = len(records) - len(section.records)
    if left_out:
        notes.append(
            f"{left_out} other records of this scale and optimizer are not shown (a less complete or older set, "
            "or a configuration run again): of the sets of records made by one code, data, model and length, the one "
            "with most methods is shown, then most runs, then the newest."
        )
    notes.extend(_unpaired(section))
    notes.extend(_same_choices(section))
    return section


def _sequences_trained_on(config: dict) -> int:
    """Sequences that a run updates on: rows whose buffers differ are compared at the same number."""
    return config.get("steps", 0) * round(config.get("selection_ratio", 1) * config.get("buffer", 1))


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


def _same_choices(section: Section) -> list[str]:
    """Methods that trained on the very same sequences at every step of every seed."""
    by_choice = defaultdict(list)
    for row in section.rows:
        chosen = tuple((seed, row.records[seed]["data"]["selected_sha256"]) for seed in sorted(row.records))
        if all(digest for _, digest in chosen):
            by_choice[chosen].append(row.label)
    return [
        f"{' and '.join(labels)} chose the very same sequences at every step of every seed."
        for labels in by_choice.values() if len(labels) > 1
    ]


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


def evaluated(task: str) -> Callable[[dict], float | None]:
    """The value of a task, as a function of a record; None where it was not run."""
    return lambda record: next((row.get("value") for row in record["evals"] if row["task"] == task), None)


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
