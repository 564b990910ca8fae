"""Attentions of the linear family between their projections: feature maps, normalisers and convolutions included.

Each against the operations of its authors' code, written out in their order, on the grids of 224, 448 and 896 pixels
at a stride of 4. Dense attention, the same for all, is measured beside the first. Weights are random. Rows of the
metric "exponent" hold the growth of time with the number of tokens.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from foveal.kernels.ops import linear_attention
from foveal.layers import (
    EfficientAttention2d,
    FlowAttention2d,
    FocusedLinearAttention2d,
    InLineAttention2d,
    LinearAttention,
)
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.operator_matrix import as_leaves, errors, gradients

from .. import figures
from ..benchmark import Benchmark, Call, Maker, Work, dtype_name, refuse_wrong
from ..operators import Tensors, bind, randn
from ..peers import compiled, dense_makers
from ..records import Row
from .scaling import exponents

HEADS, DIM = 3, 96
SIDES = (56, 112, 224)
Attend = Callable[..., Tensor]  # of a layer, query, key and value [B, N, heads, d], some of its input; [B, N, dim]


def square(x: Tensor) -> tuple[int, int]:
    side = round(x.shape[1] ** 0.5)
    return side, side


def of_layer(layer, query: Tensor, key: Tensor, value: Tensor, x: Tensor | None = None) -> Tensor:
    return layer.attend(query, key, value, x, square(query))


def of_l2vit(layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scale = layer.temperature.flatten()
    return linear_attention(query, key, value, relu=True, floor=layer.floor, scale=scale).flatten(2)


def of_efficient(layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return linear_attention(query.softmax(-1), key.softmax(1), value).flatten(2)


def heads_first(*tensors: Tensor) -> Iterator[Tensor]:
    return (x.transpose(1, 2) for x in tensors)


def joined(x: Tensor) -> Tensor:
    """`[B, heads, N, d]` to `[B, N, dim]`."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def eager_inline(layer, query: Tensor, key: Tensor, value: Tensor, x: Tensor) -> Tensor:
    (batch, count, heads, d), (rows, columns) = query.shape, square(query)
    q, k, v = heads_first(query, key, value)
    scale = d**-0.5
    out = q @ (scale / count * (k.transpose(-2, -1) @ v))
    out = out + (1 - q @ k.mean(2, keepdim=True).transpose(-2, -1) * scale) * v.mean(2, keepdim=True)
    weight = layer.residual(x.mean(1).unsqueeze(-1)).reshape(batch * heads * d, 1, 3, 3)
    maps = v.transpose(-2, -1).reshape(1, batch * heads * d, rows, columns)
    local = F.conv2d(maps, weight, padding=1, groups=batch * heads * d)
    return joined(out) + local.reshape(batch, heads * d, count).transpose(1, 2)


