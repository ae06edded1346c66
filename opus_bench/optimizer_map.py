"""The optimizer's real step as a map of the gradient, and the adjoint of its derivative.

    Phi(g)  what the next step would subtract from one parameter whose gradient is g, with the
            optimizer's live state and settings: momentum, second moments, bias corrections,
            Newton-Schulz, weight decay
    J(g)    its derivative, a matrix over the parameter's elements, never formed
    V       J(g)^T y, one vector-Jacobian product

Adding a small multiple of a candidate's gradient g_z to the gradient g of the batch lowers a loss
whose gradient is y by that multiple of <J(g) g_z, y> = <g_z, V> to first order.  So V takes the
place of P_t g_proxy (preconditioner.py), which replaces J by a linear map that is simpler and wrong.

Phi is the optimizer's own ``step`` with differentiable=True on a clone of parameter and state; for
Muon, whose step torch cannot differentiate, it is written out here.  Everything is computed in the
parameter's dtype, at least float32 (torch.optim.Muon: Newton-Schulz in bfloat16).

What to know before using V:
- Adam's first step is g / (|g| + eps): flat where |g| >> eps, so V is nearly 0 before the second step.
- sqrt(v) has no derivative at 0.  Its slope there is taken to be 0, which makes V right where an
  element never had a gradient and has none now (embedding rows of tokens not seen yet): J = C_t / eps
  for Adam, finite but so steep that it holds only for candidates with |g_z| << eps.
- Gradient clipping is no part of Phi.  ``gradient`` is what the step would see.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim._muon import _adjust_lr
from torch.overrides import TorchFunctionMode

from .ghost import outside_autocast, wide
from .preconditioner import Owned, owners

Optimizers = torch.optim.Optimizer | Iterable[torch.optim.Optimizer]


@outside_autocast
def step_map(
    optimizers: Optimizers, parameters: dict[str, nn.Parameter], gradient: dict[str, Float[Tensor, "o i"]]
) -> dict[str, Float[Tensor, "o i"]]:
    """Phi(gradient) of every named parameter; 1-D parameters are (o, 1).

    Weight decay's share is in it, the same for every gradient.  What ``adjoint`` says of exactness,
    side effects and errors holds here too.  Cost: one step, and a clone of one parameter's state.
    """
    found = {}
    for name, one in owners(optimizers, parameters).items():
        update = _update_of(name, one)
        with torch.enable_grad():
            found[name] = _matrix(update(_like(name, gradient, one.parameter)).detach())
    return found


@outside_autocast
def adjoint(
    optimizers: Optimizers,
    parameters: dict[str, nn.Parameter],
    gradient: dict[str, Float[Tensor, "o i"]],
    cotangent: dict[str, Float[Tensor, "o i"]],
) -> dict[str, Float[Tensor, "o i"]]:
    """V = J_Phi(gradient)^T cotangent of every named parameter; 1-D parameters are (o, 1).

    Args:
        gradient: where Phi is differentiated: the gradient of the batch about to be trained on, or
            the candidates' mean.
        cotangent: the proxy's gradient.

    Exactness: exact up to rounding in the parameter's dtype (at least float32).
    Cost: one step and one backward through it, parameter by parameter; nothing per candidate.
        Memory: some ten times one parameter.
    Leaves parameters, ``.grad``, optimizer state and RNGs as they were; hooks of the optimizer are
    not called.

    Raises:
        ValueError: for an optimizer that autograd cannot follow, or whose step does not depend on
            the size of the gradient (Rprop); for maximize=True; for a parameter that no optimizer
            owns, or without a gradient or cotangent of its shape.
        FloatingPointError: for a V with NaN or infinite elements.
    """
    found = {}
    for name, one in owners(optimizers, parameters).items():
        update = _update_of(name, one)
        g, y = (_like(name, x, one.parameter) for x in (gradient, cotangent))
        g.requires_grad_()
        with torch.enable_grad():
            step = update(g)
            if not step.requires_grad:
                raise ValueError(f"the step of {type(one.optimizer).__name__} for {name} does not depend on "
                                 "the gradient in a way that autograd can follow")
            (v,) = torch.autograd.grad(step, g, y)
        if not torch.isfinite(v).all():
            raise FloatingPointError(f"the derivative of the step of {type(one.optimizer).__name__} for {name} is "
                                     "not finite; raise eps, or look for NaN in its gradient and state")
        found[name] = _matrix(v)
    return found


def muon_update(
    gradient: Float[Tensor, "o i"], momentum_buffer: Float[Tensor, "o i"], group: dict[str, Any]
) -> Float[Tensor, "o i"]:
    """What torch.optim.Muon's step subtracts, without weight decay, differentiable, in the dtype given.

        m' = mu m + (1 - mu) g;   x = (1 - mu) g + mu m' with Nesterov, else m'
        update = eta' newton_schulz(x),   eta' the rate adjusted to the shape
    """
    mu = group["momentum"]
    momentum = torch.lerp(momentum_buffer, gradient, 1 - mu)
    direction = torch.lerp(gradient, momentum, mu) if group["nesterov"] else momentum
    rate = _adjust_lr(float(group["lr"]), group["adjust_lr_fn"], gradient.shape)
    return rate * newton_schulz(direction, group["ns_coefficients"], group["ns_steps"], group["eps"])


def newton_schulz(
    x: Float[Tensor, "o i"], coefficients: tuple[float, float, float], steps: int, eps: float
) -> Float[Tensor, "o i"]:
    """``steps`` times X <- a X + (b A + c A^2) X with A = X X^T, from X = x / max(|x|_F, eps).

    A tall matrix is turned on its side, so that A is the smaller of the two.  Cost: O(steps o i min(o, i)).
    """
    a, b, c = coefficients
    tall = x.shape[0] > x.shape[1]
    x = x / x.norm().clamp(min=eps)
    if tall:
        x = x.T
    for _ in range(steps):
        outer = x @ x.T
        x = a * x + (b * outer + c * outer @ outer) @ x
    return x.T if tall else x


def _update_of(name: str, one: Owned) -> Callable[[Tensor], Tensor]:
    """Phi of one parameter, differentiable in its argument of the parameter's shape."""
    kind = type(one.optimizer).__name__
    if isinstance(one.optimizer, torch.optim.Muon):
        return lambda gradient: _muon_step(one, gradient)
    if isinstance(one.optimizer, torch.optim.Rprop):
        raise ValueError(f"{kind} steps by the gradient's sign alone, so the derivative of its step is 0 for {name}")
    if "differentiable" not in one.group:
        raise ValueError(f"{kind} of {name} has no differentiable step; those of torch.optim with the option "
                         "differentiable, and Muon, are known")
    return lambda gradient: _real_step(one, gradient)


