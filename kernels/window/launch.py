"""Launches of the window kernels; imported, and triton with it, when a kernel first runs."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ..common.launching import cdiv, device_class, needs_wide, padded, precision, tile_strides, width_constants
from . import configs
from .backward import bias_kernel, key_kernel, query_kernel, window_kernel
from .call import WindowCall
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


class _Launches:
    """Sizes of one call, and arguments that its launches share."""

    def __init__(self, query: Tensor, value: Tensor, call: WindowCall, tensors: tuple[Tensor, ...]):
        self.axes, self.rank, self.scale = (axes := call.axes), len(axes), call.scale
        self.table = None if call.bias is None else call.bias.contiguous()
        self.batch, self.heads, self.head_dim = query.shape[0], *query.shape[-2:]
        self.key_heads, self.value_dim = value.shape[-2:]
        self.lengths = padded([a.length for a in axes], 1)
        self.windows, self.tokens = prod([a.windows for a in axes]), prod([a.window for a in axes])
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
        return [x for tensor in tensors for x in (tensor, tile_strides(tensor, self.rank))]

    def gradients(self, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[list, list]:
        """dQ, and dK and dV, with their strides: None for those that are the strides of out and of dK."""
        if self.head_dim == self.value_dim:
            return [dq, None], [*self.strided(dk), dv, None]
        return self.strided(dq), self.strided(dk, dv)


def forward(query: Tensor, key: Tensor, value: Tensor, call: WindowCall) -> tuple[Tensor, Tensor]:
    """Output `[B, *spatial, heads, value_dim]` and float32 log-sum-exp `[B, *spatial, heads]`."""
    out = torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    if query.shape[0] == 0:
        return out, lse
    this = _Launches(query, value, call, (query, key, value, out))
    config, fixed = this.configure("forward")
    with torch.cuda.device_of(query):
        forward_kernel[(this.query_programs(config),)](
            *this.strided(query, key, value, out, lse),
            *(this.table, this.lengths, this.heads, this.scale),
            BIAS=call.bias is not None,
            **fixed,
        )
    return out, lse


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    call: WindowCall,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value and bias, contiguous; None for a bias without."""
    (out, lse), (grad_out, grad_lse) = outputs, gradients
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    bias, wants_bias = call.bias, call.bias is not None and wanted[0]
    if query.shape[0] == 0:
        return dq, dk, dv, None if bias is None else bias.new_zeros(bias.shape)
    this = _Launches(query, value, call, (query, key, value, out, grad_out, grad_lse, dq, dk, dv))
    out, lse = out.contiguous(), lse.contiguous()  # dQ and delta have their strides
    for_query, for_keys = this.gradients(dq, dk, dv)
    delta, table = torch.empty_like(lse), (this.table, this.lengths)
    saved = this.strided(query, key, value, out, grad_out, lse, grad_lse)
    shared, partial = dict(BIAS=bias is not None), None
    with torch.cuda.device_of(query):
        if configs.in_one_pass(call.axes, **this.size):
            config, fixed = this.configure("window")
            packs = cdiv(this.windows, config.pack) * this.batch
            summed = wants_bias and this.heads == this.key_heads and configs.sums_bias(config)
            chunk = cdiv(packs * this.heads, PROGRAMS) if summed else 1
            chunks = cdiv(packs, chunk)
            if summed:
                partial = torch.empty(chunks * config.pack, *bias.shape, dtype=torch.float32, device=query.device)
            tensors = (*saved, delta, *for_query, *for_keys, this.table, partial, this.lengths)
            sizes = (this.batch, this.key_heads, chunk, this.scale)
            window_kernel[(chunks * this.key_heads,)](*tensors, *sizes, **shared, DBIAS=summed, **fixed)
        else:
            config, fixed = this.configure("query")
            tensors = (*saved, delta, *for_query, *table)
            query_kernel[(this.query_programs(config),)](*tensors, this.heads, this.scale, **shared, **fixed)
            config, fixed = this.configure("key")
            cells = prod([a.windows + 2 * cdiv(a.margin, a.window) for a in call.axes])
            programs = cells * cdiv(this.tokens, config.keys) * this.key_heads * this.batch
            tensors = (*this.strided(query, key, value, grad_out), lse, *this.strided(delta), *for_keys, *table)
            key_kernel[(programs,)](*tensors, this.key_heads, this.scale, **shared, **fixed)
        if wants_bias and partial is None:
            partial = _bias_partials(this, query, key, value, grad_out, lse, delta)
    return dq, dk, dv, None if partial is None else partial.sum(0).to(bias.dtype)


def _bias_partials(this: _Launches, query, key, value, grad_out, lse, delta) -> Tensor:
    """Gradients of the bias, summed over chunks of windows: `[chunks, heads, window tokens, key tokens]`."""
    config, fixed = this.configure("bias")
    blocks = cdiv(this.table.shape[1], config.queries) * cdiv(this.table.shape[2], config.keys)
    steps = this.windows * this.batch
    chunk = cdiv(steps * blocks * this.heads, PROGRAMS)
    chunks = cdiv(steps, chunk)
    partial = torch.empty(chunks, *this.table.shape, dtype=torch.float32, device=query.device)
    tensors = (*this.strided(query, key, value, grad_out), lse, *this.strided(delta), this.table, partial)
    sizes = (this.lengths, this.batch, this.heads, chunk, this.scale)
    bias_kernel[(chunks * this.heads * blocks,)](*tensors, *sizes, **fixed)
    return partial
