"""What determines a pool: sources, tokenizer, goal, cut."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from opus_bench.archives import CorpusError
from opus_bench.sources import END_OF_TEXT
from opus_bench.pools.web import Source, parse_source

FORMAT = 1
"""Raised when the reading, cutting or packing changes, so that old plans are not gone on with."""


@dataclass(frozen=True)
class PoolSpec:
    """Everything that determines a pool but the content of its sources."""

    sources: tuple[str, ...]
    """As on the command line; see `web`."""
    tokenizer: str = "gpt2"
    """gpt2, a tokenizer.json or its folder, or a hub id; see `tokenizing`."""
    tokens: int = 30_000_000_000
    """Goal of each domain; the last block is kept whole, so a little more comes."""
    subset: str = "sample-100BT"
    """Of FineWeb and FineWeb-Edu on the hub."""
    revision: str = "main"
    """Branch, tag or commit of what comes from the hub."""
    domains: tuple[str, ...] = ()
    """Keep these alone; empty: all."""
    text_field: str = "text"
    prompt_field: str | None = None
    """Column of a text before the text, whose tokens do not count in the loss."""
    end_of_text: str = END_OF_TEXT
    """Token after each document."""
    shard_characters: int = 400_000_000
    """Text of a block; about 90 million tokens of English."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise CorpusError("no source given; give fineweb, fineweb-edu, sciencepedia or a path")
        for name in ("tokens", "shard_characters"):
            if getattr(self, name) < 1:
                raise CorpusError(f"{name} is {getattr(self, name)}; it must be at least 1")
        names = [source.name for source in self.parsed]
        for name in names:
            if names.count(name) > 1:
                raise CorpusError(f"two sources are named {name!r}; give NAME=PLACE with another name")
        known = [domain for source in self.parsed for domain in source.domains]
        for domain in self.domains:
            if domain not in known:
                raise CorpusError(f"domain {domain!r} is in none of the sources; known: {', '.join(known)}")

    @property
    def parsed(self) -> tuple[Source, ...]:
        fields = self.subset, self.revision, self.text_field, self.prompt_field
        return tuple(parse_source(text, *fields) for text in self.sources)

    def kept(self, source: Source) -> tuple[str, ...]:
        """The domains of a source that are asked for."""
        return tuple(domain for domain in source.domains if not self.domains or domain in self.domains)

    def plain(self) -> dict[str, Any]:
        """The settings as JSON gives them back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def of_plain(cls, settings: dict[str, Any]) -> "PoolSpec":
        """The spec whose `plain` this is."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()})
