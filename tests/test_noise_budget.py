"""Every source of the noise budget recomputed from dense gradients of torch.func in float64; its rows and its page.

Exact identities at float64 round-off.  What is compared is the scores themselves, not their ranks alone.
"""

import copy
import dataclasses
import re
from zlib import crc32

import pytest
import torch
from fake_corpus import SPEC
from scipy.stats import spearmanr
from small_models import optimizers_for, tokens

from opus_bench.gradients import exact_per_sample_grads, layer_names, mean_gradient, parameter_names
from opus_bench.optimizer_map import step_map
from opus_bench.preconditioner import preconditioners
from opus_bench.schema import RecordError
from opus_bench.sketch import count_sketch
from opus_bench.train import RunConfig, weights_sha256
from opus_bench.validation import noise_budget as subject
from opus_bench.validation.noise_budget import GROUPS, Settings, losses, measure, only
from opus_bench.validation.problem import float64_copy, scoring
from opus_bench.validation.sketch_error import candidates_after
from opus_bench.validation.trained import stages
from opus_bench.validation.validate import disjoint_proxies
from reproduce import noise_budget as script
from reproduce.measurement import Measurement
from reproduce.scales import SCALES

CONFIG = RunConfig("random", model="ci", length=32, buffer=4, adam_lr=1e-2, muon_lr=1e-2)
SMALL = {"stages": [2, 3], "staleness": [1], "replicates": 2, "candidates": 6, "proxy_size": 2, "large_proxy_size": 3,
         "windows": [2], "widths": [16]}
HASH = 5
BOTH = pytest.mark.parametrize("optimizer", ["adamw", "muon"])


class Budget:
    """One call of ``losses`` on a small model in float32, and dense gradients in float64 to recompute it from."""

    def __init__(self, model, optimizer, monkeypatch, past=None, **changes):
        model = model.float()
        optimizers = optimizers_for(model, optimizer)
        self.model, self.optimizers = float64_copy(model, optimizers)
        self.candidates, self.proxies = tokens(8, 12, 3), (tokens(3, 12, 4), tokens(3, 12, 5))
        self.p = preconditioners(self.optimizers, parameter_names(self.model, layer_names(model, "all")))
        compared, plain = [], subject.spearman_lost
        monkeypatch.setattr(subject, "spearman_lost", lambda x, y: compared.append((x, y)) or plain(x, y))
        settings = Settings(**SMALL | changes)
        self.found = {(one.source, one.score): (one, *compared[-1])
                      for one in losses(model, optimizers, self.candidates, self.proxies, settings, past or {}, HASH)}

    def dense(self, batch, shift=1):
        return exact_per_sample_grads(self.model, batch, layer_names(self.model, "all"), shift)

    def target(self, batch, shift=1):
        return {k: g.mean(0) for k, g in self.dense(batch, shift).items()}

    def alignment(self, gradients, target, p=None, names=None, weight=lambda k: 1.0):
        """sum over weights of eta <P g_n, target>, dense; the weights of the blocks if no others are named."""
        p = p or self.p
        names = names or [k for k in gradients if k.startswith("blocks")]
        return sum(weight(k) * self.p[k].learning_rate * (p[k](gradients[k]) * target[k]).sum((1, 2)) for k in names)

    def check(self, source, want, score="alignment", reference=None):
        """The scores and the loss, against the independent ones."""
        one, got, against = self.found[source, score]
        if reference is None:
            reference = self.alignment(self.dense(self.candidates), self.target(self.proxies[0][:2]))
        # a few thousand products a sum, some of which cancel: far above 1e-16, far below any real change
        scale = float(want.abs().max())
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10 * scale)
        torch.testing.assert_close(against, reference, rtol=1e-9, atol=1e-10 * float(reference.abs().max()))
        assert one.lost == pytest.approx(1 - spearmanr(want, reference).statistic, abs=1e-12)


@BOTH
def test_proxies_windows_and_labels(model, optimizer, monkeypatch):
    b = Budget(model, optimizer, monkeypatch)
    candidates, (first, second) = b.candidates, b.proxies
    whole = b.dense(candidates)
    b.check("another proxy of 2", b.alignment(whole, b.target(second[:2])))
    b.check("proxy of 3 against another", b.alignment(whole, b.target(second)),
            reference=b.alignment(whole, b.target(first)))
    b.check("window of 1/2 of the sequence", b.alignment(b.dense(candidates[:, :6]), b.target(first[:2, :6])))
    b.check("labels shifted twice", b.alignment(b.dense(candidates, 2), b.target(first[:2], 2)))


