"""Super-resolution by attention among tokens of like content (CATANet, arXiv:2503.06896); names as in its files."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Restorer

PATCHES = (16, 20, 24, 28, 16, 20, 24, 28)
CENTERS = (16, 32, 64, 128, 16, 32, 64, 128)
GROUPS = (256, 128, 64, 32, 256, 128, 64, 32)


def heads_of(x: Tensor, heads: int) -> Tensor:
    """`[…, N, heads * d]` to `[…, heads, N, d]`."""
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of heads, joined: `[…, N, heads * d]`."""
    return F.scaled_dot_product_attention(query, key, value).transpose(-2, -3).flatten(-2)


class ConvFFN(nn.Module):
    """Two layers with a depthwise convolution between them, on tokens of a map."""

    def __init__(self, dim: int, hidden: int, kernel: int = 5):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dwconv = nn.Module()
        conv = nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden)
        self.dwconv.depthwise_conv = nn.Sequential(conv, nn.GELU())

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = F.gelu(self.fc1(x))
        local = self.dwconv.depthwise_conv(x.mT.unflatten(2, size))  # pyright: ignore
        return self.fc2(x + local.flatten(2).mT)


class PreNorm(nn.Module):
    """A layer on normed tokens."""

    def __init__(self, dim: int, fn: nn.Module):
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(dim), fn

    def forward(self, x: Tensor, *args) -> Tensor:
        return self.fn(self.norm(x), *args)


class CenterKeys(nn.Module):
    """Keys and values of centers, and how centers are found (`irca_attn`)."""

    def __init__(self, dim: int, qk_dim: int):
        super().__init__()
        self.to_k, self.to_v = nn.Linear(dim, qk_dim, bias=False), nn.Linear(dim, dim, bias=False)

    @torch.no_grad()
    def refine(self, tokens: Tensor, centers: Tensor) -> Tensor:
        """Centers after a step of spherical k-means over all tokens `[B, N, dim]`; empty ones stay."""
        unit = F.normalize(tokens.flatten(0, -2), dim=-1)
        nearest = (unit @ F.normalize(centers, dim=-1).T).argmax(-1)
        sums = torch.zeros_like(centers).index_add(0, nearest, unit)
        used = torch.zeros_like(centers[:, 0]).index_add(0, nearest, torch.ones_like(unit[:, 0])) > 0
        return torch.where(used[:, None], F.normalize(sums, dim=-1), centers)


class GroupAttention(nn.Module):
    """Attention within groups of sorted tokens and to centers, added (`iasa_attn`)."""

    def __init__(self, dim: int, qk_dim: int, heads: int, group: int):
        super().__init__()
        self.heads, self.group = heads, group
        self.to_q, self.to_k = (nn.Linear(dim, qk_dim, bias=False) for _ in range(2))
        self.to_v, self.proj = (nn.Linear(dim, dim, bias=False) for _ in range(2))

    def forward(self, x: Tensor, order: Tensor, k_center: Tensor, v_center: Tensor) -> Tensor:
        """Tokens `[B, N, dim]` in an order `[B, N]`."""
        batch, tokens, _ = x.shape
        group = min(self.group, tokens)
        pad = -tokens % group
        sorted_x = x.gather(1, order[..., None].expand_as(x))
        # a group sees itself and the next one; behind the end stand the last tokens, backwards
        filled = torch.cat([sorted_x, sorted_x[:, max(0, tokens - pad - group) :].flip(1)], dim=1)
        q = heads_of(self.to_q(filled[:, : tokens + pad]).unflatten(1, (-1, group)), self.heads)
        k, v = (f(filled).unfold(1, 2 * group, group).mT for f in (self.to_k, self.to_v))
        out = attend(q, heads_of(k, self.heads), heads_of(v, self.heads))
        centers = (heads_of(c, self.heads).expand(batch, q.shape[1], -1, -1, -1) for c in (k_center, v_center))
        out = (out + attend(q, *centers)).flatten(1, 2)[:, :tokens]
        return self.proj(torch.zeros_like(x).scatter(1, order[..., None].expand_as(x), out))


