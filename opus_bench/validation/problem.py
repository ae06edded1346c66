"""One scoring problem on a live training state: candidates, proxy and P_t, scored exactly or by sketch.

Axes as in gradients.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from scipy.stats import spearmanr
from torch import Tensor, nn

from ..gradients import PerSampleGradient, capture, layer_names, mean_gradient, parameter_names
from ..preconditioner import Preconditioner, preconditioners
from ..utility import Utility, check_utilities, exact_utility, sketched_utility

Optimizers = Sequence[torch.optim.Optimizer]


@dataclass(frozen=True)
class Scoring:
    """Factored gradients of the candidates with all that the utilities take."""

    gradients: dict[str, PerSampleGradient]
    proxy_gradient: dict[str, Tensor]
    preconditioners: dict[str, Preconditioner]

    @property
    def weights(self) -> tuple[dict[str, float], dict[str, float]]:
        """The paper's: eta for the alignment, eta^2 for the redundancy."""
        eta = {name: p.learning_rate for name, p in self.preconditioners.items()}
        return eta, {name: value**2 for name, value in eta.items()}

    def exact(self, gram: bool = True) -> Utility:
        alignment_weights, redundancy_weights = self.weights
        return exact_utility(self.gradients, self.proxy_gradient, self.preconditioners,
                             alignment_weights, redundancy_weights if gram else None)

    def sketched(self, width: int, seed: int) -> Utility:
        return sketched_utility(self.gradients, self.proxy_gradient, self.preconditioners,
                                *self.weights, width, seed)


def scoring(
    model: nn.Module, optimizers: Optimizers, candidates: Int[Tensor, "n t"], proxy: Int[Tensor, "m t"],
    layers: str | Sequence[str] = "blocks",
) -> Scoring:
    """Gradients of candidates and proxy, and the live P_t, for the layers that the paper scores."""
    names = layer_names(model, layers)
    return Scoring(
        capture(model, candidates, names),
        mean_gradient(model, proxy, names)[0],
        preconditioners(optimizers, parameter_names(model, names)),
    )


def float64_copy(model: nn.Module, optimizers: Optimizers) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """Model and optimizers with the same values in float64; the originals are left alone."""
    model, optimizers = copy.deepcopy((model, list(optimizers)))
    model.double()
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            for name, value in state.items():
                if torch.is_tensor(value) and value.shape == p.shape:
                    state[name] = value.double()
    return model, optimizers


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, Frobenius."""
    return float((got.double() - want).norm() / want.norm())


def rank_correlation(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """Spearman's."""
    check_utilities(x, "rank correlation")
    check_utilities(y, "rank correlation")
    return float(spearmanr(x.numpy(), y.numpy()).statistic)
