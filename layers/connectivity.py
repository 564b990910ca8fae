"""A learned choice of single keys: Sparsifiner's low-rank map of attention (arXiv:2303.13755)."""

from math import ceil, prod

import torch
from torch import Tensor, nn

from ..kernels.block_sparse import BlockMask
from ..kernels.common.calling import without_autocast
from ..kernels.masks import keep, to_mask


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
        self.proj_c_q.reset_parameters()
        self.proj_c_k.reset_parameters()
        for parameter in (self.proj_n, self.proj_back_n):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """The predicted map `[B, heads, tokens, tokens]`, not negative, of `[B, *spatial, heads, head_dim]` twice.

        Differentiable, also in query and key.

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
