"""Launches of the kernels of linear attention; imported, and triton with it, when a kernel first runs."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ..common.launching import block_d, cdiv, device_class, grid, has_tf32, needs_wide, precision
from . import configs
from .backward import key_kernel, query_kernel
from .call import LinearCall
from .forward import apply_kernel, state_kernel


def constants(
    kernel: configs.Kernel, config: configs.Config, head_dim: int, value_dim: int, precision: str, state_precision: str
) -> dict:  # fmt: skip
    """Compile-time arguments of a kernel but those of the variant of attention."""
    blocks = {"BLOCK_D": block_d(head_dim), "BLOCK_E": block_d(value_dim)}
    columns = {name[-1]: min(config.columns, size) for name, size in blocks.items()}
    kinds = {
        "state": {
            "BLOCK_D": blocks["BLOCK_D"],
            "COLUMNS": columns["E"],
            "PRECISION": precision,
            "STATE_PRECISION": state_precision,
        },
        "apply": {"BLOCK_D": blocks["BLOCK_D"], "COLUMNS": columns["E"], "STATE_PRECISION": state_precision},
        "query": {**blocks, "COLUMNS": columns["D"], "PRECISION": precision, "STATE_PRECISION": state_precision},
        "key": {
            **blocks,
            "COLUMNS_D": columns["D"],
            "COLUMNS_E": columns["E"],
            "BLOCKS": max(cdiv(head_dim, columns["D"]), cdiv(value_dim, columns["E"])),
            "STATE_PRECISION": state_precision,
        },
    }
    launch = {"num_warps": config.warps, "num_stages": config.stages}
    shared = {"D": head_dim, "E": value_dim, "ROWS": config.rows, "WIDE": config.wide, "STAGES": config.stages}
    return shared | kinds[kernel] | launch


def programs(kernel: configs.Kernel, fixed: dict) -> int:
    """Programs that share a slice: blocks of features."""
    if kernel == "key":
        return fixed["BLOCKS"]
    return cdiv(fixed["D" if kernel == "query" else "E"], fixed["COLUMNS"])


def flags(kernel: configs.Kernel, call: LinearCall, scales: bool) -> dict:
    """Compile-time arguments of a kernel that say which variant of attention is meant."""
    kind, _ = normaliser(call)
    given = {"RELU": call.relu, "CENTERED": call.centered}
    if kernel == "state":
        return given | {"SUMS": call.centered or kind != "none"}
    given |= {"SCALES": scales, "MEAN": call.mean}
    return given if kernel == "key" else given | {"NORMALISER": kind}


def normaliser(call: LinearCall) -> tuple[str, float]:
    """Its kind, and the number that goes with it."""
    if call.eps is not None:
        return "eps", call.eps
    return ("none", 0.0) if call.floor is None else ("floor", call.floor)


def state_precision(query: Tensor, precision: str) -> str:
    """Precision of products with float32 states: for half precision TF32, which has a larger range than float16."""
    if query.dtype == torch.float32:
        return precision
    return "tf32" if has_tf32(query.device) else "ieee"


class _Launches:
    """Sizes of one call, and arguments that its launches share."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, call: LinearCall, *rest: Tensor):
        self.query, self.key, self.value = grid(query), grid(key), grid(value)
        self.batch, self.heads, self.head_dim = query.shape[0], *query.shape[-2:]
        self.value_dim = value.shape[-1]
        self.queries, self.keys = prod(query.shape[1:-2]), prod(key.shape[1:-2])
        self.packed = self.head_dim * self.value_dim + self.head_dim + self.value_dim
        made = max(self.queries, self.keys) * self.heads * max(self.head_dim, self.value_dim)  # of what is written
        self.wide = needs_wide(query, key, value, *rest, made=made)
        self.itemsize, self.device = query.element_size(), query.device
        self.precision = precision(query)
        self.state_precision = state_precision(query, self.precision)
        self.scales = None if call.scales is None else call.scales.contiguous()
        self.call = call
        self.factors, self.floor = (1 / self.keys, call.scale), normaliser(call)[1]

    def plan(self, name: configs.Kernel, tokens: int) -> tuple[dict, int, int, int]:
        """Compile-time arguments of a kernel over `tokens`, tokens a program, parts, and programs of a part."""
        sizes = dict(tokens=tokens, features=max(self.head_dim, self.value_dim))
        device = device_class(self.device)
        config = configs.choose(name, **sizes, itemsize=self.itemsize, device=device, wide=self.wide)
        fixed = constants(name, config, self.head_dim, self.value_dim, self.precision, self.state_precision)
        slices = self.batch * self.heads * programs(name, fixed)
        chunk = configs.chunk_length(name, **sizes, rows=config.rows, slices=slices)
        fixed |= flags(name, self.call, self.scales is not None)
        return fixed, chunk, cdiv(tokens, chunk), slices

    def run(self, name: configs.Kernel, kernel, tokens: int, operands: tuple, rest: tuple) -> None:
        """Launch a kernel over `tokens` that takes operands, sizes and numbers."""
        fixed, chunk, parts, slices = self.plan(name, tokens)
        kernel[(parts * slices,)](*operands, tokens, self.batch, self.heads, chunk, *rest, **fixed)

    def accumulate(self, name: configs.Kernel, kernel, tokens: int, operands: tuple, rest: tuple = ()) -> Tensor:
        """The sum `[B, heads, …]`, part after part, of the states that a kernel writes to its last operand."""
        fixed, chunk, parts, slices = self.plan(name, tokens)
        shape = (parts, self.batch, self.heads, self.packed)
        states = torch.empty(shape, dtype=torch.float32, device=self.device)
        kernel[(parts * slices,)](*operands, states, tokens, self.batch, self.heads, chunk, *rest, **fixed)
        return states[0] if parts == 1 else states.sum(0)


