"""Comparisons of losses: which runs a script lists, and what its page makes of their records.

Expected cells are worked out by hand from records whose losses are chosen; the last test trains.
"""

import argparse
import dataclasses
import itertools
import json
import math
import re

import pytest
import torch
from fake_corpus import SPEC
from test_report import record_of, table_of

from baselines import build_selector
from opus_bench import results, schema
from opus_bench.archives import CorpusError
from opus_bench.schema import RecordError
from opus_bench.sections import label_of
from opus_bench.stream import BLOCK, CandidateStream
from opus_bench.tables import paper_cells
from reproduce import ablations, table4, table7, table8
from reproduce.comparison import REPORTED, Method
from reproduce.scales import SCALES

SCRIPTS = (table4, table7, table8, ablations)
T_975_2 = 0.95 / math.sqrt(2 * 0.975 * 0.025)  # Student's t with 2 degrees of freedom, in closed form
LOSS = "validation loss on encyclopedia (nat/token)"
TO_RANDOM = "difference to Random of the same buffer and ratio (nat/token)"
TO_BASE = "difference to the arm's base row (nat/token)"
TOKENS = "update tokens to that Random's final loss (share of its own)"
SAME = "seeds that chose the base row's very sequences"


def options(scale="smoke", seeds=None, optimizers=None, paper_tasks=False):
    return argparse.Namespace(scale=scale, seeds=seeds, optimizers=optimizers, paper_tasks=paper_tasks)


def plain(run):
    """The run's settings with those of its selector beside the others."""
    settings = {key: value for key, value in run.settings.items() if key not in ("selector_options", "window")}
    return settings | {f"selector.{key}": value for key, value in run.config.selector_options.items()}


# The lists of runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["ci", "smoke"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.TABLE.experiment)
def test_every_run_has_its_own_id_the_same_tokens_and_no_suite(script, scale):
    runs = script.runs(options(scale, seeds=2))
    labels = [method.label for method in script.methods(SCALES[scale])]
    assert len({run.run_id for run in runs}) == len(runs) == 2 * len(labels) and len(set(labels)) == len(labels)
    assert len({run.config.update_tokens for run in runs}) == 1
    assert not any(run.suite for run in runs) and {run.scale for run in runs} == {scale}
    for seed in (0, 1):  # a part of the grid is paired
        part = runs[seed * len(labels):][:len(labels)]
        assert [run.label for run in part] == labels and {run.config.seed for run in part} == {seed}
    assert all(label_of({"method": run.method, "arm": run.arm}) == run.label for run in runs)
    for run in runs:
        build_selector(run.config.selector, run.config.selector_options, None, run.config.length)


def test_default_optimizers_and_seeds_and_their_options():
    for script, optimizer, seeds in ((table4, "muon", 3), (table7, "muon", 3), (table8, "muon", 2),
                                     (ablations, "adamw", 2)):
        assert {run.config.optimizer for run in script.runs(options())} == {optimizer}
        assert {run.config.seed for run in script.runs(options())} == set(range(seeds))
        both = script.runs(options("ci", optimizers=("adamw", "muon")))
        assert {(run.config.optimizer, run.config.seed) for run in both} == {("adamw", 0), ("muon", 0)}
        with pytest.raises(ValueError, match="paper_tasks"):
            script.runs(options(paper_tasks=True))


