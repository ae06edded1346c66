"""Per-sample gradients of a plain causal language model: exact (torch.func) and factored (hooks).

Notation (one letter per axis, the same in every file of the core):
    n, m   samples in the two batches being compared
    t, u   token positions
    o, i   rows and columns of a weight as it is stored
    k      sketch buckets
A sample's loss is the mean next-token negative log-likelihood of its first ``window`` tokens
(nat/token).  Its gradient for one weight is ``G[n] = sum_t left[n, t] right[n, t]^T``, shape (o, i):

    Linear     (o, i)     left = b, the gradient at the layer's output;  right = a, its input
    Conv1D     (i, o)     the transpose: left = a, right = b
    bias       (o, 1)     left = b, right = 1
    Embedding  (vocab, d) left = one-hot(token), kept as integer ids; right = b

``b`` is the gradient of that sample's own loss (losses are summed over the batch, so no 1/n is
hidden in it).  A weight used more than once (tied head, shared layer) has one pair per use; its
gradient is their sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LINEAR_KINDS = (nn.Linear, Conv1D)
SCORED_KINDS = (nn.Linear, Conv1D, nn.Embedding)


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


def token_losses(
    logits: Float[Tensor, "n t v"], tokens: Int[Tensor, "n t"], label_shift: int = 1
) -> Float[Tensor, "n u"]:
    """Negative log-likelihood (nat) of token t + label_shift under the logits at position t.

    ``label_shift`` 1 is next-token prediction.  2 is what the released OPUS code scores, which
    shifts labels that were shifted already.
    """
    # the last positions have no label; ignoring them spares a copy of the logits
    labels = nn.functional.pad(tokens[:, label_shift:], (0, label_shift), value=-100)
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(tokens.shape)[:, :-label_shift]


def sample_losses(
    model: nn.Module, tokens: Int[Tensor, "n t"], label_shift: int = 1
) -> Float[Tensor, " n"]:
    """Mean loss of each sequence in nat/token."""
    return token_losses(model(input_ids=tokens).logits, tokens, label_shift).mean(1)


def layer_names(model: nn.Module, layers: str | Sequence[str] = "blocks") -> list[str]:
    """Names of the modules whose weights are scored.

    Args:
        layers: "blocks", every linear layer but the output head (the choice of the paper and its
            code); "matrices", those and the embeddings and head, which leaves out norms' weights;
            "all", the same, but an error if that leaves anything out; or module names.

    Raises:
        ValueError: for an unknown name, a module of a kind that cannot be scored, and for "all"
            when a parameter belongs to no module that can be (it is named).
    """
    refuse_compiled(model)
    modules = dict(model.named_modules())
    if isinstance(layers, str) and layers in ("blocks", "matrices", "all"):
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if layers == "blocks":
            names = [k for k, m in modules.items() if isinstance(m, LINEAR_KINDS) and m is not head]
        else:
            names = [k for k, m in modules.items() if isinstance(m, SCORED_KINDS)]
            covered = {id(p) for k in names for p in modules[k].parameters(recurse=False)}
            missed = [k for k, p in model.named_parameters() if id(p) not in covered]
            if missed and layers == "all":
                raise ValueError(
                    f"layers='all' cannot score {', '.join(missed)}: only weights and biases of "
                    "Linear, Conv1D and Embedding modules have factored gradients; "
                    "use layers='matrices' to leave them out"
                )
    else:
        names = [layers] if isinstance(layers, str) else list(layers)
        for name in names:
            if name not in modules:
                raise ValueError(f"no layer named {name!r}; 'blocks', 'matrices', 'all' or names of modules")
            if not isinstance(modules[name], SCORED_KINDS):
                raise ValueError(f"layer {name!r} is a {type(modules[name]).__name__}; "
                                 "only Linear, Conv1D and Embedding can be scored")
    if not names:
        raise ValueError(f"layers={layers!r} selects no layer of {type(model).__name__}")
    return names


def parameter_names(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters of the named modules under their canonical names, tied ones once."""
    canonical = {id(p): name for name, p in model.named_parameters()}
    modules = dict(model.named_modules())
    return {
        canonical[id(p)]: p for name in names for p in modules[name].parameters(recurse=False)
    }


def refuse_compiled(model: nn.Module) -> None:
    """Raise ValueError for a compiled model, whose hooks would silently see nothing."""
    if any(isinstance(m, torch._dynamo.OptimizedModule) or m._compiled_call_impl is not None
           for m in model.modules()):
        raise ValueError("the model is compiled, so its layers cannot be observed; "
                         "give the selector the plain model and compile a copy that shares its weights")


