"""The paper's suites as they are run: the real task files on invented items, through the real lm-eval.

Negative log-likelihoods must equal those of the same model called by hand, an option at a time, in float64, to
round-off; counts, hashes and what is kept on disk are exact.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import pytest
import torch
from paper_data import WORDS, Items, write_items, write_part
from small_models import perturbed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationMixin, GPT2Config, GPT2LMHeadModel, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from opus_bench import cli, results, tables
from opus_bench.evaluation import records as model_evaluation
from opus_bench.evaluation import paper_suite
from opus_bench.evaluation.evaluate import undisturbed
from opus_bench.evaluation.command import EvaluationSettings
from opus_bench.model import OpusGPT2, OpusGPT2Config
from opus_bench.evaluation.records import evaluate_model, plan
from opus_bench.evaluation.paper_items import CannotLoad, Loader, count_note, revision, split_of
from opus_bench.evaluation.paper_suite import evaluate_paper_suite, evaluate_tasks
from opus_bench.evaluation.paper_tasks import CPT_TASKS, OOD_TASKS, PAPER_TASKS, SUITES, PaperTask
from opus_bench.evaluation.samples import paired_samples, read_samples, samples_folder, samples_path, write_samples
from opus_bench.schema import RecordError, check_eval
from opus_bench.sections import Row
from opus_bench.evaluation.tasks import paper_functions

END = "<|endoftext|>"
EVALUATED = {  # lm-eval's tasks and the split each is evaluated on, but MMLU's and BBH's many
    "anli_r1": "test_r1", "anli_r2": "test_r2", "anli_r3": "test_r3", "hellaswag": "validation", "piqa": "validation",
    "social_iqa": "validation", "winogrande": "validation", "opus_arc_easy": "validation",
    "opus_arc_challenge": "validation", "opus_commonsense_qa": "validation", "wsc": "validation",
    "opus_race_middle": "test", "opus_race_high": "test", "opus_ax_b": "test", "opus_ax_g": "test",
    "opus_storycloze_train": "train", "opus_storycloze_eval": "eval",
    **{f"opus_olympicarena_{s}": "val" for s in
       ("math", "physics", "chemistry", "biology", "geography", "astronomy")},
    **{f"opus_sciassess_{s}": "test" for s in ("biology", "chemistry", "material", "medicine")},
}
SMALL = tuple(task for task in (*PAPER_TASKS, *OOD_TASKS) if task.name not in ("MMLU", "BBH"))


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setattr(paper_suite, "hub_problem", lambda: "the cable is out")


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE, in which a word is one token or several."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator([" ".join(WORDS)] * 3, trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)


def tiny(tokenizer, seed=0, positions=512):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=positions, n_embd=8, n_layer=1, n_head=2,
                                      initializer_range=0.7, eos_token_id=tokenizer.eos_token_id)).eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_items(tmp_path_factory.mktemp("items"), EVALUATED)


@pytest.fixture(scope="module")
def outcomes(data, tokenizer):
    """Row and items of each small multiple-choice task, by a float64 model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper_suite, "hub_problem", lambda: "the cable is out")
        found = list(evaluate_tasks(tiny(tokenizer).double(), tokenizer, SMALL, batch_size=7, data=data))
    return {row["task"]: (row, samples) for row, samples in found}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model on disk, as a user gives it."""
    path = tmp_path_factory.mktemp("model")
    tiny(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def rows_of(data, part, split):
    return [json.loads(line) for line in (data / f"{part}.{split}.jsonl").read_text().splitlines()]


# The metric ------------------------------------------------------------------------------------------------------


PROMPTS = {  # of one row: the contexts and continuations of its options, and the right one, written out by hand
    "HellaSwag": ("hellaswag", lambda r: ([f"{r['activity_label']}: {r['ctx_a']} {r['ctx_b'].capitalize()}"] * 4,
                                          [f" {e}" for e in r["endings"]], int(r["label"]))),
    "ARC-C": ("opus_arc_challenge", lambda r: (
        [f"Question: {r['question']}\nAnswer:"] * 4, [f" {c}" for c in r["choices"]["text"]],
        r["choices"]["label"].index(r["answerKey"]))),
    "CommonsenseQA": ("opus_commonsense_qa", lambda r: (
        [f"Question: {r['question']}\nAnswer:"] * 5, [f" {c}" for c in r["choices"]["text"]],
        "ABCDE".index(r["answerKey"]))),
    "WinoGrande": ("winogrande", lambda r: (
        [r["sentence"].split("_")[0] + r[name] for name in ("option1", "option2")],
        [f" {r['sentence'].split('_')[1].strip()}"] * 2, int(r["answer"]) - 1)),
    "RACE-M": ("opus_race_middle", lambda r: (
        [f"Article: {r['article']}\n\nQuestion: {r['question']}\nAnswer:"] * 4, [f" {o}" for o in r["options"]],
        "ABCD".index(r["answer"]))),
    "AX-b": ("opus_ax_b", lambda r: (
        [f"{r['sentence1']}\nQuestion: {r['sentence2']} True or False?\nAnswer:"] * 2, [" True", " False"],
        r["label"])),
    "AX-g": ("opus_ax_g", lambda r: (
        [f"{r['premise']}\nQuestion: {r['hypothesis']} True or False?\nAnswer:"] * 2, [" True", " False"],
        r["label"])),
    "StoryCloze": ("opus_storycloze_eval", lambda r: (
        [" ".join(r[f"input_sentence_{k}"] for k in (1, 2, 3, 4))] * 2,
        [f" {r['sentence_quiz1']}", f" {r['sentence_quiz2']}"], r["answer_right_ending"] - 1)),
}


def nll_by_hand(model, tokenizer, context, continuation):
    """Total negative log-likelihood of the continuation (nat) and its tokens, one forward, float64."""
    first, both = tokenizer.encode(context), tokenizer.encode(context + continuation)
    logits = model(torch.tensor([both[:-1]])).logits[0].double()
    logs = logits - torch.logsumexp(logits, -1, keepdim=True)
    total = sum(logs[t - 1, both[t]].item() for t in range(len(first), len(both)))
    return -total, len(both) - len(first)


@pytest.mark.parametrize("task", PROMPTS)
def test_the_option_of_the_lowest_mean_nll_is_that_of_the_model_called_by_hand(task, outcomes, data, tokenizer):
    part, questions = PROMPTS[task]
    row, samples = outcomes[task]
    model = tiny(tokenizer).double()
    right = []
    for item, sample in zip(rows_of(data, part, EVALUATED[part]), [s for s in samples if s["part"] == part],
                            strict=True):
        contexts, continuations, gold = questions(item)
        with torch.no_grad():
            by_hand = [nll_by_hand(model, tokenizer, a, b) for a, b in zip(contexts, continuations, strict=True)]
        assert sample["nll"] == pytest.approx([total for total, _ in by_hand], rel=1e-10)
        assert sample["tokens"] == [length for _, length in by_hand]
        means = [total / length for total, length in by_hand]
        assert sample["gold"] == gold and sample["correct"] == (means.index(min(means)) == gold)
        right.append(sample["correct"])
    described = next(found for found in row["parts"] if found["lm_eval"] == part)
    assert described["value"] == sum(right) / len(right)


def test_the_mean_is_over_tokens_and_the_rules_differ(outcomes):
    """lm-eval's acc (total) and acc_norm (per character) answer otherwise on some of the items."""
    decided = {rule: [] for rule in ("mean", "total")}
    for row, samples in outcomes.values():
        for s in samples:
            means = [a / b for a, b in zip(s["nll"], s["tokens"], strict=True)]
            assert s["correct"] == float(min(range(len(means)), key=means.__getitem__) == s["gold"])
            decided["mean"].append(means.index(min(means)))
            decided["total"].append(s["nll"].index(min(s["nll"])))
        total = [s["nll"].index(min(s["nll"])) == s["gold"] for s in samples]
        if "acc" in row["other_rules"]:
            assert row["other_rules"]["acc"] == sum(total) / len(total)
    assert decided["mean"] != decided["total"]
    assert "acc_norm" in outcomes["HellaSwag"][0]["other_rules"]


