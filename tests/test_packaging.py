"""What a newcomer relies on: pins that agree, commands and paths of the README that exist."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


def pins():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_conda_environment_has_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["dependencies"][-1]["pip"] == pins()
    assert environment["dependencies"][0] == "python=3.11"
    assert all(re.fullmatch(r"[a-z0-9-]+(\[hf\])?==[\w.]+", pin) for pin in pins())


def test_every_declared_dependency_is_pinned_at_or_above_its_bound():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {re.split(r"[\[=]", pin)[0]: pin.split("==")[1] for pin in pins()}
    declared = project["dependencies"] + [d for extra in project["optional-dependencies"].values() for d in extra]
    for line in declared:
        name, bound = re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", line).groups()
        as_numbers = [[int(x) for x in v.split(".")] for v in (pinned[name], bound)]
        assert as_numbers[0] >= as_numbers[1], line


def readme():
    return (ROOT / "README.md").read_text()


def test_every_link_of_the_readme_points_at_something():
    targets = re.findall(r"\]\(([^)#]+)(?:#L?[\w-]*)?\)", readme())
    assert len(targets) > 10
    for target in targets:
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_every_make_target_and_module_of_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake (\w+)", readme())):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for module in set(re.findall(r"python -m ([\w.]+)", readme())):
        if not module.startswith("pytest"):
            assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module


def test_every_function_the_readme_links_is_defined_there():
    """`[name](file)` in code style names something that the file defines."""
    for name, path in re.findall(r"\[`([A-Za-z_.]+)`\]\(([\w/]+\.py)\)", readme()):
        source = (ROOT / path).read_text()
        assert re.search(rf"(def|class) {name.split('.')[-1]}\b", source), (name, path)


@pytest.mark.parametrize("folder", ["opus_bench", "baselines", "reproduce", "tests"])
def test_arrows_between_rooms_go_one_way(folder):
    above = {"opus_bench": ("baselines", "benchmarks", "reproduce"), "baselines": ("benchmarks", "reproduce")}
    forbidden = above.get(folder, ())
    for path in (ROOT / folder).rglob("*.py"):
        for name in forbidden:
            assert not re.search(rf"^\s*(from|import) {name}\b", path.read_text(), re.M), path


def test_the_examples_of_the_readme_run():
    blocks = re.findall(r"```python\n(.*?)```", readme(), re.S)
    assert len(blocks) == 2
    loop: dict = {}
    exec(blocks[0], loop)
    assert len(loop["chosen"]) == 8
    assert len([line for line in blocks[0].splitlines() if line.strip()]) <= 15
    added: dict = {}
    exec(blocks[1], added)
    selection = added["LowestLoss"]().select(loop["candidates"], 4, loop["state"], loop["generator"])
    assert len(set(selection.indices.tolist())) == 4


def test_the_results_in_the_readme_are_those_of_the_records():
    from opus_bench.report import EXACTNESS_MARKERS, HEADLINE_MARKERS, MARKERS, exactness_block, headline, readme_block
    from opus_bench.results import load
    from opus_bench.sections import arrange
    from opus_bench.tables import paper_cells

    sections = arrange(load(ROOT / "results" / "runs", "table3"))
    block = readme_block(sections, "table3", paper_cells(ROOT / "reproduce" / "reported.csv"))
    assert readme().split(MARKERS[0])[1].split(MARKERS[1])[0] == f"\n{block}\n" and "OPUS (calibrated)" in block
    start, end = HEADLINE_MARKERS
    assert readme().split(start)[1].split(end)[0] == f"\n{headline(sections, 'table3')}\n"
    start, end = EXACTNESS_MARKERS
    assert readme().split(start)[1].split(end)[0] == f"\n{exactness_block(ROOT / 'results')}\n"


def test_committed_tables_and_figures_are_those_of_the_committed_records(tmp_path):
    import shutil

    from reproduce.pages import SCRIPTS, write

    for folder in ("runs", "replays", "validation"):
        shutil.copytree(ROOT / "results" / folder, tmp_path / folder)
    written, missing = write(tmp_path)
    assert not missing
    for path in written:
        assert path.read_bytes() == (ROOT / "results" / path.relative_to(tmp_path)).read_bytes(), path
    for folder in ("tables", "figures"):
        committed = {path.name for path in (ROOT / "results" / folder).iterdir()}
        assert committed == {path.name for path in written if path.parent.name == folder}
    assert {f"{name}.md" for name in SCRIPTS} <= {path.name for path in written}


def test_the_numbers_of_the_instrument_in_the_readme_are_those_of_the_records():
    from reproduce.pages import MARKERS, QUESTIONS, instrument_block

    block = instrument_block(ROOT / "results")
    assert readme().split(MARKERS[0])[1].split(MARKERS[1])[0] == f"\n{block}\n"
    assert "not run" not in block and len(block.splitlines()) == len(QUESTIONS) + 2


def test_every_mutant_still_finds_its_text():
    from mutants import MUTANTS

    for name, text, replacement, what, tests in MUTANTS:
        assert (ROOT / name).read_text().count(text) == 1, (name, what)
        assert text != replacement and (ROOT / "tests" / f"test_{tests}.py").exists(), (name, what)
