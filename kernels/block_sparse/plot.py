"""Pictures of block masks: which blocks of a grid one block attends to, and all lists as a matrix."""

from pathlib import Path

import torch

from .mask import BlockMask, box_of_token, boxes, listed

QUERY, KEY, REST, LINE = "#f2c14e", "#c1440e", "#eceff1", "#90a4ae"


def draw(mask: BlockMask, shape: tuple[int, int], path: str | Path, *, box: int = 0) -> None:
    """Save a picture of the lists of the first batch entry and head of a mask on one image grid.

    Args:
        mask: a mask of 2-D blocks, on the CPU, with queries and keys on the same grid.
        shape: tokens along height and width.
        path: file to write; its suffix names the format.
        box: block of queries whose list is shown in the grid.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    rows, columns = boxes(shape, mask.key_block)
    seen = torch.zeros(mask.kv_num.shape[-1], rows * columns)
    for i, entries in enumerate(listed(mask.kv_num, mask.kv_idx)[0, 0]):
        seen[i, mask.kv_idx[0, 0, i][entries].long()] = 1
    numbers, _ = box_of_token(shape, mask.key_block, torch.device("cpu"))
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    grid, matrix = figure.subplots(1, 2)
    colors = ListedColormap([REST, KEY])
    grid.imshow(seen[box][numbers].view(shape), cmap=colors, vmin=0, vmax=1)
    for axis, count, step, line in ((0, rows, 0, grid.axhline), (1, columns, 1, grid.axvline)):
        for i in range(count + 1):
            line(min(i * mask.key_block[axis], shape[axis]) - 0.5, color="white", lw=1.5, zorder=2 + step)
    numbers, _ = box_of_token(shape, mask.query_block, torch.device("cpu"))
    own = (numbers == box).view(shape).nonzero()
    (top, left), (bottom, right) = own.amin(0).tolist(), own.amax(0).tolist()
    edge = [left - 0.5, right + 0.5, right + 0.5, left - 0.5, left - 0.5]
    grid.plot(edge, [top - 0.5, top - 0.5, bottom + 0.5, bottom + 0.5, top - 0.5], color=QUERY, lw=4, zorder=5)
    grid.set(title=f"Box {box} (outlined) attends to these", xticks=[], yticks=[])
    matrix.imshow(seen, cmap=colors, vmin=0, vmax=1)
    matrix.set(title="All lists", xlabel="box of keys", ylabel="box of queries")
    for axes in (grid, matrix):
        axes.spines[:].set_color(LINE)
    figure.savefig(path, dpi=120)
