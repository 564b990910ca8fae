"""Swin Transformer's layout: 4x4 patches, stages of blocks, patch merging (arXiv:2103.14030)."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from timm.layers import register_notrace_module, to_2tuple
from torch import nn

from ...layers.window import WindowAttention2d
from .base import Host, stage_grids
from .blocks import AttentionFactory, Block, Layout, Place, Stage
from .patches import CompletedPatchEmbed, CompletedPatchMerging

register_notrace_module(WindowAttention2d)  # torch.fx cannot trace its checks of shapes


def patch_stem(
    in_chans: int, dim: int, *, norm_layer: Callable[..., nn.Module], patch_size: int = 4, device=None, dtype=None
) -> nn.Module:
    """Patches: `[B, in_chans, H, W]` to `[B, ceil(H / 4), ceil(W / 4), dim]`, zero-padded right and bottom."""
    return CompletedPatchEmbed(
        img_size=None,
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=dim,
        norm_layer=norm_layer,
        output_fmt="NHWC",
        dynamic_img_pad=True,
        device=device,
        dtype=dtype,
    )


class Swin(Host):
    """Swin's layout around any attention on maps `[B, H, W, dim]`, for images of any size.

    Parameters are named as in the official checkpoints. Without `attn` it is Swin Transformer itself.

    Args:
        attn: makes the attention of a block; see `foveal.zoo.hosts.Place`. The host's own is Swin's: windows, shifted
            in odd blocks, with a bias per offset.
        in_chans, num_classes: channels of the images, outputs of the head (0: no head).
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (none).
        img_size: native input size, for which attentions may learn positions.
        embed_dim: channels of the first stage; every further stage doubles them.
        depths, num_heads: blocks and heads of each stage.
        window: side of the host's windows; a 32nd of the image but 7 at least when None.
        mlp_ratio: hidden over embedding width.
        layer_scale: initial value of the residual scales; none when None.
        stage_norms: normalise each stage's map by `norm0`, `norm1`, ... instead of the last one by `norm`, as the
            official detection and segmentation backbones do.
        drop_rate, proj_drop_rate, drop_path_rate: dropout before the head and in blocks, stochastic depth (its rate
            grows linearly to this value).
        norm_layer, act_layer: layers of the blocks.
        impl: implementation of the attention, "auto", "triton", "torch" or "reference".
        attn_options: further arguments of `attn`; a list or tuple has one entry per stage.
    """

    stages_name: ClassVar[str] = "layers"
    stem_layer: ClassVar[Callable[..., nn.Module]] = staticmethod(patch_stem)
    downsample_layer: ClassVar[Callable[..., nn.Module]] = CompletedPatchMerging

    def __init__(
        self,
        *,
        attn: AttentionFactory | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window: int | None = None,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        stage_norms: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        act_layer: type[nn.Module] = nn.GELU,
        impl: str = "auto",
        device=None,
        dtype=None,
        **attn_options: Any,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        size: tuple[int, int] = to_2tuple(img_size)
        channels = [embed_dim * 2**i for i in range(len(depths))]
        reductions = [4 * 2**i for i in range(len(depths))]

        def make_block(place: Place, **parts) -> Block:
            return Block(
                place.dim,
                mlp_ratio=mlp_ratio,
                layer_scale=layer_scale,
                proj_drop=proj_drop_rate,
                norm_layer=norm_layer,
                act_layer=act_layer,
                **parts,
                **dd,
            )

        layout = Layout(
            attn=attn,
            attn_options=attn_options,
            own=self._own_attention,
            block=make_block,
            channels=channels,
            depths=depths,
            num_heads=num_heads,
            grids=stage_grids(size, reductions),
            windows=[max(7, min(size) // 32) if window is None else window] * len(depths),
            drop_path_rate=drop_path_rate,
            options={"proj_drop": proj_drop_rate, "impl": impl, **dd},
        )
        stages = []
        for i, dim in enumerate(channels):
            last = i == len(channels) - 1
            blocks = layout.blocks(i)
            stages.append(Stage(blocks, None if last else self.downsample_layer(dim, norm_layer=norm_layer, **dd)))
        self.patch_embed = self.stem_layer(in_chans, embed_dim, norm_layer=norm_layer, **dd)
        self.add_module(self.stages_name, nn.Sequential(*stages))
        self._build_head(
            feature_info=[
                {"num_chs": dim, "reduction": reductions[i], "module": f"{self.stages_name}.{i}.blocks"}
                for i, dim in enumerate(channels)
            ],
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm_layer=norm_layer,
            stage_norms=stage_norms,
            dd=dd,
        )
        self.init_weights(needs_reset=False)

    @staticmethod
    def _own_attention(place: Place) -> nn.Module:
        assert place.window is not None
        shift = place.window // 2 if place.shift else 0
        return WindowAttention2d(
            place.dim, num_heads=place.num_heads, window=place.window, shift=shift, **place.options
        )
