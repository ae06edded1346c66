"""One shape, set up: its training state, its data, and the plain training step that every cost is divided by."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opus_bench.corpus import Corpus
from opus_bench.gradients import sample_losses
from opus_bench.stream import CandidateStream, ProxyStream
from opus_bench.streamed import microbatches

from .estimators import ESTIMATORS
from .problem import Problem
from .shapes import Shape


class Bench:
    """One shape: its training state, data, and the plain step that every cost is divided by."""

    def __init__(self, shape: Shape, corpus: Corpus) -> None:
        self.shape = shape
        self.model = shape.build()
        self.model.train()
        fused = {"fused": True} if shape.device == "cuda" else {}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=shape.learning_rate, betas=(0.8, 0.95),
                                           weight_decay=0.0, **fused)
        self.problem = Problem(self.model, [self.optimizer])
        self.stream = CandidateStream(corpus, shape.length, shape.candidates, 0)
        self.proxies = ProxyStream(corpus, shape.window, shape.proxies, 0)
        self.updates = 0
        self.estimators = [e for e in ESTIMATORS if shape.architecture == "gpt2" or not e.gpt2_only]

    def candidates(self, buffer: int) -> Tensor:
        """Whole sequences that training was never offered."""
        return self.stream.candidates(self.shape.updates + 100 + buffer).tokens.to(self.shape.device)

    def proxy(self, step: int) -> Tensor:
        return self.proxies.proxy(step).to(self.shape.device)

    def plain_step(self, tokens: Tensor) -> None:
        """Forward, backward, clipping and optimizer step on whole sequences, in microbatches as the shape says."""
        narrow = self.shape.step_dtype == "bfloat16 autocast"
        for part, sequences in microbatches(tokens, self.shape.microbatch):
            with torch.autocast(self.shape.device, torch.bfloat16, enabled=narrow):
                loss = sample_losses(self.model, sequences).sum() / len(tokens)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def train(self, updates: int, on_step: Callable[[], Any] = lambda: None) -> None:
        for _ in range(updates):
            tokens = self.stream.candidates(self.updates).tokens[: self.shape.selected]
            self.plain_step(tokens.to(self.shape.device))
            self.updates += 1
            on_step()

    def seconds(self, work: Callable[[], Any]) -> float:
        if self.shape.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if self.shape.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start
