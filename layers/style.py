"""Style transfer by attention: to few keys, distributed and progressive (StyA2K, ICCV 2023), or to all (PAMA)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def standardize(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Each channel of `[B, C, H, W]` less its mean over its deviation (unbiased variance, as published)."""
    variance = x.var((2, 3), keepdim=True) + eps
    return (x - x.mean((2, 3), keepdim=True)) / variance.sqrt()


def to_regions(x: Tensor, heads: int, side: int) -> Tensor:
    """`[B, C, H, W]` as regions `[B, heads, regions, side * side, C / heads]`."""
    batch, channels, height, width = x.shape
    x = x.view(batch, heads, channels // heads, height // side, side, width // side, side)
    return x.permute(0, 1, 3, 5, 4, 6, 2).flatten(4, 5).flatten(2, 3)


def from_regions(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `to_regions`, for maps of this size."""
    batch, heads, _, area, channels = x.shape
    side = round(area**0.5)
    rows, columns = size[0] // side, size[1] // side
    x = x.view(batch, heads, rows, columns, side, side, channels).permute(0, 1, 6, 2, 4, 3, 5)
    return x.reshape(batch, heads * channels, *size)


class AllToKeyAttention(nn.Module):
    """Style features for each place of a content, from aggregated regions and from the best region of the style.

    Distributed: each style region becomes one key, the mean of its keys weighted by their similarity to its center,
    and every place attends to all of these. Progressive: regions of content and style are compared place by place,
    and each content region attends to its best match. Logits are not scaled. Both cost N sqrt(N) instead of N^2.
    Parameters are named as in the official files (`q`, `k`, `v` distributed; `q2`, `k2`, `v2` progressive).

    Args:
        channels: of the features.
        num_heads: a divisor of channels.
        region: side of the regions.

    Raises:
        ValueError: num_heads that do not divide channels; in `forward`, sizes that are not multiples of the region, or
            content and style of other sizes.
    """

    def __init__(self, channels: int, *, num_heads: int = 8, region: int = 8, device=None, dtype=None):
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide channels={channels}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.region = num_heads, region
        self.sim_alpha, self.sim_beta = nn.Parameter(torch.ones(1, **dd)), nn.Parameter(torch.zeros(1, **dd))
        point = lambda: nn.Conv2d(channels, channels, 1, **dd)  # noqa: E731
        self.q, self.k, self.v = point(), point(), point()
        self.q2, self.k2, self.v2 = point(), point(), point()
        self.fusion1, self.fusion2 = point(), point()

    def distributed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention to one key per region, of `[B, heads, regions, R, d]`."""
        k_mean, v_mean = key.mean(3, keepdim=True), value.mean(3, keepdim=True)
        likeness = (self.sim_beta + self.sim_alpha * (k_mean * key).sum(-1, keepdim=True)).sigmoid()
        count = key.shape[3] + 1
        k, v = (((likeness * x).sum(3) + m[:, :, :, 0]) / count for x, m in ((key, k_mean), (value, v_mean)))
        q = query.flatten(2, 3)
        return F.scaled_dot_product_attention(q, k, v, scale=1.0).view_as(query)

    def progressive(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention inside of the best region, of `[B, heads, regions, R, d]`."""
        best = (query.flatten(3) @ key.flatten(3).mT).argmax(-1)  # [B, heads, regions]
        index = best[..., None, None].expand(-1, -1, -1, *key.shape[3:])
        k, v = key.gather(2, index), value.gather(2, index)
        return F.scaled_dot_product_attention(query, k, v, scale=1.0)

    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        """`[B, C, H, W]` twice to `[B, C, H, W]`."""
        if content.shape != style.shape or any(n % self.region for n in content.shape[2:]):
            shapes = f"{tuple(content.shape)} and {tuple(style.shape)}"
            raise ValueError(f"content and style of {shapes} must be equal, and multiples of region={self.region}")
        plain = standardize(content), standardize(style)
        made = []
        for suffix, attend in (("", self.distributed), ("2", self.progressive)):
            q, k, v = (
                to_regions(getattr(self, f"{name}{suffix}")(x), self.num_heads, self.region)
                for name, x in (("q", plain[0]), ("k", plain[1]), ("v", style))
            )
            made.append(from_regions(attend(q, k, v), (content.shape[2], content.shape[3])))
        return content + self.fusion1(made[0]) + self.fusion2(made[1])


class ManifoldAlignment(nn.Module):
    """Content features rearranged by attention to all of a style, and fused with the content by a gate (PAMA).

    One of the three blocks of "Consistent Style Transfer" on features of VGG. Logits are not scaled; every convolution
    but the fusion's is followed by ReLU6. Parameters are named as in the official code.

    Args:
        channels: of the features, even.

    Raises:
        ValueError: odd channels.
    """

    def __init__(self, channels: int = 512, *, device=None, dtype=None):
        super().__init__()
        if channels % 2:
            raise ValueError(f"channels={channels} must be even")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        def conv(inputs: int, outputs: int, size: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, size, padding=size // 2, padding_mode="reflect", **dd)

        half = channels // 2
        self.conv_in, self.conv_out = conv(channels, channels, 3), conv(channels, channels, 3)
        self.attn = nn.ModuleDict({name: conv(channels, half, 1) for name in "fgh"})
        self.attn["out_conv"] = conv(half, channels, 1)
        parts = {"proj1": conv(2 * channels, channels, 1)}
        parts |= {name: conv(channels, channels, 1) for name in ("proj2", "proj3")}
        parts |= {f"fuse{size}x": conv(channels, 1, size) for size in (1, 3, 5)}
        self.fuse = nn.ModuleDict(parts)

    def attend(self, content: Tensor, style: Tensor) -> Tensor:
        """Style features for each place of a content, `[B, C, H, W]`."""
        made = (("f", standardize(content)), ("g", standardize(style)), ("h", style))
        q, k, v = (F.relu6(self.attn[name](x)).flatten(2).mT for name, x in made)
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=1.0)[:, 0]
        return F.relu6(self.attn["out_conv"](out.mT.unflatten(2, content.shape[2:])))

    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        """`[B, C, H, W]` and `[B, C, h, w]` to `[B, C, H, W]`; H and W at least 3, for the reflected borders."""
        content, style = (F.relu6(self.conv_in(x)) for x in (content, style))
        aligned = F.relu6(self.conv_out(self.attend(content, style)))
        joined = self.fuse["proj1"](torch.cat([content, aligned], 1))
        gate = torch.stack([self.fuse[f"fuse{size}x"](joined).sigmoid() for size in (1, 3, 5)]).mean(0)
        return gate * self.fuse["proj2"](content) + (1 - gate) * self.fuse["proj3"](aligned)
