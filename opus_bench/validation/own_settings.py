"""What ``opus-bench validate --model`` is told, and the thresholds that it can be held to.

Imports nothing heavy: the command's help is made from it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PAPER_WIDTH = 8192  # buckets per weight
PAPER_ARM = "paper"
OPTIMIZERS = {"sgd": 1e-3, "adamw": 1e-6, "muon": 1e-5}  # default rates; the latter two: the paper's, 8B model
DTYPES = ("float32", "bfloat16", "float64")
TEXT, ARRAYS = (".txt", ".jsonl", ".parquet"), (".npy", ".pt", ".bin")  # kinds of data
TOKEN_DTYPES = ("uint16", "uint32", "int32", "int64")
POSITIVE = ("candidates", "proxy_size", "proxy_pairs", "hash_seeds", "batch_size", "text_tokens")


@dataclass(frozen=True)
class OwnSettings:
    """A model, its data and optimizer, and how they are scored; None: settled by what is given."""

    model: str  # folder that save_pretrained made, or a hub id
    data: str  # .txt, .jsonl, .parquet, .npy, .pt or .bin
    optimizer: str = "adamw"  # sgd; adamw; muon for linear layers' matrices with adamw for the rest
    dtype: str = "float32"  # of weights and optimizer state
    trust_remote_code: bool = False
    tokenizer: str | None = None  # folder or hub id (None: where the model is)
    text_field: str = "text"  # of a record in .jsonl, column of .parquet
    text_tokens: int = 10_000_000  # tokens of a text file that are read, from its start
    token_dtype: str = "uint16"  # of a .bin without header
    proxy_data: str | None = None  # None: sequences of ``data`` that are used for nothing else
    length: int | None = None  # tokens per sequence, all of them scored (None: 512, or the model's context)
    candidates: int = 32  # sequences scored; half of them are chosen
    proxy_size: int = 8  # sequences per proxy batch
    proxy_pairs: int = 8  # pairs of proxy batches; the two of a pair share no sequence
    layers: tuple[str, ...] = ("blocks",)  # see layers.layer_names
    windows: tuple[int, ...] | None = None  # shorter score windows, tokens (None: a quarter and half of length)
    widths: tuple[int, ...] = (512, 2048, 8192, 32768)  # sketch buckets per weight
    hash_seeds: int = 8  # independent sketches per width
    oracle_candidates: int = 4  # sequences scored by torch.func in float64; 0: none
    optimizer_steps: int | None = None  # updates before scoring (None: 10, or 0 with a saved state)
    batch_size: int = 8  # sequences per update
    lr: float | None = None  # (None: OPTIMIZERS, or the saved state's)
    adam_lr: float | None = None  # of what Muon leaves to AdamW (None: AdamW's default, or the saved state's)
    optimizer_state: str | None = None  # torch.save of optimizer.state_dict(), of a list of two for muon
    seed: int = 0  # of the order of the data, dropout and draws

    def __post_init__(self) -> None:
        for name, known in (("optimizer", OPTIMIZERS), ("dtype", DTYPES), ("token_dtype", TOKEN_DTYPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, least in (("candidates", 4), ("hash_seeds", 2), ("length", 2), ("seed", 0), ("optimizer_steps", 0),
                            ("oracle_candidates", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.oracle_candidates > self.candidates:
            raise ValueError(f"oracle_candidates {self.oracle_candidates} are more than the {self.candidates} "
                             "candidates; lower it, or raise candidates")
        if not self.widths or not self.layers:
            raise ValueError("give at least one sketch width and one name of layers")
        for width in self.widths:
            if width < 1:
                raise ValueError(f"a sketch width must be at least 1 bucket, got {width}")
        for name in ("lr", "adam_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, got {value}; without a rate every utility is 0")
        if self.adam_lr is not None and self.optimizer != "muon":
            raise ValueError(f"adam_lr is of what muon leaves to AdamW; with {self.optimizer} give lr")

    @property
    def steps(self) -> int:
        """Optimizer updates before scoring."""
        if self.optimizer_steps is not None:
            return self.optimizer_steps
        return 10 if self.optimizer_state is None else 0

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def check_files(settings: OwnSettings) -> None:
    """Find out first that something given is not there or of no known kind.

    Raises:
        ValueError: naming it; a hub id cannot be looked up here and passes.
    """
    for path in filter(None, (settings.data, settings.proxy_data, settings.optimizer_state)):
        if not Path(path).is_file():
            raise ValueError(f"{path} is no file")
    for path in filter(None, (settings.data, settings.proxy_data)):
        if Path(path).suffix not in TEXT + ARRAYS:
            raise ValueError(f"data file {path} is none of {', '.join(TEXT + ARRAYS)}")
    for name in filter(None, (settings.model, settings.tokenizer)):
        hub_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)
        if not Path(name).expanduser().is_dir() and not hub_id:
            raise ValueError(f"{name} is no folder and no hub id; give the folder that save_pretrained wrote")
    folder = Path(settings.model).expanduser()
    if folder.is_dir() and not (folder / "config.json").exists():
        raise ValueError(f"{settings.model} holds no config.json; give the folder that save_pretrained wrote")


def threshold_width(widths: Iterable[int]) -> int:
    """The width that thresholds look at: the paper's, or the largest where it is not given."""
    return PAPER_WIDTH if PAPER_WIDTH in widths else max(widths)


