"""Poolers and heads on tokens: linear and attentive probes, and bags of instances."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class HeadOutput(NamedTuple):
    """Results of a head.

    Attributes:
        logits: `[B, classes]`.
        attention: weights of tokens `[B, queries, N]`, or None.
        loss: a further loss of training, or None.
    """

    logits: Tensor
    attention: Tensor | None = None
    loss: Tensor | None = None


class EfficientPooling(nn.Module):
    """Learned queries, each of which pools channels of its own (efficient probing, arXiv:2506.10178, section 3).

    Attention is one softmax over tokens per query, without projections of queries and keys; values are projected once,
    and query j pools the j-th of `queries` equal parts of their channels. With one query this is attention pooling.
    Parameters are named as in the official code.

    Args:
        dim: channels of the tokens.
        queries: a divisor of dim / d_out.
        d_out: divisor of the channels of the result.

    Raises:
        ValueError: queries or d_out that do not divide the channels.
    """

    def __init__(self, dim: int, *, queries: int = 32, d_out: int = 1, device=None, dtype=None):
        super().__init__()
        if dim % d_out or (dim // d_out) % queries:
            raise ValueError(f"queries={queries} must divide dim={dim} / d_out={d_out}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.scale = dim**-0.5
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, queries, dim, **dd))
        self.v = nn.Linear(dim, dim // d_out, bias=False, **dd)
        self.width = dim // d_out

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Pool `[B, N, dim]`.

        Returns:
            pooled `[B, dim / d_out]`, and weights `[B, queries, N]`.
        """
        weights = (self.scale * self.cls_token @ tokens.mT).softmax(-1)
        values = self.v(tokens).unflatten(-1, (weights.shape[1], -1))  # [B, N, queries, part]
        return torch.einsum("bqn,bnqd->bqd", weights, values).flatten(1), weights


class MeanPooling(nn.Module):
    """Mean of the tokens.

    Args:
        dim: channels of the tokens.
    """

    def __init__(self, dim: int, *, device=None, dtype=None):
        super().__init__()
        self.width = dim

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        """`[B, N, dim]` to `[B, dim]`, and no weights."""
        return tokens.mean(1), None


POOLINGS: dict[str, Any] = {"linear": MeanPooling, "ep": EfficientPooling}


class TokenHead(nn.Module):
    """Pool, standardise and classify: the head that published probes of frozen features share.

    The norm has no parameters of its own; without it probes of masked autoencoders fail.

    Args:
        dim: channels of the tokens.
        num_classes: outputs.
        pool: "linear" (mean of tokens) or "ep" (`EfficientPooling`).
        tokens: "patch", "cls" (first token alone), or "both".
        **options: further arguments of the pooling.

    Raises:
        ValueError: an unknown pool or choice of tokens.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        pool: str = "linear",
        tokens: Literal["patch", "cls", "both"] = "patch",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        super().__init__()
        if pool not in POOLINGS:
            raise ValueError(f"pool={pool!r} must be one of {sorted(POOLINGS)}")
        if tokens not in ("patch", "cls", "both"):
            raise ValueError(f"tokens={tokens!r} must be 'patch', 'cls' or 'both'")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.tokens = tokens
        self.pool = POOLINGS[pool](dim, **options, **dd)
        self.norm = nn.BatchNorm1d(self.pool.width, affine=False, eps=1e-6, **dd)
        self.fc = nn.Linear(self.pool.width, num_classes, **dd)

    def forward(
        self, tokens: Tensor, prefix: Tensor | None = None, *, maps: Sequence[Tensor] | None = None
    ) -> HeadOutput:
        """Classify.

        Args:
            tokens: `[B, N, dim]` without prefix tokens.
            prefix: `[B, P, dim]`, class token first.
            maps: attention maps of the blocks, which this head does not use.

        Raises:
            ValueError: tokens of the prefix are asked for, and there are none.
        """
        if self.tokens != "patch":
            if prefix is None or prefix.shape[1] == 0:
                raise ValueError(f"tokens={self.tokens!r} needs a class token, and the trunk has none")
            tokens = prefix[:, :1] if self.tokens == "cls" else torch.cat([prefix[:, :1], tokens], dim=1)
        pooled, weights = self.pool(tokens)
        return HeadOutput(self.fc(self.norm(pooled)), weights)


class _Linear(nn.Module):
    """A linear layer under the name `fc`, as in the official files."""

    def __init__(self, dim: int, out: int, *, bias: bool = True, **dd: Any):
        super().__init__()
        self.fc = nn.Linear(dim, out, bias=bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class GatedAttention(nn.Module):
    """Attention logits of instances by two layers, tanh and sigmoid (arXiv:1802.04712, section 2.4)."""

    def __init__(self, dim: int, hidden: int, branches: int, **dd: Any):
        super().__init__()
        self.attention_V = nn.Sequential(nn.Linear(dim, hidden, **dd), nn.Tanh())
        self.attention_U = nn.Sequential(nn.Linear(dim, hidden, **dd), nn.Sigmoid())
        self.attention_weights = nn.Linear(hidden, branches, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, dim]` to `[B, branches, N]`."""
        return self.attention_weights(self.attention_V(x) * self.attention_U(x)).mT


