"""The command of pre-training: its plan, a Qwen3 of two layers end to end, torchrun, and its errors."""

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import shared_jobs as jobs
import torch
from shared_faults import write_pools
from transformers import AutoModelForCausalLM

from opus_bench.distributed import pretrain as training
from opus_bench import results
from reproduce import pretrain as command
from reproduce.paper_commands import CPT_TASKS
from reproduce.paper_settings import GPT2_LARGE, QWEN3_8B
from reproduce.presets import METHODS, PRESETS, WINDOW
from reproduce.pretrain_plan import checkpoint_bytes

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--steps", "4", "--length", "12", "--buffer", "4", "--window", "10", "--proxy-size", "4",
         "--validation-every", "2", "--validation-sequences", "3", "--checkpoint-every", "2", "--precision", "float32"]


def knobs(method, **values):
    return ["--model", "ci", "--method", method, "--selector-options", json.dumps(values)]


def without_window():
    at = SMALL.index("--window")
    return SMALL[:at] + SMALL[at + 2:]


class CountedPool(jobs.FakePool):
    """Invented tokens with what a pool of shards says of itself."""

    vocab_size, token_count, domains = 50, 120_000, ("a", "b")

    def __init__(self, where, verify=True):
        super().__init__(len(str(where)))
        self.sha256 = f"{self.seed:064x}"

    def sequence_count(self, length):
        return self.token_count // length


@pytest.fixture
def qwen3(tmp_path):
    torch.manual_seed(0)
    model = jobs.small_qwen3()
    model.generation_config.update(do_sample=True, temperature=0.6)
    model.save_pretrained(tmp_path / "qwen3")
    return tmp_path / "qwen3"


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """The command in this process, on invented pools; its exit code, and what it printed and complained of."""
    monkeypatch.setattr(command, "ShardPool", CountedPool, raising=False)

    def run(*arguments):
        where = ["--data", "pool", "--proxy", "proxies", "--results", str(tmp_path / "results")]
        code = command.main([*map(str, arguments), *where])
        if torch.distributed.is_initialized():  # an interrupted process ends, and its group with it
            torch.distributed.destroy_process_group()
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_the_presets_are_the_papers_settings():
    large, xl, qwen = (PRESETS[name] for name in ("gpt2-large", "gpt2-xl", "qwen3-8b"))
    for preset in PRESETS.values():
        c = preset.config
        assert preset.tokens <= c.update_tokens < preset.tokens + c.selected_size * c.length
        assert (c.selection_ratio, c.proxy_size, c.proxy_length) == (0.5, 8, WINDOW)
        assert any("schedule" in line and "not published" in line for line in preset.decided)
    # the token ratio of scoring, (N + proxy) 512 / (rho N L): 4.69 % for Large with N = 64, 20.8 % for XL with 32
    ratios = [(p.config.buffer + 8) * 512 / (p.config.selected_size * p.config.length) for p in (large, xl)]
    assert ratios == [pytest.approx(0.0469, abs=5e-5), pytest.approx(0.208, abs=5e-4)]
    assert qwen.config.update_tokens // qwen.config.steps == 8 * 4096 and qwen.processes == 8
    assert (qwen.config.adam_lr, qwen.config.muon_lr, qwen.config.warmup) == (1e-6, 1e-5, 0.01)


def test_dry_run_prints_the_plan_and_makes_nothing(call, tmp_path):
    code, out, _ = call("--model", "gpt2-xl", "--optimizer", "muon", "--dry-run")
    assert code == 0 and not (tmp_path / "results").exists()
    assert "305,176 steps" not in out and "305,176 x 16 of 32 sequences x 6,144 tokens" in out
    parameters = 50_304 * 1600 + 48 * 12 * 1600**2
    assert f"{parameters:,} parameters" in out
    held = 4 * (6 * parameters - 48 * 12 * 1600**2) / 2**30
    assert f"{held:.2f} GiB a process" in out
    assert "learning-rate schedule not published" in out and "proxy_size 32 instead of 8" in out


