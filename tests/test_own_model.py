"""The comparison on models, text and optimizer states of one's own: what it reads, measures and refuses."""

import dataclasses
import json
import math
import shutil
import types

import numpy as np
import pandas
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from opus_bench import cli
from opus_bench.gradients import capture, layer_names
from opus_bench.validation import own_inputs, own_model, own_optimizers, own_plan, own_report, own_settings, validate
from opus_bench.validation.own_settings import MEASURES, OwnSettings
from test_cli import error_line

LENGTH = 16
SMALL = ["--length", LENGTH, "--candidates", 8, "--proxy-size", 4, "--proxy-pairs", 2, "--windows", 8,
         "--widths", 64, 512, "--hash-seeds", 2, "--oracle-candidates", 2, "--optimizer-steps", 2, "--batch-size", 4]
FIVE_SIGMA = 5.0


def invented(count, seed=0):
    """Documents of words of few letters."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("abcdef"), size=rng.integers(2, 5))) for _ in range(30)]
    return [" ".join(rng.choice(words, size=20)) for _ in range(count)]


def write_text(path, texts):
    """One file in the format that its name says."""
    if path.suffix == ".txt":
        path.write_text("\n \n".join(texts) + "\n")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"n": 1, "text": t}) for t in texts) + "\n")
    else:
        pandas.DataFrame({"text": texts}).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three models with a tokenizer in gpt2's and llama's folder, and text."""
    folder = tmp_path_factory.mktemp("own")
    texts = invented(120)
    write_text(folder / "text.txt", texts)
    write_text(folder / "proxy.jsonl", invented(30, seed=1))
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<eos>"],
                                                       show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", eos_token="<eos>")
    size = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)
    torch.manual_seed(0)
    made = {
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=2, n_head=2)),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**size, head_dim=8, tie_word_embeddings=False)),
        "llama": LlamaForCausalLM(LlamaConfig(**size, tie_word_embeddings=True)),
    }
    with own_inputs.quiet():
        for name, model in made.items():
            model.save_pretrained(folder / name)
            if name != "qwen3":
                tokenizer.save_pretrained(folder / name)
    return folder


def run(*arguments):
    return cli.main([str(a) for a in ("validate", *arguments)])


def settings_for(folder, name="gpt2", **changes):
    small = dict(length=LENGTH, candidates=8, proxy_size=4, proxy_pairs=2, windows=(8,), widths=(64, 512), hash_seeds=2,
                 oracle_candidates=2, optimizer_steps=2, batch_size=4)
    return OwnSettings(str(folder / name), str(folder / "text.txt"), **{**small, **changes})


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def found(folder):
    """One comparison as plain values."""
    torch.set_num_threads(1)
    return json.loads(json.dumps(own_model.compare(own_plan.prepare(settings_for(folder))).plain()))


# Runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name,optimizer", [("gpt2", "sgd"), ("qwen3", "adamw"), ("llama", "muon")])
def test_any_architecture_and_optimizer_is_exact_and_reported(folder, tmp_path, capsys, name, optimizer):
    before = files_of(folder)
    page, numbers = tmp_path / "report.md", tmp_path / "numbers.json"
    code = run("--model", folder / name, "--tokenizer", folder / "gpt2", "--data", folder / "text.txt", "--optimizer",
               optimizer, "--layers", "all", *SMALL, "--threshold", "oracle_float64=1e-10", "--threshold",
               f"variance_sigmas={FIVE_SIGMA}", "--report", page, "--output", numbers)
    assert code == 0 and files_of(folder) == before
    content, printed = json.loads(numbers.read_text()), capsys.readouterr().out
    assert content["oracle"][0]["dtype"] == "float64" and content["oracle"][1]["dtype"] == "float32"
    assert max(content["oracle"][0]["alignment"], content["oracle"][0]["gram"]) < 1e-10
    assert content["model"]["scored_parameters"] == content["model"]["parameters"]
    assert content["training_loss"][0] == pytest.approx(math.log(len(load_tokenizer(folder))), rel=0.05)
    assert page.read_text() == own_report.markdown(content)
    assert own_report.text(own_report.found_sections(content)) in printed
    assert f"| command | {content['command']} |" in page.read_text() and str(page) in content["command"]
    for row in content["sketch"]:
        line = next(line for line in page.read_text().splitlines() if line.startswith(f"| {row['width']} |"))
        assert f"{row['utility_spearman']:.4f} (" in line and f"{row['predicted_scatter']:.4f}" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numbers.json", "report.md"]


