"""P_t equals what one real torch.optim step does to a parameter, as far as that step is linear."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from opus_bench.gradients import PerSampleGradient, Factors, capture, layer_names, parameter_names
from opus_bench.ghost import rows
from opus_bench.preconditioner import inner_flops, left_flops, muon_inner, muon_preconditioner, preconditioners

from small_models import optimizers_for, tokens


def test_adamw_step_with_the_second_moment_held_is_minus_p_times_the_gradient():
    """AdamW's step is -C_t m_t / (sqrt(v_hat_t) + eps): linear in g once v is held at t - 1.

    v is held by giving the real optimizer a gradient whose square leaves v_hat unchanged, namely
    +-sqrt(v_hat_{t-1}); for such gradients the real step minus the momentum's part is -P_t g.
    """
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    beta1, beta2, rate = 0.8, 0.95, 1e-2
    opt = torch.optim.AdamW([w], lr=rate, betas=(beta1, beta2), eps=1e-8, weight_decay=0.0)
    for _ in range(5):
        w.grad = torch.randn_like(w)
        opt.step()
    p = preconditioners(opt, {"w": w})["w"]
    state = opt.state[w]
    t = int(state["step"])
    g = torch.randn_like(w).sign() * (state["exp_avg_sq"] / (1 - beta2**t)).sqrt()
    momentum, before = state["exp_avg"].clone(), w.detach().clone()
    w.grad = g.clone()
    opt.step()
    alone = rate / (1 - beta1 ** (t + 1)) * beta1 * momentum / (g.abs() + 1e-8)
    torch.testing.assert_close(w.detach() - before + alone, -p(g), rtol=1e-10, atol=1e-14)


def test_muon_scale_and_polynomial_by_hand():
    """On a momentum with known singular vectors, S multiplies each by a + b s^2 + c s^4."""
    w = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    opt = torch.optim.Muon([w], lr=0.1, momentum=0.9, weight_decay=0.0)
    w.grad = torch.ones_like(w)
    opt.step()
    opt.state[w]["momentum_buffer"].copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]))
    p = preconditioners(opt, {"w": w})["w"]
    a, b, c = 3.4445, -4.7750, 2.0315
    want = 0.1 * 1.5**0.5 * (1 - 0.9**2) * torch.tensor(
        [a + b * 0.6**2 + c * 0.6**4, a + b * 0.8**2 + c * 0.8**4, a], dtype=torch.float64
    )
    torch.testing.assert_close(p(torch.ones(3, 2, dtype=torch.float64)), want[:, None].expand(3, 2),
                               rtol=1e-10, atol=0)


GROUPS = [  # two groups of one optimizer
    (dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-8, weight_decay=0.0),
     dict(lr=3e-3, betas=(0.9, 0.999), eps=1e-3, weight_decay=0.1)),
    (dict(lr=1e-2, betas=(0.0, 0.5), weight_decay=0.3), dict(lr=0.5, eps=1e-2)),
]


@pytest.mark.parametrize("way", [{}, {"foreach": True}, {"fused": True}, {"foreach": False}])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_one_real_adamw_step_is_minus_p_g_in_every_group(way, groups, steps):
    """With m = 0 and v such that g leaves v_hat as it is, the real step is linear in g: the whole of it.

    v_hat_t = (beta2 v + (1 - beta2) g^2) / (1 - beta2^t) equals v / (1 - beta2^(t - 1)) for g^2 = v_hat.
    """
    torch.manual_seed(steps)
    w, b = (torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in [(4, 3), (5,)])
    opt = torch.optim.AdamW([{"params": [p], **group} for p, group in zip((w, b), groups)], **way)
    for _ in range(steps):
        w.grad, b.grad = torch.randn_like(w), torch.randn_like(b)
        opt.step()
    for p, group in zip((w, b), opt.param_groups):
        p.grad = torch.randn_like(p)
        opt.state[p]["exp_avg"].zero_()
        opt.state[p]["exp_avg_sq"].copy_(p.grad**2 * (1 - group["betas"][1] ** steps))
    found = preconditioners(opt, {"w": w, "b": b})
    decayed = {p: p.detach() * (1 - g["lr"] * g["weight_decay"]) for p, g in zip((w, b), opt.param_groups)}
    opt.step()
    for name, p in {"w": w, "b": b}.items():
        change = (p.detach() - decayed[p]).view(len(p), -1)
        # the weights' rounding, relative to a change that is smaller than they are
        torch.testing.assert_close(change, -found[name](p.grad.view(len(p), -1)), rtol=1e-10, atol=1e-14)
    assert [found[k].learning_rate for k in "wb"] == [float(g["lr"]) for g in opt.param_groups]


def test_adams_coupled_decay_is_an_offset_of_the_gradient():
    """Two candidates' real steps differ by P_t of their difference, decay or none, once v is held."""
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    # eps so large that sqrt(v) is a millionth beside it
    opt = torch.optim.Adam([w], lr=torch.tensor(0.1, dtype=torch.float64), eps=1e6, weight_decay=0.5)
    w.grad = torch.randn_like(w)
    opt.step()
    p = preconditioners(opt, {"w": w})["w"]
    start, state, ends = w.detach().clone(), copy.deepcopy(opt.state_dict()), []
    x, y = torch.randn(2, 4, 3, dtype=torch.float64)
    for g in (x, y):
        w.data.copy_(start)
        opt.load_state_dict(copy.deepcopy(state))
        w.grad = g
        opt.step()
        ends.append(w.detach().clone())
    torch.testing.assert_close(ends[1] - ends[0], p(x - y), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust,factor", [(None, {(4, 3): (4 / 3) ** 0.5, (2, 6): 1.0}),
                                           ("original", {(4, 3): (4 / 3) ** 0.5, (2, 6): 1.0}),
                                           ("match_rms_adamw", {(4, 3): 0.2 * 2, (2, 6): 0.2 * 6**0.5})])
