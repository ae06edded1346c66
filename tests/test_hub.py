"""The paths of a hub by its real clients: a small hub on this machine whose files lie as those published do.

Asked in a process of its own, since the clients read the hub's address when they are imported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from fake_hub import FakeHub, commit_of
from hub_client import QWEN, TASKS
from lm_eval.tasks._yaml_loader import load_yaml
from paper_data import Items
from test_proxy import TINY, WORDS, tiny_tokenizer
from test_scorers import ONE, saved, write_fasttext
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from opus_bench.evaluation.paper_items import SPLITS, Loader
from opus_bench.evaluation.paper_tasks import SUITES

CLIENT = Path(__file__).with_name("hub_client.py")
EDU, STORIES, ARCTIC = "HuggingFaceFW/fineweb-edu", "juletxara/xstory_cloze", "Snowflake/snowflake-arctic-embed-l-v2.0"


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_text(datasets):
    """FineWeb-Edu's sample, dump and export, with the columns of its card."""
    rows = [{"text": f"river stone {n} planet", "id": f"<urn:uuid:{n}>", "dump": "CC-MAIN-2024-10", "url": "u",
             "file_path": "s3://", "language": "en", "language_score": 0.9, "token_count": 4, "score": 3.0 + n % 3,
             "int_score": 3 + n % 3} for n in range(30)]
    home = datasets / EDU
    write_parquet(home / "main/sample/10BT/000_00000.parquet", rows)
    write_parquet(home / "main/data/CC-MAIN-2024-10/train-00000-of-00001.parquet", rows[:9])
    write_parquet(home / "refs--convert--parquet/sample/0000.parquet", rows[:6])


def write_tasks(datasets, cache):
    """The data sets of TASKS: parquet under the configurations that the task files name; stories with their script."""
    loader, made, cards = Loader((), None, str(cache), lambda: None), Items(), {}
    for part in (part for suite in SUITES.values() for task in suite if task.name in TASKS
                 for part in loader.parts(task)):
        config = load_yaml(loader.manager.task_index[part].yaml_path, resolve_func=False)
        splits = {config[key] for key in SPLITS if config.get(key)}
        rows = [made.row(part, n) for n in range(4)]
        if config["dataset_path"] == STORIES:
            for split in splits:
                write_parquet(datasets / STORIES / f"refs--convert--parquet/en/{split}/0000.parquet", rows)
            continue
        home, name = datasets / config["dataset_path"] / "main", config.get("dataset_name") or "default"
        for split in splits:
            write_parquet(home / name / f"{split}-00000-of-00001.parquet", rows)
        files = [{"split": split, "path": f"{name}/{split}-*"} for split in sorted(splits)]
        cards.setdefault(home, []).append({"config_name": name, "data_files": files})
    for home, configs in cards.items():
        (home / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    (datasets / STORIES / "main").mkdir()
    (datasets / STORIES / "main/README.md").write_text("a card")
    (datasets / STORIES / "main/xstory_cloze.py").write_text("raise RuntimeError('a script')\n")


def write_qwen(folder):
    """Two layers, more rows than tokens, and a byte-level tokenizer whose end of text is GPT-2's."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(WORDS, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>",
                            pad_token="<|endoftext|>").save_pretrained(folder)
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(
        vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=32)).save_pretrained(folder)


def write_arctic(folder):
    """A model of sentence-transformers' form: first token, normalised, "query: " before queries."""
    BertModel(BertConfig(**TINY), add_pooling_layer=False).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), pad_token="[PAD]", unk_token="[UNK]",
                            model_max_length=8192).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps(
        {"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(
        {"prompts": {"query": "query: "}, "default_prompt_name": None}))
    kind = "sentence_transformers.models"
    (folder / "modules.json").write_text(json.dumps([
        {"idx": 0, "name": "0", "path": "", "type": f"{kind}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{kind}.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{kind}.Normalize"}]))


def write_classifier(path, labels):
    rng = np.random.default_rng(0)
    path.parent.mkdir(parents=True)
    write_fasttext(path, ["river", "stone", "planet"], list(labels), rng.normal(size=(3, 4)), rng.normal(size=(2, 4)))


