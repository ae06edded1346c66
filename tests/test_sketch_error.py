"""Sketch error by width and weight: sums over weights, the predicted scatter against many hashes, rows, page.

Exact identities in float64 at round-off; variances of random hashes within five standard errors.
"""

import copy
import dataclasses
import math
import re

import pytest
import torch
from fake_corpus import SPEC
from small_models import FIVE_SIGMA, optimizers_for, tokens

from opus_bench.gradients import exact_per_sample_grads, layer_names, parameter_names
from opus_bench.preconditioner import preconditioners
from opus_bench.schema import RecordError
from opus_bench.sketch import count_sketch
from opus_bench.stream import CandidateStream
from opus_bench.train import RunConfig, weights_sha256
from opus_bench.validation import sketch_error as subject
from opus_bench.validation.problem import rank_correlation, scoring
from opus_bench.validation.sketch_error import Settings, candidates_after, measure, weight_problems
from opus_bench.validation.trained import stages
from opus_bench.validation.validate import HASH_SEED_STEP, sketch_fidelity
from reproduce import sketch_error as script
from reproduce.measurement import Measurement
from reproduce.scales import SCALES

CONFIG = RunConfig("random", model="ci", length=32, buffer=4, adam_lr=1e-2, muon_lr=1e-2)
SMALL = {"stages": [1, 3], "widths": [32, 8192], "hash_seeds": 2, "candidates": 6, "proxy_size": 3}
WEIGHTS = 2 * 6  # blocks times q, k, v, out, up, down


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_problems_of_the_weights_sum_to_the_whole(model, optimizer):
    problem = scoring(model, optimizers_for(model, optimizer), tokens(6, 9), tokens(3, 9, seed=2))
    parts = weight_problems(problem)
    assert list(parts) == [name for name in dict(model.named_parameters()) if "blocks" in name]
    for whole, found in ((problem.exact(), [p.exact() for p in parts.values()]),
                         (problem.sketched(16, 7), [p.sketched(16, 7) for p in parts.values()])):
        # a dozen terms, each rounded: 1e-12 of the largest
        for name in ("alignment", "gram"):
            total, want = sum(getattr(u, name) for u in found), getattr(whole, name)
            torch.testing.assert_close(total, want, rtol=0, atol=1e-12 * float(want.abs().max()))
    assert not torch.allclose(problem.exact().alignment, problem.sketched(16, 7).alignment, rtol=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_predicted_scatter_is_that_of_many_hashes(model, optimizer, trials=400):
    """Every candidate's error squared over hash seeds, from dense updates of torch.func; one weight and all."""
    optimizers = optimizers_for(model, optimizer)
    candidates, proxy = tokens(6, 9), tokens(3, 9, seed=2)
    problem = scoring(model, optimizers, candidates, proxy)
    names = layer_names(model)
    p = preconditioners(optimizers, parameter_names(model, names))
    targets = {k: g.mean(0).flatten() for k, g in exact_per_sample_grads(model, proxy, names).items()}
    updates = {k: p[k].learning_rate * p[k](g).flatten(1)
               for k, g in exact_per_sample_grads(model, candidates, names).items()}
    weight, width = "blocks.1.up.weight", 8
    for chosen, part in (([weight], weight_problems(problem)[weight]), (list(updates), problem)):
        exact = sum(updates[k] @ targets[k] for k in chosen)
        errors = torch.zeros(trials, len(candidates), dtype=torch.float64)
        for trial in range(trials):
            for i, k in enumerate(chosen):  # hashes of their own for each weight
                both = torch.cat([updates[k], targets[k][None]])
                sketch = count_sketch(both, width, 1000 * trial + i)
                errors[trial] += sketch[:-1] @ sketch[-1]
            errors[trial] -= exact
        squares = (errors**2).sum(1) / (exact**2).sum()  # of one hash seed; independent over trials
        predicted = sketch_fidelity(part, width, [0, 1]).predicted_scatter ** 2
        assert abs(squares.mean() - predicted) < FIVE_SIGMA * squares.std() / math.sqrt(trials)
        assert squares.std() / math.sqrt(trials) < 0.15 * predicted  # else nothing could fail


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rows_are_what_they_say(corpus, optimizer):
    config = dataclasses.replace(CONFIG, optimizer=optimizer, seed=1)
    rows = measure(config, SMALL, corpus)
    assert len(rows) == 2 * 2 * (1 + WEIGHTS)
    assert [(r["step"], r["width"]) for r in rows if r["weight"] == "all"] == [(1, 32), (1, 8192), (3, 32), (3, 8192)]
    stage, = stages(config, corpus, [3])
    stream = CandidateStream(corpus, 32, 4, 1)
    candidates = torch.cat([stream.candidates(3).tokens, stream.candidates(4).tokens[:2]])
    proxy = subject.ProxyStream(corpus, 32, 3, 1).proxy(0)
    problem = scoring(stage.model, stage.optimizers, candidates, proxy)
    for weight, part in (("all", problem), ("blocks.1.up.weight", weight_problems(problem)["blocks.1.up.weight"])):
        exact = part.exact()
        sketches = [part.sketched(32, HASH_SEED_STEP * i) for i in (3, 4)]  # 1 and 2 are seed 0's
        errors = [((s.alignment - exact.alignment) ** 2).sum() for s in sketches]
        row = next(r for r in rows if (r["step"], r["width"], r["weight"]) == (3, 32, weight))
        # sums in another order: float64 rounding
        assert row["value"] == pytest.approx(float((sum(errors) / 2).sqrt() / exact.alignment.norm()), rel=1e-12)
        spearman = [rank_correlation(s.alignment, exact.alignment) for s in sketches]
        assert row["alignment_spearman"] == pytest.approx(sum(spearman) / 2)
        assert row["alignment_spearman_lowest"] == pytest.approx(min(spearman))
    row = next(r for r in rows if r["weight"] == "all")
    assert row["elements"] == sum(p.numel() for k, p in stage.model.named_parameters() if "blocks" in k)
    sizes = {k: p.numel() for k, p in stage.model.named_parameters()}
    assert all(r["elements"] == sizes[r["weight"]] for r in rows if r["weight"] != "all")
    assert all(r["hash_seeds"] == 2 and (r["name"], r["unit"]) == ("scatter", "1") for r in rows)


def test_candidates_are_those_that_training_has_not_come_to(corpus):
    stream = CandidateStream(corpus, 32, 4, 0)
    want = torch.cat([stream.candidates(step).tokens for step in (2, 3, 4)])[:9]
    assert torch.equal(candidates_after(CONFIG, corpus, 2, 9), want)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_equal_settings_give_equal_rows_and_leave_the_training_alone(corpus, optimizer, monkeypatch):
    config, seen, calls = dataclasses.replace(CONFIG, optimizer=optimizer), [], []

    def watched(*arguments):
        for stage in stages(*arguments):
            yield stage
            seen.append(stage)
            if stage.step == 3:
                assert all(p.grad is None for p in stage.model.parameters()) and stage.model.training
                last.append((weights_sha256(stage.model), copy.deepcopy([o.state_dict() for o in stage.optimizers])))

    last = []
    monkeypatch.setattr(subject, "stages", watched)
    first = measure(config, SMALL, corpus, lambda: calls.append(1))
    assert first == measure(config, SMALL, corpus) and len(calls) == Settings(**SMALL).units == 3 + 2 * 2
    plain, = stages(config, corpus, [3])
    assert last[0][0] == last[1][0] == weights_sha256(plain.model)
    for got, want in zip(last[0][1], plain.optimizers, strict=True):
        for key, state in want.state_dict()["state"].items():
            assert all(torch.equal(torch.as_tensor(got["state"][key][k]), torch.as_tensor(v))
                       for k, v in state.items())


@pytest.mark.parametrize("change,words", [
    ({"widths": []}, "widths must be sketch widths of at least 1 bucket, got []"),
    ({"widths": [8, 0]}, "at least 1 bucket, got [8, 0]"),
    ({"hash_seeds": 1}, "hash_seeds must be at least 2, or there is no scatter; got 1"),
    ({"candidates": 3}, "candidates must be at least 4, of which a quarter is selected; got 3"),
    ({"stages": [0, 2]}, "stages must be at least 1"),
    ({"stages": []}, "got []"),
])
def test_settings_name_the_offending_value(change, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Settings(**SMALL | change)


def test_a_stage_without_learning_rate_is_refused_before_training(corpus):
    def train():
        raise AssertionError("trained")

    ending = dataclasses.replace(CONFIG, steps=3, cooldown=0.5)
    with pytest.raises(ValueError, match=r"below the 3 steps .* got \[1, 3\]"):
        measure(ending, SMALL, corpus, train)
    subject.check_rates(dataclasses.replace(ending, cooldown=0.0), [3])
    subject.check_rates(ending, [2])


# The page -------------------------------------------------------------------------------------------------------


def synthetic(ratio=1.0, spearman=0.5, stderr=0.1):
    """Rows of one weight and of all, at two widths."""
    return [{"step": 8, "tokens_seen": 8, "split": "validation", "name": "scatter", "unit": "1", "value": 0.2,
             "weight": weight, "elements": elements, "width": width, "hash_seeds": 2, "predicted_scatter": 0.1,
             "variance_ratio": ratio, "variance_ratio_stderr": stderr, "gram_error": 0.3,
             "alignment_spearman": spearman, "alignment_spearman_lowest": spearman - 0.1,
             "utility_spearman": spearman, "utility_spearman_lowest": spearman - 0.2}
            for width in (32, 8192)
            for weight, elements in (("all", 26000), ("blocks.0.attention.q.weight", 10000),
                                     ("blocks.0.up.weight", 16000))]


def record(rows):
    return {"metrics": rows, "config": {"measured": {"stages": [8], "widths": [32, 8192], "hash_seeds": 2}}}


def test_the_page_counts_what_contradicts_the_stated_variance():
    for ratio, beyond in ((1.3, [0, 0]), (1.4, [0, 2]), (1.6, [2, 2])):
        # 0.1 for all together; the mean of two weights has 0.071: 0.4 is 5.7 standard errors
        text = script.sentences([record(synthetic(ratio))])
        assert re.findall(r"over 2 stages and widths; (\d) are more than five", text) == [str(n) for n in beyond]
        assert f"the furthest is {ratio:.2f} ± 0.10" in text and f"the furthest is {ratio:.2f} ± 0.07" in text


def test_tables_say_elements_per_bucket_and_pick_the_widths_that_stand_for_the_papers():
    found = script.cells([record(synthetic())])
    assert script.per_bucket(found, 8192) == "1.22 to 1.95"
    text = script.weight_table([record(synthetic())])
    assert ("| 8,192 | attention.q | 10,000 | 1.221 | 20.00 | 10.00 | 1.00 ± 0.10 | 0.5000 (0.4000) | 0.5000 (0.3000)"
            in text)
    assert "| 32 | up | 16,000 | 500 |" in text  # 312 elements per bucket of GPT-2 XL: 10,000 / 32
    assert script.XL == 1600 * 1600 / 8192
    pooled = script.ratio(synthetic(ratio=1.0)[:1] + synthetic(ratio=2.0)[:1])
    assert pooled == pytest.approx((1.5, 0.1 / math.sqrt(2)))


@pytest.fixture
def words(cache, monkeypatch):
    monkeypatch.setenv("OPUS_BENCH_CACHE", str(cache))
    monkeypatch.setitem(SCALES, "ci", dataclasses.replace(SCALES["ci"], corpus=SPEC))


def test_records_make_the_same_page_and_figures_twice(words, tmp_path):
    with pytest.raises(RecordError, match="no records of sketch_error; make them with"):
        script.write(tmp_path)
    for optimizer in ("muon", "adamw"):
        config = dataclasses.replace(CONFIG, optimizer=optimizer)
        Measurement(script.EXPERIMENT, "opus_bench.validation.sketch_error:measure", config, SMALL, "ci",
                    Settings(**SMALL).units).execute(tmp_path)
    paths = script.write(tmp_path)
    names = ["sketch_error.md", "sketch_error_width_ci.svg", "sketch_error_weight_ci.svg"]
    assert [path.name for path in paths] == names
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in script.write(tmp_path)] == before
    text = paths[0].read_text()
    assert "ci scale exercises the code" in text and text.index("### AdamW") < text.index("### Muon")
    assert "Widths of 8,192 exceed the smallest" in text and "312 to" in text
    for path in paths[1:]:
        assert f"(../figures/{path.name})" in text and "(ci scale)" in path.read_text()


def test_the_grid_of_the_script_is_sound():
    for scale in ("ci", "smoke"):
        options = type("Options", (), {"scale": scale, "optimizers": None, "seeds": None})
        jobs = script.runs(options)
        assert [(j.config.optimizer, j.config.seed) for j in jobs] == [
            (optimizer, seed) for optimizer in ("adamw", "muon") for seed in (0, 1)]
        for job in jobs:
            assert job.units == Settings(**job.settings).units
            assert len(job.settings["stages"]) <= len(script.LOOKS)
            subject.check_rates(job.config, job.settings["stages"])
            assert script.PAPER_WIDTH in job.settings["widths"]
