"""How far the paper's linear P_t of Muon is from a multiple of the identity, and from Muon.

The paper replaces Muon's step by P_t G = kappa_t S_t G with one Newton-Schulz polynomial S_t of the
momentum (preconditioner.py).  The real step orthogonalises: five polynomials, of momentum and gradient
together, divided by their norm (optimizer_map.py).  Every matrix that Muon trains is looked at, at stages
of a training at random:

    spectrum     |S - c I| / |S| with c = tr S / o, and the extreme eigenvalues of S
    update       S x against the real update at the candidates' mean gradient, x its Nesterov direction:
                 what the five polynomials are applied to
    candidates   P g_z of each candidate against J g_z, J the derivative of the real update there, and
                 the alignments with the proxy that they give

Three maps are compared: "identity" (kappa_t G, S left out), "frozen" (P_t) and "real".  All in float64 from
the float32 state.  Gradients are taken over whole sequences, as the step takes them; clipping is no part of
the maps.  Axes as in gradients.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..corpus import Corpus
from ..ghost import rows
from ..gradients import capture, mean_gradient
from ..optimizer_map import muon_update
from ..preconditioner import Owned, Preconditioner, muon_preconditioner, owners
from ..stream import CandidateStream, ProxyStream
from ..train import RunConfig
from .problem import rank_correlation
from .trained import Stage, stages

MAPS = ("identity", "frozen", "real")
ALL = "all"  # matrices together
QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)

Products = dict[tuple[str, str], Float[Tensor, " n"]]  # inner products by two of MAPS, or by one and "proxy"


@dataclass(frozen=True)
class Spectrum:
    """S of one matrix."""

    distance: float  # |S - c I| / |S|, c = tr S / o
    smallest: float  # eigenvalue of S
    largest: float
    singular: tuple[float, ...]  # singular values of the momentum over its norm, at QUANTILES


def momentum_of(name: str, one: Owned) -> Float[Tensor, "o i"]:
    """The momentum that Muon's last step left, in float64.

    Raises:
        ValueError: for a momentum of zero or none.
    """
    momentum = one.state.get("momentum_buffer")
    if momentum is None or not momentum.any():
        raise ValueError(f"the momentum of {name} is zero, so that S is a multiple of the identity by definition; "
                         "choose a later stage (behind an output projection that starts at zero: 2 updates)")
    return momentum.detach().double()


def frozen_map(momentum: Float[Tensor, "o i"], group: dict[str, Any]) -> Preconditioner:
    """The paper's P_t in the momentum's dtype."""
    return muon_preconditioner({"momentum_buffer": momentum}, group, momentum.shape)


def spectrum(momentum: Float[Tensor, "o i"], group: dict[str, Any]) -> Spectrum:
    """How far S is from c I; exact in the momentum's dtype, O(o^3 + o i min(o, i))."""
    left = frozen_map(momentum, group).left
    assert left is not None
    eigenvalues = torch.linalg.eigvalsh(left.dense())
    away = (eigenvalues - eigenvalues.mean()).norm() / eigenvalues.norm()  # S is symmetric
    singular = torch.linalg.svdvals(momentum) / momentum.norm()
    quantiles = singular.quantile(torch.tensor(QUANTILES, dtype=singular.dtype))
    return Spectrum(float(away), float(eigenvalues[0]), float(eigenvalues[-1]), tuple(quantiles.tolist()))


def nesterov(
    gradient: Float[Tensor, "o i"], momentum: Float[Tensor, "o i"], group: dict[str, Any]
) -> Float[Tensor, "o i"]:
    """What Muon's next step applies the five polynomials to, before its norm is divided out."""
    after = torch.lerp(momentum, gradient, 1 - group["momentum"])
    return torch.lerp(gradient, after, group["momentum"]) if group["nesterov"] else after


def inner_products(under: dict[str, Float[Tensor, "n o i"]], proxy: Float[Tensor, "o i"]) -> Products:
    """Of the same gradients under two of MAPS, and under one and the proxy's; those of several matrices add up."""
    pairs = {(x, y): (under[x] * under[y]).sum((1, 2)) for x, y in itertools.combinations_with_replacement(MAPS, 2)}
    return pairs | {(x, "proxy"): (under[x] * proxy).sum((1, 2)) for x in MAPS}


