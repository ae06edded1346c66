"""Limits against random and extreme utilities, draws against enumerated probabilities, gains by hand.

Sampled shares are compared with their enumerated mean within five standard errors; the rest is exact.
"""

import copy
import dataclasses
import itertools
import json
import math

import pytest
import torch
from fake_corpus import SPEC
from small_models import FIVE_SIGMA

from opus_bench import results, sampling
from opus_bench.schema import RecordError
from opus_bench.selector import ARMS, Opus, TrainState
from opus_bench.stream import CandidateStream, ProxyStream
from opus_bench.train import RunConfig
from opus_bench.utility import Utility
from opus_bench.validation.selection_entropy import (
    PAPER_SCORES,
    Scored,
    bound,
    check,
    domain_share,
    draw,
    draws_at,
    measure,
    score,
    units,
)
from opus_bench.validation.trained import stages
from reproduce import selection_entropy as script
from reproduce.measurement import Measurement
from reproduce.scales import SCALES

CONFIG = RunConfig("random", model="ci", length=32, buffer=8, proxy_size=2, adam_lr=1e-3)
SETTINGS = {"stages": [1, 2], "buffers": 2, "repeats": 2, "window": 16, "sketch_width": 64,
            "proxy_sizes": {"paper": 2, "released": 2, "calibrated": 4},
            "temperatures": {"raw": [1e-6, 0.9], "spread": [0.5], "share": [0.25, 0.5]}}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def scored(utilities, domains=None, gram=None, weight=1.0):
    u = torch.tensor(utilities, dtype=torch.float64)
    gram = None if gram is None else torch.tensor(gram, dtype=torch.float64)
    return Scored(Utility(u, gram, weight), tuple(domains or "a" * len(u)))


# The limits


@pytest.mark.parametrize("spread,temperature", [(0.0026, 0.9), (1.0, 0.5), (3.0, 0.4), (1e-3, 1e-4)])
def test_no_utilities_in_the_range_go_beyond_the_bound(spread, temperature):
    limit = bound(2.0, 2.0 + spread, temperature)
    for seed in range(300):
        g = generator(seed)
        n = int(torch.randint(2, 60, (), generator=g))
        u = 2.0 + spread * torch.rand(n, generator=g, dtype=torch.float64)
        if seed % 2:  # at the ends
            u = 2.0 + spread * (u > u.median()).double()
        p = sampling.boltzmann_probabilities(u, temperature)
        assert math.log(p.max() / p.min()) <= limit.log_ratio + 1e-12
        assert sampling.effective_sample_size(p) / n >= limit.effective_share - 1e-12
        assert sampling.total_variation(p) <= limit.total_variation + 1e-12


@pytest.mark.parametrize("d", [0.0026 / 0.9, 1.0, 4.0])
def test_the_bound_is_reached_at_its_extremes(d, n=100_000):
    """With a share x of n candidates at the top, x = 1/(1 + e^d) for the ESS and 1/(1 + e^(d/2)) for the distance.

    Both are smooth with their extreme there, so rounding x to a multiple of 1/n costs at most e^(2d) / n.
    """
    limit = bound(0.0, d, 1.0)
    for x, want, measured in ((1 / (1 + math.exp(d)), limit.effective_share,
                               lambda p: sampling.effective_sample_size(p) / n),
                              (1 / (1 + math.exp(d / 2)), limit.total_variation, sampling.total_variation)):
        u = torch.zeros(n, dtype=torch.float64)
        u[: round(x * n)] = d
        p = sampling.boltzmann_probabilities(u, 1.0)
        assert math.log(p.max() / p.min()) == pytest.approx(limit.log_ratio, abs=1e-12)
        assert measured(p) == pytest.approx(want, abs=math.exp(2 * d) / n**2 + 1e-12)


def test_the_papers_scores_leave_next_to_nothing():
    limit = bound(*PAPER_SCORES, 0.9)
    assert math.exp(limit.log_ratio) == pytest.approx(math.exp(0.0026 / 0.9), rel=1e-12)
    assert 1 - limit.effective_share == pytest.approx((0.0026 / 0.9) ** 2 / 4, rel=1e-5)
    assert limit.total_variation == pytest.approx(0.0026 / 0.9 / 4, rel=1e-5)
    assert bound(1.0, 1.0, 0.9) == type(limit)(0.0, 1.0, 0.0)
    assert bound(0.0, 1.0, 1e-9).effective_share == 0.0  # no overflow


