"""Bi-level routing attention and the full attention that takes its place on small maps (arXiv:2303.08810)."""

from typing import Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.block_sparse import block_sparse_attention
from ..kernels.block_sparse.routing import make_routing_mask, routing_attention2d
from ..kernels.common.calling import Impl
from ..kernels.common.symbolic import at_least, ceil_div, known
from .completion import complete_multiples, crop


def pointwise(conv: bool, dim: int, out: int, *, bias: bool = True, device=None, dtype=None) -> nn.Module:
    """Linear layer on channels; with the weights of a 1x1 convolution when `conv`."""
    if conv:
        return nn.Conv2d(dim, out, 1, bias=bias, device=device, dtype=dtype)
    return nn.Linear(dim, out, bias=bias, device=device, dtype=dtype)


def conv_nhwc(conv: nn.Module, x: Tensor) -> Tensor:
    """A module that takes `[B, C, H, W]`, applied to `[B, H, W, C]`."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class _PositionAttention(nn.Module):
    """Base of BiFormer's attentions: heads, the depthwise convolution `lepe`, checks."""

    def __init__(self, dim: int, *, num_heads: int, proj_drop: float, device=None, dtype=None):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        self.dim, self.num_heads = dim, num_heads
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def _check(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, H, W, {self.dim}]")

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        return query, key, value  # [B, H, W, heads, d]

    def __prepare_scriptable__(self) -> NoReturn:
        name = type(self).__name__
        raise NotImplementedError(f"TorchScript cannot compile {name}; use torch.export or torch.compile instead")


