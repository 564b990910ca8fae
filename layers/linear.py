"""Layers of L2ViT: linear attention with ReLU features, and the convolutions that concentrate it (arXiv:2501.16182)."""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..kernels.common.calling import Impl
from ..kernels.ops import linear_attention


class LinearAttention(nn.Module):
    """Linear attention with ReLU features on `[B, *spatial, dim]` (arXiv:2501.16182, section 3.2).

    Queries and keys are ReLU'd, the normaliser is kept at `floor` at least, and every head's output has a learnt
    `temperature`. The cost is linear in the number of tokens, whatever their grid.

    Parameters carry the names of the official checkpoints: `qkv` (rows: query, key, value; each head by head),
    `temperature` `[heads, 1, 1]` and `proj`.

    Args:
        dim: channels of the input and the output.
        num_heads: heads; a divisor of dim.
        qkv_bias: whether the projection of queries, keys and values has a bias.
        floor: the least that the normaliser may be, above 0.
        proj_drop: dropout after the output projection.
        impl: "auto", "triton", "torch" or "reference"; see `foveal.kernels.ops.linear_attention`.

    Raises:
        ValueError: num_heads does not divide dim.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        qkv_bias: bool = True,
        floor: float = 100.0,
        proj_drop: float = 0.0,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.floor = dim, num_heads, floor
        self.impl: Impl = impl
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **dd))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the temperatures to head_dim ** -0.5; submodules have their own `reset_parameters`."""
        nn.init.constant_(self.temperature, (self.dim // self.num_heads) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, *spatial, dim]` to `[B, *spatial, dim]`; raises ValueError for another shape."""
        if x.dim() < 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, *spatial, {self.dim}]")
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)  # [B, *spatial, heads, d]
        scale = self.temperature.flatten()
        out = linear_attention(query, key, value, relu=True, floor=self.floor, scale=scale, impl=self.impl)
        return self.proj_drop(self.proj(out.flatten(-2)))

    def attention_macs(self, shape: tuple[int, int]) -> int:
        """Multiply-accumulates of the attention for one map of this size: the state, what is read of it, its sums."""
        head_dim = self.dim // self.num_heads
        return shape[0] * shape[1] * self.dim * (2 * head_dim + 1)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, floor={self.floor}"

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError("TorchScript cannot compile LinearAttention; use torch.export or torch.compile")


class LocalConcentration(nn.Module):
    """L2ViT's local concentration module on `[B, H, W, dim]` (arXiv:2501.16182, section 3.3).

    Two depthwise convolutions with GELU and batch norm between them: linear attention spreads evenly over a map, and
    these bring it back to what is near. Parameters carry the names of the official checkpoints: `conv1`, `bn`, `conv2`.

    Args:
        dim: channels.
        kernel_size: side of the convolutions, odd.
        act_layer: activation.
    """

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int = 7,
        act_layer: type[nn.Module] = nn.GELU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd: the map keeps its size")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        options: dict[str, Any] = {"padding": kernel_size // 2, "groups": dim, **dd}
        self.conv1 = nn.Conv2d(dim, dim, kernel_size, **options)
        self.act = act_layer()
        self.bn = nn.BatchNorm2d(dim, **dd)
        self.conv2 = nn.Conv2d(dim, dim, kernel_size, **options)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` to `[B, H, W, dim]`."""
        return self.conv2(self.bn(self.act(self.conv1(x.permute(0, 3, 1, 2))))).permute(0, 2, 3, 1)
