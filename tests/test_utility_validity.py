"""Predicted and true changes of the loss: predictors against dense algebra, steps against real optimizers.

Exact identities in float64 at round-off; limits by the order at which their error vanishes as the step is
halved; standard errors against simulated samples, within five standard errors of their variance.
"""

import copy
import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from fake_corpus import SPEC
from scipy.stats import linregress
from small_models import FIVE_SIGMA, optimizers_for, tokens

from opus_bench.gradients import curvature, exact_per_sample_grads, layer_names, mean_gradient
from opus_bench.optimizer_map import step_map
from opus_bench.stream import CandidateStream
from opus_bench.train import RunConfig, update
from opus_bench.validation import utility_validity as validity
from opus_bench.validation.agreement import agreement, correlation, difference_stderr
from opus_bench.validation.trained import stages
from opus_bench.validation.utility_validity import PREDICTORS, Settings, at, decreases, measure, problem
from reproduce import utility_validity as script
from reproduce.measurement import Measurement
from reproduce.scales import SCALES

KINDS = ("sgd", "adamw", "muon")
NO_CLIP = 1e9
CONFIG = RunConfig("random", model="ci", length=32, buffer=4, adam_lr=1e-2, muon_lr=1e-2)
SMALL = {"stages": [2, 3], "set_sizes": [1, 2], "factors": [0.1, 1.0], "sets": 4, "length": 16, "proxy_size": 3,
         "held_out": 2}


def dot(x, y):
    return sum(float((x[k] * y[k]).sum()) for k in x)


def a_problem(model, kind):
    optimizers = optimizers_for(model, kind)
    sets = [tokens(4, 10, seed) for seed in (1, 2)]
    return problem(model, optimizers, sets, (tokens(3, 10, 7), tokens(2, 10, 8))), sets


def step_of(state, batch):
    gradient = mean_gradient(state.model, batch, layer_names(state.model, "all"))[0]
    return gradient, step_map(state.optimizers, state.parameters, gradient)


def scaled(model, optimizers, s):
    """Copies with every learning rate multiplied by s."""
    model, optimizers = copy.deepcopy((model, list(optimizers)))
    for group in (g for optimizer in optimizers for g in optimizer.param_groups):
        group["lr"] *= s
    return model, optimizers


@pytest.fixture
def no_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)


