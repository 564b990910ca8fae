"""Attention to the own block exactly, and to one summary of each other block, under one softmax."""

from __future__ import annotations

from math import prod
from typing import Literal

import torch
from torch import Tensor

from ..kernels.block_sparse.mask import BlockMask, boxes
from ..kernels.common.calling import PerAxis, resolve_scale
from ..kernels.masks.blocks import (
    block_extrema,
    block_lengths,
    block_means,
    block_tokens,
    check_query_key,
    cut_into_blocks,
)
from ..kernels.ops import block_sparse_attention, merge_attentions, window_attention

Summary = Literal["max_query", "mean"]


def block_summaries(
    query: Tensor, key: Tensor, value: Tensor, *, block: PerAxis[int], kind: Summary = "max_query", scale: float
) -> tuple[Tensor, Tensor]:
    """One key and one value for each block of tokens.

    Args:
        query, key, value: `[B, *spatial, heads, d]`, of one grid.
        block: tokens along each axis.
        kind: "max_query", the largest value of each channel of the keys, and the values as the largest values of the
            queries attend to them (Combiner, arXiv:2107.05768, section 4.1); "mean", means of both.
        scale: factor on query . key.

    Returns:
        keys and values `[B, *blocks, heads, d]`, in the dtypes of key and value.

    Raises:
        ValueError: an unknown kind.
    """
    rank, shape = query.dim() - 3, key.shape[1:-2]
    lengths = block_lengths("block", block, rank)
    grid = boxes(shape, lengths)
    if kind == "mean":
        return tuple(block_means(x, lengths).to(x.dtype).unflatten(1, grid) for x in (key, value))  # pyright: ignore
    if kind != "max_query":
        raise ValueError(f"kind={kind!r} must be 'max_query' or 'mean'")
    most_query, most_key = (block_extrema(x, lengths)[1] for x in (query, key))  # [B, blocks, heads, d]
    keys, exists = cut_into_blocks(key, lengths)  # [B, blocks, tokens, heads, d]
    values, _ = cut_into_blocks(value, lengths)
    logits = torch.einsum("bnhd,bnthd->bnth", most_query, keys) * scale
    weights = logits.masked_fill(~exists[None, :, :, None], -torch.inf).softmax(2)
    found = torch.einsum("bnth,bnthd->bnhd", weights, values)
    return most_key.unflatten(1, grid), found.unflatten(1, grid)


def summarized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block: PerAxis[int],
    kind: Summary = "max_query",
    scale: float | None = None,
) -> Tensor:
    """Attention to the tokens of the own block and to a summary of each other block (Combiner, "fixed" form).

    N tokens in blocks of n cost N (n + N / n) products instead of N². Each token is seen once: the summary of the own
    block, which the published code adds to its tokens, is left out. A mean counts as often as it has tokens.
    Differentiable.

    Args:
        query, key, value: `[B, *spatial, heads, d]` with 1 to 3 spatial axes, of one grid and as many heads.
        block: tokens along each axis; blocks at the far borders may be shorter.
        kind: of the summaries, see `block_summaries`.
        scale: factor on query . key; d ** -0.5 when None.

    Returns:
        `[B, *spatial, heads, d]`.

    Raises:
        ValueError: other grids or heads, or an unknown kind.
    """
    rank, shape = check_query_key(query, key), query.shape[1:-2]
    if key.shape != query.shape or value.shape[:-1] != key.shape[:-1]:
        shapes = f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        raise ValueError(f"query, key and value of {shapes} must have one grid and as many heads")
    scale, lengths = resolve_scale(query, scale), block_lengths("block", block, rank)
    own, own_lse = window_attention(query, key, value, window=lengths, scale=scale, return_lse=True)
    count = prod(boxes(shape, lengths))
    if count == 1:
        return own
    keys, values = block_summaries(query, key, value, block=lengths, kind=kind, scale=scale)
    mask = other_blocks(shape, lengths, weighted=kind == "mean", device=query.device)
    others, lse = block_sparse_attention(query, keys, values, mask=mask, scale=scale, return_lse=True)
    return merge_attentions([own, others], [own_lse, lse])[0]


def other_blocks(
    shape: tuple[int, ...], block: tuple[int, ...], *, weighted: bool, device: torch.device | None = None
) -> BlockMask:
    """Lists of all summaries but the own one, for each block of queries; `weighted` adds log(tokens) to logits."""
    count = prod(boxes(shape, block))
    listed = torch.arange(count - 1, device=device).repeat(count, 1)
    listed = listed + (listed >= torch.arange(count, device=device)[:, None])  # jump over the own block
    lists = listed.to(torch.int32)[None, None]
    number = torch.full((1, 1, count), count - 1, dtype=torch.int32, device=device)
    bias = block_tokens(shape, block, device).float().log()[listed][None, None] if weighted else None
    return BlockMask(block, (1,) * len(block), number, lists, bias)
