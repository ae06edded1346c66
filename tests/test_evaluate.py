"""lm-eval's numbers equal those computed by hand from the model, and evaluating leaves no trace.

Accuracies must be equal, not close: both sides take the argmax of the same log-likelihoods. Bits per
byte agree to float32 round-off. The models are bigram tables, whose likelihoods are worked out here
without torch, and one transformers model small enough to call an option at a time.
"""

import json
import math
import random
import threading
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from test_items import synthetic_documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from opus_bench.evaluation import items as rules
from opus_bench import tables
from opus_bench.evaluation import records as model_evaluation
from opus_bench.evaluation import paper_items
from opus_bench.evaluation import paper_suite
from opus_bench.evaluation import suite as suites
from opus_bench.evaluation.evaluate import TEMPLATES, evaluate
from opus_bench.evaluation.command import EvaluationSettings
from opus_bench.evaluation.paper_suite import PAPER_TASKS, PaperTask, evaluate_paper_suite
from opus_bench.results import record_path
from opus_bench.evaluation.samples import paired_samples, read_samples, samples_folder, samples_path
from opus_bench.schema import check_eval
from opus_bench.evaluation.suite import load_suite, write_suite

SIZE = 8
END = "<|endoftext|>"


class BigramModel(PreTrainedModel):
    """logits[t] = table[token t]: a language model that can be checked with a pocket calculator."""

    config_class = PretrainedConfig

    def __init__(self, table):
        super().__init__(PretrainedConfig())
        self.table = torch.nn.Parameter(table, requires_grad=False)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, input_ids, **_):
        return CausalLMOutput(logits=self.dropout(self.table[input_ids]))


@pytest.fixture(scope="module")
def documents():
    return synthetic_documents(120, seed=1)


@pytest.fixture(scope="module")
def reference():
    return synthetic_documents(200, seed=2)


@pytest.fixture(scope="module")
def domains():
    return {
        "plain": [" ".join(synthetic_documents(3, seed)) for seed in (5, 6, 7)],
        "odd": ["naïve café – ünïcode", "x = [1, 2]\n"],
    }


@pytest.fixture(scope="module")
def suite(tmp_path_factory, documents, reference, domains):
    return write_suite(tmp_path_factory.mktemp("suites") / "suite", documents, reference, domains, SIZE, seed=0)


@pytest.fixture(scope="module")
def words(documents, domains):
    """A tokenizer of one token a word, so that likelihoods can be summed by hand."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(special_tokens=[END], show_progress=False)
    tokenizer.train_from_iterator(documents + [text for texts in domains.values() for text in texts], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, unk_token=END)


@pytest.fixture(scope="module")
def pieces(documents):
    """A byte-level BPE, as the benchmark uses."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


@pytest.fixture(scope="module")
def bigram(words):
    return BigramModel(torch.randn(len(words), len(words), generator=torch.Generator().manual_seed(0)))


def tiny_gpt2(tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5
    )
    return GPT2LMHeadModel(config)


def suite_items(suite, name):
    return rules.from_jsonl((suite.directory / suite.tasks[name].file).read_text())


def by_task(rows):
    return {row["task"]: row for row in rows}


def table_loglikelihood(model, ids):
    """Sum over pairs of log softmax(table[a])[b], in numpy."""
    table = model.table.detach().double().numpy()
    logs = table - np.log(np.exp(table).sum(1, keepdims=True))
    return sum(logs[a, b] for a, b in pairwise(ids))


