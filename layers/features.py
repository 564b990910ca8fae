"""Features of queries and keys whose products come close to softmax weights, for linear attention and scans."""

from __future__ import annotations

from itertools import combinations_with_replacement
from math import comb, factorial, prod

import torch
from torch import Tensor

LLN_FIT = (0.1486, -0.3549)  # slope and offset of the variance of log weights over that of logits, of the paper


def taylor_features(x: Tensor, *, order: int = 2) -> Tensor:
    """Features whose products are a truncated exponential series (FAST, arXiv:2402.07901, section 3).

    `taylor_features(q) @ taylor_features(k)` is the sum over l up to order of (q @ k) ** l / l!: each monomial of the
    channels comes once, so there are comb(d + order, order) of them, 1 + d + d (d + 1) / 2 at order 2. Even orders make
    weights positive; order 1 does where products stay above -1. The paper standardises queries and keys per token;
    scale them by head_dim ** -0.25 each for the products of softmax attention.

    Args:
        x: `[…, d]`.
        order: of the series, at least 1.

    Returns:
        `[…, comb(d + order, order)]`.

    Raises:
        ValueError: an order below 1.
    """
    if order < 1:
        raise ValueError(f"order={order} must be at least 1")
    dim, parts = x.shape[-1], [torch.ones_like(x[..., :1])]
    for degree in range(1, order + 1):
        chosen = list(combinations_with_replacement(range(dim), degree))
        repeats = [prod(factorial(row.count(i)) for i in set(row)) for row in chosen]
        places = torch.tensor(chosen, device=x.device)  # [monomials, degree]
        parts.append(x[..., places].prod(-1) * x.new_tensor(repeats).rsqrt())
    made = torch.cat(parts, dim=-1)
    assert made.shape[-1] == comb(dim + order, order)
    return made


def log_normal_features(
    query: Tensor, key: Tensor, *, query_std: Tensor | float | None = None, key_std: Tensor | float | None = None
) -> tuple[Tensor, Tensor]:
    """Exponentials of queries and keys, with the temperatures of linear log-normal attention (arXiv:2311.13541).

    Temperatures are such that the logarithms of the weights have the variance of the logits of softmax attention, for
    normal queries and keys. Factors that cancel in normalised linear attention are taken out for the range of floats:
    `linear_attention(*log_normal_features(q, k), v, eps=0.0)`. The paper's average with softmax attention in blocks is
    left to the caller.

    Args:
        query, key: `[B, *spatial, heads, d]`.
        query_std, key_std: standard deviations. None: of all of these tensors, the batch included, as published, so
            that an image depends on the others of its batch; give those of training for inference.

    Returns:
        features of both, positive, in the shapes of query and key.
    """
    slope, offset = LLN_FIT
    sigma_q, sigma_k = (
        x.detach().std() if given is None else torch.as_tensor(given, device=x.device, dtype=x.dtype)
        for x, given in ((query, query_std), (key, key_std))
    )
    wanted = (((sigma_q * sigma_k).square() - offset) / (2 * slope)).sqrt()
    query, key = query * (wanted / sigma_q), key * (wanted / sigma_k)
    return (query - query.detach().amax(-1, keepdim=True)).exp(), (key - key.detach().amax()).exp()