class TokenAggregation(nn.Module):
    """Attention among tokens whose nearest center is the same or the next, and to all centers.

    Args:
        stable: tokens of a center keep the order of the image; see `CATANet`.
    """

    means: Tensor
    initted: Tensor

    def __init__(
        self, dim: int, qk_dim: int, mlp_dim: int, heads: int, centers: int, group: int, steps: int, stable: bool
    ):
        super().__init__()
        self.steps, self.stable, self.decay = steps, stable, 0.999
        self.norm = nn.LayerNorm(dim)
        self.mlp = PreNorm(dim, ConvFFN(dim, mlp_dim))
        self.irca_attn, self.iasa_attn = CenterKeys(dim, qk_dim), GroupAttention(dim, qk_dim, heads, group)
        self.register_buffer("means", torch.randn(centers, dim))
        self.register_buffer("initted", torch.tensor(False))
        self.conv1x1 = nn.Conv2d(dim, dim, 1, bias=False)

    @torch.no_grad()
    def _centers(self, x: Tensor) -> Tensor:
        """Centers of a step of training, and the running ones after it."""
        count = len(self.means)
        if self.initted:
            centers = self.means
        else:  # means of runs of tokens, of all images of the batch
            pad = -x.shape[1] % count
            filled = torch.cat([x, x[:, x.shape[1] - pad :].flip(1)], dim=1)
            centers = filled.unflatten(1, (count, -1)).mean((0, 2))
        for _ in range(self.steps):
            centers = self.irca_attn.refine(x, centers)
        if self.initted:
            self.means.lerp_(centers, 1 - self.decay)
        else:
            self.means.copy_(centers)
            self.initted.fill_(True)
        return centers

    def order(self, normed: Tensor, centers: Tensor) -> Tensor:
        """Tokens `[B, N]` by their nearest center."""
        similarity = F.normalize(normed, dim=-1) @ F.normalize(centers, dim=-1).T
        return similarity.argmax(-1).argsort(dim=-1, stable=self.stable)

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[2], x.shape[3])
        tokens = x.flatten(2).mT
        normed = self.norm(tokens)
        centers = self._centers(normed) if self.training else self.means
        order = self.order(normed, centers)
        given = self.irca_attn.to_k(centers), self.irca_attn.to_v(centers)
        out = self.iasa_attn(normed, order, *given)
        tokens = tokens + self.conv1x1(out.mT.unflatten(2, size)).flatten(2).mT
        return (tokens + self.mlp(tokens, size)).mT.unflatten(2, size)


