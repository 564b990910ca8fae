"""`torch.ops.foveal.block_sparse_*`: schemas, fake kernels, autograd and FLOP formulas of compiled calls.

There are two pairs of operators: the Triton kernels, and the tiled path as `torch.compile` sees it on CPU. Only torch
is imported here, so a first call may be a compiled one; the modules that compute are imported when they first run.
"""

from math import prod

import torch
from torch import Tensor

from ..common import operators
from .mask import BlockMask, boxes

LISTS = "Tensor kv_num, Tensor kv_idx, Tensor? bias, Tensor? q_len, Tensor? kv_len, Tensor? starts, Tensor? order"
BLOCKS = "SymInt[] query_block, SymInt[] key_block, float scale"


def _unpack(
    query, key, extra_key, extra_value, kv_num, kv_idx, bias, q_len, kv_len, starts, order, query_block, key_block,
    scale,
) -> dict:  # fmt: skip
    """Arguments of `launch` and `tiled`."""
    inverse = None if starts is None else (starts, order)
    mask = BlockMask(tuple(query_block), tuple(key_block), kv_num, kv_idx, bias, q_len, kv_len, inverse)
    return {"mask": mask, "scale": scale, "extra_key": extra_key, "extra_value": extra_value}


def _flops(query, key, value, extra_key, extra_value, kv_num, kv_idx, *rest) -> tuple[int, int]:
    """From shapes alone: as if every list were full."""
    batch, *shape, heads, head_dim = query
    *_, query_block, key_block, _ = rest
    keys = kv_idx[-1] * prod(key_block) + (extra_key[1] if extra_key else 0)
    pairs = batch * heads * prod(boxes(shape, query_block)) * prod(query_block) * keys
    return 2 * (head_dim + value[-1]) * pairs, 2 * (3 * head_dim + 2 * value[-1]) * pairs


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


for _name, _module in (("block_sparse", "launch"), ("block_sparse_tiled", "tiled")):
    operators.define(
        _name,
        f"{__package__}.{_module}",
        extras=("extra_key", "extra_value"),
        rest=f"{LISTS}, {BLOCKS}",
        unpack=_unpack,
        flops=_flops,
        title="block-sparse attention",
    )
