"""Optimizers of torchao with moments in few bits, for schedules that set a rate as a plain number; needs torchao.

torchao compiles its step and wants rates as tensors, which a number would compile anew for; timm's schedules and the
search for a rate assign numbers.
"""

from typing import Any

import torch
import torchao.optim  # pyright: ignore[reportMissingImports]


class _NumericRates:
    """Takes learning rates of any kind, before a class of torchao."""

    param_groups: list[dict[str, Any]]

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)
        return super().step(closure)  # pyright: ignore[reportAttributeAccessIssue]


class Adam8bit(_NumericRates, torchao.optim.Adam8bit):
    """Adam, moments in blocks of 8 bits."""


class Adam4bit(_NumericRates, torchao.optim.Adam4bit):
    """Adam, moments in blocks of 4 bits."""


class AdamFp8(_NumericRates, torchao.optim.AdamFp8):
    """Adam, moments in e4m3."""


class AdamW8bit(_NumericRates, torchao.optim.AdamW8bit):
    """AdamW, moments in blocks of 8 bits."""


class AdamW4bit(_NumericRates, torchao.optim.AdamW4bit):
    """AdamW, moments in blocks of 4 bits."""


class AdamWFp8(_NumericRates, torchao.optim.AdamWFp8):
    """AdamW, moments in e4m3."""
