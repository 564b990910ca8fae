"""Neighborhood attention against what one would use instead: time and peak memory, forward and backward.

    python benchmarks/neighborhood.py                 # every case this device can run, into benchmarks/results
    python benchmarks/neighborhood.py --only 56 --rounds 5

Providers: ours (eager and compiled), `unfold` (every query gathers its keys), dense `scaled_dot_product_attention`
without a mask, and compiled `flex_attention` with the mask of the window. All run in turns, round by round, so a busy
machine slows them alike. What cannot run says why. Nothing is reported unless ours equals the reference first.

Memory is the peak of a call less what it returns, so it counts neither inputs nor results; as a ratio it is over query,
key, value and output.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Annotated

import harness
import numpy as np
import torch
import typer
from foveal.kernels.neighborhood import geometry, make_axes
from foveal.kernels.ops import na1d, na2d, na3d
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

OPERATORS = {1: na1d, 2: na2d, 3: na3d}
COLORS = {"foveal": "#c1440e", "foveal compiled": "#f0a35e", "dense": "#56789a", "flex": "#8ab17d", "unfold": "#b8b8b8"}
console = harness.console


@dataclass(frozen=True)
class Case:
    """One call; the `scaling` cases run ours alone."""

    group: str
    shape: tuple[int, ...]
    window: int | tuple[int, ...] = 7
    stride: int | tuple[int, ...] = 1
    dilation: int = 1
    heads: int = 2
    head_dim: int = 32
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        text = f"{'x'.join(map(str, self.shape))} w{self.window} h{self.heads}x{self.head_dim}"
        text += f" s{self.stride}" if self.stride != 1 else ""
        text += f" d{self.dilation}" if self.dilation != 1 else ""
        text = text.replace(", ", ".").replace("(", "").replace(")", "") + f" {str(self.dtype)[6:]}"
        return f"{text} scaling" if self.group == "scaling" else text  # timed alone: not to be compared with the others

    @property
    def axes(self) -> tuple[geometry.Axis, ...]:
        return make_axes(self.shape, window=self.window, stride=self.stride, dilation=self.dilation)

    @property
    def tokens(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Of query, key, value and output."""
        return 4 * self.tokens * self.heads * self.head_dim * self.dtype.itemsize

    def grids(self, device: torch.device, n: int = 3) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        size = (1, *self.shape, self.heads, self.head_dim)
        return [torch.randn(size, generator=generator, device=device, dtype=self.dtype) for _ in range(n)]


def cases(device: torch.device) -> Iterator[Case]:
    dtypes = (torch.float32,) if device.type == "cpu" else (torch.bfloat16,)
    for dtype in dtypes:
        for side, heads, dilation in ((56, 2, 8), (28, 4, 4), (14, 8, 2)):  # DiNAT's stages
            yield Case("dinat", (side, side), heads=heads, dtype=dtype)
            yield Case("dinat", (side, side), heads=heads, dilation=dilation, dtype=dtype)
        yield Case("dinat", (7, 7), heads=16, dtype=dtype)
        yield Case("large", (112, 112), dtype=dtype)
        yield from (Case("scaling", (side, side), dtype=dtype) for side in (56, 112, 224, 448))
    if device.type == "cuda":
        for stride in (1, 16):
            yield Case("large", (256, 256), 80, stride, heads=24, head_dim=128, dtype=torch.bfloat16)
        for stride in (1, (16, 8, 8)):
            yield Case("large", (30, 48, 80), (18, 24, 24), stride, heads=24, head_dim=128, dtype=torch.bfloat16)


