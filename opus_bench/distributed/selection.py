"""Selection by several processes: each scores a share of the candidates.

    global    utilities (and sketches, where there is redundancy) are gathered, and the choice is process 0's from
              all of them.  It does not depend on the number of processes: utilities are equal to rounding, draws
              are equal but where rounding moves one across a threshold.  What the others chose is not looked at:
              a GPU's sums may differ from another's in the last bit, and a greedy choice with them.
    local     the candidates are split into ``size`` shares, in order, and process r draws its part of the
              selection from share r with generator r.  Utilities are those of the global selection; the choice
              depends on the number of shares, and equals what one process draws from each share with that
              share's generator.  Nothing but the proxy's gradient is communicated.

In both all processes must see the same candidates in the same order, which is checked at every step.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.tensor import DTensor

from opus_bench import sampling
from opus_bench.distributed.world import World, shared_mean_gradient
from opus_bench.layers import layer_names, parameter_names
from opus_bench.distributed.state import LivePreconditioners
from opus_bench.selector import Opus, Selection, Selector, TrainState
from opus_bench.sequences import Sequences, as_sequences
from opus_bench.streamed import (
    forward_alignment, is_out_of_memory, streamed_alignment, streamed_features, within_memory,
)
from opus_bench.utility import Utility, utility_of_sketches

Scope = Literal["global", "local"]
SCOPES = ("global", "local")


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of one step's randomness, a function of its arguments alone: nothing of it need be saved to resume."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:7], "big")


def step_generator(seed: int, step: int, share: int = 0) -> torch.Generator:
    """The generator of one step's draws; global selection has one share."""
    return torch.Generator().manual_seed(step_seed(seed, step, share))


@dataclass
class SharedOpus:
    """``selector.Opus`` on processes that hold the same or shards of the same model; a Selector.

    ``gathered``: candidates are those of all processes, each scores its share, and all get all utilities (global
    selection).  Otherwise the candidates are this process's own (local selection).  In both the proxy batch is that
    of all processes, its gradient the mean over all of it.

    Exactness: utilities equal those of one process up to the order of sums.
    Cost: that of Opus on 1 / size of candidates and proxy, and 1 / size of Muon's P_t (``LivePreconditioners``).
        Sharded weights: the direction V = P_t g_proxy stays sharded, and one weight of it at a time is gathered when
        the backward meets its layer (o i numbers a weight and microbatch); the sketch gathers optimizer state in its
        place, and sketches of all candidates, weight by weight, where there is redundancy (n * width numbers each).
        ``estimator="forward"`` needs neither.

    A GPU that runs out of memory in scoring halves the microbatch and scores again, with the same result to
    rounding; ``notes`` says so.  Not with sharded weights, where the other processes would wait for this one's
    part of a collective: there it is an error.

    Raises:
        ValueError: for an Opus whose terms need all candidates' factors at once (exact Gram, measured curvature,
            adjoint).
    """

    opus: Opus
    world: World
    gathered: bool = True
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.opus.needs_all_at_once:
            raise ValueError("the exact Gram, the measured curvature and the adjoint need all candidates' factors on "
                             "one process; set redundancy=0 and preconditioner='frozen', or take estimator='sketch'")

    def select(self, candidates: Any, size: int, state: TrainState, generator: torch.Generator) -> Selection:
        """Choose ``size`` of the candidates; all processes call this together."""
        sampling.check_size(size, len(as_sequences(candidates)))
        return self.opus.choose(self.utilities(candidates, state), size, state.step, generator)

    def utilities(self, candidates: Any, state: TrainState) -> Utility:
        """Alignment and redundancy of the candidates, the same on every process if ``gathered``."""
        opus = self.opus
        proxy_batch = None if state.proxy is None else as_sequences(state.proxy).window(opus.window)
        if not proxy_batch:
            raise ValueError("opus needs a proxy batch in TrainState.proxy, got none")
        names = layer_names(state.model, opus.layers)
        p = LivePreconditioners(
            state.optimizers, parameter_names(state.model, names), plain=opus.preconditioner == "identity")
        if opus._proxy_gradient is None or state.step % opus.proxy_every == 0:
            opus._proxy_gradient = shared_mean_gradient(
                state.model, proxy_batch, names, self.world, opus.label_shift)
        window = as_sequences(candidates).window(opus.window)
        own, counted = self.world.share(len(window)) if self.gathered else (torch.arange(len(window)), len(window))
        part = window[own]
        if opus.estimator == "sketch":
            return self._sketched(part, counted, len(window), state, names, p)
        directions = self._directions(state, names, p)
        mine = self._in_microbatches(
            lambda size: self._alignment(part, state, names, directions, size), len(part), state)
        return Utility(self._all(mine[:counted], len(window)), None, 0.0)

    def _all(self, mine: Tensor, n: int) -> Tensor:
        return self.world.gather(mine, n) if self.gathered else mine

    def _directions(self, state: TrainState, names: list[str], p: LivePreconditioners) -> dict[str, Tensor]:
        """V = w P_t g_proxy of every weight, of all processes together, so not in what one may do over."""
        assert self.opus._proxy_gradient is not None
        weights, _ = self.opus.term_weights(p.rates, parameter_names(state.model, names))
        found = p.directions(self.opus._proxy_gradient)
        return {k: weights[k] * found.pop(k) for k in list(found)}

    def _alignment(
        self, part: Sequences, state: TrainState, names: list[str], directions: dict[str, Tensor],
        microbatch: int | None,
    ) -> Float[Tensor, " m"]:
        opus = self.opus
        if opus.estimator == "forward":
            return forward_alignment(
                state.model, part, parameter_names(state.model, names), directions, opus.relative_step,
                opus.label_shift, microbatch)
        return streamed_alignment(
            state.model, part, names, directions, opus.label_shift, microbatch,
            opus.products)

    def _sketched(
        self, part: Sequences, counted: int, n: int, state: TrainState, names: list[str], p: LivePreconditioners
    ) -> Utility:
        opus, proxy = self.opus, self.opus._proxy_gradient
        assert proxy is not None
        alignment_weights, redundancy_weights = opus.term_weights(p.rates, parameter_names(state.model, names))
        weight = 1.0 if isinstance(opus.redundancy, str) else float(opus.redundancy)
        p.build()  # of all processes together, so not in what one may do over

        def features(microbatch: int | None) -> dict[str, Tensor]:
            return streamed_features(state.model, part, names, p, opus.sketch_width, opus.sketch_seed,
                                     opus.label_shift, microbatch, opus.products)

        mine = self._in_microbatches(features, len(part), state)

        own = ((name, mine.pop(name)[:counted]) for name in list(mine))
        rows = utility_of_sketches(
            own, proxy, alignment_weights, redundancy_weights if weight else None, opus.sketch_width,
            opus.sketch_seed, lambda x: self._all(x, n))
        return Utility(self._all(rows.alignment, n), None if rows.gram is None else self._all(rows.gram, n), weight)

    def _in_microbatches(self, score: Callable[[int | None], Any], n: int, state: TrainState) -> Any:
        """The score with the selector's microbatch, halved for good when memory runs out."""
        opus, sharded = self.opus, any(isinstance(p, DTensor) for p in state.model.parameters())
        tried = opus._fitting or opus.microbatch
        try:
            found, fitted = (score(tried), tried) if sharded else within_memory(score, n, tried)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            size = min(tried or n, n) if sharded else 1
            raise ValueError(f"out of GPU memory at step {state.step}, scoring {size} candidates at a time on process "
                             f"{self.world.rank}; give a smaller scoring microbatch or window") from error
        if fitted != tried:
            opus._fitting = fitted
            self.notes.append(f"step {state.step}, process {self.world.rank}: out of memory scoring "
                              f"{min(tried or n, n)} candidates at a time; {fitted} from here on")
        return found

    def state_dict(self) -> dict[str, Any]:
        return self.opus.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.opus.load_state_dict(state)


