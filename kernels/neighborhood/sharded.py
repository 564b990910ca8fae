"""Neighborhood attention over several processes, each with a piece of one spatial axis.

A rank fetches the keys and values that its queries see, from however many neighbours hold them, and attends to them
with the windows of the whole grid; queries that see own tokens only are attended meanwhile. Gradients of what it
fetched go back to the owners, who add them in order of rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Required, Unpack, overload

import torch
import torch.distributed as dist
from torch import Tensor

from ..common.arguments import check_arguments
from ..common.calling import (
    Impl,
    Mask,
    PerHead,
    additional_visibility,
    check_additional,
    check_grids,
    is_integer,
    on_grid,
    wants_gradient,
)
from .api import SharedOptions, dispatch, na3d
from .call import neighborhood as operator
from .geometry import Axis
from .heads import KINDS, attend_groups, check_bias, head_groups, per_head
from .shards import Part, Shard, make_shards

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class Options(SharedOptions, total=False):
    """Keyword arguments of `sharded_neighborhood_attention` but for `return_lse`, for type checkers."""

    mesh: Required[DeviceMesh | ProcessGroup]
    axis: int
    lengths: Sequence[int] | None
    grid: Sequence[int] | None


@overload
def sharded_neighborhood_attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[False] = False, **options: Unpack[Options]
) -> Tensor: ...
@overload
def sharded_neighborhood_attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...
def sharded_neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mesh: DeviceMesh | ProcessGroup,
    axis: int = 0,
    lengths: Sequence[int] | None = None,
    grid: Sequence[int] | None = None,
    window: PerHead[int],
    stride: PerHead[int] = 1,
    dilation: PerHead[int] = 1,
    causal: PerHead[bool] = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    additional_mask: Mask | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`na1d`, `na2d` or `na3d` on a grid of which every rank holds a piece (sequence parallelism).

    The pieces, in order of rank, are consecutive along one spatial axis; they may differ in length, and windows may
    reach past a neighbour. Output and gradients are those of one process with the whole grid. Queries that see own
    tokens only are attended while keys, values and their gradients travel. Every rank of `mesh` must make the call, and
    its backward. `foveal.kernels.neighborhood.sharded_cost` counts what travels and what is computed meanwhile.

    Args:
        query: this rank's piece `[B, *spatial, heads, head_dim]`, one to three spatial axes.
        key, value: this rank's piece `[B, *spatial, key_heads, head_dim]` and `[…, value_dim]`.
        mesh: the ranks: a device mesh of one dimension (`mesh["sequence"]` of a larger one) or a process group.
        axis: which spatial axis is split, counted from 0.
        lengths: tokens of every rank's piece along it. When None the ranks tell each other, which makes the host wait,
            and compare their arguments, so that all of them refuse what does not fit. When given, nothing is compared:
            a call that differs between ranks hangs or fails in the communication.
        grid: tokens of this rank's piece along each spatial axis, for flat pieces `[B, tokens, heads, head_dim]`;
            outputs are flat then, too.
        window, stride, dilation, causal: of the whole grid, also per head; see `na2d`.
        bias, additional_keys, additional_values, additional_mask: as in `na2d`, the same on every rank. Their gradients
            are those of this rank's queries; the sum over ranks is that of one process.
        scale, return_lse, impl: as in `na2d`.

    Returns:
        output `[B, *spatial, heads, value_dim]` of this rank's queries; with `return_lse` a tuple of it and the
        log-sum-exp `[B, *spatial, heads]`, float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError, NotImplementedError: as `na2d`; a mesh that is not initialised or has more than one
            dimension; an axis that does not exist; arguments that differ between ranks.
    """
    group = _process_group(mesh)
    neighborhood = {"window": window, "stride": stride, "dilation": dilation, "causal": causal}
    extra = {
        "additional_keys": additional_keys,
        "additional_values": additional_values,
        "additional_mask": additional_mask,
    }
    given = {"bias": bias, "scale": scale, **extra, "impl": impl}
    if lengths is None:
        lengths = _agree(group, query, key, value, grid, axis, neighborhood, given)
    else:
        _describe(query, key, value, grid, axis, neighborhood, given)
        if not isinstance(lengths, Sequence) or not all(map(is_integer, lengths)):
            raise TypeError(f"lengths={lengths!r} must be a list or tuple of integers, one for each rank")
    query, key, value = _unflatten(query, key, value, grid)
    rank, lengths = dist.get_rank(group), tuple(lengths)
    if len(lengths) != dist.get_world_size(group) or lengths[rank] != query.shape[1 + axis]:
        raise ValueError(
            f"lengths={lengths} must hold one length for each of {dist.get_world_size(group)} ranks, and for rank "
            f"{rank} that of axis {axis} of query, {query.shape[1 + axis]}"
        )
    shape = [sum(lengths) if i == axis else n for i, n in enumerate(query.shape[1:-2])]
    groups = head_groups(shape, query.shape[-2], key.shape[-2], **neighborhood)
    rest = {"scale": scale, "additional_mask": additional_visibility(additional_mask, additional_keys), "impl": impl}

    def attend(axes: tuple[Axis, ...], query: Tensor, key: Tensor, value: Tensor, **tensors):
        if len(lengths) == 1:
            return dispatch(query, key, value, axes=axes, **tensors, **rest)
        shards = make_shards(axes[axis], lengths)

        def attend_part(part: Part, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            cut = (*axes[:axis], part.axis, *axes[axis + 1 :])
            return dispatch(query, key, value, axes=cut, **tensors, **rest)

        if not any(shard.border for shard in shards):  # windows end where pieces do, and no token travels
            return attend_part(shards[rank].parts[0], query, key, value)
        return _attend_parts(query, key, value, dim=1 + axis, shard=shards[rank], group=group, attend=attend_part)

    out, lse = attend_groups(groups, attend, query, key, value, bias, additional_keys, additional_values)
    if grid is not None:
        out, lse = out.flatten(1, len(grid)), None if lse is None else lse.flatten(1, len(grid))
    return out if lse is None or not return_lse else (out, lse)


def _attend_parts(
    query: Tensor, key: Tensor, value: Tensor, *, dim: int, shard: Shard, group: ProcessGroup, attend: Callable
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a rank's queries, those of the interior while the others' keys travel."""
    from .exchange import Pack, Wait, send

    parts, interior = shard.parts, shard.interior
    queries = query.split([last - first for first, last in (part.queries for part in parts)], dim)
    outgoing, *own = Pack.apply(key, value, shard, dim)
    incoming = send(outgoing.detach(), shard.sent, shard.receive, group)
    keys, values = own[::2], own[1::2]
    meanwhile = ()
    if interior is not None:
        meanwhile = attend(parts[interior], queries[interior], keys[interior], values[interior])
    border = [i for i in range(len(parts)) if i != interior]
    waiting = [x for i in border for x in (keys[i], values[i])]
    widths = (key.shape[-1], value.shape[-1])
    arrived = Wait.apply(shard, dim, widths, group, outgoing, incoming, *waiting, *meanwhile)
    results = [attend(parts[i], queries[i], *arrived[2 * n : 2 * n + 2]) for n, i in enumerate(border)]
    if interior is not None:
        results.insert(interior, arrived[-2:])
    outs, lses = zip(*results, strict=True)
    return (outs[0], lses[0]) if len(parts) == 1 else (torch.cat(outs, dim), torch.cat(lses, dim))


def _process_group(mesh: DeviceMesh | ProcessGroup) -> ProcessGroup:
    from torch.distributed.device_mesh import DeviceMesh

    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("mesh must belong to torch.distributed after init_process_group, which was not called")
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ValueError(f"mesh={mesh} must have one dimension; take one of a larger mesh by its name")
        return mesh.get_group()
    if not isinstance(mesh, dist.ProcessGroup):
        raise TypeError(f"mesh must be a DeviceMesh or a ProcessGroup, got {type(mesh).__name__}")
    return mesh


def _unflatten(query: Tensor, key: Tensor, value: Tensor, grid: Sequence[int] | None) -> list[Tensor]:
    """The three on the grid of this rank's piece."""
    rank = len(grid) if isinstance(grid, Sequence) else 0
    return [on_grid(name, x, rank, grid) for name, x in (("query", query), ("key", key), ("value", value))]


def _describe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: Sequence[int] | None,
    axis: int,
    neighborhood: dict,
    rest: dict,
) -> dict:
    """Facts that must be the same on every rank, by name, of arguments that one rank can take."""
    check_arguments(na3d, query, key, value, **neighborhood, **rest)
    query, key, value = _unflatten(query, key, value, grid)
    rank = query.dim() - 3
    if not 1 <= rank <= 3:
        raise ValueError(f"query has shape {tuple(query.shape)}; expected [B, 1 to 3 spatial axes, heads, head_dim]")
    check_grids(rank, query, key, value)
    if not isinstance(axis, int) or not 0 <= axis < rank:
        raise ValueError(f"axis={axis!r} must be one of the spatial axes 0 to {rank - 1}")
    spread = {name: per_head(name, neighborhood[name], query.shape[-2], rank) for name in KINDS}
    same = {name: values[0] if len(values) == 1 else values for name, values in spread.items()}
    tensors = {"query": query, "key": key, "value": value}
    if rest["bias"] is not None:
        check_bias(spread["window"], query, rest["bias"])
    check_additional(key, value, rest["additional_keys"], rest["additional_values"])
    additional_visibility(rest["additional_mask"], rest["additional_keys"])
    names = ("bias", "additional_keys", "additional_values", "additional_mask")
    tensors |= {name: rest[name] for name in names if rest[name] is not None}
    operator.select_impl(query, key, value, None, rest["impl"])
    shapes = {}
    for name, x in tensors.items():
        split = 1 + axis if name in ("query", "key", "value") else None
        shapes[name] = (str(x.dtype), *("split" if i == split else n for i, n in enumerate(x.shape)))
    scale = None if rest["scale"] is None else float(rest["scale"])
    trains = wants_gradient(key, value)
    return {"axis": axis, **same, **shapes, "scale": scale, "whether key or value requires a gradient": trains}


def _agree(
    group: ProcessGroup,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: Sequence[int] | None,
    axis: int,
    neighborhood,
    rest,
) -> list[int]:
    """The lengths of all pieces. If any rank refuses its arguments, or they differ, every rank raises."""
    mine: dict = {"length": 0, "error": None, "same": {}}
    error = None
    try:
        mine["same"] = _describe(query, key, value, grid, axis, neighborhood, rest)
        mine["length"] = query.shape[1 + axis] if grid is None else grid[axis]
    except (TypeError, ValueError, NotImplementedError) as refused:
        error, mine["error"] = refused, str(refused)
    ranks: list[dict] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(ranks, mine, group=group)
    if error is not None:
        raise error
    for rank, other in enumerate(ranks):
        if other["error"] is not None:
            raise ValueError(f"rank {rank} of mesh refuses its arguments: {other['error']}")
    for name in {name: None for other in ranks for name in other["same"]}:
        values = [other["same"].get(name) for other in ranks]
        if any(x != values[0] for x in values):
            raise ValueError(f"{name} must be the same on every rank of mesh, got {values}")
    return [other["length"] for other in ranks]
