"""Scan attention in plain PyTorch: products inside chunks of tokens, and a recurrence over their states.

With c the sums of the log decay inside a chunk, A the lower triangle of beta_t exp(c_t - c_j) k_t.k_j, and S the state
before the chunk,

    u = (I + A)^-1 beta (v - exp(c) K S)        what is written; the values themselves without beta
    out = tril(exp(c_t - c_j) q_t.k_j) u + exp(c) Q S
    S' = exp(c_C) S + (exp(c_C - c) K)^T u

Exponents are sums over the tokens between, at most zero. The gradient is written out: it keeps nothing but
inputs, and computes states and `u` again.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..common.calling import is_plain_call, wants_gradient, without_autocast
from ..common.launching import cdiv
from .call import ScanCall

CHUNK = 64  # tokens


def attend(query: Tensor, key: Tensor, value: Tensor, call: ScanCall) -> tuple[Tensor, Tensor]:
    """Output `[B, *spatial, heads, value_dim]` and last state; see `api.scan_attention`.

    Graphs that need nothing but torch have the plain products; all else is differentiable once, and a second derivative
    raises RuntimeError.
    """
    if is_plain_call() and wants_gradient(query, key, value, call.log_decay, call.beta, call.state):
        return _Scan.apply(query, key, value, call.log_decay, call.beta, call.state, call)
    return forward(query, key, value, call)


class _Chunks:
    """Tokens of a call in the order of the scan, heads first, in chunks: `[B, heads, chunks, tokens, d]`.

    Tokens that fill up the last chunk write nothing. Gates are `[B, heads, chunks, tokens, 1]`.
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, call: ScanCall):
        self.dtype, self.reverse, self.tokens = torch.promote_types(query.dtype, torch.float32), call.reverse, 0
        self.size = min(CHUNK, query.flatten(1, -3).shape[1])
        self.query, self.key, self.value = (self.cut(x.flatten(1, -3)) for x in (query, key, value))
        self.beta = None if call.beta is None else self.cut(call.beta.unsqueeze(-1))
        if call.log_decay is None:
            decay = torch.zeros(1, 1, 1, self.size, 1, dtype=self.dtype, device=query.device)
        else:
            decay = self.cut(call.log_decay.unsqueeze(-1))
        ones = torch.ones(self.size, self.size, dtype=torch.bool, device=query.device)
        self.later = ~ones.tril(-1)
        # [t, j] is summed from j on: a difference of sums from the first token would lose small decays to large ones
        between = decay.expand(*decay.shape[:-1], self.size).masked_fill(self.later, 0).cumsum(-2)
        sums = decay.cumsum(-2)
        self.rise, self.fall, self.whole = sums.exp(), between[..., -1:, :].mT.exp(), sums[..., -1:, :].exp()
        self.pairs = between.masked_fill(self.later if call.strict else ~ones.tril(), float("-inf")).exp()
        if self.beta is not None:
            self.before = self.pairs.masked_fill(self.later, 0)
            self.lower = self.beta * (self.key @ self.key.mT) * self.before

    def cut(self, x: Tensor) -> Tensor:
        """Chunks of `[B, tokens, heads, d]`."""
        x = x.to(self.dtype).transpose(1, 2)
        self.tokens = x.shape[2]
        x = x.flip(2) if self.reverse else x
        x = F.pad(x, (0, 0, 0, cdiv(self.tokens, self.size) * self.size - self.tokens))
        return x.unflatten(2, (-1, self.size))

    def join(self, x: Tensor) -> Tensor:
        """`[B, tokens, heads, d]` of chunks."""
        x = x.flatten(2, 3)[:, :, : self.tokens]
        return (x.flip(2) if self.reverse else x).transpose(1, 2)

    def first(self, call: ScanCall) -> Tensor:
        """State before the first token."""
        batch, heads, *_, d = self.key.shape
        if call.state is None:
            return self.key.new_zeros(batch, heads, d, self.value.shape[-1])
        return call.state.to(self.dtype)

    def solve(self, x: Tensor, *, transposed: bool = False) -> Tensor:
        """(I + A)^-1 x, or with the transposed A."""
        lower = self.lower.mT if transposed else self.lower
        return torch.linalg.solve_triangular(lower, x, upper=transposed, unitriangular=True)

    def written(self, first: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Written values, the state before each chunk, that after the last, and (I + A)^-1 beta exp(c) K."""
        falling, state, starts = (self.key * self.fall).mT, first, []
        whole = self.whole.expand(-1, -1, self.key.shape[2], -1, -1)
        if self.beta is None:
            added = falling @ self.value
            for n in range(self.key.shape[2]):
                starts.append(state)
                state = whole[:, :, n] * state + added[:, :, n]
            return self.value, torch.stack(starts, 2), state, None
        both = self.solve(torch.cat([self.beta * self.value, self.beta * self.rise * self.key], -1))
        values, keys = both.split([self.value.shape[-1], self.key.shape[-1]], -1)
        writes = []
        for n in range(self.key.shape[2]):
            starts.append(state)
            writes.append(values[:, :, n] - keys[:, :, n] @ state)
            state = whole[:, :, n] * state + falling[:, :, n] @ writes[-1]
        return torch.stack(writes, 2), torch.stack(starts, 2), state, keys


def forward(query: Tensor, key: Tensor, value: Tensor, call: ScanCall) -> tuple[Tensor, Tensor]:
    """Output and last state, of both directions that of the first pass."""
    found = [_forward(query, key, value, one) for one in call.passes()]
    out = sum((out for out, _ in found[1:]), found[0][0])
    return out.reshape(*query.shape[:-1], value.shape[-1]).to(query.dtype), found[0][1]


def _forward(query: Tensor, key: Tensor, value: Tensor, call: ScanCall) -> tuple[Tensor, Tensor]:
    """Output `[B, tokens, heads, e]` in the dtype of sums, and last state."""
    these = _Chunks(query, key, value, call)
    u, starts, last, _ = these.written(these.first(call))
    weights = (these.query @ these.key.mT) * these.pairs
    out = call.scale * (weights @ u + (these.query * these.rise) @ starts)
    return these.join(out), last


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    outputs: Sequence[Tensor | None],
    gradients: Sequence[Tensor],
    call: ScanCall,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, log_decay, beta and state; outputs are not read."""
    grad_out, grad_last = gradients
    with without_autocast(query.device):
        first, *rest = (
            _backward(query, key, value, grad_out, grad_last if i == 0 else torch.zeros_like(grad_last), one)
            for i, one in enumerate(call.passes())
        )
    like = (query, key, value, call.log_decay, call.beta, call.state)
    return add_up(like, first, *rest)


def add_up(like: Sequence[Tensor | None], *passes: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Sums of the gradients of passes, in the shapes and dtypes of the tensors that they are of."""
    sums = (None if x[0] is None else cast(Tensor, sum(x[1:], x[0])) for x in zip(*passes, strict=True))
    return tuple(
        None if x is None or y is None else x.reshape(y.shape).to(y.dtype) for x, y in zip(sums, like, strict=True)
    )


def _backward(
    query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, grad_last: Tensor, call: ScanCall
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, log_decay, beta and state by one direction, in the dtype of sums."""
    these = _Chunks(query, key, value, call)
    q, k, do = these.query, these.key, these.cut(grad_out.flatten(1, -3)) * call.scale
    u, starts, _, keys = these.written(these.first(call))
    # gradient of the state after each chunk, and of what tokens write
    weights = (q @ k.mT) * these.pairs
    falling, rising, own = k * these.fall, (q * these.rise).mT @ do, weights.mT @ do
    whole = these.whole.expand(-1, -1, k.shape[2], -1, -1)
    dstate, ends, found = grad_last.to(these.dtype), [], []
    for n in reversed(range(k.shape[2])):
        ends.append(dstate)
        found.append(own[:, :, n] + falling[:, :, n] @ dstate)
        dstate = whole[:, :, n] * dstate + rising[:, :, n]
        if keys is not None:
            dstate = dstate - keys[:, :, n].mT @ found[-1]
    ends, du = torch.stack(ends[::-1], 2), torch.stack(found[::-1], 2)
    # each gradient is a sum over earlier or over later tokens
    products = (do @ u.mT) * these.pairs
    through, later = these.rise * (do @ starts.mT), these.fall * (u @ ends.mT)
    dq, dk = products @ k + through, products.mT @ q + later
    flows, reads, writes = products * (q @ k.mT), (q * through).sum(-1), (k * later).sum(-1)
    dv, dbeta = du, None
    if these.beta is not None and call.beta is not None:
        du = these.solve(du, transposed=True)
        dv = these.beta * du
        products, through = (du @ u.mT) * these.before, these.rise * (du @ starts.mT)
        dbeta = (du * these.value).sum(-1, keepdim=True) - (k * (products @ k + through)).sum(-1, keepdim=True)
        dbeta = these.join(dbeta).squeeze(-1)
        products, through = these.beta * products, these.beta * through
        dk = dk - products @ k - products.mT @ k - through
        flows, reads = flows - products * (k @ k.mT), reads - (k * through).sum(-1)
    dlog = None
    if call.log_decay is not None:
        dlog = _decay_gradient(flows, reads, writes, these.whole[..., 0, 0] * (starts * ends).sum((-1, -2)))
        dlog = these.join(dlog.unsqueeze(-1)).squeeze(-1)
    return *(these.join(x) for x in (dq, dk, dv)), dlog, dbeta, dstate


def _decay_gradient(flows: Tensor, reads: Tensor, writes: Tensor, whole: Tensor) -> Tensor:
    """Gradient of the log decay `[B, heads, chunks, tokens]`: what flows over a token, from before it to it or later.

    Sums of differences of what is read and written would be the same, and lose it to rounding.

    Args:
        flows: `[..., tokens, tokens]` from the column's token to the row's.
        reads, writes: `[..., tokens]` from before the chunk to a token, from a token to behind the chunk.
        whole: `[...]` over the chunk.
    """
    before = F.pad(flows.cumsum(-1)[..., :-1], (1, 0)).tril().sum(-2)
    written = F.pad(writes.cumsum(-1)[..., :-1], (1, 0))
    return before + written + reads.flip(-1).cumsum(-1).flip(-1) + whole[..., None]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, log_decay, beta, state, call):
        ctx.call = replace(call, log_decay=None, beta=None, state=None)
        ctx.save_for_backward(query, key, value, log_decay, beta, state)
        return forward(query, key, value, call)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_last):
        query, key, value, log_decay, beta, state = ctx.saved_tensors
        call = replace(ctx.call, log_decay=log_decay, beta=beta, state=state)
        found = backward(query, key, value, (None, None), (grad_out, grad_last), call, ctx.needs_input_grad[3:6])
        return *found, None
