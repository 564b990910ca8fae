"""Launches of the kernels of scored attention; imported, and triton with it, when a kernel first runs."""

from collections.abc import Sequence
from math import log, prod

import torch
from torch import Tensor

from ..common.launching import block_d, cdiv, device_class, grid, needs_wide, precision, width_constants
from . import configs
from .backward import key_kernel, query_kernel
from .call import FusedCall, passes, statistics
from .forward import count_kernel, forward_kernel
from .lists import tile_lists, tile_states


def constants(config: configs.Config, head_dim: int, value_dim: int, precision: str) -> dict:
    """Compile-time arguments of the kernels that compute logits, but those of the formula."""
    return dict(
        **width_constants(head_dim, value_dim),
        QUERIES=config.queries,
        KEYS=config.keys,
        WIDE=config.wide,
        PRECISION=precision,
        STAGES=config.stages,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def formula(kind: str, *, power: float, length_scale: bool, positions: int, intervals: int) -> dict:
    """Compile-time arguments of the kernels that say which formula and mask is meant."""
    counted = intervals > 0 and (bool(power) or length_scale)
    flags = dict(KIND=kind, POWER=bool(power), LENGTH=length_scale, POSITIONS=positions)
    return flags | dict(INTERVALS=intervals, COUNTED=counted)


class _Launches:
    """Sizes of one call, and arguments that its launches share."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, call: FusedCall, *rest: Tensor):
        self.call, self.kind, self.device, self.itemsize = call, call.kind, query.device, query.element_size()
        self.batch, self.heads, self.head_dim, self.value_dim = query.shape[0], *query.shape[-2:], value.shape[-1]
        self.queries, self.keys, self.key_heads = prod(query.shape[1:-2]), prod(key.shape[1:-2]), key.shape[-2]
        self.rows = self.batch * self.queries * self.heads
        widest = max(self.head_dim, self.value_dim, 0 if call.table is None else call.table.shape[1])
        made = max(self.queries, self.keys) * self.heads * widest
        others = rest if call.r is None else (*rest, call.r)
        self.wide = needs_wide(query, key, value, *others, made=made)
        self.precision = precision(query)
        absent = (None, (0,) * 6, (1, 1))
        self.operands = [y for x in (query, key, value) for y in grid(x)] + list(
            absent if call.r is None else grid(call.r)
        )
        self.known = None if call.table is None else self._known(query)
        self.intervals = 0 if call.intervals is None else call.intervals.shape[2] // 2
        self.counts = self._counts()
        self.numbers = (call.scale, log(self.head_dim), call.power, call.offset)

    @property
    def bias_scale(self) -> float:
        """Factor of the position term of CoPE."""
        return self.call.scale if self.call.scaled else 1.0

    def _known(self, query: Tensor) -> Tensor:
        """Position term of CoPE at each entry of its table, float32 `[B, queries, heads, positions]`."""
        assert self.call.table is not None
        return (query.flatten(1, -3).float() @ self.call.table.float() * self.bias_scale).contiguous()

    def config(self, kernel: configs.Kernel) -> configs.Config:
        return configs.choose(
            kernel,
            self.kind,
            queries=self.queries,
            keys=self.keys,
            head_dim=max(self.head_dim, self.value_dim),
            itemsize=self.itemsize,
            device=device_class(self.device),
            wide=self.wide,
        )

    def fixed(self, config: configs.Config) -> dict:
        """Compile-time arguments of a kernel."""
        positions = 0 if self.call.table is None else self.call.table.shape[1]
        options = dict(power=self.call.power, length_scale=self.call.length_scale, positions=positions)
        flags = formula(self.kind, **options, intervals=self.intervals)
        group = dict(GROUP=self.heads // self.key_heads)
        return group | flags | constants(config, self.head_dim, self.value_dim, self.precision)

    def lists(self, config: configs.Config, *, of_keys: bool = False) -> Tensor | None:
        """Lists of tiles to visit per tile of queries, or of keys; None without a mask."""
        if self.call.intervals is None or self.call.positions is None:
            return None
        states = tile_states(self.call.intervals, self.call.positions, config.queries, config.keys)
        return tile_lists(states.mT if of_keys else states)

    def _counts(self) -> Tensor | None:
        """Visible keys per query `[B or 1, heads or 1, queries]`, float32; None where no formula needs them."""
        call = self.call
        if call.intervals is None or not (call.power or call.length_scale) or self.batch == 0:
            return None
        config = self.config("forward")
        shape = call.intervals.shape[:2]
        counts = torch.empty(*shape, self.queries, dtype=torch.float32, device=self.device)
        tensors = (call.intervals, call.positions, self.lists(config), counts)
        fixed = dict(QUERIES=config.queries, KEYS=config.keys, INTERVALS=self.intervals)
        with torch.cuda.device_of(counts):
            programs = prod(shape) * cdiv(self.queries, config.queries)
            count_kernel[(programs,)](*tensors, self.queries, self.keys, **fixed)
        return counts

    def mask(self, lists: Tensor | None) -> tuple:
        """Intervals, positions, counts and lists of the mask, and their strides along batch and heads."""
        tensors = (self.call.intervals, lists, self.counts)
        strides = [0 if x is None or x.shape[i] == 1 else x.stride(i) for x in tensors for i in (0, 1)]
        return self.call.intervals, self.call.positions, self.counts, lists, tuple(strides)

    def run(self, kernel, programs: int, tensors: tuple, lists: Tensor | None, fixed: dict) -> None:
        """Launch a kernel that takes the operands, `tensors`, the mask and the sizes."""
        sizes = (self.queries, self.keys, self.heads, self.rows)
        kernel[(programs,)](*self.operands, self.known, *tensors, *self.mask(lists), *sizes, *self.numbers, **fixed)


def forward(query: Tensor, key: Tensor, value: Tensor, call: FusedCall) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp `[B, *spatial, heads]`, and the `statistics` of rows `[…, B, queries, heads]`, float32."""
    out = torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    number, tokens = statistics(call.kind, call.power), prod(query.shape[1:-2])
    stat = lse.new_empty(number, query.shape[0], tokens, query.shape[-2])
    if query.shape[0] == 0:
        return out, lse, stat
    this = _Launches(query, key, value, call)
    with torch.cuda.device_of(query):
        config = this.config("forward")
        lists = this.lists(config)
        programs = cdiv(this.queries, config.queries) * this.batch * this.heads
        for name in passes(call.kind, call.power):
            this.run(forward_kernel, programs, (out, lse, stat), lists, this.fixed(config) | {"PASS": name})
    return out, lse, stat


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    call: FusedCall,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, table and r; None for what the formula does not have."""
    out, lse, stat = outputs
    grad_out, grad_lse = gradients
    if query.shape[0] == 0:
        dtable = None if call.table is None else torch.zeros_like(call.table)
        return *map(torch.empty_like, (query, key, value)), dtable, None if call.r is None else torch.empty_like(call.r)
    this = _Launches(query, key, value, call, grad_out)
    shape = (this.batch, this.queries, this.heads)
    dq_dtype = query.dtype if call.table is None else torch.float32  # the table adds to it
    dq = torch.empty(*shape, this.head_dim, dtype=dq_dtype, device=query.device)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (key, value))
    dr = None if call.r is None else torch.empty(*shape, this.head_dim, dtype=query.dtype, device=query.device)
    delta, sums = torch.empty_like(lse), torch.empty_like(lse)
    dknown = later = None
    do = grid(grad_out)
    with torch.cuda.device_of(query):
        config = this.config("query")
        if this.known is not None:
            dknown = torch.empty_like(this.known)
            later = lse.new_empty(cdiv(this.keys, config.keys), 2, *shape)
        tensors = (out, *do, lse, grad_lse.contiguous(), stat, delta, sums, later, dq, dr, dknown)
        fixed = this.fixed(config) | {"BINS": block_d(0 if this.known is None else this.known.shape[-1])}
        lists, programs = this.lists(config), cdiv(this.queries, config.queries) * this.batch * this.heads
        for name in passes(call.kind, call.power, backward=True):
            this.run(query_kernel, programs, tensors, lists, fixed | {"PASS": name})

        config = this.config("key")
        tensors = (*do, lse, stat, delta, sums, later, dk, dv)
        programs = cdiv(this.keys, config.keys) * this.batch * this.key_heads
        this.run(key_kernel, programs, tensors, this.lists(config, of_keys=True), this.fixed(config))

    dtable = None
    if dknown is not None and call.table is not None:
        table = call.table.float()
        dq = (dq + dknown @ table.mT * this.bias_scale).to(query.dtype)
        if wanted[0]:
            rows = query.flatten(1, -3).float().flatten(0, -2)
            dtable = (rows.mT @ dknown.flatten(0, -2) * this.bias_scale).to(call.table.dtype)
    return dq.view(query.shape), dk, dv, dtable, None if dr is None or call.r is None else dr.view(call.r.shape)
