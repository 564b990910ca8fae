"""Scan attention by its definition: a loop over tokens. Any dtype, the oracle."""

import torch
from torch import Tensor

from ..common.calling import wants_gradient
from .call import ScanCall, out_and_state


def attend(query: Tensor, key: Tensor, value: Tensor, call: ScanCall) -> tuple[Tensor, Tensor]:
    """Output `[B, *spatial, heads, value_dim]` and last state; see `api.scan_attention`."""
    if query.device.type == "meta" and not wants_gradient(query, key, value, call.log_decay, call.beta, call.state):
        return out_and_state(query, key, value, call)  # `explain` asks, and the loop takes seconds without data, too
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(dtype).flatten(1, -3) for x in (query, key, value))  # [B, N, heads, d]
    found = [_scan(q, k, v, one) for one in call.passes()]
    out = sum((out for out, _ in found[1:]), found[0][0])
    return out.reshape(*query.shape[:-1], v.shape[-1]).to(query.dtype), found[0][1]


def _scan(q: Tensor, k: Tensor, v: Tensor, call: ScanCall) -> tuple[Tensor, Tensor]:
    """Output `[B, N, heads, value_dim]` and last state of one direction."""
    batch, tokens, heads, d = q.shape
    state = q.new_zeros(batch, heads, d, v.shape[-1]) if call.state is None else call.state.to(q.dtype)
    outs: list[Tensor] = []
    for t in reversed(range(tokens)) if call.reverse else range(tokens):
        if call.log_decay is not None:
            state = state * call.log_decay[:, t, :, None, None].to(q.dtype).exp()
        read, new = state, v[:, t]
        if call.beta is not None:
            stored = torch.einsum("bhde,bhd->bhe", state, k[:, t])
            new = call.beta[:, t, :, None].to(q.dtype) * (new - stored)
        state = state + torch.einsum("bhd,bhe->bhde", k[:, t], new)
        outs.append(call.scale * torch.einsum("bhde,bhd->bhe", read if call.strict else state, q[:, t]))
    return torch.stack(outs[::-1] if call.reverse else outs, 1), state
