"""Launches of the kernels of agent attention; imported, and triton with it, when a kernel first runs."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ..common.launching import block_d, cdiv, device_class, grid, needs_wide, precision, width_constants
from . import configs
from .backward import bias_kernel, key_kernel, query_kernel
from .call import AgentCall
from .forward import forward_kernel, merge_kernel

MERGE_QUERIES = 16


def constants(config: configs.Config, head_dim: int, value_dim: int, precision: str) -> dict:
    """Compile-time arguments of the kernels that compute logits."""
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


def bias_constants(head_dim: int, value_dim: int, itemsize: int) -> dict:
    """Compile-time arguments of the kernel of the bias gradient that differ: it takes 128 bytes of a row at a time."""
    return dict.fromkeys(("BLOCK_D", "BLOCK_DV"), min(block_d(max(head_dim, value_dim)), 128 // itemsize))


def merge_constants(value_dim: int, wide: bool) -> dict:
    """Compile-time arguments of the kernel that merges parts."""
    return dict(DV=value_dim, BLOCK_DV=block_d(value_dim), QUERIES=MERGE_QUERIES, WIDE=wide)


class Pass:
    """Sizes of one pass, and what its launches have in common."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, *rest: Tensor):
        self.operands = [y for x in (query, key, value) for y in grid(x)]
        self.batch, self.heads, self.head_dim, self.value_dim = query.shape[0], *query.shape[-2:], value.shape[-1]
        self.queries, self.keys = prod(query.shape[1:-2]), prod(key.shape[1:-2])
        self.bias, self.scale = bias, scale
        rows = max(self.queries, self.keys) * self.heads
        made = rows * max(self.head_dim, self.value_dim)  # numbers an entry of what is written
        self.wide = needs_wide(query, key, value, *rest, *(() if bias is None else (bias,)), made=made)
        self.precision, self.itemsize, self.device = precision(query), query.element_size(), query.device

    def config(self, kernel: configs.Kernel) -> configs.Config:
        return configs.choose(
            kernel,
            queries=self.queries,
            keys=self.keys,
            head_dim=max(self.head_dim, self.value_dim),
            itemsize=self.itemsize,
            device=device_class(self.device),
            wide=self.wide,
        )

    def run(self, kernel, programs: int, *tensors, chunk: int, config: configs.Config, **flags) -> None:
        """Launch a kernel that takes the operands, `tensors`, the bias and the sizes."""
        strides = (0, 0, 0) if self.bias is None else self.bias.stride()
        sizes = (self.queries, self.keys, self.batch, self.heads, chunk)
        fixed = constants(config, self.head_dim, self.value_dim, self.precision) | flags
        kernel[(programs,)](*self.operands, *tensors, self.bias, strides, *sizes, self.scale, **fixed)


def forward(query: Tensor, key: Tensor, value: Tensor, call: AgentCall) -> tuple[Tensor, ...]:
    """Output, values of the agents, and base-2 log-sum-exps of agents and of queries."""
    agent_value, agent_lse = forward_pass(call.agent, key, value, call.agent_bias, call.scale)
    out, lse = forward_pass(query, call.agent, agent_value, call.query_bias, call.query_scale)
    return out, agent_value, agent_lse, lse


