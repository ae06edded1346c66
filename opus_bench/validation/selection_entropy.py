"""How far from uniform OPUS draws, and what it draws, by temperature and by the unit of the temperature.

A small model is trained at random on real text.  At each stage of the training every arm of the selector
scores the same buffers of candidates, and a part of each buffer is drawn at every temperature:

    raw      the temperature divides the utility itself, as in the paper (its value: .9)
    spread   in units of the standard deviation of the buffer's utilities before anything is selected
    share    of each draw, so that the effective sample size is a set share of the candidates left
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import sampling
from ..corpus import Corpus
from ..selector import ARMS, Opus, TrainState
from ..stream import Batch, CandidateStream, ProxyStream
from ..train import RunConfig
from ..utility import Utility, check_utilities
from .trained import Stage, stages

PAPER_SCORES = (0.0033, 0.0059)  # lowest and highest score printed in the paper's appendix
PAPER_TEMPERATURE = 0.9  # raw [paper]
UNITS = ("raw", "spread", "share")


@dataclass(frozen=True)
class Bound:
    """How far from uniform one draw can be at most."""

    log_ratio: float  # ln(largest / smallest probability), at most
    effective_share: float  # effective sample size / candidates, at least
    total_variation: float  # from uniform, at most


def bound(lowest: float, highest: float, temperature: float) -> Bound:
    """Limits that hold for any number of candidates with utilities anywhere in [lowest, highest].

    With d = (highest - lowest) / temperature the weights w = exp(U / temperature) lie in [A, A e^d], and

        ln(largest / smallest probability)  <= d
        ESS / n = (sum w)^2 / (n sum w^2)   >= 4 A A e^d / (A + A e^d)^2 = 1 / cosh^2(d / 2)
        total variation from uniform        <= tanh(d / 4)

    The second is Kantorovich's inequality in the form of Polya and Szego.  The third: for a set S of k
    candidates, p(S) - k/n is largest with S at the top and the rest at the bottom, where it is
    x (1 - x) (e^d - 1) / (1 + x (e^d - 1)), x = k/n, largest at x = 1 / (1 + e^(d/2)).

    Raises:
        ValueError: highest below lowest, or a temperature that is not positive.
    """
    sampling.check_temperature(temperature)
    if not highest >= lowest:
        raise ValueError(f"the highest utility, {highest}, must not be below the lowest, {lowest}")
    d = (highest - lowest) / temperature
    x = math.exp(-d)  # never overflows
    return Bound(d, 4 * x / (1 + x) ** 2, math.tanh(d / 4))


@dataclass(frozen=True)
class Scored:
    """A buffer with its utilities by one arm."""

    utility: Utility
    domains: tuple[str, ...]  # of each candidate

    @property
    def spread(self) -> float:
        """Standard deviation of U before anything is selected."""
        return float(self.utility.marginal([]).double().std())


def score(
    stage: Stage, arm: str, buffers: Sequence[Batch], proxies: Sequence[Tensor], window: int, sketch_width: int
) -> list[Scored]:
    """Each buffer scored by an arm for its own proxy batch, over the first ``window`` tokens.

    Raises:
        FloatingPointError, ValueError: utilities that cannot rank anything (`utility.check_utilities`).
    """
    found = []
    for candidates, proxy in zip(buffers, proxies, strict=True):
        # a new one: it would keep the proxy gradient of the last buffer.  Its size enters a measured curvature only
        selector = Opus.arm(arm, window=window, sketch_width=sketch_width)
        utility = selector.utilities(
            candidates, len(candidates) // 2, TrainState(stage.model, stage.optimizers, stage.step, proxy)
        )
        check_utilities(utility.marginal([]), f"{arm} arm at step {stage.step}")
        found.append(Scored(utility, candidates.domains))
    return found


def draw(scored: Scored, size: int, unit: str, value: float, generator: torch.Generator) -> sampling.Draws:
    """``size`` candidates at a temperature of ``value`` in a unit of the module's legend.

    Raises:
        ValueError: an unknown unit, a value that is none of it.
    """
    if unit == "share":
        return sampling.boltzmann_sample(scored.utility.marginal, size, generator, effective_share=value)
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")
    scale = scored.spread if unit == "spread" else 1.0
    return sampling.boltzmann_sample(scored.utility.marginal, size, generator, temperature=value * scale)


def domain_share(domains: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of the sequences whose domain is one of ``wanted``."""
    return sum(domain in wanted for domain in domains) / len(domains)


