"""NiNformer: ViT whose attention gives way to a gate, made by a network inside the block (arXiv:2403.02411).

The inner network is an MLP-Mixer block, learnt for one input size, which `img_size` chooses. No weights are published;
sizes are ours.
"""

from typing import Any, ClassVar

from timm.layers import DropPath, Mlp, calculate_drop_path_rates, to_2tuple
from timm.models.mlp_mixer import MixerBlock
from torch import Tensor, nn

from ...layers.mixing import check_grid
from ..builder import DIGITS_CFG, Model, register_family
from ..hosts.base import Backbone, stage_grids
from ..hosts.swin import patch_stem


class InnerGate(nn.Module):
    """A linear layer of `[B, H, W, dim]`, scaled value by value by what an MLP-Mixer block makes of the same map.

    Args:
        dim: channels.
        grid_size: H and W, for which the inner network is learnt.
        drop: dropout in the inner network.
    """

    def __init__(self, dim: int, *, grid_size: tuple[int, int], drop: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.grid_size = dim, (grid_size[0], grid_size[1])
        self.proj = nn.Linear(dim, dim, **dd)
        self.mixer = MixerBlock(dim, grid_size[0] * grid_size[1], drop=drop, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` to `[B, H, W, dim]`; raises ValueError for another grid."""
        check_grid(x, self.dim, self.grid_size)
        return self.proj(x) * self.mixer(x.flatten(1, 2)).view(x.shape)


class Block(nn.Module):
    """Inner gate and feed-forward layer, both residual and behind the same norm; `[B, H, W, dim]`."""

    def __init__(
        self,
        dim: int,
        *,
        grid_size: tuple[int, int],
        mlp_ratio: float,
        proj_drop: float,
        drop_path: float,
        act_layer: type[nn.Module],
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, **dd)
        self.gate = InnerGate(dim, grid_size=grid_size, drop=proj_drop, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.gate(self.norm(x)))
        return x + self.drop_path(self.mlp(self.norm(x)))


class NiNformer(Backbone):
    """NiNformer for images of one size. Its blocks count as four stages, for features.

    Args:
        in_chans, num_classes: channels of the images, outputs of the head (0: no head).
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (none).
        img_size: the input size.
        patch_size, embed_dim, depth, mlp_ratio: side of the patches, channels, blocks, hidden over embedding width.
        drop_rate, proj_drop_rate, drop_path_rate: dropout before the head and in blocks, stochastic depth (its rate
            grows linearly to this value).
        act_layer: activation of feed-forward layers.
    """

    stages_name: ClassVar[str] = "layers"

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 256,
        depth: int = 8,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        (grid,) = stage_grids(to_2tuple(img_size), [patch_size])
        options = {"grid_size": grid, "mlp_ratio": mlp_ratio, "proj_drop": proj_drop_rate, "act_layer": act_layer}
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        blocks = [Block(embed_dim, drop_path=rate, **options, **dd) for rate in rates]
        self.patch_embed = patch_stem(in_chans, embed_dim, norm_layer=nn.LayerNorm, patch_size=patch_size, **dd)
        self._build_stages(
            [blocks[depth * i // 4 : depth * (i + 1) // 4] for i in range(4)],
            ways_down=[None] * 3,
            channels=[embed_dim] * 4,
            reductions=[patch_size] * 4,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm_layer=nn.LayerNorm,
            stage_norms=False,
            dd=dd,
        )


MODELS = {
    "ninformer_s": Model("NiNformer of eight blocks.", NiNformer, {}),
    "ninformer_pico": Model(
        "Four blocks on 4x4 patches for 32x32 single-channel images (handwritten digits).",
        NiNformer,
        {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "mlp_ratio": 2.0},
    ),
    "test_ninformer": Model("NiNformer for tests.", NiNformer, {"img_size": 64, "embed_dim": 16, "depth": 4}),
}
register_family(
    __name__,
    MODELS,
    cfg={"fixed_input_size": True, "paper_ids": "arXiv:2403.02411"},
    cfgs={"ninformer_pico.untrained": {**DIGITS_CFG, "pool_size": (8, 8)}},
    leaves=(InnerGate,),
)
