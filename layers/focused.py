"""Focused linear attention: features that sharpen, and a convolution that restores rank (arXiv:2308.00442)."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..kernels.common.calling import is_plain_call
from ..kernels.ops import linear_attention
from .base import BranchMixin, ProjectedAttention2d, add_convolved, convolve_depthwise
from .positions import resize_positions

EPS = 1e-6  # keeps features and normalisers off zero, as upstream
CHUNK = 1 << 17  # numbers that are worked on at a time on CPU: some tensors of them fit into its cache


def focused_features(
    x: Tensor, scale: Tensor, positions: Tensor | None = None, focus: float = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """Features that sharpen: y ** focus of the norm of y = (ReLU(x + positions) + 1e-6) / softplus(scale), over all
    channels together (arXiv:2308.00442, equation 5).

    They are made in float32 at least: cubes of small numbers vanish in half precision. On CPU some tokens are taken
    at a time, and made again for the gradient, which exists once.

    Args:
        x: `[B, N, dim]`.
        scale: `[1, 1, dim]`.
        positions: `[1, N, dim]`, added to x; nothing when None.
        focus: power.
        dtype: of the result; that of x when None.
    """
    dtype = dtype or x.dtype
    if x.device.type == "cpu" and is_plain_call():
        return _Focused.apply(x, scale, positions, focus, dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    placed = x.to(wide) if positions is None else x.to(wide) + positions
    y = (F.relu(placed) + EPS) / F.softplus(scale.to(wide))
    sharp = y**focus
    return (sharp * (y.norm(dim=-1, keepdim=True) / sharp.norm(dim=-1, keepdim=True))).to(dtype)


class _Focused(torch.autograd.Function):
    """Features of some tokens at a time."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, positions: Tensor | None, focus: float, dtype: torch.dtype) -> Tensor:
        ctx.focus = focus
        ctx.save_for_backward(x, scale, positions)
        out = x.new_empty(x.shape, dtype=dtype)
        for part, y in _parts(x, scale, positions):
            sharp = y**focus
            out[part] = sharp.mul_(y.norm(dim=-1, keepdim=True) / sharp.norm(dim=-1, keepdim=True))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        x, scale, positions = ctx.saved_tensors
        wide, focus = torch.promote_types(x.dtype, torch.float32), ctx.focus
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dscale = scale.new_zeros(scale.shape[-1], dtype=wide)
        dpositions = None if positions is None else torch.zeros_like(positions)
        inverse = _inverse(scale, wide)
        for part, y in _parts(x, scale, positions):
            # out = a * u / b with u = y ** focus, a = |y|, b = |u|
            grad, u = grad_out[part].to(wide), y**focus
            a, b = y.norm(dim=-1, keepdim=True), u.norm(dim=-1, keepdim=True)
            along = (grad * u).sum(-1, keepdim=True) / b
            dy = (grad - u * (along / b)).mul_(u).div_(y).mul_(a * (focus / b)).addcmul_(y, along / a)
            dscale -= (dy * y).sum(0)
            dy.masked_fill_(y <= EPS * inverse, 0).mul_(inverse)
            dx[part] = dy
            if dpositions is not None:
                dpositions[0, part[1]] += dy
        dscale *= inverse * scale.to(wide).flatten().sigmoid()
        return dx, dscale.view(scale.shape).to(scale.dtype), dpositions, None, None


def _inverse(scale: Tensor, wide: torch.dtype) -> Tensor:
    return 1 / F.softplus(scale.to(wide)).flatten()


