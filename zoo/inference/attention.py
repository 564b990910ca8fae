"""Attention of a token: which tokens of the image an attention layer of a model mixes into it, and how much.

The output of softmax and linear attention is linear in the values. The derivative of a token's output with respect to
every value is therefore the row of attention weights, whatever kernel computed it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..tasks.plots import FONT, save_figure


@dataclass(frozen=True)
class TokenAttention:
    """Attention weights of one query.

    Attributes:
        layer: name of the attention layer in the model.
        token: place of the query on the layer's grid, (row, column).
        weights: `[heads, H, W]`; of softmax attention each head sums to 1 together with tokens that are not on the grid
            (class token, padding of the layer).
    """

    layer: str
    token: tuple[int, int]
    weights: Tensor


def attention_layers(model: nn.Module) -> list[str]:
    """Names of the layers that `token_attention` takes: those with one projection `qkv` and an output `proj`."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "qkv", None), nn.Linear)
        and isinstance(getattr(module, "proj", None), nn.Linear)
        and isinstance(getattr(module, "num_heads", None), int)
    ]


def _choose(model: nn.Module, layer: str | int) -> str:
    names = attention_layers(model)
    if not names:
        raise ValueError("the model has no attention layer with a projection qkv and an output proj to look into")
    if isinstance(layer, int):
        if not -len(names) <= layer < len(names):
            raise ValueError(f"layer={layer} must be from {-len(names)} to {len(names) - 1}")
        return names[layer]
    if layer not in names:
        raise ValueError(f"layer={layer!r} must be one of {', '.join(names)}, or a number")
    return layer


def _grid(shape: Sequence[int], *, name: str, aspect: float) -> tuple[int, int, int]:
    """Tokens before the grid, and its rows and columns, of what a layer got: `[1, H, W, C]` or `[1, N, C]`."""
    if shape[0] != 1:
        raise ValueError(f"layer {name} cuts its map into windows before it projects: take a layer on whole maps")
    if len(shape) == 4:
        return 0, shape[1], shape[2]
    tokens = shape[1]
    for before in range(9):  # class token and registers
        rows = round(((tokens - before) * aspect) ** 0.5)
        if rows and (tokens - before) % rows == 0 and abs(rows * rows / (tokens - before) / aspect - 1) < 1e-6:
            return before, rows, (tokens - before) // rows
    raise ValueError(f"layer {name} has {tokens} tokens, which are no grid of the image")


def token_attention(
    model: nn.Module, image: Tensor, *, place: tuple[float, float] = (0.5, 0.5), layer: str | int = -1
) -> TokenAttention:
    """Attention weights of the token at a place of the image.

    Args:
        model: of timm, in evaluation mode.
        image: `[1, C, H, W]`.
        place: of the query, (vertical, horizontal), from 0 at the top left to 1 at the bottom right.
        layer: name of an attention layer, or its number among `attention_layers`; -1 is the last.

    Raises:
        ValueError: no such layer, one whose tokens are windows or no grid, or a place outside of the image.
    """
    if len(image) != 1:
        raise ValueError(f"image has shape {tuple(image.shape)}; expected [1, C, H, W]")
    if not all(0 <= part <= 1 for part in place):
        raise ValueError(f"place={place} must be two numbers from 0 to 1, vertical and horizontal")
    name = _choose(model, layer)
    module: Any = model.get_submodule(name)
    caught: dict[str, Tensor] = {}

    def keep_values(_: nn.Module, args: Any, out: Tensor) -> Tensor:
        caught["qkv"] = out.detach().requires_grad_()
        return caught["qkv"]

    def keep_output(_: nn.Module, args: tuple[Tensor]) -> None:
        caught["out"] = args[0]

    hooks = [module.qkv.register_forward_hook(keep_values), module.proj.register_forward_pre_hook(keep_output)]
    try:
        with torch.enable_grad():
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    qkv, out = caught["qkv"], caught["out"]
    if qkv.dim() != out.dim() or qkv.shape[0] != out.shape[0] or (qkv.dim() == 3 and qkv.shape[1] != out.shape[1]):
        raise ValueError(f"layer {name} changes the order of its tokens between projections: take another one")
    before, rows, columns = _grid(out.shape, name=name, aspect=image.shape[-2] / image.shape[-1])
    row, column = (min(int(part * n), n - 1) for part, n in zip(place, (rows, columns), strict=True))
    channels, heads = out.shape[-1], module.num_heads
    ours = out.flatten(1, -2)[0, before + row * columns + column]  # [channels], head by head
    (slope,) = torch.autograd.grad(ours.sum(), qkv)
    slope = slope[0, :rows, :columns] if qkv.dim() == 4 else slope[0, before:].unflatten(0, (rows, columns))
    weights = slope[..., -channels:].unflatten(-1, (heads, -1)).mean(-1)  # [H, W, heads], without the layer's padding
    return TokenAttention(name, (row, column), weights.permute(2, 0, 1))


def plot_token_attention(found: TokenAttention, image: Tensor, *, path: Path) -> Path:
    """Draws the image with the query, the mean of the heads over it, and up to six heads.

    Args:
        found: the attention weights.
        image: pixels `[C, H, W]` in 0..1.
        path: where the PNG goes.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    pixels = image.permute(1, 2, 0).expand(-1, -1, 3).numpy() if image.shape[0] == 1 else image.permute(1, 2, 0).numpy()
    height, width = pixels.shape[:2]
    weights = found.weights.detach()
    heads = weights.shape[0]
    panels = [("the query", None), (f"mean of {heads} heads" if heads > 1 else "attention", weights.mean(0))]
    panels += [(f"head {i}", weights[i]) for i in range(min(heads, 6))] if heads > 1 else []
    rows, columns = weights.shape[1:]
    cell = (width / columns, height / rows)
    with rc_context(FONT):
        shown = min(4, len(panels))
        lines = -(-len(panels) // shown)
        figure = Figure(figsize=(2.3 * shown, 2.5 * lines * height / width + 0.5), dpi=160, layout="constrained")
        axes = list(figure.subplots(lines, shown, squeeze=False).flat)
        for ax in axes:
            ax.set_axis_off()
        for ax, (title, heat) in zip(axes, panels, strict=False):
            extent = (0, width, height, 0)
            ax.imshow(pixels, extent=extent)
            if heat is not None:
                ax.imshow(pixels.mean(-1), extent=extent, cmap="gray", vmin=0, vmax=1)
                share = (heat / heat.max().clamp(min=1e-12)).clamp(min=0)
                ax.imshow(share.numpy(), extent=extent, cmap="inferno", alpha=0.65, vmin=0, vmax=1)
            corner = (found.token[1] * cell[0], found.token[0] * cell[1])
            ax.add_patch(Rectangle(corner, *cell, fill=False, edgecolor="#56b4e9", linewidth=1.5))
            ax.set_title(title, fontsize=9)
        figure.suptitle(f"{found.layer}, token {found.token} of {rows}×{columns}", fontweight="bold")
        return save_figure(figure, path)
