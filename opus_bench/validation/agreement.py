"""How well predicted values agree with true ones: correlations and slope with their standard errors.

Standard errors are large-sample ones of normal pairs, by Fisher's z = atanh r.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """Of n pairs.  Var z is 1 / (n - 3) for Pearson's r and (1 + r^2/2) / (n - 3) for Spearman's; dr = (1 - r^2) dz.

    Spearman's is an upper one: a tenth of its variance too large at n = 24, r = .7.  The slope's is that of least
    squares.  Source: Fisher 1921; Bonett and Wright 2000.
    """

    pearson: float
    pearson_stderr: float
    spearman: float
    spearman_stderr: float
    slope: float  # true per predicted: 1 where the size is right
    slope_stderr: float


def agreement(predicted: Float[Tensor, " n"], true: Float[Tensor, " n"]) -> Agreement:
    """Of the true values with the predicted ones.

    Raises:
        ValueError: fewer than 4 pairs; values that are not finite, or all equal: nothing correlates with a constant.
    """
    n = len(true)
    if n < 4:
        raise ValueError(f"a correlation with a standard error needs at least 4 pairs, got {n}")
    for name, x in (("predicted", predicted), ("true", true)):
        if not torch.isfinite(x).all() or bool((x == x[0]).all()):
            raise ValueError(f"{name} values must be finite and differ, got {x.tolist()}")
    r = correlation(predicted, true)
    rank = float(spearmanr(predicted.numpy(), true.numpy()).statistic)
    ratio = float(true.std() / predicted.std())
    return Agreement(r, (1 - r**2) / math.sqrt(n - 3), rank, (1 - rank**2) * math.sqrt((1 + rank**2 / 2) / (n - 3)),
                     r * ratio, ratio * math.sqrt((1 - r**2) / (n - 2)))


def correlation(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """Pearson's."""
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1].clamp(-1, 1))


def difference_stderr(r1: float, r2: float, between: float, n: int) -> float:
    """Standard error of atanh r1 - atanh r2, two predictors' correlations with one truth over the same n pairs.

    ``between``: the predictors' own correlation.  Source: Meng, Rosenthal and Rubin 1992, their Z test.
    """
    square = (r1**2 + r2**2) / 2
    if square >= 1:
        return 0.0
    f = min(1.0, (1 - between) / (2 * (1 - square)))
    return math.sqrt(max(0.0, 2 * (1 - between)) * (1 - f * square) / (1 - square) / (n - 3))
