"""The comparison itself: predictions against oracles of their own, and errors that must be seen."""

import dataclasses
import json
import math
import re

import pytest
import torch
from small_models import FIVE_SIGMA, VOCABULARY, optimizers_for, tokens

from opus_bench.validation import validate as subject
from opus_bench.corpus import CorpusSpec, build_corpus
from opus_bench.gradients import exact_per_sample_grads, layer_names, parameter_names
from opus_bench.preconditioner import preconditioners
from opus_bench.train import weights_sha256
from opus_bench.utility import exact_utility
from opus_bench.validation.trained import stages
from opus_bench.validation.validate import HASH_SEED_STEP, Settings

SEEDS = [HASH_SEED_STEP * i for i in range(1, 9)]


class TinyCorpus:
    """Random tokens behind the interface of corpus.Corpus."""

    spec = CorpusSpec.ci()
    vocab_size = VOCABULARY
    domains = spec.domains

    def tokens(self, split, domain):
        return tokens(1, 48 * 128, seed=9)[0].numpy()

    def sequences(self, split, domain, length, count=None):
        return torch.from_numpy(self.tokens(split, domain)).view(-1, length)


class RandomCandidates:
    """CandidateStream over TinyCorpus."""

    def __init__(self, corpus, length, buffer, seed):
        self.shape = buffer, length

    def candidates(self, step):
        return type("Batch", (), {"tokens": tokens(*self.shape, seed=1000 + step)})


def random_candidates(monkeypatch):
    for module in ("trained", "validate"):
        monkeypatch.setattr(f"opus_bench.validation.{module}.CandidateStream", RandomCandidates)


