"""The Selector protocol and Opus, with its three arms.

    paper        Eq 23-26 as written: sketched utility, eta and eta^2, temperature .9 on raw scores
    released     what the authors' code computes: labels shifted twice, each layer's features
                 scaled by 1 / sqrt(d_in d_out), the rest as in the paper
    calibrated   ours: exact alignment over all weights with a larger, less frequent proxy batch,
                 temperature set per draw by a target effective sample size, no redundancy term

An arm is a set of defaults; every knob can be set by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Int
from torch import Tensor, nn

from . import sampling
from .ghost import mean, outside_autocast, wide
from .gradients import PerSampleGradient, capture, curvature, mean_gradient
from .layers import layer_names, parameter_names
from .optimizer_map import adjoint
from .preconditioner import Preconditioner, preconditioners
from .sequences import Sequences, as_sequences
from .streamed import (
    check_microbatch, explained, forward_alignment, streamed_alignment, streamed_sketch, within_memory,
)
from .utility import Utility, Weights, check_utilities, exact_utility, sketched_utility


@dataclass(frozen=True)
class TrainState:
    """What a selector may look at; it must leave all of it as it was."""

    model: nn.Module  # plain (not compiled) causal language model of transformers
    optimizers: Sequence[torch.optim.Optimizer] | torch.optim.Optimizer
    step: int  # update steps done
    proxy: Int[Tensor, "m t"] | Sequences | Mapping[str, Tensor] | None = None  # this step's proxy batch


@dataclass(frozen=True)
class Selection:
    """The choice of one step."""

    indices: Int[Tensor, " size"]  # into the candidates, in the order of picking
    utilities: Tensor | None = None  # (n,) before anything was selected
    diagnostics: dict[str, Any] = field(default_factory=dict)


class Selector(Protocol):
    """Chooses which candidates are trained on.

    ``select`` leaves parameters, ``.grad``, optimizer state, module types, training flags and
    every RNG but ``generator`` bit-identical.  ``candidates`` is whatever ``sequences.as_sequences``
    takes: a (n, t) tensor of tokens, a data loader's batch with masks, anything with ``.tokens``.
    A selector that carries something from step to step returns it from ``state_dict`` (plain
    values), so that a resumed run is the same run.
    """

    def select(
        self, candidates: Any, size: int, state: TrainState, generator: torch.Generator
    ) -> Selection: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Stateless:
    """Mix-in for selectors that carry nothing from step to step."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def products_of(scoring_dtype: str) -> torch.dtype | None:
    """Dtype of the matrix products of scoring by its name in a selector; None: the factors', at least float32.

    Raises:
        ValueError: for another name.
    """
    if scoring_dtype not in ("model", "bfloat16"):
        raise ValueError(f"scoring_dtype must be model or bfloat16, got {scoring_dtype!r}")
    return torch.bfloat16 if scoring_dtype == "bfloat16" else None


def scoring_autocast(products: torch.dtype | None, device: torch.device) -> AbstractContextManager:
    """Forwards and backwards of scoring in the dtype of its products; None: as they are."""
    return nullcontext() if products is None else torch.autocast(device.type, products)


