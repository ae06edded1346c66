"""Tests and intervals against enumeration, closed forms, and simulation within five standard errors."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opus_bench import results
from opus_bench.significance import (
    ALPHA,
    BOOTSTRAPS,
    benjamini_hochberg,
    bootstrap_interval,
    detectable_difference,
    holm,
    item_difference,
    paired_t_test,
    power,
    sign_flip_test,
    smallest_sign_flip_p,
    stderr_bounds,
)
from opus_bench.statistics import Interval, binomial_stderr, mean_interval
from reproduce import coverage

FIVE_SIGMA = 5.0


def close_to(share, expected, trials):
    """Whether a simulated share is within five standard errors of what it should be."""
    return abs(share - expected) <= FIVE_SIGMA * binomial_stderr(expected, trials)


# Seeds ----------------------------------------------------------------------------------------


def test_the_percentile_bootstrap_of_three_values_is_their_range():
    """Each end has probability 1/27 > .025, so both 95 % limits are ends; the basic one is its mirror image."""
    rng, values = np.random.default_rng(0), [1.0, 2.0, 6.0]
    assert bootstrap_interval(values, rng, "percentile") == Interval(3.0, 1.0, 6.0, 3)
    basic = bootstrap_interval(values, rng, "basic")
    assert (basic.low, basic.high) == pytest.approx((0.0, 5.0), abs=1e-12)


def test_the_percentile_bootstrap_undercovers_at_three_as_derived(trials=300):
    """The range of three symmetric values holds their mean unless all lie on one side: 1 - 2/8 = .75, not .95."""
    rng = np.random.default_rng(1)
    hits = sum(not bootstrap_interval(rng.normal(size=3), rng, "percentile", resamples=2_000).excludes(0.0)
               for _ in range(trials))
    assert close_to(hits / trials, 0.75, trials)
    assert not close_to(hits / trials, 0.95, trials)


@pytest.mark.parametrize("method", BOOTSTRAPS)
def test_the_bootstrap_covers_where_n_is_large(method, trials=200):
    rng = np.random.default_rng(2)
    hits = sum(not bootstrap_interval(rng.normal(2, 3, size=60), rng, method, resamples=500).excludes(2.0)
               for _ in range(trials))
    assert close_to(hits / trials, 0.95, trials)


def test_the_bootstrap_is_a_function_of_its_generator_and_shows_no_interval_of_two():
    values = np.random.default_rng(9).normal(size=12)
    first, again, other = (bootstrap_interval(values, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert bootstrap_interval([1.0, 2.0], np.random.default_rng(0)) == Interval(1.5, None, None, 2)
    assert bootstrap_interval([0.5] * 4, np.random.default_rng(0)) == Interval(0.5, 0.5, 0.5, 4)


def test_the_t_test_by_hand_and_as_its_interval():
    """With 2 degrees of freedom p = 1 - |t| / sqrt(t^2 + 2)."""
    t = 2 / (1 / math.sqrt(3))
    assert paired_t_test([1.0, 2.0, 3.0]) == pytest.approx(1 - t / math.sqrt(t * t + 2), rel=1e-12)
    rng = np.random.default_rng(3)
    for values in rng.normal(1.0, 1.0, size=(100, 4)):
        assert (paired_t_test(values) < ALPHA) == mean_interval(values).excludes(0.0)
    assert paired_t_test([0.0] * 3) == 1.0 and paired_t_test([0.5] * 3) == 0.0


@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0], [1.0, 2.0, -3.5, 4.0], [0.0, 0.3, -0.1, 0.2, 0.5, -0.4]])
def test_sign_flips_are_those_enumerated(values):
    """Twice the smaller tail over all 2^n signs; ties with the observed mean count."""
    flips = itertools.product((1, -1), repeat=len(values))
    sums = [sum(s * v for s, v in zip(signs, values, strict=True)) for signs in flips]
    above, below = (sum(sign * total >= sign * sum(values) - 1e-9 for total in sums) / len(sums) for sign in (1, -1))
    assert sign_flip_test(values) == pytest.approx(min(1.0, 2 * min(above, below)), rel=1e-12)


@pytest.mark.parametrize("n", [2, 3, 5, 6])
def test_the_least_p_of_n_differences(n):
    assert sign_flip_test([1.0 + 0.1 * i for i in range(n)]) == pytest.approx(smallest_sign_flip_p(n))
    assert smallest_sign_flip_p(n) == min(1, 2 / 2**n)
    assert (smallest_sign_flip_p(n) <= ALPHA) == (n >= 6)


def test_the_sign_flip_test_rejects_as_often_as_enumeration_says(trials=400):
    """Of 64 flips of 6 differences two have p = 2/64 and no others at most .05."""
    rng = np.random.default_rng(4)
    rejected = sum(sign_flip_test(values) <= ALPHA for values in rng.normal(size=(trials, 6)))
    assert close_to(rejected / trials, 2 / 64, trials)


def test_many_differences_are_flipped_at_random():
    values = np.random.default_rng(5).normal(0.3, 1.0, size=40)
    assert sign_flip_test(values, np.random.default_rng(0)) == pytest.approx(paired_t_test(values), abs=0.02)


# Power ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 5, 12])
def test_the_detectable_difference_is_detected_as_often_as_it_says(n, trials=20_000):
    sd = 0.7
    difference = detectable_difference(sd, n)
    values = np.random.default_rng(n).normal(difference, sd, size=(trials, n))
    t = values.mean(1) / values.std(1, ddof=1) * math.sqrt(n)
    critical = {3: 4.302652730, 5: 2.776445105, 12: 2.200985160}[n]  # .975 quantiles of Student's t, from a table
    assert close_to((abs(t) > critical).mean(), 0.8, trials)
    assert power(difference, sd, n) == pytest.approx(0.8, abs=1e-8) == power(-difference, sd, n)


def test_power_has_its_limits():
    assert power(0.0, 1.0, 3) == pytest.approx(ALPHA, rel=1e-9)
    assert power(1e3, 1.0, 3) == pytest.approx(1.0)
    found = [detectable_difference(1.0, n) for n in (2, 3, 4, 8, 50)]
    assert found == sorted(found, reverse=True)
    assert detectable_difference(2.0, 5) == pytest.approx(2 * detectable_difference(1.0, 5), rel=1e-8)
    assert found[-1] * math.sqrt(50) == pytest.approx(1.96 + 0.8416, rel=0.03)  # normal quantiles where n is large


# Items ----------------------------------------------------------------------------------------


def test_mcnemar_by_hand():
    """5 gained, 1 lost of 10: p = 2 (C(6,0) + C(6,1)) / 2^6."""
    got = item_difference([1] * 7 + [0] * 3, [1] * 2 + [0] * 5 + [1] + [0] * 2)
    assert (got.gained, got.lost, got.n) == (5, 1, 10)
    assert got.difference == pytest.approx(0.4) and got.p_value == pytest.approx(14 / 64)
    assert got.stderr == pytest.approx(math.sqrt(6 - 16 / 10) / 10)
    assert item_difference([1, 0], [1, 0]).p_value == 1.0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_the_paired_stderr_is_that_of_the_differences_and_never_below_the_least(answers):
    ours, base = ([pair[side] for pair in answers] for side in (0, 1))
    got = item_difference(ours, base)
    differences = np.subtract(ours, base, dtype=float)
    assert got.stderr == pytest.approx(differences.std() / math.sqrt(len(answers)), abs=1e-12)
    least, unpaired = stderr_bounds(sum(ours) / len(ours), sum(base) / len(base), len(answers))
    assert least <= got.stderr + 1e-12 and least <= unpaired + 1e-12
    if got.lost == 0 or got.gained == 0:
        assert got.stderr == pytest.approx(least, abs=1e-9)


def test_independent_answers_have_the_unpaired_stderr(n=2_000, trials=400):
    rng = np.random.default_rng(6)
    ours, base = rng.random((trials, n)) < 0.6, rng.random((trials, n)) < 0.3
    spread = (ours.mean(1) - base.mean(1)).std(ddof=1)
    want = stderr_bounds(0.6, 0.3, n)[1]
    assert abs(spread - want) < FIVE_SIGMA * want / math.sqrt(2 * (trials - 1))


def test_mcnemar_rejects_no_more_often_than_it_says(n=200, trials=1_000):
    rng = np.random.default_rng(7)
    ours = rng.random((trials, n)) < 0.5
    base = ours ^ (rng.random((trials, n)) < 0.3)
    rejected = sum(item_difference(a, b).p_value <= ALPHA for a, b in zip(ours, base, strict=True)) / trials
    assert 0 < rejected <= ALPHA + FIVE_SIGMA * binomial_stderr(ALPHA, trials)


# Many comparisons -----------------------------------------------------------------------------


def test_corrections_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 x .01, 2 x .03, then no less
    assert holm([0.9, 0.5]) == pytest.approx([1.0, 1.0]) and len(holm([])) == 0
    assert benjamini_hochberg([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.04, 0.04])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.randoms())
def test_corrections_do_not_depend_on_order_and_lie_between_none_and_bonferroni(p, random):
    order = list(range(len(p)))
    random.shuffle(order)
    for correct in (holm, benjamini_hochberg):
        adjusted, bonferroni = correct(p), np.minimum(1, np.array(p) * len(p))
        assert np.allclose(correct([p[i] for i in order]), adjusted[order])
        assert (adjusted >= np.array(p) - 1e-12).all() and (adjusted <= bonferroni + 1e-12).all()


def test_holm_and_benjamini_hochberg_keep_their_promise(m=10, trials=4_000):
    """Independent nulls: P(any false rejection) = 1 - (1 - alpha/m)^m by Holm; false share m0/m alpha by B.-H."""
    rng = np.random.default_rng(8)
    p = rng.random((trials, m))
    wrong = sum((holm(row) <= ALPHA).any() for row in p) / trials
    assert close_to(wrong, 1 - (1 - ALPHA / m) ** m, trials)
    p[:, :4] /= 1e6  # four true effects
    shares = [found[4:].sum() / max(1, found.sum()) for found in (benjamini_hochberg(row) <= ALPHA for row in p)]
    assert abs(np.mean(shares) - 0.6 * ALPHA) <= FIVE_SIGMA * np.std(shares, ddof=1) / math.sqrt(trials)


@pytest.mark.parametrize("call,message", [
    (lambda: bootstrap_interval([1.0, 2.0, 3.0], np.random.default_rng(0), "other"), "unknown bootstrap 'other'"),
    (lambda: bootstrap_interval([1.0, math.nan], np.random.default_rng(0)), "got nan"),
    (lambda: paired_t_test([1.0, 2.0]), "at least 3 differences, got 2"),
    (lambda: sign_flip_test([1.0]), "at least 2 differences, got 1"),
    (lambda: sign_flip_test([1.0] * 20), "20 differences have too many sign flips"),
    (lambda: smallest_sign_flip_p(0), "got 0"),
    (lambda: power(1.0, 0.0, 3), "sd = 0.0"),
    (lambda: power(1.0, 1.0, 1), "n = 1"),
    (lambda: detectable_difference(1.0, 3, wanted=0.01), "got 0.01"),
    (lambda: item_difference([1], [1, 0]), "got 1 and 2"),
    (lambda: item_difference([1, 2], [1, 0]), "got 2.0"),
    (lambda: holm([0.2, 1.5]), "numbers in"),
])
def test_errors_name_the_offending_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# The coverage script --------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(coverage, "SIZES", (3,))
    monkeypatch.setattr(coverage, "FLIP_SIZES", (3,))
    monkeypatch.setattr(coverage, "RESAMPLES", 99)
    return [cell for cell in coverage.cells()]


def test_the_record_is_made_once_and_the_page_is_its_function(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["coverage", "--trials", "4", "--results", str(tmp_path)])
    assert coverage.main() == 0
    [record] = results.load(tmp_path / "runs", coverage.EXPERIMENT)
    assert [(row["name"], row["method"], row["of"], row["n"]) for row in record["metrics"]] == small
    text = (tmp_path / "tables" / "coverage.md").read_text(encoding="utf-8")
    monkeypatch.setattr(coverage, "measured", None)  # would fail if it were measured again
    assert coverage.main() == 0 and (tmp_path / "tables" / "coverage.md").read_text(encoding="utf-8") == text
    assert coverage.page(record) == text and "| Student's t | normal | 95 |" in text
    assert "| 3 | 3.26 | 0.25 |" in text
    monkeypatch.setattr("sys.argv", ["coverage", "--trials", "0"])
    assert coverage.main() == 2 and "--trials must be at least 1, got 0" in capsys.readouterr().err


def test_a_cell_is_a_function_of_itself_and_a_broken_promise_is_marked(small):
    cell = next(cell for cell in small if cell[1] == "percentile")
    assert coverage.measured(cell, 20) == coverage.measured(cell, 20)
    row = {"name": "interval", "nominal": 0.95, "value": 0.75}
    assert coverage.shown(row, 1_000) == "75.0*" and coverage.shown(row | {"value": 0.94}, 1_000) == "94.0"
    assert coverage.shown(row | {"value": 1.0}, 1_000) == "100.0"  # covering too often breaks no promise
    row = {"name": "test", "nominal": 0.05, "value": 0.0}
    assert coverage.shown(row, 1_000) == "0.0" and coverage.shown(row | {"value": 0.15}, 1_000) == "15.0*"
