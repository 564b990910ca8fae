"""What a `skip_threshold` skips, and thresholds that skip a given share."""

import math

import torch
from torch import Tensor

from ..common.arguments import operator
from .call import BlockSparseCall, make_call
from .mask import BlockMask, by_head, listed
from .skip import SkipCalibration, fit
from .tiled import block_margins


def _margins(query: Tensor, key: Tensor, call: BlockSparseCall) -> tuple[Tensor, Tensor]:
    """Natural `skip.margins` and which of them are of listed blocks, `[B, heads, query blocks, most]` each."""
    with torch.no_grad():
        above = block_margins(query, key, call.mask, call.scale) * math.log(2)
    return above, by_head(listed(call.mask.kv_num, call.mask.kv_idx), above.shape[1]).expand(above.shape)


@operator
def skipped_blocks(
    query: Tensor, key: Tensor, *, mask: BlockMask, skip_threshold: float, scale: float | None = None
) -> Tensor:
    """Listed blocks that `block_sparse_attention` skips with a `skip_threshold`.

    Args:
        query, key, mask, scale: as in `block_sparse_attention`.
        skip_threshold: in [0, 1].

    Returns:
        bool `[B, heads, query blocks, most]`, False where no block is listed.

    Raises:
        ValueError, TypeError: an argument outside what is accepted; the message names it and its value.
    """
    call = make_call(query, key, key, mask=mask, scale=scale, skip_threshold=skip_threshold)
    above, of_list = _margins(query, key, call)
    return of_list & (above < (-math.inf if call.skip_threshold is None else math.log(call.skip_threshold)))


@operator
def calibrate_skip(query: Tensor, key: Tensor, *, mask: BlockMask, scale: float | None = None) -> SkipCalibration:
    """Thresholds of skip softmax by the share of the listed blocks that they skip, fitted to a query and a key.

    The form is that of NVIDIA's Model Optimizer, threshold = a * exp(b * sparsity) / keys, fitted to logarithms. It
    carries over to grids of other lengths as far as thresholds fall with the number of keys (BLASST, arXiv:2512.12087).

    Args:
        query, key, mask, scale: as in `block_sparse_attention`; those of a layer of the model, at a typical step.

    Returns:
        the fit, whose `threshold(sparsity, keys)` is a `skip_threshold`.

    Raises:
        ValueError: too few blocks are below earlier ones for a line.
        ValueError, TypeError: an argument outside what is accepted; the message names it and its value.
    """
    above, of_list = _margins(query, key, make_call(query, key, key, mask=mask, scale=scale))
    return fit(above[of_list], math.prod(key.shape[1:-2]))
