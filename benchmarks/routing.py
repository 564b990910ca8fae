"""Bi-level routing against the gather of regions it is usually written as: time and peak memory on this device.

    python benchmarks/routing.py                 # BiFormer's first three stages at three input sizes
    python benchmarks/routing.py --rounds 3

The gather makes a copy of the keys and values of the chosen regions for every region, then attends densely. Both run in
turns, round by round. Nothing is reported unless both agree. Memory is the peak of a call less what it returns.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import harness
import torch
import typer
from foveal.kernels.ops import routing_attention2d
from rich.table import Table
from torch import Tensor

REGIONS = 7
WIDTHS = {"224x224": ((56, 56), (28, 28), (14, 14)), "600x500": ((154, 126), (77, 63), (42, 35))}
WIDTHS["1024x1024"] = ((259, 259), (133, 133), (70, 70))  # maps, padded to regions, of the first three stages
HEADS, TOPK = (2, 4, 8), (1, 4, 16)


@dataclass(frozen=True)
class Case:
    """One stage at one input size."""

    size: str
    shape: tuple[int, int]
    heads: int
    topk: int

    @property
    def name(self) -> str:
        return f"{self.size} {self.shape[0]}x{self.shape[1]} h{self.heads}x32 topk{self.topk}"


def gather(topk: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Routing with the tokens of the chosen regions gathered."""
    batch, height, width, heads, d = query.shape
    size = height // REGIONS, width // REGIONS

    def regions(x: Tensor) -> Tensor:  # [B, regions, tokens, C]
        x = x.reshape(batch, REGIONS, size[0], REGIONS, size[1], heads * d)
        return x.transpose(2, 3).reshape(batch, REGIONS**2, size[0] * size[1], heads * d)

    q, k, v = map(regions, (query, key, value))
    with torch.no_grad():
        chosen = (q.mean(2) @ k.mean(2).mT).topk(topk).indices
    kv = torch.cat([k, v], -1)
    index = chosen[..., None, None].expand(-1, -1, -1, *kv.shape[2:])
    kv = kv[:, None].expand(-1, REGIONS**2, -1, -1, -1).gather(2, index)  # [B, regions, topk, tokens, 2 C]
    k, v = (x.unflatten(-1, (heads, d)).transpose(-2, -3) for x in kv.flatten(2, 3).chunk(2, -1))
    q = q.unflatten(-1, (heads, d)).transpose(-2, -3)
    out = ((q * (heads * d) ** -0.5) @ k.mT).softmax(-1) @ v  # [B, regions, heads, tokens, d]
    out = out.transpose(2, 3).reshape(batch, REGIONS, REGIONS, *size, heads, d).transpose(2, 3)
    return out.reshape(query.shape)


def ours(topk: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return routing_attention2d(query, key, value, regions=REGIONS, topk=topk)


def bind(function: Callable, mode: str, tensors: list[Tensor]) -> Callable[[], object]:
    """A call without arguments that does the forward, or forward and backward."""
    *qkv, grad = tensors
    if mode == "forward":
        return torch.no_grad()(partial(function, *qkv))
    qkv = [x.clone().requires_grad_() for x in qkv]

    def both():
        out = function(*qkv)
        return out.detach(), *torch.autograd.grad(out, qkv, grad)

    return both


def measure(case: Case, mode: str, device: torch.device, rounds: int) -> Iterator[dict]:
    """Rows of one case and mode."""
    generator = torch.Generator(device).manual_seed(0)
    tensors = [torch.randn(1, *case.shape, case.heads, 32, generator=generator, device=device) for _ in range(4)]
    functions = {"foveal": partial(ours, case.topk), "gather": partial(gather, case.topk)}
    calls = {name: bind(function, mode, tensors) for name, function in functions.items()}
    found, expected = (call() for call in calls.values())
    for got, exact in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True):
        torch.testing.assert_close(got, exact, atol=1e-4, rtol=1e-4)
    del found, expected
    made = {name: partial(lambda call: call, call) for name, call in calls.items()}
    for row in harness.measure(made, device, rounds, what=f"{case.name}, {mode}"):
        yield row | {"mode": mode, "case": case.name}


def print_table(rows: list[dict]) -> None:
    """Ours, the gather, and their ratio."""
    table = Table("case", "mode", "foveal ms", "gather ms", "faster", "foveal MiB", "gather MiB", "memory")
    values = {(r["case"], r["mode"], r["provider"], r["metric"]): r["value"] for r in rows}
    for case, mode in dict.fromkeys((r["case"], r["mode"]) for r in rows):
        time, slow, memory, much = (
            values[case, mode, provider, metric] for metric in ("time", "memory") for provider in ("foveal", "gather")
        )
        cells = (
            f"{time:.1f}",
            f"{slow:.1f}",
            f"{slow / time:.2f}x",
            f"{memory:.1f}",
            f"{much:.1f}",
            f"{memory / much:.2f}x",
        )
        table.add_row(case, mode, *cells)
    harness.console.print(table)


def main(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    only: Annotated[str, typer.Option(help="run the cases whose name holds this text")] = "",
    rounds: Annotated[int, typer.Option(help="timed calls of each provider")] = 9,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves it to torch")] = 0,
    results: Annotated[Path, typer.Option(help="folder of the CSV")] = Path(__file__).parent / "results",
) -> None:
    if threads:
        torch.set_num_threads(threads)
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    cases = [Case(s, *c) for s, shapes in WIDTHS.items() for c in zip(shapes, HEADS, TOPK, strict=True)]
    rows = []
    for case in (case for case in cases if only in case.name):
        for mode in ("forward", "forward+backward"):
            rows += measure(case, mode, where, rounds)
    print_table(rows)
    path = results / f"routing_{where.type}.csv"
    harness.write(rows, path, kernel="routing", device=where, rounds=rounds)
    harness.console.print(f"wrote {path}")


if __name__ == "__main__":
    typer.run(main)
