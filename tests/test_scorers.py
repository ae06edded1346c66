"""Each static scorer against the number worked out by hand, on stand-ins of its published model's form."""

import hashlib
import json
import math
import struct
import unicodedata

import dill
import numpy as np
import pytest
import torch
from datatrove.executor import RayPipelineExecutor, SlurmPipelineExecutor
from tokenizers import processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from baselines import build_selector, score
from baselines.dsir import Dsir
from baselines.fast_text import FastText, dclm, one_line, tokens_line, ultra_fineweb
from baselines.perplexity import ReferenceLoss
from baselines.pipeline import Resources, ScorePool, executor
from baselines.quality import StaticQuality, TextClassifier, classifier_scores
from baselines.raters import CRITERIA, FineWebEdu, QuRating
from baselines.scorers import PUBLISHED, ScorerOptions, build_scorer
from opus_bench.documents.files import Fields, pool_files
from opus_bench.documents.scored import Rule, choose, gumbel, summaries
from test_proxy import TINY, WORDS, chosen, pool, some_texts, tiny_encoder, tiny_tokenizer  # noqa: F401

ONE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
       "vocab_size": len(WORDS) + 2, "max_position_embeddings": 32}


def saved(model, folder, seed=0):
    """A random model and the tiny tokenizer as save_pretrained leaves them; it puts a special token first."""
    torch.manual_seed(seed)
    model.apply(lambda module: [torch.nn.init.normal_(p, std=0.5) for p in module.parameters(recurse=False)])
    model.double().save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing("[UNK] $A", special_tokens=[("[UNK]", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return str(folder)


# DSIR.


def ngram_counts(text, buckets):
    """Unigrams and bigrams in buckets of sha256, written out again."""
    words = text.lower().split()
    counts = np.zeros(buckets)
    for gram in [*words, *(f"{a} {b}" for a, b in zip(words, words[1:]))]:
        counts[int(hashlib.sha256(gram.encode()).hexdigest(), 16) % buckets] += 1
    return counts


def test_dsir_is_the_log_ratio_of_two_bags_of_hashed_words(tmp_path):
    target, others = ["River river stone", "stone king"], ["buy buy now", "king pills now", "river now"]
    scorer = Dsir.fit(target, others, shortest=2, buckets=50)
    p, q = (sum(ngram_counts(text, 50) for text in texts) for texts in (target, others))
    ratio = np.log(p / p.sum() + 1e-8) - np.log(q / q.sum() + 1e-8)
    texts = ["river stone king", "buy now now", "river"]
    want = [float(ratio @ ngram_counts(text, 50)) for text in texts[:2]]
    got = scorer.score(texts)
    np.testing.assert_allclose(got[:2], want, rtol=1e-12)
    assert want[0] > 0 > want[1] and got[2] == -math.inf  # one word is below the shortest
    scorer.save(tmp_path / "fit.npz")
    again = build_scorer("dsir", ScorerOptions(model=str(tmp_path / "fit.npz")))
    assert (again.score(texts) == got).all()
    with pytest.raises(ValueError, match="one of them has none"):
        Dsir.fit([], others)


# fastText.


def write_fasttext(path, words, labels, rows, outputs):
    """A supervised softmax model with the given weights, in fastText's own format (version 12)."""
    def matrix(values):
        return struct.pack("<?qq", False, *values.shape) + values.astype("<f4").tobytes()

    dimension = rows.shape[1]
    content = struct.pack("<ii", 793712314, 12)
    content += struct.pack("<12id", dimension, 5, 1, 1, 5, 1, 3, 3, 0, 0, 0, 100, 1e-4)  # loss softmax, supervised
    content += struct.pack("<iiiqq", len(words) + len(labels), len(words), len(labels), 100, -1)
    for kind, names in ((0, words), (1, labels)):
        for place, name in enumerate(names):
            content += name.encode() + b"\0" + struct.pack("<qb", 50 - place, kind)
    path.write_bytes(content + matrix(rows) + matrix(outputs))
    return str(path)


def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    return rng.normal(size=(3, 4)), rng.normal(size=(2, 4))


def test_dclm_is_the_probability_of_high_quality_of_the_joined_lines(weights, tmp_path):
    rows, outputs = weights
    model = write_fasttext(tmp_path / "m.bin", ["river", "stone", "buy"], ["__label__cc", "__label__hq"], rows, outputs)
    texts = ["river stone\nriver", "buy", "  stone\r\nbuy stone\n"]
    words = [[0, 1, 0], [2], [1, 2, 1]]
    want = [softmax(outputs @ rows[n].mean(0))[1] for n in words]
    np.testing.assert_allclose(dclm(model).score(texts), want, rtol=0, atol=1.2e-5)  # fastText adds 1e-5
    assert build_scorer("dclm", ScorerOptions(model=model)).score(texts).argsort().tolist() == np.argsort(want).tolist()
    assert one_line("  a\nb\r\n") == "a b"


def test_ultra_fineweb_is_one_minus_the_probability_of_low_quality_of_decoded_tokens(weights, tmp_path):
    rows, outputs = weights
    labels = ["__label__neg", "__label__pos"]
    model = write_fasttext(tmp_path / "m.bin", ["river", "stone", "buy"], labels, rows, outputs)
    tiny_encoder().tokenizer.save_pretrained(tmp_path / "tokenizer")
    scorer = ultra_fineweb(model, str(tmp_path / "tokenizer"))
    want = 1 - softmax(outputs @ rows[[0, 1]].mean(0))[0]
    assert abs(scorer.score(["RÏVER Stone"])[0] - want) < 1.2e-5


def test_tokens_line_is_what_the_card_says():
    class Characters:
        def encode(self, text, add_special_tokens):
            assert not add_special_tokens
            return [ord(c) for c in text]

        def decode(self, tokens):
            return "".join(map(chr, tokens))

    assert tokens_line("É\n\n\n\nb\tC  d ", Characters()) == r"e \n \n b \t c d"
    assert unicodedata.normalize("NFKD", "é") == "e\u0301"  # the mark that is dropped


def test_files_that_are_no_such_model_are_refused(weights, tmp_path):
    model = write_fasttext(tmp_path / "m.bin", ["a", "b", "c"], ["__label__x", "__label__y"], *weights)
    with pytest.raises(ValueError, match="has no __label__hq; its labels: __label__x, __label__y"):
        dclm(model)
    (tmp_path / "other.bin").write_bytes(b"no model at all")
    with pytest.raises(ValueError, match="other.bin is no fastText model"):
        FastText(tmp_path / "other.bin", "__label__x", one_line)
    with pytest.raises(ValueError, match="nowhere.bin is no file"):
        dclm(str(tmp_path / "nowhere.bin"))


# Transformers.


def test_fineweb_edu_is_the_logit_of_the_first_tokens(tmp_path):
    where = saved(BertForSequenceClassification(BertConfig(**TINY, num_labels=1)), tmp_path)
    scorer = FineWebEdu(where, max_tokens=6, batch_size=3, device="cpu")
    scorer.model.double()
    texts = some_texts(8)
    for text, got in zip(texts, scorer.score(texts)):
        ids = [1, *tiny_tokenizer().encode(text).ids][:6]
        with torch.no_grad():
            assert abs(scorer.model(input_ids=torch.tensor([ids])).logits.item() - got) < 1e-6 * max(1, abs(got))
    assert FineWebEdu(where).max_tokens == 512
    with pytest.raises(ValueError, match="has 1 outputs, this scorer reads 4"):
        QuRating(where)


def test_qurating_averages_windows_by_their_length(tmp_path):
    config = LlamaConfig(**ONE, num_key_value_heads=2, num_labels=4, pad_token_id=0)
    where = saved(LlamaForSequenceClassification(config), tmp_path)
    scorer = QuRating(where, "facts_and_trivia", max_tokens=4, batch_size=2, device="cpu")
    scorer.model.double()
    texts = [*some_texts(5), ""]
    ratings = scorer.ratings(texts)
    for text, got in zip(texts[:-1], ratings):
        ids = tiny_tokenizer().encode(text).ids
        parts = [ids[n : n + 4] for n in range(0, len(ids), 4)]
        with torch.no_grad():
            rows = [scorer.model(input_ids=torch.tensor([part])).logits[0].numpy() for part in parts]
        want = np.average(rows, axis=0, weights=[len(part) for part in parts])
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * max(1, np.abs(want).max()))
    assert (scorer.score(texts) == ratings[:, 2]).all() and ratings[-1, 0] == -math.inf
    scorer.criterion = "mean"
    assert (scorer.score(texts) == ratings.mean(1)).all()
    assert CRITERIA[0] == "writing_style" and QuRating(where).criterion == "educational_value"
    assert QuRating(where).window == 512
    with pytest.raises(ValueError, match="criterion must be one of writing_style.*got 'style'"):
        QuRating(where, "style")


def test_the_reference_loss_is_that_of_one_text_at_a_time(tmp_path):
    config = GPT2Config(vocab_size=len(WORDS) + 2, n_positions=12, n_embd=16, n_layer=2, n_head=2)
    where = saved(GPT2LMHeadModel(config), tmp_path)
    low, high = (ReferenceLoss(where, keep, max_tokens=7, batch_size=3, device="cpu") for keep in ("low", "high"))
    low.model.double()
    high.model.double()
    texts = ["river", *some_texts(8)]
    got = low.score(texts)
    for text, value in zip(texts[1:], got[1:]):
        ids = torch.tensor(tiny_tokenizer().encode(text).ids[:7])
        if len(ids) > 1:
            with torch.no_grad():
                probabilities = low.model(input_ids=ids[None]).logits[0, :-1].softmax(1)
            assert abs(probabilities[range(len(ids) - 1), ids[1:]].log().mean() - value) < 1e-12
    scored = np.isfinite(got)
    assert not scored[0] and scored.sum() >= 6 and (got[scored] == -high.score(texts)[scored]).all()
    assert ReferenceLoss(where).max_tokens == 12
    with pytest.raises(ValueError, match="keep must be high or low, got 'mid'"):
        ReferenceLoss(where, "mid")


@pytest.mark.parametrize("name", ["fineweb-edu", "qurating", "perplexity", "ultra-fineweb"])
def test_models_out_of_reach_are_named_with_the_mend(name, tmp_path):
    options = ScorerOptions(model=str(tmp_path / "nowhere"), classifier_tokenizer=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="cannot load .*give --"):
        build_scorer(name, options)


# The classifier, and the interface.


def test_the_classifier_is_the_same_fitted_from_a_stream_and_read_again(tmp_path):
    target, others = [f"river stone {n}" for n in range(30)], [f"buy pills {n}" for n in range(40)]
    trained = TextClassifier.train(target, others)
    got = trained.score(["river", "pills", "neither"])
    assert got[0] > 0 > got[1]
    trained.save(tmp_path / "fit.npz")
    again = build_scorer("classifier", ScorerOptions(model=str(tmp_path / "fit.npz")))
    assert (again.score(["river"]) == got[:1]).all()
    streamed = TextClassifier.fit(iter(target), iter(others), negatives=25)
    drawn = sorted(range(40), key=lambda n: gumbel(0, str(n)))[::-1][:25]
    want = TextClassifier.train(target, [others[n] for n in drawn])
    np.testing.assert_allclose(streamed.coefficients, want.coefficients)
    with pytest.raises(ValueError, match="got 1 of the target and 0 of the pool"):
        TextClassifier.fit(["a"], [])


def test_every_scorer_can_stand_in_for_the_classifier_of_a_run(corpus):
    plain = build_selector("quality", {"kept_share": 0.25}, corpus, 24)
    assert (plain.scores == classifier_scores(corpus, 24)[0]).all()
    assert plain.threshold == np.quantile(plain.scores, 0.75)
    options = {"scorer": "dsir", "scorer_options": {"shortest": 1}}
    ratios = build_selector("quality", options, corpus, 24)
    assert np.isfinite(ratios.scores).all() and not (ratios.scores == plain.scores).any()
    assert build_selector("quality", options, corpus, 24).scoring_s == ratios.scoring_s  # scored once
    for bad, words in (({"scorer": "best"}, "unknown scorer 'best'; known: classifier, dsir, dclm"),
                       ({"scorer_options": {"modell": "x"}}, "selector 'quality'.*modell")):
        with pytest.raises(ValueError, match=words):
            build_selector("quality", bad, corpus, 24)


def test_a_sampled_subset_is_drawn_by_gumbel_noise_and_stays_the_same():
    scores = np.linspace(-1, 1, 40)
    sampled = StaticQuality(scores, kept_share=0.25, temperature=0.5, sample_seed=3)
    keys = scores / 0.5 + [gumbel(3, str(n)) for n in range(40)]
    assert (sampled.scores == keys).all() and (sampled.scores >= sampled.threshold).sum() == 10
    assert set(np.argsort(keys)[-10:]) != set(range(30, 40))  # not the ten best
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        StaticQuality(scores, temperature=0)


def test_what_is_known_of_each_scorer_has_a_source_and_says_what_is_not():
    assert all(all(vars(known).values()) and "arXiv" in known.source for known in PUBLISHED.values())


# The pipeline and the command.


@pytest.fixture
def command(pool, tmp_path):  # noqa: F811
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    rows = [json.dumps({"text": f"{text} river river"}) + "\n" for text in some_texts(20, 4)]
    (tmp_path / "target.jsonl").write_text("".join(rows))

    def call(*options, out="out"):
        fixed = ["--pool", pool, "--out", tmp_path / out, "--tokenizer", tmp_path / "tokenizer.json", "--chunk", 6]
        return score.main([str(option) for option in [*fixed, *options]])

    return call


def test_the_command_scores_by_a_pipeline_and_chooses_again_without_it(command, tmp_path, capsys, monkeypatch):
    dsir = ["--scorer", "dsir", "--target", tmp_path / "target.jsonl", "--shortest", 1, "--share", 0.3]
    assert command(*dsir, "--dry-run") == 0 and not (tmp_path / "out").exists()
    assert "a sample at temperature 1" in capsys.readouterr().out
    assert command(*dsir) == 0
    best = chosen(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    fitted = Dsir.load(tmp_path / "out" / "scores" / "fitted.npz")
    assert len(best) == 19 == manifest["chosen"]["documents"] and manifest["pool"]["documents"] == 61
    assert [row["score"] for row in best] == [fitted.score([row["text"]])[0] for row in best]
    assert manifest["published"]["source"] == "arXiv:2302.03169"
    monkeypatch.setattr("baselines.pipeline.executor", None)  # a second rule scores nothing
    assert command(*dsir, "--temperature", 1, "--seed", 1) == 0
    sampled = chosen(tmp_path / "out")
    assert len(sampled) == 19 and {row["id"] for row in sampled} != {row["id"] for row in best}
    monkeypatch.undo()
    assert command(*dsir, "--tasks", 3, out="tasks") == 0
    assert chosen(tmp_path / "tasks") == best and (tmp_path / "tasks" / "logs" / "stats.json").exists()


def test_a_pipeline_that_stopped_goes_on(command, tmp_path, monkeypatch):
    classifier = ["--scorer", "classifier", "--target", tmp_path / "target.jsonl", "--tokens", 50]
    assert command(*classifier, out="whole") == 0
    plain, calls = TextClassifier.score, []

    def dies(self, texts):
        calls.append(len(texts))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(self, texts)

    monkeypatch.setattr(TextClassifier, "score", dies)
    assert command(*classifier) == 130
    assert len(list((tmp_path / "out" / "scores").glob("*.parquet"))) == 3
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert command(*classifier) == 0
    assert sum(calls) - calls[3] == 61
    assert (tmp_path / "out" / "chosen.jsonl").read_bytes() == (tmp_path / "whole" / "chosen.jsonl").read_bytes()


def test_a_step_that_travelled_to_other_processes_scores_its_ranks_files(command, pool, tmp_path):  # noqa: F811
    dsir = ["--scorer", "dsir", "--target", tmp_path / "target.jsonl", "--shortest", 1, "--tokens", 40]
    assert command(*dsir) == 0
    fitted = ScorerOptions(model=str(tmp_path / "out" / "scores" / "fitted.npz"))
    step = ScorePool("dsir", fitted, tmp_path / "two", [str(pool)], Fields(), str(tmp_path / "tokenizer.json"), 6)
    (tmp_path / "two" / "scores").mkdir(parents=True)
    for rank in (1, 0):
        assert not list(dill.loads(dill.dumps(step)).run(rank=rank, world_size=2))
        done = [summary is not None for summary in summaries(tmp_path / "two", pool_files([pool]))]
        assert done == [rank == 0, True, rank == 0, True]
    one, two = (choose(tmp_path / out, pool_files([pool]), Rule(share=1.0)) for out in ("out", "two"))
    assert one.equals(two)


def test_the_executors_of_clusters_get_the_resources(command, tmp_path, monkeypatch, capsys):
    step = ScorePool("dclm", ScorerOptions(), tmp_path, ["pool"], Fields(), "gpt2", 10)
    slurm = executor(step, tmp_path, Resources("slurm", 20, 5, "01:00:00", "cpu", cpus=4, gpus=1, memory_gb=16))
    assert isinstance(slurm, SlurmPipelineExecutor) and slurm.world_size == 20 and slurm.workers == 5
    assert (slurm.time, slurm.partition, slurm.cpus_per_task, slurm.mem_per_cpu_gb) == ("01:00:00", "cpu", 4, 4)
    assert not slurm.skip_completed and slurm.pipeline == [step]
    ray = executor(step, tmp_path, Resources("ray", 20, 5, cpus=4, gpus=1))
    assert isinstance(ray, RayPipelineExecutor) and ray.world_size == 20 and ray.gpus_per_task == 1
    launched = []
    monkeypatch.setattr(SlurmPipelineExecutor, "run", lambda self: launched.append(self.partition))
    classifier = ["--scorer", "classifier", "--target", tmp_path / "target.jsonl", "--tokens", 50]
    classifier += ["--executor", "slurm"]
    assert command(*classifier, "--time", "01:00:00", "--partition", "cpu") == 0 and launched == ["cpu"]
    assert "4 of 4 files are not scored yet" in capsys.readouterr().out
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert command(*classifier) == 2 and "--partition NAME" in capsys.readouterr().err


@pytest.mark.parametrize("options,words", [
    (["--scorer", "best", "--share", 1], "unknown scorer 'best'"),
    (["--scorer", "dsir", "--share", 1], "give --target, or --model"),
    (["--scorer", "dclm", "--share", 1, "--target", "x"], "has weights; leave --target out"),
    (["--scorer", "perplexity", "--share", 1], "needs a reference model"),
    (["--scorer", "dclm"], "give tokens or a share"), (["--scorer", "dclm", "--share", 2], "got 2.0"),
    (["--scorer", "dclm", "--share", 1, "--tasks", 0], "tasks must be at least 1, got 0"),
    (["--scorer", "dclm", "--share", 1, "--model", "no.bin"], "no.bin is no file"),
    (["--scorer", "dclm", "--share", 1, "--text-field", "body"], "a.jsonl row 0: 'body' is NoneType"),
])
def test_bad_options_are_refused_in_one_line(options, words, command, capsys):
    assert command(*options) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]


def test_help_and_list_say_units_defaults_and_sources(capsys):
    for option, words in (("--help", ["GB, slurm and ray", "default: local", "no default"]),
                          ("--list", ["arXiv:2402.09739", "unknown: "])):
        with pytest.raises(SystemExit) as stop:
            score.main([option])
        assert stop.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        assert all(word in text for word in words)
    assert all("default" in action.help for action in score.parser()._actions[1:])
