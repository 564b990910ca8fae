"""NATTEN's functions on our operators, every argument by name; `orders` gives them the order of a release."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...block_sparse import BlockMask, block_sparse_attention
from ...common.calling import PerAxis
from ...neighborhood import merge_attentions as merge
from ...neighborhood import na1d, na2d, na3d
from ...ragged.groups import attend_groups
from ...ragged.layout import RaggedLayout
from .geometry import check_axes, check_tensor

BLOCK = 128  # tokens of a block of `attention` between other lengths
OPERATORS: dict[int, Callable[..., Any]] = {1: na1d, 2: na2d, 3: na3d}


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kernel_size: PerAxis[int],
    stride: PerAxis[int] | None = 1,
    dilation: PerAxis[int] | None = 1,
    is_causal: PerAxis[bool] | None = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    rank: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention on 1 to 3 axes; see `foveal.kernels.ops.na2d`, whose `window` is `kernel_size` here.

    Args:
        query, key, value: `[B, *spatial, heads, head_dim]`.
        rpb: bias of relative positions `[heads, *(2 * kernel_size - 1)]`.
        scale: head_dim ** -0.5 when None or 0, as in NATTEN.
        rank: spatial axes that the function's name promises; those of query when None.

    Returns:
        output `[B, *spatial, heads, value_dim]`; with `return_lse` a tuple of it and `[B, *spatial, heads]`.

    Raises:
        ValueError, TypeError: an argument outside what is accepted; the message names it.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, x)
    axes = query.dim() - 3
    if axes not in OPERATORS or rank not in (None, axes):
        spatial = "1 to 3 spatial axes" if rank is None else f"{rank} spatial axes"
        raise ValueError(f"query.shape={tuple(query.shape)} must be [B, {spatial}, heads, head_dim]")
    checked = check_axes(query.shape[1:-2], kernel_size, stride, dilation, is_causal)
    given = {
        "window": [axis.window for axis in checked],
        "stride": [axis.stride for axis in checked],
        "dilation": [axis.dilation for axis in checked],
        "causal": [axis.causal for axis in checked],
        "bias": rpb,
        "scale": scale or None,
        "additional_keys": additional_keys,
        "additional_values": additional_values,
    }
    return OPERATORS[axes](query, key, value, **given, return_lse=return_lse)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_Q: Tensor | None = None,
    seqlens_KV: Tensor | None = None,
    cumulative_seqlen_Q: Tensor | None = None,
    cumulative_seqlen_KV: Tensor | None = None,
    max_seqlen_Q: int | None = None,
    max_seqlen_KV: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Every query attends to every key, or with `is_causal` to the keys of its own and lower numbers.

    Args:
        query: `[B, tokens, heads, head_dim]`.
        key, value: `[B, key tokens, key_heads, head_dim]` and `[…, value_dim]`; heads is a multiple of key_heads.
        is_causal: query i sees keys 0 to i.
        scale: head_dim ** -0.5 when None or 0, as in NATTEN.
        seqlens_Q, seqlens_KV: int32 `[entries]`: sequences of these lengths lie one after the other in a batch of 1.
        cumulative_seqlen_Q, cumulative_seqlen_KV: the same by their ends, int32 `[entries + 1]`, beginning with 0.
        max_seqlen_Q, max_seqlen_KV: the largest lengths. Not needed here; 0 stands for None.

    Returns:
        output `[B, tokens, heads, value_dim]`; with `return_lse` a tuple of it and `[B, tokens, heads]`.

    Raises:
        ValueError, TypeError: an argument outside what is accepted; the message names it.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name}.shape={tuple(x.shape)} must be [B, tokens, heads, head_dim]")
    lengths = _lengths(seqlens_Q, seqlens_KV, cumulative_seqlen_Q, cumulative_seqlen_KV)
    if lengths is None:
        out, lse = _dense(query, key, value, is_causal=is_causal, scale=scale or None)
    else:
        if query.shape[0] != 1 or key.shape[0] != 1:
            raise ValueError(f"sequences of several lengths lie in a batch of 1, got query.shape={tuple(query.shape)}")
        layout, key_layout = (RaggedLayout.from_cumulative(x) for x in lengths)
        out, lse = attend_groups(
            lambda group, *tensors: _dense(*tensors, is_causal=is_causal, scale=scale or None),
            *(x[0] for x in (query, key, value)),
            layout=layout,
            key_layout=key_layout,
        )
        out, lse = out[None], lse[None]
    return (out, lse) if return_lse else out


def _lengths(*given: Tensor | None) -> list[list[int]] | None:
    """Ends of the sequences of queries and of keys, or None for a dense batch."""
    names = ("seqlens_Q", "seqlens_KV", "cumulative_seqlen_Q", "cumulative_seqlen_KV")
    for first in (0, 2):
        pair = given[first : first + 2]
        if (pair[0] is None) != (pair[1] is None):
            raise ValueError(f"{names[first]} and {names[first + 1]} must be given together")
    if given[2] is not None and given[3] is not None:
        return [x.tolist() for x in given[2:] if x is not None]
    if given[0] is None or given[1] is None:
        return None
    return [[0, *x.cumsum(0).tolist()] for x in given[:2] if x is not None]


def _dense(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one batch; causal queries are counted from the first key on."""
    length, keys = query.shape[1], key.shape[1]
    if length == keys:
        return na1d(query, key, value, window=length, causal=is_causal, scale=scale, return_lse=True)
    if not is_causal:
        whole = _every_block(length, keys, query.device)
        return block_sparse_attention(query, key, value, mask=whole, scale=scale, return_lse=True)
    if length < keys:
        return _dense(query, key[:, :length], value[:, :length], is_causal=True, scale=scale)
    parts = [
        _dense(query[:, :keys], key, value, is_causal=True, scale=scale),
        _dense(query[:, keys:], key, value, is_causal=False, scale=scale),  # they come after every key
    ]
    return torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 1)


