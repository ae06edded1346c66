"""The audit: bounds derived and enumerated, the paper's numbers by hand, and doctored files that it must notice."""

import csv
import math
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from reproduce import audit, headlines
from reproduce.audit_tables import odd_cells
from reproduce.claims import BELOW, BEYOND, DEPENDS, WITHIN, compare, comparisons, largest_part, verdicts
from reproduce.counts import LARGE, token_ratio
from reproduce.printed import (
    ITEMS,
    Average,
    Block,
    average_stderr,
    averages,
    cell_stderr,
    fit_by_chance,
    fits,
    fitting_counts,
    items_of,
    printed_values,
    read_blocks,
    repeated_rows,
)

COLUMNS = ("table", "model", "optimizer", "corpus", "method", "benchmark", "value")
XL = ("3", "GPT-2 XL", "Muon", "FineWeb")


@pytest.fixture(scope="module")
def paper():
    return read_blocks(audit.REPORTED)


@pytest.fixture
def doctored(tmp_path):
    """Writes reported.csv anew with some values replaced: {(table, ..., method, benchmark): value}."""

    def write(changes):
        with open(audit.REPORTED, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        left = dict(changes)
        for row in rows:
            row["value"] = left.pop(tuple(row[name] for name in COLUMNS[:-1]), row["value"])
        assert not left, left
        path = tmp_path / "doctored.csv"
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        return path

    return write


def block_of(rows, table="3"):
    """A block from {method: {benchmark: percent}}, averages as printed from the cells."""
    cells = {method: {name: round(100 * value) for name, value in row.items()} for method, row in rows.items()}
    printed = {method: round(sum(row.values()) / len(row)) for method, row in cells.items()}
    return Block(table, "m", "muon", "c", cells, printed)


def of(blocks, table, model="GPT-2 XL", optimizer="muon", corpus="FineWeb"):
    return next(b for b in blocks if (b.table, b.model, b.optimizer, b.corpus) == (table, model, optimizer, corpus))


# Averages -------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.fractions(0, 100), min_size=1, max_size=12))
def test_rounding_never_disagrees(values):
    """Whatever the cells were, their printed forms and the printed form of their mean are within one unit."""
    row = {str(i): round(100 * value) for i, value in enumerate(values)}
    block = Block("3", "m", "muon", "c", {"a": row}, {"a": round(100 * sum(values) / len(values))})
    [found] = averages([block])
    assert not found.disagrees


def test_the_bound_is_one_unit_and_no_less():
    cells = {"x": 1000, "y": 1000, "z": 1000}
    block = Block("3", "m", "muon", "c", {"a": cells}, {"a": 1001})
    assert not averages([block])[0].disagrees and averages([block])[0].needs_more_decimals
    assert Average(block, "a", 1001, Fraction(2999, 3)).disagrees and not Average(block, "a", 1000, Fraction(1000)).gap


def test_two_printed_averages_of_the_paper_are_not_those_of_their_cells(paper):
    wrong = [(a.block.title, a.method, a.printed, float(a.recomputed)) for a in averages(paper) if a.disagrees]
    block = "Table 3: GPT-2 XL, AdamW, FineWeb"
    assert wrong == [(block, "PPL", 4002, 4039.9), (block, "QuRating", 3871, 3817.0)]
    assert len(averages(paper)) == 121 and sum(len(r) + 1 for b in paper for r in b.cells.values()) == 1295


def test_a_wrong_printed_average_in_a_doctored_file_is_found(doctored, paper):
    path = doctored({(*XL, "DSIR", "Avg"): "40.70", ("3", "GPT-2 XL", "AdamW", "FineWeb", "PPL", "Avg"): "40.40"})
    blocks = read_blocks(path)
    found = {(a.block.title, a.method) for a in averages(blocks) if a.disagrees}
    assert found == {("Table 3: GPT-2 XL, Muon, FineWeb", "DSIR"), ("Table 3: GPT-2 XL, AdamW, FineWeb", "QuRating")}
    said = "DSIR in Table 3: GPT-2 XL, Muon, FineWeb is printed 40.70 where its cells give 40.68"
    assert said in audit.page(blocks) and said not in audit.page(paper)


def test_rows_printed_twice_are_compared(doctored, paper):
    alike, unlike = repeated_rows(paper)
    names = {(a[0].table, a[1], b[0].table, b[1]) for a, b in alike}
    assert names == {("3", "Random", "7", "Random"), ("3", "OPUS", "7", "OPUS"), ("3", "Random", "8", "Random"),
                     ("3", "OPUS", "8", "b=64,t=.9,m=8192")} and not unlike
    path = doctored({("7", "GPT-2 XL", "Muon", "FineWeb", "OPUS", "WSC"): "38.46"})
    [(first, second)] = repeated_rows(read_blocks(path))[1]
    assert (first[1], second[0].table) == ("OPUS", "7")


# Item counts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 104, 295, 1267])
def test_what_fits_is_what_some_number_of_items_prints_as(n):
    """Both neighbours where a share lies half way."""
    printable = set()
    for k in range(n + 1):
        exact = Fraction(10_000 * k, n)
        printable |= {math.floor(exact + Fraction(1, 2)), math.ceil(exact - Fraction(1, 2))}
    assert {value for value in range(10_001) if fits(value, n)} == printable
    assert fit_by_chance(n) == len(printable) / 10_001


def test_counts_that_fit_are_those_enumerated():
    values = [3654, 3846, 4808, 5481, 3942]
    assert fitting_counts(values, 400) == [n for n in range(1, 401) if all(fits(v, n) for v in values)]
    assert 104 in fitting_counts(values, 400) and 103 not in fitting_counts(values, 400)


def test_item_counts_of_the_paper_by_hand(paper):
    assert printed_values(paper, "WSC") == [3654, 3750, 3846, 3942, 4808, 5481]  # 38, 39, 40, 41, 50 and 57 of 104
    assert [round(value * 104 / 10_000) for value in printed_values(paper, "WSC")] == [38, 39, 40, 41, 50, 57]
    assert fitting_counts(printed_values(paper, "SIQA"), 2_000) == [1954]
    assert fitting_counts(printed_values(paper, "CommonsenseQA"), 2_000) == [1221]
    odd = {(name, value) for name in ITEMS for value in printed_values(paper, name) if not fits(value, ITEMS[name])}
    assert odd == {("PIQA", 6887), ("WinoGrande", 4902), ("WinoGrande", 4919), ("ARC-E", 3919), ("ARC-E", 4486),
                   ("ARC-E", 4839)}
    assert len(odd_cells(paper)) == 6


# Standard errors and ranks --------------------------------------------------------------------


def test_standard_errors_by_hand(paper):
    xl = of(paper, "3")
    assert cell_stderr(xl, "OPUS", "WSC") == pytest.approx(100 * math.sqrt(0.4808 * 0.5192 / 104), rel=1e-12)
    parts = [cell_stderr(xl, "OPUS", name) for name in xl.benchmarks]
    assert average_stderr(xl, "OPUS") == pytest.approx(math.sqrt(sum(e * e for e in parts)) / 10)
    assert 0.6 < average_stderr(xl, "Random") < 0.66
    assert items_of("ANLI") == 3000
    with pytest.raises(ValueError, match="no number of items known for 'Chess'"):
        items_of("Chess")


def test_the_lead_of_gpt2_xl_with_muon_is_twelve_items_of_wsc(paper):
    xl = of(paper, "3")
    name, points, items = largest_part(xl, "OPUS", "Random")
    assert (name, round(float(points), 2), round(items)) == ("WSC", 1.15, 12)
    assert float(xl.mean("OPUS") - xl.mean("Random")) / 100 == pytest.approx(1.461)
    assert xl.rank("OPUS") == 1 and xl.rank("OPUS", "WSC") == 3 and xl.best_baseline("WSC") == "QuRating"
    assert "WSC adds +1.15 of the +1.46 points, 12 items of 104" in audit.page(paper)


def test_ranks_by_hand():
    block = block_of({"OPUS": {"ARC-E": 50, "WSC": 40}, "Random": {"ARC-E": 40, "WSC": 50},
                      "PPL": {"ARC-E": 60, "WSC": 20}, "Random(60B)": {"ARC-E": 90, "WSC": 90}})
    assert [block.rank(m) for m in block.equal_tokens] == [1, 1, 3]  # equals share a rank; twice the tokens is left out
    assert block.rank("OPUS", "WSC") == 2 and block.rank("OPUS", "ARC-E") == 2
    assert block.best_baseline() == "Random" and block.best_baseline("WSC") == "PPL"
    losses = block_of({"OPUS": {"Health": 3.1}, "Random": {"Health": 3.2}}, table="6")
    assert losses.is_loss and losses.rank("OPUS") == 1 and losses.rank("Random") == 2
    assert losses.best_baseline() == "Random"


# Comparisons ----------------------------------------------------------------------------------


def test_a_comparison_by_hand():
    block = block_of({"OPUS": {"ARC-E": 50, "WSC": 40}, "Random": {"ARC-E": 45, "WSC": 40}})
    got = compare(block, "OPUS", "Random")
    assert got.difference == got.printed == 2.5
    assert got.least == pytest.approx(100 * math.sqrt((0.05 - 0.0025) / 567) / 2)
    unpaired = [(0.5 * 0.5 + 0.45 * 0.55) / 567, 2 * 0.4 * 0.6 / 104]
    assert got.unpaired == pytest.approx(100 * math.sqrt(sum(unpaired)) / 2)
    assert got.unpaired_p == pytest.approx(2 * stats.norm.sf(2.5 / got.unpaired))
    assert got.tasks_p == 1.0  # two flips change nothing where one difference is 0
    q = got.tolerated_disagreement(0.05)
    stderr = 100 * math.sqrt((q - 0.0025) / 567 + q / 104) / 2
    assert 2.5 / stderr == pytest.approx(stats.norm.isf(0.025), rel=1e-9)


def test_the_family_counts_a_pair_once_and_holds_every_baseline(paper):
    family = comparisons(paper)
    # Table 3: 4 x 9; Table 4: 2 x 2 x 10; Table 5: 8; Table 7: Greedy and StdProxy, its Random being Table 3's
    assert len(family) == 36 + 40 + 8 + 2
    assert all(c.least <= c.unpaired for c in family)
    said = dict(zip(((c.block.title, c.opus, c.baseline) for c in family), verdicts(family), strict=True))
    assert said["Table 3: GPT-2 XL, Muon, FineWeb", "OPUS", "Random"] == DEPENDS
    assert said["Table 3: GPT-2 XL, AdamW, FineWeb", "OPUS", "Random(60B)"] == BELOW
    assert said["Table 3: GPT-2 Large, Muon, FineWeb", "OPUS", "QuRating"] == WITHIN


def test_a_doctored_claim_flips(doctored, paper):
    """PIQA and ARC-E of OPUS raised by 20 and 25 points: 4.5 more on average, five unpaired standard errors."""
    key = ("Table 3: GPT-2 XL, Muon, FineWeb", "OPUS", "Random")

    def verdict(path):
        family = comparisons(read_blocks(path))
        return dict(zip(((c.block.title, c.opus, c.baseline) for c in family), verdicts(family), strict=True))[key]

    assert verdict(audit.REPORTED) == DEPENDS
    assert verdict(doctored({(*XL, "OPUS", "PIQA"): "91.27", (*XL, "OPUS", "ARC-E"): "64.68"})) == BEYOND
    assert verdict(doctored({(*XL, "OPUS", "WSC"): "33.65", (*XL, "OPUS", "SIQA"): "37.91"})) == BELOW
    # without WSC's twelve items, .34 points over nine benchmarks remain: noise even at the least
    assert verdict(doctored({(*XL, "OPUS", "WSC"): "36.54"})) in (DEPENDS, WITHIN)


# Headline numbers -----------------------------------------------------------------------------


def test_headline_numbers_from_formulas(paper):
    assert headlines.token_factors()["Qwen3-8B on everything / Qwen3-8B with OPUS"] == 6.0
    assert not any(headlines.rounds_to(value, headlines.COMPUTE, 0) for value in headlines.token_factors().values())
    assert headlines.fitting_shapes() == [LARGE.name] and headlines.rounds_to(100 * token_ratio(LARGE), 4.7)
    tried = headlines.improvements(paper)
    assert tried["Table 3: GPT-2 XL, Muon, FineWeb, OPUS: over Random (points)"] == pytest.approx(1.46)
    assert tried["mean of Table 3: over Random (points)"] == pytest.approx((0.53 + 1.46 + 2.14 + 0.65) / 4)
    assert tried["Table 4: GPT-2 XL, Muon, FineWeb-Edu, OPUS(s3): over Random (points)"] == pytest.approx(44.99 - 41.81)
    assert tried["mean of Table 3, Muon: over Random (relative, %)"] == pytest.approx(
        50 * (40.25 / 39.72 + 41.75 / 40.29 - 2))
    fitting, number, _ = headlines.fitting_improvements(paper)
    assert number == len(tried) and all(2.15 <= value < 2.25 for _, value in fitting)
    assert not any("over Random (" in name for name, _ in fitting)
    beaten = {(arm.block.title, arm.opus): won for arm, won in headlines.beats_twice(paper)}
    assert len(beaten) == 8 and not beaten["Table 3: GPT-2 XL, AdamW, FineWeb", "OPUS"]


def test_a_doctored_improvement_fits(doctored):
    blocks = read_blocks(doctored({(*XL, "OPUS", "Avg"): "42.49"}))
    fitting = dict(headlines.fitting_improvements(blocks)[0])
    assert fitting["Table 3: GPT-2 XL, Muon, FineWeb, OPUS: over Random (points)"] == pytest.approx(2.2)


# The page and bad files -----------------------------------------------------------------------


def test_page_and_figure_are_functions_of_the_file(doctored, tmp_path, paper):
    first = audit.write(tmp_path / "a")
    again = audit.write(tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    text = first[0].read_text(encoding="utf-8")
    assert text.startswith(f"# {audit.TITLE}") and "No seed is repeated" in text
    values = {"WSC": "36.54", "Avg": "40.60"}  # Table 7 prints the row of Table 3 again
    changed = {(table, *XL[1:], "OPUS", name): value for table in "37" for name, value in values.items()}
    other = audit.write(tmp_path / "c", doctored(changed))
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(first, other, strict=True))
    assert "WSC adds +1.15" not in other[0].read_text(encoding="utf-8")


@pytest.mark.parametrize("text,message", [
    ("a,b\n1,2\n", "not a file of reported numbers"),
    (",".join(COLUMNS) + "\n", "no reported numbers in this file"),
    (",".join(COLUMNS) + "\n3,m,Muon,c,OPUS,WSC,36.541\n", "two decimals, got 36.541"),
    (",".join(COLUMNS) + "\n3,m,Muon,c,OPUS,WSC,36.54\n", "differs .* in \\['Avg'\\]"),
    (",".join(COLUMNS) + "\n3,m,Muon,c,PPL,WSC,36.54\n3,m,Muon,c,PPL,Avg,36.54\n", "starts with OPUS"),
    (",".join(COLUMNS) + "\n3,m,Muon,c,OPUS,WSC,many\n", "not a file of reported numbers .*many"),
])
def test_bad_files_are_refused_in_one_line(text, message, tmp_path, monkeypatch, capsys):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_blocks(path)
    monkeypatch.setattr("sys.argv", ["audit", "--reported", str(path), "--results", str(tmp_path)])
    assert audit.main() == 2 and capsys.readouterr().err.count("\n") == 1
    assert not list(Path(tmp_path).glob("tables/*"))