@pytest.fixture
def problem(model):
    return subject.scoring(model, optimizers_for(model, "adamw"), tokens(12, 9), tokens(3, 9, seed=2))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_predicted_variance_is_the_stated_one_on_autograds_gradients(model, kind, monkeypatch):
    """The variance of every candidate, and of the sum of two by the same formula."""
    monkeypatch.setattr("opus_bench.ghost.CHUNK_ELEMENTS", 500)
    optimizers = optimizers_for(model, kind)
    names = layer_names(model)
    p = preconditioners(optimizers, parameter_names(model, names))
    candidates, proxy = tokens(5, 9), tokens(3, 7, seed=2)
    targets = exact_per_sample_grads(model, proxy, names)
    want = 0.0
    for k, g in exact_per_sample_grads(model, candidates, names).items():
        u, t = p[k](g).flatten(1), targets[k].mean(0).flatten()
        u = torch.cat([u, u[:1] + u[1:2]])
        stated = (u**2).sum(1) * (t @ t) + (u @ t) ** 2 - 2 * (u**2 @ t**2)
        want = want + p[k].learning_rate ** 2 * stated / 32
    want, of_sum = want[:5], want[5]
    got = subject.alignment_covariance(subject.scoring(model, optimizers, candidates, proxy), 32)
    torch.testing.assert_close(got.diagonal(), want, rtol=1e-10, atol=0)
    torch.testing.assert_close(got[:2, :2].sum(), of_sum, rtol=1e-10, atol=0)
    torch.testing.assert_close(got, got.T, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_measured_scatter_is_within_five_standard_errors_of_the_predicted(model, kind, trials=200):
    problem = subject.scoring(model, optimizers_for(model, kind), tokens(6, 9), tokens(3, 9, seed=2))
    got = subject.sketch_fidelity(problem, 32, [HASH_SEED_STEP * i for i in range(trials)])
    # between errors that are independent and errors that are the same, for six candidates
    assert math.sqrt(2 / trials / 6) <= got.variance_ratio_stderr <= math.sqrt(2 / trials)
    assert abs(got.variance_ratio - 1) < FIVE_SIGMA * got.variance_ratio_stderr
    assert math.isclose((got.scatter / got.predicted_scatter) ** 2, got.variance_ratio, rel_tol=1e-9)


def test_a_sketch_much_wider_than_its_weights_is_exact(model):
    """256 coordinates in a million buckets: 3 % of the hashes have a collision at all."""
    optimizers = optimizers_for(model, "adamw")
    problem = subject.scoring(model, optimizers, tokens(8, 9), tokens(3, 9, seed=2), "blocks.0.attention.q")
    got = subject.sketch_fidelity(problem, 1 << 20, SEEDS[:2])
    assert got.alignment_spearman == pytest.approx(1, abs=1e-12)
    assert got.alignment_spearman_lowest == pytest.approx(1, abs=1e-12)
    assert got.utility_spearman == pytest.approx(1, abs=1e-12)
    assert got.top_overlap == got.greedy_overlap == 1
    assert max(got.alignment_error, got.gram_error) < 0.01


def test_a_sketch_of_four_buckets_is_noise(problem):
    got = subject.sketch_fidelity(problem, 4, SEEDS)
    assert got.alignment_spearman_lowest < got.alignment_spearman < 0.95
    assert got.alignment_error > 0.3 and got.top_overlap < 1


def test_fidelity_by_hand(problem, monkeypatch):
    """A "sketch" that doubles everything keeps every rank and errs by exactly one norm."""
    exact = problem.exact()
    doubled = dataclasses.replace(exact, alignment=2 * exact.alignment, gram=2 * exact.gram)
    monkeypatch.setattr(subject.Scoring, "sketched", lambda *_: doubled)
    got = subject.sketch_fidelity(problem, 64, SEEDS[:2])
    assert got.alignment_error == pytest.approx(1) and got.gram_error == pytest.approx(1)
    assert got.scatter == pytest.approx(1)
    assert got.alignment_spearman == got.utility_spearman == pytest.approx(1)
    assert got.top_overlap == got.greedy_overlap == 1
    opposite = dataclasses.replace(exact, alignment=-exact.alignment, gram=-exact.gram)
    monkeypatch.setattr(subject.Scoring, "sketched", lambda *_: opposite)
    got = subject.sketch_fidelity(problem, 64, SEEDS[:2])
    assert got.alignment_spearman == got.utility_spearman == pytest.approx(-1)
    assert got.top_overlap == 0
    crowded = dataclasses.replace(exact, gram=exact.gram.clone())
    crowded.gram[:, :3] += 1e6 * torch.arange(12.0, dtype=torch.float64)[:, None]  # the later, the more redundant
    monkeypatch.setattr(subject.Scoring, "sketched", lambda *_: crowded)
    got = subject.sketch_fidelity(problem, 64, SEEDS[:2])
    order = -torch.arange(9.0, dtype=torch.float64)
    want = subject.rank_correlation(order, exact.marginal([0, 1, 2])[3:])
    assert got.alignment_spearman == pytest.approx(1) and got.utility_spearman == pytest.approx(want)
    assert want < 0.9 and got.greedy_overlap < 1 == got.top_overlap


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_oracle_agrees_in_float64_and_to_rounding_in_float32(model, kind):
    model = model.float()
    optimizers = optimizers_for(model, kind)
    before = [p.clone() for p in model.parameters()]
    exact, single = subject.oracle_errors(model, optimizers, tokens(3, 9), tokens(2, 9, seed=2))
    assert (exact.dtype, single.dtype) == ("float64", "float32") and exact.candidates == 3
    assert max(exact.alignment, exact.gram) < 1e-12
    assert 1e-12 < min(single.alignment, single.gram) and max(single.alignment, single.gram) < 1e-4
    assert all(p.dtype == torch.float32 and torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_the_oracle_sees_a_wrong_utility(model, monkeypatch):
    right = exact_utility

    def wrong(*args):
        found = right(*args)
        return dataclasses.replace(found, alignment=1.01 * found.alignment, gram=0.98 * found.gram)

    monkeypatch.setattr("opus_bench.validation.problem.exact_utility", wrong)
    for error in subject.oracle_errors(model, optimizers_for(model, "adamw"), tokens(3, 9), tokens(2, 9)):
        assert error.alignment == pytest.approx(0.01) and error.gram == pytest.approx(0.02)


def test_noise_floor_compares_what_it_says(model):
    optimizers = optimizers_for(model, "adamw")
    candidates, x, y = tokens(12, 9), tokens(3, 9, seed=2), tokens(3, 9, seed=3)
    same = subject.noise_floor(model, optimizers, candidates, [(x, x), (y, y)], [9])
    assert [f.spearman for f in same] == pytest.approx([1, 1]) and same[0].pairs == 2
    other = subject.noise_floor(model, optimizers, candidates, [(x, y), (x, x)], [4])
    alignments = [subject.scoring(model, optimizers, candidates, proxy).exact().alignment for proxy in (x, y)]
    want = subject.rank_correlation(*alignments)
    assert want < 0.99
    assert (other[0].lowest, other[0].spearman, other[0].highest) == pytest.approx((want, (want + 1) / 2, 1))
    short = subject.scoring(model, optimizers, candidates[:, :4], x[:, :4]).exact().alignment
    assert other[1].spearman == pytest.approx(subject.rank_correlation(short, alignments[0]))
    assert other[1].change == "window of 4 of 9 tokens"


def test_the_proxies_of_a_pair_share_no_sequence():
    for x, y in subject.disjoint_proxies(TinyCorpus(), 128, 8, 0, 4):
        assert len(x) == len(y) == 8
        assert not {tuple(row.tolist()) for row in x} & {tuple(row.tolist()) for row in y}


def test_every_arm_draws_from_the_same_candidates(model):
    draws = subject.arm_draws(model, optimizers_for(model, "adamw"), tokens(12, 9), tokens(3, 9), step=3, seed=0)
    by = {draw.arm: draw for draw in draws}
    assert list(by) == ["paper", "released", "calibrated"]
    assert by["calibrated"].effective_share < 0.5 < by["paper"].effective_share
    assert by["calibrated"].total_variation > by["paper"].total_variation


def pieces(spearman=0.9, floor=0.5, ratio=1.0, error=1e-16, width=8192, share=1.0):
    sketch = subject.SketchFidelity(width, 8, spearman, spearman, 1, 1, 0, 0, 1, 1, ratio, 0.05, 1, 1)
    return (
        [subject.OracleError("float64", 4, error, error)],
        [sketch],
        [subject.ArmDraw("paper", 1, 1, share, 0), subject.ArmDraw("calibrated", 1, 1, 0.25, 0.5)],
        [subject.NoiseFloor("another proxy batch", 2, floor, floor, floor)],
    )


@pytest.mark.parametrize("changes,words", [
    ({}, "equal autograd's to rounding; the sketch scatters as .* paper's width .* less than another proxy batch"),
    ({"error": 1e-3}, "factored utilities DIFFER"),
    ({"ratio": 1.3}, "does NOT scatter"),
    ({"floor": 0.95}, "more than another proxy batch does, so the sketch"),
    ({"width": 512}, "at width 512"),
    ({}, "paper draws almost uniformly; calibrated prefers some"),
    ({"share": 0.3}, "; paper and calibrated prefer some"),
])
def test_the_verdict_follows_the_numbers(changes, words):
    assert re.search(words, subject.verdict(*pieces(**changes)))


def test_the_verdict_is_about_the_width_nearest_to_the_papers():
    oracle, sketch, arms, floor = pieces(spearman=0.9)
    others = [dataclasses.replace(sketch[0], width=width, alignment_spearman=0.1) for width in (512, 32768)]
    assert "paper's width it reorders candidates less" in subject.verdict(oracle, others + sketch, arms, floor)


@pytest.mark.parametrize("change,words", [
    ({"widths": (512, 0)}, "width must be at least 1 bucket, got 0"),
    ({"widths": ()}, "at least one sketch width"),
    ({"steps": 0}, "steps must be at least 1, got 0"),
    ({"optimizer": "lion"}, "adamw or muon, got 'lion'"),
    ({"scale": "smoke"}, "tiny or ci, got 'smoke'"),
    ({"seed": -1}, "seed must be at least 0, got -1"),
    ({"candidates": 2}, "at least 4 sequences, got 2"),
    ({"hash_seeds": 1}, "hash_seeds must be at least 2, got 1"),
])
def test_settings_name_the_offending_value(change, words):
    with pytest.raises(ValueError, match=words):
        Settings(**change)


SMALL = Settings(scale="ci", steps=2, widths=(64, 512), length=16, candidates=8, proxy_size=4, hash_seeds=2,
                 oracle_candidates=2, proxy_pairs=2, windows=(8,))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_whole_is_deterministic_and_plain(optimizer, monkeypatch):
    random_candidates(monkeypatch)
    settings = dataclasses.replace(SMALL, optimizer=optimizer)
    first, second = (subject.validate(settings, TinyCorpus(), progress=False).plain() for _ in range(2))
    assert first.pop("seconds") > 0 and second.pop("seconds") > 0
    assert json.dumps(first, allow_nan=False) == json.dumps(second)
    assert [row["width"] for row in first["sketch"]] == [64, 512]
    assert first["sketch"][1]["predicted_scatter"] < first["sketch"][0]["predicted_scatter"]


def test_training_leaves_the_rate_of_the_step_to_come(monkeypatch):
    random_candidates(monkeypatch)
    calls = []
    (stage,) = stages(SMALL.run_config, TinyCorpus(), [2], lambda: calls.append(1))
    optimizers = stage.optimizers
    assert len(calls) == len(stage.losses) == 2 and stage.losses[0] > 0
    assert (stage.step, stage.tokens_seen) == (2, 2 * 4 * 16)
    assert {group["lr"] for o in optimizers for group in o.param_groups} == {SMALL.run_config.adam_lr}
    cooling = dataclasses.replace(SMALL.run_config, optimizer="muon", steps=3)
    (stage,) = stages(cooling, TinyCorpus(), [3])
    muon = stage.optimizers[0]
    assert muon.param_groups[0]["momentum"] == pytest.approx(0.85 + 0.1 * 3 / 300, abs=1e-12)
    assert all(state["step"] == 2 for o in optimizers for state in o.state.values())


def test_stages_are_those_of_one_training(monkeypatch):
    random_candidates(monkeypatch)
    seen = [(s.step, weights_sha256(s.model)) for s in stages(SMALL.run_config, TinyCorpus(), [0, 1, 3])]
    assert [step for step, _ in seen] == [0, 1, 3] and len({sha for _, sha in seen}) == 3
    (alone,) = [weights_sha256(s.model) for s in stages(SMALL.run_config, TinyCorpus(), [3])]
    assert alone == seen[-1][1]
    with pytest.raises(ValueError, match=r"\[3, 1\]"):
        next(stages(SMALL.run_config, TinyCorpus(), [3, 1]))


@pytest.mark.network
def test_on_real_text():
    found = subject.validate(dataclasses.replace(SMALL, length=64), build_corpus(CorpusSpec.ci(), progress=False))
    assert max(found.oracle[0].alignment, found.oracle[0].gram) < 1e-12
