"""Planted runs of words are found, all of them and nothing else."""

import functools
import json
import random

import pytest
from lm_eval import tasks
from test_web import tokenizer  # noqa: F401 a fixture: a byte a token

from opus_bench import cli
from opus_bench.archives import CorpusError
from opus_bench.pools.contamination import EvaluationItem, RunIndex, contamination, read_items, task_items
from opus_bench.pools.build import build_pool
from opus_bench.pools.spec import PoolSpec

WORDS = [f"w{k}" for k in range(40)]


def shared_runs(item, documents, size):
    """By comparing every run of the item with every run of every document."""
    def runs(text):
        words = text.lower().replace(",", " ").replace(".", " ").split()
        return {tuple(words[k : k + size]) for k in range(len(words) - size + 1)}

    pool = [runs(text) for text in documents]
    mine = set().union(*(runs(text) for text in item.texts))
    return len(mine & set().union(*pool)), sum(bool(mine & found) for found in pool)


@pytest.fixture(scope="module")
def documents():
    rng = random.Random(0)
    return [" ".join(rng.choice(WORDS) for _ in range(60)) for _ in range(30)]


@pytest.fixture(scope="module")
def pool(documents, tokenizer, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("pool")
    (folder / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    spec = PoolSpec((str(folder / "x.jsonl"),), str(tokenizer), shard_characters=1500)
    build_pool(spec, folder / "out", progress=False)
    return folder / "out"


@pytest.fixture(scope="module")
def items(documents):
    rng = random.Random(1)
    planted = documents[3].split()[10:23]
    return (
        EvaluationItem("t", "exact", (" ".join(planted),)),
        EvaluationItem("t", "case and marks", (" ".join(planted[:6]).upper() + ", " + " ".join(planted[6:]) + ".",)),
        EvaluationItem("t", "one short", (" ".join(planted[:12]) + " zzz yyy",)),
        EvaluationItem("t", "option", ("what is it? nothing", "what is it? " + documents[29])),
        EvaluationItem("u", "too short", (" ".join(planted[:12]),)),
        EvaluationItem("u", "random", (" ".join(rng.choice(WORDS) for _ in range(60)),)),
    )


def test_planted_items_are_hit_and_others_are_not(pool, items):
    report = contamination(pool, items, progress=False)
    assert [hit["id"] for hit in report["hits"]] == ["exact", "case and marks", "option"]
    assert report["tasks"]["t"] == {"items": 4, "too_short": 0, "hit": 3, "share": 0.75}
    assert report["tasks"]["u"] == {"items": 2, "too_short": 1, "hit": 0, "share": 0.0}
    assert report["all"] == {"items": 6, "too_short": 1, "hit": 3, "share": 0.6}
    assert report["pool"]["documents"] == 30
    exact, _, option = report["hits"]
    assert (exact["runs"], exact["runs_of_item"], exact["documents"]) == (1, 1, 1)
    assert exact["examples"] == [items[0].texts[0]]
    assert exact["first"] == "x/00000-0000.bin document 3"
    assert (option["runs"], option["runs_of_item"]) == (48, 48 + 3)  # and those that start in "what is it"
    assert option["first"] == "x/00000-0004.bin document 1"  # of 30 documents, seven a shard


@pytest.mark.parametrize("size", [2, 3, 4])
def test_counts_are_those_of_comparing_everything_with_everything(pool, items, documents, size):
    report = contamination(pool, items, size, progress=False)
    found = {hit["id"]: (hit["runs"], hit["documents"]) for hit in report["hits"]}
    want = {item.id: shared_runs(item, documents, size) for item in items}
    assert found == {name: counts for name, counts in want.items() if counts[0]}
    assert len(found) == 6 or size > 2


def test_a_place_found_by_its_hash_is_confirmed_by_its_words(items):
    index = RunIndex(items)
    index.shingles.multipliers[:] = 0  # every run has the hash of every other
    index.hashes = index.hashes * 0
    assert index.find(" ".join(["other"] * 20)) == set()
    assert {number for number, _ in index.find(items[0].texts[0])} == {0, 1}


def test_two_workers_find_what_one_finds(pool, items):
    assert contamination(pool, items, 4, workers=2, progress=False) == contamination(pool, items, 4, progress=False)


def test_items_of_files(tmp_path):
    (tmp_path / "suite.jsonl").write_text(json.dumps({"context": "a", "choices": ["b", "c"], "answer": 0}) + "\n"
                                          + json.dumps({"id": "x", "text": "d"}) + "\n")
    first, second = read_items([tmp_path / "suite.jsonl"])
    assert (first.task, first.id, [text.split() for text in first.texts]) == ("suite", "1", [["a", "b"], ["a", "c"]])
    assert (second.id, second.texts[0].split()) == ("x", ["d"])
    with pytest.raises(CorpusError, match="suite.jsonl, line 2: KeyError 'choices'; give JSON objects"):
        read_items([tmp_path / "suite.jsonl"], ["choices"])
    (tmp_path / "bad.jsonl").write_text("{}\n[1]\n")
    with pytest.raises(CorpusError, match="bad.jsonl, line 1: KeyError 'text'"):
        read_items([tmp_path / "bad.jsonl"])


def test_items_of_lm_eval_s_tasks(tmp_path, monkeypatch):
    """A task as users write them: loaded by its name, here from a folder instead of the hub."""
    (tmp_path / "mine.jsonl").write_text(json.dumps({"context": "a b", "choices": ["c", "d"], "answer": 1}) + "\n")
    config = {"task": "mine", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
              "dataset_kwargs": {"data_files": {"test": str(tmp_path / "mine.jsonl")},
                                 "cache_dir": str(tmp_path / "c")},
              "doc_to_text": "{{context}}", "doc_to_choice": "{{choices}}", "doc_to_target": "answer"}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/mine.yaml").write_text(json.dumps(config))
    monkeypatch.setattr("opus_bench.evaluation.evaluate.TEMPLATES", tmp_path / "tasks")
    only_mine = functools.partial(tasks.TaskManager, include_defaults=False)  # listing lm-eval's own takes seconds
    monkeypatch.setattr(tasks, "TaskManager", only_mine)
    (item,) = task_items(["mine"])
    assert (item.task, item.id) == ("mine", "0")
    assert [text.split() for text in item.texts] == [["a", "b", "c"], ["a", "b", "d"]]
    with pytest.raises(CorpusError, match="task 'no_such_task' cannot be loaded .*items as JSONL with --items"):
        task_items(["no_such_task"])


def test_the_command_prints_a_table_and_writes_the_report(pool, items, tmp_path, capsys):
    lines = "".join(json.dumps({"id": item.id, "context": "", "choices": list(item.texts)}) + "\n" for item in items)
    (tmp_path / "mine.jsonl").write_text(lines)
    words = ["contamination", "--pool", str(pool), "--items", str(tmp_path / "mine.jsonl"), "--output",
             str(tmp_path / "report.json")]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "60.00 %" in printed and "runs of 13 words" in printed
    assert json.loads((tmp_path / "report.json").read_text())["all"]["hit"] == 3
    assert cli.main(words) == 2
    assert "report.json exists; give --force" in capsys.readouterr().err
    assert cli.main(["contamination", "--pool", str(pool)]) == 2
    assert "no items to look for; give --items or --tasks" in capsys.readouterr().err


def test_options_out_of_range(pool, items):
    with pytest.raises(CorpusError, match="ngram is 1"):
        contamination(pool, items, 1)
    with pytest.raises(CorpusError, match="workers is 0"):
        contamination(pool, items, workers=0)
