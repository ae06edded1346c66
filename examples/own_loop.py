"""Select the training batch inside your own loop: any causal language model of transformers, any torch.optim optimizer.

    python -m examples.own_loop     # a few seconds on one core, no network

The text is half noise: sequences that count upwards, as the proxy's do, beside sequences of random tokens.  Printed
is the share of counting sequences among those that OPUS chose; half of those offered count upwards.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from opus_bench.selector import Opus, TrainState

VOCABULARY, LENGTH, STEPS, OFFERED, TAKEN = 64, 24, 30, 16, 8

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
opus = Opus.arm("calibrated", window=LENGTH)
generator = torch.Generator().manual_seed(0)  # the only randomness of the choice


def counting(n):
    """n sequences that count upwards from anywhere."""
    return (torch.randint(VOCABULARY, (n, 1)) + torch.arange(LENGTH)) % VOCABULARY


shares = []
for step in range(STEPS):
    candidates = torch.cat([counting(OFFERED // 2), torch.randint(VOCABULARY, (OFFERED // 2, LENGTH))])
    state = TrainState(model, optimizer, step, proxy=counting(32))
    selection = opus.select(candidates, TAKEN, state, generator)
    batch = candidates[selection.indices]
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    shares.append((selection.indices < OFFERED // 2).float().mean().item())
    if step % 10 == 9:
        share = selection.diagnostics["effective_sample_size"]
        print(f"step {step + 1}: loss {loss.item():.2f} nat/token, counting sequences among the chosen "
              f"{shares[-1]:.0%}, effective sample size {share:.2f} of those left")
late = sum(shares[-10:]) / 10
print(f"last ten steps: {late:.0%} of the chosen count upwards, 50% of the offered")
