"""Phi equals the real optimizer's step, and V its derivative, taken from the real step by differences."""

import copy

import pytest
import torch
from small_models import optimizers_for, tokens

from opus_bench.gradients import layer_names, mean_gradient, parameter_names
from opus_bench.optimizer_map import adjoint, muon_update, newton_schulz, step_map

WIDE, TALL, VECTOR = (3, 5), (5, 3), (4,)
KINDS = [
    ("SGD", dict(lr=0.1)),
    ("SGD", dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)),
    ("SGD", dict(lr=0.1, momentum=0.9, dampening=0.3)),
    ("Adam", dict(lr=0.1, weight_decay=0.1)),
    ("Adam", dict(lr=0.1, foreach=True)),
    ("AdamW", dict(lr=0.1, betas=(0.8, 0.95), weight_decay=0.1, fused=True)),
    ("AdamW", dict(lr=torch.tensor(0.1, dtype=torch.float64), amsgrad=True)),
    ("NAdam", dict(lr=0.1, decoupled_weight_decay=True, weight_decay=0.1)),
    ("RAdam", dict(lr=0.1, betas=(0.9, 0.7))),
    ("RMSprop", dict(lr=0.1, momentum=0.5)),
    ("RMSprop", dict(lr=0.1, alpha=0.7, centered=True)),
    ("Adagrad", dict(lr=0.1, lr_decay=0.1)),
    ("Adamax", dict(lr=0.1)),
    ("Adadelta", dict(lr=0.1)),
    ("ASGD", dict(lr=0.1, lambd=0.01)),
    ("Muon", dict(lr=0.1, weight_decay=0.1)),
    ("Muon", dict(lr=0.1, nesterov=False, momentum=0.8)),
    ("Muon", dict(lr=0.1, adjust_lr_fn="match_rms_adamw", ns_steps=3, ns_coefficients=(2.0, -1.5, 0.5))),
]
CASES = [(kind, options, shape, steps) for kind, options in KINDS
         for shape, steps in [(WIDE, 0), (WIDE, 1), (TALL, 6), *([] if kind == "Muon" else [(VECTOR, 6)])]]


