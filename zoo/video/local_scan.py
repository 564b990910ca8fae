"""Layers of LaMamba-Diff in VideoDiT: scans of whole frames before attention in shifted windows (arXiv:2408.02615)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...kernels.ops import window_attention
from ...layers.state_space import Scan2d

OPTIONS = ("expand", "conv", "state_dim", "orders")  # of `foveal.layers.Scan2d`


def check_local_scan(layer: object, window: Any, shift: Any, options: Any) -> None:
    """Raise ValueError unless the fields of a layer fit together."""
    if type(window) is not int or window < 1:
        raise ValueError(f"attention={layer!r}: window={window!r} must be an integer from 1 on")
    if type(shift) is not int or not 0 <= shift < window:
        raise ValueError(f"attention={layer!r}: shift={shift!r} must be an integer from 0 to window - 1")
    if not isinstance(options, Mapping) or set(options) - set(OPTIONS):
        raise ValueError(f"attention={layer!r}: options={options!r} must be a mapping of some of {OPTIONS}")


def attend_windows(query: Tensor, key: Tensor, value: Tensor, window: int, shift: int) -> Tensor:
    """Attention inside the windows of each frame, `[B, T, H, W, heads, d]`; a shorter axis is seen whole."""
    lengths = query.shape[2:4]
    sizes = tuple(min(window, n) for n in lengths)
    shifts = tuple(shift if window < n else 0 for n in lengths)
    frames = (x.flatten(0, 1) for x in (query, key, value))
    return window_attention(*frames, window=sizes, shift=shifts).unflatten(0, query.shape[:2])


class FrameScan(Scan2d):
    """Scans of each frame by itself, `[B, T * H * W, dim]` in raster order to the same."""

    def forward(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        frames = x.unflatten(1, grid).flatten(0, 1)
        return super().forward(frames).unflatten(0, (x.shape[0], grid[0])).flatten(1, 3)


def frame_scan(dim: int, heads: int, options: Mapping[str, Any]) -> nn.Module:
    """The scans of a layer, of twice as many channels as `dim` unless the options say otherwise."""
    return FrameScan(dim, num_heads=heads, **options)
