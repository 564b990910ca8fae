"""Orders of the tokens of a grid, for masks of sequences: along other axes, along a space-filling curve, by content.

An order lists raster numbers, place by place: `x.flatten(1, -3)[:, order]` lays tokens out, `[:, inverse]` back.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

Vector = tuple[int, ...]


def inverse_order(order: Tensor) -> Tensor:
    """The order that undoes `order`, along the last dimension."""
    return order.argsort(dim=-1)


def axis_order(shape: Sequence[int], order: Sequence[int]) -> Tensor:
    """Raster order of a grid whose axes are taken in another order, int64 `[tokens]`.

    Args:
        shape: tokens of the grid along each axis.
        order: a permutation of the axes, the last of them fastest.

    Raises:
        ValueError: not a permutation.
    """
    if sorted(order) != list(range(len(shape))):
        raise ValueError(f"order={tuple(order)} must be a permutation of the axes of shape={tuple(shape)}")
    return torch.arange(torch.Size(shape).numel()).view(*shape).permute(*order).flatten()


def _add(*vectors: Vector) -> Vector:
    return tuple(map(sum, zip(*vectors, strict=True)))


def _minus(x: Vector) -> Vector:
    return tuple(-n for n in x)


def _sides(x: Vector) -> tuple[int, Vector, Vector]:
    """Length of a side, its unit step, and its first half, which is even where the side is longer than 2."""
    length, step = abs(sum(x)), tuple((n > 0) - (n < 0) for n in x)
    half = tuple(n // 2 for n in x)
    return length, step, _add(half, step) if abs(sum(half)) % 2 and length > 2 else half


def _curve(start: Vector, a: Vector, b: Vector, c: Vector) -> Iterator[Vector]:
    """Points of the cuboid with sides a, b, c at `start`, from there to the end of a, neighbour by neighbour."""
    (w, da, a2), (h, db, b2), (d, dc, c2) = _sides(a), _sides(b), _sides(c)
    for length, step, others in ((w, da, (h, d)), (h, db, (w, d)), (d, dc, (w, h))):
        if others == (1, 1):
            for _ in range(length):
                yield start
                start = _add(start, step)
            return
    rest_a, rest_b, rest_c = (_add(x, _minus(half)) for x, half in ((a, a2), (b, b2), (c, c2)))
    end_a, end_b, end_c = (_add(x, _minus(step)) for x, step in ((a, da), (b2, db), (c2, dc)))
    if 2 * w > 3 * h and 2 * w > 3 * d:  # long: two cuboids
        parts = [(start, a2, b, c), (_add(start, a2), rest_a, b, c)]
    elif 3 * h > 4 * d:  # flat: three, as in the plane of a and b
        parts = [
            (start, b2, c, a2),
            (_add(start, b2), a, rest_b, c),
            (_add(start, end_a, end_b), _minus(b2), c, _minus(rest_a)),
        ]
    elif 3 * d > 4 * h:  # three, in the plane of a and c
        parts = [
            (start, c2, a2, b),
            (_add(start, c2), a, b, rest_c),
            (_add(start, end_a, end_c), _minus(c2), _minus(rest_a), b),
        ]
    else:
        top = _add(c, _minus(dc))
        parts = [
            (start, b2, c2, a2),
            (_add(start, b2), c, a2, rest_b),
            (_add(start, end_b, top), a, _minus(b2), _minus(rest_c)),
            (_add(start, end_a, b2, top), _minus(c), _minus(rest_a), rest_b),
            (_add(start, end_a, end_b), _minus(b2), c2, _minus(rest_a)),
        ]
    for part in parts:
        yield from _curve(*part)


def gilbert_order(shape: Sequence[int]) -> Tensor:
    """The generalised Hilbert ("Gilbert") curve through a grid of two or three axes of any lengths: consecutive tokens
    are neighbours, but for a few steps where lengths are odd. int64 `[tokens]`.

    Raises:
        ValueError: a grid of another number of axes.
    """
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(f"shape={tuple(shape)} must have two or three axes of at least 1 token")
    depth, height, width = (1, *shape) if len(shape) == 2 else shape
    sides = [(width, 0, 0), (0, height, 0), (0, 0, depth)]
    longest = max(sides, key=max)  # the first of equals
    others = [x for x in sides if x is not longest]
    points = torch.tensor(list(_curve((0, 0, 0), longest, *others)))
    return points[:, 0] + width * (points[:, 1] + height * points[:, 2])


@torch.no_grad()
def content_order(
    query: Tensor,
    key: Tensor,
    *,
    kind: Literal["lsh", "kmeans"] = "kmeans",
    clusters: int = 16,
    rounds: int = 3,
    directions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Orders in which queries, and keys, that are alike stand together.

    "lsh": the signs of products with `directions` are the bits of a bucket (HyperAttention, arXiv:2310.05869);
    buckets are numbered by the Gray code of these bits, as published. "kmeans": spherical k-means of the
    queries and keys together, from evenly spaced queries (Routing Transformer, arXiv:2003.05997).

    Args:
        query, key: `[B, tokens, heads, d]`, as many heads.
        kind: see above.
        clusters, rounds: of "kmeans".
        directions: `[d, bits]` of "lsh".

    Returns:
        order of queries, order of keys: int64 `[B, heads, tokens]`; equal buckets keep their order.
        bucket of every query, of every key, in the same shape.

    Raises:
        ValueError: an argument outside what is accepted.
    """
    if query.dim() != 4 or key.dim() != 4 or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"query.shape={tuple(query.shape)}, key.shape={tuple(key.shape)} must be [B, tokens, heads, d]"
        )
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k = (x.to(dtype).transpose(1, 2) for x in (query, key))  # [B, heads, tokens, d]
    if kind == "lsh":
        if directions is None:
            raise ValueError("kind='lsh' needs directions, [head_dim, bits]")
        powers = 2 ** torch.arange(directions.shape[-1], device=query.device)
        codes = [((x @ directions.to(x)) > 0).to(torch.int64) for x in (q, k)]
        numbers = [(code * powers).sum(-1) for code in codes]
        buckets = [x ^ (x >> 1) for x in numbers]  # the Gray code
    elif kind == "kmeans":
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
        both = torch.cat([q, k], dim=2)
        first = torch.linspace(0, q.shape[2] - 1, clusters, device=query.device).long()
        centres = q[:, :, first]
        for _ in range(rounds):
            member = torch.zeros(*both.shape[:3], clusters, dtype=dtype, device=query.device)
            member = member.scatter(-1, (both @ centres.mT).argmax(-1, keepdim=True), 1)
            centres = torch.nn.functional.normalize(member.mT @ both, dim=-1)
        buckets = [(x @ centres.mT).argmax(-1) for x in (q, k)]
    else:
        raise ValueError(f"kind={kind!r} must be 'lsh' or 'kmeans'")
    orders = [x.sort(dim=-1, stable=True).indices for x in buckets]
    return orders[0], orders[1], buckets[0], buckets[1]