@pytest.mark.parametrize("method", ["opus-paper", "ppl-low", "greats"])
def test_a_qwen3_trains_and_its_record_is_complete(call, qwen3, tmp_path, method):
    sketch = ["--sketch-width", "64"] if method == "opus-paper" else []
    arguments = ["--model", qwen3, "--method", method, *SMALL, *sketch, "--validation", "held-out",
                 "--save", tmp_path / "trained", "--no-checkpointing"]
    code, out, err = call(*arguments)
    assert code == 0, err
    (record,) = results.load(tmp_path / "results" / "runs")
    assert (record["method"], record["arm"]) == (METHODS[method].name, METHODS[method].arm)
    assert record["environment"]["world_size"] == 1 and record["environment"]["parallelism"] == "fsdp2"
    assert [m["step"] for m in record["metrics"] if m["split"] == "val"] == [0, 2, 4]
    assert sum(record["selection"]["chosen"].values()) == 4 * 2
    assert "length 12 instead of 4096" in record["deviations"]
    timing = record["timing"]
    assert timing["wall_s"] > timing["train_s"] + timing["select_s"] + timing["eval_s"]
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    before = AutoModelForCausalLM.from_pretrained(qwen3)
    assert trained.generation_config.temperature == before.generation_config.temperature == 0.6
    moved = [not torch.equal(p, q) for p, q in zip(trained.parameters(), before.parameters())]
    assert all(moved)
    code, out, _ = call(*arguments)
    assert code == 0 and "is there: done" in out
    code, _, err = call(*arguments, "--save", tmp_path / "elsewhere")
    assert code == 2 and "its model is not in" in err and not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("method", ["opus-paper", "opus-calibrated"])
def test_a_qwen3_goes_on_whose_embedding_is_its_head_and_whose_heads_are_wider_than_it(call, tmp_path, method):
    torch.manual_seed(0)
    config = jobs.small_qwen3().config
    config.num_attention_heads, config.tie_word_embeddings = 4, True  # 4 heads of 8 on a width of 16
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tied")
    code, _, err = call("--model", tmp_path / "tied", "--method", method, *SMALL, "--save", tmp_path / "first")
    assert code == 0, err
    code, _, err = call("--model", tmp_path / "first", "--method", method, *SMALL, "--save", tmp_path / "second")
    assert code == 0, err
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("tied", "first", "second")]
    assert all(model.lm_head.weight is model.model.embed_tokens.weight for model in models)
    for before, after in zip(models, models[1:]):
        assert not any(torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True))


