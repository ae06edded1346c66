"""A measurement and its record: kept exactly, made once, refused by name; which records a page shows and from what.

The records are made on invented words, but for one test that goes through the command on real text.
"""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_corpus import SPEC

from opus_bench import provenance, results, schema
from opus_bench.schema import RecordError
from opus_bench.train import RunConfig
from opus_bench.validation.trained import stages
from reproduce import runner
from reproduce.measurement import Measurement, newest, page
from reproduce.scales import SCALES
from reproduce.training import Run

ROOT = Path(__file__).resolve().parent.parent
CONFIG = RunConfig("random", model="ci", length=32, buffer=4, adam_lr=1e-3)
CALLS = []


def losses(config, settings, corpus, on_step):
    """The mean training loss so far after each of ``steps``, and a value that the settings give."""
    CALLS.append(config.seed)
    return [row for stage in stages(config, corpus, settings["steps"], on_step) if stage.losses
            for row in (stage.row("mean loss", sum(stage.losses) / stage.step, "nat/token", of="all"),
                        stage.row("given", settings.get("value", 1 / 3), rank=(1, 2)))]


def nothing(config, settings, corpus, on_step):
    return []


def nameless(config, settings, corpus, on_step):
    return [{"step": 0, "tokens_seen": 0, "split": "validation", "unit": "1", "value": 1.0}]


def not_a_number(config, settings, corpus, on_step):
    good = {"step": 0, "tokens_seen": 0, "split": "validation", "unit": "1", "name": "fine", "value": 1.0}
    return [good, {**good, "name": "broken ratio", "value": float("nan")}]


def measurement(measure="test_measurement:losses", seed=0, optimizer="adamw", **settings):
    return Measurement("toy", measure, dataclasses.replace(CONFIG, seed=seed, optimizer=optimizer),
                       {"steps": [0, 2, 3], **settings}, "words", 3, ("invented words",))


@pytest.fixture(autouse=True)
def scale_of_invented_words(cache, monkeypatch):
    """A scale of invented words."""
    monkeypatch.setenv("OPUS_BENCH_CACHE", str(cache))
    monkeypatch.setitem(SCALES, "words", dataclasses.replace(SCALES["ci"], name="words", corpus=SPEC, suite_size=8))


def test_a_record_holds_the_rows_exactly_and_what_they_were_made_with(corpus, tmp_path):
    job, told = measurement(), []
    returned = job.execute(tmp_path, told.append)
    record = results.read(tmp_path / "runs" / f"{job.run_id}.json")
    assert record["metrics"] == json.loads(json.dumps(losses(job.config, job.settings, corpus, lambda: None)))
    assert [row["step"] for row in record["metrics"]] == [2, 2, 3, 3]
    assert record["metrics"][1]["value"] == 1 / 3 and record["metrics"][1]["rank"] == [1, 2]
    assert all(returned[key] == record[key] for key in returned)
    assert record["config"]["measured"] == {"steps": [0, 2, 3]} and record["config"]["betas"] == [0.8, 0.95]
    assert (record["method"], record["arm"], record["paper"]["row"]) == ("AdamW", None, None)
    assert record["evals"] == [] and record["final"]["weights_sha256"] is None
    assert record["data"]["train_sha256"] == corpus.train_sha256 and record["data"]["suite_sha256"] is None
    timing = record["timing"]
    assert timing["wall_s"] == timing["eval_s"] > 0 == timing["train_s"] == timing["select_s"]
    assert timing["peak_bytes"] > 1e7 and record["environment"]["threads"] == 1
    assert told == [1, 2, 3, 3]


def test_a_second_call_computes_nothing(tmp_path):
    job = measurement()
    job.execute(tmp_path)
    path, calls = tmp_path / "runs" / f"{job.run_id}.json", len(CALLS)
    before = path.read_bytes()
    assert job.execute(tmp_path) == results.read(path)
    assert len(CALLS) == calls and path.read_bytes() == before


def test_two_processes_cannot_measure_the_same_at_once(tmp_path):
    from filelock import FileLock, Timeout

    job, seen = measurement(), []

    def try_to_enter(done):
        with pytest.raises(Timeout):
            FileLock(tmp_path / "work" / job.run_id / "lock").acquire(timeout=0)
        seen.append(done)

    job.execute(tmp_path, lambda done: try_to_enter(done) if not seen else None)
    assert seen == [1]


