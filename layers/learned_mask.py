"""A learned sparse mask between the tokens of a clip (SwinBERT, arXiv:2111.13196)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.block_sparse.mask import BlockMask
from ..kernels.masks.blocks import to_mask


class LearnedMask(nn.Module):
    """A bias of attention from one learned number per pair of tokens, for all clips, heads and layers.

    The sigmoid of the number is how far the pair sees each other; a token sees itself in full. The published bias,
    -10000 (1 - a), is hard at once: gradients reach pairs that are visible already. Ours, log(a + 1e-4), reaches all.

    Args:
        tokens: of a clip.
        start: sigmoid of all numbers at the start, in (0, 1).
        official: take the published bias.

    Raises:
        ValueError: fewer than one token, or a start outside of (0, 1).
    """

    def __init__(self, tokens: int, *, start: float = 0.98, official: bool = False, device=None, dtype=None):
        super().__init__()
        if tokens < 1 or not 0 < start < 1:
            raise ValueError(f"tokens={tokens} must be at least 1 and start={start} lie in (0, 1)")
        self.tokens, self.official = tokens, official
        first = torch.tensor(start).logit().item()
        self.weight = nn.Parameter(torch.full((tokens * tokens, 1), first, device=device, dtype=dtype))

    def visible(self) -> Tensor:
        """How far token i sees token j, `[tokens, tokens]` in [0, 1]; 1 on the diagonal."""
        shares = self.weight.view(self.tokens, self.tokens).sigmoid()
        own = torch.eye(self.tokens, dtype=torch.bool, device=shares.device)
        return shares.masked_fill(own, 1.0)

    def forward(self, text: int = 0) -> Tensor:
        """Bias of attention, to be added to logits, `[text + tokens, text + tokens]`.

        Args:
            text: tokens in front that describe the clip: each sees itself, earlier ones and the clip; the clip sees
                none of them.
        """
        shares = self.visible()
        bias = -10000.0 * (1 - shares) if self.official else (shares + 1e-4).log().clamp(max=0.0)
        if not text:
            return bias
        hidden = torch.finfo(bias.dtype).min
        whole = bias.new_zeros(text + self.tokens, text + self.tokens)
        later = torch.ones(text, text, dtype=torch.bool, device=bias.device).triu(1)
        whole[:text, :text] = whole[:text, :text].masked_fill(later, hidden)
        whole[text:, :text] = hidden
        whole[text:, text:] = bias
        return whole

    def sparsity_loss(self) -> Tensor:
        """Mean share that tokens see of each other; training adds half of it."""
        shares = self.visible()
        return (shares.sum() - self.tokens) / max(self.tokens * (self.tokens - 1), 1)

    @torch.no_grad()
    def block_mask(self, *, threshold: float = 0.5) -> BlockMask:
        """Pairs above a threshold as lists of single tokens, for `block_sparse_attention` on the flattened clip."""
        return to_mask((self.visible() > threshold)[None, None], query_block=1, key_block=1)
