"""The page is a function of the records: same bytes twice, every number where a hand puts it."""
import math
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel

from opus_bench import figures, provenance, report, results, schema, sections, tables
from opus_bench.schema import RecordError
from opus_bench.significance import detectable_difference

SHA = "ab" * 32
REPORTED = Path(__file__).resolve().parent.parent / "reproduce" / "reported.csv"
TARGET = "encyclopedia"
OFFERED = {"encyclopedia": 320, "dictionary": 480, "code": 320, "spam": 160, "corrupted": 160}
# method, arm, shift of the final loss to Random's (None: as Random), effective sample size, share of the target chosen
GRID = {
    "Random": (None, 0.0, 1.0, 0.22),
    "PPL high": (None, 0.15, None, 0.10),
    "PPL mid": (None, 0.02, None, 0.20),
    "PPL low": (None, -0.02, None, 0.25),
    "static quality": (None, -0.05, None, 0.40),
    "OPUS paper": ("paper", 0.08, 0.98, 0.08),
    "OPUS released": ("released", 0.004, 1.0, 0.22),
    "OPUS calibrated": ("calibrated", -0.12, 0.25, 0.56),
}


def record_of(method="Random", seed=0, optimizer="adamw", scale="smoke", code="c0de" * 16, wobble=0.01, **config):
    """A record with known numbers: loss 8 - 3 p over progress p of 1e6 tokens, shifted by method and seed."""
    arm, shift, size, target_share = GRID.get(method, (None, 0.01, 0.5, 0.22))
    wobble *= math.sin(7 * seed + 3 * len(method))
    losses = [(step, 8.0 - 3.0 * step / 100 + 0.2 * seed + (shift + wobble) * step / 100) for step in range(0, 101, 20)]
    rest = (1 - target_share) / (sum(OFFERED.values()) - OFFERED[TARGET])
    chosen = {name: round(720 * rest * count) for name, count in OFFERED.items()} | {TARGET: round(720 * target_share)}
    random = method == "Random"
    record = {
        "schema": 1,
        "run_id": "",
        "experiment": "table3",
        "scale": scale,
        "arm": arm,
        "method": method,
        "paper": {"arxiv": schema.ARXIV, "item": "Table 3", "row": "OPUS" if arm else method},
        "config": {"selector": method, "optimizer": optimizer, "seed": seed, "model": "tiny", "steps": 100, **config},
        "deviations": ["4 layers instead of 48", *(["no proxy"] if random else [])],
        "data": {
            "spec_sha256": SHA,
            "train_sha256": SHA,
            "proxy_sha256": SHA,
            "tokenizer_sha256": SHA,
            "suite_sha256": SHA,
            "selected_sha256": f"{zlib.crc32(f'{method} {seed}'.encode()):08x}",
            "target_domain": TARGET,
        },
        "code": {"version": code, "commit": "0123456789abcdef", "dirty": True},
        "environment": provenance.environment() | {"torch": "2.13.0", "numpy": "2.4.6"},
        "timing": {
            "wall_s": 30.0 + seed,
            "train_s": 20.0,
            "select_s": 0.0 if random else 5.0,
            "eval_s": 4.0,
            "peak_bytes": (100 + seed) * 2**20,
        },
        "metrics": [
            {
                "step": step,
                "tokens_seen": 10_000 * step,
                "split": split,
                "name": "loss",
                "unit": "nat/token",
                "value": loss + more,
            }
            for split, more in ((f"val/{TARGET}", 0.0), ("val/code", 1.0), ("train", 2.0))
            for step, loss in losses
        ],
        "evals": [
            evaluation("cloze", 0.40 - shift, n_samples=500, stderr=0.022, chance=0.25, surface=0.286),
            evaluation("agreement", 0.70 - shift, n_samples=640, stderr=None, chance=0.5, surface=0.502),
            evaluation("mean_accuracy", 0.55 - shift - wobble),
            evaluation("bits_per_byte_code", 2.0 + shift + wobble, metric="bits_per_byte", unit="bit/byte"),
            evaluation("bits_per_byte_encyclopedia", 1.5 + shift, metric="bits_per_byte", unit="bit/byte"),
            *({"task": task, "status": "not run: no hub", "value": None} for task in ("mmlu", "hellaswag", "arc_easy")),
        ],
        "selection": {
            "offered": OFFERED,
            "chosen": chosen,
            "per_step": {
                "step": list(range(20)),
                "effective_sample_size": [size] * 20,
                "total_variation": [None if size is None else 1 - size] * 20,
                "utility_std": [None] * 20,
            },
            "notes": [],
        },
        "final": {"weights_sha256": SHA},
    }
    record["run_id"] = schema.run_id("table3", record["config"], SHA, code)
    return record


