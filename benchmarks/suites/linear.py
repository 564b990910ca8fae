"""Linear attention against its two products in eager PyTorch, and dense attention.

If flash-linear-attention can be imported, its chunked kernel is a provider. It is causal, so it computes another
function of about the same cost, on ReLU'd features and without normaliser. It never ran here: its interface is that of
its documentation (`fla.ops.linear_attn.chunk_linear_attn` on `[B, T, H, K]`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from foveal.kernels.ops import linear_attention
from torch import Tensor

from ..benchmark import SkippedError
from ..operators import Operator, Tensors, randn
from ..peers import Attend, dense_makers, heads_first, heads_last

FLOOR = 100.0


@dataclass(frozen=True)
class Case:
    source: str
    side: int
    heads: int
    batch: int = 1
    dtype: torch.dtype = torch.float32
    kernel = "linear"

    @property
    def name(self) -> str:
        return f"{self.side}x{self.side} h{self.heads}x32" + (f" b{self.batch}" if self.batch != 1 else "")


def written_out(query, key, value, scale) -> Tensor:
    """Eager operations in the order of the paper's equations."""
    q, k, v = heads_first(query).relu(), heads_first(key).relu(), heads_first(value)
    normaliser = (q @ k.transpose(-1, -2).sum(-1, keepdim=True)).clamp(min=FLOOR)
    return heads_last(q @ (k.transpose(-1, -2) @ v * scale[:, None, None]) / normaliser, query)


def fla_chunked() -> Attend:
    """flash-linear-attention's chunked kernel, which is causal."""
    if find_spec("fla") is None:
        raise SkippedError("flash-linear-attention is not installed")
    chunk_linear_attn = import_module("fla.ops.linear_attn").chunk_linear_attn

    def attend(query, key, value, scale) -> Tensor:
        q, k, v = query.flatten(1, -3).relu(), key.flatten(1, -3).relu(), value.flatten(1, -3)
        out, _ = chunk_linear_attn(q, k, v, scale=1.0, normalize=False)
        return out.unflatten(1, query.shape[1:-2])

    return attend


class Linear(Operator):
    name = "linear"
    title = "Linear attention"
    folder = "linear"

    def cases(self, device: torch.device, *, everything: bool = False) -> Iterator[Case]:
        on_cpu = device.type == "cpu"
        dtype = torch.float32 if on_cpu else torch.bfloat16
        for stage, (side, heads) in enumerate(((56, 3), (28, 6), (14, 12)), 1):
            yield Case(f"L2ViT-T stage {stage}", side, heads, 8 if on_cpu else 64, dtype)
        for stage, (side, heads) in ((1, (256, 3)), (3, (64, 12))):
            yield Case(f"L2ViT-T stage {stage}, 1024 pixels", side, heads, 1 if on_cpu else 4, dtype)

    def scaling(self, device: torch.device) -> list[Case]:
        sides = (64, 128, 256) if device.type == "cpu" else (64, 128, 256, 512)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        return [Case("L2ViT-T stage 3, larger", n, 2, dtype=dtype) for n in sides]

    def inputs(self, case: Case, device: torch.device) -> Tensors:
        draw = randn(device, case.dtype)
        tensors = {x: draw(case.batch, case.side, case.side, case.heads, 32) for x in ("query", "key", "value")}
        return tensors | {"scale": draw(case.heads)}

    def arguments(self, case: Case) -> dict:
        return {"relu": True, "floor": FLOOR}

    def function(self, case: Case) -> Callable[..., Tensor]:
        return linear_attention

    def eager(self, case: Case, device: torch.device) -> Attend:
        return written_out

    def crop(self, case: Case) -> Case:
        return replace(case, batch=1, heads=1, side=min(case.side, 64))

    def same_result(self, provider: str) -> bool:
        return super().same_result(provider) and not provider.startswith("fla")

    def peers(self, case: Case, mode: str, device: torch.device) -> dict[str, Callable[[], Attend]]:
        made: dict[str, Callable[[], Attend]] = {"eager": partial(self.eager, case, device)}
        if device.type == "cuda":
            made["fla causal"] = fla_chunked
        return made | dense_makers((case.batch, case.side, case.side, case.heads, 32), case.dtype, device)