def test_the_bound_refuses_what_is_no_range():
    with pytest.raises(ValueError, match="0.0033, must not be below the lowest, 0.0059"):
        bound(0.0059, 0.0033, 0.9)
    for temperature in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match=f"temperature must be positive, got {temperature}"):
            bound(0.0, 1.0, temperature)


# Draws


def test_two_candidates_have_the_closed_form():
    """p = 1 / (1 + e^-d): ESS / n = 1 / (2 (p^2 + (1-p)^2)), distance p - 1/2."""
    u, temperature = [0.3, 1.7], 0.8
    p = 1 / (1 + math.exp(-1.4 / 0.8))
    found = draws_at([scored(u)] * 2, 1, "raw", temperature, 3, 0, ["a"], ["b"])
    assert found["effective_share"] == pytest.approx(1 / (2 * (p**2 + (1 - p) ** 2)), rel=1e-12)
    assert found["total_variation"] == pytest.approx(p - 0.5, rel=1e-12)
    assert found["log_ratio"] == pytest.approx(1.4 / 0.8, rel=1e-12)
    in_spreads = draws_at([scored(u)] * 2, 1, "spread", temperature / (1.4 / math.sqrt(2)), 3, 0, ["a"], ["b"])
    assert in_spreads == pytest.approx(found, rel=1e-12)


