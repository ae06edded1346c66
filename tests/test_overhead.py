"""Counted overhead: FLOP formulas against torch's counter on real models, to the last FLOP; ratios by hand; the page.

Tolerances: counts are integers and equal; ratios are quotients of integers, 1e-12.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_models import perturbed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from opus_bench.model import OpusGPT2, OpusGPT2Config
from opus_bench.schema import RecordError
from opus_bench.validation.problem import scoring
from reproduce import counts
from reproduce import overhead as subject
from reproduce.counts import ESTIMATORS, LARGE, SHAPES, XL, Shape, flop_ratio, kept_bytes, token_ratio

TINY = Shape("tiny", "test", 2, 64, 128, 32, candidates=4, proxies=3, selected=2, window=16)
GROUPED = Shape("grouped", "test", 2, 64, 128, 32, 4, 3, 2, 16, feed_forward=96, kv_width=32, gated=True)
WIDER = replace(GROUPED, name="wider heads", query_width=128)
ROOT = Path(__file__).resolve().parent.parent


def tokens(n, t):
    return torch.randint(128, (n, t), generator=torch.Generator().manual_seed(0))


def counted(call):
    """FLOPs by torch's counter, attention by plain products; and what the call returns."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = call()
    return counter.get_total_flops(), result


def model_of(shape):
    """The paper's GPT-2 or Qwen3, small."""
    if shape is TINY:
        return OpusGPT2(OpusGPT2Config(128, 2, 64, 2, 64))
    config = Qwen3Config(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16,
                         num_attention_heads=shape.queries // 16, num_key_value_heads=2, attn_implementation="sdpa")
    return Qwen3ForCausalLM(config)


def embedded(model):
    """List that gets the embedding's output, where the backward to activations ends."""
    found = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: found.append(output))
    return found


@pytest.mark.parametrize("shape", [TINY, GROUPED, WIDER], ids=lambda s: s.name)
def test_parameters_are_those_of_the_model(shape):
    model = model_of(shape)
    matrices = {k: p.numel() for k, p in model.named_parameters() if p.ndim == 2}
    blocks = sum(n for k, n in matrices.items() if "embed" not in k and "head" not in k)
    assert shape.block_parameters == blocks
    assert shape.head_parameters == model.get_output_embeddings().weight.numel()


@pytest.mark.parametrize("shape", [TINY, GROUPED, WIDER], ids=lambda s: s.name)
def test_forward_is_that_of_torchs_counter(shape):
    flops, _ = counted(lambda: model_of(shape)(input_ids=tokens(2, 32)))
    assert flops == counts.forward_flops(shape, 2, 32)


@pytest.mark.parametrize("shape", [TINY, GROUPED, WIDER], ids=lambda s: s.name)
def test_training_step_is_that_of_torchs_counter(shape):
    batch, model = tokens(shape.selected, shape.length), model_of(shape)
    flops, _ = counted(lambda: model(input_ids=batch, labels=batch).loss.backward())
    assert flops == counts.training_flops(shape)


@pytest.mark.parametrize("shape", [TINY, GROUPED, WIDER], ids=lambda s: s.name)
def test_backward_to_activations_is_that_of_torchs_counter(shape):
    batch, model = tokens(2, 32), model_of(shape).requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_()
    found = embedded(model)
    _, loss = counted(lambda: model(input_ids=batch, labels=batch).loss)
    # frozen weights but for the embedding, which TINY shares with its head: gradients of its output alone are asked for
    flops, _ = counted(lambda: torch.autograd.grad(loss, found))
    assert flops == counts.activation_flops(shape, 2, 32)


