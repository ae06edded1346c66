"""The making of a corpus: documents to splits, splits to a tokenizer, texts to token shards."""

import dataclasses
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm

from opus_bench.archives import ARCHIVES, CorpusError
from opus_bench.corpus_spec import FORMAT, HELD_OUT, TARGET_HELD_OUT, CorpusSpec
from opus_bench.sources import END_OF_TEXT, Document, corrupt, read_documents
from opus_bench.splits import PRECEDENCE, Shingles, near_duplicates, normalise, split_of

TOKENIZER_CHARACTERS = 6_000_000
"""Text the tokenizer is trained on."""


def write_corpus(spec: CorpusSpec, directory: Path, cache: str | os.PathLike | None, progress: bool) -> None:
    """Write every file of a corpus into an empty folder, the manifest last."""
    documents = [document for key in spec.sources for document in read_documents(key, spec.domains, cache, progress)]
    splits, dropped = split_documents(spec, documents, progress)
    for split, domain in spec.shards:
        if not splits[split, domain]:
            raise CorpusError(f"no {split} text of {domain!r} is left; raise limit_characters or remove its share")
    tokenizer = train_tokenizer(spec, splits)
    files = {}

    def save(name: str, content: bytes) -> None:
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        files[name] = hashlib.sha256(content).hexdigest()

    save("tokenizer.json", tokenizer.to_str(pretty=True).encode())
    counts: dict[str, dict[str, dict[str, int]]] = {split: {} for split in PRECEDENCE}
    for split, domain in tqdm(spec.shards, desc="tokenizing", unit="shard", disable=not progress, leave=False):
        chosen = splits[split, domain]
        tokens = encode(tokenizer, [document.text for document in chosen])
        save(f"{split}/{domain}.bin", tokens.tobytes())
        lines = [
            json.dumps(
                {"text": document.text, "quality": document.quality, "source": document.source},
                ensure_ascii=False,
            )
            for document in chosen
        ]
        save(f"{split}/{domain}.jsonl", "".join(f"{line}\n" for line in lines).encode())
        counts[split][domain] = {
            "documents": len(chosen),
            "characters": sum(len(document.text) for document in chosen),
            "tokens": len(tokens),
        }
    train = [f"{name} {files[name]}" for name in sorted(files) if name.startswith("train/")]
    manifest = {
        "format": FORMAT,
        "spec_sha256": spec.sha256,
        "spec": dataclasses.asdict(spec),
        "archives": {key: dataclasses.asdict(ARCHIVES[key]) for key in spec.sources},
        "vocab_size": tokenizer.get_vocab_size(),
        "tokenizer_sha256": files["tokenizer.json"],
        "train_sha256": hashlib.sha256("\n".join([*train, files["tokenizer.json"]]).encode()).hexdigest(),
        "counts": counts,
        "dropped": dropped,
        "files": files,
    }
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def split_documents(
    spec: CorpusSpec, documents: Iterable[Document], progress: bool = False
) -> tuple[dict[tuple[str, str], list[Document]], dict]:
    """Documents by (split, domain), in the order of their hashes, and the counts of those dropped.

    Exact duplicates are dropped first, then each domain is cut to its limit, then near-duplicates
    of a document of an earlier split of `PRECEDENCE` are dropped. Corrupted text is made from each
    split's own documents of the tiers 1 and 2, so that its only defect is the corruption, and is
    held to the same rule.
    """
    unique: dict[str, tuple[str, Document]] = {}
    exact: Counter = Counter()
    for document in documents:
        words = f"order {spec.split_seed}\n{normalise(document.text)}"  # not the hash of split_of
        key = hashlib.sha256(words.encode()).hexdigest()
        if key in unique:
            exact[document.domain] += 1
        else:
            unique[key] = (key, document)
    chosen: dict[tuple[str, str], list[Document]] = {shard: [] for shard in spec.shards}
    taken: Counter = Counter()
    for _, document in sorted(unique.values(), key=lambda pair: pair[0]):
        target = document.domain == spec.target
        if taken[document.domain] >= (spec.target_characters if target else spec.limit_characters):
            continue
        taken[document.domain] += len(document.text)
        split = split_of(document.text, TARGET_HELD_OUT if target else HELD_OUT, spec.split_seed)
        chosen[split, document.domain].append(document)

    shingles = Shingles(spec.shingle)
    held: list[np.ndarray] = []
    near: dict[str, dict[str, int]] = {split: {} for split in PRECEDENCE}
    steps = tqdm(PRECEDENCE, desc="near-duplicates", unit="split", disable=not progress, leave=False)
    for number, split in enumerate(steps):
        domains = [domain for domain in spec.domains if (split, domain) in chosen and domain != "corrupted"]
        sets: list[np.ndarray] = []
        for domain in [*domains, "corrupted"]:
            if domain == "corrupted":
                if ("train", domain) not in chosen or split == "proxy":
                    continue
                clean = [document for name in domains for document in chosen[split, name] if document.quality <= 2]
                share = 1.0 if split == "train" else HELD_OUT[split]
                amount = math.ceil(share * spec.limit_characters / 2)
                chosen[split, domain] = corrupt(clean, amount, 4 * spec.split_seed + number)
            own = [shingles(document.text) for document in chosen[split, domain]]
            duplicate = near_duplicates(own, held, spec.overlap)
            near[split][domain] = int(duplicate.sum())
            chosen[split, domain] = [
                document for document, bad in zip(chosen[split, domain], duplicate, strict=True) if not bad
            ]
            sets += [one for one, bad in zip(own, duplicate, strict=True) if not bad]
        held += sets
    return chosen, {"exact": dict(exact), "near": near}


def train_tokenizer(spec: CorpusSpec, splits: dict[tuple[str, str], list[Document]]) -> Tokenizer:
    """Byte-level BPE on an even share of every uncorrupted domain of the train pool."""
    domains = [domain for domain in spec.domains if domain != "corrupted"]
    sample = []
    for domain in domains:
        room = TOKENIZER_CHARACTERS // len(domains)
        for document in splits["train", domain]:
            if room <= 0:
                break
            sample.append(document.text)
            room -= len(document.text)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """The tokens of the texts, each followed by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    tokens: list[int] = []
    for ids in token_lists(tokenizer, texts):
        tokens += ids
        tokens.append(end)
    return np.array(tokens, dtype=np.uint16)


def token_lists(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    """The tokens of each text: no special token is added, and the name of one inside a text is text."""
    tokenizer.encode_special_tokens = True
    for start in range(0, len(texts), 1024):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + 1024], add_special_tokens=False):
            yield encoding.ids
