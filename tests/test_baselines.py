"""Each baseline against an example worked by hand."""

import numpy as np
import pytest
import torch

from baselines.perplexity import Perplexity
from baselines.quality import StaticQuality, classifier_scores
from baselines.random import Random
from opus_bench.gradients import sample_losses
from opus_bench.selector import TrainState
from opus_bench.stream import Batch, CandidateStream
from small_models import FIVE_SIGMA, tokens


def batch_of(ids):
    n = len(ids)
    return Batch(tokens(n, 6), torch.tensor(ids), ("d",) * n, torch.ones(n, dtype=torch.long))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_random_is_uniform_over_pairs(trials=4000):
    counts = torch.zeros(5, 5)
    g = generator()
    for _ in range(trials):
        i, j = Random().select(tokens(5, 3), 2, None, g).indices.tolist()
        counts[i, j] += 1
    p = 1 / 20
    off = counts[~torch.eye(5, dtype=torch.bool)] / trials
    assert counts.diagonal().sum() == 0
    assert (off - p).abs().max() < FIVE_SIGMA * (p * (1 - p) / trials) ** 0.5


@pytest.mark.parametrize("keep", ["high", "mid", "low"])
def test_perplexity_ranks_by_the_models_own_loss_over_the_window(model, keep):
    batch = tokens(7, 12)
    state = TrainState(model, [], 0)
    got = Perplexity(keep, window=8).select(batch, 3, state, generator()).indices.tolist()
    with torch.no_grad():
        losses = sample_losses(model, batch[:, :8])
    order = losses.argsort().tolist()
    middle = sorted(range(7), key=lambda n: abs(losses[n] - losses.median()))
    assert got == {"high": order[::-1][:3], "low": order[:3], "mid": middle[:3]}[keep]


def test_static_quality_keeps_a_fixed_subset_and_fills_up_with_the_best_of_the_rest():
    quality = StaticQuality(np.array([0.0, 1, 2, 3, 4, 5, 6, 7], dtype=np.float32), kept_share=0.5)
    assert quality.threshold == 3.5
    assert StaticQuality(quality.scores, kept_share=0.25).threshold == 5.25
    assert StaticQuality(quality.scores, kept_share=1.0).threshold == 0
    few = quality.select(batch_of([0, 1, 2, 6]), 2, None, generator()).indices.tolist()
    assert few == [3, 2]
    picked = {tuple(sorted(quality.select(batch_of([4, 5, 6, 7, 0]), 2, None, generator(s)).indices.tolist()))
              for s in range(60)}
    assert picked == {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)}  # not only the two best


def test_the_classifier_prefers_the_target_and_is_scored_once(corpus):
    stream = CandidateStream(corpus, 24, 4, 0)
    scores, seconds = classifier_scores(corpus, 24, negatives=500)
    domains = np.array([d for batch in stream.pool() for d in batch.domains])
    assert scores.shape == (stream.pool_size,) and np.isfinite(scores).all() and seconds > 0
    again, kept = classifier_scores(corpus, 24, negatives=500)
    assert (again == scores).all() and kept == seconds
    assert len(set(domains)) == 4


def test_the_classifier_separates_texts_that_differ(corpus, monkeypatch):
    """A pool whose target sequences hold a word that no other holds: every one of them ranks first."""
    target = corpus.spec.target

    class Words:
        def batch_decode(self, rows):
            return ["target word" if row[0] else "other text" for row in rows.tolist()]

    monkeypatch.setattr(type(corpus), "tokenizer", lambda self: Words())
    original = type(corpus).sequences
    monkeypatch.setattr(type(corpus), "sequences",
                        lambda self, *a, **k: torch.ones_like(original(self, *a, **k)))
    plain = CandidateStream.pool

    def marked(self, size=256):
        for batch in plain(self, size):
            flag = torch.tensor([d == target for d in batch.domains], dtype=torch.long)
            yield Batch(flag[:, None].expand_as(batch.tokens), batch.ids, batch.domains, batch.quality)

    monkeypatch.setattr(CandidateStream, "pool", marked)
    scores, _ = classifier_scores(corpus, 20, negatives=300)
    is_target = np.array([d == target for batch in plain(CandidateStream(corpus, 20, 4, 0)) for d in batch.domains])
    assert scores[is_target].min() > scores[~is_target].max()


def test_bad_options_are_refused_by_value():
    with pytest.raises(ValueError, match="keep must be high, mid or low, got 'top'"):
        Perplexity("top")
    with pytest.raises(ValueError, match="kept_share must be in .*got 0"):
        StaticQuality(np.arange(3.0), kept_share=0)
    with pytest.raises(ValueError, match="all equal"):
        StaticQuality(np.ones(3))
    with pytest.raises(ValueError, match="cannot select 4 of 3"):
        Random().select(tokens(3, 3), 4, None, generator())