def test_half_precision_models_are_normalised_in_float32(data, tokenizer):
    model = tiny(tokenizer).bfloat16()
    row, samples = next(evaluate_tasks(model, tokenizer, [SMALL[1]], batch_size=1, data=data))
    item = rows_of(data, "hellaswag", "validation")[0]
    contexts, continuations, _ = PROMPTS["HellaSwag"][1](item)
    with torch.no_grad():
        by_hand = [nll_by_hand(model, tokenizer, a, b)[0] for a, b in zip(contexts, continuations, strict=True)]
    assert row["task"] == "HellaSwag"
    assert samples[0]["nll"] == pytest.approx(by_hand, rel=1e-5)  # float32; bfloat16 has 8 bits


# The suites ------------------------------------------------------------------------------------------------------


def test_a_row_says_which_items_it_is_of(outcomes, data):
    assert list(outcomes) == [task.name for task in SMALL]
    for row, samples in outcomes.values():
        check_eval(json.loads(json.dumps(row)), "evals[0]", "test")
        assert (row["metric"], row["n_shot"], row["limit"], row["batch_size"]) == ("acc_mean_nll", 0, None, 7)
        assert row["n_samples"] == len(samples) == sum(part["n"] for part in row["parts"])
        assert row["value"] == sum(s["correct"] for s in samples) / len(samples)
        assert row["stderr"] == pytest.approx(math.sqrt(row["value"] * (1 - row["value"]) / len(samples)))
        for part in row["parts"]:
            assert part["split"] == EVALUATED[part["lm_eval"]] and part["dataset"] == "local file"
            assert set(part["files_sha256"]) == {part["split"]} and part["revision"] is part["fingerprint"] is None
        expected = "4 items, not the paper's" if row["n_paper"] else "12 items; the paper states no number"
        assert row["count"].startswith(expected) or row["task"] == "StoryCloze"
    assert outcomes["StoryCloze"][0]["count"] == "8 items, not the paper's 1,871"
    assert len({row["items_sha256"] for row, _ in outcomes.values()}) == len(outcomes)
    assert [part["lm_eval"] for part in outcomes["ANLI"][0]["parts"]] == ["anli_r1", "anli_r2", "anli_r3"]


