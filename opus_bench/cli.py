"""The command ``opus-bench``: validate the estimators here, rebuild the report, choose a proxy, check the machine.

    opus-bench validate                     # sketched against exact utilities, about a minute on 2 cores
    opus-bench validate --model FOLDER --data FILE --report FILE.md        # the same on a model of your own
    opus-bench report                       # tables and figures from the records
    opus-bench proxy --help                 # documents most like benchmark items, out of a pool
    opus-bench evaluate --model FOLDER --suite paper       # the paper's benchmarks, or ood, cpt, offline
    opus-bench doctor                       # what this machine has for each scale
    opus-bench data --source fineweb --out DIR       # text at paper scale to token shards; --dry-run first
    opus-bench contamination --pool DIR --items FILE # which evaluation items stand in a pool

Experiments are scripts of their own: ``python -m reproduce.table3 --help``.
Exit codes: 0; 1 when doctor finds something missing, validate misses a threshold or evaluate could not run a
task; 2 after one line about bad input; 130 on ctrl-C.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import doctor

try:
    from .documents.command import SUMMARY, proxy_options, run_proxy
    from .evaluation.command import evaluate, evaluation_options
    from .pools import command as pool_commands
    from .validation.own_report import measures, text, threshold_help
    from .validation.own_settings import DTYPES, OPTIMIZERS, TOKEN_DTYPES, OwnSettings
except ModuleNotFoundError as lacking:
    sys.exit(f"error: {lacking.name} is not installed; `python -m opus_bench.doctor` names all that is missing")

if TYPE_CHECKING:
    from .validation.findings import Validation

ROOT = Path(__file__).resolve().parent.parent
REPORTED = ROOT / "reproduce" / "reported.csv"
# as findings.Settings, which is not imported before it is needed
STEPS, WIDTHS, SCALE = 60, (512, 2048, 8192, 32768), "tiny"
OWN = tuple(field.name for field in dataclasses.fields(OwnSettings) if field.name not in
            ("model", "optimizer", "widths", "seed"))  # options that go with --model alone


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

    one = command("report", report, "write Table 3, its figures and index.html, the page of all results, "
                                    "from the records of finished runs and the tables that lie beside them")
    one.add_argument("--results", type=Path, default=ROOT / "results", metavar="FOLDER",
                     help="folder that holds runs/ and gets tables/ and figures/ (default: results of the repository)")
    one.add_argument("--reported", type=Path, default=REPORTED, metavar="FILE.csv",
                     help="the paper's numbers, percent or nat/token (default: reproduce/reported.csv)")

    one = command("validate", validate, "compare sketched with exact utilities: on a small model trained here on real "
                                        "text (about a minute on 2 cores, and a download of 6 MB the first time), or "
                                        "with --model on a model and data of your own")
    one.add_argument("--steps", type=int, default=STEPS, metavar="N",
                     help="optimizer updates before scoring (default: %(default)s)")
    one.add_argument("--widths", type=int, nargs="+", default=WIDTHS, metavar="N",
                     help=f"sketch widths, buckets per weight (default: {' '.join(map(str, WIDTHS))}; the "
                          "paper's: 8192)")
    one.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="adamw",
                     help="adamw, or muon for the blocks' matrices and adamw for the rest; sgd with --model only "
                          "(default: %(default)s)")
    one.add_argument("--scale", choices=("tiny", "ci"), default=SCALE,
                     help="size of the model: tiny, 4 layers of width 96; ci, 2 of width 64 (default: %(default)s)")
    one.add_argument("--seed", type=int, default=0, metavar="N",
                     help="of weights, order of the data and draws (default: %(default)s)")
    one.add_argument("--output", type=Path, default=None, metavar="FILE.json",
                     help="also write every number, as JSON (default: none is written)")
    one.add_argument("--force", action="store_true",
                     help="replace the files of --output and --report (default: refuse)")
    own_options(one)

    proxy_options(command("proxy", run_proxy, SUMMARY))
    one = command("evaluate", evaluate, "evaluate a model with lm-eval on one of the suites; every task is put on disk "
                                        "when it is done, so the same command goes on after an interruption")
    evaluation_options(one)

    doctor.add_options(command("doctor", doctor.run, doctor.SUMMARY))

    pool_commands.data_options(command("data", pool_commands.data,
                                       "tokenise text at paper scale into a pool of shards"))
    pool_commands.contamination_options(command("contamination", pool_commands.contamination,
                                                "which evaluation items stand in a pool, by shared runs of words"))
    return top


def own_options(command: argparse.ArgumentParser) -> None:
    """Options of validate that go with --model; absent ones are None, and OwnSettings has the default."""
    d = OwnSettings("", "")
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.description = textwrap.fill(command.description or "", 80)
    command.epilog = f"thresholds, NAME=VALUE:\n{threshold_help()}"
    group = command.add_argument_group(
        "on a model of your own", "Nothing of the model is written to; exit code 1 if a threshold is missed.")

    def add(name: str, what: str, **options: Any) -> None:
        group.add_argument(name, help=what, default=options.pop("default", None), **options)

    add("--model", "folder that save_pretrained wrote, or a hub id; safetensors (default: the small model)",
        metavar="WHERE")
    add("--data", "needed with --model: text (.txt with blank lines between documents, .jsonl, .parquet) or token ids "
        "(.npy, .pt, .bin; flat or rows) (default: none)", metavar="FILE")
    add("--proxy-data", "text or tokens of the proxy (default: sequences of --data that serve nothing else)",
        metavar="FILE")
    add("--tokenizer", "folder or hub id, for text (default: that of --model)", metavar="WHERE")
    add("--dtype", f"of weights and optimizer state (default: {d.dtype})", choices=DTYPES)
    add("--trust-remote-code", "run code that comes with the model (default: refuse)", action="store_true")
    add("--text-field", f"of .jsonl and .parquet (default: {d.text_field})", metavar="NAME")
    add("--text-tokens", f"tokens read from the start of a text file (default: {d.text_tokens})", type=int, metavar="N")
    add("--token-dtype", f"of a .bin without header (default: {d.token_dtype})", choices=TOKEN_DTYPES)
    add("--length", "tokens per sequence, all scored (default: 512, or the model's context)", type=int, metavar="N")
    add("--candidates", f"sequences scored; half are chosen (default: {d.candidates})", type=int, metavar="N")
    add("--proxy-size", f"sequences per proxy batch (default: {d.proxy_size})", type=int, metavar="N")
    add("--proxy-pairs", f"pairs of proxy batches compared (default: {d.proxy_pairs})", type=int, metavar="N")
    add("--layers", f"weights scored: blocks, matrices, all, a kind, names or patterns (default: {d.layers[0]})",
        nargs="+", metavar="NAME")
    add("--windows", "shorter score windows compared with the whole, tokens; none: give no number (default: a quarter "
        "and half of the length)", type=int, nargs="*", metavar="N")
    add("--hash-seeds", f"independent sketches per width (default: {d.hash_seeds})", type=int, metavar="N")
    add("--oracle-candidates", f"sequences scored by torch.func in float64; 0 skips (default: {d.oracle_candidates})",
        type=int, metavar="N")
    add("--optimizer-steps", "real steps, in memory, before scoring (default: 10, or 0 with --optimizer-state)",
        type=int, metavar="N")
    add("--batch-size", f"sequences per optimizer step (default: {d.batch_size})", type=int, metavar="N")
    rates = ", ".join(f"{rate:g} {name}" for name, rate in OPTIMIZERS.items())
    add("--lr", f"learning rate (default: that of --optimizer-state, or {rates})", type=float, metavar="X")
    add("--adam-lr", "with muon, that of the adamw part (default: as --lr for adamw)", type=float, metavar="X")
    add("--optimizer-state", "torch.save of optimizer.state_dict(), for muon of the list [muon's, adamw's] "
        "(default: none)", metavar="FILE")
    add("--threshold", "hold a measure, named below, to a value; repeatable (default: none)", action="append",
        default=[], metavar="NAME=VALUE")
    add("--report", "also write a report as markdown (default: none is written)", type=Path, metavar="FILE.md")
    add("--dry-run", "print model, data, plan and memory, and stop (default: go on)", action="store_true",
        default=False)


def report(options: argparse.Namespace) -> int:
    from .report import report as write_report
    from .site.page import write as write_site

    for path in [*write_report(options.results, options.reported), write_site(options.results, options.reported)]:
        print(f"wrote {os.path.relpath(path)}")
    return 0


def validate(options: argparse.Namespace) -> int:
    given = [name for name in OWN if getattr(options, name) is not None]
    given += [name for name in ("threshold", "report", "dry_run") if getattr(options, name)]
    if options.model is not None:
        return validate_own(options, given)
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')} is for a model of your own; give --model")
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


def validate_own(options: argparse.Namespace, given: Sequence[str]) -> int:
    """validate on the user's model; ``given`` names the options that stand on the command line."""
    from .validation.own_report import found_sections, markdown, plan_sections
    from .validation.own_settings import check_files, judge, parse_thresholds, refuse_unmeasured

    if (options.steps, options.scale) != (STEPS, SCALE):
        raise ValueError("--steps and --scale are of the small model; with --model give --optimizer-steps")
    if options.data is None:
        raise ValueError("--model needs text or token ids; give --data")
    bounds = parse_thresholds(options.threshold)
    chosen = {name: getattr(options, name) for name in OWN if name in given}
    chosen = {name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()}
    settings = OwnSettings(model=options.model, optimizer=options.optimizer, widths=tuple(options.widths),
                           seed=options.seed, **chosen)
    files = [path for path in (options.output, options.report) if path is not None]
    if len({path.absolute() for path in files}) < len(files):
        raise ValueError(f"--output and --report are both {options.report}; give two names")
    for path in files:
        check_output(path, options.force)
    check_files(settings)
    from .provenance import code_version, environment
    from .validation.own_model import compare
    from .validation.own_plan import prepare

    plan = prepare(settings)
    refuse_unmeasured(bounds, plan.oracle_reason, plan.settings.windows or ())
    print(text(plan_sections(plan.plain)), flush=True)
    if options.dry_run:
        return 0
    content = compare(plan).plain()
    content |= {"thresholds": judge(content, bounds), "command": options.command, "code_version": code_version(),
                "environment": environment()}
    print("\n" + text(found_sections(content)))
    for path in files:
        if path is options.output:
            write_json(content, path, options.force)
        else:
            write_text(markdown(content), path, options.force)
        print(f"wrote {path}")
    return int(not all(threshold["met"] for threshold in content["thresholds"]))