def test_each_estimator_is_what_the_core_does():
    """Candidates' and proxy's gradients less what the first block's q, k and v do not need; then the estimators."""
    model = perturbed(model_of(TINY))
    optimizer = torch.optim.AdamW(model.parameters())
    batch = tokens(2, 32)
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    n, m, t, p = TINY.candidates, TINY.proxies, TINY.window, TINY.block_parameters
    flops, problem = counted(lambda: scoring(model, [optimizer], tokens(n, t), tokens(m, t)))
    gradients = counts.forward_flops(TINY, n, t) + counts.activation_flops(TINY, n, t)
    unneeded = 2 * (n + m) * t * 64 * 3 * 64
    assert flops == gradients + counts.proxy_flops(TINY) - unneeded
    width, weights = 32, 2 * 6
    sketches_gram = 2 * n * n * width * weights
    for name, call, extra in (("exact alignment", lambda: problem.exact(gram=False), 0),
                              ("exact alignment and Gram", problem.exact, 0),
                              ("CountSketch", lambda: problem.sketched(width, 0), sketches_gram)):
        assert counted(call)[0] == counts.candidate_flops(TINY, name) - gradients + extra, name
    assert counts.candidate_flops(TINY, "exact alignment and Gram") - gradients == 2 * n * t * p + 2 * n * n * p
    flops, _ = counted(lambda: [model(input_ids=tokens(n, t)) for _ in range(2)])
    assert flops == counts.candidate_flops(TINY, "central difference")


def test_token_ratios_by_hand():
    assert token_ratio(LARGE) == pytest.approx(36_864 / 786_432, rel=1e-12) == 0.046875  # 72 x 512, 32 x 24,576
    assert token_ratio(XL) == pytest.approx(20_480 / 98_304, rel=1e-12)  # 40 x 512, 16 x 6,144: 20.8 %
    assert token_ratio(replace(XL, candidates=64, selected=32)) == pytest.approx(0.1875, rel=1e-12)
    ratios = {s.name: round(100 * token_ratio(s), 2) for s in SHAPES}
    assert ratios == {"GPT-2 Large": 4.69, "GPT-2 XL": 20.83, "GPT-2 XL, N 64": 18.75, "GPT-2 XL, M 16": 25.0,
                      "Qwen3-8B": 37.5, "A": 150.0}


def test_parameters_by_hand():
    assert LARGE.block_parameters == 36 * 12 * 1280**2 and LARGE.head_parameters == 50304 * 1280
    qwen = next(s for s in SHAPES if s.name == "Qwen3-8B")
    assert qwen.block_parameters == 6_945_767_424  # 8.19 billion with embedding and head of 622 million each
    assert (qwen.block_parameters + 2 * qwen.head_parameters) / 1e9 == pytest.approx(8.19, abs=0.01)


@pytest.mark.parametrize("every", [1, 8])
def test_without_attention_and_head_scoring_costs_its_tokens(monkeypatch, every):
    monkeypatch.setattr(counts, "attention_flops", lambda *args: 0)
    for shape in (replace(s, vocabulary=0) for s in SHAPES):
        candidates = shape.candidates * shape.window / (shape.selected * shape.length)
        proxies = shape.proxies * shape.window / (shape.selected * shape.length) / every
        for name in ("CountSketch", "exact alignment"):
            assert flop_ratio(shape, name, every) == pytest.approx(candidates + proxies, rel=1e-12)
        want = candidates * 2 / 3 + proxies
        assert flop_ratio(shape, "central difference", every) == pytest.approx(want, rel=1e-12)


def test_bytes_kept_by_hand():
    assert kept_bytes(XL)["hash tables of the literal method"] == 12 * 48 * 12 * 1600**2  # 17.7 GB
    assert kept_bytes(TINY, width=10)["sketches"] == 4 * 4 * 10 * 12
    assert kept_bytes(GROUPED, width=10)["sketches"] == 4 * 4 * 10 * 14
    assert kept_bytes(TINY)["proxy gradient"] == 4 * TINY.block_parameters


