"""Utilities in one pass and bounded memory: what a layer's (a, b) are needed for is done when the backward meets it.

Candidates go through the model in microbatches, and nothing but n numbers (alignment) or n sketches is kept, so
peak memory does not depend on how many candidates there are.  ``forward_alignment`` needs no backward at all.
The same quantities from captured factors, and the exact Gram, which needs all candidates at once, are in
utility.py; axes as in gradients.py.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .errors import first_line
from .ghost import contract, full, outside_autocast
from .gradients import PerSampleGradient, sample_losses, scoring_mode, stream
from .preconditioner import Preconditioner
from .sequences import Sequences, as_sequences
from .sketch import sketch_gradients
from .utility import Utility, Weights, utility_of_sketches, weight_seed

Batch = Int[Tensor, "n t"] | Sequences
Result = TypeVar("Result")


def check_microbatch(size: int | None) -> None:
    """Raise ValueError for a size below 1."""
    if size is not None and size < 1:
        raise ValueError(f"microbatch must be at least 1 candidate, got {size}")


def microbatches(batch: Batch, size: int | None) -> Iterator[tuple[slice, Sequences]]:
    """Consecutive parts of at most ``size`` samples (None: one part) with their places in the batch.

    Raises:
        ValueError: for a size below 1.
    """
    check_microbatch(size)
    sequences = as_sequences(batch)
    step = size or max(1, len(sequences))
    for start in range(0, len(sequences), step):
        part = slice(start, min(start + step, len(sequences)))
        yield part, sequences[part]


def streamed_alignment(
    model: nn.Module,
    batch: Batch,
    layers: Sequence[str],
    directions: Mapping[str, Float[Tensor, "o i"]],
    label_shift: int = 1,
    microbatch: int | None = None,
    products: torch.dtype | None = None,
) -> Float[Tensor, " n"]:
    """<G_n, V> summed over the layers' parameters, V = ``directions`` with all weights in it; float64.

    Args:
        directions: by parameter name, w_l P_t g_proxy or an adjoint; a sharded one is gathered when the backward
            meets its layer, for each microbatch, and dropped again.
        microbatch: candidates in one forward and backward; None: all.
        products: dtype of the contraction's matrix products; None: the factors', at least float32.

    Exactness: that of ``ghost.contract``; products in bfloat16 round V, a and V a to 8 bits of mantissa, an
        error of independent roundings that is measured by ``python -m benchmarks.scoring``.
    Cost: one forward, one backward to activations, and 2 t o i flops a candidate and weight; memory of one
        microbatch's backward without weight gradients.
    """
    total = torch.zeros(len(as_sequences(batch)), dtype=torch.float64)
    for part, sequences in microbatches(batch, microbatch):
        sums: list[Tensor] = []

        def consume(name: str, gradient: PerSampleGradient, sums: list[Tensor] = sums) -> None:
            direction = directions[name] if products is None else directions[name].to(products)
            sums.append(contract(gradient, full(direction), products).double())

        stream(model, sequences, layers, consume, label_shift)
        total[part] = torch.stack(sums).sum(0).cpu()
    return total


def streamed_sketch(
    model: nn.Module,
    batch: Batch,
    layers: Sequence[str],
    proxy_gradient: Mapping[str, Float[Tensor, "o i"]],
    preconditioners: Mapping[str, Preconditioner],
    alignment_weights: Weights,
    redundancy_weights: Weights | None,
    width: int = 8192,
    seed: int = 42,
    label_shift: int = 1,
    microbatch: int | None = None,
    products: torch.dtype | None = None,
) -> Utility:
    """``utility.sketched_utility`` without captured factors: equal to it up to the order of sums.

    Memory: one microbatch's backward, and n * width numbers per weight.
    """
    features = streamed_features(model, batch, layers, preconditioners, width, seed, label_shift, microbatch,
                                 products)
    return utility_of_sketches(features.items(), proxy_gradient, alignment_weights, redundancy_weights, width, seed)


def streamed_features(
    model: nn.Module,
    batch: Batch,
    layers: Sequence[str],
    preconditioners: Mapping[str, Preconditioner],
    width: int = 8192,
    seed: int = 42,
    label_shift: int = 1,
    microbatch: int | None = None,
    products: torch.dtype | None = None,
) -> dict[str, Float[Tensor, "n k"]]:
    """CountSketch of every u_n = P_t G_n per weight, in the order of the model; cost as ``streamed_sketch``."""
    n = len(as_sequences(batch))
    features: dict[str, Tensor] = {}

    for part, sequences in microbatches(batch, microbatch):

        def consume(name: str, gradient: PerSampleGradient, part: slice = part) -> None:
            found = outside_autocast(sketch_gradients)(
                gradient, preconditioners[name], width, weight_seed(seed, name), products)
            if name not in features:
                features[name] = found.new_zeros(n, width)
            features[name][part] += found

        stream(model, sequences, layers, consume, label_shift)
    if not features:
        raise ValueError("no parameter to score")
    return dict(reversed(features.items()))  # the backward met the last layer first


def within_memory(
    compute: Callable[[int | None], Result], samples: int, microbatch: int | None
) -> tuple[Result, int | None]:
    """``compute(microbatch)``, all over with half the microbatch each time memory runs out; and the size that did.

    Equal to computing with that size from the start.  Utilities of two sizes differ by rounding at most.

    Raises:
        torch.OutOfMemoryError: if one candidate alone does not fit.
    """
    while True:
        size = samples if microbatch is None else min(microbatch, samples)
        try:
            return compute(microbatch), microbatch
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise torch.OutOfMemoryError("one candidate does not fit in memory; lower the window") from error
        microbatch = size // 2  # out of the handler, whose error keeps alive what was allocated
        warnings.warn(f"out of memory scoring {size} candidates at once; going on with {microbatch}", RuntimeWarning,
                      stacklevel=2)


@contextmanager
def explained(mend: str) -> Iterator[None]:
    """Add to an out-of-memory error what its user can do."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(f"{mend} ({first_line(error)})") from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Of an accelerator, or of PyTorch's allocator on the CPU, whose error has no type of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def moved(
    parameters: Mapping[str, nn.Parameter], directions: Mapping[str, Float[Tensor, "o i"]]
) -> Iterator[Callable[[float], None]]:
    """``set_to(c)`` puts every parameter to theta + c V; on leaving they are theta again, bit for bit.

    Memory: one copy of the parameters.
    """
    before = {name: p.detach().clone() for name, p in parameters.items()}

    def set_to(c: float) -> None:
        with torch.no_grad():
            for name, p in parameters.items():
                torch.add(before[name], directions[name].reshape(p.shape), alpha=c, out=p)
        torch.clear_autocast_cache()  # an autocast of the caller's keeps narrow copies of weights

    try:
        yield set_to
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(before[name])
        torch.clear_autocast_cache()


