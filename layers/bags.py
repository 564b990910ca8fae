"""Heads of bags beside `pooling.BagHead`: a mean of instances, and attention among those that a gate selects."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .pooling import BagHead, HeadOutput
from .selection import SelectAndPackAttention2d

Loss = Callable[[Tensor, Tensor], Tensor]


class MeanBagHead(nn.Module):
    """Classify bags by the mean of their instances: the baseline that attention has to beat.

    Args:
        dim: channels of an instance.
        num_classes: outputs.
        inner: channels after the first layer.
    """

    def __init__(self, dim: int, num_classes: int, *, inner: int = 128, device=None, dtype=None):
        super().__init__()
        self.embed = nn.Linear(dim, inner, device=device, dtype=dtype)
        self.fc = nn.Linear(inner, num_classes, device=device, dtype=dtype)

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None) -> HeadOutput:
        """Instances `[B, N, dim]`, of which `mask` (bool `[B, N]`) tells those that are there; no attention."""
        hidden = self.embed(tokens).relu()
        weights = mean_weights(hidden, mask)
        return HeadOutput(self.fc((weights @ hidden)[:, 0]))

    def losses(
        self, tokens: Tensor, target: Tensor, *, mask: Tensor | None = None, loss: Loss = F.cross_entropy
    ) -> dict[str, Tensor]:
        """Return the loss of the bags; arguments as in `BagHead.losses`."""
        return {"bag": loss(self(tokens, mask=mask).logits, target)}


class PackedBagHead(nn.Module):
    """Classify bags by attention of the instances that a gate selects to each other (SPA, arXiv:2410.23608, section 3).

    The bag is the mean of the selected instances after the attention, or of all where none is selected. The gate learns
    from the label of the bag, straight through the choice, and from marks of instances where there are some. The paper
    has images and video, and no code is public: the head is ours.

    Args:
        dim: channels of an instance.
        num_classes: outputs.
        inner: channels after the first layer.
        num_heads: a divisor of inner.
        pack: attend the selected instances alone, see `SelectAndPackAttention2d`.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        inner: int = 128,
        num_heads: int = 4,
        pack: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed = nn.Linear(dim, inner, **dd)
        self.norm = nn.LayerNorm(inner, **dd)
        self.attention = SelectAndPackAttention2d(inner, num_heads=num_heads, pack=pack, **dd)
        self.fc = nn.Linear(inner, num_classes, **dd)

    def _run(self, tokens: Tensor, mask: Tensor | None) -> tuple[HeadOutput, Tensor]:
        """Output, and logits of the gate `[B, N]`."""
        hidden = self.embed(tokens).relu()
        places = None if mask is None else mask[:, None]
        attended, weight, logits = self.attention.attend_selected(self.norm(hidden)[:, None], mask=places)
        hidden, weight = hidden + attended[:, 0], weight.to(hidden.dtype)[:, None]
        none = weight.detach().sum(-1, keepdim=True) == 0
        weights = torch.where(none, mean_weights(hidden, mask), weight / weight.sum(-1, keepdim=True).clamp(min=1e-6))
        return HeadOutput(self.fc((weights @ hidden)[:, 0]), weights), logits[:, 0]

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None) -> HeadOutput:
        """Classify bags.

        Args:
            tokens: instances `[B, N, dim]`.
            mask: instances that are there, bool `[B, N]`; all when None.

        Returns:
            logits of the bags `[B, classes]`, and weights of the instances `[B, 1, N]`, equal for the selected ones.
        """
        return self._run(tokens, mask)[0]

    def losses(
        self,
        tokens: Tensor,
        target: Tensor,
        *,
        mask: Tensor | None = None,
        loss: Loss = F.cross_entropy,
        marks: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses of training: `bag`, and `gate`, the cross-entropy between the gate and marks of instances.

        Args:
            tokens, target, mask, loss: as in `BagHead.losses`.
            marks: instances that make the label, bool `[B, N]`; None: the gate learns from the bags alone.
        """
        output, logits = self._run(tokens, mask)
        found = {"bag": loss(output.logits, target)}
        if marks is not None:
            there = torch.ones_like(marks) if mask is None else mask
            found["gate"] = F.binary_cross_entropy_with_logits(logits[there], marks[there].to(logits.dtype))
        return found


def mean_weights(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Weights `[B, 1, N]` of a mean of the tokens `[B, N, dim]` that are there."""
    there = tokens.new_ones(tokens.shape[:2]) if mask is None else mask.to(tokens.dtype)
    return (there / there.sum(1, keepdim=True))[:, None]


BAG_HEADS: dict[str, Any] = {
    "mean": MeanBagHead,
    "abmil": partial(BagHead, branches=1),
    "acmil": BagHead,
    "spa": PackedBagHead,
}


def attention_measures(weights: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """How widely bags are looked at.

    Args:
        weights: of instances, `[B, N]`, a row sums to 1.
        mask: instances that are there, bool `[B, N]`, one or more in each bag.

    Returns:
        entropy: as a share of that of equal weights, `[B]`; 0 for bags of one instance.
        top: mass of the heaviest twentieth of the instances, rounded up, `[B]`.
    """
    count = mask.sum(1)
    weights = weights.masked_fill(~mask, 0)
    entropy = torch.special.entr(weights).sum(1) / count.clamp(min=2).to(weights.dtype).log()
    heaviest = weights.sort(dim=1, descending=True).values
    kept = torch.arange(weights.shape[1], device=weights.device) < ((count + 19) // 20)[:, None]
    return entropy, (heaviest * kept).sum(1)
