"""A linear layer that keeps a few of its input's rows for the gradient of the weight."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def represent(x: Tensor, generators: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """For each row the generator that it is most parallel to, and its coefficient on that.

    Args:
        x: rows `[rows, channels]`.
        generators: `[few, channels]`.
        tolerance: rows whose relative error exceeds it get coefficient 0 and generator -1.

    Returns:
        index int64 `[rows]`, and coefficient `[rows]`: x is about coefficient * generators[index].
    """
    lengths = generators.norm(dim=-1)
    products = x @ generators.T
    index = (products / lengths.clamp_min(torch.finfo(x.dtype).tiny)).abs().argmax(-1)
    squares = lengths.square()[index]
    coefficient = products.gather(1, index[:, None])[:, 0] / squares.masked_fill(squares == 0, 1.0)
    if math.isfinite(tolerance):
        error = (x - coefficient[:, None] * generators[index]).norm(dim=-1)
        kept = error <= tolerance * x.norm(dim=-1)
        index = index.masked_fill(~kept, -1)
        coefficient = coefficient * kept
    return index, coefficient


class _CompressedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, tolerance: float) -> Tensor:
        flat = x.flatten(0, -2)
        generators = flat[rows]
        index, coefficient = represent(flat, generators, tolerance)
        ctx.save_for_backward(weight, generators, index, coefficient)
        ctx.has_bias = bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad,) = grads
        weight, generators, index, coefficient = ctx.saved_tensors
        dx, flat = grad @ weight, grad.flatten(0, -2)
        sums = flat.new_zeros(generators.shape[0] + 1, flat.shape[1])  # the last row takes what is dropped
        sums.index_add_(0, torch.where(index < 0, generators.shape[0], index), coefficient[:, None] * flat)
        kept = (index >= 0).sum().clamp_min(1)
        dw = (sums[:-1].T @ generators) * (index.numel() / kept)
        return dx, dw, flat.sum(0) if ctx.has_bias else None, None, None


class CompressedLinear(nn.Linear):
    """`nn.Linear` that saves few rows of its input for the gradient of its weight (PAMM).

    Some rows are drawn as generators; each other row is kept as a multiple of the generator most parallel to it.
    Output and gradient of the input are exact; the gradient of the weight is exact when every row is a generator or the
    input has rank one, and an approximation otherwise. Made for one projection of queries, keys and values, whose
    input is then kept once. No official code is public.

    Args:
        in_features, out_features, bias: as in `nn.Linear`.
        ratio: share of the rows that are generators, at least one of them, in (0, 1].
        tolerance: rows with a larger relative error are left out, and the others stand for them; inf keeps all.

    Raises:
        ValueError: ratio or tolerance out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        ratio: float = 1 / 512,
        tolerance: float = math.inf,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio={ratio} must lie in (0, 1]")
        if not tolerance > 0:
            raise ValueError(f"tolerance={tolerance} must be above 0")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(in_features, out_features, bias, **dd)
        self.ratio, self.tolerance = ratio, tolerance

    def forward(self, input: Tensor) -> Tensor:
        """`[…, in_features]` to `[…, out_features]`."""
        if not torch.is_grad_enabled() or not self.weight.requires_grad:
            return super().forward(input)
        total = input.numel() // self.in_features
        count = max(1, math.ceil(self.ratio * total))
        rows = torch.randperm(total, device=input.device)[:count]
        return _CompressedLinear.apply(input, self.weight, self.bias, rows, self.tolerance)  # pyright: ignore

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ratio={self.ratio:g}, tolerance={self.tolerance:g}"

    @classmethod
    def replace(cls, model: nn.Module, pattern: str = r"(^|\.)qkv$", **options: Any) -> list[str]:
        """Replace linear layers of a model by their names, keeping parameters.

        Args:
            model: changed in place.
            pattern: regular expression that is searched for in the names.
            **options: `ratio` and `tolerance`.

        Returns:
            names of the replaced layers.

        Raises:
            ValueError: no linear layer matches.
        """
        names = [n for n, m in model.named_modules() if type(m) is nn.Linear and re.search(pattern, n)]
        if not names:
            raise ValueError(f"pattern={pattern!r} matches no linear layer of {type(model).__name__}")
        for name in names:
            old = model.get_submodule(name)
            assert isinstance(old, nn.Linear)
            new = cls(old.in_features, old.out_features, old.bias is not None, device="meta", **options)
            new.weight, new.bias = old.weight, old.bias
            model.set_submodule(name, new)
        return names
