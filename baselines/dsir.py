"""DSIR: importance resampling of the pool towards target text (Xie et al. 2023, arXiv:2302.03169).

The score of a document is its log importance weight under two bags of hashed words,

    log w(x) = sum over unigrams and bigrams of x of  log p_target(bucket) - log p_pool(bucket)

and a sample without replacement, p proportional to w, is kept: Gumbel top-k at temperature 1.  Features,
fit and weights are those of the authors' package data-selection: lower case, words and punctuation apart,
10,000 buckets of sha256, and documents of fewer than 100 words are never kept.

The OPUS paper (arXiv:2602.05400) does not say which target text its DSIR baseline has.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from opus_bench.files import replacing

SHORTEST = 100  # words, the package's default
BUCKETS, NGRAMS = 10_000, 2  # the package's defaults


class Dsir:
    """Log importance weights of texts (module docstring).

    log_ratio: (buckets,) log p_target - log p_pool; see `fit` and `load`.
    shortest: words that a document needs to be kept at all.

    Raises:
        ValueError: without data-selection.
    """

    def __init__(self, log_ratio: np.ndarray, shortest: int = SHORTEST):
        self._dsir = _package([], [], len(log_ratio), shortest)
        self._dsir.log_diff = log_ratio

    @classmethod
    def fit(cls, target: Iterable[str], pool: Iterable[str], shortest: int = SHORTEST, buckets: int = BUCKETS,
            pool_ngrams: int | None = None) -> Dsir:
        """Fit both bags.

        pool_ngrams: n-grams of the pool's beginning that are counted (None: 100,000 a bucket, the
            package's 'auto').  Cost: one hash an n-gram, in one process.
        """
        dsir = _package(target, pool, buckets, shortest)
        with np.errstate(invalid="ignore"):  # no word at all: said below
            dsir.fit_importance_estimator(num_tokens_to_fit="auto" if pool_ngrams is None else pool_ngrams)
        if not np.isfinite(dsir.log_diff).all():
            raise ValueError("DSIR needs words in the target and in the pool; one of them has none")
        return cls(dsir.log_diff, shortest)

    def score(self, texts: list[str]) -> np.ndarray:
        """(n,) float64 log weights, summed over the document and not divided by its length."""
        found = np.full(len(texts), -np.inf)
        for n, text in enumerate(texts):
            features = self._dsir.featurizer(text)
            words = self._dsir.get_perexample_metadata(None, features)
            if self._dsir.perexample_metadata_filter(np.array(words)):
                found[n] = self._dsir.importance_estimator(features)
        return found

    def save(self, path: Path) -> None:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, log_ratio=self._dsir.log_diff, shortest=self._dsir.min_example_length)

    @classmethod
    def load(cls, path: Path) -> Dsir:
        with np.load(path, allow_pickle=False) as saved:
            return cls(saved["log_ratio"], int(saved["shortest"]))


def _package(target: Iterable[str], pool: Iterable[str], buckets: int, shortest: int) -> Any:
    try:
        from data_selection import HashedNgramDSIR
    except ImportError as error:
        raise ValueError("DSIR needs data-selection: pip install 'opus_bench[baselines]'") from error
    texts = {"target": target, "pool": pool}
    with tempfile.TemporaryDirectory() as scratch:  # for weights that the package would write; not used
        return HashedNgramDSIR(["pool"], ["target"], scratch, raw_load_dataset_fn=texts.__getitem__,
                               raw_parse_example_fn=None, target_load_dataset_fn=texts.__getitem__,
                               target_parse_example_fn=None, num_proc=1, ngrams=NGRAMS, num_buckets=buckets,
                               min_example_length=shortest)
