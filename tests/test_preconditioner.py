"""P_t equals what one real torch.optim step does to a parameter, as far as that step is linear."""

import pytest
import torch

from opus_bench.gradients import PerSampleGradient, Factors, capture, layer_names, parameter_names
from opus_bench.ghost import rows
from opus_bench.preconditioner import preconditioners

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
    want = 0.1 * (1 - 0.9**2) * torch.tensor(
        [a + b * 0.6**2 + c * 0.6**4, a + b * 0.8**2 + c * 0.8**4, a], dtype=torch.float64
    )
    torch.testing.assert_close(p(torch.ones(3, 2, dtype=torch.float64)), want[:, None].expand(3, 2),
                               rtol=1e-10, atol=0)


def test_sgd_is_the_identity_and_no_state_is_a_multiple_of_it():
    w = torch.nn.Parameter(torch.randn(3, 2))
    g = torch.randn(3, 2)
    assert torch.equal(preconditioners(torch.optim.SGD([w], lr=0.5), {"w": w})["w"](g), g)
    fresh = preconditioners(torch.optim.AdamW([w], lr=0.5), {"w": w})["w"]
    torch.testing.assert_close(fresh(g), 0.5 * g)


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
    opt = torch.optim.Muon([w])
    w.grad = torch.ones_like(w)
    opt.step()
    ids = PerSampleGradient((2, 2), (Factors(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, 2)),))
    with pytest.raises(ValueError, match="embedding"):
        preconditioners(opt, {"w": w})["w"].on_left(ids)
