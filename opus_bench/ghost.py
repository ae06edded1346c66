"""Algebra on factored per-sample gradients: exact, without keeping a gradient per sample.

The legend of axes and factors is that of gradients.py.  Factors of half precision are multiplied and
summed in float32, and an autocast of the caller's does not reach in here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import ParamSpec, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor

from .gradients import Factors, PerSampleGradient

CHUNK_ELEMENTS = 1 << 24  # elements of per-sample gradient that are held at once

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def outside_autocast(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function with autocast off: what it is given decides the dtype that it computes in."""

    @functools.wraps(function)
    def plain(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return plain


def wide(x: Tensor) -> Tensor:
    """At least float32, in which sums of many products are worth having; integer ids as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x


def full(x: Tensor) -> Tensor:
    """The whole of a tensor that is sharded over processes, which all call this together; else x itself."""
    return x.full_tensor() if isinstance(x, DTensor) else x


@outside_autocast
def ghost_inner_product(x: Factors, y: Factors) -> Float[Tensor, "n m"]:
    """Inner products of two batches' per-sample gradients of one use, without forming a gradient.

        <G_n, G'_m> = sum_{t,u} (left[n,t] . left'[m,u]) (right[n,t] . right'[m,u])

    Exactness: exact up to rounding; checked against autograd in float64.
    Cost: O(n m t u (i + o)) flops and O(n m t u) memory.  Forming the gradients costs
        O((n t + m u) i o) flops and is cheaper when t u > i o.
    """
    if x.left.is_floating_point() != y.left.is_floating_point():
        raise ValueError("one side is an embedding (integer rows), the other is not")
    columns = torch.einsum("nti,mui->nmtu", wide(x.right), wide(y.right))
    if x.left.is_floating_point():
        rows = torch.einsum("nto,muo->nmtu", wide(x.left), wide(y.left))
    else:
        rows = (x.left[:, None, :, None] == y.left[None, :, None, :]).to(columns.dtype)
    return torch.einsum("nmtu,nmtu->nm", rows, columns)


@outside_autocast
def contract(
    gradient: PerSampleGradient, matrix: Float[Tensor, "o i"], products: torch.dtype | None = None
) -> Float[Tensor, " n"]:
    """<G_n, V> for every sample: sum_t left[n,t]^T V right[n,t], no gradient formed.

    Exactness: exact up to rounding; V right is multiplied in the dtype ``products`` if one is given, and
        what follows is summed in at least float32.
    Cost: O(n t o i) flops, as one forward of the layer, and O(n t o) memory; O(n t i) for an
        embedding.
    """
    matrix = wide(matrix)
    total: Tensor | None = None
    for use in gradient.uses:
        left, right = wide(use.left), wide(use.right)
        if left.is_floating_point():
            if products is None:
                product = right @ matrix.T
            else:
                product = wide(use.right.to(products) @ matrix.to(products).T)
            part = (product * left).sum((1, 2))
        else:
            part = (matrix[left] * right).sum((1, 2))
        total = part if total is None else total + part
    assert total is not None
    return total


@outside_autocast
def rows(
    gradient: PerSampleGradient, start: int, stop: int, products: torch.dtype | None = None
) -> Float[Tensor, "n r i"]:
    """Rows start..stop-1 of every sample's dense gradient; exact, O(n t r i) flops.

    ``products``: dtype of the matrix products; the result is at least float32.
    """
    total: Tensor | None = None
    for use in gradient.uses:
        left, right = use.left, wide(use.right)
        if left.is_floating_point():
            if products is None:
                part = torch.einsum("ntr,nti->nri", wide(left[:, :, start:stop]), right)
            else:
                narrow = left[:, :, start:stop].to(products), use.right.to(products)
                part = wide(torch.einsum("ntr,nti->nri", *narrow))
        else:
            n = len(left)
            inside = (left >= start) & (left < stop)
            sample = torch.arange(n, device=left.device)[:, None].expand_as(left)
            slot = (sample * (stop - start) + left - start)[inside]
            part = right.new_zeros(n * (stop - start), right.shape[2])
            part = part.index_add(0, slot, right[inside]).view(n, stop - start, -1)
        total = part if total is None else total + part
    assert total is not None
    return total


def row_slice(gradient: PerSampleGradient, start: int, stop: int) -> PerSampleGradient:
    """The factors of rows start..stop-1 of every sample's gradient; of an embedding by copies with zeros outside."""
    uses = []
    for use in gradient.uses:
        if use.left.is_floating_point():
            uses.append(Factors(use.left[:, :, start:stop], use.right))
        else:
            inside = (use.left >= start) & (use.left < stop)
            uses.append(Factors((use.left - start) * inside, use.right * inside[:, :, None]))
    return PerSampleGradient((stop - start, gradient.shape[1]), tuple(uses))


def mean(gradient: PerSampleGradient) -> Float[Tensor, "o i"]:
    """Mean of the samples' gradients, dense; exact, O(n t o i) flops, no gradient per sample."""
    samples = len(gradient.uses[0].right)
    uses = tuple(Factors(use.left.flatten(0, 1)[None], use.right.flatten(0, 1)[None]) for use in gradient.uses)
    return rows(PerSampleGradient(gradient.shape, uses), 0, gradient.shape[0])[0] / samples


def row_chunks(
    gradient: PerSampleGradient, elements: int | None = None, products: torch.dtype | None = None
) -> Iterator[tuple[int, Float[Tensor, "n r i"]]]:
    """Dense gradients in chunks of rows, each of at most ``elements`` elements over all samples."""
    samples = len(gradient.uses[0].right)
    o, i = gradient.shape
    size = max(1, (elements or CHUNK_ELEMENTS) // max(1, samples * i))
    for start in range(0, o, size):
        yield start, rows(gradient, start, min(o, start + size), products)
