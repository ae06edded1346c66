"""Pages that look at Table 3's records: numbers by hand from records whose losses are straight lines."""

import re

import pytest
from test_report import SUITE, record_of, table_of

from opus_bench import results, schema
from opus_bench.schema import RecordError
from opus_bench.sections import arrange
from reproduce import figure1, figure4, figure5_6, figure7, table5, table6
from reproduce.counts import Shape, scoring_flops, training_flops

VIEWS = (table5, table6, figure1, figure4, figure7)
METHODS = ("Random", "PPL high", "OPUS paper", "OPUS calibrated")
CONFIG = dict(length=192, buffer=16, proxy_size=8, selection_ratio=0.5)
SELECTORS = {"Random": ("random", {}), "PPL high": ("perplexity", {"keep": "high", "window": 40}),
             "OPUS paper": ("opus", {"arm": "paper", "window": 40}),
             "OPUS calibrated": ("opus", {"arm": "calibrated", "window": 40})}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Records of four methods and three seeds in which nothing but the shift of the loss is random."""
    folder = tmp_path_factory.mktemp("views")
    for method in METHODS:
        for seed in range(3):
            selector, options = SELECTORS[method]
            record = record_of(method, seed, wobble=0.0, selector=selector, selector_options=options,
                               window=options.get("window"), **CONFIG)
            results.write(record, folder / "runs")
    return folder


@pytest.mark.parametrize("script", VIEWS, ids=lambda script: script.__name__.rpartition(".")[2])
def test_a_view_is_a_function_of_the_records_and_says_what_was_not_run(script, folder, tmp_path):
    first = [path.read_bytes() for path in script.write(folder)]
    assert first == [path.read_bytes() for path in script.write(folder)]
    text = first[0].decode()
    assert "from 12 runs of Table 3; smoke scale: code " in text and "Smoke scale: checks the pipeline" in text
    assert len(set(re.findall(r"\(\.\./runs/(\w+)\.json\)", text))) == 12
    assert ("not run: " in text) == (script in (table5, table6))
    with pytest.raises(RecordError, match=f"no records of table3, which {script.__name__.rpartition('.')[2]} shows"):
        script.write(tmp_path)


def rows_of(script, folder):
    return table_of(script.write(folder)[0].read_text(), "AdamW")


def test_table_5_leaves_target_and_damaged_text_out(folder):
    rows = rows_of(table5, folder)
    assert rows["Random"]["bits per byte, mean of 1 other domains"] == "2.000"
    assert rows["OPUS (paper)" if "OPUS (paper)" in rows else "OPUS paper"]["bits per byte on encyclopedia"] == "1.580"
    record = record_of(wobble=0.0)
    record["evals"].append({"task": "bits_per_byte_corrupted", "value": 9.0})
    record["evals"].append({"task": "bits_per_byte_recipes", "value": 3.0})
    assert table5.others(record) == ["code", "recipes"] and table5.bits_elsewhere(record) == 2.5
    assert table5.bits_elsewhere(record | {"evals": []}) is None


def test_table_6_counts_domains_and_reads_losses_where_they_are(folder):
    text = table6.write(folder)[0].read_text()
    assert "Of 2 domains, mean over seeds below Random's: PPL high 0, OPUS paper 0, OPUS calibrated 2; a count" in text
    row = arrange(results.load(folder / "runs", "table3"))[0].base
    assert table6.domain_loss(row, "Health").startswith("not run: ")
    assert table6.domain_loss(row, "code") == f"{8 - 3 + 0.2 + 1:.3f}"  # the last point, mean over seeds


def test_figure_1_has_the_papers_points_beside_ours(folder):
    rows = rows_of(figure1, folder)
    opus = rows["OPUS calibrated"]
    assert opus["difference to Random (points)"].startswith("+12.00 [")
    assert (opus["the paper's mean (%), GPT-2 XL"], opus["the paper's points over its Random"]) == ("41.01", "+0.65")
    assert rows["Random"][f"mean accuracy, {SUITE}"] == "55.00"


def test_figure_1_has_a_line_for_every_method_of_any_optimizer(folder, tmp_path):
    """Panels share their axis: with fewer methods in the last, the others keep theirs."""
    records = results.load(folder / "runs", "table3")
    fewer = [record_of(method, optimizer="muon", **CONFIG) | {"written_utc": records[0]["written_utc"]}
             for method in ("Random", "GREATS")]
    sections = arrange([*records, *fewer])
    assert [len(section.rows) for section in sections] == [4, 2]
    text = figure1.draw(sections, tmp_path / "figure.svg").read_text()
    names = [name for name in re.findall(r">([^<>]+)</text>", text) if name in (*METHODS, "GREATS")]
    assert names == ["Random", "PPL high", "OPUS paper", "OPUS calibrated", "GREATS"]


def test_figure_4_counts_randoms_tokens_to_the_same_loss(folder):
    section = arrange(results.load(folder / "runs", "table3"))[0]
    rows = {row.label: row for row in section.rows}
    tokens, worth = figure4.worth(rows["OPUS calibrated"], section.base)
    # losses fall by 3.12 where Random's fall by 3; beyond .96 of the tokens Random never gets there
    assert tokens == [200_000, 400_000, 600_000, 800_000] and worth == pytest.approx([1.04] * 4)
    assert figure4.worth(rows["PPL high"], section.base)[0][-1] == 1_000_000
    rows = rows_of(figure4, folder)
    half = "loss at the last evaluation up to 50 % of the tokens (nat/token)"
    assert rows["OPUS calibrated"][half] != rows["Random"][half]
    assert rows["Random"]["loss at the last evaluation up to 100 % of the tokens (nat/token)"] == "5.2000"


def test_figure_7_at_equal_time_and_flops(folder):
    """Random takes 20 s, the others 25: at equal time they stand at .8 of their tokens."""
    section = arrange(results.load(folder / "runs", "table3"))[0]
    rows = {row.label: row for row in section.rows}
    record = rows["OPUS paper"].records[1]
    fast, base = 8.2 - 0.8 * (3 - 0.08), 8.2 - 3.0
    assert figure7.loss_when(record, 0.8) == pytest.approx(fast)
    assert figure7.matched(rows["OPUS paper"], section.base, figure7.relative_time).startswith(f"{fast - base:+.4f} [")
    assert figure7.matched(section.base, section.base, figure7.relative_time) == "–"
    assert figure7.loss_when(record, 1.3) == pytest.approx(8.2 - 2.92)  # it ended before
    shape = Shape("tiny", "smoke", 4, 96, 2048, 192, 16, 8, 8, 40)
    training, choosing = figure7.step_flops(record)
    assert (training, choosing) == (training_flops(shape), scoring_flops(shape, "opus", {"arm": "paper"}, "adamw"))
    share = training / (training + choosing)
    want = 8.2 - share * 2.92 - base
    assert figure7.matched(rows["OPUS paper"], section.base, figure7.flops).startswith(f"{want:+.4f} [")
    shown = rows_of(figure7, folder)["OPUS paper"]
    assert (shown["train (s)"], shown["select (s)"]) == ("20.0", "5.0")
    assert shown["train (FLOPs)"] == f"{100 * training:.3g}"


def test_figures_5_and_6_draw_accuracy_by_tokens(tmp_path):
    with pytest.raises(RecordError, match="--scale paper --dry-run` says what it takes"):
        figure5_6.write(tmp_path)
    for method, gain in (("Random", 0.0), ("OPUS paper", 0.1)):
        record = record_of(method, 0, scale="paper", model="Qwen/Qwen3-8B-Base", setting="Qwen3-8B-Base")
        record["experiment"] = "figure5_6"
        record["metrics"] += [
            {"step": step, "tokens_seen": step * 10**9, "split": "suite", "name": task, "unit": "share",
             "value": 0.2 + gain * step} for step in (1, 2) for task in ("OlympicArena", "SciAssess biology")]
        record["run_id"] = schema.run_id("figure5_6", record["config"], record["data"]["spec_sha256"],
                                         record["code"]["version"])
        results.write(record, tmp_path / "runs")
    page, figure = figure5_6.write(tmp_path)
    text = page.read_text()
    assert "| OPUS paper | OlympicArena | 30.00 | 40.00 |" in text
    assert "| Random | SciAssess biology | 20.00 | 20.00 |" in text
    assert "| Random | SciAssess medicine | – | – |" in text and "AdamW, Qwen3-8B-Base" in text and figure.exists()
