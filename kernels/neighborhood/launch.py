"""Launches of the neighborhood kernels; imported, and triton with it, when a kernel first runs."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from ..common.launching import (
    Vectors,
    aligned,
    cdiv,
    device_class,
    has_descriptors,
    kernel_strides,
    needs_wide,
    padded,
    precision,
    tile_strides,
    unspecialised,
    vectors,
    with_scratch,
)
from . import configs
from .backward import extra_kernel, key_kernel, query_kernel, table_kernel
from .call import NeighborhoodCall
from .forward import forward_kernel
from .geometry import Axis, query_count, query_range

# The gradient of extra keys, which walks all tokens: programs to aim for, enough to fill any device several times over,
# and the fewest queries that one takes.
PROGRAMS = 4096
MIN_CHUNK = 256
PAIR_BYTES = 128 * 2**20  # that the gradient of a relative position table takes; launches are cut to it
TABLE_ENTRIES = 32  # of a table, that a program sums at a time


def window_constants(axes: tuple[Axis, ...]) -> dict:
    """Compile-time arguments that describe the windows."""
    return dict(
        WINDOW=padded([a.window for a in axes], 1),
        STRIDE=padded([a.stride for a in axes], 1),
        DILATION=padded([a.dilation for a in axes], 1),
        CAUSAL=padded([a.causal for a in axes], False),
        PART=is_part(axes),
    )


def is_part(axes: tuple[Axis, ...]) -> bool:
    """Return whether queries are a subset of the grid."""
    return any(a.queries is not None for a in axes)


@lru_cache(maxsize=1024)
def grids(axes: tuple[Axis, ...]) -> tuple:
    """Lengths of the grid, and of the queries where they are a part of it the start and the lengths."""
    lengths = unspecialised(padded([a.length for a in axes], 1))
    if not is_part(axes):
        return lengths, None, None
    start, counts = padded([query_range(a)[0] for a in axes], 0), padded([query_count(a) for a in axes], 1)
    return lengths, unspecialised(start), unspecialised(counts)


@lru_cache(maxsize=1024)
def constants(axes: tuple[Axis, ...], config: configs.Config, held: Vectors, precision: str) -> dict:
    """Compile-time arguments of the kernels that walk windows."""
    return dict(
        **held._asdict(),
        **window_constants(axes),
        QUERIES=config.queries,
        KEYS=config.keys,
        TABLE=table_lengths(axes, config),
        INNER=config.inner,
        BORDER=config.border,
        DESCRIPTOR=config.descriptor,
        WIDE=config.wide,
        PRECISION=precision,
        STAGES=config.stages,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def table_lengths(axes: tuple[Axis, ...], config: configs.Config) -> tuple[int, int, int]:
    """Lengths of the bias table widened by zeros: every pair of a visited tile has its entry, whether seen or not.

    A tile of columns reaches less than itself and a tile of rows further than windows do.
    """
    x, y, z = (
        2 * (window + queries + keys) - 5
        for window, queries, keys in zip(padded([a.window for a in axes], 1), config.queries, config.keys, strict=True)
    )
    return x, y, z


def widen(bias: Tensor, lengths: tuple[int, int, int]) -> Tensor:
    """The relative position table `[heads, …]` in the middle of zeros of `table_lengths`."""
    margins = [(n - old) // 2 for n, old in zip(reversed(lengths), reversed(bias.shape[1:]), strict=False)]
    return torch.nn.functional.pad(bias, [m for margin in margins for m in (margin, margin)]).contiguous()


@lru_cache(maxsize=1024)
def table_constants(axes: tuple[Axis, ...], queries: tuple[int, int, int]) -> dict:
    """Compile-time arguments of the kernel that sums the pairs of tiles of `queries` by table entry."""
    fixed = window_constants(axes)
    _, y, z = (1 << (n - 1).bit_length() for n in fixed["WINDOW"])
    last = min(TABLE_ENTRIES, z)
    return dict(
        **fixed,
        QUERIES=queries,
        ENTRIES=(min(TABLE_ENTRIES // last, y), last),
        num_warps=max(1, prod(queries) // 32),
    )


def extra_constants(size: configs.Size, held: Vectors, precision: str) -> dict:
    """Compile-time arguments of the kernel of the gradients of extra keys."""
    return dict(
        **held._asdict(),
        QUERIES=size.queries,
        EXTRA_KEYS=size.keys,
        PRECISION=precision,
        STAGES=size.stages,
        num_warps=size.warps,
    )


@lru_cache(maxsize=1024)
def programs(axes: tuple[Axis, ...], tile: tuple[int, ...], batch_heads: int, *, keys: bool = False) -> int:
    """Programs of a kernel whose rows, queries or `keys`, are tiled by `tile`: tiles of the longest dilation group, for
    every group."""
    tiles = prod(
        [
            a.dilation * cdiv(cdiv(a.length if keys else query_count(a), a.dilation), t)
            for a, t in zip(axes, tile[3 - len(axes) :], strict=True)
        ]
    )
    return tiles * batch_heads


def configure(
    kernel: configs.Kernel,
    axes: tuple[Axis, ...],
    walked: tuple[Tensor, ...],
    tensors: tuple[Tensor, ...],
    pairs: bool = False,
) -> configs.Config:
    """Launch parameters of a kernel that walks tiles of `walked`; `tensors` are all that it addresses."""
    config = configs.choose(
        kernel,
        axes,
        head_dim=max(x.shape[-1] for x in walked),
        itemsize=walked[0].element_size(),
        device=device_class(walked[0].device),
        descriptor=has_descriptors(walked[0].device),
        wide=needs_wide(*tensors),
        pairs=pairs,
    )
    return config._replace(descriptor=config.descriptor and aligned(*walked))


def extra_arguments(
    query: Tensor, additional_keys: Tensor | None, additional_values: Tensor | None, additional_mask: Tensor | None
) -> tuple:
    """Extra keys and values with their strides, which are visible, and where these end, as kernels take them."""
    k, v = (
        (query, query) if additional_keys is None or additional_values is None else (additional_keys, additional_values)
    )
    pair = (k, kernel_strides(k, k.stride()[:4]), v, kernel_strides(v, v.stride()[:4]))
    if additional_mask is None:
        return *pair, None, None
    place = torch.arange(1, additional_mask.shape[1] + 1, dtype=torch.int32, device=additional_mask.device)
    ends = (
        torch.where(additional_mask, place, 0).amax(1) if place.numel() else additional_mask.sum(1, dtype=torch.int32)
    )
    return *pair, additional_mask.contiguous().view(torch.uint8), ends


def extra_block(query: Tensor, additional_keys: Tensor | None, value_dim: int) -> int:
    """Additional keys of an iteration; see `configs.extra_block`."""
    extra, width = 0 if additional_keys is None else additional_keys.shape[1], max(query.shape[-1], value_dim)
    return configs.extra_block(extra, width, query.element_size(), device_class(query.device))


@with_scratch
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: NeighborhoodCall,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output `[B, *spatial, heads, value dim]` and float32 log-sum-exp `[B, *spatial, heads]`.

    With a `factor`, float32 `[B, heads]`, query, key and extra key are e4m3 numbers whose products it multiplies.
    """
    axes, scale, bias = call.axes, call.scale, call.bias
    additional_keys, additional_values, additional_mask = call.additional
    rank, (batch, heads), widths = len(axes), (query.shape[0], query.shape[-2]), (key.shape[-1], value.shape[-1])
    out = torch.empty(*query.shape[:-1], widths[1], dtype=value.dtype, device=query.device)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    if batch == 0:
        return out, lse
    config = configure("forward", axes, (key, value), (query, key, value, out))
    held = configs.held(*widths, "forward", device_class(query.device), eight_bits=factor is not None)
    fixed = constants(axes, config, held, precision(query))
    with torch.cuda.device_of(query):
        forward_kernel[(programs(axes, config.queries, batch * heads),)](
            query,
            tile_strides(query, rank),
            key,
            tile_strides(key, rank),
            value,
            tile_strides(value, rank),
            out,
            tile_strides(out, rank),
            lse,
            factor,
            bias if bias is None else widen(bias, fixed["TABLE"]),
            *extra_arguments(query, additional_keys, additional_values, additional_mask),
            *grids(axes),
            heads,
            0 if additional_keys is None else additional_keys.shape[1],
            scale,
            GROUP=heads // key.shape[-2],
            EXTRA_KEYS=extra_block(query, additional_keys, widths[1]),
            QUANTIZED=factor is not None,
            BIAS=bias is not None,
            EXTRA=additional_keys is not None,
            EXTRA_MASK=additional_mask is not None,
            **fixed,
        )
    return out, lse


