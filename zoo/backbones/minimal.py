"""Minimal transformer: ViT whose blocks leave out projections and feed-forward layers (arXiv:2410.13732).

No code and no weights are published; sizes are ours. Norms stay in front of what is left.
"""

from functools import partial

from torch import Tensor, nn

from ...layers.minimal import MinimalAttention, QueryKey, ValueOutput
from ..builder import DIGITS_CFG, Model, register_family
from ..hosts import DeiT, Place


class TokenAttention(MinimalAttention):
    """The attention as DeiT's layout calls it, which tells it the grid."""

    def forward(self, x: Tensor, *, grid_size: tuple[int, int]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x)


def minimal(place: Place, *, qk: QueryKey = "symmetric", vo: ValueOutput = "merged") -> nn.Module:
    """Attention with the projections that `qk` and `vo` leave; see `foveal.layers.MinimalAttention`."""
    options = {key: value for key, value in place.options.items() if key != "impl"}
    return TokenAttention(place.dim, num_heads=place.num_heads, qk=qk, vo=vo, **options)


class MinimalViT(DeiT):
    """DeiT's layout, whose feed-forward layers may be left out; arguments as in `DeiT`.

    Args:
        mlp: whether blocks have a feed-forward layer, and the norm before it.
    """

    def __init__(self, *, mlp: bool = True, **arguments):
        super().__init__(**arguments)
        if not mlp:
            for block in self.blocks:
                block.norm2 = block.mlp = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
                block.drop_path2 = Nothing()  # pyright: ignore[reportAttributeAccessIssue]


class Nothing(nn.Module):
    """Zeros: what a layer that is left out adds to the residual stream."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


LAYOUT = partial(MinimalViT, attn=minimal)
# Four heads for digits: with one, of a single symmetric map of attention, 5 more of 360 images go wrong.
SIZE = {"embed_dim": 64, "depth": 6, "num_heads": 4, "img_size": 32, "patch_size": 4}
MODELS = {
    "minimal_vit_t": Model("Minimal ViT with DeiT-Tiny's sizes.", LAYOUT, {"embed_dim": 192, "num_heads": 3}),
    "minimal_vit_pico": Model("Six blocks for 32x32 single-channel images (handwritten digits).", LAYOUT, SIZE),
    "test_minimal_vit": Model(
        "Minimal ViT for tests.",
        LAYOUT,
        {"embed_dim": 32, "depth": 3, "num_heads": 2, "qk": "collapsed", "vo": "none", "mlp": False},
    ),
}
register_family(
    __name__,
    MODELS,
    cfg={"fixed_input_size": True, "paper_ids": "arXiv:2410.13732"},
    cfgs={"minimal_vit_pico.untrained": {**DIGITS_CFG, "pool_size": (8, 8)}},
    leaves=(TokenAttention,),
)
