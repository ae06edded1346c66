"""The documentation: it builds, its links hold, what it names exists, and what it shows runs."""

from __future__ import annotations

import argparse
import importlib
import inspect
import io
import re
import runpy
import shlex
import shutil
import socket
import sys
import tomllib
import warnings
from contextlib import redirect_stderr, redirect_stdout
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort, MkDocsException

from opus_bench import cli
from reproduce import cost
from reproduce.paper_scale import GPU_SCALES
from reproduce.runner import SCALES

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
GALLERY = sorted((ROOT / "examples").glob("*.py"))


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def build_site(folder, site):
    build(load_config(str(folder / "mkdocs.yml"), strict=True, site_dir=str(site)))


# The site ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    build_site(ROOT, folder)
    return folder


class Anchors(HTMLParser):
    """Links and ids of a page."""

    def __init__(self, page):
        super().__init__()
        self.links, self.ids = [], set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)


def test_every_link_and_anchor_of_the_site_leads_somewhere(site):
    pages = {page: Anchors(page) for page in site.rglob("*.html") if page.name != "404.html"}
    followed = 0
    for page, found in pages.items():
        if site / "results" in page.parents:
            continue  # the results page has a test of its own
        for link in found.links:
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            place = (page.parent / unquote(path)).resolve() if path else page
            assert place.exists(), (page, link)
            if anchor and place in pages:
                assert unquote(anchor) in pages[place].ids, (page, link)
            followed += 1
    assert followed > 1000


def test_the_site_asks_nothing_of_any_server(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|link)\b[^>]*?(?:src|href)=\"?(https?:[^\s\">]+)", page.read_text("utf-8"))
        assert not loaded, (page, loaded)


@pytest.mark.parametrize("text,error", [
    ("[x](nowhere.md)", Abort),
    ("[x](../opus_bench/nowhere.py)", Abort),
    ("[x](#no-such-heading)", Abort),
    ("<!-- include nowhere.py -->", MkDocsException),
    ("<!-- include docs/index.md#nothing -->", MkDocsException),
    ("# Sound\n\n[x](#sound)", None),
])
def test_a_page_that_is_wrong_ends_the_build(text, error, tmp_path):
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "hooks.py", tmp_path / "docs")
    settings = text_of("mkdocs.yml").split("nav:\n  -")[0]
    (tmp_path / "mkdocs.yml").write_text(settings + "nav:\n  - Start: index.md\n", encoding="utf-8")
    (tmp_path / "docs" / "index.md").write_text(text + "\n", encoding="utf-8")
    if error is None:
        build_site(tmp_path, tmp_path / "site")
        assert (tmp_path / "site" / "index.html").is_file()
    else:
        with pytest.raises(error):
            build_site(tmp_path, tmp_path / "site")


def test_every_page_is_in_the_navigation():
    nav = [path for one in yaml.safe_load(text_of("mkdocs.yml"))["nav"] for path in one.values()]
    assert {page.name for page in PAGES} == {path for path in nav if not path.startswith("../")}
    assert all((ROOT / "docs" / path).is_file() for path in nav)


def test_make_docs_is_the_strict_build():
    assert re.search(r"^docs: setup\n\t\$\(BIN\)/python -m mkdocs build --strict$", text_of("Makefile"), re.M)


def test_the_start_page_names_every_table_and_command():
    start = text_of("docs/index.md")
    for page in (ROOT / "results" / "tables").glob("*.md"):
        assert f"](../results/tables/{page.name})" in start, page.name
    shown = {line[0] for line in commands("docs/*.md") if line and line[0] in cli_commands()}
    assert shown == cli_commands()


# The method -------------------------------------------------------------------------------------------

