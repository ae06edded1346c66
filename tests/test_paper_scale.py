"""The scales small and paper: numbers by hand, commands that fit together, refusals, a run from end to end.

Counts are exact or have the tolerance that is said beside them; programs that need GPUs or a hub are replaced by a
function that leaves the files they would.
"""

import argparse
import csv
import json
import shlex
import sys
import types
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from test_overhead import GROUPED, TINY, WIDER, model_of
from test_report import record_of
from transformers import Qwen3Config, Qwen3ForCausalLM

from opus_bench import results, schema
from reproduce import (ablations, counts, domain_loss, figure1, figure5_6, paper_checks, paper_commands, paper_cost,
                       paper_launch, paper_scale, paper_text, pretrain_plan, runner, table3, table4, table5, table6,
                       table7, table8)
from reproduce.comparison import REPORTED
from reproduce.counts import LARGE, XL
from reproduce.paper_cost import Rates, selection_flops, training_flops
from reproduce.paper_settings import GPT2_LARGE, GPT2_XL, POOLS, QWEN3_8B, SMALL_POOLS

TABLES = (table3, table4, table5, table6, table7, table8, figure1, figure5_6)
NAMES = [script.__name__.rpartition(".")[2] for script in TABLES]


def options(scale="paper", **given):
    known = dict(scale=scale, seeds=None, optimizers=None, paper_tasks=False, methods=None, dry_run=True, models=None,
                 gpus=None, peak_tflops=None, utilisation=paper_cost.UTILISATION, data=Path("data"),
                 results=Path("none"))
    return argparse.Namespace(**known | given)


@pytest.fixture(scope="module")
def grid3():
    return table3.large_runs(options())


def one(runs, label, optimizer="muon", setting=GPT2_XL):
    return next(r for r in runs if (r.label, r.optimizer, r.setting) == (label, optimizer, setting))


# Runs -------------------------------------------------------------------------------------------------


def test_table_3_is_twelve_rows_by_two_models_and_two_optimizers(grid3):
    assert len(grid3) == 48 and len({run.run_id for run in grid3}) == 48
    for run in grid3:
        goal = 30e9 * run.line.times
        each = run.selected_size * run.setting.shape.length
        assert goal <= run.update_tokens < goal + each
        assert run.candidate_tokens == run.update_tokens * (1 if run.fields["selection_ratio"] == 1 else 2)
    assert [run.line.times for run in grid3].count(2) == 4
    xl, large = one(grid3, "OPUS (paper)").fields, one(grid3, "OPUS (paper)", setting=GPT2_LARGE).fields
    assert (xl["steps"], xl["buffer"], xl["length"], xl["adam_lr"], xl["muon_lr"]) == (305_176, 32, 6_144, 2e-3, 1e-2)
    assert (large["steps"], large["buffer"], large["length"], large["adam_lr"]) == (38_147, 64, 24_576, 0.004)
    assert one(grid3, "OPUS (calibrated)").fields["proxy_size"] == 32


@pytest.mark.parametrize("script,table", [(table3, "3"), (table4, "4"), (table6, "6"), (table7, "7"), (table8, "8")])
def test_every_row_of_the_papers_table_has_a_run_and_every_named_row_exists(script, table):
    with open(REPORTED, encoding="utf-8", newline="") as file:
        cells = {(line["table"], line["model"], line["optimizer"].lower(), line["method"].replace("(30B)", ""))
                 for line in csv.DictReader(file)}
    runs = script.large_runs(options())
    named = {((run.line.item or run.item).removeprefix("Table ") if script is not table6 else "6", run.setting.title,
              run.optimizer, run.line.paper_row) for run in runs if run.line.paper_row}
    assert named <= cells
    if script is table7:
        named = {row for row in named if row[0] == "7"}
    assert {row for row in cells if row[0] == table} == named


def test_views_show_the_very_runs_of_table_3(grid3):
    ids = {run.run_id for run in grid3}
    for script in (table5, figure1):
        assert {run.run_id for run in script.large_runs(options())} <= ids
    by_domain = table6.large_runs(options())
    assert {run.experiment for run in by_domain} == {"table3", "table6"}
    assert {run.run_id for run in by_domain if run.experiment == "table3"} <= ids
    assert {run.pool.origin for run in by_domain if run.experiment == "table6"} == {"fineweb-edu-3-5"}
    ood = {(run.setting.title, run.optimizer, run.line.times) for run in table5.large_runs(options())}
    assert ood == {("GPT-2 XL", "muon", 1)}


@pytest.mark.parametrize("script", [table3, table4, table5, table6, table7, table8, ablations])
def test_small_is_one_model_on_one_gpu_with_three_seeds(script):
    runs = script.large_runs(options("small"))
    assert {(run.setting.model, run.setting.gpus, run.optimizer) for run in runs} == {("gpt2", 1, "muon")}
    assert {run.seed for run in runs} == {0, 1, 2}
    assert all(abs(run.update_tokens / run.line.times - 2.5e9) < 1e6 for run in runs)
    assert all(run.pool.origin in SMALL_POOLS for run in runs)


