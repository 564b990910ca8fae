"""DiNAT_s: dilated neighborhood attention in the layout of Swin Transformer (arXiv:2209.15001).

Patches of 4x4 and patch merging instead of overlapping convolutions; otherwise the blocks of DiNAT.
"""

from collections.abc import Callable
from typing import ClassVar

from timm.layers import PatchEmbed
from timm.models import generate_default_cfgs, register_model
from torch import nn

from .builder import build_backbone, imagenet_cfg
from .dinat import AT_384, DiNAT
from .dinat_checkpoint import checkpoint_filter_fn
from .patches import CompletedPatchEmbed, CompletedPatchMerging


def patch_stem(in_chans: int, dim: int, *, norm_layer: type[nn.Module], device=None, dtype=None) -> PatchEmbed:
    """4x4 patches: `[B, in_chans, H, W]` to `[B, ceil(H / 4), ceil(W / 4), dim]`, zero-padded right and bottom."""
    return CompletedPatchEmbed(
        img_size=None,
        patch_size=4,
        in_chans=in_chans,
        embed_dim=dim,
        norm_layer=norm_layer,
        output_fmt="NHWC",
        dynamic_img_pad=True,
        device=device,
        dtype=dtype,
    )


class DiNATs(DiNAT):
    """DiNAT with Swin's stem and patch merging, for images of any size; arguments as in `DiNAT`."""

    stages_name: ClassVar[str] = "layers"
    stem_layer: ClassVar[Callable[..., nn.Module]] = staticmethod(patch_stem)
    downsample_layer: ClassVar[Callable[..., nn.Module]] = CompletedPatchMerging


def _cfg(name: str, **overrides) -> dict:
    defaults = {
        "first_conv": "patch_embed.proj",
        "license": "mit",
        "paper_ids": "arXiv:2209.15001",
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
    }
    return imagenet_cfg(name, **(defaults | overrides))


CHECKPOINTS: dict[str, dict] = {
    "natten_dinats_t.shi_in1k": {},
    "natten_dinats_s.shi_in1k": {},
    "natten_dinats_b.shi_in1k": {},
    "natten_dinats_l.shi_in22k_ft_in1k": {},
    "natten_dinats_l.shi_in22k": {"num_classes": 21841},
    "natten_dinats_l_384.shi_in22k_ft_in1k_384": AT_384,
}
default_cfgs = generate_default_cfgs({name: _cfg(name, **overrides) for name, overrides in CHECKPOINTS.items()})


def _create_dinats(variant: str, pretrained: bool, **kwargs) -> DiNATs:
    return build_backbone(DiNATs, variant, pretrained, filter_fn=checkpoint_filter_fn, **({"mlp_ratio": 4.0} | kwargs))


@register_model
def natten_dinats_t(pretrained: bool = False, **kwargs) -> DiNATs:
    """DiNAT_s-Tiny, trained with drop path 0.2."""
    model_args = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "dilations": (8, 4, 2, 1)}
    return _create_dinats("natten_dinats_t", pretrained, **(model_args | kwargs))


@register_model
def natten_dinats_s(pretrained: bool = False, **kwargs) -> DiNATs:
    """DiNAT_s-Small, trained with drop path 0.3."""
    model_args = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24), "dilations": (8, 4, 2, 1)}
    return _create_dinats("natten_dinats_s", pretrained, **(model_args | kwargs))


@register_model
def natten_dinats_b(pretrained: bool = False, **kwargs) -> DiNATs:
    """DiNAT_s-Base, trained with drop path 0.5."""
    model_args = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "dilations": (8, 4, 2, 1)}
    return _create_dinats("natten_dinats_b", pretrained, **(model_args | kwargs))


@register_model
def natten_dinats_l(pretrained: bool = False, **kwargs) -> DiNATs:
    """DiNAT_s-Large, fine-tuned with drop path 0.35, pre-trained with 0.2."""
    model_args = {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48), "dilations": (8, 4, 2, 1)}
    return _create_dinats("natten_dinats_l", pretrained, **(model_args | kwargs))


@register_model
def natten_dinats_l_384(pretrained: bool = False, **kwargs) -> DiNATs:
    """DiNAT_s-Large with the dilations of 384x384 images."""
    model_args = {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48), "dilations": (13, 6, 3, 1)}
    return _create_dinats("natten_dinats_l_384", pretrained, **(model_args | kwargs))
