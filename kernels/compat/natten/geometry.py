"""NATTEN's arguments of a neighborhood as axes, with errors in its words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...common.calling import PerAxis, per_axis
from ...neighborhood.geometry import Axis


def check_tensor(name: str, x: Any) -> None:
    """Refuse what is no dense tensor.

    Raises:
        TypeError, NotImplementedError: something else, or a nested tensor.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.is_nested:
        raise NotImplementedError(f"{name} is nested; foveal.kernels.ops.ragged_attention takes nested tensors")


def check_axes(
    shape: Sequence[int],
    kernel_size: PerAxis[int],
    stride: PerAxis[int] | None,
    dilation: PerAxis[int] | None,
    is_causal: PerAxis[bool] | None,
) -> tuple[Axis, ...]:
    """The axes of a grid from NATTEN's arguments; None stands for a stride or dilation of 1 and for not causal.

    Raises:
        ValueError, TypeError: a value outside its range, named as NATTEN names it.
    """
    rank = len(shape)
    axes = tuple(
        Axis(*values)
        for values in zip(
            shape,
            per_axis("kernel_size", kernel_size, rank, int),
            per_axis("stride", 1 if stride is None else stride, rank, int),
            per_axis("dilation", 1 if dilation is None else dilation, rank, int),
            per_axis("is_causal", False if is_causal is None else is_causal, rank, bool),
            strict=True,
        )
    )
    for i, axis in enumerate(axes):
        if axis.window < 1 or axis.dilation < 1:
            raise ValueError(f"kernel_size={axis.window} and dilation={axis.dilation} on axis {i} must be at least 1")
        if axis.window * axis.dilation > axis.length:
            raise ValueError(
                f"kernel_size={axis.window} times dilation={axis.dilation} on axis {i} must not exceed its length "
                f"{axis.length}"
            )
        if not 1 <= axis.stride <= axis.window:
            raise ValueError(f"stride={axis.stride} on axis {i} must lie in [1, kernel_size={axis.window}]")
    return axes
