"""Streamed utilities equal the captured ones; memory is counted, not timed.

Exact identities hold to float64 round-off.  The central difference is of order eps^2; products in bfloat16 stay
within the bound of their roundings.
"""

import pytest
import torch
from small_models import optimizers_for, perturbed, small_hf_gpt2, small_paper_gpt2, tokens

from benchmarks.counting import peak_allocated
from opus_bench.gradients import PerSampleGradient, capture, mean_gradient, sample_losses, stream
from opus_bench.ghost import contract, wide
from opus_bench.layers import layer_names, parameter_names
from opus_bench.model import OpusGPT2, OpusGPT2Config
from opus_bench.preconditioner import preconditioners
from opus_bench.selector import Opus, TrainState
from opus_bench.streamed import forward_alignment, microbatches, streamed_alignment, streamed_sketch
from opus_bench.utility import exact_utility, sketched_utility, utility_of_sketches


class Problem:
    def __init__(self, build=small_paper_gpt2, layers="blocks", kind="adamw"):
        self.model = perturbed(build())
        self.optimizers = optimizers_for(self.model, kind)
        self.names = layer_names(self.model, layers)
        self.parameters = parameter_names(self.model, self.names)
        self.p = preconditioners(self.optimizers, self.parameters)
        self.batch = tokens(5, 9)
        self.proxy, _ = mean_gradient(self.model, tokens(3, 9, seed=7), self.names)
        self.alignment_weights = {k: 0.3 + 0.1 * i for i, k in enumerate(self.p)}
        self.redundancy_weights = {k: w**2 for k, w in self.alignment_weights.items()}
        self.directions = {k: self.alignment_weights[k] * self.p[k](g) for k, g in self.proxy.items()}
        self.options = (self.proxy, self.p, self.alignment_weights, self.redundancy_weights)

    def captured(self):
        return capture(self.model, self.batch, self.names)


CASES = [(small_paper_gpt2, "blocks", "muon"), (small_paper_gpt2, "matrices", "adamw"), (small_hf_gpt2, "all", "adamw")]


@pytest.mark.parametrize("microbatch", [None, 1, 2, 5, 9])
@pytest.mark.parametrize("build,layers,kind", CASES)
def test_streamed_utilities_equal_those_of_captured_factors(build, layers, kind, microbatch):
    problem = Problem(build, layers, kind)
    exact = exact_utility(problem.captured(), *problem.options)
    alignment = streamed_alignment(problem.model, problem.batch, problem.names, problem.directions,
                                   microbatch=microbatch)
    torch.testing.assert_close(alignment, exact.alignment, rtol=1e-10, atol=1e-12)
    want = sketched_utility(problem.captured(), *problem.options, width=64, seed=3)
    got = streamed_sketch(problem.model, problem.batch, problem.names, *problem.options, width=64, seed=3,
                          microbatch=microbatch)
    torch.testing.assert_close(got.alignment, want.alignment, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got.gram, want.gram, rtol=1e-10, atol=1e-12)


def test_sketches_are_multiplied_as_wide_as_they_are_whatever_the_autocast():
    features = [("w", torch.randn(5, 64, generator=torch.Generator().manual_seed(0)))]
    options = ({"w": torch.linspace(-1, 1, 12).view(3, 4)}, {"w": 1.0}, {"w": 1.0}, 64, 3)
    plain = utility_of_sketches(features, *options)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = utility_of_sketches(features, *options)
    assert torch.equal(narrow.gram, plain.gram) and torch.equal(narrow.alignment, plain.alignment)


def test_alignment_and_gram_from_the_same_rows_equal_the_contraction():
    problem = Problem(kind="muon")
    with_gram = exact_utility(problem.captured(), *problem.options)
    without = exact_utility(problem.captured(), *problem.options[:-1], None)
    torch.testing.assert_close(with_gram.alignment, without.alignment, rtol=1e-10, atol=1e-12)


def test_a_stream_hands_over_every_use_once_and_leaves_no_gradient():
    problem = Problem(layers="matrices")
    seen: dict[str, list[PerSampleGradient]] = {}
    losses = stream(problem.model, problem.batch, problem.names, lambda k, g: seen.setdefault(k, []).append(g))
    kept = problem.captured()
    assert {k: len(g) for k, g in seen.items()} == {k: len(g.uses) for k, g in kept.items()}
    assert len(seen["embedding.weight"]) == 2  # the head's weight is the embedding's
    assert losses.shape == (5,) and not losses.requires_grad
    assert all(p.grad is None for p in problem.model.parameters())


