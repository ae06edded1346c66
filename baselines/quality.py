"""Static quality: a score given to the pool once, and the fixed subset of it that is kept.

By default a linear classifier of target text against pool text gives the score; any other scorer of
`scorers` can (`scorer_scores`).  The recipe of DCLM's fastText filter (Li et al. 2024): positives are
target documents, negatives are a random part of the pool, and a fixed subset of the pool, its share
``selection_ratio`` of highest score, is kept for the whole run.  Here the classifier is scikit-learn's SGDClassifier on
hashed word uni- and bigrams, trained at run time on the proxy split; no published weights are used.
Within a buffer the kept sequences are drawn uniformly; where fewer than asked for are kept, the best
of the others fill up, and where more are, the rest is left out.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import SGDClassifier
from torch import Tensor

from opus_bench.corpus import Corpus, CorpusError
from opus_bench.files import replacing
from opus_bench.sampling import check_size
from opus_bench.documents.scored import gumbel
from opus_bench.selector import Selection, Stateless, TrainState
from opus_bench.stream import CandidateStream

Texts = Callable[[], list[str]]
FORMAT = 1  # of the cached scores; raise it when the classifier changes


def classifier_scores(
    corpus: Corpus, length: int, negatives: int = 4000
) -> tuple[np.ndarray, float]:
    """Log-odds of being target text for every pool sequence, float32, by its id; and the seconds.

    Scored once per corpus and length and cached beside the corpus, with the time that it took;
    deterministic.  Cost: decoding and hashing the whole pool.

    Raises:
        CorpusError: for a damaged cache, naming it.
    """
    key = [FORMAT, corpus.train_sha256, corpus.proxy_sha256, length, negatives]
    return _pool_scores(corpus, length, key, lambda: target_classifier(corpus, length, negatives))


def scorer_scores(
    corpus: Corpus, length: int, identity: Sequence[object],
    scorer: Callable[[Texts, Texts], Callable[[list[str]], np.ndarray]],
) -> tuple[np.ndarray, float]:
    """Scores of the pool's sequences as texts, by any scorer, as `classifier_scores` in all else.

    identity: what tells the scorer from others, for the cache.
    scorer: makes the score function of functions that give the target's texts and the pool's.
    """

    def score() -> Callable[[Int[Tensor, "n t"]], np.ndarray]:
        decode = corpus.tokenizer().batch_decode
        score_texts = scorer(lambda: decode(corpus.sequences("proxy", corpus.spec.target, length)),
                             lambda: decode(_pool(corpus, length)[1]))
        return lambda tokens: score_texts(decode(tokens))

    key = [FORMAT, corpus.train_sha256, corpus.proxy_sha256, length, *identity]
    return _pool_scores(corpus, length, key, score)


def _pool_scores(
    corpus: Corpus, length: int, key: list[object], scorer: Callable[[], Callable[[Int[Tensor, "n t"]], np.ndarray]]
) -> tuple[np.ndarray, float]:
    path = corpus.directory / f"quality-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}.npz"
    if not path.exists():
        started = time.perf_counter()
        ids, tokens = _pool(corpus, length)
        score = scorer()
        scores = np.full(int(ids.max()) + 1, -np.inf, dtype=np.float32)
        for start in range(0, len(ids), 4096):
            part = slice(start, start + 4096)
            scores[ids[part].numpy()] = score(tokens[part])
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, scores=scores, seconds=time.perf_counter() - started)
    try:
        with np.load(path, allow_pickle=False) as saved:
            return saved["scores"], float(saved["seconds"])
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise CorpusError(f"{path} is damaged ({type(error).__name__}); delete it and run again") from error


def target_classifier(
    corpus: Corpus, length: int, negatives: int = 4000
) -> Callable[[Int[Tensor, "n t"]], np.ndarray]:
    """The classifier, trained: log-odds (n,) of being target text for any token sequences; deterministic."""
    tokenizer = corpus.tokenizer()
    target = corpus.sequences("proxy", corpus.spec.target, length)
    ids, tokens = _pool(corpus, length)
    drawn = np.random.default_rng(0).permutation(len(ids))[:negatives].copy()
    texts = tokenizer.batch_decode(torch.cat([target, tokens[drawn]]))
    classifier = TextClassifier.train(texts[: len(target)], texts[len(target) :])
    return lambda tokens: classifier.score(tokenizer.batch_decode(tokens))


class TextClassifier:
    """Log-odds of being target text: SGDClassifier on hashed word uni- and bigrams; deterministic.

    coefficients, intercept: (2^18,) and a number; see `train`, `fit` and `load`.
    """

    def __init__(self, coefficients: np.ndarray, intercept: float):
        self.coefficients, self.intercept = coefficients, intercept

    @classmethod
    def train(cls, target: Sequence[str], others: Sequence[str]) -> TextClassifier:
        """Trained to tell target texts from others, both classes of one weight."""
        if not target or not others:
            raise ValueError(f"the classifier needs texts of both kinds, got {len(target)} of the target and "
                             f"{len(others)} of the pool")
        y = np.r_[np.ones(len(target)), np.zeros(len(others))]
        trained = SGDClassifier(loss="log_loss", class_weight="balanced", alpha=1e-5, random_state=0)
        trained.fit(_features([*target, *others]), y)
        return cls(trained.coef_[0], float(trained.intercept_[0]))

    @classmethod
    def fit(cls, target: Iterable[str], pool: Iterable[str], negatives: int = 4000) -> TextClassifier:
        """Trained on all target texts and a random part of a pool that is read once and not kept in memory."""
        drawn = heapq.nlargest(negatives, ((gumbel(0, str(n)), text) for n, text in enumerate(pool)))
        return cls.train(list(target), [text for _, text in drawn])

    def score(self, texts: list[str]) -> np.ndarray:
        """(n,) float64 log-odds."""
        return _features(texts) @ self.coefficients + self.intercept

    def save(self, path: Path) -> None:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, coefficients=self.coefficients, intercept=self.intercept)

    @classmethod
    def load(cls, path: Path) -> TextClassifier:
        with np.load(path, allow_pickle=False) as saved:
            return cls(saved["coefficients"], float(saved["intercept"]))


def _features(texts: Sequence[str]) -> csr_matrix:
    return HashingVectorizer(ngram_range=(1, 2), n_features=2**18, alternate_sign=False).transform(texts)


def _pool(corpus: Corpus, length: int) -> tuple[Int[Tensor, " n"], Int[Tensor, "n t"]]:
    """Ids and tokens of all sequences that a selector may be offered."""
    pool = list(CandidateStream(corpus, length, 1, 0).pool())
    return torch.cat([batch.ids for batch in pool]), torch.cat([batch.tokens for batch in pool])


@dataclass
class StaticQuality(Stateless):
    """Keep the share of the pool that a static score ranks highest, or a sample of that size by the score.

    scores: one number per pool sequence id, higher is better; -inf marks ids that do not exist.
    kept_share: share of the pool that the fixed subset holds, in (0, 1].
    scoring_s: seconds that scoring the pool took, for the record.
    temperature: None ranks by the score; else the subset is a sample without replacement, p proportional
        to exp(score / temperature), by Gumbel noise that is a function of sample_seed and the id.
    """

    scores: np.ndarray
    kept_share: float = 0.5
    scoring_s: float = 0.0
    temperature: float | None = None
    sample_seed: int = 0
    threshold: float = field(init=False)

    def __post_init__(self) -> None:
        finite = self.scores[np.isfinite(self.scores)]
        if not 0 < self.kept_share <= 1:
            raise ValueError(f"kept_share must be in (0, 1], got {self.kept_share}")
        if not len(finite) or np.isnan(self.scores).any() or finite.min() == finite.max():
            raise ValueError("static scores are missing, NaN or all equal; nothing can be ranked")
        if self.temperature is not None:
            if not self.temperature > 0:
                raise ValueError(f"temperature must be positive, got {self.temperature}")
            noise = np.array([gumbel(self.sample_seed, str(n)) for n in range(len(self.scores))])
            self.scores = self.scores / self.temperature + noise
            finite = self.scores[np.isfinite(self.scores)]
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
