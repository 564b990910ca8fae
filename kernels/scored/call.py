"""One call of scored attention: checked arguments, laid out for the scores."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..common.calling import check_grids, resolve_scale
from ..common.operator import Operator
from .columns import ColumnMask
from .lists import pack
from .rows import Rows
from .score import Score

MAX_HEAD_DIM = 128
MAX_POSITIONS = 65  # of CoPE's table: further on float32 positions lose too much of what lies behind the point


@dataclass(frozen=True)
class ScoredCall:
    """Everything but query, key and value; see `api.scored_attention`."""

    score: Score
    mask: ColumnMask | None
    order: Tensor | None
    scale: float


@dataclass(frozen=True)
class FusedCall:
    """A call as the kernels take it: the formula by name, its numbers and tensors, and a packed mask.

    Attributes:
        kind: name of the formula, `Score.fused`.
        scale: factor on query . key.
        table, r: of `CoPE` and of `Parallax`.
        intervals: int32 `[B or 1, heads or 1, 2 x intervals, keys]`, starts and ends in turn.
        positions: of queries in the intervals, int32 `[queries]`.
        power, offset, length_scale, scaled: as the scores have them.
    """

    kind: str
    scale: float
    table: Tensor | None = None
    r: Tensor | None = None
    intervals: Tensor | None = None
    positions: Tensor | None = None
    power: float = 0.0
    offset: float = 1.0
    length_scale: bool = False
    scaled: bool = True


PARAMETERS = ("table", "r", "power", "offset", "length_scale", "scaled")


def to_fused(query: Tensor, key: Tensor, value: Tensor, call: ScoredCall) -> tuple[Tensor, Tensor, Tensor, FusedCall]:
    """Operands, and the call as the kernels take it; the order of the call is that of the operands by now."""
    queries = prod(query.shape[1:-2])
    intervals, positions = (None, None) if call.mask is None else pack(call.mask, queries)
    given = {name: getattr(call.score, name) for name in PARAMETERS if hasattr(call.score, name)}
    fused = FusedCall(call.score.fused, call.scale, intervals=intervals, positions=positions, **given)
    return query, key, value, fused


def _unsupported(query: Tensor, key: Tensor, value: Tensor, call: ScoredCall) -> str | None:
    """Why the kernels cannot take a call, or None."""
    score = call.score
    if not vars(type(score)).get("fused"):  # not what a class inherits, whose formula may be another
        return f"{type(score).__name__}: {score.unfused}"
    table, r = getattr(score, "table", None), getattr(score, "r", None)
    if table is not None and table.shape[1] > MAX_POSITIONS:
        return f"score.table has {table.shape[1]} positions, more than {MAX_POSITIONS}"
    if r is not None and r.dtype != query.dtype:
        return f"score.r.dtype={r.dtype} is not that of query, {query.dtype}: products with keys take one dtype"
    return None


def _outputs(query: Tensor, key: Tensor, value: Tensor, call: FusedCall) -> tuple[Tensor, Tensor, Tensor]:
    """Empty output, log-sum-exp, and statistics of rows `[…, B, queries, heads]`."""
    batch, *shape, heads, _ = query.shape
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    number = statistics(call.kind, call.power)
    return query.new_empty(*query.shape[:-1], value.shape[-1]), lse, lse.new_empty(number, batch, prod(shape), heads)


def statistics(kind: str, power: float) -> int:
    """How many numbers of a row the forward kernels leave for the backward beside the log-sum-exp.

    Of softplus the sum of the first stage and, with a power, the largest excess over the mean weight and the sum of the
    second stage; of Parallax the mean tilt.
    """
    return {"softplus": 3 if power else 1, "parallax": 1}.get(kind, 0)


def passes(kind: str, power: float, *, backward: bool = False) -> tuple[str, ...]:
    """Sweeps of the forward kernel, or of the query's gradient, over the keys."""
    two = kind == "parallax" or bool(power) or (backward and kind == "cope")
    return ("sums", "final") if two else ("one",)