@contextmanager
def scoring_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off while scoring; every module's training flag is put back as it was.

    Raises:
        ValueError: for a compiled model.
    """
    refuse_compiled(model)
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        with torch.enable_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def capture(
    model: nn.Module, tokens: Int[Tensor, "n t"], layers: Sequence[str], label_shift: int = 1
) -> dict[str, PerSampleGradient]:
    """Factored per-sample gradients of the named layers, by one forward and one backward.

    Exactness: the factors are those of autograd; nothing is approximated.
    Cost: one forward and the backward to activations only (no weight gradient is formed);
        memory O(n t (o + i)) per layer on top of the activations.
    Leaves ``.grad``, training flags and RNGs as they were.

    Raises:
        ValueError: if a named layer was not called, or got no gradient, or the model is compiled.
    """
    refuse_compiled(model)
    modules = dict(model.named_modules())
    canonical = {id(p): name for name, p in model.named_parameters()}
    calls: list[tuple[str, Tensor, Tensor]] = []

    def observe(name: str, a: Tensor, output: Tensor) -> Tensor:
        """Note input and output of one call; a call shared by all samples is made one per sample."""
        if len(output) == 1 < len(tokens):  # position embeddings are looked up once and broadcast
            a, output = (x.expand(len(tokens), *x.shape[1:]) for x in (a, output))
        if output.ndim != 3 or len(output) != len(tokens):
            raise ValueError(f"layer {name!r} has output {tuple(output.shape)} for {len(tokens)} "
                             "samples; only (samples, positions, features) can be scored")
        calls.append((name, a.detach(), output))
        return output

    handles = [
        modules[name].register_forward_hook(
            lambda module, args, output, name=name: observe(name, args[0], output)
        )
        for name in layers
    ]
    try:
        with scoring_mode(model):
            losses = sample_losses(model, tokens, label_shift)
            silent = set(layers) - {name for name, _, _ in calls}
            if silent:
                raise ValueError(f"layers {sorted(silent)} were not called by the forward pass")
            outputs = [output for _, _, output in calls]
            grads = torch.autograd.grad(losses.sum(), outputs, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    dead = [name for (name, _, _), grad in zip(calls, grads) if grad is None]
    if dead:
        raise ValueError(f"layers {dead} got no gradient: the loss does not depend on them")

    uses: dict[str, list[Factors]] = {}
    shapes: dict[str, tuple[int, int]] = {}

    def add(parameter: nn.Parameter, left: Tensor, right: Tensor) -> None:
        name = canonical[id(parameter)]
        uses.setdefault(name, []).append(Factors(left, right))
        shapes[name] = tuple(parameter.shape) if parameter.ndim == 2 else (parameter.numel(), 1)

    for (name, a, _), b in zip(calls, grads):
        module = modules[name]
        if isinstance(module, nn.Embedding):
            add(module.weight, a, b)
        elif isinstance(module, Conv1D):
            add(module.weight, a, b)
        else:
            add(module.weight, b, a)
        if getattr(module, "bias", None) is not None:
            add(module.bias, b, b.new_ones(*b.shape[:2], 1))
    return {name: PerSampleGradient(shapes[name], tuple(uses[name])) for name in uses}


def mean_gradient(
    model: nn.Module, tokens: Int[Tensor, "n t"], layers: Sequence[str], label_shift: int = 1
) -> tuple[dict[str, Float[Tensor, "o i"]], Tensor]:
    """Gradient of the batch's mean loss for the named layers, and that loss (nat/token).

    For a proxy batch this is g_proxy.  Biases come as (o, 1).  Exact; one forward and backward.
    """
    parameters = parameter_names(model, layers)
    with scoring_mode(model):
        loss = sample_losses(model, tokens, label_shift).mean()
        grads = torch.autograd.grad(loss, list(parameters.values()))
    return {k: g if g.ndim == 2 else g[:, None] for k, g in zip(parameters, grads)}, loss.detach()


def exact_per_sample_grads(
    model: nn.Module, tokens: Int[Tensor, "n t"], layers: Sequence[str], label_shift: int = 1
) -> dict[str, Float[Tensor, "n o i"]]:
    """Per-sample gradients by ``torch.func.grad``, one sample at a time: the oracle.

    Independent of hooks and factors; every other estimate in the suite is tested against it.
    Cost: n forwards and backwards and O(n o i) memory.
    """
    parameters = {k: p.detach() for k, p in parameter_names(model, layers).items()}

    def loss(parameters: dict[str, Tensor], sequence: Tensor) -> Tensor:
        logits = torch.func.functional_call(
            model, parameters, (), {"input_ids": sequence[None]}, tie_weights=True
        ).logits
        return token_losses(logits, sequence[None], label_shift).mean()

    with scoring_mode(model):
        rows = [torch.func.grad(loss)(parameters, sequence) for sequence in tokens]
    stacked = {k: torch.stack([row[k] for row in rows]).detach() for k in parameters}
    return {k: g if g.ndim == 3 else g[:, :, None] for k, g in stacked.items()}


def curvature(
    model: nn.Module,
    tokens: Int[Tensor, "n t"],
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
    norm = sum((d.double() ** 2).sum() for d in directions)
    if not norm > 0:
        raise ValueError("curvature along a zero direction is undefined")
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with scoring_mode(model), plain:
        loss = sample_losses(model, tokens, label_shift).mean()
        grads = torch.autograd.grad(loss, parameters, create_graph=True)
        slope = sum((g * d).sum() for g, d in zip(grads, directions))
        products = torch.autograd.grad(slope, parameters, allow_unused=True)
    bend = sum((h.double() * d.double()).sum() for h, d in zip(products, directions) if h is not None)
    return float((bend / norm).detach())
