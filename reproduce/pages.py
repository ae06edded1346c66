"""Every table and figure again, the results page and the README's numbers, from the records alone.  Nothing is trained.

    python -m reproduce.pages                       # results/
    python -m reproduce.pages --results results/ci  # another folder of records

The core cannot know the experiments, and the results page needs not: `opus_bench.site.page` binds whatever pages lie
in the folder.  So this command writes them all and then binds them, and `opus-bench report` binds the same files.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from opus_bench.site import page as site
from opus_bench.figures import OPTIMIZERS
from opus_bench.report import update_readme
from opus_bench.results import load
from opus_bench.schema import RecordError
from opus_bench.tables import markdown

from .comparison import REPORTED
from .measurement import newest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("table3", "table5", "table6", "figure1", "figure4", "figure7", "table7", "table8", "ablations",
           "offline_suite", "sketch_error", "noise_budget", "utility_validity", "selection_entropy", "noise_injection",
           "muon_map", "scoring", "overhead", "coverage", "audit", "cost", "figure5_6", "replay")
ELSEWHERE = {"scoring": "benchmarks.scoring"}  # modules that are not reproduce.<name>
VIEWS = ("table5", "table6", "figure1", "figure4", "figure7")  # of Table 3's records
# experiments whose records a page is made from, where it has another name; None: of all
READS: dict[str, str | None] = {"overhead": "scoring", **dict.fromkeys(VIEWS, "table3"), "cost": None, "replay": None}
WITHOUT_RECORDS = ("audit",)  # pages that are made from the paper's numbers alone
WITHOUT_SCALE = (*ELSEWHERE, "overhead", "coverage")
INSTRUMENT = """\
# The instrument: what each approximation costs

Made by `python -m reproduce.pages` from the records of the pages named in the last column: their last stage, mean over
seeds. Orders of magnitude and signs carry over at best."""
MARKERS = ("<!-- instrument -->", "<!-- end of instrument -->")
Cell = Callable[[list[dict]], str]


def last(records: Sequence[dict], name: str, key: str = "value", **wanted: object) -> str:
    """Mean over records of a metric's key at the last stage that has such rows, three significant digits.

    Raises:
        RecordError: no row is so.
    """
    rows = [row for record in records for row in record["metrics"]
            if row["name"] == name and all(row.get(k) == v for k, v in wanted.items())]
    if not rows:
        raise RecordError(f"no metric {name!r} with {wanted} in {[record['run_id'] for record in records]}")
    end = max(row["step"] for row in rows)
    values = [row[key] for row in rows if row["step"] == end]
    return f"{math.fsum(values) / len(values):.3g}"


def lost(source: str, score: str = "alignment") -> Cell:
    """Spearman lost to a source of the noise budget."""
    return lambda records: last(records, "spearman lost", source=source, score=score)


def pair(*cells: Cell) -> Cell:
    """Several numbers in one cell."""
    return lambda records: ", ".join(cell(records) for cell in cells)


QUESTIONS: tuple[tuple[str, str, Cell], ...] = (
    ("sketch_error", "sketch of 8,192 buckets a weight: Spearman of U with exact U",
     lambda r: last(r, "scatter", "utility_spearman", weight="all", width=8192)),
    ("sketch_error", "the same of 32 buckets, with as many weight elements per bucket as GPT-2 XL has at 8,192",
     lambda r: last(r, "scatter", "utility_spearman", weight="all", width=32)),
    ("sketch_error", "scatter at 8,192, measured and as the stated variance predicts (of the exact norm)",
     pair(lambda r: last(r, "scatter", weight="all", width=8192),
          lambda r: last(r, "scatter", "predicted_scatter", weight="all", width=8192))),
    ("noise_budget", "Spearman of alignment lost to the sketch of 8,192", lost("sketch of 8,192 buckets")),
    ("noise_budget", "... to another proxy batch of 8", lost("another proxy of 8")),
    ("noise_budget", "... to a score window of a quarter of the sequence", lost("window of 1/4 of the sequence")),
    ("noise_budget", "... to a proxy gradient 8 updates old", lost("proxy's gradient of 8 steps ago")),
    ("noise_budget", "... to labels shifted twice", lost("labels shifted twice")),
    ("noise_budget", "... to bfloat16 autocast", lost("bfloat16 autocast")),
    ("utility_validity", "Pearson of alignment, and of the paper's U, with what a real step on 8 samples does",
     pair(*(lambda r, name=name: last(r, "pearson", predictor=name, target="proxy", set_size=8, factor=1.0)
            for name in ("alignment", "paper's U")))),
    ("utility_validity", "... of the adjoint of the real optimizer map",
     lambda r: last(r, "pearson", predictor="adjoint", target="proxy", set_size=8, factor=1.0)),
    ("utility_validity", "curvature along the candidates' mean update, where the paper's H = I says 1",
     lambda r: last(r, "curvature", along="mean update", layers="blocks")),
    ("selection_entropy", "total variation from uniform of a draw at temperature .9: paper, released",
     pair(*(lambda r, arm=arm: last(r, "effective_share", "total_variation", arm=arm, temperature_unit="raw",
                                    temperature=0.9)
            for arm in ("paper", "released")))),
    ("noise_injection", "AUC for random tokens: paper, calibrated",
     pair(*(lambda r, arm=arm: last(r, "detection_auc", selector=f"OPUS ({arm})", kind="random tokens")
            for arm in ("paper", "calibrated")))),
    ("noise_injection", "random tokens: share among the kept minus share among the offered (negative: filtered out): "
                        "paper, calibrated",
     pair(*(lambda r, arm=arm: last(r, "kept_excess", selector=f"OPUS ({arm})", kind="random tokens")
            for arm in ("paper", "calibrated")))),
    ("muon_map", "Muon: distance of S from a multiple of the identity over its norm, mean of matrices",
     lambda r: last(r, "distance")),
    ("muon_map", "Muon: cosine of P g with the derivative of the real map, and of g itself with it",
     pair(lambda r: last(r, "direction_cosine", weight="all"),
          lambda r: last(r, "direction_cosine", "identity_direction_cosine", weight="all"))),
    ("muon_map", "Muon: cosine of P g with g, which is 1 where P does nothing",
     lambda r: last(r, "direction_cosine", "frozen_identity_cosine", weight="all")),
)


def instrument_block(results_dir: Path, scale: str = "smoke") -> str:
    """The README's table of what the validation experiments found: last stage, mean over seeds."""
    rows = []
    for experiment, question, cell in QUESTIONS:
        records = [r for r in newest(load(results_dir / "runs", experiment)) if r["scale"] == scale]
        cells = []
        for optimizer in ("adamw", "muon"):
            mine = [r for r in records if r["config"]["optimizer"] == optimizer]
            cells.append(cell(mine) if mine else "–")
        seeds = len({r["config"]["seed"] for r in records})
        source = f"[{experiment}](results/tables/{experiment}.md), n = {seeds}" if records else (
            f"not run: `python -m reproduce.{experiment} --scale {scale}`")
        rows.append([question, *cells, source])
    return markdown(["", *(OPTIMIZERS[name] for name in ("adamw", "muon")), "page, seeds"], rows)


