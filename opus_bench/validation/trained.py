"""Small models trained at random on real text, looked at while their optimizers are live."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..corpus import Corpus
from ..model import OpusGPT2, OpusGPT2Config
from ..stream import CandidateStream
from ..train import RunConfig, build_optimizers, set_determinism, set_schedule, update


@dataclass(frozen=True)
class Stage:
    """A training state between two steps; whoever looks at it must leave it as it was."""

    step: int  # updates done
    tokens_seen: int  # tokens trained on so far
    model: OpusGPT2
    optimizers: list[torch.optim.Optimizer]  # groups hold the rates of the step about to be taken
    losses: tuple[float, ...]  # training loss of every step so far, nat/token

    def row(self, name: str, value: float, unit: str = "1", **keys: Any) -> dict[str, Any]:
        """A measurement at this stage as a record keeps it (``metrics``); ``keys`` say what it is of.

        Units: "1" for a pure number, "nat/token", "%", "s".
        """
        return {"step": self.step, "tokens_seen": self.tokens_seen, "split": "validation", "name": name,
                "unit": unit, "value": float(value), **keys}


def stages(
    config: RunConfig, corpus: Corpus, steps: Sequence[int], on_step: Callable[[], Any] = lambda: None
) -> Iterator[Stage]:
    """Train on a random half of every buffer and yield the state after each of ``steps`` updates.

    One model is trained once, to the last of ``steps``; ``config.steps`` is not read but for the
    learning rate's schedule.  Deterministic on one machine.

    Raises:
        ValueError: steps that do not increase.
    """
    if not steps or list(steps) != sorted(set(steps)) or steps[0] < 0:
        raise ValueError(f"stages must be increasing numbers of steps, got {list(steps)}")
    set_determinism(config.threads)
    torch.manual_seed(config.seed)
    model = OpusGPT2(OpusGPT2Config.from_size(config.model, corpus.vocab_size, embedding_std=config.embedding_std))
    model.train()
    optimizers = build_optimizers(model, config)
    generator = torch.Generator().manual_seed(config.seed)
    stream = CandidateStream(corpus, config.length, config.buffer, config.seed)
    losses: list[float] = []
    for step in range(steps[-1] + 1):
        set_schedule(optimizers, step, config)
        if step in steps:
            yield Stage(step, step * config.selected_size * config.length, model, optimizers, tuple(losses))
        if step < steps[-1]:
            chosen = torch.randperm(config.buffer, generator=generator)[: config.selected_size]
            losses.append(update(model, optimizers, stream.candidates(step).tokens[chosen], config.clip))
            on_step()
