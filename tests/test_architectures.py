"""Factored gradients and utilities on real transformers models, every kind of parameter, float64."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from opus_bench.ghost import contract, mean, rows
from opus_bench.gradients import capture, exact_per_sample_grads, mean_gradient
from opus_bench.layers import layer_names, parameter_names
from opus_bench.preconditioner import preconditioners
from opus_bench.selector import Opus, TrainState
from opus_bench.sequences import Sequences, sample_losses
from opus_bench.utility import exact_utility, sketched_utility

from small_models import FIVE_SIGMA, VOCABULARY, perturbed, small_paper_gpt2, tokens

EXACT = dict(rtol=1e-10, atol=1e-13)
SMALL = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2))


def qwen3():
    return Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=False, attention_bias=True))


def llama():
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True, mlp_bias=True))


def lora():
    model = get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True,
                                              lora_dropout=0.1, task_type="CAUSAL_LM"))
    return model


BUILDERS = {f.__name__: f for f in (gpt2, qwen3, llama, small_paper_gpt2, lora)}


@pytest.fixture(params=BUILDERS)
def architecture(request):
    torch.manual_seed(0)
    return perturbed(BUILDERS[request.param]())


def masked(n=4, t=9):
    """Padding on the right of three samples and a loss mask that leaves out beginnings."""
    batch = tokens(n, t)
    lengths = torch.tensor([t, t - 2, 4, t - 1][:n])
    attention = (torch.arange(t) < lengths[:, None]).long()
    counted = torch.rand(n, t, generator=torch.Generator().manual_seed(3)) < 0.7
    counted[:, 1] = True
    return Sequences(batch, attention, counted)


@pytest.mark.parametrize("batch", [tokens(3, 9), masked()], ids=["plain", "masked"])
def test_every_parameter_has_the_gradient_of_autograd(architecture, batch):
    names = layer_names(architecture, "all")
    want = exact_per_sample_grads(architecture, batch, names)
    got = capture(architecture, batch, names)
    assert set(got) == set(want) == {k for k, p in architecture.named_parameters() if p.requires_grad}
    for name, gradient in got.items():
        assert want[name].abs().max() > 0, name
        dense = rows(gradient, 0, gradient.shape[0])
        torch.testing.assert_close(dense, want[name], msg=lambda m, name=name: f"{name}: {m}", **EXACT)
        torch.testing.assert_close(mean(gradient), want[name].mean(0), **EXACT)
        matrix = torch.randn(gradient.shape, dtype=torch.float64)
        torch.testing.assert_close(contract(gradient, matrix), (want[name] * matrix).sum((1, 2)), **EXACT)


def test_padding_and_masks_score_what_a_plain_backward_scores(architecture):
    """A padded sample alone, cut to its length, with torch's own loss and labels of -100."""
    batch = masked()
    names = layer_names(architecture, "all")
    got = capture(architecture, batch, names)
    architecture.eval()
    for n, length in enumerate(batch.attention_mask.sum(1).tolist()):
        alone = batch.tokens[n : n + 1, :length]
        labels = torch.where(batch.loss_mask[n, :length], alone[0], -100)
        architecture.zero_grad()
        # not through the model's own ``labels``, whose loss is float32 whatever the model is
        loss = torch.nn.functional.cross_entropy(architecture(input_ids=alone).logits[0, :-1], labels[1:])
        loss.backward()
        assert sample_losses(architecture, batch)[n].item() == pytest.approx(loss.item(), rel=1e-12)
        for name, p in architecture.named_parameters():
            if p.requires_grad:
                dense = rows(got[name], 0, got[name].shape[0])[n].view(p.shape)
                torch.testing.assert_close(dense, p.grad, msg=lambda m, name=name: f"{name}: {m}", **EXACT)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_utilities_equal_those_of_autograd(architecture, kind):
    """Exact to rounding, sketched within five standard errors of its stated variance.

    Four proxies, because the norms of transformers round to float32 inside, also in the backward: a
    mean over a power of two changes no mantissa, so that both ways round alike.
    """
    optimizers = grouped_optimizers(architecture, kind)
    batch, proxy = masked(), tokens(4, 9, seed=2)
    names = layer_names(architecture, "all")
    parameters = parameter_names(architecture, names)
    p = preconditioners(optimizers, parameters)
    grads = exact_per_sample_grads(architecture, batch, names)
    target = {k: g.mean(0) for k, g in exact_per_sample_grads(architecture, proxy, names).items()}
    eta = {k: p[k].learning_rate for k in grads}
    assert len(set(eta.values())) > 1
    updates = {k: p[k](g) for k, g in grads.items()}
    alignment = sum(eta[k] * (updates[k] * target[k]).sum((1, 2)) for k in eta)
    gram = sum(eta[k] ** 2 * updates[k].flatten(1) @ updates[k].flatten(1).T for k in eta)
    options = (capture(architecture, batch, names), mean_gradient(architecture, proxy, names)[0], p, eta,
               {k: v**2 for k, v in eta.items()})
    got = exact_utility(*options)
    torch.testing.assert_close(got.alignment, alignment, rtol=1e-10, atol=0)
    torch.testing.assert_close(got.gram, gram, rtol=1e-10, atol=0)
    width = 4096
    sketched = sketched_utility(*options, width)

    def variance(x, y, weight):
        """Of sketched inner products of rows of x and y, summed over weights (count_sketch), from above."""
        return sum(weight[k] ** 2 * ((x[k] ** 2).sum(1)[:, None] * (y[k] ** 2).sum(1) + (x[k] @ y[k].T) ** 2)
                   for k in x) / width

    u, g = {k: v.flatten(1) for k, v in updates.items()}, {k: v.reshape(1, -1) for k, v in target.items()}
    assert ((sketched.alignment - alignment).abs() < FIVE_SIGMA * variance(u, g, eta)[:, 0].sqrt()).all()
    squares = {k: v**2 for k, v in eta.items()}
    assert ((sketched.gram - gram).abs() < FIVE_SIGMA * variance(u, u, squares).sqrt()).all()


