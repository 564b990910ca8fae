"""MoH-ViT: TransNeXt whose tokens weigh the heads of each attention and leave some out (arXiv:2410.11842).

Images of any size go through; the authors' code takes one. Parameter names are those of the official checkpoints but
for the routers'.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from ...layers.aggregated import GlobalCosineAttention2d, PixelFocusedAttention2d
from ..builder import DIGITS_CFG, Model, register_family
from ..conversion import Conversion
from ..hosts import Place, PVTv2
from ..hosts.blocks import DepthwiseConv


class ConvGlu(nn.Module):
    """Feed-forward layer gated by a depthwise convolution, on `[B, H, W, dim]`; 2/3 of the hidden width."""

    def __init__(self, dim: int, hidden: int, *, act_layer: type[nn.Module], drop: float, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = int(2 * hidden / 3)
        self.fc1 = nn.Linear(dim, 2 * hidden, **dd)
        self.dwconv = DepthwiseConv(hidden, **dd)
        self.act = act_layer()
        self.drop = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.drop(self.fc2(self.drop(self.act(self.dwconv(gate)) * value)))


class TransNeXt(PVTv2):
    """TransNeXt's layout: PVT v2 with gated feed-forward layers; arguments as in `PVTv2`."""

    mlp_layer: ClassVar[Callable[..., nn.Module]] = ConvGlu


def mixture(
    place: Place,
    *,
    shared: int | Sequence[int],
    routed: int | Sequence[int],
    pools: int | Sequence[int] = (8, 4, 2, 1),
    skip_heads: bool = False,
) -> nn.Module:
    """TransNeXt's attention with a mixture of heads.

    Args:
        place: the block.
        shared, routed: heads that serve every token, and further ones that each token takes, by stage.
        pools: side of the cells of pooled keys by stage; 1 for attention to all tokens.
        skip_heads: see `foveal.layers.LengthScaledAttention2d`.
    """
    pool = place.pick(pools)
    options = {key: value for key, value in place.options.items() if key != "impl"}
    options |= {"shared": place.pick(shared), "routed": place.pick(routed), "skip_heads": skip_heads}
    if pool == 1:
        return GlobalCosineAttention2d(place.dim, num_heads=place.num_heads, grid_size=place.grid, **options)
    return PixelFocusedAttention2d(place.dim, num_heads=place.num_heads, grid_size=place.grid, pool=pool, **options)


LAYOUT = partial(TransNeXt, attn=mixture)
SMALL = {"embed_dims": (72, 144, 288, 576), "num_heads": (3, 6, 12, 24), "depths": (5, 5, 22, 5)}
BASE = {"embed_dims": (96, 192, 384, 768), "num_heads": (4, 8, 16, 32), "depths": (5, 5, 23, 5)}
TEST = {
    "embed_dims": (16, 32),
    "depths": (1, 2),
    "num_heads": (2, 4),
    "mlp_ratios": (2, 3),
    "pools": (2, 1),
    "shared": (2, 1),
    "routed": (0, 2),
}
PICO = {
    **TEST,
    "img_size": 32,
    "embed_dims": (32, 64, 96),
    "depths": (1, 1, 1),
    "num_heads": (2, 4, 6),
    "mlp_ratios": (2, 2, 2),
    "pools": (2, 2, 1),
    "shared": (2, 1, 2),
    "routed": (0, 2, 2),
}
MODELS = {
    "moh_vit_s_80": Model(
        "MoH-ViT-Small, 80 % of the heads.", LAYOUT, {**SMALL, "shared": (3, 6, 3, 8), "routed": (0, 0, 6, 12)}
    ),
    "moh_vit_s_75": Model(
        "MoH-ViT-Small, 75 % of the heads.", LAYOUT, {**SMALL, "shared": (3, 6, 3, 4), "routed": (0, 0, 6, 12)}
    ),
    "moh_vit_b_75": Model(
        "MoH-ViT-Base, 75 % of the heads.", LAYOUT, {**BASE, "shared": (4, 8, 4, 5), "routed": (0, 0, 8, 16)}
    ),
    "moh_vit_b_50": Model(
        "MoH-ViT-Base, 50 % of the heads.", LAYOUT, {**BASE, "shared": (2, 2, 2, 4), "routed": (2, 4, 6, 8)}
    ),
    "moh_vit_pico": Model("Three stages for 32x32 single-channel images (handwritten digits).", LAYOUT, PICO),
    "test_moh_vit": Model("MoH-ViT for tests.", LAYOUT, TEST),
}
CONVERSION = Conversion(rename=((r"\.attn\.(wg(?:_[01])?)\.", r".attn.router.\1."),))
register_family(
    __name__,
    MODELS,
    conversion=CONVERSION,
    cfg={"paper_ids": "arXiv:2410.11842"},
    cfgs={"moh_vit_pico.untrained": DIGITS_CFG},
    leaves=(GlobalCosineAttention2d, PixelFocusedAttention2d),
)