def test_small_continued_training_is_the_papers_with_a_smaller_model_and_less_text():
    runs, paper = figure5_6.large_runs(options("small")), figure5_6.large_runs(options())
    settings = {(run.setting.model, run.setting.gpus, run.optimizer) for run in runs}
    assert settings == {("Qwen/Qwen3-0.6B-Base", 1, "muon")}
    labels = [run.label for run in paper if run.optimizer == "muon"]
    assert [(run.label, run.seed) for run in runs] == [(label, seed) for seed in range(3) for label in labels]
    for run, model in zip(runs, [run for run in paper if run.optimizer == "muon"]):
        changed = {name for name, value in model.fields.items() if run.fields[name] != value}
        assert changed == {"model", "steps", "validation_every", "save_every"}
        assert 90e6 <= run.update_tokens < 90e6 + 8 * 4096 and run.candidate_tokens <= run.pool.tokens == 200e6
        assert [round(step * 8 * 4096 / 1e6) for step in run.kept_steps] == [30, 60, 90]
        assert run.setting.deviations[0].startswith("Qwen3-0.6B-Base on 90 million tokens instead of Qwen3-8B-Base")
        assert run.setting.validation_length == run.fields["length"]
    rates = Rates(None, 0.4, 1)
    hours = sum(rates.seconds(training_flops(run) + selection_flops(run), "bfloat16") for run in runs) / 3600
    assert 4 < hours < 24  # as the module says


@pytest.mark.parametrize("runs_of,sizes", [
    ("small", dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
                   tie_word_embeddings=True)),
    ("paper", dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
                   tie_word_embeddings=False))])
def test_weights_of_qwen3_are_those_of_the_model(runs_of, sizes):
    """All but the vectors of norms, which are no matrices; sizes as in the models' config.json."""
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(vocab_size=151936, num_key_value_heads=8, head_dim=128, **sizes))
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    run = figure5_6.large_runs(options(runs_of))[0]
    assert paper_cost.parameters(run) == weights
    assert run.setting.shape.block_parameters == sum(
        p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name)


def test_a_hub_id_that_is_no_presets_takes_the_settings_of_qwen3():
    words = ["--model", "Qwen/Qwen3-0.6B-Base", "--data", "a", "--proxy", "b", "--method", "random"]
    plan = pretrain_plan.settle(pretrain_plan.parser("").parse_args(words))
    assert plan.where == "Qwen/Qwen3-0.6B-Base"
    assert (plan.config.length, plan.config.muon_lr, plan.config.weight_decay) == (4096, 1e-5, 0.01)
    assert plan.deviations[0] == f"model Qwen3-0.6B-Base instead of {QWEN3_8B.model}"


def test_what_these_scales_cannot_do_is_refused():
    with pytest.raises(ValueError, match="--paper-tasks: scale paper evaluates"):
        table3.large_runs(options(paper_tasks=True))
    with pytest.raises(ValueError, match="unknown model 'gpt3'; this item has gpt2-large, gpt2-xl"):
        paper_launch.chosen_models(table3.large_runs(options()), ["gpt3"])
    for bad, words in (({"peak": 0.0}, "peak-tflops"), ({"utilisation": 1.5}, "utilisation"), ({"gpus": 0}, "gpus")):
        with pytest.raises(ValueError, match=words):
            Rates(**{"peak": None, "utilisation": 0.4, "gpus": 8} | bad)


# Cost ---------------------------------------------------------------------------------------------------


def test_training_flops_of_table_3_by_hand(grid3):
    """6 N D with the published sizes (1.558e9 and .774e9 parameters, positions included) and causal attention,
    6 L d layers D; 2 % for the positions and the padding of the vocabulary, 15 % for 6 N D alone."""
    hand = {GPT2_XL: (1.558e9, 6 * 6144 * 1600 * 48), GPT2_LARGE: (0.774e9, 6 * 24576 * 1280 * 36)}
    for setting, (n, attention) in hand.items():
        run = one(grid3, "Random", setting=setting)
        assert training_flops(run) == pytest.approx((6 * n + attention) * 30e9, rel=0.02)
        assert training_flops(run) - attention * run.update_tokens == pytest.approx(6 * n * 30e9, rel=0.15)
    total = sum(2 * (11 * 30e9 + 60e9) * (6 * n + attention) for n, attention in hand.values())
    assert sum(map(training_flops, grid3)) == pytest.approx(total, rel=0.02)
    assert "6 x (1.475e9 + 0.080e9) x 30.00e9 + 6 x 6,144 x 1,600 x 48" in paper_cost.derivation(one(grid3, "Random"))


