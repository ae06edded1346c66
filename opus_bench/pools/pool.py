"""A pool of token shards as training code reads it: candidates as a pure function of (seed, step).

    pool = ShardPool("DIR")                               # made by `opus-bench data --out DIR`
    batch = pool.candidates(step, size, length, seed)     # Sequences: tokens (size, length), masks if there are any
    mine = pool.candidates(step, size, length, seed, rank, world)  # this rank's size / world rows of the same
    ids = pool.ids(step, size, length, seed)              # LongTensor (size,): which sequences of the pool these are
    pool.sequences(ids, length)                           # the same sequences again, by id
    pool.sequence_count(length), pool.vocab_size, pool.sha256, pool.domains, pool.domain_names(ids, length)

Nothing is consumed: a resumed run needs only its step, and 1, 2 or 4 processes see the same global buffer.

    S       sequences of `length` tokens in the pool: consecutive, non-overlapping, within a shard
    k       position in the stream, step * size + place in the buffer
Position k holds entry k mod S of the (k div S)-th permutation of all sequences: none comes back before
all others were shown.  Shards stay on disk (memory-mapped), so the pool may be larger than memory.
"""

import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from opus_bench.archives import CorpusError
from opus_bench.sequences import Sequences
from opus_bench.pools.shards import check_shard, read_manifest, read_mask, read_shard
from opus_bench.stream import domain_rng, epoch_rows, positive, seed_in_range

OPEN_SHARDS = 256
"""Shards mapped at a time: a system allows a process about 1,024 open files."""


