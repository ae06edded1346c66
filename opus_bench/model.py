"""The paper's GPT-2 as a transformers model, from a million parameters to XL by its config.

Architecture of the released code: GPT-2 sizes, RMSNorm without weights, rotary positions on half
of each head, normalised queries and keys, no biases, GELU MLP of four times the width, tied head,
output projections that start at zero, attention scale .12, and a soft cap on the logits,
30 sigmoid(x / (7.5 sqrt(d))).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

SIZES = {  # name: (layers, width, heads, context); large and xl as in the paper
    "ci": (2, 64, 2, 128),
    "tiny": (4, 96, 3, 512),
    "mini": (6, 128, 4, 512),
    "gpt2": (12, 768, 12, 8192),
    "gpt2-large": (36, 1280, 20, 32768),
    "gpt2-xl": (48, 1600, 25, 8192),
}


class OpusGPT2Config(PretrainedConfig):
    """Sizes of the model; defaults are a tiny one for CPUs.

    vocab_size is padded by the caller (the paper: 50,257 to 50,304); max_position_embeddings is
    the longest sequence in tokens; embedding_std the standard deviation of the initial embedding.
    """

    model_type = "opus_gpt2"

    def __init__(
        self,
        vocab_size: int = 4096,
        num_hidden_layers: int = 4,
        hidden_size: int = 128,
        num_attention_heads: int = 4,
        max_position_embeddings: int = 512,
        attention_scale: float = 0.12,
        embedding_std: float = 1.0,
        tie_word_embeddings: bool = True,
        **kwargs,
    ) -> None:
        if hidden_size % num_attention_heads or (hidden_size // num_attention_heads) % 4:
            raise ValueError(f"hidden_size {hidden_size} must be heads times a multiple of 4, "
                             f"got {num_attention_heads} heads")
        self.vocab_size = vocab_size
        self.num_hidden_layers = num_hidden_layers
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.attention_scale = attention_scale
        self.embedding_std = embedding_std
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @classmethod
    def from_size(cls, size: str, vocab_size: int, **options) -> OpusGPT2Config:
        """A config by name: ci, tiny, gpt2, gpt2-large, gpt2-xl; options are further fields."""
        if size not in SIZES:
            raise ValueError(f"unknown model size {size!r}; known: {', '.join(SIZES)}")
        layers, width, heads, context = SIZES[size]
        return cls(vocab_size, layers, width, heads, context, **options)


def rms_norm(x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """RMSNorm without weights."""
    return F.rms_norm(x, (x.shape[-1],))


def rotary(x: Float[Tensor, "n h t e"]) -> Float[Tensor, "n h t e"]:
    """Rotary position embedding on half of the head's pairs; the other half is left alone.

    Angles are computed in float64, frequencies 1024^(-linspace(0, 1)), as modded-nanogpt's
    half-truncated RoPE.
    """
    length, quarter = x.shape[-2], x.shape[-1] // 4
    frequency = (1 / 1024) ** torch.linspace(0, 1, quarter, dtype=torch.float64, device=x.device)
    frequency = torch.cat([frequency, frequency.new_zeros(quarter)])
    angle = torch.arange(length, dtype=torch.float64, device=x.device)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], -1)


def zero_linear(columns: int, rows: int) -> nn.Linear:
    """A linear layer marked to start at zero."""
    layer = nn.Linear(columns, rows, bias=False)
    layer.starts_at_zero = True
    return layer


class Attention(nn.Module):
    """Causal self-attention with normalised queries and keys."""

    def __init__(self, config: OpusGPT2Config) -> None:
        super().__init__()
        d = config.hidden_size
        self.heads, self.scale = config.num_attention_heads, config.attention_scale
        self.q, self.k, self.v = (nn.Linear(d, d, bias=False) for _ in range(3))
        self.out = zero_linear(d, d)

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        n, t, d = x.shape
        q, k, v = (f(x).view(n, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = rotary(rms_norm(q)), rotary(rms_norm(k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return self.out(y.transpose(1, 2).reshape(n, t, d))


class Block(nn.Module):
    """Attention and MLP, each on the normalised residual stream."""

    def __init__(self, config: OpusGPT2Config) -> None:
        super().__init__()
        d = config.hidden_size
        self.attention = Attention(config)
        self.up = nn.Linear(d, 4 * d, bias=False)
        self.down = zero_linear(4 * d, d)

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        x = x + self.attention(rms_norm(x))
        return x + self.down(F.gelu(self.up(rms_norm(x))))


class OpusGPT2(PreTrainedModel, GenerationMixin):
    """The paper's GPT-2: a transformers model, so lm-eval, save_pretrained and generate just work.

    `generate` computes the whole sequence anew for each token, since no keys and values are kept, and takes prompts
    of one length at a time, since padding on the left is refused.
    """

    config_class = OpusGPT2Config
    base_model_prefix = "model"
    _tied_weights_keys = {"head.weight": "embedding.weight"}
    _no_split_modules = ["Block"]
    supports_gradient_checkpointing = False
    left_padding = False

    def __init__(self, config: OpusGPT2Config) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Uniform with standard deviation .5 / sqrt(width); output projections zero."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.embedding_std)
        elif getattr(module, "starts_at_zero", False):
            nn.init.zeros_(module.weight)
        elif isinstance(module, nn.Linear) and module is not self.head:
            bound = math.sqrt(3) * 0.5 / math.sqrt(module.in_features)
            nn.init.uniform_(module.weight, -bound, bound)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.head = value

    def prepare_inputs_for_generation(self, input_ids: Int[Tensor, "n t"], **kwargs) -> dict[str, Tensor | None]:
        """Whole sequences, with their mask."""
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}

    def forward(
        self,
        input_ids: Int[Tensor, "n t"],
        attention_mask: Tensor | None = None,
        labels: Int[Tensor, "n t"] | None = None,
        **kwargs,
    ) -> CausalLMOutput:
        """Logits (n, t, vocab) and, with labels, their mean next-token loss in nat/token.

        Padding is expected on the right, where causal attention cannot see it; positions whose
        label is -100 are not counted.
        """
        if input_ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(f"sequence of {input_ids.shape[1]} tokens is longer than the model's "
                             f"{self.config.max_position_embeddings}")
        if attention_mask is not None and bool((attention_mask[:, :-1] < attention_mask[:, 1:]).any()):
            raise ValueError("attention_mask pads on the left; pad on the right")
        x = rms_norm(self.embedding(input_ids))
        for block in self.blocks:
            x = block(x)
        # the soft cap's division acts on the hidden state, which is smaller than the logits
        logits = self.head(rms_norm(x) / (7.5 * math.sqrt(self.config.hidden_size)))
        logits = 30 * torch.sigmoid(logits)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


AutoConfig.register("opus_gpt2", OpusGPT2Config, exist_ok=True)
AutoModelForCausalLM.register(OpusGPT2Config, OpusGPT2, exist_ok=True)