def products(query: Tensor, key: Tensor, value: Tensor, r: Tensor | None) -> tuple[int, int]:
    """FLOPs of the passes as if every pair were visible: of softmax attention, and of Parallax of the products with r.

    Each is counted once, also where a pass reads the keys twice.
    """
    pairs = query.shape[0] * query.shape[-2] * prod(query.shape[1:-2]) * prod(key.shape[1:-2])
    logits, value_dim = query.shape[-1] * (1 if r is None else 2), value.shape[-1]
    return 2 * pairs * (logits + value_dim), 2 * pairs * (3 * logits + 2 * value_dim)


def _flops(query: Tensor, key: Tensor, value: Tensor, call: FusedCall) -> tuple[int, int]:
    return products(query, key, value, call.r)


scored = Operator(
    "scored",
    package=__name__.rpartition(".")[0],
    call=FusedCall,
    differentiable=("table", "r"),
    flops=_flops,
    fake=_outputs,
    flows=(True, True, False),
    modules={"triton": "launch", "torch": "chunked", "reference": "reference"},
    max_head_dims=(MAX_HEAD_DIM, MAX_HEAD_DIM),
    unsupported=_unsupported,
    prepare=to_fused,
    title="scored attention with impl='triton'",
)


def make_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score: Score,
    mask: ColumnMask | None = None,
    order: Tensor | None = None,
    scale: float | None = None,
) -> ScoredCall:
    """The call of arguments that fit together.

    Raises:
        ValueError, TypeError: an argument outside what is accepted; the message names it and its value.
    """
    rank = query.dim() - 3
    if not 1 <= rank <= 3:
        raise ValueError(f"query has shape {tuple(query.shape)}; expected [B, 1 to 3 spatial axes, heads, head_dim]")
    check_grids(rank, query, key, value, cross=True)
    flat = [x.flatten(1, -3) for x in (query, key, value)]
    check_mask(mask, *flat[:2])
    tokens = flat[0].shape[1]
    if order is not None:
        if order.dtype.is_floating_point or order.dtype == torch.bool or order.shape != (tokens,):
            raise ValueError(f"order ({order.dtype}, {tuple(order.shape)}) must be a permutation, int64 [{tokens}]")
        if flat[1].shape[1] != tokens:
            raise ValueError(f"order needs as many keys ({flat[1].shape[1]}) as queries ({tokens})")
    score.check(*flat)
    return ScoredCall(score, mask, order, resolve_scale(query, scale))


def check_mask(mask: ColumnMask | None, query: Tensor, key: Tensor) -> None:
    """Refuse a mask for other operands `[B, tokens, heads, dim]`."""
    if mask is None:
        return
    batch, heads = query.shape[0], query.shape[2]
    if mask.num_keys != key.shape[1] or mask.start.shape[0] not in (1, batch) or mask.start.shape[1] not in (1, heads):
        expected = f"[B={batch} or 1, heads={heads} or 1, keys={key.shape[1]}]"
        raise ValueError(f"mask.start.shape={tuple(mask.start.shape)} must be {expected}")
    mask.positions(query.shape[1])
    if mask.start.device != query.device:
        raise ValueError(f"mask.start.device={mask.start.device} must equal query.device={query.device}")


def lay_out(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Operands `[B, *spatial, heads, dim]` as `[B, heads, tokens, dim]`, in float32 at least, a key head per head."""
    wide, heads = torch.promote_types(query.dtype, torch.float32), query.shape[-2]
    q, k, v = (x.flatten(1, -3).transpose(1, 2).to(wide) for x in (query, key, value))
    group = heads // k.shape[1]
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    return q, k, v


def rows_of(
    query: Tensor, key: Tensor, value: Tensor, mask: ColumnMask | None, scale: float, first: int, last: int
) -> Rows:
    """Queries `first` to `last` of laid out operands."""
    visible = None if mask is None else mask.visible(query.shape[2], first, last)
    return Rows(query[:, :, first:last], key, value, visible, scale, first)


def give_back(x: Tensor, like: Tensor) -> Tensor:
    """Output `[B, heads, tokens, value_dim]` on the grid and in the dtype of the query."""
    return x.transpose(1, 2).reshape(*like.shape[:-1], x.shape[-1]).to(like.dtype)


def give_back_lse(x: Tensor | None, like: Tensor) -> Tensor | None:
    """Log-sum-exp `[B, heads, tokens]` on the grid of the query."""
    return None if x is None else x.transpose(1, 2).reshape(like.shape[:-1])
