"""FLatten: PVT, PVT v2, Swin and CSWin on focused linear attention over whole maps (arXiv:2308.00442).

Parameters are named as in the official checkpoints, which load unchanged, at any input size.
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from ...layers.focused import FocusedLinearAttention2d, FocusedLinearBranch2d
from ..builder import DIGITS_CFG, Model, register_family
from ..conversion import Conversion, positions, window_table
from ..hosts import PVT, CSWin, Place, PVTv2, Swin


def focused(
    place: Place, *, layer: Callable[..., nn.Module], linear_blocks: Sequence[int] | None = None
) -> nn.Module | None:
    """Focused linear attention in the leading blocks of a stage; the others keep the host's own.

    Args:
        place: the block.
        layer: the layer that the host calls.
        linear_blocks: leading blocks with it; all when None.
    """
    if not place.is_leading("linear_blocks", linear_blocks):
        return None
    return layer(place.dim, num_heads=place.num_heads, grid_size=place.grid, **place.options)


SEPARATE = partial(FocusedLinearAttention2d, separate_query=True)
PVT_, PVTV2 = partial(PVT, attn=focused, layer=SEPARATE), partial(PVTv2, attn=focused, layer=SEPARATE)
SWIN = partial(Swin, attn=focused, layer=FocusedLinearAttention2d)
CSWIN = partial(CSWin, attn=focused, layer=FocusedLinearBranch2d)

DEEP = {"depths": (2, 2, 18, 2), "linear_blocks": (2, 2, 0, 0)}
BASE_HEADS = {"num_heads": (4, 8, 16, 32)}
TEST_PVT = {"embed_dims": (16, 24), "depths": (2, 1), "num_heads": (1, 2), "mlp_ratios": (2, 3)}
PICO = {
    "img_size": 32,
    "embed_dim": 24,
    "depths": (1, 2, 1),
    "num_heads": (1, 2, 4),
    "linear_blocks": (1, 1, 1),
    "window": 4,
}
MODELS = {
    "flatten_pvt_t": Model("FLatten-PVT-Tiny, trained with drop path 0.1.", PVT_, {"depths": (2, 2, 2, 2)}),
    "flatten_pvt_s": Model("FLatten-PVT-Small; no weights are published.", PVT_, {"depths": (3, 4, 6, 3)}),
    "flatten_pvt_m": Model("FLatten-PVT-Medium; no weights are published.", PVT_, {"depths": (3, 4, 18, 3)}),
    "flatten_pvt_b": Model("FLatten-PVT-Large; no weights are published.", PVT_, {"depths": (3, 8, 27, 3)}),
    "flatten_pvtv2_b0": Model(
        "FLatten-PVTv2-B0, trained with drop path 0.1.",
        PVTV2,
        {"embed_dims": (32, 64, 160, 256), "depths": (2, 2, 2, 2)},
    ),
    "flatten_pvtv2_b1": Model("FLatten-PVTv2-B1; no weights are published.", PVTV2, {"depths": (2, 2, 2, 2)}),
    "flatten_pvtv2_b2": Model("FLatten-PVTv2-B2; no weights are published.", PVTV2, {"depths": (3, 4, 6, 3)}),
    "flatten_pvtv2_b3": Model("FLatten-PVTv2-B3; no weights are published.", PVTV2, {"depths": (3, 4, 18, 3)}),
    "flatten_pvtv2_b4": Model("FLatten-PVTv2-B4; no weights are published.", PVTV2, {"depths": (3, 8, 27, 3)}),
    "flatten_swin_t": Model(
        "FLatten-Swin-Tiny, trained with drop path 0.2.",
        SWIN,
        {"depths": (2, 2, 6, 2), "linear_blocks": (2, 2, 0, 0)},
    ),
    "flatten_swin_s": Model("FLatten-Swin-Small, trained with drop path 0.3.", SWIN, DEEP),
    "flatten_swin_b": Model(
        "FLatten-Swin-Base, trained with drop path 0.5.", SWIN, {**DEEP, **BASE_HEADS, "embed_dim": 128}
    ),
    "flatten_cswin_t": Model(
        "FLatten-CSWin-Tiny, trained with drop path 0.2.",
        CSWIN,
        {"depths": (2, 4, 18, 1), "linear_blocks": (2, 4, 0, 0)},
    ),
    "flatten_cswin_s": Model(
        "FLatten-CSWin-Small; no weights are published.",
        CSWIN,
        {"depths": (2, 4, 32, 2), "linear_blocks": (2, 4, 0, 0)},
    ),
    "flatten_cswin_b": Model(
        "FLatten-CSWin-Base; no weights are published.",
        CSWIN,
        {**BASE_HEADS, "embed_dim": 96, "depths": (3, 6, 29, 2), "linear_blocks": (3, 6, 0, 0)},
    ),
    "flatten_swin_pico": Model("Three stages for 32x32 single-channel images (handwritten digits).", SWIN, PICO),
    "test_flatten_pvt": Model("FLatten-PVT for tests.", PVT_, TEST_PVT),
    "test_flatten_pvtv2": Model("FLatten-PVTv2 for tests.", PVTV2, TEST_PVT),
    "test_flatten_swin": Model(
        "FLatten-Swin for tests.",
        SWIN,
        {"embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2), "linear_blocks": (1, 1), "window": 3},
    ),
    "test_flatten_cswin": Model(
        "FLatten-CSWin for tests.",
        CSWIN,
        {"embed_dim": 16, "depths": (1, 1, 1), "num_heads": (1, 2, 4), "linear_blocks": (1, 0, 0)},
    ),
}
CONVERSION = Conversion(
    drop=(r"\.relative_position_index$", r"\.attn_mask$", r"^norm\."),  # PVT's files hold a norm without a use
    resize={
        "relative_position_bias_table": window_table,
        **{name: positions for name in ("positional_encoding", "pos_embed1", "pos_embed2", "pos_embed3", "pos_embed4")},
    },
)
register_family(
    __name__,
    MODELS,
    conversion=CONVERSION,
    cfg={"fixed_input_size": True, "crop_mode": "squash", "paper_ids": "arXiv:2308.00442"},
    cfgs={"flatten_swin_b.leap_in1k_384": {"crop_pct": 1.0}, "flatten_swin_pico.untrained": DIGITS_CFG},
    leaves=(FocusedLinearAttention2d, FocusedLinearBranch2d),
)
