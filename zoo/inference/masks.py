"""Pictures of the block masks of `foveal.kernels.masks` that follow from a grid alone."""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kernels import masks
from ...kernels.block_sparse.mask import BlockMask, box_of_token, boxes, listed
from ...kernels.masks.blocks import density
from ..data.foreign import reason
from ..data.names import unknown_name
from ..tasks.plots import FONT, save_figure

MOST_FRAMES = 8
OWN, VISIBLE, HIDDEN = "#c1440e", "#56b4e9", "#f1f3f5"


def static_masks() -> list[str]:
    """Names of masks that are made from a grid alone."""
    return sorted(name for name, entry in masks.REGISTRY.items() if not entry.dynamic)


def read_options(words: Sequence[str]) -> dict[str, Any]:
    """`["decay=2.0", "half=(None, 2)"]` as arguments.

    Raises:
        ValueError: no `=`, or a value that is no Python literal.
    """
    options = {}
    for word in words:
        name, equals, value = word.partition("=")
        try:
            options[name] = literal_eval(value)
        except (ValueError, SyntaxError):
            equals = ""
        if not equals:
            raise ValueError(f"--set {word!r} must be NAME=VALUE with a number, True, False, None or a tuple")
    return options


def _seen(mask: BlockMask, keys: int) -> Tensor:
    """Bool `[query blocks, key blocks]` of the first batch entry and head."""
    seen = torch.zeros(mask.kv_num.shape[-1], keys, dtype=torch.bool)
    entries = listed(mask.kv_num, mask.kv_idx)[0, 0]
    for row, keep, numbers in zip(seen, entries, mask.kv_idx[0, 0], strict=True):
        row[numbers[keep].long()] = True
    return seen


def draw_mask(name: str, shape: Sequence[int], path: Path, **options: Any) -> float:
    """Draw a mask: all lists as a matrix, and on the grid the keys that the middle block of queries sees.

    Args:
        name: of a mask that follows from a grid alone, see `static_masks`; its first head is drawn.
        shape: tokens of the grid.
        path: where the PNG goes.
        **options: of the mask.

    Returns:
        Share of the pairs of query and key that are visible, 0 to 1.

    Raises:
        ValueError: an unknown mask, or arguments that it does not take.
    """
    from matplotlib import rc_context
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    known = static_masks()
    if name not in known:
        raise unknown_name("mask", name, known)
    try:
        mask = masks.REGISTRY[name].function(tuple(shape), **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"mask {name} of {list(shape)} with {options}: {reason(error)}") from error
    grid = tuple(shape) if len(mask.key_block) == len(shape) else (prod(shape),)
    seen = _seen(mask, prod(boxes(grid, mask.key_block)))
    keys, _ = box_of_token(grid, mask.key_block, torch.device("cpu"))
    queries, _ = box_of_token(grid, mask.query_block, torch.device("cpu"))
    middle = int(queries.view(tuple(shape))[tuple(n // 2 for n in shape)])
    classes = torch.where(queries == middle, 2, seen[middle][keys].long()).view(tuple(shape))
    frames = classes if classes.dim() == 3 else classes.view(1, *([1] * (2 - classes.dim())), *shape)
    chosen = sorted({round(float(t)) for t in torch.linspace(0, len(frames) - 1, min(MOST_FRAMES, len(frames)))})
    share = float(density(mask, grid)[0, 0])
    with rc_context(FONT):
        columns = min(4, len(chosen))
        rows = -(-len(chosen) // columns)
        ratio = frames.shape[-2] / frames.shape[-1]
        figure = Figure(
            figsize=(3.6 + 1.7 * columns, max(3.4, 1.9 * rows * max(ratio, 0.2) + 0.7)), dpi=160, layout="constrained"
        )
        left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(3.6, 1.7 * columns))[0]
        ax = left.subplots()
        ax.imshow(seen.numpy(), cmap=ListedColormap([HIDDEN, VISIBLE]), vmin=0, vmax=1, interpolation="nearest")
        ax.set(title=f"{seen.shape[0]}×{seen.shape[1]} blocks", xlabel="block of keys", ylabel="block of queries")
        axes = list(right.subplots(rows, columns, squeeze=False).flat)
        for ax in axes:
            ax.set_axis_off()
        for ax, t in zip(axes, chosen, strict=False):
            ax.imshow(
                frames[t].numpy(), cmap=ListedColormap([HIDDEN, VISIBLE, OWN]), vmin=0, vmax=2, interpolation="nearest"
            )
            ax.set_title(f"frame {t}" if len(shape) == 3 else "the grid", fontsize=9)
        right.suptitle("keys that the red block of queries sees", fontsize=9)
        figure.suptitle(f"{name}: {100 * share:.1f} % of the pairs are visible", fontweight="bold")
        save_figure(figure, path)
    return share
