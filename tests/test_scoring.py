"""The benchmark of scoring: estimators against the exact utilities, the page, and a run of the smallest shape.

Nothing is timed here: ratios of the smallest shape are written and read, not judged.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import optimizers_for, perturbed, small_paper_gpt2, tokens

from benchmarks import frontier as pages
from benchmarks.counting import flops, peak_allocated
from benchmarks.estimators import ESTIMATORS
from benchmarks.problem import Problem, opus
from benchmarks.scoring import Bench, Effort
from benchmarks.shapes import SHAPES, Shape
from benchmarks.tried import forward_difference, forward_mode, gram_of_some_rows, tensor_sketch, two_sided
from benchmarks.variants import PROXY_EVERY, gradient_of
from opus_bench import results
from opus_bench.gradients import capture, exact_per_sample_grads, mean_gradient
from opus_bench.layers import layer_names
from opus_bench.preconditioner import preconditioners

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def problem():
    model = perturbed(small_paper_gpt2())
    return Problem(model, optimizers_for(model, "adamw"))


def by_autograd(problem, candidates, proxy):
    """Alignment and Gram with the paper's weights from dense gradients by torch.func."""
    names, parameters = problem.scored()
    gradients = exact_per_sample_grads(problem.model, candidates, names)
    target, _ = mean_gradient(problem.model, proxy, names)
    p = preconditioners(problem.optimizers, parameters)
    alignment, gram = 0, 0
    for name, g in gradients.items():
        u = p[name](g).flatten(1)
        alignment = alignment + p[name].learning_rate * u @ target[name].flatten()
        gram = gram + p[name].learning_rate ** 2 * u @ u.T
    return alignment, gram


@pytest.mark.parametrize("score", [opus(estimator="exact"), forward_mode])
def test_exact_estimators_of_the_benchmark_equal_autograd(problem, score):
    candidates, proxy = tokens(4, 9), tokens(3, 9, seed=5)
    alignment, gram = by_autograd(problem, candidates, proxy)
    got = score(problem, candidates, proxy)
    torch.testing.assert_close(got.alignment, alignment, rtol=1e-9, atol=1e-14)
    if got.gram is not None:
        torch.testing.assert_close(got.gram, gram, rtol=1e-9, atol=1e-16)


def test_all_rows_give_the_gram_and_products_in_bfloat16_its_error(problem):
    candidates, proxy = tokens(4, 9), tokens(3, 9, seed=5)
    alignment, gram = by_autograd(problem, candidates, proxy)
    got = gram_of_some_rows(1.0)(problem, candidates, proxy)
    # every entry is a sum of products of five rounded numbers, each within 2^-8
    bound = 5 * 2**-8 * gram.diagonal().sqrt().outer(gram.diagonal().sqrt())
    assert ((got.gram - gram).abs() <= bound).all()


def test_projections_of_an_unfactored_map_are_unbiased():
    """With SGD nothing is factored, so over projections the mean alignment is the exact one."""
    model = perturbed(small_paper_gpt2())
    problem = Problem(model, optimizers_for(model, "sgd"))
    candidates = proxy = tokens(3, 9)  # so alignments are far from zero
    exact = opus(estimator="exact")(problem, candidates, proxy)
    wide = two_sided(512, torch.float64)(problem, candidates, proxy)
    # |error| <= 5 standard errors; variance below (2 / size) |u|^2 |g|^2 (1 + 2 / size), weights independent
    scale = exact.gram.diagonal().sqrt() * float(sum((g**2).sum() for g in mean_gradient(
        model, proxy, problem.scored()[0])[0].values())) ** 0.5
    assert ((wide.alignment - exact.alignment).abs() <= 5 * (3 / 512) ** 0.5 * scale).all()


def test_a_tensor_sketch_is_unbiased_and_scatters_as_stated():
    """As above; the candidates' sketches and that of a dense proxy gradient share their hashes."""
    model = perturbed(small_paper_gpt2())
    problem = Problem(model, optimizers_for(model, "sgd"))
    candidates = proxy = tokens(3, 9)  # so alignments are far from zero
    exact = opus(estimator="exact")(problem, candidates, proxy)
    got = tensor_sketch(2**14)(problem, candidates, proxy)
    target = float(sum((g**2).sum() for g in mean_gradient(model, proxy, problem.scored()[0])[0].values())) ** 0.5
    scale = exact.gram.diagonal().sqrt()
    assert ((got.alignment - exact.alignment).abs() <= 5 * (3 / 2**14) ** 0.5 * scale * target).all()
    assert ((got.gram - exact.gram).abs() <= 5 * (3 / 2**14) ** 0.5 * scale.outer(scale)).all()