def write(results_dir: Path, scripts: Sequence[str] = SCRIPTS) -> tuple[list[Path], list[str]]:
    """Pages and figures of every script that has records, the results page, the README's blocks; what was not run."""
    paths, missing = [], []
    for name in scripts:
        module = ELSEWHERE.get(name, f"reproduce.{name}")
        if name not in WITHOUT_RECORDS and not load(results_dir / "runs", READS.get(name, name)):
            options = "" if name in WITHOUT_SCALE else " --scale smoke"
            missing.append(f"{name}: not run: no record; `python -m {module}{options}` makes them")
            continue
        paths += importlib.import_module(module).write(results_dir)
    if paths:
        paths += [_page(results_dir, "instrument", f"{INSTRUMENT}\n\n{instrument_page(results_dir)}"),
                  *_not_run(results_dir, missing), site.write(results_dir, REPORTED)]
    readme = results_dir.absolute().parent / "README.md"
    if readme.exists() and MARKERS[0] in readme.read_text(encoding="utf-8"):
        update_readme(readme, MARKERS, instrument_block(results_dir))
        paths.append(readme)
    return list(dict.fromkeys(paths)), missing


def instrument_page(results_dir: Path) -> str:
    """The same as a page of results/tables: with its links from there."""
    return instrument_block(results_dir).replace("](results/tables/", "](")


def _not_run(results_dir: Path, missing: Sequence[str]) -> list[Path]:
    """A page of what has no record, so that whoever binds the pages says it too; none where nothing is missing."""
    if missing:
        return [_page(results_dir, "not_run", "# Not run\n\n" + "\n".join(f"- {line}" for line in missing))]
    (results_dir / "tables" / "not_run.md").unlink(missing_ok=True)
    return []


def _page(results_dir: Path, name: str, text: str) -> Path:
    path = results_dir / "tables" / f"{name}.md"
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
    return path


def main() -> int:
    """Exit code 0, 2 after one line about records that are damaged or not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="FOLDER",
                        help="folder that holds runs/ and gets tables/ and figures/ (default: results)")
    options = parser.parse_args()
    try:
        paths, missing = write(options.results)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in paths:
        print(f"wrote {os.path.relpath(path)}")
    for line in missing:
        print(line)
    if len(missing) + len(WITHOUT_RECORDS) == len(SCRIPTS):
        print(f"error: {options.results / 'runs'} holds no records", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
