"""A learned choice of single keys: Sparsifiner's low-rank map of attention (arXiv:2303.13755)."""

from math import ceil, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.block_sparse import BlockMask
from ..kernels.common.calling import without_autocast
from ..kernels.common.symbolic import exporting
from ..kernels.masks import keep, to_mask
from .base import ProjectedAttention2d
from .positions import resize_positions


class LearnedConnectivity(nn.Module):
    """Sparsifiner's predictor: attention maps as sparse mixtures of learned basis maps, of which every query keeps the
    largest entries.

    Queries and keys are halved in width; keys are mixed over all tokens into `basis` of them; the softmax of their
    products, its largest entries alone, mixes the basis maps. `forward` is trained to resemble the attention's own
    map, `mask` then lists keys. The map has an entry for every pair of tokens, and the number of tokens is fixed: this
    is for image grids.

    Parameters have the names of the official code: `proj_c_q`, `proj_c_k`, `proj_n`, `proj_back_n`.

    Args:
        num_heads, head_dim: of queries; the scale of the products is num_heads ** -0.5, as in the official code.
        tokens: of the grid.
        basis: maps; None: a sixth of the tokens.
        coefficients: maps that a query mixes.
        threshold: entries of basis maps below it count as zero.

    Raises:
        ValueError: a number below 1, or fewer tokens than maps.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        tokens: int,
        basis: int | None = None,
        coefficients: int = 8,
        threshold: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        basis = max(1, tokens // 6) if basis is None else basis
        if min(num_heads, tokens, basis, coefficients) < 1 or head_dim < 2 or basis > tokens:
            raise ValueError(
                f"num_heads={num_heads}, tokens={tokens}, basis={basis} and coefficients={coefficients} must be at "
                f"least 1, head_dim={head_dim} at least 2, and basis no more than tokens"
            )
        dd = {"device": device, "dtype": dtype}
        self.num_heads, self.head_dim, self.tokens = num_heads, head_dim, tokens
        self.coefficients, self.threshold = min(coefficients, basis), threshold
        self.proj_c_q = nn.Linear(head_dim, head_dim // 2, **dd)
        self.proj_c_k = nn.Linear(head_dim, head_dim // 2, **dd)
        self.proj_n = nn.Parameter(torch.empty(tokens, basis, **dd))
        self.proj_back_n = nn.Parameter(torch.empty(tokens, basis, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tables anew; submodules have their own `reset_parameters`."""
        for parameter in (self.proj_n, self.proj_back_n):
            nn.init.trunc_normal_(parameter, std=0.02)

    def resize(self, grid_size: tuple[int, int], new_size: tuple[int, int], prefix: int = 0) -> None:
        """Interpolate the tables for a map of another size; `prefix` leading tokens have no place on it.

        Sums over keys keep their size: entries of `proj_n` become smaller as tokens become more.
        """
        count, self.tokens = self.tokens, prefix + prod(new_size)
        for name, scale in (("proj_n", count / self.tokens), ("proj_back_n", 1.0)):
            old = getattr(self, name)
            table = resize_positions(old.detach()[None], grid_size, new_size, prefix)[0] * scale
            setattr(self, name, nn.Parameter(table, requires_grad=old.requires_grad))

    def forward(self, query: Tensor, key: Tensor, *, whole: bool = False) -> Tensor:
        """The predicted map `[B, heads, tokens, tokens]` of `[B, *spatial, heads, head_dim]` twice.

        Differentiable, also in query and key.

        Args:
            query, key: of one attention.
            whole: mix all basis maps as they are, with neither threshold nor choice, for the first phase of training.
                Otherwise no entry is negative.

        Raises:
            ValueError: shapes that do not fit.
        """
        for name, x in (("query", query), ("key", key)):
            tokens = prod(x.shape[1:-2])
            if x.dim() < 4 or tokens != self.tokens or x.shape[-2:] != (self.num_heads, self.head_dim):
                raise ValueError(
                    f"{name}.shape={tuple(x.shape)} must be [B, *spatial, {self.num_heads}, {self.head_dim}] of "
                    f"{self.tokens} tokens"
                )
        q = self.proj_c_q(query.flatten(1, -3)).transpose(1, 2)  # [B, heads, tokens, d / 2]
        k = self.proj_c_k(key.flatten(1, -3)).transpose(1, 2)
        with without_autocast(query.device):
            mixed = k.mT @ self.proj_n.to(k.dtype)  # [B, heads, d / 2, basis]
            weights = (q @ mixed * self.num_heads**-0.5).softmax(-1)
            if whole:
                return weights @ self.proj_back_n.to(k.dtype).mT
            weights = weights * keep(weights, rule="topk", topk=self.coefficients)
            maps = self.proj_back_n.to(k.dtype).abs()
            return weights @ (maps * (maps > self.threshold)).mT

    @torch.no_grad()
    def mask(self, query: Tensor, key: Tensor, *, share: float = 0.25, dense: int = 0) -> BlockMask:
        """Every query keeps the `ceil(share * tokens)` keys of the largest entries of the map, and itself.

        Args:
            query, key: as of `forward`.
            share: in (0, 1]. Official: 0.25.
            dense: queries at the start of the sequence that keep everything, such as a class token.

        Raises:
            ValueError: an argument outside what is accepted.
        """
        if not 0 < share <= 1 or dense < 0:
            raise ValueError(f"share={share!r} must lie in (0, 1] and dense={dense!r} not be negative")
        number, one = torch.arange(self.tokens, device=query.device), (1,) * (query.dim() - 3)
        topk = ceil(share * self.tokens)
        always = (number == number[:, None]) | (number[:, None] < dense)
        kept = keep(self(query, key), rule="topk", topk=topk, always=always)
        return to_mask(kept, query_block=one, key_block=one, most=self.tokens if dense else topk + 1)

    def extra_repr(self) -> str:
        heads = f"num_heads={self.num_heads}, head_dim={self.head_dim}"
        return f"{heads}, tokens={self.tokens}, basis={self.proj_n.shape[1]}"