class BiLevelRoutingAttention2d(_PositionAttention):
    """Attention to the tokens of the few regions that resemble one's own most (arXiv:2303.08810, section 3.2).

    The scale is dim ** -0.5, of all heads together. A depthwise 5x5 convolution of the values is added before the
    output projection. Parameters carry the names of the official checkpoints: `qkv.qkv` (rows: query, key, value),
    `lepe`, `wo`.

    Args:
        dim: channels of the input and the output.
        num_heads: heads; a divisor of dim.
        regions: regions along height and along width, whatever the size of the map.
        topk: regions that each attends to; all of them if there are fewer.
        auto_pad: zero-pad maps that the regions do not divide, right and bottom before the projection and without a
            mask, as the official dense-task models do: padded tokens are keys, and count in means and convolution.
            Otherwise such a map is an error.
        proj_drop: dropout after the output projection.
        impl: see `foveal.kernels.ops.routing_attention2d`.

    Raises:
        ValueError: dim is no multiple of num_heads; regions or topk is below 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        regions: int = 7,
        topk: int = 4,
        auto_pad: bool = True,
        proj_drop: float = 0.0,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads=num_heads, proj_drop=proj_drop, **dd)
        _check_regions(regions, topk)
        self.regions, self.topk, self.auto_pad = regions, min(topk, regions**2), auto_pad
        self.impl: Impl = impl
        self.qkv = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim, **dd)})
        self.wo = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` to `[B, H, W, dim]`.

        Raises:
            ValueError: a shape that does not fit, or a map that the regions do not divide while `auto_pad` is off.
        """
        self._check(x)
        rows, columns = x.shape[1:3]
        if not self.auto_pad and (rows % self.regions or columns % self.regions):
            raise ValueError(f"x has a map of {(rows, columns)}; regions={self.regions} must divide both sides")
        x = complete_multiples(x, (self.regions, self.regions))
        query, key, value = self._heads(self.qkv["qkv"](x))
        out = routing_attention2d(query, key, value, regions=self.regions, topk=self.topk, impl=self.impl)
        local = conv_nhwc(self.lepe, value.flatten(-2).contiguous())  # on strides it takes CPUs several times as long
        out = crop(out.flatten(-2) + local, (rows, columns))
        return self.proj_drop(self.wo(out))

    def attention_macs(self, grid: tuple[int, int]) -> int:
        """Multiply-accumulates of the products of queries, keys and values for one map of this size, and of routing."""
        tokens = [n + -n % self.regions for n in grid]
        total, count = tokens[0] * tokens[1], self.regions**2
        return self.dim * (2 * total * self.topk * total // count + count**2)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, regions={self.regions}, topk={self.topk}"


class ConvRoutingAttention2d(_PositionAttention):
    """Bi-level routing attention as in the official `nchw` models, whose numbers differ on maps that do not divide.

    Regions have max(1, side // regions) tokens a side, so there may be more than regions ** 2. Means are over the
    tokens that exist; the attention sees zero keys and values where the last regions stick out. Projections are 1x1
    convolutions, `qkv_linear` and `output_linear`. Arguments as in `BiLevelRoutingAttention2d`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        regions: int = 7,
        topk: int = 4,
        proj_drop: float = 0.0,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads=num_heads, proj_drop=proj_drop, **dd)
        _check_regions(regions, topk)
        self.regions, self.topk = regions, topk
        self.impl: Impl = impl
        self.qkv_linear = nn.Conv2d(dim, 3 * dim, 1, **dd)
        self.output_linear = nn.Conv2d(dim, dim, 1, **dd)

    def _cut(self, grid: tuple[int, int]) -> tuple[tuple[int, int], int]:
        """Tokens of a region along height and width, and how many regions each attends to."""
        height, width = (at_least(1, n // self.regions) for n in grid)
        count = ceil_div(grid[0], height) * ceil_div(grid[1], width)
        topk = self.topk if known(count >= self.topk) else torch.sym_min(self.topk, count)
        return (height, width), topk  # pyright: ignore[reportReturnType]

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` to `[B, H, W, dim]`; a ValueError for a shape that does not fit."""
        self._check(x)
        rows, columns = x.shape[1:3]
        size, topk = self._cut((rows, columns))
        query, key, value = self._heads(conv_nhwc(self.qkv_linear, x))
        mask = make_routing_mask(query, key, size=size, topk=topk)
        padded = (complete_multiples(t, size) for t in (query, key, value))
        out = block_sparse_attention(*padded, mask=mask, scale=self.dim**-0.5, impl=self.impl)
        out = crop(out, (rows, columns)).flatten(-2) + conv_nhwc(self.lepe, value.flatten(-2))
        return self.proj_drop(conv_nhwc(self.output_linear, out))

    def attention_macs(self, grid: tuple[int, int]) -> int:
        """Multiply-accumulates of the products of queries, keys and values for one map of this size, and of routing."""
        (height, width), topk = self._cut(grid)
        count = -(-grid[0] // height) * -(-grid[1] // width)
        return self.dim * (2 * count * topk * (height * width) ** 2 + count**2)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, regions={self.regions}, topk={self.topk}"


class LePEAttention2d(_PositionAttention):
    """Attention of all tokens to all, plus a depthwise 5x5 convolution: the last stage of BiFormer.

    The scale is that of a head. Parameters: `qkv` (no bias), `lepe`, `proj`.

    Args:
        dim, num_heads, proj_drop: as in `BiLevelRoutingAttention2d`.
        lepe_of: the map that the convolution sees, "input" or "value".
        conv: hold the projections as 1x1 convolutions, as the official `nchw` models do.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        lepe_of: Literal["input", "value"] = "input",
        conv: bool = False,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads=num_heads, proj_drop=proj_drop, **dd)
        if lepe_of not in ("input", "value"):
            raise ValueError(f"lepe_of={lepe_of!r} must be 'input' or 'value'")
        self.lepe_of, self.conv = lepe_of, conv
        self.qkv = pointwise(conv, dim, 3 * dim, bias=False, **dd)
        self.proj = pointwise(conv, dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` to `[B, H, W, dim]`; a ValueError for a shape that does not fit."""
        self._check(x)
        qkv = conv_nhwc(self.qkv, x) if self.conv else self.qkv(x)
        query, key, value = (t.flatten(1, 2).transpose(1, 2) for t in self._heads(qkv))  # [B, heads, T, d]
        out = F.scaled_dot_product_attention(query, key, value)
        out = out.transpose(1, 2).flatten(2).unflatten(1, x.shape[1:3])
        out = out + conv_nhwc(self.lepe, x if self.lepe_of == "input" else qkv[..., 2 * self.dim :])
        return self.proj_drop(conv_nhwc(self.proj, out) if self.conv else self.proj(out))

    def attention_macs(self, grid: tuple[int, int]) -> int:
        """Multiply-accumulates of the products of queries, keys and values for one map of this size."""
        return 2 * self.dim * (grid[0] * grid[1]) ** 2


def _check_regions(regions: int, topk: int) -> None:
    if regions < 1 or topk < 1:
        raise ValueError(f"regions={regions} and topk={topk} must be at least 1")
