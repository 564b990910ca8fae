"""A canvas that glimpses write to and read from (CanViT, arXiv:2603.22570)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Canvas(NamedTuple):
    """State between glimpses.

    Attributes:
        tokens: registers and grid of the canvas, `[B, registers + grid * grid, dim]`.
        cls: recurrent class token `[B, 1, embed_dim]`.
        patches: tokens of the last glimpse `[B, N, embed_dim]`, or None before the first.
    """

    tokens: Tensor
    cls: Tensor
    patches: Tensor | None = None


def cell_centers(side: int, *, device=None, dtype=None) -> Tensor:
    """Centers of the cells of a grid over [-1, 1] squared, `[side * side, 2]`: row, column."""
    at = (torch.arange(side, device=device, dtype=dtype) + 0.5) * 2 / side - 1
    return torch.stack(torch.meshgrid(at, at, indexing="ij"), dim=-1).flatten(0, 1)


def sample_glimpse(scene: Tensor, center: Tensor, scale: Tensor, side: int) -> Tensor:
    """A square part of scenes, by bilinear sampling.

    Args:
        scene: `[B, C, H, W]`.
        center: row and column in [-1, 1], `[B, 2]`.
        scale: half side of the part, in (0, 1], `[B]`.
        side: pixels a side.
    """
    grid = center[:, None] + scale[:, None, None] * cell_centers(side, device=scene.device, dtype=scene.dtype)
    return F.grid_sample(scene, grid.flip(-1).unflatten(1, (side, side)), mode="bilinear", align_corners=False)


def rotate(x: Tensor, positions: Tensor, prefix: int, base: float = 100.0) -> Tensor:
    """Rotary embedding by places in the scene; tokens of the prefix stay.

    Args:
        x: `[B, heads, prefix + N, d]`, d a multiple of 4.
        positions: row and column `[B or 1, N, 2]`.
        prefix: tokens without a place.
        base: of the periods, base ** (i / (d / 4)).
    """
    quarter = x.shape[-1] // 4
    wide = torch.promote_types(x.dtype, torch.float32)
    periods = base ** (torch.arange(quarter, device=x.device, dtype=wide) / quarter)
    angles = (2 * math.pi * positions.to(wide)[..., None] / periods).flatten(-2)  # rows, then columns
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    first, rest = x[:, :, :prefix], x[:, :, prefix:]
    a, b = rest.chunk(2, dim=-1)
    turned = rest * angles.cos().to(x.dtype) + torch.cat([-b, a], dim=-1) * angles.sin().to(x.dtype)
    return torch.cat([first, turned], dim=2)


def heads_of(x: Tensor, heads: int) -> Tensor:
    """`[B, N, heads * d]` to `[B, heads, N, d]`."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of `[B, heads, N, d]`, heads joined: `[B, N, heads * d]`."""
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class GlimpseBlock(nn.Module):
    """A transformer block with rotary places, layer scale, and no bias of keys."""

    def __init__(self, dim: int, num_heads: int, *, mlp_ratio: float = 4.0, init_values: float = 1e-5, **dd: Any):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-5, **dd) for _ in range(2))
        self.attn, self.mlp, self.ls1, self.ls2 = (nn.Module() for _ in range(4))
        self.attn.qkv, self.attn.proj = nn.Linear(dim, 3 * dim, **dd), nn.Linear(dim, dim, **dd)
        hidden = int(dim * mlp_ratio)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, hidden, **dd), nn.Linear(hidden, dim, **dd)
        for scale in (self.ls1, self.ls2):
            scale.gamma = nn.Parameter(torch.full((dim,), init_values, **dd))

    def forward(self, x: Tensor, positions: Tensor, prefix: int) -> Tensor:
        layer: Any = self.attn
        bias_q, _, bias_v = layer.qkv.bias.chunk(3)
        bias = torch.cat([bias_q, torch.zeros_like(bias_q), bias_v])
        q, k, v = (heads_of(t, self.num_heads) for t in F.linear(self.norm1(x), layer.qkv.weight, bias).chunk(3, -1))
        out = attend(rotate(q, positions, prefix), rotate(k, positions, prefix), v)
        x = x + self.ls1.gamma * layer.proj(out)  # pyright: ignore
        mlp: Any = self.mlp
        return x + self.ls2.gamma * mlp.fc2(F.gelu(mlp.fc1(self.norm2(x))))  # pyright: ignore


