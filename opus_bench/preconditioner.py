"""The optimizer's preconditioner P_t, read from the live state of ``torch.optim`` optimizers.

    SGD     P_t G = G
    AdamW   P_t G = C_t G / (sqrt(v_hat_{t-1}) + eps),   C_t = alpha_t (1 - beta1) / (1 - beta1^t)
    Muon    P_t G = kappa_t S_t G,  S_t = a I + b A + c A^2,  A = q q^T,  q = m / |m|_F,
            kappa_t = eta'_t (1 - mu^2),  (a, b, c) the Newton-Schulz coefficients,
            eta' the rate adjusted to the matrix's shape, as torch.optim.Muon applies it

t is the step about to be taken, m the momentum and v_hat the bias-corrected second moment left by
the step before.  All three are linear, symmetric maps of one weight's gradient, so
<P g_n, g_proxy> = <g_n, P g_proxy>.  A parameter without state (before the optimizer's first step)
gets alpha_1 G for AdamW and eta'_1 G for Muon: no second moment or momentum exists yet.

Every parameter has the settings of its own group; foreach, fused and capturable change where the
step is computed, not what it is.  1 - mu^2 is the share of G in Nesterov's direction
(1 - mu^2) G + mu^2 m, the paper's; with nesterov=False it is 1 - mu.  Decoupled weight decay is no
part of P_t.  Adam's coupled one adds decay * W to every gradient: an offset that is the same
whichever candidates are chosen, and so left out.  maximize=True is refused: whether the gradients
scored here are those of the loss or of what is maximized cannot be known.
The real maps are not linear; optimizer_map.py has their derivative.

Products are in the state's dtype, at least float32; on a GPU that is float32 itself, not TF32, unless the caller
allows it by ``torch.set_float32_matmul_precision``, which nothing here does and records state.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim._muon import _adjust_lr

from .ghost import wide
from .gradients import Factors, PerSampleGradient


@dataclass(frozen=True)
class LeftPolynomial:
    """S = a I + b A + c A^2 with A = q q^T, (o, o) and symmetric, held by the shorter side of q.

        o <= i    S x = inner x                     inner = S                  (o, o)
        o > i     S x = a x + q (inner (q^T x))     inner = b I + c q^T q      (i, i), and q is kept

    Exactness: the two forms are equal up to rounding in the dtype of q.
    Cost: ``inner`` takes 2 o^2 i + 2 o^3 flops, or 2 o i^2; S x takes 2 o^2 flops a column of x, or 4 o i + 2 i^2.
        For o = 3 i and one gradient of i columns that is 20 i^3 in all, where forming S takes 90 i^3.
    """

    inner: Float[Tensor, "k k"]  # k = min(o, i)
    a: float
    q: Float[Tensor, "o i"] | None = None  # None: o <= i

    def __call__(self, x: Float[Tensor, "*n o r"], products: torch.dtype | None = None) -> Float[Tensor, "*n o r"]:
        """S x, in at least float32; ``products``: dtype of the matrix products, None: of x, at least float32."""

        def product(left: Tensor, right: Tensor) -> Tensor:
            return left @ right if products is None else wide(left.to(products) @ right.to(products))

        x = wide(x)
        if self.q is None:
            return product(self.inner, x)
        return self.a * x + product(self.q, product(self.inner, product(self.q.T, x)))

    def dense(self) -> Float[Tensor, "o o"]:
        """S itself; O(o^2 i) flops where o > i."""
        if self.q is None:
            return self.inner
        return self(torch.eye(len(self.q), dtype=self.q.dtype, device=self.q.device))


def inner_flops(o: int, i: int) -> int:
    """Of ``LeftPolynomial.inner``."""
    return 2 * o * i * i if o > i else 2 * o * o * (i + o)


def left_flops(o: int, i: int, columns: int) -> int:
    """Of ``LeftPolynomial`` applied to so many columns."""
    return columns * (4 * o * i + 2 * i * i if o > i else 2 * o * o)


@dataclass(frozen=True)
class Preconditioner:
    """P(G) = scale * left (diagonal o G); a part that is None is the identity."""

    scale: float = 1.0
    diagonal: Tensor | None = None  # (o, i)
    left: LeftPolynomial | None = None
    learning_rate: float = 1.0  # eta_t of the parameter's group, not adjusted, for the utility

    def __call__(self, gradient: Float[Tensor, "*n o i"]) -> Float[Tensor, "*n o i"]:
        """Apply P to dense gradients."""
        if self.diagonal is not None:
            gradient = gradient * self.diagonal
        if self.left is not None:
            gradient = self.left(gradient)
        return gradient * self.scale

    def on_left(self, gradient: PerSampleGradient, products: torch.dtype | None = None) -> PerSampleGradient:
        """Apply the left factor to factored gradients: (S b) a^T = S (b a^T); n t columns of ``LeftPolynomial``."""
        if self.left is None:
            return gradient
        if any(not use.left.is_floating_point() for use in gradient.uses):
            raise ValueError("a left-multiplying preconditioner (Muon) cannot act on an embedding; "
                             "give embeddings to AdamW")
        return PerSampleGradient(
            gradient.shape, tuple(Factors(self.left(use.left.mT, products).mT, use.right) for use in gradient.uses)
        )

    def on_rows(self, rows: Float[Tensor, "n r i"], start: int) -> Float[Tensor, "n r i"]:
        """Apply diagonal and scale to dense rows start, start + 1, ... of the gradients."""
        if self.diagonal is not None:
            rows = rows * self.diagonal[start : start + rows.shape[1]]
        return rows * self.scale


def adamw_preconditioner(state: dict, group: dict) -> Preconditioner:
    """P_t of AdamW or Adam for one parameter (module legend); exact in the parameter's dtype."""
    if group.get("amsgrad"):
        raise ValueError("amsgrad=True keeps a running maximum of v that P_t does not describe; "
                         "use amsgrad=False")
    beta1, beta2 = (float(beta) for beta in group["betas"])
    rate = float(group["lr"])
    done = int(state.get("step", 0))  # t - 1
    if not done:
        return Preconditioner(scale=rate, learning_rate=rate)
    scale = rate * (1 - beta1) / (1 - beta1 ** (done + 1))
    v_hat = state["exp_avg_sq"] / (1 - beta2**done)
    diagonal = 1 / (v_hat.sqrt() + group["eps"])
    return Preconditioner(scale, _as_matrix(diagonal), None, rate)


