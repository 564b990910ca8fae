"""Isotropic NAT, DiNAT and ViT-rpb: one resolution throughout, like ViT (arXiv:2209.15001).

The three differ in the attention of their blocks only: neighborhoods, neighborhoods dilated in every other block, and
dense attention with the same kind of relative position bias, whose table fixes the input size.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from timm.layers import PatchEmbed, calculate_drop_path_rates, register_notrace_module, to_2tuple
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from ..layers.neighborhood import NeighborhoodAttention2d
from ..layers.relative import RelativeAttention2d
from .backbone import Backbone
from .builder import build_backbone, imagenet_cfg
from .dinat import Block, block_dilations
from .dinat_checkpoint import checkpoint_filter_fn
from .patches import CompletedPatchEmbed

register_notrace_module(RelativeAttention2d)  # torch.fx cannot trace its check of the grid


class NATIsotropic(Backbone):
    """Isotropic NAT, DiNAT and ViT-rpb.

    Args:
        in_chans, num_classes: channels of the images, outputs of the head (0: no head).
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (none).
        attention: "neighborhood" takes images of any size; "dense" those of `img_size` only.
        patch_size: side of the patches; images are zero-padded right and bottom to a multiple of it ("neighborhood").
        embed_dim, depth, num_heads: channels, blocks, heads.
        window: side of the neighborhood, odd; "neighborhood" only.
        dilations: dilation of the odd-numbered blocks (the others have 1), or one number per block.
        img_size: input size, from which the bias tables of "dense" follow; `set_input_size` changes it.
        mlp_ratio, drop_rate, proj_drop_rate, drop_path_rate, norm_layer, act_layer, impl: as in `DiNAT`.
    """

    stages_name: ClassVar[str] = "layers"

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        attention: Literal["neighborhood", "dense"] = "neighborhood",
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        window: int = 7,
        dilations: int | Sequence[int] = 1,
        img_size: int | tuple[int, int] | None = 224,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        act_layer: type[nn.Module] = nn.GELU,
        impl: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        if attention not in ("neighborhood", "dense"):
            raise ValueError(f"attention={attention!r} must be 'neighborhood' or 'dense'")
        dd = {"device": device, "dtype": dtype}
        self.attention, self.grad_checkpointing = attention, False
        dense = attention == "dense"
        self.patch_embed = (PatchEmbed if dense else CompletedPatchEmbed)(
            img_size=img_size if dense else None,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            norm_layer=norm_layer,
            output_fmt="NHWC",
            strict_img_size=dense,
            dynamic_img_pad=not dense,
            **dd,
        )

        def make_attn(dilation: int) -> nn.Module:
            shared = {"num_heads": num_heads, "proj_drop": proj_drop_rate, **dd}
            if dense:
                return RelativeAttention2d(embed_dim, grid_size=self.patch_embed.grid_size, **shared)
            options = {"window": window, "dilation": dilation, "rpb": True, "pad": True, "impl": impl}
            return NeighborhoodAttention2d(embed_dim, **options, **shared)

        drop_paths = calculate_drop_path_rates(drop_path_rate, depth)
        self.layers = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    attn=make_attn(dilation),
                    mlp_ratio=mlp_ratio,
                    layer_scale=None,
                    proj_drop=proj_drop_rate,
                    drop_path=drop_path,
                    norm_layer=norm_layer,
                    act_layer=act_layer,
                    **dd,
                )
                for dilation, drop_path in zip(block_dilations(dilations, depth), drop_paths, strict=True)
            )
        )
        self._build_head(
            feature_info=[
                {"num_chs": embed_dim, "reduction": patch_size, "module": f"layers.{i}"} for i in range(depth)
            ],
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm_layer=norm_layer,
            stage_norms=False,
            dd=dd,
        )
        self.init_weights(needs_reset=False)

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(stage, x) if self.grad_checkpointing else stage(x)

    def _down(self, index: int, x: Tensor) -> Tensor:
        return x

    def _shorten(self, last: int) -> None:
        self.layers = self.layers[: last + 1]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions that order parameters by depth (layer decay, freezing)."""
        return {"stem": r"^patch_embed", "blocks": [(r"^layers\.(\d+)", None), (r"^norm", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Take images of another size: bias tables of dense attention are interpolated; neighborhoods stay.

        Raises:
            ValueError: img_size is no multiple of the patch size and the attention is dense.
        """
        size = to_2tuple(img_size)
        if self.attention == "dense":
            if any(side % self.patch_embed.patch_size[0] for side in size):
                raise ValueError(f"img_size={size} must be a multiple of the patch size {self.patch_embed.patch_size}")
            self.patch_embed.set_input_size(img_size=size)
            for block in self.layers:
                block.attn.set_grid_size(self.patch_embed.grid_size)
        update_model_input_size(self, size)


def _cfg(name: str, **overrides) -> dict:
    defaults = {
        "first_conv": "patch_embed.proj",
        "pool_size": (14, 14),
        "license": "mit",
        "paper_ids": "arXiv:2209.15001",
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
    }
    return imagenet_cfg(name, **(defaults | overrides))


CHECKPOINTS: dict[str, dict] = {
    "natten_nat_iso_s.shi_in1k": {},
    "natten_nat_iso_b.shi_in1k": {},
    "natten_dinat_iso_s.shi_in1k": {},
    "natten_dinat_iso_b.shi_in1k": {},
    "natten_vitrpb_s.shi_in1k": {"fixed_input_size": True},
    "natten_vitrpb_b.shi_in1k": {"fixed_input_size": True},
}
default_cfgs = generate_default_cfgs({name: _cfg(name, **overrides) for name, overrides in CHECKPOINTS.items()})


def _create_isotropic(variant: str, pretrained: bool, **kwargs) -> NATIsotropic:
    return build_backbone(NATIsotropic, variant, pretrained, filter_fn=checkpoint_filter_fn, **kwargs)


SMALL = {"embed_dim": 384, "num_heads": 12}
BASE = {"embed_dim": 768, "num_heads": 24}


@register_model
def natten_nat_iso_s(pretrained: bool = False, **kwargs) -> NATIsotropic:
    """Isotropic NAT-Small, trained with drop path 0.1."""
    model_args = SMALL
    return _create_isotropic("natten_nat_iso_s", pretrained, **(model_args | kwargs))


@register_model
def natten_nat_iso_b(pretrained: bool = False, **kwargs) -> NATIsotropic:
    """Isotropic NAT-Base, trained with drop path 0.4."""
    model_args = BASE
    return _create_isotropic("natten_nat_iso_b", pretrained, **(model_args | kwargs))


@register_model
def natten_dinat_iso_s(pretrained: bool = False, **kwargs) -> NATIsotropic:
    """Isotropic DiNAT-Small, trained with drop path 0.1."""
    model_args = {**SMALL, "dilations": 2}
    return _create_isotropic("natten_dinat_iso_s", pretrained, **(model_args | kwargs))


@register_model
def natten_dinat_iso_b(pretrained: bool = False, **kwargs) -> NATIsotropic:
    """Isotropic DiNAT-Base, trained with drop path 0.4."""
    model_args = {**BASE, "dilations": 2}
    return _create_isotropic("natten_dinat_iso_b", pretrained, **(model_args | kwargs))


@register_model
def natten_vitrpb_s(pretrained: bool = False, **kwargs) -> NATIsotropic:
    """ViT-Small with relative position biases and dense attention, trained with drop path 0.1."""
    model_args = {**SMALL, "attention": "dense"}
    return _create_isotropic("natten_vitrpb_s", pretrained, **(model_args | kwargs))


@register_model
def natten_vitrpb_b(pretrained: bool = False, **kwargs) -> NATIsotropic:
    """ViT-Base with relative position biases and dense attention, trained with drop path 0.4."""
    model_args = {**BASE, "attention": "dense"}
    return _create_isotropic("natten_vitrpb_b", pretrained, **(model_args | kwargs))
