"""Choosing candidates by utility: Boltzmann, greedy and top-k, and how far from uniform it was.

``marginal`` maps the indices selected so far to the utilities of all candidates, so that the
redundancy term is brought up to date after every pick.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

Marginal = Callable[[Sequence[int]], Tensor]


@dataclass
class Draws:
    """What was picked, and for each pick how the draw's distribution differed from uniform."""

    indices: list[int] = field(default_factory=list)
    effective_share: list[float] = field(default_factory=list)  # ESS / candidates left, in (0, 1]
    total_variation: list[float] = field(default_factory=list)  # from uniform over those left
    temperature: list[float] = field(default_factory=list)  # in units of the utility


def boltzmann_probabilities(
    utility: Float[Tensor, " n"], temperature: float
) -> Float[Tensor, " n"]:
    """p proportional to exp(U / temperature), float64, safe for any magnitude (OPUS Eq 26)."""
    check_temperature(temperature)
    return torch.softmax(utility.double() / temperature, 0)


def effective_sample_size(probabilities: Float[Tensor, " n"]) -> float:
    """1 / sum p^2: n when uniform, 1 when one candidate is certain (Kish 1965)."""
    return float(1 / (probabilities.double() ** 2).sum())


def total_variation(probabilities: Float[Tensor, " n"]) -> float:
    """Distance from uniform, (1/2) sum |p - 1/n|: 0 when uniform, 1 - 1/n at most."""
    return float((probabilities.double() - 1 / len(probabilities)).abs().sum() / 2)


def temperature_for(utility: Float[Tensor, " n"], effective_share: float) -> float:
    """The temperature whose Boltzmann distribution has ESS = ``effective_share`` * n.

    The ESS rises with the temperature from the number of candidates tied for the maximum to n;
    found by bisection on log(temperature) to 1e-6 relative.  A share that would ask for less than
    one candidate, or for fewer than are tied, gives a temperature that picks the maximum.
    """
    check_effective_share(effective_share)
    u = utility.double() - utility.double().max()
    spread = float(-u.min())
    if spread == 0:
        return 1.0  # any temperature is uniform over equal utilities
    target = effective_share * len(u)
    low, high = math.log(spread * 1e-9), math.log(spread * 1e9)
    while high - low > 1e-6:
        middle = (low + high) / 2
        if effective_sample_size(torch.softmax(u / math.exp(middle), 0)) < target:
            low = middle
        else:
            high = middle
    return math.exp(high)


def boltzmann_sample(
    marginal: Marginal,
    size: int,
    generator: torch.Generator,
    temperature: float | None = None,
    effective_share: float | None = None,
) -> Draws:
    """Draw ``size`` candidates one by one without replacement, utilities updated after each.

    Exactly one of ``temperature`` (in units of the utility, the paper's .9) and
    ``effective_share`` (set the temperature of each draw so that the effective sample size is this
    share of the candidates left) is given.

    Exactness: each pick is drawn from softmax(U / temperature) over the candidates left, in
        float64, by the inverse of its distribution function.
    Source: OPUS Eq 26 and its algorithm; the effective share is ours.
    """
    if (temperature is None) == (effective_share is None):
        raise ValueError("give exactly one of temperature and effective_share, got "
                         f"{temperature} and {effective_share}")
    left = _candidates(marginal, size)
    draws = Draws()
    for _ in range(size):
        utility = marginal(draws.indices).double()[left]
        if temperature is not None:
            tau = temperature
        elif effective_share is not None:
            tau = temperature_for(utility, effective_share)
        p = boltzmann_probabilities(utility, tau)
        draws.effective_share.append(effective_sample_size(p) / len(p))
        draws.total_variation.append(total_variation(p))
        draws.temperature.append(tau)
        uniform = torch.rand((), dtype=torch.float64, generator=generator)
        pick = int((p.cumsum(0) <= uniform * p.sum()).sum().clamp(max=len(left) - 1))
        draws.indices.append(left.pop(pick))
    return draws


def greedy(marginal: Marginal, size: int) -> Draws:
    """The candidate of highest marginal utility, ``size`` times; ties go to the lowest index."""
    left = _candidates(marginal, size)
    draws = Draws()
    for _ in range(size):
        utility = marginal(draws.indices)[left]
        draws.indices.append(left.pop(int(utility.argmax())))
    return draws


def top_k(marginal: Marginal, size: int) -> Draws:
    """The ``size`` candidates of highest utility before anything is selected (no redundancy)."""
    _candidates(marginal, size)
    order = torch.sort(marginal([]), descending=True, stable=True).indices
    return Draws(indices=order[:size].tolist())


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless the temperature is positive and finite."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive, got {temperature}")


def check_effective_share(share: float) -> None:
    """Raise ValueError unless the share is in (0, 1)."""
    if not 0 < share < 1:
        raise ValueError(f"effective_share must be between 0 and 1, got {share}")


def check_size(size: int, available: int) -> None:
    """Raise ValueError unless 1 <= size <= available."""
    if not 1 <= size <= available:
        raise ValueError(f"cannot select {size} of {available} candidates")


def _candidates(marginal: Marginal, size: int) -> list[int]:
    available = len(marginal([]))
    check_size(size, available)
    return list(range(available))
