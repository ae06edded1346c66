"""Injections by their properties, the AUC by enumeration, judges against the selectors that they stand for.

Shares of random choices are compared with what a choice that does not look has, within five standard errors.
"""

import copy
import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from fake_corpus import SPEC
from sklearn.metrics import roc_auc_score
from small_models import FIVE_SIGMA, optimizers_for, tokens

from baselines.greats import Greats
from baselines.perplexity import Perplexity
from baselines.quality import classifier_scores, target_classifier
from baselines.random import Random
from opus_bench import results
from opus_bench.schema import RecordError
from opus_bench.selector import Opus, TrainState
from opus_bench.sources import QUALITY
from opus_bench.stream import CandidateStream
from opus_bench.train import RunConfig
from opus_bench.validation import noise_injection
from opus_bench.validation.noise_injection import (
    Settings,
    detection_auc,
    make_buffer,
    make_buffers,
    mean_stderr,
)
from opus_bench.validation.noise_kinds import KINDS, Material, inject
from opus_bench.validation.trained import stages
from reproduce import noise_injection as script
from reproduce.measurement import Measurement
from reproduce.noise_selectors import LABELS, Judges, by_loss, by_utility, measure
from reproduce.scales import SCALES

CONFIG = RunConfig("random", model="ci", length=32, buffer=8, proxy_size=2, adam_lr=1e-3)
SELECTORS = {"window": 16, "sketch_width": 64, "calibrated_proxy": 4}
SETTINGS = {"stages": [0, 2], "candidates": 10, "buffers": 2, "repeats": 1, "selectors": SELECTORS}
VOCABULARY, LENGTH = 1000, 48
TAGS = tuple(torch.tensor(tag) for tag in ([2000], [2001, 2002, 2003], [2004, 2005]))
MATERIAL = Material(VOCABULARY, TAGS, 3000 + torch.arange(12 * LENGTH).view(12, LENGTH), span=7, gap=4)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def text(n=6, seed=1):
    return torch.randint(VOCABULARY, (n, LENGTH), generator=generator(seed))


# The noise