def test_the_hash_of_the_items_moves_with_a_question_and_not_with_the_model(tmp_path, data, outcomes, tokenizer):
    piqa = [task for task in SMALL if task.name == "PIQA"]
    same = evaluate_paper_suite(tiny(tokenizer, seed=1), tokenizer, piqa, batch_size=2, data=data)[0]
    assert same["items_sha256"] == outcomes["PIQA"][0]["items_sha256"]
    rows = rows_of(data, "piqa", "validation")
    write_part(tmp_path, "piqa", "validation", [rows[0] | {"label": 1 - rows[0]["label"]}, *rows[1:]])
    other = evaluate_paper_suite(tiny(tokenizer, seed=1), tokenizer, piqa, batch_size=2, data=tmp_path)[0]
    assert other["items_sha256"] != same["items_sha256"]


def test_the_hash_of_the_items_moves_with_a_prompt_of_the_same_questions(data, outcomes, tokenizer, monkeypatch):
    piqa = [task for task in SMALL if task.name == "PIQA"]
    load = Loader.load

    def asked_otherwise(loader, task):
        loaded = load(loader, task)
        loaded["tasks"]["piqa"].config.doc_to_text = "Q: {{goal}}\nA:"
        return loaded

    monkeypatch.setattr(Loader, "load", asked_otherwise)
    ((row, samples),) = evaluate_tasks(tiny(tokenizer), tokenizer, piqa, batch_size=7, data=data)
    assert [s["sha"] for s in samples] == [s["sha"] for s in outcomes["PIQA"][1]]
    assert row["items_sha256"] != outcomes["PIQA"][0]["items_sha256"]


def test_counts_are_compared_with_the_papers():
    arc = next(task for task in PAPER_TASKS if task.name == "ARC-E")
    assert count_note(arc, 567) == "567 items as in the paper"
    assert count_note(arc, 570) == "570 items, not the paper's 567"
    stated = {"MMLU": 14042, "HellaSwag": 10042, "PIQA": 1838, "SIQA": 1954, "WinoGrande": 1267, "ARC-E": 567,
              "ARC-C": 295, "CommonsenseQA": 1221, "WSC": 104, "RACE-M": 1436, "RACE-H": 3498, "AX-b": 1104,
              "AX-g": 356, "StoryCloze": 1871}
    assert {task.name: task.n for suite in SUITES.values() for task in suite if task.n} == stated


def test_questions_of_arc_without_four_options_are_left_out(tmp_path, tokenizer):
    rows = [Items(1).row("opus_arc_easy", i) for i in range(4)]
    for row, n in zip(rows, (3, 4, 5, 4)):
        row["choices"] = {"text": (row["choices"]["text"] * 2)[:n], "label": list("ABCDE"[:n])}
        row["answerKey"] = "A"
    write_part(tmp_path, "opus_arc_easy", "validation", rows)
    task = next(task for task in PAPER_TASKS if task.name == "ARC-E")
    ((row, samples),) = evaluate_tasks(tiny(tokenizer), tokenizer, [task], data=tmp_path)
    assert row["n_samples"] == 2 and all(len(s["nll"]) == 4 for s in samples)