def forward(query: Tensor, key: Tensor, value: Tensor, call: LinearCall) -> tuple[Tensor, Tensor]:
    """Output, and the packed state `[B, heads, D * E + D + E]` in float32."""
    this = _Launches(query, key, value, call)
    out = torch.empty(*query.shape[:-1], this.value_dim, dtype=query.dtype, device=query.device)
    if this.batch == 0:
        return out, out.new_empty(0, this.heads, this.packed, dtype=torch.float32)
    with torch.cuda.device_of(query):
        state = this.accumulate("state", state_kernel, this.keys, (*this.key, *this.value))
        operands = (*this.query, *this.value, state, this.scales, out)
        this.run("apply", apply_kernel, this.queries, operands, (this.keys, *this.factors, this.floor))
    return out, state


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    call: LinearCall,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and, if wanted, scales."""
    (out, state), (grad_out,), scales = outputs, gradients, call.scales if wanted[0] else None
    this = _Launches(query, key, value, call, grad_out)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    if this.batch == 0:
        return dq, dk, dv, None if scales is None else scales.new_zeros(scales.shape)
    with torch.cuda.device_of(query):
        out, state = out.contiguous(), state.contiguous()  # as the kernels take them
        operands = (*this.query, *grid(grad_out), out, state, this.scales, dq)
        dstate = this.accumulate("query", query_kernel, this.queries, operands, (*this.factors, this.floor))
        operands = (*this.key, *this.value, state, dstate, this.scales, dk, dv)
        this.run("key", key_kernel, this.keys, operands, this.factors)
    return dq, dk, dv, None if scales is None else _scales_gradient(this, state, dstate).to(scales.dtype)


def _scales_gradient(this: _Launches, state: Tensor, dstate: Tensor) -> Tensor:
    """Gradient of the scales: sum of (state before its factor) * (gradient of the state after it), per head."""
    d, e, (share, scale) = this.head_dim, this.value_dim, this.factors
    matrix, key_sum, value_sum = state.split([d * e, d, e], -1)
    met = matrix.unflatten(-1, (d, e))
    if this.call.centered:
        met = met - key_sum.unsqueeze(-1) * value_sum.unsqueeze(-2) * share
    found = (dstate[..., : d * e].unflatten(-1, (d, e)) * met).sum((0, 2, 3))
    return found * (share * scale if this.call.mean else scale)
