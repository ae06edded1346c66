"""Read run records and draw from them: nothing is trained, no number is typed.

    python -m examples.records_figure                    # writes loss_by_seed.svg here
    python -m examples.records_figure figure.svg muon    # another file, another optimizer

A record is one JSON file per run; `load` checks the hash of each before it is used, and `arrange` takes those that
belong together (one code, data, model and length).  Drawn is each seed's difference to Random, paired by seed, in the
loss on the target domain; printed is the paired 95 % t interval.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from opus_bench.results import load
from opus_bench.sections import arrange, final_loss, pairs
from opus_bench.statistics import paired_interval

path = Path(sys.argv[1] if len(sys.argv) > 1 else "loss_by_seed.svg")
optimizer = sys.argv[2] if len(sys.argv) > 2 else "adamw"
records = load(Path(__file__).resolve().parent.parent / "results" / "runs", "table3", "smoke")
(section,) = [section for section in arrange(records) if section.optimizer == optimizer]

figure = Figure(figsize=(7, 3.5), layout="constrained")
axes = figure.subplots()
methods = [row for row in section.rows if row is not section.base]
for row in methods:
    ours, random = pairs(row, section.base, final_loss)  # nat/token, one pair a seed
    interval = paired_interval(ours, random)
    limits = "no interval below 3 seeds" if interval.low is None else f"[{interval.low:+.3f}, {interval.high:+.3f}]"
    print(f"{row.label:18} {interval.mean:+.3f} {limits} nat/token against Random, n = {interval.n}")
    axes.plot([a - b for a, b in zip(ours, random)], [row.label] * len(ours), "o")
axes.axvline(0, color="grey", linewidth=1)
axes.set_xlabel("loss on the target domain minus Random's of the same seed (nat/token)")
axes.set_title(f"{optimizer}, smoke scale: a check of the pipeline, not of the paper's claim", fontsize=9)
figure.savefig(path)
print(f"wrote {path}")