@pytest.mark.parametrize("kind", KINDS)
def test_an_injection_is_a_pure_function_of_tokens_and_generator(kind):
    clean, before = text(), text()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, again, other = (inject(clean, kind, MATERIAL, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(clean, before) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == clean.shape and first.dtype == clean.dtype
    assert (first != clean).any(1).all()


def test_random_tokens_are_uniform_over_the_vocabulary(trials=400):
    small = dataclasses.replace(MATERIAL, vocab_size=5)
    found = inject(torch.zeros(trials, LENGTH, dtype=torch.long), "random tokens", small, generator())
    counts, n = torch.bincount(found.flatten()), trials * LENGTH
    assert len(counts) == 5
    assert (counts / n - 1 / 5).abs().max() < FIVE_SIGMA * math.sqrt(0.2 * 0.8 / n)


def test_shuffling_keeps_the_tokens_and_any_order_is_as_likely(trials=6000):
    clean = text()
    spoilt = inject(clean, "shuffled", MATERIAL, generator())
    assert torch.equal(spoilt.sort(1).values, clean.sort(1).values)
    short = inject(torch.tensor([[1, 2, 3]]).expand(trials, 3), "shuffled", MATERIAL, generator())
    for order in itertools.permutations((1, 2, 3)):
        share = (short == torch.tensor(order)).all(1).double().mean()
        assert abs(share - 1 / 6) < FIVE_SIGMA * math.sqrt(1 / 6 * 5 / 6 / trials)


def test_repetition_has_the_period_and_is_a_span_of_the_text():
    clean = text(40)
    spoilt = inject(clean, "repeated", MATERIAL, generator())
    assert torch.equal(spoilt[:, 7:], spoilt[:, :-7])
    places = set()
    for row, original in zip(spoilt, clean, strict=True):
        spans = original.unfold(0, 7, 1)
        places.add(int((spans == row[:7]).all(1).nonzero()[0]))
    assert len(places) > 15 and max(places) <= LENGTH - 7
    ends = inject(torch.arange(14)[None].expand(400, 14), "repeated", MATERIAL, generator())[:, 0]
    assert set(ends.tolist()) == set(range(8))  # from the first place to the last


def test_markup_is_tags_around_the_text_in_its_order():
    clean = text(30)
    spoilt = inject(clean, "markup", MATERIAL, generator())
    seen = set()
    for row, original in zip(spoilt.tolist(), clean.tolist(), strict=True):
        prose = [token for token in row if token < VOCABULARY]
        assert prose == original[: len(prose)] and len(prose) < LENGTH
        runs = [(is_text, [t for t in run]) for is_text, run in itertools.groupby(row, lambda t: t < VOCABULARY)]
        assert not runs[0][0]
        for is_text, run in runs[:-1]:
            if is_text:
                assert len(run) == 4
            else:
                assert run in [tag.tolist() for tag in TAGS]
                seen.add(tuple(run))
    assert len(seen) == 3


def test_foreign_sequences_take_the_place_each_once():
    spoilt = inject(text(12), "foreign", MATERIAL, generator())
    assert sorted(spoilt[:, 0].tolist()) == MATERIAL.foreign[:, 0].tolist()
    assert torch.equal(spoilt, MATERIAL.foreign[(spoilt[:, 0] - 3000) // LENGTH])


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_a_buffer_has_exactly_so_many_injected_and_the_others_untouched(count):
    clean = text(10)
    buffer = make_buffer(clean, 5, KINDS, MATERIAL, generator())
    for kind in KINDS:
        offered, mask = buffer.tokens[buffer.members(kind, count)], buffer.injected(count)
        assert mask.sum() == count and torch.equal(offered[~mask], clean[~mask])
        assert (offered != clean).any(1).sum() == count
        if kind == "shuffled":
            assert torch.equal(offered.sort(1).values, clean.sort(1).values)
    if count:
        assert (buffer.injected(count) & buffer.injected(count - 1)).sum() == count - 1  # nested
    places = {make_buffer(clean, 1, ["shuffled"], MATERIAL, generator(seed)).replaced for seed in range(200)}
    assert places == {(place,) for place in range(10)}


def test_buffers_are_of_clean_text_that_training_has_not_come_to(corpus):
    settings = Settings(**SETTINGS)
    buffers = make_buffers(corpus, CONFIG, settings)
    stream = CandidateStream(corpus, CONFIG.length, CONFIG.buffer, CONFIG.seed)
    batches = [stream.candidates(step) for step in range(2, 40)]
    ahead = [(domain, tuple(row)) for batch in batches
             for domain, row in zip(batch.domains, batch.tokens.tolist(), strict=True)]
    clean = [row for domain, row in ahead if QUALITY[domain] <= 2]
    foreign = {row for domain, row in ahead if domain == "foreign"}
    got = [tuple(row) for buffer in buffers for row in buffer.tokens[: buffer.size].tolist()]
    assert len(got) == 20 and got[:10] == clean[:10] and set(got[10:]) <= set(clean[10:])
    for buffer in buffers:
        at = buffer.members("foreign", 5)
        spoilt = buffer.tokens[[at[place] for place in buffer.replaced]].tolist()
        assert {tuple(row) for row in spoilt} <= foreign
    assert settings.units == 2 + 2 * 2


# The measures


def test_auc_equals_the_count_over_pairs_and_scikit_learn():
    for seed in range(30):
        g = generator(seed)
        n = int(torch.randint(4, 30, (), generator=g))
        scores = torch.randint(6, (n,), generator=g).double()  # many ties
        injected = torch.rand(n, generator=g) < 0.4
        injected[0], injected[1] = True, False
        pairs = [(1.0 if c > i else 0.5 if c == i else 0.0)
                 for c in scores[~injected].tolist() for i in scores[injected].tolist()]
        got = detection_auc(scores, injected)
        assert got == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
        assert got == pytest.approx(roc_auc_score(~injected.numpy(), scores.numpy()), abs=1e-12)
        assert detection_auc(-scores, injected) == pytest.approx(1 - got, abs=1e-12)


def test_auc_of_a_blind_score_has_the_stated_mean_and_variance(trials=4000, clean=7, noise=3):
    injected = torch.arange(clean + noise) < noise
    g = generator()
    found = torch.tensor([detection_auc(torch.rand(clean + noise, generator=g), injected) for _ in range(trials)])
    variance = (clean + noise + 1) / (12 * clean * noise)
    assert abs(found.mean() - 0.5) < FIVE_SIGMA * math.sqrt(variance / trials)
    spread = ((found - 0.5) ** 2)
    assert abs(spread.mean() - variance) < FIVE_SIGMA * spread.std() / math.sqrt(trials)


def test_a_standard_error_is_that_of_a_mean():
    assert mean_stderr([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, np.std([1, 2, 4], ddof=1) / math.sqrt(3)))
    one, other = ({"value": 1.0, "stderr": 0.3}, {"value": 2.0, "stderr": 0.4})
    pooled = script.pooled([one, other])
    assert (pooled.value, pooled.stderr) == pytest.approx((1.5, 0.25))
    assert [script.Estimate(x, 0.1).beyond(0.5) for x in (0.79, 0.81, 0.21, 0.19)] == [0, 1, 0, -1]


@pytest.mark.parametrize("scores,injected,word", [
    ([1.0, math.nan], [True, False], "nan"),
    ([1.0, 2.0], [True, True], "0 and 2"),
])
def test_what_has_no_auc_is_refused(scores, injected, word):
    with pytest.raises(ValueError, match=word):
        detection_auc(torch.tensor(scores), torch.tensor(injected))


def rows_of(corpus, judges, config=CONFIG, **settings):
    settings = Settings(**{**SETTINGS, "stages": [0], **settings})
    return noise_injection.measure(config, settings, corpus, lambda: None, judges)


def values(rows, name, **keys):
    return [row["value"] for row in rows if row["name"] == name and keys.items() <= row.items()]


def told(stage, buffer, number):
    """A selector that knows which sequences are injected, and one that wants them."""
    def judge(sign):
        def choose(members, size, generator):
            score = torch.tensor([sign if member < buffer.size else -sign for member in members])
            return torch.sort(score, descending=True, stable=True).indices[:size].tolist(), score
        return choose
    return {"knows": judge(1.0), "wants": judge(-1.0)}


def test_a_score_that_is_the_label_finds_all_noise_as_far_as_the_count_permits(corpus):
    rows = rows_of(corpus, told, shares=[0.2, 0.5, 0.7])
    for kind in KINDS:
        assert values(rows, "kept_share", selector="knows", kind=kind) == pytest.approx([0, 0, 0.4])
        assert values(rows, "kept_share", selector="wants", kind=kind) == pytest.approx([0.4, 1, 1])
        assert values(rows, "kept_excess", selector="knows", kind=kind) == pytest.approx([0.4 / 3 - 1.4 / 3])
        assert values(rows, "detection_auc", selector="knows", kind=kind) == [1]
        assert values(rows, "detection_auc", selector="wants", kind=kind) == [0]
    assert {row["stderr"] for row in rows} == {0} and len(rows) == 2 * len(KINDS) * (3 + 1 + 1)
    half = rows_of(corpus, told, config=dataclasses.replace(CONFIG, selection_ratio=0.8), shares=[0.5])
    assert values(half, "kept_share", selector="knows") == pytest.approx([3 / 8] * len(KINDS))


def test_random_keeps_what_is_offered(corpus, buffers=150):
    def judges(stage, buffer, number):
        def choose(members, size, g):
            return Random().select(buffer.tokens[members], size, None, g).indices.tolist(), None
        return {"Random": choose}

    rows = rows_of(corpus, judges, buffers=buffers, repeats=1)
    for row in rows:
        if row["name"] == "kept_share":
            s, n, size = row["offered"], 10, 5
            stderr = math.sqrt(s * (1 - s) * (n - size) / (size * (n - 1)) / buffers)
            assert abs(row["value"] - s) < FIVE_SIGMA * stderr
            # a standard deviation of n values has itself that of sd / sqrt(2 n) at most: tails no heavier than normal
            assert row["stderr"] == pytest.approx(stderr, rel=FIVE_SIGMA / math.sqrt(2 * buffers))
    assert len(rows) == len(KINDS) * 5 and not values(rows, "detection_auc")


@pytest.mark.parametrize("change,word", [
    ({"shares": [0.25]}, "share 0.25 of 10 candidates is 2.5"),
    ({"shares": [1.0]}, "share 1.0 of 10"),
    ({"shares": [0.5, 0.2]}, r"\[0.5, 0.2\]"),
    ({"kinds": ["rotten"]}, "'rotten'"),
    ({"buffers": 1}, "got 1"),
    ({"repeats": 0}, "repeats must be at least 1, got 0"),
    ({"stages": [3, 3]}, r"\[3, 3\]"),
    ({"span": 17}, "span must be 1 to 16 tokens.*got 17"),
    ({"selectors": {**SELECTORS, "window": 33}}, "got 33"),
    ({"selectors": {"window": 16}}, "'sketch_width'"),
])
def test_bad_settings_are_refused_by_value_before_training(corpus, monkeypatch, change, word):
    def never(*arguments):
        raise AssertionError("trained")

    monkeypatch.setattr(noise_injection, "stages", never)
    with pytest.raises(ValueError, match=word):
        measure(CONFIG, {**SETTINGS, **change}, corpus)


def test_foreign_text_must_be_there():
    with pytest.raises(ValueError, match="unknown kind of noise 'old'"):
        inject(text(), "old", MATERIAL, generator())
    with pytest.raises(ValueError, match="13 foreign sequences are needed, got 12"):
        inject(text(13), "foreign", MATERIAL, generator())
    spec = dataclasses.replace(SPEC, shares=(("encyclopedia", 0.5), ("recipes", 0.5)))

    class Corpus:
        domains = spec.domains

    with pytest.raises(ValueError, match="no domain 'foreign', only encyclopedia, recipes"):
        make_buffers(Corpus(), CONFIG, Settings(**SETTINGS))


# The selectors


@pytest.mark.parametrize("keep", ["high", "mid", "low"])
def test_the_choice_by_known_losses_is_that_of_perplexity(model, keep):
    everything, members = tokens(12, 10), [11, 2, 5, 3, 8, 7, 1]
    state = TrainState(model, [], 0)
    judge = by_loss(Perplexity(window=8).select(everything, 1, state, generator()).utilities, keep)
    chosen, score = judge(members, 3, generator())
    assert chosen == Perplexity(keep, window=8).select(everything[members], 3, state, generator()).indices.tolist()
    assert set(chosen) == set(score.argsort(descending=True)[:3].tolist())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("name", ["greats", "paper", "released", "calibrated", "redundant"])
def test_the_choice_by_known_utilities_is_the_selectors_own(model, kind, name):
    everything, members = tokens(14, 10), [13, 2, 5, 3, 8, 7, 1, 11]
    state = TrainState(model, optimizers_for(model, kind), 3, tokens(4, 10, seed=9))
    if name == "greats":
        make = lambda: Greats(window=8)  # noqa: E731
        utility = make().utilities(everything, state)
    else:
        changes = {"redundant": {"redundancy": 1e6, "temperature": 1e-4}, "paper": {"temperature": 1e-4}}.get(name, {})
        arm = "paper" if name == "redundant" else name
        make = lambda: Opus.arm(arm, window=8, sketch_width=64, **changes)  # noqa: E731
        utility = make().utilities(everything, 1, state)
    judge = by_utility(make(), utility, everything, state)
    for seed in range(5):
        own = make().select(everything[members], 4, state, generator(seed))
        chosen, score = judge(members, 4, generator(seed))
        assert chosen == own.indices.tolist()
        torch.testing.assert_close(score, own.utilities, rtol=1e-9, atol=1e-12 * float(score.abs().max()))


def test_the_text_classifier_gives_the_pool_its_scores(corpus):
    want, _ = classifier_scores(corpus, CONFIG.length)
    classify = target_classifier(corpus, CONFIG.length)
    pool = torch.cat([batch.tokens for batch in CandidateStream(corpus, CONFIG.length, 1, 0).pool()])
    assert np.array_equal(classify(pool).astype(np.float32), want)
    assert np.array_equal(classify(pool[5:6]).astype(np.float32), want[5:6])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_judges_leave_the_live_model_as_it_was(corpus, optimizer):
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    judges = Judges(config, SELECTORS, corpus)
    buffer = make_buffers(corpus, config, Settings(**SETTINGS))[0]
    for stage in stages(config, corpus, [2]):
        model, states = stage.model, [optimizer.state_dict() for optimizer in stage.optimizers]
        before, random_state = copy.deepcopy((model.state_dict(), states)), torch.get_rng_state()
        found = judges(stage, buffer, 0)
        for judge in found.values():
            chosen, score = judge(buffer.members("shuffled", 3), 5, generator())
            assert len(set(chosen)) == 5 and (score is None or len(score) == 10)
        assert tuple(found) == LABELS
        after = (model.state_dict(), [optimizer.state_dict() for optimizer in stage.optimizers])
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), random_state) and model.training
        assert all(p.grad is None for p in model.parameters())
        # static quality keeps what is above the threshold that the pool gives, whatever is in the buffer
        at = buffer.members("foreign", 5)
        scores = judges.classify(buffer.tokens[at])
        for pool, wanted in (([1e6, 2e6], set(np.argsort(-scores, kind="stable")[:5])), ([-2e6, -1e6], set(range(10)))):
            judges.pool_scores = np.array(pool)
            judge = judges(stage, buffer, 0)["Static quality"]
            choices = [judge(at, 5, generator(seed)) for seed in range(40)]
            assert {place for chosen, _ in choices for place in chosen} == wanted
            assert np.array_equal(choices[0][1].numpy(), scores)


# The whole


@pytest.fixture
def records(cache, corpus, monkeypatch, tmp_path):
    monkeypatch.setenv("OPUS_BENCH_CACHE", str(cache))
    monkeypatch.setitem(SCALES, "words", dataclasses.replace(SCALES["ci"], name="words", corpus=SPEC))
    for optimizer, seed in (("adamw", 0), ("adamw", 1), ("muon", 0)):
        job = Measurement("noise_injection", "reproduce.noise_selectors:measure",
                          dataclasses.replace(CONFIG, optimizer=optimizer, seed=seed),
                          {"shares": [0.1, 0.5], "kinds": list(KINDS), "span": 8, "gap": 4, **SETTINGS}, "words", 6)
        seen = []
        job.execute(tmp_path, seen.append)
        assert seen[-1] == seen[-2] == job.units  # on_step as often as announced
    return results.load(tmp_path / "runs", "noise_injection")


def test_a_page_is_made_from_its_records_and_equal_settings_give_equal_rows(records, corpus, tmp_path):
    record = next(r for r in records if r["config"]["optimizer"] == "muon")
    config = dataclasses.replace(CONFIG, optimizer="muon")
    assert json.loads(json.dumps(measure(config, record["config"]["measured"], corpus))) == record["metrics"]
    rows = record["metrics"]
    assert len(rows) == 2 * len(KINDS) * (len(LABELS) * (2 + 1) + len(LABELS) - 1)
    assert all(0 <= row["value"] <= 1 and row["stderr"] >= 0 for row in rows if row["name"] != "kept_excess")
    high, low = (values(rows, "detection_auc", selector=f"PPL ({keep})") for keep in ("high", "low"))
    assert high == pytest.approx([1 - area for area in low])

    paths = script.write(tmp_path)
    assert [path.name for path in paths] == ["noise_injection.md", "noise_injection_kept_words.svg",
                                             "noise_injection_auc_words.svg"]
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in script.write(tmp_path)] == before
    page = paths[0].read_text()
    assert "](../figures/noise_injection_kept_words.svg)" in page and page.index("### AdamW") < page.index("### Muon")
    own = [r for r in records if r["config"]["optimizer"] == "adamw"]
    cells = [[row for row in r["metrics"] if row["name"] == "kept_share" and row["selector"] == "GREATS"
              and row["kind"] == "markup" and row["offered"] == 0.5 and row["step"] == 2] for r in own]
    a, b = (row for row, in cells)
    expected = f"{50 * (a['value'] + b['value']):.1f} ± {50 * math.hypot(a['stderr'], b['stderr']):.1f}"
    line = next(line for line in page.splitlines() if line.startswith("| markup | 50 % |"))
    assert line.split(" | ")[2 + LABELS.index("GREATS")].startswith(expected)
    with pytest.raises(RecordError, match="python -m reproduce.noise_injection"):
        script.write(tmp_path / "empty")


def test_sentences_name_the_kinds_by_side():
    rows = [{"name": "kept_excess", "step": 5, "selector": selector, "kind": kind, "offered": 0.3, "value": value,
             "stderr": 0.01} for selector in LABELS
            for kind, value in (("shuffled", 0.05), ("markup", -0.2), ("foreign", -0.0001))]
    rows += [{**row, "name": "detection_auc", "value": value} for row, value in
             zip(rows[3:6], (0.4, 0.9, 0.9), strict=True)]
    record = {"metrics": rows, "config": {"measured": {"kinds": ["shuffled", "markup", "foreign"]}}}
    lines = script.sentences([record], 5).splitlines()
    assert lines[0] == ("- Random: more than offered: shuffled (+5.0); less than offered: markup (-20.0); "
                        "not told apart from what is offered: foreign (+0.0).")
    assert len(lines) == len(LABELS) and not any("seen" in line for line in lines[2:])
    assert lines[1] == lines[0].replace("Random", "PPL (high)").removesuffix(".") + (
        "; seen by its score, but not kept out: foreign (AUC 0.90).")


@pytest.mark.parametrize("scale", ["ci", "smoke"])
def test_the_grid_has_both_optimizers_and_settings_that_hold(scale):
    class Options:
        optimizers = seeds = None

    Options.scale = scale
    jobs = script.runs(Options)
    assert {job.config.optimizer for job in jobs} == {"adamw", "muon"}
    assert len({job.run_id for job in jobs}) == len(jobs) == 2 * script.SEEDS[scale]
    for job in jobs:
        settings = Settings(**json.loads(json.dumps(job.settings)))
        assert job.units == settings.units and settings.counts[0] >= 1
        assert job.config.model == SCALES[scale].run["model"]
        assert job.settings["selectors"]["window"] == SCALES[scale].window
