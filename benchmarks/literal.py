"""The paper's sketch done literally: dense per-sample gradients and a stored hash table per weight.

The reference of every ratio of time and memory.  It estimates what ``utility.sketched_utility``
does, with the same mean and variance; what differs is where the hashes come from: 12 bytes per
weight, drawn once and kept, as the released code keeps them.  Axes are named as in gradients.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opus_bench.ghost import outside_autocast, row_chunks, wide
from opus_bench.gradients import PerSampleGradient
from opus_bench.preconditioner import Preconditioner
from opus_bench.utility import Utility, Weights


@dataclass(frozen=True)
class Table:
    """Bucket and sign of every coordinate of one weight, row-major."""

    bucket: Int[Tensor, " d"]  # int64, in [0, width)
    sign: Float[Tensor, " d"]  # float32, +1 or -1

    @property
    def bytes(self) -> int:
        return self.bucket.nbytes + self.sign.nbytes


class LiteralSketch:
    """Alignment and Gram of the candidates by CountSketch with stored tables.

    Mean and variance, over seeds: those of ``sketch.count_sketch``, summed over weights.
    Cost: O(n t o i) flops to form the gradients and O(n o i) to scatter them; 12 bytes per weight
        are kept from the first call on, and n * width numbers for the weight at hand.
    A table is drawn on the CPU, so it is the same on every machine, and kept on the gradients' device.
    """

    def __init__(self, width: int = 8192, seed: int = 42) -> None:
        if width < 1:
            raise ValueError(f"sketch_width must be at least 1, got {width}")
        self.width = width
        self.seed = seed
        self.tables: dict[str, Table] = {}

    @property
    def bytes(self) -> int:
        """Bytes of all tables drawn so far."""
        return sum(table.bytes for table in self.tables.values())

    def table(self, name: str, size: int, device: torch.device) -> Table:
        """The weight's table, drawn from the seed and the name on first use.

        Raises:
            ValueError: for a weight that has another size than at its first use.
        """
        if name not in self.tables:
            generator = torch.Generator().manual_seed(self.seed + crc32(name.encode()))
            bucket = torch.randint(self.width, (size,), generator=generator)
            sign = torch.randint(2, (size,), generator=generator, dtype=torch.float32).mul_(2).sub_(1)
            self.tables[name] = Table(bucket.to(device), sign.to(device))
        table = self.tables[name]
        if len(table.sign) != size:
            raise ValueError(f"{name} has {size} coordinates, its table {len(table.sign)}")
        return table

    @outside_autocast
    def sketch(self, name: str, gradient: PerSampleGradient, preconditioner: Preconditioner) -> Float[Tensor, "n k"]:
        """Sketch of every sample's effective update P_t G_n, materialised by chunks of rows."""
        o, i = gradient.shape
        right = wide(gradient.uses[0].right)
        table = self.table(name, o * i, right.device)
        total = right.new_zeros(len(right), self.width)
        for start, dense in row_chunks(preconditioner.on_left(gradient)):
            update = preconditioner.on_rows(dense, start).flatten(1)
            part = slice(start * i, start * i + update.shape[1])
            total.index_add_(1, table.bucket[part], update * table.sign[part])
        return total

    @outside_autocast
    def __call__(
        self,
        candidates: dict[str, PerSampleGradient],
        proxy_gradient: dict[str, Float[Tensor, "o i"]],
        preconditioners: dict[str, Preconditioner],
        alignment_weights: Weights,
        redundancy_weights: Weights | None,
    ) -> Utility:
        """Features of candidates and proxy per weight, then inner products; sums over weights in float64.

        ``redundancy_weights`` None skips the Gram.
        """
        if not candidates:
            raise ValueError("no parameter to score")
        like = next(iter(candidates.values())).uses[0].right
        alignment = like.new_zeros(len(like), dtype=torch.float64)
        gram = like.new_zeros(len(like), len(like), dtype=torch.float64)
        for name, gradient in candidates.items():
            features = self.sketch(name, gradient, preconditioners[name])
            table, target = self.tables[name], proxy_gradient[name].flatten()
            proxy = target.new_zeros(self.width).index_add_(0, table.bucket, target * table.sign)
            alignment = alignment + alignment_weights[name] * (features @ proxy).double()
            if redundancy_weights is not None:
                gram = gram + redundancy_weights[name] * (features @ features.T).double()
        return Utility(alignment.cpu(), None if redundancy_weights is None else gram.cpu())