def test_muons_scale_is_of_its_group_shape_and_momentum(adjust, factor, nesterov):
    """eta' (1 - mu^2), or eta' (1 - mu) without Nesterov, by hand; eta itself for the utility."""
    weights = {shape: torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in factor}
    rates, moments = {(4, 3): 0.1, (2, 6): 0.3}, {(4, 3): 0.9, (2, 6): 0.5}
    opt = torch.optim.Muon([{"params": [w], "lr": rates[k], "momentum": moments[k]} for k, w in weights.items()],
                           adjust_lr_fn=adjust, nesterov=nesterov)
    named = {str(shape): w for shape, w in weights.items()}
    fresh = preconditioners(opt, named)
    for w in weights.values():
        w.grad = torch.randn_like(w)
    opt.step()
    live = preconditioners(opt, named)
    for shape in factor:
        share = 1 - moments[shape] ** (2 if nesterov else 1)
        assert fresh[str(shape)].scale == pytest.approx(rates[shape] * factor[shape], rel=1e-12)
        assert live[str(shape)].scale == pytest.approx(rates[shape] * factor[shape] * share, rel=1e-12)
        assert fresh[str(shape)].learning_rate == live[str(shape)].learning_rate == rates[shape]


@pytest.mark.parametrize("nesterov", [True, False])
def test_muons_scale_is_what_a_real_step_makes_of_a_gradient(nesterov, monkeypatch):
    """A real step with S made the identity: ns_steps = 1, a = 1, b = c = 0, and the norm divided out."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.zeros(5, 2, dtype=torch.float64))
    opt = torch.optim.Muon([w], lr=0.1, momentum=0.9, weight_decay=0.2, nesterov=nesterov, ns_steps=1,
                           ns_coefficients=(1.0, 0.0, 0.0))
    w.grad = torch.randn_like(w)
    opt.step()
    opt.state[w]["momentum_buffer"].zero_()
    p = preconditioners(opt, {"w": w})["w"]
    g = w.grad = torch.randn_like(w)
    norm = (1 - 0.9 ** (2 if nesterov else 1)) * g.norm()  # of the direction that is normalised
    before = w.detach() * (1 - 0.1 * 0.2)
    opt.step()
    torch.testing.assert_close((before - w.detach()) * norm, p(g), rtol=1e-10, atol=1e-14)


SHAPES = [(7, 5), (5, 7), (6, 6), (9, 3), (1, 4), (4, 1), (33, 32)]
GROUP = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "ns_coefficients": (3.4445, -4.7750, 2.0315), "eps": 1e-7,
         "adjust_lr_fn": None}


@pytest.mark.parametrize("o,i", SHAPES)
def test_both_forms_of_muons_s_are_the_polynomial(o, i):
    """S = a I + b A + c A^2 by its definition, against the form that the shape decides, on columns, rows and I.

    Every product is of sums of at most max(o, i, 1) terms and of factors whose norms multiply to at most
    (a sqrt(o) + |b| + |c|) |x|, since |q|_F = 1; three in a row on either side.
    """
    torch.manual_seed(o)
    momentum, x = torch.randn(2, o, i, dtype=torch.float64)
    p = muon_preconditioner({"momentum_buffer": momentum}, GROUP, momentum.shape)
    (a, b, c), q = GROUP["ns_coefficients"], momentum / momentum.norm()
    outer = q @ q.T
    s = a * torch.eye(o, dtype=torch.float64) + b * outer + c * outer @ outer
    bound = 6 * max(o, i) * torch.finfo(torch.float64).eps * (a * o**0.5 + abs(b) + abs(c))
    assert p.left.inner.shape == (min(o, i),) * 2
    assert (p.left(x) - s @ x).norm() < bound * x.norm()
    assert (p.left.dense() - s).norm() < bound * o**0.5
    assert (p(x) - p.scale * (s @ x)).norm() < bound * p.scale * x.norm()
    several = torch.randn(2, 3, o, dtype=torch.float64)  # samples, positions
    (moved,) = p.on_left(PerSampleGradient((o, i), (Factors(several, several),))).uses
    assert (moved.left - several @ s).norm() < bound * several.norm()
    again = muon_preconditioner({"momentum_buffer": momentum}, GROUP, momentum.shape, p.left.inner)
    assert torch.equal(again(x), p(x))


@pytest.mark.parametrize("o,i", SHAPES)
def test_muons_flops_are_those_of_torchs_counter(o, i):
    momentum, x = torch.randn(2, o, i)
    with FlopCounterMode(display=False) as made:
        inner = muon_inner(momentum, GROUP)
    p = muon_preconditioner({"momentum_buffer": momentum}, GROUP, momentum.shape, inner)
    with FlopCounterMode(display=False) as applied:
        p(x)
    with FlopCounterMode(display=False) as left:
        p.on_left(PerSampleGradient((o, i), (Factors(torch.randn(2, 3, o), torch.randn(2, 3, i)),)))
    assert made.get_total_flops() == inner_flops(o, i)
    assert applied.get_total_flops() == left_flops(o, i, i)
    assert left.get_total_flops() == left_flops(o, i, 2 * 3)
    want = 6 * o * i**2 + 2 * i**3 if o > i else 4 * o**2 * i + 2 * o**3
    assert made.get_total_flops() + applied.get_total_flops() == want
    dense = 4 * o**2 * i + 2 * o**3  # S formed, then one product
    assert want <= dense or o / i < 1.2


@pytest.mark.parametrize("shape", [(4, 3), (3, 4)])
def test_muons_products_are_at_least_float32(shape):
    momentum, x = torch.randn(2, *shape, dtype=torch.bfloat16)
    p = muon_preconditioner({"momentum_buffer": momentum}, GROUP, shape)
    want = muon_preconditioner({"momentum_buffer": momentum.float()}, GROUP, shape)
    assert p(x).dtype == torch.float32 and torch.equal(p(x), want(x.float()))


def test_adamws_numbers_are_bit_for_bit_the_stated_operations():
    """The order of operations is part of every run's record."""
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(4, 3))
    opt = torch.optim.AdamW([w], lr=1e-3, betas=(0.8, 0.95), eps=1e-8)
    for _ in range(3):
        w.grad = torch.randn_like(w)
        opt.step()
    p = preconditioners(opt, {"w": w})["w"]
    assert p.scale == 1e-3 * (1 - 0.8) / (1 - 0.8**4)
    assert torch.equal(p.diagonal, 1 / ((opt.state[w]["exp_avg_sq"] / (1 - 0.95**3)).sqrt() + 1e-8))


