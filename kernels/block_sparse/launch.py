"""Launches of the block-sparse kernels; imported, and triton with it, when a kernel first runs."""

import math
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ..common.launching import (
    Vectors,
    aligned,
    cdiv,
    device_class,
    has_descriptors,
    needs_wide,
    padded,
    precision,
    tile_strides,
    with_scratch,
)
from ..neighborhood.geometry import Axis
from ..neighborhood.launch import extra_arguments, extra_block, extra_gradient
from . import configs
from .backward import key_kernel, query_kernel
from .call import BlockSparseCall, empty_kept
from .forward import forward_kernel
from .inverse import invert
from .mask import BlockMask, boxes, by_entry, divides
from .skip import without_skipped


def configure(
    kernel: configs.Kernel,
    call: BlockSparseCall,
    most: int,
    widths: tuple[int, int],
    walked: tuple[Tensor, Tensor],
    tensors: tuple[Tensor, ...],
) -> configs.Config:
    """Launch parameters of a kernel that walks up to `most` blocks of `walked`.

    `tensors` are all that the kernel addresses, `widths` the head dims of keys and of values. The first one walked may
    hold 8-bit numbers.
    """
    mask = call.mask
    length = mask.q_len if kernel == "key" else mask.kv_len
    blocks = (mask.key_block, mask.query_block) if kernel == "key" else (mask.query_block, mask.key_block)
    common: dict = dict(wide=needs_wide(*tensors), descriptor=has_descriptors(walked[0].device))
    if kernel == "forward" and call.skip_threshold is not None:
        config = configs.skipping(*blocks, **common, whole=length is None)
    else:
        config = configs.choose(
            kernel,
            *blocks,
            most,
            **common,
            head_dim=max(widths),
            itemsize=walked[1].element_size(),
            device=device_class(walked[0].device),
            whole=length is None and call.scale > 0,  # then the maximum of scaled logits is that of logits, scaled
        )
    return config._replace(descriptor=config.descriptor and aligned(*walked))


def constants(
    config: configs.Config,
    query_block: tuple[int, ...],
    key_block: tuple[int, ...],
    held: Vectors,
    precision: str,
    even: bool,
) -> dict:
    """Compile-time arguments of the kernels that walk lists.

    `even` says that no block that is walked is cut short.
    """
    return dict(
        **held._asdict(),
        QUERY_BOX=padded(query_block, 1),
        KEY_BOX=padded(key_block, 1),
        ROWS=config.size.rows,
        COLUMNS=config.size.columns,
        TILE=config.tile,
        DESCRIPTOR=config.descriptor,
        EVEN=even and config.tile is not None,
        WIDE=config.wide,
        PRECISION=precision,
        STAGES=config.size.stages,
        num_warps=config.size.warps,
        num_stages=config.size.stages,
    )


def programs(shape, block: tuple[int, ...], rows: int, batch_heads: int) -> int:
    """Programs of a kernel that owns tiles of `rows` tokens of every block of a grid."""
    return prod(boxes(shape, block)) * cdiv(prod(block), rows) * batch_heads