def test_draws_have_the_enumerated_means(trials=4000):
    """Two picks of four with redundancy: every ordered pair by its probability."""
    u, weight, temperature = [0.1, 0.5, 0.9, 0.2], 0.7, 0.6
    gram = [[1.0, 0.2, 0.9, 0.0], [0.2, 1.0, 0.3, 0.1], [0.9, 0.3, 2.0, 0.4], [0.0, 0.1, 0.4, 1.0]]
    one = scored(u, "acab", gram, weight)
    values = {"effective_share": [], "total_variation": [], "target_gain": [], "corrupted_gain": [], "weight": []}
    for i, j in itertools.permutations(range(4), 2):
        left = [k for k in range(4) if k != i]
        first = torch.softmax(torch.tensor(u, dtype=torch.float64) / temperature, 0)
        second = torch.softmax(torch.tensor([u[k] - weight * gram[k][i] for k in left], dtype=torch.float64)
                               / temperature, 0)
        shares = [float(1 / (p**2).sum()) / len(p) for p in (first, second)]
        distances = [float((p - 1 / len(p)).abs().sum()) / 2 for p in (first, second)]
        values["weight"].append(float(first[i] * second[left.index(j)]))
        values["effective_share"].append(sum(shares) / 2)
        values["total_variation"].append(sum(distances) / 2)
        chosen = ["acab"[i], "acab"[j]]
        values["target_gain"].append(chosen.count("a") / 2 - 0.5)
        values["corrupted_gain"].append(chosen.count("c") / 2 - 0.25)
    assert sum(values["weight"]) == pytest.approx(1)
    found = draws_at([one] * 2, 2, "raw", temperature, trials // 2, 0, ["a"], ["c"])
    probability = torch.tensor(values.pop("weight"), dtype=torch.float64)
    for name, each in values.items():
        x = torch.tensor(each, dtype=torch.float64)
        mean = float(probability @ x)
        variance = float(probability @ (x - mean) ** 2)
        if "gain" in name:  # minus uniform draws of the same random numbers: at most the two deviations added
            uniform = {"target_gain": 0.5 * 0.5 / 2 * 2 / 3, "corrupted_gain": 0.25 * 0.75 / 2 * 2 / 3}[name]
            variance = (math.sqrt(variance) + math.sqrt(uniform)) ** 2
        assert abs(found[name] - mean) < FIVE_SIGMA * math.sqrt(variance / trials) + 1e-12, name


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_the_unit_share_gives_the_effective_sample_size_asked_for(share):
    u = torch.randn(16, generator=generator(), dtype=torch.float64).tolist()
    draws = draw(scored(u), 8, "share", share, generator())
    # bisection stops at 1e-6 of the temperature; the share changes by less than its own size per e-fold
    assert draws.effective_share == pytest.approx([share] * 8, rel=1e-5)
    found = draws_at([scored(u)] * 2, 8, "share", share, 2, 0, ["a"], ["b"])
    assert found["effective_share"] == pytest.approx(share, rel=1e-5)


def test_the_unit_spread_does_not_know_the_scale_of_the_utilities():
    u = torch.randn(12, generator=generator(), dtype=torch.float64)
    one, other = (draw(scored((factor * u).tolist()), 6, "spread", 0.5, generator()) for factor in (1.0, 1e-7))
    assert one.indices == other.indices and one.effective_share == pytest.approx(other.effective_share, rel=1e-9)
    assert one.temperature[0] == pytest.approx(0.5 * float(u.std()), rel=1e-12)
    raw = draw(scored(u.tolist()), 6, "raw", 0.5, generator())
    assert raw.temperature == [0.5] * 6
    with pytest.raises(ValueError, match="raw, spread, share, got 'kelvin'"):
        draw(scored([0.0, 1.0]), 1, "kelvin", 1.0, generator())


def test_gains_are_counted_from_uniform_draws_of_the_same_numbers():
    """At a low temperature the best half is chosen whatever the numbers; uniform draws are replayed here."""
    buffers = [scored([3.0, 2.0, 1.0, 0.0], "aabc"), scored([0.0, 1.0, 2.0, 3.0], "aabc")]
    found = draws_at(buffers, 2, "raw", 1e-6, 3, 5, ["a"], ["c"])
    g, target, corrupted = generator(5), [], []
    for best in ("aa", "bc"):
        picks = "".join("aabc"[i] for _ in range(3)
                        for i in sampling.boltzmann_sample(lambda s: torch.zeros(4), 2, g, temperature=1.0).indices)
        target.append(best.count("a") / 2 - picks.count("a") / 6)
        corrupted.append(best.count("c") / 2 - picks.count("c") / 6)
    assert found["target_gain"] == pytest.approx(sum(target) / 2)
    assert found["corrupted_gain"] == pytest.approx(sum(corrupted) / 2)
    assert found["target_gain_stderr"] == pytest.approx(abs(target[0] - target[1]) / 2)
    assert found["corrupted_gain_stderr"] == pytest.approx(abs(corrupted[0] - corrupted[1]) / 2)
    assert domain_share("aabc", ["a", "c"]) == 0.75 and domain_share("b", ["a"]) == 0


def test_a_temperature_far_above_the_utilities_makes_the_uniform_choice():
    u = torch.randn(16, generator=generator(), dtype=torch.float64).tolist()
    hot = draws_at([scored(u, "ab" * 8)] * 2, 8, "raw", 1e12, 20, 0, ["a"], ["b"])
    assert hot["same_as_uniform"] == 1 and hot["target_gain"] == hot["corrupted_gain"] == 0
    assert hot["effective_share"] == pytest.approx(1, abs=1e-12)
    cold = draws_at([scored(u, "ab" * 8)] * 2, 8, "raw", 1e-12, 20, 0, ["a"], ["b"])
    assert cold["same_as_uniform"] == 0 and cold["effective_share"] < 0.15


# The measurement


def test_scores_are_the_arms_own_and_leave_the_model_alone(corpus):
    stage = next(stages(CONFIG, corpus, [2]))
    before = copy.deepcopy((stage.model.state_dict(), [o.state_dict() for o in stage.optimizers]))
    state = torch.get_rng_state()
    buffers = [CandidateStream(corpus, 32, 8, 0).candidates(step) for step in (5, 6)]
    proxies = [ProxyStream(corpus, 32, 2, 0).proxy(step) for step in (0, 1)]
    for arm in ARMS:
        found = score(stage, arm, buffers, proxies, 16, 64)
        for one, batch, proxy in zip(found, buffers, proxies, strict=True):
            want = Opus.arm(arm, window=16, sketch_width=64).utilities(
                batch.tokens, 4, TrainState(stage.model, stage.optimizers, 2, proxy))
            assert torch.equal(one.utility.marginal([3]), want.marginal([3])) and one.domains == batch.domains
            assert one.spread == pytest.approx(float(want.alignment.std()))
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in stage.model.parameters())
    after = (stage.model.state_dict(), [o.state_dict() for o in stage.optimizers])
    assert all(torch.equal(before[0][name], after[0][name]) for name in after[0])
    for old, new in zip(before[1], after[1], strict=True):
        for parameter in new["state"]:
            assert all(torch.equal(old["state"][parameter][k], v) for k, v in new["state"][parameter].items())