EQUATIONS = {  # of the paper: the row of docs/method.md, and what must compute it
    "per-token loss": "opus_bench.sequences.token_losses",
    "loss of a sample": "opus_bench.sequences.sample_losses",
    "per-sample gradient, ghost factors": "opus_bench.gradients.capture",
    "the same, exactly": "opus_bench.gradients.exact_per_sample_grads",
    "ghost inner product": "opus_bench.ghost.ghost_inner_product",
    "proxy gradient": "opus_bench.gradients.mean_gradient",
    "P_t of AdamW": "opus_bench.preconditioner.adamw_preconditioner",
    "P_t of Muon": "opus_bench.preconditioner.muon_preconditioner",
    "P_t of SGD": "opus_bench.preconditioner.preconditioners",
    "effective update": "opus_bench.preconditioner.Preconditioner",
    "exact alignment": "opus_bench.ghost.contract",
    "utility (Eq 23)": "opus_bench.utility.exact_utility",
    "marginal utility (Eq 25)": "opus_bench.utility.Utility.marginal",
    "CountSketch": "opus_bench.sketch.count_sketch",
    "sketched utility": "opus_bench.utility.sketched_utility",
    "Boltzmann sampling (Eq 26)": "opus_bench.sampling.boltzmann_sample",
    "BENCH-PROXY": "opus_bench.documents.proxy.MaxCosine",
    "proxy pool": "opus_bench.documents.scored.Rule",
    "all of it": "opus_bench.selector.Opus.select",
}
NAMED = re.compile(r"\[`([\w.]+)`\]\(\.\./([\w/]+)\.py\)")


def rows(heading):
    """Quantity to (equation, computed by) of the table under a heading of docs/method.md."""
    section = text_of("docs/method.md").split(f"## {heading}\n")[1].split("\n## ")[0]
    cells = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")][2:]
    return {quantity: (equation, computed) for quantity, equation, computed in cells}


def named(computed):
    """Dotted names of the functions that a cell links to, from the package down."""
    for name, path in NAMED.findall(computed):
        module = path.replace("/", ".")
        assert name.split(".")[0] == module.rsplit(".")[-1], (name, path)
        yield ".".join([module, *name.split(".")[1:]])


def found(dotted):
    """The object of a dotted name."""
    parts = dotted.split(".")
    depth = next(n for n in range(len(parts), 0, -1) if (ROOT / "/".join(parts[:n])).with_suffix(".py").is_file())
    thing = importlib.import_module(".".join(parts[:depth]))
    for part in parts[depth:]:
        thing = getattr(thing, part)
    return thing


def test_every_equation_of_the_paper_has_its_function():
    table = rows("From a loss to a choice")
    assert {quantity: list(named(computed)) for quantity, (_, computed) in table.items()} == {
        quantity: [name] for quantity, name in EQUATIONS.items()}
    assert all(len(equation) > 0 for equation, _ in table.values())


@pytest.mark.parametrize("heading", ["From a loss to a choice", "What is ours, beside it"])
def test_every_function_of_the_method_is_defined_where_the_page_says(heading):
    for quantity, (_, computed) in rows(heading).items():
        names = list(named(computed))
        assert names, quantity
        for name in names:
            thing = found(name)
            assert inspect.getdoc(thing), name
            assert name.startswith(f"{thing.__module__}.{thing.__qualname__}"), (name, thing)


def test_names_in_code_style_that_link_to_a_file_are_in_that_file():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for name, path in re.findall(r"\[`([\w.]+)`\]\((?:\.\./)?([\w/]+\.py)\)", page.read_text(encoding="utf-8")):
            last = name.split(".")[-1]
            assert re.search(rf"^\s*(def |class )?{last}\b", text_of(path), re.M), (page.name, name, path)


def test_every_public_module_that_makes_a_choice_is_on_the_method_page():
    """No part of the scoring path is left out of the mapping."""
    page = text_of("docs/method.md")
    for name in ("gradients", "ghost", "sketch", "sequences", "preconditioner", "optimizer_map", "utility", "streamed",
                 "sampling", "selector"):
        assert f"(../opus_bench/{name}.py)" in page, name


