"""TransNeXt's attentions: cosine attention with scaled lengths and continuous biases (arXiv:2311.17132).

Pixel-focused attention sees the tokens around a query and a pooled map; the last stage sees every token.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import join_heads
from .mixture import HeadRouter, taken_rows

HIDDEN = 512  # of the network from offsets to biases
REACH = 8.0  # offset across the native map, before the logarithm


def axis_offsets(length: int, pooled: int, step: int, native: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Offsets of queries from pooled keys along one axis.

    Key j stands in the middle of tokens `step * j` to `step * j + step - 1`.

    Returns:
        offsets `[length + step * (pooled - 1)]`, such that the native map is `REACH` long;
        index of each pair in them, `[length, pooled]`.
    """
    back = step * (pooled - 1)
    offsets = torch.arange(length + back, device=device, dtype=torch.float32) - back - (step - 1) / 2
    queries, keys = torch.arange(length, device=device), torch.arange(pooled, device=device)
    return offsets / max(native - 1, 1) * REACH, queries[:, None] - step * keys + back


class LengthScaledAttention2d(nn.Module):
    """Base of TransNeXt's attentions on `[B, H, W, dim]` (arXiv:2311.17132, sections 3.2 and 3.3).

    Queries and keys have length 1; a query gets a learnt embedding, a learnt temperature and the logarithm of the
    number of keys that it sees. Biases are a network's, of offsets on a logarithmic scale. With a router heads are
    weighted token by token (arXiv:2410.11842).

    Args:
        dim: channels of the input and the output.
        num_heads: heads; a divisor of dim.
        grid_size: H and W of the native map, by which offsets are scaled; maps of any size go through.
        shared, routed: heads that serve every token, and further ones that each token takes; see `HeadRouter`. All
            heads count alike when both are None.
        skip_heads: compute routed heads for the tokens that take them alone. The same result; whether it is quicker
            depends on the number of tokens.
        proj_drop: dropout after the output projection.

    Raises:
        ValueError: num_heads does not divide dim.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        grid_size: tuple[int, int],
        shared: int | None = None,
        routed: int | None = None,
        skip_heads: bool = False,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.grid_size, self.skip_heads = tuple(grid_size), skip_heads
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **dd))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, self.head_dim, **dd))
        self.cpb_fc1 = nn.Linear(2, HIDDEN, **dd)
        self.cpb_fc2 = nn.Linear(HIDDEN, num_heads, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        plain = shared is None and routed is None
        self.router = None
        if not plain:
            self.router = HeadRouter(dim, num_heads=num_heads, shared=shared or 0, routed=routed or 0, **dd)

    def reset_parameters(self) -> None:
        """Draw the parameters of this layer anew; submodules have their own `reset_parameters`."""
        with torch.no_grad():
            self.temperature.fill_(1 / 0.24).expm1_().log_()  # softplus gives 1 / 0.24
        nn.init.trunc_normal_(self.query_embedding, std=0.02)

    def pair_bias(self, grid: tuple[int, int], pooled: tuple[int, int], step: int) -> Tensor:
        """Biases of all queries and pooled keys, `[heads, H * W, pooled H * pooled W]`."""
        device = self.temperature.device
        (rows, row_index), (columns, column_index) = (
            axis_offsets(n, p, step, native, device) for n, p, native in zip(grid, pooled, self.grid_size, strict=True)
        )
        offsets = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
        offsets = offsets.sign() * (offsets.abs() + 1).log2() / 3
        table = self.cpb_fc2(self.cpb_fc1(offsets.to(self.cpb_fc1.weight.dtype)).relu()).permute(2, 0, 1)
        by_row = table[:, row_index]  # [heads, H, pooled H, column offsets]
        return by_row[..., column_index].transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def scaled(self, query: Tensor, lengths: Tensor) -> Tensor:
        """Unit queries `[B, heads, N, d]`, scaled for keys whose logarithmic number is `lengths`, `[N, 1]`."""
        return (query + self.query_embedding) * F.softplus(self.temperature) * lengths.to(query.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` to `[B, H, W, dim]`; raises ValueError for another shape."""
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, H, W, {self.dim}]")
        attend = self.attention(x)
        if self.router is None:
            out = attend(slice(None), None)
        else:
            weights = self.router(x.flatten(1, 2))
            first = self.router.shared
            if self.skip_heads and self.router.routed:
                rows = taken_rows(weights[..., first:])
                some = attend(slice(first, None), rows)  # [B, routed heads, rows, d]
                index = rows[..., None].expand_as(some)
                routed = some.new_zeros(*some.shape[:2], x.shape[1] * x.shape[2], self.head_dim)
                routed = routed.scatter(2, index, some)
                out = torch.cat([attend(slice(0, first), None), routed], dim=1) if first else routed
            else:
                out = attend(slice(None), None)
            out = out * weights.transpose(1, 2)[..., None]
        return self.proj_drop(self.proj(join_heads(out))).view(x.shape)

    def attention(self, x: Tensor) -> Callable[[slice, Tensor | None], Tensor]:
        """A function from heads, a slice, and rows `[B, heads, R]` or None to their outputs `[B, heads, N or R, d]`."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"

    def __prepare_scriptable__(self) -> NoReturn:
        name = type(self).__name__
        raise NotImplementedError(f"TorchScript cannot compile {name}; use torch.export or torch.compile")


def near(x: Tensor, index: Tensor) -> Tensor:
    """Tokens `[N, w]`, or `[B, heads, R, w]`, of `[B, heads, N, d]`: `[B, heads, N or R, w, d]`."""
    if index.dim() == 2:
        return x[:, :, index]
    flat = index.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, flat).unflatten(2, index.shape[2:])


def take(x: Tensor, rows: Tensor | None) -> Tensor:
    """Rows `[B, heads, R]` of `[B, heads, N, d]`, or of `[1, heads, N, d]` for every image; all when None."""
    if rows is None:
        return x
    x = x.expand(rows.shape[0], -1, -1, -1)
    return x.gather(2, rows[..., None].expand(-1, -1, -1, x.shape[-1]))


class GlobalCosineAttention2d(LengthScaledAttention2d):
    """Attention of every token to every other; arguments as in `LengthScaledAttention2d`."""

    def __init__(self, dim: int, **options: Any):
        super().__init__(dim, **options)
        self.qkv = nn.Linear(dim, 3 * dim, device=options.get("device"), dtype=options.get("dtype"))
        self.reset_parameters()

    def attention(self, x: Tensor) -> Callable[[slice, Tensor | None], Tensor]:
        grid = (x.shape[1], x.shape[2])
        query, key, value = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        wide = torch.promote_types(x.dtype, torch.float32)
        lengths = torch.full((1, 1), grid[0] * grid[1], device=x.device, dtype=wide).log()
        query, key = self.scaled(F.normalize(query, dim=-1), lengths), F.normalize(key, dim=-1)
        bias = self.pair_bias(grid, grid, 1)[None].to(query.dtype)

        def attend(heads: slice, rows: Tensor | None) -> Tensor:
            queries, mask = take(query[:, heads], rows), take(bias[:, heads], rows)
            return F.scaled_dot_product_attention(queries, key[:, heads], value[:, heads], attn_mask=mask, scale=1.0)

        return attend

    def attention_macs(self, shape: tuple[int, int]) -> int:
        """Multiply-accumulates of the attention of all heads for one map of this size."""
        return 2 * (shape[0] * shape[1]) ** 2 * self.dim


class PixelFocusedAttention2d(LengthScaledAttention2d):
    """Attention to the tokens of a window around each query and to a pooled map, in one softmax.

    Weights inside the window get a learnt part of their own, after the softmax, from the unit query. The window ends
    at the border of the map.

    Args:
        pool: side of the cells that are averaged into pooled keys; cells at the border may be smaller.
        window: side of the window, odd.
        dim, options: as in `LengthScaledAttention2d`.
    """

    def __init__(self, dim: int, *, pool: int, window: int = 3, **options: Any):
        super().__init__(dim, **options)
        if window % 2 == 0:
            raise ValueError(f"window={window} must be odd: it is centred on a query")
        dd: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.pool, self.window = pool, window
        self.relative_pos_bias_local = nn.Parameter(torch.empty(self.num_heads, window**2, **dd))
        self.learnable_tokens = nn.Parameter(torch.empty(self.num_heads, self.head_dim, window**2, **dd))
        self.learnable_bias = nn.Parameter(torch.empty(self.num_heads, 1, window**2, **dd))
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        self.sr = nn.Conv2d(dim, dim, 1, **dd)
        self.norm = nn.LayerNorm(dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.trunc_normal_(self.relative_pos_bias_local, std=0.0004)
        nn.init.trunc_normal_(self.learnable_tokens, std=0.02)
        nn.init.zeros_(self.learnable_bias)

    def pooled(self, x: Tensor) -> Tensor:
        """The map `[B, H, W, dim]` with cells averaged, `[B, H / pool, W / pool, dim]`, rounded up."""
        mixed = F.gelu(self.sr(x.permute(0, 3, 1, 2)))
        return self.norm(F.avg_pool2d(mixed, self.pool, ceil_mode=True, count_include_pad=False).permute(0, 2, 3, 1))

    def window_index(self, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens of each query's window, `[N, window ** 2]`, and which of them lie on the map."""
        reach = torch.arange(self.window, device=device) - self.window // 2
        sides = [torch.arange(n, device=device)[:, None] + reach for n in grid]  # [H, window], [W, window]
        inside = [(side >= 0) & (side < n) for side, n in zip(sides, grid, strict=True)]
        rows, columns = (side.clamp(min=0, max=n - 1) for side, n in zip(sides, grid, strict=True))
        index = rows[:, None, :, None] * grid[1] + columns[None, :, None, :]
        valid = inside[0][:, None, :, None] & inside[1][None, :, None, :]
        return index.flatten(2).flatten(0, 1), valid.flatten(2).flatten(0, 1)

    def attention(self, x: Tensor) -> Callable[[slice, Tensor | None], Tensor]:
        grid = (x.shape[1], x.shape[2])
        tokens, pooled = x.flatten(1, 2), self.pooled(x)
        query = F.normalize(self.q(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2), dim=-1)
        key, value = self.kv(tokens).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        far_key, far_value = self.kv(pooled.flatten(1, 2)).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        key, far_key = F.normalize(key, dim=-1), F.normalize(far_key, dim=-1)
        index, valid = self.window_index(grid, x.device)
        lengths = (valid.sum(-1, keepdim=True).float() + pooled.shape[1] * pooled.shape[2]).log()
        scaled = self.scaled(query, lengths)
        bias = self.pair_bias(grid, (pooled.shape[1], pooled.shape[2]), self.pool)[None].to(query.dtype)

        def attend(heads: slice, rows: Tensor | None) -> Tensor:
            queries, units, far_bias = (take(t[:, heads], rows) for t in (scaled, query, bias))
            near_index = index if rows is None else index[rows]  # [N, window ** 2] or [B, heads, R, window ** 2]
            hidden = ~(valid if rows is None else valid[rows])
            near_key, near_value = (near(t[:, heads], near_index) for t in (key, value))
            local = (queries[..., None, :] * near_key).sum(-1) + self.relative_pos_bias_local[heads, None]
            far = queries @ far_key[:, heads].mT + far_bias
            scores = torch.cat([local.masked_fill(hidden, float("-inf")), far], dim=-1)
            local, far = scores.softmax(-1).split([self.window**2, far_key.shape[2]], dim=-1)
            local = local + units @ self.learnable_tokens[heads] + self.learnable_bias[heads]
            local = local.masked_fill(hidden, 0.0)  # tokens beyond the border have no value
            return (local[..., None] * near_value).sum(-2) + far @ far_value[:, heads]

        return attend

    def attention_macs(self, shape: tuple[int, int]) -> int:
        """Multiply-accumulates of the attention of all heads for one map of this size."""
        cells = -(-shape[0] // self.pool) * -(-shape[1] // self.pool)
        return shape[0] * shape[1] * self.dim * (3 * self.window**2 + 2 * cells)
