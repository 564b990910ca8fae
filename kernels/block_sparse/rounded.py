"""Queries and keys of few bits: 8-bit integers by block, e4m3, or signs. Values and weights stay as they are.

Of int8 and e4m3 the mean of a head's keys is subtracted from all of them: it adds the same to every logit of a query,
which a softmax does not see, and what is left spans less ("smoothing", SageAttention, arXiv:2410.02367, section 4.2).
An int8 number is `round(x / scale)` with `scale = max |x| / 127` of each block of queries or keys and head; additional
keys are one block. A sign stands for the mean magnitude of all queries or all keys of a head and batch entry
(BinaryAttention, arXiv:2603.09582, section 3.2), without smoothing.

Everything here is plain PyTorch, without gradients of its own: rounding passes them straight through, the sign of a
number beyond 1 stops them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..common.rounding import signs, straight_through
from ..neighborhood import quantized
from .call import ONE_BIT, RoundedCall
from .mask import box_of_token, boxes, by_entry

LARGEST = 127
LEAST_SCALE = 1e-7  # added to every scale, as SpargeAttn does (arXiv:2502.18137): a block of zeros stays zeros


class Int8(NamedTuple):
    """Queries and keys as 8-bit integers.

    Attributes:
        query, key, additional_keys: int8, over their scales; keys less `mean`.
        query_scale: `[B, heads, query blocks]`, float32 at least; NaN where a block holds NaN or an infinity.
        key_scale: `[B, key_heads, key blocks]`.
        additional_scale: `[B, key_heads]`.
        mean: `[B, key_heads, head_dim]`, of the keys that exist.
    """

    query: Tensor
    key: Tensor
    additional_keys: Tensor | None
    query_scale: Tensor
    key_scale: Tensor
    additional_scale: Tensor | None
    mean: Tensor


class Known(NamedTuple):
    """Queries and keys, zero where there are none."""

    query: Tensor
    key: Tensor
    additional_keys: Tensor | None
    queries: Tensor | int  # that exist, `[B or 1, 1, 1]`
    keys: Tensor | int  # likewise, additional ones included


def _exists(x: Tensor, block: tuple[int, ...], length: Tensor | None) -> Tensor | None:
    """Tokens `[B or 1, tokens]` within the length of their block; None for all."""
    if length is None:
        return None
    number, place = box_of_token(x.shape[1:-2], block, x.device)
    return place < by_entry(length)[:, number]


def known(query: Tensor, key: Tensor, call: RoundedCall) -> Known:
    def cleared(x: Tensor, exists: Tensor | None) -> tuple[Tensor, Tensor | int]:
        if exists is None:
            return x, prod(x.shape[1:-2])
        hidden = ~exists.view(exists.shape[0], *x.shape[1:-2], 1, 1)
        return x.masked_fill(hidden, 0), exists.sum(1)[:, None, None]  # what does not exist may hold anything

    mask, extra = call.mask, call.additional_keys
    query, queries = cleared(query, _exists(query, mask.query_block, mask.q_len))
    key, keys = cleared(key, _exists(key, mask.key_block, mask.kv_len))
    if extra is not None:
        extra, more = cleared(extra, call.additional_mask)
        keys = keys + more
    return Known(query, key, extra, queries, keys)


def _largest(x: Tensor, block: Sequence[int]) -> Tensor:
    """Largest magnitude in every block, `[B, heads, blocks]`, of `[B, *spatial, heads, d]`."""
    x = x.detach().abs().amax(-1)
    for axis, b in enumerate(block, 1):
        end = -x.shape[axis] % b
        x = pad(x, [0, 0] * (x.dim() - 1 - axis) + [0, end]) if end else x
        x = x.unflatten(axis, (-1, b)).amax(axis + 1)
    return x.flatten(1, -2).transpose(1, 2)


def _of_tokens(x: Tensor, shape: Sequence[int], block: Sequence[int]) -> Tensor:
    """Numbers of blocks `[B, heads, blocks]`, one a token: `[B, *shape, heads, 1]`."""
    x = x.transpose(1, 2).unflatten(1, boxes(shape, block))
    for axis, (n, b) in enumerate(zip(shape, block, strict=True), 1):
        x = x.repeat_interleave(b, dim=axis).narrow(axis, 0, n)
    return x[..., None]


def _nearest(x: Tensor) -> Tensor:
    """The nearest integers, halves away from zero, as the official code rounds; NaN becomes zero."""
    return (x.abs() + 0.5).floor().clamp(max=LARGEST).copysign(x).nan_to_num(0.0).to(torch.int8)


@torch.no_grad()
def to_int8(query: Tensor, key: Tensor, call: RoundedCall) -> Int8:
    """Query and key as 8-bit integers. Tokens that do not exist and masked additional keys count nowhere."""
    accumulate = torch.promote_types(query.dtype, torch.float32)
    query, key, extra, _, count = known(query, key, call)
    total = key.sum(tuple(range(1, key.dim() - 2)), dtype=accumulate)
    total = total if extra is None else total + extra.sum(1, dtype=accumulate)
    mean = torch.where(total.isfinite(), total / count, 0.0).nan_to_num(0.0)  # of no keys at all

    def rounded(x: Tensor, block: Sequence[int]) -> tuple[Tensor, Tensor]:
        largest = _largest(x, block)
        scale = torch.where(largest.isfinite(), largest / LARGEST + LEAST_SCALE, torch.nan)
        return _nearest(x / _of_tokens(scale, x.shape[1:-2], block)), scale

    def centred(x: Tensor) -> Tensor:
        return x.to(accumulate) - mean.view(mean.shape[0], *(1,) * (x.dim() - 3), *mean.shape[1:])

    q, query_scale = rounded(query.to(accumulate), call.mask.query_block)
    k, key_scale = rounded(centred(key), call.mask.key_block)
    if extra is None or not extra.shape[1]:
        return Int8(q, k, extra if extra is None else extra.to(torch.int8), query_scale, key_scale, None, mean)
    extra = centred(extra)
    if call.additional_mask is not None:
        extra = extra.masked_fill(~call.additional_mask[..., None, None], 0)
    e, additional_scale = rounded(extra, extra.shape[1:2])
    return Int8(q, k, e, query_scale, key_scale, additional_scale[..., 0], mean)


def restore(found: Int8, call: RoundedCall, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Query, key less its mean and additional key that the integers stand for, rounded to `dtype`."""

    def times(x: Tensor, scale: Tensor, block: Sequence[int]) -> Tensor:
        accumulate = torch.promote_types(dtype, scale.dtype)
        return (x.to(accumulate) * _of_tokens(scale, x.shape[1:-2], block)).to(dtype)

    extra = found.additional_keys
    if extra is not None and found.additional_scale is not None:
        extra = times(extra, found.additional_scale[..., None], extra.shape[1:2])
    elif extra is not None:
        extra = extra.to(dtype)
    query = times(found.query, found.query_scale, call.mask.query_block)
    return query, times(found.key, found.key_scale, call.mask.key_block), extra