@BOTH
def test_layers(model, optimizer, monkeypatch):
    b = Budget(model, optimizer, monkeypatch)
    whole, target = b.dense(b.candidates), b.target(b.proxies[0][:2])
    parts = {"attention only": [k for k in whole if "attention" in k],
             "MLP only": [k for k in whole if ".up" in k or ".down" in k],
             "last block only": [k for k in whole if k.startswith("blocks.1.")]}
    assert [len(names) for names in parts.values()] == [8, 4, 6]
    for source, names in parts.items():
        b.check(source, b.alignment(whole, target, names=names))
    b.check("embedding and head as well", b.alignment(whole, target, names=list(whole)))
    assert len(whole) == 13
    b.check("each layer divided by sqrt(o i)",
            b.alignment(whole, target, weight=lambda k: whole[k][0].numel() ** -0.5))


@BOTH
def test_preconditioners_old_none_and_the_adjoint(model, optimizer, monkeypatch):
    earlier = copy.deepcopy(model)
    old_p = preconditioners(optimizers_for(earlier, optimizer, steps=1),
                            parameter_names(earlier, layer_names(earlier)))
    old_target = mean_gradient(earlier, tokens(2, 12, 9), layer_names(earlier))[0]
    b = Budget(model, optimizer, monkeypatch, past={7: (old_p, old_target)})
    whole, target = b.dense(b.candidates), b.target(b.proxies[0][:2])
    b.check("P_t of 7 steps ago", b.alignment(whole, target, p=old_p))
    b.check("proxy's gradient of 7 steps ago", b.alignment(whole, old_target))
    b.check("no P_t (SGD)", b.alignment(whole, target, p={k: lambda g: g for k in whole}))

    names = parameter_names(b.model, layer_names(b.model))
    batch = {k: whole[k].mean(0) for k in names}

    def slopes(e):
        """(Phi(g + e g_n) - Phi(g - e g_n)) / 2e along the proxy's gradient, times the rate as all alignments."""
        found = []
        for n in range(len(b.candidates)):
            up, down = (step_map(b.optimizers, names, {k: batch[k] + s * e * whole[k][n] for k in names})
                        for s in (1, -1))
            found.append(sum(b.p[k].learning_rate * float(((up[k] - down[k]) * target[k]).sum()) for k in names))
        return torch.tensor(found, dtype=torch.float64) / (2 * e)

    coarse, fine = slopes(2e-4), slopes(1e-4)
    got = b.found["adjoint of the real step for P_t", "alignment"][1]
    # the error of a central difference quarters: a third of the change, and rounding of Phi over e
    rounding = 1e-11 / 1e-4 * float(fine.abs().max())
    assert (got - fine).abs().max() < (coarse - fine).abs().max() + rounding
    assert (coarse - fine).abs().max() < 1e-2 * fine.abs().max()


@BOTH
def test_sketches_of_alignment_and_utility(model, optimizer, monkeypatch):
    b = Budget(model, optimizer, monkeypatch)
    whole, target = b.dense(b.candidates), b.target(b.proxies[0][:2])
    exact, sketched = torch.zeros(2, 8, dtype=torch.float64), torch.zeros(2, 8, dtype=torch.float64)
    for k in (k for k in whole if k.startswith("blocks")):
        eta, u, g = b.p[k].learning_rate, b.p[k](whole[k]).flatten(1), target[k].flatten()
        su = count_sketch(torch.cat([u, g[None]]), 16, HASH + crc32(k.encode()))
        for into, x, y in ((exact, u, g), (sketched, su[:-1], su[-1])):
            into[0] += eta * x @ y
            into[1] += eta * x @ y - eta**2 * x @ x[:2].sum(0)  # a quarter of eight is selected
    b.check("sketch of 16 buckets", sketched[0])
    b.check("sketch of 16 buckets", sketched[1, 2:], "utility", exact[1, 2:])
    assert b.found["sketch of 16 buckets", "alignment"][0].lost > 0


@BOTH
def test_arithmetic_has_the_rounding_of_its_dtype(model, optimizer, monkeypatch):
    """Relative errors between a tenth of and some thousand times the unit roundoff: sums over layers and tokens."""
    b = Budget(model, optimizer, monkeypatch)
    errors = {}
    for source in ("float32", "bfloat16 autocast", "bfloat16 weights as well"):
        _, got, want = b.found[source, "alignment"]
        errors[source] = float((got - want).norm() / want.norm())
    assert 0.1 * 2**-24 < errors["float32"] < 2**-24 * 1e3
    for source in ("bfloat16 autocast", "bfloat16 weights as well"):
        assert 0.1 * 2**-9 < errors[source] < 0.5
    assert errors["bfloat16 autocast"] != errors["bfloat16 weights as well"]
    for k, p in model.named_parameters():  # the live model, which b.model was copied from before
        assert p.dtype == torch.float32 and torch.equal(p.double(), dict(b.model.named_parameters())[k])