def test_selection_flops_by_selector(grid3):
    run = {label: one(grid3, label, "adamw") for label in
           ("Random", "DSIR", "PPL", "GREATS", "OPUS (paper)", "OPUS (released)", "OPUS (calibrated)")}
    assert selection_flops(run["Random"]) == selection_flops(run["DSIR"]) == 0
    step = {label: selection_flops(one) / one.fields["steps"] for label, one in run.items()}
    blocks, head, windows = XL.block_parameters, XL.head_parameters, 32 * 512
    attention = 2 * 512 * 1600 * 48  # of a position, causal half, one product of each sort
    forward = 2 * (blocks + head) + attention
    backward = 2 * (blocks + head) + 2 * attention
    assert step["PPL"] == windows * forward
    proxy = 8 * 512 * (forward + backward + 2 * blocks)
    assert step["OPUS (paper)"] == step["OPUS (released)"] == windows * (forward + backward + 2 * blocks) + proxy
    assert step["GREATS"] == step["OPUS (paper)"] + 2 * 32 * 32 * blocks
    larger_proxy = 4 * proxy + 2 * 32 * 512 * head  # of all matrices, the head too, every 8 steps
    assert step["OPUS (calibrated)"] == windows * (forward + backward + 2 * blocks + 2 * head) + larger_proxy / 8
    muon = selection_flops(one(grid3, "OPUS (paper)")) / 305_176
    # S of four square matrices, the wide and the tall one; then times b of every position
    assert muon - step["OPUS (paper)"] == 48 * (34 * 1600**3 + windows * 28 * 1600**2)
    muon = selection_flops(one(grid3, "OPUS (calibrated)")) / 305_176
    assert muon - step["OPUS (calibrated)"] == 48 * (4 * 6 + 18 + 26) * 1600**3
    with pytest.raises(ValueError, match="no count for selector 'best'"):
        counts.scoring_flops(XL, "best", {}, "adamw")


def test_options_of_opus_change_its_count():
    def of(**given):
        return counts.scoring_flops(XL, "opus", {"arm": "calibrated", **given}, "adamw")

    base = of()
    proxy = counts.proxy_flops(XL) + 2 * 8 * 512 * XL.head_parameters
    assert of(proxy_every=1) - base == pytest.approx(7 / 8 * proxy)
    assert base - of(layers="blocks") == 2 * 32 * 512 * XL.head_parameters + 2 * 8 * 512 * XL.head_parameters / 8
    assert of(redundancy="measured") - base == 2 * 32 * 32 * XL.block_parameters
    assert of(estimator="forward") == 2 * counts.forward_flops(XL, 32, 512) + counts.proxy_flops(XL) / 8
    for options in ({"preconditioner": "identity"}, {"preconditioner": "adjoint"}):
        assert counts.scoring_flops(XL, "opus", {"arm": "calibrated", **options}, "muon") == base
    gram = {"arm": "calibrated", "redundancy": "measured"}
    assert counts.scoring_flops(XL, "opus", gram, "muon") - of(redundancy="measured") == counts.muon_flops(XL, 32 * 512)
    whole = counts.scoring_flops(replace(XL, window=10**6), "perplexity", {}, "adamw")
    assert whole == counts.forward_flops(XL, 32, 6144)


@pytest.mark.parametrize("shape", [TINY, GROUPED, WIDER], ids=lambda shape: shape.name)
def test_matrices_are_those_of_the_model(shape):
    blocks = [p for k, p in model_of(shape).named_parameters() if p.ndim == 2 and ("blocks." in k or "layers." in k)]
    assert sorted(shape.matrices * shape.layers) == sorted(tuple(p.shape) for p in blocks)


def test_hours_disk_downloads_and_memory_by_hand(grid3):
    xl = [run for run in grid3 if run.setting is GPT2_XL and run.optimizer == "muon"]
    rates = Rates(None, 0.4, 8)
    assert rates.seconds(989.4e12 * 0.4 * 3600, "bfloat16") == pytest.approx(3600)
    assert rates.seconds(66.9e12 * 0.4 * 3600, "float32") == pytest.approx(3600)
    assert Rates(100e12, 0.5, 8).seconds(50e12, "bfloat16") == 1
    assert Rates(494.7e12, 0.5, 8).peak_of("float32") == pytest.approx(66.9e12 / 2)
    text = "\n".join(paper_cost.cost_lines(xl, rates))
    assert "reading fineweb by DSIR: negligible" in text and "at most 2 x parameters x tokens = 2.6e+20" in text
    kept = paper_cost.disk(xl)
    shards = 2 * (100e9 + 5 * 30e9 + 2 * 30e6 + 10e6)
    assert kept["token shards"] == shards and kept["documents"] == 277.4e9
    weights = XL.block_parameters + XL.head_parameters
    assert kept["models of all runs"] == 12 * 4 * weights
    proxied = 12 * weights - 4 * XL.block_parameters + 4 * weights  # the calibrated arm scores all matrices
    assert kept["checkpoints, 3 of the run in progress"] == 3 * proxied
    assert paper_cost.downloads(xl) == {"HuggingFaceFW/fineweb sample-100BT": 277.4e9}
    parts = paper_cost.memory_per_gpu(one(xl, "OPUS (paper)"), 8)
    assert parts == {"state": 4 * (4 * weights - XL.block_parameters) / 8,
                     "gathered": 2 * 4 * 50304 * 1600 + 2 * 2 * 4 * 12 * 1600**2,
                     "activations": 6144 * (48 * 6400 + 89_600), "logits": 12 * 6144 * 50304,
                     "scoring": XL.block_parameters, "factors": 0}
    greats = paper_cost.memory_per_gpu(one(xl, "GREATS"), 8)
    assert greats.pop("factors") == 2 * 512 * 1600 * (4 * 48 * (4 * 2 + 5 + 5) + 32 * 5)
    assert greats == {name: value for name, value in parts.items() if name != "factors"}
    assert paper_cost.memory_per_gpu(one(xl, "OPUS (calibrated)"), 8)["scoring"] == weights
    assert paper_cost.memory_per_gpu(one(xl, "Random"), 8)["scoring"] == 0
    alone = paper_cost.memory_per_gpu(one(xl, "PPL"), 1)  # which scores 32 windows of 512 tokens at once
    assert alone["logits"] == 12 * 32 * 512 * 50304
    assert paper_cost.host_memory(xl[0]) == 4 * weights
    qwen = figure5_6.large_runs(options())[0]
    assert paper_cost.host_memory(qwen) == 8 * paper_cost.parameters(qwen)  # read from files
    assert paper_cost.memory_per_gpu(qwen, 8)["gathered"] == pytest.approx(10e9 + 16 * 193e6, rel=0.005)
    assert paper_cost.parameters(qwen) == pytest.approx(8.19e9, rel=0.001) and paper_cost.token_bytes(qwen) == 4
    assert (paper_cost.size(999), paper_cost.size(2.08e12)) == ("999 B", "2.08 TB")


