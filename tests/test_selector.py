"""Opus: its arms compute what they say, and scoring changes nothing that it should not."""

import copy
import math
import random

import numpy as np
import pytest
import torch

from opus_bench.gradients import curvature, exact_per_sample_grads, layer_names, parameter_names
from opus_bench.optimizer_map import step_map
from opus_bench.preconditioner import preconditioners
from opus_bench.selector import ARMS, Opus, TrainState
from small_models import optimizers_for, perturbed, small_hf_gpt2, tokens


def state_of(model, kind="adamw", step=3):
    return TrainState(model, optimizers_for(model, kind), step, tokens(4, 12, seed=9))


def dense(state, batch, window, label_shift=1, layers="blocks"):
    names = layer_names(state.model, layers)
    p = preconditioners(state.optimizers, parameter_names(state.model, names))
    u = {k: p[k](g) for k, g in
         exact_per_sample_grads(state.model, batch[:, :window], names, label_shift).items()}
    g = {k: g.mean(0) for k, g in
         exact_per_sample_grads(state.model, state.proxy[:, :window], names, label_shift).items()}
    return u, g, p


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_paper_arm_with_the_exact_estimator_is_eq_23(model, kind):
    state, batch = state_of(model, kind), tokens(6, 12)
    u, g, p = dense(state, batch, 10)
    got = Opus.arm("paper", window=10, estimator="exact").utilities(batch, 3, state)
    eta = {k: p[k].learning_rate for k in u}
    selected = [2, 5]
    want = sum(eta[k] * (u[k] * g[k]).sum((1, 2)) - eta[k] ** 2 * (u[k] * u[k][selected].sum(0)).sum((1, 2))
               for k in u)
    torch.testing.assert_close(got.marginal(selected), want, rtol=1e-10, atol=1e-18)
    assert got.redundancy_weight == 1.0


@pytest.mark.parametrize("kind", ["sgd", "adamw", "muon"])
def test_without_a_preconditioner_the_alignment_is_that_of_plain_gradients(model, kind):
    state, batch = state_of(model, kind), tokens(6, 12)
    names = layer_names(model, "blocks")
    g, target = (exact_per_sample_grads(model, some, names) for some in (batch, state.proxy))
    p = preconditioners(state.optimizers, parameter_names(model, names))
    got = Opus.arm("paper", window=12, estimator="exact", preconditioner="identity").utilities(batch, 3, state)
    want = sum(p[k].learning_rate * (g[k] * target[k].mean(0)).sum((1, 2)) for k in g)
    torch.testing.assert_close(got.alignment, want, rtol=1e-10, atol=1e-18)
    if kind != "sgd":
        frozen = Opus.arm("paper", window=12, estimator="exact").utilities(batch, 3, state)
        assert not torch.allclose(frozen.alignment, want)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_adjoint_takes_the_place_of_p_in_the_alignment_alone(model, kind):
    """Against finite differences of the real map at the candidates' mean gradient, which adjoint() is tested by."""
    state, batch = state_of(model, kind), tokens(6, 12)
    names = layer_names(model, "blocks")
    parameters = parameter_names(model, names)
    g = exact_per_sample_grads(model, batch, names)
    target = {k: one.mean(0) for k, one in exact_per_sample_grads(model, state.proxy, names).items()}
    mean = {k: one.mean(0) for k, one in g.items()}
    options = dict(window=12, estimator="exact")
    got = Opus.arm("paper", preconditioner="adjoint", **options).utilities(batch, 3, state)
    p = preconditioners(state.optimizers, parameters)
    slopes = []
    for n in range(len(batch)):
        steps = [step_map(state.optimizers, parameters, {k: mean[k] + sign * 1e-5 * g[k][n] for k in g})
                 for sign in (1, -1)]
        slopes.append(sum(p[k].learning_rate * ((steps[0][k] - steps[1][k]) * target[k]).sum() for k in g) / 2e-5)
    torch.testing.assert_close(got.alignment, torch.stack(slopes), rtol=1e-5, atol=1e-12)
    frozen = Opus.arm("paper", **options).utilities(batch, 3, state)
    torch.testing.assert_close(got.gram, frozen.gram, rtol=0, atol=0)
    with pytest.raises(ValueError, match="needs estimator='exact'"):
        Opus.arm("paper", preconditioner="adjoint")


