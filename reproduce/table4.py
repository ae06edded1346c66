"""Table 4 of OPUS (arXiv:2602.05400): choosing from text of lower quality against training on text of higher.

    python -m reproduce.table4 --scale smoke     # about 15 min, 2 CPU cores; checks the pipeline
    python -m reproduce.table4 --scale ci        # under a minute; exercises the code
    python -m reproduce.table4 --dry-run         # prints the runs and stops
    python -m reproduce.table4 --scale paper --dry-run    # FineWeb-Edu of score 3 against 4 and 5

The paper parts FineWeb-Edu by the score of its classifier: OPUS chooses from score 3, everything else trains on scores
4 and 5.  Here, at ci and smoke, quality is the tier of a document's source: tiers 2 to 4 (documentation, mathematics,
code, catalogues, minified, foreign, corrupted) stand for the lower, tier 1 (encyclopedia, dictionary, recipes) for the
higher part.  Validation loss and proxy are encyclopedia for all, so the lower part has nothing of the target's own
domain.  Static scorers: at paper scale only.  Muon as in the paper unless --optimizers says otherwise.
Writes results/tables/table4.md and its figure from the records.
"""

from __future__ import annotations

import sys

from opus_bench.sources import QUALITY

from .comparison import Comparison, Method, losses_only
from .paper_rows import DEVIATIONS, Line, compared_lines, opus_lines
from .paper_settings import EDU_3, EDU_4_5, GPT2_LARGE, GPT2_XL, Setting
from .runner import main
from .scales import Scale

LOWER, HIGHER = "(tiers 2-4)", "(tier 1)"
S3, S45 = "s3", "s4+5"  # the paper's names


def methods(scale: Scale) -> list[Method]:
    """Random and OPUS in two arms on both parts, and highest loss and GREATS on the higher."""
    parts = {LOWER: tuple(name for name in scale.corpus.domains if QUALITY[name] > 1),
             HIGHER: tuple(name for name in scale.corpus.domains if QUALITY[name] == 1)}
    window = {"window": scale.window}
    rows = []
    for part, paper in ((LOWER, S3), (HIGHER, S45)):
        config, random = {"domains": parts[part]}, f"Random {part}"
        base = "Random " + HIGHER if part == LOWER else None
        rows.append(Method(random, "random", base=base, random=random, paper_row=f"Random({paper})", config=config))
        if part == HIGHER:
            rows.append(Method(f"PPL (high) {part}", "perplexity", {"keep": "high", **window}, random=random,
                               paper_row=f"PPL({paper})", config=config, deviations=DEVIATIONS["perplexity"]))
            rows.append(Method(f"GREATS {part}", "greats", window, random=random, paper_row=f"GREATS({paper})",
                               config=config, deviations=DEVIATIONS["greats"]))
        for arm in ("paper", "calibrated"):
            options = {"arm": arm, **window, "sketch_width": scale.sketch_width}
            wider = {"proxy_size": 4 * scale.run["proxy_size"]} if arm == "calibrated" else {}
            rows.append(Method(f"OPUS {part}", "opus", options, arm, random=random, paper_row=f"OPUS({paper})",
                               base=f"OPUS {HIGHER} ({arm})" if part == LOWER else None,
                               config={**config, **wider}, deviations=DEVIATIONS.get(arm, ())))
    return rows


def large_lines(setting: Setting) -> list[Line]:
    """The paper's rows, OPUS in two arms."""
    arms = ("paper", "calibrated")
    return [
        compared_lines(setting, EDU_3.name, S3)[0],
        *opus_lines(setting, arms, EDU_3.name, S3),
        *compared_lines(setting, EDU_4_5.name, S45),
        *opus_lines(setting, arms, EDU_4_5.name, S45),
    ]


def deviations(scale: Scale) -> tuple[str, ...]:
    """Those of the scale, and what stands for the scores."""
    return (*(text.replace("instead of FineWeb", "instead of FineWeb-Edu") for text in losses_only(scale)),
            "tiers of sources instead of FineWeb-Edu's scores: tier 1 for 4 and 5, tiers 2 to 4 for 3",
            "no static scorers")


TABLE = Comparison(
    experiment="table4",
    item="Table 4",
    title="Table 4 of arXiv:2602.05400: choosing from lower quality against training on higher",
    heading="Table 4: quality of the pool",
    about=(
        "Tier 1: encyclopedia, dictionary, recipes; tiers 2-4: all else, without any text of the target's domain. Each "
        "part has its own Random; the base row of a row on tiers 2-4 is the same method on tier 1, so its last "
        "differences say what the better pool is worth, where the paper asks whether choice makes up for it."
    ),
    methods=methods,
    sizes={"ci": {"steps": 12, "evaluations": 2}, "smoke": {}},
    seeds={"ci": 1, "smoke": 3},
    optimizers=("muon",),
    deviations=deviations,
    paper_model="GPT-2 XL",
    paper_corpus="FineWeb-Edu",
    settings=(GPT2_LARGE, GPT2_XL),
    large_lines=large_lines,
)
runs, write, large_runs = TABLE.runs, TABLE.write, TABLE.large_runs

if __name__ == "__main__":
    sys.exit(main(runs, __doc__, write, large_runs))
