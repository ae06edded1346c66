"""Table 8 of OPUS (arXiv:2602.05400): buffer size, temperature and width of the sketch.

    python -m reproduce.table8 --scale smoke     # about 12 min, 2 CPU cores; checks the pipeline
    python -m reproduce.table8 --scale ci        # under a minute; exercises the code
    python -m reproduce.table8 --dry-run         # prints the runs and stops
    python -m reproduce.table8 --scale small --dry-run       # on one GPU; --scale paper: the paper's size

The rows of the paper for the arm `paper`, and for `calibrated` those of its knobs that correspond: the buffer,
and the effective share in place of the temperature (its utility is exact, so there is no width).
The paper's buffers 16, 32, 64 are a quarter, half and the whole of the scale's.  Half of a buffer is chosen, as
in the paper, and every run updates on the same tokens, so a smaller buffer means smaller batches and more steps;
each buffer therefore has its own Random.  Muon as in the paper unless --optimizers says otherwise.
Writes results/tables/table8.md and its figure from the records.
"""

from __future__ import annotations

import math
import sys

from opus_bench.sections import Row, final_loss, step_mean

from .comparison import Comparison, Method, losses_only
from .paper_rows import DEVIATIONS
from .paper_settings import GPT2_LARGE
from .runner import main
from .scales import Scale

BUFFER = 64  # the paper's default, here the scale's
TEMPERATURES = {".8": 0.8, ".9": 0.9, "1.0": 1.0}
BASE = "b=64,t=.9,m=8192 (paper)"


def methods(scale: Scale) -> list[Method]:
    """The rows: Random of each buffer, the paper's seven settings, and five of `calibrated`."""
    def buffer(size: int) -> dict:
        return {} if size == BUFFER else {"buffer": scale.run["buffer"] * size // BUFFER}

    def random(size: int) -> str:
        return "Random" if size == BUFFER else f"Random, b={size}"

    def paper(size: int, temperature: str, width: int) -> Method:
        name = f"b={size},t={temperature},m={width}"
        options = {"arm": "paper", "window": scale.window, "sketch_width": width,
                   "temperature": TEMPERATURES[temperature]}
        base = None if f"{name} (paper)" == BASE else BASE
        return Method(name, "opus", options, "paper", base, random(size), paper_row=name, config=buffer(size))

    def calibrated(size: int, share: float) -> Method:
        options = {"arm": "calibrated", "window": scale.window, "effective_share": share}
        base = None if (size, share) == (BUFFER, 0.25) else f"b={BUFFER},share=0.25 (calibrated)"
        return Method(f"b={size},share={share}", "opus", options, "calibrated", base, random(size),
                      config={"proxy_size": 4 * scale.run["proxy_size"], **buffer(size)},
                      deviations=DEVIATIONS["calibrated"])

    return [
        Method("Random", "random", paper_row="Random"),
        *(Method(random(size), "random", base="Random", random=random(size), config=buffer(size)) for size in (32, 16)),
        paper(64, ".9", 8192), paper(32, ".9", 8192), paper(16, ".9", 8192),
        paper(64, ".8", 8192), paper(64, "1.0", 8192), paper(64, ".9", 4096), paper(64, ".9", 16384),
        calibrated(64, 0.25), calibrated(32, 0.25), calibrated(16, 0.25), calibrated(64, 0.1), calibrated(64, 0.5),
    ]


def deviations(scale: Scale) -> tuple[str, ...]:
    """Those of the scale, beside the paper's GPT-2 Large and its buffers."""
    whole, sizes = scale.run["buffer"], "score window 40 instead of 24,576 and 512"
    return (
        *(text.replace("GPT-2 XL", "GPT-2 Large")
          .replace("buffer 16, score window 40 instead of 6,144, 32 and 512", sizes) for text in losses_only(scale)),
        (f"the paper's buffers 16, 32 and 64 are {whole // 4}, {whole // 2} and {whole} sequences here; half of each "
         "is chosen and trained on at the same learning rate, with more steps for a smaller one, so that update tokens "
         "are equal"),
    )


def seen(rows: dict[str, Row]) -> list[str]:
    """What the temperatures did, from the numbers."""
    found = [(value, rows[f"b=64,t={text},m=8192 (paper)"]) for text, value in TEMPERATURES.items()
             if f"b=64,t={text},m=8192 (paper)" in rows]
    if not found:
        return []
    sizes = [size for _, row in found for size in row.values(step_mean("effective_sample_size"))]
    spread = [std / value for value, row in found for std in row.values(step_mean("utility_std"))]
    seeds = set.intersection(*(set(row.records) for _, row in found))
    losses = [[final_loss(row.records[seed]) for _, row in found] for seed in sorted(seeds)]
    ranges = [max(of_seed) - min(of_seed) for of_seed in losses if None not in of_seed]
    texts = []
    if sizes and spread:
        texts.append(f"temperatures {', '.join(f'{value:g}' for value, _ in found)}: the standard deviation of the raw "
                     f"utilities, mean over a run, is at most {max(spread):.1e} of the temperature, and the effective "
                     f"sample size at least {min(sizes):.6f} of uniform sampling's.")
    if len(found) > 1 and ranges:
        texts.append("over these temperatures the final loss of one seed differs by "
                     f"{math.fsum(ranges) / len(ranges):.4f} nat/token on average and by {max(ranges):.4f} at most "
                     f"(n = {len(ranges)} seeds).")
    return texts


TABLE = Comparison(
    experiment="table8",
    item="Table 8",
    title="Table 8 of arXiv:2602.05400: buffer, temperature and sketch width",
    heading="Table 8: buffer, temperature, sketch width",
    about=(
        "b, t and m are the paper's numbers: buffer, temperature and buckets of the sketch; the third column has our "
        "buffer. The base rows are b=64,t=.9,m=8192 for `paper` and b=64,share=0.25 for `calibrated`. Expected before "
        "the runs: raw utilities are so small beside a temperature near 1 that .8, .9 and 1.0 make no difference. "
        "`calibrated` sets its temperature so that the effective sample size of each draw is the share given; of a few "
        "candidates a small share leaves less than one, and then the best is taken."
    ),
    methods=methods,
    sizes={"ci": {"steps": 12, "evaluations": 2}, "smoke": {"steps": 140, "evaluations": 7}},
    seeds={"ci": 1, "smoke": 2},
    optimizers=("muon",),
    deviations=deviations,
    paper_model="GPT-2 Large",
    seen=seen,
    settings=(GPT2_LARGE,),
)
runs, write, large_runs = TABLE.runs, TABLE.write, TABLE.large_runs

if __name__ == "__main__":
    sys.exit(main(runs, __doc__, write, large_runs))
