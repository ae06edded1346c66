"""Replayable streams over a corpus: candidates to choose from, and the proxy they are scored against.

All are pure functions of (corpus, arguments, step): nothing is consumed, so a resumed run needs
only its step, and every method compared under one seed sees the same candidates in the same order.

    i, j    a domain; a position in the stream, counted over all steps
    n_i     sequences of domain i in the train pool
Position j belongs to domain i with probability share_i. The k-th position of domain i holds entry
k mod n_i of the (k div n_i)-th permutation of that domain's sequences: no sequence comes back
before all others of its domain were shown.
"""

import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opus_bench.archives import CorpusError
from opus_bench.corpus import Corpus
from opus_bench.sources import QUALITY

BLOCK = 1024
"""Steps whose domains are drawn together, so that step s costs O(s / BLOCK) draws when resumed."""


@dataclass(frozen=True)
class Batch:
    """Sequences with their labels. The labels are for reports; a selector must not read them."""

    tokens: Tensor
    """LongTensor (n, length)."""
    ids: Tensor
    """LongTensor (n,): the sequence's place in the pool; equal ids are equal sequences."""
    domains: tuple[str, ...]
    """Domain of each sequence."""
    quality: Tensor
    """LongTensor (n,): tier, 1 best to 4 worst."""

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Tensor | Sequence[int]) -> "Batch":
        """The sequences at `indices`, in that order."""
        indices = torch.as_tensor(indices, dtype=torch.long).cpu()
        domains = tuple(self.domains[i] for i in indices.tolist())
        return Batch(self.tokens[indices], self.ids[indices], domains, self.quality[indices])


def domain_rng(seed: int, domain: str, *rest: int) -> np.random.Generator:
    """A generator of its own for each (seed, domain, ...), the same on every machine."""
    return np.random.default_rng([seed, zlib.crc32(domain.encode()), *rest])