def forward_pass(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output `[B, *spatial, heads, value_dim]`, and base-2 log-sum-exp `[B, heads, queries]` in float32."""
    this = Pass(query, key, value, bias, scale)
    out = torch.empty(*query.shape[:-1], this.value_dim, dtype=query.dtype, device=query.device)
    lse = torch.empty(this.batch, this.heads, this.queries, dtype=torch.float32, device=query.device)
    if this.batch == 0:
        return out, lse
    config = this.config("forward")
    programs = cdiv(this.queries, config.queries) * this.batch * this.heads
    chunk = configs.chunk_length(this.keys, config.keys, programs)
    parts = cdiv(this.keys, chunk)
    some, some_lse = out, lse
    if parts > 1:
        some = torch.empty(parts, *out.shape, dtype=torch.float32, device=query.device)
        some_lse = torch.empty(parts, *lse.shape, dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        this.run(forward_kernel, programs * parts, some, some_lse, chunk=chunk, config=config, BIAS=bias is not None)
        if parts > 1:
            merge_kernel[(cdiv(this.queries, MERGE_QUERIES) * this.batch * this.heads,)](
                some,
                some_lse,
                out,
                lse,
                this.queries,
                this.batch,
                this.heads,
                parts,
                **merge_constants(this.value_dim, this.wide),
            )
    return out, lse


def _partial(parts: int, like: Tensor) -> Tensor:
    """Memory for what each part finds: the gradient itself if there is one part only."""
    dtype = like.dtype if parts == 1 else torch.float32
    return torch.empty(parts, *like.shape, dtype=dtype, device=like.device)


def _total(partial: Tensor, like: Tensor) -> Tensor:
    return (partial[0] if len(partial) == 1 else partial.sum(0)).to(like.dtype)


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    call: AgentCall,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, agent, agent_bias and query_bias; None for a bias without."""
    (out, agent_value, agent_lse, lse), agent, wants = outputs, call.agent, wanted[1:]
    second = (query, agent, agent_value, out, lse, gradients[0], call.query_bias, call.query_scale, wants[1])
    dq, dagent, dagent_value, dquery_bias = backward_pass(*second)  # queries saw agents, which saw keys
    first = (agent, key, value, agent_value, agent_lse, dagent_value, call.agent_bias, call.scale, wants[0])
    more, dk, dv, dagent_bias = backward_pass(*first)
    return dq, dk, dv, dagent + more, dagent_bias, dquery_bias


def backward_pass(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    bias: Tensor | None,
    scale: float,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and, if wanted, bias."""
    this = Pass(query, key, value, bias, scale, grad_out)
    given = (query, key, value)
    if this.batch == 0:
        dbias = bias.new_zeros(bias.shape) if bias is not None and bias_gradient else None
        return *(x.new_empty(x.shape) for x in given), dbias
    slices, delta, do = this.batch * this.heads, torch.empty_like(lse), grid(grad_out)
    with torch.cuda.device_of(query):
        config = this.config("query")
        programs = cdiv(this.queries, config.queries) * slices
        chunk = configs.chunk_length(this.keys, config.keys, programs)
        parts = cdiv(this.keys, chunk)
        dq = _partial(parts, query)
        tensors = (out, *do, lse, delta, dq)
        flags = dict(BIAS=bias is not None, WHOLE=this.keys <= config.keys)
        this.run(query_kernel, programs * parts, *tensors, chunk=chunk, config=config, **flags)

        config = this.config("key")
        programs = cdiv(this.keys, config.keys) * slices
        chunk = configs.chunk_length(this.queries, config.queries, programs)
        parts = cdiv(this.queries, chunk)
        dk, dv = _partial(parts, key), _partial(parts, value)
        tensors = (*do, lse, delta, dk, dv)
        this.run(key_kernel, programs * parts, *tensors, chunk=chunk, config=config, BIAS=bias is not None)

        dbias = None
        if bias is not None and bias_gradient:
            config = this.config("bias")
            programs = cdiv(this.queries, config.queries) * cdiv(this.keys, config.keys) * this.heads
            chunk = configs.chunk_length(this.batch, 1, programs, "batch")
            parts = cdiv(this.batch, chunk)
            partial = torch.empty(parts, *bias.shape, dtype=torch.float32, device=bias.device)
            tensors = (*do, lse, delta, partial)
            flags = bias_constants(this.head_dim, this.value_dim, this.itemsize)
            this.run(bias_kernel, programs * parts, *tensors, chunk=chunk, config=config, **flags)
            dbias = _total(partial, bias)
    return _total(dq, query), _total(dk, key), _total(dv, value), dbias
