"""Gates of maps `[B, C, H, W]`: modules that keep the shape, for the end of a block or a stage of any network."""

from __future__ import annotations

from math import gcd
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .triplet import TripletAttention2d


class ELA(nn.Module):
    """Scales rows and columns by gates of their means (efficient local attention, arXiv:2403.01123, section 3.3).

    A gate is a convolution along the axis, a group norm and a sigmoid. With one convolution for both axes, which the
    paper's text says, transposing the map transposes the result.

    Args:
        channels: of the map.
        kernel: size of the convolutions, odd. The paper's variants: T 5, B 7, S 5, L 7.
        groups: of the convolutions: "depthwise" (T, B) or "c8", channels / 8 (S, L).
        gn: groups of the norm (T 32, others 16), lowered to a divisor of channels.
        shared: one convolution and norm for both axes.

    Raises:
        ValueError: an even kernel, or groups that do not fit.
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel: int = 7,
        groups: Literal["depthwise", "c8"] = "depthwise",
        gn: int = 16,
        shared: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel={kernel} must be odd: gates keep the length of their axis")
        if groups not in ("depthwise", "c8") or (groups == "c8" and channels % 8):
            raise ValueError(f"groups={groups!r} must be 'depthwise', or 'c8' with channels={channels} a multiple of 8")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        count = channels if groups == "depthwise" else channels // 8

        def gate() -> nn.Sequential:
            conv = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=count, bias=False, **dd)
            return nn.Sequential(conv, nn.GroupNorm(gcd(gn, channels), channels, **dd), nn.Sigmoid())

        self.gate = gate()
        self.gate_w = None if shared else gate()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same shape."""
        of_rows = self.gate(x.mean(3))
        of_columns = (self.gate if self.gate_w is None else self.gate_w)(x.mean(2))
        return x * of_rows[..., None] * of_columns[:, :, None]


