"""One call of block-sparse attention: checked arguments, and the operators of torch's dispatcher that take them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..common.arguments import ACCEPTED_DTYPES, DTYPES, check_dense
from ..common.calling import (
    Mask,
    additional_visibility,
    check_additional,
    check_grids,
    entries,
    gluon_obstacle,
    resolve_scale,
)
from ..common.launching import block_d, device_class
from ..common.operator import Operator, output_and_lse
from . import cost
from .configs import SKIP_TOKENS, part, skip_bytes
from .mask import BlockMask, boxes


@dataclass(frozen=True)
class BlockSparseCall:
    """Everything but query, key and value; see `api.block_sparse_attention`."""

    additional_keys: Tensor | None
    additional_values: Tensor | None
    mask: BlockMask
    scale: float
    additional_mask: Tensor | None = None  # bool [B, tokens]
    skip_threshold: float | None = None  # in (0, 1]

    @property
    def additional(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Additional keys, their values, and which are visible."""
        return self.additional_keys, self.additional_values, self.additional_mask


@dataclass(frozen=True)
class RoundedCall(BlockSparseCall):
    """A call whose queries and keys are rounded first, see `rounded`."""

    qk_dtype: torch.dtype = torch.int8


ONE_BIT: torch.dtype = torch.uint1  # pyright: ignore[reportAttributeAccessIssue]  # not in torch's stubs
QK_DTYPES = (torch.int8, torch.float8_e4m3fn, ONE_BIT)


def make_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: BlockMask,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    additional_mask: Mask | None = None,
    skip_threshold: float | None = None,
    qk_dtype: torch.dtype | None = None,
) -> BlockSparseCall:
    """The call of arguments that fit together.

    Raises:
        ValueError, TypeError: an argument outside what is accepted; the message names it and its value.
    """
    rank = query.dim() - 3
    if not 1 <= rank <= 3:
        raise ValueError(f"query has shape {tuple(query.shape)}; expected [B, 1 to 3 spatial axes, heads, head_dim]")
    check_grids(rank, query, key, value, cross=True)
    _check_mask(rank, query, key, mask)
    check_additional(key, value, additional_keys, additional_values)
    mask = mask._replace(query_block=tuple(mask.query_block), key_block=tuple(mask.key_block))
    visible = additional_visibility(additional_mask, additional_keys)
    if skip_threshold is not None and not 0 <= skip_threshold <= 1:
        raise ValueError(f"skip_threshold={skip_threshold!r} must be in [0, 1], a share of the largest weight, or None")
    skip = float(skip_threshold) if skip_threshold else None
    fields = additional_keys, additional_values, mask, resolve_scale(query, scale), visible, skip
    if qk_dtype is None:
        return BlockSparseCall(*fields)
    if qk_dtype not in QK_DTYPES:
        raise ValueError(f"qk_dtype={qk_dtype!r} must be None or one of {', '.join(map(str, QK_DTYPES))}")
    return RoundedCall(*fields, qk_dtype)


def _check_blocks(rank: int, query: Tensor, key: Tensor, mask: BlockMask) -> tuple[int, int]:
    """Numbers of blocks of queries and of keys."""
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
    batch, heads, key_heads = query.shape[0], query.shape[-2], key.shape[-2]
    lists, most = mask.kv_idx.shape[:2], mask.kv_idx.shape[-1]
    if mask.kv_idx.dim() != 4 or lists[0] not in (1, batch) or lists[1] not in (1, heads, key_heads):
        counts = f"heads={heads} or 1" if heads == key_heads else f"heads={heads}, key_heads={key_heads} or 1"
        raise ValueError(f"mask.kv_idx.shape={tuple(mask.kv_idx.shape)} must be [B={batch} or 1, {counts}, …]")
    expected = {"kv_idx": (*lists, query_boxes, most), "kv_num": (*lists, query_boxes)}
    expected |= {"bias": (*lists, query_boxes, most)}
    expected |= {"inverse[0]": (*lists, key_boxes + 1), "inverse[1]": (*lists, query_boxes * most)}
    for name, x in tensors.items():
        if name in ("q_len", "kv_len"):
            count = query_boxes if name == "q_len" else key_boxes
            if tuple(x.shape) not in ((count,), (1, count), (batch, count)):
                raise ValueError(
                    f"mask.{name}.shape={tuple(x.shape)} must be ({count},) or [B={batch} or 1, blocks={count}]"
                )
        elif tuple(x.shape) != expected[name]:
            raise ValueError(f"mask.{name}.shape={tuple(x.shape)} must be {expected[name]}")
        if x.device != query.device:
            raise ValueError(f"mask.{name}.device={x.device} must equal query.device={query.device}")
        if name == "bias" and x.dtype not in DTYPES:
            raise TypeError(f"mask.bias.dtype={x.dtype} must be a floating dtype: {ACCEPTED_DTYPES}")
        if name != "bias" and x.dtype != torch.int32:
            raise TypeError(f"mask.{name}.dtype={x.dtype} must be torch.int32")
    if mask.bias is not None and mask.bias.requires_grad and torch.is_grad_enabled():
        raise ValueError("mask.bias requires gradients, but it is a constant: detach it")