def load_tokenizer(folder):
    return PreTrainedTokenizerFast.from_pretrained(folder / "gpt2")


def test_exit_code_1_says_which_threshold_is_missed(folder, capsys, tmp_path):
    page = tmp_path / "report.md"
    code = run("--model", folder / "gpt2", "--data", folder / "text.txt", *SMALL, "--threshold", "effective_share=0.5",
               "--threshold", "oracle_float64=1e-10", "--threshold", "sketch_error=0", "--report", page)
    verdicts = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines()
                if line.split()[:1] and line.split()[0] in MEASURES}
    assert code == 1
    assert verdicts == {"effective_share": "MISSED", "oracle_float64": "met", "sketch_error": "MISSED"}
    assert page.read_text().count("| MISSED |") == 2


def test_the_oracle_sees_a_wrong_utility_and_the_threshold_is_missed(folder, monkeypatch, tmp_path):
    from opus_bench.validation import problem

    right = problem.exact_utility

    def wrong(*args):
        got = right(*args)
        gram = None if got.gram is None else 0.98 * got.gram
        return dataclasses.replace(got, alignment=1.01 * got.alignment, gram=gram)

    monkeypatch.setattr(problem, "exact_utility", wrong)
    numbers = tmp_path / "numbers.json"
    assert run("--model", folder / "gpt2", "--data", folder / "text.txt", *SMALL, "--threshold", "oracle_float64=1e-3",
               "--output", numbers) == 1
    content = json.loads(numbers.read_text())
    assert content["oracle"][0]["alignment"] == pytest.approx(0.01)
    assert content["oracle"][0]["gram"] == pytest.approx(0.02)
    assert content["thresholds"][0]["measured"] == pytest.approx(0.02) and "DIFFER" in content["verdict"]


@pytest.mark.parametrize("proxies,used", [(3, 2), (4, 4)])
def test_norms_that_round_to_float32_inside_do_not_hide_the_algebra(folder, monkeypatch, proxies, used):
    """A mean over three proxies would round the backward of Qwen3's norms otherwise than one over their sum."""
    seen = []
    plain = own_model.scoring
    monkeypatch.setattr(own_model, "scoring", lambda *args: seen.append(len(args[3])) or plain(*args))
    plan = own_plan.prepare(settings_for(folder, "qwen3", tokenizer=str(folder / "gpt2"), layers=("all",)))
    model = own_inputs.read_model(plan.settings)
    optimizers = own_optimizers.build_optimizers(model, plan.settings)
    exact, _ = own_model.oracle_errors(model, optimizers, plan.candidates[:3], plan.proxies[0][0][:proxies], ["all"])
    assert max(exact.alignment, exact.gram) < 1e-12 and seen == [used, used]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_measures_are_those_of_validate(folder, optimizer):
    """The same numbers from the functions that measure the small model."""
    s = settings_for(folder, "llama", optimizer=optimizer)
    plan = own_plan.prepare(s)
    got = own_model.compare(plan, progress=False)
    model = own_inputs.read_model(s)
    optimizers = own_optimizers.build_optimizers(model, s)
    losses = trained_by_hand(model, optimizers, plan)
    few = plan.candidates[:2]
    assert got.training_loss == pytest.approx((losses[0], losses[-1]), rel=1e-6) and losses[0] != losses[-1]
    for mine, theirs in zip(got.floor, validate.noise_floor(model, optimizers, plan.candidates, plan.proxies, [8])):
        assert mine == theirs
    for mine, theirs in zip(got.oracle, validate.oracle_errors(model, optimizers, few, plan.proxies[0][0])):
        assert (mine.dtype, mine.candidates) == (theirs.dtype, theirs.candidates)
        # both are rounding, which depends on the order of sums
        eps = torch.finfo(getattr(torch, mine.dtype)).eps
        assert max(mine.alignment, mine.gram, theirs.alignment, theirs.gram) < 100 * eps
    problem = validate.scoring(model, optimizers, plan.candidates, plan.proxies[0][0])
    seeds = [validate.HASH_SEED_STEP * i for i in (1, 2)]
    assert list(got.sketch) == [validate.sketch_fidelity(problem, width, seeds) for width in (64, 512)]