def draws_at(
    buffers: Sequence[Scored], size: int, unit: str, value: float, repeats: int, seed: int,
    target: Sequence[str], corrupted: Sequence[str],
) -> dict[str, float]:
    """What `measure` lists of one temperature: means over buffers and over ``repeats`` selections from each.

    A pick takes one random number, so the same seed gives every arm and temperature the same ones, and the
    uniform draws that gains are counted from: near-uniform draws differ from these by no more than they should.
    """
    generator, same = (torch.Generator().manual_seed(seed) for _ in range(2))
    shares, variations, ratios, coincide = [], [], [], []
    gains: tuple[list[float], list[float]] = ([], [])
    for scored in buffers:
        n = len(scored.domains)
        first = scored.utility.marginal([]).double()
        chosen, at_random = [], []
        for _ in range(repeats):
            draws = draw(scored, size, unit, value, generator)
            uniform = sampling.boltzmann_sample(lambda selected, n=n: torch.zeros(n), size, same, temperature=1.0)
            shares.append(_mean(draws.effective_share))
            variations.append(_mean(draws.total_variation))
            coincide.append(draws.indices == uniform.indices)
            chosen += [scored.domains[i] for i in draws.indices]
            at_random += [scored.domains[i] for i in uniform.indices]
        ratios.append(float(first.max() - first.min()) / draws.temperature[0])  # of the first draw, in every repeat
        for gain, wanted in zip(gains, (target, corrupted)):
            gain.append(domain_share(chosen, wanted) - domain_share(at_random, wanted))
    target_stderr, corrupted_stderr = (
        float(torch.tensor(gain, dtype=torch.float64).std()) / math.sqrt(len(buffers)) for gain in gains)
    return {
        "effective_share": _mean(shares), "total_variation": _mean(variations), "log_ratio": _mean(ratios),
        "same_as_uniform": _mean(coincide),
        "target_gain": _mean(gains[0]), "target_gain_stderr": target_stderr,
        "corrupted_gain": _mean(gains[1]), "corrupted_gain_stderr": corrupted_stderr,
    }


def units(settings: dict[str, Any]) -> int:
    """How often ``measure`` calls ``on_step``: once a training step and once a stage, arm and temperature."""
    temperatures = sum(len(values) for values in settings["temperatures"].values())
    return settings["stages"][-1] + len(settings["stages"]) * len(ARMS) * (temperatures + 1)


def check(settings: dict[str, Any], config: RunConfig) -> None:
    """Refuse what `measure` cannot measure.

    Raises:
        ValueError: fewer than 2 buffers (no standard error), no repeats, a unit or temperature that is none, an
            arm without a proxy size, a window that does not fit a sequence.
    """
    for name, least in (("buffers", 2), ("repeats", 1)):
        if settings[name] < least:
            raise ValueError(f"{name} must be at least {least}, got {settings[name]}")
    for unit, values in settings["temperatures"].items():
        if unit not in UNITS:
            raise ValueError(f"temperatures have the units {', '.join(UNITS)}, got {unit!r}")
        for value in values:
            (sampling.check_effective_share if unit == "share" else sampling.check_temperature)(value)
    if sorted(settings["proxy_sizes"]) != sorted(ARMS):
        raise ValueError(f"proxy_sizes must be given for {', '.join(ARMS)}, got {sorted(settings['proxy_sizes'])}")
    if not 2 < settings["window"] <= config.length:
        raise ValueError(f"window must be 3 tokens to the {config.length} of a sequence, got {settings['window']}")


def measure(
    config: RunConfig, settings: dict[str, Any], corpus: Corpus, on_step: Callable[[], Any] = lambda: None
) -> list[dict[str, Any]]:
    """Rows named "effective_share": effective sample size of a draw over candidates left, mean over draws.

    Buffers are of the size that the model is trained with, and those that training would come to after the
    last stage, the same at every stage; as many are drawn from each as a step trains on.

    Args:
        settings: stages (updates done), temperatures (unit -> values), buffers, repeats (selections from each
            buffer), window (tokens scored of a sequence), sketch_width, proxy_sizes (arm -> sequences).

    Returns:
        A row for each stage, arm, unit and temperature.  Further keys, means over buffers and repeats:
        total_variation (of a draw, from uniform), log_ratio (ln of largest over smallest probability, first
        draw), same_as_uniform (share of the selections that are pick for pick those of uniform draws with the
        same random numbers), target_gain and corrupted_gain (share of the chosen that is of the target domain,
        or of corrupted text, minus that of those uniform draws, whose mean is the share offered) with their
        standard errors over buffers.  Then, once a stage and arm, "utility_std" (of a buffer's utilities, in the
        arm's own units, mean over buffers), and once for all "target_offered" and "corrupted_offered", the
        shares among all candidates.  Equal settings give equal rows.

    Raises:
        ValueError: bad settings, before the model is trained.
    """
    check(settings, config)
    count, window, width = settings["buffers"], settings["window"], settings["sketch_width"]
    target, corrupted = [corpus.spec.target], [domain for domain in corpus.domains if "corrupt" in domain]
    stream = CandidateStream(corpus, config.length, config.buffer, config.seed)
    ahead = settings["stages"][-1]
    buffers = [stream.candidates(ahead + number) for number in range(count)]
    offered = [domain for batch in buffers for domain in batch.domains]
    proxies = {}
    for arm in ARMS:
        proxy = ProxyStream(corpus, config.length, settings["proxy_sizes"][arm], config.seed)
        proxies[arm] = [proxy.proxy(number) for number in range(count)]
    rows: list[dict[str, Any]] = []
    for stage in stages(config, corpus, settings["stages"], on_step):
        if not rows:
            rows.append(stage.row("target_offered", domain_share(offered, target)))
            rows.append(stage.row("corrupted_offered", domain_share(offered, corrupted)))
        for arm in ARMS:
            scored = score(stage, arm, buffers, proxies[arm], window, width)
            rows.append(stage.row("utility_std", _mean([one.spread for one in scored]), arm=arm))
            on_step()
            for unit, values in settings["temperatures"].items():
                for value in values:
                    found = draws_at(scored, config.selected_size, unit, value, settings["repeats"], config.seed,
                                     target, corrupted)
                    rows.append(stage.row("effective_share", found.pop("effective_share"), arm=arm,
                                          temperature_unit=unit, temperature=value, **found))
                    on_step()
    return rows


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