def test_what_changes_nothing_loses_nothing(model, monkeypatch):
    b = Budget(model, "adamw", monkeypatch, windows=[1, 2])
    assert b.found["window of 1/1 of the sequence", "alignment"][0].lost == pytest.approx(0, abs=1e-12)
    assert b.found["window of 1/2 of the sequence", "alignment"][0].lost > 0


def test_only_restricts_to_the_named_weights(model):
    problem = scoring(model, optimizers_for(model, "muon"), tokens(8, 12), tokens(3, 12, 2))
    names = list(problem.gradients)
    parts = [only(problem, chosen).exact() for chosen in (names[:5], names[5:])]
    for name in ("alignment", "gram"):
        want = getattr(problem.exact(), name)
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), want, rtol=0,
                                   atol=1e-12 * float(want.abs().max()))
    part = only(problem, names[2:3])
    assert [list(field) for field in (part.gradients, part.proxy_gradient, part.preconditioners)] == [names[2:3]] * 3


@BOTH
def test_rows_repeat_and_training_is_left_alone(corpus, optimizer, monkeypatch):
    config, calls, seen = dataclasses.replace(CONFIG, optimizer=optimizer), [], []

    def watched(*arguments):
        for stage in stages(*arguments):
            yield stage
            assert all(p.grad is None for p in stage.model.parameters()) and stage.model.training
            seen.append((stage.step, weights_sha256(stage.model),
                         sum(float(v.double().sum()) for o in stage.optimizers for s in o.state.values()
                             for v in s.values() if torch.is_tensor(v))))

    monkeypatch.setattr(subject, "stages", watched)
    settings = SMALL | {"stages": [2], "staleness": [0, 1]}
    rows = measure(config, settings, corpus, lambda: calls.append(1))
    assert rows == measure(config, settings, corpus) and len(calls) == Settings(**settings).units == 2 + 2
    assert seen[:2] == seen[2:] and [step for step, *_ in seen[:2]] == [1, 2]
    plain, = stages(config, corpus, [2])
    assert seen[1][1] == weights_sha256(plain.model)
    sources = {row["source"] for row in rows}
    assert len(rows) == 2 * (len(sources) + 1)  # the sketch is there for U, too
    assert {row["group"] for row in rows} == set(GROUPS) and {row["replicate"] for row in rows} == {0, 1}
    for row in rows:
        assert row["name"] == "spearman lost" and 0 <= row["value"] <= 2
        if " 0 steps ago" in row["source"]:
            assert row["value"] == pytest.approx(0, abs=1e-12)


@BOTH
def test_old_states_are_those_of_that_many_steps_ago(corpus, optimizer):
    """Rows of the last replicate at the last stage from two trainings of their own."""
    config = dataclasses.replace(CONFIG, optimizer=optimizer, seed=1)
    rows = {row["source"]: row["value"] for row in measure(config, SMALL, corpus)
            if (row["step"], row["replicate"], row["score"]) == (3, 1, "alignment")}
    candidates = candidates_after(config, corpus, 3, 12)[6:]
    proxy = disjoint_proxies(corpus, 32, 3, 1, 2)[1][0][:2]
    now, = stages(config, corpus, [3])
    then, = stages(config, corpus, [2])
    problem, old = (scoring(*float64_copy(s.model, s.optimizers), candidates, proxy) for s in (now, then))
    exact = problem.exact().alignment
    for source, change in (("P_t of 1 steps ago", {"preconditioners": old.preconditioners}),
                           ("proxy's gradient of 1 steps ago", {"proxy_gradient": old.proxy_gradient})):
        changed = dataclasses.replace(problem, **change).exact().alignment
        assert not torch.allclose(changed, exact, rtol=1e-3)
        assert rows[source] == pytest.approx(1 - spearmanr(changed, exact).statistic, abs=1e-12)


