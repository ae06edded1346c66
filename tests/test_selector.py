"""Opus: its arms compute what they say, and scoring changes nothing that it should not."""

import copy
import math
import random

import numpy as np
import pytest
import torch

from opus_bench.gradients import curvature, exact_per_sample_grads, layer_names, parameter_names
from opus_bench.preconditioner import preconditioners
from opus_bench.selector import ARMS, Opus, TrainState
from small_models import optimizers_for, perturbed, small_hf_gpt2, tokens


def state_of(model, kind="adamw", step=3):
    return TrainState(model, optimizers_for(model, kind), step, tokens(4, 12, seed=9))


def dense(state, batch, window, label_shift=1):
    names = layer_names(state.model)
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


def test_calibrated_arm_is_alignment_minus_measured_curvature(model):
    state, batch = state_of(model), tokens(6, 12)
    u, g, _ = dense(state, batch, 12)
    opus = Opus.arm("calibrated", window=12)
    got = opus.utilities(batch, 3, state)
    h = max(0.0, curvature(model, state.proxy, {k: x.mean(0) for k, x in u.items()}))
    alignment = sum((u[k] * g[k]).sum((1, 2)) for k in u)
    torch.testing.assert_close(got.alignment, alignment, rtol=1e-10, atol=1e-16)
    assert got.redundancy_weight == pytest.approx(h / 3, rel=1e-9)
    number = Opus.arm("calibrated", window=12, redundancy=0.5).utilities(batch, 3, state)
    want = alignment - 0.5 * sum((u[k] * u[k][1]).sum((1, 2)) for k in u)
    torch.testing.assert_close(number.marginal([1]), want, rtol=1e-10, atol=1e-16)


def test_curvature_is_measured_on_its_schedule_and_travels_in_the_state(model):
    state, batch = state_of(model, step=0), tokens(4, 12)
    opus = Opus.arm("calibrated", window=12, curvature_every=5)
    opus._curvature = 123.0
    opus.utilities(batch, 2, TrainState(model, state.optimizers, 4, state.proxy))
    assert opus.state_dict() == {"curvature": 123.0}
    opus.utilities(batch, 2, TrainState(model, state.optimizers, 5, state.proxy))
    assert opus.state_dict()["curvature"] != 123.0
    other = Opus.arm("calibrated", window=12)
    other.load_state_dict(opus.state_dict())
    assert other.state_dict() == opus.state_dict()


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


@pytest.mark.parametrize("arm", list(ARMS))
@pytest.mark.parametrize("kind", ["sgd", "adamw", "muon"])
def test_scoring_changes_nothing_but_its_generator(model, arm, kind):
    state, batch = state_of(model, kind), tokens(6, 12)
    model.train()
    model.blocks[1].eval()
    model(input_ids=batch, labels=batch).loss.backward()  # gradients in accumulation
    before = fingerprint(model, state.optimizers)
    opus = Opus.arm(arm, window=12, sketch_width=64)
    generator = torch.Generator().manual_seed(0)
    selection = opus.select(batch, 3, state, generator)
    after = fingerprint(model, state.optimizers)
    for key in before:
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=0) if key in ("parameters", "grads") else None
        assert str(after[key]) == str(before[key]), key
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
    ({"sketch_width": 0}, "sketch_width must be at least 1, got 0"),
    ({"redundancy": "none"}, "redundancy must be 'paper', 'measured' or a number, got 'none'"),
    ({"sampling": "best"}, "sampling must be boltzmann, greedy or top_k, got 'best'"),
    ({"estimator": "guess"}, "estimator must be exact or sketch, got 'guess'"),
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
