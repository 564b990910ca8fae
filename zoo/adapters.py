"""`use_kernels`: timm's window attention on our kernels.

A module keeps its parameters, buffers and hooks and changes its class, so that state dicts stay as they are. Masks of
shifted windows are -100 in timm and exclude in ours; no released checkpoint tells them apart in float32.
"""

import logging
import math

import torch
from timm.layers.halo_attn import HaloAttn
from timm.models.davit import SpatialBlock
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.ops import window_attention

_logger = logging.getLogger(__name__)


def _pad(x: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Zeros that complete the windows of `[B, H, W, C]`, where timm puts them: behind the rolled grid.

    They are ordinary keys, as in timm.
    """
    missing = [-n % w for n, w in zip(x.shape[1:3], window, strict=True)]
    if not any(missing):
        return x
    size = (0, 0, 0, missing[1], 0, missing[0])
    if not any(shift):
        return F.pad(x, size)
    return F.pad(x.roll((-shift[0], -shift[1]), (1, 2)), size).roll(shift, (1, 2))


def _crop(x: Tensor, size: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """`[B, H, W, C]` without the zeros of `_pad`."""
    if tuple(x.shape[1:3]) == tuple(size):
        return x
    if not any(shift):
        return x[:, : size[0], : size[1]]
    return x.roll((-shift[0], -shift[1]), (1, 2))[:, : size[0], : size[1]].roll(shift, (1, 2))


class _SwinBlock(SwinTransformerBlock):
    def _attn(self, x: Tensor) -> Tensor:
        attn, window, shift = self.attn, tuple(self.window_size), tuple(self.shift_size)
        qkv = attn.qkv(_pad(x, window, shift)).unflatten(-1, (3, attn.num_heads, -1))
        out = window_attention(
            *qkv.unbind(-3), window=window, shift=shift, bias=attn._get_rel_pos_bias()[0], scale=attn.scale
        )
        return attn.proj_drop(attn.proj(_crop(out.flatten(-2), x.shape[1:3], shift)))


class _SwinV2Block(SwinTransformerV2Block):
    def _attn(self, x: Tensor) -> Tensor:
        attn, window, shift = self.attn, tuple(self.window_size), tuple(self.shift_size)
        bias = None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        qkv = F.linear(_pad(x, window, shift), attn.qkv.weight, bias).unflatten(-1, (3, attn.num_heads, -1))
        query, key, value = qkv.unbind(-3)  # [B, H, W, heads, d]
        sharpness = attn.logit_scale.clamp(max=math.log(100)).exp().flatten(1)  # [heads, 1]
        query, key = F.normalize(query, dim=-1) * sharpness, F.normalize(key, dim=-1)
        out = window_attention(
            query.to(value.dtype),
            key.to(value.dtype),
            value,
            window=window,
            shift=shift,
            bias=self._bias(),
            scale=1.0,
        )
        return attn.proj_drop(attn.proj(_crop(out.flatten(-2), x.shape[1:3], shift)))

    def _bias(self) -> Tensor:
        """Continuous position bias, `[heads, window tokens, window tokens]` (arXiv:2111.09883, section 3.3)."""
        table = self.attn.cpb_mlp(self.attn.relative_coords_table).flatten(0, 2)  # [offsets, heads]
        return 16 * table[self.attn.relative_position_index].permute(2, 0, 1).sigmoid()


class _DaViTBlock(SpatialBlock):
    def forward(self, x: Tensor) -> Tensor:
        size, attn = x.shape[2:], self.attn
        shortcut = self.cpe1(x).flatten(2).transpose(1, 2)  # [B, H * W, C]
        padded = _pad(self.norm1(shortcut).unflatten(1, size), self.window_size, (0, 0))
        qkv = attn.qkv(padded).unflatten(-1, (3, attn.num_heads, -1))
        out = window_attention(*qkv.unbind(-3), window=self.window_size, scale=attn.scale)
        out = attn.proj(_crop(out.flatten(-2), size, (0, 0)))
        x = shortcut + self.drop_path1(out.flatten(1, 2))  # pyright: ignore[reportOptionalCall]
        x = self.cpe2(x.transpose(1, 2).unflatten(2, size))
        if self.mlp is None:
            return x
        x = x.flatten(2).transpose(1, 2)
        x = x + self.drop_path2(self.mlp(self.norm2(x)))  # pyright: ignore[reportOptionalCall]
        return x.transpose(1, 2).unflatten(2, size)


class _HaloAttention(HaloAttn):
    """Relative logits depend on the query, so they enter by more head channels instead of a bias.

    A window sees `win_size` consecutive rows (and columns) of keys, which differ in their index modulo `win_size`. Each
    key is marked by this class, one-hot, and each query brings its relative logit for every class.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % self.block_size or x.shape[3] % self.block_size:
            raise ValueError(f"map {tuple(x.shape[2:])} must be a multiple of block_size={self.block_size}")
        heads, halo, win = self.num_heads, self.halo_size, self.win_size
        query = self.q(x).unflatten(1, (heads, -1)).permute(0, 3, 4, 1, 2)  # [B, H, W, heads, d]
        kv = F.pad(self.kv(x), (halo, halo, halo, halo)).unflatten(1, (heads, -1)).permute(0, 3, 4, 1, 2)
        key, value = kv.split((self.dim_head_qk, self.dim_head_v), -1)

        down = torch.einsum("bxyhd,xcd->bxyhc", query, self._by_class(self.pos_embed.height_rel, x.shape[2]))
        across = torch.einsum("bxyhd,ycd->bxyhc", query, self._by_class(self.pos_embed.width_rel, x.shape[3]))
        relative = torch.cat((down, across), -1) * (self.scale if self.scale_pos_embed else 1.0)
        rows, columns = (F.one_hot(torch.arange(n, device=x.device) % win, win) for n in key.shape[1:3])
        rows = rows.to(key.dtype)[:, None, None].expand(*key.shape[:-1], win)
        columns = columns.to(key.dtype)[:, None].expand(*key.shape[:-1], win)

        tensors = torch.cat((query * self.scale, relative), -1), torch.cat((key, rows, columns), -1), value
        width = max(t.shape[-1] for t in tensors)
        query, key, value = (F.pad(t, (0, width - t.shape[-1])) for t in tensors)
        out = window_attention(query, key, value, window=self.block_size, halo=halo, scale=1.0)
        out = out[..., : self.dim_head_v].flatten(-2).permute(0, 3, 1, 2)
        return self.pool(out.contiguous())

    def _by_class(self, table: Tensor, length: int) -> Tensor:
        """Rows of a relative table `[2 * win - 1, d]` for every query and class of keys: `[length, win, d]`."""
        query = torch.arange(length, device=table.device)[:, None]
        classes = torch.arange(self.win_size, device=table.device)
        slot = (classes - query // self.block_size * self.block_size) % self.win_size
        return table[slot - query % self.block_size + self.win_size - 1]


ADAPTERS: dict[type[nn.Module], type[nn.Module]] = {
    SwinTransformerBlock: _SwinBlock,
    SwinTransformerV2Block: _SwinV2Block,
    SpatialBlock: _DaViTBlock,
    HaloAttn: _HaloAttention,
}


def _can_swap(module: nn.Module) -> bool:
    """Return whether ours replaces a module of timm's; blocks whose queries are every other token stay timm's."""
    return type(module) in ADAPTERS and getattr(module, "block_stride", 1) == 1


def use_kernels(model: nn.Module) -> nn.Module:
    """Let timm's Swin, Swin v2, HaloNet and DaViT models attend by `foveal.kernels.ops.window_attention`, in place.

    Parameters and state dict stay as they are; outputs and gradients too, up to rounding. HaloNet's attention layers
    that also halve the resolution keep timm's code.

    Args:
        model: a model of timm, or one that contains its blocks.

    Returns:
        The same model. How many modules were swapped is logged; a second call swaps none.

    Raises:
        ValueError: nothing in the model can be swapped, or a block has attention dropout, which the kernels lack.
    """
    found = [(name, module) for name, module in model.named_modules() if _can_swap(module)]
    if not found and not any(type(module) in ADAPTERS.values() for module in model.modules()):
        known = ", ".join(cls.__name__ for cls in ADAPTERS)
        raise ValueError(f"{type(model).__name__} has no module to swap; known are timm's {known}")
    for name, module in found:
        dropout = getattr(getattr(module, "attn", None), "attn_drop", None)
        if dropout is not None and dropout.p > 0:
            raise ValueError(f"{name} has attn_drop={dropout.p}; the kernels have no attention dropout: build with 0")
    for _, module in found:
        module.__class__ = ADAPTERS[type(module)]
    _logger.info("%s: %d modules now attend by foveal's window attention", type(model).__name__, len(found))
    return model