def trained_by_hand(model, optimizers, plan):
    """Steps on the plan's sequences, written out; the losses."""
    losses = []
    for batch in plan.training.split(plan.settings.batch_size):
        logits = model(input_ids=batch).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("optimizer,grouped", [("adamw", False), ("adamw", True), ("muon", False), ("sgd", True)])
def test_a_saved_state_scores_as_the_live_one(folder, tmp_path, optimizer, grouped):
    """Steps in memory, or steps by hand that are saved: the same numbers, bit for bit."""
    s = settings_for(folder, "llama", optimizer=optimizer, proxy_data=str(folder / "proxy.jsonl"), lr=1e-3)
    plan = own_plan.prepare(s)
    live = own_model.compare(plan, progress=False).plain()
    model = own_inputs.read_model(s)
    optimizers = own_optimizers.build_optimizers(model, s)
    if grouped:
        decayed = [p for k, p in model.named_parameters() if "norm" not in k]
        rest = [p for k, p in model.named_parameters() if "norm" in k]
        optimizers = [type(optimizers[0])([{"params": decayed}, {"params": rest}], lr=1e-3) for _ in "1"]
        for name in ("betas", "weight_decay", "momentum"):
            for group in optimizers[0].param_groups:
                if name in group:
                    group[name] = {"betas": (0.9, 0.95), "weight_decay": 0.0, "momentum": 0.95}[name]
    trained_by_hand(model, optimizers, plan)
    with own_inputs.quiet():
        model.save_pretrained(tmp_path / "model")
    states = [o.state_dict() for o in optimizers]
    torch.save(states if len(states) > 1 else states[0], tmp_path / "state.pt")
    s = dataclasses.replace(s, model=str(tmp_path / "model"), tokenizer=s.model, optimizer_steps=None, lr=None,
                            optimizer_state=str(tmp_path / "state.pt"))
    saved = own_model.compare(own_plan.prepare(s), progress=False).plain()
    assert saved["training_loss"] is None and saved["settings"]["optimizer_steps"] == 0
    assert saved["rates"] == {k: v * (2 if grouped else 1) for k, v in live["rates"].items()}
    for name in ("oracle", "sketch", "arms", "floor"):
        assert saved[name] == live[name], name
    dull = own_model.compare(own_plan.prepare(dataclasses.replace(s, optimizer_state=None, optimizer_steps=0, lr=1e-3)))
    assert (dull.plain()["sketch"] != saved["sketch"]) == (optimizer != "sgd")  # the state is what made the difference


def test_equal_settings_give_equal_numbers_and_the_seed_matters(folder, found):
    again = json.loads(json.dumps(own_model.compare(own_plan.prepare(settings_for(folder))).plain()))
    drop = ("seconds", "memory_free")
    assert {k: v for k, v in again.items() if k not in drop} == {k: v for k, v in found.items() if k not in drop}
    plans = [own_plan.prepare(settings_for(folder, seed=seed)) for seed in (0, 1)]
    assert not torch.equal(plans[0].candidates, plans[1].candidates)


def test_half_precision_is_sketched_in_float32_and_says_what_could_not_run(folder, capsys, tmp_path):
    numbers = tmp_path / "numbers.json"
    assert run("--model", folder / "gpt2", "--data", folder / "text.txt", "--dtype", "bfloat16", "--optimizer", "muon",
               *SMALL, "--threshold", f"variance_sigmas={FIVE_SIGMA}", "--output", numbers) == 0
    content = json.loads(numbers.read_text())
    assert [e["dtype"] for e in content["oracle"]] == ["float64", "bfloat16"]
    assert content["oracle"][0]["alignment"] < 1e-10 < content["oracle"][1]["alignment"] < 0.1
    assert bool(content["arms"]) != bool(content["arms_reason"])
    printed = capsys.readouterr().out
    assert "numbers hashed, in float32" in printed and ("not run: the selector" in printed) == (not content["arms"])