# Commands -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", TABLES, ids=NAMES)
def test_every_input_of_a_command_was_made_before_or_is_the_users(script):
    """Folders below data that a command reads: text that the user brings, or the output of an earlier command."""
    runs, data = script.large_runs(options()), Path("texts")
    made = {data / "text" / name for name in ("sciencepedia", "validation-sciencepedia")}
    for step in paper_scale.preparation(runs, data):
        out = step.command[step.command.index("--out" if "--out" in step.command else "--local-dir") + 1]
        for word in step.command:
            place = Path(word.rpartition("=")[2])
            if place.parts[:1] == ("texts",) and str(place) != out:
                assert any(place.is_relative_to(folder) for folder in made), (step.what, word)
        made.add(Path(out))
        assert step.made.is_relative_to(out)
    for run in runs:
        command = run.command(data, Path("results"), 8)
        for name in ("--data", "--proxy", "--validation"):
            assert Path(command[command.index(name) + 1]) in made, run.label


def test_the_training_command_says_the_run(grid3):
    command = one(grid3, "OPUS (released)").command(Path("data"), Path("results"), 4)
    given = dict(zip(command, command[1:]))
    assert given["--nproc-per-node"] == "4" and given["--model"] == "gpt2-xl" and given["--method"] == "opus-released"
    assert (given["--steps"], given["--length"], given["--buffer"]) == ("305176", "6144", "32")
    assert (given["--adam-lr"], given["--muon-lr"], given["--cooldown"]) == ("0.002", "0.01", "0.4")
    assert (given["--window"], given["--sketch-width"], given["--proxy-size"]) == ("512", "8192", "8")
    assert "--selector-options" not in given and given["--data"] == "data/pools/fineweb"
    assert paper_commands.shown(command).startswith("torchrun --standalone --nproc-per-node 4 -m reproduce.pretrain ")
    methods = {paper_commands.method_of(run.line.selector, run.line.options) for run in grid3}
    assert methods == {"random", "ppl-high", "greats", "opus-paper", "opus-released", "opus-calibrated"}
    eight = {run.label: run.command(Path("d"), Path("r"), 8) for run in table8.large_runs(options())}
    warm = eight["b=64,t=.8,m=8192 (paper)"]
    assert json.loads(warm[warm.index("--selector-options") + 1]) == {"temperature": 0.8}
    share = eight["b=32,share=0.25 (calibrated)"]
    assert json.loads(share[share.index("--selector-options") + 1]) == {"effective_share": 0.25}
    assert "--sketch-width" not in share and share[share.index("--buffer") + 1] == "32"
    standard = next(r for r in table7.large_runs(options()) if r.label == "StdProxy (paper)")
    assert standard.proxy == "standard-proxy-fineweb" and " standard " in " ".join(
        " ".join(step.command) for step in paper_scale.preparation([standard], Path("data")))


def test_models_are_kept_and_evaluated_every_half_billion_tokens():
    run = figure5_6.large_runs(options())[0]
    each = run.selected_size * 4096
    assert [round(step * each / 1e8) for step in run.kept_steps] == [5, 10, 15]
    assert run.kept_steps[-1] == run.fields["steps"]
    commands = run.evaluations(Path("data"), Path("results"))
    assert list(commands) == [(step, "cpt") for step in run.kept_steps]
    models = [command[command.index("--model") + 1] for command in commands.values()]
    assert [Path(model).name for model in models] == [*(f"model-{step}" for step in run.kept_steps[:2]), "model"]