class CanvasRead(nn.Module):
    """Local tokens read from the canvas: queries and the output are projected, keys and values are the canvas."""

    def __init__(self, dim: int, canvas_dim: int, num_heads: int, **dd: Any):
        super().__init__()
        self.num_heads = num_heads
        self.q_norm, self.kv_norm = nn.LayerNorm(dim, eps=1e-5, **dd), nn.LayerNorm(canvas_dim, eps=1e-5, **dd)
        self.q_proj, self.out_proj = nn.Linear(dim, canvas_dim, **dd), nn.Linear(canvas_dim, dim, **dd)

    def forward(self, local: Tensor, canvas: Tensor, places: tuple[Tensor, int], grid: tuple[Tensor, int]) -> Tensor:
        q = rotate(heads_of(self.q_proj(self.q_norm(local)), self.num_heads), *places)
        kv = heads_of(self.kv_norm(canvas), self.num_heads)
        return local + self.out_proj(attend(q, rotate(kv, *grid), kv))


class CanvasWrite(nn.Module):
    """The canvas takes from local tokens: keys and values are projected, queries and the output are the canvas.

    Args:
        convex: mix by a learned gate instead of adding.
    """

    def __init__(self, dim: int, canvas_dim: int, num_heads: int, *, convex: bool = False, **dd: Any):
        super().__init__()
        self.num_heads = num_heads
        self.q_norm, self.kv_norm = nn.LayerNorm(canvas_dim, eps=1e-5, **dd), nn.LayerNorm(dim, eps=1e-5, **dd)
        self.k_proj, self.v_proj = nn.Linear(dim, canvas_dim, **dd), nn.Linear(dim, canvas_dim, **dd)
        self.gate = nn.Linear(canvas_dim, canvas_dim, **dd) if convex else None

    def forward(self, local: Tensor, canvas: Tensor, places: tuple[Tensor, int], grid: tuple[Tensor, int]) -> Tensor:
        given = self.kv_norm(local)
        q = rotate(heads_of(self.q_norm(canvas), self.num_heads), *grid)
        k = rotate(heads_of(self.k_proj(given), self.num_heads), *places)
        out = attend(q, k, heads_of(self.v_proj(given), self.num_heads))
        return canvas + out if self.gate is None else torch.lerp(canvas, out, self.gate(out).sigmoid())


