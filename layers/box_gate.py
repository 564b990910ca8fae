"""A learned choice of blocks: SeerAttention's gate (arXiv:2410.13276)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.block_sparse import BlockMask
from ..kernels.common.calling import PerAxis, resolve_scale, without_autocast
from ..kernels.masks import keep, to_mask
from ..kernels.masks.blocks import block_extrema, block_means, check_blocks, cut_into_blocks, most_own, own_or_none
from ..kernels.masks.select import pair_scores

LOGITS = 1 << 24  # of the target that are held at a time


class _HeadLinear(nn.Module):
    """A matrix for every head, `[..., heads, inputs]` to `[..., heads, outputs]`."""

    def __init__(self, heads: int, inputs: int, outputs: int, **dd: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, inputs, outputs, **dd))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...hc,hcd->...hd", x, self.weight.to(x.dtype))


def _rotate(x: Tensor, places: Sequence[Tensor], theta: float) -> Tensor:
    """Rotary positions of blocks: `[B, blocks, heads, d]`, the channels shared out among the axes in pairs."""
    pairs = x.shape[-1] // 2
    angles = []
    for axis, place in enumerate(places):
        own = pairs // len(places) + (axis < pairs % len(places))
        rate = theta ** -(torch.arange(own, device=x.device, dtype=x.dtype) / max(1, own))
        angles.append(place.to(x.dtype)[:, None] * rate)
    angle = torch.cat(angles, dim=-1)[:, None]  # [blocks, 1, pairs]
    first, second = x[..., :pairs], x[..., pairs : 2 * pairs]
    turned = first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()
    return torch.cat([*turned, x[..., 2 * pairs :]], dim=-1)


class BoxGate(nn.Module):
    """SeerAttention's gate: logits of pairs of blocks from pooled queries and keys, before their rotary positions.

    Queries are averaged over a block; of keys the largest, smallest and mean entries are mapped by a matrix of every
    head. The attention around it stays as it is and frozen: `loss` teaches the gate the attention's own map, `mask`
    then chooses blocks. At first the gate is the product of means.

    Parameters have the names of the official checkpoints: `mask_linear_k.weight` `[heads, 3 * head_dim, gate_dim]`,
    and `mask_linear_q.weight` `[heads, head_dim, gate_dim]` if `gate_dim` is given.

    Args:
        num_heads: heads of queries.
        head_dim: channels of a head.
        query_block, key_block: tokens of a block along each axis; one number for all axes.
        gate_dim: channels of the gate's products; None: head_dim, without a matrix for queries.
        rope_theta: base of rotary positions of blocks, their number along each axis; None for none.

    Raises:
        ValueError: numbers below 1.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        query_block: PerAxis[int] = 64,
        key_block: PerAxis[int] = 64,
        gate_dim: int | None = None,
        rope_theta: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if min(num_heads, head_dim, gate_dim or 1) < 1:
            raise ValueError(f"num_heads={num_heads}, head_dim={head_dim} and gate_dim={gate_dim} must be at least 1")
        dd = {"device": device, "dtype": dtype}
        self.num_heads, self.head_dim, self.gate_dim = num_heads, head_dim, gate_dim
        self.query_block, self.key_block, self.rope_theta = query_block, key_block, rope_theta
        self.mask_linear_k = _HeadLinear(num_heads, 3 * head_dim, gate_dim or head_dim, **dd)
        self.mask_linear_q = None if gate_dim is None else _HeadLinear(num_heads, head_dim, gate_dim, **dd)
        self.imitation: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            weight = self.mask_linear_k.weight.zero_()
            if self.mask_linear_q is None:
                weight[:, 2 * self.head_dim :].copy_(torch.eye(self.head_dim))
                return
            same = torch.empty_like(self.mask_linear_q.weight).normal_(std=self.head_dim**-0.5)
            self.mask_linear_q.weight.copy_(same)
            weight[:, 2 * self.head_dim :].copy_(same)

    def _check(self, query: Tensor, key: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        blocks = check_blocks(query, key, self.query_block, self.key_block)
        if query.shape[-2:] != (self.num_heads, self.head_dim):
            raise ValueError(f"query.shape={tuple(query.shape)} must end in {(self.num_heads, self.head_dim)}")
        return blocks

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """Logits `[B, heads, query blocks, key blocks]` of `[B, *spatial, heads, d]` and `[B, *key_spatial, key_heads,
        d]`; gradients reach the gate's parameters only.

        Raises:
            ValueError: shapes that do not fit.
        """
        query_block, key_block = self._check(query, key)
        query, key = query.detach(), key.detach()
        means, (low, high) = block_means(key, key_block), block_extrema(key, key_block)
        pooled = torch.cat([high, low, means], dim=-1).repeat_interleave(self.num_heads // key.shape[-2], dim=-2)
        queries = block_means(query, query_block)
        with without_autocast(query.device):
            keys = self.mask_linear_k(pooled)
            queries = queries if self.mask_linear_q is None else self.mask_linear_q(queries)
            if self.rope_theta is not None:
                queries = _rotate(queries, _places(query, query_block), self.rope_theta)
                keys = _rotate(keys, _places(key, key_block), self.rope_theta)
            return pair_scores(queries, keys, scale=keys.shape[-1] ** -0.5)

    @torch.no_grad()
    def mask(
        self, query: Tensor, key: Tensor, *, threshold: float | None = None, topk: int | None = None, own: bool = True
    ) -> BlockMask:
        """Blocks of which the gate's softmax is at least `threshold`, or the `topk` highest; 0.002 of neither.

        Args:
            query, key: as of `forward`.
            threshold, topk: one of them. Official: 0.002, or a share of the blocks.
            own: keep the own blocks besides.
        """
        query_block, key_block = self._check(query, key)
        if threshold is not None and topk is not None:
            raise ValueError(f"threshold={threshold!r} and topk={topk!r}: give one of them")
        always = own_or_none(query, key, query_block, key_block, own)
        if topk is not None:
            kept = keep(self(query, key), rule="topk", topk=topk, always=always)
            most = topk + most_own(query_block, key_block)
            return to_mask(kept, query_block=query_block, key_block=key_block, most=most)
        gate = self(query, key).softmax(-1)
        kept = keep(gate, rule="threshold", threshold=0.002 if threshold is None else threshold, always=always)
        return to_mask(kept, query_block=query_block, key_block=key_block)

    def loss(self, query: Tensor, key: Tensor, *, gate_inputs: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Kullback-Leibler divergence of the gate from the attention's own map, the mean over its rows; a scalar.

        Args:
            query, key: as attention uses them, with rotary positions.
            gate_inputs: queries and keys without, which the gate sees; None: the same.
        """
        query_block, key_block = self._check(query, key)
        target = attention_map(query, key, query_block, key_block)
        gate = self(*(gate_inputs or (query, key))).log_softmax(-1)
        return nn.functional.kl_div(gate, target.to(gate.dtype), reduction="none").sum(-1).mean()

    def choose(self, query: Tensor, key: Tensor, **options: Any) -> BlockMask:
        """`mask(query, key, **options)`; in training `imitation` becomes `loss(query, key)`, for `gate_loss`."""
        if self.training and torch.is_grad_enabled():
            self.imitation = self.loss(query, key)
        return self.mask(query, key, **options)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"imitation": None}  # of a graph, which is neither copied nor stored

    def extra_repr(self) -> str:
        blocks = f"query_block={self.query_block}, key_block={self.key_block}"
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, {blocks}, gate_dim={self.gate_dim}"


def gate_loss(model: nn.Module) -> Tensor:
    """Sum over the gates of a model of what their last `choose` in training left; 0 where none chose.

    Raises:
        ValueError: the model has no gate.
    """
    gates = [module for module in model.modules() if isinstance(module, BoxGate)]
    if not gates:
        raise ValueError(f"{type(model).__name__} has no BoxGate")
    losses = [gate.imitation for gate in gates if gate.imitation is not None]
    return torch.stack(losses).sum() if losses else torch.zeros(())


def _places(x: Tensor, block: tuple[int, ...]) -> tuple[Tensor, ...]:
    counts = tuple(-(-n // b) for n, b in zip(x.shape[1:-2], block, strict=True))
    return torch.unravel_index(torch.arange(torch.Size(counts).numel(), device=x.device), counts)


@torch.no_grad()
def attention_map(
    query: Tensor,
    key: Tensor,
    query_block: tuple[int, ...],
    key_block: tuple[int, ...],
    *,
    scale: float | None = None,
) -> Tensor:
    """The largest probability of dense attention in every pair of blocks, rows divided by their sums; without all
    probabilities at once.

    Args:
        query, key: `[B, *spatial, heads, d]`, `[B, *key_spatial, key_heads, d]`.
        query_block, key_block: tokens of a block along each axis.
        scale: factor on query . key; d ** -0.5 when None.

    Returns:
        `[B, heads, query blocks, key blocks]`, float32, float64 for float64 inputs.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = resolve_scale(query, scale)
    key = key.repeat_interleave(query.shape[-2] // key.shape[-2], dim=-2)
    q, q_there = cut_into_blocks(query.to(dtype) * scale, query_block)
    k, k_there = cut_into_blocks(key.to(dtype), key_block)
    q, keys = q.permute(0, 3, 1, 2, 4), k.flatten(1, 2).permute(0, 2, 3, 1)[:, :, None]  # [B, heads, blocks, tokens, d]
    step = max(1, LOGITS // (q.shape[0] * q.shape[1] * q.shape[3] * keys.shape[-1]))
    rows = []
    for start in range(0, q.shape[2], step):
        with without_autocast(query.device):
            logits = q[:, :, start : start + step] @ keys
        shares = logits.masked_fill(~k_there.flatten(), -torch.inf).softmax(-1)
        best = shares.unflatten(-1, k_there.shape).amax(-1)
        rows.append(best.masked_fill(~q_there[start : start + step, :, None], 0).amax(-2))
    found = torch.cat(rows, dim=2)
    return found / found.sum(-1, keepdim=True)