def test_every_task_file_loads_and_asks_what_the_plan_says(tmp_path):
    """All 111 parts, MMLU's 57 and BBH's 27 among them, with one item each."""
    everything = [task for suite in SUITES.values() for task in suite]
    loader = Loader(everything, None, str(tmp_path), lambda: "no")
    manager, parts = loader.manager, {part: task for task in everything for part in loader.parts(task)}
    assert len(parts) == 111 and len(loader.parts(PAPER_TASKS[0])) == 57 and len(loader.parts(OOD_TASKS[0])) == 27
    splits = {part: EVALUATED.get(part, "test") for part in parts}
    assert set(EVALUATED) <= set(parts) and all(name in manager.all_tasks for name in parts)
    write_items(tmp_path / "items", splits, n=1)
    lines = [line for suite in SUITES for line in plan(EvaluationSettings("none", suite, data=str(tmp_path / "items")))]
    assert [line["status"] for line in lines] == [None] * len(everything)
    requests = {line["task"]: line["requests"] for line in lines}
    assert requests == {
        "MMLU": 57 * 4, "ANLI": 9, "HellaSwag": 4, "PIQA": 2, "SIQA": 3, "WinoGrande": 2, "ARC-E": 4, "ARC-C": 4,
        "CommonsenseQA": 5, "WSC": 2, "BBH": 27, "RACE-M": 4, "RACE-H": 4, "AX-b": 2, "AX-g": 2, "StoryCloze": 4,
        "OlympicArena": 6, **{f"SciAssess {field}": 1 for field in ("biology", "chemistry", "material", "medicine")}}
    assert {line["source"] for line in lines} == {"local files"}


def test_without_a_hub_each_task_says_why_it_is_not_run(tokenizer, tmp_path):
    rows = evaluate_paper_suite(tiny(tokenizer), tokenizer, [*PAPER_TASKS, *CPT_TASKS])
    assert [row["task"] for row in rows] == [task.name for task in (*PAPER_TASKS, *CPT_TASKS)]
    for row in rows:
        private = row["task"].startswith("SciAssess")
        assert row["status"].startswith("not run: no public copy" if private else "not run: no hub")
        assert private or row["reason"] == "the cable is out"
        check_eval(json.loads(json.dumps(row)), "evals[0]", "test")


