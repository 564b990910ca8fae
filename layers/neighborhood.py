"""Neighborhood attention as a layer: projections, norms and position hooks around `foveal.kernels.ops.na1d/2d/3d`."""

from collections.abc import Callable, Sequence
from typing import ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.common.calling import PerHead, additional_visibility, is_per_head, on_grid
from ..kernels.common.symbolic import at_least
from ..kernels.ops import na1d, na2d, na3d
from .completion import complete, crop

Rope = Callable[[Tensor, Tensor], Tensor]


class _NeighborhoodAttention(nn.Module):
    """The layer for every rank; `NeighborhoodAttention2d` documents it."""

    rank: ClassVar[int]
    attend: ClassVar[Callable[..., Tensor]]

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        window: PerHead[int],
        stride: PerHead[int] = 1,
        dilation: PerHead[int] = 1,
        causal: PerHead[bool] = False,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        rpb: bool = False,
        qk_norm: Callable[..., nn.Module] | None = None,
        rope: Rope | None = None,
        pad: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        qk_dtype: torch.dtype | None = None,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if head_dim is None and dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads} unless head_dim is given")
        num_kv_heads = num_kv_heads or num_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}")
        if pad and rope is not None:
            raise ValueError("pad=True cannot be combined with rope: padded tokens have no position")
        self.dim, self.num_heads, self.num_kv_heads = dim, num_heads, num_kv_heads
        self.head_dim = head_dim or dim // num_heads
        self.window, self.stride = self._per_axis("window", window), self._per_axis("stride", stride)
        self.dilation, self.causal = self._per_axis("dilation", dilation), self._per_axis("causal", causal)
        windows = self.window if is_per_head(self.window) else (self.window,)
        if rpb and any(w % 2 == 0 for sizes in windows for w in sizes):
            raise ValueError(f"window={self.window} must be odd on every axis when rpb=True")
        self.pad, self.qk_dtype, self.impl = pad, qk_dtype, impl

        inner = num_heads * self.head_dim
        table = (num_heads, *(2 * max(sizes) - 1 for sizes in zip(*windows, strict=True)))
        self.rpb = nn.Parameter(torch.empty(table, **dd)) if rpb else None
        self.qkv = nn.Linear(dim, inner + 2 * num_kv_heads * self.head_dim, bias=qkv_bias, **dd)
        self.q_norm = qk_norm(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.k_norm = qk_norm(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.rope = rope
        self.proj = nn.Linear(inner, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def _per_axis(self, name: str, value) -> tuple:
        """One value for each axis, or such a tuple for each head."""
        if is_per_head(value):
            if len(value) != self.num_heads:
                raise ValueError(
                    f"{name}={value!r} has {len(value)} entries; expected one for each of {self.num_heads} heads"
                )
            return tuple(self._per_axis(f"{name}[{head}]", entry) for head, entry in enumerate(value))
        values = tuple(value) if isinstance(value, Sequence) else (value,) * self.rank
        if len(values) != self.rank:
            raise ValueError(f"{name}={value!r} must be one value, or one for each of {self.rank} axes")
        return values

    def reset_parameters(self) -> None:
        """Draw the relative position bias anew; submodules have their own `reset_parameters`."""
        if self.rpb is not None:
            nn.init.trunc_normal_(self.rpb, std=0.02)

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        extra: Tensor | None = None,
        additional_mask: Tensor | None = None,
        grid: Sequence[int] | None = None,
    ) -> Tensor:
        """Attend within the neighborhood.

        Args:
            x: `[B, *spatial, dim]`, or `[B, tokens, dim]` with `grid`.
            positions: coordinates handed to `rope`, `[..., *spatial, rank]`; those of the grid, 0 to length - 1 on
                each axis, when None.
            extra: tokens `[B, tokens, dim]` (registers, text) that every query sees besides its window; they pass
                through the same key and value projection and get neither `rope` nor `rpb`.
            additional_mask: visible additional tokens, bool `[B, tokens]`, or their number at the start of each batch
                entry, integer `[B]`; all when None. A masked token may hold anything, NaN included.
            grid: tokens along each axis, of which `x` holds prod(grid) in C order.

        Returns:
            The shape of `x`.

        Raises:
            ValueError: a shape that does not fit, or a window that does not fit into the grid while `pad` is off.
            NotImplementedError: under torch.jit.trace, unless `impl` is "reference"; with `qk_dtype` outside
                torch.no_grad().
        """
        if grid is not None:
            x = on_grid("x", x, self.rank, grid, features="dim")
            return self(x, positions=positions, extra=extra, additional_mask=additional_mask).flatten(1, -2)
        if x.dim() != self.rank + 2 or x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, {self.rank} spatial axes, {self.dim}]")
        if torch.jit.is_tracing() and self.impl != "reference":
            raise NotImplementedError(
                f"torch.jit.trace takes {type(self).__name__} with impl='reference' only; use torch.export instead"
            )
        spatial = x.shape[1:-1]
        query, key, value = self._project(self._pad(x) if self.pad else x)  # [B, *spatial, heads, d]
        if self.rope is not None:
            positions = self._grid(x) if positions is None else positions
            query, key = self.rope(query, positions).to(value.dtype), self.rope(key, positions).to(value.dtype)
        additional_keys, additional_values = (
            (None, None) if extra is None else self._project_extra(extra, additional_mask)
        )
        out = type(self).attend(
            query,
            key,
            value,
            window=self.window,
            stride=self.stride,
            dilation=self.dilation,
            causal=self.causal,
            bias=self.rpb,
            additional_keys=additional_keys,
            additional_values=additional_values,
            additional_mask=additional_mask,
            qk_dtype=self.qk_dtype,
            impl=self.impl,
        )
        if self.pad:
            out = crop(out, spatial)
        return self.proj_drop(self.proj(out.flatten(-2)))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        query, key, value = self.qkv(x).unflatten(-1, (sum(heads), self.head_dim)).split(heads, dim=-2)
        return self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype), value  # autocast norms in float32

    def _project_extra(self, extra: Tensor, additional_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        visible = additional_visibility(additional_mask, extra)
        if visible is not None:  # of the projection, gradients multiply what tokens hold
            extra = extra.masked_fill(~visible[..., None], 0)
        inner = self.num_heads * self.head_dim
        bias = None if self.qkv.bias is None else self.qkv.bias[inner:]
        key, value = F.linear(extra, self.qkv.weight[inner:], bias).unflatten(-1, (-1, self.head_dim)).chunk(2, dim=-2)
        return self.k_norm(key).to(value.dtype), value

    def _pad(self, x: Tensor) -> Tensor:
        """Zeros after the last token of each axis that is shorter than window * dilation."""
        return complete(x, [at_least(span, n) for span, n in zip(self._spans(), x.shape[1:-1], strict=True)])

    def _spans(self) -> list[int]:
        """The most tokens that the window of a head reaches over, per axis."""
        sizes = (
            values if is_per_head(values) else (values,) * self.num_heads for values in (self.window, self.dilation)
        )
        spans = [[w * d for w, d in zip(*of_head, strict=True)] for of_head in zip(*sizes, strict=True)]
        return [max(of_axis) for of_axis in zip(*spans, strict=True)]

    def _grid(self, x: Tensor) -> Tensor:
        axes = [torch.arange(n, device=x.device) for n in x.shape[1:-1]]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)  # [*spatial, rank]

    def extra_repr(self) -> str:
        return f"window={self.window}, stride={self.stride}, dilation={self.dilation}, causal={self.causal}"

    def __prepare_scriptable__(self) -> NoReturn:
        name = type(self).__name__
        raise NotImplementedError(
            f"TorchScript cannot compile {name}; use torch.export, torch.compile or torch.jit.trace"
        )