@with_scratch
def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    call: NeighborhoodCall,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, bias and additional keys and values, contiguous; None where not given."""
    (out, lse), (grad_out, grad_lse) = outputs, gradients
    axes, scale, bias = call.axes, call.scale, call.bias
    additional_keys, additional_values, additional_mask = call.additional
    rank, (batch, heads), key_heads = len(axes), (query.shape[0], query.shape[-2]), key.shape[-2]
    widths, device = (key.shape[-1], value.shape[-1]), query.device
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=device) for x in (query, key, value))
    if batch == 0:
        rest = (None if x is None else x.new_zeros(x.shape) for x in (bias, additional_keys, additional_values))
        return dq, dk, dv, *rest
    out, lse, grad_lse = out.contiguous(), lse.contiguous(), grad_lse.contiguous()  # as the kernels take them
    delta = torch.empty_like(lse)
    extra = 0 if additional_keys is None else additional_keys.shape[1]
    extras = extra_arguments(query, additional_keys, additional_values, additional_mask)
    alike = widths[0] == widths[1]  # then dQ has the strides of out, and dV those of dK
    group = heads // key_heads
    q, k, v, do = ((x, tile_strides(x, rank)) for x in (query, key, value, grad_out))
    with torch.cuda.device_of(query):
        pairs = bias is not None and wanted[0]
        config = configure("query", axes, (key, value), (query, key, value, grad_out, dq), pairs)
        held = configs.held(*widths, "query", device_class(device))
        fixed = constants(axes, config, held, precision(query))
        wide_bias = bias if bias is None else widen(bias, fixed["TABLE"])

        def launch_query(count: int, skip: int = 0, stored: Tensor | None = None):
            query_kernel[(count,)](
                *q,
                *k,
                *v,
                out,
                tile_strides(out, rank),
                *do,
                lse,
                grad_lse,
                delta,
                dq,
                None if alike else tile_strides(dq, rank),
                wide_bias,
                stored,
                *extras,
                *grids(axes),
                skip,
                heads,
                extra,
                scale,
                GROUP=group,
                EXTRA_KEYS=extra_block(query, additional_keys, widths[1]),
                BIAS=bias is not None,
                EXTRA=additional_keys is not None,
                EXTRA_MASK=additional_mask is not None,
                DBIAS=pairs,
                **fixed,
            )

        dbias, tiles = None, programs(axes, config.queries, 1)
        if bias is not None and pairs:
            dbias = table_gradient(launch_query, axes, bias, batch, tiles, config.queries)
        else:
            launch_query(tiles * batch * heads)
        _launch_keys(q, k, v, do, lse, delta, dk, dv, call)
        dek, dev = (None, None)
        if extra and any(wanted[1:]):
            dek, dev = extra_gradient(
                q, do, lse, delta, additional_keys, additional_values, axes, scale, additional_mask
            )
    if additional_keys is not None and not extra:
        dek, dev = torch.empty_like(additional_keys), torch.empty_like(additional_values)
    return dq, dk, dv, dbias, dek, dev


def _launch_keys(q, k, v, do, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor, call: NeighborhoodCall) -> None:
    """Fill dk and dv; `q`, `k`, `v` and `do` are tensors with their strides."""
    (query, _), (grad_out, _), axes, bias = q, do, call.axes, call.bias
    key_heads = dk.shape[-2]
    config = configure("key", axes, (query, grad_out), (query, k[0], v[0], grad_out, dk))
    if any(query_count(a) < a.dilation for a in axes):  # no descriptor of a dilation group without queries
        config = config._replace(descriptor=False)
    held = configs.held(dk.shape[-1], dv.shape[-1], "key", device_class(query.device))
    fixed = constants(axes, config, held, precision(query))
    key_kernel[(programs(axes, config.keys, query.shape[0] * key_heads, keys=True),)](
        *q,
        *k,
        *v,
        *do,
        lse,
        delta,
        dk,
        dv,
        tile_strides(dk, len(axes)),
        None if dk.shape[-1] == dv.shape[-1] else tile_strides(dv, len(axes)),
        bias if bias is None else widen(bias, fixed["TABLE"]),
        *grids(axes),
        key_heads,
        call.scale,
        GROUP=query.shape[-2] // key_heads,
        BIAS=bias is not None,
        **fixed,
    )


def table_gradient(
    launch: Callable, axes: tuple[Axis, ...], bias: Tensor, batch: int, tiles: int, queries: tuple[int, int, int]
) -> Tensor:
    """Gradient of the relative position table, summed in a fixed order over programs, then heads, then batch entries.

    Args:
        launch: launches `count` programs of the query's gradient after `skip` others, which store `pairs`.
        axes: the neighborhood.
        bias: the table `[heads, …]`.
        batch: number of batch entries.
        tiles: programs per head of a batch entry.
        queries: tile of queries of a program.
    """
    heads, entries = bias.shape[0], prod(bias.shape[1:])
    stored = prod(queries) * prod(a.window for a in axes)
    most = max(1, PAIR_BYTES // (4 * (stored + entries)))  # programs of a launch
    at_once, step = max(1, most // tiles), min(tiles, most)  # heads, and tiles of one head where all are too many
    fixed = table_constants(axes, queries)
    total = torch.zeros(batch * heads, entries, dtype=torch.float32, device=bias.device)
    pairs = torch.empty(min(at_once, len(total)) * step, stored, dtype=torch.float32, device=bias.device)
    for first in range(0, len(total), at_once):
        sums = total[first : first + at_once]
        for tile in range(0, tiles, step):
            count, skip = len(sums) * min(step, tiles - tile), first * tiles + tile
            launch(count, skip, pairs)
            partial = torch.zeros(count, entries, dtype=torch.float32, device=bias.device)
            table_kernel[(count,)](pairs, partial, *grids(axes), skip, heads, **fixed)
            sums += partial.view(len(sums), -1, entries).sum(1)
    return total.view(batch, *bias.shape).sum(0).to(bias.dtype)


def extra_gradient(
    q,
    do,
    lse,
    delta,
    additional_keys: Tensor,
    additional_values: Tensor,
    axes: tuple[Axis, ...],
    scale: float,
    additional_mask: Tensor | None = None,
):
    """Gradients of the extra keys and values: partial sums of chunks of queries, added by torch in a fixed order."""
    query, (batch, extra, key_heads, head_dim) = q[0], additional_keys.shape
    tokens = prod(map(query_count, axes))
    widths = head_dim, additional_values.shape[-1]
    device = device_class(query.device)
    size = configs.extra_gradient_size(extra, max(widths), query.element_size(), device)
    blocks = cdiv(extra, size.keys) * key_heads * batch
    chunk = max(MIN_CHUNK, cdiv(tokens, cdiv(PROGRAMS, blocks)))
    chunks = cdiv(tokens, chunk)
    dk = torch.empty(chunks, *additional_keys.shape, dtype=torch.float32, device=query.device)
    dv = torch.empty(chunks, *additional_values.shape, dtype=torch.float32, device=query.device)
    extra_kernel[(chunks * blocks,)](
        *q,
        *do,
        lse,
        delta,
        *extra_arguments(query, additional_keys, additional_values, additional_mask),
        dk,
        dv,
        unspecialised(padded([query_count(a) for a in axes], 1)),
        batch,
        key_heads,
        extra,
        chunk,
        scale,
        GROUP=query.shape[-2] // key_heads,
        EXTRA_MASK=additional_mask is not None,
        **extra_constants(size, vectors(*widths, device), precision(query)),
    )
    return dk.sum(0).to(additional_keys.dtype), dv.sum(0).to(additional_values.dtype)