class ConnectivityAttention2d(ProjectedAttention2d):
    """Sparsifiner's attention: every query attends to the keys that `LearnedConnectivity` chooses (section 3).

    The first token keeps all keys if it is a class token. The choice has no gradient. A loss of its own teaches the
    predictor, and it alone, the layer's dense map: the squared differences, summed over keys and averaged over the
    rest. Its gradient joins every backward pass, so any training loop trains it; a gradient scaler does not scale it.
    In the official code this loss reaches queries and keys, too, and its first phase copies a teacher.

    **Cost.** The map has an entry per pair of tokens and products of pairs that are not chosen run, too, so this costs
    *more* time than plain attention. It has the results of a sparse kernel, for which `LearnedConnectivity.mask` lists
    the keys.

    Parameters are named as in the official code: those of the projections, and `mask_predictor`.

    Args:
        dim, num_heads, class_token, options: as in `ProjectedAttention2d`; `impl` has no effect.
        grid_size: H and W, for which the predictor is learnt.
        share: of the keys that a query keeps, rounded up; in (0, 1].
        sparse: False for the first phase of training, in which attention stays dense and the predictor learns to mix
            whole basis maps. An attribute, too.
        loss_weight: of the predictor's loss; 0 leaves it untrained.
        predictor: `basis`, `coefficients`, `threshold`, as in `LearnedConnectivity`.

    Raises:
        ValueError: a share outside (0, 1], a negative weight; `forward` gets another grid.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        grid_size: tuple[int, int],
        class_token: bool = False,
        share: float = 0.25,
        sparse: bool = True,
        loss_weight: float = 1.0,
        predictor: dict[str, Any] | None = None,
        **options: Any,
    ):
        super().__init__(dim, num_heads=num_heads, class_token=class_token, **options)
        if not 0 < share <= 1:
            raise ValueError(f"share={share!r} must lie in (0, 1]")
        if loss_weight < 0:
            raise ValueError(f"loss_weight={loss_weight!r} must not be negative")
        self.grid_size, self.share = (grid_size[0], grid_size[1]), share
        self.sparse, self.loss_weight = sparse, loss_weight
        dd: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        tokens = prod(grid_size) + class_token
        self.mask_predictor = LearnedConnectivity(num_heads, dim // num_heads, tokens=tokens, **(predictor or {}), **dd)

    def set_grid_size(self, grid_size: tuple[int, int]) -> None:
        """Interpolate the predictor's tables for maps of another size."""
        self.mask_predictor.resize(self.grid_size, grid_size, prefix=int(self.class_token))
        self.grid_size = (grid_size[0], grid_size[1])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, x: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Tokens `[B, N, heads, d]` to `[B, N, dim]`."""
        learns = self.loss_weight > 0 and self.mask_predictor.proj_n.requires_grad
        teach = learns and torch.is_grad_enabled() and not exporting()
        predicted = None
        if teach or self.sparse:
            predicted = self.mask_predictor(query.detach(), key.detach(), whole=not self.sparse)
        kept = self._choose(predicted.detach()) if self.sparse and predicted is not None else None
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # [B, heads, N, d]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=kept).transpose(1, 2).flatten(2)
        return out if predicted is None or not teach else _WithLoss.apply(out, self._loss(query, key, predicted))

    def _choose(self, predicted: Tensor) -> Tensor:
        """The pairs that stay, bool `[B, heads, N, N]`."""
        tokens = predicted.shape[-1]
        dense = torch.arange(tokens, device=predicted.device)[:, None] < int(self.class_token)
        return keep(predicted, rule="topk", topk=ceil(self.share * tokens), always=dense)

    def _loss(self, query: Tensor, key: Tensor, predicted: Tensor) -> Tensor:
        """Of the predicted map against the dense one, without the class token's row."""
        with torch.no_grad():
            dense = (query * query.shape[-1] ** -0.5 @ key.mT).softmax(-1)
        rows = (predicted - dense)[:, :, int(self.class_token) :]
        return self.loss_weight * rows.square().sum(-1).mean()

    def attention_macs(self, shape: tuple[int, int]) -> int:
        """Multiply-accumulates of the attention to the chosen keys, and of the predictor; `shape` is H and W.

        With a class token it is tokens and dim.
        """
        tokens = shape[0] if self.class_token else prod(shape)
        chosen = tokens * ceil(self.share * tokens) if self.sparse else tokens**2
        basis, half = self.mask_predictor.proj_n.shape[1], self.dim // self.num_heads // 2
        low_rank = self.num_heads * tokens * basis * (2 * half + tokens)
        return 2 * chosen * self.dim + low_rank

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, share={self.share}, sparse={self.sparse}"


class _WithLoss(torch.autograd.Function):
    """The first tensor; backward also sends 1 to the second, a scalar, as if it were added to the training loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, torch.ones_like(ctx.like)
