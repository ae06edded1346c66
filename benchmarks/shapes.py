"""Shapes at which scoring is measured: a model, a training step and a buffer of candidates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from opus_bench.model import OpusGPT2, OpusGPT2Config


@dataclass(frozen=True)
class Shape:
    """Sizes in sequences and tokens.  A training step takes ``selected`` sequences of ``length`` tokens."""

    name: str
    about: str
    layers: int
    width: int
    heads: int
    vocabulary: int
    length: int  # tokens of a training sequence
    window: int  # tokens scored of a candidate and of a proxy
    candidates: int
    proxies: int
    selected: int
    updates: int  # of random training before anything is measured
    learning_rate: float
    device: str = "cpu"
    dtype: str = "float32"  # of weights, optimizer state and the plain step
    architecture: str = "gpt2"  # the paper's GPT-2, or qwen3
    microbatch: int | None = None  # training sequences in one forward and backward of the plain step

    @property
    def step_dtype(self) -> str:
        """What the plain step computes in."""
        return "bfloat16 autocast" if self.device == "cuda" and self.dtype == "float32" else self.dtype

    def check_device(self) -> None:
        """Raise ValueError if this machine has no such device."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"shape {self.name} needs a GPU and there is none; take --shape A")

    def build(self) -> nn.Module:
        """The model with random weights on the shape's device.

        Raises:
            ValueError: no such device here.
        """
        self.check_device()
        torch.manual_seed(0)
        previous = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, self.dtype))
        try:
            with torch.device(self.device):
                return self._model()
        finally:
            torch.set_default_dtype(previous)

    def _model(self) -> nn.Module:
        longest = max(self.length, self.window)
        if self.architecture == "gpt2":
            return OpusGPT2(OpusGPT2Config(self.vocabulary, self.layers, self.width, self.heads, longest,
                                           embedding_std=0.5))
        from transformers import Qwen3Config, Qwen3ForCausalLM

        sizes: dict[str, Any] = dict(
            vocab_size=self.vocabulary, num_hidden_layers=self.layers, hidden_size=self.width,
            intermediate_size=3 * self.width, num_attention_heads=self.heads, num_key_value_heads=self.heads // 4,
            head_dim=self.width // self.heads, max_position_embeddings=longest, tie_word_embeddings=False)
        return Qwen3ForCausalLM(Qwen3Config(**sizes))


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("ci", "exercises the code; its numbers mean nothing", 2, 64, 2, 4096, 64, 32, 8, 4, 2, 3, 1e-3),
        Shape("A", "CPU, float32", 6, 384, 6, 4096, 512, 128, 16, 8, 4, 100, 1e-3),
        Shape("B", "GPT-2 Large on a GPU", 36, 1280, 20, 50304, 24576, 512, 64, 8, 32, 20, 4e-3, "cuda", microbatch=1),
        Shape("C", "GPT-2 XL on a GPU", 48, 1600, 25, 50304, 6144, 512, 32, 8, 16, 20, 2e-3, "cuda", microbatch=2),
        Shape("D", "Qwen3-8B on one GPU of 141 GB", 36, 4096, 32, 151936, 4096, 512, 16, 8, 8, 3, 1e-6, "cuda",
              "bfloat16", "qwen3", 1),
    )
}