class BagHead(nn.Module):
    """Classify bags of instances by attention of several branches (ACMIL, arXiv:2311.07125; one branch is ABMIL).

    A branch pools the instances by its weights and classifies; the bag is classified by the mean of all weights. In
    training, some of the strongest instances of each branch are masked at random, which moves their weight to others:
    it needs far more positive instances than `mask_top`, and is for bags of hundreds. Parameters are named as in the
    official code.

    Args:
        dim: channels of an instance.
        num_classes: outputs.
        inner: channels after the first layer.
        hidden: channels of the attention.
        branches: K.
        mask_top: strongest instances per branch, of which
        mask_ratio: this share is masked in training.

    Raises:
        ValueError: mask_ratio out of [0, 1], or branches below 1.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        inner: int = 128,
        hidden: int = 128,
        branches: int = 5,
        mask_top: int = 0,
        mask_ratio: float = 0.6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if branches < 1 or not 0 <= mask_ratio <= 1:
            raise ValueError(f"branches={branches} must be positive and mask_ratio={mask_ratio} in [0, 1]")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.mask_top, self.mask_ratio = mask_top, mask_ratio
        self.dimreduction = nn.ModuleDict({"fc1": nn.Linear(dim, inner, bias=False, **dd)})
        self.attention = GatedAttention(inner, hidden, branches, **dd)
        # a single branch pools as the bag does, and its classifier would never learn
        self.classifier = nn.ModuleList(
            _Linear(inner, num_classes, **dd) for _ in range(branches if branches > 1 else 0)
        )
        self.Slide_classifier = _Linear(inner, num_classes, **dd)

    def mask_strongest(self, logits: Tensor) -> Tensor:
        """Mask some of the strongest instances of each branch, `[B, branches, N]`."""
        top = min(self.mask_top, logits.shape[-1])
        count = int(top * self.mask_ratio)
        if count == 0:
            return logits
        strongest = logits.topk(top, dim=-1).indices
        chosen = torch.rand(strongest.shape, device=logits.device).argsort(-1)[..., :count]
        return logits.scatter(-1, strongest.gather(-1, chosen), -1e9)

    def forward(
        self,
        tokens: Tensor,
        prefix: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        maps: Sequence[Tensor] | None = None,
    ) -> HeadOutput:
        """Classify bags; `loss` of the output is None, see `losses`.

        Args:
            tokens: instances `[B, N, dim]`.
            prefix, maps: not used.
            mask: instances that are there, bool `[B, N]`; all when None.

        Returns:
            logits of the bags `[B, classes]`, and attention weights `[B, branches, N]`.
        """
        _, logits, weights = self.branches(tokens, mask=mask)
        return HeadOutput(logits, weights)

    def branches(self, tokens: Tensor, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the branches `[B, branches, classes]` and the bags `[B, classes]`, weights `[B, branches, N]`."""
        hidden = self.dimreduction["fc1"](tokens).relu()
        logits = self.attention(hidden)
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None], -torch.inf)
        if self.training:
            logits = self.mask_strongest(logits)
        weights = logits.softmax(-1)
        pooled = weights @ hidden  # [B, branches, inner]
        whole = self.Slide_classifier(weights.mean(1, keepdim=True) @ hidden)
        each = [f(pooled[:, k]) for k, f in enumerate(self.classifier)]
        return torch.stack(each, dim=1) if each else whole, whole[:, 0], weights

    def losses(
        self,
        tokens: Tensor,
        target: Tensor,
        *,
        mask: Tensor | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> dict[str, Tensor]:
        """Losses of training, to be added: `bag`, `branches` and `diversity`, the likeness of the branches' weights.

        Args:
            tokens: instances `[B, N, dim]`.
            target: classes `[B]`.
            mask: instances that are there, bool `[B, N]`.
            loss: of logits `[B, classes]` and targets `[B]`, a mean over bags.
        """
        each, whole, weights = self.branches(tokens, mask=mask)
        count = each.shape[1]
        found = {"bag": loss(whole, target)}
        if count > 1:
            found["branches"] = loss(each.flatten(0, 1), target.repeat_interleave(count))
            pairs = [F.cosine_similarity(weights[:, i], weights[:, j]) for i, j in combinations(range(count), 2)]
            found["diversity"] = torch.stack(pairs).mean()
        return found
