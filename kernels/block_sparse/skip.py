"""Skip softmax: listed blocks whose logits all lie far below those of earlier blocks are left out of the softmax.

The rule is that of BLASST (arXiv:2512.12087) and NVIDIA's Model Optimizer, for blocks instead of the tiles of a kernel.
Walk the list of a block of queries in order, with the largest logit so far of every query. A block of keys is skipped
if, for all queries that exist, its largest logit less the largest so far is below log(threshold). Each softmax then
lacks at most the threshold times its largest weight for every token of a skipped block.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .call import BlockSparseCall
from .mask import BlockMask, by_head, listed


def margins(highest: Tensor, exists: Tensor | None) -> Tensor:
    """How far above earlier blocks each block of a list reaches, `[..., most]`: inf for the first.

    A threshold of at most 1 skips blocks that raise no maximum, so the largest so far is that of all blocks before.

    Args:
        highest: `[..., queries, most]`, the largest logit of every query in each block, -inf without any.
        exists: bool `[..., queries]`, queries that count; all when None.
    """
    before = torch.cat([torch.full_like(highest[..., :1], -math.inf), highest[..., :-1]], -1).cummax(-1).values
    above = highest - before
    above = above.masked_fill(above.isnan(), math.inf)  # of nothing before, and NaN shows
    if exists is not None:
        above = above.masked_fill(~exists[..., None], -math.inf)
    return above.amax(-2)


def keep_listed(mask: BlockMask, kept: Tensor) -> BlockMask:
    """The mask without the entries of its lists that are not kept.

    Args:
        mask: lists `[B or 1, lists, query blocks, most]`.
        kept: bool `[B, heads, query blocks, most]`.
    """
    heads = kept.shape[1]
    kept = kept & by_head(listed(mask.kv_num, mask.kv_idx), heads)
    most = kept.shape[-1]
    place = torch.where(kept, kept.cumsum(-1) - 1, most)  # what is left out goes behind the list, and is cut off

    def compact(x: Tensor) -> Tensor:
        found = x.new_zeros(*kept.shape[:-1], most + 1)
        return found.scatter(-1, place, by_head(x, heads).expand(kept.shape))[..., :most].contiguous()

    bias = None if mask.bias is None else compact(mask.bias)
    kv_num = kept.sum(-1, dtype=torch.int32)
    return mask._replace(kv_num=kv_num, kv_idx=compact(mask.kv_idx), bias=bias, inverse=None)


def without_skipped(call: BlockSparseCall, kept: Tensor) -> BlockSparseCall:
    """The call on what was kept of its lists; as it is without `skip_threshold`."""
    if call.skip_threshold is None:
        return call
    return replace(call, mask=keep_listed(call.mask, kept != 0), skip_threshold=None)


class SkipCalibration(NamedTuple):
    """How much a threshold skips: threshold = a * exp(b * sparsity) / keys, as NVIDIA's Model Optimizer calibrates it.

    Attributes:
        a, b: coefficients of the fit.
    """

    a: float
    b: float

    def threshold(self, sparsity: float, keys: int) -> float:
        """The `skip_threshold` that skips a share of the listed blocks.

        Args:
            sparsity: share of the listed blocks to skip, in [0, 1); 0 skips none.
            keys: tokens of the grid of keys.

        Raises:
            ValueError: an argument out of its range.
        """
        if not 0 <= sparsity < 1 or keys < 1:
            raise ValueError(f"sparsity={sparsity!r} must be in [0, 1), keys={keys!r} at least 1")
        return min(1.0, self.a * math.exp(self.b * sparsity) / keys) if sparsity else 0.0


def fit(above: Tensor, keys: int, steps: int = 16) -> SkipCalibration:
    """The line through logarithms of the thresholds that skip 1 / `steps`, 2 / `steps`, … of the blocks.

    Args:
        above: margins of all listed blocks, `[blocks]`, at most inf.
        keys: tokens of the grid of keys.

    Raises:
        ValueError: thresholds of at most 1 skip too few blocks for a line.
    """
    ordered = above.double().sort().values
    sparsity = torch.arange(1, steps, dtype=torch.float64, device=above.device) / steps
    log_threshold = ordered[(sparsity * len(ordered)).long()]
    usable = log_threshold.isfinite() & (log_threshold <= 0)
    if usable.sum() < 2:
        raise ValueError(f"of {len(ordered)} listed blocks no threshold up to 1 skips {2 / steps:.0%}")
    x, y = sparsity[usable], log_threshold[usable] + math.log(keys)
    b = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    return SkipCalibration(math.exp(float(y.mean()) - b * float(x.mean())), b)
