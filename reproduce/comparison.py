"""Methods compared by their loss alone: from a list of rows to the runs, and from records to a page and a figure.

A script gives a Comparison: its rows, with what each is compared with, and the length of its runs at
every scale.  All runs of a comparison update on the same number of tokens: where a row changes how
many sequences a step trains on, its number of steps follows.  Which records a page shows, and what
its cells hold, is `opus_bench.sections` and `opus_bench.tables`, as for Table 3.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from opus_bench import figures, tables
from opus_bench.report import caution, scale_title
from opus_bench.results import load
from opus_bench.schema import NOT_RUN, RecordError
from opus_bench.sections import Row, Section, arrange, domain_share, final_loss, pairs, step_mean, time_ratio
from opus_bench.statistics import mean_interval
from opus_bench.tables import MARK, NONE, PAPER_CORPUS
from opus_bench.train import RunConfig

from .paper_rows import Line
from .paper_scale import PaperRun, grid
from .paper_settings import GPT2, GPT2_XL, Setting
from .scales import SCALES, Scale
from .training import Run

REPORTED = Path(__file__).with_name("reported.csv")
GUIDE = (
    "How to read it. Every row has updated on the same number of tokens. Runs are paired by seed: the same initial "
    "weights and, for the same buffer, the same stream of candidates. [low, high] is the 95 % paired t interval; "
    "{a, b} are the seeds themselves where fewer than three pairs allow no interval. "
    f"`{MARK}` marks an interval that excludes no difference (0, or 1 for a share of tokens). `{NONE}`: does not apply "
    f"or was not measured. The paper's own tasks: {NOT_RUN}this script compares losses."
)
LOSS_ONLY = "validation loss on the target domain alone: neither the paper's ten tasks nor an offline suite"
COLOURS = {None: "#7f7f7f", "paper": "#cc79a7", "calibrated": "#0072b2"}  # as in figures.LINES


@dataclass(frozen=True)
class Method:
    """A row: what is run, and what it is compared with."""

    name: str
    selector: str
    options: dict[str, Any] = field(default_factory=dict)  # of the selector
    arm: str | None = None
    base: str | None = None  # label of the row from which this one differs in one knob
    random: str = "Random"  # label of the Random row with the same buffer and selection ratio
    item: str | None = None  # the paper's table that has the row, if it is another than the script's
    paper_row: str | None = None  # name of the row there
    config: dict[str, Any] = field(default_factory=dict)  # fields of RunConfig other than the scale's
    deviations: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The name with its arm."""
        return self.name if self.arm is None else f"{self.name} ({self.arm})"


