"""`torch.ops.foveal.block_sparse_*`: schemas, fake kernels, autograd and FLOP formulas of the Triton path.

Only torch is imported here, so a first call may be a compiled one; the kernels are imported when they first run.
"""

from math import prod

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .mask import BlockMask, boxes

FORWARD = "foveal::block_sparse_forward"
BACKWARD = "foveal::block_sparse_backward"
LISTS = "Tensor kv_num, Tensor kv_idx, Tensor? bias, Tensor? q_len, Tensor? kv_len, Tensor? starts, Tensor? order"
EXTRAS = "Tensor? extra_key, Tensor? extra_value"
BLOCKS = "SymInt[] query_block, SymInt[] key_block, float scale"

torch.library.define(
    FORWARD, f"(Tensor query, Tensor key, Tensor value, {EXTRAS}, {LISTS}, {BLOCKS}) -> (Tensor, Tensor)"
)
torch.library.define(
    BACKWARD,
    "(Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor grad_out, Tensor grad_lse, "
    f"{EXTRAS}, {LISTS}, {BLOCKS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _mask(kv_num, kv_idx, bias, q_len, kv_len, starts, order, query_block, key_block) -> BlockMask:
    inverse = None if starts is None else (starts, order)
    return BlockMask(tuple(query_block), tuple(key_block), kv_num, kv_idx, bias, q_len, kv_len, inverse)


@torch.library.impl(FORWARD, "default")
def _forward(query, key, value, extra_key, extra_value, *rest):
    from . import launch

    *mask, scale = rest
    return launch.forward(
        query, key, value, mask=_mask(*mask), scale=scale, extra_key=extra_key, extra_value=extra_value
    )


@torch.library.impl(BACKWARD, "default")
def _backward(query, key, value, out, lse, grad_out, grad_lse, extra_key, extra_value, *rest):
    from . import launch

    *mask, scale = rest
    return launch.backward(
        query,
        key,
        value,
        out,
        lse,
        grad_out,
        grad_lse,
        mask=_mask(*mask),
        scale=scale,
        extra_key=extra_key,
        extra_value=extra_value,
    )


@torch.library.register_fake(FORWARD)
def _forward_fake(query, *_):
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.register_fake(BACKWARD)
def _backward_fake(query, key, value, out, lse, grad_out, grad_lse, extra_key, extra_value, *_):
    def like(x: Tensor | None) -> Tensor:
        return query.new_empty(0) if x is None else x.new_empty(x.shape)

    return like(query), like(key), like(value), like(extra_key), like(extra_value)


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, extra_key, extra_value, *lists, ctx.query_block, ctx.key_block, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, extra_key, extra_value, *lists)


def _differentiate(ctx, grad_out, grad_lse):
    query, key, value, out, lse, extra_key, extra_value, *lists = ctx.saved_tensors
    if torch.is_grad_enabled() and any(x.requires_grad for x in (grad_out, grad_lse) if x is not None):
        raise NotImplementedError(
            "block-sparse attention has no double backward with impl='triton'; use impl='reference'"
        )
    gradients = torch.ops.foveal.block_sparse_backward(
        *(query, key, value, out, lse, grad_out, grad_lse, extra_key, extra_value, *lists),
        *(ctx.query_block, ctx.key_block, ctx.scale),
    )
    given = (query, key, value, extra_key, extra_value)
    return *(None if x is None else g for x, g in zip(given, gradients, strict=True)), *(None,) * 10


torch.library.register_autograd(FORWARD, _differentiate, setup_context=_setup_context)


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
    starts, order = (None, None) if mask.inverse is None else mask.inverse
    lists = mask.kv_num, mask.kv_idx, mask.bias, mask.q_len, mask.kv_len, starts, order
    return torch.ops.foveal.block_sparse_forward(
        query, key, value, extra_key, extra_value, *lists, mask.query_block, mask.key_block, scale
    )


def _pairs(query, extra_key, kv_idx, query_block, key_block) -> int:
    """(query, key) pairs of all heads from shapes alone: as if every list were full."""
    batch, *shape, heads, _ = query
    keys = kv_idx[-1] * prod(key_block) + (extra_key[1] if extra_key else 0)
    return batch * heads * prod(boxes(shape, query_block)) * prod(query_block) * keys


@register_flop_formula(torch.ops.foveal.block_sparse_forward)
def _forward_flops(query, key, value, extra_key, extra_value, kv_num, kv_idx, *rest, out_shape=None, **_) -> int:
    return 4 * query[-1] * _pairs(query, extra_key, kv_idx, *rest[-3:-1])


@register_flop_formula(torch.ops.foveal.block_sparse_backward)
def _backward_flops(
    query, key, value, out, lse, grad_out, grad_lse, extra_key, extra_value, kv_num, kv_idx, *rest, out_shape=None, **_
) -> int:
    return 10 * query[-1] * _pairs(query, extra_key, kv_idx, *rest[-3:-1])