def grouped_optimizers(model, kind):
    """Two groups with rates, betas and decay of their own; a few real steps, accumulated over two batches."""
    trained = [p for p in model.parameters() if p.requires_grad]
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    matrices = [p for p in trained if p.ndim == 2 and id(p) not in embeddings] if kind == "muon" else []
    rest = [p for p in trained if not any(p is q for q in matrices)]

    def halves(parameters, first, second):
        cut = (len(parameters) + 1) // 2
        pairs = ((parameters[:cut], first), (parameters[cut:], second))
        return [dict(params=some, **options) for some, options in pairs if some]

    found = []
    if rest:
        found.append(torch.optim.AdamW(halves(rest, dict(lr=1e-3, betas=(0.8, 0.95), weight_decay=0.1),
                                              dict(lr=3e-3, betas=(0.9, 0.99), eps=1e-6))))
    if matrices:
        found.append(torch.optim.Muon(halves(matrices, dict(lr=0.01, momentum=0.9), dict(lr=0.02)), weight_decay=0.0))
    model.eval()
    for step in range(3):
        for part in range(2):
            batch = tokens(2, 10, seed=100 + 2 * step + part)
            (model(input_ids=batch, labels=batch).loss / 2).backward()
        for optimizer in found:
            optimizer.step()
            optimizer.zero_grad()
    return found


