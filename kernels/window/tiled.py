"""Window attention in plain PyTorch: batched products over stretches of equal shape, without masks or a roll.

A grid falls into few boxes of windows of one shape (`geometry.runs`): one if the window divides it and there is neither
shift nor halo, else the middle, edges and corners. Each box is a batch of dense attentions.
"""

from itertools import product
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from ..common.calling import wants_gradient
from ..common.softmax import softmax
from ..common.symbolic import known
from . import rolled
from .call import WindowCall
from .geometry import Run, runs

Cut = tuple[int, int, int, int]  # how many stretches, the first coordinate, coordinates of one, from one to the next

# Queries of a window from which PyTorch's fused attention is faster than two products and a softmax: where no gradient
# is wanted, and where one is (its backward does not help a bias).
FUSED_INFERENCE = 48
FUSED_TRAINING = 128


def _boxes(x: Tensor, cuts: list[list[Cut]], axis: int = 0) -> list[Tensor]:
    """All boxes of `[B, *spatial, heads, d]`, each `[B, (count, size) per axis, heads, d]`, the last axis fastest."""
    if axis == 0 and all(len(c) == 1 and c[0][2] <= c[0][3] for c in cuts):  # the windows divide the grid
        return [x.view(x.shape[0], *[n for ((count, _, size, _),) in cuts for n in (count, size)], *x.shape[-2:])]
    if axis == len(cuts):
        return [x]
    dim = 1 + 2 * axis  # axes before this one are split in two already
    found = []
    if all(size <= step for _, _, size, step in cuts[axis]):  # stretches follow one another: no halo
        ends = [first for _, first, _, _ in cuts[axis][1:]] + [x.shape[dim]]
        lengths = [end - first for end, (_, first, _, _) in zip(ends, cuts[axis], strict=True)]
        for part, (count, _, size, _) in zip(x.split(lengths, dim), cuts[axis], strict=True):  # its gradient: one cat
            single = isinstance(count, int) and count == 1
            split = part.unsqueeze(dim) if single else part.unflatten(dim, (-1, size))
            found += _boxes(split, cuts, axis + 1)
        return found
    for count, first, size, step in cuts[axis]:
        part = x.narrow(dim, first, (count - 1) * step + size)
        found += _boxes(part.unfold(dim, size, step).movedim(-1, dim + 1), cuts, axis + 1)
    return found


def _join(parts: list[Tensor], counts: list[int], axis: int = 0) -> Tensor:
    """The grid whose boxes, in the order of `_boxes`, are `parts`; `counts` says how many each axis has."""
    if axis == len(counts):
        return parts[0]
    each = len(parts) // counts[axis]
    joined = [_join(parts[i : i + each], counts, axis + 1) for i in range(0, len(parts), each)]
    return joined[0] if len(joined) == 1 else torch.cat(joined, 1 + axis)


def _rows(x: Tensor, rank: int, key_heads: int, fused: bool) -> Tensor:
    """A box as `[windows, key heads, rows, d]`: rows are the window's tokens for every head of a key head in turn.

    Fused attention takes heads of any stride, so that whole tokens are copied for it, which is quicker.
    """
    counts, sizes = range(1, 2 * rank, 2), range(2, 2 * rank + 1, 2)
    batch, heads, d = x.shape[0], *x.shape[-2:]
    windows, tokens = batch * prod([x.shape[i] for i in counts]), prod([x.shape[i] for i in sizes])
    if fused and heads == key_heads:
        order = (0, *counts, *sizes, 2 * rank + 1, 2 * rank + 2)
        return x.permute(order).reshape(windows, tokens, heads, d).transpose(1, 2)
    order = (0, *counts, 2 * rank + 1, *sizes, 2 * rank + 2)
    return x.permute(order).reshape(windows, key_heads, heads // key_heads * tokens, d)


def _tokens(x: Tensor, box: Tensor, key_heads: int) -> Tensor:
    """`[windows, key heads, rows, …]` as the part `[B, *spatial, heads, …]` of the grid that `box` is."""
    batch, *pairs, heads = box.shape[:-1]
    counts, sizes, rank = pairs[::2], pairs[1::2], len(pairs) // 2
    x = x.reshape(batch, *counts, key_heads, heads // key_heads, *sizes, *x.shape[3:])
    order = [0, *[i for a in range(rank) for i in (1 + a, rank + 3 + a)], rank + 1, rank + 2]
    x = x.permute(*order, *range(2 * rank + 3, x.dim()))
    spatial = [c * s for c, s in zip(counts, sizes, strict=True)]
    return x.reshape(batch, *spatial, heads, *x.shape[2 * rank + 3 :])


def _block(bias: Tensor | None, combination: tuple[Run, ...], key_heads: int) -> Tensor | None:
    """`[key heads, rows, keys]` of the bias `[heads, *window, *span]` for one shape of window."""
    if bias is None:
        return None
    rank = len(combination)
    for axis, r in enumerate(combination, 1):
        bias = bias.narrow(axis, r.slot, r.queries).narrow(axis + rank, r.key_slot, r.keys)
    return bias.flatten(1 + rank).reshape(key_heads, -1, prod([r.keys for r in combination]))


def _softmax(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, lse: bool):
    """Output `[windows, heads, rows, d]` and, if asked for, log-sum-exp of dense attentions, in float32 at least."""
    dtype = q.dtype
    accumulate = torch.promote_types(dtype, torch.float32)
    size = q.shape[:3]
    q, k, v = (x.to(accumulate).flatten(0, 1) for x in (q, k, v))
    logits = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale)
    if bias is not None:
        logits = (logits.unflatten(0, size[:2]) + bias.to(accumulate)).flatten(0, 1)
    out = torch.bmm(softmax(logits), v).to(dtype)
    return out.unflatten(0, size[:2]), logits.logsumexp(-1).unflatten(0, size[:2]) if lse else None


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Output `[windows, heads, rows, d]` by PyTorch's fused attention, which wants one head dim of all three."""
    dtype = q.dtype if bias is None else torch.promote_types(q.dtype, bias.dtype)  # a bias is never rounded
    mask, width = None if bias is None else bias.to(dtype)[None], max(q.shape[-1], v.shape[-1])
    rows = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*(x.to(dtype) for x in rows), attn_mask=mask, scale=scale)
    return (out if v.shape[-1] == width else out[..., : v.shape[-1]]).to(q.dtype)