def test_methods_that_made_the_same_choices_are_named():
    stamp = {"written_utc": "2000-01-01T00:00:00+00:00"}
    names = ("Random", "OPUS paper", "OPUS released")
    records = [record_of(method, seed) | stamp for method in names for seed in range(3)]
    assert not [note for note in sections.arrange(records)[0].notes if "very same" in note]
    for seed in range(3):
        records[6 + seed]["data"]["selected_sha256"] = records[3 + seed]["data"]["selected_sha256"]
    notes = sections.arrange(records)[0].notes
    assert "OPUS paper and OPUS released chose the very same sequences at every step of every seed." in notes
    records[8]["data"]["selected_sha256"] = SHA
    assert not [note for note in sections.arrange(records)[0].notes if "very same" in note]


def evaluation(task, value, n_samples=1000, stderr=0.01, metric="acc", chance=None, surface=None, unit=None):
    row = {
        "task": task,
        "task_version": 1.0,
        "metric": metric,
        "higher_is_better": metric == "acc",
        "n_shot": 0,
        "n_samples": n_samples,
        "limit": None,
        "batch_size": 8,
        "value": value,
        "stderr": stderr,
        "chance": chance,
        "surface": surface,
        "surface_name": "unigram" if surface else None,
    }
    return row | ({"unit": unit} if unit else {})


def written(folder, records):
    for record in records:
        results.write(record, folder / "runs")
    return folder


def grid(seeds=(0, 1, 2), optimizers=("adamw",), methods=GRID, **changes):
    return [
        record_of(method, seed, optimizer, scale=changes.get("scale", "smoke"), code=changes.get("code", "c0de" * 16))
        for optimizer in optimizers
        for method in methods
        for seed in seeds
    ]


def page_of(folder):
    """The page without its figures, which take most of the time."""
    return report.page(sections.arrange(results.load(folder / "runs")), "table3", tables.paper_cells(REPORTED))


