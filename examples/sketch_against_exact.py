"""How well does a CountSketch order the candidates, beside the exact utilities?

    python -m examples.sketch_against_exact     # a few seconds on one core, no network

A small GPT-2 takes some AdamW steps; then the paper's utility (Eq 23) of 16 candidates is computed exactly and by
sketches of several widths.  `opus-bench validate` does this in full, on real text or on your own model.
"""

import torch
from scipy.stats import spearmanr
from transformers import GPT2Config, GPT2LMHeadModel

from opus_bench.selector import Opus, TrainState

torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=32, n_embd=32, n_layer=2, n_head=2,
                                   bos_token_id=0, eos_token_id=0))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(10):  # so that P_t is that of a live optimizer
    batch = torch.randint(100, (8, 32))
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

candidates, proxy = torch.randint(100, (16, 32)), torch.randint(100, (8, 32))
state = TrainState(model, optimizer, 10, proxy)


def utilities(**knobs):
    """Of all candidates before anything is selected, in nat/token."""
    return Opus.arm("paper", window=32, **knobs).utilities(candidates, 8, state).marginal([])


exact = utilities(estimator="exact")
agreement = {}
for width in (32, 512, 8192):
    sketched = torch.stack([utilities(sketch_width=width, sketch_seed=seed) for seed in range(4)])
    agreement[width] = sum(spearmanr(exact, one).statistic for one in sketched) / 4
    scatter = (sketched - exact).pow(2).mean().sqrt() / exact.std()
    print(f"{width:5} buckets a weight: Spearman with exact {agreement[width]:.3f}, "
          f"error {scatter:.3f} of the spread of exact utilities (mean of 4 hash seeds)")
