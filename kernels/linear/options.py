"""What variant of linear attention is meant."""

from typing import NamedTuple


class Options(NamedTuple):
    """Arguments of `api.linear_attention` but its tensors, checked; `centered` comes with `mean`."""

    relu: bool
    mean: bool
    centered: bool
    eps: float | None
    floor: float | None
