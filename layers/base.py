"""Base classes of attentions over all tokens of a map: with their projections, or without them."""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..kernels.common.calling import Impl
from ..kernels.common.symbolic import exporting


def join_heads(x: Tensor) -> Tensor:
    """Heads `[B, heads, N, d]` side by side, `[B, N, heads * d]`.

    An exported graph joins copies: a view would hold ONNX to the strides that attention had while it was traced.
    """
    return torch.cat(x.unbind(1), -1) if exporting() else x.transpose(1, 2).flatten(2)


def convolve_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Depthwise convolution of `[B, H, W, C]` by `[C, 1, k, k]`, k odd; zero-padded.

    Values are every third part of a projection. In memory of their own they are in `channels_last`, whose convolution
    takes CPUs an eighth of the time of one on strides.
    """
    maps = x.contiguous().permute(0, 3, 1, 2)
    out = F.conv2d(maps, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return out.permute(0, 2, 3, 1)


def add_convolved(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Add depthwise convolutions of maps `[B, H, W, C]` to `out [B, H * W, heads, d]`, in place.

    `weight` is `[B, C, 1, k, k]`, of every map its own, or `[1, C, 1, k, k]` for all; `bias` `[C]`. One map at a time,
    there is never a second tensor of the size of `out`; the gradient exists once.
    """
    return _AddConvolved.apply(out, x, weight, bias)


class _AddConvolved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.mark_dirty(out)
        for i in range(len(x)):
            out[i] += convolve_depthwise(x[i : i + 1], weight[i % len(weight)], bias).reshape(out[i].shape)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        x, weight, bias = ctx.saved_tensors
        _, needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_x else None
        dweight = torch.zeros_like(weight) if needs_weight else None
        dbias = torch.zeros_like(bias) if needs_bias else None
        grads = grad_out.flatten(2).unflatten(1, x.shape[1:3])
        (_, channels, _, side, _), wanted = weight.shape, (needs_x, needs_weight, needs_bias)
        pad, sizes = [side // 2] * 2, None if bias is None else [channels]
        for i in range(len(x)):
            maps, above = (t[i : i + 1].to(weight.dtype).contiguous() for t in (x, grads))
            own = i % len(weight)
            found = torch.ops.aten.convolution_backward(
                above.permute(0, 3, 1, 2), maps.permute(0, 3, 1, 2), weight[own], sizes,
                [1, 1], pad, [1, 1], False, [0, 0], channels, wanted,
            )  # fmt: skip
            if dx is not None:
                dx[i] = found[0][0].permute(1, 2, 0)
            if dweight is not None:
                dweight[own] += found[1]
            if dbias is not None:
                dbias += found[2]
        return grad_out, dx, dweight, dbias


class ProjectedAttention2d(nn.Module):
    """Attention of all tokens of a map `[B, H, W, dim]`, or of those behind a class token, between linear layers.

    A subclass has `attend(query, key, value, x, grid_size)`: tokens `[B, N, heads, d]` and the layer's input
    `[B, N, dim]` to `[B, N, dim]`; its parameters and its formula. Parameters are named as in the official checkpoints
    of vision transformers: `qkv` (rows: query, key, value; each head by head) or `q` and `kv`, and `proj`.

    Args:
        dim: channels of the input and the output.
        num_heads: heads; a divisor of dim.
        class_token: tokens `[B, 1 + H * W, dim]` come instead of a map; the first has no place on it.
        qkv_bias: whether the projections of queries, keys and values have a bias.
        separate_query: project queries by `q`, keys and values by `kv`, as PVT names them.
        projected: False for a layer that is called by a block with projections of its own.
        proj_drop: dropout after the output projection.
        impl: "auto", "triton", "torch" or "reference".

    Raises:
        ValueError: num_heads does not divide dim.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        class_token: bool = False,
        qkv_bias: bool = True,
        separate_query: bool = False,
        projected: bool = True,
        proj_drop: float = 0.0,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.class_token = dim, num_heads, class_token
        self.separate_query = separate_query
        self.impl: Impl = impl
        if projected and separate_query:
            self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
            self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        elif projected:
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        if projected:
            self.proj = nn.Linear(dim, dim, **dd)
            self.proj_drop = nn.Dropout(proj_drop)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, x: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """The attention between the projections."""
        raise NotImplementedError

    def forward(self, x: Tensor, *, grid_size: tuple[int, int] | None = None) -> Tensor:
        """Project, attend and project.

        Args:
            x: `[B, H, W, dim]`, or `[B, 1 + H * W, dim]` with a class token.
            grid_size: H and W of such tokens.

        Returns:
            the shape of x.

        Raises:
            ValueError: a shape that does not fit.
        """
        if x.dim() != 4 - self.class_token or x.shape[-1] != self.dim:
            expected = f"[B, 1 + H * W, {self.dim}]" if self.class_token else f"[B, H, W, {self.dim}]"
            raise ValueError(f"x has shape {tuple(x.shape)}; expected {expected}")
        tokens = x if self.class_token else x.flatten(1, 2)
        grid_size = grid_size if self.class_token else (x.shape[1], x.shape[2])
        if grid_size is None or tokens.shape[1] != grid_size[0] * grid_size[1] + self.class_token:
            raise ValueError(f"x has {tokens.shape[1]} tokens; expected a class token and grid_size={grid_size}")
        if self.separate_query:
            query = self.q(tokens).unflatten(-1, (self.num_heads, -1))
            key, value = self.kv(tokens).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        else:
            query, key, value = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # [B, N, heads, d]
        return self.proj_drop(self.proj(self.attend(query, key, value, tokens, grid_size))).view(x.shape)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"

    def __prepare_scriptable__(self) -> NoReturn:
        name = type(self).__name__
        raise NotImplementedError(f"TorchScript cannot compile {name}; use torch.export or torch.compile")


class BranchMixin(ProjectedAttention2d):
    """Makes of an attention a branch of CSWin's blocks, which project for it; to be named before that attention.

    A depthwise 3x3 convolution of the values, `get_v`, is added. Arguments are those of the attention.
    """

    def __init__(self, dim: int, **options: Any):
        super().__init__(dim, projected=False, **options)
        dd: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Maps `[B, H, W, heads, d]` and the block's input before its norm, `[B, H, W, dim]`, to `[B, H, W, dim]`."""
        tokens = (t.flatten(1, 2) for t in (query, key, value, x))
        out = self.attend(*tokens, grid_size=(x.shape[1], x.shape[2])).view(x.shape)
        return out + self.get_v(value.flatten(3).contiguous().permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