def table_of(page, heading):
    """Cells of the first table after a heading, by row name."""
    lines = page.split(f"### {heading}")[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    assert len({len(row) for row in rows}) == 1
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows if row[0] != "---"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return written(tmp_path_factory.mktemp("results"), grid(optimizers=("adamw", "muon")))


@pytest.fixture(scope="module")
def page(folder):
    return page_of(folder)


def test_the_page_and_the_figures_are_the_same_bytes_again(folder, page):
    first = {path: path.read_bytes() for path in report.report(folder, REPORTED)}
    assert {path.name for path in first} == {
        "table3.md",
        "table3_smoke_loss.svg",
        "table3_smoke_domains.svg",
        "table3_smoke_uniformity.svg",
    }
    assert {path: path.read_bytes() for path in report.report(folder, REPORTED)} == first
    text = (folder / "tables" / "table3.md").read_text()
    assert re.findall(r"!\[(\w+)\]", text) == ["loss", "domains", "uniformity"]
    assert re.sub(r"!\[.*\n\n", "", text) == page


def test_the_page_says_what_made_it_and_what_it_is_worth(page):
    head = page.splitlines()[2]
    assert "--scale smoke --optimizers adamw muon` from 48 runs; smoke scale: code c0dec0dec0de. " in head
    assert "Smoke scale: checks the pipeline; it is not evidence for or against the paper." in page


def test_methods_are_in_order_and_extra_ones_come_last(tmp_path):
    records = grid((0,)) + [record_of("Another", 0), record_of("GREATS", 0)]
    rows = table_of(page_of(written(tmp_path, records)), "AdamW: summary")
    place = list(GRID).index("static quality")
    assert list(rows)[1:] == [*list(GRID)[:place], "GREATS", *list(GRID)[place:], "Another"]
    assert rows["GREATS"][PAPER] == "39.25"


LOSS, GAP = f"validation loss on {TARGET} (nat/token)", "difference to Random (nat/token)"
TOKENS = "update tokens to Random's final loss (share of Random's)"
SUITE = "offline suite (%), n = 1,000 items"
PAPER = "the paper's own: mean of its ten tasks, GPT-2 XL, FineWeb (%)"


def test_the_summary_by_hand(tmp_path):
    """Without wobble the differences are exact, so the interval has no width."""
    records = [record_of(method, seed, wobble=0.0) for method in GRID for seed in (0, 1, 2)]
    rows = table_of(page_of(written(tmp_path, records)), "AdamW: summary")
    random, ours, high = rows["Random"], rows["OPUS calibrated"], rows["PPL high"]
    assert random["n seeds"] == "3"
    assert random[LOSS] == "5.2000"  # 8 - 3 + 0.2 (0 + 1 + 2) / 3
    assert ours[LOSS] == "5.0800" and ours[GAP] == "-0.1200 [-0.1200, -0.1200]**"
    assert random[GAP] == "–" and random[TOKENS] == "1 by definition"
    # Linear curves: 3 p of Random's fall is reached where 3.12 p = 3.
    assert ours[TOKENS] == "0.962 [0.962, 0.962]*"
    assert high[TOKENS] == "not reached in 1,000,000 tokens"
    assert random[SUITE] == "55.00" and ours[SUITE] == "67.00"
    assert ours["difference to Random (points)"] == "+12.00 [+12.00, +12.00]*"
    assert random["select / train time"] == "0.0 %" and ours["select / train time"] == "25.0 %"
    assert ours["effective sample size (share of buffer)"] == "0.2500"
    assert high["effective sample size (share of buffer)"] == "none: deterministic"
    assert ours[f"{TARGET}: chosen / offered (%)"] == "56.0 / 22.2"  # 403 of 720; 320 of 1440
    assert random["corrupted: chosen / offered (%)"] == "11.1 / 11.1"


def test_marks_of_differences_in_loss_are_those_of_the_t_test_and_of_holm(tmp_path):
    """Holm by hand: the i-th smallest of m p-values is held against .05 / (m - i + 1), until one fails."""
    made = {method: [record_of(method, seed, wobble=0.005) for seed in range(3)] for method in GRID}
    rows = table_of(page_of(written(tmp_path, [record for of_method in made.values() for record in of_method])),
                    "AdamW: summary")
    losses = {method: [record["metrics"][5]["value"] for record in of_method] for method, of_method in made.items()}
    p = {m: float(ttest_rel(of_method, losses["Random"]).pvalue) for m, of_method in losses.items() if m != "Random"}
    rejected = set()
    for i, method in enumerate(sorted(p, key=p.get)):
        if p[method] > 0.05 / (len(p) - i):
            break
        rejected.add(method)
    got = {method: len(re.search(r"\**$", rows[method][GAP])[0]) for method in p}
    assert got == {method: 2 * (method in rejected) or int(of_method < 0.05) for method, of_method in p.items()}
    assert set(got.values()) == {0, 1, 2}


def test_what_the_seeds_can_show_is_said(page, tmp_path):
    [line] = [line for line in page.split("### Muon")[0].splitlines() if line.startswith("What n = 3 seeds can show")]
    stamp = {"written_utc": "2000-01-01T00:00:00+00:00"}
    section = sections.arrange([record | stamp for record in grid()])[0]
    both = [sections.pairs(row, section.base, sections.final_loss) for row in section.rows if row is not section.base]
    spreads = [np.std(np.subtract(*pair), ddof=1) for pair in both]
    found = [detectable_difference(sd, 3) for sd in spreads]
    assert f"of {np.median(found):.3f} nat/token" in line and f"{min(found):.3f} for " in line
    one = page_of(written(tmp_path, grid((0,))))
    assert "Fewer than 3 pairs of seeds that differ" in one and "**" not in one.split("### AdamW: summary")[1]


def test_the_papers_numbers_stand_beside_the_right_rows(page):
    adamw = {name: row[PAPER] for name, row in table_of(page, "AdamW: summary").items() if name != "method"}
    muon = {name: row[PAPER] for name, row in table_of(page, "Muon: summary").items() if name != "method"}
    opus = {f"OPUS {arm}": "41.01" for arm in schema.ARMS}
    low = {"PPL mid": "–", "PPL low": "–"}
    assert adamw == {"Random": "40.36", "PPL high": "40.02", "static quality": "39.45", **low, **opus}
    assert (muon["Random"], muon["PPL high"], muon["static quality"]) == ("40.29", "39.82", "40.60")
    assert muon["OPUS paper"] == "41.75"


def test_a_printed_mean_that_its_cells_do_not_have_is_said(page):
    """By hand: the cells of PPL average 40.399, Random's 40.364, while 40.02 and 40.36 are printed."""
    said = ("The paper prints 40.02 as the mean of PPL under GPT-2 XL, AdamW; its own ten cells average 40.40, which "
            "is +0.04 against Random's, not -0.34.")
    assert said in page.split("### Muon")[0] and page.count("The paper prints") == 1
    reported = tables.paper_cells(REPORTED)
    (other,) = tables.odd_averages(reported, "GPT-2 XL", "adamw", ["QuRating", "QuRating", "OPUS", "no such", None])
    assert other.startswith("The paper prints 38.71 as the mean of QuRating") and "average 38.17, " in other
    rounded = reported | {("3", "GPT-2 XL", "adamw", "FineWeb", "PPL", "Avg"): 40.40}
    assert not tables.odd_averages(rounded, "GPT-2 XL", "adamw", ["PPL"])


def test_the_ten_tasks_say_why_they_were_not_run(page):
    rows = table_of(page, "Muon: the paper's ten tasks")
    assert rows["Random"]["HellaSwag"].startswith(r"not run: no hub \| ")
    assert rows["Random"]["PIQA"].startswith(r"not run: not in the records \| ")
    assert rows["OPUS calibrated"]["ARC-E"].startswith(r"not run: no hub \| ")
    assert rows["GREATS"]["MMLU"].startswith(r"not run: no run of this method \| ")
    assert "PPL mid" not in rows
    paper = tables.paper_cells(REPORTED)["3", "GPT-2 XL", "muon", "FineWeb", "OPUS", "MMLU"]
    assert rows["OPUS paper"]["MMLU"].endswith(rf"\| {paper:.2f}")


@pytest.mark.parametrize("name", ["HellaSwag", "hellaswag"])
def test_a_task_of_the_paper_that_was_run_shows_our_value(tmp_path, name):
    record = record_of()
    record["evals"] = [evaluation(name, 0.3125)]
    page = page_of(written(tmp_path, [record]))
    assert table_of(page, "AdamW: the paper's ten tasks")["Random"]["HellaSwag"].startswith(r"31.25 \| ")
    assert list(table_of(page, "AdamW: offline tasks")["method"]) == ["method"]


def test_offline_tasks_have_chance_surface_and_error(page):
    rows = table_of(page, "AdamW: offline tasks")
    assert list(rows["method"]) == ["method", "cloze (n = 500)", "agreement (n = 640)"]
    assert rows["chance"]["cloze (n = 500)"] == "25.0"
    assert rows["best surface baseline"]["cloze (n = 500)"] == "28.6 unigram"
    assert rows["Random"]["cloze (n = 500)"] == "40.0 (2.2)"
    assert rows["OPUS calibrated"]["cloze (n = 500)"] == "52.0 (2.2)*"
    assert rows["Random"]["agreement (n = 640)"] == "70.0 (1.8)"  # sqrt(.7 .3 / 640), not given by the record


def test_bits_per_byte_with_difference(page):
    rows = table_of(page, "AdamW: bits per byte")
    assert list(rows) == ["domain", "code", TARGET]
    assert rows[TARGET]["Random"] == "1.500"
    assert rows[TARGET]["OPUS calibrated"] == "1.380 (-0.120 ± 0.000*)"


def test_every_run_is_linked_and_summed(folder, page):
    assert set(re.findall(r"\]\(\.\./runs/([0-9a-f]{12})\.json\)", page)) == {
        path.stem for path in (folder / "runs").glob("*.json")
    }
    assert "Total wall time 744 s, highest peak memory 102 MiB." in page  # 8 methods (30 + 31 + 32)
    assert "- no proxy (3 of 24 runs)" in page and "- 4 layers instead of 48\n" in page
    row = table_of(page, "Muon: runs")
    assert next(iter(list(row.values())[1:]))["commit"] == "0123456789ab + changes"


def test_pairs_are_by_seed_and_a_missing_one_is_said(tmp_path):
    """Unpaired, the 0.2 per seed would enter the difference; seed 3 has no partner."""
    records = [record_of("Random", seed, wobble=0.0) for seed in (0, 1, 2)]
    records += [record_of("OPUS calibrated", seed, wobble=0.0) for seed in (1, 2, 3)]
    page = page_of(written(tmp_path, records))
    assert table_of(page, "AdamW: summary")["OPUS calibrated"][GAP] == "-0.1200 {-0.1200, -0.1200}"
    assert "- OPUS calibrated: seed 3 has no Random run and is left out of its pairs." in page
    assert "- OPUS calibrated: seed 0 has no OPUS calibrated run and is left out of its pairs." in page


def test_a_seed_that_never_gets_there_stays_visible(tmp_path):
    records = [record_of("Random", seed, wobble=0.0) for seed in (0, 1, 2)]
    records += [record_of("OPUS calibrated", seed, wobble=0.0) for seed in (0, 1)]
    late = record_of("OPUS calibrated", 2, wobble=0.0)
    for row in late["metrics"]:
        row["value"] += 0.5
    rows = table_of(page_of(written(tmp_path, [*records, late])), "AdamW: summary")
    want = "{0.962, 0.962}; not reached in 1,000,000 tokens by 1 of 3 seeds"
    assert rows["OPUS calibrated"][TOKENS] == want


def test_without_random_there_are_no_differences(tmp_path):
    page = page_of(written(tmp_path, grid((0, 1, 2), methods=["PPL high"])))
    row = table_of(page, "AdamW: summary")["PPL high"]
    assert (row[GAP], row[TOKENS]) == ("–", "–")
    assert "No Random runs: no differences can be given." in page


def test_an_interval_that_includes_zero_is_not_marked(tmp_path):
    rows = table_of(page_of(written(tmp_path, grid())), "AdamW: summary")
    assert not rows["OPUS released"][GAP].endswith("*")
    assert rows["OPUS calibrated"][GAP].endswith("*")


def stamped(monkeypatch, second):
    class Clock(results.datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 1, 0, 0, second, tzinfo=tz)

    monkeypatch.setattr(results.datetime, "datetime", Clock)


def test_the_newest_complete_set_is_shown(tmp_path, monkeypatch):
    methods = ["Random", "PPL high"]
    for second, (code, seeds) in enumerate([("0" * 64, (0, 1, 2)), ("1" * 64, (0, 1, 2)), ("2" * 64, (0,))]):
        stamped(monkeypatch, second)
        written(tmp_path, grid(seeds, methods=methods, code=code))
    page = page_of(tmp_path)
    assert "6 runs; smoke scale: code 111111111111. " in page
    assert "- 8 other records of this scale and optimizer are not shown" in page


def test_a_method_of_another_code_version_is_marked(tmp_path):
    written(tmp_path, grid(methods=["Random", "PPL high"], code="0" * 64))
    written(tmp_path, grid(methods=["GREATS"], code="1" * 64))
    page = page_of(tmp_path)
    assert "GREATS †" in table_of(page, "AdamW: summary")
    assert "- GREATS †: run under code 111111111111, the other rows under 000000000000." in page


def test_a_method_trained_for_another_length_is_not_filled_in(tmp_path):
    written(tmp_path, grid(methods=["Random", "PPL high"]))
    written(tmp_path, [record_of("GREATS", 0, steps=200)])
    page = page_of(tmp_path)
    assert list(table_of(page, "AdamW: summary"))[1:] == ["Random", "PPL high"]
    assert "- 1 other records" in page


def test_a_row_never_mixes_two_configurations(tmp_path, monkeypatch):
    for second, (rate, seeds) in enumerate([(1e-3, (0, 1)), (2e-3, (0,))]):
        stamped(monkeypatch, second)
        written(tmp_path, [record_of("Random", seed, wobble=0.0, lr=rate) for seed in seeds])
    page = page_of(tmp_path)
    assert table_of(page, "AdamW: summary")["Random"]["n seeds"] == "2"
    assert "- 1 other records" in page
    assert len(set(re.findall(r"\(\.\./runs/(\w+)\.json\)", page))) == 2


def test_scales_are_kept_apart(tmp_path):
    written(tmp_path, grid((0,), methods=["Random"]))
    written(tmp_path, grid((0,), methods=["Random", "PPL high"], scale="small", code="1" * 64))
    paths = report.report(tmp_path, REPORTED)
    page = paths[0].read_text()
    smoke = page.split("## Scale: smoke")[1]
    assert "PPL high" not in smoke.split("### AdamW: the paper's ten tasks")[0]
    assert page.index("## Scale: small") < page.index("## Scale: smoke")
    assert page.count("it is not evidence") == 1 and "it is not evidence" in smoke
    assert len(paths) == 7 and "table3_small_loss.svg" in page


def test_of_many_steps_an_even_part_is_drawn_the_same_in_every_seed():
    record = record_of("OPUS paper")
    n = 3 * report.STEPS_DRAWN
    record["selection"]["per_step"] = {"step": list(range(n)), "total_variation": [None, *(x / n for x in range(1, n))]}
    steps, values = report._per_step(record, "total_variation")
    assert steps == list(range(3, n, 3)) and values == [x / n for x in steps]
    record["selection"]["per_step"] = {"step": [0, 1, 2], "total_variation": [0.1, None, 0.3]}
    assert report._per_step(record, "total_variation") == ([0, 2], [0.1, 0.3])


def test_the_headline_is_of_the_largest_scale_with_its_differences(tmp_path):
    methods = ["Random", "OPUS paper", "OPUS calibrated"]
    written(tmp_path, grid(optimizers=("adamw", "muon"), methods=methods))
    written(tmp_path, grid((0, 1, 2, 3, 4), methods=methods, scale="cpu", code="1" * 64))
    found = sections.arrange(results.load(tmp_path / "runs"))
    text = report.headline(found, "table3")
    (cpu,) = (section for section in found if section.scale == "cpu")
    for row in cpu.rows[1:]:
        assert f"{row.label} {tables.difference(row, cpu.base, sections.final_loss, 3)} under AdamW" in text
    assert "Muon" not in text and "n = 5 paired seeds" in text and "checks the pipeline" not in text
    assert "(cpu scale, model tiny, 1,000,000 update tokens" in text and text.endswith("for or against the paper.")
    assert "--scale cpu --optimizers adamw --methods Random 'OPUS paper' 'OPUS calibrated'`" in text
    text = report.headline([section for section in found if section.scale == "smoke"], "table3")
    assert text.count(" under Muon") == 2 and "n = 3 paired seeds" in text and "checks the pipeline" in text


def test_a_scale_without_enough_pairs_does_not_take_the_headline(tmp_path):
    methods = ["Random", "OPUS paper"]
    written(tmp_path, grid(methods=methods))
    written(tmp_path, grid((0, 1), methods=methods, scale="cpu", code="1" * 64))
    written(tmp_path, grid((2,), methods=["Random"], scale="cpu", code="1" * 64))
    assert {s.scale for s in report.largest(sections.arrange(results.load(tmp_path / "runs")))} == {"smoke"}
    written(tmp_path, grid((2,), methods=["OPUS paper"], scale="cpu", code="1" * 64))
    assert {s.scale for s in report.largest(sections.arrange(results.load(tmp_path / "runs")))} == {"cpu"}


def test_the_correction_is_over_both_optimizers_of_a_scale(tmp_path):
    """The smallest p of a table may survive its own rows alone and not all of the scale."""
    written(tmp_path, grid(optimizers=("adamw", "muon")))
    family = sections.arrange(results.load(tmp_path / "runs"))
    for section in family:
        alone, together = (tables.surviving(section, sections.final_loss, of) for of in ([section], family))
        assert together <= alone
    ps = {(s.key, label): tables.paired_t_test(of_row) for s in family
          for label, of_row in tables._paired_differences(s, sections.final_loss).items()}
    adjusted = dict(zip(ps, tables.holm(list(ps.values())), strict=True))
    for section in family:
        want = {label for (key, label), p in adjusted.items() if key == section.key and p <= tables.ALPHA}
        assert tables.surviving(section, sections.final_loss, family) == want


def test_the_readme_shows_the_largest_scale_first_and_says_what_each_is_worth(tmp_path):
    written(tmp_path, grid((0,), methods=["Random"]))
    written(tmp_path, grid((0,), methods=["Random"], scale="cpu", code="1" * 64))
    found = sections.arrange(results.load(tmp_path / "runs"))
    cpu, smoke = report.readme_block(found, "table3", tables.paper_cells(REPORTED)).split("**AdamW, ")[1:]
    assert cpu.startswith("cpu scale") and "checks the pipeline" not in cpu
    assert smoke.startswith("smoke scale") and "checks the pipeline" in smoke


def test_no_records_is_an_error_with_the_command(tmp_path):
    with pytest.raises(RecordError, match="python -m reproduce.table3 --scale smoke"):
        report.report(tmp_path, REPORTED)


def test_figures_are_text_on_white_with_scale_units_and_every_method(folder):
    report.report(folder, REPORTED)
    for name in ("loss", "domains", "uniformity"):
        svg = (folder / "figures" / f"table3_smoke_{name}.svg").read_text()
        assert "smoke scale: pipeline check" in svg and "<image" not in svg and "<dc:date>" not in svg
        assert re.search(r'<g id="patch_1">\s*<path[^>]*style="fill: #ffffff"', svg)
        for method in GRID:
            assert method in svg
    assert "nat/token" in (folder / "figures" / "table3_smoke_loss.svg").read_text()


def test_the_band_is_the_interval_or_the_range():
    low, high = figures._interval(figures.np.array([[1.0], [2.0], [3.0]]))
    assert high[0] - 2 == pytest.approx(0.95 / math.sqrt(2 * 0.975 * 0.025) / math.sqrt(3), rel=1e-12)
    assert [side[0] for side in figures._interval(figures.np.array([[1.0], [3.0]]))] == [1.0, 3.0]
    assert low[0] == pytest.approx(4 - high[0])