def test_dry_run_needs_no_weights_and_stops(folder, tmp_path, capsys):
    shutil.copytree(folder / "llama", tmp_path / "llama")
    (tmp_path / "llama" / "model.safetensors").unlink()
    report = tmp_path / "report.md"
    asked = ["--model", tmp_path / "llama", "--data", folder / "text.txt", *SMALL]
    assert run(*asked, "--dry-run", "--report", report) == 0
    printed = capsys.readouterr().out
    parameters = sum(p.numel() for p in LlamaForCausalLM.from_pretrained(folder / "llama").parameters())
    assert f"{parameters:,} parameters" in printed and "14 layers (blocks)" in printed
    assert "2 steps on 4 sequences each, 128 tokens" in printed and "free now" in printed
    assert not report.exists() and "Verdict" not in printed


# Thresholds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name,value", [
    ("oracle_float64", lambda f: max(f["oracle"][0]["alignment"], f["oracle"][0]["gram"])),
    ("oracle_dtype", lambda f: max(f["oracle"][1]["alignment"], f["oracle"][1]["gram"])),
    ("sketch_spearman", lambda f: f["sketch"][1]["utility_spearman"]),
    ("sketch_error", lambda f: f["sketch"][1]["alignment_error"]),
    ("variance_sigmas", lambda f: max(abs(x["variance_ratio"] - 1) / x["variance_ratio_stderr"] for x in f["sketch"])),
    ("proxy_spearman", lambda f: f["floor"][0]["spearman"]),
    ("window_spearman", lambda f: f["floor"][1]["spearman"]),
    ("effective_share", lambda f: f["arms"][0]["effective_share"]),
])
def test_a_threshold_is_met_at_the_measured_value_and_missed_beyond(found, name, value):
    measured = value(found)
    worse = 1 if name.endswith("spearman") else -1  # a higher least, a lower most
    for bound, met in ((measured, True), (measured + worse * 1e-17 + worse * abs(measured) * 1e-9, False)):
        (judged,) = own_settings.judge(found, {name: bound})
        assert judged["measured"] == measured and judged["met"] is met


def test_every_measure_is_covered_and_what_was_not_run_is_missed(found):
    assert {"min", "max"} == {m.sense for m in MEASURES.values()} and len(MEASURES) == 8
    bare = {**found, "oracle": [], "arms": [], "floor": found["floor"][:1]}
    judged = own_settings.judge(bare, {"oracle_float64": 1.0, "effective_share": 1.0, "window_spearman": -1.0})
    assert [(j["measured"], j["met"]) for j in judged] == [(None, False)] * 3
    broken = {**found, "floor": [{**found["floor"][0], "spearman": math.nan}]}
    assert not own_settings.judge(broken, {"proxy_spearman": -1.0})[0]["met"]


def test_thresholds_look_at_the_papers_width_or_the_largest():
    assert own_settings.threshold_width((512, 8192, 32768)) == 8192
    assert own_settings.threshold_width((512, 64)) == 512


# Data -------------------------------------------------------------------------------------------