class ViewpointEmbedding(nn.Module):
    """A token of where a glimpse looks: random Fourier features of place over scale and log scale."""

    def __init__(self, dim: int, **dd: Any):
        super().__init__()
        generator = torch.Generator().manual_seed(42)
        self.register_buffer("B", torch.randn(dim // 2, 3, generator=generator).to(**dd))
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        nn.init.constant_(self.norm.weight, dim**-0.5)

    def forward(self, center: Tensor, scale: Tensor) -> Tensor:
        seen = torch.cat([center / scale[:, None], scale.log()[:, None]], dim=-1)
        angles = seen @ self.B.T.to(seen)  # pyright: ignore
        return self.norm(torch.cat([angles.cos(), angles.sin()], dim=-1))[:, None]


class CanvasViT(nn.Module):
    """A vision transformer on glimpses with a canvas in scene coordinates (CanViT, arXiv:2603.22570).

    Tokens of a glimpse are the viewpoint, the recurrent class token, registers and patches. After some blocks they read
    from the canvas, after others they write to it. The cost of a glimpse is linear in the cells of the canvas.
    Parameters are named as in the official checkpoints.

    Args:
        embed_dim, depth, num_heads: of the blocks.
        patch: pixels a side.
        registers: of the glimpse.
        canvas_grid, canvas_registers, canvas_heads, canvas_head_dim: cells a side, and sizes of the canvas.
        stride: blocks between a reading and a writing: reads after blocks stride - 1, writes stride later, and on.
        convex: writings mix by a gate instead of adding.
        init_values: of layer scale at the start.
        in_chans: of the images.

    Raises:
        ValueError: head dimensions that are no multiple of 4.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        patch: int = 16,
        registers: int = 5,
        canvas_grid: int = 32,
        canvas_registers: int = 16,
        canvas_heads: int = 8,
        canvas_head_dim: int = 128,
        stride: int = 2,
        convex: bool = False,
        init_values: float = 1e-5,
        in_chans: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if embed_dim % (4 * num_heads) or canvas_head_dim % 4:
            raise ValueError(
                f"embed_dim={embed_dim} / num_heads={num_heads} and canvas_head_dim={canvas_head_dim} must be "
                "multiples of 4: rows and columns rotate pairs"
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dim = canvas_heads * canvas_head_dim
        self.patch, self.canvas_grid, self.canvas_registers = patch, canvas_grid, canvas_registers
        # Norm 1 as in the official code: layer norms divide by it, so that gradients of smaller tokens are larger.
        self.canvas_register_init = nn.Parameter(dim**-0.5 * torch.randn(1, canvas_registers, dim, **dd))
        self.canvas_spatial_init = nn.Parameter(dim**-0.5 * torch.randn(1, 1, dim, **dd))
        self.recurrent_cls_init = nn.Parameter(embed_dim**-0.5 * torch.randn(1, 1, embed_dim, **dd))
        self.backbone_registers = nn.Parameter(0.02 * torch.randn(1, registers, embed_dim, **dd))
        self.backbone = nn.Module()
        self.backbone.patch_embed = nn.Module()
        self.backbone.patch_embed.proj = nn.Conv2d(in_chans, embed_dim, patch, stride=patch, **dd)
        self.backbone.blocks = nn.ModuleList(
            GlimpseBlock(embed_dim, num_heads, init_values=init_values, **dd) for _ in range(depth)
        )
        turns = range(stride - 1, depth, stride)
        self.read_after, self.write_after = list(turns[::2]), list(turns[1::2])
        self.canvas_read = nn.ModuleList(CanvasRead(embed_dim, dim, canvas_heads, **dd) for _ in self.read_after)
        self.canvas_write = nn.ModuleList(
            CanvasWrite(embed_dim, dim, canvas_heads, convex=convex, **dd) for _ in self.write_after
        )
        self.vpe = ViewpointEmbedding(embed_dim, **dd)

    def start(self, batch: int) -> Canvas:
        """The canvas before the first glimpse."""
        cells = self.canvas_spatial_init.expand(batch, self.canvas_grid**2, -1)
        tokens = torch.cat([self.canvas_register_init.expand(batch, -1, -1), cells], dim=1)
        return Canvas(tokens, self.recurrent_cls_init.expand(batch, -1, -1))

    def forward(self, glimpse: Tensor, center: Tensor, scale: Tensor, state: Canvas | None = None) -> Canvas:
        """One glimpse.

        Args:
            glimpse: `[B, in_chans, side, side]`, a multiple of patch; see `sample_glimpse`.
            center: row and column in [-1, 1], `[B, 2]`.
            scale: in (0, 1], `[B]`.
            state: of the glimpses before; a new canvas when None.

        Returns:
            the state after it.
        """
        batch = glimpse.shape[0]
        state = self.start(batch) if state is None else state
        trunk: Any = self.backbone
        patches = trunk.patch_embed.proj(glimpse)
        cells = cell_centers(patches.shape[-1], device=glimpse.device, dtype=glimpse.dtype)
        positions = center[:, None] + scale[:, None, None] * cells
        registers = self.backbone_registers.expand(batch, -1, -1)
        x = torch.cat([self.vpe(center, scale), state.cls, registers, patches.flatten(2).mT], dim=1)
        prefix = 2 + registers.shape[1]
        canvas, places = state.tokens, (positions, prefix)
        grid = cell_centers(self.canvas_grid, device=glimpse.device, dtype=glimpse.dtype)[None], self.canvas_registers
        for index, block in enumerate(trunk.blocks):
            x = block(x, positions, prefix)
            if index in self.read_after:
                x = self.canvas_read[self.read_after.index(index)](x, canvas, places, grid)
            if index in self.write_after:
                canvas = self.canvas_write[self.write_after.index(index)](x, canvas, places, grid)
        return Canvas(canvas, x[:, 1:2], x[:, prefix:])