class WindowAttention(nn.Module):
    """Attention of the tokens of each window."""

    def __init__(self, dim: int, qk_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k = (nn.Linear(dim, qk_dim, bias=False) for _ in range(2))
        self.to_v, self.proj = (nn.Linear(dim, dim, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attend(*(heads_of(f(x), self.heads) for f in (self.to_q, self.to_k, self.to_v))))


class OverlappingWindows(nn.Module):
    """Attention in windows that overlap by two places, whose results are averaged.

    Args:
        official_overlap: divide by two per overlap, as the official code does, where three windows meet, too.
    """

    def __init__(self, dim: int, qk_dim: int, mlp_dim: int, heads: int, patch: int, official_overlap: bool):
        super().__init__()
        self.patch, self.official_overlap = patch, official_overlap
        self.layer = nn.ModuleList(
            [PreNorm(dim, WindowAttention(dim, qk_dim, heads)), PreNorm(dim, ConvFFN(dim, mlp_dim))]
        )

    def _counts(self, length: int, starts: list[int], like: Tensor) -> Tensor:
        """What sums of windows are divided by along an axis."""
        counts = like.new_ones(length) if self.official_overlap else like.new_zeros(length)
        for i, start in enumerate(starts):
            if not self.official_overlap:
                counts[start : start + self.patch] += 1
            elif i > 0:
                counts[start : starts[i - 1] + self.patch] *= 2
        return counts

    def forward(self, x: Tensor) -> Tensor:
        size = height, width = x.shape[2], x.shape[3]
        step = self.patch - 2
        tops, lefts = ([*range(0, n - self.patch, step), n - self.patch] for n in size)
        tokens = x.permute(0, 2, 3, 1)
        parts = torch.stack(
            [tokens[:, a : a + self.patch, b : b + self.patch] for a in tops for b in lefts]
        )  # [windows, B, p, p, dim]
        flat = parts.flatten(2, 3)
        parts = (flat + self.layer[0](flat)).view_as(parts)
        out = torch.zeros_like(tokens)
        for part, (a, b) in zip(parts, [(a, b) for a in tops for b in lefts], strict=True):
            out[:, a : a + self.patch, b : b + self.patch] += part
        counts = self._counts(height, tops, x)[:, None] * self._counts(width, lefts, x)
        tokens = (out / counts[..., None]).flatten(1, 2)
        return (tokens + self.layer[1](tokens, size)).mT.unflatten(2, size)


class CATANet(Restorer):
    """Super-resolution of images `[B, in_chans, H, W]` in [0, 1] by 2, 3 or 4; sides of 28 pixels or more.

    Takes the official files by name. The official code sorts tokens by their nearest center without stability: which of
    them share a group then depends on processor and version of torch, and with random weights outputs move by 7 %.

    Args:
        scale: of the result.
        dim, qk_dim, mlp_dim, heads: of the attentions.
        depth: blocks, at most 8.
        in_chans: of the images.
        steps: steps of k-means per step of training.
        stable: sort tokens alike on all devices; False: in the order that `torch.argsort` finds, as the official code.
        official_overlap: see `OverlappingWindows`.

    Raises:
        ValueError: another scale or depth; in `forward`, a smaller image.
    """

    least = 28

    def __init__(
        self,
        *,
        scale: int = 2,
        dim: int = 40,
        qk_dim: int = 36,
        mlp_dim: int = 96,
        heads: int = 4,
        depth: int = 8,
        in_chans: int = 3,
        steps: int = 5,
        stable: bool = True,
        official_overlap: bool = False,
    ):
        super().__init__(scale=scale)
        if scale == 1 or not 1 <= depth <= len(PATCHES):
            raise ValueError(f"scale={scale} must be 2, 3 or 4, and depth={depth} at most {len(PATCHES)}")
        self.first_conv = nn.Conv2d(in_chans, dim, 3, padding=1)
        sizes = list(zip(PATCHES, CENTERS, GROUPS, strict=True))[:depth]
        self.blocks = nn.ModuleList(
            nn.Sequential(
                TokenAggregation(dim, qk_dim, mlp_dim, heads, centers, group, steps, stable),
                OverlappingWindows(dim, qk_dim, mlp_dim, heads, patch, official_overlap),
            )
            for patch, centers, group in sizes
        )
        self.mid_convs = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in sizes)
        self.steps_up = 2 if scale == 4 else 1
        factor = 2 if scale == 4 else scale
        for i in range(1, self.steps_up + 1):
            name = f"upconv{i}" if self.steps_up > 1 else "upconv"
            setattr(self, name, nn.Conv2d(dim, dim * factor**2, 3, padding=1))
        self.factor = factor
        self.last_conv = nn.Conv2d(dim, in_chans, 3, padding=1)

    def residual(self, x: Tensor) -> Tensor:
        first = x = self.first_conv(x)
        for block, conv in zip(self.blocks, self.mid_convs, strict=True):
            x = x + conv(block(x))
        x = x + first
        for i in range(1, self.steps_up + 1):
            up = getattr(self, f"upconv{i}" if self.steps_up > 1 else "upconv")
            x = F.leaky_relu(F.pixel_shuffle(up(x), self.factor), 0.1)
        return self.last_conv(x)
