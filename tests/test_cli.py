"""The command from outside: help, bad input in one line, and files that are whole or not there."""

import dataclasses
import json
import subprocess
import sys

import pytest

from opus_bench import cli
from opus_bench.validation import validate as validation
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
    ("doctor", ["--results FOLDER"]),
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
    text = cli.table(("name", "n"), [("a", "1"), ("long", "100")])
    assert text.splitlines() == ["  name    n", "  a       1", "  long  100"]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """doctor on a machine with an empty cache; the hub and the index are stubs."""
    doctor = pytest.importorskip("opus_bench.doctor")
    suite = pytest.importorskip("opus_bench.evaluation.paper_suite")
    monkeypatch.setenv("OPUS_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(suite, "hub_problem", lambda: "the cable is out")
    monkeypatch.setattr(doctor, "locate", lambda archive: None)
    return doctor


def test_doctor_tells_ok_from_missing_with_the_mend(machine, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine, "MEMORY_GB", 0.0)
    monkeypatch.setattr(machine, "DISK_GB", 0.0)
    assert cli.main(["doctor", "--results", str(tmp_path / "results")]) == 0
    text = capsys.readouterr().out
    assert "0 of 2 cached" in text and "to fetch" in text and "wiki, recipes: fetched on first use" in text
    assert "hub: the cable is out" in text
    for name in machine.CorpusSpec().sources:
        file = tmp_path / "cache" / "archives" / machine.ARCHIVES[name].filename
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    cli.main(["doctor", "--results", str(tmp_path / "results")])
    text = capsys.readouterr().out
    assert "2 of 2 cached" in text and "5 of 5 cached" in text and "to fetch" not in text


def test_doctor_exits_1_when_a_scale_cannot_run(machine, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine, "MEMORY_GB", 0.0)
    monkeypatch.setattr(machine, "DISK_GB", 1e9)
    assert cli.main(["doctor", "--results", str(tmp_path / "results")]) == 1
    assert "set OPUS_BENCH_CACHE to a folder with more" in capsys.readouterr().out
    monkeypatch.setattr(machine, "DISK_GB", 0.0)
    file = tmp_path / "file"
    file.touch()
    assert cli.main(["doctor", "--results", str(file / "results")]) == 1
    assert "records cannot be written here" in capsys.readouterr().out