@dataclass(frozen=True)
class Comparison:
    """A script: its rows, the length of its runs, and the words on its page."""

    experiment: str  # reproduce/<experiment>.py
    item: str  # the paper's table
    title: str
    heading: str  # of the figure
    about: str  # what is compared, in plain words
    methods: Callable[[Scale], list[Method]]
    sizes: dict[str, dict[str, int]]  # scale -> fields of RunConfig that set the length of the runs
    seeds: dict[str, int]  # scale -> number of seeds
    optimizers: tuple[str, ...]
    deviations: Callable[[Scale], tuple[str, ...]]  # of all rows
    paper_model: str | None = None  # whose numbers stand beside ours
    paper_corpus: str = PAPER_CORPUS  # the same
    settings: tuple[Setting, ...] = (GPT2_XL,)  # of scale paper
    large_lines: Callable[[Setting], list[Line]] | None = None  # rows of small and paper; None: those of ``methods``
    seen: Callable[[dict[str, Row]], list[str]] = lambda rows: []  # sentences from the numbers

    def runs(self, options: argparse.Namespace) -> list[Run]:
        """Every run, seeds outermost so that a part of the grid is already paired.

        Raises:
            ValueError: a row that cannot train on exactly as many tokens as the others.
        """
        scale = SCALES[options.scale]
        return [
            Run(self.experiment, method.item or self.item, method.name, method.paper_row, method.arm,
                self._config(scale, method, optimizer, seed), scale.name,
                (*self.deviations(scale), *method.deviations), options.paper_tasks, suite=False)
            for optimizer in options.optimizers or self.optimizers
            for seed in range(options.seeds or self.seeds[scale.name])
            for method in self.methods(scale)
        ]

    def large_runs(self, options: argparse.Namespace) -> list[PaperRun]:
        """Every run at scale small or paper."""
        def lines(setting: Setting) -> list[Line]:
            if self.large_lines is not None:
                return self.large_lines(setting)
            return [Line(method.name, method.selector, method.options, method.arm, method.paper_row,
                         config=method.config, item=method.item, deviations=method.deviations)
                    for method in self.methods(setting.scale(options.scale))]

        return grid(self.experiment, self.item, options, lines, self.settings, self.optimizers)

    def _rows_of(self, scale: str) -> list[Method]:
        """The rows at a scale; those of small and paper as far as they are methods of the others."""
        if scale in SCALES:
            return self.methods(SCALES[scale])
        setting = GPT2 if scale == "small" else self.settings[0]
        if self.large_lines is None:
            return self.methods(setting.scale(scale))
        return [Method(line.name, line.selector, line.options, line.arm, random=line.random, paper_row=line.paper_row)
                for line in self.large_lines(setting)]

    def _config(self, scale: Scale, method: Method, optimizer: str, seed: int) -> RunConfig:
        fields = {**scale.run, **self.sizes[scale.name]}
        changed = RunConfig(method.selector, method.options, optimizer=optimizer, seed=seed,
                            **{**fields, **method.config})
        common = RunConfig("random", **fields)
        sequences = common.steps * common.selected_size
        steps, left = divmod(sequences, changed.selected_size)
        if left:
            raise ValueError(f"{method.label}: {changed.selected_size} sequences a step do not divide the {sequences} "
                             f"of the other rows; change steps of scale {scale.name}")
        return replace(changed, steps=steps)

    def write(self, results_dir: Path) -> list[Path]:
        """The page and the figures, from the records alone; returns their paths, page first.

        Raises:
            RecordError: no records.
        """
        results_dir = Path(results_dir)
        sections = arrange(load(results_dir / "runs", self.experiment))
        if not sections:
            raise RecordError(f"{results_dir / 'runs'}: no records of {self.experiment}; make them with "
                              f"`{self._command('smoke')}`")
        drawn = {scale: self._draw([section for section in sections if section.scale == scale],
                                   results_dir / "figures" / f"{self.experiment}_{scale}.svg")
                 for scale in dict.fromkeys(section.scale for section in sections)}
        path = results_dir / "tables" / f"{self.experiment}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.page(sections, drawn), encoding="utf-8", newline="\n")
        return [path, *drawn.values()]

    def _command(self, scale: str) -> str:
        return f"python -m reproduce.{self.experiment} --scale {scale}"

    def page(self, sections: Sequence[Section], drawn: dict[str, Path]) -> str:
        """The page as markdown: the same records give the same bytes."""
        records = [record for section in sections for record in section.records]
        versions = tables.versions(sections)
        commands = ", ".join(f"`{self._command(scale)}`" for scale in drawn)
        parts = [
            f"# {self.title}",
            (f"Made by {commands} from {len(records)} runs; code {versions}. Do not edit: the same records give the "
             "same bytes."),
            self.about,
            GUIDE,
        ]
        for scale, figure in drawn.items():
            parts.append(f"## Scale: {scale}")
            parts += caution(scale)
            parts.append(f"![Difference to Random](../figures/{figure.name})")
            for section in (section for section in sections if section.scale == scale):
                parts += self._section_page(section)
        return "\n\n".join(parts) + "\n"

    def _section_page(self, section: Section) -> list[str]:
        name = figures.title_of(section.key)
        methods, found = self._rows_of(section.scale), {row.label: row for row in section.rows}
        rows = {method.label: found[method.label] for method in methods if method.label in found}
        notes = section.notes + [f"{label}: a row that the script no longer has, not shown."
                                 for label in found if label not in rows]
        shown = replace(section, rows=list(rows.values()))  # in the script's order
        seen = [_sides(methods, rows, "random", "Random"), _sides(methods, rows, "base", "their base row"),
                *self.seen(rows)]
        return [
            f"### {name}",
            self._table(section, methods, rows),
            "Seen in these numbers:\n" + "\n".join(f"- {text}" for text in seen if text),
            *(["\n".join(f"- {note}" for note in notes)] if notes else []),
            f"### {name}: runs",
            tables.runs(shown),
            f"### {name}: deviations from the paper",
            tables.deviations(shown),
        ]

    def _table(self, section: Section, methods: list[Method], rows: dict[str, Row]) -> str:
        reported = tables.paper_cells(REPORTED)
        target = section.records[0]["data"]["target_domain"]
        header = ["method", "n seeds", "steps x chosen of buffer", f"validation loss on {target} (nat/token)",
                  "difference to Random of the same buffer and ratio (nat/token)",
                  "difference to the arm's base row (nat/token)",
                  "update tokens to that Random's final loss (share of its own)", "select / train time",
                  "effective sample size (share of buffer)", f"{target}: chosen / offered (%)",
                  "seeds that chose the base row's very sequences"]
        if self.paper_model:
            whose = f"{self._paper_model(section)}, {self.paper_corpus}"
            header.append(f"the paper's own: mean of its ten tasks, {whose} (%)")
        bases = {method.base for method in methods}
        lines = []
        for method in methods:
            row, paper = rows.get(method.label), []
            if self.paper_model:
                paper = [self._paper_cell(reported, method, section)]
            if row is None:
                make = f"`{self._command(section.scale)} --optimizers {section.optimizer} --methods '{method.label}'`"
                lines.append([method.label, "0", f"{NOT_RUN}no record; {make}", *[NONE] * 8, *paper])
                continue
            random, base = rows.get(method.random), rows.get(method.base)
            config = next(iter(row.records.values()))["config"]
            uniform = row.values(step_mean("effective_sample_size"))
            chosen, offered = (
                tables.mean(row.values(domain_share(which, lambda record: [record["data"]["target_domain"]])), 1, 100)
                for which in ("chosen", "offered"))
            lines.append([
                method.label + tables.FOREIGN * row.foreign,
                str(len(row.records)),
                f"{config['steps']} x {round(config['selection_ratio'] * config['buffer'])} of {config['buffer']}",
                tables.mean(row.values(final_loss), 4),
                tables.difference(row, random, final_loss, 4),
                "base" if method.label in bases else tables.difference(row, base, final_loss, 4),
                tables.token_share(row, random),
                tables.mean(row.values(time_ratio), 0, 100, " %"),
                tables.mean(uniform, 4) if uniform else "none: deterministic",
                f"{chosen} / {offered}",
                _same_choices(row, base),
                *paper,
            ])
        return tables.markdown(header, lines)

    def _paper_model(self, section: Section) -> str | None:
        """The paper's model whose numbers stand beside the section's."""
        return section.setting if section.setting in tables.PAPER_MODELS else self.paper_model

    def _paper_cell(self, reported: dict, method: Method, section: Section) -> str:
        item = method.item or self.item
        key = (item.removeprefix("Table "), self._paper_model(section), section.optimizer, self.paper_corpus,
               method.paper_row, "Avg")
        if key not in reported:
            return NONE
        return f"{reported[key]:.2f}" + (f" ({item})" if item != self.item else "")

    def _draw(self, sections: Sequence[Section], path: Path) -> Path:
        """A dot for every row: its final loss minus Random's, one panel an optimizer."""
        scale, target = sections[0].scale, sections[0].records[0]["data"]["target_domain"]
        methods = [method for method in self._rows_of(scale) if method.random != method.label]
        arms, bases = {method.arm for method in methods}, {method.base for method in methods}

        def draw(figure, axes) -> None:
            for axis, section in zip(axes[0], sections, strict=True):
                rows = {row.label: row for row in section.rows}
                axis.axvline(0, color="#1a1a1a", linewidth=1, dashes=(4, 3))
                for place, method in enumerate(methods):
                    points = _points(rows.get(method.label), rows.get(method.random))
                    if points:
                        interval, colour = mean_interval(points), COLOURS[method.arm]
                        if interval.low is None:
                            axis.plot(points, [place] * len(points), "|", color=colour, markersize=9)
                        else:
                            axis.plot([interval.low, interval.high], [place] * 2, color=colour, linewidth=1.6)
                        axis.plot(interval.mean, place, "D" if method.label in bases else "o", color=colour,
                                  markersize=6)
                        if method.label in bases:
                            axis.axvline(interval.mean, color=colour, linewidth=0.8, alpha=0.5)
                axis.set_ylim(len(methods) - 0.5, -0.5)
                axis.set_title(figures.title_of(section.key))
                axis.set_xlabel(f"loss on {target} minus Random's\nof the same buffer and ratio (nat/token)")
            names = [method.label if len(arms) > 1 else method.name for method in methods]
            axes[0, 0].set_yticks(range(len(methods)), names)

        title = scale_title(scale)
        note = (f"Left of the dashed line: less loss than Random, same seed and update tokens; {_counts(sections)}. "
                "Diamond, thin line: base row.\n"
                "Bar: 95 % paired t interval; where fewer than three seeds allow none, a tick for each seed.")
        size = (max(7.5, 3.2 + 3.6 * len(sections)), 1.9 + 0.26 * len(methods))
        return figures.draw_panels(path, f"{self.heading} ({title})", note, draw,
                                   columns=len(sections), size=size, sharey=True)