class NeighborhoodAttention1d(_NeighborhoodAttention):
    """Neighborhood attention on sequences `[B, L, dim]`; arguments as in `NeighborhoodAttention2d`."""

    rank = 1
    attend = staticmethod(na1d)


class NeighborhoodAttention2d(_NeighborhoodAttention):
    """Neighborhood attention on maps `[B, H, W, dim]` (arXiv:2204.07143, arXiv:2209.15001, arXiv:2504.16922).

    Parameters carry the names of the official checkpoints: `qkv` (rows: query, key, value; each head by head), `proj`
    and, with `rpb`, the table `rpb`.

    Args:
        dim: channels of the input and the output.
        num_heads: query heads.
        window, stride, dilation, causal: neighborhood, one value, one per axis, or one of these per head; see
            `foveal.kernels.ops.na2d`.
        num_kv_heads: key and value heads, a divisor of num_heads (grouped-query attention); num_heads when None.
        head_dim: channels per head; dim / num_heads when None.
        qkv_bias, proj_bias: whether the projections have a bias.
        rpb: learn a relative position bias `[num_heads, 2 * window - 1 per axis]`, of the largest window where heads
            differ; odd windows only.
        qk_norm: norm layer (such as `torch.nn.RMSNorm`) over head_dim, applied to queries and keys; none when None.
        rope: rotary embedding, called as `rope(x, positions)` on queries and on keys `[B, *spatial, heads, head_dim]`
            with the positions of `forward`. A module given here becomes a submodule.
        pad: append zeros to axes shorter than window * dilation before the projection and crop them after the
            attention. The padded tokens are ordinary keys, without a mask: what NATTEN up to 0.15 did and NAT and DiNAT
            checkpoints expect. Otherwise such a map is an error.
        proj_drop: dropout after the output projection.
        qk_dtype: torch.float8_e4m3fn for products of queries and keys in e4m3, without gradients; see
            `foveal.kernels.ops.na2d`. It may be set later, as an attribute: train without, sample with it.
        impl: "auto", "triton", "torch" or "reference"; see `foveal.kernels.ops.na2d`.

    Raises:
        ValueError: arguments that contradict each other.
    """

    rank = 2
    attend = staticmethod(na2d)


class NeighborhoodAttention3d(_NeighborhoodAttention):
    """Neighborhood attention on videos or volumes `[B, T, H, W, dim]`; arguments as in `NeighborhoodAttention2d`."""

    rank = 3
    attend = staticmethod(na3d)
