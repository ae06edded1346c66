"""Algebra on factored per-sample gradients: exact, without keeping a gradient per sample.

The legend of axes and factors is that of gradients.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from .gradients import Factors, PerSampleGradient

CHUNK_ELEMENTS = 1 << 24  # elements of per-sample gradient that are held at once


def ghost_inner_product(x: Factors, y: Factors) -> Float[Tensor, "n m"]:
    """Inner products of two batches' per-sample gradients of one use, without forming a gradient.

        <G_n, G'_m> = sum_{t,u} (left[n,t] . left'[m,u]) (right[n,t] . right'[m,u])

    Exactness: exact up to rounding; checked against autograd in float64.
    Cost: O(n m t u (i + o)) flops and O(n m t u) memory.  Forming the gradients costs
        O((n t + m u) i o) flops and is cheaper when t u > i o.
    """
    if x.left.is_floating_point() != y.left.is_floating_point():
        raise ValueError("one side is an embedding (integer rows), the other is not")
    if x.left.is_floating_point():
        rows = torch.einsum("nto,muo->nmtu", x.left, y.left)
    else:
        rows = (x.left[:, None, :, None] == y.left[None, :, None, :]).to(x.right.dtype)
    columns = torch.einsum("nti,mui->nmtu", x.right, y.right)
    return torch.einsum("nmtu,nmtu->nm", rows, columns)


def contract(gradient: PerSampleGradient, matrix: Float[Tensor, "o i"]) -> Float[Tensor, " n"]:
    """<G_n, V> for every sample: sum_t left[n,t]^T V right[n,t], no gradient formed.

    Exactness: exact up to rounding.
    Cost: O(n t o i) flops, as one forward of the layer, and O(n t o) memory; O(n t i) for an
        embedding.
    """
    total: Tensor | None = None
    for use in gradient.uses:
        if use.left.is_floating_point():
            part = ((use.right @ matrix.T) * use.left).sum((1, 2))
        else:
            part = (matrix[use.left] * use.right).sum((1, 2))
        total = part if total is None else total + part
    assert total is not None
    return total


def rows(gradient: PerSampleGradient, start: int, stop: int) -> Float[Tensor, "n r i"]:
    """Rows start..stop-1 of every sample's dense gradient; exact, O(n t r i) flops."""
    total: Tensor | None = None
    for use in gradient.uses:
        if use.left.is_floating_point():
            part = torch.einsum("ntr,nti->nri", use.left[:, :, start:stop], use.right)
        else:
            n = len(use.left)
            inside = (use.left >= start) & (use.left < stop)
            sample = torch.arange(n, device=use.left.device)[:, None].expand_as(use.left)
            slot = (sample * (stop - start) + use.left - start)[inside]
            part = use.right.new_zeros(n * (stop - start), use.right.shape[2])
            part = part.index_add(0, slot, use.right[inside]).view(n, stop - start, -1)
        total = part if total is None else total + part
    assert total is not None
    return total


def row_chunks(
    gradient: PerSampleGradient, elements: int | None = None
) -> Iterator[tuple[int, Float[Tensor, "n r i"]]]:
    """Dense gradients in chunks of rows, each of at most ``elements`` elements over all samples."""
    samples = len(gradient.uses[0].right)
    o, i = gradient.shape
    size = max(1, (elements or CHUNK_ELEMENTS) // max(1, samples * i))
    for start in range(0, o, size):
        yield start, rows(gradient, start, min(o, start + size))