def test_two_processes_of_torchrun_train_as_one_process_does(qwen3, tmp_path):
    write_pools(tmp_path)
    arguments = ["--model", str(qwen3), "--data", str(tmp_path / "pool"),
                 "--proxy", str(tmp_path / "proxies"), *SMALL]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "reproduce.pretrain"]
    done = subprocess.run([sys.executable, *torchrun, *arguments, "--results", str(tmp_path / "two")], cwd=ROOT,
                          capture_output=True, text=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert command.main([*arguments, "--results", str(tmp_path / "one")]) == 0
    (one,), (two,) = (results.load(tmp_path / name / "runs") for name in ("one", "two"))
    assert (one["environment"]["world_size"], two["environment"]["world_size"]) == (1, 2)
    assert one["run_id"] == two["run_id"] and one["data"]["selected_sha256"] == two["data"]["selected_sha256"]
    # float32: some hundred units of round-off
    assert [m["value"] for m in two["metrics"]] == pytest.approx([m["value"] for m in one["metrics"]], rel=5e-5)


@pytest.mark.parametrize("text", ["greedy", "[1]", '{"temperature": NaN}'])
def test_knobs_that_are_no_json_object_are_refused(text, capsys):
    with pytest.raises(SystemExit):
        command.main(["--model", "ci", "--data", "pool", "--proxy", "proxies", "--selector-options", text])
    assert "argument --selector-options: " in capsys.readouterr().err


def test_knobs_of_the_selector_are_in_the_run(call):
    plain = call("--model", "ci", "--method", "opus-paper", *SMALL, "--dry-run")[1]
    code, out, _ = call(*knobs("opus-paper", sampling="greedy", temperature=None, window=8), *without_window(),
                        "--dry-run")
    runs = [line for line in (*plain.splitlines(), *out.splitlines()) if line.startswith("run ")]
    assert code == 0 and len(runs) == len(set(runs)) == 2
    assert "deviation    sampling greedy of the selector" in out and "proxy_length 8 instead of 512" in out
    plan = command.settle(command.parser("").parse_args(
        [*knobs("opus-paper", layers=["blocks", "head"], redundancy=0, temperature=2), "--data", "a", "--proxy", "b"]))
    built = command.selector_for(plan, command.World(0, 1, torch.device("cpu"))).opus
    assert (built.layers, built.redundancy, built.temperature, built.window) == (["blocks", "head"], 0, 2, WINDOW)
    assert built.scoring_dtype == "bfloat16"  # the preset's precision, which a knob overrides
    plan = command.settle(command.parser("").parse_args(
        [*knobs("opus-paper", scoring_dtype="model"), "--data", "a", "--proxy", "b"]))
    assert plan.options["scoring_dtype"] == "model"


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("method", ["greats", "ppl-mid"])
def test_greats_and_perplexity_share_the_candidates_of_all(method, scope):
    plan = command.settle(command.parser("").parse_args(
        ["--model", "ci", "--method", method, "--data", "a", "--proxy", "b", "--score-microbatch", "3", "--selection",
         scope]))
    world = command.World(1, 4, torch.device("cpu"))
    built = command.selector_for(plan, world)
    assert (built.microbatch, built.window) == (3, WINDOW)
    if method == "greats":  # the proxy is everybody's also where the candidates are not
        assert built.world == world and built.gathered == (scope == "global")
    else:
        assert built.world == (world if scope == "global" else None)


def test_models_on_the_way_are_kept_also_by_a_run_that_was_killed(call, qwen3, tmp_path, monkeypatch):
    arguments = ["--model", qwen3, "--method", "random", *SMALL, "--save-every", "1"]
    code, _, err = call(*arguments, "--save", tmp_path / "whole")
    assert code == 0, err
    folders = ["whole", "whole-1", "whole-2", "whole-3"]
    assert sorted(path.name for path in tmp_path.glob("*whole*")) == folders
    weights = [torch.cat([p.flatten() for p in AutoModelForCausalLM.from_pretrained(tmp_path / name).parameters()])
               for name in folders]
    assert all(not torch.equal(one, other) for n, one in enumerate(weights) for other in weights[:n])

    written = training.write

    def cut(*given):
        written(*given)
        raise KeyboardInterrupt  # just after the checkpoint of step 2

    monkeypatch.setattr(training, "write", cut)
    elsewhere = ["--save", tmp_path / "cut", "--seed", "0"]
    (tmp_path / "results").rename(tmp_path / "done")
    assert call(*arguments, *elsewhere)[0] == 130
    assert sorted(path.name for path in tmp_path.glob("*cut*")) == ["cut-1", "cut-2"]
    monkeypatch.setattr(training, "write", written)
    assert call(*arguments, *elsewhere)[0] == 0
    for name in folders:
        same = AutoModelForCausalLM.from_pretrained(tmp_path / name.replace("whole", "cut"))
        assert torch.equal(torch.cat([p.flatten() for p in same.parameters()]), weights[folders.index(name)])


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("results/work/*/checkpoints/*"))


def test_a_finished_run_keeps_its_checkpoints_only_where_it_is_told_to(call, qwen3, tmp_path):
    arguments = ["--model", qwen3, "--method", "opus-calibrated", *SMALL, "--optimizer", "muon"]
    code, out, err = call(*arguments, "--keep-checkpoints")
    assert code == 0, err
    assert checkpoints(tmp_path) == ["step-00000002", "step-00000004"]
    assert "checkpoints  every 2 steps, 2 in all" in out
    plan = command.settle(command.parser("").parse_args([*map(str, arguments), "--data", "a", "--proxy", "b"]))
    tensors = sum(path.stat().st_size for path in tmp_path.glob("results/work/*/checkpoints/step-00000004/*.distcp"))
    counted = checkpoint_bytes(plan, AutoModelForCausalLM.from_pretrained(qwen3))
    assert counted < tensors < counted + 2_000 * 100  # each of some hundred tensors with a heading of its own
    code, out, _ = call(*arguments)
    assert code == 0 and "is there: done" in out and not checkpoints(tmp_path)
    assert call(*arguments)[0] == 0  # with nothing to remove