@pytest.fixture(scope="module")
def rows(corpus):
    calls = []
    found = measure(CONFIG, SETTINGS, corpus, lambda: calls.append(1))
    assert len(calls) == units(SETTINGS) == 2 + 2 * 3 * (5 + 1)
    return found


def test_equal_settings_give_equal_rows_of_every_stage_arm_and_temperature(rows, corpus):
    assert rows == measure(CONFIG, SETTINGS, corpus)
    keys = [(row["step"], row["arm"], row["temperature_unit"], row["temperature"])
            for row in rows if row["name"] == "effective_share"]
    temperatures = [(unit, value) for unit, values in SETTINGS["temperatures"].items() for value in values]
    assert keys == [(step, arm, *at) for step in (1, 2) for arm in ARMS for at in temperatures]
    assert [row["name"] for row in rows[:2]] == ["target_offered", "corrupted_offered"]
    assert sum(row["name"] == "utility_std" for row in rows) == 6 and len(rows) == 2 + 6 + len(keys)


def test_rows_say_what_was_offered_after_training(rows, corpus):
    stream = CandidateStream(corpus, 32, 8, 0)
    offered = [domain for step in (2, 3) for domain in stream.candidates(step).domains]
    assert rows[0]["value"] == offered.count("encyclopedia") / 16
    assert rows[1]["value"] == offered.count("corrupted") / 16
    for row in rows:
        if row.get("temperature_unit") == "share":  # last picks may ask for less than one candidate
            assert row["value"] == pytest.approx(row["temperature"], abs=0.05)


@pytest.mark.parametrize("change,word", [
    ({"buffers": 1}, "buffers must be at least 2, got 1"),
    ({"repeats": 0}, "repeats must be at least 1, got 0"),
    ({"temperatures": {"kelvin": [1.0]}}, "got 'kelvin'"),
    ({"temperatures": {"raw": [0.0]}}, "temperature must be positive, got 0.0"),
    ({"temperatures": {"share": [1.0]}}, "effective_share must be between 0 and 1, got 1.0"),
    ({"proxy_sizes": {"paper": 2}}, r"paper, released, calibrated, got \['paper'\]"),
    ({"window": 33}, "3 tokens to the 32 of a sequence, got 33"),
])
def test_bad_settings_are_refused_before_anything_is_trained(corpus, change, word):
    calls = []
    with pytest.raises(ValueError, match=word):
        measure(CONFIG, SETTINGS | change, corpus, lambda: calls.append(1))
    assert not calls


# The page


class Options:
    optimizers = seeds = None
    scale = "ci"


@pytest.mark.parametrize("scale", ["ci", "smoke"])
def test_the_grid_has_both_optimizers_and_settings_that_hold(scale):
    Options.scale = scale
    jobs = script.runs(Options)
    assert {job.config.optimizer for job in jobs} == {"adamw", "muon"}
    assert len({job.run_id for job in jobs}) == len(jobs) == 2 * script.SEEDS[scale]
    for job in jobs:
        settings = json.loads(json.dumps(job.settings))
        check(settings, job.config)
        assert job.units == units(settings) and settings["window"] == SCALES[scale].window
        assert script.SHARE in settings["temperatures"]["share"]
        assert script.PAPER_TEMPERATURE in settings["temperatures"]["raw"]


