"""Exchange of keys and values between ranks in two autograd steps, with the interior computed between them.

    forward:   Pack, send | interior | Wait, border
    backward:  border, Wait sends gradients | interior | Pack waits and adds

The outputs of the interior pass through Wait. So their gradients enter the interior only after the gradients that
other ranks wait for were sent. A rank that sends or receives nothing takes part in the collective as well.

The tensor that `send` returns is not filled yet: it may be read only after `wait`. Autograd hands it from Wait to Pack
unread, and the process group keeps the sent tensor alive. The collectives are those of torch.ops._c10d_functional,
because collectives with a handle are no operators of a compiled graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed._functional_collectives import wait_tensor

from .shards import Part, Shard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Span = tuple[int, int]


def send(outgoing: Tensor, counts: Sequence[int], receive: Sequence[int], group: ProcessGroup) -> Tensor:
    """Send `counts[rank]` rows to each rank; returns the tensor `[sum(receive), …]` of the rows to come."""
    return torch.ops._c10d_functional.all_to_all_single(outgoing, list(receive), list(counts), group.group_name)


def wait(incoming: Tensor) -> Tensor:
    """Wait until a received tensor is filled, in the current stream on a GPU. A second wait returns at once."""
    return wait_tensor(incoming)


def _cut(x: Tensor, dim: int, span: Span) -> Tensor:
    return x.narrow(dim, span[0], span[1] - span[0])


def _spans(part: Part) -> tuple[Span, Span, Span]:
    """Ranges of `part.axis` that hold the tokens of lower ranks, own tokens, and the tokens of higher ranks."""
    lower, own, upper = (last - first for first, last in (part.lower, part.own, part.upper))
    first, last = part.margin + lower, part.margin + lower + own
    return (part.margin, first), (first, last), (last, last + upper)


def _lay_out(part: Part, arrived: Tensor, own: Tensor, dim: int) -> Tensor:
    """Assemble key or value on `part.axis`; tokens that no query sees are zero."""
    end = _spans(part)[2][1]
    shape = [*own.shape]
    zeros = [own.new_zeros(shape[:dim] + [n] + shape[dim + 1 :]) for n in (part.margin, part.axis.length - end)]
    return torch.cat([zeros[0], _cut(arrived, dim, part.lower), own, _cut(arrived, dim, part.upper), zeros[1]], dim)


def _is_next(node) -> bool:
    """Return whether autograd will execute `node` in this backward; `torch.autograd.grad(inputs=…)` prunes the rest."""
    return torch._C._will_engine_execute_node(node)


class Pack(torch.autograd.Function):
    """Copy the own keys and values that other ranks need.

    Args: key, value `[B, *spatial, key_heads, head_dim]`; the shard and the split dimension.
    Returns: rows to send, key and value of a token side by side, `[tokens, B, …, key_heads, key dim + value dim]`; then
        per part its own keys and its own values, as views.
    """

    @staticmethod
    def forward(ctx, key: Tensor, value: Tensor, shard: Shard, dim: int) -> tuple[Tensor, ...]:
        ctx.shard, ctx.dim, ctx.shapes = shard, dim, (key.shape, value.shape)
        both = [torch.cat([_cut(x, dim, span).movedim(dim, 0) for x in (key, value)], -1) for span in shard.send]
        return torch.cat(both), *(_cut(x, dim, part.own) for part in shard.parts for x in (key, value))

    @staticmethod
    @once_differentiable
    def backward(ctx, returned: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        shard: Shard = ctx.shard
        accumulate = torch.promote_types(returned.dtype, torch.float32)
        totals = [returned.new_zeros(shape, dtype=accumulate) for shape in ctx.shapes]  # of key and value
        widths = [shape[-1] for shape in ctx.shapes]
        for i, grad in enumerate(grads):
            _cut(totals[i % 2], ctx.dim, shard.parts[i // 2].own).add_(grad)
        for span, part in zip(shard.send, wait(returned).split(shard.sent), strict=True):
            for total, grad in zip(totals, part.split(widths, -1), strict=True):
                _cut(total, ctx.dim, span).add_(grad.movedim(0, ctx.dim))
        return *(total.to(returned.dtype) for total in totals), None, None


class Wait(torch.autograd.Function):
    """Wait for the tokens of other ranks and assemble the keys and values of the border.

    Args: the shard, the split dimension, the head dims of key and value, the process group; the sent and the incoming
        tensor; own keys and values of the border, as `Pack` returned them; the outputs of the interior.
    Returns: key and value per part of the border; the outputs of the interior unchanged.
    """

    @staticmethod
    def forward(
        ctx,
        shard: Shard,
        dim: int,
        widths: tuple[int, int],
        group: ProcessGroup,
        outgoing: Tensor,
        incoming: Tensor,
        *tensors: Tensor,
    ):
        ctx.shard, ctx.dim, ctx.widths, ctx.group, ctx.shape = shard, dim, widths, group, incoming.shape
        # Activation checkpointing recomputes up to the last saved tensor. This one makes it reach the wait even if no
        # border follows.
        ctx.save_for_backward(incoming.new_empty(0))
        arrived = [x.movedim(0, dim) for x in wait(incoming).split(widths, -1)]
        count = 2 * len(shard.border)
        laid = [_lay_out(shard.border[i // 2], arrived[i % 2], tensors[i], dim) for i in range(count)]
        return *laid, *tensors[count:]

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        shard, dim, count = ctx.shard, ctx.dim, 2 * len(ctx.shard.border)
        if not ctx.needs_input_grad[4]:  # neither key nor value requires a gradient, on any rank
            return *(None for _ in range(6 + count)), *grads[count:]
        (like,) = ctx.saved_tensors
        total = like.new_zeros(ctx.shape, dtype=torch.promote_types(like.dtype, torch.float32))
        totals, own = [x.movedim(0, dim) for x in total.split(ctx.widths, -1)], []
        for i, grad in enumerate(grads[:count]):
            part, received = shard.border[i // 2], totals[i % 2]
            below, mine, above = _spans(part)
            _cut(received, dim, part.lower).add_(_cut(grad, dim, below))
            _cut(received, dim, part.upper).add_(_cut(grad, dim, above))
            own.append(_cut(grad, dim, mine))
        returned = send(total.to(like.dtype), shard.receive, shard.sent, ctx.group)
        if not torch.compiler.is_compiling() and (torch.is_anomaly_enabled() or not _is_next(ctx.next_functions[0][0])):
            returned = wait(returned)  # anomaly mode reads the tensor at once, and a pruned Pack never waits
        return None, None, None, None, returned, None, *own, *grads[count:]
