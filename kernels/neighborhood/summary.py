"""The cost of a call by name, and the tiles that its kernel visits, for `foveal.kernels.ops.explain`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.calling import PerHead, on_grid
from . import quantized
from .cost import backward_bytes, backward_flops, forward_bytes, forward_flops, visible_pairs
from .geometry import Axis
from .heads import HeadGroup, head_groups


class Neighborhoods(NamedTuple):
    """Facts of a call that its cost depends on, query, key and value aside.

    Attributes:
        groups: heads that share their windows.
        extra: number of extra keys.
        bias: whether there is a relative position table.
        qk_dtype: as in `na2d`.
        grid: as in `na2d`.
    """

    groups: tuple[HeadGroup, ...]
    extra: int
    bias: bool
    qk_dtype: torch.dtype | None
    grid: Sequence[int] | None

    @property
    def additions(self) -> tuple[str, ...]:
        """Names of what is added to the logits or to the keys."""
        return ("bias",) * self.bias + ("additional_keys",) * (self.extra > 0)


def find_neighborhoods(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: PerHead[int],
    stride: PerHead[int] = 1,
    dilation: PerHead[int] = 1,
    causal: PerHead[bool] = False,
    bias: Tensor | None = None,
    additional_keys: Tensor | None = None,
    grid: Sequence[int] | None = None,
    qk_dtype: torch.dtype | None = None,
    **_: Any,
) -> Neighborhoods:
    """The neighborhoods of a call; arguments as in `na2d`, others of which cost nothing or follow from these."""
    rank = 0 if grid is None else len(grid)
    query, key = (on_grid("query", x, rank, grid) for x in (query, key))
    neighborhood = {"window": window, "stride": stride, "dilation": dilation, "causal": causal}
    groups = head_groups(query.shape[1:-2], query.shape[-2], key.shape[-2], **neighborhood)
    extra = 0 if additional_keys is None else additional_keys.shape[1]
    return Neighborhoods(tuple(groups), extra, bias is not None, qk_dtype, grid)


def summarize(
    query: Tensor, key: Tensor, value: Tensor, neighborhoods: Neighborhoods, impl: str | None
) -> dict[str, int | float | str]:
    """The cost of one call by name.

    Extra keys count whether masked or not: a mask is data. Heads of several windows count one by one.
    """
    groups, extra, bias, qk_dtype, grid = neighborhoods
    rank = 0 if grid is None else len(grid)
    query, value = (on_grid("query", x, rank, grid) for x in (query, value))
    batch, *shape, heads, head_dim = query.shape
    tokens, pairs = prod(shape), sum(_pairs(group, extra) for group in groups)  # pairs of all heads
    summary: dict[str, int | float | str] = {
        "tokens": tokens,
        "keys_per_query": round(pairs / tokens / heads, 2),
        "dense_over_useful": round(heads * tokens * (tokens + extra) / pairs, 2),
    }
    counts = []
    for axes, members, key_heads in groups:
        sizes = {"batch": batch, "heads": _count(members), "head_dim": head_dim, "value_dim": value.shape[-1]}
        sizes |= {"extra": extra}
        operands = {"key_heads": _count(key_heads), "itemsize": query.itemsize, "bias": bias}
        flops = (forward_flops(axes, **sizes), backward_flops(axes, **sizes))
        counts.append((*flops, forward_bytes(axes, **sizes, **operands), backward_bytes(axes, **sizes, **operands)))
    names = ("forward_flops", "backward_flops", "forward_bytes", "backward_bytes")
    summary |= dict(zip(names, map(sum, zip(*counts, strict=True)), strict=True))
    e4m3 = False
    if qk_dtype is not None:
        why = quantized.obstacle(query) if impl == "triton" else f"impl is {impl}"
        e4m3, dtype = why is None, str(query.dtype).removeprefix("torch.")
        summary["query_key_products"] = "of e4m3 numbers" + ("" if e4m3 else f" restored to {dtype}: {why}")
    width, itemsize = max(head_dim, value.shape[-1]), 1 if e4m3 else query.itemsize
    known = {"device": query.device, "width": width, "itemsize": itemsize, "extra": extra, "gluon": impl == "gluon"}
    tiled = impl in ("triton", "gluon")
    if len(groups) == 1 and tiled:
        tiling = _tiling(groups[0].axes, **known)
        summary["forward_tiles"] = f"{tiling}: queries by keys, {tiling.visited:,} visited a head"
        summary["useful_pairs"] = f"{tiling.efficiency:.0%} of those computed"
        summary["unmasked_tiles"] = f"{tiling.interior_share:.0%} of those visited"
        summary["dense_over_visited"] = round(tiling.speedup_bound, 2)
    if len(groups) > 1:
        for group in groups:
            text = f"{_describe(group.axes)}, {_pairs(group, extra) / _count(group.heads) / tokens:,.6g} keys per query"
            if tiled:
                tiling = _tiling(group.axes, **known)
                text += f", tiles of {tiling}, {tiling.efficiency:.0%} of the computed pairs useful"
            summary[_name(group.heads)] = text
    return summary


def _count(heads: slice) -> int:
    return len(range(heads.start, heads.stop, heads.step))


def _pairs(group: HeadGroup, extra: int) -> int:
    """(query, key) pairs of one batch entry and the heads of a group."""
    return visible_pairs(group.axes, extra=extra) * _count(group.heads)


def _name(heads: slice) -> str:
    first, *_, last = [heads.start, *range(heads.start, heads.stop, heads.step)]
    if first == last:
        return f"head_{first}"
    return f"heads_{first}_to_{last}" + ("" if heads.step == 1 else f"_in_steps_of_{heads.step}")


def _describe(axes: tuple[Axis, ...]) -> str:
    """The neighborhood of heads in words, without what is as by default."""
    words = ["window " + "×".join(str(axis.window) for axis in axes)]
    for name in ("stride", "dilation"):
        values = [getattr(axis, name) for axis in axes]
        if any(n > 1 for n in values):
            words.append(f"{name} " + "×".join(map(str, values)))
    if any(axis.causal for axis in axes):
        words.append("causal on " + ", ".join(f"axis {i}" for i, axis in enumerate(axes) if axis.causal))
    return ", ".join(words)


def _tiling(axes: tuple[Axis, ...], *, device: torch.device, width: int, itemsize: int, extra: int, gluon: bool):
    """The tiles that the forward kernel visits."""
    from ..common.launching import device_class
    from . import configs, simulator

    config = configs.choose(
        "forward",
        axes,
        head_dim=width,
        itemsize=itemsize,
        device=device_class(device) if torch.cuda.is_available() else "hopper",
        descriptor=False,  # neither this nor the width of offsets changes the tile
        wide=False,
        sizes=configs.GLUON_SIZES[width] if gluon else None,
    )
    rows, columns = config.queries[-len(axes) :], config.keys[-len(axes) :]  # kernels see three axes
    return simulator.simulate(axes, rows, columns, extra=extra)
