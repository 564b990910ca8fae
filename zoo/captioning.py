"""Captions of clips: a video encoder, and a transformer over words and the clip with a learned sparse mask (SwinBERT).

After arXiv:2111.13196: the encoder is small and attends in neighborhoods here, and the words are a list of the data
instead of BERT's. Training masks words; a caption is decoded word by word, by a mask behind those that stand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.learned_mask import LearnedMask
from ..layers.neighborhood import NeighborhoodAttention3d
from .blocks import PreNormBlock

END, MASK, START = 0, 1, 2  # tokens in front of the words
SPECIAL = ("[end]", "[mask]", "[start]")


class BiasedAttention(nn.Module):
    """Multi-head attention of `[B, N, dim]` with a bias `[N, N]` for all heads."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads, self.qkv, self.proj = num_heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        return self.proj(out.transpose(1, 2).flatten(2))


class VideoCaptioner(nn.Module):
    """Words for clips `[B, in_chans, frames, size, size]`.

    Words see earlier words and the clip; the clip does not see them, and its tokens see each other as far as one
    learned mask says, which a loss makes sparse.

    Args:
        vocabulary: words.
        frames, size, in_chans: of the clips.
        length: words of a caption at most, the end included.
        patch: frames and pixels of a token, `(time, space)`; an even number of pixels.
        dim, num_heads: of all blocks.
        video_depth, depth: blocks of the encoder, and over words and clip.
        window: of the encoder's attention, tokens per axis; smaller where the clip is.
        mask_start: see `LearnedMask`.

    Raises:
        ValueError: clips that the patch does not divide.
    """

    def __init__(
        self,
        vocabulary: Sequence[str],
        *,
        frames: int,
        size: int,
        in_chans: int,
        length: int,
        patch: tuple[int, int] = (2, 4),
        dim: int = 64,
        num_heads: int = 4,
        video_depth: int = 2,
        depth: int = 2,
        window: int = 3,
        mask_start: float = 0.98,
    ):
        super().__init__()
        time, space = patch
        if frames % time or size % space or space % 2:
            raise ValueError(f"patch={tuple(patch)}: must divide {frames} frames and {size} pixels, pixels evenly")
        grid = frames // time, size // space, size // space
        tokens = grid[0] * grid[1] * grid[2]
        self.vocabulary, self.length = [*SPECIAL, *vocabulary], length
        self.patch = nn.Sequential(  # overlapping convolutions: shapes that move lie anywhere in a patch
            nn.Conv3d(in_chans, dim // 2, (1, 5, 5), stride=(1, 2, 2), padding=(0, 2, 2)),
            nn.GELU(),
            nn.Conv3d(dim // 2, dim, (time, 3, 3), stride=(time, space // 2, space // 2), padding=(0, 1, 1)),
        )
        self.places = nn.Parameter(0.02 * torch.randn(1, *grid, dim))
        windows = tuple(min(window, n) for n in grid)
        self.video = nn.ModuleList(
            PreNormBlock(dim, NeighborhoodAttention3d(dim, num_heads=num_heads, window=windows))
            for _ in range(video_depth)
        )
        self.words = nn.Embedding(len(self.vocabulary), dim)
        self.order = nn.Parameter(0.02 * torch.randn(1, 1 + length, dim))
        self.kinds = nn.Parameter(0.02 * torch.randn(2, dim))
        self.mask = LearnedMask(tokens, start=mask_start)
        self.blocks = nn.ModuleList(PreNormBlock(dim, BiasedAttention(dim, num_heads)) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, len(self.vocabulary))

    def encode(self, clips: Tensor) -> Tensor:
        """Tokens of clips, `[B, tokens, dim]`."""
        x = self.patch(clips).movedim(1, -1) + self.places
        for block in self.video:
            x = block(x)
        return x.flatten(1, 3) + self.kinds[0]

    def forward(self, clip: Tensor, words: Tensor) -> Tensor:
        """Logits of words at the places of words.

        Args:
            clip: tokens of `encode`, `[B, tokens, dim]`.
            words: token numbers `[B, L]`, the first one START; L is at most 1 + length.

        Returns:
            `[B, L, vocabulary]`.
        """
        count = words.shape[1]
        x = torch.cat([self.words(words) + self.order[:, :count] + self.kinds[1], clip], dim=1)
        bias = self.mask(text=count)
        for block in self.blocks:
            x = block(x, bias)
        return self.head(self.norm(x[:, :count]))

    def loss(self, clips: Tensor, words: Tensor, *, ratio: float = 0.5) -> Tensor:
        """Cross-entropy of words behind masks, drawn from PyTorch's generator of the device.

        Args:
            clips: see above.
            words: captions `[B, length]`, END behind their last word to the end.
            ratio: chance of a word to be masked, the first END included; one of a caption is in any case.
        """
        real = torch.cat([torch.ones_like(words[:, :1]), words[:, :-1]], dim=1) != END  # words, and the first END
        chance = torch.rand(words.shape, device=words.device).masked_fill(~real, 2.0)
        masked = (chance < ratio) | (chance == chance.amin(1, keepdim=True))
        start = words.new_full((len(words), 1), START)
        logits = self(self.encode(clips), torch.cat([start, words.masked_fill(masked, MASK)], dim=1))[:, 1:]
        return F.cross_entropy(logits[masked].float(), words[masked])

    @torch.no_grad()
    def caption(self, clips: Tensor) -> Tensor:
        """The likeliest word at each place, one after the other; token numbers `[B, length]`, END behind the last."""
        clip = self.encode(clips)
        words = clip.new_full((len(clips), 1), START, dtype=torch.long)
        for _ in range(self.length):
            asked = torch.cat([words, torch.full_like(words[:, :1], MASK)], dim=1)
            logits = self(clip, asked)[:, -1]
            logits[:, [MASK, START]] = -torch.inf
            ended = (words[:, 1:] == END).any(1)
            words = torch.cat([words, logits.argmax(-1).masked_fill(ended, END)[:, None]], dim=1)
        return words[:, 1:]

    def sentences(self, words: Tensor) -> list[str]:
        """Captions of token numbers `[B, L]`, as text."""
        return [" ".join(self.vocabulary[i] for i in row if i > START) for row in words.tolist()]
