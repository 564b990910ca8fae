"""SPACH: one layout around convolution, attention and an MLP along tokens (arXiv:2108.13002).

Models have one resolution, or four (`spach_ms_*`). Convolutions tell tokens where they are, so images of any size go
through models without MLPs along tokens; those are learnt for one input size.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Literal, get_args

from torch import nn

from ...layers.dense import DenseAttention2d
from ...layers.mixing import TokenMlp2d
from ..builder import DIGITS_CFG, Model, register_family
from ..conversion import Conversion
from ..hosts import Place, Spach

Mixer = Literal["conv", "attn", "mlp"]


def mix(place: Place, *, mixer: Mixer, conv_blocks: int | Sequence[int] = 0) -> nn.Module | None:
    """The mixer of a block beside its depthwise convolution.

    Args:
        place: the block.
        mixer: "attn" for dense attention, "mlp" for an MLP along tokens, "conv" for none.
        conv_blocks: leading blocks of each stage that have none.

    Raises:
        ValueError: another mixer.
    """
    if mixer not in get_args(Mixer):
        raise ValueError(f"mixer={mixer!r} must be 'conv', 'attn' or 'mlp'")
    if mixer == "conv" or place.is_leading("conv_blocks", conv_blocks):
        return None
    options = {key: value for key, value in place.options.items() if key != "impl"}
    if mixer == "attn":
        return DenseAttention2d(place.dim, num_heads=place.num_heads, **options)
    return TokenMlp2d(place.dim, grid_size=place.grid, drop=options.pop("proj_drop"), **options)


MS = partial(Spach, attn=mix)
ISOTROPIC = partial(Spach, attn=mix, patch_size=16, halve=False, depths=(3, 3, 3, 3), embed_dim=384, num_heads=12)
DEEP = partial(ISOTROPIC, depths=(6, 6, 6, 6))


def official_names(model: nn.Module) -> list:
    """Renames of the official files, which count blocks over one resolution and after the way down to it."""
    depths: tuple[int, ...] = model.depths  # pyright: ignore[reportAssignmentType]
    blocks = [f"layers.{stage}.blocks.{block}." for stage, depth in enumerate(depths) for block in range(depth)]

    def named(match: re.Match) -> str:
        stage, block = int(match[1]) - 1, int(match[2])
        if stage == 0:
            return f"layers.0.blocks.{block}."
        return f"layers.{stage}.blocks.{block - 1}." if block else f"layers.{stage - 1}.downsample."

    return [
        (r"cpe_net\.net\.1", "cpe_net.dwconv"),
        (r"^norm1\.", "patch_embed.norm."),
        (r"^norm2\.", "norm."),
        (r"^stem\.", "patch_embed."),
        (r"^blocks\.(\d+)\.", lambda match: blocks[int(match[1])]),
        (r"^layer(\d+)\.(\d+)\.(?:net\.1\.)?", named),
    ]


def one(size: str, mixer: Mixer, build: partial = ISOTROPIC, **args) -> Model:
    about = f"SPACH-{size} with {mixer}; no weights are published. Its blocks count as four stages, for features."
    return Model(about, build, {"mixer": mixer, **args})


def several(size: str, mixer: Mixer, depths: Sequence[int], conv_blocks: Sequence[int], dim: int, **args) -> Model:
    about = f"SPACH-MS-{size} with {mixer} after {sum(conv_blocks)} blocks of convolutions alone."
    return Model(about, MS, {"mixer": mixer, "depths": depths, "conv_blocks": conv_blocks, "embed_dim": dim, **args})


NARROW = {"embed_dim": 192, "num_heads": 6}
WIDE = {"embed_dim": 512, "num_heads": 16, "mlp_ratio": 3.0}
SHORT, LONG = (2, 2, 6, 2), (3, 4, 12, 3)
MODELS = {
    "spach_xxs_conv": one("xxs", "conv"),
    "spach_xxs_attn": one("xxs", "attn", **NARROW),
    "spach_xxs_mlp": one("xxs", "mlp"),
    "spach_xs_conv": one("xs", "conv", DEEP),
    "spach_xs_attn": one("xs", "attn"),
    "spach_xs_mlp": one("xs", "mlp", DEEP),
    "spach_s_conv": one("s", "conv", DEEP, **WIDE),
    "spach_s_attn": one("s", "attn", **WIDE),
    "spach_s_mlp": one("s", "mlp", DEEP, **WIDE),
    "spach_ms_xxs_conv": several("xxs", "conv", SHORT, SHORT, 64),
    "spach_ms_xxs_attn": several("xxs", "attn", SHORT, (2, 0, 0, 0), 32, num_heads=1),
    "spach_ms_xxs_mlp": several("xxs", "mlp", SHORT, (2, 0, 0, 0), 64),
    "spach_ms_xs_conv": several("xs", "conv", LONG, LONG, 96),
    "spach_ms_xs_attn": several("xs", "attn", LONG, (3, 0, 0, 0), 64),
    "spach_ms_xs_mlp": several("xs", "mlp", LONG, (3, 0, 0, 0), 96),
    "spach_ms_xs_hybrid": several("xs", "attn", LONG, (3, 4, 2, 1), 96, num_heads=3),
    "spach_ms_s_conv": several("s", "conv", LONG, LONG, 128, mlp_ratio=3.0),
    "spach_ms_s_attn": several("s", "attn", LONG, (3, 0, 0, 0), 96, num_heads=3, mlp_ratio=3.0),
    "spach_ms_s_mlp": several("s", "mlp", LONG, (3, 0, 0, 0), 128, mlp_ratio=3.0),
    "spach_ms_s_hybrid": several("s", "attn", LONG, (3, 2, 2, 1), 128, num_heads=4, mlp_ratio=3.0),
    "spach_ms_pico": several("pico", "attn", (1, 2, 2), (1, 1, 0), 32, layer_scale=0.1),
    "test_spach": one("test", "attn", depths=(1, 2), embed_dim=16, num_heads=2, patch_size=8),
    "test_spach_ms": several("test", "attn", (1, 2), (1, 1), 16),
    "test_spach_ms_mlp": several("test", "mlp", (1, 2), (1, 1), 16, img_size=64),
}
CONVERSION = Conversion(rename=official_names)
ONE_SIZE = {"fixed_input_size": True}  # MLPs along tokens are learnt for one number of them
register_family(
    __name__,
    MODELS,
    conversion=CONVERSION,
    cfg={"paper_ids": "arXiv:2108.13002"},
    cfgs={
        **{f"spach_{size}_mlp.untrained": ONE_SIZE for size in ("xxs", "xs", "s")},
        **{f"spach_ms_{size}_mlp.microsoft_in1k": ONE_SIZE for size in ("xxs", "s")},
        "spach_ms_xs_mlp.untrained": ONE_SIZE,
        "test_spach_ms_mlp.untrained": ONE_SIZE,
        "spach_ms_pico.untrained": DIGITS_CFG,
        "test_spach.untrained": {"pool_size": (8, 8)},
    },
    leaves=(DenseAttention2d, TokenMlp2d),
)