def test_text_of_every_kind_gives_the_tokenizers_ids(folder, tmp_path):
    texts = invented(9, seed=3)
    tokenizer = load_tokenizer(folder)
    ids = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    want = np.array(ids[: len(ids) // 16 * 16]).reshape(-1, 16)
    s = settings_for(folder)
    for kind in (".txt", ".jsonl", ".parquet"):
        path = write_text(tmp_path / f"x{kind}", texts)
        assert np.array_equal(own_inputs.sequences(str(path), s, 16), want), kind
        few = own_inputs.sequences(str(path), dataclasses.replace(s, text_tokens=50), 16)
        assert np.array_equal(few, want[:3])


def test_token_ids_of_every_kind_are_read_as_they_are(folder, tmp_path):
    ids = np.arange(50, dtype=np.uint16)
    want = np.arange(48).reshape(3, 16)
    s = settings_for(folder)
    np.save(tmp_path / "flat.npy", ids)
    torch.save(torch.arange(50), tmp_path / "flat.pt")
    ids.tofile(tmp_path / "flat.bin")
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, 1, 50
    (tmp_path / "shard.bin").write_bytes(header.tobytes() + ids.tobytes())
    for name in ("flat.npy", "flat.pt", "flat.bin", "shard.bin"):
        assert np.array_equal(own_inputs.sequences(str(tmp_path / name), s, 16), want), name
    ids.astype("<i4").tofile(tmp_path / "wide.bin")
    wide = dataclasses.replace(s, token_dtype="int32")
    assert np.array_equal(own_inputs.sequences(str(tmp_path / "wide.bin"), wide, 16), want)
    np.save(tmp_path / "rows.npy", np.arange(60).reshape(3, 20))
    rows = own_inputs.sequences(str(tmp_path / "rows.npy"), s, 16)
    assert np.array_equal(rows, np.arange(60).reshape(3, 20)[:, :16])


def test_no_sequence_serves_two_purposes(folder):
    s = settings_for(folder, proxy_pairs=5)
    data = np.arange(40 * LENGTH).reshape(40, LENGTH)
    candidates, training, pairs = own_plan._drawn(data, None, s)
    rows = [set(x[:, 0].tolist()) for x in (candidates, training, torch.cat([p for pair in pairs for p in pair]))]
    assert [len(candidates), len(training)] == [8, 8] == [len(rows[0]), len(rows[1])]
    assert not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]
    assert all(len(set(torch.cat(pair)[:, 0].tolist())) == 8 for pair in pairs)
    assert len({tuple(x[:, 0].tolist()) for x, _ in pairs}) == 5
    least = data[:24]  # 8 candidates, 8 to train on, 2 times 4 of the proxy
    own_plan._drawn(least, None, s)
    with pytest.raises(ValueError, match=r"has 368 tokens in whole sequences of 16, 384 are needed \(24 sequences\)"):
        own_plan._drawn(least[:-1], None, s)
    other = dataclasses.replace(s, proxy_data="other.npy")
    own_plan._drawn(least[:16], data[:8], other)
    with pytest.raises(ValueError, match="other.npy has 112 tokens .* 128 are needed"):
        own_plan._drawn(least[:16], data[:7], other)


def test_memory_counts_the_factors_that_are_held(folder):
    s = settings_for(folder)
    model = own_inputs.read_model(s)
    names = layer_names(model)
    gradients = capture(model, torch.zeros(8, LENGTH, dtype=torch.long), names)
    factors = sum(x.nbytes for k, g in gradients.items() if g.shape[1] > 1 for use in g.uses
                  for x in (use.left, use.right))
    parameters = sum(p.numel() for p in model.parameters())
    scored = sum(math.prod(g.shape) for g in gradients.values())
    logits = model(torch.zeros(8, LENGTH, dtype=torch.long)).logits.nbytes
    plan = own_plan.prepare(s)
    assert (plan.parameters, plan.scored_parameters, plan.scored_layers) == (parameters, scored, len(names))
    assert plan.memory["scoring"] == 4 * (3 * parameters + 2 * scored) + factors + 2 * logits


def test_an_oracle_too_large_is_left_out_with_its_reason(folder, monkeypatch, capsys):
    memory = own_plan.prepare(settings_for(folder, oracle_candidates=8, candidates=8)).memory
    room = max(memory["scoring"], memory["optimizer steps"])
    monkeypatch.setattr(own_plan, "memory_needed", lambda *_: {**memory, "oracle": room + 2})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=room + 1))
    asked = ["--model", folder / "gpt2", "--data", folder / "text.txt", *SMALL]
    line = error_line(capsys, ["validate", *asked, "--threshold", "oracle_float64=1"])
    assert "oracle_float64 needs the oracle" in line and "lower --oracle-candidates" in line
    assert run(*asked) == 0
    printed = capsys.readouterr().out
    assert "1. Exact?  not run: needs at least" in printed and "equal autograd's" not in printed
    assert "factored utilities not compared with autograd's (needs at least" in printed
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=room - 1))
    assert "lower --candidates" in error_line(capsys, ["validate", *asked])


# Refusals ---------------------------------------------------------------------------------------


@pytest.fixture
def uncomputed(monkeypatch):
    """Nothing may be computed."""
    monkeypatch.setattr(own_model, "compare", lambda *_: pytest.fail("bad input was not seen before the computing"))