class Subspace(nn.Module):
    """One attention map for some channels: x + x * softmax over all places."""

    def __init__(self, channels: int, *, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv_dws = nn.Conv2d(channels, channels, 1, groups=channels, **dd)
        self.bn_dws = nn.BatchNorm2d(channels, momentum=0.9, **dd)
        self.maxpool = nn.MaxPool2d(3, stride=1, padding=1)
        self.conv_point = nn.Conv2d(channels, 1, 1, **dd)
        self.bn_point = nn.BatchNorm2d(1, momentum=0.9, **dd)

    def forward(self, x: Tensor) -> Tensor:
        found = self.maxpool(self.bn_dws(self.conv_dws(x)).relu())
        found = self.bn_point(self.conv_point(found)).relu()
        return x + x * found.flatten(2).softmax(-1).view_as(found)


class ULSAM(nn.Module):
    """One attention map per group of channels (ultra-lightweight subspace attention, arXiv:2006.15102, section 3).

    A map's weights sum to one over all places, so its effect is small on large maps.

    Args:
        channels: of the map.
        groups: maps, a divisor of channels.

    Raises:
        ValueError: groups that do not divide channels.
    """

    def __init__(self, channels: int, *, groups: int = 4, device=None, dtype=None):
        super().__init__()
        if groups < 1 or channels % groups:
            raise ValueError(f"groups={groups} must divide channels={channels}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.subspaces = nn.ModuleList(Subspace(channels // groups, **dd) for _ in range(groups))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same shape."""
        parts = x.chunk(len(self.subspaces), dim=1)
        return torch.cat([f(part) for f, part in zip(self.subspaces, parts, strict=True)], dim=1)


class TripletGate(TripletAttention2d):
    """Triplet attention of `[B, C, H, W]`; see `TripletAttention2d`.

    Args:
        channels: of the map; no parameter depends on it.
        options: as of `TripletAttention2d`.
    """

    def __init__(self, channels: int, **options: Any):
        super().__init__(**options)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PartialChannelGate(nn.Module):
    """A 3x3 convolution of some channels, a gate by mean and deviation of the others (PAT_ch, arXiv:2503.03148).

    Args:
        channels: of the map, a multiple of `parts`.
        parts: one of so many parts of the channels is convolved.

    Raises:
        ValueError: parts that do not divide channels.
    """

    def __init__(self, channels: int, *, parts: int = 4, device=None, dtype=None):
        super().__init__()
        if parts < 2 or channels % parts:
            raise ValueError(f"parts={parts} must be above 1 and divide channels={channels}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.split = channels // parts, channels - channels // parts
        self.conv = nn.Conv2d(self.split[0], self.split[0], 3, padding=1, bias=False, **dd)
        self.mix = nn.Conv1d(self.split[1], self.split[1], 2, groups=self.split[1], bias=False, **dd)
        self.mix_bn = nn.BatchNorm1d(self.split[1], **dd)
        self.bn = nn.BatchNorm2d(self.split[1], **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same shape."""
        first, rest = x.split(self.split, dim=1)
        flat = rest.flatten(2)
        # unbiased, as published; a map of one place has no deviation
        deviation = flat.std(-1) if flat.shape[-1] > 1 else torch.zeros_like(flat[..., 0])
        spread = torch.stack([flat.mean(-1), deviation], dim=-1)
        gate = nn.functional.hardsigmoid(self.mix_bn(self.mix(spread)))
        return torch.cat([self.conv(first), self.bn(rest * gate[..., None])], dim=1)


class PartialSpatialGate(nn.Module):
    """A gate of places from some channels, a pointwise convolution of the others (PAT_sp, arXiv:2503.03148).

    Args:
        channels: of the map, a multiple of `parts`.
        parts: one of so many parts of the channels makes the gate and is scaled by it.

    Raises:
        ValueError: parts that do not divide channels.
    """

    def __init__(self, channels: int, *, parts: int = 4, device=None, dtype=None):
        super().__init__()
        if parts < 2 or channels % parts:
            raise ValueError(f"parts={parts} must be above 1 and divide channels={channels}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.split = channels // parts, channels - channels // parts
        self.gate = nn.Conv2d(self.split[0], 1, 1, **dd)
        self.gate_bn, self.bn = (nn.BatchNorm2d(n, **dd) for n in self.split)
        self.conv = nn.Conv2d(self.split[1], self.split[1], 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same shape."""
        first, rest = x.split(self.split, dim=1)
        first = self.gate_bn(first * nn.functional.hardsigmoid(self.gate(first)))
        return torch.cat([first, self.conv(self.bn(rest))], dim=1)


class ClassSemanticsGate(nn.Module):
    """Scales channels and times of features by gates that come from other features alone (arXiv:2109.02613).

    The others carry the semantics of classes, such as what a recognition encoder finds before localization. Sizes of
    layers are not public; ours start as the identity.

    Args:
        channels: of the scaled features.
        semantics: channels of the others.
        bins: times to which the others are averaged for the gate of channels.
    """

    def __init__(self, channels: int, semantics: int, *, bins: int = 4, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden, narrow = max(channels // 16, 8), max(semantics // 4, 1)
        self.by_channel = nn.Sequential(
            nn.AdaptiveAvgPool1d(bins),
            nn.Flatten(),
            nn.Linear(bins * semantics, hidden, **dd),
            nn.ReLU(),
            nn.Linear(hidden, channels, **dd),
            nn.Sigmoid(),
        )
        self.by_time = nn.Sequential(
            nn.Conv1d(semantics, narrow, 3, padding=1, **dd),
            nn.ReLU(),
            nn.Conv1d(narrow, 1, 3, padding=1, **dd),
            nn.Sigmoid(),
        )
        for layer in (self.by_channel[4], self.by_time[2]):  # both gates start at one half, their sum at one
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, semantics: Tensor) -> Tensor:
        """Features `[B, C, T]` by semantics `[B, C_R, T]` to `[B, C, T]`."""
        return x * (self.by_channel(semantics)[..., None] + self.by_time(semantics))


GATES: dict[str, Any] = {
    "ela": ELA,
    "ulsam": ULSAM,
    "triplet": TripletGate,
    "pat_ch": PartialChannelGate,
    "pat_sp": PartialSpatialGate,
}
