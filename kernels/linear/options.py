"""What variant of linear attention is meant."""

from typing import NamedTuple

from torch import Tensor


class Options(NamedTuple):
    """Arguments of `api.linear_attention` but its tensors, checked; `centered` comes with `mean`."""

    relu: bool
    mean: bool
    centered: bool
    eps: float | None
    floor: float | None


def factors(scale: float | Tensor) -> tuple[Tensor | None, float]:
    """The scale as a tensor of one a head, if it is one, and a number."""
    return (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
