"""CountSketch with hashes computed on the fly: nothing is stored per weight.

Coordinate j of a weight (row-major) goes to bucket h(j) with sign s(j), both read from one 64-bit
mix of (seed, j), so a sketch costs O(1) memory for its randomness and is the same on every
machine, process and shard.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .ghost import row_chunks, wide
from .gradients import PerSampleGradient
from .preconditioner import Preconditioner

_MASK = (1 << 64) - 1
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _logical_shift(x: Int[Tensor, "..."], bits: int) -> Int[Tensor, "..."]:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def scramble(seed: int) -> int:
    """SplitMix64's finalizer of a seed as a signed integer, so that nearby seeds are unrelated."""
    z = (seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    z ^= z >> 31
    return z - (1 << 64) if z >> 63 else z


def mix(index: Int[Tensor, " d"], seed: int) -> Int[Tensor, " d"]:
    """SplitMix64 started at scramble(seed): 64 well-mixed bits per coordinate.

    Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators".
    """
    z = (index + 1) * _GOLDEN + scramble(seed)
    z = (z ^ _logical_shift(z, 30)) * _MIX_1
    z = (z ^ _logical_shift(z, 27)) * _MIX_2
    return z ^ _logical_shift(z, 31)


def hash_coordinates(
    start: int, stop: int, width: int, seed: int, device: torch.device | None = None
) -> tuple[Int[Tensor, " d"], Int[Tensor, " d"]]:
    """Bucket in [0, width) and sign (+1 or -1) of coordinates start..stop-1.

    The bucket is the high 31 bits scaled to the width (bias below width / 2^31), the sign the
    lowest bit.
    """
    if width < 1:
        raise ValueError(f"sketch_width must be at least 1, got {width}")
    bits = mix(torch.arange(start, stop, device=device), seed)
    bucket = (_logical_shift(bits, 33) * width) >> 31
    return bucket, 1 - 2 * (bits & 1)


def count_sketch(
    x: Float[Tensor, "n d"], width: int, seed: int, start: int = 0
) -> Float[Tensor, "n k"]:
    """CountSketch of each row, whose columns are coordinates start, start + 1, ...

    For hashes and signs drawn at random (over seeds), inner products are unbiased:
        E <Sx, Sy>   = <x, y>
        Var <Sx, Sy> = (|x|^2 |y|^2 + <x,y>^2 - 2 sum_j x_j^2 y_j^2) / width
    Linear in x, and the sketch of a whole is the sum of the sketches of its parts.

    Cost: O(n d), no stored table.
    Source: Charikar, Chen, Farach-Colton 2002; the width in OPUS is 8192.
    """
    bucket, sign = hash_coordinates(start, start + x.shape[1], width, seed, x.device)
    return x.new_zeros(x.shape[0], width).index_add_(1, bucket, x * sign.to(x.dtype))


def sketch_gradients(
    gradient: PerSampleGradient, preconditioner: Preconditioner, width: int, seed: int,
    products: torch.dtype | None = None,
) -> Float[Tensor, "n k"]:
    """CountSketch of every sample's effective update P_t G_n for one parameter.

    Exactness: mean and variance as in ``count_sketch`` with x = P_t G_n flattened by rows.  ``products``: dtype of
        the matrix products that form x, as in ``ghost.rows``; sums into buckets are in at least float32.
    Cost: O(n t o i + n o i) flops; memory bounded by the row chunks of ``ghost.row_chunks``.
    """
    samples, columns = len(gradient.uses[0].right), gradient.shape[1]
    total = wide(gradient.uses[0].right).new_zeros(samples, width)
    for start, dense in row_chunks(preconditioner.on_left(gradient, products), products=products):
        update = preconditioner.on_rows(dense, start)
        total += count_sketch(update.flatten(1), width, seed, start * columns)
    return total
