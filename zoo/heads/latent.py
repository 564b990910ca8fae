"""Ranks of projections and of attention, and keys and values through a latent of low rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attentions import find_attentions


def effective_rank(singular: Tensor) -> float:
    """Exponential of the entropy of singular values, 1 to their number."""
    p = singular / singular.sum().clamp_min(1e-30)
    return torch.exp(-(p * p.clamp_min(1e-30).log()).sum()).item()


def energy_rank(singular: Tensor, energy: float) -> int:
    """Number of leading singular values whose squares together hold at most this share of all."""
    share = singular.square().cumsum(0) / singular.square().sum()
    return int((share <= energy).sum())


@dataclass(frozen=True)
class HeadRank:
    """Ranks of one head.

    Attributes:
        name, head: attention and number of the head.
        effective: of the product of query and key projections: exponential of the entropy of its singular values.
        energy: singular values of it that hold 99 % of the energy.
        stable: squared Frobenius norm over squared spectral norm.
        logits, weights: effective ranks of the logits and of their softmax, mean over the batch; None without images.
    """

    name: str
    head: int
    effective: float
    energy: int
    stable: float
    logits: float | None = None
    weights: float | None = None


@torch.no_grad()
def rank_probe(model: nn.Module, images: Tensor | None = None) -> list[HeadRank]:
    """Measure how much of their rank the heads of a model use (arXiv:2407.16153 studies what low ranks cost).

    Args:
        model: any model whose attentions `find_attentions` knows.
        images: a batch to measure logits and weights on, without biases and rotary embeddings.

    Returns:
        a row per head, in order of the layers.
    """
    sites, seen = find_attentions(model), {}
    if images is not None:
        handles = [s.module.qkv.register_forward_hook(lambda m, i, o, n=s.name: seen.__setitem__(n, o)) for s in sites]
        try:
            model(images)
        finally:
            for handle in handles:
                handle.remove()
    rows = []
    for site in sites:
        weight = dense_weight(site.module.qkv).double().unflatten(0, (3, site.heads, site.head_dim))
        on_data: Any = [(None, None)] * site.heads
        if site.name in seen:
            q, k = seen[site.name].flatten(1, -2).double().unflatten(-1, (3, site.heads, -1)).unbind(2)[:2]
            logits = torch.einsum("bihd,bjhd->bhij", q, k) * site.head_dim**-0.5
            on_data = [
                tuple(
                    sum(map(effective_rank, torch.linalg.svdvals(x[:, h]))) / len(x)
                    for x in (logits, logits.softmax(-1))
                )
                for h in range(site.heads)
            ]
        for head in range(site.heads):
            singular = torch.linalg.svdvals(weight[0, head].T @ weight[1, head])[: site.head_dim]
            stable = (singular.square().sum() / singular[0].square().clamp_min(1e-30)).item()
            ranks = effective_rank(singular), max(1, energy_rank(singular, 0.99)), stable
            rows.append(HeadRank(site.name, head, *ranks, *on_data[head]))
    return rows


def dense_weight(layer: nn.Module) -> Tensor:
    """Weight of a linear layer, or the product of a latent one."""
    return layer.dense_weight() if isinstance(layer, LatentQKV) else layer.weight  # pyright: ignore


def factors(weight: Tensor, *, rank: int | None = None, energy: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Best factors of a matrix by singular values: the error is the sum of the squares behind.

    Args:
        weight: `[out, in]`.
        rank: of the factors.
        energy: share of the squared singular values, instead of a rank.

    Returns:
        up: `[out, rank]`, orthonormal columns.
        down: `[rank, in]`.
        singular: all singular values.

    Raises:
        ValueError: both or none of rank and energy, or one out of range.
    """
    if (rank is None) == (energy is None):
        raise ValueError(f"rank={rank} and energy={energy}: give one of them")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy={energy} must lie in (0, 1]")
    most = min(weight.shape)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    if energy is not None:
        rank = most if energy == 1 else max(1, energy_rank(s, energy))
    assert rank is not None
    if not 1 <= rank <= most:
        raise ValueError(f"rank={rank} must lie in [1, {most}]")
    return u[:, :rank], s[:rank, None] * v[:rank], s


class LatentQKV(nn.Module):
    """Queries by a linear layer, keys and values through a latent of low rank; called as the `qkv` of an attention.

    Args:
        q: projection of the queries.
        down, up: to the latent, and from it to keys and values.
    """

    def __init__(self, q: nn.Linear, down: nn.Linear, up: nn.Linear):
        super().__init__()
        self.q, self.down, self.up = q, down, up
        self.in_features, self.out_features = q.in_features, q.out_features + up.out_features

    def forward(self, x: Tensor) -> Tensor:
        """`[…, dim]` to `[…, 3 * heads * head_dim]`."""
        return torch.cat([self.q(x), self.up(self.down(x))], dim=-1)

    def dense_weight(self) -> Tensor:
        """The weight of one linear layer that does the same."""
        return torch.cat([self.q.weight, self.up.weight @ self.down.weight])


@torch.no_grad()
def to_latent(model: nn.Module, *, rank: int | None = None, energy: float | None = None) -> dict[str, int]:
    """Put keys and values of every attention through a shared latent, from the singular values of their weights.

    Keys and values of all heads are stacked and cut to a rank, as multi-head latent attention has them (X-EcoMLA,
    arXiv:2503.11132, section 3, without rotary channels). At full rank the model is the same; below, it is a start for
    fine-tuning or distillation. Attentions must call `qkv` as a layer.

    Args:
        model: changed in place; any model whose attentions `find_attentions` knows.
        rank: of the latent of all attentions.
        energy: share of squared singular values that each keeps, instead.

    Returns:
        rank of each attention by name.

    Raises:
        ValueError: both or none of rank and energy, one out of range, or a model that is latent already. Nothing has
            been changed then.
    """
    sites = find_attentions(model)
    ready = {}
    for site in sites:
        if not isinstance(site.module.qkv, nn.Linear):
            raise ValueError(f"{site.name}.qkv is a {type(site.module.qkv).__name__}; expected a linear layer")
        ready[site.name] = factors(site.module.qkv.weight[site.heads * site.head_dim :], rank=rank, energy=energy)
    ranks = {}
    for site in sites:
        old, width = site.module.qkv, site.heads * site.head_dim
        up, down, _ = ready[site.name]
        dd: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
        layers = (
            nn.Linear(old.in_features, width, old.bias is not None, **dd),
            nn.Linear(old.in_features, len(down), bias=False, **dd),
            nn.Linear(len(down), 2 * width, old.bias is not None, **dd),
        )
        for layer, weight in zip(layers, (old.weight[:width], down, up), strict=True):
            layer.weight.copy_(weight)
        if old.bias is not None:
            layers[0].bias.copy_(old.bias[:width])
            layers[2].bias.copy_(old.bias[width:])
        site.module.qkv = LatentQKV(*layers)
        ranks[site.name] = len(down)
    return ranks