class ShardPool:
    """The sequences of a folder of token shards, opened read-only.

    Args:
        manifest: manifest.json of `opus-bench data`, or the folder that holds it.
        domains: use the shards of these alone; None: all.
        verify: compare every byte with the manifest (about 1 GB/s); False compares sizes only, which is
            enough where another process has just compared the bytes.

    Raises:
        CorpusError: if the manifest or a shard is missing, unfinished, cut short or changed, or a domain is unknown.

    Memory: 4 bytes a sequence of the pool for the order (10 MB for 60e9 tokens at 24,576; 470 MB at 512), twice
    that where an epoch ends.
    """

    def __init__(self, manifest: str | os.PathLike, domains: Sequence[str] | None = None, verify: bool = True):
        path = Path(manifest)
        path = path / "manifest.json" if path.is_dir() else path
        self.manifest = read_manifest(path)
        known = sorted(self.manifest["domains"])
        for name in domains or ():
            if name not in known:
                raise CorpusError(f"{path} has no domain {name!r}; known: {', '.join(known)}")
        shards = [shard for shard in self.manifest["shards"] if domains is None or shard["domain"] in domains]
        for shard in tqdm(shards, desc="checking shards", unit="shard", disable=None if verify else True, leave=False):
            check_shard(path.parent / shard["file"], shard, digest=verify)
        self._use([path.parent / shard["file"] for shard in shards], [shard["domain"] for shard in shards],
                  [shard["tokens"] for shard in shards])
        self.vocab_size: int | None = self.manifest["tokenizer"]["vocab_size"]
        self.sha256: str | None = self.manifest["sha256"]

    @classmethod
    def of_files(cls, paths: Iterable[str | os.PathLike]) -> "ShardPool":
        """A pool of shards made elsewhere, in the order given; a shard's folder is its domain.

        Only headers and sizes can be checked, and vocabulary and digest are unknown (None).
        """
        pool = cls.__new__(cls)
        files = [Path(path) for path in paths]
        if not files:
            raise CorpusError("no shards given; a pool needs at least one .bin")
        pool.manifest = {}
        pool._use(files, [path.absolute().parent.name for path in files], [len(read_shard(path)) for path in files])
        pool.vocab_size = pool.sha256 = None
        return pool

    def _use(self, files: list[Path], domains: list[str], tokens: list[int]) -> None:
        self.files, self._domains, self._tokens = files, domains, np.array(tokens, dtype=np.int64)
        self._map = functools.lru_cache(maxsize=OPEN_SHARDS)(self._open)
        self._offsets = functools.lru_cache(maxsize=8)(self._count)
        self._permutation = functools.lru_cache(maxsize=2)(self._draw)
        self._masked = any(path.with_suffix(".mask").exists() for path in files)

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains read, in the order of their shards."""
        return tuple(dict.fromkeys(self._domains))

    @property
    def token_count(self) -> int:
        """Tokens in the shards read."""
        return int(self._tokens.sum())

    def sequence_count(self, length: int) -> int:
        """S, the whole sequences of so many tokens; what is left at the end of a shard is not used."""
        positive(length=length)
        return int(self._offsets(length)[-1])

    def ids(self, step: int, size: int, length: int, seed: int) -> Tensor:
        """LongTensor (size,): the places in the pool of the candidates of a step, counted from 0.

        Raises:
            CorpusError: if no sequence of this length fits a shard, or an argument is out of range.
        """
        positive(size=size)
        seed_in_range(seed)
        if step < 0:
            raise CorpusError(f"step is {step}; steps count from 0")
        count = self.sequence_count(length)
        if count < 1:
            raise CorpusError(f"a sequence of {length} tokens does not fit a shard of the pool, whose largest has "
                              f"{self._tokens.max()}; lower the length or make larger shards")
        turns = step * size + np.arange(size)
        return torch.from_numpy(epoch_rows(turns, count, functools.partial(self._permutation, seed, count)))

    def candidates(
        self, step: int, size: int, length: int, seed: int, rank: int = 0, world: int = 1
    ) -> Sequences:
        """The candidates of a step, or of them the rows from rank * size / world that are this rank's.

        The rows of the ranks 0 to world - 1, put together, are those of one process.

        Raises:
            CorpusError: as `ids`; if the ranks would get unequal shares.
        """
        if not 0 <= rank < world or size % world:
            raise CorpusError(f"{size} candidates do not fall evenly to rank {rank} of {world}; make size a multiple "
                              "of the number of ranks, and count ranks from 0")
        share = size // world
        return self.sequences(self.ids(step, size, length, seed)[rank * share : (rank + 1) * share], length)

    def sequences(self, ids: Tensor | Sequence[int], length: int) -> Sequences:
        """The sequences at these places: int64 tokens (n, length), and a loss mask if any shard has one."""
        at, starts = self._find(ids, length)
        tokens = np.empty((len(at), length), dtype=np.int64)
        counted = np.ones((len(at), length), dtype=bool) if self._masked else None
        for n, (shard, start) in enumerate(zip(at.tolist(), starts.tolist(), strict=True)):
            stored, mask = self._map(shard)
            tokens[n] = stored[start : start + length]
            if counted is not None and mask is not None:
                counted[n] = mask[start : start + length]
        return Sequences(torch.from_numpy(tokens), loss_mask=None if counted is None else torch.from_numpy(counted))

    def domain_names(self, ids: Tensor | Sequence[int], length: int) -> tuple[str, ...]:
        """The domain of each of the sequences; for reports, a selector must not read it."""
        return tuple(self._domains[shard] for shard in self._find(ids, length)[0].tolist())

    def _find(self, ids: Tensor | Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
        """(shard, first token) of each sequence."""
        places, count = np.asarray(ids, dtype=np.int64), self.sequence_count(length)
        if places.size and not 0 <= places.min() <= places.max() < count:
            raise CorpusError(f"ids run from {places.min()} to {places.max()}; the pool has 0 to {count - 1} "
                              f"of {length} tokens")
        offsets = self._offsets(length)
        at = np.searchsorted(offsets, places, side="right") - 1
        return at, (places - offsets[at]) * length

    def _open(self, shard: int) -> tuple[np.ndarray, np.ndarray | None]:
        tokens = read_shard(self.files[shard])
        return tokens, read_mask(self.files[shard], len(tokens))

    def _count(self, length: int) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self._tokens // length)])

    def _draw(self, seed: int, count: int, epoch: int) -> np.ndarray:
        kind = np.uint32 if count <= 2**32 else np.int64
        return domain_rng(seed, "pool", epoch).permutation(np.arange(count, dtype=kind))
