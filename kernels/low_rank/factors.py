"""Thin factors of attention biases: exact ones where the bias has a formula, truncated ones for learned tables."""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot


class Factors(NamedTuple):
    """Factors whose product `query @ key.T` approximates a bias, and how well it does.

    Attributes:
        query: `[heads, queries, rank]`.
        key: `[heads, keys, rank]`.
        relative_error: Frobenius norm of what is missing over that of the bias, of the worst head.
        max_error: largest absolute difference from the bias.
    """

    query: Tensor
    key: Tensor
    relative_error: float
    max_error: float

    @property
    def rank(self) -> int:
        return self.query.shape[-1]


def _smallest_rank(singular: Tensor, energy: float | None, size: int) -> int:
    """Rank that keeps `energy` of every head, or, when None, all that is no rounding error; at least 1."""
    if energy is None:
        noise = singular[:, :1] * size * torch.finfo(singular.dtype).eps
        return max(1, int((singular > noise).sum(1).max()))
    kept = singular.double().square().cumsum(1)  # [heads, rank]
    return 1 + int((kept < kept[:, -1:] * energy).sum(1).max().clamp(max=singular.shape[1] - 1))


@torch.no_grad()
def factorize(bias: Tensor, *, rank: int | None = None, energy: float | None = None) -> Factors:
    """Best factors of a rank by truncated singular value decomposition (arXiv:2505.12044, section 3.2).

    Meant for learned biases at inference; gradients do not flow into the bias. Singular values are shared evenly
    between both factors, so that neither leaves the range of half precision.

    Args:
        bias: `[heads, queries, keys]` or `[queries, keys]`, any floating dtype; float64 is decomposed as such, all else
            in float32.
        rank: columns of the factors, 1 <= rank <= min(queries, keys).
        energy: keep the smallest rank whose squared singular values are this share of their sum in every head,
            0 < energy <= 1; the relative error is then at most sqrt(1 - energy). Without rank and energy, all that
            is not rounding error is kept.

    Returns:
        factors in the dtype of the decomposition, with heads = 1 for a bias without heads, and their errors, measured.

    Raises:
        ValueError: a shape, rank or energy outside what is accepted, rank together with energy, or a bias that is not
            finite: no product of factors hides keys.
    """
    if bias.dim() not in (2, 3) or not bias.dtype.is_floating_point or 0 in bias.shape:
        raise ValueError(
            f"bias ({tuple(bias.shape)}, {bias.dtype}) must be floating point and [heads, queries, keys] or [queries, "
            "keys], not empty"
        )
    if rank is not None and energy is not None:
        raise ValueError(f"rank={rank} and energy={energy} exclude each other")
    if rank is not None and not 1 <= rank <= min(bias.shape[-2:]):
        raise ValueError(f"rank={rank} must lie in [1, min(queries, keys)={min(bias.shape[-2:])}]")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy={energy} must lie in (0, 1]")
    exact = bias.to(torch.promote_types(bias.dtype, torch.float32)).reshape(-1, *bias.shape[-2:])
    if not exact.isfinite().all():
        raise ValueError("bias must be finite; masks have no thin factors")
    u, singular, vh = torch.linalg.svd(exact, full_matrices=False)
    kept = _smallest_rank(singular, energy, max(bias.shape[-2:])) if rank is None else rank
    root = singular[:, None, :kept].sqrt()
    query, key = u[..., :kept] * root, vh[:, :kept].mT * root
    missing = exact - query @ key.mT
    norms = exact.flatten(1).norm(dim=1).clamp(min=torch.finfo(exact.dtype).tiny)
    return Factors(query, key, (missing.flatten(1).norm(dim=1) / norms).max().item(), missing.abs().max().item())


