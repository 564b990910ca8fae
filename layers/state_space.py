"""State space layers of documents and of diffusion: DocMamba's and LaMamba-Diff's, with one decay per head.

Both papers have Mamba-1's selective scan, whose decay differs by channel and state. Here it is Mamba-2's
(arXiv:2405.21060), one number per token and head, which `scan_attention` computes on any device; their weights do not
fit.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.common.calling import Impl
from ..kernels.ops import scan_attention, scan_order
from .routing import conv_nhwc
from .window import WindowAttention2d


class SelectiveScan(nn.Module):
    """One scan of a selective state space model over `[B, N, dim]`, in one direction (arXiv:2405.21060).

    Every token has a step of its own for each head, which sets its decay and the weight of what it writes. `A_log`, `D`
    and `dt_bias` are named as in Mamba.

    Args:
        dim: channels.
        num_heads: heads; a divisor of dim.
        state_dim: rows of a head's state.
        impl: "auto", "triton", "torch" or "reference".
    """

    def __init__(self, dim: int, *, num_heads: int, state_dim: int = 16, impl: Impl = "auto", device=None, dtype=None):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.state_dim = dim, num_heads, state_dim
        self.impl: Impl = impl
        self.x_proj = nn.Linear(dim, num_heads + 2 * state_dim, bias=False, **dd)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(num_heads, **dd)) for _ in range(3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set steps from 0.001 to 0.1, decays from 1 to 16 a unit of time and a skip of 1, as Mamba-2 does."""
        with torch.no_grad():
            steps = torch.logspace(-3, -1, self.num_heads, dtype=torch.float64)
            self.dt_bias.copy_(steps.expm1().log())
            self.A_log.copy_(torch.linspace(1, 16, self.num_heads, dtype=torch.float64).log())
            nn.init.ones_(self.D)

    def forward(self, x: Tensor, *, direction: str = "forward") -> Tensor:
        """`[B, N, dim]` to `[B, N, dim]`."""
        step, key, query = self.x_proj(x).split([self.num_heads, self.state_dim, self.state_dim], -1)
        wide = torch.promote_types(step.dtype, torch.float32)
        step = F.softplus(step.to(wide) + self.dt_bias.to(wide))  # [B, N, heads]
        value = x.unflatten(-1, (self.num_heads, -1))
        written = value * step.to(value.dtype).unsqueeze(-1)
        query, key = (t.unsqueeze(2).expand(-1, -1, self.num_heads, -1) for t in (query, key))
        decay = -step * self.A_log.to(wide).exp()
        out = scan_attention(query, key, written, log_decay=decay, direction=direction, impl=self.impl)
        return (out + self.D.to(out.dtype)[:, None] * value).flatten(2)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, state_dim={self.state_dim}"


class Scan1d(nn.Module):
    """Both directions of a selective scan over `[B, N, dim]`, each with its own convolution and steps: DocMamba's layer
    (arXiv:2409.11887), but for the decay.

    The directions share the projections of input and output, and are averaged.

    Args:
        dim: channels of the input and the output; those inside are `expand` times as many.
        num_heads: heads; a divisor of `expand * dim`.
        state_dim: rows of a head's state.
        expand: see `dim`.
        conv: tokens of the short convolutions, each of which sees itself and those before it in its direction.
        impl: "auto", "triton", "torch" or "reference".
    """

    def __init__(
        self, dim: int, *, num_heads: int, state_dim: int = 16, expand: int = 2, conv: int = 4, impl: Impl = "auto",
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, self.dim, self.conv = expand * dim, dim, conv
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.convs = nn.ModuleList(nn.Conv1d(inner, inner, conv, groups=inner, **dd) for _ in range(2))
        options: dict[str, Any] = {"num_heads": num_heads, "state_dim": state_dim, "impl": impl, **dd}
        self.scans = nn.ModuleList(SelectiveScan(inner, **options) for _ in range(2))
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)

    def forward(self, x: Tensor, *, order: Tensor | None = None) -> Tensor:
        """`[B, N, dim]` to `[B, N, dim]`.

        Args:
            order: int64 `[N]`, in which tokens are visited, such as `scan_order(…, "segments")`; None for as they are.
        """
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, N, {self.dim}]")
        x = x if order is None else x[:, order]
        inner, outer = self.in_proj(x).chunk(2, dim=-1)
        channels, out = inner.transpose(1, 2), torch.zeros_like(inner)
        beside = (self.conv - 1, 0), (0, self.conv - 1)
        for conv, scan, sides, direction in zip(self.convs, self.scans, beside, ("forward", "backward"), strict=True):
            convolved = F.silu(conv(F.pad(channels, sides))).transpose(1, 2)
            out = out + 0.5 * scan(convolved, direction=direction)
        out = self.out_proj(out * F.silu(outer))
        return out if order is None else out[:, order.argsort()]

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError("TorchScript cannot compile Scan1d; use torch.export or torch.compile")