# What it shows runs -----------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """An empty working folder and no network; the global random state is put back."""

    def refuse(*_):
        raise AssertionError("an example must not need a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        yield tmp_path


@pytest.mark.parametrize("page", [page.name for page in PAGES if "```python" in page.read_text(encoding="utf-8")])
def test_the_python_of_a_page_runs_in_order(page, alone):
    names = {"__name__": page}
    for block in re.findall(r"^```python\n(.*?)^```", text_of(f"docs/{page}"), re.S | re.M):
        with redirect_stdout(io.StringIO()):
            exec(compile(block, page, "exec"), names)


def test_pages_with_python_are_these():
    shown = {page.name for page in PAGES if "```python" in page.read_text(encoding="utf-8")}
    assert shown == {"arms.md", "extend.md", "own_model.md"}


def run_example(name):
    """The names that a script of examples/ leaves, run as `python -m` runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name])
        return runpy.run_module(f"examples.{name}", run_name="__main__")


def test_own_loop_chooses_the_text_that_the_proxy_asks_for(alone, capsys):
    left = run_example("own_loop")
    assert left["late"] > 0.75 and len(left["shares"]) == left["STEPS"]  # half of those offered
    assert "effective sample size 0.25" in capsys.readouterr().out  # the arm's own target


def test_wider_sketches_order_candidates_better(alone, capsys):
    agreement = run_example("sketch_against_exact")["agreement"]
    assert agreement[32] < agreement[512] < agreement[8192] and agreement[8192] > 0.95
    assert capsys.readouterr().out.count("Spearman with exact") == 3


def test_custom_selector_compares_three_on_one_stream(alone, capsys):
    losses = run_example("custom_selector")["losses"]
    assert len(losses) == 3 and losses["OPUS (calibrated)"] < losses["random"]
    assert capsys.readouterr().out.count("nat/token") == 3


def test_masked_batches_score_the_same_however_padded(alone, capsys):
    left = run_example("masked_batches")
    assert left["short"].abs().max() > 0.01 and left["difference"] < 1e-12  # float64
    assert left["sequences"].counted().sum(1).tolist() == [len(text) - 5 for text in left["texts"]]
    assert not torch.equal(left["whole"], left["answer"])


def test_records_figure_has_the_numbers_of_the_table(alone, capsys):
    left = run_example("records_figure")
    lines = capsys.readouterr().out.splitlines()
    assert left["path"].read_text(encoding="utf-8").startswith("<?xml") and lines[-1] == "wrote loss_by_seed.svg"
    table = text_of("README.md").split("<!-- results -->")[1].split("<!-- end of results -->")[0]
    assert len(lines) - 1 == len(left["methods"]) >= 5
    for line in lines[:-1]:
        method, difference = re.match(r"(.+?) +([+-]\d\.\d{3} \[\S+ \S+\]) nat/token", line).groups()
        assert any(row.startswith(f"| {method} |") and difference in row for row in table.splitlines()), line


def test_every_example_is_on_the_page_and_in_a_test():
    page, tests = text_of("docs/examples.md"), Path(__file__).read_text(encoding="utf-8")
    assert len(GALLERY) >= 5
    for script in GALLERY:
        assert f"python -m examples.{script.stem}\n" in page and f"<!-- include examples/{script.name} -->" in page
        assert f'run_example("{script.stem}")' in tests
        assert f"python -m examples.{script.stem}" in script.read_text(encoding="utf-8")


# Commands ---------------------------------------------------------------------------------------------


def cli_commands():
    return set(cli.parser()._subparsers._group_actions[0].choices)


def commands(*patterns):
    """Words of every command of the shell blocks of pages, without the program; modules as python -m has them."""
    for pattern in patterns:
        for page in sorted(ROOT.glob(pattern)):
            for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M):
                for line in block.replace("\\\n", " ").splitlines():
                    words = shlex.split(line, comments=True)
                    if words:
                        yield understood(words, page)


def understood(words, page):
    """opus-bench X ... as [X, ...], python -m X ... as ["-m", X, ...], torchrun as python, make X as ["make", X]."""
    program = words[0].rsplit("/", 1)[-1]
    if program == "opus-bench":
        return words[1:]
    if program in ("python", "torchrun") and "-m" in words:
        return words[words.index("-m"):]
    if program == "make":
        return words
    raise AssertionError(f"{page.name}: {shlex.join(words)} is no command of the suite")


def parsed(words):
    """Exit code and message of a command whose options are read by its own parser and which then stops."""
    said, parse = io.StringIO(), argparse.ArgumentParser.parse_args

    def read(*given, **named):
        parse(*given, **named)
        raise SystemExit(0)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the module is imported already
        patch.setattr(argparse.ArgumentParser, "parse_args", read)
        with redirect_stderr(said), pytest.raises(SystemExit) as stop:
            if words[0] == "-m":
                patch.setattr(sys, "argv", list(words[1:]))
                runpy.run_module(words[1], run_name="__main__")
            else:
                cli.main(list(words))
    return stop.value.code, said.getvalue()


ALL_COMMANDS = list(dict.fromkeys(map(tuple, commands("docs/*.md", "CONTRIBUTING.md"))))


@pytest.mark.parametrize("words", [words for words in ALL_COMMANDS
                                   if not {words[0], *words[1:2]} & {"make", "pytest"}
                                   and not words[-1].startswith("examples.")], ids=shlex.join)
def test_a_command_of_a_page_is_understood(words):
    code, said = parsed(words)
    assert code in (0, None), said


def test_a_command_that_is_wrong_is_not_understood():
    assert parsed(["doctor", "--colour"])[0] == 2
    assert parsed(["data", "--source", "fineweb", "--words", "5"])[0] == 2
    assert parsed(["-m", "reproduce.table3", "--scale", "huge"])[0] == 2


def test_make_targets_of_the_pages_exist():
    targets = {words[1] for words in ALL_COMMANDS if words[0] == "make"}
    assert {"test", "docs", "reproduce"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", text_of("Makefile"), re.M), target


def test_the_cost_of_every_scale_is_on_the_page():
    table = text_of("docs/cost.md").split("\n## ")[0]
    for scale in (*SCALES, *GPU_SCALES):
        assert re.search(rf"^\| `{scale}` \|", table, re.M), scale


def cost_record(experiment, scale, minutes, peak, threads=1):
    return {"experiment": experiment, "scale": scale, "environment": {"device": "cpu", "threads": threads},
            "timing": {"wall_s": 60.0 * minutes, "peak_bytes": peak}}


def test_the_cost_page_adds_up_its_records():
    records = [cost_record("table3", "smoke", 30, 2 * 10**9), cost_record("table3", "smoke", 90, 10**9),
               cost_record("scoring", "smoke", 6, None, threads=2), cost_record("table3", "cpu", 12, None)]
    lines = cost.page(records).splitlines()
    assert "from 4 records" in cost.page(records)
    assert "| smoke | 2 | 3 | 2.10 | 90.0 | 2.00 |" in lines
    assert "| cpu | 1 | 1 | 0.20 | 12.0 | – |" in lines
    assert [line.split(" | ")[0] for line in lines if "no record here" in line] == ["| ci", "| small", "| paper"]
    command = "`python -m reproduce.table3 --scale smoke`"
    assert f"| table3 | smoke | cpu, 1 | 2 | 30.0 to 90.0 | 2.00 | 2.00 | {command} |" in lines
    assert "| scoring | smoke | cpu, 2 | 1 | 6.0 to 6.0 | 0.10 | – | `python -m benchmarks.scoring` |" in lines


def test_the_cost_page_of_no_records_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no records; `python -m reproduce.table3` makes some"):
        cost.write(tmp_path)


# Files beside it --------------------------------------------------------------------------------------


def test_citation_and_changes_are_of_this_version_and_licence():
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert citation["authors"] and citation["message"] and project["name"] in citation["title"]
    (paper,) = citation["references"]
    assert paper["url"].endswith("2602.05400") and len(paper["authors"]) == 12
    licence = text_of("LICENSE")
    assert "Apache License" in licence and "Version 2.0" in licence
    headings = re.findall(r"^## (.+)$", text_of("CHANGELOG.md"), re.M)
    assert headings and headings[0].startswith("[Unreleased]") and any(project["version"] in line for line in headings)
    kinds = set(re.findall(r"^### (.+)$", text_of("CHANGELOG.md"), re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Not run"} and "Added" in kinds


def test_every_command_is_in_the_changes():
    changes = text_of("CHANGELOG.md")
    for command in cli_commands():
        assert f"`opus-bench {command}`" in changes, command
