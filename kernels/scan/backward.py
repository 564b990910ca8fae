"""Gradients of scan attention by the kernels of its forward pass: each of them is a scan.

With D the decay between two tokens and u what tokens write, out_i = sum_j D_ij (q_i.k_j) u_j over j <= i. The gradient
of q is a scan of keys u and values k that is asked by the gradient of the output; those of k and u run from the last
token to the first. With the delta rule u itself depends on what was written before it; the gradient of the values
solves the same equation in the other direction:

    x_j = gradient of u_j through the outputs and the last state
    y_j = beta_j (x_j - sum_(i > j) D_ij (k_j.k_i) y_i)          the gradient of v_j; that of u_j is y_j / beta_j

A log decay is in the sums of its token and all later ones, and D in differences of two sums: the gradient of a sum is
what flows into the token's reads, less what flows into its writes.
"""

from typing import NamedTuple

from torch import Tensor

from .passes import Order, scan, written


class Gradients(NamedTuple):
    """float32 `[B, tokens, heads, …]`; `log_decay` and `beta` in the order of the tokens."""

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor
    beta: Tensor | None
    state: Tensor


def gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    grad_last: Tensor,
    last: Tensor,
    order: Order,
    *,
    first: Tensor | None,
    scale: float,
    strict: bool,
) -> Gradients:
    """Gradients of all tensors; `grad_last` is that of the state `last`, `first` the state before the first token."""
    back, plain = order.back()._replace(beta=None), order._replace(beta=None)
    from_last = dict(near=scale, write=scale, first=grad_last)
    first_t = None if first is None else first.mT
    u = value if order.beta is None else written(key, value, order, first)
    dv, dstate = scan(key, query, grad_out, back, strict=strict, **from_last)
    dq, _ = scan(grad_out, u, key, plain, strict=strict, near=scale, far=scale, first=first_t)
    from_last["first"] = grad_last.mT
    dk, _ = scan(u, grad_out, query, back, strict=strict, **from_last)
    q, k = (x.flatten(1, -3).float() for x in (query, key))
    dsums, dbeta = (q * dq).sum(-1), None
    if order.beta is not None:
        through = written(key, dv, order.back())
        later, later_state = scan(key, key, through, back, strict=True)
        du, dv, dstate = dv - later, through, dstate - later_state
        reads = -scan(du, u, key, plain, strict=True, first=first_t)[0]
        dbeta = (du * value.flatten(1, -3)).sum(-1) + (k * reads).sum(-1)
        beta = order.beta.flip(-1) if order.reverse else order.beta
        reads = reads * beta.transpose(1, 2).unsqueeze(-1)
        dk = dk - scan(u, dv, key, back, strict=True)[0]
        dsums = dsums + (k * reads).sum(-1) - (k * dk).sum(-1)
        dk = dk + reads
    else:
        dsums = dsums - (k * dk).sum(-1)
    # sums of the tokens after it, in the order of the scan
    dlog = dsums.cumsum(1) if order.reverse else dsums.flip(1).cumsum(1).flip(1)
    dlog = dlog + (grad_last * last).sum((-1, -2)).unsqueeze(1)
    if order.decay is not None:
        dstate = dstate * order.decay[..., 0].exp()[..., None, None]
    return Gradients(dq, dk, dv, dlog, dbeta, dstate)
