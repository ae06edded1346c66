"""Table 7 of OPUS (arXiv:2602.05400): greedy choice, and a proxy that is not matched to the benchmark.

    python -m reproduce.table7 --scale smoke     # about 14 min, 2 CPU cores; checks the pipeline
    python -m reproduce.table7 --scale ci        # under a minute; exercises the code
    python -m reproduce.table7 --dry-run         # prints the runs and stops
    python -m reproduce.table7 --scale small --dry-run       # on one GPU; --scale paper: the paper's size

Random, and for the arms `paper` and `calibrated`: OPUS (Boltzmann sampling, proxy from the target), Greedy
(the same utility, highest first) and StdProxy (Boltzmann, proxy of the training mixture itself).  GREATS is
added; in the paper it stands in Table 3.  Muon as in the paper unless --optimizers says otherwise.
Writes results/tables/table7.md and its figure from the records.
"""

from __future__ import annotations

import sys

from .comparison import Comparison, Method, losses_only
from .paper_rows import DEVIATIONS
from .runner import main
from .scales import Scale

STD_PROXY = "StdProxy: held-out text of this corpus by its own shares instead of the paper's standard proxy"
GREATS = ("GREATS: the run's proxy batch stands for its validation data, the learning rate is each weight's live one; "
          "it stands in the paper's Table 3, not 7")


def methods(scale: Scale) -> list[Method]:
    """The rows.  A knob of a row is what it changes of its arm's OPUS row."""
    rows = [Method("Random", "random", paper_row="Random")]
    for arm in ("paper", "calibrated"):
        opus = {"arm": arm, "window": scale.window, "sketch_width": scale.sketch_width}
        config = {"proxy_size": 4 * scale.run["proxy_size"]} if arm == "calibrated" else {}
        deviations, base = DEVIATIONS.get(arm, ()), f"OPUS ({arm})"
        rows += [
            Method("OPUS", "opus", opus, arm, paper_row="OPUS", config=config, deviations=deviations),
            Method("Greedy", "opus", {**opus, "sampling": "greedy"}, arm, base, paper_row="Greedy", config=config,
                   deviations=deviations),
            Method("StdProxy", "opus", opus, arm, base, paper_row="StdProxy", config={**config, "proxy": "pool"},
                   deviations=(*deviations, STD_PROXY)),
        ]
    return [*rows, Method("GREATS", "greats", {"window": scale.window}, item="Table 3", paper_row="GREATS",
                          deviations=(GREATS,))]


TABLE = Comparison(
    experiment="table7",
    item="Table 7",
    title="Table 7 of arXiv:2602.05400: greedy choice and a standard proxy",
    heading="Table 7: greedy choice, standard proxy",
    about=(
        "OPUS draws from a Boltzmann distribution and looks at text of the target; Greedy takes the highest utility "
        "instead of drawing, StdProxy looks at held-out text of the training mixture instead. The base row of each "
        "arm is its OPUS. Without a redundancy term (`calibrated`), greedy takes the candidates of highest alignment. "
        "GREATS, greedy on plain gradients, is added here; the paper has it in Table 3."
    ),
    methods=methods,
    sizes={"ci": {}, "smoke": {}},
    seeds={"ci": 1, "smoke": 3},
    optimizers=("muon",),
    deviations=losses_only,
    paper_model="GPT-2 XL",
)
runs, write, large_runs = TABLE.runs, TABLE.write, TABLE.large_runs

if __name__ == "__main__":
    sys.exit(main(runs, __doc__, write, large_runs))