def test_sgd_is_the_identity_and_no_state_is_a_multiple_of_it():
    w = torch.nn.Parameter(torch.randn(3, 2))
    g = torch.randn(3, 2)
    assert torch.equal(preconditioners(torch.optim.SGD([w], lr=0.5), {"w": w})["w"](g), g)
    fresh = preconditioners(torch.optim.AdamW([w], lr=0.5), {"w": w})["w"]
    torch.testing.assert_close(fresh(g), 0.5 * g)


def test_a_state_before_its_first_step_is_no_state():
    """Loaders make such states: zeros with step = 0, whose v_hat would be 0 / 0."""
    w = torch.nn.Parameter(torch.randn(3, 2))
    opt = torch.optim.AdamW([w], lr=0.5)
    opt.state[w] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(w), "exp_avg_sq": torch.zeros_like(w)}
    g = torch.randn(3, 2)
    assert torch.equal(preconditioners(opt, {"w": w})["w"](g), 0.5 * g)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "muon"])
def test_p_is_linear_symmetric_and_agrees_between_dense_and_factored_form(model, kind):
    optimizers = optimizers_for(model, kind)
    names = layer_names(model)
    for name, gradient in capture(model, tokens(3, 9), names).items():
        p = preconditioners(optimizers, parameter_names(model, names))[name]
        dense = rows(gradient, 0, gradient.shape[0])
        x, y = torch.randn(2, *gradient.shape, dtype=torch.float64)
        assert (p(x) * y).sum().item() == pytest.approx((x * p(y)).sum().item(), rel=1e-10)
        torch.testing.assert_close(p(x + 2 * y), p(x) + 2 * p(y), rtol=1e-10, atol=1e-14)
        moved = p.on_left(gradient)
        parts = [p.on_rows(rows(moved, r, r + 1), r) for r in range(gradient.shape[0])]
        torch.testing.assert_close(torch.cat(parts, 1), p(dense), rtol=1e-10, atol=1e-16)


def test_what_has_no_preconditioner_is_refused_by_name():
    w = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="no preconditioner for RMSprop"):
        preconditioners(torch.optim.RMSprop([w]), {"w": w})
    with pytest.raises(ValueError, match="no optimizer owns w"):
        preconditioners(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), {"w": w})
    with pytest.raises(ValueError, match="amsgrad"):
        preconditioners(torch.optim.AdamW([w], amsgrad=True), {"w": w})
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        with pytest.raises(ValueError, match="group of w has maximize=True"):
            preconditioners(kind([w], maximize=True), {"w": w})
    opt = torch.optim.Muon([w])
    w.grad = torch.ones_like(w)
    opt.step()
    ids = PerSampleGradient((2, 2), (Factors(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, 2)),))
    with pytest.raises(ValueError, match="embedding"):
        preconditioners(opt, {"w": w})["w"].on_left(ids)
