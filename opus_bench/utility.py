"""The utility of a candidate: alignment with the proxy minus redundancy with what is selected.

    U_n = sum_l w_l <u_n, g_proxy>_l  -  sum_l r_l <u_n, sum of selected u>_l      (OPUS Eq 23/25)

where u_n = P_t G_n is the effective update of candidate n, l runs over scored weights, and the
paper's weights are w_l = eta, r_l = eta^2.  Both estimators below return the same two things: the
alignment of every candidate and the Gram matrix of the candidates' updates, weights included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from zlib import crc32

import torch
from jaxtyping import Float
from torch import Tensor

from .ghost import contract, full, outside_autocast, row_chunks, wide
from .gradients import PerSampleGradient
from .preconditioner import Preconditioner
from .sketch import count_sketch, sketch_gradients


@dataclass(frozen=True)
class Utility:
    """Alignment (n,) and Gram (n, n) of the candidates, in float64; U in loss (nat/token)."""

    alignment: Float[Tensor, " n"]
    gram: Float[Tensor, "n n"] | None  # None: the redundancy weight is zero
    redundancy_weight: float = 1.0

    def marginal(self, selected: Sequence[int]) -> Float[Tensor, " n"]:
        """U of every candidate given what is already selected (Eq 25)."""
        if self.gram is None or not len(selected):
            return self.alignment
        return self.alignment - self.redundancy_weight * self.gram[:, list(selected)].sum(1)


Weights = dict[str, float]  # per parameter


@outside_autocast
def exact_utility(
    candidates: dict[str, PerSampleGradient],
    proxy_gradient: dict[str, Float[Tensor, "o i"]],
    preconditioners: dict[str, Preconditioner],
    alignment_weights: Weights,
    redundancy_weights: Weights | None,
    directions: dict[str, Float[Tensor, "o i"]] | None = None,
    products: torch.dtype | None = None,
) -> Utility:
    """Alignment by contraction with P_t g_proxy; with a Gram, both from dense rows in bounded chunks.

    ``directions``, where given, take the place of P_t g_proxy in the alignment (the adjoint of the
    optimizer's real map, optimizer_map.py).

    Exactness: exact up to rounding in the model's dtype; checked against autograd in float64.
        ``products`` in bfloat16: each product of a, b and updates is rounded to 8 bits of mantissa.
    Cost: alignment as one forward of the scored layers; the Gram O(n t o i + n^2 o i) flops and
        bounded memory, alignment included unless there are directions.  ``redundancy_weights`` None skips the Gram.
    """
    alignment, gram = _nothing(candidates)
    for name, gradient in candidates.items():
        p = preconditioners[name]
        if redundancy_weights is None or directions is not None:
            direction = p(proxy_gradient[name]) if directions is None else directions[name]  # P_t is symmetric
            alignment = alignment + alignment_weights[name] * contract(gradient, direction, products).double()
        if redundancy_weights is not None:
            for start, dense in row_chunks(p.on_left(gradient, products), products=products):
                update = p.on_rows(dense, start).flatten(1)
                if directions is None:
                    proxy = proxy_gradient[name][start : start + dense.shape[1]].flatten().to(update.dtype)
                    alignment = alignment + alignment_weights[name] * (update @ proxy).double()
                narrow = update if products is None else update.to(products)
                gram = gram + redundancy_weights[name] * (narrow @ narrow.T).double()
    return Utility(alignment.cpu(), None if redundancy_weights is None else gram.cpu())


@outside_autocast
def sketched_utility(
    candidates: dict[str, PerSampleGradient],
    proxy_gradient: dict[str, Float[Tensor, "o i"]],
    preconditioners: dict[str, Preconditioner],
    alignment_weights: Weights,
    redundancy_weights: Weights | None,
    width: int = 8192,
    seed: int = 42,
    products: torch.dtype | None = None,
) -> Utility:
    """The paper's estimator: CountSketch of u_n and of g_proxy per weight, then inner products.

    Mean: the exact utility, over hash seeds.  Variance: the sum over weights of that stated in
        ``sketch.count_sketch``.
    ``products``: dtype of the matrix products that form updates; None: the factors', at least float32.
    Cost: O(n t o i) flops to form the updates by chunks, O(n o i) to hash them; n * width numbers
        per weight are kept.  Every weight has its own hash, derived from ``seed`` and its name.
    """
    if not candidates:
        raise ValueError("no parameter to score")
    features = ((name, sketch_gradients(gradient, preconditioners[name], width, weight_seed(seed, name), products))
                for name, gradient in candidates.items())
    return utility_of_sketches(features, proxy_gradient, alignment_weights, redundancy_weights, width, seed)


def weight_seed(seed: int, name: str) -> int:
    """Seed of a weight's own hash."""
    return seed + crc32(name.encode())


@outside_autocast
def utility_of_sketches(
    features: Iterable[tuple[str, Float[Tensor, "n k"]]],
    proxy_gradient: Mapping[str, Float[Tensor, "o i"]],
    alignment_weights: Weights,
    redundancy_weights: Weights | None,
    width: int,
    seed: int,
    everyones: Callable[[Tensor], Tensor] = lambda x: x,
) -> Utility:
    """Inner products of the candidates' sketches, at least one weight's, with the proxy's and with each other.

    ``everyones``: of the sketches of m candidates, those of all n of which they are a part; the Gram has m rows and n
    columns then.  Asked for only where there are redundancy weights.
    """
    alignment, gram = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for name, x in features:
        proxy = count_sketch(wide(full(proxy_gradient[name])).reshape(1, -1), width, weight_seed(seed, name))
        alignment = alignment + alignment_weights[name] * (x @ proxy[0]).double().cpu()
        if redundancy_weights is not None:
            gram = gram + redundancy_weights[name] * (x @ everyones(x).T).double().cpu()
    return Utility(alignment, None if redundancy_weights is None else gram)


def _nothing(candidates: dict[str, PerSampleGradient]) -> tuple[Tensor, Tensor]:
    """Alignment and Gram of no weight, in float64 where the factors are."""
    if not candidates:
        raise ValueError("no parameter to score")
    like = next(iter(candidates.values())).uses[0].right
    n = len(like)
    return like.new_zeros(n, dtype=torch.float64), like.new_zeros(n, n, dtype=torch.float64)


def check_utilities(utility: Float[Tensor, " n"], source: str) -> None:
    """Refuse scores that cannot rank anything, instead of sampling uniformly without a word.

    Raises:
        FloatingPointError: for NaN or infinite scores.
        ValueError: when all scores are zero or all are equal, naming the likely cause.
    """
    bad = (~torch.isfinite(utility)).sum().item()
    if bad:
        raise FloatingPointError(f"{source}: {bad} of {len(utility)} utilities are NaN or infinite; "
                                 "the model or the optimizer state has diverged")
    if len(utility) < 2:
        return
    if (utility == 0).all():
        raise ValueError(f"{source}: all {len(utility)} utilities are exactly zero; likely causes: "
                         "a compiled model whose hooks see nothing, a learning rate of zero, a "
                         "proxy without gradient")
    if (utility == utility[0]).all():
        raise ValueError(f"{source}: all {len(utility)} utilities equal {utility[0].item():g}; likely "
                         "cause: every candidate holds the same tokens")