@pytest.mark.parametrize("measure,words", [
    ("not_a_number", ("broken ratio", "metrics[1]", "nan", "AdamW, seed 0")),
    ("nothing", ("at least one row", "[]")),
    ("nameless", ("metrics[0].name", "missing")),
    ("absent", ("test_measurement has no function 'absent'",)),
])
def test_a_bad_measurement_is_refused_by_name_and_leaves_no_record(tmp_path, measure, words):
    with pytest.raises(ValueError) as caught:
        measurement(f"test_measurement:{measure}").execute(tmp_path)
    for word in words:
        assert word in str(caught.value).replace(" (None)", "")
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("change,word", [
    ({"measure": "test_measurement"}, "'test_measurement'"),
    ({"measure": "test_measurement:a b"}, "'test_measurement:a b'"),
    ({"config": dataclasses.replace(CONFIG, selector="opus")}, "'opus'"),
])
def test_what_cannot_be_measured_is_refused(change, word):
    with pytest.raises(ValueError, match=word):
        dataclasses.replace(measurement(), **change)


def test_a_module_that_is_not_there_is_named():
    for name in ("no_such_module", "no_such_package.module"):
        with pytest.raises(ValueError, match=f"no module '{name}'"):
            measurement(f"{name}:f").run_id


def test_identity_is_config_settings_corpus_and_the_code_of_the_measuring_file(tmp_path, monkeypatch):
    ids = {job.run_id for job in (measurement(), measurement(seed=1), measurement(optimizer="muon"),
                                  measurement(value=2.0), measurement(value=3.0),
                                  dataclasses.replace(measurement(), scale="ci"),
                                  dataclasses.replace(measurement(), experiment="other"))}
    assert len(ids) == 7
    assert dataclasses.replace(measurement(), deviations=(), units=9).run_id in ids
    monkeypatch.syspath_prepend(tmp_path)
    for name, code in (("first", "def f():\n    return 1\n"), ("second", "def f():\n    return 2\n")):
        (tmp_path / f"measure_{name}.py").write_text(code)
    versions = [measurement(f"measure_{name}:f").code_version for name in ("first", "second")]
    assert len({measurement("opus_bench.validation.trained:stages").code_version, *versions}) == 3


def records_of(tmp_path, *jobs):
    return [results.read(tmp_path / "runs" / f"{job.execute(tmp_path)['run_id']}.json") for job in jobs]


def variant(record, written, version="a" * 64, **config):
    """The record as another version of the code or another config would have written it, at another time."""
    changed = copy.deepcopy(record)
    changed["config"] |= config
    changed["code"]["version"], changed["written_utc"] = version, f"2030-01-0{written}T00:00:00+00:00"
    changed["run_id"] = schema.run_id(changed["experiment"], changed["config"],
                                      changed["data"]["spec_sha256"], version)
    return changed


def test_newest_is_the_last_complete_set_of_each_scale_and_optimizer(tmp_path):
    record, = records_of(tmp_path, measurement())
    old = [variant(record, 1, "a" * 64, seed=seed) for seed in (0, 1)]
    new = [variant(record, 2, "b" * 64, seed=seed) for seed in (0, 1)]
    begun = [variant(record, 3, "c" * 64)]
    muon = [variant(record, 1, "a" * 64, optimizer="muon")]
    assert newest([*old, *new, *begun, *muon]) == [*new, *muon]
    assert newest([*muon, *new[::-1], *begun, *old]) == [*muon, *new[::-1]]
    resettled = [variant(record, 4, "b" * 64, seed=seed, measured={"steps": [9]}) for seed in (0, 1)]
    assert newest([*old, *resettled, *new]) == resettled
    elsewhere = [{**copy.deepcopy(record), "scale": "smoke", "run_id": "0" * 12}]
    assert newest([*elsewhere, *new]) == [*elsewhere, *new]
    assert newest([]) == []


def test_a_page_says_its_command_its_scale_and_every_run(tmp_path):
    records = records_of(tmp_path, measurement(), measurement(seed=1))
    text = page("toy", "A toy", "python -m reproduce.toy", ["## Losses\n\n| a |\n| --- |\n| 1 |\n"], records)
    assert text.startswith("# A toy\n\nMade by `python -m reproduce.toy` from 2 runs")
    assert "\n\n## Losses\n\n| a |\n| --- |\n| 1 |\n\n## Deviations" in text and text.count("- invented words\n") == 1
    for record in records:
        assert f"[{record['run_id']}](../runs/{record['run_id']}.json)" in text
    assert text.count(records[0]["code"]["version"][:12]) == 2 and text.endswith("|\n")
    smoke = page("toy", "A toy", "x", [], [{**records[0], "scale": "smoke"}])
    assert "from 1 run," in smoke and "smoke scale checks the instrument on a small model" in smoke
    with pytest.raises(RecordError, match="no records of toy; make them with `x`"):
        page("toy", "A toy", "x", [], [])


