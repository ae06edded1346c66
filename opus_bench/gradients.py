"""Per-sample gradients of a plain causal language model: exact (torch.func) and factored (hooks).

Notation (one letter per axis, the same in every file of the core):
    n, m   samples in the two batches being compared
    t, u   token positions
    o, i   rows and columns of a weight as it is stored
    k      sketch buckets
A sample's loss is the mean next-token negative log-likelihood (nat/token) of its tokens that count
(sequences.py), of its first ``window`` tokens where a selector says so.  Its gradient for one weight
is ``G[n] = sum_t left[n, t] right[n, t]^T``, shape (o, i):

    Linear     (o, i)     left = b, the gradient at the layer's output;  right = a, its input
    Conv1D     (i, o)     the transpose: left = a, right = b
    Embedding  (vocab, d) left = one-hot(token), kept as integer ids; right = b
    bias       (o, 1)     left = b summed over positions, t = 1; right = 1
    norm       (d, 1)     left = b x summed over positions, x the normalised input; right = 1

``b`` is the gradient of that sample's own loss (losses are summed over the batch, so no 1/n is
hidden in it).  A weight used more than once (tied head, shared layer) has one pair per use; its
gradient is their sum.  Under autocast a and b have the dtype that the layer computed in; products
of them are taken in the parameter's dtype, at least float32 (ghost.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .layers import kind_of, layer_names, parameter_names, refuse_compiled
from .sequences import Sequences, as_sequences, sample_losses, token_losses

__all__ = ["Factors", "PerSampleGradient", "capture", "curvature", "exact_per_sample_grads", "layer_names",
           "mean_gradient", "parameter_names", "refuse_compiled", "sample_losses", "scoring_mode", "stream",
           "token_losses"]

Batch = Int[Tensor, "n t"] | Sequences


@dataclass(frozen=True)
class Factors:
    """One use of a weight: ``G[n] = sum_t left[n, t] right[n, t]^T`` (see the module's legend)."""

    left: Tensor  # (n, t, o), or integer ids (n, t) standing for one-hot rows
    right: Tensor  # (n, t, i)


@dataclass(frozen=True)
class PerSampleGradient:
    """Factored per-sample gradients of one parameter: the sum over its uses."""

    shape: tuple[int, int]  # (o, i); a bias counts as (o, 1)
    uses: tuple[Factors, ...]


Consume = Callable[[str, PerSampleGradient], None]


@contextmanager
def scoring_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off while scoring; every module's training flag is put back as it was."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        with torch.enable_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


class _Tap(torch.autograd.Function):
    """The identity on a layer's output; in the backward it hands (a, b) on.

    ``token`` stands for every tapped layer: asking for its gradient runs the backward through all taps and
    no further, and none of what passes is kept.  ``a`` is a saved tensor, so activation checkpointing drops
    and recomputes it as it does the layer's own.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, a: Tensor, token: Tensor, visit: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(a)
        ctx.visit = visit
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.visit(ctx.saved_tensors[0], grads[0])
        return grads[0], None, None, None


def stream(
    model: nn.Module, batch: Batch, layers: Sequence[str], consume: Consume, label_shift: int = 1
) -> Float[Tensor, " n"]:
    """One forward and one backward; every use of a weight is handed to ``consume`` when the backward meets it.

    ``consume(name, gradient)`` gets the parameter's name and one use's factors, the last layer's first; a tied
    weight comes once per use, and its gradient is their sum.  What consume does not keep is freed at once, so
    memory is that of a plain backward without weight gradients.  Returns the samples' losses (nat/token).

    Exactness, cost, side effects and errors: as ``capture``.
    """
    canonical = _canonical_names(model)

    def visit(call: int, module: nn.Module, a: Tensor, b: Tensor) -> None:
        for own_name, parameter, factors in _factors(module, a, b):
            shape = (parameter.shape[0], parameter.shape[1] if parameter.ndim == 2 else 1)
            consume(canonical[module, own_name], PerSampleGradient(shape, (factors,)))

    return _observed_backward(model, as_sequences(batch), layers, label_shift, visit)


def capture(
    model: nn.Module, batch: Batch, layers: Sequence[str], label_shift: int = 1
) -> dict[str, PerSampleGradient]:
    """Factored per-sample gradients of the named layers' trained parameters: one forward, one backward.

    Exactness: the factors are those of autograd; nothing is approximated.  Under an autocast of the
        caller's the forward runs in its dtype, and the factors are of that computation.
    Cost: one forward and the backward to activations only (no weight gradient is formed);
        memory O(n t (o + i)) per layer on top of the activations (``stream`` keeps none of it).
    Leaves ``.grad``, training flags and RNGs as they were.

    Raises:
        ValueError: if a named layer was not called, or got no gradient, or ran without autograd, or
            is a norm of another form than weight * f(input) + bias, or the model is compiled.
    """
    canonical = _canonical_names(model)
    calls: dict[int, list[tuple[str, nn.Parameter, Factors]]] = {}

    def visit(call: int, module: nn.Module, a: Tensor, b: Tensor) -> None:
        calls[call] = [(canonical[module, own_name], p, factors) for own_name, p, factors in _factors(module, a, b)]

    _observed_backward(model, as_sequences(batch), layers, label_shift, visit)
    uses: dict[str, list[Factors]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for call in sorted(calls):  # in the order of the forward
        for name, parameter, factors in calls[call]:
            uses.setdefault(name, []).append(factors)
            shapes[name] = (parameter.shape[0], parameter.shape[1] if parameter.ndim == 2 else 1)
    return {name: PerSampleGradient(shapes[name], tuple(uses[name])) for name in uses}


def _canonical_names(model: nn.Module) -> dict[tuple[nn.Module, str], str]:
    """Canonical name of every module's own parameters, tied ones under one; found before the forward, since a
    sharded module holds other tensors while it computes."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {(module, own_name): names[id(p)]
            for module in model.modules() for own_name, p in module.named_parameters(recurse=False)}


