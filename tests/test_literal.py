"""The literal sketch equals its explicit matrix, is unbiased, and keeps 12 bytes per weight."""

import pytest
import torch

from benchmarks.literal import LiteralSketch
from opus_bench.gradients import capture, exact_per_sample_grads, layer_names, mean_gradient, parameter_names
from opus_bench.preconditioner import preconditioners
from opus_bench.utility import exact_utility

from small_models import FIVE_SIGMA, optimizers_for, perturbed, small_paper_gpt2, tokens

CANDIDATES, PROXY = tokens(5, 9), tokens(3, 7, seed=2)
TIGHT = dict(rtol=1e-10, atol=1e-14)


def setting(kind, layers="all"):
    """Dense effective updates and proxy by autograd alone, and the factored inputs of an estimator."""
    torch.manual_seed(0)
    model = perturbed(small_paper_gpt2())
    optimizers = optimizers_for(model, kind)
    names = layer_names(model, layers)
    p = preconditioners(optimizers, parameter_names(model, names))
    updates = {k: p[k](g).flatten(1) for k, g in exact_per_sample_grads(model, CANDIDATES, names).items()}
    proxy = {k: g.mean(0).flatten() for k, g in exact_per_sample_grads(model, PROXY, names).items()}
    return updates, proxy, (capture(model, CANDIDATES, names), mean_gradient(model, PROXY, names)[0], p)


def matrix(table, width):
    """S, one column per coordinate: its sign in the row of its bucket."""
    dense = torch.zeros(width, len(table.sign), dtype=torch.float64)
    dense[table.bucket, torch.arange(len(table.sign))] = table.sign.double()
    return dense


@pytest.mark.parametrize("kind,layers", [("sgd", "all"), ("adamw", "all"), ("muon", "blocks")])
def test_sketch_equals_the_explicit_matrix_of_its_tables(kind, layers, monkeypatch, width=32):
    monkeypatch.setattr("opus_bench.ghost.CHUNK_ELEMENTS", 500)  # several chunks per weight
    u, g, (candidates, proxy, p) = setting(kind, layers)
    literal = LiteralSketch(width, seed=7)
    w = {k: 0.5 + j for j, k in enumerate(u)}
    r = {k: 1.5 + j**2 for j, k in enumerate(u)}
    for k in u:
        features = literal.sketch(k, candidates[k], p[k])
        s = matrix(literal.tables[k], width)
        torch.testing.assert_close(features, u[k] @ s.T, **TIGHT)
        one = literal({k: candidates[k]}, proxy, p, w, r)
        torch.testing.assert_close(one.alignment, w[k] * (u[k] @ s.T) @ (s @ g[k]), **TIGHT)
        torch.testing.assert_close(one.gram, r[k] * (u[k] @ s.T) @ (u[k] @ s.T).T, **TIGHT)
    whole = literal(candidates, proxy, p, w, r)
    s = {k: matrix(literal.tables[k], width) for k in u}
    torch.testing.assert_close(whole.alignment, sum(w[k] * u[k] @ s[k].T @ s[k] @ g[k] for k in u), **TIGHT)
    torch.testing.assert_close(whole.gram, sum(r[k] * u[k] @ s[k].T @ s[k] @ u[k].T for k in u), **TIGHT)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_alignment_is_unbiased_with_the_stated_variance(kind, width=16, trials=200):
    u, g, (candidates, proxy, p) = setting(kind, "blocks")
    one = dict.fromkeys(u, 1.0)
    draws = [LiteralSketch(width, seed)(candidates, proxy, p, one, None) for seed in range(trials)]
    assert all(draw.gram is None for draw in draws)
    variance = sum(((u[k] ** 2).sum(1) * (g[k] @ g[k]) + (u[k] @ g[k]) ** 2 - 2 * (u[k] ** 2 @ g[k] ** 2)) / width
                   for k in u)
    want = exact_utility(candidates, proxy, p, one, None).alignment
    alignment = torch.stack([draw.alignment for draw in draws])
    assert ((alignment.mean(0) - want).abs() < FIVE_SIGMA * (variance / trials).sqrt()).all()
    # the draws are not normal: their variance's own standard error comes from the fourth moment
    spread = (alignment - want) ** 2
    assert ((spread.mean(0) - variance).abs() < FIVE_SIGMA * spread.std(0) / trials**0.5).all()


def test_tables_take_twelve_bytes_per_weight_and_are_drawn_once():
    u, _, factored = setting("adamw")
    literal = LiteralSketch(width=64)
    assert literal.bytes == 0
    one = dict.fromkeys(u, 1.0)
    first = literal(*factored, one, one)
    assert literal.bytes == 12 * sum(x.shape[1] for x in u.values())
    kept = dict(literal.tables)
    second = literal(*factored, one, one)
    assert literal.tables.keys() == kept.keys() == u.keys()
    for k, table in literal.tables.items():
        assert table.bucket is kept[k].bucket and table.sign is kept[k].sign
        assert (table.bucket.dtype, table.sign.dtype) == (torch.int64, torch.float32)
    assert torch.equal(first.alignment, second.alignment) and torch.equal(first.gram, second.gram)


def test_a_table_depends_on_seed_and_name_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    cpu = torch.device("cpu")
    a, b, c = (LiteralSketch(64, seed).table(name, 1000, cpu) for seed, name in [(1, "x"), (2, "x"), (1, "y")])
    again = LiteralSketch(64, 1).table("x", 1000, cpu)
    assert torch.equal(a.bucket, again.bucket) and torch.equal(a.sign, again.sign)
    for other in (b, c):
        assert not torch.equal(a.bucket, other.bucket) and not torch.equal(a.sign, other.sign)
    assert set(a.sign.tolist()) == {-1.0, 1.0} and 0 <= a.bucket.min() and a.bucket.max() < 64
    assert torch.equal(torch.get_rng_state(), state)


def test_a_weight_of_another_size_no_weight_and_no_width_are_refused():
    literal = LiteralSketch(8)
    literal.table("x", 10, torch.device("cpu"))
    with pytest.raises(ValueError, match="x has 11 coordinates, its table 10"):
        literal.table("x", 11, torch.device("cpu"))
    with pytest.raises(ValueError, match="no parameter"):
        literal({}, {}, {}, {}, None)
    with pytest.raises(ValueError, match="at least 1"):
        LiteralSketch(0)
