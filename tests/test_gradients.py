"""Factored gradients equal torch.func's, one sample at a time, in float64."""

import pytest
import torch

from opus_bench.ghost import contract, ghost_inner_product, row_chunks, row_slice, rows
from opus_bench.gradients import (capture, curvature, exact_per_sample_grads, layer_names,
                                  mean_gradient, parameter_names, sample_losses)

from small_models import perturbed, small_hf_gpt2, small_paper_gpt2, tokens

EXACT = dict(rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("build,layers", [(small_paper_gpt2, "all"), (small_hf_gpt2, "matrices")])
@pytest.mark.parametrize("n,t", [(3, 9), (1, 4)])
@pytest.mark.parametrize("label_shift", [1, 2])
def test_factors_equal_autograd_for_every_kind_of_layer(build, layers, n, t, label_shift):
    torch.manual_seed(0)
    model = perturbed(build())
    names = layer_names(model, layers)
    batch = tokens(n, t)
    want = exact_per_sample_grads(model, batch, names, label_shift)
    got = capture(model, batch, names, label_shift)
    assert set(got) == set(want) and len(want) >= 13
    for name in want:
        assert want[name].abs().max() > 0
        torch.testing.assert_close(rows(got[name], 0, got[name].shape[0]), want[name], **EXACT)


def test_the_oracle_is_the_gradient_of_the_loss_by_plain_backward(model):
    batch, names = tokens(3, 8), layer_names(model, "all")
    want = exact_per_sample_grads(model, batch, names)
    for n in range(3):
        model.zero_grad()
        model(input_ids=batch[n : n + 1], labels=batch[n : n + 1]).loss.backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(want[name][n], p.grad, **EXACT)


def test_mean_gradient_is_the_mean_of_per_sample_gradients(model):
    batch, names = tokens(4, 8), layer_names(model, "all")
    got, loss = mean_gradient(model, batch, names)
    assert loss.item() == pytest.approx(sample_losses(model, batch).mean().item(), rel=1e-14)
    for name, g in exact_per_sample_grads(model, batch, names).items():
        torch.testing.assert_close(got[name], g.mean(0), **EXACT)


def test_ghost_contraction_and_chunks_equal_dense_algebra(model):
    names = layer_names(model, "all")
    x, y = capture(model, tokens(3, 9), names), capture(model, tokens(2, 6, seed=5), names)
    for name, gradient in x.items():
        dense, other = rows(gradient, 0, gradient.shape[0]), rows(y[name], 0, y[name].shape[0])
        matrix = torch.randn(gradient.shape, dtype=torch.float64)
        torch.testing.assert_close(contract(gradient, matrix), (dense * matrix).sum((1, 2)), **EXACT)
        chunks = torch.cat([part for _, part in row_chunks(gradient, elements=100)], 1)
        torch.testing.assert_close(chunks, dense, **EXACT)
        for start, stop in ((0, dense.shape[1]), (dense.shape[1] // 3, dense.shape[1] // 2 + 1)):
            part = row_slice(gradient, start, stop)
            torch.testing.assert_close(rows(part, 0, part.shape[0]), dense[:, start:stop], **EXACT)
            torch.testing.assert_close(contract(part, matrix[start:stop]),
                                       (dense * matrix)[:, start:stop].sum((1, 2)), **EXACT)
        if len(gradient.uses) == 1:
            got = ghost_inner_product(gradient.uses[0], y[name].uses[0])
            torch.testing.assert_close(got, torch.einsum("noi,moi->nm", dense, other), **EXACT)


def test_factors_do_not_depend_on_how_the_batch_is_split(model):
    names, batch = layer_names(model, "all"), tokens(5, 8)
    whole = capture(model, batch, names)
    parts = [capture(model, part, names) for part in batch.split(2)]
    for name, gradient in whole.items():
        split = torch.cat([rows(part[name], 0, gradient.shape[0]) for part in parts])
        torch.testing.assert_close(split, rows(gradient, 0, gradient.shape[0]), **EXACT)


def test_curvature_equals_the_second_difference_of_the_loss(model):
    batch, names = tokens(3, 8), layer_names(model, "all")
    named = dict(model.named_parameters())
    direction = {k: torch.randn(named[k].shape, dtype=torch.float64) for k in named}
    norm = sum((d**2).sum() for d in direction.values())
    got = curvature(model, batch, direction)

    def slope(step):
        with torch.no_grad():
            for k, p in named.items():
                p += step * direction[k]
        grad, _ = mean_gradient(model, batch, names)
        with torch.no_grad():
            for k, p in named.items():
                p -= step * direction[k]
        return sum((grad[k] * direction[k]).sum() for k in grad)

    # central difference: error of order step^2 (1e-10) and round-off / step (1e-11)
    want = (slope(1e-5) - slope(-1e-5)) / 2e-5 / norm
    assert got == pytest.approx(want.item(), rel=1e-6)


def test_what_cannot_be_scored_is_refused_by_name(model):
    with pytest.raises(ValueError, match="no layer named 'blocks.7.up'"):
        layer_names(model, ["blocks.7.up"])
    with pytest.raises(ValueError, match="'blocks.0' is a Block"):
        layer_names(model, ["blocks.0"])
    model.gain = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="cannot score gain"):
        layer_names(model, "all")
    with pytest.raises(ValueError, match="compiled"):
        capture(torch.compile(model), tokens(2, 8), layer_names(model))
    inner = small_paper_gpt2()
    inner.blocks[0].compile()
    with pytest.raises(ValueError, match="compiled"):
        layer_names(inner)
    model.extra = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match="'extra'.*not called"):
        capture(model, tokens(2, 8), ["blocks.0.up", "extra"])


def test_default_layers_are_the_blocks_and_tied_weights_count_once(model):
    assert layer_names(model) == [f"blocks.{b}.{k}" for b in range(2) for k in
                                  ("attention.q", "attention.k", "attention.v", "attention.out", "up", "down")]
    assert len(parameter_names(model, layer_names(model, "all"))) == len(list(model.parameters()))
