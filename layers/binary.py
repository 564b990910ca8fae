"""Attention of 1-bit queries and keys, 8-bit weights and values, in exact emulation (arXiv:2603.09582)."""

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.common.rounding import signs, straight_through
from .base import ProjectedAttention2d
from .relative import resize_bias_table

LEVELS = 255  # of the attention weights, unsigned
PEAK = 127  # of the values, signed
CLASS_ROWS = 3  # of a bias table: class token to tokens, tokens to it, it to itself


def bias_of_offsets(table: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """A table of biases by offset, spread over all pairs of a class token and the tokens of a map.

    Args:
        table: `[(2H - 1) * (2W - 1) + 3, heads]`; row (query row - key row + H - 1) * (2W - 1) + query column - key
            column + W - 1 is an offset's, the last three are those of `CLASS_ROWS`.
        grid_size: H and W.

    Returns:
        `[heads, 1 + H * W, 1 + H * W]`, query by key.
    """
    height, width = grid_size
    rows, columns = (torch.arange(n, device=table.device) for n in grid_size)
    offsets = table[:-CLASS_ROWS].T.unflatten(1, (2 * height - 1, 2 * width - 1))
    by_row = offsets[:, rows[:, None] - rows + height - 1]  # [heads, Hq, Hk, 2W - 1]
    pairs = by_row[..., columns[:, None] - columns + width - 1]  # [heads, Hq, Hk, Wq, Wk]
    pairs = pairs.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # [heads, H * W, H * W]
    to_tokens, to_class, own = table[-CLASS_ROWS:, :, None, None].unbind(0)  # each [heads, 1, 1]
    left = torch.cat([own, to_class.expand(-1, height * width, -1)], dim=1)
    right = torch.cat([to_tokens.expand(-1, -1, height * width), pairs], dim=1)
    return torch.cat([left, right], dim=2)


def resize_offsets(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """The table of `bias_of_offsets` for a map of another size, bicubic."""
    sides, wanted = ([2 * n - 1 for n in grid] for grid in (old, new))
    offsets = resize_bias_table(table[:-CLASS_ROWS].T.unflatten(1, sides), wanted)
    return torch.cat([offsets.flatten(1).T, table[-CLASS_ROWS:]])


class BinaryAttention2d(ProjectedAttention2d):
    """BinaryAttention of a class token and the tokens of a map (arXiv:2603.09582, sections 3.2 and 3.3).

    Queries and keys are their signs times one mean magnitude per image and head; a learnt bias per offset is added;
    normalised weights are rounded to 255ths and values, per channel, to 8 bits. All products are of small integers and
    thus exact in float32 whatever the order; gradients go straight through the rounding.

    **Cost.** The authors publish no kernel, and there is none here: products of bits run as products of floats, so
    this costs *more* time and memory than plain attention. It gives what the checkpoints compute, and what a kernel
    would have to. Rows of nearly uniform attention lose weight: of N equal weights, each rounds to
    round(255 / N) / 255, which sums to 0.77 at 197 tokens and to 0 above 510.

    Parameters are named as in the official checkpoints: those of the projections and `relative_position_bias_table`
    `[(2H - 1) * (2W - 1) + 3, heads]`.

    Args:
        dim, num_heads, options: as in `ProjectedAttention2d`, with a class token.
        grid_size: H and W, for which the biases are learnt; they are interpolated for other maps.
    """

    def __init__(self, dim: int, *, num_heads: int, grid_size: tuple[int, int], **options: Any):
        super().__init__(dim, num_heads=num_heads, class_token=True, **options)
        self.grid_size = (grid_size[0], grid_size[1])
        rows, columns = (2 * n - 1 for n in grid_size)
        dd: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows * columns + CLASS_ROWS, num_heads, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the bias table anew; submodules have their own `reset_parameters`."""
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def set_grid_size(self, grid_size: tuple[int, int]) -> None:
        """Interpolate the bias table for maps of another size."""
        old = self.relative_position_bias_table
        table = resize_offsets(old.detach(), self.grid_size, grid_size)
        self.relative_position_bias_table = nn.Parameter(table, requires_grad=old.requires_grad)
        self.grid_size = (grid_size[0], grid_size[1])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, x: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Tokens `[B, N, heads, d]` to `[B, N, dim]`."""
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # [B, heads, N, d]
        magnitude = query.abs().mean((-2, -1), keepdim=True) * key.abs().mean((-2, -1), keepdim=True)
        scores = signs(query) @ signs(key).mT * (magnitude * query.shape[-1] ** -0.5)
        table = resize_offsets(self.relative_position_bias_table, self.grid_size, grid_size)
        weights = (scores + bias_of_offsets(table, grid_size)).softmax(dim=-1)
        steps = weights * LEVELS
        counts = straight_through(steps.round(), steps)
        scale = (PEAK / (value.abs().amax(-2, keepdim=True) + 1e-6)).detach()  # [B, heads, 1, d]
        integers = straight_through((value * scale).round(), value.clamp(-2, 2) * scale)
        out = counts @ integers / (LEVELS * (scale + 1e-6))
        return out.transpose(1, 2).flatten(2)

    def attention_macs(self, shape: tuple[int, int]) -> int:
        """Multiply-accumulates of the attention as it runs; `shape` is tokens and dim."""
        return 2 * shape[0] ** 2 * self.dim