def test_accuracy_equals_the_bigram_likelihoods_worked_by_hand(bigram, words, suite):
    rows = by_task(evaluate(bigram, words, suite, batch_size=7))
    for name in suite.tasks:
        correct = []
        for item in suite_items(suite, name):
            last = words.encode(item.context)[-1:] if item.context else [words.eos_token_id]
            scores = [table_loglikelihood(bigram, last + words.encode(choice)) for choice in item.choices]
            correct.append(int(np.argmax(scores)) == item.answer)
        row = rows[name]
        assert row["value"] == sum(correct) / SIZE
        p = row["value"]
        assert row["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (SIZE - 1)))
        assert (row["metric"], row["n_samples"], row["n_shot"], row["limit"]) == ("acc", SIZE, 0, None)


def test_bits_per_byte_and_its_error_equal_the_likelihoods_worked_by_hand(bigram, words, suite, domains):
    rows = by_task(evaluate(bigram, words, suite))
    for domain, texts in domains.items():
        logs = [table_loglikelihood(bigram, [words.eos_token_id] + words.encode(text)) for text in texts]
        sizes = [len(text.encode("utf-8")) for text in texts]
        ratio = sum(logs) / sum(sizes)
        square = sum((log - ratio * size) ** 2 for log, size in zip(logs, sizes))
        row = rows[f"bits_per_byte_{domain}"]
        assert row["value"] == pytest.approx(-ratio / math.log(2), rel=1e-5)
        want = math.sqrt(len(texts) / (len(texts) - 1) * square) / sum(sizes) / math.log(2)
        assert row["stderr"] == pytest.approx(want, rel=1e-3)
        assert (row["higher_is_better"], row["unit"], row["n_samples"]) == (False, "bit/byte", len(texts))


def test_accuracy_equals_a_transformer_called_one_option_at_a_time(pieces, suite):
    model = tiny_gpt2(pieces).eval()

    def loglikelihood(context, continuation):
        whole = [pieces.eos_token_id] + pieces.encode(continuation)
        start = 1
        if context:
            whole = pieces.encode(f"{context} {continuation}")
            start = len(pieces.encode(context))
        cut = max(0, len(whole) - 65)  # 64 positions and the token predicted from the last
        logits = model(torch.tensor([whole[cut:-1]])).logits[0].log_softmax(-1)
        return sum(logits[t - 1 - cut, whole[t]].item() for t in range(max(start, cut + 1), len(whole)))

    rows = by_task(evaluate(model, pieces, suite, batch_size=5))
    with torch.no_grad():
        for name in ("cloze", "agreement"):
            items = suite_items(suite, name)
            best = [np.argmax([loglikelihood(item.context, choice) for choice in item.choices]) for item in items]
            assert rows[name]["value"] == sum(b == item.answer for b, item in zip(best, items)) / SIZE


def test_long_documents_are_scored_in_full(pieces, suite, domains):
    model = tiny_gpt2(pieces).eval()
    rows = by_task(evaluate(model, pieces, suite, batch_size=3))
    total, size = 0.0, 0
    for text in domains["plain"]:
        ids = [pieces.eos_token_id] + pieces.encode(text)
        assert len(ids) > 128
        size += len(text.encode())
        position = 1
        while position < len(ids):
            end = min(position + 64, len(ids))
            start = position - 1 if position == 1 or end - position == 64 else end - 65
            logits = model(torch.tensor([ids[start : end - 1]])).logits[0].log_softmax(-1)
            total += sum(logits[t - 1 - start, ids[t]].item() for t in range(position, end))
            position = end
    assert rows["bits_per_byte_plain"]["value"] == pytest.approx(-total / size / math.log(2), rel=1e-4)


def test_a_uniform_model_gets_chance_by_construction(words, suite):
    uniform = BigramModel(torch.zeros(len(words), len(words)))
    rows = by_task(evaluate(uniform, words, suite))
    for name, task in suite.tasks.items():
        assert rows[name]["value"] == task.chance  # every option ties, and each position is right equally often
    assert rows["mean_accuracy"]["value"] == pytest.approx(rows["mean_accuracy"]["chance"])


def test_a_model_that_knows_the_text_gets_all_and_one_that_inverts_it_none(documents, words, suite):
    table = torch.zeros(len(words), len(words))
    for document in documents:
        ids = [words.eos_token_id] + words.encode(document)
        for a, b in pairwise(ids):
            table[a, b] += 1
    for sign, want in ((1, 1.0), (-1, 0.0)):
        rows = by_task(evaluate(BigramModel(sign * (table + 0.01).log()), words, suite))
        assert rows["word_swap"]["value"] == want


def test_the_mean_row_is_the_mean_of_the_tasks(bigram, words, suite):
    rows = evaluate(bigram, words, suite)
    tasks = [row for row in rows if row["task"] in suite.tasks]
    mean = by_task(rows)["mean_accuracy"]
    assert mean["value"] == pytest.approx(np.mean([row["value"] for row in tasks]))
    variances = [row["value"] * (1 - row["value"]) / SIZE for row in tasks]
    assert mean["stderr"] == pytest.approx(math.sqrt(sum(variances)) / len(tasks))
    assert mean["n_samples"] == SIZE * len(tasks)


def test_surface_is_the_best_rule_without_a_model(suite, words, bigram, reference):
    rows = by_task(evaluate(bigram, words, suite, limit=2))
    for name, task in suite.tasks.items():
        own = {"chance": task.chance, **rules.surface_baselines(suite_items(suite, name), rules.word_counts(reference))}
        assert rows[name]["surface"] == max(own.values()) == own[rows[name]["surface_name"]]


def test_a_limit_takes_the_first_items(bigram, words, suite):
    rows = by_task(evaluate(bigram, words, suite, limit=3))
    assert {rows[name]["n_samples"] for name in suite.tasks} == {3}
    assert rows["agreement"]["limit"] == 3 and rows["bits_per_byte_odd"]["n_samples"] == 2
    one = by_task(evaluate(bigram, words, suite, limit=1))
    assert one["agreement"]["stderr"] is None and one["bits_per_byte_odd"]["stderr"] is None


def test_evaluation_is_repeatable_and_leaves_no_trace(pieces, suite, capfd):
    model = tiny_gpt2(pieces)
    model.train()
    model.transformer.h[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    tensors = {name: (id(p), p.clone(), p.requires_grad, p.grad) for name, p in model.named_parameters()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces.backend_tokenizer, eos_token=END)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    first = evaluate(model, tokenizer, suite)
    assert evaluate(model, tokenizer, suite) == first
    assert {name: module.training for name, module in model.named_modules()} == modes
    for name, p in model.named_parameters():
        assert (id(p), p.requires_grad, p.grad) == (tensors[name][0], *tensors[name][2:]) and torch.equal(
            p, tensors[name][1]
        )
    assert tokenizer.pad_token_id is None
    assert random.getstate() == states[0]
    assert np.random.get_state()[2] == states[1][2] and (np.random.get_state()[1] == states[1][1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    assert capfd.readouterr() == ("", "")


def test_logging_and_progress_bars_of_others_are_left_as_they_were(bigram, words, suite):
    import logging

    import datasets
    import lm_eval.api.task

    logger, bar = logging.getLogger("lm_eval"), lm_eval.api.task.tqdm
    datasets.enable_progress_bars()
    logger.setLevel(logging.WARNING)
    evaluate(bigram, words, suite, limit=1)
    assert logger.level == logging.WARNING
    assert lm_eval.api.task.tqdm is bar and isinstance(bar, type)
    assert not datasets.are_progress_bars_disabled()


def test_whatever_lm_eval_seeds_is_undone(bigram, words, suite, monkeypatch):
    from lm_eval import evaluator

    inner = evaluator.evaluate

    def seeding(*args, **kwargs):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        return inner(*args, **kwargs)

    monkeypatch.setattr(evaluator, "evaluate", seeding)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    want = random.random(), np.random.rand(), torch.rand(1)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    evaluate(bigram, words, suite, limit=1)
    assert (random.random(), np.random.rand(), torch.rand(1)) == want


def test_modes_and_random_states_are_restored_after_an_error(words, suite):
    model = BigramModel(torch.full((len(words), len(words)), float("nan"))).train()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"task agreement, item 0: .*nan.* logits are not finite"):
        evaluate(model, words, suite)
    assert model.training and model.dropout.training and torch.equal(torch.get_rng_state(), state)


def test_an_option_longer_than_the_model_is_named(pieces, suite):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(pieces), n_positions=8, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="longer than the 8 tokens the model takes"):
        evaluate(model, pieces, suite)


def test_dropout_is_off_while_evaluating(bigram, words, suite):
    quiet = evaluate(bigram.eval(), words, suite)
    assert evaluate(bigram.train(), words, suite) == quiet


def test_a_tokenizer_without_a_first_token_is_refused(bigram, words, suite):
    bare = PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer)
    with pytest.raises(ValueError, match="no bos_token and no eos_token"):
        evaluate(bigram, bare, suite)


def test_the_command_keeps_every_item_of_the_offline_suite(pieces, suite, tmp_path, monkeypatch):
    model = tiny_gpt2(pieces).eval()
    model.save_pretrained(tmp_path / "model")
    pieces.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(model_evaluation, "offline_suite", lambda folder: suite)
    settings = EvaluationSettings(str(tmp_path / "model"), "offline", batch_size=64)
    record = model_evaluation.evaluate_model(settings, tmp_path / "runs")
    assert record["evals"] == evaluate(model, pieces, suite, batch_size=64)
    _, samples = read_samples(samples_path(samples_folder(tmp_path / "runs", record["run_id"]), "offline"))
    rows = by_task(record["evals"])
    for name in suite.tasks:
        assert rows[name]["value"] == np.mean([s["correct"] for s in samples if s["part"] == name])
        assert all(s["correct"] == (np.argmin(s["nll"]) == s["gold"]) for s in samples if s["part"] == name)
    texts = [s for s in samples if s["part"] == "bits_per_byte_plain"]
    ratio = sum(s["nll"][0] for s in texts) / sum(s["bytes"] for s in texts)
    assert rows["bits_per_byte_plain"]["value"] == pytest.approx(ratio / math.log(2))
    path = record_path(tmp_path / "runs", record["run_id"])
    assert len(paired_samples(path, path)) == SIZE * len(suite.tasks)
    assert [line["requests"] for line in model_evaluation.plan(settings)][-1] == suite.domains["odd"].n


# The suite on disk.


def test_a_suite_is_reloaded_and_equal_inputs_give_equal_hashes(tmp_path, documents, reference, domains, suite):
    again = write_suite(suite.directory, documents, reference, domains, SIZE, seed=0)
    assert again == suite == load_suite(suite.directory)
    elsewhere = write_suite(tmp_path / "deep" / "suite", documents, reference, domains, SIZE, seed=0)
    assert elsewhere.sha256 == suite.sha256
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["suite"]
    other = write_suite(tmp_path / "other", documents, reference, domains, SIZE, seed=1)
    assert other.sha256 != suite.sha256


def test_a_suite_of_other_inputs_or_with_a_changed_file_is_refused(tmp_path, documents, reference, domains):
    suite = write_suite(tmp_path / "suite", documents, reference, domains, SIZE, seed=0)
    with pytest.raises(ValueError, match="size 8, seed 0 made from other inputs than size 8, seed 1"):
        write_suite(suite.directory, documents, reference, domains, SIZE, seed=1)
    path = suite.directory / "article.jsonl"
    path.write_text(path.read_text().replace('"answer": 0', '"answer": 1', 1))
    with pytest.raises(ValueError, match="article.jsonl is missing or differs"):
        load_suite(suite.directory)
    path.unlink()
    with pytest.raises(ValueError, match="article.jsonl is missing or differs"):
        write_suite(suite.directory, documents, reference, domains, SIZE, seed=0)


def test_the_slower_of_two_builders_takes_what_the_faster_wrote(tmp_path, documents, reference, domains):
    mine = write_suite(tmp_path / "suite", documents, reference, domains, SIZE, seed=0)
    suites._build_suite(mine.directory, documents, reference, domains, SIZE, 1, "later")
    assert load_suite(mine.directory) == mine
    assert [path.name for path in tmp_path.iterdir()] == ["suite"]


def test_a_failed_build_leaves_nothing_behind(tmp_path, documents, reference, domains):
    with pytest.raises(ValueError, match="give more documents"):
        write_suite(tmp_path / "suite", documents[:3], reference, domains, 500)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="has no suite.json"):
        write_suite(tmp_path, documents, reference, domains, SIZE)
    with pytest.raises(ValueError, match="domain 'a/b'"):
        write_suite(tmp_path / "suite", documents, reference, {"a/b": ["text"]}, SIZE)
    with pytest.raises(ValueError, match="domain 'empty' has no text"):
        write_suite(tmp_path / "suite", documents, reference, {"empty": [""]}, SIZE)


