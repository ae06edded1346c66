"""The paper's architecture, property by property, and that it is a transformers model like any other."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from opus_bench.model import SIZES, OpusGPT2, OpusGPT2Config, rms_norm, rotary
from small_models import VOCABULARY, perturbed, small_paper_gpt2, tokens


def by_hand(model, batch):
    """The forward pass written out from the released architecture, without any module's forward."""
    w = {k: p.detach() for k, p in model.named_parameters()}
    d, heads = 16, 2
    norm = lambda x: x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()  # noqa: E731
    x = norm(w["embedding.weight"][batch])
    n, t, _ = x.shape
    angle = torch.arange(t)[:, None] * torch.tensor([1.0, 1 / 1024, 0, 0], dtype=torch.float64)
    for b in range(2):
        y = norm(x)
        q, k, v = (F.linear(y, w[f"blocks.{b}.attention.{c}.weight"]).view(n, t, heads, 8).transpose(1, 2)
                   for c in "qkv")

        def rotate(z):
            pair = torch.complex(z[..., :4], z[..., 4:]) * torch.exp(-1j * angle)
            return torch.cat([pair.real, pair.imag], -1)

        q, k = rotate(norm(q)), rotate(norm(k))
        scores = (0.12 * q @ k.transpose(-1, -2)).masked_fill(torch.ones(t, t).triu(1).bool(), -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, d)
        x = x + F.linear(y, w[f"blocks.{b}.attention.out.weight"])
        x = x + F.linear(F.gelu(F.linear(norm(x), w[f"blocks.{b}.up.weight"])), w[f"blocks.{b}.down.weight"])
    return 30 * torch.sigmoid(norm(x) @ w["embedding.weight"].T / (7.5 * d**0.5))


def test_logits_equal_the_architecture_written_out(model):
    batch = tokens(3, 11)
    torch.testing.assert_close(model(input_ids=batch).logits, by_hand(model, batch), rtol=1e-10, atol=1e-10)


def test_positions_are_relative_and_only_half_of_each_head_turns():
    q = torch.randn(1, 1, 1, 8, dtype=torch.float64).expand(1, 1, 6, 8)
    k = torch.randn(1, 1, 1, 8, dtype=torch.float64).expand(1, 1, 6, 8)
    scores = (rotary(q) @ rotary(k).transpose(-1, -2))[0, 0]
    for lag in range(5):
        torch.testing.assert_close(scores.diagonal(lag), scores[0, lag].expand(6 - lag))
    turned = rotary(q)[0, 0]
    assert torch.equal(turned[:, [2, 3, 6, 7]], q[0, 0][:, [2, 3, 6, 7]]) and not torch.allclose(turned[5], q[0, 0, 5])


def test_norm_has_no_weights_and_unit_mean_square():
    x = torch.randn(4, 32, dtype=torch.float64) * 7
    torch.testing.assert_close(rms_norm(x).pow(2).mean(-1), torch.ones(4, dtype=torch.float64))


def test_initial_output_projections_are_zero_and_the_head_is_tied():
    model = small_paper_gpt2()
    for block in model.blocks:
        assert not block.attention.out.weight.any() and not block.down.weight.any() and block.up.weight.any()
    assert model.head.weight is model.embedding.weight
    assert not any("bias" in k or "norm" in k for k, _ in model.named_parameters())


def test_a_later_token_does_not_change_an_earlier_logit(model):
    a, b = tokens(1, 10), tokens(1, 10)
    b[0, 7] = (b[0, 7] + 1) % VOCABULARY
    x, y = model(input_ids=a).logits, model(input_ids=b).logits
    torch.testing.assert_close(x[:, :7], y[:, :7], rtol=0, atol=1e-12)
    assert not torch.allclose(x[:, 7:], y[:, 7:])


def test_loss_is_next_token_cross_entropy_with_masked_labels_left_out(model):
    batch = tokens(2, 9)
    labels = batch.clone()
    labels[0, 4:] = -100
    logits = model(input_ids=batch).logits
    want = -torch.cat([logits[n, t].log_softmax(-1)[batch[n, t + 1]][None]
                       for n in range(2) for t in range(8) if n == 1 or t + 1 < 4]).mean()
    torch.testing.assert_close(model(input_ids=batch, labels=labels).loss, want)


def test_saved_and_loaded_by_transformers_alone(tmp_path):
    model = perturbed(small_paper_gpt2()).float()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, OpusGPT2) and (tmp_path / "model.safetensors").exists()
    batch = tokens(2, 9)
    assert torch.equal(loaded(input_ids=batch).logits, model(input_ids=batch).logits)
    assert loaded.head.weight is loaded.embedding.weight


@pytest.mark.parametrize("size,millions", [("gpt2-large", 772), ("gpt2-xl", 1555)])
def test_the_papers_sizes_have_the_parameters_of_gpt2(size, millions):
    with torch.device("meta"):
        model = OpusGPT2(OpusGPT2Config.from_size(size, 50304))
    count = sum(p.numel() for p in model.parameters())
    # no position table, biases or norm weights: within one per cent of GPT-2's own count
    assert abs(count / 1e6 - millions) < 0.01 * millions
    assert SIZES[size][:3] == ((36, 1280, 20) if size == "gpt2-large" else (48, 1600, 25))


def test_bad_input_is_refused_by_value(model):
    with pytest.raises(ValueError, match="sequence of 33 tokens is longer than the model's 32"):
        model(input_ids=tokens(1, 33))
    with pytest.raises(ValueError, match="pads on the left"):
        model(input_ids=tokens(1, 3), attention_mask=torch.tensor([[0, 1, 1]]))
    with pytest.raises(ValueError, match="unknown model size 'small'"):
        OpusGPT2Config.from_size("small", 50)
    with pytest.raises(ValueError, match="hidden_size 30"):
        OpusGPT2Config(50, 2, 30, 4)
