"""Bi-level routing attention (arXiv:2303.08810): regions choose regions, then tokens attend to the tokens of those."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ..common.arguments import operator
from ..common.calling import Impl, PerAxis, check_grids, per_axis, without_autocast
from ..common.symbolic import ceil_div, is_symbol
from . import cost
from .call import BlockSparseCall, block_sparse, make_call
from .mask import BlockMask, boxes


def region_lengths(
    shape: Sequence[int], regions: PerAxis[int] = (7, 7), region_size: PerAxis[int] | None = None
) -> tuple[int, int]:
    """Tokens of a region along height and width; arguments as in `routing_attention2d`."""
    if region_size is not None:
        height, width = per_axis("region_size", region_size, 2, int)
        if height < 1 or width < 1:
            raise ValueError(f"region_size={region_size!r} must be at least 1 token an axis")
        return height, width
    rows, columns = per_axis("regions", regions, 2, int)
    if rows < 1 or columns < 1:
        raise ValueError(f"regions={regions!r} must be at least 1 an axis")
    if shape[0] % rows or shape[1] % columns:
        raise ValueError(
            f"regions={regions!r} must divide the grid {tuple(shape)}: pad it, or give region_size, whose last regions "
            "may be cut short"
        )
    return shape[0] // rows, shape[1] // columns


def _means(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Mean over the tokens of every region, in float32 at least: `[B, H, W, heads, d]` to `[B, regions, heads * d]`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    height, width = x.shape[1:3]
    if any(is_symbol(n) for n in (height, width, *size)):
        batch, down, across = x.shape[0], *(ceil_div(n, s) for n, s in zip((height, width), size, strict=True))
        rows, columns = (_shares(n, s, dtype, x.device) for n, s in zip((height, width), size, strict=True))
        x = x.reshape(batch * height, width, -1).to(dtype)
        x = torch.bmm(columns.expand(batch * height, across, width), x).view(batch, height, across * x.shape[2])
        return torch.bmm(rows.expand(batch, down, height), x).view(batch, down * across, -1)
    if height % size[0] == 0 and width % size[1] == 0:
        cut = x.unflatten(1, (height // size[0], size[0])).unflatten(3, (width // size[1], size[1]))
        return cut.mean(4, dtype=dtype).mean(2).flatten(3).flatten(1, 2)
    pooled = avg_pool2d(x.flatten(3).permute(0, 3, 1, 2), size, ceil_mode=True, count_include_pad=False)
    return pooled.flatten(2).transpose(1, 2).to(dtype)


def _shares(length: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Share of each token of an axis in the mean of each region, `[regions, length]`."""
    region = torch.arange(ceil_div(length, size), device=device)
    belongs = (torch.arange(length, device=device) // size == region[:, None]).to(dtype)
    return belongs / belongs.sum(1, keepdim=True)


@torch.no_grad()
def make_routing_mask(query: Tensor, key: Tensor, *, size: tuple[int, int], topk: int) -> BlockMask:
    """Every region of queries lists the `topk` regions of keys whose mean key has the largest product with its mean
    query (arXiv:2303.08810, equations 3 to 5), all heads together. No gradient flows through the choice.

    Args:
        query, key: `[B, H, W, heads, head_dim]`, or heads of different numbers or sizes of the same total width.
        size: tokens of a region along height and width.
        topk: regions listed, at most as many as there are.

    Raises:
        ValueError: `topk` outside its range.
    """
    rows, columns = boxes(key.shape[1:3], size)
    if not 1 <= topk <= rows * columns:
        raise ValueError(f"topk={topk} must lie in [1, {rows * columns} regions]")
    with without_autocast(query.device):  # products of half precision would overflow, and choose otherwise
        affinity = _means(query, size) @ _means(key, size).transpose(1, 2)  # [B, query regions, key regions]
    chosen = affinity.topk(topk, dim=-1, sorted=False).indices.to(torch.int32)[:, None]
    return BlockMask(size, size, chosen.new_full(chosen.shape[:-1], topk), chosen)


def make_routing_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    regions: PerAxis[int] = (7, 7),
    region_size: PerAxis[int] | None = None,
    topk: int,
    scale: float | None = None,
) -> BlockSparseCall:
    """The call of block-sparse attention that `routing_attention2d` is; arguments as there."""
    check_grids(2, query, key, value)
    if key.shape != query.shape:
        raise ValueError(f"key.shape={tuple(key.shape)} must equal query.shape={tuple(query.shape)}")
    size = region_lengths(query.shape[1:3], regions, region_size)
    mask = make_routing_mask(query, key, size=size, topk=topk)
    scale = (query.shape[-2] * query.shape[-1]) ** -0.5 if scale is None else scale
    return make_call(query, key, value, mask=mask, scale=scale)


def _summarize(query: Tensor, key: Tensor, value: Tensor, call: BlockSparseCall, impl: str | None) -> dict:
    region, topk = "×".join(map(str, call.mask.query_block)), call.mask.kv_idx.shape[-1]
    return {"region": region, "regions_seen": topk} | cost.summarize(query, key, value, call, impl)


@block_sparse.public(make_routing_call, summarize=_summarize)
@operator
def routing_attention2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    regions: PerAxis[int] = (7, 7),
    region_size: PerAxis[int] | None = None,
    topk: int,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Bi-level routing attention (BiFormer, arXiv:2303.08810).

    The grid is cut into regions. Every region chooses the `topk` regions whose mean keys are most like its mean query,
    all heads together, and its queries attend to all tokens of those. No gradient flows through the choice.

    Args:
        query, key: `[B, H, W, heads, head_dim]`, float16, bfloat16, float32 or float64, any strides.
        value: `[B, H, W, heads, value_dim]`.
        regions: regions along height and width; they must divide H and W.
        region_size: tokens of a region along height and width, instead of `regions`. Where they do not divide, the
            last regions are cut short, and their means are those of the tokens they have.
        topk: regions that a region attends to, 1 <= topk <= number of regions.
        scale: factor on query . key; (heads * head_dim) ** -0.5 when None, as in the paper's models.
        impl: as in `block_sparse_attention`.

    Returns:
        `[B, H, W, heads, value_dim]` in the dtype of query.

    Raises:
        ValueError, TypeError: an argument outside what is accepted; the message names it and its value.
        NotImplementedError: `impl` cannot take this call; the message says why.
    """
    call = make_routing_call(query, key, value, regions=regions, region_size=region_size, topk=topk, scale=scale)
    return block_sparse(query, key, value, call, impl=impl)[0]