def write_models(models):
    write_qwen(models / QWEN / "main")
    write_arctic(models / ARCTIC / "main")
    dclm = models / "mlfoundations/fasttext-oh-eli5/main"
    write_classifier(dclm / "openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train.bin", ("__label__hq", "__label__cc"))
    ultra = models / "openbmb/Ultra-FineWeb-classifier/main"
    write_classifier(ultra / "classifiers/ultra_fineweb_en.bin", ("__label__pos", "__label__neg"))
    (ultra / "config.json").write_text("{}")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), unk_token="[UNK]")
    tokenizer.save_pretrained(ultra / "local_tokenizer")
    settings = json.loads((ultra / "local_tokenizer/tokenizer_config.json").read_text())
    (ultra / "local_tokenizer/tokenizer_config.json").write_text(json.dumps(
        settings | {"tokenizer_class": "LlamaTokenizerFast"}))
    saved(BertForSequenceClassification(BertConfig(**ONE, num_labels=1)),
          models / "HuggingFaceFW/fineweb-edu-classifier/main")
    saved(LlamaForSequenceClassification(LlamaConfig(**ONE, num_labels=4, pad_token_id=0)),
          models / "princeton-nlp/QuRater-1.3B/main")


def ask(address, home, *parts, **environment):
    """What hub_client prints, of a hub that is this one alone."""
    done = subprocess.run(
        [sys.executable, str(CLIENT), *parts], text=True, capture_output=True, cwd=Path(__file__).parents[1],
        env=os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1",
                          "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*", "OMP_NUM_THREADS": "1",
                          "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONWARNINGS": "ignore", **environment})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a first user finds, and the same user on a machine without a network, who says so."""
    folder, home = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("home")
    write_text(folder / "datasets")
    write_tasks(folder / "datasets", home)
    write_models(folder / "models")
    with FakeHub(folder) as address:
        first = ask(address, home, "text", "tasks", "items", "models")
    return first, ask(address, home, "text", "tasks", "models", HF_HUB_OFFLINE="1")


def test_text_is_listed_pinned_and_streamed_by_bucket(found):
    text = found[0]["text"]
    assert text["sample"] == {"fineweb-edu-3": 10, "fineweb-edu-4-5": 20}
    assert text["dump"] == {"fineweb-edu-3": 3, "fineweb-edu-4-5": 6}
    assert text["export"] == {"fineweb-edu-3": 2, "fineweb-edu-4-5": 4}
    assert text["absent"].startswith("error: CorpusError: source fineweb-edu: cannot list ")
    assert "--subset" in text["absent"]


def test_tasks_are_loaded_as_their_files_say_and_stories_without_their_script(found):
    tasks = found[0]["tasks"]
    export = commit_of("datasets", STORIES, "refs/convert/parquet")
    assert tasks["StoryCloze"] == [[STORIES, None, split, export, 4] for split in ("train", "eval")]
    for name in TASKS:
        assert not isinstance(tasks[name], str), tasks[name]
        assert all(row[3] == commit_of("datasets", row[0], "main") and row[4] == 4 for row in tasks[name]
                   if row[0] != STORIES), tasks[name]
    assert tasks["AX-b"][0][:3] == ["aps/super_glue", "axb", "test"] and len(tasks) == len(TASKS)
    assert found[0]["items"] == {"items": ["wsc train", "piqa train"]}


def test_weights_come_after_a_look_at_the_outline(found):
    models = found[0]["models"]
    assert models["outline"] == models["weights"] > 0  # the config alone is in the cache by then
    assert 256 < models["tokenizer"] <= 300 and all(n > 0 for n in models["count"])


def test_the_encoder_and_the_scorers_load_from_the_published_names(found):
    models = found[0]["models"]
    queries, documents = (torch.tensor(rows) for rows in models["arctic"])
    torch.testing.assert_close(queries.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(documents.norm(dim=1), torch.ones(2))
    assert (queries - documents).abs().max() > 1e-3  # the prefix
    for name in ("dclm", "ultra-fineweb", "fineweb-edu", "qurating"):
        assert not isinstance(models[name], str) and len(models[name]) == 2, models[name]
    assert all(0 <= value <= 1 for name in ("dclm", "ultra-fineweb") for value in models[name])


def test_what_was_fetched_is_there_without_a_network(found):
    online, offline = found
    assert offline["models"] == online["models"]
    stories = offline["tasks"].pop("StoryCloze")  # `datasets` does not find in its cache what was loaded by file
    assert stories.startswith("error: CannotLoad: ") and stories.endswith("; --data FOLDER takes local files in its "
                                                                          "place")
    assert {name: [row[4] for row in rows] for name, rows in offline["tasks"].items()} == {
        name: [row[4] for row in rows] for name, rows in online["tasks"].items() if name != "StoryCloze"}
    assert "the hub cannot be reached (HF_HUB_OFFLINE is set)" in offline["text"]["sample"]
