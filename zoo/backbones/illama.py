"""iLLaMA: a vision transformer with the parts of LLaMA: causal attention, RoPE, RMS norm and SwiGLU (arXiv:2404.06773).

The class token is the last of the sequence. Parameter names are those of the official checkpoints; their position
embedding has the class token last, too.
"""

from functools import partial

import torch
from timm.layers import RmsNorm
from torch import Tensor, nn
from torch.nn import functional as F

from ...layers.causal import PostSoftmaxCausalAttention2d
from ..builder import DIGITS_CFG, Model, register_family
from ..conversion import Conversion, Target, positions
from ..hosts import DeiT, Place


class SwiGlu(nn.Module):
    """Gated feed-forward layer without biases; 2/3 of the hidden width, rounded up to a multiple of `multiple_of`."""

    def __init__(
        self, in_features: int, hidden_features: int, *, multiple_of: int = 256, drop: float = 0.0, device=None,
        dtype=None, **unused
    ):  # fmt: skip
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        hidden = -(-int(2 * hidden_features / 3) // multiple_of) * multiple_of
        self.fc1 = nn.Linear(in_features, hidden, bias=False, **dd)
        self.fc2 = nn.Linear(hidden, in_features, bias=False, **dd)
        self.fc3 = nn.Linear(in_features, hidden, bias=False, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(F.silu(self.fc1(x)) * self.fc3(x)))


def causal(place: Place, *, softness: float = 0.0) -> nn.Module:
    """Causal attention of a block; `softness` as in `foveal.layers.PostSoftmaxCausalAttention2d`."""
    return PostSoftmaxCausalAttention2d(
        place.dim, num_heads=place.num_heads, class_token=True, softness=softness, **place.options
    )


class iLLaMA(DeiT):
    """DeiT's layout in the order that causal attention needs: the class token last; arguments as in `DeiT`.

    Outputs have the class token first, as timm does.
    """

    def set_softness(self, softness: float) -> None:
        """Set the weight of later tokens in all blocks, which training lowers from 1 to 0."""
        if not 0 <= softness <= 1:
            raise ValueError(f"softness={softness} must lie in [0, 1]")
        for block in self.blocks:
            block.attn.softness = softness  # pyright: ignore[reportAttributeAccessIssue]

    @staticmethod
    def _resize_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
        return DeiT._resize_table(table.roll(1, dims=1), old, new).roll(-1, dims=1)

    def _positions(self, grid_size: tuple[int, int]) -> Tensor:
        return super()._positions(grid_size).roll(1, dims=1)


def positions_class_last(value: Tensor, target: Target) -> Tensor:
    """Bicubic resize of embeddings per position, of which the last is the class token's."""
    return torch.roll(positions(value.roll(1, dims=1), target), -1, dims=1)


LAYOUT = partial(iLLaMA, attn=causal, norm_layer=RmsNorm, mlp_layer=SwiGlu)
MODELS = {
    "illama_t": Model("iLLaMA-Tiny.", LAYOUT, {"embed_dim": 192, "num_heads": 3}),
    "illama_s": Model("iLLaMA-Small.", LAYOUT, {"embed_dim": 384, "num_heads": 6}),
    "illama_b": Model("iLLaMA-Base.", LAYOUT, {"embed_dim": 768, "num_heads": 12}),
    "illama_l": Model("iLLaMA-Large.", LAYOUT, {"embed_dim": 1024, "depth": 24, "num_heads": 16}),
    "illama_pico": Model(
        "Four blocks on 4x4 patches for 32x32 single-channel images (handwritten digits).",
        LAYOUT,
        {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0,
         "mlp_layer": partial(SwiGlu, multiple_of=8)},
    ),
    "test_illama": Model(
        "iLLaMA for tests.",
        LAYOUT,
        {"embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_layer": partial(SwiGlu, multiple_of=8)},
    ),
}  # fmt: skip
CONVERSION = Conversion(resize={"pos_embed": positions_class_last})
register_family(
    __name__,
    MODELS,
    conversion=CONVERSION,
    cfg={"fixed_input_size": True, "paper_ids": "arXiv:2404.06773"},
    cfgs={"illama_pico.untrained": {**DIGITS_CFG, "pool_size": (8, 8)}},
    leaves=(PostSoftmaxCausalAttention2d,),
)
