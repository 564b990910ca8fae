"""Softmax attention in torch's dispatcher: two operators with their fake kernels, gradient and FLOP formulas.

Only torch is imported here, so a first call may be a compiled one; the modules that compute are imported when they
first run.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module

import torch
from torch.utils.flop_counter import register_flop_formula


def define(
    name: str,
    module: str,
    *,
    extras: Sequence[str],
    rest: str,
    unpack: Callable[..., dict],
    flops: Callable[..., tuple[int, int]],
    title: str,
) -> None:
    """Define a softmax attention that returns its output and log-sum-exp, and the operator of its gradient.

        foveal::{name}_forward(query, key, value, *extras, *rest) -> (out, lse)
        foveal::{name}_backward(query, key, value, out, lse, grad_out, grad_lse, *extras, *rest) -> gradients

    Both run functions of a module, `forward(query, key, value, **unpacked)` and
    `backward(query, key, value, out, lse, grad_out, grad_lse, **unpacked)`, whose gradient of a tensor not given counts
    for nothing: it may be None.

    Args:
        name: as above.
        module: full name of the module that computes.
        extras: names of tensors that have gradients like query, key and value, each of them optional: the gradient of
            one that is None is an empty tensor.
        rest: schema of arguments without gradients.
        unpack: makes keyword arguments of the module's functions from (query, key, *extras, *rest).
        flops: what the forward and the backward compute, from (query, key, value, *extras, *rest) with shapes for
            tensors.
        title: the attention, as an error calls it.
    """
    forward_name, backward_name = f"foveal::{name}_forward", f"foveal::{name}_backward"
    given = 3 + len(extras)  # tensors that have gradients
    is_tensor = [True] * len(extras) + ["Tensor" in argument for argument in rest.split(", ")]  # of all after value
    more = "".join(f"Tensor? {extra}, " for extra in extras) + rest
    torch.library.define(forward_name, f"(Tensor query, Tensor key, Tensor value, {more}) -> (Tensor, Tensor)")
    torch.library.define(
        backward_name,
        "(Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor grad_out, Tensor grad_lse, "
        f"{more}) -> ({', '.join(['Tensor'] * given)})",
    )
    kernels = cache(partial(import_module, module))
    forward_operator = getattr(torch.ops.foveal, f"{name}_forward")
    backward_operator = getattr(torch.ops.foveal, f"{name}_backward")

    @torch.library.impl(forward_name, "default")
    def forward(query, key, value, *more):
        out, lse = kernels().forward(query, key, value, **unpack(query, key, *more))
        return out.contiguous(), lse.contiguous()

    @torch.library.impl(backward_name, "default")
    def backward(query, key, value, out, lse, grad_out, grad_lse, *more):
        dq, dk, dv, *rest = kernels().backward(
            query, key, value, out, lse, grad_out, grad_lse, **unpack(query, key, *more)
        )
        found = [query.new_empty(0) if x is None else g.contiguous() for x, g in zip(more, rest, strict=False)]
        return dq.contiguous(), dk.contiguous(), dv.contiguous(), *found

    @torch.library.register_fake(forward_name)
    def forward_fake(query, key, value, *_):
        rows, accumulate = query.shape[:-1], torch.promote_types(query.dtype, torch.float32)
        return query.new_empty(*rows, value.shape[-1]), query.new_empty(rows, dtype=accumulate)

    @torch.library.register_fake(backward_name)
    def backward_fake(query, key, value, out, lse, grad_out, grad_lse, *more):
        each = (query, key, value, *more)[:given]
        return tuple(query.new_empty(0) if x is None else x.new_empty(x.shape) for x in each)

    def setup_context(ctx, inputs, output) -> None:
        tensors = (x for x, keep in zip(inputs[3:], is_tensor, strict=True) if keep)
        ctx.save_for_backward(*inputs[:3], *output, *tensors)
        ctx.constants = [x for x, tensor in zip(inputs[3:], is_tensor, strict=True) if not tensor]

    def differentiate(ctx, grad_out, grad_lse):
        if torch.is_grad_enabled() and (grad_out.requires_grad or grad_lse.requires_grad):
            raise NotImplementedError(f"{title} has no double backward; use impl='reference'")
        query, key, value, out, lse, *tensors = ctx.saved_tensors
        kept, constants = iter(tensors), iter(ctx.constants)
        more = [next(kept if tensor else constants) for tensor in is_tensor]
        dq, dk, dv, *rest = backward_operator(query, key, value, out, lse, grad_out, grad_lse, *more)
        found = [None if x is None else g for x, g in zip(more, rest, strict=False)]
        return dq, dk, dv, *found, *(None,) * (len(is_tensor) - len(extras))

    torch.library.register_autograd(forward_name, differentiate, setup_context=setup_context)

    @register_flop_formula(forward_operator)
    def forward_flops(*arguments, out_shape=None, **_) -> int:
        return flops(*arguments)[0]

    @register_flop_formula(backward_operator)
    def backward_flops(query, key, value, out, lse, grad_out, grad_lse, *more, out_shape=None, **_) -> int:
        return flops(query, key, value, *more)[1]