def _flops(query: Tensor, key: Tensor, value: Tensor, call: BlockSparseCall) -> tuple[int, int]:
    """From shapes alone: as if every list were full."""
    batch, *shape, heads, head_dim = query.shape
    keys = call.mask.kv_idx.shape[-1] * prod(call.mask.key_block)
    keys += 0 if call.additional_keys is None else call.additional_keys.shape[1]
    query_block = call.mask.query_block
    pairs = batch * heads * prod(boxes(shape, query_block)) * prod(query_block) * keys
    return cost.forward_flops(pairs, head_dim, value.shape[-1]), cost.backward_flops(pairs, head_dim, value.shape[-1])


def _outputs(query: Tensor, key: Tensor, value: Tensor, call: BlockSparseCall) -> tuple[Tensor, Tensor, Tensor]:
    """Empty output, log-sum-exp, and the listed blocks that are not skipped."""
    return *output_and_lse(query, key, value, call), empty_kept(query, call)


def empty_kept(query: Tensor, call: BlockSparseCall) -> Tensor:
    """Zeros, uint8 `[B, heads, query blocks, most]`; without `skip_threshold` no number at all."""
    shape = (query.shape[0], query.shape[-2], *call.mask.kv_idx.shape[2:])
    return query.new_zeros((0,) if call.skip_threshold is None else shape, dtype=torch.uint8)


def _unsupported(query: Tensor, key: Tensor, value: Tensor, call: BlockSparseCall) -> str | None:
    """Reason of the kernels to refuse a call: with `skip_threshold` a program holds whole blocks."""
    if call.skip_threshold is None:
        return None
    width = block_d(max(query.shape[-1], value.shape[-1])) * query.itemsize
    tokens = max(prod(call.mask.query_block), prod(call.mask.key_block))
    most = min(SKIP_TOKENS, skip_bytes(device_class(query.device)) // width)
    return f"skip_threshold takes blocks of up to {most} tokens here, not {tokens}" if tokens > most else None


def gluon_unsupported(query: Tensor, key: Tensor, value: Tensor, call: BlockSparseCall | None) -> str | None:
    """Why the Gluon forward cannot take a call, or None; `call` is None where none is known yet."""
    if (why := gluon_obstacle(query, key, value)) is not None or call is None:
        return why
    mask = call.mask
    given = {
        "mask.bias": mask.bias,
        "mask.q_len": mask.q_len,
        "mask.kv_len": mask.kv_len,
        "additional_keys": call.additional_keys,
        "skip_threshold": call.skip_threshold,
    }
    if found := [name for name, x in given.items() if x is not None]:
        return f"it does not take {found[0]}"
    if call.scale <= 0:
        return f"scale={call.scale} must be positive"
    for name, block, least in (("query", mask.query_block, 128), ("key", mask.key_block, 64)):
        if prod(block) < least or part(block, least) is None:
            return f"mask.{name}_block={block} must have sides of powers of two and at least {least} tokens"
    return None


block_sparse = Operator(
    "block_sparse",
    package=__name__.rpartition(".")[0],
    call=BlockSparseCall,
    differentiable=("additional_keys", "additional_values"),
    flops=_flops,
    summarize=cost.summarize,
    fake=_outputs,
    flows=(True, True, False),
    modules={"triton": "launch", "gluon": "gluon", "torch": "tiled", "reference": "reference"},
    unsupported=_unsupported,
    on_request={"gluon": gluon_unsupported},
    graph="torch",
    title="block-sparse attention",
)