@dataclass
class Opus:
    """OPUS online selection on the live model and optimizer.  Build one with ``Opus.arm(name)``.

    Every field says where its default comes from: [P] paper, [C] released code, ours.
    """

    arm_name: str = "custom"
    window: int = 512  # tokens scored per sequence, from its start [P: 512]
    layers: str | Sequence[str] = "blocks"  # see layers.layer_names; [C] leaves out embedding, head
    preconditioner: Literal["frozen", "adjoint", "identity"] = "frozen"
    # "frozen": P_t [P].  "adjoint": alignment along J^T g_proxy, J the derivative of the optimizer's real
    # map at the candidates' mean gradient (ours; exact estimator only).  "identity": as for SGD.
    estimator: Literal["exact", "sketch", "forward"] = "sketch"  # [P] sketch; the exact costs no more (ours)
    # "forward": alignment alone as a central difference of losses, two forwards and no backward (ours)
    scoring_dtype: Literal["model", "bfloat16"] = "model"  # bfloat16: scoring under autocast, products included (ours)
    microbatch: int | None = None  # candidates in one pass; None: all.  Bounds memory but for the exact Gram (ours)
    # halved, with a warning and the diagnostic "out_of_memory", when memory runs out all the same
    relative_step: float = 3e-3  # of "forward": length of the difference / norm of the scored weights (ours)
    sketch_width: int = 8192  # buckets per weight [P]
    sketch_seed: int = 42  # [C]
    label_shift: int = 1  # 1: next token; 2: the token after it [C]
    layer_scaling: bool = False  # features of a weight times 1 / sqrt(o i) [C]
    utility_scale: Literal["learning_rate", "one"] = "learning_rate"  # the eta of Eq 23 [P]
    redundancy: float | Literal["paper", "measured"] = "paper"
    # "paper": weight eta^2 in Eq 23 [P].  "measured": h / size, the second-order term of the loss
    # after a step on the mean of ``size`` updates, h the curvature along them (ours).  A number:
    # that weight in place of h / size.  0 leaves the term out.
    curvature_every: int = 25  # steps between measurements of h (ours)
    proxy_every: int = 1  # steps that a proxy gradient serves [P: 1]; P_t is always the live one
    sampling: Literal["boltzmann", "greedy", "top_k"] = "boltzmann"  # [P] Eq 26; Table 7 has greedy
    temperature: float | None = 0.9  # in units of the utility [P]
    effective_share: float | None = None  # or: target ESS of each draw / candidates left (ours: .25)
    _curvature: float | None = field(default=None, repr=False)
    _proxy_gradient: dict[str, Tensor] | None = field(default=None, repr=False)
    _fitting: int | None = field(default=None, repr=False)  # microbatch that fitted after memory ran out

    @staticmethod
    def arm(name: str, **overrides: Any) -> Opus:
        """An arm by name: "paper", "released" or "calibrated", with any field overridden."""
        if name not in ARMS:
            raise ValueError(f"unknown arm {name!r}; known: {', '.join(ARMS)}")
        return replace(ARMS[name], arm_name=name, **overrides)

    def __post_init__(self) -> None:
        if self.window <= self.label_shift:
            raise ValueError(f"window must exceed {self.label_shift} tokens, got {self.window}")
        for name in ("curvature_every", "proxy_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 step, got {getattr(self, name)}")
        if self.sketch_width < 1:
            raise ValueError(f"sketch_width must be at least 1, got {self.sketch_width}")
        if isinstance(self.redundancy, str) and self.redundancy not in ("paper", "measured"):
            raise ValueError(f"redundancy must be 'paper', 'measured' or a number, got {self.redundancy!r}")
        if self.sampling not in ("boltzmann", "greedy", "top_k"):
            raise ValueError(f"sampling must be boltzmann, greedy or top_k, got {self.sampling!r}")
        if self.estimator not in ("exact", "sketch", "forward"):
            raise ValueError(f"estimator must be exact, sketch or forward, got {self.estimator!r}")
        products_of(self.scoring_dtype)
        check_microbatch(self.microbatch)
        if not self.relative_step > 0:
            raise ValueError(f"relative_step must be positive, got {self.relative_step}")
        if self.estimator == "forward" and self.redundancy != 0:
            raise ValueError("estimator='forward' gives alignment alone; set redundancy=0, or take 'exact' or 'sketch'")
        if self.microbatch is not None and self.needs_all_at_once:
            raise ValueError("the exact Gram, the measured curvature and the adjoint need all candidates' factors at "
                             "once; leave microbatch out, set redundancy=0, or take estimator='sketch'")
        if self.preconditioner not in ("frozen", "adjoint", "identity"):
            raise ValueError(f"preconditioner must be frozen, adjoint or identity, got {self.preconditioner!r}")
        if self.preconditioner == "adjoint" and self.estimator != "exact":
            raise ValueError("preconditioner='adjoint' needs estimator='exact': no update per candidate is formed "
                             "that could be sketched")
        if self.sampling == "boltzmann" and (self.temperature is None) == (self.effective_share is None):
            raise ValueError("give exactly one of temperature and effective_share and set the other to None, got "
                             f"{self.temperature} and {self.effective_share}")
        if self.temperature is not None:
            sampling.check_temperature(self.temperature)
        if self.effective_share is not None:
            sampling.check_effective_share(self.effective_share)

    def select(
        self, candidates: Any, size: int, state: TrainState, generator: torch.Generator
    ) -> Selection:
        """Choose ``size`` candidates; see Selector.  Cost: see ``utilities``."""
        sampling.check_size(size, len(as_sequences(candidates)))
        return self.choose(self.utilities(candidates, size, state), size, state.step, generator)

    def choose(self, utility: Utility, size: int, step: int, generator: torch.Generator) -> Selection:
        """Choose ``size`` by utility; the part of ``select`` that sees no model."""
        first = utility.marginal([])
        check_utilities(first, f"opus ({self.arm_name}) at step {step}")
        if self.sampling == "greedy":
            draws = sampling.greedy(utility.marginal, size)
        elif self.sampling == "top_k":
            draws = sampling.top_k(utility.marginal, size)
        else:
            draws = sampling.boltzmann_sample(
                utility.marginal, size, generator, self.temperature, self.effective_share
            )
        diagnostics: dict[str, Any] = {
            "utility_std": float(first.std()),
            "redundancy_weight": utility.redundancy_weight,
        }
        if self._curvature is not None:
            diagnostics["curvature"] = self._curvature
        if self._fitting is not None:
            diagnostics["out_of_memory"] = f"scored {self._fitting} candidates at once, since more ran out of memory"
        if draws.effective_share:
            for name, values in (("effective_sample_size", draws.effective_share),
                                 ("total_variation", draws.total_variation), ("temperature", draws.temperature)):
                diagnostics[name] = math.fsum(values) / len(values)
        return Selection(torch.tensor(draws.indices), first, diagnostics)

    def utilities(self, candidates: Any, size: int, state: TrainState) -> Utility:
        """Alignment and redundancy of the candidates (module legend of utility.py).

        Cost: one forward and backward-to-activations of candidates and a full one of the proxy,
            each over ``window`` tokens, then the estimator's.

        Raises:
            torch.OutOfMemoryError: if the proxy, or what has to be held at once, does not fit, with the mend.
        """
        proxy_batch = None if state.proxy is None else as_sequences(state.proxy).window(self.window)
        if not proxy_batch:
            raise ValueError("opus needs a proxy batch in TrainState.proxy, got none")
        names = layer_names(state.model, self.layers)
        parameters = parameter_names(state.model, names)
        p = outside_autocast(preconditioners)(state.optimizers, parameters)
        if self.preconditioner == "identity":
            p = {k: Preconditioner(learning_rate=v.learning_rate) for k, v in p.items()}
        window = as_sequences(candidates).window(self.window)
        with scoring_autocast(self.products, window.tokens.device):
            if self._proxy_gradient is None or state.step % self.proxy_every == 0:
                with explained(f"the proxy batch of {len(proxy_batch)} does not fit in memory; lower it or the window"):
                    self._proxy_gradient, _ = mean_gradient(state.model, proxy_batch, names, self.label_shift)
            if self.needs_all_at_once:
                with explained(f"{len(window)} candidates do not fit in memory, and the exact Gram, the measured "
                               "curvature and the adjoint need them at once; lower the buffer or the window, set "
                               "redundancy=0, or take estimator='sketch'"):
                    return self._captured(window, proxy_batch, size, state, names, parameters, p)
            return self._streamed(window, state, names, parameters, p)

    @property
    def needs_all_at_once(self) -> bool:
        """Whether the terms take all candidates' factors at once: no microbatches, no shares."""
        exact_gram = self.estimator == "exact" and self.redundancy != 0
        return exact_gram or self.redundancy == "measured" or self.preconditioner == "adjoint"

    @property
    def products(self) -> torch.dtype | None:
        """Dtype of the matrix products of scoring; None: the factors', at least float32."""
        return products_of(self.scoring_dtype)

    def term_weights(
        self, rates: Mapping[str, float], parameters: Mapping[str, nn.Parameter]
    ) -> tuple[Weights, Weights]:
        """Weights of alignment and redundancy per parameter (Eq 23; [C] with its layer scaling) by its eta_t."""
        eta = {k: rate if self.utility_scale == "learning_rate" else 1.0 for k, rate in rates.items()}
        scale = {k: 1 / math.sqrt(w.numel()) if self.layer_scaling else 1.0 for k, w in parameters.items()}
        power = 2 if self.redundancy == "paper" else 1
        return {k: eta[k] * scale[k] for k in eta}, {k: eta[k] ** power * scale[k] ** 2 for k in eta}

    def _streamed(
        self, window: Sequences, state: TrainState, names: list[str], parameters: dict[str, nn.Parameter],
        p: dict[str, Preconditioner],
    ) -> Utility:
        """Alignment, or sketches, in one pass and bounded memory."""
        proxy = self._proxy_gradient
        assert proxy is not None
        rates = {k: v.learning_rate for k, v in p.items()}
        alignment_weights, redundancy_weights = self.term_weights(rates, parameters)
        weight = 1.0 if isinstance(self.redundancy, str) else float(self.redundancy)

        def compute(microbatch: int | None) -> Utility:
            if self.estimator == "sketch":
                utility = streamed_sketch(
                    state.model, window, names, proxy, p, alignment_weights, redundancy_weights if weight else None,
                    self.sketch_width, self.sketch_seed, self.label_shift, microbatch, self.products)
                return replace(utility, redundancy_weight=weight)
            directions = {k: alignment_weights[k] * outside_autocast(p[k])(wide(g)) for k, g in proxy.items()}
            if self.estimator == "forward":
                alignment = forward_alignment(state.model, window, parameters, directions, self.relative_step,
                                              self.label_shift, microbatch)
            else:
                alignment = streamed_alignment(state.model, window, names, directions, self.label_shift, microbatch,
                                               self.products)
            return Utility(alignment, None, 0.0)

        tried = self._fitting or self.microbatch
        utility, fitted = within_memory(compute, len(window), tried)
        if fitted != tried:
            self._fitting = fitted
        return utility

    def _captured(
        self, window: Sequences, proxy_batch: Sequences, size: int, state: TrainState, names: list[str],
        parameters: dict[str, nn.Parameter], p: dict[str, Preconditioner],
    ) -> Utility:
        """What needs all candidates' factors at once: the exact Gram, the measured curvature, the adjoint."""
        proxy = self._proxy_gradient
        assert proxy is not None
        gradients = capture(state.model, window, names, self.label_shift)
        rates = {k: v.learning_rate for k, v in p.items()}
        alignment_weights, redundancy_weights = self.term_weights(rates, parameters)
        weight = 1.0
        if self.redundancy == "measured":
            weight = self._measured_curvature(state, gradients, p, proxy_batch) / size
        elif self.redundancy != "paper":
            weight = float(self.redundancy)
        options = (gradients, proxy, p, alignment_weights, redundancy_weights if weight else None)
        if self.estimator == "exact":
            directions = None
            if self.preconditioner == "adjoint":
                directions = adjoint(state.optimizers, parameters, {k: mean(g) for k, g in gradients.items()}, proxy)
            utility = exact_utility(*options, directions, self.products)
        else:
            utility = sketched_utility(*options, self.sketch_width, self.sketch_seed, self.products)
        return replace(utility, redundancy_weight=weight)

    def _measured_curvature(
        self,
        state: TrainState,
        gradients: dict[str, PerSampleGradient],
        p: dict[str, Preconditioner],
        proxy: Sequences,
    ) -> float:
        """h along the candidates' mean update, kept for ``curvature_every`` steps, at least 0."""
        if self._curvature is None or state.step % self.curvature_every == 0:
            direction = {k: p[k](mean(g)) for k, g in gradients.items()}
            self._curvature = max(0.0, curvature(state.model, proxy, direction, self.label_shift))
        return self._curvature

    def state_dict(self) -> dict[str, Any]:
        return {"curvature": self._curvature, "proxy_gradient": self._proxy_gradient, "fitting": self._fitting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._curvature, self._proxy_gradient = state["curvature"], state["proxy_gradient"]
        self._fitting = state.get("fitting")


ARMS: dict[str, Opus] = {
    "paper": Opus(arm_name="paper"),
    "released": Opus(arm_name="released", label_shift=2, layer_scaling=True),
    "calibrated": Opus(
        arm_name="calibrated", layers="matrices", estimator="exact", utility_scale="one", redundancy=0.0,
        proxy_every=8, temperature=None, effective_share=0.25,
    ),
}
