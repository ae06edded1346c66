"""Small models in float64 and real optimizers with live state."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from opus_bench.model import OpusGPT2, OpusGPT2Config

FIVE_SIGMA = 5.0
VOCABULARY = 50


def small_paper_gpt2() -> OpusGPT2:
    return OpusGPT2(OpusGPT2Config(VOCABULARY, 2, 16, 2, 32))


def small_hf_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2))


def perturbed(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """In float64, away from zero initialisation, so that every layer has a gradient."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def tokens(n: int, t: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, (n, t), generator=torch.Generator().manual_seed(seed))


def optimizers_for(model: torch.nn.Module, kind: str, steps: int = 3) -> list[torch.optim.Optimizer]:
    """Real optimizers with live state, after a few real steps."""
    matrices = [p for k, p in model.named_parameters() if "blocks" in k and p.ndim == 2]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    if kind == "sgd":
        found = [torch.optim.SGD(model.parameters(), lr=0.01)]
    elif kind == "adamw":
        found = [torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.8, 0.95), weight_decay=0.0)]
    else:
        found = [torch.optim.Muon(matrices, lr=0.01, weight_decay=0.0), torch.optim.AdamW(rest, lr=1e-3)]
    for step in range(steps):
        batch = tokens(4, 10, seed=100 + step)
        model(input_ids=batch, labels=batch).loss.backward()
        for optimizer in found:
            optimizer.step()
            optimizer.zero_grad()
    return found
