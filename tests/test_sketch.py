"""CountSketch against its stated mean and variance; hashes fixed for all machines."""

import math

import pytest
import torch

from opus_bench.gradients import Factors, PerSampleGradient, capture, layer_names, parameter_names
from opus_bench.ghost import rows
from opus_bench.preconditioner import LeftPolynomial, Preconditioner, muon_inner, normalised, preconditioners
from opus_bench.sketch import count_sketch, hash_coordinates, mix, sketch_gradients

from small_models import FIVE_SIGMA, optimizers_for, tokens


@pytest.mark.parametrize("width", [8, 64])
def test_count_sketch_has_the_stated_mean_and_variance(width, d=50, trials=20_000):
    g = torch.Generator().manual_seed(width)
    x, y = torch.randn(2, d, generator=g, dtype=torch.float64)
    pair = torch.stack([x, y])
    draws = torch.stack([torch.prod(count_sketch(pair, width, seed), 0).sum() for seed in range(trials)])
    dot = x @ y
    var = ((x @ x) * (y @ y) + dot**2 - 2 * (x**2 * y**2).sum()) / width
    assert abs(draws.mean() - dot) < FIVE_SIGMA * math.sqrt(var / trials)
    # the draws are not normal: their variance's own standard error comes from the fourth moment
    spread = (draws - dot) ** 2
    assert abs(spread.mean() - var) < FIVE_SIGMA * spread.std() / math.sqrt(trials)


def test_sketch_is_linear_and_a_sum_over_parts():
    x = torch.randn(3, 40, dtype=torch.float64)
    whole = count_sketch(x, 16, seed=3)
    parts = count_sketch(x[:, :15], 16, 3) + count_sketch(x[:, 15:], 16, 3, start=15)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(count_sketch(2 * x, 16, 3), 2 * whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [7, 8192])
def test_buckets_and_signs_are_uniform_and_independent(width, d=400_000):
    bucket, sign = hash_coordinates(0, d, width, seed=42)
    assert bucket.min() >= 0 and bucket.max() < width and set(sign.tolist()) == {-1, 1}
    assert abs(sign.double().mean()) < FIVE_SIGMA / math.sqrt(d)
    assert abs((sign[1:] * sign[:-1]).double().mean()) < FIVE_SIGMA / math.sqrt(d - 1)
    counts = torch.bincount(bucket, minlength=width).double()
    chi2 = ((counts - d / width) ** 2 / (d / width)).sum()
    assert abs(chi2 - (width - 1)) < FIVE_SIGMA * math.sqrt(2 * (width - 1))
    _, other = hash_coordinates(0, d, width, seed=43)
    assert abs((sign * other).double().mean()) < FIVE_SIGMA / math.sqrt(d)


def test_mix_is_splitmix64_with_a_scrambled_start():
    """The reference recurrence in plain Python integers."""
    mask = (1 << 64) - 1

    def finalize(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    def reference(index, seed):
        start = finalize((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & mask)
        return finalize(((index + 1) * 0x9E3779B97F4A7C15 + start) & mask)

    for seed in (0, 42, 2**31):
        got = mix(torch.tensor([0, 1, 12345, 2**40]), seed).tolist()
        assert [x & mask for x in got] == [reference(i, seed) for i in (0, 1, 12345, 2**40)]


def test_neighbouring_seeds_are_no_shifts_of_each_other():
    index = torch.arange(1000)
    near = torch.cat([mix(index, 7 + k) for k in range(5)])
    assert len(near.unique()) == len(near)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "muon"])
def test_sketched_gradients_are_the_sketch_of_the_dense_update(model, kind, monkeypatch):
    optimizers = optimizers_for(model, kind)
    names = layer_names(model)
    p = preconditioners(optimizers, parameter_names(model, names))
    monkeypatch.setattr("opus_bench.ghost.CHUNK_ELEMENTS", 200)
    for name, gradient in capture(model, tokens(3, 9), names).items():
        dense = p[name](rows(gradient, 0, gradient.shape[0])).flatten(1)
        got = sketch_gradients(gradient, p[name], 32, seed=7)
        torch.testing.assert_close(got, count_sketch(dense, 32, seed=7), rtol=1e-10, atol=1e-14)


def test_errors_name_the_offending_value():
    with pytest.raises(ValueError, match="sketch_width must be at least 1, got 0"):
        count_sketch(torch.zeros(1, 4), 0, 0)


def test_products_in_bfloat16_form_the_updates_and_nothing_else():
    """The sketch is that of updates formed of rounded factors: equal to it up to float32 sums into a bucket."""
    torch.manual_seed(0)
    o, i, n, t, width = 12, 9, 3, 5, 16
    gradient = PerSampleGradient((o, i), (Factors(torch.randn(n, t, o), torch.randn(n, t, i)),))
    preconditioner = Preconditioner(0.5, torch.rand(o, i))
    got = sketch_gradients(gradient, preconditioner, width, 7, torch.bfloat16)
    formed = 0.5 * preconditioner.diagonal * rows(gradient, 0, o, torch.bfloat16)
    assert got.dtype == torch.float32
    size = count_sketch(formed.abs().flatten(1).double(), width, 7).abs().new_full((n, width), 0)
    bucket, _ = hash_coordinates(0, o * i, width, 7, formed.device)
    size.index_add_(1, bucket, formed.abs().flatten(1).double())
    error = (got.double() - count_sketch(formed.flatten(1).double(), width, 7)).abs()
    assert (error <= o * i * torch.finfo(torch.float32).eps * size).all()
    assert not torch.equal(got, sketch_gradients(gradient, preconditioner, width, 7))


@pytest.mark.parametrize("o, i", [(6, 9), (9, 6)])
def test_a_left_factor_in_bfloat16_stays_within_the_bound_of_its_roundings(o, i):
    """Each product rounds two factors and its result, 2^-8 each; a chain of k products k times."""
    torch.manual_seed(0)
    group = dict(ns_coefficients=(3.4445, -4.775, 2.0315), eps=1e-7)
    momentum, x = torch.randn(o, i), torch.randn(4, o, 5)
    q = normalised(momentum, 1e-7)
    left = LeftPolynomial(muon_inner(momentum, group), 3.4445, q if o > i else None)
    u, inner = 2**-8, left.inner.abs()
    size = inner @ x.abs() if o <= i else q.abs() @ (inner @ (q.T.abs() @ x.abs()))
    chain = 1 if o <= i else 3
    bound = ((1 + u) ** (3 * chain) - 1) * size + 1e-5 * (size + x.abs())  # and sums in float32
    exact, got = left(x), left(x, torch.bfloat16)
    assert ((got - exact).abs() <= bound).all() and not torch.equal(got, exact)
