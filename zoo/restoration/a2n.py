"""Super-resolution by attention in attention (A2N, arXiv:2104.09497). Parameters are named as in the official files."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .base import Restorer


class _Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.k1, self.k3, self.k4 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(3))
        self.k2 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.k2(F.leaky_relu(self.k1(x), 0.2)).sigmoid()
        return self.k4(self.k3(x) * gate)


class AttentionInAttention(nn.Module):
    """A branch with pixel attention and one without, mixed by weights that the features choose.

    Args:
        width: channels.
        plain_kernel: side of the convolution without attention: 3 as released, 1 as the paper recommends (A2N-M).
        temperature: of the softmax over the two weights.
    """

    def __init__(self, width: int, *, plain_kernel: int = 3, temperature: float = 30.0):
        super().__init__()
        self.temperature = temperature
        self.conv_first, self.conv_last = (nn.Conv2d(width, width, 1, bias=False) for _ in range(2))
        self.ADM = nn.Sequential(
            nn.Linear(width, width // 4, bias=False), nn.ReLU(), nn.Linear(width // 4, 2, bias=False)
        )
        self.attention = _Attention(width)
        self.non_attention = nn.Conv2d(width, width, plain_kernel, padding=plain_kernel // 2, bias=False)

    def weights(self, x: Tensor) -> Tensor:
        """Weights of the branches, `[B, 2]`, from features after the first convolution."""
        return (self.ADM(x.mean((2, 3))) / self.temperature).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.leaky_relu(self.conv_first(x), 0.2)
        w = self.weights(a)[..., None, None]
        mixed = w[:, :1] * self.attention(a) + w[:, 1:] * self.non_attention(a)
        return x + self.conv_last(F.leaky_relu(mixed, 0.2))


class PixelAttention(nn.Module):
    """Scales a map by a gate of each place and channel."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(x).sigmoid()


class A2N(Restorer):
    """Super-resolution of images `[B, in_chans, H, W]` in [0, 1] by 2, 3 or 4.

    Args:
        scale: of the result.
        width, up_width: channels of the trunk and behind the enlargement.
        depth: blocks.
        in_chans: of the images.
        plain_kernel: see `AttentionInAttention`.

    Raises:
        ValueError: another scale.
    """

    def __init__(
        self,
        *,
        scale: int = 2,
        width: int = 40,
        up_width: int = 24,
        depth: int = 16,
        in_chans: int = 3,
        plain_kernel: int = 3,
    ):
        super().__init__(scale=scale)
        self.conv_first = nn.Conv2d(in_chans, width, 3, padding=1)
        self.AAB_trunk = nn.Sequential(*(AttentionInAttention(width, plain_kernel=plain_kernel) for _ in range(depth)))
        self.trunk_conv = nn.Conv2d(width, width, 3, padding=1)
        self.steps = 2 if scale == 4 else 1
        for i in range(1, self.steps + 1):
            setattr(self, f"upconv{i}", nn.Conv2d(width if i == 1 else up_width, up_width, 3, padding=1))
            setattr(self, f"att{i}", PixelAttention(up_width))
            setattr(self, f"HRconv{i}", nn.Conv2d(up_width, up_width, 3, padding=1))
        self.conv_last = nn.Conv2d(up_width, in_chans, 3, padding=1)

    def residual(self, x: Tensor) -> Tensor:
        first = self.conv_first(x)
        x = first + self.trunk_conv(self.AAB_trunk(first))
        for i in range(1, self.steps + 1):
            x = F.interpolate(x, scale_factor=self.scale // self.steps, mode="nearest")
            x = getattr(self, f"upconv{i}")(x)
            x = F.leaky_relu(getattr(self, f"att{i}")(x), 0.2)
            x = F.leaky_relu(getattr(self, f"HRconv{i}")(x), 0.2)
        return self.conv_last(x)
