"""Score a pool of documents by a static scorer and keep a fixed part of it.

    python -m baselines.score --scorer fineweb-edu --pool hub:HuggingFaceFW/fineweb:sample-10BT --out edu --share .1
    python -m baselines.score --scorer dsir --target wiki.jsonl --pool shards/ --out dsir --share .5 --temperature 1
    python -m baselines.score --list

The same command goes on where it was interrupted; with another rule (--tokens, --share, --temperature) and
the same --out it chooses again without scoring.  With --executor slurm the first call submits the jobs, and
the same command, once they are done, chooses.  Exit codes as of opus-bench.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from opus_bench.cli import Parser
from opus_bench.documents.embedding import model_identity
from opus_bench.documents.files import Fields, PoolFile, pool_files
from opus_bench.documents.options import (
    check_pool_options, model_options, open_pool, outcome_text, pool_options, pool_plan, pool_text,
)
from opus_bench.documents.scored import Rule, open_plan, summaries, write_chosen

from .raters import CRITERIA
from .scorers import FITTED, PUBLISHED, ScorerOptions, build_scorer, check_scorer, fit_scorer


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    command = Parser(prog="python -m baselines.score", description=__doc__,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--list", action=List, nargs=0,
                         help="print what is known of every scorer, and stop (default: go on)")
    command.add_argument("--scorer", required=True, metavar="NAME", help=f"{', '.join(PUBLISHED)} (no default)")
    pool_options(command)
    group = command.add_argument_group("scorer")
    group.add_argument("--model", default=None, metavar="WHERE",
                       help="folder, file or hub id in place of the published model; a saved fit of dsir or classifier "
                            "(default: the published one)")
    group.add_argument("--target", nargs="+", default=[], metavar="SOURCE",
                       help="target text that dsir and classifier are fitted to, as --pool (default: none)")
    group.add_argument("--criterion", default="educational_value", choices=(*CRITERIA, "mean"),
                       help="of qurating (default: %(default)s)")
    group.add_argument("--keep", default="low", choices=("low", "high"),
                       help="losses that perplexity keeps (default: %(default)s)")
    group.add_argument("--classifier-tokenizer", default=None, metavar="WHERE",
                       help="of ultra-fineweb, folder (default: that of its hub repository)")
    group.add_argument("--shortest", type=int, default=100, metavar="N",
                       help="words below which dsir never keeps a document (default: %(default)s, as published)")
    model_options(group)
    group = command.add_argument_group("selection, one of --tokens and --share")
    group.add_argument("--tokens", type=int, default=None, metavar="N",
                       help="tokens to keep (default: as --share says)")
    group.add_argument("--share", type=float, default=None, metavar="X",
                       help="share of the documents to keep, in (0, 1] (default: as --tokens says)")
    group.add_argument("--per-file", action="store_true", help="the share of every file (default: of the pool)")
    group.add_argument("--temperature", type=float, default=None, metavar="X",
                       help="keep a sample, p proportional to exp(score / X); published: 1 of dsir, 2 of qurating "
                            "(default: keep the highest scores)")
    group.add_argument("--standardize", action="store_true",
                       help="scores to mean 0 and standard deviation 1 before the temperature, as published of "
                            "qurating (default: scores as they are)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample (default: %(default)s)")
    group = command.add_argument_group("where it runs")
    group.add_argument("--executor", choices=("local", "slurm", "ray"), default="local",
                       help="datatrove's executor (default: %(default)s)")
    group.add_argument("--tasks", type=int, default=1, metavar="N",
                       help="parts that the pool's files are dealt to (default: %(default)s)")
    group.add_argument("--workers", type=int, default=1, metavar="N", help="tasks run at a time (default: %(default)s)")
    group.add_argument("--time", default=None, metavar="HH:MM:SS", help="limit of a Slurm job (no default)")
    group.add_argument("--partition", default=None, metavar="NAME", help="of Slurm (no default)")
    group.add_argument("--cpus", type=int, default=1, metavar="N",
                       help="of a task, slurm and ray (default: %(default)s)")
    group.add_argument("--gpus", type=int, default=0, metavar="N",
                       help="of a task, slurm and ray (default: %(default)s)")
    group.add_argument("--memory-gb", type=int, default=8, metavar="N",
                       help="of a task, GB, slurm and ray (default: %(default)s)")
    command.add_argument("--dry-run", action="store_true", help="print the plan and stop (default: go on)")
    return command


class List(argparse.Action):
    """--list: print the facts of every scorer and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        for name, known in PUBLISHED.items():
            print(name, *(f"  {key}: {value}" for key, value in dataclasses.asdict(known).items()), sep="\n")
        parser.exit()


