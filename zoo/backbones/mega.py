"""Mega for images: gated single-head attention behind a moving average of the patches (arXiv:2209.10655).

Positions and biases are learnt for one number of patches, which `img_size` chooses. With `weights="scan"` and `short=5`
blocks are those of CHELA (arXiv:2406.08128), of which no code is public.
"""

import re
from collections import OrderedDict
from typing import Any, ClassVar

import torch
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, to_2tuple
from torch import Tensor, nn

from ...layers.moving_average import MovingAverageGatedAttention
from ..builder import DIGITS_CFG, Model, register_family
from ..conversion import Conversion
from ..hosts.base import WideHeadBackbone, stage_grids
from ..hosts.swin import patch_stem


class Block(nn.Module):
    """Gated attention and a residual feed-forward layer on `[B, H, W, dim]`."""

    def __init__(
        self, dim: int, *, hidden: int, key_dim: int, proj_drop: float, drop_path: float, options: dict,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes = {"key_dim": key_dim, "value_dim": hidden, "drop": proj_drop}
        self.mega_layer = MovingAverageGatedAttention(dim, **sizes, **options, **dd)
        self.norm = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, hidden, act_layer=nn.SiLU, drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)
        tokens = tokens + self.drop_path(self.mega_layer(tokens) - tokens)
        return (tokens + self.drop_path(self.mlp(self.norm(tokens)))).view(x.shape)


class Mega(WideHeadBackbone):
    """Mega for images of one size. Its blocks count as four stages, for features.

    Args:
        in_chans, num_classes: channels of the images, outputs of the head (0: no head).
        global_pool: "avg", "max", "avgmax" or "" (none).
        img_size: the input size.
        patch_size, embed_dim, depth: side of the patches, channels, blocks.
        hidden_dim: channels of values and of feed-forward layers.
        key_dim: channels of queries and keys.
        drop_rate, proj_drop_rate, drop_path_rate: dropout before the head and in blocks, stochastic depth (its rate
            grows linearly to this value).
        options: further arguments of `foveal.layers.MovingAverageGatedAttention`.
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
        embed_dim: int = 192,
        depth: int = 12,
        hidden_dim: int = 384,
        key_dim: int = 64,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
        **options: Any,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        (self._grid,) = stage_grids(to_2tuple(img_size), [patch_size])
        options |= {"tokens": self._grid[0] * self._grid[1]}
        shared = {"hidden": hidden_dim, "key_dim": key_dim, "proj_drop": proj_drop_rate, "options": options}
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        blocks = [Block(embed_dim, drop_path=rate, **shared, **dd) for rate in rates]
        self.feature_dim, self.pre_head = embed_dim, nn.Identity()
        self.patch_embed = patch_stem(in_chans, embed_dim, norm_layer=None, patch_size=patch_size, **dd)  # pyright: ignore[reportArgumentType]
        self.pos_embed = nn.Parameter(torch.empty(1, options["tokens"], embed_dim, **dd))
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
        self.reset_classifier(num_classes, global_pool)
        self.init_weights(needs_reset=False)

    def _make_pre_head(self, device: torch.device | None, dtype: torch.dtype | None) -> nn.Module:
        width = nn.Linear(self.num_features, self.feature_dim, device=device, dtype=dtype)
        return nn.Sequential(OrderedDict(fc=width, act=nn.SiLU()))

    def _enter(self, index: int, x: Tensor) -> Tensor:
        if index:
            return x
        x = self.patch_embed(x)
        return x + self.pos_embed.unflatten(1, self._grid)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """As in `Backbone`, and positions from a truncated normal (std dim ** -0.5)."""
        super().init_weights(needs_reset)
        nn.init.trunc_normal_(self.pos_embed, std=self.feature_dim**-0.5)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions that order parameters by depth (layer decay, freezing)."""
        return {**super().group_matcher(coarse), "stem": r"^pos_embed|^patch_embed"}


def official_names(model: nn.Module) -> list:
    """Renames of the official files, which number all blocks and wrap their norms."""
    stages: Any = model.layers
    places = [f"layers.{i}.blocks.{j}." for i, stage in enumerate(stages) for j in range(len(stage.blocks))]

    def place(match: re.Match[str]) -> str:
        number = int(match[1])
        return places[number] if number < len(places) else match[0]

    return [
        (r"^blocks\.(\d+)\.", place),
        (r"\.nffn\.norm\.norm\.", ".norm."),
        (r"\.nffn\.", ".mlp."),
        (r"\.norm\.norm\.", ".norm."),
        (r"\.rel_pos_bias\.rel_pos_bias$", ".rel_pos_bias"),
        (r"^final_norm\.norm\.", "norm."),
        (r"^out_proj\.", "pre_head."),
        (r"^patch_embed\.pemb\.", "patch_embed."),
    ]


PICO = {"patch_size": 4, "embed_dim": 48, "depth": 4, "hidden_dim": 96, "key_dim": 24, "averages": 4}
MODELS = {
    "mega_t_patch16_224": Model("Mega-Tiny; code only, no weights are published.", Mega, {}),
    "mega_b_patch16_224": Model(
        "Mega-Base; its weights come in an archive to be unpacked by hand.",
        Mega,
        {"embed_dim": 768, "hidden_dim": 1536, "key_dim": 256},
    ),
    "mega_pico": Model(
        "Four blocks on 4x4 patches for 32x32 single-channel images (handwritten digits).",
        Mega,
        {**PICO, "img_size": 32},
    ),
    "test_mega": Model("Mega for tests.", Mega, {**PICO, "patch_size": 16, "img_size": 64, "embed_dim": 16}),
    "test_mega_chela": Model(
        "CHELA for tests.",
        Mega,
        {**PICO, "patch_size": 16, "img_size": 64, "embed_dim": 16, "weights": "scan", "short": 5},
    ),
}
CONVERSION = Conversion(rename=official_names)
register_family(
    __name__,
    MODELS,
    conversion=CONVERSION,
    cfg={"fixed_input_size": True, "crop_pct": 0.9, "paper_ids": "arXiv:2209.10655"},
    cfgs={"mega_pico.untrained": {**DIGITS_CFG, "pool_size": (8, 8)}},
    leaves=(MovingAverageGatedAttention,),
)
