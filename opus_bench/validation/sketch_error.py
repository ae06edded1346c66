"""Error of the sketched utilities by sketch width and by weight, beside the variance that CountSketch states.

A small model is trained at random on real text.  At each stage of the training the same candidates are
scored for the same proxy batch with the live P_t, exactly and by sketches of every width under several
hash seeds, all weights together and each by itself.  What is compared is said in `findings.SketchFidelity`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..corpus import Corpus
from ..stream import CandidateStream, ProxyStream
from ..train import RunConfig
from .problem import Scoring, scoring
from .trained import stages
from .validate import HASH_SEED_STEP, sketch_fidelity

ALL = "all"  # weights together, as the selector sums them


@dataclass(frozen=True)
class Settings:
    """What is measured; plain values, as a record keeps them.

    Raises:
        ValueError: no width or one below 1, fewer than 2 hash seeds, fewer than 4 candidates, no stage
            or one before the first update.
    """

    stages: Sequence[int]  # updates after which is measured
    widths: Sequence[int]  # sketch buckets per weight
    hash_seeds: int = 8  # sketches of each width
    candidates: int = 32  # sequences
    proxy_size: int = 8  # sequences

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths must be sketch widths of at least 1 bucket, got {list(self.widths)}")
        if self.hash_seeds < 2:
            raise ValueError(f"hash_seeds must be at least 2, or there is no scatter; got {self.hash_seeds}")
        if self.candidates < 4:
            raise ValueError(f"candidates must be at least 4, of which a quarter is selected; got {self.candidates}")
        if not self.stages or min(self.stages) < 1:
            raise ValueError(f"stages must be at least 1: output projections start at zero and until the first "
                             f"update other weights of their block have no gradient; got {list(self.stages)}")

    @property
    def units(self) -> int:
        """How often ``measure`` calls ``on_step``: once a training step, once a stage and width."""
        return max(self.stages) + len(self.stages) * len(self.widths)


def check_rates(config: RunConfig, stages: Sequence[int]) -> None:
    """Refuse, before anything is trained, a stage at which the learning rate, and so every utility, is zero."""
    if config.cooldown and max(stages) >= config.steps:
        raise ValueError(f"stages must be below the {config.steps} steps of the schedule, at whose end the learning "
                         f"rate is zero; got {list(stages)}")


def candidates_after(config: RunConfig, corpus: Corpus, step: int, count: int) -> Int[Tensor, "n t"]:
    """The next ``count`` sequences of the stream that a training of ``step`` steps was offered.

    None of them was a candidate before, unless the pool is smaller than what was offered.
    """
    stream = CandidateStream(corpus, config.length, config.buffer, config.seed)
    buffers = [stream.candidates(step + i).tokens for i in range(math.ceil(count / config.buffer))]
    return torch.cat(buffers)[:count]


def weight_problems(problem: Scoring) -> dict[str, Scoring]:
    """The problem of each weight by itself.

    A weight's hash depends on the seed and its name alone, so the sketched alignments of these problems
    sum to the whole problem's, and so do the stated variances.
    """
    return {
        name: Scoring({name: gradient}, {name: problem.proxy_gradient[name]}, {name: problem.preconditioners[name]})
        for name, gradient in problem.gradients.items()
    }


def measure(
    config: RunConfig, settings: dict[str, Any], corpus: Corpus, on_step: Callable[[], Any] = lambda: None
) -> list[dict[str, Any]]:
    """Rows named "scatter": root mean square error of the sketched alignments over their exact norm.

    Args:
        settings: fields of `Settings`.  Sequences have ``config.length`` tokens, all of them scored;
            the candidates are those that training would be offered after its last step.

    Returns:
        A row for each stage, width and weight, and for all weights together (key ``weight`` is "all").
        Keys beside the value: ``elements`` of the weight, and fields of `findings.SketchFidelity`.
        Equal settings give equal rows.

    Raises:
        ValueError: as `Settings` and `check_rates`.

    Cost: two sketches of all weights for each stage, width and hash seed.
    """
    s = Settings(**settings)
    check_rates(config, s.stages)
    tokens = candidates_after(config, corpus, max(s.stages), s.candidates)
    proxy = ProxyStream(corpus, config.length, s.proxy_size, config.seed).proxy(0)
    first = 1 + config.seed * s.hash_seeds  # no hash twice, so that errors of different models are independent
    seeds = [HASH_SEED_STEP * (first + i) for i in range(s.hash_seeds)]
    rows = []
    for stage in stages(config, corpus, s.stages, on_step):
        problem = scoring(stage.model, stage.optimizers, tokens, proxy)
        problems = {ALL: problem, **weight_problems(problem)}
        exact = {weight: part.exact() for weight, part in problems.items()}
        for width in s.widths:
            for weight, part in problems.items():
                found = dataclasses.asdict(sketch_fidelity(part, width, seeds, exact[weight]))
                elements = sum(g.numel() for g in part.proxy_gradient.values())
                rows.append(stage.row("scatter", found.pop("scatter"), weight=weight, elements=elements, **found))
            on_step()
    return rows
