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


class PatchConv(nn.Module):
    """Convolution of whole patches into `[B, H / side, W / side, dim]`, rounded up.

    Args:
        in_chans, dim: channels before and after.
        side: of a patch, in pixels.
        bias: whether the convolution has one.
        nhwc: whether the input is a map `[B, H, W, in_chans]` and not an image `[B, in_chans, H, W]`.
    """

    def __init__(
        self, in_chans: int, dim: int, side: int, *, bias: bool = True, nhwc: bool = False, device=None, dtype=None
    ):
        super().__init__()
        self.nhwc = nhwc
        self.proj = CompletedPatchConv2d(in_chans, dim, side, stride=side, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.permute(0, 3, 1, 2) if self.nhwc else x).permute(0, 2, 3, 1)
