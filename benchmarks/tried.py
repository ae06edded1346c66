"""Estimators that were tried and are not in the product; the page of the benchmark says what each costs and loses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from opus_bench.ghost import contract, outside_autocast
from opus_bench.gradients import PerSampleGradient, mean_gradient, sample_losses, scoring_mode, stream
from opus_bench.layers import layer_names
from opus_bench.model import rms_norm
from opus_bench.preconditioner import preconditioners
from opus_bench.streamed import forward_alignment
from opus_bench.utility import Utility, weight_seed

from .problem import Problem, Score, opus


def forward_mode(problem: Problem, candidates: Tensor, proxy: Tensor) -> Utility:
    """Alignment by forward-mode derivative along V: exact, no backward for candidates, attention in plain form."""
    _, parameters, directions = problem.weighted(proxy)

    def losses(values: dict[str, Tensor]) -> Tensor:
        # detached leaves under functional_call: no graph for a backward is made
        return _functional_losses(problem.model, values, candidates)

    primal = {k: p.detach() for k, p in parameters.items()}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, slope = torch.func.jvp(losses, (primal,), (directions,))
    return Utility(slope.double().cpu(), None, 0.0)


class _Functional(nn.Module):
    """The model with some parameters replaced, as a callable that `sample_losses` takes."""

    def __init__(self, model: nn.Module, values: dict[str, Tensor]) -> None:
        super().__init__()
        self._call = lambda **inputs: torch.func.functional_call(model, values, (), inputs, tie_weights=True)

    def forward(self, **inputs: Any) -> Any:
        return self._call(**inputs)


def _functional_losses(model: nn.Module, values: dict[str, Tensor], tokens: Tensor) -> Tensor:
    return sample_losses(_Functional(model, values), tokens)


@dataclass(frozen=True)
class Projection:
    """Linear features of a weight's gradient, taken from its factors and from a dense matrix alike."""

    of_factors: Callable[[Tensor, Tensor], Tensor]  # left (n, t, o), right (n, t, i) -> (n, k)
    of_matrix: Callable[[Tensor], Tensor]  # (o, i) -> (k,)


def projected(make: Callable[[str, int, int, Tensor | None], tuple[Projection, Projection]]) -> Score:
    """Alignment and Gram from inner products of projections, P_t's diagonal factored.

    ``make(name, o, i, diagonal)`` gives the projection of candidates' updates, with the diagonal's factors in it,
    and the same one without them, of the proxy's gradient.  An elementwise P_t does not pass through projections
    of rows and columns, so it is replaced by the outer product of its row and column means over its mean
    (Adafactor's form).
    """

    def score(problem: Problem, candidates: Tensor, proxy: Tensor) -> Utility:
        names, parameters = problem.scored()
        p = preconditioners(problem.optimizers, parameters)
        gradient, _ = mean_gradient(problem.model, proxy, names)
        alignment, gram = torch.zeros(len(candidates)).double(), torch.zeros(len(candidates), len(candidates)).double()

        def consume(name: str, g: PerSampleGradient) -> None:
            (use,) = p[name].on_left(g).uses
            updates, plain = make(name, *g.shape, p[name].diagonal)
            x = p[name].scale * updates.of_factors(use.left, use.right).to(gradient[name].dtype)
            target = plain.of_matrix(gradient[name])
            eta = p[name].learning_rate
            alignment.add_(eta * (x @ target).double().cpu())
            gram.add_(eta**2 * (x @ x.T).double().cpu())

        stream(problem.model, candidates, names, outside_autocast(consume))
        return Utility(alignment, gram)

    return score


def factored(diagonal: Float[Tensor, "o i"]) -> tuple[Float[Tensor, " o"], Float[Tensor, " i"]]:
    """Row and column factors whose outer product is the diagonal's best one of equal row and column means."""
    return diagonal.mean(1) / diagonal.mean(), diagonal.mean(0)


