"""Backbones of the linear, recurrent, low-bit and gated families against Swin-T and ConvNeXt-T, where each loses.

Models near Swin-T in size run in turns with random weights, and InLine-Swin-T, whose linear attention sees the whole
map, beside Swin-T with windows as large (arXiv:2412.06590, figure 3: 3.7 times as fast on a GPU).
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from .models import BATCHES, PEERS, Case, Models, and_compiled

MAPS = (  # take images of any size
    "inline_swin_t", "flatten_swin_t", "flowformer_cv", "ppma_s", "shiftvit_r2_t", "moh_vit_s_80", "partialnet_s",
    "triplet_resnet50",
)  # fmt: skip
TOKENS = ("illama_s", "binary_deit_s", "spach_ms_s_attn", "smlpnet_s")  # dense attention, or weights for one size
OURS = (*MAPS, *TOKENS)
WIDE = "swin_tiny_patch4_window7_224 window 56"
LARGEST_TOKENS = 384  # images that TOKENS are measured with


class FamilyCase(Case):
    kernel = "family"


class Families(Models):
    name = "families"
    title = "Backbones of the linear, recurrent, low-bit and gated families"
    our_names = and_compiled(OURS)
    rivals = tuple(
        (name + suffix, peer + suffix)
        for name in OURS
        for peer in (*PEERS[:2], *((WIDE,) if name == "inline_swin_t" else ()))
        for suffix in ("", " compiled")
    )
    batches: ClassVar[Mapping[str, Mapping[int, int]]] = BATCHES | {"cpu": {224: 2, 384: 2, 512: 1, 1024: 1}}
    case: ClassVar[type[Case]] = FamilyCase
    cpu_sizes: ClassVar[Sequence[int]] = (224, 384, 512, 1024)

    def names(self, case: Case, *, quick: bool) -> Sequence[str]:
        """Windows of 56 are those of 224 pixels: all of the first map."""
        ours = OURS if case.size <= LARGEST_TOKENS else MAPS
        return (*ours, *PEERS[:2], *((WIDE,) if case.size == 224 else ()))