def epoch_rows(turns: np.ndarray, size: int, permutation: Callable[[int], np.ndarray]) -> np.ndarray:
    """Which of `size` sequences come at these turns: turn k is entry k mod size of permutation k div size."""
    rows = np.empty(len(turns), dtype=np.int64)
    for epoch in np.unique(turns // size):
        here = turns // size == epoch
        rows[here] = permutation(int(epoch))[turns[here] % size]
    return rows


class CandidateStream:
    """The candidates of every step, drawn from the train pool by the shares of the spec.

    Args:
        corpus: an opened corpus.
        length: tokens in a sequence.
        buffer: candidates in a step.
        seed: at least 0.
        only: domains that candidates come from, in the proportions of their shares; None: all.  Ids are those of
            the whole pool all the same.

    Raises:
        CorpusError: if a domain has no sequence of this length or is not in the corpus, or an argument is out of
            range.
    """

    def __init__(self, corpus: Corpus, length: int, buffer: int, seed: int, only: Sequence[str] | None = None):
        positive(length=length, buffer=buffer)
        seed_in_range(seed)
        self.corpus, self.length, self.buffer, self.seed = corpus, length, buffer, seed
        shares = dict(corpus.spec.shares)
        self.domains = corpus.domains
        self.shares = np.array([shares[domain] for domain in self.domains])
        if only is not None:
            for name in only:
                if name not in self.domains:
                    raise CorpusError(f"the corpus has no domain {name!r}; known: {', '.join(self.domains)}")
            self.shares = self.shares * np.array([domain in only for domain in self.domains])
            if not self.shares.any():
                raise CorpusError("no domain is left that candidates could come from")
            self.shares = self.shares / self.shares.sum()
        self.sizes = np.array([sequence_count(corpus, "train", name, length) for name in self.domains])
        self.offsets = np.concatenate([[0], np.cumsum(self.sizes)])
        self._shards = [corpus.tokens("train", domain) for domain in self.domains]
        self._before = [np.zeros(len(self.domains), dtype=np.int64)]
        self._block = functools.lru_cache(maxsize=2)(self._draw_block)
        self._permutation = functools.lru_cache(maxsize=4 * len(self.domains))(self._draw_permutation)

    @property
    def pool_size(self) -> int:
        """Distinct sequences in the pool."""
        return int(self.offsets[-1])

    def candidates(self, step: int) -> Batch:
        """The `buffer` candidates of a step, counted from 0."""
        domains, counts = self._positions(step)
        rows = np.empty(self.buffer, dtype=np.int64)
        for i in range(len(self.domains)):
            at = np.flatnonzero(domains == i)
            turns = counts[i] + np.arange(len(at))
            rows[at] = epoch_rows(turns, self.sizes[i], functools.partial(self._permutation, i))
        return self._batch(domains, rows)

    def repeats(self, step: int) -> int:
        """How many candidates of this step were candidates before, in any earlier position."""
        domains, counts = self._positions(step)
        after = counts + np.bincount(domains, minlength=len(self.domains))
        return int((np.maximum(after, self.sizes) - np.maximum(counts, self.sizes)).sum())

    def pool(self, size: int = 256) -> Iterator[Batch]:
        """Every sequence of the pool once, in the order of the ids, in batches of `size`."""
        positive(size=size)
        for start in range(0, self.pool_size, size):
            ids = np.arange(start, min(start + size, self.pool_size))
            domains = np.searchsorted(self.offsets, ids, side="right") - 1
            yield self._batch(domains, ids - self.offsets[domains])

    def _batch(self, domains: np.ndarray, rows: np.ndarray) -> Batch:
        tokens = np.empty((len(rows), self.length), dtype=np.int64)
        for n, (i, row) in enumerate(zip(domains, rows, strict=True)):
            tokens[n] = self._shards[i][row * self.length : (row + 1) * self.length]
        names = tuple(self.domains[i] for i in domains)
        return Batch(
            tokens=torch.from_numpy(tokens),
            ids=torch.from_numpy(self.offsets[domains] + rows),
            domains=names,
            quality=torch.tensor([QUALITY[name] for name in names], dtype=torch.long),
        )

    def _positions(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Domain of each position of the step, and positions of each domain before the step."""
        if step < 0:
            raise CorpusError(f"step is {step}; steps count from 0")
        block, row = divmod(step, BLOCK)
        while len(self._before) <= block:
            drawn = self._block(len(self._before) - 1)
            self._before.append(self._before[-1] + np.bincount(drawn.ravel(), minlength=len(self.domains)))
        drawn = self._block(block)
        earlier = np.bincount(drawn[:row].ravel(), minlength=len(self.domains))
        return drawn[row].astype(np.int64), self._before[block] + earlier

    def _draw_block(self, block: int) -> np.ndarray:
        rng = domain_rng(self.seed, "candidates", block)
        return rng.choice(len(self.domains), size=(BLOCK, self.buffer), p=self.shares).astype(np.uint8)

    def _draw_permutation(self, i: int, epoch: int) -> np.ndarray:
        return domain_rng(self.seed, self.domains[i], epoch).permutation(self.sizes[i])


class ProxyStream:
    """Proxy batches of the target domain, without replacement within a step.

    Args:
        corpus: an opened corpus.
        length: tokens in a sequence.
        size: sequences in a batch.
        seed: at least 0.

    Raises:
        CorpusError: if the proxy split has fewer than `size` sequences, or an argument is out of range.
    """

    def __init__(self, corpus: Corpus, length: int, size: int, seed: int):
        positive(length=length, size=size)
        seed_in_range(seed)
        self.length, self.size, self.seed = length, size, seed
        target = corpus.spec.target
        self.available = sequence_count(corpus, "proxy", target, length)
        if size > self.available:
            raise CorpusError(
                f"a proxy of {size} sequences of {length} tokens is asked for, but {target} has "
                f"{self.available}; lower the size or the length"
            )
        self._sequences = corpus.sequences("proxy", target, length)

    def proxy(self, step: int) -> Tensor:
        """LongTensor (size, length): the proxy batch of a step, counted from 0."""
        if step < 0:
            raise CorpusError(f"step is {step}; steps count from 0")
        rows = domain_rng(self.seed, "proxy", step).choice(self.available, size=self.size, replace=False)
        return self._sequences[torch.from_numpy(rows)]


class PoolProxyStream:
    """Proxy batches of the training mixture itself: held-out text of every domain, by the pool's shares.

    A standard proxy, beside which one matched to the benchmark can be put.  Every sequence's domain is
    drawn by the shares of the spec, the sequence from text that is held out of the pool: for the target
    its proxy split, for every other domain its validation split.  The target's validation split, on
    which losses are measured, and evaluation splits, which are for reported numbers, are never used.
    Within a batch no sequence comes twice before all of its domain were taken.

    Args:
        corpus: an opened corpus.
        length: tokens in a sequence.
        size: sequences in a batch.
        seed: at least 0.

    Raises:
        CorpusError: if a domain has no held-out sequence of this length, or an argument is out of range.
    """

    def __init__(self, corpus: Corpus, length: int, size: int, seed: int):
        positive(length=length, size=size)
        seed_in_range(seed)
        self.length, self.size, self.seed = length, size, seed
        shares = dict(corpus.spec.shares)
        self.domains = corpus.domains
        self.shares = np.array([shares[domain] for domain in self.domains])
        self._sequences = [
            corpus.sequences("proxy" if domain == corpus.spec.target else "validation", domain, length)
            for domain in self.domains
        ]

    def proxy(self, step: int) -> Tensor:
        """LongTensor (size, length): the proxy batch of a step, counted from 0."""
        if step < 0:
            raise CorpusError(f"step is {step}; steps count from 0")
        rng = domain_rng(self.seed, "pool proxy", step)
        drawn = rng.choice(len(self.domains), size=self.size, p=self.shares)
        batch = torch.empty(self.size, self.length, dtype=torch.long)
        for i, held_out in enumerate(self._sequences):
            at = np.flatnonzero(drawn == i)
            rows = rng.permutation(len(held_out))[np.arange(len(at)) % len(held_out)]
            batch[torch.from_numpy(at)] = held_out[torch.from_numpy(rows)]
        return batch


PROXIES: dict[str, type[ProxyStream] | type[PoolProxyStream]] = {"target": ProxyStream, "pool": PoolProxyStream}
"""Where a run's proxy comes from, by the name in its config."""


def sequence_count(corpus: Corpus, split: str, domain: str, length: int) -> int:
    """Whole sequences in a shard, at least one."""
    tokens = len(corpus.tokens(split, domain))
    if tokens < length:
        raise CorpusError(
            f"a sequence of {length} tokens does not fit {split}/{domain}, which has {tokens}; "
            "lower the length or raise the corpus limits"
        )
    return tokens // length


def positive(**arguments: int) -> None:
    for name, value in arguments.items():
        if value < 1:
            raise CorpusError(f"{name} is {value}; it must be at least 1")


def seed_in_range(seed: int) -> None:
    if seed < 0:
        raise CorpusError(f"seed is {seed}; it must be at least 0")
