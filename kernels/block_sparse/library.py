"""`torch.ops.foveal.block_sparse_*`: schemas, fake kernels, autograd and FLOP formulas of compiled calls.

There are two pairs of operators: the Triton kernels, and the tiled path as `torch.compile` sees it on CPU. Only torch
is imported here, so a first call may be a compiled one; the modules that compute are imported when they first run.
"""

from functools import cache, partial
from importlib import import_module
from math import prod

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .mask import BlockMask, boxes

LISTS = "Tensor kv_num, Tensor kv_idx, Tensor? bias, Tensor? q_len, Tensor? kv_len, Tensor? starts, Tensor? order"
EXTRAS = "Tensor? extra_key, Tensor? extra_value"
BLOCKS = "SymInt[] query_block, SymInt[] key_block, float scale"
FORWARD = f"(Tensor query, Tensor key, Tensor value, {EXTRAS}, {LISTS}, {BLOCKS}) -> (Tensor, Tensor)"
BACKWARD = (
    "(Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor grad_out, Tensor grad_lse, "
    f"{EXTRAS}, {LISTS}, {BLOCKS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _mask(kv_num, kv_idx, bias, q_len, kv_len, starts, order, query_block, key_block) -> BlockMask:
    inverse = None if starts is None else (starts, order)
    return BlockMask(tuple(query_block), tuple(key_block), kv_num, kv_idx, bias, q_len, kv_len, inverse)


def _define(name: str, module: str) -> None:
    """Define `foveal::{name}_forward` and `foveal::{name}_backward`, which `forward` and `backward` of `module` do."""
    forward_name, backward_name = f"foveal::{name}_forward", f"foveal::{name}_backward"
    torch.library.define(forward_name, FORWARD)
    torch.library.define(backward_name, BACKWARD)
    kernels = cache(partial(import_module, module, __package__))

    @torch.library.impl(forward_name, "default")
    def forward(query, key, value, extra_key, extra_value, *rest):
        *mask, scale = rest
        return kernels().forward(
            query, key, value, mask=_mask(*mask), scale=scale, extra_key=extra_key, extra_value=extra_value
        )

    @torch.library.impl(backward_name, "default")
    def backward(query, key, value, out, lse, grad_out, grad_lse, extra_key, extra_value, *rest):
        *mask, scale = rest
        given = query, key, value, extra_key, extra_value
        gradients = kernels().backward(
            *(query, key, value, out, lse, grad_out, grad_lse),
            **dict(mask=_mask(*mask), scale=scale, extra_key=extra_key, extra_value=extra_value),
        )
        return tuple(query.new_empty(0) if x is None else g for x, g in zip(given, gradients, strict=True))

    def differentiate(ctx, grad_out, grad_lse):
        query, key, value, out, lse, extra_key, extra_value, *lists = ctx.saved_tensors
        if torch.is_grad_enabled() and any(x.requires_grad for x in (grad_out, grad_lse) if x is not None):
            raise NotImplementedError("block-sparse attention has no double backward; use impl='reference'")
        gradients = getattr(torch.ops.foveal, f"{name}_backward")(
            *(query, key, value, out, lse, grad_out, grad_lse, extra_key, extra_value, *lists),
            *(ctx.query_block, ctx.key_block, ctx.scale),
        )
        given = (query, key, value, extra_key, extra_value)
        return *(None if x is None else g for x, g in zip(given, gradients, strict=True)), *(None,) * 10

    torch.library.register_fake(forward_name, _forward_fake)
    torch.library.register_fake(backward_name, _backward_fake)
    torch.library.register_autograd(forward_name, differentiate, setup_context=_setup_context)
    register_flop_formula(getattr(torch.ops.foveal, f"{name}_forward"))(_forward_flops)
    register_flop_formula(getattr(torch.ops.foveal, f"{name}_backward"))(_backward_flops)


def _forward_fake(query, *_):
    accumulate = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=accumulate)


def _backward_fake(query, key, value, out, lse, grad_out, grad_lse, extra_key, extra_value, *_):
    def like(x: Tensor | None) -> Tensor:
        return query.new_empty(0) if x is None else x.new_empty(x.shape)

    return like(query), like(key), like(value), like(extra_key), like(extra_value)


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, extra_key, extra_value, *lists, ctx.query_block, ctx.key_block, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, extra_key, extra_value, *lists)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: BlockMask,
    scale: float,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and natural log-sum-exp by the Triton kernels; see `api`."""
    return torch.ops.foveal.block_sparse_forward(query, key, value, extra_key, extra_value, *_lists(mask), scale)


def attend_tiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: BlockMask,
    scale: float,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and natural log-sum-exp by the tiled path, as one operator in a compiled graph."""
    return torch.ops.foveal.block_sparse_tiled_forward(query, key, value, extra_key, extra_value, *_lists(mask), scale)


def _lists(mask: BlockMask) -> tuple:
    starts, order = (None, None) if mask.inverse is None else mask.inverse
    lists = mask.kv_num, mask.kv_idx, mask.bias, mask.q_len, mask.kv_len, starts, order
    return *lists, mask.query_block, mask.key_block


def _pairs(query, extra_key, kv_idx, query_block, key_block) -> int:
    """(query, key) pairs of all heads from shapes alone: as if every list were full."""
    batch, *shape, heads, _ = query
    keys = kv_idx[-1] * prod(key_block) + (extra_key[1] if extra_key else 0)
    return batch * heads * prod(boxes(shape, query_block)) * prod(query_block) * keys


def _forward_flops(query, key, value, extra_key, extra_value, kv_num, kv_idx, *rest, out_shape=None, **_) -> int:
    return 4 * query[-1] * _pairs(query, extra_key, kv_idx, *rest[-3:-1])


def _backward_flops(
    query, key, value, out, lse, grad_out, grad_lse, extra_key, extra_value, kv_num, kv_idx, *rest, out_shape=None, **_
) -> int:
    return 10 * query[-1] * _pairs(query, extra_key, kv_idx, *rest[-3:-1])


_define("block_sparse", ".launch")
_define("block_sparse_tiled", ".tiled")