@pytest.mark.parametrize("clip", [NO_CLIP, 0.05])
@pytest.mark.parametrize("s", [1.0, 0.02])
@pytest.mark.parametrize("kind", KINDS)
def test_true_decreases_are_those_of_the_real_optimizers(model, no_bfloat16, kind, s, clip):
    """The step of step_map times s against training's own step at s times the rates, in float64."""
    state, sets = a_problem(model, kind)
    got = validity.measure_set(state, sets[0], [0.5, s], clip)
    want = validity.real_decrease(model, state.optimizers, sets[0], s, clip, state.batches)
    assert got.clipped == (clip < 1)
    # a loss of order 1 is rounded to 1e-16, its gradient on the way to the step by a few more; 1e-12 of both
    torch.testing.assert_close(got.true[1], want, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(got.true[0], want, rtol=1e-3)


def test_torchs_bfloat16_step_of_muon_agrees_within_bfloat16(model):
    """One rounding a Newton-Schulz step, of five; and the loss moves by no more than its gradient along that."""
    state, sets = a_problem(model, "muon")
    _, step = step_of(state, sets[0])
    stepped, optimizers = copy.deepcopy((model, list(state.optimizers)))
    update(stepped, optimizers, sets[0], NO_CLIP)
    before, after = dict(model.named_parameters()), dict(stepped.named_parameters())
    error = {k: (before[k] - after[k]).detach() - step[k] for k in state.blocks}
    relative = math.sqrt(dot(error, error) / dot({k: step[k] for k in error}, step))
    assert 1e-3 < relative < 5 * torch.finfo(torch.bfloat16).eps
    true = decreases(model, step, [1.0], state.batches, state.before)[0]
    real = validity.real_decrease(model, state.optimizers, sets[0], 1.0, NO_CLIP, state.batches)
    slope = mean_gradient(stepped, state.batches[0], layer_names(model, "all"))[0]
    # to first order |difference| <= |slope| |error|; twice that leaves room for the second
    assert 0 < abs(float(true[0] - real[0])) < 2 * math.sqrt(dot(slope, slope) * dot(error, error))


@pytest.mark.parametrize("kind", KINDS)
def test_first_order_is_the_limit_and_second_order_errs_by_the_third(model, kind):
    """true(s) - s <Phi, g> is O(s^2): halving s quarters it; less s^2 d^T H d / 2 it is O(s^3): an eighth."""
    state, sets = a_problem(model, kind)
    gradient, step = step_of(state, sets[0])
    second = curvature(model, state.batches[0], step) * dot(step, step)
    said = validity.predictions(state, sets[0], gradient, step, second)
    size = 0.05 / math.sqrt(dot(step, step))  # |s Phi| is .05, whatever the rate
    points = [size, size / 2, size / 4]
    true = decreases(model, step, points, state.batches, state.before)[:, 0].tolist()
    for name, order in (("real step, order 1", 2), ("real step, order 2", 3)):
        errors = [t - at(said[name], s) for t, s in zip(true, points)]
        # the next order is |s Phi| smaller, up to a ratio of derivatives: a quarter is ample where it is .05
        for coarse, fine in pairwise(errors):
            assert coarse / fine == pytest.approx(2**order, rel=0.25)


def test_all_first_order_terms_of_sgd_are_the_exact_limit(model):
    """With P_t = 1, eta <g_S, g> is the whole first order; the paper's P_t of SGD leaves eta to the utility."""
    state, sets = a_problem(model, "sgd")
    gradient, step = step_of(state, sets[1])
    said = validity.predictions(state, sets[1], gradient, step, 0.0)
    exact = 0.01 * dot(gradient, state.proxy_gradient)
    for name in ("no P_t", "adjoint", "real step, order 1"):
        assert at(said[name], 1.0) == pytest.approx(exact, rel=1e-12)
    assert at(said["alignment"], 1.0) == pytest.approx(exact / 0.01, rel=1e-12)
    s = 1e-4
    limit = decreases(model, step, [s, s / 2], state.batches, state.before)[:, 0] / torch.tensor([s, s / 2])
    extrapolated = float(2 * limit[1] - limit[0])  # the linear error cancels; what is left is s^2 and rounding
    assert extrapolated == pytest.approx(exact, rel=1e-6, abs=10 * 2.2e-16 * float(state.before[0]) / s)


@pytest.mark.parametrize("kind", KINDS)
def test_second_difference_is_the_hessian_along_the_step(model, monkeypatch, kind):
    """D(e) errs by c e^2: by a third of D(2e) - D(e), twice that allowed, and by rounding of three losses."""
    state, sets = a_problem(model, kind)
    _, step = step_of(state, sets[0])
    exact = curvature(model, state.batches[0], step)
    found = []
    for difference in (2 * validity.DIFFERENCE, validity.DIFFERENCE):
        monkeypatch.setattr(validity, "DIFFERENCE", difference)
        found.append(validity.measure_set(state, sets[0], [1.0], NO_CLIP).curvature)
    length = validity.DIFFERENCE * math.sqrt(sum(float(p.detach().square().sum()) for p in model.parameters()))
    rounding = 40 * 2.2e-16 * float(state.before[0]) / length**2
    assert abs(found[1] - exact) < 2 / 3 * abs(found[0] - found[1]) + rounding
    assert rounding < 1e-2 * abs(exact)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_predictors_match_dense_algebra(model, kind, size):
    """Per-sample gradients by torch.func, dense updates, double loops over pairs; J by differences of Phi."""
    state, sets = a_problem(model, kind)
    batch = sets[0][:size]
    names, blocks = layer_names(model, "all"), state.blocks
    assert blocks == {k for k in state.parameters if "blocks" in k} and set(state.parameters) - blocks
    grads = exact_per_sample_grads(model, batch, names)
    p, g = state.preconditioners, state.proxy_gradient
    u = [{k: p[k](grads[k][z]) for k in grads} for z in range(size)]
    eta = {k: p[k].learning_rate for k in grads}
    s = 0.3

    def align(keys, power=0):
        return sum(eta[k] ** power * float((one[k] * g[k]).sum()) for one in u for k in keys)

    def pairs(keys, power=0):
        return sum(eta[k] ** power * float((u[z][k] * u[y][k]).sum())
                   for y in range(size) for z in range(y) for k in keys)

    mean = {k: x.mean(0) for k, x in grads.items()}
    everything = exact_per_sample_grads(model, torch.cat(sets), names)
    centre = {k: x.mean(0) for k, x in everything.items()}
    e = 1e-5
    ahead, behind = (step_map(state.optimizers, state.parameters, {k: centre[k] + sign * e * mean[k] for k in mean})
                     for sign in (1, -1))
    h = curvature(model, state.batches[0], {k: p[k](centre[k]) for k in centre})
    phi = step_map(state.optimizers, state.parameters, mean)
    want = {
        "alignment": s * align(grads) / size,
        "alignment, blocks": s * align(blocks) / size,
        "no P_t": s * sum(eta[k] * float((mean[k] * g[k]).sum()) for k in mean),
        "paper's U": s**2 * align(blocks, 1) - s**4 * pairs(blocks, 2),
        "paper's U, all": s**2 * align(grads, 1) - s**4 * pairs(grads, 2),
        "H = I": s * align(grads) / size - s**2 * pairs(grads) / size**2,
        "measured h": s * align(grads) / size - s**2 * max(0.0, h) * pairs(grads) / size**2,
        "real step, order 1": s * dot(phi, g),
        "real step, order 2": s * dot(phi, g) - s**2 * 0.7 / 2,
    }
    said = validity.predictions(state, batch, mean, phi, 0.7)
    assert set(said) == set(PREDICTORS) == {*want, "adjoint"}
    for name, value in want.items():
        assert at(said[name], s) == pytest.approx(value, rel=1e-10, abs=1e-14), name
    derivative = sum(float(((ahead[k] - behind[k]) * g[k]).sum()) for k in g) / (2 * e)
    assert at(said["adjoint"], s) == pytest.approx(s * derivative, rel=1e-4)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_prediction_at_s_is_the_prediction_at_s_times_the_rates(model, kind):
    """The polynomial in s against everything done again with the rates of the groups multiplied by s."""
    state, sets = a_problem(model, kind)
    whole, part = state, problem(*scaled(model, state.optimizers, 0.3), sets, state.batches)
    values = []
    for one, s in ((whole, 0.3), (part, 1.0)):
        gradient, step = step_of(one, sets[1])
        second = curvature(one.model, one.batches[0], step) * dot(step, step)
        values.append({k: at(v, s) for k, v in validity.predictions(one, sets[1], gradient, step, second).items()})
    for name in PREDICTORS:
        assert values[0][name] == pytest.approx(values[1][name], rel=1e-9), name


def test_agreement_is_that_of_scipy():
    x, y = torch.randn(2, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = y + x
    want, got = linregress(x.numpy(), y.numpy()), agreement(x, y)
    assert (got.pearson, got.slope, got.slope_stderr) == pytest.approx((want.rvalue, want.slope, want.stderr))
    ranks = [v.argsort().argsort().double() for v in (x, y)]
    assert got.spearman == pytest.approx(correlation(*ranks))


def rows_correlation(x, y):
    """Pearson's of each row of x with the same of y."""
    x, y = (v - v.mean(1, keepdim=True) for v in (x, y))
    return (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))


def test_standard_errors_have_the_stated_size(n=24, trials=20_000, some=300):
    """Spread of z, of Spearman's z and of the difference of two predictors' z over samples of normal triples.

    A variance of ``trials`` draws has relative standard error sqrt(2 / trials).  The stated ones are large-sample:
    at n = 24 they miss the variance by terms of order 1 / n, allowed on top.
    """
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(trials, n, dtype=torch.float64, generator=generator)
    common, own = torch.randn(2, trials, n, dtype=torch.float64, generator=generator)
    first, second = truth + common, truth + 0.8 * common + 0.6 * own
    r, between, allowed = 1 / math.sqrt(2), (1 + 0.8) / 2, FIVE_SIGMA * math.sqrt(2 / trials) + 1 / n
    z = rows_correlation(first, truth).atanh()
    assert z.var() * (n - 3) == pytest.approx(1, rel=allowed)
    difference = z - rows_correlation(second, truth).atanh()
    assert difference.var() == pytest.approx(difference_stderr(r, r, between, n) ** 2, rel=allowed)
    ranks = [x.argsort(1).argsort(1).double() for x in (first, truth)]
    found = [agreement(a, t) for a, t in zip(first[:some], truth[:some])]
    assert all(a.pearson_stderr * math.sqrt(n - 3) == pytest.approx(1 - a.pearson**2) for a in found)
    stated = sum((a.spearman_stderr / (1 - a.spearman**2)) ** 2 for a in found) / some
    # Bonett and Wright's variance of a rank correlation is on the safe side at this n, Fisher's would not be
    margin = 1 + FIVE_SIGMA * math.sqrt(2 / trials)
    assert margin / (n - 3) < rows_correlation(*ranks).atanh().var() < stated / margin
    assert difference_stderr(0.5, 0.5, 1.0, n) == 0 == difference_stderr(1.0, 1.0, 0.9, n)


@pytest.mark.parametrize("bad", [[1.0] * 5, [1.0, 2.0, math.nan, 3.0, 4.0]])
def test_nothing_correlates_with_a_constant(bad):
    good, bad = torch.arange(5.0), torch.tensor(bad)
    for arguments, name in (((bad, good), "predicted"), ((good, bad), "true")):
        with pytest.raises(ValueError, match=f"{name} values must be finite and differ"):
            agreement(*arguments)
    with pytest.raises(ValueError, match="at least 4 pairs, got 3"):
        agreement(good[:3], good[:3])


@pytest.mark.parametrize("change,words", [
    ({"stages": [0, 3]}, r"\[0, 3\]"), ({"stages": []}, r"\[\]"), ({"set_sizes": [2, 1]}, r"set_sizes .* \[2, 1\]"),
    ({"factors": [0.0, 1.0]}, r"factors .* \[0.0, 1.0\]"), ({"sets": 3}, "sets .* 3"), ({"length": 1}, "length .* 1"),
])
def test_bad_settings_are_refused_by_name(corpus, change, words):
    with pytest.raises(ValueError, match=words):
        measure(CONFIG, {**SMALL, **change}, corpus, lambda: pytest.fail("something was trained"))


def settings_of(optimizers):
    return copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for o in optimizers for g in o.param_groups])


