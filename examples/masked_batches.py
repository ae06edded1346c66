"""Padded and masked batches: padding and masked tokens take no part in a candidate's score.

    python -m examples.masked_batches     # a few seconds on one core, no network

Texts of different lengths come as a data loader hands them out (`attention_mask`, `labels` with -100).  Scored once
padded to the longest and once padded much further, their utilities are equal; a prompt whose labels are -100 changes
nothing but the tokens that are predicted from it.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from opus_bench.selector import Opus, TrainState
from opus_bench.sequences import as_sequences, sample_losses

torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_layer=2, n_head=2,
                                   bos_token_id=0, eos_token_id=0)).double()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
texts = [torch.randint(100, (length,)) for length in (7, 19, 12, 25)]


def padded(length, prompt=0):
    """A batch on the right padded to ``length``; the first ``prompt`` tokens of each text are not to be learnt."""
    tokens = torch.zeros(len(texts), length, dtype=torch.long)
    mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, -100)
    for row, text in enumerate(texts):
        tokens[row, : len(text)], mask[row, : len(text)] = text, 1
        labels[row, prompt : len(text)] = text[prompt:]
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


state = TrainState(model, optimizer, 0, proxy=torch.randint(100, (8, 32)))
opus = Opus.arm("calibrated", layers="all", window=64)
short, long = (opus.utilities(padded(length), 2, state).marginal([]) for length in (25, 60))
difference = (short - long).abs().max().item()
print(f"padded to 25 and to 60 tokens: utilities differ by at most {difference:.1e} of {short.abs().max():.1e}")

sequences = as_sequences(padded(25, prompt=5))
print("targets that count:", sequences.counted().sum(1).tolist(), "of", [len(text) - 1 for text in texts])
whole, answer = sample_losses(model, padded(25)), sample_losses(model, sequences)
print("mean loss, all tokens: ", [f"{x:.3f}" for x in whole.tolist()], "nat/token")
print("mean loss, after prompt:", [f"{x:.3f}" for x in answer.tolist()], "nat/token")
