"""Records made again: what is the same is said to be the same, what is not is named, and nothing is overwritten."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from opus_bench import results
from opus_bench.results import load
from opus_bench.schema import RecordError
from reproduce import replay, table3
from reproduce.runner import choose
from reproduce.replay import run_of

pytestmark = pytest.mark.network
COMMITTED = Path(__file__).resolve().parent.parent / "results"


def ci_run():
    """Random at ci scale, a few steps."""
    class Options:
        scale, seeds, optimizers, paper_tasks, methods = "ci", 1, None, False, ["Random"]

    (run,) = choose(table3.runs(Options), Options)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, steps=4))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the record of one run, and one in which the run lies made again."""
    folder, scratch = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("scratch")
    record = ci_run().execute(folder)
    arguments = ["--scale", "ci", "--results", str(folder), "--scratch", str(scratch)]
    assert replay.main(arguments) == 0
    return folder, scratch, record


def changed(made, tmp_path, change):
    """A folder whose record says something else, and its replay's arguments: the run itself is found in the scratch."""
    folder, scratch, record = made
    record = copy.deepcopy(record)
    change(record)
    results.write(record, tmp_path / "runs")
    return ["--scale", "ci", "--results", str(tmp_path), "--scratch", str(scratch)]


def test_a_run_made_again_is_the_same_and_says_so(made):
    folder, scratch, record = made
    (found,) = replay.read(folder)
    assert found["differ"] == [] and found["run_id"] == record["run_id"]
    assert found["final_loss"][0] == found["final_loss"][1] == record["metrics"][-1]["value"]
    (again,) = load(scratch / "runs")
    assert again["final"] == record["final"] and again["timing"] != record["timing"]  # made, not copied
    page = (folder / "tables" / "replay.md").read_text()
    assert "1 of 1 are the same bit for bit" in page and record["run_id"] in page


@pytest.mark.parametrize("part, change", [
    ("final", lambda r: r["final"].update(weights_sha256="0" * 64)),
    ("metrics", lambda r: r["metrics"][-1].update(value=r["metrics"][-1]["value"] * (1 + 2**-52))),
    ("data", lambda r: r["data"].update(selected_sha256="0" * 64)),
    ("evals", lambda r: r["evals"][0].update(value=0.123)),
    ("selection", lambda r: r["selection"].update(notes=["another"])),
])
def test_any_number_that_differs_by_a_bit_is_named_and_the_exit_code_says_so(made, tmp_path, capsys, part, change):
    arguments = changed(made, tmp_path, change)
    before = {path: path.read_bytes() for path in (tmp_path / "runs").iterdir()}
    assert replay.main(arguments) == 1
    (found,) = replay.read(tmp_path)
    assert found["differ"] == [part] and f"differs: {part}" in capsys.readouterr().out
    assert "0 of 1 are the same" in (tmp_path / "tables" / "replay.md").read_text()
    assert {path: path.read_bytes() for path in (tmp_path / "runs").iterdir()} == before


def test_a_dry_run_names_the_runs_and_makes_none(made, tmp_path, capsys):
    folder, _, record = made
    assert replay.main(["--scale", "ci", "--results", str(folder), "--scratch", str(tmp_path), "--dry-run"]) == 0
    assert record["run_id"] in capsys.readouterr().out and not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("given, words", [
    (["feedface"], "0 records of this scale have an id that starts with 'feedface'"),
    (["--scale", "smoke"], "no record of a training run of this scale"),
    (["--workers", "0"], "--workers must be at least 1, got 0"),
])
def test_what_cannot_be_replayed_is_refused_in_one_line(made, capsys, given, words):
    assert replay.main(["--scale", "ci", "--results", str(made[0]), *given]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line


def test_settings_that_this_code_does_not_have_are_refused_by_name(made):
    record = copy.deepcopy(made[2])
    record["config"]["temper"] = 1
    with pytest.raises(RecordError, match="temper 1, now None"):
        run_of(record)
    record = copy.deepcopy(made[2])
    record["data"]["spec_sha256"] = "0" * 64
    with pytest.raises(RecordError, match="the corpus of its scale"):
        run_of(record)
    record["config"]["measured"] = "x"
    with pytest.raises(RecordError, match="no training run on CPU"):
        run_of(record)


def test_a_setting_younger_than_the_record_is_at_its_default(made):
    record = copy.deepcopy(made[2])
    assert record["config"].pop("proxy") == "target"
    assert run_of(record).config == run_of(made[2]).config


def test_by_default_the_newest_record_of_every_first_seed_is_made_again(made):
    def like(seed, written, identity):
        return made[2] | {"config": made[2]["config"] | {"seed": seed}, "written_utc": written, "run_id": identity}

    records = [like(0, "2026-01-02", "b"), like(0, "2026-01-03", "c"), like(0, "2026-01-01", "a"), like(1, "2027", "d")]
    assert [record["run_id"] for record in replay.chosen(records, [])] == ["c"]


def test_a_damaged_replay_or_one_of_another_record_is_refused(made, tmp_path):
    shutil.copytree(made[0], tmp_path / "copy")
    (path,) = (tmp_path / "copy" / "replays").iterdir()
    whole = path.read_text()
    path.write_text(whole[:-20])
    with pytest.raises(RecordError, match="truncated"):
        replay.write(tmp_path / "copy")
    path.write_text(json.dumps(json.loads(whole) | {"record_sha256": "0" * 64}))
    with pytest.raises(RecordError, match="is not the record"):
        replay.write(tmp_path / "copy")
    path.write_text(json.dumps({"schema": "another"}))
    with pytest.raises(RecordError, match="not of format"):
        replay.write(tmp_path / "copy")


def test_every_committed_cpu_record_is_a_run_of_this_code():
    for record in load(COMMITTED / "runs", scale="cpu"):
        assert run_of(record).settings.items() >= record["config"].items()
