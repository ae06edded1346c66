"""The command ``opus-bench proxy``: options, plan and run of BENCH-PROXY and of the standard proxy."""

from __future__ import annotations

import argparse

from opus_bench.documents.options import (
    check_pool_options, counter, model_options, open_pool, outcome_text, pool_options, pool_plan, pool_text,
)

SUMMARY = ("choose the documents of a pool that are most like benchmark items (BENCH-PROXY), "
           "or a uniform sample of it (--kind standard)")


def proxy_options(command: argparse.ArgumentParser) -> None:
    """The options of ``opus-bench proxy``."""
    pool_options(command)
    group = command.add_argument_group("benchmark items")
    group.add_argument("--tasks", nargs="+", default=[], metavar="NAME",
                       help="lm-eval's tasks or groups; paper: the paper's ten tasks (default: none)")
    group.add_argument("--item-split", choices=("auto", "train", "validation", "fewshot", "test"),
                       default="auto",
                       help="split of the tasks that items are taken from; auto: training, else validation, else that "
                            "of few-shot examples; what a task is evaluated on leaks and is warned of "
                            "(default: %(default)s)")
    group.add_argument("--item-limit", type=int, default=None, metavar="N",
                       help="items of a task at most, a fixed random choice (default: all)")
    group.add_argument("--items", nargs="+", default=[], metavar="FILE.jsonl",
                       help="items in lines with text, or context, choices and answer (default: none)")
    group = command.add_argument_group("scores")
    group.add_argument("--encoder", default="arctic", metavar="NAME",
                       help="arctic (the paper's: Snowflake/snowflake-arctic-embed-l-v2.0), minilm (a pinned package "
                            "of 83 MB, no hub), or any sentence-transformers model by hub id or folder "
                            "(default: %(default)s)")
    model_options(group)
    group = command.add_argument_group("selection")
    group.add_argument("--kind", choices=("bench", "standard"), default="bench",
                       help="bench: most like the items; standard: uniform (default: %(default)s)")
    group.add_argument("--rule", choices=("global", "per-file"), default="global",
                       help="global: the best documents of the pool up to --tokens, as in the paper; per-file: the top "
                            "--share of every file, after the released code (default: %(default)s)")
    group.add_argument("--tokens", type=int, default=None, metavar="N",
                       help="tokens to keep (default: 30,000,000 with the global rule, the paper's)")
    group.add_argument("--share", type=float, default=None, metavar="X",
                       help="share of the documents of a file to keep, in (0, 1], with --rule per-file (no default: "
                            "the released share is not known)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the uniform sample (default: %(default)s)")
    command.add_argument("--dry-run", action="store_true", help="print the plan and stop (default: go on)")


def run_proxy(options: argparse.Namespace) -> int:
    """Run ``opus-bench proxy``; returns the exit code."""
    from opus_bench.documents import proxy
    from opus_bench.documents.embedding import load_encoder, model_identity
    from opus_bench.documents.items import Items, file_items, merged, task_items
    from opus_bench.documents.scored import open_plan, score_files, write_chosen

    fields = check_pool_options(options)
    files = open_pool(options, fields)
    standard = options.kind == "standard"
    if standard and (options.tasks or options.items or options.rule == "per-file"):
        raise ValueError("--kind standard is a uniform sample of the pool: leave --tasks, --items and --rule per-file "
                         "out")
    if options.rule == "per-file":
        if options.share is None or options.tokens is not None:
            raise ValueError("--rule per-file keeps a share of every file: give --share, and no --tokens")
        rule = proxy.released_rule(options.share)
    elif options.share is not None:
        raise ValueError("--share goes with --rule per-file; the global rule keeps --tokens")
    else:
        tokens = proxy.TOKENS if options.tokens is None else options.tokens
        rule = proxy.standard_rule(tokens, options.seed) if standard else proxy.Rule(tokens=tokens)
    if standard:
        items, scorer = Items((), (), ()), {"scorer": "standard: 0 for all"}
    else:
        found = [task_items(options.tasks, options.item_split, options.item_limit)] if options.tasks else []
        items = merged(*found, *([file_items(options.items)] if options.items else []))
        scorer = {"scorer": "max cosine", "encoder": model_identity(options.encoder), "max_tokens": options.max_tokens,
                  "batch_size": options.batch_size, "items": list(items.sources),
                  "items_sha256": proxy.items_sha256(items)}
    plan = {**scorer, **pool_plan(options, files)}
    print(pool_text(options, files))
    print(f"score: {plan['scorer']}" + ("" if standard else
          f" of {plan['encoder']} to {len(set(items.texts)):,} items of {', '.join(items.sources)}"))
    print("keep: " + (f"the top {rule.share:g} of every file" if rule.per_file else f"{rule.tokens:,} tokens")
          + f", tokens by {plan['tokens_by']}; to {options.out}")
    if options.dry_run:
        return 0
    open_plan(options.out, plan)
    count = counter(options)
    if standard:
        score = proxy.no_preference
    else:
        score = proxy.MaxCosine(load_encoder(options.encoder, options.max_tokens, options.batch_size, options.device,
                                             options.trust_remote_code), items)
    score_files(options.out, files, range(len(files)), score, count, fields, options.chunk)
    manifest = write_chosen(options.out, files, fields, rule, plan, leakage=list(items.leakage))
    print(outcome_text(options.out, manifest))
    return 0