def ours(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    options = {"window": case.window, "stride": case.stride, "dilation": case.dilation}
    return OPERATORS[len(case.shape)](q, k, v, **options)


def heads_first(x: Tensor) -> Tensor:
    return x.flatten(1, -3).transpose(1, 2)


def dense(backend: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if backend is None:
        return scaled_dot_product_attention(*map(heads_first, (q, k, v)))
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(*map(heads_first, (q, k, v)))


def unfold(keys_of: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Gather the keys of every query, `keys_of` `[tokens, keys]`, as implementations by `unfold` do."""
    q, k, v = (x.flatten(1, -3) for x in (q, k, v))
    logits = torch.einsum("bthd,btkhd->bthk", q * q.shape[-1] ** -0.5, k[:, keys_of])
    return torch.einsum("bthk,btkhd->bthd", logits.softmax(-1), v[:, keys_of])


def flex(compiled: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return compiled(*map(heads_first, (q, k, v)))


def block_mask(case: Case, device: torch.device):
    """The window as flex's block mask. Arithmetic only: on CPU flex takes no mask that looks up tables."""

    def visible(batch, head, query, key):
        seen = query >= 0
        for length, window, stride, dilation, causal in reversed(case.axes):
            i, j = query % length, key % length
            query, key = query // length, key // length
            n = length if dilation == 1 else geometry.group_length(length, dilation, i % dilation)
            lo, hi = geometry.window_bounds(i // dilation, n, window, stride, causal)
            seen = seen & (j % dilation == i % dilation) & (j // dilation >= lo) & (j // dilation < hi)
        return seen

    return create_block_mask(visible, None, None, case.tokens, case.tokens, device=device)


def keys_of_queries(case: Case, device: torch.device) -> Tensor:
    """Tokens that each query sees, `[tokens, keys]`; windows that are not causal all have the same number."""
    index = torch.zeros(1, 1, dtype=torch.int64, device=device)
    for axis in case.axes:
        first, _ = geometry.axis_bounds(axis, device)
        keys = first[:, None] + torch.arange(axis.window, device=device) * axis.dilation  # [length, window]
        index = (index[:, None, :, None] * axis.length + keys[None, :, None, :]).flatten(2).flatten(0, 1)
    return index


def providers(case: Case, mode: str, device: torch.device) -> dict[str, Callable[[], Callable]]:
    """By name, what makes the function of (q, k, v); made only when its turn comes."""

    def make_unfold():
        gathered = 2 * case.bytes // 4 * prod(axis.window for axis in case.axes)
        if gathered > 6 << 30:
            raise harness.SkippedError(f"would gather {gathered / 2**30:.0f} GiB")
        return partial(unfold, keys_of_queries(case, device))

    def make_dense(backend=None):
        if device.type == "cpu" and case.tokens > 20_000:
            raise harness.SkippedError("quadratic: minutes a call")
        return partial(dense, backend)

    def make_flex():
        if device.type == "cpu" and mode != "forward":
            raise harness.SkippedError("flex_attention has no backward on CPU")
        if case.head_dim < 16:
            raise harness.SkippedError("flex needs head_dim of 16 or more")
        torch._dynamo.reset()
        function = partial(flex_attention, block_mask=block_mask(case, device))
        return partial(flex, torch.compile(function, fullgraph=True, dynamic=False))

    def make_compiled():
        torch._dynamo.reset()
        return torch.compile(partial(ours, case), fullgraph=True, dynamic=False)

    made: dict[str, Callable[[], Callable]] = {"foveal": lambda: partial(ours, case)}
    if case.group == "scaling":
        return made
    made["foveal compiled"] = make_compiled
    made["dense"] = make_dense
    if device.type == "cuda":
        del made["dense"]
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            made[f"dense {backend.name.split('_')[0].lower()}"] = partial(make_dense, backend)
    made["flex"] = make_flex
    made["unfold"] = make_unfold
    return made


def bind(function: Callable, mode: str, tensors: list[Tensor]) -> Callable[[], object]:
    """A call without arguments that does the forward, or forward and backward."""
    *qkv, grad = tensors
    if mode == "forward":
        return torch.no_grad()(partial(function, *qkv))
    qkv = [x.requires_grad_() for x in qkv]

    def both():
        out = function(*qkv)
        shaped = grad if out.shape == grad.shape else grad.flatten(1, -3)
        shaped = shaped if out.shape == shaped.shape else shaped.transpose(1, 2)
        return out.detach(), *torch.autograd.grad(out, qkv, shaped)

    return both


def check(case: Case, device: torch.device) -> None:
    """Compare ours with the reference on a crop of the grid; raises when they differ."""
    shape = tuple(min(a.length, max(a.window * a.dilation, 20)) for a in case.axes)
    small = Case(case.group, shape, case.window, case.stride, case.dilation, 1, case.head_dim, case.dtype)
    *qkv, grad = small.grids(device, 4)
    options = {"window": case.window, "stride": case.stride, "dilation": case.dilation}
    found = []
    for impl, dtype in (("auto", case.dtype), ("reference", torch.float64)):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in qkv]
        out = OPERATORS[len(shape)](*inputs, **options, impl=impl)
        found.append([out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))])
    limit = 1e-5 if case.dtype == torch.float32 else 2e-2
    for name, got, exact in zip(("out", "dq", "dk", "dv"), *found, strict=True):
        error = float((got.double() - exact).abs().max() / exact.abs().max())
        if not error <= limit:
            raise SystemExit(
                f"{case.name}: {name} is off by {error:.2g} of the largest value; no numbers from wrong results"
            )


def measure(case: Case, mode: str, device: torch.device, rounds: int) -> Iterator[dict]:
    """Rows of one case and mode, and the reasons of what does not run."""
    made = {
        name: partial(lambda make: bind(make(), mode, case.grids(device, 4)), make)
        for name, make in providers(case, mode, device).items()
    }
    for row in harness.measure(made, device, rounds, what=f"{case.name}, {mode}"):
        row |= {"mode": mode, "case": case.name, "group": case.group}
        yield row
        if row["metric"] == "memory":
            yield row | {"metric": "memory ratio", "unit": "x", "value": row["value"] * 2**20 / case.bytes}


def exponent(rows: list[dict], mode: str) -> float:
    """Slope of log time over log tokens among the scaling cases."""
    chosen = [r for r in rows if (r["group"], r["metric"], r["mode"]) == ("scaling", "time", mode)]
    tokens = [prod(map(int, r["case"].split()[0].split("x"))) for r in chosen]
    return float(np.polyfit(np.log(tokens), np.log([r["value"] for r in chosen]), 1)[0])


def print_table(rows: list[dict], mode: str) -> None:
    """Times, and how many times faster than each provider ours is."""
    chosen = {(r["case"], r["provider"]): r["value"] for r in rows if r["metric"] == "time" and r["mode"] == mode}
    ratios = {
        r["case"]: r["value"]
        for r in rows
        if (r["metric"], r["provider"]) == ("memory ratio", "foveal") and r["mode"] == mode
    }
    others = list(dict.fromkeys(name for _, name in chosen if name != "foveal"))
    table = Table("case", "foveal", *others, "extra memory", title=f"{mode}: ms (times slower than foveal)")
    for case in dict.fromkeys(case for case, _ in chosen):
        base = chosen[case, "foveal"]
        cells = [
            f"{chosen[case, name]:.2f} ({chosen[case, name] / base:.1f}x)" if (case, name) in chosen else "-"
            for name in others
        ]
        table.add_row(case, f"{base:.2f}", *cells, f"{ratios[case]:.2f}x")
    console.print(table)


def plot(rows: list[dict], path: Path, device_name: str) -> None:
    """Bars of time per case, one panel a mode, and the scaling with tokens."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    panels = figure.subplots(2, 2, width_ratios=(3, 1))
    for (bars, line), mode in zip(panels, ("forward", "forward+backward"), strict=True):
        times = {(r["case"], r["provider"]): r for r in rows if r["metric"] == "time" and r["mode"] == mode}
        names = list(dict.fromkeys(r["case"] for r in rows if r["group"] != "scaling"))
        shown = list(dict.fromkeys(provider for _, provider in times))
        for i, provider in enumerate(shown):
            found = [(x, times[case, provider]) for x, case in enumerate(names) if (case, provider) in times]
            values = [r["value"] for _, r in found]
            spread = [[r["value"] - r["p20"] for _, r in found], [r["p80"] - r["value"] for _, r in found]]
            where = [x + (i - (len(shown) - 1) / 2) * 0.8 / len(shown) for x, _ in found]
            color = COLORS.get(provider, COLORS["dense"])
            bars.bar(where, values, 0.8 / len(shown), yerr=spread, label=provider, color=color, error_kw={"lw": 0.6})
        labels = [
            name.rsplit(" ", 1)[0]
            .replace(" w", "\nwindow ", 1)
            .replace(" h", "\nheads ", 1)
            .replace(" d", "\ndilation ", 1)
            for name in names
        ]
        bars.set(yscale="log", ylabel="ms", title=f"{mode}, median and 20th to 80th percentile")
        bars.set_xticks(range(len(names)), labels, fontsize=7)
        bars.grid(axis="y", lw=0.3)
        scaling = [r for r in rows if (r["group"], r["metric"], r["mode"]) == ("scaling", "time", mode)]
        if len(scaling) > 1:
            tokens = [prod(map(int, r["case"].split()[0].split("x"))) for r in scaling]
            line.loglog(tokens, [r["value"] for r in scaling], "o-", color=COLORS["foveal"])
            line.set(title=f"time ~ tokens^{exponent(rows, mode):.2f}", xlabel="tokens", ylabel="ms")
            line.grid(lw=0.3)
    panels[0, 0].legend(fontsize=8, frameon=False, ncols=len(COLORS))
    figure.suptitle(f"Neighborhood attention on {device_name}")
    figure.savefig(path, dpi=150)


def main(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    only: Annotated[str, typer.Option(help="run the cases whose name holds this text")] = "",
    rounds: Annotated[int, typer.Option(help="timed calls of each provider")] = 15,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves it to torch")] = 0,
    results: Annotated[Path, typer.Option(help="folder of the CSV and the picture")] = Path(__file__).parent
    / "results",
) -> None:
    if threads:
        torch.set_num_threads(threads)
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    chosen = [case for case in cases(where) if only in case.name]
    for case in dict.fromkeys(chosen):
        check(case, where)
    console.print(f"ours equals the reference in {len(chosen)} cases; measuring on {harness.name_of(where)}")
    rows = []
    for case in chosen:
        for mode in ("forward", "forward+backward"):
            rows.extend(measure(case, mode, where, rounds))
    for mode in ("forward", "forward+backward"):
        print_table(rows, mode)
        if sum(case.group == "scaling" for case in chosen) > 1:
            console.print(f"{mode}: time grows as tokens to the power {exponent(rows, mode):.3f}")
    path = results / f"neighborhood_{where.type}.csv"
    harness.write(rows, path, kernel="neighborhood", device=where, rounds=rounds)
    plot(rows, path.with_suffix(".png"), harness.name_of(where))
    console.print(f"wrote {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    typer.run(main)
