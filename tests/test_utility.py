"""Utilities equal Eq 23/25 computed from autograd's per-sample gradients."""

import math

import pytest
import torch

from opus_bench.gradients import capture, exact_per_sample_grads, layer_names, mean_gradient, parameter_names
from opus_bench.preconditioner import preconditioners
from opus_bench.sketch import count_sketch
from opus_bench.utility import check_utilities, exact_utility, sketched_utility

from small_models import FIVE_SIGMA, optimizers_for, tokens


def setting(model, kind, layers="blocks", n=5):
    optimizers = optimizers_for(model, kind)
    names = layer_names(model, layers)
    p = preconditioners(optimizers, parameter_names(model, names))
    candidates, proxy = tokens(n, 9), tokens(3, 7, seed=2)
    dense = {k: p[k](g) for k, g in exact_per_sample_grads(model, candidates, names).items()}
    proxy_gradient = {k: g.mean(0) for k, g in exact_per_sample_grads(model, proxy, names).items()}
    factored = capture(model, candidates, names), mean_gradient(model, proxy, names)[0], p
    return dense, proxy_gradient, factored


@pytest.mark.parametrize("kind,layers", [("sgd", "all"), ("adamw", "all"), ("muon", "blocks")])
def test_exact_utility_equals_autograd_on_the_preconditioned_gradients(model, kind, layers, monkeypatch):
    monkeypatch.setattr("opus_bench.ghost.CHUNK_ELEMENTS", 500)
    u, g, factored = setting(model, kind, layers)
    w = {k: 0.5 + i for i, k in enumerate(u)}
    r = {k: 1.5 + i**2 for i, k in enumerate(u)}
    got = exact_utility(*factored, w, r)
    alignment = sum(w[k] * (u[k] * g[k]).sum((1, 2)) for k in u)
    gram = sum(r[k] * u[k].flatten(1) @ u[k].flatten(1).T for k in u)
    torch.testing.assert_close(got.alignment, alignment, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(got.gram, gram, rtol=1e-10, atol=1e-14)
    chosen = sum(u[k][[1, 4]].sum(0) for k in ["blocks.0.up.weight"])
    assert chosen.abs().max() > 0
    want = alignment - sum(r[k] * (u[k] * u[k][[1, 4]].sum(0)).sum((1, 2)) for k in u)
    torch.testing.assert_close(got.marginal([1, 4]), want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_sketched_utility_is_unbiased_with_the_stated_variance(model, kind, width=64, trials=300):
    u, g, factored = setting(model, kind)
    one = dict.fromkeys(u, 1.0)
    draws = [sketched_utility(*factored, one, one, width, seed=10_000 * s) for s in range(trials)]
    alignment = torch.stack([d.alignment for d in draws])
    want = sum((u[k] * g[k]).sum((1, 2)) for k in u)
    variance = 0.0
    for k in u:
        x, y = u[k].flatten(1), g[k].flatten()
        variance = variance + ((x @ x.T).diagonal() * (y @ y) + (x @ y) ** 2
                               - 2 * (x**2 @ y**2)) / width
    assert ((alignment.mean(0) - want).abs() < FIVE_SIGMA * (variance / trials).sqrt()).all()
    spread = (alignment - want) ** 2
    assert ((spread.mean(0) - variance).abs() < FIVE_SIGMA * spread.std(0) / math.sqrt(trials)).all()
    gram = torch.stack([d.gram for d in draws])
    exact = sum(u[k].flatten(1) @ u[k].flatten(1).T for k in u)
    assert ((gram.mean(0) - exact).abs() < FIVE_SIGMA * gram.std(0) / math.sqrt(trials)).all()


def test_sketched_utility_equals_the_sketches_of_dense_updates(model):
    u, g, factored = setting(model, "adamw")
    one = dict.fromkeys(u, 1.0)
    got = sketched_utility(*factored, one, one, 32, seed=1)
    from zlib import crc32
    want = sum(count_sketch(u[k].flatten(1), 32, 1 + crc32(k.encode()))
               @ count_sketch(g[k].reshape(1, -1), 32, 1 + crc32(k.encode()))[0] for k in u)
    torch.testing.assert_close(got.alignment, want, rtol=1e-10, atol=1e-14)


def test_utilities_are_equivariant_under_permutation(model):
    u, g, (factored, proxy, p) = setting(model, "adamw")
    one, order = dict.fromkeys(u, 1.0), [3, 0, 4, 1, 2]
    shuffled = capture(model, tokens(5, 9)[order], layer_names(model))
    a, b = (exact_utility(x, proxy, p, one, one) for x in (factored, shuffled))
    torch.testing.assert_close(b.alignment, a.alignment[order], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(b.gram, a.gram[order][:, order], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("scores,error,words", [
    ([0.0, 0.0, 0.0], ValueError, "all 3 utilities are exactly zero.*compiled"),
    ([2.0, 2.0], ValueError, "all 2 utilities equal 2"),
    ([1.0, float("nan")], FloatingPointError, "1 of 2 utilities are NaN"),
    ([1.0, float("inf")], FloatingPointError, "1 of 2 utilities are NaN or infinite"),
])
def test_scores_that_rank_nothing_are_refused_with_the_likely_cause(scores, error, words):
    with pytest.raises(error, match=words):
        check_utilities(torch.tensor(scores, dtype=torch.float64), "test")


def test_scores_that_rank_something_are_accepted():
    check_utilities(torch.tensor([0.0, 1e-300], dtype=torch.float64), "test")
    check_utilities(torch.tensor([0.0]), "test")