@pytest.fixture(scope="module")
def made(cache, tmp_path_factory):
    """Records of both optimizers on invented words."""
    folder = tmp_path_factory.mktemp("made")
    settings = SETTINGS | {"stages": [2], "temperatures": {"raw": [1e-6, 0.9], "spread": [0.5, 1.0],
                                                           "share": [0.25, 0.5]}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPUS_BENCH_CACHE", str(cache))
        patch.setitem(SCALES, "words", dataclasses.replace(SCALES["ci"], name="words", corpus=SPEC))
        for optimizer in ("adamw", "muon"):
            Measurement(script.EXPERIMENT, "opus_bench.validation.selection_entropy:measure",
                        dataclasses.replace(CONFIG, optimizer=optimizer), settings, "words",
                        units(settings)).execute(folder)
    return folder


def test_the_page_and_its_figures_are_pure_functions_of_the_records(made, tmp_path):
    paths = script.write(made)
    assert [path.name for path in paths] == ["selection_entropy.md", "selection_entropy_temperature_words.svg",
                                             "selection_entropy_gain_words.svg"]
    before = [path.read_bytes() for path in paths]
    (tmp_path / "runs").mkdir()
    for path in sorted((made / "runs").glob("*.json"), reverse=True):
        (tmp_path / "runs" / path.name).write_bytes(path.read_bytes())
    assert [path.read_bytes() for path in script.write(tmp_path)] == before
    with pytest.raises(RecordError, match="python -m reproduce.selection_entropy"):
        script.write(tmp_path / "empty")


def test_the_page_prints_the_numbers_of_the_records(made):
    page = script.write(made)[0].read_text()
    assert "| the paper's printed scores | – | 0.0033 to 0.0059 | at most 1.0029 | at least 1 − 2.1e-06 |" in page
    record = next(r for r in results.load(made / "runs", script.EXPERIMENT) if r["config"]["optimizer"] == "muon")
    row = next(r for r in record["metrics"] if r.get("arm") == "released" and r.get("temperature") == 0.9)
    line = next(line for line in page.splitlines() if line.startswith("| Muon, released | 2 |"))
    assert f"| {row['total_variation']:.1e} | {100 * row['same_as_uniform']:.0f} % |" in line
    assert script.share_cell(row["value"]) in line and script.ratio_cell(row["log_ratio"]) in line


def test_cells_and_pooling_by_hand():
    assert script.share_cell(0.5) == "0.500" and script.share_cell(1 - 2e-6) == "1 − 2.0e-06"
    assert script.ratio_cell(1e-5) == "1 + 1.0e-05" and script.ratio_cell(math.log(2)) == "2"
    assert script.gain_cell({"x": -0.0001, "x_stderr": 0.012}, "x") == "+0.0 ± 1.2"

    def record(value, stderr):
        row = dict.fromkeys((*script.MEANS, *script.SPREADS), value)
        row |= {"target_gain_stderr": stderr, "name": "effective_share", "step": 3, "arm": "paper"}
        return {"metrics": [row | {"temperature_unit": "raw", "temperature": 0.9}, row | {"step": 4},
                            {"name": "utility_std", "step": 3, "arm": "paper", "value": value}]}

    records = [record(1.0, 0.3), record(2.0, 0.4)]
    at, = script.pooled(records, 3, "paper").values()
    assert (at["value"], at["target_gain"], at["target_gain_stderr"]) == pytest.approx((1.5, 1.5, 0.25))
    assert script.mean_of(records, "utility_std", step=3, arm="paper") == 1.5


def test_sentences_name_the_temperatures_that_choose():
    def table(shares):
        base = dict.fromkeys((*script.MEANS, *script.SPREADS), 0.5)
        keys = [("raw", value) for value in (1e-4, 1e-2, 0.9)] + [("share", 0.25)]
        return [base | {"name": "effective_share", "step": 3, "arm": arm, "temperature_unit": unit, "value": share,
                        "temperature": value} for arm in ARMS
                for (unit, value), share in zip(keys, (*shares, 0.25), strict=True)]

    def group(shares):
        return [{"metrics": table(shares), "config": {"measured": {"stages": [3]}}}]

    lines = script.sentences({"adamw": group((0.1, 0.4, 1.0)), "muon": group((0.6, 0.9, 0.9995))}).splitlines()
    assert len(lines) == 1 + len(ARMS) and "more than 0.29 % likelier" in lines[0] and "over 0.072 points" in lines[0]
    assert lines[1].startswith("- paper: at 0.9 the effective sample size is never below 1 − 5.0e-04 of the "
                               "candidates, and at least 50 %")
    assert "AdamW, last stage: it is below half from raw 0.01 down," in lines[1]
    assert "Muon, last stage: it is below half at no raw temperature tried," in lines[1]