def _every_block(length: int, keys: int, device: torch.device) -> BlockMask:
    """The mask of attention without a mask."""
    rows, columns = -(-length // BLOCK), -(-keys // BLOCK)
    listed = torch.arange(columns, dtype=torch.int32, device=device).expand(1, 1, rows, columns)
    number = torch.full((1, 1, rows), columns, dtype=torch.int32, device=device)
    return BlockMask((BLOCK,), (BLOCK,), number, listed.contiguous())


def merge_attentions(
    *, outputs: Sequence[Tensor], lse_tensors: Sequence[Tensor], with_lse: bool = True
) -> Tensor | tuple[Tensor, Tensor]:
    """`foveal.kernels.ops.merge_attentions` under NATTEN's names; before 0.21.5 without the log-sum-exp.

    Raises:
        ValueError, TypeError: fewer than two attentions, or attentions that do not fit together.
    """
    if len(outputs) < 2:
        raise ValueError(f"outputs must be at least two attentions, got {len(outputs)}")
    out, lse = merge(outputs, lse_tensors)
    return (out, lse) if with_lse else out


def with_depth(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of `pairs` on three axes with NATTEN 0.15's arguments: depth apart, height and width together."""

    def of_depth(
        *, kernel_size_d: int, kernel_size: int, dilation_d: int | None, dilation: int | None, **rest: Any
    ) -> Tensor:
        dilations = dilation_d or 1, dilation or 1, dilation or 1
        return function(kernel_size=(kernel_size_d, kernel_size, kernel_size), dilation=dilations, **rest)

    return of_depth


def without_size(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of `pairs` with the arguments of NATTEN 0.14.4: the window follows from the table or the weights."""

    def of_table(*, dilation: int | None, rpb: Tensor | None = None, attn: Tensor | None = None, **rest: Any) -> Tensor:
        if rpb is not None:
            return function(kernel_size=(rpb.shape[-1] + 1) // 2, dilation=dilation, rpb=rpb, **rest)
        if attn is None:
            raise ValueError("rpb must be given: the kernel size follows from its shape")
        kernel_size = round(attn.shape[-1] ** (1 / (attn.dim() - 3)))
        return function(kernel_size=kernel_size, dilation=dilation, attn=attn, **rest)

    return of_table


def generate_varlen_parameters(
    query: Tensor, key: Tensor, value: Tensor, seqlens_Q: Tensor | None = None, seqlens_KV: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Ends and largest lengths of sequences, as `attention` takes them; (None, None, 0, 0) without lengths.

    Args:
        query, key, value: not looked at; NATTEN has them here.
        seqlens_Q, seqlens_KV: int32 `[entries]`; read on the host.

    Returns:
        ends of the sequences of queries, and of keys, int32 `[entries + 1]`; the largest length of each.
    """
    _lengths(seqlens_Q, seqlens_KV, None, None)
    if seqlens_Q is None or seqlens_KV is None:
        return None, None, 0, 0
    ends = [torch.nn.functional.pad(x.cumsum(0, dtype=torch.int32), (1, 0)) for x in (seqlens_Q, seqlens_KV)]
    return ends[0], ends[1], int(seqlens_Q.max()), int(seqlens_KV.max())
