"""results/index.html is a function of the folder, every cell knows its runs, and nothing in it can execute or fetch."""

import argparse
import base64
import hashlib
import importlib
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from test_report import REPORTED, grid, record_of, written

from opus_bench import figures, report, results
from opus_bench.site import page as site
from opus_bench.site import figures as site_figures
from opus_bench.site import markup as site_pages
from opus_bench.site import summary as site_summary
from opus_bench.schema import RecordError
from opus_bench.sections import arrange, label_of
from opus_bench.tables import paper_cells

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


class Parsed(HTMLParser):
    """Elements, ids and text of a page; tables as rows of (attributes of the row, cells)."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.tables, self.scripts, self.open = [], [], [], []
        self.article = self.cell = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.elements.append((tag, attrs))
        if tag == "article":
            self.article = attrs["id"]
        elif tag == "table":
            self.tables.append((self.article, []))
        elif tag == "tr":
            self.tables[-1][1].append((attrs, []))
        elif tag in ("td", "th"):
            self.cell = [attrs, ""]
            self.tables[-1][1][-1][1].append(self.cell)
        elif tag == "script":
            self.scripts.append([attrs, ""])
        self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, text):
        if self.open and self.open[-1] == "script":
            self.scripts[-1][1] += text
        elif self.cell:
            self.cell[1] += text

    @property
    def data(self):
        return json.loads(next(text for attrs, text in self.scripts if attrs.get("type") == "application/json"))

    def behind(self, article, first, column, occurrence=0):
        """Run ids behind the cell of a row (its first cell) and a column, in the nth table of an article with both."""
        found = []
        for name, rows in self.tables:
            header = [text for _, text in rows[0][1]] if rows else []
            if name == article and column in header:
                found += [(attrs, cells[header.index(column)][0]) for attrs, cells in rows[1:] if cells[0][1] == first]
        row, cell = found[occurrence]
        number = cell.get("data-runs", row.get("data-runs", ""))
        return self.data["sets"][int(number)] if number else []


@pytest.fixture(scope="module")
def text():
    return site.site(RESULTS, REPORTED)


@pytest.fixture(scope="module")
def parsed(text):
    return Parsed(text)


@pytest.fixture(scope="module")
def records():
    return {record["run_id"]: record for record in results.load(RESULTS / "runs")}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with Table 3 of a small grid, and an older record of another code."""
    folder = written(tmp_path_factory.mktemp("results"), grid(optimizers=("adamw", "muon")))
    results.write(record_of("Random", 0, code="0bde" * 16), folder / "runs")
    report.report(folder, REPORTED)
    return folder


def cell_runs(records, runs):
    return sorted((records[run]["method"], records[run]["arm"], records[run]["config"]["optimizer"],
                   records[run]["config"]["seed"]) for run in runs)


# The page as a whole --------------------------------------------------------------------------


def test_the_committed_page_is_that_of_the_committed_folder(text):
    assert (RESULTS / "index.html").read_text() == text, "run `python -m reproduce.pages`"
    assert site.site(RESULTS, REPORTED) == text
    assert len(text.encode()) < site.LARGEST


