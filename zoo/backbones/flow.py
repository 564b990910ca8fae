"""Flow-attention in the layouts of other families: DeiT, PVT, Swin and CSWin (arXiv:2202.06258).

The authors released one image model, `flowformer_cv`, whose layout is its own. These are its attention in layouts that
they did not train, beside InLine's and FLatten's; there are no weights.
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from ...layers.flow import FlowAttention2d, FlowBranch2d
from ..builder import Model, register_family
from ..conversion import Conversion, positions, window_table
from ..hosts import PVT, CSWin, DeiT, Place, Swin


def flow(
    place: Place, *, layer: Callable[..., nn.Module], flow_blocks: int | Sequence[int] | None = None
) -> nn.Module | None:
    """Flow-attention in the leading blocks of a stage; the others keep the host's own.

    Args:
        place: the block.
        layer: the layer that the host calls.
        flow_blocks: leading blocks with it; all when None.
    """
    if not place.is_leading("flow_blocks", flow_blocks):
        return None
    return layer(place.dim, num_heads=place.num_heads, **place.options)


DEIT = partial(DeiT, attn=flow, layer=partial(FlowAttention2d, class_token=True))
PVT_ = partial(PVT, attn=flow, layer=partial(FlowAttention2d, separate_query=True))
SWIN = partial(Swin, attn=flow, layer=FlowAttention2d)
CSWIN = partial(CSWin, attn=flow, layer=FlowBranch2d)
MODELS = {
    "flow_deit_t": Model("Flow-attention in DeiT-Tiny.", DEIT, {"embed_dim": 192, "num_heads": 6}),
    "flow_deit_s": Model("Flow-attention in DeiT-Small.", DEIT, {"embed_dim": 384, "num_heads": 12}),
    "flow_pvt_t": Model("Flow-attention in PVT-Tiny.", PVT_, {"depths": (2, 2, 2, 2)}),
    "flow_pvt_s": Model("Flow-attention in PVT-Small.", PVT_, {"depths": (3, 4, 6, 3)}),
    "flow_swin_t": Model(
        "Flow-attention in the first two stages of Swin-Tiny.",
        SWIN,
        {"depths": (2, 2, 6, 2), "flow_blocks": (2, 2, 0, 0)},
    ),
    "flow_cswin_t": Model(
        "Flow-attention in the first two stages of CSWin-Tiny.",
        CSWIN,
        {"depths": (2, 4, 18, 1), "flow_blocks": (2, 4, 0, 0)},
    ),
    "test_flow_deit": Model("Flow-DeiT for tests.", DEIT, {"embed_dim": 32, "depth": 3, "num_heads": 2}),
    "test_flow_pvt": Model(
        "Flow-PVT for tests.",
        PVT_,
        {"embed_dims": (16, 24), "depths": (2, 1), "num_heads": (1, 2), "mlp_ratios": (2, 3)},
    ),
    "test_flow_swin": Model(
        "Flow-Swin for tests.",
        SWIN,
        {"embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2), "flow_blocks": (1, 1), "window": 3},
    ),
    "test_flow_cswin": Model(
        "Flow-CSWin for tests.",
        CSWIN,
        {"embed_dim": 16, "depths": (1, 1, 1), "num_heads": (1, 2, 4), "flow_blocks": (1, 0, 0)},
    ),
}
CONVERSION = Conversion(
    resize={"relative_position_bias_table": window_table, **{f"pos_embed{i}": positions for i in ("", 1, 2, 3, 4)}}
)
register_family(
    __name__,
    MODELS,
    conversion=CONVERSION,
    cfg={"fixed_input_size": True, "paper_ids": "arXiv:2202.06258"},
    leaves=(FlowAttention2d, FlowBranch2d),
)
