"""Quality of clips without a reference: textures of regions, weighed by how much the regions are looked at (KVQ).

After the idea of arXiv:2503.10259: its repository could not be reached, and all sizes are ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Quality(NamedTuple):
    """Results of `QualityNet`.

    Attributes:
        score: of clips `[B]`, between the least and the largest texture of its regions.
        saliency: of regions `[B, T, rows, columns]`; sums to 1 over a clip.
        texture: of regions `[B, T, rows, columns]`.
    """

    score: Tensor
    saliency: Tensor
    texture: Tensor


class FusionWindowAttention(nn.Module):
    """Attention of the tokens of a region to each other and to the means of the other regions most like it.

    Args:
        dim: channels.
        num_heads: a divisor of dim.
        topk: other regions that a region sees; all of them where there are fewer.
    """

    def __init__(self, dim: int, *, num_heads: int = 1, topk: int = 4):
        super().__init__()
        self.num_heads, self.topk = num_heads, topk
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def choose(self, means: Tensor) -> Tensor:
        """Places of the other regions that each region sees, `[B, regions, k]`, by products of means."""
        likeness = means @ means.mT
        own = torch.eye(means.shape[1], dtype=torch.bool, device=means.device)
        count = min(self.topk, means.shape[1] - 1)
        return likeness.masked_fill(own, -torch.inf).topk(count, dim=-1).indices

    def forward(self, x: Tensor) -> Tensor:
        """`[B, regions, tokens, dim]` to the same shape."""
        batch, regions, _, dim = x.shape
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        places = self.choose(x.detach().mean(2)).flatten(1)[..., None].expand(-1, -1, dim)
        others = (t.mean(2).gather(1, places).view(batch, regions, -1, dim) for t in (key, value))
        key, value = (torch.cat(pair, dim=2) for pair in zip((key, value), others, strict=True))
        query, key, value = (t.unflatten(-1, (self.num_heads, -1)).transpose(2, 3) for t in (query, key, value))
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(2, 3).flatten(3))


class QualityNet(nn.Module):
    """Score clips `[B, C, T, H, W]` by a mean of the textures of regions, weighed by their saliency.

    The trunk sees one region of one frame at a time, so that the texture of a region depends on no pixel of others,
    which the paper asks for by a loss; saliency compares regions of a frame.

    Args:
        trunk: from crops `[n, C, H / rows, W / columns]` to tokens `[n, tokens, dim]`.
        dim: channels of the tokens.
        regions: rows and columns, which divide the frames.
        num_heads, topk: of `FusionWindowAttention`.
    """

    def __init__(
        self, trunk: nn.Module, dim: int, *, regions: tuple[int, int] = (4, 4), num_heads: int = 1, topk: int = 4
    ):
        super().__init__()
        self.trunk, self.regions = trunk, tuple(regions)
        self.compare = FusionWindowAttention(dim, num_heads=num_heads, topk=topk)
        self.texture = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 1))
        self.norm, self.saliency = nn.LayerNorm(dim), nn.Linear(dim, 1)

    def forward(self, clips: Tensor) -> Quality:
        """Score clips.

        Raises:
            ValueError: regions that do not divide the frames.
        """
        batch, channels, frames, height, width = clips.shape
        rows, columns = self.regions
        if height % rows or width % columns:
            raise ValueError(f"regions={self.regions} must divide frames of {height} by {width} pixels")
        cut = clips.view(batch, channels, frames, rows, height // rows, columns, width // columns)
        tokens = self.trunk(cut.permute(0, 2, 3, 5, 1, 4, 6).flatten(0, 3))
        tokens = tokens.unflatten(0, (batch * frames, rows * columns))
        shape = batch, frames, rows, columns
        texture = self.texture(tokens.mean(2)).view(shape)
        seen = tokens + self.compare(self.norm(tokens))
        saliency = self.saliency(seen.mean(2)).view(batch, -1).softmax(-1).view(shape)
        return Quality((saliency * texture).sum((1, 2, 3)), saliency, texture)


def quality_loss(score: Tensor, target: Tensor, *, margin: float = 0.0) -> Tensor:
    """Half of one minus the linear correlation, and a hinge on pairs in the wrong order.

    Args:
        score, target: `[B]`, two or more.
        margin: by which scores of pairs must differ.
    """
    a, b = score - score.mean(), target - target.mean()
    correlation = (a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-6)
    steps = (score[:, None] - score) * (target[:, None] - target).sign()
    return (1 - correlation) / 2 + (margin - steps).relu().mean()