def watched(*arguments):
    """The stages of a training, each compared bit for bit with itself after whoever looked at it is done."""
    for stage in stages(*arguments):
        before, rng = [x.clone() for x in everything(stage)], torch.get_rng_state()
        groups = settings_of(stage.optimizers)
        yield stage
        assert all(torch.equal(x, y) for x, y in zip(before, everything(stage), strict=True))
        assert groups == settings_of(stage.optimizers) and torch.equal(rng, torch.get_rng_state())
        assert stage.model.training and all(p.grad is None for p in stage.model.parameters())


def watched_measure(config, corpus):
    """Rows, how often on_step was called, and the candidates of each stage."""
    calls, sets = [], []

    def noted(model, optimizers, candidates, batches):
        sets.append(torch.cat(list(candidates)))
        return problem(model, optimizers, candidates, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validity, "stages", watched)
        patch.setattr(validity, "problem", noted)
        return measure(config, SMALL, corpus, lambda: calls.append(1)), len(calls), sets


@pytest.fixture(scope="module")
def measured(corpus):
    return {name: watched_measure(dataclasses.replace(CONFIG, optimizer=name), corpus) for name in ("adamw", "muon")}


def everything(stage):
    """All that training goes on from: parameters and the optimizers' state."""
    state = [x for o in stage.optimizers for one in o.state.values() for x in one.values() if torch.is_tensor(x)]
    return [p.detach() for p in stage.model.parameters()] + state


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rows_cover_the_grid_and_live_training_is_untouched(measured, optimizer):
    rows, calls, _ = measured[optimizer]  # `watched` compares the live state bit for bit
    assert calls == Settings(**SMALL).units == 3 + 2 * 4
    keys = [tuple(r[k] for k in ("step", "set_size", "factor", "target", "predictor")) for r in rows
            if r["name"] == "pearson"]
    want = {(step, k, s, target, name) for step in (2, 3) for k in (1, 2) for s in (0.1, 1.0)
            for target in ("proxy", "held-out") for name in PREDICTORS}
    assert len(keys) == len(want) and set(keys) == want
    for row in rows:
        if row["name"] == "pearson" and row["set_size"] == 1 and row["predictor"] in ("H = I", "measured h"):
            twin = next(r for r in rows if r["name"] == "pearson" and r["predictor"] == "alignment"
                        and all(r[k] == row[k] for k in ("step", "set_size", "factor", "target")))
            assert row["value"] == pytest.approx(twin["value"], rel=1e-9)  # a single sample has no pairs
    near = [r["value"] for r in rows if r["name"] == "pearson" and r["predictor"] == "real step, order 2"
            and r["factor"] == 0.1 and r["target"] == "proxy"]
    assert min(near) > 0.99
    assert {r["along"] for r in rows if r["name"] == "curvature"} == {"mean update", "real step"}


