"""Lists of blocks as matrices."""

import torch
from foveal.kernels.ops import BlockMask


def kept(mask: BlockMask, blocks: int) -> torch.Tensor:
    """Lists as a matrix, bool `[B or 1, heads or 1, query blocks, key blocks]`."""
    out = torch.zeros(*mask.kv_idx.shape[:3], blocks + 1, dtype=torch.bool)
    listed = torch.arange(mask.kv_idx.shape[-1]) < mask.kv_num[..., None]
    return out.scatter(-1, torch.where(listed, mask.kv_idx.long(), blocks), True)[..., :blocks]
