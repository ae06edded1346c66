"""Samplers against enumerated probabilities."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from opus_bench.sampling import (boltzmann_probabilities, boltzmann_sample, effective_sample_size, greedy,
                                 temperature_for, top_k, total_variation)
from opus_bench.utility import Utility
from small_models import FIVE_SIGMA

UTILITY = torch.tensor([0.0, 0.3, -1.0, 1.5], dtype=torch.float64)
GRAM = torch.tensor([[1.0, 0.9, 0.0, -0.5], [0.9, 1.0, 0.1, 0.2], [0.0, 0.1, 1.0, 0.7], [-0.5, 0.2, 0.7, 1.0]],
                    dtype=torch.float64)


def enumerated(marginal, size, temperature=None, share=None):
    """Probability of every ordered choice, from the definition."""
    n, want = len(marginal([])), {}
    for order in itertools.permutations(range(n), size):
        p = 1.0
        for k, pick in enumerate(order):
            left = [i for i in range(n) if i not in order[:k]]
            u = marginal(list(order[:k]))[left]
            tau = temperature or temperature_for(u, share)
            w = [math.exp(x / tau) for x in (u - u.max()).tolist()]
            p *= w[left.index(pick)] / sum(w)
        want[order] = p
    assert math.isclose(sum(want.values()), 1, rel_tol=1e-12)
    return want


@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"temperature": 2.0}, {"effective_share": 0.6}])
@pytest.mark.parametrize("weight", [0.0, 0.8])
def test_boltzmann_sample_matches_enumerated_probabilities(options, weight, trials=8_000):
    marginal = Utility(UTILITY, GRAM, weight).marginal
    want = enumerated(marginal, 2, options.get("temperature"), options.get("effective_share"))
    generator = torch.Generator().manual_seed(0)
    counts = dict.fromkeys(want, 0)
    for _ in range(trials):
        counts[tuple(boltzmann_sample(marginal, 2, generator, **options).indices)] += 1
    for order, p in want.items():
        assert abs(counts[order] / trials - p) <= FIVE_SIGMA * math.sqrt(p * (1 - p) / trials) + 1e-12


def test_limits_of_the_temperature():
    marginal = Utility(UTILITY, None).marginal
    for seed in range(20):
        cold = boltzmann_sample(marginal, 3, torch.Generator().manual_seed(seed), temperature=1e-9)
        assert cold.indices == top_k(marginal, 3).indices == [3, 1, 0]
    torch.testing.assert_close(boltzmann_probabilities(UTILITY, 1e12), torch.full((4,), 0.25, dtype=torch.float64))
    p = boltzmann_probabilities(torch.tensor([-1e6, -1e6 - 1.0]), 1.0)
    assert p[0].item() == pytest.approx(1 / (1 + math.exp(-1)), rel=1e-12)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=40, unique=True), st.floats(0.05, 0.95))
@settings(max_examples=100, deadline=None)
def test_temperature_gives_the_asked_for_effective_sample_size(values, share):
    u = torch.tensor(values, dtype=torch.float64)
    gap = u.max() - u.topk(2).values[1]
    if share * len(u) <= 1.001 or gap < 1e-3 * (u.max() - u.min()):
        return
    p = boltzmann_probabilities(u, temperature_for(u, share))
    assert effective_sample_size(p) == pytest.approx(share * len(u), rel=1e-4)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12), st.data())
@settings(max_examples=100, deadline=None)
def test_every_rule_picks_distinct_candidates(values, data):
    marginal = Utility(torch.tensor(values, dtype=torch.float64), None).marginal
    size = data.draw(st.integers(1, len(values)))
    for draws in (greedy(marginal, size), top_k(marginal, size),
                  boltzmann_sample(marginal, size, torch.Generator().manual_seed(0), effective_share=0.25)):
        assert len(set(draws.indices)) == size and set(draws.indices) <= set(range(len(values)))


def test_greedy_brings_the_redundancy_up_to_date():
    utility = Utility(torch.tensor([1.0, 0.9, 0.2]), torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]]), 0.8)
    assert greedy(utility.marginal, 2).indices == [0, 2]
    assert top_k(utility.marginal, 2).indices == [0, 1]


def test_measures_of_uniformity_by_hand():
    assert effective_sample_size(torch.full((4,), 0.25)) == 4 and total_variation(torch.full((4,), 0.25)) == 0
    one = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert effective_sample_size(one) == 1 and total_variation(one) == 0.75


def test_a_draw_is_a_function_of_its_generator_alone():
    marginal = Utility(torch.randn(32, dtype=torch.float64), None).marginal
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b = (boltzmann_sample(marginal, 8, torch.Generator().manual_seed(7), temperature=1.0) for _ in range(2))
    assert a.indices == b.indices and torch.equal(before, torch.get_rng_state())
    c = boltzmann_sample(marginal, 8, torch.Generator().manual_seed(8), temperature=1.0)
    assert c.indices != a.indices


def test_errors_name_the_offending_value():
    marginal, g = Utility(UTILITY, None).marginal, torch.Generator()
    for options, words in [({"temperature": 0.0}, "temperature must be positive, got 0.0"),
                           ({"temperature": float("nan")}, "temperature must be positive, got nan"),
                           ({"effective_share": 1.5}, "effective_share must be between 0 and 1, got 1.5"),
                           ({}, "exactly one of temperature and effective_share")]:
        with pytest.raises(ValueError, match=words):
            boltzmann_sample(marginal, 2, g, **options)
    with pytest.raises(ValueError, match="cannot select 5 of 4"):
        greedy(marginal, 5)