def test_released_arm_shifts_labels_twice_and_scales_layers(model):
    state, batch = state_of(model), tokens(6, 12)
    u, g, p = dense(state, batch, 12, label_shift=2)
    got = Opus.arm("released", window=12, estimator="exact").utilities(batch, 3, state)
    s = {k: 1 / math.sqrt(u[k][0].numel()) for k in u}
    eta = 1e-3
    want = sum(eta * s[k] * (u[k] * g[k]).sum((1, 2)) - eta**2 * s[k] ** 2 * (u[k] * u[k][4]).sum((1, 2)) for k in u)
    torch.testing.assert_close(got.marginal([4]), want, rtol=1e-10, atol=1e-18)
    assert not torch.allclose(want, dense_alignment(state, batch))


def dense_alignment(state, batch):
    u, g, p = dense(state, batch, 12)
    return sum((u[k] * g[k]).sum((1, 2)) for k in u)


def test_calibrated_arm_is_the_alignment_over_all_matrices_and_no_redundancy(model):
    state, batch = state_of(model), tokens(6, 12)
    u, g, _ = dense(state, batch, 12, layers="matrices")
    got = Opus.arm("calibrated", window=12).utilities(batch, 3, state)
    alignment = sum((u[k] * g[k]).sum((1, 2)) for k in u)
    assert set(u) == {k for k, _ in model.named_parameters()}
    torch.testing.assert_close(got.alignment, alignment, rtol=1e-10, atol=1e-16)
    assert got.gram is None and torch.equal(got.marginal([1, 2]), got.alignment)


def test_measured_redundancy_is_the_second_order_term_of_a_step_on_the_mean_update(model):
    """After a step on the mean of ``size`` updates the loss has the term h |mean u|^2 / 2."""
    optimizers = optimizers_for(model, "adamw")
    for seed in range(20):  # a random model bends either way; take a proxy along which it bends up
        state, batch = TrainState(model, optimizers, 3, tokens(4, 12, seed=seed)), tokens(6, 12)
        u, _, _ = dense(state, batch, 12, layers="matrices")
        h = curvature(model, state.proxy, {k: x.mean(0) for k, x in u.items()})
        if h > 0:
            break
    got = Opus.arm("calibrated", window=12, redundancy="measured").utilities(batch, 3, state)
    assert h > 0 and got.redundancy_weight == pytest.approx(h / 3, rel=1e-9)
    want = got.alignment - h / 3 * sum((u[k] * u[k][[1, 4]].sum(0)).sum((1, 2)) for k in u)
    torch.testing.assert_close(got.marginal([1, 4]), want, rtol=1e-9, atol=1e-16)
    number = Opus.arm("calibrated", window=12, redundancy=0.5).utilities(batch, 3, state)
    want = got.alignment - 0.5 * sum((u[k] * u[k][1]).sum((1, 2)) for k in u)
    torch.testing.assert_close(number.marginal([1]), want, rtol=1e-10, atol=1e-16)


def test_a_proxy_gradient_serves_its_steps_under_the_live_preconditioner(model):
    state, batch = state_of(model, step=0), tokens(6, 12)
    opus = Opus.arm("calibrated", window=12, proxy_every=4)
    first = opus.utilities(batch, 3, state).alignment
    other = TrainState(model, state.optimizers, 3, tokens(4, 12, seed=77))
    assert torch.equal(opus.utilities(batch, 3, other).alignment, first)
    resumed = Opus.arm("calibrated", window=12, proxy_every=4)
    resumed.load_state_dict(opus.state_dict())
    assert torch.equal(resumed.utilities(batch, 3, other).alignment, first)
    state.optimizers[0].param_groups[0]["lr"] *= 2
    torch.testing.assert_close(opus.utilities(batch, 3, other).alignment, 2 * first, rtol=1e-12, atol=0)
    refreshed = TrainState(model, state.optimizers, 4, other.proxy)
    assert not torch.allclose(opus.utilities(batch, 3, refreshed).alignment, 2 * first)


def test_curvature_is_measured_on_its_schedule_and_travels_in_the_state(model):
    state, batch = state_of(model, step=0), tokens(4, 12)
    opus = Opus.arm("calibrated", window=12, redundancy="measured", curvature_every=5)
    opus._curvature = 123.0
    opus.utilities(batch, 2, TrainState(model, state.optimizers, 4, state.proxy))
    assert opus.state_dict()["curvature"] == 123.0
    opus.utilities(batch, 2, TrainState(model, state.optimizers, 5, state.proxy))
    assert opus.state_dict()["curvature"] != 123.0
    other = Opus.arm("calibrated", window=12, redundancy="measured")
    other.load_state_dict(opus.state_dict())
    assert other.state_dict()["curvature"] == opus.state_dict()["curvature"]