def test_decreases_of_the_rows_are_those_of_training_itself(measured):
    """float32 for AdamW: correlated to its rounding; Muon's bfloat16 shows."""
    own = {k: [r for r in rows if r["name"] == "as trained" and r["factor"] == 1.0 and r["target"] == "proxy"]
           for k, (rows, _, _) in measured.items()}
    assert all(r["value"] > 0.9999 and r["error"] < 1e-2 for r in own["adamw"])
    assert all(r["error"] > 1e-3 for r in own["muon"])


def test_equal_settings_give_equal_rows(corpus, measured):
    short = {**SMALL, "stages": [2]}  # the first stage of the longer training, with candidates further on
    first, again, other = (measure(dataclasses.replace(CONFIG, seed=seed), short, corpus) for seed in (0, 0, 1))
    assert first == again and [r["value"] for r in first] != [r["value"] for r in other]
    assert len(first) * 2 == len(measured["adamw"][0])


def test_candidates_come_behind_those_of_training(corpus, measured):
    """The stream's positions do not depend on the buffer: 3 steps of 4 are within the first 2 buffers of 8."""
    first, last = measured["adamw"][2]
    assert torch.equal(first, last)
    stream = CandidateStream(corpus, 16, 2, 0)  # positions 16 to 23
    assert torch.equal(first, torch.cat([stream.candidates(i).tokens for i in range(8, 12)]))


