"""The command from outside: help, bad input in one line, and files that are whole or not there."""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import pytest
import torch

from opus_bench import archives, cli, doctor
from opus_bench.corpus_spec import CorpusSpec
from opus_bench.evaluation import paper_suite
from opus_bench.validation import validate as validation
from opus_bench.validation.own_report import table
from reproduce import figure5_6, paper_cost, table3
from reproduce.paper_scale import GPU_SCALES
from reproduce.scales import SCALES
from test_report import REPORTED, grid, written
from test_validate import SMALL, TinyCorpus, random_candidates


@pytest.fixture
def tiny(monkeypatch):
    """validate on random tokens, in a second."""
    made = dataclasses.asdict(SMALL)
    build = validation.Settings

    def settings(optimizer, scale, steps, widths, seed):
        asked = build(optimizer, scale, steps, widths, seed)
        return build(**{**made, "optimizer": asked.optimizer, "widths": asked.widths, "seed": asked.seed})

    random_candidates(monkeypatch)
    monkeypatch.setattr(validation, "Settings", settings)
    monkeypatch.setattr("opus_bench.corpus.build_corpus", lambda spec: TinyCorpus())


def error_line(capsys, arguments):
    """The one line of stderr after exit code 2."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("command,words", [
    ("report", ["--results FOLDER", "--reported FILE.csv", "percent or nat/token", "default: reproduce/reported.csv"]),
    ("validate", ["--steps N", "default: 60", "buckets per weight (default: 512 2048 8192 32768", "{sgd,adamw,muon}",
                  "{tiny,ci}", "--seed N", "--output FILE.json", "--force", "--threshold NAME=VALUE",
                  "oracle_float64 at most"]),
    ("doctor", ["--results FOLDER", "--scale NAME"]),
])
def test_help_of_a_command(command, words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for word in words:
        assert word in text
    options = [action for action in cli.parser()._subparsers._group_actions[0].choices[command]._actions[1:]]
    assert all("default" in action.help for action in options)


def test_bare_command_prints_help_and_imports_nothing_heavy():
    code = ("import sys; from opus_bench import cli; assert cli.main([]) == 0; "
            "assert not {'torch', 'reproduce', 'baselines'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=cli.ROOT)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("validate", "report", "doctor", "usage: opus-bench"))


def test_defaults_are_those_of_the_settings():
    options = cli.parser().parse_args(["validate"])
    settings = validation.Settings()
    for name in ("steps", "widths", "optimizer", "scale", "seed"):
        assert getattr(options, name) == getattr(settings, name)


@pytest.mark.parametrize("arguments,words", [
    (["validate", "--widths", "512", "0"], "width must be at least 1 bucket, got 0"),
    (["validate", "--steps", "0"], "steps must be at least 1, got 0"),
    (["validate", "--seed", "-1"], "seed must be at least 0, got -1"),
    (["validate", "--optimizer", "lion"], "invalid choice: 'lion'"),
    (["validate", "--output", "/no/such/folder/file.json"], "is not a folder"),
    (["validate", "--widths", "many"], "invalid int value: 'many'"),
    (["nonsense"], "invalid choice: 'nonsense'"),
])
def test_bad_input_is_one_line(arguments, words, capsys):
    assert words in error_line(capsys, arguments)


def test_report_writes_the_page_and_says_so(tmp_path, capsys):
    folder = written(tmp_path, grid((0,), methods=("Random", "OPUS paper")))
    assert cli.main(["report", "--results", str(folder), "--reported", str(REPORTED)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("wrote ") and lines[0].endswith("table3.md")
    assert len(lines) == 2 + len(list((folder / "figures").iterdir())) and lines[-1].endswith("index.html")
    assert 'id="table3"' in (folder / "index.html").read_text()
    assert "OPUS" in (folder / "tables" / "table3.md").read_text()


def test_report_without_records_names_the_mend(tmp_path, capsys):
    line = error_line(capsys, ["report", "--results", tmp_path / "absent"])
    assert "no records of table3" in line and "python -m reproduce.table3" in line


def test_report_names_a_damaged_record(tmp_path, capsys):
    folder = written(tmp_path, grid((0,), methods=("Random",)))
    (record,) = (folder / "runs").iterdir()
    record.write_text(record.read_text()[:-40])
    assert record.name in error_line(capsys, ["report", "--results", folder])
    assert not (folder / "tables").exists()


def test_report_without_the_papers_numbers(tmp_path, capsys):
    folder = written(tmp_path, grid((0,), methods=("Random",)))
    assert "absent.csv" in error_line(capsys, ["report", "--results", folder, "--reported", tmp_path / "absent.csv"])


@pytest.mark.parametrize("raised,code,words", [
    (FloatingPointError("the training loss is nan"), 2, "error: the training loss is nan"),
    (OSError("two\nlines"), 2, "error: two lines"),
    (KeyboardInterrupt(), 130, "interrupted"),
])
def test_exit_codes(raised, code, words, tiny, monkeypatch, capsys):
    def fail(*_):
        raise raised

    monkeypatch.setattr(validation, "validate", fail)
    assert cli.main(["validate"]) == code
    assert capsys.readouterr().err.strip() == words


def test_validate_prints_every_number_it_writes(tiny, tmp_path, capsys):
    file = tmp_path / "out.json"
    assert cli.main(["validate", "--widths", "64", "512", "--optimizer", "muon", "--output", str(file)]) == 0
    text, numbers = capsys.readouterr().out, json.loads(file.read_text())
    for row in numbers["sketch"]:
        line = next(line for line in text.splitlines() if line.split()[:1] == [str(row["width"])])
        for name in ("alignment_spearman", "utility_spearman", "alignment_error", "scatter", "predicted_scatter",
                     "gram_error"):
            assert f"{row[name]:.4f}" in line
    for row in numbers["arms"]:
        assert f"{row['effective_share']:.4f}" in next(x for x in text.splitlines() if x.split()[:1] == [row["arm"]])
    for row in numbers["floor"]:
        assert f"{row['change']}" in text and f"{row['spearman']:.3f}" in text
    assert text.splitlines()[-2] == f"verdict (small model): {numbers['verdict']}"
    assert numbers["settings"]["optimizer"] == "muon" and len(numbers["code_version"]) == 64
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_validate_refuses_to_overwrite_before_computing(tiny, tmp_path, monkeypatch, capsys):
    file = tmp_path / "out.json"
    file.write_text("precious")
    calls = []
    monkeypatch.setattr(validation, "validate", lambda *_: calls.append(1))
    assert "exists; give --force" in error_line(capsys, ["validate", "--output", file])
    assert file.read_text() == "precious" and not calls
    assert "is a folder" in error_line(capsys, ["validate", "--force", "--output", tmp_path])


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "out.json"
    cli.write_json({"a": 1}, file, force=False)
    with pytest.raises(ValueError, match="exists"):
        cli.write_json({"a": 2}, file, force=False)
    with pytest.raises(ValueError, match="JSON compliant"):
        cli.write_json({"a": float("nan")}, file, force=True)
    assert json.loads(file.read_text()) == {"a": 1}
    cli.write_json({"a": 2}, file, force=True)
    assert json.loads(file.read_text()) == {"a": 2} and len(list(tmp_path.iterdir())) == 1


def test_columns_are_aligned():
    text = table(("name", "n"), [("a", "1"), ("long", "100")])
    assert text.splitlines() == ["  name    n", "  a       1", "  long  100"]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """doctor on a machine that needs nothing and has an empty cache; hub and index are stubs."""
    monkeypatch.setenv("OPUS_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(paper_suite, "hub_problem", lambda: "the cable is out")
    monkeypatch.setattr(archives, "locate", lambda archive: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, need in doctor.NEEDS.items():
        monkeypatch.setitem(doctor.NEEDS, name, dataclasses.replace(need, disk=0.0, memory=0.0))
    return doctor


def doctored(capsys, results, *options):
    """Exit code, text and the verdict by scale."""
    code = cli.main(["doctor", "--results", str(results), *options])
    text = capsys.readouterr().out
    verdicts = text.split("\n  scale\n")[1].splitlines()
    return code, text, dict(line.strip().split(maxsplit=1) for line in verdicts)


def fill_cache(folder):
    for name in CorpusSpec().sources:
        file = folder / "archives" / archives.ARCHIVES[name].filename
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def test_doctor_tells_ok_from_missing_with_the_mend(machine, tmp_path, capsys):
    code, text, verdict = doctored(capsys, tmp_path / "results")
    assert code == 0 and list(verdict) == ["ci", "smoke", "cpu", *GPU_SCALES] == list(doctor.NEEDS)
    assert "0 of 2 cached" in text and text.count("0 of 5 cached") == 2
    assert "archives: wiki, recipes: fetched on first use" in text
    assert verdict["ci"] == verdict["cpu"] == "ready, archives are fetched on first use"
    assert "hub: the cable is out; connect" in text
    assert verdict["small"] == verdict["paper"] == "lacks GPUs, hub"
    fill_cache(tmp_path / "cache")
    code, text, verdict = doctored(capsys, tmp_path / "results")
    assert "2 of 2 cached" in text and text.count("5 of 5 cached") == 2 and "to fetch" not in text
    assert verdict["ci"] == verdict["smoke"] == verdict["cpu"] == "ready"


def test_doctor_exits_1_when_a_scale_that_was_asked_about_cannot_run(machine, monkeypatch, tmp_path, capsys):
    fill_cache(tmp_path / "cache")
    assert doctored(capsys, tmp_path, "--scale", "ci", "cpu")[0] == 0
    assert doctored(capsys, tmp_path, "--scale", "cpu", "small")[0] == 1
    code, text, verdict = doctored(capsys, tmp_path, "--scale", "paper")
    assert code == 1 and list(verdict) == ["paper"] and "0, 8 of 48 GB needed" in text
    monkeypatch.setitem(doctor.NEEDS, "cpu", doctor.Need(disk=1e9, memory=1e9))
    code, text, verdict = doctored(capsys, tmp_path)
    assert code == 0 and verdict["cpu"] == "lacks memory, disk" and verdict["ci"] == "ready"
    assert "disk: set OPUS_BENCH_CACHE to a folder with more" in text and "memory: run with --workers 1" in text
    assert doctored(capsys, tmp_path, "--scale", "cpu")[0] == 1
    monkeypatch.setitem(doctor.NEEDS, "smoke", doctor.Need(disk=1e9))
    assert doctored(capsys, tmp_path)[0] == 1
    assert "invalid choice: 'huge'" in error_line(capsys, ["doctor", "--scale", "huge"])


def test_doctor_exits_1_when_records_or_the_cache_cannot_be_written(machine, monkeypatch, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    code, text, verdict = doctored(capsys, file / "results")
    assert code == 1 and "records cannot be written here" in text
    assert all("results folder" in found for found in verdict.values())
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    code, text, verdict = doctored(capsys, tmp_path)
    assert code == 1 and "cache: not writable: set OPUS_BENCH_CACHE" in text


def test_doctor_names_an_index_out_of_reach(machine, monkeypatch, tmp_path, capsys):
    asked = []

    def locate(archive):
        asked.append(archive)
        raise LookupError("no index lists it")

    monkeypatch.setattr(archives, "locate", locate)
    code, text, verdict = doctored(capsys, tmp_path)
    assert code == 1 and verdict["smoke"] == "lacks archives" and "archives: wiki: no index lists it" in text
    assert len(asked) == 2  # once for the sources of ci, once for those that smoke and cpu share


@pytest.mark.parametrize("count,size,verdict,found", [
    (8, 80e9, "lacks hub", "8 of 80 GB, 8 of 48 GB needed"),
    (7, 80e9, "lacks GPUs, hub", "7 of 80 GB, 8 of 48 GB needed"),
    (8, 16e9, "lacks GPUs, hub", "8 of 16 GB, 8 of 48 GB needed"),
])
def test_doctor_counts_gpus_and_their_memory(count, size, verdict, found, machine, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=size))
    _, text, verdicts = doctored(capsys, tmp_path, "--scale", "paper")
    assert verdicts == {"paper": verdict} and found in text


def test_doctor_says_ready_where_nothing_lacks(machine, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(paper_suite, "hub_problem", lambda: None)
    monkeypatch.setitem(doctor.NEEDS, "small", doctor.Need(disk=0, gpus=1, gpu_memory=4))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=8e9))
    code, text, verdict = doctored(capsys, tmp_path, "--scale", "small")
    assert (code, verdict) == (0, {"small": "ready"}) and "missing" not in text


@pytest.mark.parametrize("package,version,scales,mend", [
    ("pandas", None, {"ci", "smoke", "cpu", "small", "paper"}, "pandas none; pip install 'pandas>=3.1'"),
    ("pandas", "3.0.9", {"ci", "smoke", "cpu", "small", "paper"}, "pandas 3.0.9; pip install 'pandas>=3.1'"),
    ("pandas", "10.0+cpu", set(), None),
    ("datatrove", None, {"small", "paper"}, "datatrove none; pip install 'datatrove>=0.10.1'"),
])
def test_doctor_names_packages_with_their_command(package, version, scales, mend, machine, monkeypatch, tmp_path,
                                                  capsys):
    real = importlib.metadata.version

    def installed(name):
        if name == package and version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version if name == package else real(name)

    monkeypatch.setattr(importlib.metadata, "version", installed)
    code, text, verdict = doctored(capsys, tmp_path)
    assert {scale for scale, found in verdict.items() if "packages" in found} == scales
    assert code == int("ci" in scales) and (mend is None or f"packages: {mend}" in text)


def test_doctor_reads_the_same_requirements_from_an_installed_distribution(monkeypatch, tmp_path):
    project = tomllib.loads((cli.ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(f'{line}; extra == "{extra}"' for extra, of in
                                         project["optional-dependencies"].items() for line in of)]
    here = doctor.requirements(), doctor.requirements(doctor.EXTRAS)
    assert len(here[0]) == len(project["dependencies"]) and ("datatrove", "0.10.1") in here[1]
    assert ("lm-eval", "0.4.13") in here[0] and not set(here[0]) & set(here[1])
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    assert (doctor.requirements(), doctor.requirements(doctor.EXTRAS)) == here

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    (lacking,) = [check for check in doctor.examine(tmp_path) if check.state != "ok"]
    assert lacking.mend == "pip install . in the repository"


def test_doctor_runs_where_no_package_is_installed():
    def bare(*words):  # -S: without the folder of packages
        return subprocess.run([sys.executable, "-S", "-m", *words], capture_output=True, text=True, check=False,
                              cwd=cli.ROOT, env={**os.environ, "PYTHONPATH": ""})

    done = bare("opus_bench.doctor")
    assert done.returncode == 1, done.stderr
    assert f"0 of {len(doctor.requirements())}" in done.stdout and "pip install 'torch>=2.13'" in done.stdout
    assert done.stdout.count("lacks packages") == len(doctor.NEEDS)
    done = bare("opus_bench.cli", "doctor")
    assert done.returncode == 1 and "`python -m opus_bench.doctor` names all that is missing" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_doctor_asks_for_what_the_scales_are():
    for name, scale in SCALES.items():
        assert not doctor.NEEDS[name].gpus
        assert scale.corpus.sources == (CorpusSpec.ci() if name == "ci" else CorpusSpec()).sources
    for name in GPU_SCALES:
        options = argparse.Namespace(scale=name, seeds=None, methods=None, optimizers=None, models=None,
                                     paper_tasks=False)
        runs = table3.large_runs(options)
        need, gpus = doctor.NEEDS[name], max(run.setting.gpus for run in runs)
        more = figure5_6.large_runs(options)
        assert need.gpus == gpus
        memory = max(sum(paper_cost.memory_per_gpu(run, gpus).values()) for run in [*runs, *more])
        assert 0.9 * need.gpu_memory < memory / 1e9 <= need.gpu_memory
        assert 0.9 * need.disk < sum(paper_cost.disk(runs).values()) / 1e9 <= need.disk
