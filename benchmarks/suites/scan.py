"""Scan attention against its quadratic form and a loop over tokens in eager PyTorch, and dense attention.

If flash-linear-attention can be imported, its chunked kernels are providers of what they have: one direction. They
never ran here: their interface is that of its documentation (`chunk_simple_gla`, `chunk_gated_delta_rule` on
`[B, T, H, K]`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from foveal.kernels.ops import scan_attention
from torch import Tensor
from torch.nn import functional as F

from ..benchmark import SkippedError
from ..operators import Operator, Tensors, randn
from ..peers import Attend, dense_makers, heads_first, heads_last


@dataclass(frozen=True)
class Case:
    source: str
    side: int
    heads: int
    head_dim: int = 64
    delta: bool = False
    direction: str = "forward"
    batch: int = 1
    dtype: torch.dtype = torch.float32
    kernel = "scan"

    @property
    def name(self) -> str:
        kind = f"{'delta' if self.delta else 'gated'} {self.direction}"
        shape = f"{self.side}x{self.side} h{self.heads}x{self.head_dim}"
        return f"{shape} {kind}" + (f" b{self.batch}" if self.batch != 1 else "")


def _quadratic(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None, diagonal: int = 0) -> Tensor:
    """All pairs of tokens of `[B, heads, N, d]`."""
    sums = decay.float().cumsum(-1)
    earlier = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril(diagonal)
    pairs = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).masked_fill(~earlier, float("-inf")).exp()
    if beta is not None:
        lower = (beta.unsqueeze(-1) * (k @ k.mT).float() * pairs).tril(-1)
        solved = torch.linalg.solve_triangular(lower, beta.unsqueeze(-1) * v.float(), upper=False, unitriangular=True)
        v = solved.to(v.dtype)
    return ((q @ k.mT) * pairs.to(q.dtype)) @ v


def written_out(direction: str, query, key, value, log_decay, beta=None) -> Tensor:
    """Eager operations on a matrix of all pairs."""
    q, k, v = (heads_first(x) for x in (query, key, value))
    gates = [None if x is None else x.flatten(1, -2).transpose(1, 2) for x in (log_decay, beta)]
    out = _quadratic(q, k, v, *gates)
    if direction == "both":
        gates = [None if x is None else x.flip(-1) for x in gates]
        out = out + _quadratic(*(x.flip(2) for x in (q, k, v)), *gates, -1 if beta is None else 0).flip(2)
    return heads_last(out, query)


def looped(direction: str, query, key, value, log_decay, beta=None) -> Tensor:
    """Eager operations token by token."""
    q, k, v = (x.flatten(1, -3) for x in (query, key, value))
    decay = log_decay.flatten(1, -2).exp().to(q.dtype)
    step = None if beta is None else beta.flatten(1, -2).to(q.dtype)
    tokens, total = range(q.shape[1]), None
    for order in (tokens, reversed(tokens)) if direction == "both" else (tokens,):
        state, outs = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1]), {}
        for t in order:
            state = decay[:, t, :, None, None] * state
            new, before = v[:, t], state
            if step is not None:
                new = step[:, t, :, None] * (new - (state * k[:, t, :, :, None]).sum(-2))
            state = state + k[:, t, :, :, None] * new[..., None, :]
            own = before if total is not None and step is None else state
            outs[t] = (own * q[:, t, :, :, None]).sum(-2)
        found = torch.stack([outs[t] for t in tokens], 1)
        total = found if total is None else total + found
    assert total is not None
    return total.view(query.shape)


def fla_chunked(delta: bool) -> Attend:
    """flash-linear-attention's chunked kernels."""
    if find_spec("fla") is None:
        raise SkippedError("flash-linear-attention is not installed")
    gated = import_module("fla.ops.simple_gla").chunk_simple_gla
    delta_rule = import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule

    def attend(query, key, value, log_decay, beta=None) -> Tensor:
        q, k, v = (x.flatten(1, -3) for x in (query, key, value))
        decay = log_decay.flatten(1, -2)
        if delta:
            out, _ = delta_rule(q, k, v, g=decay, beta=beta.flatten(1, -2), scale=1.0)
        else:
            out, _ = gated(q, k, v, g=decay, scale=1.0)
        return out.unflatten(1, query.shape[1:-2])

    return attend


class Scan(Operator):
    name = "scan"
    title = "Scan attention"
    folder = "scan"

    def cases(self, device: torch.device, *, everything: bool = False) -> Iterator[Case]:
        on_cpu = device.type == "cpu"
        dtype = torch.float32 if on_cpu else torch.bfloat16
        for side in (14, 28, 56):
            for delta, direction in ((False, "both"), (False, "forward"), (True, "forward")):
                batch = 1 if on_cpu else 64 * 14**2 // side**2
                yield Case(f"DeiT-S, {16 * side} pixels", side, 6, 64, delta, direction, batch, dtype)

    def scaling(self, device: torch.device) -> list[Case]:
        sides = (32, 64, 128) if device.type == "cpu" else (64, 128, 256, 512)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        return [Case("DeiT-S, larger", n, 2, direction="both", dtype=dtype) for n in sides]

    def inputs(self, case: Case, device: torch.device) -> Tensors:
        draw = randn(device, case.dtype)
        grid = (case.batch, case.side, case.side, case.heads)
        tensors = {x: draw(*grid, case.head_dim) for x in ("query", "key", "value")}
        tensors["key"] = F.normalize(tensors["key"], dim=-1)
        gate = randn(device, torch.float32, seed=1)
        tensors["log_decay"] = -0.1 * gate(*grid).abs()
        return tensors | ({"beta": gate(*grid).sigmoid()} if case.delta else {})

    def arguments(self, case: Case) -> dict:
        return {"direction": case.direction}

    def function(self, case: Case) -> Callable[..., Tensor]:
        return scan_attention

    def eager(self, case: Case, device: torch.device) -> Attend:
        return partial(written_out, case.direction)

    def yardstick(self, case: Case, device: torch.device) -> Attend:
        return partial(looped, case.direction)

    def crop(self, case: Case) -> Case:
        return replace(case, batch=1, heads=1, side=min(case.side, 6))

    def peers(self, case: Case, mode: str, device: torch.device) -> dict[str, Callable[[], Attend]]:
        made: dict[str, Callable[[], Attend]] = {"quadratic": partial(self.eager, case, device)}
        if case.side <= 28:
            made["loop"] = partial(self.yardstick, case, device)
        if device.type == "cuda" and case.direction == "forward":
            made["fla"] = partial(fla_chunked, case.delta)
        shape = (case.batch, case.side, case.side, case.heads, case.head_dim)
        return made | dense_makers(shape, case.dtype, device)