def test_a_training_run_without_the_suite_says_so_in_its_settings_alone(corpus, tmp_path):
    config = dataclasses.replace(CONFIG, steps=2, evaluations=1, proxy_size=2, validation_sequences=2)
    whole = Run("toy", "Table 3", "Random", None, None, config, "words")
    bare = dataclasses.replace(whole, suite=False)
    assert whole.settings | {"suite_size": 0} == bare.settings and whole.settings["suite_size"] == 8
    assert list(whole.settings) == list(bare.settings) and whole.run_id != bare.run_id
    told = []
    record = bare.execute(tmp_path, told.append)
    schema.validate(record)
    assert len(record["evals"]) == 10 and {r["status"] for r in record["evals"]} == {
        "not run: this script compares losses"}
    assert record["data"]["suite_sha256"] is None and told[-1] == bare.units == 2 < whole.units
    assert [m["split"] for m in record["metrics"]] == ["val/encyclopedia", "train", "val/encyclopedia"]
    assert bare.cost([record]) == pytest.approx(record["timing"]["wall_s"])
    with pytest.raises(ValueError, match="paper_tasks"):
        dataclasses.replace(bare, paper_tasks=True)


def test_costs_come_from_records_of_the_same_kind(tmp_path):
    job = measurement()
    record, = records_of(tmp_path, job)
    run = Run("toy", "Table 3", "Random", None, None, CONFIG, "words")
    assert run.cost([record]) is None and job.cost([]) is None
    assert dataclasses.replace(job, experiment="other").cost([record]) is None
    other = variant(record, 1, optimizer="muon")
    record["timing"]["wall_s"], other["timing"]["wall_s"] = 10.0, 30.0
    assert job.cost([record, other]) == 10 and job.cost([other]) == 30
    assert runner._estimate([job, job], [record], workers=2) == "; about 0 min going by the records here"
    record["timing"]["wall_s"] = 600.0
    assert runner._estimate([job, job], [record], workers=1) == "; about 20 min going by the records here"
    assert runner._estimate([job, run], [record], workers=1) == "; no record here says how long they take"


SCRIPT = '''"""A toy."""
import sys
from opus_bench.results import load
from opus_bench.train import RunConfig
from reproduce.measurement import Measurement, page
from reproduce.runner import main

def runs(options):
    return [Measurement("toy", "toy_measure:measure",
                        RunConfig("random", model="ci", length=64, optimizer=optimizer, seed=seed),
                        {"value": float(seed)}, options.scale, 4)
            for optimizer in options.optimizers or ("adamw", "muon") for seed in range(options.seeds or 1)]

def write(results_dir):
    path = results_dir / "toy.md"
    path.write_text(page("toy", "A toy", "toy", [], load(results_dir / "runs", "toy")))
    return [path]

if __name__ == "__main__":
    sys.exit(main(runs, __doc__, write))
'''
MEASURE = '''
import os, torch
def measure(config, settings, corpus, on_step):
    for _ in range(4):
        on_step()
    row = {"step": 0, "tokens_seen": 0, "split": "validation", "unit": "1"}
    return [{**row, "name": "seed", "value": settings["value"]}, {**row, "name": "process", "value": os.getpid()},
            {**row, "name": "threads", "value": torch.get_num_threads()}]
'''


@pytest.mark.network
def test_the_command_measures_in_fresh_processes_and_once(tmp_path):
    (tmp_path / "toy_script.py").write_text(SCRIPT)
    (tmp_path / "toy_measure.py").write_text(MEASURE)
    environment = {key: value for key, value in os.environ.items() if key != "OPUS_BENCH_CACHE"}
    environment["PYTHONPATH"] = os.pathsep.join((str(tmp_path), str(ROOT)))

    def call(*arguments):
        return subprocess.run([sys.executable, "-m", "toy_script", "--scale", "ci", "--results", str(tmp_path / "out"),
                               *arguments], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120)

    done = call("--seeds", "2")
    assert done.returncode == 0, done.stderr
    assert "4 runs, 0 done, 16 units of work to go; no record here" in done.stdout
    assert "toy                muon   seed 1  4 units of work" in done.stdout
    assert "4 runs in" in done.stdout and "peak memory of all processes" in done.stdout
    records = results.load(tmp_path / "out" / "runs", "toy")
    value = {name: [m["value"] for r in records for m in r["metrics"] if m["name"] == name]
             for name in ("seed", "process", "threads")}
    assert value["seed"] == [0, 1, 0, 1] and value["threads"] == [1] * 4 and len(set(value["process"])) == 4
    assert [r["method"] for r in records] == ["AdamW", "AdamW", "Muon", "Muon"]
    assert len({r["run_id"] for r in records}) == 4
    text = (tmp_path / "out" / "toy.md").read_text()
    again = call("--seeds", "2")
    assert again.returncode == 0 and "4 runs, 4 done, 0 units of work to go\n" in again.stdout
    assert (tmp_path / "out" / "toy.md").read_text() == text
    refused = call("--methods", "Best")
    assert refused.returncode == 2 and "unknown method 'Best'; known: AdamW, Muon" in refused.stderr