def _parts(x: Tensor, scale: Tensor, positions: Tensor | None) -> Iterator[tuple[tuple[int, slice], Tensor]]:
    """Entries of the batch and tokens, with y of them."""
    wide = torch.promote_types(x.dtype, torch.float32)
    inverse = _inverse(scale, wide)
    tokens = max(1, CHUNK // x.shape[-1])
    for entry in range(x.shape[0]):
        for first in range(0, x.shape[1], tokens):
            part = entry, slice(first, first + tokens)
            y = x[part].to(wide, copy=True)
            if positions is not None:
                y += positions[0, part[1]]
            yield part, y.relu_().add_(EPS).mul_(inverse)


class FocusedLinearAttention2d(ProjectedAttention2d):
    """Focused linear attention on maps `[B, H, W, dim]` (arXiv:2308.00442, section 4).

    Queries and keys, with positions added to the latter, are ReLU'd and raised to the power `focus` without a change
    of their norm, over all heads together. Every query reads the mean of keys times values, normalised; a depthwise
    convolution of the values, shared by all heads, is added. The cost is linear in the number of tokens.

    Parameters are named as in the official checkpoints: those of the projections, `scale`, `positional_encoding` and
    `dwc`. Maps of other sizes than `grid_size` go through, with positions interpolated on the way.

    Args:
        dim, num_heads, options: as in `ProjectedAttention2d`, without a class token.
        grid_size: rows and columns of the map whose positions are learnt.
        focus: power that the features are raised to; their norm stays.
        kernel_size: side of the convolution, odd.

    Raises:
        ValueError: num_heads does not divide dim, or a class token.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        grid_size: Sequence[int],
        focus: float = 3,
        kernel_size: int = 5,
        **options: Any,
    ):
        super().__init__(dim, num_heads=num_heads, **options)
        if self.class_token:
            raise ValueError("class_token=True must be False: every token needs a place on the map")
        dd: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.grid_size, self.focus = (grid_size[0], grid_size[1]), focus
        head_dim = dim // num_heads
        self.scale = nn.Parameter(torch.empty(1, 1, dim, **dd))
        self.positional_encoding = nn.Parameter(torch.empty(1, grid_size[0] * grid_size[1], dim, **dd))
        self.dwc = nn.Conv2d(head_dim, head_dim, kernel_size, padding=kernel_size // 2, groups=head_dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set scales and positions to zero; submodules have their own `reset_parameters`."""
        nn.init.zeros_(self.scale)
        nn.init.zeros_(self.positional_encoding)

    def set_grid_size(self, grid_size: Sequence[int]) -> None:
        """Make another map the native one: positions are interpolated bicubically, as upstream does."""
        table = self.positional_encoding
        resized = resize_positions(table.detach(), self.grid_size, grid_size)
        self.positional_encoding = nn.Parameter(resized, requires_grad=table.requires_grad)
        self.grid_size = (grid_size[0], grid_size[1])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, x: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Tokens `[B, N, heads, d]` to `[B, N, dim]`; the input `x` has no part in it."""
        heads = query.shape[2:]
        positions = resize_positions(self.positional_encoding, self.grid_size, grid_size)
        placed = (query.flatten(2), None), (key.flatten(2), positions)
        query, key = (
            focused_features(t, self.scale, p, self.focus, value.dtype).unflatten(2, heads) for t, p in placed
        )
        out = linear_attention(query, key, value, mean=True, eps=EPS, impl=self.impl)
        maps, repeats = value.flatten(2).unflatten(1, grid_size), self.num_heads
        weight, bias = self.dwc.weight.repeat(repeats, 1, 1, 1), self.dwc.bias.repeat(repeats)  # pyright: ignore
        if maps.device.type == "cpu" and self.impl != "reference" and is_plain_call():
            return add_convolved(out, maps, weight.unsqueeze(0), bias).flatten(2)
        return out.flatten(2) + convolve_depthwise(maps, weight, bias).flatten(1, 2)

    def attention_macs(self, shape: tuple[int, int]) -> int:
        """Multiply-accumulates of the attention for one map of this size: the state, what is read of it, its sums."""
        return shape[0] * shape[1] * self.dim * (2 * self.dim // self.num_heads + 1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, grid_size={self.grid_size}, focus={self.focus}"


class FocusedLinearBranch2d(BranchMixin, FocusedLinearAttention2d):
    """Focused linear attention as a branch of CSWin's blocks."""
