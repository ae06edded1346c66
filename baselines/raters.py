"""Two published transformers that rate texts: FineWeb-Edu's classifier and QuRating.

`FineWebEdu`: Penedo et al. 2024 (arXiv:2406.17557), HuggingFaceFW/fineweb-edu-classifier: a regression head
on Snowflake-arctic-embed-m, 0 (not educational) to 5, read from the first 512 tokens.  FineWeb-Edu keeps
documents whose score, rounded, is at least 3.

`QuRating`: Wettig et al. 2024 (arXiv:2402.09739), princeton-nlp/QuRater-1.3B: four ratings of windows of 512
tokens, averaged by the windows' lengths.  Ratings are log-odds up to a constant, higher is better.  Its
authors standardise them over the pool and keep a sample at temperature 2; they rate in bfloat16, here it
is the dtype of the checkpoint.  Their best single criterion is the educational value, the default here;
which one the OPUS paper (arXiv:2602.05400) used is not known.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from opus_bench.documents.embedding import in_batches
from opus_bench.errors import first_line

FINEWEB_EDU, QURATER = "HuggingFaceFW/fineweb-edu-classifier", "princeton-nlp/QuRater-1.3B"
CRITERIA = ("writing_style", "required_expertise", "facts_and_trivia", "educational_value")
"""QuRater's logits, in the order of its model card."""
TOKENS = 512  # read by FineWeb-Edu's classifier; QuRater's window


class FineWebEdu:
    """Educational value of texts by a sequence classifier with one output (module docstring)."""

    def __init__(self, model: str = FINEWEB_EDU, max_tokens: int | None = None, batch_size: int = 32,
                 device: str | None = None, trust_remote_code: bool = False):
        self.model, self.tokenizer, self.device = _load(model, 1, device, trust_remote_code)
        self.max_tokens, self.batch_size = max_tokens or TOKENS, batch_size

    def score(self, texts: list[str]) -> np.ndarray:
        """(n,) float64, about 0 to 5."""
        return in_batches(texts, self.batch_size, self._rate)[:, 0].double().numpy()

    def _rate(self, texts: list[str]) -> Tensor:
        reading = {"padding": "longest", "truncation": True, "max_length": self.max_tokens, "return_tensors": "pt"}
        batch = self.tokenizer(texts, **reading)
        with torch.no_grad():
            return self.model(**batch.to(self.device)).logits.float().cpu()


class QuRating:
    """One of QuRater's four ratings, or their mean (module docstring).

    criterion: one of CRITERIA, or "mean".
    max_tokens: length of a window, in tokens.

    Raises:
        ValueError: for another criterion or a model that has not four outputs.
    """

    def __init__(self, model: str = QURATER, criterion: str = "educational_value", max_tokens: int | None = None,
                 batch_size: int = 32, device: str | None = None, trust_remote_code: bool = False):
        if criterion not in (*CRITERIA, "mean"):
            raise ValueError(f"criterion must be one of {', '.join(CRITERIA)} or mean, got {criterion!r}")
        self.model, self.tokenizer, self.device = _load(model, len(CRITERIA), device, trust_remote_code)
        self.model.config.pad_token_id = 0  # as the published script pads
        self.criterion, self.window, self.batch_size = criterion, max_tokens or TOKENS, batch_size

    def score(self, texts: list[str]) -> np.ndarray:
        """(n,) float64; -inf for a text without tokens."""
        ratings = self.ratings(texts)
        return ratings.mean(1) if self.criterion == "mean" else ratings[:, CRITERIA.index(self.criterion)]

    def ratings(self, texts: list[str]) -> np.ndarray:
        """(n, 4) float64 in the order of CRITERIA."""
        tokens = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        windows = [(n, ids[start : start + self.window]) for n, ids in enumerate(tokens)
                   for start in range(0, len(ids), self.window)]
        total, length = np.zeros((len(texts), len(CRITERIA))), np.zeros(len(texts))
        if windows:
            rated = in_batches([ids for _, ids in windows], self.batch_size, self._rate).double().numpy()
            for (n, ids), row in zip(windows, rated):
                total[n] += len(ids) * row
                length[n] += len(ids)
        return np.where(length[:, None] > 0, total / np.maximum(length, 1)[:, None], -np.inf)

    def _rate(self, windows: list[list[int]]) -> Tensor:
        longest = max(map(len, windows))
        tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids in windows])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in windows])
        with torch.no_grad():
            logits = self.model(input_ids=tokens.to(self.device), attention_mask=mask.to(self.device)).logits
        return logits.float().cpu()


def _load(name: str, outputs: int, device: str | None, trust_remote_code: bool) -> tuple[Any, Any, str]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        model = AutoModelForSequenceClassification.from_pretrained(
            name, trust_remote_code=trust_remote_code, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load {name} ({first_line(error)}); give --model FOLDER") from error
    if model.config.num_labels != outputs:
        raise ValueError(f"{name} has {model.config.num_labels} outputs, this scorer reads {outputs}; "
                         "give another model")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval().to(device), tokenizer, device