def _packed(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _optional(mask: BlockMask) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return _packed(mask.bias), _packed(mask.q_len), _packed(mask.kv_len)


def list_sizes(mask: BlockMask, heads: int) -> tuple[int, ...]:
    """Leading sizes of the lists, query heads that share a list, and rows of the lengths of queries and of keys."""
    batch, lists = mask.kv_idx.shape[:2]
    rows = (1 if x is None else by_entry(x).shape[0] for x in (mask.q_len, mask.kv_len))
    return batch, lists, heads // lists, *rows


def _flags(mask: BlockMask) -> dict:
    return dict(BIAS=mask.bias is not None, Q_LEN=mask.q_len is not None, KV_LEN=mask.kv_len is not None)


@with_scratch
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: BlockSparseCall,
    scales: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[B, *spatial, heads, value_dim]`, float32 log-sum-exp `[B, *spatial, heads]` and the kept blocks.

    With `scales`, float32, queries, keys and additional keys are 8-bit numbers; see `forward_kernel`.
    """
    mask, (additional_keys, additional_values, additional_mask) = call.mask, call.additional
    shape, key_shape, rank = query.shape[1:-2], key.shape[1:-2], query.dim() - 3
    batch, heads, widths = query.shape[0], query.shape[-2], (key.shape[-1], value.shape[-1])
    out = torch.empty(*query.shape[:-1], widths[1], dtype=value.dtype, device=query.device)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    kept, skip = empty_kept(query, call), call.skip_threshold is not None
    if batch == 0:
        return out, lse, kept
    most = mask.kv_idx.shape[-1]
    tensors = query, key, value, out
    config = configure("forward", call, most, widths, (key, value), tensors)
    even, held = (
        divides(key_shape, mask.key_block),
        configs.held(*widths, "forward", device_class(query.device), eight_bits=scales[0] is not None),
    )
    with torch.cuda.device_of(query):
        forward_kernel[(programs(shape, mask.query_block, config.size.rows, batch * heads),)](
            query,
            tile_strides(query, rank),
            key,
            tile_strides(key, rank),
            value,
            tile_strides(value, rank),
            out,
            tile_strides(out, rank),
            lse,
            tile_strides(lse, rank),
            mask.kv_num.contiguous(),
            mask.kv_idx.contiguous(),
            *_optional(mask),
            list_sizes(mask, heads),
            most,
            *extra_arguments(query, additional_keys, additional_values, additional_mask),
            padded(shape, 1),
            padded(key_shape, 1),
            heads,
            0 if additional_keys is None else additional_keys.shape[1],
            call.scale,
            kept,
            math.log2(call.skip_threshold or 1.0),
            *scales,
            SKIP=skip,
            SCALED=scales[0] is not None,
            GROUP=heads // key.shape[-2],
            EXTRA_KEYS=extra_block(query, additional_keys, widths[1]),
            EXTRA=additional_keys is not None,
            EXTRA_MASK=additional_mask is not None,
            **_flags(mask),
            **constants(config, mask.query_block, mask.key_block, held, precision(query), even),
        )
    return out, lse, kept


@with_scratch
def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    call: BlockSparseCall,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, additional_keys and additional_values, contiguous; None for those not given."""
    (out, lse, kept), (grad_out, grad_lse) = outputs, gradients
    call = without_skipped(call, kept)
    mask, scale = call.mask, call.scale
    additional_keys, additional_values, additional_mask = call.additional
    shape, key_shape, rank = query.shape[1:-2], key.shape[1:-2], query.dim() - 3
    batch, heads, key_heads, widths = query.shape[0], query.shape[-2], key.shape[-2], (key.shape[-1], value.shape[-1])
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=query.device) for x in (query, key, value))
    if batch == 0:
        return dq, dk, dv, *(None if x is None else x.new_zeros(x.shape) for x in (additional_keys, additional_values))
    most, extra = mask.kv_idx.shape[-1], 0 if additional_keys is None else additional_keys.shape[1]
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))
    out, lse = out.contiguous(), lse.contiguous()  # dQ and delta have their strides
    delta = torch.empty_like(lse)
    q, k, v, do = ((x, tile_strides(x, rank)) for x in (query, key, value, grad_out))
    lists, group = list_sizes(mask, heads), heads // key_heads
    alike = widths[0] == widths[1]  # then dQ has the strides of out, and dV those of dK
    common = dict(GROUP=group, **_flags(mask))
    blocks, tensors = (mask.query_block, mask.key_block), (query, key, value, grad_out, grad_lse, dq, dk, dv)
    with torch.cuda.device_of(query):
        config = configure("query", call, most, widths, (key, value), tensors)
        held = configs.held(*widths, "query", device_class(query.device))
        query_kernel[(programs(shape, mask.query_block, config.size.rows, batch * heads),)](
            *q,
            *k,
            *v,
            out,
            tile_strides(out, rank),
            *do,
            lse,
            tile_strides(lse, rank),
            grad_lse,
            tile_strides(grad_lse, rank),
            delta,
            dq,
            None if alike else tile_strides(dq, rank),
            mask.kv_num.contiguous(),
            mask.kv_idx.contiguous(),
            *_optional(mask),
            lists,
            most,
            *extra_arguments(query, additional_keys, additional_values, additional_mask),
            padded(shape, 1),
            padded(key_shape, 1),
            heads,
            extra,
            scale,
            EXTRA_KEYS=extra_block(query, additional_keys, widths[1]),
            EXTRA=additional_keys is not None,
            EXTRA_MASK=additional_mask is not None,
            **common,
            **constants(config, *blocks, held, precision(query), divides(key_shape, mask.key_block)),
        )
        starts, order = mask.inverse or invert(mask.kv_num, mask.kv_idx, prod(boxes(key_shape, mask.key_block)))
        config = configure("key", call, prod(boxes(shape, mask.query_block)), widths, (query, grad_out), tensors)
        held = configs.held(*widths, "key", device_class(query.device))
        key_kernel[(programs(key_shape, mask.key_block, config.size.rows, batch * key_heads),)](
            *q,
            *k,
            *v,
            *do,
            lse,
            tile_strides(lse, rank),
            delta,
            dk,
            tile_strides(dk, rank),
            dv,
            None if alike else tile_strides(dv, rank),
            starts.contiguous(),
            order.contiguous(),
            *_optional(mask),
            lists,
            most,
            padded(shape, 1),
            padded(key_shape, 1),
            key_heads,
            scale,
            **common,
            **constants(config, *blocks, held, precision(query), divides(shape, mask.query_block)),
        )
        dek = dev = None
        if additional_keys is not None and any(wanted):
            dek, dev = _extra(q, do, lse, delta, call)
    return dq, dk, dv, dek, dev


def _extra(q, do, lse, delta, call: BlockSparseCall) -> tuple[Tensor, Tensor]:
    """Gradients of the additional keys and values, which are visible to every query as in neighborhood attention."""
    keys, values = call.additional_keys, call.additional_values
    assert keys is not None and values is not None
    if not keys.shape[1]:
        return torch.empty_like(keys), torch.empty_like(values)
    if call.mask.q_len is not None:  # what does not exist may hold anything, and zero times NaN is NaN
        dead = (lse == float("inf"))[..., None]
        q, do = ((y := x.masked_fill(dead, 0), tile_strides(y, y.dim() - 3)) for x, _ in (q, do))
    axes = tuple(Axis(n, 1) for n in q[0].shape[1:-2])
    return extra_gradient(q, do, lse, delta, keys, values, axes, call.scale, call.additional_mask)