def _one_bit(query: Tensor, key: Tensor, call: RoundedCall) -> tuple[Tensor, Tensor, Tensor | None]:
    """Signs times the mean magnitude of their batch entry and head."""
    accumulate = torch.promote_types(query.dtype, torch.float32)
    q, k, extra, queries, keys = known(query, key, call)

    def total(x: Tensor) -> Tensor:  # [B, heads, 1]
        return x.abs().sum((*range(1, x.dim() - 2), -1), dtype=accumulate)[..., None] / x.shape[-1]

    def valued(x: Tensor, magnitude: Tensor) -> Tensor:
        magnitude = magnitude.view(magnitude.shape[0], *(1,) * (x.dim() - 3), -1, 1)
        return (signs(x.to(accumulate)) * magnitude).to(x.dtype)

    of_key = (total(k) if extra is None else total(k) + total(extra)) / keys
    extra = None if extra is None else valued(extra, of_key)
    return valued(q, total(q) / queries), valued(k, of_key), extra


def emulate(query: Tensor, key: Tensor, call: RoundedCall) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Query, key and additional key as they are after rounding, in their dtype and with gradients, and the mean that
    the keys lack, None for none."""
    extra = call.additional_keys
    if call.qk_dtype == ONE_BIT:
        return *_one_bit(query, key, call), None
    if call.qk_dtype == torch.int8:
        found = to_int8(query, key, call)
        restored, mean = restore(found, call, query.dtype), found.mean
    else:
        with torch.no_grad():
            e4m3 = quantized.quantize(*known(query, key, call)[:3], call.additional_mask, cast=False)
            restored, mean = quantized.restore(e4m3, query.dtype), e4m3.mean
    if extra is not None and restored[2] is not None:
        extra = straight_through(restored[2], extra)
    return straight_through(restored[0], query), straight_through(restored[1], key), extra, mean