def eager_focused(layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    (batch, count, heads, d), (rows, columns) = query.shape, square(query)
    scale = F.softplus(layer.scale)
    q, k = query.flatten(2), key.flatten(2) + layer.positional_encoding
    q, k = F.relu(q) + 1e-6, F.relu(k) + 1e-6
    q, k = q / scale, k / scale
    q_norm, k_norm = q.norm(dim=-1, keepdim=True), k.norm(dim=-1, keepdim=True)
    q, k = q**3, k**3
    q = q / q.norm(dim=-1, keepdim=True) * q_norm
    k = k / k.norm(dim=-1, keepdim=True) * k_norm
    q, k, v = heads_first(*(t.unflatten(2, (heads, d)) for t in (q, k)), value)
    normaliser = 1 / (q @ k.mean(2, keepdim=True).transpose(-2, -1) + 1e-6)
    out = q @ ((k.transpose(-2, -1) * count**-0.5) @ (v * count**-0.5)) * normaliser
    maps = v.transpose(-2, -1).reshape(batch * heads, d, rows, columns)
    return joined(out) + layer.dwc(maps).reshape(batch, heads * d, count).transpose(1, 2)


def eager_l2vit(layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = heads_first(query, key, value)
    q, k = q.relu(), k.relu()
    normaliser = (q @ k.sum(2, keepdim=True).transpose(-2, -1)).clamp(min=layer.floor)
    return joined(q @ (k.transpose(-2, -1) @ v * layer.temperature) / normaliser)


def eager_flow(layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = heads_first(query, key, value)
    q, k, eps = q.sigmoid(), k.sigmoid(), 1e-6
    incoming = 1 / (((q + eps) * (k.sum(2, keepdim=True) + eps)).sum(-1) + eps)
    outgoing = 1 / (((k + eps) * (q.sum(2, keepdim=True) + eps)).sum(-1) + eps)
    sinks = ((q + eps) * ((k * outgoing[..., None]).sum(2, keepdim=True) + eps)).sum(-1) + eps
    sources = (((k + eps) * ((q * incoming[..., None]).sum(2, keepdim=True) + eps)).sum(-1) + eps).clamp(-1, 1)
    competition = sources.softmax(-1) * k.shape[2]
    out = (q * incoming[..., None]) @ (k.transpose(-2, -1) @ (v * competition[..., None]))
    return joined(out * sinks.sigmoid()[..., None])


def eager_efficient(layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One head after the other on channels first, as the authors' loop over heads does."""
    outs = []
    for q, k, v in zip(*(t.permute(2, 0, 3, 1) for t in (query, key, value)), strict=True):  # [B, d, N]
        context = k.softmax(-1) @ v.transpose(1, 2)
        outs.append(context.transpose(1, 2) @ q.softmax(1))
    return torch.cat(outs, 1).transpose(1, 2)


class Core(NamedTuple):
    source: str
    make: Callable[[int], nn.Module]  # of the side of the map
    ours: Attend
    eager: Attend


CORES = {
    "inline": Core("InLine-Swin-T", lambda n: InLineAttention2d(DIM, num_heads=HEADS), of_layer, eager_inline),
    "focused": Core(
        "FLatten-Swin-T",
        lambda n: FocusedLinearAttention2d(DIM, num_heads=HEADS, grid_size=(n, n)),
        of_layer,
        eager_focused,
    ),
    "l2vit": Core("L2ViT-T", lambda n: LinearAttention(DIM, num_heads=HEADS), of_l2vit, eager_l2vit),
    "flow": Core("Flowformer", lambda n: FlowAttention2d(DIM, num_heads=HEADS), of_layer, eager_flow),
    "efficient": Core(
        "efficient attention",
        lambda n: EfficientAttention2d(DIM, key_dim=DIM, value_dim=DIM, num_heads=HEADS),
        of_efficient,
        eager_efficient,
    ),
}


@dataclass(frozen=True)
class Case:
    kernel: str
    side: int
    batch: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.side}x{self.side} h{HEADS}x{DIM // HEADS} b{self.batch}"

    @property
    def source(self) -> str:
        return f"{CORES[self.kernel].source} stage 1, {4 * self.side} pixels"


class Cores(Benchmark):
    name = "cores"
    suite = "kernels"
    title = "Attentions of the linear family between their projections"

    def cases(self, device: torch.device, *, everything: bool = False) -> Iterator[Case]:
        on_cpu = device.type == "cpu"
        for kernel in CORES:
            for side in SIDES:
                yield Case(kernel, side, 2 if on_cpu else 16, torch.float32 if on_cpu else torch.bfloat16)

    def layer(self, case: Case, device: torch.device) -> nn.Module:
        """Layer without zeros, which would hide a part of it."""
        torch.manual_seed(0)
        layer = CORES[case.kernel].make(case.side)
        for parameter in layer.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        return layer.eval().to(device, case.dtype)

    def inputs(self, case: Case, device: torch.device) -> Tensors:
        """Views of one projection, as layers have them, and the layer's input where its mean is needed."""
        draw = randn(device, case.dtype)
        qkv = draw(case.batch, case.side**2, 3, HEADS, DIM // HEADS).unbind(2)
        tensors = dict(zip(("query", "key", "value"), qkv, strict=True))
        return tensors | ({"x": draw(case.batch, case.side**2, DIM)} if case.kernel == "inline" else {})

    def ours(self, case: Case, layer: nn.Module) -> Callable[..., Tensor]:
        return partial(CORES[case.kernel].ours, layer)

    def verify(self, case: Case, device: torch.device) -> None:
        """Hold the layer on a small map to its formulation in float64."""
        small = Case(case.kernel, 12, 1, case.dtype)
        layer, eager = self.layer(small, device), CORES[case.kernel].eager
        given = as_leaves({**self.inputs(small, device)})
        exact = as_leaves({**given}, torch.float64)
        found = gradients(given, self.ours(small, layer)(**given), None, 1)
        truth = gradients(exact, eager(copy.deepcopy(layer).double(), **exact), None, 1)
        yardstick = gradients(given, eager(layer, **given), None, 1) if case.dtype.itemsize < 4 else None
        refuse_wrong(f"{case.kernel} {dtype_name(case)}", errors(found, truth, yardstick, case.dtype))

    def same_result(self, provider: str) -> bool:
        return not provider.startswith("dense")

    def makers(self, case: Case, mode: str, device: torch.device, *, everything: bool = False) -> dict[str, Maker]:
        def call(make: Callable[[nn.Module], Callable[..., Tensor]]) -> Call:
            tensors, layer = self.inputs(case, device), self.layer(case, device)
            gradient = randn(device, case.dtype, seed=1)(case.batch, case.side**2, DIM)
            return bind(make(layer), mode, tensors, gradient)

        made: dict[str, Maker] = {"foveal": partial(call, partial(self.ours, case))}
        if device.type == "cuda" or everything:
            made["foveal compiled"] = partial(call, lambda layer: compiled(self.ours(case, layer)))
        made["eager"] = partial(call, partial(partial, CORES[case.kernel].eager))
        if case.kernel == next(iter(CORES)):
            shape = (case.batch, case.side, case.side, HEADS, DIM // HEADS)
            for name, attend in dense_makers(shape, case.dtype, device).items():
                made[name] = partial(call, partial(_flat, attend))
        return made

    def work(self, case: Case, mode: str) -> Work:
        """Products of the layers' own count, twice as many of them in the backward, and each operand once a pass."""
        macs = CORES[case.kernel].make(case.side).attention_macs((case.side, case.side))  # pyright: ignore
        tokens = case.batch * case.side**2 * DIM * case.dtype.itemsize
        passes, operands = (1, 4) if mode == "forward" else (3, 12)
        return Work(2 * case.batch * macs * passes, tokens * operands)

    def conclude(self, rows: Sequence[Row]) -> Iterator[Row]:
        return exponents(rows)

    def plot(self, rows: Sequence[Row], path: Path) -> None:
        figures.lines(rows, path, title=self.title)


def _flat(make: Callable[[], Callable[..., Tensor]], layer: nn.Module) -> Callable[..., Tensor]:
    """Dense attention with its heads side by side."""
    attend = make()
    return lambda query, key, value, **_: attend(query, key, value).flatten(2)