def test_a_selection_amid_gradient_accumulation_leaves_the_gradients_alone(architecture):
    optimizers = grouped_optimizers(architecture, "adamw")
    batch = tokens(2, 10, seed=7)
    architecture(input_ids=batch, labels=batch).loss.backward()
    before = {k: p.grad.clone() for k, p in architecture.named_parameters() if p.grad is not None}
    state = TrainState(architecture, optimizers, 0, {"input_ids": tokens(3, 9, seed=2)})
    labels = torch.where(masked().loss_mask & masked().attention_mask.bool(), masked().tokens, -100)
    hf_batch = {"input_ids": masked().tokens, "attention_mask": masked().attention_mask, "labels": labels}
    for arm in ("paper", "released", "calibrated"):
        picks = [Opus.arm(arm, window=9).select(x, 2, state, torch.Generator().manual_seed(0)).utilities
                 for x in (hf_batch, masked())]
        assert torch.equal(*picks)
    after = {k: p.grad for k, p in architecture.named_parameters() if p.grad is not None}
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_bf16_autocast_gives_the_gradients_of_the_computation_that_ran(architecture):
    """Against .backward() of each sample under the same autocast.

    Autograd rounds a weight's gradient to bf16 (relative 2^-8) after summing over positions, and sums
    bf16 values over uses; a batch is rounded as a single sample is.  Measured in norm, with a factor
    for the several roundings on the way.
    """
    architecture.float()
    batch, names = tokens(3, 9), layer_names(architecture, "all")
    architecture.eval()
    with torch.autocast("cpu", torch.bfloat16):
        got = capture(architecture, batch, names)
    exact = capture(architecture, batch, names)
    lossy = 0
    for n in range(3):
        architecture.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            sample_losses(architecture, batch[n : n + 1]).sum().backward()
        for name, p in architecture.named_parameters():
            if not p.requires_grad:
                continue
            dense = rows(got[name], 0, got[name].shape[0])[n].view(p.shape)
            assert dense.dtype == torch.float32
            assert (dense - p.grad).norm() <= 4 * 2**-8 * p.grad.norm(), name
            lossy += not torch.equal(dense, rows(exact[name], 0, exact[name].shape[0])[n].view(p.shape))
    assert lossy > 10  # it did run in bf16


def test_algebra_is_not_touched_by_an_autocast_around_the_selection(architecture):
    architecture.float()
    names, batch = layer_names(architecture, "matrices"), tokens(3, 9)
    gradients = capture(architecture, batch, names)
    target = mean_gradient(architecture, tokens(2, 9, seed=2), names)[0]
    plain = [contract(gradients[k], target[k]) for k in gradients]
    with torch.autocast("cpu", torch.bfloat16):
        inside = [contract(gradients[k], target[k]) for k in gradients]
    assert all(torch.equal(x, y) for x, y in zip(plain, inside))


def test_a_half_precision_model_is_contracted_in_float32(architecture):
    architecture.to(torch.bfloat16)
    names, batch = layer_names(architecture, "matrices"), tokens(3, 9)
    gradients = capture(architecture, batch, names)
    target = mean_gradient(architecture, tokens(2, 9, seed=2), names)[0]
    for name, gradient in gradients.items():
        got = contract(gradient, target[name])
        want = (rows(gradient, 0, gradient.shape[0]).double() * target[name].double()).sum((1, 2))
        assert got.dtype == torch.float32
        # |sum of products| in float32 against float64: rounding of as many terms as there are
        scale = rows(gradient, 0, gradient.shape[0]).double().abs().flatten(1) @ target[name].double().abs().flatten()
        assert ((got - want).abs() <= 1e-5 * scale).all()


@pytest.mark.parametrize("build", [gpt2, qwen3, llama])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_does_not_change_scores(build, reentrant):
    torch.manual_seed(0)
    model = perturbed(build())
    names, batch = layer_names(model, "all"), tokens(3, 9)
    want = capture(model, batch, names)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    got = capture(model, batch, names)
    for name in want:
        assert torch.equal(rows(got[name], 0, 4), rows(want[name], 0, 4))


class Checkpointed(torch.nn.Module):
    """Checkpoints its block whether or not it is training."""

    def __init__(self, reentrant):
        super().__init__()
        self.inner, self.reentrant = perturbed(small_paper_gpt2()), reentrant
        block = self.inner.blocks[0]
        plain = block.forward
        block.forward = lambda x: torch.utils.checkpoint.checkpoint(plain, x, use_reentrant=self.reentrant)

    def forward(self, input_ids):
        return self.inner(input_ids)


