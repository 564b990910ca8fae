"""NAT, DiNAT and their relatives: neighborhood attention in three layouts (arXiv:2204.07143, arXiv:2209.15001).

DiNAT dilates every other block of NAT; DiNAT_s has the layout of Swin; the isotropic models have that of ViT.
Parameters are named as in the official checkpoints, which load unchanged, as do the `transformers` conversions on the
Hugging Face hub.
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from ...layers.neighborhood import NeighborhoodAttention2d
from ..builder import DIGITS_CFG, Model, register_family
from ..conversion import Conversion, bias_table
from ..hosts import NAT, Isotropic, Place, Swin
from ..hosts.nat import neighborhood


def dilated(
    place: Place,
    *,
    dilations: int | Sequence[int | Sequence[int]] = 1,
    qk_norm: Callable[..., nn.Module] | None = None,
) -> nn.Module:
    """Neighborhood attention, dilated in odd blocks.

    Args:
        place: the block.
        dilations: per stage, the dilation of its odd blocks (the others have 1), or one number per block. Dilations
            belong to the weights and do not follow the input size.
        qk_norm: norm layer for queries and keys; none when None.
    """
    dilation = place.pick(dilations)
    if isinstance(dilation, int):
        dilation = dilation if place.block % 2 else 1
    elif len(dilation) == place.depth:
        dilation = dilation[place.block]
    else:
        raise ValueError(f"dilations={tuple(dilation)} must be one number, or one for each of {place.depth} blocks")
    return neighborhood(place, dilation=dilation, qk_norm=qk_norm)


PYRAMID = partial(NAT, attn=dilated, window=7)
SWIN = partial(Swin, attn=dilated, window=7)
ISOTROPIC = partial(Isotropic, attn=dilated)

MINI = {"embed_dim": 64, "depths": (3, 4, 6, 5), "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0}
TINY = {**MINI, "depths": (3, 4, 18, 5)}
SMALL = {"embed_dim": 96, "depths": (3, 4, 18, 5), "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0}
BASE = {**SMALL, "embed_dim": 128, "num_heads": (4, 8, 16, 32), "layer_scale": 1e-5}
LARGE = {**SMALL, "embed_dim": 192, "num_heads": (6, 12, 24, 48)}
SWIN_TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "dilations": (8, 4, 2, 1)}
SWIN_SMALL = {**SWIN_TINY, "depths": (2, 2, 18, 2)}
SWIN_BASE = {**SWIN_SMALL, "embed_dim": 128, "num_heads": (4, 8, 16, 32)}
SWIN_LARGE = {**SWIN_SMALL, "embed_dim": 192, "num_heads": (6, 12, 24, 48)}
ISO_SMALL, ISO_BASE = {"embed_dim": 384, "num_heads": 12}, {"embed_dim": 768, "num_heads": 24}
AT_224, AT_384 = {"dilations": (8, 4, 2, 1)}, {"dilations": (13, 6, 3, 1)}
PICO = {"embed_dim": 28, "depths": (2, 2, 1), "num_heads": (1, 2, 4), "mlp_ratio": 2.0}
TEST = {"window": 3, "embed_dim": 16, "depths": (2, 1), "num_heads": (1, 2), "dilations": (3, 1)}
TEST_ISO = {"embed_dim": 32, "depth": 3, "num_heads": 2}
MODELS = {
    "natten_nat_m": Model("NAT-Mini, trained with drop path 0.2.", PYRAMID, MINI),
    "natten_nat_t": Model("NAT-Tiny, trained with drop path 0.2.", PYRAMID, TINY),
    "natten_nat_s": Model("NAT-Small, trained with drop path 0.3.", PYRAMID, {**SMALL, "layer_scale": 1e-5}),
    "natten_nat_b": Model("NAT-Base, trained with drop path 0.5.", PYRAMID, BASE),
    "natten_dinat_m": Model("DiNAT-Mini, trained with drop path 0.2.", PYRAMID, {**MINI, **AT_224}),
    "natten_dinat_t": Model("DiNAT-Tiny, trained with drop path 0.2.", PYRAMID, {**TINY, **AT_224}),
    "natten_dinat_s": Model("DiNAT-Small, trained with drop path 0.3.", PYRAMID, {**SMALL, **AT_224}),
    "natten_dinat_b": Model("DiNAT-Base, trained with drop path 0.5.", PYRAMID, {**BASE, **AT_224}),
    "natten_dinat_l": Model(
        "DiNAT-Large, fine-tuned with drop path 0.35, pre-trained with 0.2.", PYRAMID, {**LARGE, **AT_224}
    ),
    "natten_dinat_l_384": Model("DiNAT-Large with the dilations of 384x384 images.", PYRAMID, {**LARGE, **AT_384}),
    "natten_dinat_l_11x11_384": Model(
        "DiNAT-Large with 11x11 windows, for 384x384 images.", PYRAMID, {**LARGE, **AT_224, "window": 11}
    ),
    "natten_dinat_pico": Model(
        "Three stages for 32x32 single-channel images (handwritten digits); its weights are small enough to ship.",
        PYRAMID,
        {**PICO, "window": 3, "dilations": (2, 1, 1)},
    ),
    "natten_dinats_t": Model("DiNAT_s-Tiny, trained with drop path 0.2.", SWIN, SWIN_TINY),
    "natten_dinats_s": Model("DiNAT_s-Small, trained with drop path 0.3.", SWIN, SWIN_SMALL),
    "natten_dinats_b": Model("DiNAT_s-Base, trained with drop path 0.5.", SWIN, SWIN_BASE),
    "natten_dinats_l": Model("DiNAT_s-Large, fine-tuned with drop path 0.35, pre-trained with 0.2.", SWIN, SWIN_LARGE),
    "natten_dinats_l_384": Model("DiNAT_s-Large with the dilations of 384x384 images.", SWIN, {**SWIN_LARGE, **AT_384}),
    "natten_nat_iso_s": Model("Isotropic NAT-Small, trained with drop path 0.1.", ISOTROPIC, ISO_SMALL),
    "natten_nat_iso_b": Model("Isotropic NAT-Base, trained with drop path 0.4.", ISOTROPIC, ISO_BASE),
    "natten_dinat_iso_s": Model(
        "Isotropic DiNAT-Small, trained with drop path 0.1.", ISOTROPIC, {**ISO_SMALL, "dilations": 2}
    ),
    "natten_dinat_iso_b": Model(
        "Isotropic DiNAT-Base, trained with drop path 0.4.", ISOTROPIC, {**ISO_BASE, "dilations": 2}
    ),
    "natten_vitrpb_s": Model(
        "ViT-Small with relative position biases and dense attention, trained with drop path 0.1.", Isotropic, ISO_SMALL
    ),
    "natten_vitrpb_b": Model(
        "ViT-Base with relative position biases and dense attention, trained with drop path 0.4.", Isotropic, ISO_BASE
    ),
    "test_natten_dinat": Model("DiNAT for tests.", PYRAMID, {**TEST, "layer_scale": 0.5}),
    "test_natten_dinats": Model("DiNAT_s for tests.", SWIN, TEST),
    "test_natten_dinat_iso": Model("Isotropic DiNAT for tests.", ISOTROPIC, {**TEST_ISO, "window": 3, "dilations": 2}),
    "test_natten_vitrpb": Model("ViT with relative position biases for tests.", Isotropic, TEST_ISO),
}
CONVERSION = Conversion(
    rename=(  # names of `transformers`' Nat and Dinat
        (r"^(nat|dinat)\.", ""),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.norm\.", "patch_embed.norm."),
        (r"^encoder\.levels\.(\d+)\.layers\.", r"levels.\1.blocks."),
        (r"^encoder\.", ""),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.attention\.self\.", ".attn."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"^layernorm\.", "norm."),
        (r"^classifier\.", "head."),
    ),
    drop=(r"\.relative_position_index$",),
    join={"qkv": ("query", "key", "value")},
    split={"layer_scale_parameters": ("gamma1", "gamma2")},
    resize={"rpb": bias_table},
)
register_family(
    __name__,
    MODELS,
    conversion=CONVERSION,
    cfg={"paper_ids": "arXiv:2209.15001"},
    cfgs={
        **{f"natten_nat_{size}.shi_in1k": {"paper_ids": "arXiv:2204.07143"} for size in "mtsb"},
        **{f"natten_{name}.shi_in22k_ft_in1k_384": {"crop_pct": 1.0} for name in ("dinat_l_384", "dinats_l_384")},
        "natten_dinat_l_11x11_384.shi_in22k_ft_in1k_384": {"crop_pct": 1.0},
        "natten_dinat_pico.digits": {**DIGITS_CFG, "origin_url": None},
        **{f"natten_vitrpb_{size}.shi_in1k": {"fixed_input_size": True} for size in "sb"},
        "test_natten_vitrpb.untrained": {"fixed_input_size": True},
    },
    leaves=(NeighborhoodAttention2d,),
)
