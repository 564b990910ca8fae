"""Cost of block-sparse attention: useful FLOPs and compulsory bytes, exact where the lists can be read."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .mask import BlockMask, box_of_token, boxes, by_entry, listed
from .obstacle import obstacle


def tokens_by_box(shape, block, length: Tensor | None = None) -> Tensor:
    """Tokens that exist in each block of a grid, int64 `[B or 1, blocks]` on the CPU."""
    box, place = box_of_token(shape, block, torch.device("cpu"))
    exists = torch.ones_like(box)[None] if length is None else (place < by_entry(length).cpu()[:, box]).long()
    found = torch.zeros(exists.shape[0], prod(boxes(shape, block)), dtype=torch.int64)
    return found.index_add_(1, box, exists)


def visible_pairs(mask: BlockMask, query_shape, key_shape, *, batch: int, heads: int) -> int:
    """(query, key) pairs of all heads and batch entries, extra keys aside."""
    queries = tokens_by_box(query_shape, mask.query_block, mask.q_len)
    keys = tokens_by_box(key_shape, mask.key_block, mask.kv_len)
    kv_num, kv_idx = mask.kv_num.cpu(), mask.kv_idx.cpu()
    seen = listed(kv_num, kv_idx)
    number = torch.where(seen, kv_idx, 0).long().flatten(1)
    number = number.expand(max(keys.shape[0], number.shape[0]), -1)
    found = keys.expand(number.shape[0], -1).gather(1, number).unflatten(1, seen.shape[1:])
    pairs = torch.where(seen, found, 0).sum(-1) * queries[:, None]  # [B or 1, lists, query blocks]
    return int(pairs.sum()) * (batch * heads // prod(pairs.shape[:2])) if pairs.numel() else 0


def _full_lists(size: tuple[int, ...], shape: tuple[int, ...], most: int) -> int:
    """Pairs of one head in which every region sees `most` whole regions."""
    return prod(shape) * most * prod(size)


def forward_flops(pairs: int, head_dim: int, value_dim: int | None = None) -> int:
    """Useful FLOPs of the forward pass: two products a pair. Softmax and bias are not counted.

    Args:
        pairs: (query, key) pairs of all heads and batch entries.
        head_dim: features of a head of query and key.
        value_dim: features of a head of value and output; head_dim when None.
    """
    return 2 * pairs * (head_dim + (value_dim or head_dim))


def backward_flops(pairs: int, head_dim: int, value_dim: int | None = None) -> int:
    """Useful FLOPs of the backward pass: five products a pair (logits again, dP, dQ, dK, dV); see `forward_flops`."""
    return 2 * pairs * (3 * head_dim + 2 * (value_dim or head_dim))


def _products(query: Tensor, call: Any, impl: str | None) -> str:
    """What a call with `qk_dtype` multiplies, and why it is not the rounded numbers themselves."""
    words = {torch.int8: "int8 numbers", torch.float8_e4m3fn: "e4m3 numbers"}.get(call.qk_dtype, "signs")
    restored = f"restored to {str(query.dtype).removeprefix('torch.')}"
    why = f"impl is {impl}" if impl != "triton" else obstacle(query, call)
    return f"of {words} {restored}: {why}" if why else f"of {words}; for gradients {restored}"


def summarize(query: Tensor, key: Tensor, value: Tensor, call: Any, impl: str | None) -> dict[str, int | float | str]:
    """The cost of one call, by name, for `foveal.kernels.ops.explain`.

    Lists without data count as if every one were full and every block whole.
    """
    batch, *shape, heads, head_dim = query.shape
    key_shape, tokens, mask = key.shape[1:-2], batch * prod(shape) * heads, call.mask
    extra = 0 if call.additional_keys is None else call.additional_keys.shape[1]
    if mask.kv_num.is_meta or isinstance(mask.kv_num, FakeTensor):
        pairs = batch * heads * _full_lists(mask.key_block, tuple(shape), mask.kv_idx.shape[-1])
    else:
        pairs = visible_pairs(mask, shape, key_shape, batch=batch, heads=heads)
    pairs += tokens * extra
    value_dim = value.shape[-1]
    features = (head_dim + value_dim) * query.itemsize
    queries = tokens * features  # bytes of query and output
    keys = batch * key.shape[-2] * (prod(key_shape) + extra) * features  # of key and value
    products = {} if getattr(call, "qk_dtype", None) is None else {"query_key_products": _products(query, call, impl)}
    return products | {
        "query_block": "×".join(map(str, mask.query_block)),
        "key_block": "×".join(map(str, mask.key_block)),
        "tokens": prod(shape),
        "keys_per_query": round(pairs / max(tokens, 1), 2),
        "dense_over_useful": round(tokens * (prod(key_shape) + extra) / max(pairs, 1), 2),
        "forward_flops": forward_flops(pairs, head_dim, value_dim),
        "backward_flops": backward_flops(pairs, head_dim, value_dim),
        "forward_bytes": queries + keys + tokens * 4,
        "backward_bytes": 2 * queries + 2 * keys + tokens * 4,
    }