class Scan2d(nn.Module):
    """Selective scans of `[B, H, W, dim]` along several orders, each in both directions: LaMamba-Diff's mixing
    (arXiv:2408.02615), but for the decay.

    Args:
        dim: channels of the input and the output; those inside are `expand` times as many.
        num_heads: heads; a divisor of `expand * dim`.
        state_dim: rows of a head's state.
        expand: see `dim`.
        conv: side of the depthwise convolution before the scans, odd.
        orders: as `foveal.kernels.ops.scan_order` takes them.
        impl: "auto", "triton", "torch" or "reference".
    """

    def __init__(
        self, dim: int, *, num_heads: int, state_dim: int = 16, expand: int = 2, conv: int = 3,
        orders: Sequence[str] = ("snake_rows", "snake_columns"), impl: Impl = "auto", device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, self.dim, self.orders = expand * dim, dim, tuple(orders)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv = nn.Conv2d(inner, inner, conv, padding=conv // 2, groups=inner, **dd)
        options: dict[str, Any] = {"num_heads": num_heads, "state_dim": state_dim, "impl": impl, **dd}
        self.scans = nn.ModuleList(SelectiveScan(inner, **options) for _ in range(2 * len(self.orders)))
        self.norm = nn.LayerNorm(inner, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` to `[B, H, W, dim]`."""
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, H, W, {self.dim}]")
        inner, outer = self.in_proj(x).chunk(2, dim=-1)
        tokens = F.silu(conv_nhwc(self.conv, inner.contiguous())).flatten(1, 2)
        out = torch.zeros_like(tokens)
        for i, kind in enumerate(self.orders):
            order, inverse = (t.to(x.device) for t in scan_order(x.shape[1:3], kind))
            laid_out = tokens[:, order]
            for scan, direction in zip(self.scans[2 * i : 2 * i + 2], ("forward", "backward"), strict=True):
                out = out + scan(laid_out, direction=direction)[:, inverse]
        return self.out_proj(self.norm(out).view(inner.shape) * F.silu(outer))

    def extra_repr(self) -> str:
        return f"orders={self.orders}"

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError("TorchScript cannot compile Scan2d; use torch.export or torch.compile")


class LocalScanBlock(nn.Module):
    """Block of LaMamba-Diff on `[B, H, W, dim]`: scans, windows and a feed-forward layer, all three shifted, scaled and
    gated by a condition (arXiv:2408.02615).

    The last layer of the condition starts at zero, and the block with it as the identity.

    Args:
        dim, cond_dim: channels of the map and of the condition.
        num_heads: heads of windows and of scans; a divisor of dim.
        window, shift: side of the windows, and how far they are shifted; every second block has half a window.
        mlp_ratio: hidden over embedding width.
        options: further arguments of `Scan2d`.
    """

    def __init__(
        self, dim: int, *, cond_dim: int, num_heads: int, window: int = 8, shift: int = 0, mlp_ratio: float = 4.0,
        device=None, dtype=None, **options: Any,
    ):  # fmt: skip
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norms = nn.ModuleList(nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6, **dd) for _ in range(3))
        scan = Scan2d(dim, num_heads=num_heads, **options, **dd)
        attn = WindowAttention2d(dim, num_heads=num_heads, window=window, shift=shift, **dd)
        mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=nn.GELU, **dd)
        self.parts = nn.ModuleList([scan, attn, mlp])
        self.modulation = nn.Linear(cond_dim, 9 * dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """`[B, H, W, dim]` and a condition `[B, cond_dim]` to `[B, H, W, dim]`."""
        chunks = self.modulation(F.silu(cond))[:, None, None].chunk(9, dim=-1)
        for i, (norm, part) in enumerate(zip(self.norms, self.parts, strict=True)):
            shift, scale, gate = chunks[3 * i : 3 * i + 3]
            x = x + gate * part(norm(x) * (1 + scale) + shift)
        return x
