"""Queries and keys of eight bits that matrix units multiply as they are, without gradients.

The numbers are those of `rounded`: int8 with a scale for each block, e4m3 with one for each head. Values and weights
stay in half precision.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..common.calling import wants_gradient
from ..neighborhood import quantized
from .call import RoundedCall, block_sparse, empty_kept
from .mask import boxes
from .obstacle import obstacle
from .rounded import known, to_int8


def multiplies(query: Tensor, key: Tensor, value: Tensor, call: RoundedCall, impl: str) -> bool:
    """Return whether a call takes the kernel: Triton runs it, and nobody asks for a gradient."""
    if wants_gradient(query, key, value, call.additional_keys, call.additional_values):
        return False
    chosen = block_sparse.select_impl(query, key, value, call, impl)  # pyright: ignore[reportArgumentType]
    return chosen == "triton" and obstacle(query, call) is None


def attend(query: Tensor, key: Tensor, value: Tensor, call: RoundedCall) -> tuple[Tensor, Tensor, Tensor]:
    """Output, natural log-sum-exp without what the mean of the keys adds, and that mean `[B, key_heads, head_dim]`."""
    if call.qk_dtype == torch.int8:
        found = to_int8(query, key, call)
        scales = found.query_scale, found.key_scale, found.additional_scale
    else:
        found = quantized.quantize(*known(query, key, call)[:3], call.additional_mask)
        of_heads = (query, call.mask.query_block, found.query_scale), (key, call.mask.key_block, found.key_scale)
        of_blocks = (scale[..., None].expand(-1, -1, prod(boxes(x.shape[1:-2], b))) for x, b, scale in of_heads)
        scales = *of_blocks, found.key_scale
    extra = found.additional_keys
    if extra is None or not extra.shape[1]:
        call = replace(call, additional_keys=None, additional_values=None, additional_mask=None)
        scales = *scales[:2], None
    else:
        call = replace(call, additional_keys=extra)
    floats = [None if x is None else x.float().contiguous() for x in scales]
    arguments = block_sparse.codec.flatten(call)
    out, lse, _ = torch.ops.foveal.block_sparse_eight_bit_forward(found.query, found.key, value, *floats, *arguments)
    return out, lse, found.mean


torch.library.define(
    "foveal::block_sparse_eight_bit_forward",
    "(Tensor query, Tensor key, Tensor value, Tensor query_scale, Tensor key_scale, Tensor? additional_scale, "
    f"{block_sparse.arguments}) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("foveal::block_sparse_eight_bit_forward", "default")
def _forward(query, key, value, query_scale, key_scale, additional_scale, *arguments):
    from . import launch

    scales = query_scale, key_scale, additional_scale
    return launch.forward(query, key, value, block_sparse.codec.build(arguments), scales)


@torch.library.register_fake("foveal::block_sparse_eight_bit_forward")
def _fake(query, key, value, query_scale, key_scale, additional_scale, *arguments):
    rows, call = query.shape[:-1], block_sparse.codec.build(arguments)
    out, lse = value.new_empty(*rows, value.shape[-1]), value.new_empty(rows, dtype=torch.float32)
    return out, lse, empty_kept(query, call)


@register_flop_formula(torch.ops.foveal.block_sparse_eight_bit_forward, get_raw=True)
def _count(query, key, value, query_scale, key_scale, additional_scale, *arguments, out_val=None, **_) -> int:
    return block_sparse.flops(query, key, value, block_sparse.codec.build(arguments))[0]
