"""A measurement on a small model and its record: a validation experiment, as one line of a grid.

A script lists Measurements, one for each optimizer and seed; the measuring itself is a function

    measure(config, settings, corpus, on_step) -> rows

that trains the model at random (`opus_bench.validation.trained.stages`), calls ``on_step()`` once per
unit of work and returns rows made by `Stage.row`, which become the record's ``metrics``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opus_bench import hashing, provenance, results, schema
from opus_bench.corpus import Corpus, build_corpus
from opus_bench.schema import RecordError
from opus_bench.tables import markdown
from opus_bench.train import RunConfig, peak_bytes, set_determinism

from .scales import SCALES
from .training import corpus_hashes, locked

NAMES = {"adamw": "AdamW", "muon": "Muon"}
NOTES = {
    "smoke": "smoke scale checks the instrument on a small model: orders of magnitude and signs carry over at best",
    "ci": "ci scale exercises the code: its numbers mean nothing",
}


@dataclass(frozen=True)
class Measurement:
    """One optimizer and seed of a validation experiment.

    Identity (``run_id``): the experiment, the config with ``settings`` under "measured", the corpus, and the
    code of the core, of the file that ``measure`` is in and of what that imports of `opus_bench.validation`, but
    for prose.

    Raises:
        ValueError: a ``measure`` that is not "package.module:function", a selector other than random.
    """

    experiment: str  # reproduce/<experiment>.py
    measure: str  # "package.module:function", imported in the worker
    config: RunConfig  # the small model that is trained at random
    settings: dict[str, Any]  # what is measured, as plain JSON values
    scale: str
    units: int  # how often measure calls on_step
    deviations: tuple[str, ...] = ()

    unit = "units of work"  # of ``amount``

    def __post_init__(self) -> None:
        module, _, function = self.measure.partition(":")
        if not all(part.isidentifier() for part in (*module.split("."), function)):
            raise ValueError(f"measure must be 'package.module:function', got {self.measure!r}")
        if self.config.selector != "random":
            raise ValueError(f"a measurement trains at random: selector must be 'random', got {self.config.selector!r}")

    @property
    def label(self) -> str:
        """The optimizer as a table shows it; the record's method."""
        return NAMES[self.config.optimizer]

    @property
    def preloaded(self) -> tuple[str, ...]:
        """Modules that are imported once for all workers."""
        return ("opus_bench.train", self.measure.partition(":")[0])

    @property
    def record_config(self) -> dict[str, Any]:
        """All that determines the numbers but data and code, as plain values: the record's config."""
        config = {**dataclasses.asdict(self.config), "betas": list(self.config.betas)}
        return {**config, "measured": self.settings}

    @property
    def code_version(self) -> str:
        """Version of the code that determines the numbers."""
        return _code_version(self.measure.partition(":")[0])

    @property
    def run_id(self) -> str:
        """Identity of the measurement: the name of its record."""
        spec = SCALES[self.scale].corpus.sha256
        return schema.run_id(self.experiment, self.record_config, spec, self.code_version)

    @property
    def amount(self) -> int:
        """Units of work."""
        return self.units

    def describe(self) -> str:
        """The measurement in the plan, without its id."""
        c = self.config
        return f"{self.experiment:18} {c.optimizer:6} seed {c.seed}  {self.units} units of work, model {c.model!r}"

    def cost(self, records: Sequence[dict]) -> float | None:
        """Seconds that this will take by the records of the same experiment and scale, None if there is none."""
        like = [r for r in records if (r["experiment"], r["scale"]) == (self.experiment, self.scale)]
        like = [r for r in like if r["config"]["optimizer"] == self.config.optimizer] or like
        return sum(r["timing"]["wall_s"] for r in like) / len(like) if like else None

    def prepare(self, corpus: Corpus) -> None:
        """Nothing but the corpus is shared by the workers."""

    def execute(self, results_dir: Path, on_progress: Callable[[int], None] = lambda done: None) -> dict:
        """Make the record, or return it if it is there.  Two processes never work on the same one.

        ``on_progress`` is told how many of ``units`` are done.  There is no checkpoint: an interrupted
        measurement begins again.

        Raises:
            ValueError: no rows, or a row that is no measurement (a value that is not finite, a key missing);
                no record is written.
        """
        record_path = results.record_path(results_dir / "runs", self.run_id)
        done = 0

        def on_step() -> None:
            nonlocal done
            done += 1
            on_progress(min(done, self.units))

        with locked(results_dir, self.run_id):
            if record_path.exists():
                return results.read(record_path)
            measure = self._function()
            corpus = build_corpus(SCALES[self.scale].corpus, progress=False)
            set_determinism(self.config.threads)
            started = time.perf_counter()
            rows = measure(self.config, self.settings, corpus, on_step)
            record = self._record(self._checked(rows), corpus, time.perf_counter() - started)
            results.write(record, results_dir / "runs")
        on_progress(self.units)
        return record

    def _function(self) -> Callable:
        module, _, function = self.measure.partition(":")
        try:
            return getattr(importlib.import_module(module), function)
        except AttributeError:
            raise ValueError(f"{module} has no function {function!r}, which {self.experiment} measures with") from None

    def _checked(self, rows: object) -> list[dict]:
        source = f"{self.measure}, {self.label}, seed {self.config.seed}"
        if not isinstance(rows, list) or not rows:
            raise RecordError(f"{source}: a measurement returns a list of at least one row, got {rows!r}")
        for index, row in enumerate(rows):
            name = row.get("name") if isinstance(row, dict) else None
            schema.check_fields(row, schema.METRIC, f"metrics[{index}] ({name})", source)
        return rows

    def _record(self, rows: list[dict], corpus: Corpus, wall_s: float) -> dict:
        record = {
            "schema": schema.SCHEMA,
            "run_id": self.run_id,
            "experiment": self.experiment,
            "scale": self.scale,
            "arm": None,
            "method": self.label,
            "paper": {"arxiv": schema.ARXIV, "item": "no item of the paper", "row": None},
            "config": self.record_config,
            "deviations": list(self.deviations),
            "data": {**corpus_hashes(corpus), "suite_sha256": None, "selected_sha256": None},
            "code": {"version": self.code_version, **provenance.git_state()},
            "environment": provenance.environment(),
            "timing": {"wall_s": wall_s, "train_s": 0.0, "select_s": 0.0, "eval_s": wall_s,
                       "peak_bytes": peak_bytes()},
            "metrics": rows,
            "evals": [],
            "selection": {"offered": {}, "chosen": {}, "per_step": {name: [] for name in schema.PER_STEP},
                          "notes": []},
            "final": {"weights_sha256": None},
        }
        schema.validate(record)  # before it goes through JSON, which would hide what it cannot hold
        return json.loads(json.dumps(record))  # as it is read back: lists for tuples