@pytest.mark.parametrize("arguments,words", [
    (["--threshold", "speed=1"], "no threshold named 'speed'; known: oracle_float64, "),
    (["--threshold", "sketch_spearman"], "sketch_spearman needs a finite number, as sketch_spearman=0.5"),
    (["--threshold", "sketch_spearman=nan"], "needs a finite number"),
    (["--threshold", "sketch_error=1", "--threshold", "sketch_error=2"], "sketch_error is given twice"),
    (["--threshold", "oracle_dtype=1", "--oracle-candidates", "0"], "needs the oracle, which is not run"),
    (["--threshold", "window_spearman=1", "--windows"], "give --windows"),
    (["--length", "33"], "longer than the model's context of 32"),
    (["--length", "1"], "length must be at least 2, got 1"),
    (["--windows", "16"], "2 to 15 tokens, fewer than length, got 16"),
    (["--candidates", "3"], "candidates must be at least 4, got 3"),
    (["--candidates", "4", "--oracle-candidates", "5"], "5 are more than the 4 candidates"),
    (["--hash-seeds", "1"], "hash_seeds must be at least 2, got 1"),
    (["--widths", "0"], "width must be at least 1 bucket, got 0"),
    (["--lr", "0"], "lr must be a positive number, got 0.0"),
    (["--adam-lr", "1"], "adam_lr is of what muon leaves"),
    (["--layers", "*.nothing.*"], "no layer that can be scored matches"),
    (["--steps", "3"], "--steps and --scale are of the small model"),
    (["--candidates", "4000"], "are needed (4016 sequences)"),
    (["--dtype", "float16"], "invalid choice: 'float16'"),
    (["--tokenizer", "../absent"], "../absent is no folder and no hub id"),
    (["--optimizer-state", "absent.pt"], "absent.pt is no file"),
])
def test_bad_input_is_one_line_before_any_computing(folder, capsys, uncomputed, arguments, words):
    common = ["validate", "--model", folder / "gpt2", "--data", folder / "text.txt", *SMALL]
    assert words in error_line(capsys, [*common, *arguments])


@pytest.mark.parametrize("name,content,words", [
    ("absent.txt", None, "is no file"),
    ("x.csv", b"a", "is none of .txt, .jsonl"),
    ("x.jsonl", b'{"text": "a"}\n{"body": "a"}', "line 2 has no text under 'text'; give --text-field"),
    ("x.jsonl", b'{"text": "a"}\n\nnonsense', "line 3 is no JSON"),
    ("x.parquet", b"nonsense", "cannot read text of"),
    ("x.npy", b"nonsense", "cannot read token ids of"),
    ("x.npy", np.zeros((40, 16)), "holds float64 of shape (40, 16)"),
    ("x.npy", np.zeros((40, 15), dtype=int), "have 15 tokens, 16 are needed; lower --length"),
    ("x.npy", np.full((40, 16), 999), "token ids from 999 to 999, the model's vocabulary"),
    ("x.npy", np.full((40, 16), -1), "token ids from -1 to -1"),
    ("x.pt", {"ids": 1}, "it holds a dict, not a tensor"),
    ("x.bin", b"123", "cannot read token ids of"),
    ("x.txt", b"\xff\xfe\xff", "cannot read text of"),
    ("x.txt", b"", "has 0 tokens in whole sequences of 16, 384 are needed"),
])
def test_bad_data_is_one_line_before_any_computing(folder, tmp_path, capsys, uncomputed, name, content, words):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, np.ndarray):
        np.save(path, content)
    elif content is not None:
        torch.save(content, path)
    line = error_line(capsys, ["validate", "--model", folder / "gpt2", "--data", path, *SMALL])
    assert words in line and name in line


def test_a_config_in_the_cache_is_not_taken_for_the_weights(monkeypatch):
    name = "Qwen/Qwen3-8B-Base"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: f"cache/{file}")
    monkeypatch.setattr(own_inputs, "hub_problem", lambda: None)
    assert own_inputs.place(name, "model") == {"pretrained_model_name_or_path": name}
    monkeypatch.setattr(own_inputs, "hub_problem", lambda: "the cable is out")
    assert own_inputs.place(name, "model") == {"pretrained_model_name_or_path": name, "local_files_only": True}


def test_a_hub_that_cannot_be_reached_is_one_line(folder, capsys, monkeypatch, uncomputed):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    line = error_line(capsys, ["validate", "--model", "no-such/model", "--data", folder / "text.txt"])
    assert "no-such/model" in line and "HF_HUB_OFFLINE is set" in line and "give a folder that save_pretrained" in line
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("opus_bench.evaluation.paper_suite.hub_problem", lambda: "the cable is out")
    assert "(the cable is out)" in error_line(capsys, ["validate", "--model", "no-such/model", "--data",
                                                       folder / "text.txt"])
    line = error_line(capsys, ["validate", "--model", folder / "gpt2", "--tokenizer", "no-such/tokenizer", "--data",
                               folder / "text.txt"])
    assert "tokenizer 'no-such/tokenizer'" in line