def losses_only(scale: Scale) -> tuple[str, ...]:
    """The scale's deviations for runs whose record holds losses alone."""
    return (*(text for text in scale.deviations if not text.startswith("an offline suite")), LOSS_ONLY)


def _counts(sections: Sequence[Section]) -> str:
    """Seeds of the rows, as small print."""
    counts = sorted({len(row.records) for section in sections for row in section.rows})
    return f"n = {' to '.join(str(n) for n in sorted({counts[0], counts[-1]}))}"


def _points(row: Row | None, base: Row | None) -> list[float]:
    """Final loss of the row minus the base's, a value for each seed that both have."""
    if row is None or base is None or row is base:
        return []
    return [ours - theirs for ours, theirs in zip(*pairs(row, base, final_loss), strict=True)]


def _same_choices(row: Row, base: Row | None) -> str:
    """At how many of the shared seeds both trained on the same sequences at every step."""
    if base is None or row is base:
        return NONE
    chosen = list(zip(*pairs(row, base, lambda record: record["data"]["selected_sha256"]), strict=True))
    return f"{sum(ours == theirs for ours, theirs in chosen)} of {len(chosen)}"


def _sides(methods: list[Method], rows: dict[str, Row], reference: str, name: str) -> str:
    """A sentence on which side of the reference the rows lie: by every seed, and by their intervals."""
    compared = [(rows.get(method.label), rows.get(getattr(method, reference) or "")) for method in methods]
    compared = [(row, base) for row, base in compared if _points(row, base)]
    if not compared:
        return ""
    points = [_points(row, base) for row, base in compared]
    less, more = sum(max(one) < 0 for one in points), sum(min(one) > 0 for one in points)
    text = (f"against {name}, {len(points)} comparisons: less loss at every seed in {less}, more at every seed in "
            f"{more}, neither in {len(points) - less - more}")
    with_interval = [one for one in map(mean_interval, points) if one.low is not None]
    outside = sum(one.excludes(0.0) for one in with_interval)
    if not with_interval:
        return f"{text}; fewer than three seeds, so no intervals and nothing is called significant."
    return (f"{text}; {outside} of {len(with_interval)} intervals exclude zero, where one in twenty would by chance "
            "(no correction for their number).")