@functools.lru_cache
def _code_version(module: str) -> str:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of a package above it
        found = None
    if found is None or not found.origin:
        raise ValueError(f"no module {module!r} to measure with")
    return provenance.measuring_version(Path(found.origin))


def newest(records: Sequence[dict]) -> list[dict]:
    """Of each scale and optimizer the newest complete set of records, in the order given.

    A set is what one version of the code made with one config, over seeds.  It is complete if no other
    set of its scale and optimizer has more seeds; of complete ones the last written counts.
    """
    sets: dict[tuple[str, str], dict[tuple[str, str], list[dict]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        config = {key: value for key, value in record["config"].items() if key != "seed"}
        made_by = (record["code"]["version"], hashing.canonical(config))
        sets[record["scale"], config["optimizer"]][made_by].append(record)
    kept = set()
    for group in sets.values():
        _, chosen = max(group.items(), key=lambda item: (len(item[1]), max(r["written_utc"] for r in item[1]), item[0]))
        kept |= {record["run_id"] for record in chosen}
    return [record for record in records if record["run_id"] in kept]


def measurements(
    options: argparse.Namespace, experiment: str, measure: str, settings: dict[str, Any], units: int, seeds: int,
    deviations: Sequence[str], optimizers: Sequence[str] = ("adamw", "muon"),
) -> list[Measurement]:
    """One measurement for each optimizer and seed, on the model of the scale that the tables train.

    ``optimizers`` and ``seeds`` hold where the options name none.
    """
    scale = SCALES[options.scale]
    return [
        Measurement(experiment, measure, RunConfig("random", optimizer=optimizer, seed=seed, **scale.run), settings,
                    scale.name, units, tuple(deviations))
        for optimizer in options.optimizers or optimizers
        for seed in range(options.seeds or seeds)
    ]


Chapter = Callable[[dict[str, list[dict]], str, Path], tuple[list[Path], list[str]]]
"""(optimizer -> records by seed, scale, folder for figures) -> (the scale's figures, parts of its page)."""


def write_page(results_dir: Path, experiment: str, title: str, command: str, chapter: Chapter) -> list[Path]:
    """The page of an experiment and, for each scale, the figures of its chapter, from the records alone.

    Raises:
        RecordError: no records.
    """
    records = newest(results.load(results_dir / "runs", experiment))
    paths, parts = [], []
    for scale in sorted({r["scale"] for r in records}):
        groups: dict[str, list[dict]] = defaultdict(list)
        for record in sorted((r for r in records if r["scale"] == scale),
                             key=lambda r: (r["config"]["optimizer"], r["config"]["seed"])):
            groups[record["config"]["optimizer"]].append(record)
        figures, said = chapter(dict(groups), scale, results_dir / "figures")
        paths += figures
        parts += [f"## {scale} scale", *said]
    path = results_dir / "tables" / f"{experiment}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(experiment, title, command, parts, records), encoding="utf-8", newline="\n")
    return [path, *paths]


def links(figures: Sequence[Path]) -> list[str]:
    """Figures as a page in results_dir/tables shows them."""
    return [f"![{figure.stem}](../figures/{figure.name})" for figure in figures]


def page(experiment: str, title: str, command: str, parts: list[str], records: Sequence[dict]) -> str:
    """A page of results in markdown: head, the parts, deviations, and the runs that it is made from.

    Links are relative to results_dir/tables.  The same records give the same bytes.

    Raises:
        RecordError: no records.
    """
    if not records:
        raise RecordError(f"no records of {experiment}; make them with `{command}`")
    scales = sorted({r["scale"] for r in records})
    head = (f"Made by `{command}` from {len(records)} run{'s' if len(records) > 1 else ''}, listed below; "
            f"{'; '.join(NOTES.get(scale, f'{scale} scale') for scale in scales)}.")
    deviations = list(dict.fromkeys(text for r in records for text in r["deviations"]))
    rows = [[r["scale"], r["method"], str(r["config"]["seed"]), f"{r['timing']['wall_s'] / 60:.1f}",
             r["code"]["version"][:12], f"[{r['run_id']}](../runs/{r['run_id']}.json)"] for r in records]
    blocks = [f"# {title}", head, *(part.strip("\n") for part in parts)]
    if deviations:
        blocks += ["## Deviations from the paper's setting", "\n".join(f"- {text}" for text in deviations)]
    blocks += ["## Runs", markdown(["scale", "optimizer", "seed", "minutes", "code version", "run"], rows)]
    return "\n\n".join(blocks) + "\n"
