"""What a user's first commands ask of a hub, in a process of its own: prints a JSON object of outcomes.

    HF_ENDPOINT=http://... HF_HOME=... python tests/hub_client.py PART ...

An outcome is a plain value, or "error: ..." in one line.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

QWEN = "Qwen/Qwen3-8B-Base"
TASKS = ("StoryCloze", "AX-b", "RACE-M", "PIQA", "SIQA", "WinoGrande", "WSC", "ARC-C", "CommonsenseQA")


def outcome(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception as error:
        return f"error: {type(error).__name__}: {' '.join(str(error).split())}"


def text() -> dict[str, Any]:
    """A pool of FineWeb-Edu's two buckets by Qwen's tokenizer."""
    from opus_bench.pools.build import build_pool
    from opus_bench.pools.shards import read_manifest
    from opus_bench.pools.spec import PoolSpec

    def pool(*sources: str, **options: Any) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as out:
            manifest = read_manifest(build_pool(PoolSpec(sources, QWEN, 40, **options), Path(out)))
        return {name: domain["documents"] for name, domain in manifest["domains"].items()}

    export = "hf://datasets/HuggingFaceFW/fineweb-edu@refs/convert/parquet/sample"
    return {"sample": outcome(lambda: pool("fineweb-edu", subset="sample-10BT")),
            "dump": outcome(lambda: pool("fineweb-edu", subset="CC-MAIN-2024-10")),
            "export": outcome(lambda: pool(f"fineweb-edu={export}")),
            "absent": outcome(lambda: pool("fineweb-edu", subset="sample-1BT"))}


def tasks() -> dict[str, Any]:
    """Tasks of the suites as their own task files load them: by part, data set, commit and items."""
    from opus_bench.evaluation.paper_items import Loader, describe
    from opus_bench.evaluation.paper_suite import hub_problem
    from opus_bench.evaluation.paper_tasks import SUITES

    chosen = [task for suite in SUITES.values() for task in suite if task.name in TASKS]
    with tempfile.TemporaryDirectory() as cache:
        loader = Loader(chosen, None, cache, hub_problem)

        def load(task: Any) -> list[tuple]:
            rows = (describe(name, part, loader, [1.0]) for name, part in loader.load(task)["tasks"].items())
            return [(row["dataset"], row["config"], row["split"], row["revision"], row["n_available"]) for row in rows]

        return {task.name: outcome(lambda task=task: load(task)) for task in chosen}


def items() -> dict[str, Any]:
    """Benchmark items of BENCH-PROXY."""
    from opus_bench.documents.items import task_items

    return {"items": outcome(lambda: task_items(["wsc", "piqa"]).sources)}


def models() -> dict[str, Any]:
    """A model's outline and weights as training takes them, the encoder and the scorers."""
    from baselines.scorers import build_scorer
    from opus_bench.documents.embedding import load_encoder
    from opus_bench.documents.proxy import token_counter
    from opus_bench.validation.own_inputs import model_outline, read_model, read_tokenizer
    from opus_bench.validation.own_settings import OwnSettings

    settings = OwnSettings(QWEN, "absent.npy")
    some = ["river stone", "planet music law"]
    found = {"outline": outcome(lambda: len(list(model_outline(settings).parameters()))),
             "weights": outcome(lambda: len(list(read_model(settings).parameters()))),
             "tokenizer": outcome(lambda: len(read_tokenizer(settings))),
             "count": outcome(lambda: token_counter(QWEN)(some)),
             "arctic": outcome(lambda: [load_encoder("arctic", device="cpu").embed(some, query).tolist()
                                        for query in (True, False)])}
    for name in ("dclm", "ultra-fineweb", "fineweb-edu", "qurating"):
        found[name] = outcome(lambda name=name: build_scorer(name).score(some).tolist())
    return found


if __name__ == "__main__":
    print(json.dumps({part: globals()[part]() for part in sys.argv[1:]}))