@pytest.fixture
def float64(monkeypatch):
    """Counters of the real optimizers in float64 (NAdam, ASGD keep rates in them), Muon not in bfloat16."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def live(kind, options, shape, steps, dtype=torch.float64):
    """A parameter with its optimizer after some real steps, and a gradient for the next."""
    torch.manual_seed(steps)
    w = torch.nn.Parameter(torch.randn(shape, dtype=dtype))
    optimizer = getattr(torch.optim, kind)([w], **options)
    for _ in range(steps):
        w.grad = torch.randn_like(w)
        optimizer.step()
    w.grad = None
    return w, optimizer, torch.randn_like(w)


def real_step(w, optimizer, gradient):
    """What the real step subtracts."""
    w, optimizer = copy.deepcopy((w, optimizer))
    before = w.detach().clone()
    w.grad = gradient.clone()
    optimizer.step()
    return before - w.detach()


def matrix(x):
    return x if x.ndim == 2 else x[:, None]


@pytest.mark.parametrize("kind,options,shape,steps", CASES)
def test_phi_is_the_real_step(float64, kind, options, shape, steps):
    w, optimizer, g = live(kind, options, shape, steps)
    got = step_map(optimizer, {"w": w}, {"w": matrix(g)})["w"]
    torch.testing.assert_close(got, matrix(real_step(w, optimizer, g)), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind,options,shape,steps", CASES)
def test_v_is_the_derivative_of_the_real_step(float64, kind, options, shape, steps):
    """<d, V> against central differences D of <Phi, y> along d.

    D(h) errs by c h^2 + O(h^4), so D(h / 2) by a third of D(h) - D(h / 2), and by rounding of the
    weights over h; ten times the second.
    """
    w, optimizer, g = live(kind, options, shape, steps)
    y, d = torch.randn(2, *shape, dtype=torch.float64)
    v = adjoint(optimizer, {"w": w}, {"w": matrix(g)}, {"w": matrix(y)})["w"]

    def difference(h):
        return sum(sign * (real_step(w, optimizer, g + sign * h * d) * y).sum() for sign in (1, -1)) / (2 * h)

    h = 1e-4
    coarse, fine = difference(h), difference(h / 2)
    rounding = 10 * torch.finfo(torch.float64).eps * (w.abs() * y.abs()).sum() / h
    tolerance = (coarse - fine).abs() + rounding
    assert v.shape == matrix(w).shape
    assert tolerance < 1e-3 * matrix(v).norm() * d.norm() or tolerance < 1e-8  # Adam's first step is flat
    assert ((v * matrix(d)).sum() - fine).abs() < tolerance


def test_v_of_adamw_by_hand():
    """d/dg of C (b1 m + (1 - b1) g) / (sqrt(v') + eps), both terms, with the counters of float32."""
    w, optimizer, g = live("AdamW", dict(lr=0.1, betas=(0.8, 0.95), eps=1e-3), WIDE, 3)
    m, v = (optimizer.state[w][k] for k in ("exp_avg", "exp_avg_sq"))
    rate, correction = 0.1 / (1 - 0.8**4), 1 - 0.95**4
    root = ((0.95 * v + 0.05 * g**2) / correction).sqrt()
    bottom = root + 1e-3
    want = rate * (0.2 / bottom - (0.8 * m + 0.2 * g) * (0.05 * g / correction / root) / bottom**2)
    y = torch.randn_like(g)
    got = adjoint([optimizer], {"w": w}, {"w": g}, {"w": y})["w"]
    torch.testing.assert_close(got, want * y, rtol=1e-10, atol=0)


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_newton_schulz_maps_singular_values_and_its_jacobian_is_used(shape):
    """Each singular value s of x / |x| becomes a s + b s^3 + c s^5, five times over."""
    w, optimizer, g = live("Muon", dict(lr=0.1, momentum=0.9), shape, 3)
    a, b, c = (3.4445, -4.7750, 2.0315)
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(newton_schulz(g, (a, b, c), 5, 1e-7), u @ torch.diag(s) @ vt, rtol=1e-10, atol=1e-12)
    momentum = optimizer.state[w]["momentum_buffer"]
    jacobian = torch.autograd.functional.jacobian(lambda x: muon_update(x, momentum, optimizer.param_groups[0]), g)
    y = torch.randn_like(g)
    got = adjoint(optimizer, {"w": w}, {"w": g}, {"w": y})["w"]
    torch.testing.assert_close(got, torch.einsum("oi,oipq->pq", y, jacobian), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape,steps", [((32, 32), 0), ((32, 32), 5), ((64, 16), 5), ((16, 64), 5)])
def test_muons_bfloat16_step_is_within_bfloat16_of_phi(shape, steps):
    """The real step against Phi in float64 and float32: bfloat16 makes 1.4 to 1.7 %."""
    w, optimizer, g = live("Muon", dict(lr=0.1, weight_decay=0.0), shape, steps)
    phi = step_map(optimizer, {"w": w}, {"w": g})["w"]
    error = (real_step(w, optimizer, g) - phi).norm() / phi.norm()
    assert 1e-3 < error < 5 * torch.finfo(torch.bfloat16).eps  # one rounding a Newton-Schulz step
    w.data, optimizer.state[w] = w.data.float(), {k: v.float() for k, v in optimizer.state[w].items()}
    single = step_map(optimizer, {"w": w}, {"w": g})["w"]
    assert (single - phi).norm() / phi.norm() < 1e-5


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_v_predicts_how_the_proxy_loss_answers_to_more_of_a_sample(model, kind, float64):
    """d/dx of L(theta - Phi(g + x g_z)) is -<g_z, V> where y is the gradient after the step."""
    optimizers = optimizers_for(model, kind)
    names = layer_names(model, "matrices")
    batch, sample, proxy = tokens(4, 9), tokens(1, 9, seed=5), tokens(3, 9, seed=2)
    g, g_z = (mean_gradient(model, x, names)[0] for x in (batch, sample))

    def after(x):
        stepped, copies = copy.deepcopy((model, optimizers))
        for name, p in parameter_names(stepped, names).items():
            p.grad = g[name] + x * g_z[name]
        for optimizer in copies:
            optimizer.step()
        return mean_gradient(stepped, proxy, names)

    v = adjoint(optimizers, parameter_names(model, names), g, after(0.0)[0])
    want = -sum((g_z[name] * v[name]).sum() for name in v)
    h = 1e-3
    coarse, fine = ((after(x)[1] - after(-x)[1]) / (2 * x) for x in (h, h / 2))
    tolerance = (coarse - fine).abs() + 1e-15 / h
    assert tolerance < 1e-3 * want.abs() and (want - fine).abs() < tolerance


def test_rows_that_never_had_a_gradient_have_the_derivative_at_zero():
    """v = 0 and g = 0: C / eps for Adam; where underflow left a momentum, the mean of both sides; no NaN."""
    options = dict(lr=0.1, betas=(0.8, 0.95), eps=1e-3)
    w, optimizer, g = live("AdamW", options, TALL, 0)
    seen = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0], dtype=torch.float64)[:, None]
    for _ in range(3):
        w.grad = torch.randn_like(w) * seen
        optimizer.step()
    y = torch.randn_like(w)
    v = adjoint(optimizer, {"w": w}, {"w": g * seen}, {"w": y})["w"]
    slope = 0.1 * 0.2 / (1 - 0.8**4) / 1e-3
    torch.testing.assert_close(v[2:4], slope * y[2:4], rtol=1e-10, atol=0)
    torch.testing.assert_close(v[:2], adjoint(optimizer, {"w": w}, {"w": g}, {"w": y})["w"][:2], rtol=0, atol=0)
    optimizer.state[w]["exp_avg"][2] = 1e-6  # as after v has underflowed
    h = 1e-7 * torch.ones_like(g)
    ends = [real_step(w, optimizer, g * seen + sign * h)[2] for sign in (1, -1)]
    v = adjoint(optimizer, {"w": w}, {"w": g * seen}, {"w": y})["w"]
    torch.testing.assert_close(v[2], (ends[0] - ends[1]) / 2e-7 * y[2], rtol=1e-3, atol=0)
    torch.testing.assert_close(v[2], slope * y[2], rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind,options", KINDS)
def test_no_gradient_at_all_is_finite(kind, options):
    """The first step with g = 0: the worst case of every square root."""
    w, optimizer, g = live(kind, options, WIDE, 0)
    v = adjoint(optimizer, {"w": w}, {"w": torch.zeros_like(g)}, {"w": g})["w"]
    assert torch.isfinite(v).all() and v.any()


def test_adams_first_step_is_flat():
    """g / (|g| + eps) has slope eps / (|g| + eps)^2."""
    w, optimizer, g = live("AdamW", dict(lr=0.1, eps=1e-8), WIDE, 0)
    v = adjoint(optimizer, {"w": w}, {"w": g}, {"w": torch.ones_like(g)})["w"]
    torch.testing.assert_close(v, 0.1 * 1e-8 / (g.abs() + 1e-8) ** 2, rtol=1e-6, atol=0)


def snapshot(model, optimizers):
    states = [(k, v.clone()) for o in optimizers for s in o.state.values() for k, v in s.items()]
    groups = [{k: v for k, v in g.items() if k != "params"} for o in optimizers for g in o.param_groups]
    return [p.detach().clone() for p in model.parameters()], states, copy.deepcopy(groups), torch.get_rng_state()


@pytest.mark.parametrize("kind", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("steps", [0, 2])
def test_nothing_is_changed_and_no_hook_is_called(model, kind, steps):
    optimizers = optimizers_for(model, kind, steps)
    calls = []
    for optimizer in optimizers:
        optimizer.register_step_post_hook(lambda *_: calls.append(1))
        torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps step
    calls.clear()
    names = layer_names(model, "matrices")
    parameters = parameter_names(model, names)
    g, _ = mean_gradient(model, tokens(2, 9), names)
    grads = {name: torch.randn_like(p) for name, p in parameters.items()}
    for name, p in parameters.items():
        p.grad = grads[name]
    copies = {name: x.clone() for name, x in grads.items()}
    before = snapshot(model, optimizers)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        v = adjoint(optimizers, parameters, g, g)
        step_map(optimizers, parameters, g)
    assert {name: x.dtype for name, x in v.items()} == dict.fromkeys(parameters, torch.float64)
    assert all(torch.equal(v[name], x) for name, x in adjoint(optimizers, parameters, g, g).items())
    after = snapshot(model, optimizers)
    for x, y in zip(before[0], after[0], strict=True):
        assert torch.equal(x, y)
    for (k, x), (name, y) in zip(before[1], after[1], strict=True):
        assert k == name and torch.equal(x, y) and x.dtype == y.dtype and not y.requires_grad
    assert before[2] == after[2] and torch.equal(before[3], after[3])
    assert all(p.grad is grads[name] and torch.equal(p.grad, copies[name]) for name, p in parameters.items())
    assert not calls and torch.get_default_dtype() == torch.float32 and all(not x.requires_grad for x in g.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind,options", [(k, o) for k, o in KINDS if "fused" not in o])
def test_half_precision_is_computed_in_float32(kind, options, dtype):
    """Against the same state in float64; a state kept in bfloat16 has lost what it has lost."""
    w, optimizer, g = live(kind, options, WIDE, 3, dtype)
    y = torch.randn(WIDE)
    got = adjoint(optimizer, {"w": w}, {"w": g}, {"w": y})["w"]
    wide, copied = copy.deepcopy((w, optimizer))
    wide.data = wide.data.double()
    for name, value in copied.state[wide].items():
        copied.state[wide][name] = value.double() if torch.is_tensor(value) and value.ndim else value
    want = adjoint(copied, {"w": wide}, {"w": g}, {"w": y})["w"]
    assert got.dtype == torch.float32 and want.dtype == torch.float64
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_autocast_of_the_caller_stays_outside():
    w, optimizer, g = live("Muon", dict(lr=0.1), TALL, 3, torch.float32)
    want = adjoint(optimizer, {"w": w}, {"w": g}, {"w": g})["w"]
    with torch.autocast("cpu", torch.bfloat16):
        got = adjoint(optimizer, {"w": w}, {"w": g}, {"w": g})["w"]
    assert torch.equal(got, want)


class Undifferentiable(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad)


def test_what_cannot_be_differentiated_is_refused_by_name():
    w = torch.nn.Parameter(torch.ones(2, 2))
    g = {"w": torch.ones(2, 2)}
    for kind, words in [("Rprop", "Rprop steps by the gradient's sign"), ("LBFGS", "LBFGS of w has no differ"),
                        ("SparseAdam", "SparseAdam of w"), ("Adafactor", "Adafactor of w")]:
        with pytest.raises(ValueError, match=words):
            adjoint(getattr(torch.optim, kind)([w]), {"w": w}, g, g)
    with pytest.raises(ValueError, match="the step of Undifferentiable for w"):
        adjoint(Undifferentiable([w]), {"w": w}, g, g)
    with pytest.raises(ValueError, match="group of w has maximize=True"):
        adjoint(torch.optim.AdamW([w], maximize=True), {"w": w}, g, g)
    sgd = torch.optim.SGD([w])
    with pytest.raises(ValueError, match="no optimizer owns v"):
        adjoint(sgd, {"v": torch.nn.Parameter(torch.zeros(1))}, g, g)
    with pytest.raises(ValueError, match=r"w has shape \(2, 2\), but was given nothing"):
        adjoint(sgd, {"w": w}, g, {})
    with pytest.raises(ValueError, match=r"given \(4, 1\)"):
        adjoint(sgd, {"w": w}, {"w": torch.ones(4, 1)}, g)
    with pytest.raises(FloatingPointError, match="step of AdamW for w is not finite; raise eps"):
        adjoint(torch.optim.AdamW([w], eps=0.0), {"w": w}, {"w": torch.zeros(2, 2)}, g)
