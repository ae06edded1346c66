"""Five ways to spoil a sequence of tokens, each a pure function of the tokens and a generator.

    random tokens   every token drawn uniformly from the vocabulary
    shuffled        the same tokens in random order
    repeated        a short span of the sequence, over and over
    markup          tags put between every few tokens of the text, the end cut off
    foreign         another sequence in its place

Axes: n samples, t positions, m sequences to put in the place of others, u tokens of a tag.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

KINDS = ("random tokens", "shuffled", "repeated", "markup", "foreign")


@dataclass(frozen=True)
class Material:
    """What the kinds of noise are made of."""

    vocab_size: int
    tags: tuple[Int[Tensor, " u"], ...]  # tokens of each tag
    foreign: Int[Tensor, "m t"]  # sequences to put in the place of others
    span: int = 8  # tokens that are repeated
    gap: int = 4  # tokens of text between two tags


def random_tokens(tokens: Int[Tensor, "n t"], vocab_size: int, generator: torch.Generator) -> Int[Tensor, "n t"]:
    """Tokens drawn uniformly from the vocabulary."""
    return torch.randint(vocab_size, tokens.shape, generator=generator)


def shuffled(tokens: Int[Tensor, "n t"], generator: torch.Generator) -> Int[Tensor, "n t"]:
    """The tokens of each sequence in an order of its own, uniform over permutations."""
    return torch.stack([row[torch.randperm(len(row), generator=generator)] for row in tokens])


def repeated(tokens: Int[Tensor, "n t"], span: int, generator: torch.Generator) -> Int[Tensor, "n t"]:
    """``span`` consecutive tokens of each sequence, from a uniform place, repeated to its length."""
    starts = torch.randint(tokens.shape[1] - span + 1, (len(tokens), 1), generator=generator)
    return tokens.gather(1, starts + torch.arange(tokens.shape[1]) % span)


def marked_up(
    tokens: Int[Tensor, "n t"], tags: Sequence[Int[Tensor, " u"]], gap: int, generator: torch.Generator
) -> Int[Tensor, "n t"]:
    """A tag drawn uniformly before every ``gap`` tokens of text, cut to the length of the sequence."""
    rows = []
    for row in tokens:
        drawn = torch.randint(len(tags), (math.ceil(len(row) / gap),), generator=generator).tolist()
        pieces = zip(drawn, row.split(gap), strict=True)
        rows.append(torch.cat([part for tag, text in pieces for part in (tags[tag], text)])[: len(row)])
    return torch.stack(rows)


def inject(
    tokens: Int[Tensor, "n t"], kind: str, material: Material, generator: torch.Generator
) -> Int[Tensor, "n t"]:
    """Each sequence spoilt, by the module's legend; a pure function, and ``tokens`` stay as they are.

    Raises:
        ValueError: an unknown kind, a span that does not fit twice, fewer foreign sequences than asked for.
    """
    if kind == "random tokens":
        return random_tokens(tokens, material.vocab_size, generator)
    if kind == "shuffled":
        return shuffled(tokens, generator)
    if kind == "repeated":
        if not 1 <= material.span <= tokens.shape[1] // 2:
            raise ValueError(f"span must be 1 to {tokens.shape[1] // 2} tokens, half of a sequence, "
                             f"got {material.span}")
        return repeated(tokens, material.span, generator)
    if kind == "markup":
        return marked_up(tokens, material.tags, material.gap, generator)
    if kind == "foreign":
        if len(material.foreign) < len(tokens):
            raise ValueError(f"{len(tokens)} foreign sequences are needed, got {len(material.foreign)}")
        return material.foreign[torch.randperm(len(material.foreign), generator=generator)[: len(tokens)]]
    raise ValueError(f"unknown kind of noise {kind!r}; known: {', '.join(KINDS)}")
