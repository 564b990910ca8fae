"""Windows that differ between heads: heads of one geometry go through one call, as views of query, key and value."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.calling import is_per_head, per_axis
from .geometry import Axis, make_axes

KINDS: dict[str, type] = {"window": int, "stride": int, "dilation": int, "causal": bool}


class HeadGroup(NamedTuple):
    """Heads that one call attends with.

    Attributes:
        axes: their neighborhood.
        heads: which query heads they are.
        key_heads: the heads of key and value that these read.
    """

    axes: tuple[Axis, ...]
    heads: slice
    key_heads: slice


def per_head(name: str, value, heads: int, rank: int) -> list[tuple]:
    """`value` of each axis, from one value or one per axis: of all heads, one entry, or of each head."""
    if not is_per_head(value):
        return [per_axis(name, value, rank, KINDS[name])]
    if len(value) != heads:
        raise ValueError(f"{name}={value!r} has {len(value)} entries; expected one for each of {heads} heads")
    return [per_axis(f"{name}[{head}]", entry, rank, KINDS[name]) for head, entry in enumerate(value)]


def head_groups(shape: Sequence[int], heads: int, key_heads: int, **neighborhood) -> tuple[HeadGroup, ...]:
    """The calls that serve all heads, in the order of their first head.

    Args:
        shape: tokens along each spatial axis.
        heads, key_heads: of query, and of key and value.
        neighborhood: window, stride, dilation and causal, each one value, one per axis, or one of these per head.

    Raises:
        ValueError, TypeError: as `make_axes`; a number of entries that is not that of the heads.
    """
    if not any(map(is_per_head, neighborhood.values())):
        return (HeadGroup(make_axes(shape, **neighborhood), slice(0, heads, 1), slice(0, key_heads, 1)),)
    columns = [per_head(name, neighborhood[name], heads, len(shape)) for name in KINDS]
    columns = [column * heads if len(column) == 1 else column for column in columns]
    alike: dict[tuple, list[int]] = {}
    for head, geometry in enumerate(zip(*columns, strict=True)):
        alike.setdefault(geometry, []).append(head)
    groups = []
    for geometry, members in alike.items():
        axes = make_axes(shape, **dict(zip(KINDS, geometry, strict=True)))
        groups += [HeadGroup(axes, *slices) for slices in _views(members, heads // key_heads)]
    return tuple(sorted(groups, key=lambda group: group.heads.start))


def _views(members: list[int], shared: int) -> list[tuple[slice, slice]]:
    """Slices of query heads that together are `members`, and of the key heads that they read.

    `shared` query heads read a key head. Members at equal distances are one slice; where key heads are shared, those
    that read one key head, or consecutive whole sets of such.
    """
    found = []
    while members:
        step = members[1] - members[0] if shared == 1 and len(members) > 1 else 1
        count = 1
        while count < len(members) and members[count] == members[0] + count * step:
            count += 1
        first, key_head = members[0], members[0] // shared
        if first % shared or count < shared:
            count = min(count, (key_head + 1) * shared - first)
        else:
            count -= count % shared
        keys = slice(key_head, key_head + -(-count // shared) * step, step)
        found.append((slice(first, first + count * step, step), keys))
        members = members[count:]
    return found


def check_bias(windows: Sequence[Sequence[int]], query: Tensor, bias: Tensor) -> None:
    """Refuse bias tables that do not fit the windows of heads; all have the size of the largest window on an axis."""
    for window in windows:
        if any(w % 2 == 0 for w in window):
            raise ValueError(f"window={[*window]} must be odd on every axis when bias is given")
    expected = (query.shape[-2], *(2 * max(w) - 1 for w in zip(*windows, strict=True)))
    if tuple(bias.shape) != expected:
        raise ValueError(f"bias.shape={tuple(bias.shape)} must be [heads, 2 * window - 1 per axis] = {expected}")
    if not bias.dtype.is_floating_point or bias.device != query.device:
        raise ValueError(f"bias ({bias.dtype}, {bias.device}) must be floating point on query.device={query.device}")


def _select_bias(bias: Tensor, group: HeadGroup) -> Tensor:
    """The tables of a group: the middle, as large as its windows ask, of those of the largest window."""
    bias = bias[group.heads]
    for dim, axis in enumerate(group.axes, start=1):
        bias = bias.narrow(dim, bias.shape[dim] // 2 + 1 - axis.window, 2 * axis.window - 1)
    return bias


def _join(parts: Sequence[Tensor], groups: Sequence[HeadGroup], dim: int) -> Tensor:
    """One tensor of the results of all groups, whose heads lie on axis `dim`."""
    rows: dict[int, Tensor] = {}
    for part, (_, heads, _) in zip(parts, groups, strict=True):
        rows.update(zip(range(heads.start, heads.stop, heads.step), part.unbind(dim), strict=True))
    return torch.stack([rows[head] for head in range(len(rows))], dim)


def attend_groups(
    groups: Sequence[HeadGroup],
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Output and log-sum-exp of all heads from those of groups, which `attend(axes, query, key, value, bias=,
    additional_keys=, additional_values=)` makes."""
    if len(groups) == 1:
        extra = {"additional_keys": additional_keys, "additional_values": additional_values}
        return attend(groups[0].axes, query, key, value, bias=bias, **extra)
    outs, lses = [], []
    for group in groups:
        k, v, ek, ev = (
            None if x is None else x[..., group.key_heads, :] for x in (key, value, additional_keys, additional_values)
        )
        table = None if bias is None else _select_bias(bias, group)
        out, lse = attend(
            group.axes, query[..., group.heads, :], k, v, bias=table, additional_keys=ek, additional_values=ev
        )
        outs.append(out)
        lses.append(lse)
    return _join(outs, groups, -2), None if lses[0] is None else _join(lses, groups, -1)
