"""The command ``opus-bench``: validate the estimators here, rebuild the report, check the machine.

    opus-bench validate                     # sketched against exact utilities, about a minute on 2 cores
    opus-bench report                       # tables and figures from the records
    opus-bench doctor                       # what this machine has for each scale

Experiments are scripts of their own: ``python -m reproduce.table3 --help``.
Exit codes: 0; 1 when doctor finds something missing; 2 after one line about bad input; 130 on ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .validation.findings import Validation

ROOT = Path(__file__).resolve().parent.parent
REPORTED = ROOT / "reproduce" / "reported.csv"
# as findings.Settings, which is not imported before it is needed
STEPS, WIDTHS = 60, (512, 2048, 8192, 32768)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> None:
        print(f"error: {message}; see `{self.prog} --help`", file=sys.stderr)
        sys.exit(2)


def parser() -> argparse.ArgumentParser:
    """The options of every sub-command."""
    top = Parser(prog="opus-bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=summary, description=summary)
        made.set_defaults(run=run)
        return made

    one = command("report", report, "write tables and figures from the records of finished runs")
    one.add_argument("--results", type=Path, default=ROOT / "results", metavar="FOLDER",
                     help="folder that holds runs/ and gets tables/ and figures/ (default: results of the repository)")
    one.add_argument("--reported", type=Path, default=REPORTED, metavar="FILE.csv",
                     help="the paper's numbers, percent or nat/token (default: reproduce/reported.csv)")

    one = command("validate", validate, "compare sketched with exact utilities on a small model trained here on real "
                                        "text; about a minute on 2 cores, and a download of 6 MB the first time")
    one.add_argument("--steps", type=int, default=STEPS, metavar="N",
                     help="optimizer updates before scoring (default: %(default)s)")
    one.add_argument("--widths", type=int, nargs="+", default=WIDTHS, metavar="N",
                     help=f"sketch widths, buckets per weight (default: {' '.join(map(str, WIDTHS))}; the paper's: 8192)")
    one.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw",
                     help="adamw, or muon for the blocks' matrices and adamw for the rest (default: %(default)s)")
    one.add_argument("--scale", choices=("tiny", "ci"), default="tiny",
                     help="size of the model: tiny, 4 layers of width 96; ci, 2 of width 64 (default: %(default)s)")
    one.add_argument("--seed", type=int, default=0, metavar="N",
                     help="of weights, order of the data and draws (default: %(default)s)")
    one.add_argument("--output", type=Path, default=None, metavar="FILE.json",
                     help="also write every number, as JSON (default: none is written)")
    one.add_argument("--force", action="store_true", help="replace the file of --output (default: refuse)")

    one = command("doctor", doctor, "show what this machine has for each scale, and the mend for what is missing")
    one.add_argument("--results", type=Path, default=ROOT / "results", metavar="FOLDER",
                     help="folder that records will be written to (default: results of the repository)")
    return top


def report(options: argparse.Namespace) -> int:
    from .report import report as write_report

    for path in write_report(options.results, options.reported):
        print(f"wrote {os.path.relpath(path)}")
    return 0


def validate(options: argparse.Namespace) -> int:
    from .corpus import CorpusSpec, build_corpus
    from .provenance import code_version, environment
    from .validation.validate import Settings
    from .validation.validate import validate as compare

    settings = Settings(options.optimizer, options.scale, options.steps, tuple(options.widths), options.seed)
    if options.output is not None:
        check_output(options.output, options.force)
    found = compare(settings, build_corpus(CorpusSpec.ci()))
    print(validation_text(found))
    if options.output is not None:
        content = {**found.plain(), "code_version": code_version(), "environment": environment()}
        write_json(content, options.output, options.force)
        print(f"wrote {options.output}")
    return 0


def doctor(options: argparse.Namespace) -> int:
    from .doctor import examine

    checks = examine(options.results)
    print(table(("for", "what", "found", ""), [(c.scale, c.what, c.found, c.state) for c in checks]))
    for c in checks:
        if c.mend:
            print(f"{c.what}: {c.mend}")
    return int(any(c.required and c.state == "missing" for c in checks))


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned columns: text to the left, numbers (given as strings) to the right by their header."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    right = [all(row[i][:1].isdigit() or row[i][:1] == "-" for row in cells[1:]) for i in range(len(header))]
    return "\n".join(
        "  " + "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right)).rstrip()
        for row in cells
    )


def validation_text(v: Validation) -> str:
    """Tables with a line of explanation each, and the verdict."""
    s, parts = v.settings, []
    parts.append(
        f"GPT-2 of the paper's architecture, size {s.scale}: {v.parameters:,} parameters, {s.steps} steps of "
        f"{s.optimizer} on\n{s.run_config.selected_size} random sequences of {s.length} tokens, training loss "
        f"{v.training_loss[0]:.2f} to {v.training_loss[1]:.2f} nat/token.  A small model: orders of magnitude\n"
        f"and signs carry over at best, numbers do not.  {s.candidates} candidates, proxy of {s.proxy_size}, live P_t."
    )
    parts.append("1. Exact?  Factored utilities against per-sample autograd in float64, relative error (norm / norm), "
                 f"{v.oracle[0].candidates} candidates.\n" + table(
                     ("dtype", "alignment", "Gram"),
                     [(e.dtype, f"{e.alignment:.1e}", f"{e.gram:.1e}") for e in v.oracle]))
    parts.append(
        f"2. Sketched against exact: mean over {s.hash_seeds} hash seeds (lowest in brackets).  U: the paper's, eta and "
        "eta^2,\n   with a quarter of the candidates already selected.  rms: root mean square error over seeds / norm, "
        "measured\n   and as the stated variance of the sketch predicts; ratio: measured / predicted variance.\n" + table(
            ("width", "Spearman of alignment", "Spearman of U", "error of alignment", "rms", "predicted",
             "ratio (s.e.)", "error of Gram"),
            [(f"{x.width:,}", f"{x.alignment_spearman:.4f} ({x.alignment_spearman_lowest:.4f})",
              f"{x.utility_spearman:.4f} ({x.utility_spearman_lowest:.4f})", f"{x.alignment_error:.4f}",
              f"{x.scatter:.4f}", f"{x.predicted_scatter:.4f}",
              f"{x.variance_ratio:.2f} ({x.variance_ratio_stderr:.2f})", f"{x.gram_error:.4f}") for x in v.sketch]))
    chance = s.candidates // 2 / s.candidates
    parts.append(
        f"3. Choosing half by sketched U: share that exact U chooses too ({chance:.2f} by chance).\n" + table(
            ("width", "highest before selection", "greedy, redundancy included"),
            [(f"{x.width:,}", f"{x.top_overlap:.3f}", f"{x.greedy_overlap:.3f}") for x in v.sketch]))
    parts.append(
        "4. How far from uniform each arm draws the half.  ESS share: effective sample size / candidates left, 1 is\n"
        "   uniform; total variation from uniform, 0 is uniform.  Means over the picks.\n" + table(
            ("arm", "spread of U", "temperature", "ESS share", "total variation"),
            [(a.arm, f"{a.utility_std:.2g}", f"{a.temperature:.2g}", f"{a.effective_share:.4f}",
              f"{a.total_variation:.4f}") for a in v.arms]))
    parts.append(
        f"5. Noise floor: Spearman of exact alignments when something else changes, {v.floor[0].pairs} proxy batches.\n"
        + table(("change", "Spearman", "lowest", "highest"),
                [(f.change, f"{f.spearman:.3f}", f"{f.lowest:.3f}", f"{f.highest:.3f}") for f in v.floor]))
    parts.append(f"elapsed: {v.seconds:.0f} s\nverdict (small model): {v.verdict}")
    return "\n\n".join(parts)


def check_output(path: Path, force: bool) -> None:
    """Find out before the computing that the file cannot be written.

    Raises:
        ValueError: the file exists and ``force`` is not given, or its folder does not exist.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give --output the name of a file")
    if path.exists() and not force:
        raise ValueError(f"{path} exists; give --force to replace it, or another --output")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path.absolute().parent} is not a folder; make it, or give another --output")
    with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", dir=path.absolute().parent):
        pass


def write_json(content: dict[str, Any], path: Path, force: bool) -> None:
    """The whole file or none; an existing one only with ``force``."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.absolute().parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        check_output(path, force)  # again: it may have appeared meanwhile
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (module docstring)."""
    top = parser()
    options = top.parse_args(arguments)
    if not hasattr(options, "run"):
        top.print_help()
        return 0
    try:
        return options.run(options)
    except (ValueError, OSError, FloatingPointError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
