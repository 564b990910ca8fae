"""Fine-grained classification with cross-attention to salient patches and to a second image (DCAL, CVPR 2022)."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...layers.cross import pairwise_cross_attention, rollout_row, strongest_tokens
from .parts import add_branches, embed, project, take_parts, unite


class PairedOutput(NamedTuple):
    """Logits of `PairedViT`, `[B, classes]` each.

    Attributes:
        whole: of self-attention.
        local: of the class token that attends again, among the patches that matter most.
        paired: of self-attention to two images at once; None without partners.
    """

    whole: Tensor
    local: Tensor
    paired: Tensor | None


class PairedViT(nn.Module):
    """A ViT trained on three branches: itself, global-local and pair-wise cross-attention.

    The global-local branch is one more block, whose queries are the class token and the patches that the rollout of all
    attention maps weighs most, and whose keys are all tokens. The pair-wise branch runs the same blocks on keys and
    values of an image and its partner, as a distraction in training. Parameters of the ViT keep timm's names. No code
    is public; the added block begins as a copy of the last one. With one added block, as published, the class token has
    the same result whichever patches are chosen: all are keys.

    Args:
        vit: a timm `VisionTransformer` with a class token and absolute positions; its parameters are taken over.
        num_classes: outputs.
        ratio: share of the patches of the global-local branch, in (0, 1].

    Raises:
        ValueError: a model without these parts, or a ratio outside of its range.
    """

    blocks: nn.Sequential

    def __init__(self, vit: nn.Module, num_classes: int, *, ratio: float = 0.1):
        super().__init__()
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio={ratio} must lie in (0, 1]")
        take_parts(self, vit)
        dim, like = self.cls_token.shape[-1], self.cls_token
        dd: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.local_block, self.local_norm = copy.deepcopy(self.blocks[-1]), copy.deepcopy(self.norm)
        self.head, self.local_head = (nn.Linear(dim, num_classes, **dd) for _ in range(2))
        self.log_variances = nn.Parameter(torch.zeros(3, **dd))  # of the losses of the branches
        self.ratio = ratio

    def forward(self, images: Tensor, partner: Tensor | None = None) -> PairedOutput:
        """Logits of images `[B, C, H, W]`.

        Args:
            images: a batch.
            partner: other image of each, int64 `[B]`, such as a random permutation; the third branch is left out when
                None.
        """
        first = x = embed(self, images)
        queries, keys = [], []
        for block in self.blocks:
            q, k, v = project(block.attn, block.norm1(x))
            queries.append(q.detach())
            keys.append(k.detach())
            x = add_branches(block, x, unite(block.attn, F.scaled_dot_product_attention(q, k, v)))
        rows = strongest_tokens(rollout_row(queries, keys), self.ratio)
        whole = self.head(self.norm(x)[:, 0])
        local = self.local_head(self.local_norm(self._attend_again(x, rows))[:, 0])
        if partner is None:
            return PairedOutput(whole, local, None)
        x = first
        for block in self.blocks:
            attended = pairwise_cross_attention(*project(block.attn, block.norm1(x)), partner)
            x = add_branches(block, x, unite(block.attn, attended))
        return PairedOutput(whole, local, self.head(self.norm(x)[:, 0]))

    def _attend_again(self, x: Tensor, rows: Tensor) -> Tensor:
        """The added block on some tokens `[B, K]` as queries and all as keys."""
        block: Any = self.local_block
        q, k, v = project(block.attn, block.norm1(x))
        q = q.gather(2, rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
        chosen = x.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))
        return add_branches(block, chosen, unite(block.attn, F.scaled_dot_product_attention(q, k, v)))

    def loss(self, output: PairedOutput, target: Tensor) -> Tensor:
        """Half the sum over branches of exp(-w) cross-entropy + w, with learned w that begin at 0.

        Args:
            output: of `forward`.
            target: classes `[B]`; a pair has that of its first image.
        """
        terms = [F.cross_entropy(x, target) for x in output if x is not None]
        return sum((-w).exp() * term + w for w, term in zip(self.log_variances, terms, strict=False)) / 2  # pyright: ignore

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Mean probabilities of the first two branches, `[B, classes]`."""
        output = self(images)
        return (output.whole.softmax(-1) + output.local.softmax(-1)) / 2
