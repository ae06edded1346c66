"""A corpus of known domains and qualities: documents, splits, tokenizer, token shards.

`build_corpus(spec)` makes it once and finds it again by the hash of everything that determines it.

    <cache>/corpora/<first 12 digits of spec.sha256>/
        manifest.json               spec, digests of every file, counts
        tokenizer.json              byte-level BPE trained on the train pool
        <split>/<domain>.bin        uint16 tokens of that domain's documents, each ended by
                                    <|endoftext|>
        <split>/<domain>.jsonl      the same documents as text, in the same order

Splits: `train` is the pool that candidates come from; `proxy` (target domain only) stands for the
target during selection; `validation` is for tuning; `evaluation` is for reported numbers only.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from opus_bench.archives import CorpusError, cache_directory, file_sha256
from opus_bench.corpus_build import write_corpus
from opus_bench.corpus_spec import CorpusSpec
from opus_bench.sources import END_OF_TEXT
from opus_bench.splits import PRECEDENCE

__all__ = ["Corpus", "CorpusError", "CorpusSpec", "build_corpus"]


class Corpus:
    """A built corpus, opened read-only; every file is checked against the manifest on opening.

    Raises:
        CorpusError: if the manifest or a file is missing, cut short or changed.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        try:
            self.manifest = json.loads((self.directory / "manifest.json").read_text())
            self.spec = CorpusSpec(**self.manifest["spec"])
            current = self.spec.sha256 == self.manifest["spec_sha256"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CorpusError(
                f"{self.directory} holds no readable manifest.json; delete the folder and build again"
            ) from error
        if not current:
            raise CorpusError(
                f"{self.directory} was built by another version or edited; delete the folder and build again"
            )
        for name, digest in self.manifest["files"].items():
            path = self.directory / name
            if not path.is_file():
                raise CorpusError(f"{path} is missing; delete {self.directory} and build again")
            if file_sha256(path) != digest:
                raise CorpusError(
                    f"{path} is damaged (its sha256 is not the manifest's); delete {self.directory} and build again"
                )

    @property
    def vocab_size(self) -> int:
        """Entries of the trained tokenizer; below `spec.vocab_size` only for tiny corpora."""
        return self.manifest["vocab_size"]

    @property
    def domains(self) -> tuple[str, ...]:
        return self.spec.domains

    @property
    def train_sha256(self) -> str:
        """Digest of the train pool, tokens and text, and of the tokenizer."""
        return self.manifest["train_sha256"]

    @property
    def proxy_sha256(self) -> str:
        """Digest of the target's proxy tokens."""
        return self.manifest["files"][f"proxy/{self.spec.target}.bin"]

    def tokens(self, split: str, domain: str) -> np.memmap:
        """The uint16 tokens of a shard, memory-mapped."""
        return np.memmap(self._file(split, domain, "bin"), dtype=np.uint16, mode="r")

    def documents(self, split: str, domain: str) -> list[str]:
        """The texts of a shard's documents, in the order of its tokens."""
        return [record["text"] for record in self.records(split, domain)]

    def records(self, split: str, domain: str) -> list[dict]:
        """text, quality and source of a shard's documents."""
        with open(self._file(split, domain, "jsonl"), encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    def sequences(self, split: str, domain: str, length: int, count: int | None = None) -> Tensor:
        """The first `count` (or all) consecutive, non-overlapping sequences of a shard.

        Returns:
            LongTensor (n, length), n at most `count`.
        """
        tokens = self.tokens(split, domain)
        available = len(tokens) // length if length > 0 else 0
        if available < 1:
            raise CorpusError(f"a sequence of {length} tokens does not fit {split}/{domain}, which has {len(tokens)}")
        count = available if count is None else min(count, available)
        return torch.from_numpy(tokens[: count * length].astype(np.int64)).view(count, length)

    def tokenizer(self):
        """The tokenizer as transformers' PreTrainedTokenizerFast."""
        from transformers import PreTrainedTokenizerFast

        special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END_OF_TEXT)
        return PreTrainedTokenizerFast(tokenizer_file=str(self.directory / "tokenizer.json"), **special)

    def _file(self, split: str, domain: str, suffix: str) -> Path:
        name = f"{split}/{domain}.{suffix}"
        if name not in self.manifest["files"]:
            raise CorpusError(
                f"the corpus has no {split} text of {domain!r}; domains: {', '.join(self.domains)}; "
                f"splits: {', '.join(PRECEDENCE)} (proxy for {self.spec.target} only)"
            )
        return self.directory / name


def build_corpus(spec: CorpusSpec, cache: str | os.PathLike | None = None, progress: bool = True) -> Corpus:
    """The corpus of a spec, built on first use and opened from the cache afterwards.

    The build happens in a temporary folder under a lock and is renamed when complete: concurrent
    callers share one build, and an interrupted build leaves nothing that looks like a corpus.

    Raises:
        CorpusError: if an archive cannot be fetched, a domain lacks text, or the cache is damaged.
    """
    corpora = cache_directory(cache) / "corpora"
    name = spec.sha256[:12]
    directory = corpora / name
    if not directory.exists():
        corpora.mkdir(parents=True, exist_ok=True)
        with FileLock(corpora / f".{name}.lock"):
            if not directory.exists():
                for abandoned in corpora.glob(f".{name}.building.*"):
                    shutil.rmtree(abandoned)
                temporary = Path(tempfile.mkdtemp(prefix=f".{name}.building.", dir=corpora))
                try:
                    write_corpus(spec, temporary, cache, progress)
                    temporary.chmod(0o755)
                    os.rename(temporary, directory)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
    return Corpus(directory)