def muon_preconditioner(
    state: dict, group: dict, shape: torch.Size, inner: Float[Tensor, "k k"] | None = None
) -> Preconditioner:
    """The paper's P_t of Muon for one parameter: one Newton-Schulz polynomial of the momentum.

    ``inner``: that of ``muon_inner`` where it is known; the momentum is then read only where o > i.
    Not the derivative of the real step, which has five such polynomials and the momentum's norm.
    """
    rate = float(group["lr"])
    adjusted = _adjust_lr(rate, group["adjust_lr_fn"], shape)
    if "momentum_buffer" not in state:
        return Preconditioner(scale=adjusted, learning_rate=rate)
    momentum, tall = state["momentum_buffer"], shape[0] > shape[1]
    left = LeftPolynomial(
        muon_inner(momentum, group) if inner is None else inner, group["ns_coefficients"][0],
        normalised(momentum, group["eps"]) if tall else None)
    share = 1 - group["momentum"] ** (2 if group["nesterov"] else 1)
    return Preconditioner(adjusted * share, None, left, rate)


def muon_inner(momentum: Float[Tensor, "o i"], group: dict) -> Float[Tensor, "k k"]:
    """``LeftPolynomial.inner`` for a momentum: the costly part of Muon's P_t, k = min(o, i)."""
    a, b, c = group["ns_coefficients"]
    q = normalised(momentum, group["eps"])
    tall = q.shape[0] > q.shape[1]
    outer = q.T @ q if tall else q @ q.T
    eye = torch.eye(len(outer), dtype=q.dtype, device=q.device)
    return b * eye + c * outer if tall else a * eye + b * outer + c * outer @ outer


def normalised(momentum: Float[Tensor, "o i"], eps: float) -> Float[Tensor, "o i"]:
    """q = m / max(|m|_F, eps), in at least float32."""
    momentum = wide(momentum)
    return momentum / momentum.norm().clamp(min=eps)


@dataclass(frozen=True)
class Owned:
    """A parameter with the optimizer that steps it, its group and its state ({} before the first step)."""

    parameter: nn.Parameter
    optimizer: torch.optim.Optimizer
    group: dict[str, Any]
    state: dict[str, Any]


def owners(
    optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
    parameters: dict[str, nn.Parameter],
) -> dict[str, Owned]:
    """Every named parameter with its optimizer.

    Raises:
        ValueError: for a parameter that no optimizer owns and for a group that maximizes.
    """
    if isinstance(optimizers, torch.optim.Optimizer):
        optimizers = [optimizers]
    found = {
        id(p): Owned(p, optimizer, group, optimizer.state.get(p, {}))
        for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]
    }
    missing = [name for name, p in parameters.items() if id(p) not in found]
    if missing:
        raise ValueError(f"no optimizer owns {', '.join(missing)}")
    owned = {name: found[id(p)] for name, p in parameters.items()}
    for name, one in owned.items():
        if one.group.get("maximize"):
            raise ValueError(f"the group of {name} has maximize=True; minimize the negative instead, "
                             "so that its gradients are those of a loss")
    return owned


def preconditioners(
    optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
    parameters: dict[str, nn.Parameter],
) -> dict[str, Preconditioner]:
    """P_t of every named parameter, from the optimizer that owns it.

    Raises:
        ValueError: for an optimizer that is not SGD, Adam(W) or Muon, for amsgrad and maximize, and
            for a parameter that no optimizer owns.

    SGD's P_t is the identity also with momentum (the paper's choice).
    """
    return {name: preconditioner_of(one) for name, one in owners(optimizers, parameters).items()}


def preconditioner_of(one: Owned, inner: Float[Tensor, "k k"] | None = None) -> Preconditioner:
    """P_t of one parameter; errors as ``preconditioners``, ``inner`` as ``muon_preconditioner``."""
    if isinstance(one.optimizer, torch.optim.Adam):  # AdamW is a subclass
        return adamw_preconditioner(one.state, one.group)
    if isinstance(one.optimizer, torch.optim.Muon):
        return muon_preconditioner(one.state, one.group, one.parameter.shape, inner)
    if isinstance(one.optimizer, torch.optim.SGD):
        return Preconditioner(learning_rate=float(one.group["lr"]))
    raise ValueError(f"no preconditioner for {type(one.optimizer).__name__}; "
                     "SGD, Adam, AdamW and Muon of torch.optim are known")


def _as_matrix(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x[:, None]
