"""Why matrix units do not multiply rounded queries and keys as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.launching import device_class
from ..neighborhood import quantized

MIN_HEAD_DIM = 17  # matrix instructions of eight bits add over 32 features


def obstacle(query: Tensor, call: Any) -> str | None:
    """Why the Triton kernel does not multiply the rounded numbers of a call, or None where it does.

    A device that is not there counts as one that can.
    """
    if call.scale <= 0:
        return f"scale={call.scale} is not positive"
    if call.qk_dtype == torch.float8_e4m3fn:
        return quantized.obstacle(query)
    if call.qk_dtype != torch.int8:
        return "products of bits are not used"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"values of {query.dtype} are not half precision"
    if query.shape[-1] < MIN_HEAD_DIM:
        return f"head_dim {query.shape[-1]} is under {MIN_HEAD_DIM}"
    if query.device.type == "cuda" and torch.cuda.is_available() and device_class(query.device) == "rdna":
        return "products of int8 were not compiled for RDNA"
    return None
