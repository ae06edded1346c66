"""Spectra and updates of known momenta in closed form, the derivative by finite differences and by its adjoint.

Exact identities in float64 at round-off; finite differences to the error of their order.
"""

import copy
import dataclasses
import json
import math

import pytest
import torch
from fake_corpus import SPEC
from scipy.stats import spearmanr
from small_models import tokens

from opus_bench import results
from opus_bench.gradients import exact_per_sample_grads, mean_gradient
from opus_bench.model import OpusGPT2
from opus_bench.optimizer_map import adjoint, muon_update
from opus_bench.preconditioner import Owned, preconditioners
from opus_bench.schema import RecordError
from opus_bench.train import RunConfig
from opus_bench.validation.muon_map import (
    ALL,
    MAPS,
    agreement,
    check,
    compare,
    compare_all,
    frozen_map,
    inner_products,
    measure,
    momentum_of,
    muon_matrices,
    nesterov,
    spectrum,
    units,
)
from opus_bench.validation.problem import float64_copy
from opus_bench.validation.trained import Stage, stages
from reproduce import muon_map as script
from reproduce.measurement import Measurement
from reproduce.scales import SCALES

A, B, C = 3.4445, -4.7750, 2.0315
GROUP = {"lr": 0.02, "momentum": 0.9, "nesterov": True, "ns_coefficients": (A, B, C), "ns_steps": 5, "eps": 1e-7,
         "adjust_lr_fn": None, "weight_decay": 0.0}
CONFIG = RunConfig("random", model="ci", length=32, buffer=6, proxy_size=2, optimizer="muon", adam_lr=1e-3)
SETTINGS = {"stages": [2, 3], "buffers": 2}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_singular(values, o, i, seed=0):
    """A matrix of known singular values."""
    left, right = (torch.linalg.qr(normal(n, len(values), seed=seed + k))[0] for k, n in enumerate((o, i)))
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T


# S in closed form


@pytest.mark.parametrize("o,i", [(4, 4), (4, 9), (9, 4)])
def test_the_spectrum_is_the_polynomial_of_the_singular_values(o, i):
    values = [5.0, 2.0, 1.0, 0.5]
    found = spectrum(with_singular(values, o, i), GROUP)
    sigma = torch.tensor(values, dtype=torch.float64) / math.sqrt(sum(v * v for v in values))
    eigenvalues = torch.full((o,), A, dtype=torch.float64)
    eigenvalues[:4] = A + B * sigma**2 + C * sigma**4
    want = (eigenvalues - eigenvalues.mean()).norm() / eigenvalues.norm()
    assert found.distance == pytest.approx(float(want), rel=1e-12)
    assert (found.smallest, found.largest) == pytest.approx((float(eigenvalues.min()), float(eigenvalues.max())))
    assert (found.singular[0], found.singular[-1]) == pytest.approx((float(sigma.min()), float(sigma.max())))
    assert found.singular[2] == pytest.approx(float(sigma[1] + sigma[2]) / 2)
    assert spectrum(1e-6 * with_singular(values, o, i), GROUP).distance == pytest.approx(found.distance, rel=1e-9)


def test_an_orthogonal_momentum_makes_s_a_multiple_of_the_identity():
    found = spectrum(3 * torch.linalg.qr(normal(6, 6))[0], GROUP)
    assert found.distance < 1e-14
    assert found.smallest == pytest.approx(A + B / 6 + C / 36) == found.largest


def test_a_momentum_of_rank_one_has_one_other_eigenvalue():
    o = 8
    found = spectrum(torch.outer(normal(o), normal(5, seed=1)), GROUP)
    low = A + B + C
    mean = ((o - 1) * A + low) / o
    want = math.sqrt((o - 1) * (A - mean) ** 2 + (low - mean) ** 2) / math.sqrt((o - 1) * A**2 + low**2)
    assert (found.smallest, found.largest) == pytest.approx((low, A)) and found.distance == pytest.approx(want)


def test_nothing_is_said_of_a_momentum_of_zero():
    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    for state in ({}, {"momentum_buffer": torch.zeros(3, 4)}):
        with pytest.raises(ValueError, match="momentum of blocks.0.up.weight is zero.*choose a later stage"):
            momentum_of("blocks.0.up.weight", Owned(parameter, None, GROUP, state))
    kept = momentum_of("x", Owned(parameter, None, GROUP, {"momentum_buffer": torch.ones(3, 4)}))
    assert kept.dtype == torch.float64


# The update and its derivative