def fingerprint(model, optimizers):
    return copy.deepcopy({
        "parameters": {k: p.detach() for k, p in model.named_parameters()},
        "grads": {k: p.grad for k, p in model.named_parameters()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "optimizers": [o.state_dict() for o in optimizers],
        "training": [m.training for m in model.modules()],
        "types": [type(m).__name__ for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()],
        "torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state(),
        "grad_mode": torch.is_grad_enabled(),
    })


def same(a, b):
    """Equal to the last bit, whatever the nesting."""
    if isinstance(a, (torch.Tensor, np.ndarray)):
        return a.shape == b.shape and a.dtype == b.dtype and bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("arm", [*ARMS, "adjoint"])
@pytest.mark.parametrize("kind", ["sgd", "adamw", "muon"])
def test_scoring_changes_nothing_but_its_generator(model, arm, kind):
    state, batch = state_of(model, kind), tokens(6, 12)
    model.train()
    model.blocks[1].eval()
    model(input_ids=batch, labels=batch).loss.backward()  # gradients in accumulation
    before = fingerprint(model, state.optimizers)
    options = {"preconditioner": "adjoint", "estimator": "exact"} if arm == "adjoint" else {}
    opus = Opus.arm("paper" if options else arm, window=12, sketch_width=64, **options)
    generator = torch.Generator().manual_seed(0)
    selection = opus.select(batch, 3, state, generator)
    after = fingerprint(model, state.optimizers)
    for key in before:
        assert same(after[key], before[key]), key
    assert len(set(selection.indices.tolist())) == 3 and len(selection.utilities) == 6
    again = opus.select(batch, 3, state, torch.Generator().manual_seed(0))
    assert torch.equal(again.indices, selection.indices)


def test_dropout_of_a_model_in_training_does_not_touch_the_scores():
    torch.manual_seed(0)
    model = perturbed(small_hf_gpt2())
    state, batch = state_of(model, "sgd"), tokens(6, 12)
    opus = Opus.arm("calibrated", window=12, redundancy=0.0)
    model.eval()
    want = opus.utilities(batch, 3, state).alignment
    model.train()
    assert torch.equal(opus.utilities(batch, 3, state).alignment, want)


def test_the_papers_temperature_on_raw_utilities_is_uniform_and_ours_is_not(model):
    state, batch = state_of(model), tokens(8, 12)
    paper, ours = (Opus.arm(a, window=12).select(batch, 4, state, torch.Generator().manual_seed(0)).diagnostics
                   for a in ("paper", "calibrated"))
    assert paper["effective_sample_size"] > 0.999 and paper["total_variation"] < 0.01
    assert ours["effective_sample_size"] < 0.5 and ours["total_variation"] > 0.2


@pytest.mark.parametrize("options,words", [
    ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
    ({"window": 1}, "window must exceed 1 tokens, got 1"),
    ({"proxy_every": 0}, "proxy_every must be at least 1 step, got 0"),
    ({"sketch_width": 0}, "sketch_width must be at least 1, got 0"),
    ({"redundancy": "none"}, "redundancy must be 'paper', 'measured' or a number, got 'none'"),
    ({"sampling": "best"}, "sampling must be boltzmann, greedy or top_k, got 'best'"),
    ({"estimator": "guess"}, "estimator must be exact, sketch or forward, got 'guess'"),
])
def test_a_bad_knob_is_refused_when_the_selector_is_built(options, words):
    with pytest.raises(ValueError, match=words):
        Opus.arm("paper", **options)


def test_an_unknown_arm_and_a_missing_proxy_are_refused(model):
    with pytest.raises(ValueError, match="unknown arm 'best'; known: paper, released, calibrated"):
        Opus.arm("best")
    state = TrainState(model, optimizers_for(model, "sgd"), 0, None)
    with pytest.raises(ValueError, match="needs a proxy batch"):
        Opus.arm("paper", window=12).select(tokens(4, 12), 2, state, torch.Generator())


def test_zero_scores_are_an_error_not_a_uniform_draw(model):
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1), 0, tokens(2, 12))
    with pytest.raises(ValueError, match="exactly zero"):
        Opus.arm("calibrated", window=12, redundancy=0.0).select(tokens(4, 12), 2, state, torch.Generator())
