"""BinaryAttention-DeiT: DeiT with 1-bit queries and keys, 8-bit weights and values (arXiv:2603.09582).

Parameter names are those of the official checkpoints. The arithmetic is emulated, at a cost above plain attention's.
"""

from functools import partial

from torch import Tensor

from ...layers.binary import CLASS_ROWS, BinaryAttention2d, resize_offsets
from ..builder import DIGITS_CFG, Model, register_family
from ..conversion import Conversion, Target, positions
from ..hosts import DeiT, Place


def binary(place: Place) -> BinaryAttention2d:
    """BinaryAttention of a block, with biases for the native grid."""
    return BinaryAttention2d(place.dim, num_heads=place.num_heads, grid_size=place.grid, **place.options)


def offsets(value: Tensor, target: Target) -> Tensor:
    """Bicubic resize of a file's biases per offset, which were learnt on a square map."""
    side = (round((len(value) - CLASS_ROWS) ** 0.5) + 1) // 2
    return resize_offsets(value, (side, side), target.grid_size)


LAYOUT = partial(DeiT, attn=binary)
MODELS = {
    "binary_deit_t": Model("BinaryAttention-DeiT-Tiny.", LAYOUT, {"embed_dim": 192, "num_heads": 3}),
    "binary_deit_s": Model("BinaryAttention-DeiT-Small.", LAYOUT, {"embed_dim": 384, "num_heads": 6}),
    "binary_deit_b": Model(
        "BinaryAttention-DeiT-Base; also for 384x384 images.", LAYOUT, {"embed_dim": 768, "num_heads": 12}
    ),
    "binary_deit_pico": Model(
        "Four blocks on 4x4 patches for 32x32 single-channel images (handwritten digits).",
        LAYOUT,
        {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0},
    ),
    "test_binary_deit": Model("BinaryAttention-DeiT for tests.", LAYOUT, {"embed_dim": 32, "depth": 3, "num_heads": 2}),
}
CONVERSION = Conversion(
    drop=(r"\.relative_position_index$",),
    resize={"relative_position_bias_table": offsets, "pos_embed": positions},
)
register_family(
    __name__,
    MODELS,
    conversion=CONVERSION,
    cfg={"fixed_input_size": True, "crop_pct": 0.9, "paper_ids": "arXiv:2603.09582"},
    cfgs={"binary_deit_pico.untrained": {**DIGITS_CFG, "pool_size": (8, 8)}},
    leaves=(BinaryAttention2d,),
)