def validation_text(v: Validation) -> str:
    """Tables with a line of explanation each, and the verdict."""
    s = v.settings
    return "\n\n".join([
        f"GPT-2 of the paper's architecture, size {s.scale}: {v.parameters:,} parameters, {s.steps} steps of "
        f"{s.optimizer} on\n{s.run_config.selected_size} random sequences of {s.length} tokens, training loss "
        f"{v.training_loss[0]:.2f} to {v.training_loss[1]:.2f} nat/token.  A small model: orders of magnitude\n"
        f"and signs carry over at best, numbers do not.  {s.candidates} candidates, proxy of {s.proxy_size}, live P_t.",
        text(measures(v.plain())),
        f"elapsed: {v.seconds:.0f} s\nverdict (small model): {v.verdict}",
    ])


def check_output(path: Path, force: bool) -> None:
    """Find out before the computing that the file cannot be written.

    Raises:
        ValueError: the file exists and ``force`` is not given, or its folder does not exist.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file")
    if path.exists() and not force:
        raise ValueError(f"{path} exists; give --force to replace it, or another name")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path.absolute().parent} is not a folder; make it, or give another name")
    with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", dir=path.absolute().parent):
        pass


def write_json(content: dict[str, Any], path: Path, force: bool) -> None:
    """As write_text; NaN and infinity are refused, which JSON does not know."""
    write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", path, force)


def write_text(content: str, path: Path, force: bool) -> None:
    """The whole file or none; an existing one only with ``force``."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.absolute().parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
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
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = top.parse_args(arguments)
    options.command = shlex.join(["opus-bench", *arguments])
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