def _is_fused(tensors: tuple[Tensor, ...], bias: Tensor | None, rows: int, lse: bool) -> bool:
    """Return whether PyTorch's fused attention computes a box: faster for many rows, but it has no log-sum-exp."""
    least = FUSED_TRAINING if wants_gradient(*tensors) else FUSED_INFERENCE
    return not lse and not wants_gradient(bias) and known(rows >= least)


def attend_box(
    q: Tensor, k: Tensor, v: Tensor, *, block: Tensor | None, scale: float, lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Output and, with `lse`, log-sum-exp of a box of windows of one shape, as parts of the grid.

    Args:
        q, k, v: `[B, (count, size) per axis, heads, d]`.
        block: bias `[key heads, rows, keys]`, see `_block`.
    """
    rank, key_heads = (q.dim() - 3) // 2, k.shape[-2]
    fused = _is_fused((q, k, v), block, prod(q.shape[2:-2:2]), lse)
    q_rows, k_rows, v_rows = [_rows(x, rank, key_heads, fused) for x in (q, k, v)]
    if fused:
        return _tokens(_fused(q_rows, k_rows, v_rows, block, scale), q, key_heads), None
    out, found = _softmax(q_rows, k_rows, v_rows, block, scale, lse)
    return _tokens(out, q, key_heads), None if found is None else _tokens(found, q, key_heads)


def attend(query: Tensor, key: Tensor, value: Tensor, call: WindowCall) -> tuple[Tensor, Tensor | None]:
    """Output `[B, *spatial, heads, value_dim]` and natural log-sum-exp `[B, *spatial, heads]`.

    The latter is None where the call does not ask for it, but for windows of symbolic lengths.
    """
    axes, bias = call.axes, call.bias
    if rolled.covers(axes):
        return rolled.attend(query, key, value, call)
    heads, key_heads, dtype = query.shape[-2], key.shape[-2], query.dtype
    if any(a.halo for a in axes):  # gradients of keys that several windows see are summed in float32
        query, key, value = (x.to(torch.promote_types(dtype, torch.float32)) for x in (query, key, value))
    table = None
    if bias is not None:
        table = bias.reshape([heads, *[a.window for a in axes], *[a.span for a in axes]])
    shapes = [runs(a) for a in axes]
    query_cuts = [[(r.count, r.query, r.queries, a.window) for r in s] for s, a in zip(shapes, axes, strict=True)]
    key_cuts = [[(r.count, r.key, r.keys, a.window) for r in s] for s, a in zip(shapes, axes, strict=True)]
    boxes = [_boxes(query, query_cuts), _boxes(key, key_cuts), _boxes(value, key_cuts)]
    outs, lses = [], []
    for combination, q, k, v in zip(product(*shapes), *boxes, strict=True):
        block = _block(table, combination, key_heads)
        block_out, block_lse = attend_box(q, k, v, block=block, scale=call.scale, lse=call.return_lse)
        outs.append(block_out)
        if block_lse is not None:
            lses.append(block_lse)
    counts = [len(s) for s in shapes]
    return _join(outs, counts).to(dtype), _join(lses, counts) if lses else None
