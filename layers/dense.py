"""Dense attention: every token of a map attends to every other, by PyTorch's own kernels."""

from torch import Tensor
from torch.nn import functional as F

from .base import ProjectedAttention2d


class DenseAttention2d(ProjectedAttention2d):
    """Softmax attention of all tokens of a map `[B, H, W, dim]`; arguments as in `ProjectedAttention2d`."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, x: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Tokens `[B, N, heads, d]` to `[B, N, dim]`."""
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # [B, heads, N, d]
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

    def attention_macs(self, shape: tuple[int, int]) -> int:
        """Multiply-accumulates of the attention for one image; `shape` is H and W, or tokens and dim."""
        tokens = shape[0] if self.class_token else shape[0] * shape[1]
        return 2 * tokens**2 * self.dim
