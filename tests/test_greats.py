"""GREATS picks what its formula says, by gradients that know nothing of hooks, and changes nothing."""

import pytest
import torch

from baselines import build_selector
from baselines.greats import Greats
from opus_bench.gradients import exact_per_sample_grads
from opus_bench.layers import layer_names, parameter_names
from opus_bench.selector import TrainState
from small_models import optimizers_for, tokens
from test_selector import fingerprint, same


def state_of(model, kind="sgd", step=3, proxy=9):
    return TrainState(model, optimizers_for(model, kind), step, tokens(4, 12, seed=proxy))


def rates(state, names):
    """The learning rate of every scored weight, looked up by the weight itself."""
    by_id = {id(p): group["lr"] for o in state.optimizers for group in o.param_groups for p in group["params"]}
    return {k: by_id[id(p)] for k, p in parameter_names(state.model, names).items()}


def brute_force(state, batch, size, window, layers, eta=None):
    """Greedy choice and first utilities from per-sample gradients by torch.func."""
    names = layer_names(state.model, layers)
    g = exact_per_sample_grads(state.model, batch[:, :window], names)
    proxy = exact_per_sample_grads(state.model, state.proxy[:, :window], names)
    eta = rates(state, names) if eta is None else dict.fromkeys(g, eta)
    chosen, first = [], None
    for _ in range(size):
        gains = []
        for n in range(len(batch)):
            gain = 0.0
            for k in g:
                gain += eta[k] * (g[k][n] * proxy[k].mean(0)).sum()
                gain -= eta[k] ** 2 * sum((g[k][n] * g[k][m]).sum() for m in chosen)
            gains.append(gain if n not in chosen else torch.tensor(-torch.inf, dtype=torch.float64))
        first = torch.stack(gains) if first is None else first
        chosen.append(int(torch.stack(gains).argmax()))
    return chosen, first


@pytest.mark.parametrize("kind,layers,eta", [
    ("sgd", "blocks", None), ("adamw", "blocks", None), ("muon", "matrices", None), ("sgd", "blocks", 0.3),
    ("adamw", "blocks", 2.0),
])
def test_the_choice_is_that_of_brute_force_over_per_sample_gradients(model, kind, layers, eta):
    state, batch = state_of(model, kind), tokens(7, 12)
    greats = Greats(window=10, layers=layers, learning_rate=eta)
    got = greats.select(batch, 4, state, None)
    chosen, first = brute_force(state, batch, 4, 10, layers, eta)
    assert got.indices.tolist() == chosen
    torch.testing.assert_close(got.utilities, first, rtol=1e-10, atol=1e-18)
    assert got.diagnostics == {"utility_std": pytest.approx(float(first.std()))}


def test_a_large_step_turns_the_choice_away_from_what_is_like_the_chosen(model):
    state, batch = state_of(model), tokens(7, 12)
    top = brute_force(state, batch, 1, 12, "blocks", 1.0)[1].argsort(descending=True)[:4].tolist()
    picked = {eta: Greats(window=12, learning_rate=eta).select(batch, 4, state, None).indices.tolist()
              for eta in (1e-6, 3.0)}
    assert picked[1e-6] == top
    assert picked[3.0][0] == top[0] and set(picked[3.0]) != set(top)


def test_marginal_gains_use_the_rate_of_each_weights_own_group(model):
    state, batch = state_of(model, "muon"), tokens(6, 12)
    names = layer_names(model, "matrices")
    eta, g = rates(state, names), exact_per_sample_grads(model, batch, names)
    assert len(set(eta.values())) == 2
    proxy = exact_per_sample_grads(model, state.proxy, names)
    got = Greats(window=12, layers="matrices").utilities(batch, state).marginal([1, 4])
    want = sum(eta[k] * (g[k] * proxy[k].mean(0)).sum((1, 2))
               - eta[k] ** 2 * (g[k] * (g[k][1] + g[k][4])).sum((1, 2)) for k in g)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-18)


def test_a_proxy_gradient_serves_its_steps_and_is_resumed(model):
    batch, greats = tokens(6, 12), Greats(window=12, proxy_every=4)
    at = [TrainState(model, state_of(model).optimizers, step, tokens(4, 12, seed=step)) for step in (4, 5, 8)]
    first, kept, renewed = (greats.utilities(batch, state).alignment for state in at)
    assert torch.equal(first, kept) and not torch.equal(first, renewed)
    resumed = Greats(window=12, proxy_every=4)
    resumed.load_state_dict(greats.state_dict())
    state = TrainState(model, at[0].optimizers, 9, at[0].proxy)
    assert torch.equal(resumed.utilities(batch, state).alignment, renewed)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "muon"])
def test_choosing_changes_nothing_not_even_its_generator(model, kind):
    state, batch = state_of(model, kind), tokens(6, 12)
    model.train()
    model.blocks[1].eval()
    model(input_ids=batch, labels=batch).loss.backward()  # gradients in accumulation
    generator = torch.Generator().manual_seed(0)
    before, drawn = fingerprint(model, state.optimizers), generator.get_state()
    Greats(window=12).select(batch, 3, state, generator)
    after = fingerprint(model, state.optimizers)
    for key in before:
        assert same(after[key], before[key]), key
    assert torch.equal(generator.get_state(), drawn)


@pytest.mark.parametrize("proxy", [None, tokens(0, 12)], ids=["none", "empty"])
def test_an_empty_proxy_is_refused(model, proxy):
    state = TrainState(model, state_of(model).optimizers, 0, proxy)
    with pytest.raises(ValueError, match="greats needs a proxy batch"):
        Greats(window=12).select(tokens(6, 12), 3, state, None)


@pytest.mark.parametrize("options,words", [
    ({"window": 1}, "window must be at least 2 tokens, got 1"),
    ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
    ({"learning_rate": float("nan")}, "learning_rate must be positive, got nan"),
    ({"proxy_every": 0}, "proxy_every must be at least 1 step, got 0"),
    ({"microbatch": 0}, "microbatch must be at least 1 candidate, got 0"),
    ({"eta": 1.0}, "selector 'greats'.*eta"),
])
def test_bad_options_are_refused_by_value(options, words):
    with pytest.raises(ValueError, match=words):
        build_selector("greats", options, None, 12)


def test_it_is_built_by_its_name():
    assert build_selector("greats", {"window": 40}, None, 64) == Greats(window=40)


def test_microbatches_give_the_utilities_of_one(model):
    state, batch = state_of(model, "adamw"), tokens(7, 12)
    one, many = (Greats(window=12, layers="all", microbatch=size).utilities(batch, state) for size in (None, 3))
    torch.testing.assert_close(many.alignment, one.alignment, rtol=1e-10, atol=1e-18)
    torch.testing.assert_close(many.gram, one.gram, rtol=1e-10, atol=1e-18)