def _observed_backward(
    model: nn.Module, sequences: Sequences, layers: Sequence[str], label_shift: int,
    visit: Callable[[int, nn.Module, Tensor, Tensor], None],
) -> Tensor:
    """Losses of the samples; ``visit(call, module, a, b)`` is called in the backward, b of summed losses."""
    refuse_compiled(model)
    modules = dict(model.named_modules())
    called: list[str] = []
    cut: list[str] = []
    met: set[int] = set()
    token = torch.zeros((), requires_grad=True, device=sequences.tokens.device)
    observing = True  # activation checkpointing calls the hooks once more in the backward
    checking: list[str] = []  # the norm that is being called by ``_normalised``

    def observe(name: str, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Tap one call; a call shared by all samples is made one per sample."""
        if checking:
            return output
        a = args[0] if args else next(iter(kwargs.values()))
        if len(output) == 1 < len(sequences):  # position embeddings are looked up once and broadcast
            a, output = (x.expand(len(sequences), *x.shape[1:]) for x in (a, output))
        if output.ndim < 3 or len(output) != len(sequences):
            raise ValueError(f"layer {name!r} has output {tuple(output.shape)} for {len(sequences)} "
                             "samples; only (samples, positions, ..., features) can be scored")
        a = a.detach()
        if kind_of(modules[name]) == "norm":
            checking.append(name)
            a = _normalised(name, modules[name], a, output)
            checking.clear()
        call = len(called)
        if observing:
            called.append(name)
            if not output.requires_grad:
                cut.append(name)

        def visited(a: Tensor, b: Tensor) -> None:
            met.add(call)
            visit(call, modules[name], a, b)

        return _Tap.apply(output, a, token, visited)

    handles = [
        modules[name].register_forward_hook(
            lambda module, args, kwargs, output, name=name: observe(name, args, kwargs, output), with_kwargs=True
        )
        for name in layers
    ]
    try:
        with scoring_mode(model):
            losses = sample_losses(model, sequences, label_shift)
            observing = False
            silent = set(layers) - set(called)
            if silent:
                raise ValueError(f"layers {sorted(silent)} were not called by the forward pass")
            if cut:
                raise ValueError(f"layers {cut} ran without autograd; use_reentrant=False if they are checkpointed, "
                                 "and let at least one of their parameters be trained")
            torch.autograd.grad(losses.sum(), token, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    dead = [name for call, name in enumerate(called) if call not in met]
    if dead:
        raise ValueError(f"layers {dead} got no gradient: the loss does not depend on them")
    return losses.detach()


def _factors(module: nn.Module, a: Tensor, b: Tensor) -> Iterator[tuple[str, nn.Parameter, Factors]]:
    """The module's trained parameters, under their own names, with the factors of one call (module legend).

    A norm's a is normalised.
    """
    a = a if isinstance(module, nn.Embedding) else a.to(b.dtype)  # as autocast computed it
    weight: Any = module.weight  # of a kind that layers.kind_of knows
    bias: Any = getattr(module, "bias", None)

    def per_feature(x: Tensor) -> Factors:
        summed = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(1, -2).sum(1, keepdim=True)
        return Factors(summed, summed.new_ones(len(summed), 1, 1))

    if weight.requires_grad:
        if kind_of(module) == "norm":
            yield "weight", weight, per_feature(a * b)
        else:
            columns = a.flatten(1) if isinstance(module, nn.Embedding) else a.flatten(1, -2)
            rows = b.flatten(1, -2)
            turned = isinstance(module, nn.Embedding | Conv1D)
            yield "weight", weight, Factors(columns, rows) if turned else Factors(rows, columns)
    if bias is not None and bias.requires_grad:
        yield "bias", bias, per_feature(b)


def _normalised(name: str, module: nn.Module, a: Tensor, output: Tensor) -> Tensor:
    """x in output = weight * x + bias, from the module itself with weight 1 and bias 0; checked."""
    values = {k: p.detach() for k, p in module.named_parameters(recurse=False)}
    zero = {k: torch.zeros_like(p) for k, p in values.items()}
    with torch.no_grad():
        nothing = torch.func.functional_call(module, zero, (a,))
        x = torch.func.functional_call(module, zero | {"weight": torch.ones_like(values["weight"])}, (a,))
        again = x * values["weight"] + values.get("bias", 0)
        # rounding of a product and a sum, and of x once more; ten times that for orders of operations
        tolerance = 10 * torch.finfo(output.dtype).eps * again.abs().max()
        if nothing.any() or not (again - output).abs().max() <= tolerance:
            raise ValueError(f"layer {name!r} is a {type(module).__name__} whose output is not "
                             "weight * f(input) + bias; leave it out by naming layers")
    return x


def mean_gradient(
    model: nn.Module, batch: Batch, layers: Sequence[str], label_shift: int = 1
) -> tuple[dict[str, Float[Tensor, "o i"]], Tensor]:
    """Gradient of the mean over samples of their losses for the named layers, and that mean (nat/token).

    For a proxy batch this is g_proxy.  Biases come as (o, 1).  Exact; one forward and backward.
    """
    parameters = parameter_names(model, layers)
    with scoring_mode(model):
        loss = sample_losses(model, batch, label_shift).mean()
        grads = torch.autograd.grad(loss, list(parameters.values()))
    return {k: g if g.ndim == 2 else g[:, None] for k, g in zip(parameters, grads)}, loss.detach()


def exact_per_sample_grads(
    model: nn.Module, batch: Batch, layers: Sequence[str], label_shift: int = 1
) -> dict[str, Float[Tensor, "n o i"]]:
    """Per-sample gradients by ``torch.func.grad``, one sample at a time: the oracle.

    Independent of hooks and factors; every other estimate in the suite is tested against it.
    Cost: n forwards and backwards and O(n o i) memory.
    """
    parameters = {k: p.detach() for k, p in parameter_names(model, layers).items()}

    def loss(parameters: dict[str, Tensor], sequence: Tensor, mask: Tensor | None, counted: Tensor | None) -> Tensor:
        inputs = {"input_ids": sequence[None]} | ({} if mask is None else {"attention_mask": mask[None]})
        logits = torch.func.functional_call(model, parameters, (), inputs, tie_weights=True).logits
        losses = token_losses(logits, sequence[None], label_shift)[0]
        return losses.mean() if counted is None else (losses * counted).sum() / counted.sum()

    sequences = as_sequences(batch)
    counted = sequences.counted(label_shift)
    with scoring_mode(model):
        rows = [
            torch.func.grad(loss)(parameters, tokens,
                                  None if sequences.attention_mask is None else sequences.attention_mask[n],
                                  None if counted is None else counted[n])
            for n, tokens in enumerate(sequences.tokens)
        ]
    stacked = {k: torch.stack([row[k] for row in rows]).detach() for k in parameters}
    return {k: g if g.ndim == 3 else g[:, :, None] for k, g in stacked.items()}


def curvature(
    model: nn.Module,
    batch: Batch,
    direction: dict[str, Float[Tensor, "o i"]],
    label_shift: int = 1,
) -> float:
    """Rayleigh quotient d^T H d / |d|^2 of the batch's mean loss along a direction.

    OPUS takes H = I, that is a curvature of one.  Exact: one Hessian-vector product by double
    backward (attention by its plain mathematical form, which is twice differentiable).
    """
    named = dict(model.named_parameters())
    parameters = [named[name] for name in direction]
    directions = [d.reshape(p.shape) for d, p in zip(direction.values(), parameters)]
    zero = torch.zeros((), dtype=torch.float64, device=directions[0].device)
    norm = sum(((d.double() ** 2).sum() for d in directions), start=zero)
    if not norm > 0:
        raise ValueError("curvature along a zero direction is undefined")
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with scoring_mode(model), plain:
        loss = sample_losses(model, batch, label_shift).mean()
        grads = torch.autograd.grad(loss, parameters, create_graph=True)
        slope = sum(((g * d).sum() for g, d in zip(grads, directions)), start=torch.zeros_like(loss))
        products = torch.autograd.grad(slope, parameters, allow_unused=True)
    bend = sum(((h.double() * d.double()).sum() for h, d in zip(products, directions) if h is not None), start=zero)
    return float((bend / norm).detach())
