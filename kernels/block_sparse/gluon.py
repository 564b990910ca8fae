"""Launch of the Gluon forward; imported, and Triton's Gluon with it, when it first runs.

Output and log-sum-exp are laid out as the Triton kernels leave them, so the gradients are those of `launch.backward`.
"""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.launching import aligned, grid_strides, needs_wide, padded, with_scratch
from . import configs
from .call import BlockSparseCall, empty_kept
from .gluon_forward import CONSUMERS, ROWS, forward_kernel
from .launch import backward, list_sizes, programs
from .mask import divides

__all__ = ["backward", "forward"]


class Parts(NamedTuple):
    """Part of a block of queries that a consumer owns, part of a block of keys that is a tile, and stages."""

    share: tuple[int, int, int]
    tile: tuple[int, int, int]
    stages: int


def configure(query_block: tuple[int, ...], key_block: tuple[int, ...], head_dim: int) -> Parts:
    """Parts of blocks: the longest tile of keys that a block fills."""
    sizes = configs.GLUON_SIZES[head_dim]
    keys, stages = next(size for size in sizes if configs.part(key_block, size[0]) is not None)
    share, tile = configs.part(query_block, ROWS.value), configs.part(key_block, keys)
    assert share is not None and tile is not None
    return Parts(share, tile, stages)


def constants(
    parts: Parts, query_block: tuple[int, ...], key_block: tuple[int, ...], head_dim: int, *, wide: bool, even: bool
) -> dict:
    """Compile-time arguments of the kernel; `even` says that no block of keys is cut short."""
    return dict(
        D=head_dim,
        QUERY_BOX=padded(query_block, 1),
        SHARE=parts.share,
        KEY_BOX=padded(key_block, 1),
        TILE=parts.tile,
        EVEN=even,
        WIDE=wide,
        STAGES=parts.stages,
        num_warps=4,
    )


@with_scratch
def forward(query: Tensor, key: Tensor, value: Tensor, call: BlockSparseCall) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[B, *spatial, heads, head_dim]`, float32 log-sum-exp `[B, *spatial, heads]`, and no kept blocks.

    Raises:
        NotImplementedError: a tensor that does not begin at a multiple of 16 bytes.
    """
    mask, shape, key_shape, rank = call.mask, query.shape[1:-2], key.shape[1:-2], query.dim() - 3
    batch, heads, head_dim = query.shape[0], query.shape[-2], query.shape[-1]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    kept = empty_kept(query, call)
    if batch == 0:
        return out, lse, kept
    if not aligned(query, key, value):
        raise NotImplementedError("impl='gluon' cannot take this call: a tensor begins between multiples of 16 bytes")
    parts = configure(mask.query_block, mask.key_block, head_dim)
    facts = dict(wide=needs_wide(query, key, value, out), even=divides(key_shape, mask.key_block))
    rows = CONSUMERS.value * prod(parts.share)
    with torch.cuda.device_of(query):
        forward_kernel[(programs(shape, mask.query_block, rows, batch * heads),)](
            query,
            grid_strides(query, rank),
            key,
            grid_strides(key, rank),
            value,
            grid_strides(value, rank),
            out,
            grid_strides(out, rank),
            lse,
            grid_strides(lse, rank),
            mask.kv_num.contiguous(),
            mask.kv_idx.contiguous(),
            list_sizes(mask, heads),
            mask.kv_idx.shape[-1],
            padded(shape, 1),
            padded(key_shape, 1),
            heads,
            call.scale,
            GROUP=heads // key.shape[-2],
            **constants(parts, mask.query_block, mask.key_block, head_dim, **facts),
        )
    return out, lse, kept