def test_a_model_that_is_not_whole_is_refused(folder, tmp_path, capsys):
    """transformers would fill a missing weight at random."""
    shutil.copytree(folder / "gpt2", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    asked = ["validate", "--model", tmp_path / "model", "--data", folder / "text.txt", *SMALL]
    weights = load_file(path)
    weights.pop("transformer.h.0.attn.c_attn.weight")
    save_file(weights, path, metadata={"format": "pt"})
    assert "lacks weights" in (line := error_line(capsys, asked)) and "h.0.attn.c_attn.weight" in line
    path.write_bytes(path.read_bytes()[:-7])
    assert "cannot read the weights of" in error_line(capsys, asked)
    path.unlink()
    assert "cannot read the weights of" in error_line(capsys, asked)
    torch.save(load_file(folder / "gpt2" / "model.safetensors"), path.with_name("pytorch_model.bin"))
    assert "safetensors" in error_line(capsys, asked)  # a pickle is not read
    (tmp_path / "model" / "config.json").write_text("{")
    assert "cannot read the config of" in error_line(capsys, asked)
    (tmp_path / "model" / "config.json").unlink()
    assert "holds no config.json" in error_line(capsys, asked)


def test_a_model_without_a_tokenizer_names_the_mend(folder, capsys):
    asked = ["validate", "--model", folder / "qwen3", "--data", folder / "text.txt", *SMALL]
    assert "give --tokenizer, or token ids as --data" in error_line(capsys, asked)


def test_states_that_do_not_fit_are_refused(folder, tmp_path, capsys):
    path = tmp_path / "state.pt"
    asked = ["validate", "--model", folder / "gpt2", "--data", folder / "text.txt", *SMALL, "--optimizer-state", path]
    s = settings_for(folder)
    model = own_inputs.read_model(s)

    def stepped(parameters, lr=1e-3):
        optimizer = torch.optim.AdamW(parameters, lr=lr)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()
        return optimizer.state_dict()

    path.write_bytes(b"nonsense")
    assert "cannot read an optimizer's state of" in error_line(capsys, asked)
    torch.save({"a": 1}, path)
    assert "must hold the state_dict() of AdamW" in error_line(capsys, asked)
    assert "of Muon then AdamW in a list" in error_line(capsys, [*asked, "--optimizer", "muon"])
    parameters = list(model.parameters())
    torch.save(stepped(parameters[:3]), path)
    assert "does not fit AdamW of this model" in error_line(capsys, asked)
    torch.save(stepped(parameters[::-1]), path)
    assert "was it saved for this model and optimizer?" in error_line(capsys, asked)
    torch.save(stepped(parameters, lr=0.0), path)
    assert "is 0, which makes every utility 0; give --lr" in error_line(capsys, asked)
    assert run(*asked[1:], "--lr", "0.001") == 0


def test_options_that_do_not_go_together_are_refused(folder, tmp_path, capsys, uncomputed):
    assert "--data is for a model of your own; give --model" in error_line(capsys, ["validate", "--data", "x.txt"])
    for extra in (["--threshold", "sketch_error=1"], ["--report", "x.md"], ["--dry-run"], ["--oracle-candidates", "0"]):
        assert f"{extra[0]} is for a model of your own" in error_line(capsys, ["validate", *extra])
    assert "adamw or muon, got 'sgd'" in error_line(capsys, ["validate", "--optimizer", "sgd"])
    own = ["validate", "--model", folder / "gpt2"]
    assert "give --data" in error_line(capsys, own)
    own += ["--data", folder / "text.txt"]
    one = tmp_path / "one"
    assert "give two names" in error_line(capsys, [*own, "--output", one, "--report", one])
    one.write_text("precious")
    assert "exists; give --force" in error_line(capsys, [*own, "--report", one])
    assert one.read_text() == "precious"


def test_option_names_are_fields_of_the_settings():
    options = cli.parser().parse_args(["validate"])
    assert set(cli.OWN) < {f.name for f in dataclasses.fields(OwnSettings)}
    assert all(getattr(options, name) is None for name in cli.OWN)
    assert OwnSettings("", "").widths == cli.WIDTHS
