"""Gradients of scan attention by the kernels of its forward pass: each of them is a scan.

With D the decay between two tokens and u what tokens write, out_i = sum_j D_ij (q_i.k_j) u_j over j <= i. The gradient
of q is a scan of keys u and values k that is asked by the gradient of the output; those of k and u run from the last
token to the first. With the delta rule u itself depends on what was written before it; the gradient of the values
solves the same equation in the other direction:

    x_j = gradient of u_j through the outputs and the last state
    y_j = beta_j (x_j - sum_(i > j) D_ij (k_j.k_i) y_i)          the gradient of v_j; that of u_j is y_j / beta_j
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .passes import Order, decay_gradient, scan, written


class Gradients(NamedTuple):
    """`[B, tokens, heads, …]` and the state's; those of gates in float32."""

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor | None
    beta: Tensor | None
    state: Tensor


def gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    grad_last: Tensor,
    order: Order,
    *,
    first: Tensor | None,
    scale: float,
    strict: bool,
    wants_decay: bool,
    dtype: torch.dtype,
) -> Gradients:
    """Gradients of all tensors.

    Args:
        grad_last: gradient of the last state.
        first: state before the first token.
        dtype: of the gradients of query, key and value; with the delta rule those of key and value are float32.
    """
    plain, first_t = order._replace(beta=None), None if first is None else first.mT
    back = plain.back()
    delta = order.beta is not None
    u = written(key, value, order, first) if delta else value
    from_last: dict[str, Any] = dict(near=scale, write=scale, strict=strict, dtype=torch.float32 if delta else dtype)
    dv, dstate, _ = scan(key, query, grad_out, back, first=grad_last, **from_last)
    near: dict[str, Any] = dict(near=scale, far=scale, strict=strict)
    dq, _, states = scan(grad_out, u, key, plain, first=first_t, dtype=dtype, **near)
    dk, _, ends = scan(u, grad_out, query, back, first=grad_last.mT, **from_last)
    dbeta = None
    if order.beta is not None:
        through = written(key, dv, order.back())
        later, later_state, _ = scan(key, key, through, back, strict=True)
        du, dv, dstate = dv - later, through, dstate - later_state
        reads = scan(du, u, key, plain, strict=True, first=first_t)[0]
        keys, values = (x.flatten(1, -3).float() for x in (key, value))
        dbeta = (du * values).sum(-1) - (keys * reads).sum(-1)
        beta = order.beta.flip(-1) if order.reverse else order.beta
        writes, _, written_ends = scan(u, dv, key, back, strict=True)
        dk, ends = dk - writes - reads * beta.transpose(1, 2).unsqueeze(-1), ends - written_ends
    dlog = None
    if order.decay is not None:
        dstate = dstate * order.decay[..., 0].exp()[..., None, None]
        if wants_decay:
            given = (query, key, u, grad_out, dv if delta else None, states, ends)
            dlog = decay_gradient(*given, order, scale=scale, strict=strict)
    return Gradients(dq, dk, dv, dlog, dbeta, dstate)
