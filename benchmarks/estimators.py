"""Estimators of the utilities, complete: proxy gradient, P_t and candidates, as a selector pays for them each step.

Those of the product are an `Opus` with its knobs; the rest (tried.py) are what was tried beside them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opus_bench.gradients import capture, mean_gradient
from opus_bench.preconditioner import preconditioners
from opus_bench.utility import Utility

from .literal import LiteralSketch
from .problem import Estimator, Problem, bf16, opus
from .tried import forward_difference, forward_mode, gram_of_some_rows, tensor_sketch, top_blocks, two_sided

_literal = LiteralSketch()


def literal(problem: Problem, candidates: Tensor, proxy: Tensor) -> Utility:
    """The paper's algorithm as written: factors of all layers captured, rows made dense, scattered by cached tables."""
    names, parameters = problem.scored()
    p = preconditioners(problem.optimizers, parameters)
    gradient, _ = mean_gradient(problem.model, proxy, names)
    eta = {k: one.learning_rate for k, one in p.items()}
    return _literal(capture(problem.model, candidates, names), gradient, p, eta, {k: x**2 for k, x in eta.items()})


EXACT: dict[str, Any] = dict(estimator="exact", redundancy=0.0)
ESTIMATORS = (
    Estimator("literal CountSketch", "as written in the paper, tables cached", "float32", literal, False),
    Estimator("CountSketch", "hashed on the fly, layer by layer", "float32", opus()),
    Estimator("CountSketch, bf16", "the same, forward and backward in bfloat16", "bfloat16",
              opus(scoring_dtype="bfloat16")),
    Estimator("exact alignment and Gram", "both from dense rows in chunks", "float32", opus(estimator="exact")),
    Estimator("exact alignment and Gram, bf16", "the same, products in bfloat16", "bfloat16",
              opus(estimator="exact", scoring_dtype="bfloat16")),
    Estimator("exact alignment", "contraction with P g_proxy", "float32", opus(**EXACT)),
    Estimator("exact alignment, bf16", "the same, products in bfloat16", "bfloat16",
              opus(scoring_dtype="bfloat16", **EXACT)),
    Estimator("exact alignment, bf16, microbatches of 4", "the same in bounded memory", "bfloat16",
              opus(scoring_dtype="bfloat16", microbatch=4, **EXACT)),
    Estimator("central difference", "two forwards, step 1e-3", "float32",
              opus(estimator="forward", redundancy=0.0, relative_step=1e-3)),
    Estimator("central difference, bf16", "two forwards, step 1e-2", "bfloat16",
              opus(estimator="forward", redundancy=0.0, relative_step=1e-2, scoring_dtype="bfloat16")),
    Estimator("forward-mode derivative", "torch.func.jvp", "float32", forward_mode, False),
    Estimator("central difference, bf16, compiled", "torch.compile, after its graphs are made", "bfloat16",
              bf16(forward_difference(1.0, 1e-2, True)), False, gpt2_only=True),
    Estimator("central difference of the upper two thirds, bf16, compiled", "lower blocks run once", "bfloat16",
              bf16(forward_difference(2 / 3, 1e-2, True)), False, gpt2_only=True),
    Estimator("central difference of the upper half, bf16, compiled", "lower blocks run once", "bfloat16",
              bf16(forward_difference(1 / 2, 1e-2, True)), False, gpt2_only=True),
    Estimator("two-sided projection 96 x 96, bf16", "second moments factored", "bfloat16",
              bf16(two_sided(96, torch.bfloat16)), False),
    Estimator("TensorSketch 1024", "second moments factored", "float32", tensor_sketch(1024), False),
    Estimator("exact alignment, Gram of a quarter of rows, bf16", "random rows", "bfloat16",
              bf16(gram_of_some_rows(0.25)), False),
    Estimator("alignment of the upper half, bf16", "backward through half of the blocks", "bfloat16",
              top_blocks(0.5), False),
)
