"""The panels of the page: functions from what a visitor chose to what is drawn, both as plain values (JSON)."""

from __future__ import annotations

import base64
import inspect
import io
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...kernels.neighborhood import cost, make_axes
from ...kernels.neighborhood.geometry import axis_bounds
from ...kernels.neighborhood.plot import composed_weights
from ...kernels.neighborhood.simulator import rank_tiles
from ..inference.attention import attention_layers, token_attention
from ..inference.sample import sample_clips
from ..inference.source import OpenedModel, open_model
from ..tasks.plots import first_stage

SCAN = 8  # pixels of a scan of scikit-learn's digits, as which a drawing is read
BITMAP = 32  # of which the scans were made, by counting 4×4 cells (UCI "Optical Recognition of Handwritten Digits")
INK = 0.1  # of a pixel that belongs to the digit
MOST_PIXELS, MOST_TOKENS, MOST_STEPS = 512, 64, 50
HEADS, HEAD_DIM, ITEM = 4, 64, 2  # of the call that the last panel counts: bytes of half precision
PEAK, BANDWIDTH = 989e12, 3.35e12  # H100 SXM: dense bf16 FLOP/s and bytes/s, NVIDIA's data sheet
TILE = 64  # queries and keys of a tile


def read_drawing(pixels: Any) -> Tensor:
    """A drawing `[H][W]` of numbers 0 (paper) to 255 (ink) as a scan `[8, 8]` in 0..1.

    As the scans were made: cut to the digit's box, fitted into 32×32 and averaged over cells of 4×4.

    Raises:
        ValueError: no such numbers, or nothing is drawn.
    """
    try:
        drawn = torch.tensor(pixels, dtype=torch.float32) / 255
    except (TypeError, ValueError) as error:
        raise ValueError("pixels must be rows of equal length of numbers from 0 to 255") from error
    if drawn.dim() != 2 or not 1 <= min(drawn.shape) <= max(drawn.shape) <= MOST_PIXELS:
        raise ValueError(f"pixels must be [H][W] of at most {MOST_PIXELS} a side, got {list(drawn.shape)}")
    if not 0 <= float(drawn.min()) <= float(drawn.max()) <= 1:
        raise ValueError("pixels must be numbers from 0 to 255")
    rows, columns = (drawn.amax(dim=axis) > INK for axis in (1, 0))
    if not rows.any():
        raise ValueError("nothing is drawn yet")
    (top, bottom), (left, right) = ((int(line.nonzero()[0]), int(line.nonzero()[-1]) + 1) for line in (rows, columns))
    box = drawn[top:bottom, left:right]
    scale = BITMAP / max(box.shape)
    size = [max(1, round(length * scale)) for length in box.shape]
    small = F.interpolate(box[None, None], size=size, mode="area" if scale < 1 else "bilinear")[0, 0]
    bitmap = torch.zeros(BITMAP, BITMAP)
    y, x = ((BITMAP - length) // 2 for length in size)
    bitmap[y : y + size[0], x : x + size[1]] = small
    return F.avg_pool2d(bitmap[None, None], BITMAP // SCAN)[0, 0].clamp(0, 1)


def data_url(frames: Tensor, *, fps: float, side: int) -> str:
    """A grey clip `[T, H, W]` in 0..1 as the `data:` address of a GIF that repeats, enlarged to about `side` pixels."""
    factor = max(1, round(side / max(frames.shape[1:])))
    pixels = (frames.clamp(0, 1) * 255).round().byte().numpy()
    height, width = (factor * length for length in pixels.shape[1:])
    pictures = [Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in pixels]
    file = io.BytesIO()
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0)
    return "data:image/gif;base64," + base64.b64encode(file.getvalue()).decode()


def _rounded(values: Tensor) -> Any:
    return np.round(values.double().numpy(), 5).tolist()


def _number(name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name}={value!r} must be a whole number from {least} to {most}")
    return value


def neighborhood_panel(
    *, size: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False, query: Sequence[int] = (0, 0)
) -> dict[str, Any]:
    """Say what a query of `na2d` sees on a square grid, and what the whole call costs.

    Args:
        size: tokens a side.
        window, stride, dilation, causal: of both axes; see `na2d`.
        query: (row, column).

    Returns:
        `keys`, `[size][size]` of 0 and 1; `visible`, their number, of `tokens`; `share`, that of all pairs that count;
        `flops`, useful FLOPs of the forward, and those of dense attention; `speedup`, the bound over dense attention
        that tiles of 64 queries and 64 keys leave, and `efficiency`, useful over computed pairs; `bound`, "memory" or
        "products", and the least `microseconds` on an H100 by its data sheet: one batch entry of 4 heads of 64, bf16.

    Raises:
        ValueError: a neighborhood that `na2d` refuses, or a number out of range.
    """
    _number("size", size, 1, MOST_TOKENS)
    for name, value in (("window", window), ("stride", stride), ("dilation", dilation)):
        _number(name, value, 1, MOST_TOKENS)
    axes = make_axes((size, size), window=window, stride=stride, dilation=dilation, causal=bool(causal))
    if not isinstance(query, Sequence) or len(query) != 2:
        raise ValueError(f"query={query!r} must be a row and a column")
    place = [_number("query", part, 0, size - 1) for part in query]
    seen = []
    for axis, coordinate in zip(axes, place, strict=True):
        first, last = (int(bound[coordinate]) for bound in axis_bounds(axis))
        line = torch.zeros(size, dtype=torch.int64)
        line[first : last + 1 : axis.dilation] = 1
        seen.append(line)
    keys = seen[0][:, None] * seen[1]
    shape = {"batch": 1, "heads": HEADS, "head_dim": HEAD_DIM}
    flops, moved = cost.forward_flops(axes, **shape), cost.forward_bytes(axes, **shape, itemsize=ITEM)
    pairs, dense = cost.visible_pairs(axes), size**4
    tiling = rank_tiles(axes, row_tokens=TILE, column_tokens=TILE)[0]
    seconds = {"memory": moved / BANDWIDTH, "products": flops / PEAK}
    bound = max(seconds, key=lambda name: seconds[name])
    return {
        "keys": keys.tolist(),
        "visible": int(keys.sum()),
        "tokens": size * size,
        "share": pairs / dense,
        "flops": flops,
        "dense_flops": 4 * dense * HEADS * HEAD_DIM,
        "speedup": tiling.speedup_bound,
        "efficiency": tiling.efficiency,
        "bound": bound,
        "microseconds": 1e6 * seconds[bound],
    }


class Panels:
    """The models behind the page; each is opened when it is first asked for.

    Args:
        model: an image model of digits, see `open_model`.
        generator: a video pipeline of classes, see `open_pipeline`; None: no clips.
    """

    def __init__(self, model: str = "natten_dinat_pico", generator: str | None = "digits"):
        self.model_name, self.generator = model, generator
        self._lock, self._opened = Lock(), list[OpenedModel]()

    def opened(self) -> OpenedModel:
        """The image model.

        Raises:
            ValueError: it is not one of grey images of digits.
        """
        if not self._opened:
            opened = open_model(self.model_name)
            if opened.mode != "L" or opened.num_classes != 10:
                raise ValueError(
                    f"{self.model_name} takes {opened.mode} images of {opened.num_classes} classes; the page needs a "
                    "model of grey images of ten digits"
                )
            self._opened.append(opened)
        return self._opened[0]

    def about(self) -> dict[str, Any]:
        """List what the page shows: `model`, `layers`, `classes`, and whether there are `clips`."""
        opened = self.opened()
        return {
            "model": self.model_name,
            "layers": attention_layers(opened.model),
            "classes": list(opened.names),
            "clips": self.generator is not None,
        }

    def drawing(self, *, pixels: Any, place: Sequence[float] = (0.5, 0.5), layer: int = 0) -> dict[str, Any]:
        """Class of a drawing, with the attention and the receptive field of one of its tokens.

        Args:
            pixels: `[H][W]`, 0 (paper) to 255 (ink).
            place: of the token, (vertical, horizontal), 0 to 1.
            layer: number of an attention layer.

        Returns:
            `scan` `[8][8]`; `image` `[N][N]`, what the model gets, in 0..1; `shares`, a probability per class;
            `attention` `[h][w]`, the mean of the heads, and its `token`; `field` `[h][w]`, share of the tokens of the
            first stage in one of its outputs were all weights equal, or None where that is everything.

        Raises:
            ValueError: a drawing, place or layer that does not exist.
        """
        opened, scan = self.opened(), read_drawing(pixels)
        grey = Image.fromarray((scan * 255).round().byte().numpy())
        side = (opened.img_size, opened.img_size)
        image = opened.transform(grey.resize(side, Image.Resampling.BICUBIC))[None]
        if not isinstance(place, Sequence) or len(place) != 2 or not all(isinstance(p, int | float) for p in place):
            raise ValueError(f"place={place!r} must be two numbers from 0 to 1, vertical and horizontal")
        _number("layer", layer, 0, len(attention_layers(opened.model)) - 1)
        with self._lock:  # hooks of one visitor are not those of another
            shares = opened.probabilities(image)[0]
            found = token_attention(opened.model, image, place=(float(place[0]), float(place[1])), layer=layer)
            stage = first_stage(opened.model, image)
        answer = {
            "scan": _rounded(scan),
            "image": _rounded(opened.denormalize(image)[0, 0]),
            "shares": _rounded(shares),
            "attention": _rounded(found.weights.mean(0).detach()),
            "token": list(found.token),
            "layer": found.layer,
            "field": None,
        }
        if stage is not None:
            grid, neighborhoods = stage
            query = [min(int(part * n), n - 1) for part, n in zip(place, grid, strict=True)]
            answer["field"] = _rounded(composed_weights([make_axes(grid, **one) for one in neighborhoods], query)[-1])
        return answer

    def clip(self, *, digit: int, seed: int = 0, steps: int = 25) -> dict[str, Any]:
        """A clip of a digit: `gif`, a `data:` address, and its `frames` and `side`.

        Raises:
            ValueError: no such digit, or there is no generator.
        """
        if self.generator is None:
            raise ValueError("this page was started without a generator of clips")
        _number("digit", digit, 0, 9)
        _number("seed", seed, 0, 2**31)
        _number("steps", steps, 1, MOST_STEPS)
        with self._lock:
            made = sample_clips(self.generator, class_labels=[str(digit)], steps=steps, seed=seed)
        frames = made.frames[0, 0]
        return {"gif": data_url(frames, fps=8, side=256), "frames": frames.shape[0], "side": frames.shape[1]}

    def answer(self, panel: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of a panel by its name: about, drawing, clip or neighborhood.

        Raises:
            ValueError: no such panel, arguments that it does not take, or values that it refuses.
        """
        panels = {
            "about": self.about,
            "drawing": self.drawing,
            "clip": self.clip,
            "neighborhood": neighborhood_panel,
        }
        if panel not in panels:
            raise ValueError(f"panel {panel!r} must be one of {', '.join(panels)}")
        try:
            inspect.signature(panels[panel]).bind(**chosen)
        except TypeError as error:
            raise ValueError(f"{panel}: {error}") from error
        return panels[panel](**chosen)