def test_documents_for_bits_per_byte_are_cut(tmp_path, documents, reference):
    many = {"long": ["é" * 5000] * 50}
    suite = write_suite(tmp_path / "suite", documents, reference, many, SIZE)
    lines = (suite.directory / suite.domains["long"].file).read_text().splitlines()
    assert suite.domains["long"].n == len(lines) == suites.BITS_DOCUMENTS
    assert json.loads(lines[0])["text"] == "é" * suites.BITS_CHARACTERS


# The paper's suite.


def test_the_papers_tasks_are_not_run_without_a_hub(bigram, words, monkeypatch):
    monkeypatch.setattr(paper_suite, "hub_problem", lambda: "the cable is out")
    rows = evaluate_paper_suite(bigram, words)
    assert [row["task"] for row in rows] == [task.name for task in PAPER_TASKS]
    assert len(rows) == 10
    assert all(row["status"] == "not run: no hub" and row["reason"] == "the cable is out" for row in rows)


def test_the_hub_is_found_missing_quickly(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "none")
    assert "HF_HUB_OFFLINE is set" in paper_suite.hub_problem()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    (tmp_path / "a data set").touch()
    assert paper_suite.hub_problem() is None

    class Session:
        def __init__(self, answer):
            self.head = answer

    def refuse(*_, **__):
        raise ConnectionError("refused\nlong story")

    release = threading.Event()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(paper_suite, "HUB_TIMEOUT", -0.9)  # a second of grace is added
    for answer, want in [
        (lambda *_, **__: None, None),
        (refuse, "ConnectionError: refused"),
        (lambda *_, **__: release.wait(30), "no answer within -0.9 s"),
    ]:
        monkeypatch.setattr(huggingface_hub.utils, "get_session", partial(Session, answer))
        assert paper_suite.hub_problem() == want
    release.set()


