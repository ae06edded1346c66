"""Static quality: a linear classifier of target text against pool text scores the pool once.

The recipe of DCLM's fastText filter (Li et al. 2024): positives are target documents, negatives
are a random part of the pool, and a fixed subset of the pool, its share ``selection_ratio`` of
highest score, is kept for the whole run.  Here the classifier is scikit-learn's SGDClassifier on
hashed word uni- and bigrams, trained at run time on the proxy split; no published weights are used.
Within a buffer the kept sequences are drawn uniformly; where fewer than asked for are kept, the best
of the others fill up, and where more are, the rest is left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import SGDClassifier
from torch import Tensor

from opus_bench.corpus import Corpus
from opus_bench.sampling import check_size
from opus_bench.selector import Selection, Stateless, TrainState
from opus_bench.stream import CandidateStream

FORMAT = 1  # of the cached scores; raise it when the classifier changes


def classifier_scores(
    corpus: Corpus, length: int, negatives: int = 4000
) -> tuple[np.ndarray, float]:
    """Log-odds of being target text for every pool sequence, float32, by its id; and the seconds.

    Scored once per corpus and length and cached beside the corpus, with the time that it took;
    deterministic.  Cost: decoding and hashing the whole pool.
    """
    key = json.dumps([FORMAT, corpus.train_sha256, corpus.proxy_sha256, length, negatives])
    path = corpus.directory / f"quality-{hashlib.sha256(key.encode()).hexdigest()[:12]}.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as saved:
            return saved["scores"], float(saved["seconds"])
    started = time.perf_counter()
    ids, tokens = _pool(corpus, length)
    score = target_classifier(corpus, length, negatives)
    scores = np.full(int(ids.max()) + 1, -np.inf, dtype=np.float32)
    for start in range(0, len(ids), 4096):
        part = slice(start, start + 4096)
        scores[ids[part].numpy()] = score(tokens[part])
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.savez(file, scores=scores, seconds=time.perf_counter() - started)
    os.replace(temporary, path)
    return classifier_scores(corpus, length, negatives)


def target_classifier(
    corpus: Corpus, length: int, negatives: int = 4000
) -> Callable[[Int[Tensor, "n t"]], np.ndarray]:
    """The classifier, trained: log-odds (n,) of being target text for any token sequences; deterministic."""
    tokenizer = corpus.tokenizer()
    vectorizer = HashingVectorizer(ngram_range=(1, 2), n_features=2**18, alternate_sign=False)

    def features(tokens: Tensor) -> csr_matrix:
        return vectorizer.transform(tokenizer.batch_decode(tokens))

    target = corpus.sequences("proxy", corpus.spec.target, length)
    ids, tokens = _pool(corpus, length)
    drawn = np.random.default_rng(0).permutation(len(ids))[:negatives].copy()
    x = features(torch.cat([target, tokens[drawn]]))
    y = np.r_[np.ones(len(target)), np.zeros(len(drawn))]
    classifier = SGDClassifier(loss="log_loss", class_weight="balanced", alpha=1e-5, random_state=0).fit(x, y)
    return lambda tokens: classifier.decision_function(features(tokens))


def _pool(corpus: Corpus, length: int) -> tuple[Int[Tensor, " n"], Int[Tensor, "n t"]]:
    """Ids and tokens of all sequences that a selector may be offered."""
    pool = list(CandidateStream(corpus, length, 1, 0).pool())
    return torch.cat([batch.ids for batch in pool]), torch.cat([batch.tokens for batch in pool])


@dataclass
class StaticQuality(Stateless):
    """Keep the share of the pool that a static score ranks highest (module docstring).

    scores: one number per pool sequence id, higher is better; -inf marks ids that do not exist.
    kept_share: share of the pool that the fixed subset holds, in (0, 1].
    scoring_s: seconds that scoring the pool took, for the record.
    """

    scores: np.ndarray
    kept_share: float = 0.5
    scoring_s: float = 0.0
    threshold: float = field(init=False)

    def __post_init__(self) -> None:
        finite = self.scores[np.isfinite(self.scores)]
        if not 0 < self.kept_share <= 1:
            raise ValueError(f"kept_share must be in (0, 1], got {self.kept_share}")
        if not len(finite) or np.isnan(self.scores).any() or finite.min() == finite.max():
            raise ValueError("static scores are missing, NaN or all equal; nothing can be ranked")
        self.threshold = float(np.quantile(finite, 1 - self.kept_share))

    def select(
        self, candidates: Any, size: int, state: TrainState, generator: torch.Generator
    ) -> Selection:
        check_size(size, len(candidates.ids))
        scores = torch.from_numpy(self.scores[candidates.ids.numpy()]).double()
        shuffled = torch.randperm(len(scores), generator=generator)
        kept = shuffled[scores[shuffled] >= self.threshold]
        others = torch.sort(scores, descending=True, stable=True).indices
        others = others[scores[others] < self.threshold]
        indices = torch.cat([kept, others])[:size]
        return Selection(indices, scores, {"utility_std": float(scores.std())})