def test_the_central_difference_is_of_second_order_and_restores_the_weights():
    problem = Problem(layers="matrices")
    exact = exact_utility(problem.captured(), *problem.options[:-1], None).alignment
    before = {k: p.detach().clone() for k, p in problem.model.named_parameters()}
    errors = []
    for step in (1e-3, 5e-4):
        got = forward_alignment(problem.model, problem.batch, problem.parameters, problem.directions, step)
        errors.append((got - exact).norm())
    assert 3.5 < errors[0] / errors[1] < 4.5  # 4 for an error of eps^2
    assert errors[1] < 1e-4 * exact.norm()
    split = forward_alignment(problem.model, problem.batch, problem.parameters, problem.directions, 5e-4,
                              microbatch=2)
    torch.testing.assert_close(split, got, rtol=1e-6, atol=1e-9 * float(got.abs().max()))
    assert all(torch.equal(p, before[k]) for k, p in problem.model.named_parameters())


def test_the_central_difference_moves_the_weights_that_autocast_computes_with():
    model, optimizer = reference()
    state = TrainState(model, optimizer, 0, torch.randint(128, (2, 64)))
    batch = torch.randint(128, (8, 64))
    exact, narrow = (
        Opus.arm("calibrated", layers="blocks", window=64, **options).utilities(batch, 4, state).alignment
        for options in ({}, {"estimator": "forward", "scoring_dtype": "bfloat16", "relative_step": 3e-2})
    )
    assert torch.corrcoef(torch.stack([exact, narrow]))[0, 1] > 0.5  # a stale copy of the weights gives zeros
    again = Opus.arm("calibrated", layers="blocks", window=64).utilities(batch, 4, state).alignment
    assert torch.equal(again, exact)


def test_weights_are_restored_bit_for_bit_when_a_forward_raises():
    problem = Problem()
    before = {k: p.detach().clone() for k, p in problem.model.named_parameters()}
    with pytest.raises(IndexError):
        forward_alignment(problem.model, problem.batch + 1000, problem.parameters, problem.directions)
    assert all(torch.equal(p, before[k]) for k, p in problem.model.named_parameters())


def test_a_compiled_model_can_be_scored_by_forwards_alone():
    problem = Problem()
    plain = forward_alignment(problem.model, problem.batch, problem.parameters, problem.directions, 1e-3)
    compiled = torch.compile(problem.model, backend="aot_eager")
    got = forward_alignment(compiled, problem.batch, problem.parameters, problem.directions, 1e-3)
    torch.testing.assert_close(got, plain, rtol=1e-6, atol=1e-9 * float(plain.abs().max()))
    with pytest.raises(ValueError, match="compiled"):
        streamed_alignment(compiled, problem.batch, problem.names, problem.directions)


def test_products_in_bfloat16_stay_within_the_bound_of_their_roundings():
    problem = Problem()
    u = torch.finfo(torch.bfloat16).eps / 2
    for name, gradient in problem.captured().items():
        (use,) = gradient.uses
        v = problem.directions[name]
        exact, got = contract(gradient, v), contract(gradient, v, torch.bfloat16)
        size = ((use.right.abs() @ v.abs().T) * use.left.abs()).sum((1, 2))
        # two rounded factors and a rounded product, and a sum of i terms in float32
        bound = ((1 + u) ** 3 - 1 + v.shape[1] * torch.finfo(torch.float32).eps) * size
        assert ((got - exact).abs() <= bound).all()
        assert not torch.equal(wide(got).double(), exact)