def test_the_page_is_a_function_of_the_records(cache, measured, monkeypatch, tmp_path):
    monkeypatch.setattr(validity, "measure", lambda config, *_: measured[config.optimizer][0])
    monkeypatch.setenv("OPUS_BENCH_CACHE", str(cache))
    monkeypatch.setitem(SCALES, "ci", dataclasses.replace(SCALES["ci"], corpus=SPEC))
    for optimizer in ("muon", "adamw"):
        job = Measurement("utility_validity", "opus_bench.validation.utility_validity:measure",
                          dataclasses.replace(CONFIG, optimizer=optimizer), SMALL, "ci", Settings(**SMALL).units)
        record = job.execute(tmp_path)
    paths = script.write(tmp_path)
    contents = [path.read_bytes() for path in paths]
    assert [p.name for p in paths] == ["utility_validity.md", "utility_validity_factor_ci.svg",
                                       "utility_validity_set_size_ci.svg"]
    text = contents[0].decode()
    row = next(r for r in record["metrics"] if r["name"] == "pearson" and r["step"] == 3 and r["set_size"] == 2
               and r["factor"] == 1.0 and r["target"] == "held-out" and r["predictor"] == "adjoint")
    assert f"{row['value']:.3f} ± {row['pearson_stderr']:.3f}" in text and f"/ {row['spearman']:.2f} |" in text
    assert all(f"- {name}: " in text for name in PREDICTORS) and "ci scale exercises the code" in text
    assert script.write(tmp_path) == paths and [path.read_bytes() for path in paths] == contents


def test_seeds_are_pooled_by_fishers_z_and_a_copy_of_alignment_never_differs():
    base = [{"value": r, "spearman": r, "sets": 28, "with_alignment": 1.0} for r in (0.5, 0.7)]
    rows = [{"value": r, "spearman": r, "sets": 28, "with_alignment": 0.6} for r in (0.97, 0.99)]
    got = script.pooled_correlation(rows, "value", base)
    r = math.tanh((math.atanh(0.97) + math.atanh(0.99)) / 2)
    assert (got.value, got.stderr) == pytest.approx((r, (1 - r**2) * math.sqrt(2 / 25) / 2)) and got.differs
    copies = [{**b, "value": b["value"] + 1e-12, "with_alignment": 1.0} for b in base]
    assert not script.pooled_correlation(copies, "value", base).differs
    near = [{**row, "value": b["value"] + 0.05} for row, b in zip(rows, base)]
    assert not script.pooled_correlation(near, "value", base).differs


def test_the_script_measures_both_optimizers_at_every_scale():
    import argparse

    for scale in ("ci", "smoke"):
        jobs = script.runs(argparse.Namespace(scale=scale, optimizers=None, seeds=None))
        assert [job.config.optimizer for job in jobs] == ["adamw", "muon"] and len({job.run_id for job in jobs}) == 2
    assert script.SETTINGS["smoke"]["sets"] >= 24
    assert len(script.runs(argparse.Namespace(scale="ci", optimizers=["muon"], seeds=3))) == 3