def test_nothing_is_fetched_and_only_the_pages_own_script_runs(text, parsed):
    loading = {"link", "iframe", "object", "embed", "img", "audio", "video", "source", "base"}
    assert not loading & {tag for tag, _ in parsed.elements}
    assert all("src" not in attrs and not any(name.startswith("on") for name in attrs) for _, attrs in parsed.elements)
    assert not re.search(r"@import|url\((?!#)", text.split("</style>")[0])
    code = [content for attrs, content in parsed.scripts if "type" not in attrs]
    assert len(code) == 1
    digest = base64.b64encode(hashlib.sha256(code[0].encode()).digest()).decode()
    policy = next(attrs["content"] for tag, attrs in parsed.elements if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy
    assert not re.search(r"\b(fetch|XMLHttpRequest|innerHTML|eval|import)\b", code[0])


def test_every_link_has_its_target_and_every_id_is_one(parsed):
    ids = [attrs["id"] for _, attrs in parsed.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in parsed.elements:
        target = attrs.get("href", "")
        if target.startswith("#"):
            assert target[1:] in ids, target
        elif target:
            assert (RESULTS / target).exists(), target
        for name in re.findall(r"url\(#([^)]+)\)", " ".join(map(str, attrs.values()))):
            assert name in ids, name


def test_every_page_figure_and_record_is_there(parsed, records):
    articles = {attrs["data-page"] for _, attrs in parsed.elements if "data-page" in attrs}
    sources = {path.stem: path.read_text() for path in (RESULTS / "tables").glob("*.md")}
    assert articles == {*sources, "exactness"}
    drawn = {attrs["data-figure"] for _, attrs in parsed.elements if "data-figure" in attrs}
    assert drawn == {path.stem for path in (RESULTS / "figures").glob("*.svg")}
    assert {attrs["data-run"] for _, attrs in parsed.elements if "data-run" in attrs} == set(records)
    for name, source in sources.items():
        bodies = [rows for article, rows in parsed.tables if article == name]
        assert len(bodies) == len(re.findall(r"^\| --- ", source, re.M)), name
        assert sum(map(len, bodies)) == len(re.findall(r"^\| (?!---)", source, re.M)), name


def test_a_record_is_inside_but_for_its_series_which_are_counted(parsed, records):
    inside = parsed.data["records"]
    for run, record in records.items():
        kept = dict(inside[run])
        assert kept.pop("left_out") == {"metrics": len(record["metrics"]),
                                        "selection.per_step": len(record["selection"]["per_step"]["step"])}
        selection = {key: value for key, value in record["selection"].items() if key != "per_step"}
        assert kept == {key: value for key, value in record.items() if key != "metrics"} | {"selection": selection}


def test_a_page_that_a_script_adds_is_shown_without_being_registered(small, tmp_path):
    shutil.copytree(small, tmp_path / "r")
    added = "# An audit\n\nMade by `python -m reproduce.audit`.\n\n| a | b |\n| --- | --- |\n| x | not run: no hub |\n"
    (tmp_path / "r" / "tables" / "audit.md").write_text(added)
    page = Parsed(site.site(tmp_path / "r", REPORTED))
    assert [attrs["data-page"] for _, attrs in page.elements if "data-page" in attrs] == ["table3", "audit"]
    assert any(attrs.get("class") == "not-run" for name, rows in page.tables if name == "audit"
               for _, cells in rows for attrs, _ in cells)


def test_what_was_not_run_and_what_is_older_is_said(small):
    text = site.site(small, REPORTED)
    inside = Parsed(text).data["records"]
    older = [run for run, record in inside.items() if record["code"]["version"].startswith("0bde")]
    rows = dict(re.findall(r'<tr id="run-(\w+)"(.*?)</tr>', text))
    assert [run for run, row in rows.items() if "in no table" in row] == older and len(older) == 1
    assert all('<a href="#table3">Table 3</a>' in row for run, row in rows.items() if run not in older)
    for number in "45678":
        cell = '</th><td colspan="4" class="not-run">not run: no record; the paper gives'
        assert f"Table {number} of arXiv:2602.05400{cell}" in text
    assert "Table 3 of arXiv:2602.05400</th>" not in text


def test_a_figure_that_is_gone_is_said_to_be(small, tmp_path):
    shutil.copytree(small, tmp_path / "r")
    (tmp_path / "r" / "figures" / "table3_smoke_loss.svg").unlink()
    assert "not run: no file figures/table3_smoke_loss.svg" in site.site(tmp_path / "r", REPORTED)


def test_no_pages_or_too_large_a_page_is_an_error_and_leaves_the_old_one(small, tmp_path, monkeypatch):
    with pytest.raises(RecordError, match="no pages; make them with"):
        site.write(tmp_path, REPORTED)
    path = site.write(small, REPORTED)
    before = path.read_bytes()
    monkeypatch.setattr(site, "LARGEST", 1000)
    with pytest.raises(RecordError, match="more than 1,000"):
        site.write(small, REPORTED)
    assert path.read_bytes() == before and not list(small.glob(".*"))


def test_strings_of_records_and_pages_are_text(small, tmp_path):
    folder = tmp_path / "r"
    shutil.copytree(small, folder)
    bad = record_of(HOSTILE, 0)
    bad["deviations"], bad["selection"]["notes"] = [HOSTILE + "</script>\u2028"], [HOSTILE]
    results.write(bad, folder / "runs")
    report.report(folder, REPORTED)
    parts = (f"# {HOSTILE}", HOSTILE, "[a](javascript:x())", f"## {HOSTILE}", f"| {HOSTILE} |\n| --- |\n| {HOSTILE} |")
    (folder / "tables" / "bad.md").write_text("\n\n".join(parts))
    text = site.site(folder, REPORTED)
    page = Parsed(text)
    assert not {"img"} & {tag for tag, _ in page.elements} and len(page.scripts) == 2
    assert not any("onerror" in attrs or attrs.get("href", "").startswith("javascript") for _, attrs in page.elements)
    assert page.data["records"][bad["run_id"]]["deviations"] == bad["deviations"]
    block = next(content for attrs, content in page.scripts if "type" in attrs)
    assert "&lt;script&gt;document.title" in text and not re.search("[<\u2028]", block)


# Cells and their runs -------------------------------------------------------------------------


def test_a_cell_knows_the_runs_it_is_made_from(parsed, records):
    column = "validation loss on encyclopedia (nat/token)"
    for occurrence, section in enumerate(arrange(r for r in records.values() if r["experiment"] == "table3")):
        seeds = sorted(next(row for row in section.rows if row.label == "OPUS (paper)").records)
        own = [("OPUS", "paper", section.optimizer, seed) for seed in seeds]
        assert len(seeds) >= 3
        runs = parsed.behind("table3", "OPUS (paper)", column, occurrence)
        assert cell_runs(records, runs) == own and {records[run]["scale"] for run in runs} == {section.scale}
        runs = parsed.behind("table3", "OPUS (paper)", "difference to Random (nat/token)", occurrence)
        assert cell_runs(records, runs) == own + [("Random", None, section.optimizer, seed) for seed in seeds]
        runs = parsed.behind("table3", "code", "OPUS (paper)", occurrence)  # bits per byte: methods are columns
        assert cell_runs(records, runs) == own
    assert parsed.behind("table3", "chance", "agreement (n = 200)") == []
    paper = "the paper's own: mean of its ten tasks, GPT-2 XL, FineWeb (%)"
    assert parsed.behind("table3", "OPUS (paper)", paper) == []


def test_a_cell_of_a_measurement_knows_its_optimizer_and_a_row_of_runs_its_run(parsed, records):
    runs = parsed.behind("noise_budget", "labels shifted twice", "Muon, after 280 updates")
    assert {records[run]["config"]["optimizer"] for run in runs} == {"muon"} and len(runs) == 1
    for run, record in records.items():
        if record["experiment"] == "offline_suite":
            tokens = f"{max(row['tokens_seen'] for row in record['metrics']):,}"
            assert parsed.behind("offline_suite", tokens, "seed") == [run]
    assert parsed.behind("table7", "GREATS", "n seeds") != parsed.behind("table7", "Random", "n seeds")


def test_the_parts_of_a_place_are_read_from_headings():
    records = [record_of("Random", 0, name, scale) for name in ("adamw", "muon") for scale in ("smoke", "ci")]
    place = site_pages.Place().narrowed("Scale: ci", records)
    assert place == site_pages.Place("ci", None)
    assert place.narrowed("AdamW: summary", records) == site_pages.Place("ci", "adamw")
    assert place.narrowed("How Muon is read", records) == place
    assert [label_of(r) for r in place.of(records)] == ["Random"] * 2
    assert site_pages.arm_in("Greedy (paper)") == "paper" and site_pages.arm_in("released arm") == "released"
    assert site_pages.arm_in("the paper") is None and site_pages.arm_in("PPL (high)") is None


def test_the_replay_command_is_one_that_makes_the_run(records, parsed, monkeypatch):
    from reproduce import runner
    from reproduce.scales import SCALES

    choices = {}
    for run, record in records.items():
        *checkout, command = parsed.data["replay"][run].split("\n")
        assert [line.split()[2] for line in checkout] == [record["code"]["commit"]]
        python, flag, module, *options = shlex.split(command)
        assert (python, flag) == ("python", "-m") and options[-2:] == ["--results", "replay"]
        if module == "reproduce.coverage":
            assert options == ["--results", "replay"]
            continue
        if not module.startswith("reproduce."):
            assert module == "benchmarks.scoring" and options[:2] == ["--shape", record["config"]["shape"]["name"]]
            continue
        if command not in choices:
            monkeypatch.setattr("sys.argv", [module, *options])
            script = importlib.import_module(module)
            parsed_options = runner.arguments("", large=hasattr(script, "large_runs"), scales=tuple(SCALES))
            assert isinstance(parsed_options, argparse.Namespace) and parsed_options.results == Path("replay")
            scales = getattr(script, "SCALES", None)  # of its runs by torchrun, where it says them
            large = isinstance(scales, tuple) and parsed_options.scale in scales
            made = runner.choose((script.large_runs if large else script.runs)(parsed_options), parsed_options)
            choices[command] = {(job.label, *((job.optimizer, job.seed) if large else
                                              (job.config.optimizer, job.config.seed))) for job in made}
        assert (label_of(record), record["config"]["optimizer"], record["config"]["seed"]) in choices[command], command


# The summary ----------------------------------------------------------------------------------


def test_the_summary_says_what_the_intervals_say(small):
    sections = arrange(r for r in results.load(small / "runs") if r["code"]["version"].startswith("c0de"))
    by_label = {row.label: site_summary.verdict(row, sections[0].base) for row in sections[0].rows}
    assert [by_label[name] for name in ("OPUS calibrated", "PPL high", "OPUS released")] == ["less", "more", "same"]
    said = site_summary.finding(sections)
    assert said.startswith("Smoke scale, 3 paired seeds, 95 % intervals. ")
    assert "OPUS calibrated: less target loss than Random under AdamW and Muon" in said
    assert "OPUS paper: more target loss than Random under AdamW and Muon" in said
    less = sum(value == "less" for value in by_label.values())
    assert f"Of all methods, {less} of 7 under AdamW and {less} of 7 under Muon end with less." in said
    text = site.site(small, REPORTED)
    assert "<strong>Smoke scale</strong>: checks the pipeline" in text and "run at the paper's scale" in text
    reported = paper_cells(REPORTED)
    opus, base = (reported["3", "GPT-2 XL", "muon", "FineWeb", name, "Avg"] for name in ("OPUS", "Random"))
    row = next(cells for _, rows in Parsed(text).tables[:1] for _, cells in rows if cells[0][1] == "OPUS paper")
    assert row[5][1] == f"{opus - base:+.2f}" and row[6][1] == "smoke"


def test_too_few_seeds_are_said_and_other_scales_are_not_called_pipeline_checks(tmp_path):
    folder = written(tmp_path, grid((0,), scale="small", methods=("Random", "OPUS paper")))
    report.report(folder, REPORTED)
    text = site.site(folder, REPORTED)
    assert "OPUS paper: too few seeds for an interval under AdamW" in text and "checks the pipeline" not in text


# Figures --------------------------------------------------------------------------------------


def test_the_values_of_a_figure_are_those_drawn_and_lie_where_they_are_drawn(tmp_path):
    x, y = np.array([1.0, 10.0, 1000.0]), np.array([0.5, 0.25, 0.123456])

    def draw(figure, axes):
        left, right = axes[0]
        left.plot(x, y, label="ours", color="#0072b2")
        left.set_xscale("log")
        left.axhline(0.3)
        left.set_xlabel("width")
        left.set_ylabel("error")
        left.set_title("log")
        right.plot([2.0, 3.0], [0, 1], "o", color="#d55e00", linestyle="")
        right.set_yticks([0, 1], ["first", "second"])
        right.barh(1, 2.5, height=0.5)

    path = figures.draw_panels(tmp_path / "f.svg", "A title", "a note", draw, columns=2)
    drawn = site_figures.inline(path)
    assert (drawn.title, drawn.note, len(drawn.panels)) == ("A title", "a note", 2)
    left, right = drawn.panels
    assert (left["title"], left["x"], left["y"]) == ("log", "width", "error")
    assert [series["label"] for series in left["series"]] == ["ours"]  # the reference line is no value
    points = left["series"][0]["points"]
    assert [point[2:] for point in points] == [[1, 0.5], [10, 0.25], [1000, 0.12346]]
    line = re.search(r' d="([^"]+)"[^>]*stroke:var\(--c0072b2', drawn.svg).group(1)
    vertices = re.findall(r"[ML] ([\d.]+) ([\d.]+)", line)
    assert np.allclose([point[:2] for point in points], np.array(vertices, dtype=float), atol=0.06)
    assert [series["points"][0][2:] for series in right["series"]] == [[2, "first"], [2.5, "second"]]
    again = figures.draw_panels(tmp_path / "g.svg", "A title", "a note", draw, columns=2)
    assert again.read_bytes() == path.read_bytes()


def test_a_long_series_is_thinned_and_keeps_its_ends(tmp_path):
    def draw(figure, axes):
        axes[0, 0].plot(range(1000), range(1000), label="long")

    panel = site_figures.inline(figures.draw_panels(tmp_path / "f.svg", "t", "", draw)).panels[0]
    shown = [point[2] for point in panel["series"][0]["points"]]
    assert len(shown) == 60 and shown[0] == 0 and shown[-1] == 999 and shown == sorted(set(shown))


def test_only_drawing_is_let_through_and_names_are_the_figures_own(tmp_path):
    path = tmp_path / "one.svg"
    path.write_text('<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                    'viewBox="0 0 10 10" onload="x()"><style>*{color:red}</style><script>x()</script>'
                    '<defs><path id="m" d="M 0 0 L 1.23456 2"/></defs><foreignObject><p>x</p></foreignObject>'
                    '<a xlink:href="javascript:x()"><text>t</text></a>'
                    '<use xlink:href="#m" onclick="x()" style="fill: #ffffff; background: url(http://a)"/>'
                    '<image xlink:href="http://a/b.png"/>'
                    '<g id="unused" clip-path="url(#m)"><text>a &lt;b&gt;</text></g></svg>')
    drawn = site_figures.inline(path)
    assert drawn.svg == ('<svg viewBox="0 0 10 10" role="img" aria-label="one"><defs>'
                         '<path id="one-m" d="M 0 0 L 1.23 2"></path></defs>'
                         '<use href="#one-m" style="fill:var(--paper)"></use><image></image>'
                         '<g clip-path="url(#one-m)"><text>a &lt;b&gt;</text></g></svg>')
    path.write_text("<html></html>")
    with pytest.raises(ValueError, match="not an SVG but <html>"):
        site_figures.inline(path)
    path.write_text("no")
    with pytest.raises(ValueError, match="one.svg: not an SVG"):
        site_figures.inline(path)


def test_a_heat_map_keeps_its_colours_and_other_figures_take_the_pages(text):
    kinds = {name: kind for kind, name in re.findall(r'<figure class="figure([ a-z-]*)" id="figure-(\w+)"', text)}
    assert {name for name, kind in kinds.items() if kind} == {"table3_cpu_domains", "table3_smoke_domains",
                                                              "noise_injection_auc_smoke"}
    drawn = site_figures.inline(RESULTS / "figures" / "table3_smoke_loss.svg").svg
    assert "#ffffff" not in drawn and "#000000" not in drawn and "var(--ink)" in drawn
    assert "#ffffff" in site_figures.inline(RESULTS / "figures" / "table3_smoke_domains.svg").svg