def reference(width=64, layers=3):
    torch.manual_seed(0)
    model = OpusGPT2(OpusGPT2Config(128, layers, width, 4, 64))
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def peak_of(options, candidates):
    model, optimizer = reference()
    batch, proxy = torch.randint(128, (candidates, 64)), torch.randint(128, (2, 64))
    opus, state = Opus.arm(**options), TrainState(model, optimizer, 1, proxy)
    opus.utilities(batch, candidates // 2, TrainState(model, optimizer, 0, proxy))  # the proxy gradient is kept
    opus.proxy_every = 1000
    return peak_allocated(lambda: opus.utilities(batch, candidates // 2, state))


@pytest.mark.parametrize("options", [
    {"name": "calibrated"}, {"name": "calibrated", "scoring_dtype": "bfloat16"},
    {"name": "calibrated", "estimator": "forward"},
])
def test_peak_memory_does_not_depend_on_the_number_of_candidates(options):
    few, many = (peak_of(options | {"microbatch": 2, "window": 64}, n) for n in (4, 32))
    tokens_and_scores = 28 * 64 * 8 + 28 * 8 * 4
    assert many - few <= tokens_and_scores
    assert peak_of(options | {"window": 64}, 32) > 2 * many  # without microbatches it does


def test_sketches_keep_width_numbers_a_candidate_and_weight_and_no_table():
    options = {"name": "paper", "microbatch": 2, "window": 64, "sketch_width": 128, "redundancy": 0.0}
    few, many = (peak_of(options, n) for n in (4, 32))
    model, _ = reference()
    weights = len(layer_names(model, "blocks"))
    assert many - few <= 28 * weights * 128 * 4 + 28 * 64 * 8 + 28 * 8 * 4
    scored = sum(p.numel() for p in parameter_names(model, layer_names(model, "blocks")).values())
    before = torch.randint(128, (4, 64))
    opus = Opus.arm(**options)
    opus.utilities(before, 2, TrainState(model, torch.optim.AdamW(model.parameters()), 0, before))
    kept = [x for x in vars(opus).values() if isinstance(x, torch.Tensor)]
    kept += list((opus._proxy_gradient or {}).values())
    assert sum(x.numel() * x.element_size() for x in kept) == 4 * scored  # the proxy's gradient and nothing else


def test_scoring_needs_no_more_memory_than_a_plain_backward_of_the_same_tokens():
    model, _ = reference()
    names = layer_names(model, "blocks")
    batch = torch.randint(128, (16, 64))
    directions = {k: torch.zeros_like(p) for k, p in parameter_names(model, names).items()}

    def plain():
        sample_losses(model, batch).mean().backward()

    streamed = peak_allocated(lambda: streamed_alignment(model, batch, names, directions))
    assert streamed <= peak_allocated(plain) + 64 * len(batch)  # scores of the samples, loss by loss


@pytest.mark.parametrize("options,words", [
    ({"microbatch": 0}, "microbatch must be at least 1 candidate, got 0"),
    ({"estimator": "exact", "microbatch": 2}, "exact Gram"),
    ({"estimator": "exact", "preconditioner": "adjoint", "redundancy": 0.0, "microbatch": 2}, "adjoint"),
    ({"estimator": "forward"}, "alignment alone; set redundancy=0"),
    ({"relative_step": 0.0}, "relative_step must be positive, got 0.0"),
    ({"scoring_dtype": "float8"}, "scoring_dtype must be model or bfloat16, got 'float8'"),
])
def test_a_selector_that_cannot_be_is_refused_when_it_is_built(options, words):
    with pytest.raises(ValueError, match=words):
        Opus(**options)


def test_bad_arguments_are_named():
    problem = Problem()
    with pytest.raises(ValueError, match="microbatch must be at least 1 candidate, got 0"):
        list(microbatches(problem.batch, 0))
    with pytest.raises(ValueError, match="relative_step must be positive, got -1"):
        forward_alignment(problem.model, problem.batch, problem.parameters, problem.directions, -1)
    nothing = {k: torch.zeros_like(v) for k, v in problem.directions.items()}
    with pytest.raises(ValueError, match="norm is 0.0"):
        forward_alignment(problem.model, problem.batch, problem.parameters, nothing)


@pytest.mark.parametrize("options", [{"estimator": "exact"}, {"estimator": "forward"}, {"estimator": "sketch"}])
def test_microbatches_do_not_change_the_choice(options):
    problem = Problem(layers="matrices")
    state = TrainState(problem.model, problem.optimizers, 0, tokens(3, 9, seed=7))
    chosen = [
        Opus.arm("calibrated", microbatch=m, window=9, **options)
        .select(problem.batch, 2, state, torch.Generator().manual_seed(0)).indices.tolist()
        for m in (None, 1, 3)
    ]
    assert chosen[0] == chosen[1] == chosen[2]