# Checks and launch --------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(paper_checks, "hub_problem", lambda: "no route")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(paper_scale, "subprocess", types.SimpleNamespace(run=lambda *_: pytest.fail("started")))
    monkeypatch.setattr(sys, "argv", ["script"])


def launch(script, scale, folder, *arguments):
    sys.argv[1:] = ["--scale", scale, "--results", str(folder / "results"), "--data", str(folder / "data"), *arguments]
    return runner.main(script.runs, script.__doc__, script.write, script.large_runs)


PLANS = [*((script, "paper") for script in TABLES), (table3, "small"), (ablations, "small"), (figure5_6, "small")]


@pytest.mark.parametrize("script,scale", PLANS, ids=lambda x: getattr(x, "__name__", x).rpartition(".")[2])
def test_a_dry_run_prints_the_plan_and_a_real_one_is_refused(script, scale, offline, tmp_path, capsys):
    assert launch(script, scale, tmp_path, "--dry-run") == 0
    text = capsys.readouterr().out
    for words in ("update tokens", "GPU hours", "Disk", "Downloads", "Memory per GPU", "torchrun",
                  "missing  GPUs: 0 here", "missing  hub: not reachable (no route)", "dry run: nothing was started"):
        assert words in text, words
    assert not list(tmp_path.rglob("*"))
    arguments = ["--models", "gpt2-xl"] if script is table3 and scale == "paper" else []
    assert launch(script, scale, tmp_path, *arguments) == 2
    text = capsys.readouterr().out
    assert "refused: " in text and "nothing was started" in text and not list(tmp_path.rglob("*.json"))


def test_options_that_make_no_sense_are_refused_in_one_line(offline, tmp_path, capsys):
    for arguments, words in ((["--methods", "Best"], "unknown method 'Best'"), (["--gpus", "0"], "--gpus"),
                             (["--utilisation", "0"], "--utilisation"), (["--peak-tflops", "-1"], "--peak-tflops"),
                             (["--models", "gpt3"], "unknown model 'gpt3'")):
        assert launch(table3, "paper", tmp_path, *arguments) == 2
        assert words in capsys.readouterr().err
    sys.argv[1:] = ["--scale", "paper"]
    with pytest.raises(SystemExit):
        runner.main(table3.runs, "a script without these scales", table3.write)


def states(checks):
    return {check.what: check.state for check in checks}


