"""Launches of the kernels of scan attention, one scan at a time; imports triton."""

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.launching import block_d, cdiv, device_class, grid, has_tf32, needs_wide, precision
from . import configs
from .backward import decay_kernel
from .forward import output_kernel, solve_kernel, state_kernel


class Order(NamedTuple):
    """The order of a scan and its gates, `[B, heads, tokens]` float32 in that order.

    Attributes:
        widen: take all operands in float32: those of the delta rule are the solutions of equations.
        whole_last: the first chunk is the one that lacks tokens, not the last.
    """

    reverse: bool
    decay: Tensor | None = None
    beta: Tensor | None = None
    widen: bool = False
    whole_last: bool = False

    def back(self) -> "Order":
        """The same tokens and chunks from last to first: a token's decay comes behind it, where it was before it."""
        decay = None if self.decay is None else self.decay.flip(-1)
        if decay is not None:
            decay = torch.cat([torch.zeros_like(decay[..., :1]), decay[..., :-1]], -1)
        beta = None if self.beta is None else self.beta.flip(-1)
        return self._replace(reverse=not self.reverse, decay=decay, beta=beta, whole_last=True)


def ordered(gate: Tensor | None, reverse: bool) -> Tensor | None:
    """`[B, tokens, heads]` as `[B, heads, tokens]` float32 in the order of a scan."""
    if gate is None:
        return None
    gate = gate.float().transpose(1, 2)
    return (gate.flip(-1) if reverse else gate).contiguous()


def constants(kernel: configs.Kernel, config: configs.Config, rows: int, head_dim: int, value_dim: int) -> dict:
    """Compile-time sizes of a kernel, and how it is launched."""
    block, block_e = block_d(head_dim), block_d(value_dim)
    fixed = {"D": head_dim, "E": value_dim, "ROWS": rows, "WIDE": config.wide}
    if kernel == "decay":
        fixed |= {"COLUMNS": min(config.columns, block), "STEP": min(config.columns, block_e)}
    else:
        fixed |= {"BLOCK_D": block}
        fixed |= {"BLOCK_E": block_e} if kernel == "solve" else {"COLUMNS": min(config.columns, block_e)}
    if kernel == "state":
        fixed["STAGES"] = config.stages
    return fixed | {"num_warps": config.warps, "num_stages": config.stages}


