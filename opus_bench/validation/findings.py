"""What ``opus-bench validate`` is told and what it finds: plain dataclasses, filled by validate.py."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..train import RunConfig


@dataclass(frozen=True)
class Settings:
    """What is trained and how it is scored.  The paper's batch of 32 candidates and 8 proxies."""

    optimizer: str = "adamw"  # adamw, or muon for block matrices with adamw for the rest
    scale: str = "tiny"  # model size: tiny or ci
    steps: int = 60  # optimizer updates before scoring
    widths: tuple[int, ...] = (512, 2048, 8192, 32768)  # sketch buckets per weight
    seed: int = 0  # of weights, data order and draws
    length: int = 128  # tokens per sequence, all of them scored
    candidates: int = 32  # sequences scored; half of them are chosen
    proxy_size: int = 8  # sequences per proxy batch
    hash_seeds: int = 8  # independent sketches per width
    oracle_candidates: int = 8  # sequences scored in float64
    proxy_pairs: int = 8  # pairs of disjoint proxy batches
    windows: tuple[int, ...] = (32, 64)  # shorter score windows, tokens

    def __post_init__(self) -> None:
        if self.scale not in ("tiny", "ci"):
            raise ValueError(f"scale must be tiny or ci, got {self.scale!r}")
        if not self.widths:
            raise ValueError("give at least one sketch width")
        for width in self.widths:
            if width < 1:
                raise ValueError(f"a sketch width must be at least 1 bucket, got {width}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if self.candidates < 4:
            raise ValueError(f"candidates must be at least 4 sequences, got {self.candidates}")
        if self.hash_seeds < 2:
            raise ValueError(f"hash_seeds must be at least 2, got {self.hash_seeds}")
        self.run_config  # noqa: B018  (checks the rest)

    @property
    def run_config(self) -> RunConfig:
        """Training settings: constant rate, so that eta at the scored step is the peak's."""
        return RunConfig(
            "random", model=self.scale, embedding_std=0.5, optimizer=self.optimizer, adam_lr=0.02, cooldown=0.0,
            steps=self.steps, length=self.length, buffer=self.candidates, proxy_size=self.proxy_size, seed=self.seed,
        )


@dataclass(frozen=True)
class OracleError:
    """Norm of the difference to torch.func in float64 over the norm, of alignments and Gram."""

    dtype: str  # of the factored computation
    candidates: int
    alignment: float
    gram: float


@dataclass(frozen=True)
class SketchFidelity:
    """Sketched against exact utilities at one width; means over hash seeds unless named otherwise.

    Errors are norms over norms of the exact quantity.  ``scatter`` is the root mean square of the
    alignment's error over seeds, ``predicted_scatter`` the same from the stated variance.  The
    candidates share the proxy's sketch, so their errors go together: for normal errors of covariance
    C the ratio of measured to predicted variance has standard error sqrt(2 tr C^2 / seeds) / tr C.
    """

    width: int  # buckets per weight
    hash_seeds: int
    alignment_spearman: float
    alignment_spearman_lowest: float
    utility_spearman: float  # of U given a quarter already selected, over the candidates left
    utility_spearman_lowest: float
    alignment_error: float
    gram_error: float  # Frobenius
    scatter: float
    predicted_scatter: float
    variance_ratio: float  # measured / predicted
    variance_ratio_stderr: float  # of that ratio for this many seeds
    top_overlap: float  # share of the top half by U before anything is selected that is exact's too
    greedy_overlap: float  # the same for the half taken greedily, U brought up to date


@dataclass(frozen=True)
class ArmDraw:
    """One selection by an arm: means over its picks."""

    arm: str
    utility_std: float
    temperature: float  # in units of the utility
    effective_share: float  # effective sample size / candidates left; 1 is uniform
    total_variation: float  # from uniform; 0 is uniform


@dataclass(frozen=True)
class NoiseFloor:
    """Spearman of exact alignments for one change of the measurement."""

    change: str
    pairs: int
    spearman: float  # mean over pairs
    lowest: float
    highest: float


@dataclass(frozen=True)
class Validation:
    """Everything that ``opus-bench validate`` prints."""

    settings: Settings
    training_loss: tuple[float, float]  # first and last step, nat/token
    parameters: int
    oracle: tuple[OracleError, ...]
    sketch: tuple[SketchFidelity, ...]
    arms: tuple[ArmDraw, ...]
    floor: tuple[NoiseFloor, ...]
    verdict: str
    seconds: float

    def plain(self) -> dict[str, Any]:
        """All numbers as values that JSON knows."""
        return dataclasses.asdict(self)