def test_what_costs_more_is_counted_as_more():
    for shape in SHAPES:
        for causal in (False, True):
            ratio = {name: flop_ratio(shape, name, causal=causal) for name in ESTIMATORS}
            assert ratio["central difference"] < ratio["exact alignment"] == ratio["CountSketch"]
            assert ratio["CountSketch"] < ratio["exact alignment and Gram"]
            assert flop_ratio(shape, "CountSketch", 8, causal) < ratio["CountSketch"] < token_ratio(shape)
    half, full = (counts.attention_flops(TINY, 2, 32, causal) for causal in (True, False))
    assert 2 * half == full == 4 * 2 * 32 * 32 * 64 * 2


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="unknown estimator 'tea leaves'; known: CountSketch"):
        flop_ratio(XL, "tea leaves")
    with pytest.raises(ValueError, match="proxy_every must be at least 1, got 0"):
        flop_ratio(XL, "CountSketch", 0)


def record(run, *rows, device="cpu"):
    """The part of a record that the page reads."""
    metrics = [{"name": "time ratio", "shape": shape, "estimator": name, "value": value} for shape, name, value in rows]
    return {"run_id": run, "scale": "smoke", "environment": {"device": device}, "config": {"seed": 0},
            "code": {"version": "0" * 12}, "metrics": [*metrics, {"name": "seconds", "value": 1.0}]}


def line(text, *start):
    return [x for x in text.splitlines() if x.startswith("| " + " | ".join(start) + " |")]


def test_page_shows_measured_beside_counted():
    records = [record("a" * 12, ("A", "CountSketch", 1.5), ("A", "CountSketch, bf16", 1.25)),
               record("b" * 12, ("A", "CountSketch", 1.75), ("B", "exact alignment", 0.5))]
    text = subject.page(records)
    assert text == subject.page(records) and text.startswith(f"# {subject.TITLE}\n\nMade by `{subject.COMMAND}`")
    counts = subject.percent(flop_ratio(SHAPES[-1], "CountSketch"))
    [row] = line(text, "A", "CountSketch")
    assert row.endswith("| 162.5 % (cpu, n = 2, 150.0 % to 175.0 %) |") and f"| 150.0 % | {counts} |" in row
    [row] = line(text, "A", "CountSketch, bf16")
    assert row.endswith("| – | – | – | – | – | – | 125.0 % (cpu, n = 1) |")
    assert line(text, "A", "exact alignment")[0].endswith("| not run: no record |")
    assert line(text, "B", "exact alignment")[0].endswith("| 50.0 % (cpu, n = 1) |")
    assert line(text, "GPT-2 XL", "central difference")[0].endswith("| not run: no GPU |")
    assert "[aaaaaaaaaaaa](../runs/aaaaaaaaaaaa.json)" in text and "from 2 runs" in text


def test_page_without_records_says_which_reading_fits():
    text = subject.page([])
    assert "Token ratios that round to 4.7 %: GPT-2 Large." in text and "no run has measured a time ratio" in text
    assert "FLOP ratios that do, of 96 counted: none." in text and "## Runs" not in text
    assert line(text, "released launch script", "any")[0].count("not known") == 5


def test_devices_are_kept_apart():
    records = [record("a" * 12, ("A", "CountSketch", 1.5)), record("b" * 12, ("A", "CountSketch", 0.5), device="cuda")]
    times = subject.time_ratios(records)
    assert subject.measured(times, "A", "CountSketch") == "150.0 % (cpu, n = 1); 50.0 % (cuda, n = 1)"


def test_a_ratio_of_nothing_is_refused():
    broken = record("c" * 12, ("A", "CountSketch", 1.5))
    del broken["metrics"][0]["estimator"]
    with pytest.raises(RecordError, match="cccccccccccc: a time ratio needs 'estimator'"):
        subject.page([broken])


def test_script_writes_the_page_or_says_one_clear_line(tmp_path):
    def call(folder):
        return subprocess.run([sys.executable, "-m", "reproduce.overhead", "--results", folder], cwd=ROOT,
                              capture_output=True, text=True, check=False)

    done = call(tmp_path)
    assert done.returncode == 0 and "| GPT-2 Large | CountSketch | 4.7 % | 4.69 % |" in done.stdout
    assert (tmp_path / "tables" / "overhead.md").read_text(encoding="utf-8") == subject.page([])
    bad = call(tmp_path / "missing")
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and "is not a folder" in bad.stderr