def compare(
    momentum: Float[Tensor, "o i"], group: dict[str, Any],
    gradients: Float[Tensor, "n o i"], proxy: Float[Tensor, "o i"],
) -> tuple[Products, Products]:
    """The candidates' gradients under the three maps, and (n = 1) the direction of the update itself.

    "real" is J of the update at the mean of the gradients for the candidates, and the update for its direction.
    Cost: one forward-mode derivative of the update for each candidate.
    """
    frozen = frozen_map(momentum, group)
    identity = dataclasses.replace(frozen, left=None)
    mean = gradients.mean(0)

    def real(x: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        return muon_update(x, momentum, group)

    def derivative(tangent: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        return torch.func.jvp(real, (mean,), (tangent,))[1]

    direction = nesterov(mean, momentum, group)[None]
    maps = (identity, frozen, torch.vmap(derivative))
    candidates = {name: f(gradients) for name, f in zip(MAPS, maps, strict=True)}
    whole = {"identity": identity(direction), "frozen": frozen(direction), "real": real(mean)[None]}
    return inner_products(candidates, proxy), inner_products(whole, proxy)


def muon_matrices(stage: Stage) -> dict[str, Owned]:
    """The parameters that Muon trains, by name."""
    found = owners(stage.optimizers, dict(stage.model.named_parameters()))
    return {name: one for name, one in found.items() if isinstance(one.optimizer, torch.optim.Muon)}


def compare_all(stage: Stage, candidates: Tensor, proxy: Tensor) -> dict[str, tuple[Products, Products]]:
    """`compare` of every matrix that Muon trains, and under ALL the sums over them."""
    owned = muon_matrices(stage)
    layers = [name.removesuffix(".weight") for name in owned]
    target, _ = mean_gradient(stage.model, proxy, layers)
    found = {}
    for name, gradient in capture(stage.model, candidates, layers).items():
        one = owned[name]
        found[name] = compare(momentum_of(name, one), one.group, rows(gradient, 0, gradient.shape[0]).double(),
                              target[name].double())
    together = [{key: torch.stack([pair[part][key] for pair in found.values()]).sum(0) for key in products}
                for part, products in enumerate(next(iter(found.values())))]
    return found | {ALL: (together[0], together[1])}


def agreement(candidates: Products, update: Products) -> dict[str, float]:
    """Cosines (means over candidates) and Spearman's correlations over candidates, named as in `measure`."""

    def cosine(products: Products, x: str, y: str) -> float:
        return float((products[x, y] / (products[x, x] * products[y, y]).sqrt()).mean())

    def rank(x: str, y: str) -> float:
        return rank_correlation(candidates[x, "proxy"], candidates[y, "proxy"])

    return {
        "direction_cosine": cosine(candidates, "frozen", "real"),
        "identity_direction_cosine": cosine(candidates, "identity", "real"),
        "frozen_identity_cosine": cosine(candidates, "identity", "frozen"),
        "update_cosine": cosine(update, "frozen", "real"),
        "identity_update_cosine": cosine(update, "identity", "real"),
        "rank": rank("frozen", "real"),
        "identity_rank": rank("identity", "real"),
        "frozen_identity_rank": rank("frozen", "identity"),
    }


def check(settings: dict[str, Any], config: RunConfig) -> None:
    """Refuse what `measure` cannot measure.

    Raises:
        ValueError: an optimizer other than muon, a stage before 2 updates (inner momenta are zero: output
            projections start at zero), fewer than 2 buffers (no standard error), a buffer of fewer than 3.
    """
    if config.optimizer != "muon":
        raise ValueError(f"the map of Muon is measured under optimizer='muon', got {config.optimizer!r}")
    if min(settings["stages"], default=0) < 2:
        raise ValueError(f"stages must begin at 2 updates or later, got {settings['stages']}")
    if settings["buffers"] < 2:
        raise ValueError(f"buffers must be at least 2, got {settings['buffers']}")
    if config.buffer < 3:
        raise ValueError(f"buffer must be at least 3 candidates, which are ranked; got {config.buffer}")


def measure(
    config: RunConfig, settings: dict[str, Any], corpus: Corpus, on_step: Callable[[], Any] = lambda: None
) -> list[dict[str, Any]]:
    """Rows named "distance", one a stage and matrix, and "direction_cosine", one more of ALL.

    Buffers are of the size that the model is trained with, and those that training would come to after the
    last stage, the same at every stage.

    Args:
        settings: stages (updates done, at least 2), buffers.

    Returns:
        Keys of both (weight, kind, rows, columns).  "distance": the fields of Spectrum.  "direction_cosine",
        means over buffers with ``stderr`` (name -> standard error over buffers): cos(P g_z, J g_z) as the value,
        identity_direction_cosine of kappa g_z with J g_z, frozen_identity_cosine of P g_z with kappa g_z, means
        over candidates; update_cosine and identity_update_cosine of S x and of x with the real update; and
        Spearman's correlations of the candidates' alignments <. g_z, g_proxy>: rank between P and J,
        identity_rank between kappa and J, frozen_identity_rank between P and kappa.  ALL takes the gradients
        of all matrices as one vector.  Equal settings give equal rows.

    Cost: calls ``on_step`` once a training step and once a stage and buffer (``units``).

    Raises:
        ValueError: bad settings, before the model is trained; a momentum of zero.
    """
    check(settings, config)
    candidates = CandidateStream(corpus, config.length, config.buffer, config.seed)
    proxies = ProxyStream(corpus, config.length, config.proxy_size, config.seed)
    ahead = settings["stages"][-1]
    found = []
    for stage in stages(config, corpus, settings["stages"], on_step):
        owned = muon_matrices(stage)
        labels = {name: {"weight": name, "kind": ".".join(name.removesuffix(".weight").split(".")[2:]),
                         "rows": one.parameter.shape[0], "columns": one.parameter.shape[1]}
                  for name, one in owned.items()}
        for name, one in owned.items():
            s = dataclasses.asdict(spectrum(momentum_of(name, one), one.group))
            found.append(stage.row("distance", s.pop("distance"), **labels[name], **s))
        seen: dict[str, list[dict[str, float]]] = {}
        for number in range(settings["buffers"]):
            tokens = candidates.candidates(ahead + number).tokens
            for name, products in compare_all(stage, tokens, proxies.proxy(number)).items():
                seen.setdefault(name, []).append(agreement(*products))
            on_step()
        whole = {"weight": ALL, "kind": ALL, "rows": 0, "columns": 0}
        for name, values in seen.items():
            means, stderr = _mean_stderr(values)
            found.append(stage.row("direction_cosine", means.pop("direction_cosine"), **labels.get(name, whole),
                                   **means, stderr=stderr))
    return found


def units(settings: dict[str, Any]) -> int:
    """How often ``measure`` calls ``on_step``."""
    return settings["stages"][-1] + len(settings["stages"]) * settings["buffers"]


def _mean_stderr(values: Sequence[dict[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    table = {name: torch.tensor([value[name] for value in values], dtype=torch.float64) for name in values[0]}
    return ({name: float(x.mean()) for name, x in table.items()},
            {name: float(x.std()) / math.sqrt(len(x)) for name, x in table.items()})