def _muon_step(one: Owned, gradient: Tensor) -> Tensor:
    momentum = one.state.get("momentum_buffer")
    momentum = torch.zeros_like(gradient) if momentum is None else wide(momentum)
    decay = float(one.group["lr"]) * one.group["weight_decay"]
    return muon_update(gradient, momentum, one.group) + decay * wide(one.parameter.detach())


def _real_step(one: Owned, gradient: Tensor) -> Tensor:
    """The optimizer's own step on clones, followed by autograd from the gradient."""
    before = wide(one.parameter.detach())
    parameter = before.clone()
    parameter.grad = gradient
    state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
    if one.state:
        state[parameter] = {name: _clone(value, parameter) for name, value in one.state.items()}
    options = {"foreach": False, "fused": False, "capturable": False, "differentiable": True}
    group = one.group | {name: value for name, value in options.items() if name in one.group} | {"params": [parameter]}
    if isinstance(one.optimizer, torch.optim.SGD) and one.state.get("momentum_buffer") is None:
        # SGD starts its momentum at a detached gradient; from zero without dampening it is the same one
        state[parameter]["momentum_buffer"], group["dampening"] = torch.zeros_like(parameter), 0.0
    # all that the optimizer is but its hooks and the wrapper that a scheduler puts around its step
    rest = {k: v for k, v in vars(one.optimizer).items() if k != "step" and not k.endswith("_hooks")}
    optimizer = object.__new__(type(one.optimizer))
    optimizer.__setstate__(rest | {
        "defaults": one.optimizer.defaults | {"differentiable": True}, "state": state, "param_groups": [group],
    })
    with _default_float64(), _SqrtFlatAtZero():
        optimizer.step()
    return before - parameter


def _clone(value: Any, parameter: Tensor) -> Any:
    """A state's entry for a step of its own: counters in float64, the rest at least as wide as the parameter."""
    if not torch.is_tensor(value):
        return value
    if value.ndim == 0 and value.is_floating_point():
        return value.to(torch.float64, copy=True)
    return value.to(parameter.dtype, copy=True) if value.is_floating_point() else value.clone()


class _SqrtFlatAtZero(TorchFunctionMode):
    """Inside it the derivative of sqrt at 0 is 0, not infinite (and 0 times infinity not NaN)."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (torch.sqrt, Tensor.sqrt):
            return _flat_sqrt(args[0])
        if func is Tensor.sqrt_:
            return args[0].copy_(_flat_sqrt(args[0]))
        return func(*args, **(kwargs or {}))


def _flat_sqrt(x: Tensor) -> Tensor:
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


@contextmanager
def _default_float64() -> Iterator[None]:
    """The step counters that an optimizer makes are float64, so that bias corrections are exact."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _like(name: str, given: dict[str, Tensor], parameter: nn.Parameter) -> Tensor:
    """The entry of a parameter as a new tensor of the parameter's shape, at least float32."""
    x = given.get(name)
    if x is None or x.numel() != parameter.numel() or x.shape[0] != parameter.shape[0]:
        raise ValueError(f"{name} has shape {tuple(parameter.shape)}, but was given "
                         f"{'nothing' if x is None else tuple(x.shape)}; give an (o, i) matrix, (o, 1) for a vector")
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return x.detach().to(dtype, copy=True).reshape(parameter.shape)


def _matrix(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x[:, None]