def signs(rows: int, columns: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Random signs in the dtype and on the device of ``like``."""
    return torch.randint(2, (rows, columns), generator=generator).mul(2).sub(1).to(like)


def two_sided(size: int, products: torch.dtype) -> Score:
    """(A b) (B a)^T of size x size; A, B random signs over sqrt(size).

    Variance, nothing factored: below (2 / size) |u|^2 |g|^2 (1 + 2 / size) a weight.
    """

    def make(name: str, o: int, i: int, diagonal: Tensor | None) -> tuple[Projection, Projection]:
        generator = torch.Generator().manual_seed(weight_seed(42, name))
        like = torch.zeros(())
        a, b = (signs(d, size, generator, like) / size**0.5 for d in (o, i))

        def projection(a: Tensor, b: Tensor) -> Projection:
            def of_factors(left: Tensor, right: Tensor) -> Tensor:
                left, right = left.to(products) @ a.to(left.device, products), right.to(products) @ b.to(
                    right.device, products)
                return torch.einsum("ntp,ntq->npq", left, right).flatten(1)

            return Projection(of_factors, lambda g: (a.to(g).T @ g @ b.to(g)).flatten())

        if diagonal is None:
            return projection(a, b), projection(a, b)
        rows, columns = (x.cpu() for x in factored(diagonal))
        return projection(rows[:, None] * a, columns[:, None] * b), projection(a, b)

    return projected(make)


def tensor_sketch(size: int) -> Score:
    """CountSketch of the outer product b a^T as the circular convolution of one of b with one of a (Pham, Pagh 2013).

    Coordinate (o, i) falls into bucket h1(o) + h2(i) mod size with sign s1(o) s2(i).  A token costs two short
    transforms, whatever o and i are; the sum over tokens is taken in the frequency domain.
    Variance, nothing factored: below 3 |u|^2 |g|^2 / size a weight.
    """

    def make(name: str, o: int, i: int, diagonal: Tensor | None) -> tuple[Projection, Projection]:
        generator = torch.Generator().manual_seed(weight_seed(42, name))
        buckets = [torch.randint(size, (d,), generator=generator) for d in (o, i)]
        sign = [signs(1, d, generator, torch.zeros(()))[0] for d in (o, i)]

        def side(x: Tensor, which: int, factor: Tensor | None) -> Tensor:
            x = x.float() if x.dtype == torch.bfloat16 else x
            scaled = x * (sign[which] if factor is None else sign[which] * factor.cpu()).to(x)
            counts = x.new_zeros(*x.shape[:-1], size).index_add_(-1, buckets[which].to(x.device), scaled)
            return torch.fft.rfft(counts)

        def projection(rows: Tensor | None, columns: Tensor | None) -> Projection:
            def of_factors(left: Tensor, right: Tensor) -> Tensor:
                product = torch.einsum("ntk,ntk->nk", side(left, 0, rows), side(right, 1, columns))
                return torch.fft.irfft(product, n=size)

            def of_matrix(g: Tensor) -> Tensor:
                bucket = (buckets[0][:, None] + buckets[1]) % size
                signed = g * (sign[0][:, None] * sign[1]).to(g)
                return g.new_zeros(size).index_add_(0, bucket.flatten().to(g.device), signed.flatten())

            return Projection(of_factors, of_matrix)

        return projection(*((None, None) if diagonal is None else factored(diagonal))), projection(None, None)

    return projected(make)


def gram_of_some_rows(share: float) -> Score:
    """Exact alignment by contraction, and the Gram from a random share of each weight's rows, over the share."""

    def score(problem: Problem, candidates: Tensor, proxy: Tensor) -> Utility:
        names, parameters, directions = problem.weighted(proxy)
        p = preconditioners(problem.optimizers, parameters)
        n = len(candidates)
        alignment, gram = torch.zeros(n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
        generator = torch.Generator().manual_seed(42)

        def consume(name: str, g: PerSampleGradient) -> None:
            (use,) = g.uses
            o = g.shape[0]
            chosen = torch.randperm(o, generator=generator)[: max(1, round(share * o))]
            rows = torch.einsum("nto,nti->noi", use.left[:, :, chosen].bfloat16(), use.right.bfloat16())
            diagonal = p[name].diagonal
            if diagonal is not None:
                rows = rows * diagonal[chosen].bfloat16()
            flat = rows.flatten(1) * p[name].scale
            alignment.add_(contract(g, directions[name], torch.bfloat16).double().cpu())
            gram.add_(p[name].learning_rate ** 2 * o / len(chosen) * (flat @ flat.T).double().cpu())

        stream(problem.model, candidates, names, consume)
        return Utility(alignment, gram)

    return score


def top_blocks(share: float) -> Score:
    """Exact alignment of the upper blocks alone: the backward stops where they begin."""

    def score(problem: Problem, candidates: Tensor, proxy: Tensor) -> Utility:
        depth = sum(1 for name, _ in problem.model.named_modules() if name.endswith((".up", ".up_proj")))
        first = depth - max(1, round(share * depth))
        names = [name for name in layer_names(problem.model, "blocks")
                 if int(next(part for part in name.split(".") if part.isdigit())) >= first]
        return opus(layers=names, estimator="exact", redundancy=0.0, scoring_dtype="bfloat16")(
            problem, candidates, proxy)

    return score


class Upper:
    """The blocks from ``first`` on of the paper's GPT-2, as a model of its own on the same parameters.

    ``at(tokens)`` runs the lower blocks once, without a graph, and gives the upper model for these tokens.
    """

    class Lower(nn.Module):
        """In the lower blocks' place: their stored output, whatever comes in."""

        output: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("output", torch.zeros(()), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.output

    def __init__(self, model: nn.Module, first: int, compiled: bool) -> None:
        lower = list(model.blocks[:first])
        self.stored = Upper.Lower()
        upper = copy.copy(model)
        upper._modules = dict(model._modules) | {"blocks": nn.ModuleList([self.stored, *model.blocks[first:]])}

        def below(tokens: Tensor) -> Tensor:
            x = rms_norm(model.embedding(tokens))
            for block in lower:
                x = block(x)
            return x

        # a graph is compiled for every shape and grad mode on first use
        self.below, self.upper = ((torch.compile(f, dynamic=False) if compiled else f) for f in (below, upper))

    def at(self, tokens: Tensor) -> nn.Module:
        with torch.no_grad():
            self.stored.output = self.below(tokens)
        return self.upper


@lru_cache(maxsize=4)  # compiled once a model
def upper_of(model: nn.Module, first: int, compiled: bool) -> Upper:
    return Upper(model, first, compiled)


def forward_difference(share: float, relative_step: float, compiled: bool) -> Score:
    """Central difference along V in the upper ``share`` of the blocks; the lower ones run once.

    Exact but for the step's bias and rounding if share is 1; what the lower blocks would add is left out otherwise.
    """

    def score(problem: Problem, candidates: Tensor, proxy: Tensor) -> Utility:
        model = problem.model
        first = len(model.blocks) - max(1, round(share * len(model.blocks)))
        upper = upper_of(model, first, compiled)
        parameters = {k: w for k, w in problem.scored()[1].items() if int(k.split(".")[1]) >= first}
        p = outside_autocast(preconditioners)(problem.optimizers, parameters)
        with scoring_mode(model):
            loss = sample_losses(upper.at(proxy), proxy).mean()
            gradient = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))
            directions = {k: p[k].learning_rate * outside_autocast(p[k])(g) for k, g in gradient.items()}
            alignment = forward_alignment(upper.at(candidates), candidates, parameters, directions,
                                          relative_step)
        return Utility(alignment, None, 0.0)

    return score