def test_unconditional_checkpointing_is_scored_or_refused_by_name():
    torch.manual_seed(0)
    batch = tokens(3, 9)
    model = Checkpointed(False)
    names = layer_names(model, ["*.q", "*.up"])
    got, want = capture(model, batch, names), capture(model.inner, batch, [n.removeprefix("inner.") for n in names])
    for name in want:
        assert torch.equal(rows(got[f"inner.{name}"], 0, 4), rows(want[name], 0, 4))
    with pytest.raises(ValueError, match="inner.blocks.0.attention.q.*use_reentrant=False"):
        capture(Checkpointed(True), batch, names)


def test_compiled_models_are_refused(architecture):
    with pytest.raises(ValueError, match="compiled.*plain model"):
        layer_names(torch.compile(architecture))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    state = TrainState(torch.compile(architecture), optimizer, 0, tokens(2, 9))
    with pytest.raises(ValueError, match="compiled"):
        Opus.arm("calibrated").select(tokens(4, 9), 2, state, torch.Generator())


def test_a_norm_of_another_form_is_refused_by_name():
    class GemmaRMSNorm(torch.nn.RMSNorm):
        def forward(self, x):
            return torch.nn.functional.rms_norm(x, self.normalized_shape) * (1 + self.weight)

    torch.manual_seed(0)
    model = perturbed(llama())
    model.model.norm = GemmaRMSNorm(16).double()
    with pytest.raises(ValueError, match="'model.norm' is a GemmaRMSNorm whose output is not weight"):
        capture(model, tokens(2, 9), layer_names(model, "all"))


def test_layers_by_kind_by_name_and_by_pattern():
    model = qwen3()
    blocks = layer_names(model)
    assert len(blocks) == 14 and all(".layers." in name for name in blocks)
    assert layer_names(model, "head") == ["lm_head"] and layer_names(model, "embedding") == ["model.embed_tokens"]
    assert layer_names(model, "norm") == layer_names(model, "*norm*") and len(layer_names(model, "norm")) == 9
    assert layer_names(model, "*.mlp.*") == [name for name in blocks if "mlp" in name]
    assert layer_names(model, ["lm_head", "*.0.mlp.up_proj", "embedding"]) == [
        "model.embed_tokens", "model.layers.0.mlp.up_proj", "lm_head"]
    assert set(layer_names(model, "all")) == {*layer_names(model, "matrices"), *layer_names(model, "norm")}
    with pytest.raises(ValueError, match=r"matches '\*.conv.\*'"):
        layer_names(model, "*.conv.*")
    with pytest.raises(ValueError, match="'model.layers.0' is a Qwen3DecoderLayer"):
        layer_names(model, "model.layers.0")
    adapted = lora()
    assert len(layer_names(adapted)) == 8 and all("lora_" in name for name in layer_names(adapted))
    with pytest.raises(ValueError, match="'base_model.model.transformer.ln_f' is frozen"):
        layer_names(adapted, "base_model.model.transformer.ln_f")


def test_masks_that_leave_nothing_are_refused_by_sample():
    batch = Sequences(tokens(3, 9), None, torch.tensor([[True] * 9, [True] * 2 + [False] * 7, [False] * 8 + [True]]))
    with pytest.raises(ValueError, match=r"samples \[2\] within their first 5"):
        sample_losses(small_paper_gpt2(), batch.window(5))
    with pytest.raises(ValueError, match="pad on the right"):
        Sequences(tokens(1, 4), torch.tensor([[0, 1, 1, 1]]))
    with pytest.raises(ValueError, match=r"loss_mask has shape \(1, 3\)"):
        Sequences(tokens(1, 4), None, torch.ones(1, 3))
    with pytest.raises(ValueError, match="labels differ"):
        Opus.arm("paper").select({"input_ids": tokens(2, 4), "labels": tokens(2, 4, seed=5)}, 1, None, None)


def test_all_is_refused_where_a_trained_parameter_belongs_to_no_layer(architecture):
    model = architecture
    model.register_parameter("stray", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match="layers='all' cannot score stray"):
        layer_names(model, "all")
    assert layer_names(model, "matrices")
    model.stray.requires_grad_(False)
    assert layer_names(model, "all")
