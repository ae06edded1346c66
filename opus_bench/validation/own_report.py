"""What ``opus-bench validate`` found, as text for a terminal and as markdown: pure functions of its JSON.

A section is a title, a note and a table (header and rows of strings), or no table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .own_settings import MEASURES

Section = tuple[str, str, Sequence[str], Sequence[Sequence[str]]]
NONE: tuple[str, ...] = ()
SENSE = {"max": "at most", "min": "at least"}


def measures(found: dict[str, Any]) -> list[Section]:
    """The five comparisons of validate.py, from their plain values."""
    s, oracle = found["settings"], found["oracle"]
    oracle_reason, arms_reason = found.get("oracle_reason"), found.get("arms_reason")
    chance = s["candidates"] // 2 / s["candidates"]
    exact_note = (f"not run: {oracle_reason}." if oracle_reason else
                  "Factored utilities against per-sample autograd in float64, relative error (norm / norm), "
                  f"{oracle[0]['candidates']} candidates.")
    arms_note = (f"not run: {arms_reason}." if arms_reason else
                 "ESS share: effective sample size / candidates left, 1 is uniform; total variation from uniform, 0 is "
                 "uniform. Means over the picks.")
    return [
        ("1. Exact?", exact_note, NONE if oracle_reason else ("dtype", "alignment", "Gram"),
         [(e["dtype"], f"{e['alignment']:.1e}", f"{e['gram']:.1e}") for e in oracle]),
        ("2. Sketched against exact",
         f"Mean over {s['hash_seeds']} hash seeds (lowest in brackets). U: the paper's, eta and eta^2, with a quarter "
         "of the candidates already selected. rms: root mean square error over seeds / norm, measured and as the "
         "stated variance of the sketch predicts; ratio: measured / predicted variance.",
         ("width", "Spearman of alignment", "Spearman of U", "error of alignment", "rms", "predicted", "ratio (s.e.)",
          "error of Gram"),
         [(f"{x['width']:,}", f"{x['alignment_spearman']:.4f} ({x['alignment_spearman_lowest']:.4f})",
           f"{x['utility_spearman']:.4f} ({x['utility_spearman_lowest']:.4f})", f"{x['alignment_error']:.4f}",
           f"{x['scatter']:.4f}", f"{x['predicted_scatter']:.4f}",
           f"{x['variance_ratio']:.2f} ({x['variance_ratio_stderr']:.2f})", f"{x['gram_error']:.4f}")
          for x in found["sketch"]]),
        ("3. Choosing half by sketched U", f"Share that exact U chooses too ({chance:.2f} by chance).",
         ("width", "highest before selection", "greedy, redundancy included"),
         [(f"{x['width']:,}", f"{x['top_overlap']:.3f}", f"{x['greedy_overlap']:.3f}") for x in found["sketch"]]),
        ("4. How far from uniform each arm draws the half",
         arms_note,
         NONE if arms_reason else ("arm", "spread of U", "temperature", "ESS share", "total variation"),
         [(a["arm"], f"{a['utility_std']:.2g}", f"{a['temperature']:.2g}", f"{a['effective_share']:.4f}",
           f"{a['total_variation']:.4f}") for a in found["arms"]]),
        ("5. Noise floor",
         f"Spearman of exact alignments when something else changes, {found['floor'][0]['pairs']} proxy batches.",
         ("change", "Spearman", "lowest", "highest"),
         [(f["change"], f"{f['spearman']:.3f}", f"{f['lowest']:.3f}", f"{f['highest']:.3f}") for f in found["floor"]]),
    ]


def plan_sections(plan: dict[str, Any]) -> list[Section]:
    """What will be done, and the memory it takes."""
    s, model = plan["settings"], plan["model"]
    origin = f"state of {s['optimizer_state']}, then " if s["optimizer_state"] else ""
    rows = [
        ("model", f"{s['model']}: {model['architecture']}, {model['parameters']:,} parameters, {s['dtype']}"),
        ("scored", f"{model['scored_layers']} layers ({', '.join(s['layers'])}), {model['scored_parameters']:,} "
                   "parameters; in 4. each arm has layers of its own"),
        ("data", f"{s['data']}: {plan['sequences']['data']:,} sequences of {s['length']} tokens"),
        ("proxy", f"{s['proxy_data'] or 'the same, other sequences'}: {s['proxy_pairs']} pairs of {s['proxy_size']} "
                  "sequences"),
        ("optimizer", f"{s['optimizer']}: {origin}{s['optimizer_steps']} steps on {s['batch_size']} sequences each, "
                      f"{plan['tokens_trained_on']:,} tokens"),
        ("candidates", f"{s['candidates']} sequences of {s['length']} tokens; shorter windows "
                       f"{', '.join(map(str, s['windows'])) or 'none'}"),
        ("oracle", f"not run: {plan['oracle_reason']}" if plan["oracle_reason"] else
                   f"{s['oracle_candidates']} candidates by torch.func in float64"),
        ("sketch", f"widths {', '.join(f'{w:,}' for w in s['widths'])}, {s['hash_seeds']} hash seeds each: "
                   f"{plan['hashed_numbers']:.1e} numbers hashed" +
                   ", in float32" * (s["dtype"] == "bfloat16")),
    ]
    memory = [(name, f"{size / 1e9:.3g}") for name, size in plan["memory_at_least"].items()]
    return [("Plan", "", ("what", "how"), rows),
            ("Memory", "At least, activations inside layers not counted.", ("phase", "GB"),
             [*memory, ("free now", f"{plan['memory_free'] / 1e9:.3g}")])]


def threshold_sections(judged: Sequence[dict[str, Any]]) -> list[Section]:
    """Every threshold with what was measured and whether it is met."""
    rows = [(t["name"], SENSE[t["sense"]], f"{t['threshold']:g}",
             "not run" if t["measured"] is None else f"{t['measured']:.4g}", t["unit"], "met" if t["met"] else "MISSED")
            for t in judged]
    note = "" if rows else "None was given."
    return [("Thresholds", note, ("threshold", "sense", "value", "measured", "unit", "") if rows else NONE, rows)]


def found_sections(content: dict[str, Any]) -> list[Section]:
    """The findings after the plan: training, five comparisons, verdict, thresholds."""
    loss = content["training_loss"]
    rates = "; ".join(f"{name} {', '.join(f'{rate:g}' for rate in some)}" for name, some in content["rates"].items())
    trained = f"Training loss {loss[0]:.3f} to {loss[1]:.3f} nat/token" if loss else "No step was taken"
    return [
        ("Training state", f"{trained}; learning rate {rates}. The model was changed in memory only.", NONE, []),
        *measures(content),
        ("Verdict", f"{content['verdict']}.", NONE, []),
        *threshold_sections(content["thresholds"]),
    ]


def origin_sections(content: dict[str, Any]) -> list[Section]:
    """Hashes, versions and command."""
    environment = content["environment"]
    rows = [("command", content["command"]), ("weights, sha256", content["weights_sha256"])]
    rows += [(f"{name}, sha256", sha256) for name, sha256 in content["data_sha256"].items()]
    rows += [("code version", content["code_version"]), ("seed", str(content["settings"]["seed"]))]
    rows += [(name, str(environment[name])) for name in
             ("python", "torch", "transformers", "numpy", "platform", "cpu", "threads")]
    rows += [("seconds", f"{content['seconds']:.0f}")]
    return [("Origin", "", ("what", "value"), rows)]


def threshold_help() -> str:
    """Every measure that a threshold can be given for, as --help prints it."""
    return table(("NAME", "VALUE is", "unit", "of"),
                 [(m.name, SENSE[m.sense], m.unit, m.meaning) for m in MEASURES.values()])


# Forms -------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned columns: text to the left, numbers (given as strings) to the right by their first character."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    right = [all(row[i][:1].isdigit() or row[i][:1] == "-" for row in cells[1:]) for i in range(len(header))]
    return "\n".join(
        "  " + "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right)).rstrip()
        for row in cells
    )


def text(sections: Sequence[Section]) -> str:
    """Sections for a terminal, notes folded at 110 characters."""
    import textwrap

    parts = []
    for title, note, header, rows in sections:
        head = title if title.endswith("?") else f"{title}."
        lines = textwrap.wrap(f"{head}  {note}", 110, subsequent_indent="   ", break_long_words=False,
                              break_on_hyphens=False)
        parts.append("\n".join([*lines, *([table(header, rows)] if header else [])]))
    return "\n\n".join(parts)


def markdown(content: dict[str, Any]) -> str:
    """The whole report."""
    from ..tables import markdown as markdown_table

    parts = [f"# OPUS's approximations on {content['settings']['model']}",
             "Utilities of the candidates below were computed in every way that the suite knows, on this model with "
             "this optimizer's live state; thresholds are the user's."]
    sections = [*threshold_sections(content["thresholds"]), *plan_sections(content),
                *found_sections(content)[:-1], *origin_sections(content)]
    for title, note, header, rows in sections:
        parts.append(f"## {title}")
        parts += [note] if note else []
        parts += [markdown_table(header, rows)] if header else []
    return "\n\n".join(parts) + "\n"