@pytest.mark.parametrize("nesterov_on", [True, False])
def test_the_direction_is_what_the_polynomials_are_applied_to(nesterov_on):
    g, m, group = normal(5, 7), normal(5, 7, seed=1), GROUP | {"nesterov": nesterov_on}
    x = nesterov(g, m, group)
    share = 1 - 0.9**2 if nesterov_on else 1 - 0.9
    torch.testing.assert_close(x, share * g + (1 - share) * m, rtol=1e-12, atol=1e-12)
    unit = muon_update(g, m, {**group, "ns_steps": 0})
    torch.testing.assert_close(x / x.norm(), unit / unit.norm(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("o,i", [(4, 6), (6, 4)])
def test_products_are_those_of_the_maps_written_out(o, i, step=1e-5):
    """J by central differences of the update: their error is of the order of step^2."""
    g, m, proxy = normal(3, o, i), normal(o, i, seed=1), normal(o, i, seed=2)
    candidates, update = compare(m, GROUP, g, proxy)
    q = m / m.norm()
    s = A * torch.eye(o, dtype=q.dtype) + B * q @ q.T + C * q @ q.T @ q @ q.T
    kappa = GROUP["lr"] * max(1, o / i) ** 0.5 * (1 - 0.9**2)
    mean, x = g.mean(0), nesterov(g.mean(0), m, GROUP)
    slopes = torch.stack([(muon_update(mean + step * one, m, GROUP) - muon_update(mean - step * one, m, GROUP))
                          / (2 * step) for one in g])
    maps = {"identity": kappa * g, "frozen": kappa * s @ g, "real": slopes}
    whole = {"identity": kappa * x, "frozen": kappa * s @ x, "real": muon_update(mean, m, GROUP)}
    for a in MAPS:
        for b in MAPS[MAPS.index(a):]:
            torch.testing.assert_close(candidates[a, b], (maps[a] * maps[b]).sum((1, 2)), rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(update[a, b], (whole[a] * whole[b]).sum()[None], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(candidates[a, "proxy"], (maps[a] * proxy).sum((1, 2)), rtol=1e-6, atol=1e-9)


def test_one_polynomial_of_an_orthogonal_momentum_is_the_identity_up_to_scale():
    """And with gradients along it the direction is it, orthogonal already: the update is a multiple of it too."""
    m = torch.linalg.qr(normal(5, 5))[0]
    g = torch.stack([0.7 * m + 0.1 * normal(5, 5, seed=k) for k in (1, 2, 3, 4)])
    found = agreement(*compare(m, GROUP, g, normal(5, 5, seed=9)))
    assert found["frozen_identity_cosine"] == pytest.approx(1) and found["frozen_identity_rank"] == 1
    assert found["direction_cosine"] == pytest.approx(found["identity_direction_cosine"])
    assert found["rank"] == found["identity_rank"]
    along = agreement(*compare(m, GROUP, g - g.mean(0) + m, normal(5, 5, seed=9)))
    assert along["update_cosine"] == pytest.approx(1) and along["identity_update_cosine"] == pytest.approx(1)


def test_the_update_of_a_known_direction_has_the_cosines_of_its_singular_values():
    """Momentum and mean gradient alike, of two singular values: S x and the update share its singular vectors."""
    values = [4.0, 1.0]
    m = with_singular(values, 2, 6)
    x = torch.tensor(values, dtype=torch.float64) / math.sqrt(17)
    s = x * (A + B * x**2 + C * x**4)
    real = x.clone()
    for _ in range(5):
        real = A * real + B * real**3 + C * real**5
    noise = normal(4, 2, 6, seed=5)
    found = agreement(*compare(m, GROUP, m + noise - noise.mean(0), normal(2, 6, seed=9)))

    def cosine(a, b):
        return float(a @ b / (a.norm() * b.norm()))

    assert found["update_cosine"] == pytest.approx(cosine(s, real), rel=1e-10)
    assert found["identity_update_cosine"] == pytest.approx(cosine(x, real), rel=1e-10)
    assert found["update_cosine"] > found["identity_update_cosine"]


def test_agreement_is_cosines_and_spearman_by_name():
    under = {name: normal(5, 3, 4, seed=k) for k, name in enumerate(MAPS)}
    whole = {name: normal(1, 3, 4, seed=k + 7) for k, name in enumerate(MAPS)}
    proxy = normal(3, 4, seed=20)
    found = agreement(inner_products(under, proxy), inner_products(whole, proxy))

    def cosine(maps, a, b):
        return float(torch.cosine_similarity(maps[a].flatten(1), maps[b].flatten(1)).mean())

    def rank(a, b):
        return spearmanr(*((under[name] * proxy).sum((1, 2)) for name in (a, b))).statistic

    want = {"direction_cosine": cosine(under, "frozen", "real"),
            "identity_direction_cosine": cosine(under, "identity", "real"),
            "frozen_identity_cosine": cosine(under, "frozen", "identity"),
            "update_cosine": cosine(whole, "frozen", "real"),
            "identity_update_cosine": cosine(whole, "identity", "real"),
            "rank": rank("frozen", "real"), "identity_rank": rank("identity", "real"),
            "frozen_identity_rank": rank("frozen", "identity")}
    assert found == pytest.approx(want, abs=1e-12)


# A live model


@pytest.fixture(scope="module")
def stage(corpus):
    return next(stages(CONFIG, corpus, [3]))


def test_alignments_are_those_of_the_live_maps_and_the_whole_is_their_sum(stage):
    """P from the live optimizer on oracle gradients; J from the core's adjoint: <J g, y> = <g, J^T y>."""
    model, optimizers = float64_copy(stage.model, stage.optimizers)
    state = Stage(3, 0, model, optimizers, ())
    batch, proxy = tokens(4, 12), tokens(2, 12, seed=8)
    found = compare_all(state, batch, proxy)
    names = list(muon_matrices(state))
    layers = [name.removesuffix(".weight") for name in names]
    assert list(found) == [*names, ALL] and len(names) == sum("blocks." in k for k, _ in model.named_parameters())
    parameters = {name: dict(model.named_parameters())[name] for name in names}
    oracle, target = exact_per_sample_grads(model, batch, layers), mean_gradient(model, proxy, layers)[0]
    directions = adjoint(optimizers, parameters, {k: g.mean(0) for k, g in oracle.items()}, target)
    live = preconditioners(optimizers, parameters)
    for name in names:
        products, g = found[name][0], oracle[name]
        want = {"identity": (live[name].scale * g * target[name]).sum((1, 2)),
                "frozen": (live[name](g) * target[name]).sum((1, 2)), "real": (g * directions[name]).sum((1, 2))}
        for kind, alignment in want.items():
            torch.testing.assert_close(products[kind, "proxy"], alignment, rtol=1e-8, atol=1e-14)
    for part in (0, 1):
        for key, total in found[ALL][part].items():
            summed = torch.stack([found[name][part][key] for name in names]).sum(0)
            torch.testing.assert_close(total, summed, rtol=1e-12, atol=1e-18)
    norms = torch.stack([(oracle[name] * live[name].scale).flatten(1).norm(dim=1) ** 2 for name in names]).sum(0)
    torch.testing.assert_close(found[ALL][0]["identity", "identity"], norms, rtol=1e-8, atol=0)


def test_looking_leaves_the_model_alone(stage):
    before = copy.deepcopy((stage.model.state_dict(), [o.state_dict() for o in stage.optimizers]))
    random, training = torch.get_rng_state(), [m.training for m in stage.model.modules()]
    compare_all(stage, tokens(3, 12), tokens(2, 12, seed=8))
    for name, one in muon_matrices(stage).items():
        spectrum(momentum_of(name, one), one.group)
    assert torch.equal(random, torch.get_rng_state())
    assert training == [m.training for m in stage.model.modules()]
    assert all(p.grad is None for p in stage.model.parameters())
    assert all(torch.equal(before[0][name], value) for name, value in stage.model.state_dict().items())
    for old, optimizer in zip(before[1], stage.optimizers, strict=True):
        for parameter, state in optimizer.state_dict()["state"].items():
            assert all(torch.equal(old["state"][parameter][k], v) for k, v in state.items())


@pytest.fixture(scope="module")
def rows(corpus):
    calls = []
    found = measure(CONFIG, SETTINGS, corpus, lambda: calls.append(1))
    assert len(calls) == units(SETTINGS) == 3 + 2 * 2
    return found


def test_equal_settings_give_equal_rows_of_every_matrix_and_all(rows, corpus):
    assert rows == measure(CONFIG, SETTINGS, corpus)
    matrices = [name for name, p in next(stages(CONFIG, corpus, [0])).model.named_parameters() if "blocks." in name]
    for step in (2, 3):
        here = [row for row in rows if row["step"] == step]
        assert [r["weight"] for r in here if r["name"] == "distance"] == matrices
        assert [r["weight"] for r in here if r["name"] == "direction_cosine"] == [*matrices, ALL]
    assert len(rows) == 2 * (2 * len(matrices) + 1)
    kinds = {"attention.q", "attention.k", "attention.v", "attention.out", "up", "down", ALL}
    assert {r["kind"] for r in rows} == kinds


def test_rows_hold_the_mean_and_standard_error_over_buffers_that_training_has_not_come_to(rows, corpus):
    from opus_bench.stream import CandidateStream, ProxyStream

    *_, stage = stages(CONFIG, corpus, SETTINGS["stages"])
    candidates, proxies = CandidateStream(corpus, 32, 6, 0), ProxyStream(corpus, 32, 2, 0)
    seen = [agreement(*compare_all(stage, candidates.candidates(3 + k).tokens, proxies.proxy(k))[ALL]) for k in (0, 1)]
    row = next(r for r in rows if r["step"] == 3 and r["weight"] == ALL)
    for name in seen[0]:
        value = row["value"] if name == "direction_cosine" else row[name]
        assert value == pytest.approx((seen[0][name] + seen[1][name]) / 2, abs=1e-12)
        assert row["stderr"][name] == pytest.approx(abs(seen[0][name] - seen[1][name]) / 2, abs=1e-12)


@pytest.mark.parametrize("config,change,word", [
    ({"optimizer": "adamw"}, {}, "optimizer='muon', got 'adamw'"),
    ({}, {"stages": [1, 3]}, r"2 updates or later, got \[1, 3\]"),
    ({}, {"buffers": 1}, "buffers must be at least 2, got 1"),
    ({"buffer": 2}, {}, "at least 3 candidates, which are ranked; got 2"),
])
def test_bad_settings_are_refused_before_anything_is_trained(corpus, config, change, word):
    calls = []
    with pytest.raises(ValueError, match=word):
        measure(dataclasses.replace(CONFIG, **config), SETTINGS | change, corpus, lambda: calls.append(1))
    assert not calls


def test_the_frozen_map_is_the_cores(stage):
    name, one = next(iter(muon_matrices(stage).items()))
    live = preconditioners(stage.optimizers, {name: one.parameter})[name]
    found = frozen_map(momentum_of(name, one), one.group)
    assert found.scale == live.scale and isinstance(stage.model, OpusGPT2)
    # S has norm below 4 sqrt(o); float32 sums of o products of entries below 1
    want = live.left.dense().double()
    torch.testing.assert_close(found.left.dense(), want, rtol=0, atol=4 * len(want) * 2**-23)


# The page


class Options:
    optimizers = seeds = None
    scale = "ci"


@pytest.mark.parametrize("scale", ["ci", "smoke"])
def test_the_grid_is_muon_alone(scale):
    options = Options()
    options.scale = scale
    jobs = script.runs(options)
    assert len({job.run_id for job in jobs}) == len(jobs) == script.SEEDS[scale]
    for job in jobs:
        check(json.loads(json.dumps(job.settings)), job.config)
        assert job.units == units(job.settings) and job.config.model == SCALES[scale].run["model"]
    options.optimizers = ["muon"]
    assert script.runs(options) == jobs
    options.optimizers = ["adamw", "muon"]
    with pytest.raises(ValueError, match="under Muon alone, got --optimizers adamw; leave it out"):
        script.runs(options)


@pytest.fixture(scope="module")
def made(cache, tmp_path_factory):
    """Records of two seeds on invented words."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPUS_BENCH_CACHE", str(cache))
        patch.setitem(SCALES, "words", dataclasses.replace(SCALES["ci"], name="words", corpus=SPEC))
        for seed in (0, 1):
            Measurement(script.EXPERIMENT, "opus_bench.validation.muon_map:measure",
                        dataclasses.replace(CONFIG, seed=seed), SETTINGS, "words", units(SETTINGS)).execute(folder)
    return folder


def test_the_page_and_its_figure_are_pure_functions_of_the_records(made, tmp_path):
    paths = script.write(made)
    assert [path.name for path in paths] == ["muon_map.md", "muon_map_words.svg"]
    before = [path.read_bytes() for path in paths]
    (tmp_path / "runs").mkdir()
    for path in sorted((made / "runs").glob("*.json"), reverse=True):
        (tmp_path / "runs" / path.name).write_bytes(path.read_bytes())
    assert [path.read_bytes() for path in script.write(tmp_path)] == before
    with pytest.raises(RecordError, match="python -m reproduce.muon_map"):
        script.write(tmp_path / "empty")


def test_the_page_prints_the_numbers_of_the_records(made):
    records = results.load(made / "runs", script.EXPERIMENT)
    page = script.write(made)[0].read_text()
    last = page[page.index("### After 3 updates"):]
    rows = [r for record in records for r in record["metrics"] if r["step"] == 3]
    up = [r for r in rows if r["kind"] == "up" and r["name"] == "distance"]
    distances = [100 * r["value"] for r in up]
    line = next(line for line in last.splitlines() if line.startswith("| up |"))
    assert f"| up | {len(up)} | {sum(distances) / len(up):.1f} % ({max(distances):.1f} %) |" in line
    assert f"| {min(r['smallest'] for r in up):.2f} to {max(r['largest'] for r in up):.2f} |" in line
    whole = [r for r in rows if r["weight"] == ALL]
    line = next(line for line in last.splitlines() if line.startswith("| all matrices |"))
    without, with_s = (sum(r[name] for r in whole) / 2 for name in ("identity_rank", "rank"))
    assert f"| {without:.2f} → {with_s:.2f} |" in line
    stderr = math.hypot(*(r["stderr"]["rank"] for r in whole)) / 2
    assert f"a rank correlation of {with_s:.2f} ± {stderr:.2f} (identity: {without:.2f}" in page