LOCAL = """
task: {task}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: {text}
doc_to_choice: {choices}
doc_to_target: {target}
metric_list: [{{metric: acc}}]
metadata: {{version: 1.0}}
"""


def test_the_papers_rule_is_the_lowest_mean_negative_log_likelihood(bigram, words, tmp_path, monkeypatch):
    import lm_eval.tasks

    generator = random.Random(0)
    vocabulary = [word for word in words.get_vocab() if word != END]

    def phrase(n):
        return " ".join(generator.choices(vocabulary, k=n))

    questions = [{"q": phrase(3), "options": [phrase(1), phrase(6)], "label": i % 2} for i in range(40)]
    gaps = [{"which": i % 2, "options": [phrase(2), phrase(2)], "end": phrase(2)} for i in range(40)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (tmp_path / "gaps.jsonl").write_text("".join(json.dumps(q) + "\n" for q in gaps))
    for task, text, choices, target in [("questions", "q", "options", "label"), ("gaps", "which", "options", "end")]:
        fields = {"text": text, "choices": choices, "target": target, "cache": tmp_path / "cache"}
        (tmp_path / f"{task}.yaml").write_text(LOCAL.format(task=task, data=tmp_path / f"{task}.jsonl", **fields))
    monkeypatch.setattr(paper_suite, "hub_problem", lambda: None)
    monkeypatch.setattr(paper_items, "TEMPLATES", tmp_path)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))

    def mean(context, continuation):
        ids = words.encode(continuation)
        return table_loglikelihood(bigram, words.encode(context)[-1:] + ids) / len(ids)

    tasks = [
        PaperTask("Q", ("questions",), 7),
        PaperTask("G", ("gaps",), None),
        PaperTask("both", ("questions", "gaps"), None),
    ]
    rows = evaluate_paper_suite(bigram, words, [*tasks, PaperTask("lost", ("no_such_task",), 1)])
    right = {
        "Q": [int(np.argmax([mean(q["q"], option) for option in q["options"]])) == q["label"] for q in questions],
        "G": [int(np.argmax([mean(q["options"][i], q["end"]) for i in (0, 1)])) == q["which"] for q in gaps],
    }
    right["both"] = right["Q"] + right["G"]
    for row in rows[:3]:
        p = np.mean(right[row["task"]])
        assert (row["value"], row["n_samples"], row["metric"]) == (p, len(right[row["task"]]), "acc_mean_nll")
        assert row["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / row["n_samples"]))
    assert rows[0]["n_paper"] == 7
    assert rows[3]["status"].startswith("not run: KeyError") and "no_such_task" in rows[3]["status"]


def test_lm_eval_knows_every_task_of_the_paper():
    from pathlib import Path

    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders = ("mmlu/continuation", "anli", "hellaswag", "piqa", "siqa", "winogrande", "super_glue/wsc")
    known = lm_eval.tasks.TaskManager(
        include_path=[*(root / folder for folder in folders), TEMPLATES], include_defaults=False
    )
    for task in PAPER_TASKS:
        assert set(task.lm_eval) <= set(known.all_tasks), task.name


def test_rows_fit_the_results_schema(bigram, words, suite, monkeypatch):
    monkeypatch.setattr(paper_suite, "hub_problem", lambda: "offline")
    for row in evaluate(bigram, words, suite) + evaluate_paper_suite(bigram, words):
        check_eval(json.loads(json.dumps(row)), "evals[0]", "test")


def test_the_tables_look_for_the_names_that_rows_have(bigram, words, suite, domains):
    names = [row["task"] for row in evaluate(bigram, words, suite, limit=1)]
    assert names == [*suite.tasks, tables.MEAN_ACCURACY, *(tables.BITS_PER_BYTE + domain for domain in domains)]
    assert tables.PAPER_TASKS == tuple(task.name for task in PAPER_TASKS)