class Scan:
    """Launches over queries, keys and values of one shape but for their features."""

    def __init__(self, key: Tensor, value: Tensor, order: Order, *others: Tensor):
        self.key, self.value, self.order = key, value, order
        self.batch, self.heads, self.head_dim = key.shape[0], *key.shape[-2:]
        self.value_dim, self.tokens = value.shape[-1], prod(key.shape[1:-2])
        tensors = (key, value, *others)
        self.widen = order.widen or len({x.dtype for x in tensors}) > 1
        self.itemsize = 4 if self.widen else key.itemsize
        self.precision = precision(key) if key.dtype == torch.float32 else "tf32" if has_tf32(key.device) else "ieee"
        self.device = device_class(key.device)
        self.features = max(self.head_dim, self.value_dim)
        self.wide = needs_wide(*tensors, made=self.tokens * self.heads * self.features)
        sizes: dict[str, Any] = dict(tokens=self.tokens, features=self.features, device=self.device)
        self.rows = configs.chunk_length(**sizes, itemsize=self.itemsize)
        self.chunks = cdiv(self.tokens, self.rows)
        self.lead = self.chunks * self.rows - self.tokens if order.whole_last else 0

    def made(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.key.device)

    def fixed(self, kernel: configs.Kernel, **flags: bool) -> dict:
        given: dict[str, Any] = dict(features=self.features, itemsize=self.itemsize, device=self.device)
        config = configs.choose(kernel, **given, wide=self.wide)
        sizes = constants(kernel, config, self.rows, self.head_dim, self.value_dim)
        flags |= {"REVERSE": self.order.reverse} | (
            {} if kernel == "decay" else {"DECAY": self.order.decay is not None}
        )
        return sizes | flags | {"PRECISION": self.precision}

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.tokens, self.heads, self.chunks, self.lead

    def states(self, first: Tensor | None, factor: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """States before chunks, the last, and what tokens write: `[B, tokens, heads, E]` with beta, else the values."""
        value, w, written = self.value, None, None
        if self.order.beta is not None:
            u = self.made(self.batch, self.tokens, self.heads, self.value_dim)
            w = self.made(self.batch, self.tokens, self.heads, self.head_dim)
            fixed = self.fixed("solve")
            operands: tuple = (*grid(self.key), *grid(value), self.order.decay, self.order.beta, u, w)
            solve_kernel[(self.batch * self.heads * self.chunks,)](*operands, *self.sizes, **fixed)
            value, written = u, self.made(*u.shape)
        states = self.made(self.batch, self.heads, self.chunks, self.head_dim, self.value_dim)
        last = self.made(self.batch, self.heads, self.head_dim, self.value_dim)
        first = None if first is None else first.float().contiguous()
        fixed = self.fixed("state", DELTA=w is not None, FIRST=first is not None, WIDEN=self.widen)
        of_w = (None, (0,) * 6, (0, 0)) if w is None else grid(w)
        operands: tuple = (*grid(self.key), *grid(value), *of_w, self.order.decay, first, states, last, written)
        programs = self.batch * self.heads * cdiv(self.value_dim, fixed["COLUMNS"])
        state_kernel[(programs,)](*operands, *self.sizes, factor, **fixed)
        return states, last, self.value if written is None else written

    def outputs(
        self,
        query: Tensor,
        written: Tensor,
        states: Tensor,
        *,
        dtype: torch.dtype,
        near: float,
        far: float,
        strict: bool,
    ) -> Tensor:
        """Outputs of queries, `[B, tokens, heads, E]`."""
        out = self.made(self.batch, self.tokens, self.heads, self.value_dim, dtype=dtype)
        fixed = self.fixed("output", STRICT=strict, WIDEN=self.widen)
        operands: tuple = (*grid(query), *grid(self.key), *grid(written), self.order.decay, states, out)
        programs = self.batch * self.heads * self.chunks * cdiv(self.value_dim, fixed["COLUMNS"])
        output_kernel[(programs,)](*operands, *self.sizes, near, far, **fixed)
        return out


def scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    order: Order,
    *,
    dtype: torch.dtype = torch.float32,
    near: float = 1.0,
    far: float = 1.0,
    write: float = 1.0,
    strict: bool = False,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[B, tokens, heads, E]`, last state, and the states before chunks.

    Args:
        dtype: of the output.
        near, far: factors on what is read of a token's own chunk and of those before it.
        write: factor on what goes into the state.
        strict: a token does not read what it wrote.
        first: state before the first token.
    """
    this = Scan(key, value, order, query)
    states, last, written = this.states(first, write)
    return this.outputs(query, written, states, dtype=dtype, near=near, far=far, strict=strict), last, states


def written(key: Tensor, value: Tensor, order: Order, first: Tensor | None = None) -> Tensor:
    """Values that tokens write by the delta rule, `[B, tokens, heads, E]` in float32."""
    return Scan(key, value, order).states(first)[2]


def decay_gradient(
    query: Tensor, key: Tensor, u: Tensor, grad_out: Tensor, dv: Tensor | None, states: Tensor, ends: Tensor,
    order: Order, *, scale: float, strict: bool,
) -> Tensor:  # fmt: skip
    """Gradient of the log decay, `[B, tokens, heads]`.

    Args:
        u, dv: what tokens write, and with the delta rule the gradient of the values.
        states, ends: as `decay_kernel` takes them.
    """
    this = Scan(key, u, order, query, grad_out, *(() if dv is None else (dv,)))
    fixed = this.fixed("decay", DELTA=dv is not None, WIDEN=this.widen)
    blocks = cdiv(this.head_dim, fixed["COLUMNS"])
    parts = this.made(blocks, this.batch, this.heads, this.tokens)
    of_dv = (None, (0,) * 6, (0, 0)) if dv is None else grid(dv)
    operands: tuple = (*grid(query), *grid(key), *grid(u), *grid(grad_out), *of_dv, order.decay, states, ends, parts)
    sizes = (this.tokens, this.heads, this.chunks, scale, int(strict), this.batch)
    decay_kernel[(blocks * this.batch * this.heads * this.chunks,)](*operands, *sizes, **fixed)
    found = parts[0] if blocks == 1 else parts.sum(0)
    return (found.flip(-1) if order.reverse else found).transpose(1, 2)
