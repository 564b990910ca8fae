"""Launches of the window kernels; imported, and triton with it, when a kernel first runs."""

from math import prod

import torch
from torch import Tensor

from ..common.launching import cdiv, device_class, grid_strides, needs_wide, padded, precision, width_constants
from . import configs
from .backward import bias_kernel, key_kernel, query_kernel, window_kernel
from .forward import forward_kernel
from .geometry import Axis

PROGRAMS = 2048  # of a kernel that sums over windows: enough to fill any device several times over


def constants(
    axes: tuple[Axis, ...], config: configs.Config, head_dim: int, value_dim: int, precision: str
) -> dict:  # fmt: skip
    """Compile-time arguments that all kernels share."""
    return dict(
        **width_constants(head_dim, value_dim),
        WINDOW=padded([a.window for a in axes], 1),
        SHIFT=padded([a.shift for a in axes], 0),
        HALO=padded([a.halo for a in axes], 0),
        MARGIN=padded([a.margin for a in axes], 0),
        PACK=config.pack,
        QUERIES=config.queries,
        KEYS=config.keys,
        WIDE=config.wide,
        PRECISION=precision,
        num_warps=config.warps,
        num_stages=config.stages,
    )


class _Call:
    """What the launches of one call share."""

    def __init__(self, query: Tensor, value: Tensor, axes: tuple[Axis, ...], tensors: tuple[Tensor, ...]):
        self.axes, self.rank = axes, len(axes)
        self.batch, self.heads, self.head_dim = query.shape[0], *query.shape[-2:]
        self.key_heads, self.value_dim = value.shape[-2:]
        self.lengths = padded([a.length for a in axes], 1)
        self.windows, self.tokens = prod(a.windows for a in axes), prod(a.window for a in axes)
        self.wide, self.precision = needs_wide(*tensors), precision(query)
        longer = max(self.head_dim, self.value_dim)
        self.size = dict(head_dim=longer, itemsize=query.element_size(), device=device_class(query.device))

    def configure(self, kernel: configs.Kernel) -> tuple[configs.Config, dict]:
        config = configs.choose(kernel, self.axes, **self.size, wide=self.wide)
        group = self.heads // self.key_heads
        fixed = constants(self.axes, config, self.head_dim, self.value_dim, self.precision)
        return config, dict(fixed, GROUP=group)

    def query_programs(self, config: configs.Config) -> int:
        blocks = cdiv(self.tokens, config.queries)
        return cdiv(self.windows, config.pack) * blocks * self.heads * self.batch

    def strided(self, *tensors: Tensor) -> list:
        return [x for tensor in tensors for x in (tensor, grid_strides(tensor, self.rank))]

    def gradients(self, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[list, list]:
        """dQ, and dK and dV, with their strides: None for those that are the strides of out and of dK."""
        if self.head_dim == self.value_dim:
            return [dq, None], [*self.strided(dk), dv, None]
        return self.strided(dq), self.strided(dk, dv)


def forward(
    query: Tensor, key: Tensor, value: Tensor, *, bias: Tensor | None, axes: tuple[Axis, ...], scale: float
) -> tuple[Tensor, Tensor]:
    """Output `[B, *spatial, heads, value_dim]` and float32 log-sum-exp `[B, *spatial, heads]`."""
    out = torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    if query.shape[0] == 0:
        return out, lse
    call = _Call(query, value, axes, (query, key, value, out))
    config, fixed = call.configure("forward")
    table = bias if bias is None else bias.contiguous()
    with torch.cuda.device_of(query):
        forward_kernel[(call.query_programs(config),)](
            *call.strided(query, key, value, out, lse),
            table,
            call.lengths,
            call.heads,
            scale,
            BIAS=bias is not None,
            **fixed,
        )
    return out, lse


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    *,
    bias: Tensor | None,
    axes: tuple[Axis, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and bias, contiguous; None for a bias that is not given."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    if query.shape[0] == 0:
        return dq, dk, dv, None if bias is None else bias.new_zeros(bias.shape)
    call = _Call(query, value, axes, (query, key, value, out, grad_out, grad_lse, dq, dk, dv))
    out, lse = out.contiguous(), lse.contiguous()  # dQ and delta have their strides
    for_query, for_keys = call.gradients(dq, dk, dv)
    table, delta = bias if bias is None else bias.contiguous(), torch.empty_like(lse)
    rest = (table, call.lengths)
    saved = call.strided(query, key, value, out, grad_out, lse, grad_lse)
    partial = None
    with torch.cuda.device_of(query):
        if configs.in_one_pass(axes, **call.size):
            config, fixed = call.configure("window")
            packs = cdiv(call.windows, config.pack) * call.batch
            summed = bias is not None and call.heads == call.key_heads and configs.sums_bias(config)
            chunk = cdiv(packs * call.heads, PROGRAMS) if summed else 1
            chunks = cdiv(packs, chunk)
            if summed:
                partial = torch.empty(chunks * config.pack, *table.shape, dtype=torch.float32, device=query.device)
            window_kernel[(chunks * call.key_heads,)](
                *saved,
                delta,
                *for_query,
                *for_keys,
                table,
                partial,
                call.lengths,
                call.batch,
                call.key_heads,
                chunk,
                scale,
                BIAS=bias is not None,
                DBIAS=summed,
                **fixed,
            )
        else:
            config, fixed = call.configure("query")
            query_kernel[(call.query_programs(config),)](
                *saved, delta, *for_query, *rest, call.heads, scale, BIAS=bias is not None, **fixed
            )
            config, fixed = call.configure("key")
            cells = prod(a.windows + 2 * cdiv(a.margin, a.window) for a in axes)
            blocks = cdiv(call.tokens, config.keys)
            key_kernel[(cells * blocks * call.key_heads * call.batch,)](
                *call.strided(query, key, value, grad_out),
                lse,
                *call.strided(delta),
                *for_keys,
                *rest,
                call.key_heads,
                scale,
                BIAS=bias is not None,
                **fixed,
            )
        if bias is not None and partial is None:
            partial = _bias_partials(call, query, key, value, grad_out, lse, delta, table, scale)
    return dq, dk, dv, None if bias is None or partial is None else partial.sum(0).to(bias.dtype)


def _bias_partials(call: _Call, query, key, value, grad_out, lse, delta, table, scale) -> Tensor:
    """Gradients of the bias, summed over chunks of windows: `[chunks, heads, window tokens, key tokens]`."""
    config, fixed = call.configure("bias")
    blocks = cdiv(table.shape[1], config.queries) * cdiv(table.shape[2], config.keys)
    steps = call.windows * call.batch
    chunk = cdiv(steps * blocks * call.heads, PROGRAMS)
    chunks = cdiv(steps, chunk)
    partial = torch.empty(chunks, *table.shape, dtype=torch.float32, device=query.device)
    bias_kernel[(chunks * call.heads * blocks,)](
        *call.strided(query, key, value, grad_out),
        lse,
        *call.strided(delta),
        table,
        partial,
        call.lengths,
        call.batch,
        call.heads,
        chunk,
        scale,
        **fixed,
    )
    return partial
