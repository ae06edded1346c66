"""The optimizer's preconditioner P_t, read from the live state of ``torch.optim`` optimizers.

    SGD     P_t G = G
    AdamW   P_t G = C_t G / (sqrt(v_hat_{t-1}) + eps),   C_t = alpha_t (1 - beta1) / (1 - beta1^t)
    Muon    P_t G = kappa_t S_t G,  S_t = a I + b A + c A^2,  A = q q^T,  q = m / |m|_F,
            kappa_t = eta_t (1 - mu^2),  (a, b, c) the Newton-Schulz coefficients

t is the step about to be taken, m the momentum and v_hat the bias-corrected second moment left by
the step before.  All three are linear, symmetric maps of one weight's gradient, so
<P g_n, g_proxy> = <g_n, P g_proxy>.  A parameter without state (before the optimizer's first step)
gets alpha_1 G for AdamW and eta_1 G for Muon: no second moment or momentum exists yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .gradients import Factors, PerSampleGradient


@dataclass(frozen=True)
class Preconditioner:
    """P(G) = scale * left (diagonal o G); a part that is None is the identity."""

    scale: float = 1.0
    diagonal: Tensor | None = None  # (o, i)
    left: Tensor | None = None  # (o, o), symmetric
    learning_rate: float = 1.0  # eta_t of the parameter's group, for the utility

    def __call__(self, gradient: Float[Tensor, "*n o i"]) -> Float[Tensor, "*n o i"]:
        """Apply P to dense gradients."""
        if self.diagonal is not None:
            gradient = gradient * self.diagonal
        if self.left is not None:
            gradient = self.left @ gradient
        return gradient * self.scale

    def on_left(self, gradient: PerSampleGradient) -> PerSampleGradient:
        """Apply the left factor to factored gradients: (S b) a^T = S (b a^T); cost O(n t o^2)."""
        if self.left is None:
            return gradient
        if any(not use.left.is_floating_point() for use in gradient.uses):
            raise ValueError("a left-multiplying preconditioner (Muon) cannot act on an embedding; "
                             "give embeddings to AdamW")
        return PerSampleGradient(
            gradient.shape, tuple(Factors(use.left @ self.left, use.right) for use in gradient.uses)
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
    beta1, beta2 = group["betas"]
    rate = float(group["lr"])
    if "exp_avg_sq" not in state:
        return Preconditioner(scale=rate, learning_rate=rate)
    done = int(state["step"])  # t - 1
    scale = rate * (1 - beta1) / (1 - beta1 ** (done + 1))
    v_hat = state["exp_avg_sq"] / (1 - beta2**done)
    diagonal = 1 / (v_hat.sqrt() + group["eps"])
    return Preconditioner(scale, _as_matrix(diagonal), None, rate)


def muon_preconditioner(state: dict, group: dict) -> Preconditioner:
    """The paper's P_t of Muon for one parameter: one Newton-Schulz polynomial of the momentum."""
    rate = float(group["lr"])
    if "momentum_buffer" not in state:
        return Preconditioner(scale=rate, learning_rate=rate)
    momentum = state["momentum_buffer"]
    a, b, c = group["ns_coefficients"]
    q = momentum / momentum.norm().clamp(min=group["eps"])
    outer = q @ q.T
    eye = torch.eye(len(q), dtype=q.dtype, device=q.device)
    left = a * eye + b * outer + c * outer @ outer
    return Preconditioner(rate * (1 - group["momentum"] ** 2), None, left, rate)


def preconditioners(
    optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
    parameters: dict[str, nn.Parameter],
) -> dict[str, Preconditioner]:
    """P_t of every named parameter, from the optimizer that owns it.

    Raises:
        ValueError: for an optimizer that is not SGD, Adam(W) or Muon, for amsgrad, and for a
            parameter that no optimizer owns.

    SGD's P_t is the identity also with momentum (the paper's choice).
    """
    if isinstance(optimizers, torch.optim.Optimizer):
        optimizers = [optimizers]
    found: dict[int, Preconditioner] = {}
    wanted = {id(p) for p in parameters.values()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if id(p) not in wanted:
                    continue
                state = optimizer.state.get(p, {})
                if isinstance(optimizer, torch.optim.Adam):  # AdamW is a subclass
                    found[id(p)] = adamw_preconditioner(state, group)
                elif isinstance(optimizer, torch.optim.Muon):
                    found[id(p)] = muon_preconditioner(state, group)
                elif isinstance(optimizer, torch.optim.SGD):
                    found[id(p)] = Preconditioner(learning_rate=float(group["lr"]))
                else:
                    raise ValueError(f"no preconditioner for {type(optimizer).__name__}; "
                                     "SGD, Adam, AdamW and Muon of torch.optim are known")
    missing = [name for name, p in parameters.items() if id(p) not in found]
    if missing:
        raise ValueError(f"no optimizer owns {', '.join(missing)}")
    return {name: found[id(p)] for name, p in parameters.items()}


def _as_matrix(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x[:, None]
