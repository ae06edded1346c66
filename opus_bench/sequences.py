"""Batches of token sequences, padded or masked or neither, and their losses.

A sample's loss is the mean negative log-likelihood (nat/token) of the tokens of it that count: all
that have a predecessor, but for padding and for what a loss mask leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

IGNORED = -100  # label of transformers and torch for "does not count"


@dataclass(frozen=True)
class Sequences:
    """n sequences of t tokens; a mask that is None leaves nothing out.

    Raises:
        ValueError: for a mask of another shape than the tokens', and for padding on the left (give
            it on the right, where causal attention cannot see it).
    """

    tokens: Int[Tensor, "n t"]
    attention_mask: Int[Tensor, "n t"] | None = None  # 0 at padding
    loss_mask: Bool[Tensor, "n t"] | None = None  # False where the token is no target

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or self.tokens.is_floating_point():
            raise ValueError(f"tokens must be integers (samples, positions), got {self.tokens.dtype} "
                             f"of shape {tuple(self.tokens.shape)}")
        for name in ("attention_mask", "loss_mask"):
            mask = getattr(self, name)
            if mask is not None and mask.shape != self.tokens.shape:
                raise ValueError(f"{name} has shape {tuple(mask.shape)}, the tokens {tuple(self.tokens.shape)}")
        mask = self.attention_mask
        if mask is not None and bool((mask[:, :-1] < mask[:, 1:]).any()):
            raise ValueError("attention_mask pads on the left; pad on the right")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, samples: Any) -> Sequences:
        """Some of the samples: a slice, a list or a tensor of indices."""
        return self._map(lambda x: x[samples])

    def window(self, size: int) -> Sequences:
        """The first ``size`` positions of every sequence."""
        return self._map(lambda x: x[:, :size])

    def to(self, device: torch.device) -> Sequences:
        """The same on a device."""
        return self._map(lambda x: x.to(device))

    def _map(self, change: Any) -> Sequences:
        masks = {k: None if (m := getattr(self, k)) is None else change(m) for k in ("attention_mask", "loss_mask")}
        return replace(self, tokens=change(self.tokens), **masks)

    def counted(self, label_shift: int = 1) -> Bool[Tensor, "n u"] | None:
        """Which of the t - label_shift targets count; None: all do.

        Raises:
            ValueError: naming the samples of which no token counts.
        """
        masks = [m.bool()[:, label_shift:] for m in (self.attention_mask, self.loss_mask) if m is not None]
        if not masks:
            return None
        counted = masks[0] if len(masks) == 1 else masks[0] & masks[1]
        empty = (~counted.any(1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"no token counts in samples {empty} within their first {self.tokens.shape[1]}; "
                             "leave them out, or score a longer window")
        return counted


def as_sequences(batch: Any) -> Sequences:
    """Sequences of what loops hand around: a token tensor, a batch of a data loader, a labelled batch.

    Args:
        batch: (n, t) integer tensor; a mapping with ``input_ids`` and perhaps ``attention_mask`` and
            ``labels`` (-100 where a token does not count), as transformers' collators make; Sequences;
            or anything with ``.tokens``.

    Raises:
        ValueError: for labels that are neither the input nor -100: next tokens of the input are scored.
    """
    if isinstance(batch, Sequences):
        return batch
    if isinstance(batch, Tensor):
        return Sequences(batch)
    if isinstance(batch, Mapping):
        tokens, labels, loss_mask = batch["input_ids"], batch.get("labels"), None
        if labels is not None:
            loss_mask = labels != IGNORED
            if bool((loss_mask & (labels != tokens)).any()):
                raise ValueError("labels differ from input_ids where they are not -100; only the prediction of "
                                 "the input's own next tokens can be scored")
        return Sequences(tokens, batch.get("attention_mask"), loss_mask)
    if hasattr(batch, "tokens"):
        return Sequences(batch.tokens)
    raise ValueError(f"expected tokens (n, t), a batch with input_ids or Sequences, got {type(batch).__name__}")


def token_losses(
    logits: Float[Tensor, "n t v"], tokens: Int[Tensor, "n t"], label_shift: int = 1
) -> Float[Tensor, "n u"]:
    """Negative log-likelihood (nat) of token t + label_shift under the logits at position t.

    ``label_shift`` 1 is next-token prediction.  2 is what the released OPUS code scores, which
    shifts labels that were shifted already.
    """
    # the last positions have no label; ignoring them spares a copy of the logits
    labels = nn.functional.pad(tokens[:, label_shift:], (0, label_shift), value=IGNORED)
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(tokens.shape)[:, :-label_shift]


def sample_losses(
    model: nn.Module, batch: Int[Tensor, "n t"] | Sequences, label_shift: int = 1
) -> Float[Tensor, " n"]:
    """Mean loss of each sequence over its tokens that count, in nat/token."""
    sequences = as_sequences(batch)
    mask = {} if sequences.attention_mask is None else {"attention_mask": sequences.attention_mask}
    losses = token_losses(model(input_ids=sequences.tokens, **mask).logits, sequences.tokens, label_shift)
    counted = sequences.counted(label_shift)
    if counted is None:
        return losses.mean(1)
    return torch.where(counted, losses, 0).sum(1) / counted.sum(1)