@pytest.mark.parametrize("change,words", [
    ({"stages": [0, 3]}, "stages must be at least 1"),
    ({"stages": []}, "got []"),
    ({"staleness": [3]}, "staleness 3 reaches behind the start of a model of 2 steps"),
    ({"staleness": [-1]}, "staleness must be at least 0, got -1"),
    ({"large_proxy_size": 2}, "large_proxy_size 2 must be larger than proxy_size 2"),
    ({"proxy_size": 0}, "proxy_size must be at least 1, got 0"),
    ({"candidates": 3}, "candidates must be at least 4, of which a quarter is selected; got 3"),
    ({"replicates": 0}, "replicates must be at least 1, got 0"),
    ({"windows": [2, 0]}, "windows must be at least 1, got 0"),
    ({"widths": [0]}, "widths must be at least 1, got 0"),
    ({"widths": []}, "at least one sketch width"),
])
def test_settings_name_the_offending_value(change, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Settings(**SMALL | change)


def test_a_stage_without_learning_rate_is_refused_before_training(corpus):
    def train():
        raise AssertionError("trained")

    with pytest.raises(ValueError, match=r"below the 3 steps .* got \[2, 3\]"):
        measure(dataclasses.replace(CONFIG, steps=3, cooldown=0.5), SMALL, corpus, train)


# The page -------------------------------------------------------------------------------------------------------


def a_record(optimizer, **lost):
    rows = [{"step": step, "name": "spearman lost", "value": value * step, "source": source.replace("_", " "),
             "group": group, "score": score, "replicate": i}
            for step in (1, 2) for source, (group, score, values) in lost.items() for i, value in enumerate(values)]
    return {"metrics": rows, "config": {"optimizer": optimizer, "measured": {
        "stages": [1, 2], "widths": [16, 8192], "proxy_size": 2}}}


def a_budget(proxy):
    return a_record("adamw", **{"sketch of 8,192 buckets": ("sketch", "alignment", [0.02, 0.03, 0.04]),
                                "sketch of 16 buckets": ("sketch", "utility", [0.2, 0.3, 0.4]),
                                "another proxy of 2": ("proxy", "alignment", proxy),
                                "float32": ("arithmetic", "alignment", [0.0, 0.0, 0.0])})


def test_sources_are_ranked_by_what_they_lose_at_the_last_stage():
    budget = {"adamw": [a_budget([0.05, 0.06, 0.07])]}
    order = ["sketch of 16 buckets, U", "another proxy of 2", "sketch of 8,192 buckets", "float32"]
    assert script.ranked(budget) == order
    interval = script.lost(budget["adamw"])[2, "another proxy of 2"]
    # t of two degrees of freedom, 4.303, times .02 / sqrt(3)
    assert (interval.mean, interval.high - interval.mean) == pytest.approx((0.12, 4.302653 * 0.02 / 3**0.5))
    text = script.budget_table(budget)
    assert [line.split(" | ")[0] for line in text.splitlines()[2:]] == [f"| {name}" for name in order]
    assert "| another proxy of 2 | proxy | 0.0600 [0.0352, 0.0848] | 0.1200 [0.0703, 0.1697] |" in text
    words = script.sentences(budget["adamw"])
    assert "A sketch of 8,192 buckets loses 0.0600; 1 of the 2 sources that are no sketch lose more." in words
    assert "Another proxy of 2 loses 0.1200, 2.0 times as much." in words
    assert "sketch 0.6000 (sketch of 16 buckets, U); proxy 0.1200 (another proxy of 2); arithmetic 0.0000" in words
    fewer = script.sentences([a_budget([0.01, 0.01, 0.01])])
    assert "; 0 of the 2 sources" in fewer


@pytest.fixture
def words(cache, monkeypatch):
    monkeypatch.setenv("OPUS_BENCH_CACHE", str(cache))
    monkeypatch.setitem(SCALES, "ci", dataclasses.replace(SCALES["ci"], corpus=SPEC))


def test_records_make_the_same_page_and_figure_twice(words, tmp_path):
    with pytest.raises(RecordError, match="no records of noise_budget; make them with"):
        script.write(tmp_path)
    for optimizer in ("muon", "adamw"):
        Measurement(script.EXPERIMENT, "opus_bench.validation.noise_budget:measure",
                    dataclasses.replace(CONFIG, optimizer=optimizer), SMALL, "ci",
                    Settings(**SMALL).units).execute(tmp_path)
    paths = script.write(tmp_path)
    assert [path.name for path in paths] == ["noise_budget.md", "noise_budget_ci.svg"]
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in script.write(tmp_path)] == before
    text, svg = (path.read_text() for path in paths)
    assert "ci scale exercises the code" in text and "(../figures/noise_budget_ci.svg)" in text
    assert text.index("AdamW, after 3 updates") < text.index("Muon, after 3 updates")
    assert "(ci scale)" in svg and all(source in svg for source in ("labels shifted twice", "sketch of 16 buckets, U"))


def test_the_grid_of_the_script_is_sound():
    assert set(script.GLOSSES) == set(script.COLOURS) == set(GROUPS)
    for scale in ("ci", "smoke"):
        options = type("Options", (), {"scale": scale, "optimizers": None, "seeds": None})
        jobs = script.runs(options)
        assert [(j.config.optimizer, j.config.seed) for j in jobs] == [
            (optimizer, seed) for optimizer in ("adamw", "muon") for seed in (0, 1)]
        for job in jobs:
            assert job.units == Settings(**job.settings).units
            subject.check_rates(job.config, job.settings["stages"])
