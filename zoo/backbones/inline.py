"""InLine: DeiT, PVT, Swin and CSWin on injective linear attention over whole maps (arXiv:2412.06590).

Parameters are named as in the official checkpoints, which load unchanged, at any input size.
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from ...layers.inline import InLineAttention2d, InLineBranch2d
from ..builder import DIGITS_CFG, Model, register_family
from ..conversion import Conversion, positions, window_table
from ..hosts import PVT, CSWin, DeiT, Place, Swin


def inline(
    place: Place, *, layer: Callable[..., nn.Module], inline_blocks: int | Sequence[int] | None = None
) -> nn.Module | None:
    """InLine attention in the leading blocks of a stage; the others keep the host's own.

    Args:
        place: the block.
        layer: the layer that the host calls.
        inline_blocks: leading blocks with it; all when None.
    """
    if not place.is_leading("inline_blocks", inline_blocks):
        return None
    return layer(place.dim, num_heads=place.num_heads, **place.options)


DEIT = partial(DeiT, attn=inline, layer=partial(InLineAttention2d, class_token=True))
PVT_ = partial(PVT, attn=inline, layer=partial(InLineAttention2d, separate_query=True), num_heads=(2, 4, 10, 16))
SWIN = partial(Swin, attn=inline, layer=InLineAttention2d)
CSWIN = partial(CSWin, attn=inline, layer=InLineBranch2d)

TINY = {"depths": (2, 2, 6, 2), "inline_blocks": (2, 2, 6, 0)}
SMALL = {"depths": (2, 2, 18, 2), "inline_blocks": (2, 2, 0, 0)}
BASE = {"embed_dim": 128, "num_heads": (4, 8, 16, 32), "depths": (2, 2, 18, 2), "inline_blocks": (2, 2, 2, 0)}
CSWIN_SMALL = {"depths": (3, 6, 29, 2), "inline_blocks": (3, 6, 0, 0)}
PICO = {
    "img_size": 32,
    "embed_dim": 24,
    "depths": (1, 2, 1),
    "num_heads": (1, 2, 4),
    "inline_blocks": (1, 1, 1),
    "window": 4,
}
MODELS = {
    "inline_deit_t": Model("InLine-DeiT-Tiny.", DEIT, {"embed_dim": 192, "num_heads": 6}),
    "inline_deit_s": Model("InLine-DeiT-Small, for 288x288 images.", DEIT, {"embed_dim": 320, "num_heads": 10}),
    "inline_deit_b": Model("InLine-DeiT-Base, for 448x448 images.", DEIT, {"embed_dim": 384, "num_heads": 12}),
    "inline_pvt_t": Model("InLine-PVT-Tiny, trained with drop path 0.1.", PVT_, {"depths": (2, 2, 2, 2)}),
    "inline_pvt_s": Model("InLine-PVT-Small, trained with drop path 0.1.", PVT_, {"depths": (3, 4, 6, 3)}),
    "inline_pvt_m": Model("InLine-PVT-Medium, trained with drop path 0.3.", PVT_, {"depths": (3, 4, 18, 3)}),
    "inline_pvt_b": Model("InLine-PVT-Large, trained with drop path 0.3.", PVT_, {"depths": (3, 8, 27, 3)}),
    "inline_swin_t": Model("InLine-Swin-Tiny, trained with drop path 0.2.", SWIN, TINY),
    "inline_swin_s": Model("InLine-Swin-Small, trained with drop path 0.3.", SWIN, SMALL),
    "inline_swin_b": Model("InLine-Swin-Base, trained with drop path 0.5.", SWIN, BASE),
    "inline_cswin_t": Model(
        "InLine-CSWin-Tiny, trained with drop path 0.2.",
        CSWIN,
        {"depths": (2, 4, 18, 1), "inline_blocks": (2, 4, 0, 0)},
    ),
    "inline_cswin_s": Model("InLine-CSWin-Small, trained with drop path 0.4.", CSWIN, CSWIN_SMALL),
    "inline_cswin_b": Model(
        "InLine-CSWin-Base, trained with drop path 0.5.",
        CSWIN,
        {**CSWIN_SMALL, "embed_dim": 96, "num_heads": (4, 8, 16, 32)},
    ),
    "inline_swin_pico": Model("Three stages for 32x32 single-channel images (handwritten digits).", SWIN, PICO),
    "test_inline_deit": Model("InLine-DeiT for tests.", DEIT, {"embed_dim": 32, "depth": 3, "num_heads": 2}),
    "test_inline_pvt": Model(
        "InLine-PVT for tests.",
        PVT_,
        {"embed_dims": (16, 24), "depths": (2, 1), "num_heads": (1, 2), "mlp_ratios": (2, 3)},
    ),
    "test_inline_swin": Model(
        "InLine-Swin for tests.",
        SWIN,
        {"embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2), "inline_blocks": (1, 1), "window": 3},
    ),
    "test_inline_cswin": Model(
        "InLine-CSWin for tests.",
        CSWIN,
        {"embed_dim": 16, "depths": (1, 1, 1), "num_heads": (1, 2, 4), "inline_blocks": (1, 0, 0)},
    ),
}
CONVERSION = Conversion(
    drop=(r"\.relative_position_index$", r"\.attn_mask$"),
    resize={
        "relative_position_bias_table": window_table,
        **{f"pos_embed{i}": positions for i in ("", 1, 2, 3, 4)},
    },
)
register_family(
    __name__,
    MODELS,
    conversion=CONVERSION,
    cfg={"fixed_input_size": True, "crop_mode": "squash", "paper_ids": "arXiv:2412.06590"},
    cfgs={"inline_swin_pico.untrained": DIGITS_CFG},
    leaves=(InLineAttention2d, InLineBranch2d),
)