@pytest.mark.parametrize("scale", ["ci", "smoke"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.TABLE.experiment)
def test_a_row_differs_from_its_base_in_one_knob(script, scale):
    """Steps follow from equal tokens; two fields that only have a meaning together count as one knob."""
    one_knob = [{"temperature", "effective_share"}, {"redundancy", "utility_scale"}, {"estimator", "sketch_width"}]
    runs = {run.label: run for run in script.runs(options(scale, seeds=1))}
    with_base = [method for method in script.methods(SCALES[scale]) if method.base]
    assert len(with_base) >= (3 if script is table4 else 4)
    for method in with_base:
        ours, base = plain(runs[method.label]), plain(runs[method.base])
        changed = {key.removeprefix("selector.") for key in ours.keys() | base.keys()
                   if ours.get(key) != base.get(key)} - {"steps"}
        assert len(changed) == 1 or any(changed <= pair for pair in one_knob), (method.label, changed)
        assert runs[method.label].arm == runs[method.base].arm
    knobs = [json.dumps(plain(run), sort_keys=True) for run in runs.values()]
    assert len(set(knobs)) == len(knobs)


@pytest.mark.parametrize("scale", ["ci", "smoke"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.TABLE.experiment)
def test_every_row_has_a_random_row_of_the_same_batches(script, scale):
    runs = {run.label: run for run in script.runs(options(scale, seeds=1))}
    for method in script.methods(SCALES[scale]):
        random, ours = runs[method.random].config, runs[method.label].config
        assert random.selector == "random"
        for name in ("buffer", "selected_size", "steps", "length", "evaluations", "optimizer", "seed"):
            assert getattr(random, name) == getattr(ours, name), (method.label, name)


def test_rows_of_table_4_differ_from_their_base_in_the_part_of_the_pool_and_ids_stay():
    """Lower and higher part are disjoint and together all domains; a sequence keeps its id in any part."""
    for scale in ("ci", "smoke"):
        parts = {run.label: run.config.domains for run in table4.runs(options(scale, seeds=1))}
        lower, higher = set(parts["Random (tiers 2-4)"]), set(parts["Random (tier 1)"])
        assert lower | higher == set(SCALES[scale].corpus.domains) and not lower & higher and "encyclopedia" in higher
        assert {parts[f"OPUS (tiers 2-4) ({arm})"] for arm in ("paper", "calibrated")} == {parts["Random (tiers 2-4)"]}


def test_a_part_of_the_pool_gives_only_its_domains_by_their_shares(corpus):
    only = ("recipes", "foreign")  # shares .2 and .1
    stream = CandidateStream(corpus, 32, 16, 3, only)
    whole = {int(i): row for batch in CandidateStream(corpus, 32, 16, 3).pool()
             for i, row in zip(batch.ids, batch.tokens)}
    batches = [stream.candidates(step) for step in range(200)]
    for batch in batches[:10]:
        assert all(torch.equal(whole[int(i)], row) for i, row in zip(batch.ids, batch.tokens))
    names = [name for batch in batches for name in batch.domains]
    assert set(names) == set(only)
    assert abs(names.count("recipes") / 3200 - 2 / 3) < 5 * math.sqrt(2 / 9 / 3200)
    assert CandidateStream(corpus, 32, 16, 3, corpus.domains).candidates(0).ids.equal(
        CandidateStream(corpus, 32, 16, 3).candidates(0).ids)
    with pytest.raises(CorpusError, match="the corpus has no domain 'news'; known: encyclopedia"):
        CandidateStream(corpus, 32, 16, 3, ("news",))
    with pytest.raises(CorpusError, match="no domain is left"):
        CandidateStream(corpus, 32, 16, 3, ())


@pytest.mark.parametrize("script,number", [(table7, "7"), (table8, "8")])
def test_the_papers_rows_are_all_there_and_exist(script, number):
    reported = paper_cells(REPORTED)
    theirs = {key[4] for key in reported if key[0] == number}
    named = {(method.item, method.paper_row) for method in script.methods(SCALES["smoke"]) if method.paper_row}
    assert {row for item, row in named if item is None} == theirs
    for item, row in named:
        table = number if item is None else item.removeprefix("Table ")
        assert (table, script.TABLE.paper_model, "muon", "FineWeb", row, "Avg") in reported
    assert [item for item, _ in named if item] == (["Table 3"] if script is table7 else [])


def test_buffers_of_table_8_are_offered_the_same_sequences(corpus):
    """Positions of the stream are counted over steps, so smaller buffers cut the same stream more finely."""
    for scale in ("ci", "smoke"):
        configs = [run.config for run in table8.runs(options(scale, seeds=1))]
        whole = SCALES[scale].run["buffer"]
        assert {c.buffer for c in configs} == {whole, whole // 2, whole // 4}
        assert {c.selected_size * 2 == c.buffer for c in configs} == {True}
        assert max(c.steps for c in configs) <= BLOCK
    offered = [torch.cat([CandidateStream(corpus, 32, size, 3).candidates(step).ids for step in range(64 // size)])
               for size in (4, 8, 16)]
    assert offered[0].equal(offered[1]) and offered[1].equal(offered[2]) and len(set(offered[0].tolist())) > 8


def test_deviations_of_table_8_name_its_model_and_its_buffers():
    texts = " / ".join(table8.deviations(SCALES["smoke"]))
    assert "instead of GPT-2 Large" in texts and "GPT-2 XL" not in texts
    assert "score window 40 instead of 24,576 and 512" in texts and "6,144" not in texts
    assert "buffers 16, 32 and 64 are 4, 8 and 16 sequences here" in texts
    for script in SCRIPTS:
        for run in script.runs(options(seeds=1)):
            assert not any(text.startswith("an offline suite") for text in run.deviations)
            assert any("neither the paper's ten tasks nor an offline suite" in text for text in run.deviations)


def test_a_row_that_cannot_train_on_the_same_tokens_is_refused():
    broken = dataclasses.replace(table7.TABLE, methods=lambda scale: [
        Method("Random", "random"), Method("odd", "random", config={"selection_ratio": 0.6875})])
    with pytest.raises(ValueError, match="odd: 11 sequences a step do not divide the 2240 of the other rows"):
        broken.runs(options())


# The pages ----------------------------------------------------------------------------------------


def records_of(script, loss, seeds=3, scale="ci", **changes):
    """Records of all rows: a straight line from 8 to ``loss(label, seed)``; every choice its own."""
    made = []
    for run in script.runs(options(scale, seeds=seeds)):
        final = loss(run.label, run.config.seed)
        if final is None:
            continue
        record = record_of("Random", run.config.seed, scale=scale)
        tokens = run.config.update_tokens
        points = [(share, 8 + (final - 8) * share) for share in (0, 0.5, 1)]
        record |= {
            "experiment": run.experiment, "method": run.method, "arm": run.arm, "config": run.settings,
            "paper": record["paper"] | {"item": run.item, "row": run.paper_row}, "deviations": list(run.deviations),
            "metrics": [{"step": round(run.config.steps * share), "tokens_seen": round(tokens * share),
                         "split": "val/encyclopedia", "name": "loss", "unit": "nat/token", "value": value}
                        for share, value in points],
        }
        record["data"] = record["data"] | {"selected_sha256": run.run_id} | changes.get("data", {})
        record["selection"] = record["selection"] | changes.get("selection", {})
        record["run_id"] = schema.run_id(run.experiment, record["config"], record["data"]["spec_sha256"],
                                         record["code"]["version"])
        made.append(record)
    return made


def page_of(script, folder, records):
    for record in records:
        results.write(record, folder / "runs")
    return script.write(folder)[0].read_text()


RANDOM = 5.0


def shifted(shifts, otherwise=0.0):
    """Random's loss is 5 + .1 seed; a row's is that and its shift at the seed."""
    def loss(label, seed):
        shift = shifts.get(label, otherwise)
        return None if shift is None else RANDOM + 0.1 * seed + (shift[seed] if isinstance(shift, tuple) else shift)

    return loss


def test_paired_differences_by_hand(tmp_path):
    shifts = {"OPUS (paper)": (-0.1, -0.2, -0.3), "Greedy (paper)": (-0.3, -0.4, -0.5),
              "StdProxy (paper)": (0.1, 0.2, 0.1), "StdProxy (calibrated)": (-0.1, 0.1, 0.0)}
    page = page_of(table7, tmp_path, records_of(table7, shifted(shifts)))
    rows = table_of(page, "Muon")
    half = T_975_2 * 0.1 / math.sqrt(3)
    assert rows["Random"][LOSS] == "5.1000" and rows["Random"][TO_RANDOM] == "–"
    assert rows["OPUS (paper)"][LOSS] == "4.9000" and rows["OPUS (paper)"]["n seeds"] == "3"
    assert rows["OPUS (paper)"][TO_RANDOM] == f"-0.2000 [{-0.2 - half:+.4f}, {-0.2 + half:+.4f}]"  # includes zero
    assert rows["Greedy (paper)"][TO_RANDOM] == f"-0.4000 [{-0.4 - half:+.4f}, {-0.4 + half:+.4f}]*"
    assert (rows["OPUS (paper)"][TO_BASE], rows["OPUS (calibrated)"][TO_BASE]) == ("base", "base")
    assert rows["Greedy (paper)"][TO_BASE] == "-0.2000 [-0.2000, -0.2000]*"
    differences = (0.2, 0.4, 0.4)
    spread = T_975_2 * math.sqrt(sum((x - 1 / 3) ** 2 for x in differences) / 2) / math.sqrt(3)
    assert rows["StdProxy (paper)"][TO_BASE] == f"+0.3333 [{1 / 3 - spread:+.4f}, {1 / 3 + spread:+.4f}]*"
    assert rows["GREATS"][TO_BASE] == "–" and rows["GREATS"][TO_RANDOM] == "+0.0000 [+0.0000, +0.0000]"
    # straight lines: OPUS falls 3.1 where Random falls 3, and 3.1 for 2.9 and 2.8 at the other seeds
    shares = [(3 - 0.1 * seed) / (3 - 0.1 * seed + down) for seed, down in enumerate((0.1, 0.2, 0.3))]
    assert rows["OPUS (paper)"][TOKENS].startswith(f"{math.prod(shares) ** (1 / 3):.3f} [")
    assert rows["StdProxy (paper)"][TOKENS] == "not reached in 6,144 tokens"
    assert ("against Random, 7 comparisons: less loss at every seed in 2, more at every seed in 1, neither in 4; "
            "1 of 7 intervals exclude zero") in page  # Greedy's; StdProxy's is .1333 +- .1434
    assert ("against their base row, 4 comparisons: less loss at every seed in 1, more at every seed in 1, neither in 2"
            in page)


def test_rows_are_in_the_scripts_order_beside_the_papers_numbers(tmp_path):
    page = page_of(table7, tmp_path, records_of(table7, shifted({}), seeds=1))
    rows = table_of(page, "Muon")
    labels = [method.label for method in table7.methods(SCALES["ci"])]
    column = "the paper's own: mean of its ten tasks, GPT-2 XL, FineWeb (%)"
    assert list(rows)[1:] == labels
    assert [rows[label][column] for label in labels] == [
        "40.29", "41.75", "40.49", "41.03", "41.75", "40.49", "41.03", "39.23 (Table 3)"]
    runs = table_of(page, "Muon: runs")
    assert [row["method"] for row in list(runs.values())[1:]] == labels and page.count("](../runs/") == len(labels)
    assert "Ci scale: checks the pipeline" in page and "not run: this script compares losses" in page
    with_adamw = dataclasses.replace(table7.TABLE, optimizers=("adamw",))
    adamw = page_of(table7, tmp_path / "adamw", records_of(with_adamw, shifted({}), seeds=1))
    assert table_of(adamw, "AdamW")["Random"][column] == "–"


def test_each_buffer_is_compared_with_its_own_random(tmp_path):
    shifts = {"Random, b=32": -0.5, "b=32,t=.9,m=8192 (paper)": -0.4, "b=64,t=.9,m=8192 (paper)": 0.2}
    page = page_of(table8, tmp_path, records_of(table8, shifted(shifts), seeds=2))
    rows = table_of(page, "Muon")
    assert rows["b=32,t=.9,m=8192 (paper)"][TO_RANDOM] == "+0.1000 {+0.1000, +0.1000}"
    assert rows["b=32,t=.9,m=8192 (paper)"][TO_BASE] == "-0.6000 {-0.6000, -0.6000}"
    assert (rows["Random, b=32"][TO_RANDOM], rows["Random, b=32"][TO_BASE]) == ("–", "-0.5000 {-0.5000, -0.5000}")
    steps = "steps x chosen of buffer"
    assert [rows[f"b={b},t=.9,m=8192 (paper)"][steps] for b in (64, 32, 16)] == [
        "12 x 4 of 8", "24 x 2 of 4", "48 x 1 of 2"]
    column = "the paper's own: mean of its ten tasks, GPT-2 Large, FineWeb (%)"
    assert [rows[name][column] for name in ("Random", "Random, b=32", "b=64,t=.8,m=8192 (paper)",
                                            "b=64,t=.9,m=16384 (paper)", "b=64,share=0.1 (calibrated)")] == [
        "39.72", "–", "39.88", "39.34", "–"]
    assert "fewer than three seeds, so no intervals and nothing is called significant" in page


def test_what_the_temperatures_did_is_read_from_the_records(tmp_path):
    names = {text: f"b=64,t={text},m=8192 (paper)" for text in (".8", ".9", "1.0")}
    shifts = {names[".8"]: (0.0, 0.3), names[".9"]: (0.0, 0.1), names["1.0"]: (0.0, -0.1)}
    records = records_of(table8, shifted(shifts), seeds=2)
    for record in records:
        if (record["method"], record["arm"]) == ("b=64,t=.8,m=8192", "paper"):
            record["selection"]["per_step"] = {"step": [0, 1], "effective_sample_size": [0.5, 0.7],
                                               "total_variation": [0.0, 0.0], "utility_std": [0.01, 0.03]}
    same = {record["config"]["seed"]: record["data"]["selected_sha256"]
            for record in records if record["method"] == "b=64,t=.9,m=8192"}
    for record in records:
        if record["method"] == "b=64,t=1.0,m=8192" and record["config"]["seed"] == 0:
            record["data"] = record["data"] | {"selected_sha256": same[0]}
    page = page_of(table8, tmp_path, records)
    assert "is at most 2.5e-02 of the temperature" in page  # (.01 + .03) / 2 / .8
    assert "at least 0.600000 of uniform" in page
    assert "differs by 0.2000 nat/token on average and by 0.4000 at most (n = 2 seeds)" in page  # 0 and .3 + .1
    rows = table_of(page, "Muon")
    assert [rows[names[text]][SAME] for text in (".8", ".9", "1.0")] == ["0 of 2", "–", "1 of 2"]


def test_missing_rows_say_how_to_make_them_and_the_rest_stands(tmp_path):
    shifts = {"Greedy (paper)": None, "OPUS (calibrated)": None}
    page = page_of(table7, tmp_path, records_of(table7, shifted(shifts), seeds=1))
    rows = table_of(page, "Muon")
    assert rows["Greedy (paper)"]["steps x chosen of buffer"] == (
        "not run: no record; `python -m reproduce.table7 --scale ci --optimizers muon --methods 'Greedy (paper)'`")
    assert rows["Greedy (paper)"]["the paper's own: mean of its ten tasks, GPT-2 XL, FineWeb (%)"] == "40.49"
    assert rows["Greedy (calibrated)"][TO_BASE] == "–" and rows["StdProxy (paper)"][TO_BASE] == "+0.0000 {+0.0000}"
    assert "against Random, 5 comparisons" in page
    none = page_of(table7, tmp_path / "alone", [record for record in records_of(table7, shifted({}), seeds=1)
                                                if record["method"] == "GREATS"])
    assert table_of(none, "Muon")["GREATS"][TO_RANDOM] == "–"
    assert "No Random runs: no differences can be given." in none and "comparisons" not in none


def test_rows_that_the_script_no_longer_has_are_named(tmp_path):
    records = records_of(table7, shifted({}), seeds=1)
    records[-1]["method"] = "Best"
    page = page_of(table7, tmp_path, records)
    assert "- Best: a row that the script no longer has, not shown." in page
    assert "Best" not in table_of(page, "Muon") and "not run: no record" in table_of(page, "Muon")["GREATS"][
        "steps x chosen of buffer"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.TABLE.experiment)
def test_the_same_records_give_the_same_bytes_and_a_figure_of_every_row(script, tmp_path):
    page_of(script, tmp_path, records_of(script, shifted({}, -0.1), seeds=3))
    first = {path: path.read_bytes() for path in script.write(tmp_path)}
    assert {path: path.read_bytes() for path in script.write(tmp_path)} == first
    name = script.TABLE.experiment
    assert [path.relative_to(tmp_path).as_posix() for path in first] == [f"tables/{name}.md", f"figures/{name}_ci.svg"]
    svg = list(first.values())[1].decode()
    assert "ci scale: pipeline check" in svg and "nat/token" in svg and "n = 3" in svg
    drawn = [method for method in script.methods(SCALES["ci"]) if method.random != method.label]
    for method in drawn:
        assert f">{method.label}<" in svg or f">{method.name}<" in svg
    assert f"../figures/{name}_ci.svg" in next(iter(first.values())).decode()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.TABLE.experiment)
def test_without_records_the_command_is_given(script, tmp_path):
    with pytest.raises(RecordError, match=r"no records of (\w+); make .* `python -m reproduce\.\1 --scale smoke`"):
        script.write(tmp_path)
    assert not list(tmp_path.rglob("*.md"))


# From training to the page ------------------------------------------------------------------------


def test_a_few_real_runs_make_a_page(cache, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("OPUS_BENCH_CACHE", str(cache))
    small = {**SCALES["ci"].run, "length": 32, "proxy_size": 1, "validation_sequences": 2}
    monkeypatch.setitem(SCALES, "ci", dataclasses.replace(SCALES["ci"], corpus=SPEC, run=small, window=16))
    wanted = {table4: ("Random (tiers 2-4)", "OPUS (tiers 2-4) (calibrated)", "Random (tier 1)"),
              table7: ("Random", "OPUS (paper)", "StdProxy (calibrated)", "GREATS"),
              table8: ("Random, b=16", "b=16,t=.9,m=8192 (paper)", "b=64,t=.9,m=8192 (paper)",
                       "b=64,t=1.0,m=8192 (paper)"),
              ablations: ("Random, ratio 0.25", "ratio 0.25 (calibrated)", "redundancy eta^2 (calibrated)",
                          "P adjoint (calibrated)")}
    for script, labels in wanted.items():
        short = dataclasses.replace(script.TABLE, sizes={"ci": {"steps": 3, "evaluations": 1}})
        runs = [run for run in short.runs(options("ci")) if run.label in labels]
        assert len(runs) == len(labels)
        for run in runs:
            record = run.execute(tmp_path)
            assert record["config"]["proxy"] == ("pool" if run.method == "StdProxy" else "target")
            assert max(row["tokens_seen"] for row in record["metrics"]) == run.config.update_tokens == 3 * 4 * 32
        text = short.write(tmp_path)[0].read_text()
        rows = table_of(text, "Muon" if script is not ablations else "AdamW")
        shown = [label for label, row in rows.items() if re.fullmatch(r"\d", row["n seeds"]) and row["n seeds"] != "0"]
        assert sorted(shown) == sorted(labels)
        before = text
        for run in runs:
            run.execute(tmp_path, lambda done: pytest.fail("a run that is done was made again"))
        assert short.write(tmp_path)[0].read_text() == before
    offered = {record["method"]: set(record["selection"]["offered"])
               for record in results.load(tmp_path / "runs", "table4")}
    assert offered == {"Random (tier 1)": {"encyclopedia", "recipes"},
                       **dict.fromkeys(("Random (tiers 2-4)", "OPUS (tiers 2-4)"), {"foreign", "corrupted"})}
    pairs = [(record["method"], record["selection"]["offered"]) for record in results.load(tmp_path / "runs", "table8")]
    assert all(a == b for (_, a), (_, b) in itertools.combinations(pairs, 2))  # buffers of 2 and 8 saw the same