def test_the_training_gradient_comes_from_the_captured_factors(problem):
    batch, names, chosen = tokens(4, 9), layer_names(problem.model, "all"), [2, 0]
    got = gradient_of(capture(problem.model, batch, names), chosen)
    want, _ = mean_gradient(problem.model, batch[chosen], names)
    assert got.keys() == want.keys()
    for name, g in want.items():
        torch.testing.assert_close(got[name], g, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_difference_in_the_upper_blocks_is_the_exact_alignment_of_these(problem, share):
    candidates, proxy = tokens(4, 9), tokens(3, 9, seed=5)
    names = [n for n, _ in problem.model.named_modules() if n.startswith("blocks.1" if share < 1 else "blocks.")]
    names = [n for n in names if hasattr(problem.model.get_submodule(n), "weight")]
    exact = opus(estimator="exact", redundancy=0.0, layers=names)(problem, candidates, proxy)
    got = forward_difference(share, 1e-5, compiled=False)(problem, candidates, proxy)
    # bias of relative order step^2, rounding of losses of about 5 over a step: 5e-16 / 1e-5 of the alignment's size
    size = float(exact.alignment.abs().max())
    torch.testing.assert_close(got.alignment, exact.alignment, rtol=1e-6, atol=1e-9 * size)


def test_every_estimator_leaves_the_state_as_it_was(problem, monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "disable", True)  # compiling takes long and needs a compiler
    before = [p.detach().clone() for p in problem.model.parameters()]
    state = [x.clone() for o in problem.optimizers for s in o.state.values() for x in s.values()]
    for e in ESTIMATORS:
        e.score(problem, tokens(4, 9), tokens(3, 9, seed=5))
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(problem.model.parameters(), before, strict=True))
    now = [x for o in problem.optimizers for s in o.state.values() for x in s.values()]
    assert all(torch.equal(x, y) for x, y in zip(now, state, strict=True))


def test_counted_memory_and_flops_are_those_of_the_tensors():
    x = torch.zeros(100, 100)
    assert peak_allocated(lambda: (x + 1) + (x + 2)) == pytest.approx(3 * 40_000, abs=64)
    assert flops(lambda: x @ x) == 2 * 100**3


def test_shapes_are_those_of_the_models():
    qwen = Shape("tiny", "a stand-in", 2, 32, 4, 64, 16, 8, 4, 2, 2, 1, 1e-3, dtype="bfloat16", architecture="qwen3")
    model = qwen.build()
    assert type(model).__name__ == "Qwen3ForCausalLM" and next(model.parameters()).dtype == torch.bfloat16
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        model(input_ids=tokens(2, 9) % 64, labels=tokens(2, 9) % 64).loss.backward()
        optimizer.step()
    got = opus(estimator="exact", redundancy=0.0)(Problem(model, [optimizer]), tokens(4, 8), tokens(2, 8, seed=5))
    assert got.alignment.isfinite().all()
    sketched = opus()(Problem(model, [optimizer]), tokens(4, 8), tokens(2, 8, seed=5))
    assert torch.corrcoef(torch.stack([got.alignment, sketched.alignment]))[0, 1] > 0.9
    assert SHAPES["D"].layers == 36 and SHAPES["B"].length == 24576 and SHAPES["A"].selected == 4
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a GPU"):
            SHAPES["C"].build()


def test_the_frontier_is_what_nothing_beats():
    rows = [{"estimator": name, "value": cost, "alignment": rank}
            for name, cost, rank in (("a", 1.0, 0.9), ("b", 0.5, 0.5), ("c", 2.0, 0.9), ("d", 2.0, 0.99),
                                     ("e", 0.6, 0.4))]
    assert pages.frontier(rows) == ["b", "a", "d"]


def call(*arguments):
    done = subprocess.run([sys.executable, "-m", "benchmarks.scoring", *arguments], cwd=ROOT, capture_output=True,
                          text=True, timeout=600, env={**os.environ, "TORCHDYNAMO_DISABLE": "1"})
    return done.returncode, done.stdout, done.stderr


def test_bad_input_is_one_line_before_anything_runs(tmp_path):
    code, out, _ = call("--shape", "ci", "--results", str(tmp_path), "--dry-run")
    assert code == 0 and "8 candidates" in out and not list(tmp_path.rglob("*.json"))
    code, _, errors = call("--repeats", "0")
    assert code == 2 and "--repeats must be at least 1, got 0" in errors
    if not torch.cuda.is_available():
        code, _, errors = call("--shape", "B", "--results", str(tmp_path))
        assert code == 2 and "needs a GPU and there is none" in errors and "Traceback" not in errors


@pytest.mark.network
def test_a_run_of_the_smallest_shape_gives_a_record_a_page_and_a_figure(tmp_path):
    options = ("--shape", "ci", "--results", str(tmp_path), "--repeats", "1", "--buffers", "2")
    code, out, errors = call(*options)
    assert code == 0, errors[-2000:]
    (record,) = results.load(tmp_path / "runs", "scoring")
    ratios = {row["estimator"]: row for row in pages.named(record, "time ratio")}
    assert {e.name for e in ESTIMATORS} < set(ratios)
    assert ratios["exact alignment"]["alignment"] == ratios["exact alignment and Gram"]["utility"] == 1.0
    assert all(row["peak_ratio"] > 0 and row["value"] > 0 for row in ratios.values())
    assert len(pages.named(record, "stale proxy")) == len(pages.named(record, "aged proxy")) == 2 * PROXY_EVERY
    assert len(pages.named(record, "reuse")) == 3
    assert {r["axis"] for r in pages.named(record, "linearity")} == {"candidates", "tokens"}
    page = (tmp_path / "tables" / "scoring.md").read_bytes()
    assert all(e.name.encode() in page for e in ESTIMATORS)
    assert [p.read_bytes() for p in pages.write(tmp_path)][0] == page
    code, out, _ = call(*options)
    assert code == 0 and "is done" in out


def test_the_plain_step_is_the_same_in_microbatches():
    assert Effort().factors[-1] == 8
    models = [perturbed(small_paper_gpt2())]
    models.append(copy.deepcopy(models[0]))
    batch = tokens(4, 9)
    for model, microbatch in zip(models, (None, 1), strict=True):
        bench = object.__new__(Bench)
        bench.model, bench.shape = model, Shape("x", "x", 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1.0, microbatch=microbatch)
        bench.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        bench.plain_step(batch)
    first, second = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-12)
