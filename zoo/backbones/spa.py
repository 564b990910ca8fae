"""SPA: isotropic ViT whose attention keeps to the tokens that a gate selects (arXiv:2410.23608).

No code and no weights are published; layout and sizes are ours. Positions are embedded, as nothing else tells where a
token is. Feed-forward layers keep all tokens.
"""

from functools import partial

from ...layers.selection import SelectAndPackAttention2d
from ..builder import DIGITS_CFG, Model, register_family
from ..conversion import Conversion, positions
from ..hosts import Isotropic, Place


def selected(place: Place, *, pack: bool = False, gate_bias: float | None = None) -> SelectAndPackAttention2d:
    """Attention of selected tokens; see `foveal.layers.SelectAndPackAttention2d`."""
    options = {"pack": pack, "gate_bias": gate_bias, **place.options}
    return SelectAndPackAttention2d(place.dim, num_heads=place.num_heads, **options)


LAYOUT = partial(Isotropic, attn=selected, positions=True)
SIZE = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0}
MODELS = {
    "spa_iso_t": Model("Select and pack with ViT-Tiny's sizes.", LAYOUT, {"embed_dim": 192, "num_heads": 3}),
    "spa_iso_s": Model("Select and pack with ViT-Small's sizes.", LAYOUT, {"embed_dim": 384, "num_heads": 6}),
    "spa_pico": Model("Four blocks on 4x4 patches for 32x32 single-channel images (handwritten digits).", LAYOUT, SIZE),
    "test_spa": Model("Select and pack for tests.", LAYOUT, {"embed_dim": 32, "depth": 3, "num_heads": 2}),
}
register_family(
    __name__,
    MODELS,
    conversion=Conversion(resize={"pos_embed": positions}),
    cfg={"paper_ids": "arXiv:2410.23608"},
    cfgs={"spa_pico.untrained": {**DIGITS_CFG, "pool_size": (8, 8)}},
    leaves=(SelectAndPackAttention2d,),
)