def test_bad_local_files_are_named(tmp_path, tokenizer):
    def status(task, **files):
        folder = tmp_path / task.name
        folder.mkdir(exist_ok=True)
        for part, (split, rows) in files.items():
            write_part(folder, part, split, rows)
        return evaluate_paper_suite(tiny(tokenizer), tokenizer, [task], data=folder)[0]["status"]

    by_name = {task.name: task for suite in SUITES.values() for task in suite}
    items = Items()
    anli = [items.row("anli_r1", 0)]
    assert "local files for 1 of 3 parts; there is none for anli_r2" in status(by_name["ANLI"],
                                                                             anli_r1=("test_r1", anli))
    assert "evaluated on its split validation" in status(by_name["PIQA"], piqa=("test", [items.row("piqa", 0)]))
    hidden = [items.row("opus_ax_b", 0), items.row("opus_ax_b", 1) | {"label": -1}]
    assert "item 1: label -1 is none of its 2 options" in status(by_name["AX-b"], opus_ax_b=("test", hidden))
    assert "not run: " in status(by_name["WSC"], wsc=("validation", [{"text": "a lamp"}]))
    one = [items.row("opus_sciassess_biology", 0)]
    assert "shows 3 worked examples; there is no opus_sciassess_biology.fewshot.jsonl" in status(
        by_name["SciAssess biology"], opus_sciassess_biology=("test", one))
    with pytest.raises(ValueError, match="pika.validation.jsonl belongs to no task"):
        write_part(tmp_path, "pika", "validation", [{}])
        evaluate_paper_suite(tiny(tokenizer), tokenizer, [by_name["PIQA"]], data=tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        evaluate_paper_suite(tiny(tokenizer), tokenizer, [by_name["PIQA"]], data=tmp_path / "nowhere")
    with pytest.raises(KeyError, match="no_such_task"):
        Loader([], None, str(tmp_path), lambda: None).parts(PaperTask("lost", ("no_such_task",), 1))
    with pytest.raises(CannotLoad, match="no_such_task"):
        Loader([], None, str(tmp_path), lambda: None).load(PaperTask("lost", ("no_such_task",), 1))


def test_parquet_serves_as_well(tmp_path, data, outcomes, tokenizer):
    import pandas as pd

    rows = rows_of(data, "piqa", "validation")
    pd.DataFrame(rows).to_parquet(tmp_path / "piqa.validation.parquet")
    task = next(task for task in SMALL if task.name == "PIQA")
    row = evaluate_paper_suite(tiny(tokenizer).double(), tokenizer, [task], batch_size=7, data=tmp_path)[0]
    assert (row["value"], row["items_sha256"]) == tuple(outcomes["PIQA"][0][key] for key in ("value", "items_sha256"))
    write_part(tmp_path, "piqa", "validation", rows)
    with pytest.raises(ValueError, match="two files for split validation of piqa"):
        evaluate_paper_suite(tiny(tokenizer), tokenizer, [task], data=tmp_path)


def test_the_revision_is_read_of_the_addresses_a_data_set_keeps():
    class Kept:
        def __init__(self, checksums, files):
            self.info = type("Info", (), {"download_checksums": checksums})
            self.cache_files = [{"filename": file} for file in files]

    commit = "0123456789abcdef0123456789abcdef01234567"
    assert revision(Kept({f"hf://datasets/cais/mmlu@{commit}/anatomy/test.parquet": {}}, [])) == commit
    assert revision(Kept(None, [f"/cache/cais___mmlu/anatomy/0.0.0/{commit}/mmlu-test.arrow"])) == commit
    assert revision(Kept(None, ["/cache/json/default-123/0.0.0/abc/json-test.arrow"])) is None


def test_a_cell_shows_another_number_of_items():
    def cell(**row):
        record = {"evals": [{"task": "ARC-E", "value": 0.25, **row}]}
        return tables._ours(Row("Random", None, {0: record}), "ARC-E")

    assert cell(n_samples=567, n_paper=567) == "25.00"
    assert cell(n_samples=570, n_paper=567) == "25.00 (570 items, not the paper's)"
    assert cell(n_samples=3200, n_paper=None) == "25.00"


# Generated answers -----------------------------------------------------------------------------------------------


class Mute(PreTrainedModel):
    """A model without generate."""

    config_class = PretrainedConfig


class Chain(PreTrainedModel, GenerationMixin):
    """Says the next word of a chain, whatever came before the last one: answers that are known."""

    config_class = PretrainedConfig
    supports_gradient_checkpointing = False

    def __init__(self, config, following):
        super().__init__(config)
        table = torch.zeros(config.vocab_size, config.vocab_size)
        for a, b in following.items():
            table[a, b] = 50.0
        self.table = torch.nn.Parameter(table, requires_grad=False)

    def forward(self, input_ids, attention_mask=None, **_):
        return CausalLMOutput(logits=self.table[input_ids])

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}


