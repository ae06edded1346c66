"""One knob of the calibrated selector at a time: ablations that the paper lacks.

    python -m reproduce.ablations --scale smoke     # about 13 min, 2 CPU cores; checks the pipeline
    python -m reproduce.ablations --scale ci        # under a minute; exercises the code
    python -m reproduce.ablations --dry-run         # prints the runs and stops
    python -m reproduce.ablations --scale small --dry-run       # on one GPU; --scale paper: the paper's size

The base row is OPUS (calibrated): exact alignment over all matrices, frozen P_t, proxy of four times the
scale's sequences every 8 steps, effective share .25, no redundancy term, half of the buffer chosen.  Every other
row changes one knob: selection ratio, redundancy, preconditioner, score window, proxy, temperature, layers,
estimator.  All runs update on the same tokens.  Writes results/tables/ablations.md and its figure from the records.
"""

from __future__ import annotations

import sys

from .comparison import Comparison, Method, losses_only
from .runner import main
from .scales import Scale

RATIOS = (0.25, 0.75)
SHARES = (0.1, 0.5, 0.75)
BASE = "OPUS (calibrated)"


def methods(scale: Scale) -> list[Method]:
    """Random of each selection ratio, the base, and what differs from it in one knob."""
    whole, size = scale.run["length"], 4 * scale.run["proxy_size"]
    options = {"arm": "calibrated", "window": scale.window, "sketch_width": scale.sketch_width}

    def change(name: str, knob: dict | None = None, random: str = "Random", **config) -> Method:
        return Method(name, "opus", {**options, **(knob or {})}, "calibrated", BASE, random,
                      config={"proxy_size": size, **config})

    return [
        Method("Random", "random"),
        *(Method(f"Random, ratio {ratio}", "random", base="Random", random=f"Random, ratio {ratio}",
                 config={"selection_ratio": ratio}) for ratio in RATIOS),
        Method("OPUS", "opus", options, "calibrated", config={"proxy_size": size}),
        *(change(f"ratio {ratio}", random=f"Random, ratio {ratio}", selection_ratio=ratio) for ratio in RATIOS),
        change("redundancy measured", {"redundancy": "measured"}),
        # eta^2 is a weight beside the eta of the alignment, so the two go together; without redundancy that eta
        # changes nothing, as the temperature follows the spread of the utilities
        change("redundancy eta^2", {"redundancy": "paper", "utility_scale": "learning_rate"}),
        change("P identity", {"preconditioner": "identity"}),
        change("P adjoint", {"preconditioner": "adjoint"}),
        *(change(f"window {tokens}", {"window": tokens}) for tokens in (scale.window // 2, 2 * scale.window)
          if tokens < whole),
        change(f"window {whole} (whole)", {"window": whole}),
        *(change(f"proxy of {n}", proxy_size=n) for n in (size // 4, 4 * size)),
        *(change(f"proxy every {steps}", {"proxy_every": steps}) for steps in (1, 32)),
        *(change(f"share {share}", {"effective_share": share}) for share in SHARES),
        change("temperature .9", {"temperature": 0.9, "effective_share": None}),
        change("layers: blocks", {"layers": "blocks"}),
        *(change(f"sketch of {width}", {"estimator": "sketch", "sketch_width": width})
          for width in (scale.sketch_width, scale.sketch_width // 16)),
    ]


def deviations(scale: Scale) -> tuple[str, ...]:
    """Those of the scale; the paper has no such table."""
    return (*losses_only(scale), "no item of the paper: the base is the calibrated arm, not the paper's")


TABLE = Comparison(
    experiment="ablations",
    item="no item of the paper",
    title="Ablations of the calibrated selector",
    heading="One knob of OPUS (calibrated) at a time",
    about=(
        "Each row changes one knob of the base row, OPUS (calibrated), which the script's first lines describe. Ratio: "
        "share of the buffer that is trained on, with more or fewer steps so that update tokens are equal; batches "
        "then differ, so each ratio has its own Random, and its difference to the base row holds the effect of the "
        "batch too. Redundancy eta^2: the paper's weight, with its eta on the alignment. Window: tokens scored of each "
        "sequence. Proxy: sequences in it, steps that it serves. Share: effective sample size of a draw over the "
        "candidates left. Sketch: CountSketch of that many buckets a matrix in place of exact utilities."
    ),
    methods=methods,
    sizes={"ci": {"steps": 6, "evaluations": 2}, "smoke": {"steps": 120, "evaluations": 10}},
    seeds={"ci": 1, "smoke": 2},
    optimizers=("adamw",),
    deviations=deviations,
)
runs, write, large_runs = TABLE.runs, TABLE.write, TABLE.large_runs

if __name__ == "__main__":
    sys.exit(main(runs, __doc__, write, large_runs))
