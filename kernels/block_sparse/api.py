"""Public block-sparse attention: validation and semantics."""

from math import prod
from typing import Any

import torch
from torch import Tensor

from ..common.arguments import ACCEPTED_DTYPES, DTYPES, check_dense, operator
from ..common.calling import (
    Impl,
    check_extra,
    check_grids,
    choose,
    entries,
    is_compiled_on_cpu,
    obstacles,
    resolve_scale,
    without_autocast,
)
from . import library, reference, tiled
from .mask import BlockMask, boxes

__all__ = ["block_sparse_attention", "block_sparse_attention_lse", "choose", "obstacles"]


def _check_blocks(rank: int, query: Tensor, key: Tensor, mask: BlockMask) -> tuple[int, int]:
    """Numbers of boxes of queries and of keys."""
    counts = []
    for name, block, x in (("query_block", mask.query_block, query), ("key_block", mask.key_block, key)):
        lengths = entries(f"mask.{name}", block, int)
        if lengths is None or len(lengths) != rank or any(b < 1 for b in lengths):
            raise ValueError(f"mask.{name}={block!r} must be {rank} positive numbers of tokens, one an axis")
        counts.append(prod(boxes(x.shape[1:-2], block)))
    return counts[0], counts[1]


def _lists(mask: BlockMask) -> dict[str, Tensor]:
    """The tensors of a mask by name."""
    found: dict[str, Any] = {"kv_idx": mask.kv_idx, "kv_num": mask.kv_num}
    if mask.inverse is not None:
        if not isinstance(mask.inverse, tuple) or len(mask.inverse) != 2:
            raise TypeError(f"mask.inverse={mask.inverse!r} must be None or two tensors, see BlockMask.with_inverse")
        found |= {"inverse[0]": mask.inverse[0], "inverse[1]": mask.inverse[1]}
    found |= {name: x for name in ("bias", "q_len", "kv_len") if (x := getattr(mask, name)) is not None}
    for name, x in found.items():
        check_dense(f"mask.{name}", x, "a tensor or None" if name in ("bias", "q_len", "kv_len") else "a tensor")
    return found


def _check_mask(rank: int, query: Tensor, key: Tensor, mask: BlockMask) -> None:
    tensors = _lists(mask)
    query_boxes, key_boxes = _check_blocks(rank, query, key, mask)
    batch, heads = query.shape[0], query.shape[-2]
    lists, most = mask.kv_idx.shape[:2], mask.kv_idx.shape[-1]
    if mask.kv_idx.dim() != 4 or lists[0] not in (1, batch) or lists[1] not in (1, heads):
        raise ValueError(
            f"mask.kv_idx.shape={tuple(mask.kv_idx.shape)} must be [B={batch} or 1, heads={heads} or 1, …]"
        )
    expected = {"kv_idx": (*lists, query_boxes, most), "kv_num": (*lists, query_boxes)}
    expected |= {"bias": (*lists, query_boxes, most), "q_len": (query_boxes,), "kv_len": (key_boxes,)}
    expected |= {"inverse[0]": (*lists, key_boxes + 1), "inverse[1]": (*lists, query_boxes * most)}
    for name, x in tensors.items():
        if tuple(x.shape) != expected[name]:
            raise ValueError(f"mask.{name}.shape={tuple(x.shape)} must be {expected[name]}")
        if x.device != query.device:
            raise ValueError(f"mask.{name}.device={x.device} must equal query.device={query.device}")
        if name == "bias" and x.dtype not in DTYPES:
            raise TypeError(f"mask.bias.dtype={x.dtype} must be a floating dtype: {ACCEPTED_DTYPES}")
        if name != "bias" and x.dtype != torch.int32:
            raise TypeError(f"mask.{name}.dtype={x.dtype} must be torch.int32")
    if mask.bias is not None and mask.bias.requires_grad and torch.is_grad_enabled():
        raise ValueError("mask.bias requires gradients, but it is a constant: detach it")


def _attend(query, key, value, mask, scale, extra_key, extra_value, impl) -> tuple[Tensor, Tensor]:
    rank = query.dim() - 3
    if not 1 <= rank <= 3:
        raise ValueError(f"query has shape {tuple(query.shape)}; expected [B, 1 to 3 spatial axes, heads, head_dim]")
    check_grids(rank, query, key, value, cross=True)
    _check_mask(rank, query, key, mask)
    check_extra(key, value, extra_key, extra_value)
    tiles = library.attend_tiled if is_compiled_on_cpu(query) else tiled.attend
    attend = {"triton": library.attend, "tiled": tiles, "reference": reference.attend}[choose(query, impl, value)]
    with without_autocast(query.device):
        return attend(
            query,
            key,
            value,
            mask=mask,
            scale=resolve_scale(query, scale),
            extra_key=extra_key,
            extra_value=extra_value,
        )


@operator
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: BlockMask,
    scale: float | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attention in which every box of queries attends to its own list of boxes of keys, on 1-D, 2-D and 3-D grids.

    Cost and memory follow the lists, not the square of the tokens. Tokens stay where they are in memory: boxes are
    addressed inside the grid. Differentiable in query, key, value and the extras, once.

    Args:
        query: `[B, *spatial, heads, head_dim]` with 1 to 3 spatial axes, float16, bfloat16, float32 or float64, any
            strides.
        key: `[B, *key_spatial, key_heads, head_dim]`, as many axes as query, of any lengths; heads is a multiple of
            key_heads (grouped-query attention).
        value: `[B, *key_spatial, key_heads, value_dim]`.
        mask: the boxes and their lists; see `BlockMask`. A query whose list is empty, and that has no extra keys, gets
            output 0 and log-sum-exp -inf.
        scale: factor on query . key; head_dim ** -0.5 when None.
        extra_key, extra_value: `[B, tokens, key_heads, head_dim]` and `[…, value_dim]`, seen by every query (text,
            registers), without bias.
        impl: "auto" takes the fused kernels on CUDA and ROCm and the tiled PyTorch path elsewhere; "triton", "tiled"
            or "reference" insist on one. `foveal.kernels.ops.explain` says which a call takes and why.

    Returns:
        `[B, *spatial, heads, value_dim]` in the dtype of query.

    Raises:
        ValueError, TypeError: an argument outside what is accepted; the message names it and its value.
        NotImplementedError: `impl` cannot take this call; the message says why.
    """
    return _attend(query, key, value, mask, scale, extra_key, extra_value, impl)[0]


@operator
def block_sparse_attention_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: BlockMask,
    scale: float | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """`block_sparse_attention` and the natural log-sum-exp of its logits, both differentiable.

    Returns:
        output `[B, *spatial, heads, value_dim]` and log-sum-exp `[B, *spatial, heads]`, the latter float32, or float64
        for float64 inputs.
    """
    return _attend(query, key, value, mask, scale, extra_key, extra_value, impl)