def chain(*words, start):
    """A model that says these words after `start`, then ends; with its tokenizer of one token a word."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys((END, start, *words)))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, unk_token=END)
    said = [vocabulary[word] for word in (start, *words, END)]
    config = PretrainedConfig(vocab_size=len(vocabulary), max_position_embeddings=4096,
                              eos_token_id=vocabulary[END], num_hidden_layers=1, hidden_size=8)
    return Chain(config, dict(zip(said, said[1:]))), tokenizer


def test_bbh_is_the_mean_over_subtasks_of_exact_answers(tmp_path):
    parts = {"bbh_fewshot_navigate": 3, "bbh_fewshot_sports_understanding": 1}
    items = Items()
    for part, n in parts.items():
        write_part(tmp_path, part, "test", [items.row(part, i) for i in range(n)])
    task = PaperTask("BBH", tuple(parts), None, by_part=True)
    model, words = chain("Yes", start="A:")
    ((row, samples),) = evaluate_tasks(model, words, [task], batch_size=2, data=tmp_path)
    assert (row["metric"], row["n_shot"], row["n_samples"]) == ("exact_match", 3, 4)
    assert [s["response"].strip() for s in samples] == ["Yes"] * 4
    assert [part["value"] for part in row["parts"]] == [2 / 3, 1.0]
    assert row["value"] == pytest.approx((2 / 3 + 1) / 2)
    assert row["stderr"] == pytest.approx(math.sqrt(2 / 9 / 3) / 2)


def test_olympicarena_and_sciassess_are_judged_by_their_answers(tmp_path):
    items = Items()
    for subject in ("math", "physics", "chemistry", "biology", "geography", "astronomy"):
        part = f"opus_olympicarena_{subject}"
        rows = [items.row(part, 0) | {"prompt": "choose so:"},
                items.row(part, 0) | {"prompt": "x so:", "answer": ["A"]},
                items.row(part, 0) | {"modality": "multi-modal"}, items.row(part, 0) | {"answer_type": "EX"}]
        write_part(tmp_path, part, "val", rows)
    model, words = chain("thus", r"\boxed{B}", start="so:")
    ((row, samples),) = evaluate_tasks(model, words, CPT_TASKS[:1], batch_size=2, data=tmp_path)
    assert (row["metric"], row["n_shot"], row["value"], row["n_samples"]) == ("acc", 0, 0.5, 12)
    assert r"\boxed{B}" in samples[0]["response"]

    write_items(tmp_path / "more", {"opus_sciassess_biology": "test"}, n=2)
    model, words = chain("since", "Answer:", "b)", "gills", start="Reasoning:")
    ((row, samples),) = evaluate_tasks(model, words, CPT_TASKS[1:2], data=tmp_path / "more")
    assert (row["value"], row["n_shot"], row["n_samples"]) == (1.0, 3, 2)
    examples = tmp_path / "more" / "opus_sciassess_biology.fewshot.jsonl"
    write_part(tmp_path / "more", "opus_sciassess_biology", "fewshot", [
        {key: value for key, value in json.loads(line).items() if key != "reasoning"}
        for line in examples.read_text().splitlines()])
    (row,) = evaluate_paper_suite(model, words, CPT_TASKS[1:2], data=tmp_path / "more")
    assert "needs its `reasoning`" in row["status"]


def test_a_model_that_cannot_generate_is_told(tmp_path, tokenizer):
    write_items(tmp_path, {"bbh_fewshot_navigate": "test"})
    task = PaperTask("BBH", ("bbh_fewshot_navigate",), None)
    short = evaluate_paper_suite(tiny(tokenizer, positions=256), tokenizer, [task], data=tmp_path)[0]
    assert short["status"] == "not run: the model's context is too short" and "256 tokens" in short["reason"]
    mute = Mute(PretrainedConfig(vocab_size=5))
    row = evaluate_paper_suite(mute, tokenizer, [task], data=tmp_path)[0]
    assert row["status"] == "not run: the model cannot generate" and "Mute" in row["reason"]


def test_the_papers_gpt2_generates_what_its_logits_say(tmp_path, tokenizer):
    write_items(tmp_path, {"bbh_fewshot_navigate": "test"}, n=2)
    torch.manual_seed(0)
    model = perturbed(OpusGPT2(OpusGPT2Config(len(tokenizer), 1, 8, 2, 4096, eos_token_id=tokenizer.eos_token_id)))
    prompt = torch.tensor([tokenizer.encode("the old lamp sings near")])
    want = prompt
    with torch.no_grad():
        for _ in range(8):
            want = torch.cat([want, model(input_ids=want).logits[:, -1:].argmax(-1)], 1)
    said = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    assert torch.equal(said, want[:, : said.shape[1]]) and said.shape[1] > prompt.shape[1] + 1
    task = PaperTask("BBH", ("bbh_fewshot_navigate",), None)
    ((row, samples),) = evaluate_tasks(model, tokenizer, [task], batch_size=2, limit=2, data=tmp_path)
    assert row["n_samples"] == 2 and all(isinstance(s["response"], str) for s in samples)


@pytest.mark.parametrize("kind,answer,response,right", [
    ("SC", ["B"], r"so \boxed{B}", True), ("SC", ["B"], r"\boxed{\text{B}}", True), ("SC", ["B"], r"\boxed{A}", False),
    ("SC", ["B"], "B", False), ("SC", ["B"], r"\boxed{B: the second}", True), ("SC", ["B"], r"\boxed{Both}", False),
    ("MC", ["A", "C"], r"\boxed{[C, A]}", True), ("MC", ["A", "C"], r"\boxed{A}", False),
    ("TF", ["True"], r"\boxed{true}", True), ("TF", ["True"], r"\boxed{False}", False),
    ("NV", ["0.5"], r"\boxed{\frac{1}{2}}", True), ("NV", ["3.0"], r"\boxed{3}", True),
    ("NV", ["3"], r"\boxed{3.1}", False), ("NV", ["2000"], r"\boxed{2 \times 10^{3}}", True),
    ("NV", [r"\sqrt{2}"], r"\boxed{\sqrt{2}}", True), ("NV", [r"\sqrt{2}"], r"\boxed{\sqrt{3}}", False),
    ("NV", ["4"], r"\boxed{4} and then \boxed{5}", True),
])
def test_a_boxed_answer_is_judged_by_its_type(kind, answer, response, right):
    assert paper_functions.judge_problem({"answer_type": kind, "answer": answer}, [response]) == {"acc": float(right)}


@pytest.mark.parametrize("response,right", [
    ("since it is so\nAnswer: b) gills", True), ("Answer: (B) gills", True), ("Answer: a) lungs", False),
    ("b) gills", False), ("Answer: a)\nAnswer: b)", True), ("Answer: because", False)])
def test_a_choice_is_judged_by_the_letter_after_the_last_answer(response, right):
    assert paper_functions.judge_choice({"ideal": "b) gills"}, [response]) == {"acc": float(right)}


# The command -----------------------------------------------------------------------------------------------------


def settings_for(folder, data, **changes):
    return EvaluationSettings(str(folder), "ood", data=str(data), batch_size=4, **changes)


@pytest.fixture
def short(monkeypatch):
    """The ood suite without the tasks whose answers are generated."""
    monkeypatch.setitem(SUITES, "ood", tuple(task for task in OOD_TASKS if task.name != "BBH"))


def test_the_command_writes_a_record_and_every_item(folder, data, tmp_path, capsys, short):
    arguments = ["evaluate", "--model", str(folder), "--suite", "ood", "--data", str(data), "--batch-size", "4",
                 "--limit", "2", "--dtype", "bfloat16", "--output", str(tmp_path)]
    assert cli.main([*arguments, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "RACE-M" in shown and "1,436" in shown and "local files" in shown and "0 of 5 tasks cannot" in shown
    assert list(tmp_path.iterdir()) == []
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "the first 4 of 8 items, not the paper's 1,871" in shown
    (record,) = results.load(tmp_path)
    assert (record["config"]["dtype"], record["config"]["limit"], record["config"]["batch_size"]) == ("bfloat16", 2, 4)
    assert "only the first 2 items of each part" in record["deviations"]
    assert "AX-b: 4 items, not the paper's 1,104" in record["deviations"]
    kept = samples_folder(tmp_path, record["run_id"])
    for row in record["evals"]:
        header, samples = read_samples(samples_path(kept, row["task"]))
        assert header["rows"] == [row] and row["value"] == sum(s["correct"] for s in samples) / row["n_samples"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.count("(on disk)") == 5
    assert cli.main(["evaluate", "--model", str(folder), "--suite", "ood", "--limit", "0"]) == 2
    assert "limit must be at least 1, got 0" in capsys.readouterr().err


def test_an_interrupted_evaluation_goes_on_with_the_next_task(folder, data, tmp_path, monkeypatch, short):
    whole = evaluate_model(settings_for(folder, data), tmp_path / "whole")
    inner, asked = paper_suite.evaluate_tasks, []

    def stopping(*arguments, **options):
        for count, found in enumerate(inner(*arguments, **options)):
            if count == 2:
                raise KeyboardInterrupt
            asked.append(found[0]["task"])
            yield found

    monkeypatch.setattr(paper_suite, "evaluate_tasks", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(settings_for(folder, data), tmp_path / "cut")
    assert asked == ["RACE-M", "RACE-H"] and not results.load(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(settings_for(folder, data), tmp_path / "cut")
    again = evaluate_model(settings_for(folder, data), tmp_path / "cut")
    assert asked == [task.name for task in SUITES["ood"]]
    assert results.outcome(again) == results.outcome(whole)
    for name in asked:
        one, other = (read_samples(samples_path(samples_folder(tmp_path / run, whole["run_id"]), name))
                      for run in ("whole", "cut"))
        assert one[1] == other[1] and one[0]["rows"] == other[0]["rows"]


def test_a_task_that_was_not_run_is_tried_again_and_the_record_replaced(folder, data, tmp_path, monkeypatch, short):
    inner = Loader.load

    def out(self, task):
        if task.name == "AX-g":
            raise CannotLoad("no hub", "the cable is out")
        return inner(self, task)

    monkeypatch.setattr(Loader, "load", out)
    first = evaluate_model(settings_for(folder, data), tmp_path)
    assert [row["task"] for row in first["evals"] if row.get("value") is None] == ["AX-g"]
    monkeypatch.setattr(Loader, "load", inner)
    told = []
    second = evaluate_model(settings_for(folder, data), tmp_path, lambda row, kept: told.append((row["task"], kept)))
    assert told == [("RACE-M", True), ("RACE-H", True), ("AX-b", True), ("StoryCloze", True), ("AX-g", False)]
    assert results.load(tmp_path) == [results.read(tmp_path / f"{first['run_id']}.json")]
    assert results.outcome(results.load(tmp_path)[0]) == results.outcome(second)
    assert all(row["value"] is not None for row in second["evals"])


def test_what_changes_the_numbers_changes_the_identity(folder, data, tmp_path, tokenizer, monkeypatch, short):
    monkeypatch.setattr(model_evaluation, "_all_rows", lambda *_: ([], 0.0))
    first = settings_for(folder, data)
    other = write_items(tmp_path / "other", EVALUATED, seed=1)
    longer = tmp_path / "another"
    shutil.copytree(folder, longer)
    changed = [first, dataclasses.replace(first, limit=1), dataclasses.replace(first, dtype="float64"),
               dataclasses.replace(first, batch_size=5), dataclasses.replace(first, data=str(other))]
    ids = [evaluate_model(settings, tmp_path / "runs")["run_id"] for settings in changed]
    assert len(set(ids)) == len(ids)
    assert evaluate_model(dataclasses.replace(first, model=str(longer)), tmp_path / "runs")["run_id"] == ids[0]
    tiny(tokenizer, seed=5).save_pretrained(longer)
    assert evaluate_model(dataclasses.replace(first, model=str(longer)), tmp_path / "runs")["run_id"] not in ids


# Pairs -----------------------------------------------------------------------------------------------------------


def test_two_runs_are_paired_item_by_item(folder, data, tmp_path, tokenizer, short):
    other = tmp_path / "other"
    tiny(tokenizer, seed=3).save_pretrained(other)
    tokenizer.save_pretrained(other)
    runs = [evaluate_model(settings_for(model, data), tmp_path / "runs") for model in (folder, other)]
    paths = [results.record_path(tmp_path / "runs", run["run_id"]) for run in runs]
    pairs = paired_samples(*paths)
    assert len(pairs) == sum(row["n_samples"] for row in runs[0]["evals"]) == 24
    for side, run in zip(("correct_a", "correct_b"), runs):
        means = pairs.groupby("task")[side].mean()
        assert {row["task"]: row["value"] for row in run["evals"]} == means.to_dict()
    assert (pairs.correct_a != pairs.correct_b).any()
    assert paired_samples(paths[0], paths[0]).eval("correct_a == correct_b").all()
    assert set(paired_samples(*paths, tasks=["AX-b"]).task) == {"AX-b"}
    fewer = evaluate_model(settings_for(folder, data, limit=1), tmp_path / "runs")
    with pytest.raises(ValueError, match="AX-b: the runs answered other items"):
        paired_samples(paths[0], results.record_path(tmp_path / "runs", fewer["run_id"]))
    with pytest.raises(ValueError, match="do not both have items of BBH"):
        paired_samples(*paths, tasks=["BBH"])
    with pytest.raises(ValueError, match="has no items"):
        paired_samples(paths[0], tmp_path)


def test_a_separator_of_lines_inside_an_answer_ends_no_line(tmp_path):
    sample = {"part": "t", "doc": 0, "sha": "x", "correct": 1.0, "answer": "one\u2028two\x85"}
    write_samples(tmp_path / "t.jsonl.gz", [{"task": "T"}], [sample, sample], 0.5)
    assert read_samples(tmp_path / "t.jsonl.gz")[1] == [sample, sample]


def test_a_damaged_file_of_items_is_refused(tmp_path):
    path = tmp_path / "task.jsonl.gz"
    write_samples(path, [{"task": "T"}], [{"part": "t", "doc": 0, "sha": "x", "correct": 1.0}], 0.5)
    first = path.read_bytes()
    write_samples(path, [{"task": "T"}], [{"part": "t", "doc": 0, "sha": "x", "correct": 1.0}], 0.5)
    assert path.read_bytes() == first and [p.name for p in tmp_path.iterdir()] == ["task.jsonl.gz"]
    path.write_bytes(first[:-9])
    with pytest.raises(RecordError, match="cannot be read as items .* delete it"):
        read_samples(path)
    import gzip

    path.write_bytes(gzip.compress(gzip.decompress(first).replace(b'"correct":1.0', b'"correct":0.0')))
    with pytest.raises(RecordError, match="does not match its sha256"):
        read_samples(path)


def test_evaluating_leaves_no_trace(data, tokenizer, capfd):
    model = tiny(tokenizer).train()
    state = torch.get_rng_state()
    with undisturbed(model):
        pass
    evaluate_paper_suite(model, tokenizer, [SMALL[1]], data=data)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")
