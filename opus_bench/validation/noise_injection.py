"""Do selectors keep bad text out?  Known noise is put into buffers of clean text, and what is kept is counted.

Of each kind of `noise_kinds` and each share of a buffer of n candidates, so many sequences are spoilt that the
count is whole; a selector chooses part of the buffer, and the share of its choice that is injected is set
against the share offered.  The same buffers, with the same sequences spoilt, are offered at every stage and to
every selector.  What a selector is, is the caller's matter: `Judge`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..corpus import Corpus
from ..sources import QUALITY
from ..stream import CandidateStream
from ..train import RunConfig
from .noise_kinds import KINDS, Material, inject
from .trained import Stage, stages

FOREIGN = "foreign"  # the domain of that name
CLEAN_TIER = 2  # sequences of this tier or a better one are clean: edited prose and documentation
TAGS = ('<div class="row">', "</div>", '<a href="/index.html">', "</a>", '<span id="x1">', "</span>", "<br/>",
        '<td align="left">', "</td>", '<img src="/a.png"/>', "<li>", "</li>", "&nbsp;")

Judge = Callable[[list[int], int, torch.Generator], tuple[list[int], Tensor | None]]
"""A selector that has seen all sequences of a buffer: (candidates, as indices into them; size; generator) ->
(the places of the chosen among the candidates, a score of each candidate that is higher the rather it is
chosen, or None)."""


@dataclass(frozen=True)
class Buffer:
    """n clean candidates, then for each kind, in the order of ``kinds``, the spoilt versions of k of them."""

    tokens: Int[Tensor, "n+k*kinds t"]
    size: int  # n
    replaced: tuple[int, ...]  # the k places among the candidates, in the order in which they are injected
    kinds: tuple[str, ...]

    def members(self, kind: str, injected: int) -> list[int]:
        """The n candidates as indices into ``tokens`` when the first ``injected`` of ``replaced`` are spoilt."""
        found = list(range(self.size))
        start = self.size + self.kinds.index(kind) * len(self.replaced)
        for k, place in enumerate(self.replaced[:injected]):
            found[place] = start + k
        return found

    def injected(self, count: int) -> Bool[Tensor, " n"]:
        """Which of the candidates are spoilt."""
        mask = torch.zeros(self.size, dtype=torch.bool)
        mask[list(self.replaced[:count])] = True
        return mask


def make_buffer(
    clean: Int[Tensor, "n t"], most: int, kinds: Sequence[str], material: Material, generator: torch.Generator
) -> Buffer:
    """A buffer of which up to ``most`` candidates, at uniform places, can be injected."""
    replaced = torch.randperm(len(clean), generator=generator)[:most]
    spoilt = [inject(clean[replaced], kind, material, generator) for kind in kinds]
    return Buffer(torch.cat([clean, *spoilt]), len(clean), tuple(replaced.tolist()), tuple(kinds))


def detection_auc(scores: Float[Tensor, " n"], injected: Bool[Tensor, " n"]) -> float:
    """Probability that a random clean sequence scores higher than a random injected one; ties count half.

    1: every clean one is above every injected one.  For continuous scores that do not depend on the
    noise, of c clean and i injected sequences in any fixed number:

        E AUC = 1/2,   Var AUC = (c + i + 1) / (12 c i)

    Raises:
        ValueError: scores that are not finite, or none of one sort.

    Exactness: the count over all pairs (Mann and Whitney 1947).  Cost: O(n^2).
    """
    if not torch.isfinite(scores).all():
        raise ValueError(f"scores must be finite, got {scores[~torch.isfinite(scores)][0]}")
    clean, noise = scores[~injected], scores[injected]
    if not len(clean) or not len(noise):
        raise ValueError(f"an AUC needs clean and injected sequences, got {len(clean)} and {len(noise)}")
    above = clean[:, None] > noise
    tied = clean[:, None] == noise
    return float((above.double() + 0.5 * tied.double()).mean())


def mean_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error s / sqrt(n), s^2 with n - 1; exact in the mean for independent values."""
    x = torch.tensor(values, dtype=torch.float64)
    return float(x.mean()), float(x.std() / math.sqrt(len(x)))


