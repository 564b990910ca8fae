"""Radial attention (arXiv:2506.19852): a window inside frames that halves as the distance in time doubles."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..block_sparse.mask import BlockMask
from .blocks import static_mask
from .registry import published


def _half_widths(frames: int, tokens: int, block: int, decay: float, first_frame: bool, dense_from: int) -> Tensor:
    """Half width of the window for every pair of frames, int64 `[frames, frames]`; -1 where a pair sees nothing."""
    power = 1 << tokens.bit_length()  # the power of two above the tokens of a frame
    widths = []
    for distance in range(frames):
        halved = power / 2 ** distance.bit_length()
        width = tokens if distance <= 1 else max(halved * decay, block)
        skipped = halved < dense_from and distance % int(dense_from / halved)
        widths.append(-1 if skipped else int(width))
    number = torch.arange(frames)
    pairs = torch.tensor(widths)[(number[:, None] - number).abs()]
    if first_frame:
        pairs[:, 0] = tokens
    return pairs


@published(paper="2506.19852", density="decay", exact="lifted to blocks by the paper's rule")
def radial(
    shape: Sequence[int],
    *,
    block: int = 128,
    decay: float = 1.0,
    first_frame: bool = True,
    text: int = 0,
    dense_from: int = 128,
    device: torch.device | str | None = None,
) -> BlockMask:
    """Radial attention: frames next to each other attend densely, frames at distance d to a window in raster order
    whose half width is `decay * 2**bits(tokens of a frame) / 2**bits(d)`, at least a block; where that falls below
    `dense_from` tokens, only frames at every `dense_from / …`-th distance see each other.

    A pair of blocks is kept where, of the keys that some query of the block sees, more than 0.6 are seen by more than
    a third of the block. The official code counts over all pairs of tokens and cuts frames short that do not start at
    a block; this is the count in closed form, for whole frames, and the own block is always kept.

    Args:
        shape: `(T, H, W)`. The mask is one of the flattened grid: `query.flatten(1, 3)`.
        block: tokens of a block, less than three frames.
        decay: factor on the windows. Official: Wan 2.1 0.2, Wan 2.2 0.8, HunyuanVideo 0.95.
        first_frame: whether everybody sees the first frame (Wan: yes, HunyuanVideo: no).
        text: tokens after the video in the same sequence; blocks from theirs on see and are seen by everybody.
        dense_from: tokens; 128 in the official code.
        device: of the lists; the host when None.

    Raises:
        ValueError: an argument outside what is accepted.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape={tuple(shape)} must be (T, H, W)")
    frames, tokens = shape[0], shape[1] * shape[2]
    if not 1 <= block < 3 * tokens:
        raise ValueError(f"block={block!r} must be less than three frames of {tokens} tokens: nothing else is lifted")
    if decay < 0 or text < 0 or dense_from < 1:
        raise ValueError(
            f"decay={decay!r} and text={text!r} must not be negative, dense_from={dense_from!r} at least 1"
        )
    # pieces: what each block holds of each frame, as rows [first, last) of the frame
    video = frames * tokens
    starts = torch.cat([torch.arange(0, video, block), torch.arange(0, video, tokens)]).unique()
    ends = torch.cat([starts[1:], torch.tensor([video])])
    frame, owner = starts // tokens, starts // block
    first, last = starts - frame * tokens, ends - frame * tokens
    width = _half_widths(frames, tokens, block, decay, first_frame, dense_from)[frame[:, None], frame]

    def columns(least: int) -> Tensor:
        """Keys of every piece that at least so many queries of every piece see: an interval."""
        low = torch.maximum(first, first[:, None] + least - 1 - width)
        high = torch.minimum(last - 1, last[:, None] - least + width)
        enough = (last - first)[:, None].clamp(max=tokens) >= least
        return torch.where(enough & (width >= 0) & (2 * width + 1 >= least), (high - low + 1).clamp(min=0), 0)

    many, some = columns(block // 3 + 1), columns(1)
    lifted = 5 * many > 3 * some
    count = -(-(video + text) // block)
    kept = torch.zeros(count * count, dtype=torch.bool)
    kept[(owner[:, None] * count + owner)[lifted]] = True
    kept = kept.view(count, count) | torch.eye(count, dtype=torch.bool)
    kept[video // block :] = True
    kept[:, video // block :] = True
    return static_mask(kept, (block,), (block,), device)
