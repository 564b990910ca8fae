"""Polyline path masked attention: decay along rows and columns that the tokens choose (arXiv:2506.15940)."""

from math import ceil
from typing import Any, Literal, NoReturn, cast

import torch
from timm.layers import apply_rot_embed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..kernels.common.calling import wants_gradient
from .routing import conv_nhwc

Form = Literal["criss_cross", "whole"]
Sums = tuple[Tensor, Tensor]
LOGITS = 1 << 24  # numbers of one tensor of logits that are held at a time


class MapConv(nn.Module):
    """Depthwise convolution of `[B, H, W, dim]`, named as in the official checkpoints."""

    def __init__(self, dim: int, kernel_size: int, *, device=None, dtype=None):
        super().__init__()
        options: dict[str, Any] = {"padding": kernel_size // 2, "groups": dim, "device": device, "dtype": dtype}
        self.conv = nn.Conv2d(dim, dim, kernel_size, **options)

    def forward(self, x: Tensor) -> Tensor:
        return conv_nhwc(self.conv, x)


class PathDecay(nn.Module):
    """Log decays of each token and head, at most zero, along the rows and along the columns of a map."""

    def __init__(self, num_heads: int, head_dim: int, *, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dt_bias = nn.Parameter(torch.empty(num_heads, **dd))
        self.A_log = nn.Parameter(torch.empty(num_heads, **dd))
        self.dt_linear = nn.Linear(head_dim, 2, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set decays of about 0.01 to 0.1 a token at first, as state space models do; `dt_linear` has its own."""
        with torch.no_grad():
            steps = torch.linspace(0.01, 0.1, len(self.dt_bias), dtype=torch.float64)
            self.dt_bias.copy_(steps.expm1().log())
            self.A_log.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, heads, d]` to `[2, B, H, W, heads]`, in float32 at least."""
        steps = F.softplus(self.dt_linear(x).movedim(-1, 0) + self.dt_bias)
        dtype = torch.promote_types(steps.dtype, torch.float32)
        return -steps.to(dtype) * self.A_log.to(dtype).exp()


def _rotate(x: Tensor, frequencies: Tensor) -> Tensor:
    """Rotate pairs of neighbouring channels of `[B, H, W, heads, d]` by the raster number of the token."""
    height, width = x.shape[1:3]
    places = torch.arange(height * width, device=x.device, dtype=frequencies.dtype).view(height, width, 1, 1)
    angles = places * frequencies.repeat_interleave(2)
    return apply_rot_embed(x.to(angles.dtype), angles.sin(), angles.cos()).to(x.dtype)


def _distances(sums: Tensor) -> Tensor:
    """Differences of sums along the last axis, `[..., n]` to `[..., n, n]`, without their sign."""
    return (sums.unsqueeze(-1) - sums.unsqueeze(-2)).abs()


def _rows(query: Tensor, key: Tensor, value: Tensor, along: Sums, down: Sums) -> Tensor:
    """Outputs of some rows of queries `[B, heads, rows, W, d]` by both paths, over keys `[B, heads, H, W, d]`.

    `along` are sums of log decays along each row, `down` along each column: of the rows of queries `[B, heads, rows,
    W]` and of all `[B, heads, H, W]`.
    """
    (own_along, all_along), (own_down, all_down) = along, down
    logits = torch.einsum("bhiwd,bhjvd->bhiwjv", query, key)  # query (i, w), key (j, v)
    by_row = _distances(own_along).unsqueeze(-2)  # along the query's row, then along the key's column
    by_row = by_row + (own_down[:, :, :, None] - all_down[:, :, None]).abs().unsqueeze(3)
    by_column = _distances(all_along).movedim(-2, -3)[:, :, None]  # along the query's column, then the key's row
    by_column = by_column + (own_down[:, :, :, None] - all_down[:, :, None]).abs().transpose(-1, -2).unsqueeze(-1)
    weights = 0.5 * ((logits - by_row).flatten(-2).softmax(-1) + (logits - by_column).flatten(-2).softmax(-1))
    return (weights.flatten(2, 3) @ value.flatten(2, 3)).unflatten(2, query.shape[2:4])


class PolylinePathAttention2d(nn.Module):
    """Attention on `[B, H, W, dim]` that fades along the path from the query to the key (arXiv:2506.15940).

    A path goes along the query's row to the key's column and then along that column, or the other way round; what it
    costs is the sum of the log decays it passes, that is, a difference of running sums: no mask of all pairs is formed.
    "whole" averages the attention of both paths; it takes rows of queries in turns, so that memory is linear in the
    number of tokens for maps of any size. "criss_cross" attends along rows and then along columns, and in the other
    order, and averages those. Queries and keys are rotated by their raster number, and a depthwise convolution of the
    values is added.

    Parameters have the names of the official checkpoints.

    Args:
        dim: channels of the input and the output.
        num_heads: heads; a divisor of dim with an even quotient.
        form: "criss_cross" or "whole".
        proj_drop: dropout after the output projection.

    Raises:
        ValueError: an argument outside what is accepted; `forward` gets another shape.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        form: Form = "criss_cross",
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % (2 * num_heads):
            raise ValueError(f"dim={dim} must be a multiple of 2 * num_heads={2 * num_heads}: pairs of channels turn")
        if form not in ("criss_cross", "whole"):
            raise ValueError(f"form={form!r} must be 'criss_cross' or 'whole'")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.form = dim, num_heads, form
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, **dd) for _ in range(3))
        self.lepe = MapConv(dim, 5, **dd)
        self.out_proj = nn.Linear(dim, dim, **dd)
        self.path_embed = PathDecay(num_heads, dim // num_heads, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` to `[B, H, W, dim]`; raises ValueError for another shape."""
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, H, W, {self.dim}]")
        heads = (self.num_heads, -1)
        value = self.v_proj(x)
        query, key = self.q_proj(x).unflatten(-1, heads), self.k_proj(x).unflatten(-1, heads)
        pairs = query.shape[-1] // 2
        wide = torch.promote_types(x.dtype, torch.float32)
        frequencies = 10000.0 ** -torch.linspace(0, 1, pairs, device=x.device, dtype=wide)
        query, key = _rotate(query * query.shape[-1] ** -0.5, frequencies), _rotate(key, frequencies)
        along, down = self.path_embed(x.unflatten(-1, heads))
        sums = along.cumsum(2).movedim(-1, 1), down.cumsum(1).movedim(-1, 1)  # [B, heads, H, W]
        query, key, value_heads = (
            t.movedim(-2, 1) for t in (query, key, value.unflatten(-1, heads))
        )  # [B, heads, H, W, d]
        attend = self._criss_cross if self.form == "criss_cross" else self._whole
        out = attend(query, key, value_heads, *sums).movedim(1, -2).flatten(3).to(x.dtype)
        return self.proj_drop(self.out_proj(out + self.lepe(value)))

    def _criss_cross(self, query: Tensor, key: Tensor, value: Tensor, along: Tensor, down: Tensor) -> Tensor:
        rows = (query @ key.mT - _distances(along)).softmax(-1).to(value.dtype)  # [B, heads, H, W, W]
        turned = query.transpose(2, 3) @ key.transpose(2, 3).mT
        columns = (turned - _distances(down.transpose(2, 3))).softmax(-1).to(value.dtype)  # [B, heads, W, H, H]
        first = (columns @ (rows @ value).transpose(2, 3)).transpose(2, 3)
        second = rows @ (columns @ value.transpose(2, 3)).transpose(2, 3)
        return 0.5 * (first + second)

    def _whole(self, query: Tensor, key: Tensor, value: Tensor, along: Tensor, down: Tensor) -> Tensor:
        dtype = torch.promote_types(query.dtype, torch.float32)
        query, key, value = (t.to(dtype) for t in (query, key, value))
        batch, heads, height, width, _ = query.shape
        rows = max(1, LOGITS // max(1, batch * heads * width * height * width))
        if rows >= height:
            return _rows(query, key, value, (along, along), (down, down))
        outs: list[Tensor] = []
        again = wants_gradient(query, key, value, along, down)
        for part in range(ceil(height / rows)):
            own = slice(part * rows, (part + 1) * rows)
            given = (query[:, :, own], key, value, (along[:, :, own], along), (down[:, :, own], down))
            outs.append(cast(Tensor, checkpoint(_rows, *given, use_reentrant=False)) if again else _rows(*given))
        return torch.cat(outs, 2)

    def attention_macs(self, shape: tuple[int, int]) -> int:
        """Multiply-accumulates of the attention for one map of this size."""
        tokens, across = shape[0] * shape[1], shape[0] + shape[1]
        return 3 * tokens * across * self.dim if self.form == "criss_cross" else 2 * tokens**2 * self.dim

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, form={self.form!r}"

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError(
            "TorchScript cannot compile PolylinePathAttention2d; use torch.export or torch.compile"
        )