def grid_positions(
    shape: Sequence[int], *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Coordinates `[prod(shape), axes]` of the tokens of a grid in C order, centred on zero.

    Centred, products of coordinates stay small, and with them what rounding costs.
    """
    dtype = torch.get_default_dtype() if dtype is None else dtype
    axes = [torch.arange(n, device=device, dtype=dtype) - (n - 1) / 2 for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def alibi_factors(slopes: Tensor, query_positions: Tensor, key_positions: Tensor) -> tuple[Tensor, Tensor]:
    """Exact factors, of rank 2, of the causal ALiBi bias slope * (key - query) (arXiv:2108.12409).

    The bias of ALiBi without causality, -slope * |key - query|, has no thin factors.

    Args:
        slopes: `[heads]`, differentiable.
        query_positions, key_positions: `[queries]` and `[keys]`.

    Returns:
        query factor `[heads, queries, 2]` and key factor `[heads, keys, 2]`.

    Raises:
        ValueError: an argument with another number of axes.
    """
    for name, x in (("slopes", slopes), ("query_positions", query_positions), ("key_positions", key_positions)):
        if x.dim() != 1:
            raise ValueError(f"{name}.shape={tuple(x.shape)} must have one axis")
    query = torch.stack([torch.ones_like(query_positions), -query_positions], dim=-1)
    key = torch.stack([key_positions, torch.ones_like(key_positions)], dim=-1)
    return slopes[:, None, None] * query, key.expand(len(slopes), -1, -1)


def squared_distance_factors(weights: Tensor, query_positions: Tensor, key_positions: Tensor) -> tuple[Tensor, Tensor]:
    """Exact factors, of rank axes + 2, of the bias sum over axes of weight * (query - key)^2.

    Args:
        weights: `[heads]`, or `[heads, axes]` for another weight on every axis; differentiable.
        query_positions, key_positions: `[queries, axes]` and `[keys, axes]`, e.g. of `grid_positions`; differentiable.

    Returns:
        query factor `[heads, queries, axes + 2]` and key factor `[heads, keys, axes + 2]`.

    Raises:
        ValueError: shapes that do not fit together.
    """
    axes = query_positions.shape[-1]
    if query_positions.dim() != 2 or key_positions.dim() != 2 or key_positions.shape[-1] != axes:
        shapes = f"{tuple(query_positions.shape)} and {tuple(key_positions.shape)}"
        raise ValueError(f"query_positions and key_positions of {shapes} must be [queries, axes] and [keys, axes]")
    if weights.dim() not in (1, 2) or weights.shape[1:] not in ((), (axes,)):
        raise ValueError(f"weights.shape={tuple(weights.shape)} must be [heads] or [heads, axes={axes}]")
    weights = weights[:, None, None].expand(-1, 1, axes) if weights.dim() == 1 else weights[:, None]
    query_square = (weights * query_positions.square()).sum(-1, keepdim=True)  # [heads, queries, 1]
    key_square = (weights * key_positions.square()).sum(-1, keepdim=True)
    query = torch.cat([query_square, torch.ones_like(query_square), -2 * weights * query_positions], dim=-1)
    positions = key_positions.expand(len(weights), -1, -1)
    return query, torch.cat([torch.ones_like(key_square), key_square, positions], dim=-1)


def axis_factors(tables: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Exact factors of a bias that is a sum of one table an axis; their rank is the sum of the query grid's lengths.

    Args:
        tables: per axis `[heads, query length, key length]`, indexed by the coordinates of query and key on that axis;
            differentiable.

    Returns:
        query factor `[heads, queries, rank]`, constant, and key factor `[heads, keys, rank]`, with queries and keys in
        the C order of their grids.

    Raises:
        ValueError: no tables, one with another number of axes, or unequal heads.
    """
    if not tables or any(t.dim() != 3 or t.shape[0] != tables[0].shape[0] for t in tables):
        shapes = [tuple(t.shape) for t in tables]
        raise ValueError(f"tables of {shapes} must be at least one [heads, query length, key length] of equal heads")
    heads, device = tables[0].shape[0], tables[0].device
    query_index = _coordinates([t.shape[1] for t in tables], device)
    key_index = _coordinates([t.shape[2] for t in tables], device)
    query = [one_hot(i, t.shape[1]).to(t.dtype) for i, t in zip(query_index, tables, strict=True)]
    key = [t[:, :, i].mT for i, t in zip(key_index, tables, strict=True)]
    return torch.cat(query, dim=-1).expand(heads, -1, -1), torch.cat(key, dim=-1)


def _coordinates(shape: Sequence[int], device: torch.device) -> list[Tensor]:
    """Per axis the coordinate `[prod(shape)]` of every token of a grid."""
    axes = torch.meshgrid(*(torch.arange(n, device=device) for n in shape), indexing="ij")
    return [x.flatten() for x in axes]


def tile_factor(factor: Tensor, *, window: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Repeat the factor of one window over a grid that windows tile, for operators that attend inside windows.

    Args:
        factor: `[heads, prod(window), rank]`.
        window: tokens of a window along each axis.
        shape: tokens of the grid along each axis, multiples of those of the window.

    Returns:
        `[heads, prod(shape), rank]`.

    Raises:
        ValueError: a grid that windows do not tile, or a factor of another size.
    """
    window, shape = tuple(window), tuple(shape)
    if len(window) != len(shape) or any(n % w for n, w in zip(shape, window, strict=True)):
        raise ValueError(f"shape={shape} must be a multiple of window={window} on every axis")
    if factor.dim() != 3 or factor.shape[1] != prod(window):
        raise ValueError(f"factor.shape={tuple(factor.shape)} must be [heads, prod(window)={prod(window)}, rank]")
    repeats = [n // w for n, w in zip(shape, window, strict=True)]
    return factor.unflatten(1, window).repeat(1, *repeats, 1).flatten(1, -2)