@dataclass(frozen=True)
class Settings:
    """What is measured; plain values, as a record keeps them.  ``selectors`` is read by the caller alone."""

    stages: Sequence[int]  # steps after which is measured
    candidates: int = 20  # sequences of a buffer
    shares: Sequence[float] = (0.1, 0.2, 0.3, 0.5)  # of the candidates that are injected
    kinds: Sequence[str] = KINDS
    buffers: int = 16
    repeats: int = 4  # choices from each buffer, kind and share
    span: int = 8
    gap: int = 4
    selectors: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"unknown kind of noise {kind!r}; known: {', '.join(KINDS)}")
        if not self.stages or list(self.stages) != sorted(set(self.stages)) or self.stages[0] < 0:
            raise ValueError(f"stages must be increasing numbers of steps, got {list(self.stages)}")
        if self.buffers < 2:
            raise ValueError(f"buffers must be at least 2 for a standard error, got {self.buffers}")
        for name in ("repeats", "gap"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.shares or list(self.shares) != sorted(set(self.shares)):
            raise ValueError(f"shares must increase, got {list(self.shares)}")
        for share in self.shares:
            count = share * self.candidates
            if not 0 < share < 1 or abs(count - round(count)) > 1e-9:
                raise ValueError(f"share {share} of {self.candidates} candidates is {count:g} sequences; it must be "
                                 "a whole number of them, and some must stay clean")

    @property
    def counts(self) -> list[int]:
        """Injected sequences of a buffer, for each share."""
        return [round(share * self.candidates) for share in self.shares]

    @property
    def units(self) -> int:
        """How often ``measure`` calls ``on_step``: once a training step and once a stage and buffer."""
        return self.stages[-1] + len(self.stages) * self.buffers


def make_buffers(corpus: Corpus, config: RunConfig, settings: Settings) -> list[Buffer]:
    """Buffers of clean text from the candidates that the training would have come to next.

    Clean: the stream's sequences of tier CLEAN_TIER or better, as they come.  Foreign sequences are the
    stream's own as well.  So nothing in a buffer has been trained on before the stream begins again.

    Raises:
        ValueError: a corpus without foreign text.
    """
    if FOREIGN in settings.kinds and FOREIGN not in corpus.domains:
        raise ValueError(f"the corpus has no domain {FOREIGN!r}, only {', '.join(corpus.domains)}; leave that kind out")
    most = settings.counts[-1]
    stream = CandidateStream(corpus, config.length, config.buffer, config.seed)
    ahead = _ahead(stream, settings.stages[-1])
    tokenizer = corpus.tokenizer()
    tags = tuple(torch.tensor(tokenizer.encode(tag)) for tag in TAGS)
    generator = torch.Generator().manual_seed(config.seed)
    found = []
    for _ in range(settings.buffers):
        clean: list[Tensor] = []
        foreign: list[Tensor] = []
        while len(clean) < settings.candidates or (FOREIGN in settings.kinds and len(foreign) < most):
            domain, tokens = next(ahead)
            if QUALITY[domain] <= CLEAN_TIER and len(clean) < settings.candidates:
                clean.append(tokens)
            elif domain == FOREIGN and len(foreign) < most:
                foreign.append(tokens)
        material = Material(corpus.vocab_size, tags, torch.stack(foreign) if foreign else torch.empty(0, config.length),
                            settings.span, settings.gap)
        found.append(make_buffer(torch.stack(clean), most, settings.kinds, material, generator))
    return found


def _ahead(stream: CandidateStream, step: int) -> Iterator[tuple[str, Tensor]]:
    """Domain and tokens of every candidate from a step on."""
    while True:
        batch = stream.candidates(step)
        yield from zip(batch.domains, batch.tokens, strict=True)
        step += 1


def measure(
    config: RunConfig, settings: Settings, corpus: Corpus, on_step: Callable[[], Any],
    judges: Callable[[Stage, Buffer, int], Mapping[str, Judge]],
) -> list[dict[str, Any]]:
    """What each selector keeps of the injected sequences, and how well its score tells them.

    Args:
        judges: (stage, buffer, number of the buffer) -> name of a selector -> Judge; must leave the stage as
            it is.  A share ``config.selection_ratio`` of the candidates is chosen.

    Returns:
        Rows, all of them means over buffers with ``stderr`` over buffers (given the model): for each stage,
        selector and kind
          "kept_share"    share of the chosen that is injected, for each share ``offered``; a choice that
                          does not look has mean ``offered`` and, with one choice a buffer, the variance
                          s (1 - s) (N - n) / (n (N - 1)) of n of N, over the buffers
          "kept_excess"   kept share minus offered share, mean over the shares
          "detection_auc" of the score, at the largest share; none for a selector without a score

        A score may mean something else in each buffer (its proxy, its median), so the AUC is taken within
        buffers and averaged: the mean is unbiased for that of a buffer, and since buffers share no sequence
        the standard error s / sqrt(buffers) holds whatever the distribution within them.
        Equal settings give equal rows.
    """
    buffers = make_buffers(corpus, config, settings)
    size = round(config.selection_ratio * settings.candidates)
    rows = []
    for stage in stages(config, corpus, settings.stages, on_step):
        kept: dict[tuple[str, str], list[list[float]]] = {}  # buffer by buffer, for each share
        areas: dict[tuple[str, str], list[float]] = {}
        generators: dict[str, torch.Generator] = {}
        for number, buffer in enumerate(buffers):
            for name, judge in judges(stage, buffer, number).items():
                # the same random numbers for each selector, so that those who draw alike choose alike
                generator = generators.setdefault(name, torch.Generator().manual_seed(config.seed))
                for kind in settings.kinds:
                    shares, area = _look(buffer, kind, judge, settings, size, generator)
                    kept.setdefault((name, kind), []).append(shares)
                    if area is not None:
                        areas.setdefault((name, kind), []).append(area)
            on_step()
        for (name, kind), by_buffer in kept.items():
            rows += _rows(stage, settings, by_buffer, areas.get((name, kind)), selector=name, kind=kind)
    return rows


def _look(
    buffer: Buffer, kind: str, judge: Judge, settings: Settings, size: int, generator: torch.Generator
) -> tuple[list[float], float | None]:
    """Kept share for each share offered, mean over repeats; AUC of the score at the largest."""
    shares = []
    area = None
    for count in settings.counts:
        members, injected = buffer.members(kind, count), buffer.injected(count)
        choices = [judge(members, size, generator) for _ in range(settings.repeats)]
        shares.append(math.fsum(float(injected[chosen].double().mean()) for chosen, _ in choices) / len(choices))
        scores = choices[0][1]
        area = None if scores is None else detection_auc(scores, injected)
    return shares, area


def _rows(
    stage: Stage, settings: Settings, by_buffer: list[list[float]], areas: list[float] | None, **keys: str
) -> list[dict[str, Any]]:
    found = []
    for at, share in enumerate(settings.shares):
        mean, stderr = mean_stderr([shares[at] for shares in by_buffer])
        found.append(stage.row("kept_share", mean, **keys, offered=share, stderr=stderr))
    offered = math.fsum(settings.shares) / len(settings.shares)
    mean, stderr = mean_stderr([math.fsum(shares) / len(shares) - offered for shares in by_buffer])
    found.append(stage.row("kept_excess", mean, **keys, offered=offered, stderr=stderr))
    if areas:
        mean, stderr = mean_stderr(areas)
        found.append(stage.row("detection_auc", mean, **keys, offered=settings.shares[-1], stderr=stderr))
    return found
