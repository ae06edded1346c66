"""Figures 5 and 6 at scale ci: each command is parsed and run by the real program, in this process."""

import json
import sys
import types

import pytest
import torch

from baselines import score
from opus_bench import cli, results
from opus_bench.validation.own_inputs import file_sha256
from reproduce import figure5_6, paper_scale, pretrain, runner, stand_ins

TASKS = [task.name for task in stand_ins.CPT_TASKS]


def launch(folder, *arguments):
    sys.argv[1:] = ["--scale", "ci", "--results", str(folder / "results"), "--data", str(folder / "data"), *arguments]
    return runner.main(figure5_6.runs, figure5_6.__doc__, figure5_6.write, figure5_6.large_runs, figure5_6.SCALES)


@pytest.fixture
def started(monkeypatch):
    """The programs that were started, each by its main function with the words after its name."""
    mains = {"opus_bench.cli": cli.main, "reproduce.pretrain": pretrain.main, "reproduce.stand_ins": stand_ins.main,
             "baselines.score": score.main}
    names = []

    def run(command):
        at = max(n for n, word in enumerate(command) if word in mains)
        names.append(command[at] if command[at] != "opus_bench.cli" else command[at + 1])
        return types.SimpleNamespace(returncode=mains[command[at]](command[at + 1:]))

    monkeypatch.setattr(paper_scale, "subprocess", types.SimpleNamespace(run=run))
    monkeypatch.setattr(sys, "argv", ["figure5_6"])
    threads = torch.get_num_threads()
    yield names
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def test_the_path_of_the_paper_scale_from_text_to_figure(started, tmp_path, capsys):
    assert launch(tmp_path, "--dry-run") == 0
    assert "ok       python -m reproduce.pretrain: there" in capsys.readouterr().out
    assert not started and not list(tmp_path.iterdir())
    users = tmp_path / "data" / "text" / "sciencepedia" / "mine.jsonl"
    users.parent.mkdir(parents=True)
    users.touch()
    stand_ins.write(tmp_path / "data")
    (tmp_path / "data" / "items-words" / "opus_sciassess_medicine.test.jsonl").unlink()

    assert launch(tmp_path) == 0, capsys.readouterr().err
    prepared, each = ["data", "data", "proxy", "data"], ["reproduce.pretrain", "evaluate", "evaluate"]
    assert started == [*prepared, *each, *each]
    assert [path.name for path in users.parent.iterdir()] == ["mine.jsonl"]
    records = {record["method"]: record for record in results.load(tmp_path / "results" / "runs", "figure5_6", "ci")}
    assert set(records) == {"Random", "OPUS"}
    for record in records.values():
        found = [(row["tokens_seen"], row["name"]) for row in record["metrics"] if row["split"] == "suite"]
        assert found == [(tokens, task) for tokens in (128, 256) for task in TASKS[:-1]]
        assert [row["task"] for row in record["evals"]] == TASKS
        assert record["evals"][-1]["status"].startswith("not run: ") and "value" not in record["evals"][-1]
        assert (record["config"]["pool"], record["config"]["proxy"]) == ("words", "standard-proxy-words")
        assert record["deviations"][0] == "a few steps of a toy model on words in a random order"
        work = tmp_path / "results" / "work" / record["run_id"]
        assert sorted(path.name for path in work.glob("model*")) == ["model", "model-2"]
        weights = [file_sha256(work / name / "model.safetensors") for name in ("model-2", "model")]
        evaluated = [results.load(work / "evaluations" / f"{step}-cpt")[0]["config"] for step in (2, 4)]
        assert len(set(weights)) == 2 and evaluated[0] != evaluated[1]
    assert records["Random"]["final"] != records["OPUS"]["final"]
    page = (tmp_path / "results" / "tables" / "figure5_6.md").read_text()
    assert "| method | task | 128 tokens (%) | 256 tokens (%) |" in page
    assert "| Random | SciAssess medicine | – | – |" in page
    assert all(f"| OPUS (paper) | {task} | 0.00 | 0.00 |" in page for task in TASKS[:-1])
    assert (tmp_path / "results" / "figures" / "figure5_6_ci_muon.svg").exists()

    started.clear()
    assert launch(tmp_path) == 0 and not started


def test_every_part_has_items_and_their_keys_are_among_the_options(tmp_path):
    stand_ins.write_items(tmp_path, stand_ins.random.Random(1))
    parts = [part for task in stand_ins.CPT_TASKS for part in task.lm_eval]
    assert len(list(tmp_path.glob("*.fewshot.jsonl"))) == 4
    assert sum(len(list(tmp_path.glob(f"{part}.[tv]*.jsonl"))) for part in parts) == len(parts) == 10
    row = json.loads((tmp_path / "opus_sciassess_biology.test.jsonl").read_text().splitlines()[0])
    assert row["ideal"] in row["input"][-1]["content"]


def test_scales_without_a_model_that_knows_the_questions_are_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["figure5_6"])
    assert launch(tmp_path, "--scale", "smoke") == 2
    assert "figure5_6 has no scale smoke" in capsys.readouterr().err