def score(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    name = options.scorer
    check_scorer(name)
    fields = check_pool_options(options)
    rule = Rule(options.tokens, options.share, options.per_file, options.temperature, options.seed, options.standardize)
    if bool(options.target) != (name in FITTED and options.model is None):
        raise ValueError(f"scorer {name} is fitted: give --target, or --model with a saved fit, and not both"
                         if name in FITTED else f"scorer {name} has weights; leave --target out")
    if name == "perplexity" and options.model is None:
        raise ValueError("scorer perplexity needs a reference model; give --model")
    known = {field.name for field in dataclasses.fields(ScorerOptions)}
    chosen = ScorerOptions(**{key: value for key, value in vars(options).items() if key in known})
    try:
        from .pipeline import Resources, ScorePool, executor
    except ImportError as error:
        raise ValueError(f"scoring runs on datatrove: pip install 'opus_bench[baselines]' ({error})") from error
    resources = Resources(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Resources)})

    files, target = open_pool(options, fields), pool_files(options.target) if options.target else []
    identity = dataclasses.asdict(chosen) | {"model": model_identity(chosen.model or PUBLISHED[name].model)}
    del identity["device"]  # where it runs is no part of what is computed
    plan = {"scorer": name, **identity, "target": [model_identity(str(f.path)) if f.path else f.name for f in target],
            **pool_plan(options, files)}
    print(pool_text(options, files))
    print(f"score: {name}, {plan['model']}; it reads {PUBLISHED[name].reads}")
    print(f"keep: {_rule_text(rule)}; published convention: {PUBLISHED[name].keeps}; to {options.out}")
    if options.dry_run:
        return 0
    open_plan(options.out, plan)
    if target:
        fitted = options.out / "scores" / "fitted.npz"
        if not fitted.exists():
            print(f"fitting {name} on {len(target)} target files and the pool")
            fit_scorer(name, chosen, _texts(target, Fields(fields.text, fields.id)), _texts(files, fields)).save(fitted)
        chosen = dataclasses.replace(chosen, model=str(fitted))
    if None in summaries(options.out, files):
        tokenizer = None if options.token_field else options.tokenizer
        sources = [_absolute(source) or source for source in options.pool]
        away = dataclasses.replace(chosen, model=_absolute(chosen.model),
                                   classifier_tokenizer=_absolute(chosen.classifier_tokenizer))
        step = ScorePool(name, away, options.out.absolute(), sources, fields, _absolute(tokenizer), options.chunk)
        if resources.executor == "local":
            build_scorer(name, away)  # what is amiss is said once and now, not by every task
        executor(step, options.out, resources).run()
    waiting = summaries(options.out, files).count(None)
    if waiting:
        print(f"{waiting} of {len(files)} files are not scored yet; once the jobs are done, run the same command")
        return 0
    manifest = write_chosen(options.out, files, fields, rule, plan, published=dataclasses.asdict(PUBLISHED[name]))
    print(outcome_text(options.out, manifest))
    return 0


def _absolute(where: str | None) -> str | None:
    """A path that exists in its absolute form, which holds in every folder; anything else as it is."""
    return where if where is None or not Path(where).exists() else str(Path(where).absolute())


def _rule_text(rule: Rule) -> str:
    share = f"{rule.share:g} of the documents" + " of every file" * rule.per_file if rule.share else ""
    amount = share or f"{rule.tokens:,} tokens"
    if rule.temperature is None:
        return f"the highest scores, {amount}"
    return f"a sample at temperature {rule.temperature:g}{' of standardised scores' * rule.standardize}, {amount}"


def _texts(files: Sequence[PoolFile], fields: Fields) -> Iterator[str]:
    return (document.text for document in itertools.chain.from_iterable(file.documents(fields) for file in files))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        return score(options)
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
