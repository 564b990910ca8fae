"""Relational heads: attention that retrieves what relates two tokens, and symbols that say which it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SymbolicAttention(nn.Module):
    """Symbols of tokens: attention from tokens to learned templates, whose values are learned symbols.

    Source: arXiv:2405.16727, section 3. Parameters are named as in the official code.

    Args:
        dim: channels of tokens and symbols.
        num_heads: heads, a divisor of dim.
        num_symbols: templates.
    """

    def __init__(self, dim: int, *, num_heads: int, num_symbols: int, device=None, dtype=None):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim, **dd)
        self.template_features = nn.Parameter(torch.randn(num_symbols, dim, **dd))
        self.symbol_library = nn.Parameter(torch.randn(num_symbols, dim, **dd))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, dim]` to symbols `[B, N, dim]`."""
        heads = (self.num_heads, -1)
        q = self.q_proj(x).unflatten(-1, heads).transpose(1, 2)
        k, v = (t.unflatten(-1, heads).transpose(0, 1).expand(x.shape[0], -1, -1, -1)
                for t in (self.template_features, self.symbol_library))  # fmt: skip
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class RelationalHeads(nn.Module):
    """Heads that retrieve relations: sum_j a_ij (W_r r_ij + W_v s_j), concatenated and projected (arXiv:2405.16727).

    Relation l of two tokens is r_ij[l] = activation(q_il . k_jl / sqrt(d_rel)), with projections of relations that are
    not those of the attention a. Without an activation this is softmax attention of wide values, [s_j | k_j of all
    relations], combined afterwards with the query's side of the relations, so no matrix of all pairs is held.
    Parameters are named as in the official code.

    Args:
        dim: channels of the input.
        num_heads: relational heads.
        head_dim: channels of a head.
        relations: relations, a divisor of num_heads * head_dim.
        symbols: module that makes symbols `[B, N, dim]` of tokens `[B, N, dim]`; the tokens themselves when None.
        symmetric: relations are symmetric: keys of relations are their queries.
        activation: of the relations; None is the identity.
        causal: tokens see earlier ones and themselves.

    Raises:
        ValueError: relations that do not divide the channels.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        head_dim: int,
        relations: int,
        symbols: nn.Module | None = None,
        symmetric: bool = False,
        activation: Callable[[Tensor], Tensor] | None = None,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        width = num_heads * head_dim
        if width % relations:
            raise ValueError(f"relations={relations} must divide num_heads * head_dim = {width}")
        self.num_heads, self.head_dim, self.relations = num_heads, head_dim, relations
        self.symmetric, self.activation, self.causal = symmetric, activation, causal
        self.wq_attn, self.wk_attn = (nn.Linear(dim, width, bias=False, **dd) for _ in range(2))
        self.wq_rel = nn.Linear(dim, width, bias=False, **dd)
        if not symmetric:
            self.wk_rel = nn.Linear(dim, width, bias=False, **dd)
        self.wv = nn.Linear(dim, width, bias=False, **dd)
        self.wr = nn.Parameter(torch.empty(num_heads, head_dim, relations, **dd))
        nn.init.kaiming_uniform_(self.wr, a=math.sqrt(5))
        self.wo = nn.Linear(width, width, bias=False, **dd)
        self.symbols = symbols

    def forward(self, x: Tensor, symbols: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: `[B, *spatial, dim]`.
            symbols: `[B, N, dim]` with N the tokens of x; made by the module of symbols when None.

        Returns:
            `[B, *spatial, num_heads * head_dim]`.
        """
        tokens = x.flatten(1, -2)
        if symbols is None:
            symbols = tokens if self.symbols is None else self.symbols(tokens)
        q, k, s = (
            w(t).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for w, t in ((self.wq_attn, tokens), (self.wk_attn, tokens), (self.wv, symbols))
        )
        q_rel = self.wq_rel(tokens).unflatten(-1, (self.relations, -1))  # [B, N, relations, d_rel]
        k_rel = q_rel if self.symmetric else self.wk_rel(tokens).unflatten(-1, (self.relations, -1))
        q_rel = q_rel * q_rel.shape[-1] ** -0.5
        if self.activation is None:
            out = self._by_wide_values(q, k, s, q_rel, k_rel)
        else:
            out = self._by_pairs(q, k, s, self.activation(torch.einsum("bild,bjld->bijl", q_rel, k_rel)))
        return self.wo(out.transpose(1, 2).flatten(2)).reshape(*x.shape[:-1], -1)

    def _by_wide_values(self, q: Tensor, k: Tensor, s: Tensor, q_rel: Tensor, k_rel: Tensor) -> Tensor:
        """`[B, heads, N, head_dim]`: relations of the mean key are the mean of relations."""
        wide = torch.cat([s, k_rel.flatten(2)[:, None].expand(-1, self.num_heads, -1, -1)], dim=-1)
        mean = F.scaled_dot_product_attention(q, k, wide, is_causal=self.causal)
        symbols, keys = mean.split([s.shape[-1], mean.shape[-1] - s.shape[-1]], dim=-1)
        relations = torch.einsum("bild,bhild->bhil", q_rel, keys.unflatten(-1, (self.relations, -1)))
        return symbols + relations @ self.wr.mT

    def _by_pairs(self, q: Tensor, k: Tensor, s: Tensor, relations: Tensor) -> Tensor:
        """The same from relations of all pairs `[B, N, N, relations]`."""
        logits = q @ k.mT * q.shape[-1] ** -0.5
        if self.causal:
            logits = logits.masked_fill(torch.ones_like(logits[0, 0]).triu(1).bool(), -torch.inf)
        weights = logits.softmax(-1)
        return weights @ s + torch.einsum("bhij,bijl->bhil", weights, relations) @ self.wr.mT