@dataclass(frozen=True)
class Measure:
    """One number of the comparison that can be held to a threshold."""

    name: str
    sense: str  # "max": at most the threshold; "min": at least
    unit: str
    meaning: str
    value: Callable[[dict[str, Any]], float | None]  # of the findings as plain values; None: not run


def _oracle(found: dict[str, Any], own: bool) -> float | None:
    dtype = found["settings"]["dtype"] if own else "float64"
    return max((max(e["alignment"], e["gram"]) for e in found["oracle"] if e["dtype"] == dtype), default=None)


def _sketch(found: dict[str, Any], name: str) -> float:
    width = threshold_width(found["settings"]["widths"])
    return next(s[name] for s in found["sketch"] if s["width"] == width)


def _sigmas(found: dict[str, Any]) -> float:
    return max(abs(s["variance_ratio"] - 1) / s["variance_ratio_stderr"] for s in found["sketch"])


def _paper_share(found: dict[str, Any]) -> float | None:
    return next((a["effective_share"] for a in found["arms"] if a["arm"] == PAPER_ARM), None)


MEASURES = {m.name: m for m in (
    Measure("oracle_float64", "max", "relative error", "factored against torch.func, alignment and Gram, in float64",
            lambda f: _oracle(f, own=False)),
    Measure("oracle_dtype", "max", "relative error", "the same in the model's dtype, rounding included",
            lambda f: _oracle(f, own=True)),
    Measure("sketch_spearman", "min", "Spearman", "sketched against exact U, mean over hash seeds, at width 8192 "
            "(the largest where that is not among the widths)", lambda f: _sketch(f, "utility_spearman")),
    Measure("sketch_error", "max", "relative error", "of sketched alignments, mean over hash seeds, same width",
            lambda f: _sketch(f, "alignment_error")),
    Measure("variance_sigmas", "max", "standard errors", "measured over stated variance of the sketch, from 1; the "
            "worst width", _sigmas),
    Measure("proxy_spearman", "min", "Spearman", "exact alignments for another proxy batch, mean over pairs",
            lambda f: f["floor"][0]["spearman"]),
    Measure("window_spearman", "min", "Spearman", "exact alignments in a shorter window, mean over pairs; the worst "
            "window", lambda f: min((x["spearman"] for x in f["floor"][1:]), default=None)),
    Measure("effective_share", "max", "share", "effective sample size of the paper arm's draw over candidates left; "
            "1 is uniform", _paper_share),
)}


def parse_thresholds(texts: Sequence[str]) -> dict[str, float]:
    """NAME=VALUE as numbers by name.

    Raises:
        ValueError: for an unknown name, a name given twice, or a value that is no finite number.
    """
    bounds: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in MEASURES:
            raise ValueError(f"no threshold named {name!r}; known: {', '.join(MEASURES)}")
        if name in bounds:
            raise ValueError(f"threshold {name} is given twice")
        try:
            bounds[name] = float(value)
        except ValueError:
            bounds[name] = math.nan
        if not math.isfinite(bounds[name]):
            raise ValueError(f"threshold {name} needs a finite number, as {name}=0.5; got {text!r}")
    return bounds


def refuse_unmeasured(bounds: dict[str, float], oracle_reason: str | None, windows: Sequence[int]) -> None:
    """Find out before the computing that a threshold's measure will not be run.

    Raises:
        ValueError: naming the threshold and what leaves its measure out.
    """
    for name in bounds:
        if name.startswith("oracle") and oracle_reason:
            raise ValueError(f"threshold {name} needs the oracle, which is not run: {oracle_reason}")
        if name == "window_spearman" and not windows:
            raise ValueError(f"threshold {name} needs a shorter window; give --windows")


def judge(found: dict[str, Any], bounds: dict[str, float]) -> list[dict[str, Any]]:
    """Every threshold with what was measured; one that cannot be said to be met is missed."""
    judged = []
    for name, bound in bounds.items():
        measure = MEASURES[name]
        value = measure.value(found)
        met = value is not None and (value <= bound if measure.sense == "max" else value >= bound)
        judged.append({"name": name, "sense": measure.sense, "threshold": bound, "unit": measure.unit,
                       "measured": value, "met": met})
    return judged
