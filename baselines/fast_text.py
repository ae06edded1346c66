"""Two published fastText classifiers of web text: DCLM's and Ultra-FineWeb's.

`dclm`: Li et al. 2024 (arXiv:2406.11794), mlfoundations/fasttext-oh-eli5, trained to tell OpenHermes 2.5
and Reddit's ELI5 (__label__hq) from RefinedWeb (__label__cc).  The lines of a document are joined by
spaces and the whole is read; DCLM keeps the tenth of highest P(hq), in its released configuration
P(hq) above 0.018112.

`ultra_fineweb`: Wang et al. 2025 (arXiv:2505.05427), openbmb/Ultra-FineWeb-classifier, English.  Its model
card cuts a document into tokens of the tokenizer that comes with it, after lower case and the loss of
diacritics, and gives 1 - P(neg).  The threshold of the published data set is not in the card.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from opus_bench.errors import first_line

DCLM = ("mlfoundations/fasttext-oh-eli5", "openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train.bin")
ULTRA_FINEWEB = ("openbmb/Ultra-FineWeb-classifier", "classifiers/ultra_fineweb_en.bin")
ULTRA_TOKENIZER = "local_tokenizer"  # folder of the same repository


class FastText:
    """P(label) of a fastText classifier, or 1 - P(label).

    model: a .bin file.  normalise: what is done to a text first; its result must be one line.

    Raises:
        ValueError: without fasttext, for a file that is no model, and for a label that it lacks.
    """

    def __init__(self, model: Path, label: str, normalise: Callable[[str], str], complement: bool = False):
        try:
            import fasttext
        except ImportError as error:
            raise ValueError("fastText classifiers need fasttext: pip install 'opus_bench[baselines]'") from error
        try:
            self.model = fasttext.load_model(str(model))
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{model} is no fastText model: {error}") from error
        if label not in self.model.get_labels():
            raise ValueError(f"{model} has no {label}; its labels: {', '.join(self.model.get_labels())}")
        self.label, self.normalise, self.complement = label, normalise, complement

    def score(self, texts: list[str]) -> np.ndarray:
        """(n,) float64 in [0, 1]; fastText's own rounding adds up to 1e-5."""
        found = np.zeros(len(texts))
        for n, text in enumerate(texts):
            labels, probabilities = self.model.predict(self.normalise(text), k=-1)
            found[n] = min(float(dict(zip(labels, probabilities)).get(self.label, 0.0)), 1.0)
        return 1 - found if self.complement else found


def dclm(model: str | None = None) -> FastText:
    """DCLM's classifier, from the hub or a local .bin: P(high quality), higher is better."""
    return FastText(_file(model, *DCLM), "__label__hq", one_line)


def ultra_fineweb(model: str | None = None, tokenizer: str | None = None) -> FastText:
    """Ultra-FineWeb's classifier: 1 - P(low quality), higher is better.

    model, tokenizer: a local .bin and a local tokenizer; None: those of the hub.
    """
    try:
        if tokenizer is None:
            loaded = AutoTokenizer.from_pretrained(ULTRA_FINEWEB[0], subfolder=ULTRA_TOKENIZER)
        else:
            loaded = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the tokenizer of {ULTRA_FINEWEB[0]} ({first_line(error)}); give "
                         "--classifier-tokenizer FOLDER") from error
    file = _file(model, *ULTRA_FINEWEB)
    return FastText(file, "__label__neg", lambda text: tokens_line(text, loaded), complement=True)


def one_line(text: str) -> str:
    return " ".join(text.strip().splitlines())


def tokens_line(text: str, tokenizer: Any) -> str:
    """The decoded tokens of a text with spaces between, in one line, as Ultra-FineWeb's card has it.

    Three newlines and more become two, lower case, marks of NFKD dropped; line breaks and tabs are
    written as backslash and letter, runs of spaces become one.
    """
    text = re.sub(r"\n{3,}", "\n\n", text).lower()
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c) != "Mn")
    line = " ".join(tokenizer.decode([token]) for token in tokenizer.encode(text, add_special_tokens=False))
    for character, written in (("\n", r"\n"), ("\r", r"\r"), ("\t", r"\t")):
        line = line.replace(character, written)
    return re.sub(" +", " ", line).strip()


def _file(model: str | None, repository: str, name: str) -> Path:
    if model is not None:
        if not Path(model).is_file():
            raise ValueError(f"{model} is no file; give the .bin of a fastText model")
        return Path(model)
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(repository, name))
    except Exception as error:  # the hub's client raises anything when it cannot be reached
        raise ValueError(f"cannot fetch {name} of {repository} ({first_line(error)}); give --model FILE.bin") from error