def test_checks_see_gpus_disk_and_programs(grid3, monkeypatch, tmp_path):
    runs, rates = [one(grid3, "OPUS (paper)")], Rates(None, 0.4, 2)
    monkeypatch.setattr(paper_checks, "hub_problem", lambda: "no route")
    need = sum(paper_cost.memory_per_gpu(runs[0], 2).values())
    for count, memory, state in ((2, need + 1, "ok"), (1, need + 1, "missing"), (2, need - 1, "missing")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        monkeypatch.setattr(torch.cuda, "get_device_properties",
                            lambda index, memory=memory: types.SimpleNamespace(total_memory=memory))
        assert states(paper_checks.examine(runs, tmp_path / "new", tmp_path, rates))["GPUs"] == state
    usage = types.SimpleNamespace(free=sum(paper_cost.disk(runs).values()))
    monkeypatch.setattr(paper_checks.shutil, "disk_usage", lambda folder: usage)
    assert states(paper_checks.examine(runs, tmp_path, tmp_path, rates))["disk"] == "ok"
    for free, state in ((paper_cost.host_memory(runs[0]), "ok"), (paper_cost.host_memory(runs[0]) - 1, "missing")):
        memory = types.SimpleNamespace(available=free)
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
        assert states(paper_checks.examine(runs, tmp_path, tmp_path, rates))["host memory"] == state
    usage.free -= 1
    checks = paper_checks.examine(runs, tmp_path, tmp_path, rates)
    assert states(checks)["disk"] == "missing" and states(checks)["documents by domain"] == "missing"
    lines = paper_checks.check_lines(checks)
    assert any(line.startswith("  optional documents by domain") for line in lines)
    assert all("; " in line for line in lines if "missing" in line)  # each says how to mend
    (tmp_path / "text" / "domains").mkdir(parents=True)
    (tmp_path / "text" / "domains" / "Health.jsonl").touch()
    assert states(paper_checks.examine(runs, tmp_path, tmp_path, rates))["documents by domain"] == "ok"


def test_checks_know_what_the_training_command_can_do(monkeypatch):
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", choices=("random",))
    parser.add_argument("--steps")
    module = types.ModuleType("pretrain_stand_in")
    module.parser, module.__spec__ = (lambda description: parser), types.SimpleNamespace(name="pretrain_stand_in")
    monkeypatch.setitem(sys.modules, "pretrain_stand_in", module)
    for name in ("PRETRAIN", "PRETRAIN_OPTIONS"):
        monkeypatch.setattr(paper_commands, name, "pretrain_stand_in")
    assert paper_checks.training_lacks({"--steps"}, {"random"}) == ""
    assert paper_checks.training_lacks({"--steps", "--save-every"}, {"random", "greats"}) == (
        "lacks --save-every, --method greats")
    monkeypatch.setattr(paper_commands, "PRETRAIN", "opus_bench.no_such_module")
    assert paper_checks.training_lacks(set(), set()) == "not there"
    assert not paper_checks._has_command("no-such-command") and paper_checks._has_command("doctor")


def test_the_hub_is_asked_for_each_name(grid3, monkeypatch, tmp_path):
    import huggingface_hub

    def ask(self, name, timeout):
        if name.startswith("princeton"):
            raise OSError("401: log in")

    monkeypatch.setattr(paper_checks, "hub_problem", lambda: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", ask)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", ask)
    outcomes = {"paper": (0, "10 tasks"), "ood": (1, "1 of 6 tasks cannot be run here")}

    def plan(command, **_):
        code, text = outcomes[command[command.index("--suite") + 1]]
        return types.SimpleNamespace(returncode=code, stdout=text, stderr="")

    monkeypatch.setattr(paper_checks, "subprocess", types.SimpleNamespace(run=plan))
    found = {check.what: (check.state, check.found) for check in paper_checks._hub("paper", grid3)}
    assert found["data set HuggingFaceFW/fineweb"] == ("ok", "reachable")
    assert found["model princeton-nlp/QuRater-1.3B"] == ("missing", "not reachable (401: log in)")
    assert found["tasks of the suite paper"][0] == "ok"
    assert found["tasks of the suite ood"] == ("missing", "1 of 6 tasks cannot be run here")
    assert sum(what.startswith("model ") for what in found) == 5


# From end to end ----------------------------------------------------------------------------------------


class Programs:
    """Stands for the programs: leaves the files that they would, and remembers the commands."""

    def __init__(self, fail=""):
        self.commands, self.fail, self.leave = [], fail, True

    def __call__(self, command, **_):
        self.commands.append(command)
        if self.fail and self.fail in command:
            return types.SimpleNamespace(returncode=1 if self.fail != "evaluate" else 2)
        given = dict(zip(command, command[1:]))
        if not self.leave:
            return types.SimpleNamespace(returncode=0)
        if "reproduce.pretrain" in command:
            (Path(given["--results"]) / "work" / "run" / "checkpoints" / "step-00000002").mkdir(parents=True)
            record = record_of("Random", int(given["--seed"]), "muon")
            record["metrics"] = [{**row, "split": "val"} if row["split"] == "val/encyclopedia" else row
                                 for row in record["metrics"]]
            results.write(record | {"evals": []}, Path(given["--results"]) / "runs")
        elif "evaluate" in command:
            record = record_of("Random", 0)
            task = "MMLU" if given["--suite"] == "paper" else "BBH"
            row = {**record["evals"][0], "task": task, "value": 0.25}
            results.write(record | {"evals": [row]}, Path(given["--output"]))
        elif "reproduce.domain_loss" in command:
            Path(given["--out"]).write_text(json.dumps({"Health": {"loss": 3.25}}))
        else:
            made = Path(given.get("--out") or given["--local-dir"])
            made.mkdir(parents=True, exist_ok=True)
            for name in ("manifest.json", "chosen.jsonl", "done.json"):
                (made / name).touch()
            (made / "sample" / "10BT").mkdir(parents=True, exist_ok=True)
        return types.SimpleNamespace(returncode=0)


def test_a_run_is_executed_recorded_and_then_done(grid3, monkeypatch, tmp_path):
    run, programs = one(grid3, "OPUS (paper)"), Programs()
    monkeypatch.setattr(paper_scale, "subprocess", types.SimpleNamespace(run=programs))
    (tmp_path / "data" / "text" / "domains").mkdir(parents=True)
    record = run.execute(tmp_path / "data", tmp_path, 8)
    assert [next(name for name in ("reproduce.pretrain", "reproduce.domain_loss", "evaluate") if name in command)
            for command in programs.commands] == ["reproduce.pretrain", "reproduce.domain_loss", "evaluate", "evaluate"]
    written = results.read(tmp_path / "runs" / f"{run.run_id}.json")
    assert [written[name] for name in ("experiment", "scale", "method", "arm")] == ["table3", "paper", "OPUS", "paper"]
    assert written["paper"] == {"arxiv": schema.ARXIV, "item": "Table 3", "row": "OPUS"}
    assert written["config"] == json.loads(json.dumps(run.settings)) and written["config"]["setting"] == "GPT-2 XL"
    assert {row["task"]: row["value"] for row in written["evals"]} == {"MMLU": 0.25, "BBH": 0.25}
    assert written["timing"]["eval_s"] == 4 + 2 * 4 and written["timing"]["wall_s"] == 30 + 2 * 4
    losses = {row["split"]: row["value"] for row in written["metrics"] if row["name"] == "loss"}
    assert losses["val/Health"] == 3.25 and "val/encyclopedia" in losses and "val" not in losses
    assert any("schedule is not published" in text for text in written["deviations"])
    assert "no proxy" in written["deviations"]  # of the training's own record
    assert record["run_id"] == run.run_id and results.done(tmp_path / "runs", run.run_id)
    # left by a training that was killed after its record
    assert not list(tmp_path.rglob("checkpoints")) and (run.work(tmp_path) / "work" / "run").is_dir()
    programs.commands.clear()
    assert run.execute(tmp_path / "data", tmp_path, 8) == written and not programs.commands


def test_an_interrupted_run_goes_on_where_it_stopped(grid3, monkeypatch, tmp_path):
    run, programs = one(grid3, "Random"), Programs(fail="evaluate")
    monkeypatch.setattr(paper_scale, "subprocess", types.SimpleNamespace(run=programs))
    with pytest.raises(ValueError, match="exit code 2 of `opus-bench evaluate .*the same command goes on"):
        run.execute(tmp_path / "data", tmp_path, 8)
    assert not (tmp_path / "runs").exists()
    programs.fail, programs.commands = "", []
    run.execute(tmp_path / "data", tmp_path, 8)
    assert [("reproduce.pretrain" in command) for command in programs.commands] == [False, False]
    programs.fail, other = "reproduce.pretrain", one(grid3, "PPL")
    with pytest.raises(ValueError, match="exit code 1 of `torchrun"):
        other.execute(tmp_path / "data", tmp_path, 8)
    programs.fail, programs.leave = "", False
    with pytest.raises(ValueError, match="holds 0 records of the training"):
        other.execute(tmp_path / "data", tmp_path, 8)
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_a_download_that_broke_off_is_gone_on_with(monkeypatch, tmp_path, capsys):
    programs = Programs()
    monkeypatch.setattr(sys, "argv", ["script"])
    monkeypatch.setattr(paper_scale, "subprocess", types.SimpleNamespace(run=programs))
    monkeypatch.setattr(paper_launch, "examine", lambda *_: [])
    part = tmp_path / "data" / "text" / "fineweb" / "sample" / "10BT" / "000_00000.parquet"
    part.parent.mkdir(parents=True)
    part.touch()
    for times in (1, 1):  # the second call finds it whole
        assert launch(table3, "small", tmp_path, "--methods", "Random", "--seeds", "1") == 0
        assert sum(command[:2] == ["hf", "download"] for command in programs.commands) == times


def test_preparation_and_runs_are_started_in_order_and_once(monkeypatch, tmp_path, capsys):
    programs = Programs()
    monkeypatch.setattr(sys, "argv", ["script"])
    monkeypatch.setattr(paper_scale, "subprocess", types.SimpleNamespace(run=programs))
    monkeypatch.setattr(paper_launch, "examine", lambda *_: [])
    arguments = ("--methods", "Random", "OPUS (calibrated)", "--seeds", "1")
    assert launch(table3, "small", tmp_path, *arguments) == 0
    kinds = [" ".join(command) for command in programs.commands]
    assert [kind.startswith("hf download") for kind in kinds] == [True] + [False] * (len(kinds) - 1)
    assert [sum(name in kind for kind in kinds) for name in ("reproduce.pretrain", "proxy --pool")] == [2, 1]
    text = (tmp_path / "results" / "tables" / "table3.md").read_text()
    assert "### Muon, GPT-2 (124M): summary" in text and "OPUS (calibrated)" in text
    programs.commands.clear()
    assert launch(table3, "small", tmp_path, *arguments) == 0 and not programs.commands
    assert "2 runs, 2 done" in capsys.readouterr().out
    assert launch(table3, "small", tmp_path, "--methods", "Random", "PPL", "--seeds", "1") == 0
    assert [("reproduce.pretrain" in command, "evaluate" in command) for command in programs.commands] == [
        (True, False), (False, True), (False, True)]  # of the new run alone; what was prepared stays


def test_pages_of_two_models_stand_side_by_side(grid3, monkeypatch, tmp_path):
    monkeypatch.setattr(paper_scale, "subprocess", types.SimpleNamespace(run=Programs()))
    labels = ("Random", "Random(60B)", "DSIR", "OPUS (paper)")
    for label in labels:
        for setting in (GPT2_XL, GPT2_LARGE):
            one(grid3, label, setting=setting).execute(tmp_path / "data", tmp_path, 8)
    text = table3.write(tmp_path)[0].read_text()
    large, xl = text.index("### Muon, GPT-2 Large: summary"), text.index("### Muon, GPT-2 XL: summary")
    for start, paper in ((large, "39.72"), (xl, "40.29")):
        part = text[start:].split("###")[1]
        assert all(f"| {label} |" in part for label in labels) and paper in part
    assert "25.00 | 11.02" in table5.write(tmp_path)[0].read_text().replace("\\", "")  # BBH of OPUS, and the paper's


@pytest.mark.parametrize("script,scale", PLANS, ids=lambda x: getattr(x, "__name__", x).rpartition(".")[2])
def test_the_training_command_takes_every_run_and_means_the_same(script, scale):
    """What the command settles of each run's words, by its presets, is what the run's record will say."""
    for run in script.large_runs(options(scale)):
        words = run.command(Path("data"), Path("results"), 8)
        words = words[words.index("reproduce.pretrain") + 1:]
        settled = pretrain_plan.settle(pretrain_plan.parser("").parse_args(words))
        config, fields = vars(settled.config), run.fields
        shared = set(config) & set(fields)
        assert shared >= {*paper_commands.FLAGS, "betas", "eps", "proxy_length"}
        assert {name: config[name] for name in shared} == {
            name: tuple(fields[name]) if name == "betas" else fields[name] for name in shared}, run.label
        for name, value in run.line.options.items():
            if name != "sketch_width" or "sketch_width" in settled.options:
                assert settled.options[name] == value, (run.label, name)


# Text and losses of domains -----------------------------------------------------------------------------


def scored_documents(folder):
    import pyarrow
    import pyarrow.parquet

    rows = [{"id": str(n), "text": f"text {n}", "token_count": 10, "int_score": n % 5 + 1} for n in range(500)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "scored.parquet", row_group_size=50)
    return folder / "scored.parquet"


def kept(folder):
    import pyarrow.parquet

    return [row for path in sorted(folder.glob("*.parquet")) for row in pyarrow.parquet.read_table(path).to_pylist()]


def test_documents_of_some_scores_are_kept_up_to_the_goal_and_resumed(tmp_path, capsys, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = scored_documents(tmp_path)

    def rows():
        return datasets.load_dataset("parquet", data_files=[str(source)], split="train", streaming=True)

    made = paper_text.keep(rows(), (4, 5), 1500, tmp_path / "whole", documents=40)
    whole = kept(tmp_path / "whole")
    assert made["kept"] == 1500 and len(whole) == 150
    assert [row["id"] for row in whole] == [str(n) for n in range(500) if n % 5 + 1 in (4, 5)][:150]

    class Cut:
        """The stream, cut off after some rows."""

        def __init__(self, after):
            self.rows, self.after = rows(), after
            self.state_dict, self.load_state_dict = self.rows.state_dict, self.rows.load_state_dict

        def __iter__(self):
            for n, row in enumerate(self.rows):
                if n == self.after:
                    raise KeyboardInterrupt
                yield row

    with pytest.raises(KeyboardInterrupt):
        paper_text.keep(Cut(260), (4, 5), 1500, tmp_path / "cut", documents=40)
    assert 0 < len(kept(tmp_path / "cut")) < 150 and not (tmp_path / "cut" / "done.json").exists()
    paper_text.keep(rows(), (4, 5), 1500, tmp_path / "cut", documents=40)
    assert kept(tmp_path / "cut") == whole
    assert paper_text.main(["--repository", "parquet", "--files", str(source), "--scores", "3", "--tokens", "2000",
                            "--out", str(tmp_path / "few")]) == 2
    assert "has 1,000 tokens of score 3, 2,000 were asked for" in capsys.readouterr().err
    with pytest.raises(ValueError, match="other scores or tokens"):
        paper_text.keep(rows(), (3,), 1500, tmp_path / "whole")


class Letters:
    """A tokenizer of single letters."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(letter) % 50 for letter in text]}


def test_losses_by_domain_are_those_of_the_documents(model, tmp_path):
    from opus_bench.gradients import sample_losses

    for name, texts in (("Health", ["abcdefgh", "ijklm"]), ("Arts&Lit", ["nopqrstuvwxyz"])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = {name: (loss, n) for name, loss, n in domain_loss.domain_losses(model, Letters(), tmp_path, 5)}
    joined = [ord(letter) % 50 for letter in "abcdefgh"] + [0] + [ord(letter) % 50 for letter in "ijklm"] + [0]
    want = sample_losses(model, torch.tensor(joined).view(3, 5)).mean().item()
    assert found["Health"] == (pytest.approx(want, rel=1e-12), 3) and found["Arts&Lit"][1] == 2
    assert len(domain_loss.sequences_of(tmp_path / "Health.jsonl", Letters(), 5, most=2)) == 2
    with pytest.raises(ValueError, match="has 15 tokens, a sequence has 16"):
        domain_loss.sequences_of(tmp_path / "Health.jsonl", Letters(), 16)
    (tmp_path / "Health.jsonl").write_text('{"title": "x"}\n')
    with pytest.raises(ValueError, match="Health.jsonl, line 1: no JSON object with a text"):
        domain_loss.sequences_of(tmp_path / "Health.jsonl", Letters(), 5)
    with pytest.raises(ValueError, match="has no DOMAIN.jsonl"):
        list(domain_loss.domain_losses(model, Letters(), tmp_path / "none", 5))


def test_the_printed_commands_are_what_a_shell_takes(grid3):
    run = one(grid3, "OPUS (calibrated)")
    words = shlex.split(paper_commands.shown(run.command(Path("data"), Path("results"), 8)))
    assert words[:2] == ["torchrun", "--standalone"] and words[words.index("-m") + 1] == "reproduce.pretrain"
    assert set(POOLS) == {"fineweb", "fineweb-edu-3", "fineweb-edu-4-5", "fineweb-edu-3-5", "sciencepedia"}
    assert LARGE.length == 24_576 and run.setting.validation_length == 8_192
