"""The layout of NAT: Swin's, with overlapping convolutions on the way down (arXiv:2204.07143)."""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

from timm.layers import register_notrace_module
from torch import Tensor, nn

from ...layers.neighborhood import NeighborhoodAttention2d
from .blocks import Place
from .swin import Swin

register_notrace_module(NeighborhoodAttention2d)  # torch.fx cannot trace its checks of shapes


class ConvStem(nn.Module):
    """Two 3x3 convolutions of stride 2: `[B, in_chans, H, W]` to `[B, ceil(H / 4), ceil(W / 4), dim]`."""

    def __init__(self, in_chans: int, dim: int, *, norm_layer: type[nn.Module], device=None, dtype=None):
        super().__init__()
        conv = partial(nn.Conv2d, kernel_size=3, stride=2, padding=1, device=device, dtype=dtype)
        self.proj = nn.Sequential(conv(in_chans, dim // 2), conv(dim // 2, dim))
        self.norm = norm_layer(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvDownsample(nn.Module):
    """3x3 convolution of stride 2: `[B, H, W, dim]` to `[B, ceil(H / 2), ceil(W / 2), 2 * dim]`."""

    def __init__(self, dim: int, *, norm_layer: type[nn.Module], device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.reduction = nn.Conv2d(dim, 2 * dim, kernel_size=3, stride=2, padding=1, bias=False, **dd)
        self.norm = norm_layer(2 * dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class NAT(Swin):
    """NAT's layout around any attention on maps `[B, H, W, dim]`, for images of any size; arguments as in `Swin`.

    The host's own attention is that of neighborhoods of `window` x `window` tokens, with a bias per offset.
    """

    stages_name: ClassVar[str] = "levels"
    first_conv: ClassVar[str] = "patch_embed.proj.0"
    stem_layer: ClassVar[Callable[..., nn.Module]] = ConvStem
    downsample_layer: ClassVar[Callable[..., nn.Module]] = ConvDownsample

    @staticmethod
    def _own_attention(place: Place) -> nn.Module:
        return neighborhood(place)


def neighborhood(place: Place, *, dilation: int = 1, qk_norm: Callable[..., nn.Module] | None = None) -> nn.Module:
    """Neighborhood attention of the place's window, with biases; small maps are padded, as upstream does."""
    return NeighborhoodAttention2d(
        place.dim,
        num_heads=place.num_heads,
        window=place.window,
        dilation=dilation,
        rpb=True,
        qk_norm=qk_norm,
        pad=True,
        **place.options,
    )