def select_shared(
    selector: Selector, candidates: Sequences, size: int, state: TrainState, world: World, scope: str, seed: int
) -> tuple[Int[Tensor, " size"], Int[Tensor, " part"], Selection]:
    """One step's choice by all processes (module docstring).

    Every process runs ``selector`` on all candidates (global) or on its own (local).  SharedOpus, and GREATS and
    perplexity with a ``world``, are made for a scope and divide the work of the global one; any other does all of
    it on every process.  Process 0's choice is everybody's in the global scope (module docstring).

    Cost beside the selector's: one checksum of the candidates, and a broadcast of ``size`` numbers.

    Returns:
        Indices of all chosen candidates and those that this process trains on, both ascending and as places among
        all candidates; and this process's Selection, of which the utilities may differ from process 0's by rounding.

    Raises:
        ValueError: for a scope that is unknown, and candidates or a size that the processes cannot share evenly.
        RuntimeError: if a process has other candidates than process 0.
    """
    check_scope(scope, len(candidates), size, world.size)
    world.check_equal(f"candidates at step {state.step}", torch.tensor([checksum(candidates)]))
    part = size // world.size
    if scope == "global":
        selection = selector.select(candidates, size, state, step_generator(seed, state.step))
        chosen = world.first(selection.indices).sort().values
        return chosen, chosen[world.rank * part : (world.rank + 1) * part], selection
    own, _ = world.share(len(candidates))
    selection = selector.select(candidates[own], part, state, step_generator(seed, state.step, world.rank))
    mine = own[selection.indices.sort().values]
    return world.gather(mine, size), mine, selection


def checksum(batch: Sequences) -> int:
    """CRC-32 of tokens, masks and their shape; milliseconds for millions of tokens."""
    found = zlib.crc32(str(tuple(batch.tokens.shape)).encode())
    for x in (batch.tokens, batch.attention_mask, batch.loss_mask):
        if x is not None:
            found = zlib.crc32(x.cpu().numpy().tobytes(), found)
    return found


def check_scope(scope: str, candidates: int, size: int, processes: int) -> None:
    """Refuse what cannot be shared, before anything is computed; see ``select_shared``."""
    if scope not in SCOPES:
        raise ValueError(f"selection must be {' or '.join(SCOPES)}, got {scope!r}")
    if size % processes:
        raise ValueError(f"{size} selected sequences cannot be trained on by {processes} processes evenly; "
                         "make the selection a multiple of the processes")
    if scope == "local" and candidates % processes:
        raise ValueError(f"{candidates} candidates cannot be split evenly over {processes} processes for local "
                         "selection; make the buffer a multiple of the processes")
