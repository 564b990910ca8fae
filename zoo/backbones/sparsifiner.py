"""Sparsifiner: DeiT whose tokens attend to a quarter of the others, by a learned map of low rank (arXiv:2303.13755).

Parameter names are those of the official code, which comes without weights. Pairs that are not chosen are masked, at a
cost above plain attention's.
"""

from functools import partial

from ...layers.connectivity import ConnectivityAttention2d
from ..builder import DIGITS_CFG, Model, register_family
from ..conversion import Conversion, positions
from ..hosts import DeiT, Place


def connected(
    place: Place,
    *,
    share: float = 0.25,
    sparse: bool = True,
    loss_weight: float = 1.0,
    basis: int | None = None,
    coefficients: int = 8,
    threshold: float = 0.02,
) -> ConnectivityAttention2d:
    """Attention to keys that a predictor chooses; see `foveal.layers.ConnectivityAttention2d`."""
    return ConnectivityAttention2d(
        place.dim,
        num_heads=place.num_heads,
        grid_size=place.grid,
        class_token=True,
        share=share,
        sparse=sparse,
        loss_weight=loss_weight,
        predictor={"basis": basis, "coefficients": coefficients, "threshold": threshold},
        **place.options,
    )


LAYOUT = partial(DeiT, attn=connected)
SIZE = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0}
MODELS = {
    "sparsifiner_deit_t": Model("Sparsifiner-DeiT-Tiny.", LAYOUT, {"embed_dim": 192, "num_heads": 3}),
    "sparsifiner_deit_s": Model("Sparsifiner-DeiT-Small.", LAYOUT, {"embed_dim": 384, "num_heads": 6}),
    "sparsifiner_pico": Model(
        "Four blocks on 4x4 patches for 32x32 single-channel images (handwritten digits).", LAYOUT, SIZE
    ),
    "test_sparsifiner": Model("Sparsifiner for tests.", LAYOUT, {"embed_dim": 32, "depth": 3, "num_heads": 2}),
}
register_family(
    __name__,
    MODELS,
    conversion=Conversion(resize={"pos_embed": positions}),
    cfg={"fixed_input_size": True, "crop_pct": 0.9, "paper_ids": "arXiv:2303.13755"},
    cfgs={"sparsifiner_pico.untrained": {**DIGITS_CFG, "pool_size": (8, 8)}},
    leaves=(ConnectivityAttention2d,),
)
