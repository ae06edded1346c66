"""A selector of your own in a dozen lines, compared with OPUS and with a random choice on the same stream.

    python -m examples.custom_selector     # a few seconds on one core, no network

A selector needs `select`; `Stateless` adds what a resumed run asks for.  It must leave model, optimizer and every
random state but its own generator as they were, which `scoring_mode` and `no_grad` see to here.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from baselines.random import Random
from opus_bench.gradients import sample_losses, scoring_mode
from opus_bench.selector import Opus, Selection, Selector, Stateless, TrainState


class MiddleLoss(Stateless):
    """Keep the candidates whose loss is nearest to the median: neither known already nor noise."""

    def select(self, candidates, size, state, generator):
        with scoring_mode(state.model), torch.no_grad():
            losses = sample_losses(state.model, candidates)
        utilities = -(losses - losses.median()).abs()
        return Selection(utilities.argsort(descending=True)[:size], utilities)


def final_loss(selector: Selector, steps: int = 20) -> float:
    """Loss on held-out counting sequences (nat/token) after training on what the selector chose."""
    torch.manual_seed(0)  # the same weights and the same stream for every selector
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=2,
                                       bos_token_id=0, eos_token_id=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    stream, generator = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)

    def counting(n):  # a, a + 3, a + 6, ...: what the proxy asks for
        return (torch.randint(40, (n, 1), generator=stream) + 3 * torch.arange(16)) % 40

    for step in range(steps):
        candidates = torch.cat([counting(8), torch.randint(40, (8, 16), generator=stream)])
        chosen = selector.select(candidates, 8, TrainState(model, optimizer, step, counting(8)), generator).indices
        model(input_ids=candidates[chosen], labels=candidates[chosen]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return sample_losses(model, counting(32)).mean().item()


selectors = {"random": Random(), "middle loss": MiddleLoss(), "OPUS (calibrated)": Opus.arm("calibrated", window=16)}
losses = {name: final_loss(selector) for name, selector in selectors.items()}
for name, loss in losses.items():
    print(f"{name:18} {loss:.3f} nat/token (one seed: no evidence, an example)")
