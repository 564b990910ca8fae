"""Launch of the Gluon forward; imported, and Triton's Gluon with it, when it first runs.

Output and log-sum-exp are laid out as the Triton kernels leave them, so the gradients are those of `launch.backward`.
"""

import torch
from torch import Tensor

from ..common.launching import aligned, grid_strides, needs_wide, with_scratch
from . import configs
from .call import NeighborhoodCall
from .geometry import Axis
from .gluon_forward import CONSUMERS, ROWS, forward_kernel
from .launch import backward, grids, programs, window_constants

__all__ = ["backward", "forward"]


def configure(axes: tuple[Axis, ...], head_dim: int, *, wide: bool) -> configs.Config:
    """Launch parameters of the kernel.

    Raises:
        ValueError: a size is forced that the two consumers do not have.
    """
    known = dict(head_dim=head_dim, itemsize=2, device="hopper", descriptor=True, wide=wide)
    config = configs.choose("forward", axes, **known, sizes=configs.GLUON_SIZES[head_dim])
    queries, keys = config.queries, config.keys
    if (count := queries[0] * queries[1] * queries[2]) != CONSUMERS.value * ROWS.value:
        raise ValueError(f"size.queries={count} must be {CONSUMERS.value * ROWS.value} with impl='gluon'")
    if (count := keys[0] * keys[1] * keys[2]) not in (64, 128):
        raise ValueError(f"size.keys={count} must be 64 or 128 with impl='gluon'")
    if config.stages < 2:  # the keys of the next tile arrive before the values of the last are released
        raise ValueError(f"stages={config.stages} must be at least 2 with impl='gluon'")
    return config


def share(queries: tuple[int, int, int]) -> tuple[int, int, int]:
    """The box of queries of a consumer: half of a program's, along the first axis that can be halved."""
    x, y, z = queries
    return (x // 2, y, z) if x > 1 else (x, y // 2, z) if y > 1 else (x, y, z // 2)


def constants(axes: tuple[Axis, ...], config: configs.Config, head_dim: int) -> dict:
    """Compile-time arguments of the kernel."""
    return dict(
        window_constants(axes),
        D=head_dim,
        QUERIES=config.queries,
        SHARE=share(config.queries),
        KEYS=config.keys,
        INNER=config.inner,
        BORDER=config.border,
        WIDE=config.wide,
        STAGES=config.stages,
        num_warps=4,
    )


@with_scratch
def forward(query: Tensor, key: Tensor, value: Tensor, call: NeighborhoodCall) -> tuple[Tensor, Tensor]:
    """Output `[B, *spatial, heads, head_dim]` and float32 log-sum-exp `[B, *spatial, heads]`.

    Raises:
        NotImplementedError: a tensor that does not begin at a multiple of 16 bytes.
    """
    axes, rank, (batch, heads), head_dim = call.axes, len(call.axes), (query.shape[0], query.shape[-2]), query.shape[-1]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    if batch == 0:
        return out, lse
    if not aligned(query, key, value):
        raise NotImplementedError("impl='gluon' cannot take this call: a tensor begins between multiples of 16 bytes")
    config = configure(axes, head_dim, wide=needs_wide(query, key, value, out))
    with torch.cuda.device_of(query):
        forward_kernel[(programs(axes, config.queries, batch * heads),)](
            query,
            grid_strides(query, rank),
            key,
            grid_strides(key, rank),
            value,
            grid_strides(value, rank),
            out,
            grid_strides(out, rank),
            lse,
            *grids(axes),
            heads,
            call.scale,
            GROUP=heads // key.shape[-2],
            **constants(axes, config, head_dim),
        )
    return out, lse
