"""Scored attention against its formulas on all logits in eager PyTorch, and dense attention with softmax weights."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from foveal.kernels.ops import scored_attention
from foveal.kernels.scored import ColumnMask, CoPE, Parallax, Score, Signed, Softmax, Softplus
from foveal.kernels.tools.explain import explain
from torch import Tensor
from torch.nn import functional as F

from ..benchmark import Work
from ..operators import Operator, Tensors, randn
from ..peers import Attend, dense_makers, heads_first, heads_last

POSITIONS, POWER, OFFSET, DOCUMENTS = 32, 3.0, 0.5, 4
KINDS = ("documents", "signed", "softplus", "power", "cope", "parallax")


@dataclass(frozen=True)
class Case:
    source: str
    side: int
    kind: str
    heads: int = 6
    head_dim: int = 64
    batch: int = 1
    dtype: torch.dtype = torch.float32
    kernel = "scored"

    @property
    def name(self) -> str:
        shape = f"{self.side}x{self.side} h{self.heads}x{self.head_dim}"
        return f"{shape} {self.kind}" + (f" b{self.batch}" if self.batch != 1 else "")


def options(case: Case, device: torch.device, table: Tensor | None, r: Tensor | None) -> dict:
    """Score and mask of a case."""
    made: dict[str, Callable[[], Score]] = {
        "documents": Softmax,
        "signed": Signed,
        "softplus": Softplus,
        "power": lambda: Softplus(POWER, OFFSET),
        "cope": lambda: CoPE(table),  # pyright: ignore[reportArgumentType]
        "parallax": lambda: Parallax(r),  # pyright: ignore[reportArgumentType]
    }
    lengths = [case.side**2 // DOCUMENTS] * DOCUMENTS
    mask = ColumnMask.documents(lengths, device=device) if case.kind == "documents" else None
    return {"score": made[case.kind](), "mask": mask}


def attend(
    case: Case, query, key, value, table: Tensor | None = None, r: Tensor | None = None, impl: Any = "auto"
) -> Tensor:
    """`scored_attention` of a case."""
    return scored_attention(query, key, value, **options(case, query.device, table, r), impl=impl)


def written_out(case: Case, query, key, value, table: Tensor | None = None, r: Tensor | None = None) -> Tensor:
    """The formula on all logits, each step in the dtype of the inputs."""
    q, k, v = (heads_first(x) for x in (query, key, value))
    logits = q @ k.mT * case.head_dim**-0.5
    if case.kind == "documents":
        number = torch.arange(case.side**2, device=q.device) * DOCUMENTS // case.side**2
        logits = logits.masked_fill(number[:, None] != number, -torch.inf)
    elif case.kind == "cope":
        assert table is not None
        at = logits.sigmoid().flip(-1).cumsum(-1).flip(-1).clamp(max=POSITIONS - 1)
        low, high = ((q @ table).gather(-1, x.detach().long()) for x in (at.floor(), at.ceil()))
        logits = logits + torch.lerp(low, high, at - at.floor().detach()) * case.head_dim**-0.5
    if case.kind in ("softplus", "power"):
        weights = F.softplus(logits)
        weights = weights / weights.sum(-1, keepdim=True)
        if case.kind == "power":
            excess = (weights * logits.shape[-1] - OFFSET).relu()
            sharp = (excess / excess.amax(-1, keepdim=True)) ** POWER
            weights = sharp / sharp.sum(-1, keepdim=True)
    elif case.kind == "signed":
        weights = logits.abs().softmax(-1) * logits.sign()
    else:
        weights = logits.softmax(-1)
    if case.kind == "parallax":
        assert r is not None
        tilt = heads_first(r) @ k.mT
        weights = weights * (1 + (weights * tilt).sum(-1, keepdim=True) - tilt)
    return heads_last(weights @ v, query)


class Scored(Operator):
    name = "scored"
    title = "Scored attention"
    folder = "scored"

    def cases(self, device: torch.device, *, everything: bool = False) -> Iterator[Case]:
        on_cpu = device.type == "cpu"
        facts: dict[str, Any] = {"batch": 1} if on_cpu else {"batch": 16, "dtype": torch.bfloat16}
        for side in (14, 28) if on_cpu else (28, 64):
            for kind in KINDS:
                yield Case(f"DeiT-S, {16 * side} pixels", side, kind, **facts)

    def scaling(self, device: torch.device) -> list[Case]:
        sides = (16, 32, 64) if device.type == "cpu" else (32, 64, 128)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        return [Case("DeiT-S, larger", n, "signed", heads=2, dtype=dtype) for n in sides]

    def inputs(self, case: Case, device: torch.device) -> Tensors:
        draw = randn(device, case.dtype)
        shape = (case.batch, case.side, case.side, case.heads, case.head_dim)
        tensors = {x: draw(*shape) for x in ("query", "key", "value")}
        if case.kind == "cope":
            tensors["table"] = draw(case.head_dim, POSITIONS)
        if case.kind == "parallax":
            tensors["r"] = draw(*shape) / 8
        return tensors

    def arguments(self, case: Case) -> dict:
        return {}

    def function(self, case: Case) -> Callable[..., Tensor]:
        return partial(attend, case)

    def eager(self, case: Case, device: torch.device) -> Attend:
        return partial(written_out, case)

    def crop(self, case: Case) -> Case:
        return replace(case, batch=1, heads=1, side=min(case.side, 12))

    def peers(self, case: Case, mode: str, device: torch.device) -> dict[str, Callable[[], Attend]]:
        made: dict[str, Callable[[], Attend]] = {"eager": partial(self.eager, case, device)}
        shape = (case.batch, case.side, case.side, case.heads, case.head_dim)
        return made | dense_makers(shape, case.dtype, device)

    def work(self, case: Case, mode: str) -> Work:
        tensors = self.inputs(case, torch.device("meta"))
        given = options(case, torch.device("meta"), tensors.pop("table", None), tensors.pop("r", None))
        summary: Any = explain(scored_attention, **tensors, **given).cost
        passes = ("forward",) if mode == "forward" else ("forward", "backward")
        return Work(*(sum(summary[f"{name}_{what}"] for name in passes) for what in ("flops", "bytes")))
