"""timm's patches, zero-padded right and bottom so that graphs of any size have simple lengths."""

from timm.layers import PatchEmbed, register_notrace_module
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from ...layers.completion import complete_multiples


@register_notrace_module  # torch.fx cannot trace questions about lengths
class CompletedPatchEmbed(PatchEmbed):
    """Patches of images that they need not divide."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(complete_multiples(x, self.patch_size, first=2))


@register_notrace_module
class CompletedPatchMerging(PatchMerging):
    """`[B, H, W, dim]` to `[B, ceil(H / 2), ceil(W / 2), out_dim]`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(complete_multiples(x, (2, 2)))


@register_notrace_module
class CompletedPatchConv2d(nn.Conv2d):
    """Convolution of whole patches of `[B, C, H, W]`, which its stride need not divide: one for each begun patch."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(complete_multiples(input, self.stride, first=2))
