"""Rows of the tables at the scales `small` and `paper`: what is run, on which text, under the paper's name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .paper_settings import SCORERS, Setting
from .presets import METHODS

ARMS = ("paper", "released", "calibrated")
DEVIATIONS = {
    **{name: METHODS[method].deviations for name, method in (
        ("released", "opus-released"), ("calibrated", "opus-calibrated"), ("perplexity", "ppl-high"),
        ("greats", "greats"))},
    "static": ("the scorer keeps the best documents of the whole pool, as many tokens as are trained on; the paper's "
               "share is not known",),
    "quality": ("classifier trained here on the proxy split instead of DCLM's published fastText model",),
}


@dataclass(frozen=True)
class Line:
    """A row of a table at these scales: what is run on which pool."""

    name: str
    selector: str = "random"
    options: dict[str, Any] = field(default_factory=dict)  # of the selector
    arm: str | None = None
    paper_row: str | None = None
    pool: str = "fineweb"  # of POOLS
    random: str = "Random"  # label of the Random row on the same pool
    static: str | None = None  # scorer whose best documents the pool holds
    times: int = 1  # the setting's update tokens
    config: dict[str, Any] = field(default_factory=dict)  # buffer, selection_ratio, proxy_size, proxy
    item: str | None = None  # the paper's table that has the row, if it is another than the script's
    deviations: tuple[str, ...] = ()


def opus_lines(setting: Setting, arms: Sequence[str] = ARMS, pool: str = "fineweb", part: str = "") -> list[Line]:
    """OPUS in its arms; ``part`` is the paper's name of the pool, as s4+5."""
    scale, name = setting.scale(""), named("OPUS", part)
    options = {"window": scale.window, "sketch_width": scale.sketch_width}
    wider = {"proxy_size": 4 * scale.run["proxy_size"]}  # as at the other scales
    return [Line(name, "opus", {"arm": arm, **options}, arm, name, pool, named("Random", part),
                 config=wider if arm == "calibrated" else {}, deviations=DEVIATIONS.get(arm, ())) for arm in arms]


def compared_lines(setting: Setting, pool: str = "fineweb", part: str = "", twice: bool = True) -> list[Line]:
    """The paper's baselines: random, twice the tokens, highest loss, GREATS, static scorers."""
    shape, window, random = setting.shape, {"window": setting.shape.window}, named("Random", part)
    all_offered = {"buffer": shape.selected, "selection_ratio": 1.0}

    def line(name: str, selector: str = "random", options: dict[str, Any] | None = None, **more: Any) -> Line:
        return Line(named(name, part), selector, options or {}, None, named(name, part), pool, random, **more)

    doubled = [Line(f"Random({2 * setting.update_tokens / 1e9:g}B{f', {part}' * bool(part)})",
                    paper_row=f"Random(60B{f',{part}' * bool(part)})", pool=pool, random=random, times=2,
                    config=all_offered)]
    return [
        line("Random"),
        *(doubled if twice else []),
        line("PPL", "perplexity", {"keep": "high", **window}, deviations=DEVIATIONS["perplexity"]),
        line("GREATS", "greats", window, deviations=DEVIATIONS["greats"]),
        *(line(scorer.row, static=scorer.name, config=all_offered, deviations=DEVIATIONS["static"])
          for scorer in SCORERS),
    ]


def named(name: str, part: str) -> str:
    """A row's name with the paper's name of its pool, as OPUS(s3)."""
    return f"{name}({part})" if part else name