def forward_alignment(
    model: nn.Module,
    batch: Batch,
    parameters: Mapping[str, nn.Parameter],
    directions: Mapping[str, Float[Tensor, "o i"]],
    relative_step: float = 3e-3,
    label_shift: int = 1,
    microbatch: int | None = None,
) -> Float[Tensor, " n"]:
    """<G_n, V> as a central difference of the losses along V: two forwards, no backward, no hooks; float64.

        (L_n(theta + eps V) - L_n(theta - eps V)) / (2 eps),   eps |V| = relative_step |theta|

    Works on whatever runs forward: compiled or sharded models (parameters and V as DTensors), fused attention,
    layers that cannot be observed.

    Exactness: bias eps^2 / 6 times the third derivative along V; noise of the losses' rounding over eps.  Both
        are measured by ``python -m benchmarks.scoring``; smaller steps suit float32, larger ones bfloat16.
    Cost: two forwards, three passes over the parameters and one copy of them.  They are restored bit for bit,
        also when a forward raises.

    Raises:
        ValueError: for a relative step that is not positive, and for a V that is zero or not finite.
    """
    if not relative_step > 0:
        raise ValueError(f"relative_step must be positive, got {relative_step}")

    def norm(tensors: Sequence[Tensor]) -> float:  # only sets the step, so the tensors' precision is enough
        return math.hypot(*(float(full(torch.linalg.vector_norm(x.detach()))) for x in tensors))

    length = norm([directions[name] for name in parameters])
    if not 0 < length < float("inf"):
        raise ValueError(f"the direction's norm is {length}; no difference can be taken along it")
    size = norm(list(parameters.values()))
    eps = relative_step * (size or 1.0) / length
    total = torch.zeros(len(as_sequences(batch)), dtype=torch.float64)
    with scoring_mode(model), torch.no_grad(), moved(parameters, directions) as set_to:
        for sign in (1, -1):
            set_to(sign * eps)
            for part, sequences in microbatches(batch, microbatch):
                total[part] += sign * sample_losses(model, sequences, label_shift).double().cpu() / (2 * eps)
    return total