def test_checkpoints_outlive_all_but_the_written_record_and_model(call, qwen3, tmp_path, monkeypatch):
    arguments = ["--model", qwen3, "--method", "random", *SMALL, "--save", tmp_path / "model"]
    written = results.write

    def full_disk(*given):
        raise OSError("no space left")

    monkeypatch.setattr(results, "write", full_disk)
    assert call(*arguments)[0] == 2
    assert checkpoints(tmp_path) == ["step-00000002", "step-00000004"]
    monkeypatch.setattr(results, "write", written)

    def killed(folder):
        assert len(results.load(tmp_path / "results" / "runs")) == 1 and (tmp_path / "model" / "config.json").exists()
        shutil.rmtree(folder / "step-00000002")
        raise KeyboardInterrupt

    removed = command.shutil.rmtree
    monkeypatch.setattr(command, "shutil", SimpleNamespace(
        rmtree=lambda folder, **more: killed(folder) if folder.name == "checkpoints" else removed(folder, **more)))
    assert call(*arguments)[0] == 130
    assert checkpoints(tmp_path) == ["step-00000004"]
    monkeypatch.undo()
    monkeypatch.setattr(command, "ShardPool", CountedPool)
    code, out, _ = call(*arguments)
    assert code == 0 and "is there: done" in out
    assert not list(tmp_path.glob("results/work/*/checkpoints"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_a_run_in_float32_does_not_deviate_by_bfloat16():
    for precision, said in (("float32", False), ("bfloat16", True)):
        plan = command.settle(command.parser("").parse_args(
            ["--model", "qwen3-8b", "--data", "a", "--proxy", "b", "--precision", precision]))
        assert any(line.startswith("bfloat16 products") for line in plan.deviations) == said


def test_steps_between_checkpoints_follow_the_steps_and_are_no_deviation():
    def settled(*words):
        return command.settle(command.parser("").parse_args(["--data", "a", "--proxy", "b", *words]))

    assert [settled("--model", name).config.checkpoint_every for name in PRESETS] == [1_526, 12_208, 1_832]
    short, given = settled("--model", "ci", "--steps", "40"), settled("--model", "gpt2-xl", "--checkpoint-every", "7")
    assert (short.config.checkpoint_every, given.config.checkpoint_every) == (500, 7)
    for plan in (short, given, settled("--model", "qwen3-8b")):
        assert not any("checkpoint" in line for line in plan.deviations)
    assert given.settings(8) == settled("--model", "gpt2-xl").settings(8)


def test_what_the_paper_leaves_out_of_each_setting_is_said():
    assert all(any("buffer and proxy batch read as those of all" in line for line in preset.decided)
               for preset in PRESETS.values())
    for lines in (PRESETS["gpt2-large"].decided, GPT2_LARGE.deviations):
        assert any("under AdamW" in line and "Table 8" in line and "64" in line for line in lines)
    assert any("SciQ" in line and "MMLU" in line for line in QWEN3_8B.deviations)
    assert CPT_TASKS == ("sciq", "mmlu_stem")


def test_a_model_that_cannot_be_put_whole_in_its_folder_has_no_config(call, qwen3, tmp_path, monkeypatch):
    put = os.replace

    def full_disk(source, target):
        if Path(target).name == "model.safetensors":
            raise OSError("no space left")
        put(source, target)

    monkeypatch.setattr(os, "replace", full_disk)
    shutil.copytree(qwen3, tmp_path / "kept")
    code, _, err = call("--model", qwen3, "--method", "random", *SMALL, "--save", tmp_path / "kept")
    assert code == 2 and "no space left" in err and not (tmp_path / "kept" / "config.json").exists()
    assert not results.load(tmp_path / "results" / "runs")


def test_a_saved_model_replaces_an_older_one_and_nothing_else(call, qwen3, tmp_path):
    shutil.copytree(qwen3, tmp_path / "kept")
    (tmp_path / "kept" / "notes.txt").write_text("mine")
    (tmp_path / "kept" / "model-00001-of-00002.safetensors").touch()  # of a larger one
    code, _, err = call("--model", qwen3, "--method", "random", *SMALL, "--save", tmp_path / "kept")
    assert code == 0, err
    assert {path.name for path in (tmp_path / "kept").iterdir()} >= {"notes.txt", "config.json", "model.safetensors"}
    assert not (tmp_path / "kept" / "model-00001-of-00002.safetensors").exists()


@pytest.mark.parametrize("arguments, message", [
    (["--model", "no-such-model"], "model 'no-such-model' is no folder here"),
    (["--model", "ci", "--method", "random", "--sketch-width", "64"], "--sketch-width is of the opus methods with a"),
    (["--model", "ci", "--method", "random", "--score-microbatch", "2"], "is of methods that score, not of random"),
    (["--model", "ci", "--method", "greats", "--score-microbatch", "0"], "microbatch must be at least 1 candidate"),
    (["--model", "ci", "--method", "ppl-low", "--score-microbatch", "0"], "microbatch must be at least 1 candidate"),
    (knobs("greats", gathered=False), "greats has no knob 'gathered'"),
    (["--model", "ci", "--steps", "4", "--tokens", "1e6"], "--steps and --tokens say the same"),
    (["--model", "ci", "--save-every", "2"], "--save-every 2 needs at least 1 step and --save"),
    (["--model", "ci", "--save-every", "0", "--save", "m"], "--save-every 0 needs at least 1 step"),
    (knobs("opus-paper", colour=1), "opus-paper has no knob 'colour'; known: window, layers, "),
    (knobs("random", temperature=1), "random has no knob 'temperature'; known: none"),
    (knobs("ppl-high", keep="low"), "ppl-high has no knob 'keep'; known: window"),
    (knobs("opus-paper", temperature="hot"), 'temperature cannot be "hot"; see Opus.temperature'),
    (knobs("opus-paper", microbatch=True), "microbatch cannot be true"),
    (knobs("opus-paper", sketch_width=64.0), "sketch_width cannot be 64.0"),
    (knobs("opus-paper", layers=[]), "layers cannot be []"),
    (knobs("opus-paper", sampling="best"), 'sampling cannot be "best"'),
    (knobs("opus-paper", temperature=-1), "temperature must be positive, got -1"),
    (knobs("opus-calibrated", temperature=0.9), "give exactly one of temperature and effective_share"),
    ([*knobs("opus-calibrated", redundancy="measured"), *SMALL], "need all candidates' factors on one process"),
    ([*knobs("opus-calibrated", layers="no.such"), *SMALL], "no layer named 'no.such'"),
    (knobs("greats", learning_rate=0), "learning_rate must be positive, got 0"),
    ([*knobs("greats", window=10), "--window", "12"], "--window and --selector-options window say the same"),
    ([*knobs("opus-paper", microbatch=2), "--score-microbatch", "2"], "--score-microbatch and --selector-options"),
    (["--model", "ci", "--length", "0"], "length must be at least 1, got 0"),
    (["--model", "ci", "--length", "1024"], "sequences of 1,024 tokens do not fit"),
])
def test_bad_input_is_one_line_before_anything_is_computed(call, arguments, message, tmp_path):
    code, _, err = call(*arguments)
    assert code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_weights_that_memory_cannot_hold_are_not_read(call, qwen3, monkeypatch):
    need = 4 * sum(p.numel() for p in jobs.small_qwen3().parameters())
    for name, free, code in (("short", need - 1, 2), ("enough", need, 0)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=free))
        said = call("--model", qwen3, "--method", "random", *SMALL)
        assert said[0] == code, said[2]
        assert ("GB of memory where they are read" in said[2]) == (code == 2)


def test_a_vocabulary_that_the_model_lacks_is_refused(call, qwen3, monkeypatch):
    monkeypatch.setattr(CountedPool, "vocab_size", 51)
    code, _, err = call("--model", qwen3, *SMALL)
    assert code == 2 and "--data has tokens of a vocabulary of 51, the model one of 50" in err


def test_processes_that_cannot_share_the_selection_are_refused(call, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    code, _, err = call("--model", "ci", *SMALL, "--dry-run")
    assert code == 2 and "2 selected sequences cannot be trained on by 3 processes evenly" in err
