"""Layout of the tokens of one forward: the grid, and where each stream begins and ends.

Everything is read from the arguments of the model, before it runs. Functions `*_layout(model, arguments)` serve one
family of diffusers each.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from .site import Site


@dataclass(frozen=True)
class Layout:
    """Tokens of one forward.

    Attributes:
        grid: tokens along (t, h, w) of a video or (h, w) of an image, in raster order; None when it is not known.
        counts: tokens of the streams whose number the arguments give.
        why: why there is no grid.
        levels: of a UNet, (h, w) or (t, h, w) of the maps, height and width halved once more at each entry.
        masked: argument of the forward that hides tokens of the grid from each other; empty without one.
        device: of the tensors of the forward.
    """

    grid: tuple[int, ...] | None
    counts: Mapping[str, int] = field(default_factory=dict)
    why: str = ""
    levels: tuple[tuple[int, ...], ...] = ()
    masked: str = ""
    device: torch.device | None = None

    def grid_of(self, site: Site) -> tuple[int, ...] | None:
        """Tokens of the sequences of a site along the axes that they span."""
        grid = self.levels[site.level] if self.levels else self.grid
        if grid is None or site.axes is None:
            return grid
        return tuple(grid[axis] for axis in site.axes)

    def spans(self, site: Site, streams: Sequence[str], tokens: int) -> dict[str, tuple[int, int]]:
        """First token and end of each stream of a sequence.

        Args:
            site: whose sequence it is.
            streams: in order; at most one of them may be of unknown length, it takes the rest.
            tokens: of the whole sequence.

        Raises:
            ValueError: lengths that do not add up.
        """
        grid = self.grid_of(site)
        known = {name: self.counts[name] for name in streams if name in self.counts}
        for name in ("video", "image"):
            if name in streams and grid is not None:
                known[name] = prod(grid)
        unknown = [name for name in streams if name not in known]
        rest = tokens - sum(known.values())
        if len(unknown) > 1 or rest < 0 or (rest and not unknown):
            raise ValueError(
                f"{site.path} attends over {tokens} tokens, which are not {dict(known)} of {list(streams)}"
            )
        spans, start = {}, 0
        for name in streams:
            length = known.get(name, rest)
            spans[name] = (start, start + length)
            start += length
        return spans


def complete(layout: Layout, arguments: Mapping[str, Any], masks: Sequence[str]) -> Layout:
    """A layout with what is the same for all models: masks given by the caller under some names, and the device."""
    mine = {name: arguments.get(name) for name in masks}
    for name in ("attention_kwargs", "joint_attention_kwargs", "cross_attention_kwargs"):
        mine[f"{name}['attention_mask']"] = (arguments.get(name) or {}).get("attention_mask")
    masked = next((name for name, mask in mine.items() if mask is not None), "")
    tensors = (y for x in arguments.values() for y in (x if isinstance(x, list) else [x]) if isinstance(y, Tensor))
    return replace(layout, masked=masked, device=next((x.device for x in tensors), None))


def _latents(arguments: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(arguments["hidden_states"].shape)


def patched_video(patch: tuple[int, int, int], shape: Sequence[int]) -> Layout:
    """Layout of latents (T, H, W) that are cut into patches."""
    return Layout(tuple(n // p for n, p in zip(shape, patch, strict=True)))


def wan_layout(model: Any, arguments: Mapping[str, Any]) -> Layout:
    """Latents `[B, C, T, H, W]`, `config.patch_size` of three entries (Wan, Cosmos)."""
    return patched_video(tuple(model.config.patch_size), _latents(arguments)[2:])


def video_dit_layout(model: Any, arguments: Mapping[str, Any]) -> Layout:
    """As Wan's; earlier frames of a rollout are keys without queries."""
    layout = wan_layout(model, arguments)
    if arguments.get("kv_cache") is not None:
        return Layout(None, {}, "a rollout with a KV cache attends to frames that are not among its queries")
    return layout


def hunyuan_layout(model: Any, arguments: Mapping[str, Any]) -> Layout:
    """Latents `[B, C, T, H, W]`, patches of `patch_size_t` and `patch_size` (HunyuanVideo, Allegro)."""
    side = model.config.patch_size
    return patched_video((model.config.patch_size_t, side, side), _latents(arguments)[2:])


def frames_layout(model: Any, arguments: Mapping[str, Any]) -> Layout:
    """Latents `[B, C, T, H, W]`, patches of one frame (Mochi, Latte)."""
    side = model.config.patch_size
    return patched_video((1, side, side), _latents(arguments)[2:])


def cogvideox_layout(model: Any, arguments: Mapping[str, Any]) -> Layout:
    """Latents `[B, T, C, H, W]`; `patch_size_t` is None in CogVideoX and 2 in 1.5."""
    _, frames, _, height, width = _latents(arguments)
    side = model.config.patch_size
    return patched_video((model.config.patch_size_t or 1, side, side), (frames, height, width))


def ltx_layout(model: Any, arguments: Mapping[str, Any]) -> Layout:
    """Packed tokens `[B, S, C]`, the grid given by name; conditions of LTX-2 follow the video."""
    grid = tuple(arguments.get(name) for name in ("num_frames", "height", "width"))
    if not all(isinstance(n, int) for n in grid):
        return Layout(None, {}, "the model was not given num_frames, height and width")
    tokens = _latents(arguments)[1]
    counts = {"reference": tokens - prod(grid)}
    if arguments.get("audio_hidden_states") is not None:
        counts["audio"] = arguments["audio_hidden_states"].shape[1]
    if counts["reference"] < 0:
        return Layout(None, {}, f"hidden_states has {tokens} tokens, fewer than the grid {grid}")
    return Layout(grid, counts)


_IDS: dict[int, tuple[weakref.ref, int, Layout]] = {}


def ids_layout(model: Any, arguments: Mapping[str, Any]) -> Layout:
    """Packed tokens with `img_ids` `[S, 3 or 4]` of (image, y, x, …): the first image is made, the others condition.

    The ids of a run are one tensor, whose values are read once.
    """
    ids = arguments["img_ids"]
    found = _IDS.get(id(ids))
    if found is None or found[0]() is not ids or found[1] != ids._version:
        key = id(ids)
        found = (weakref.ref(ids, lambda _: _IDS.pop(key, None)), ids._version, _read_ids(ids))
        _IDS[key] = found
    layout = found[2]
    extract = arguments.get("kv_cache_mode") is not None
    return Layout(None, {}, "a KV cache of reference images attends in several calls") if extract else layout


def _read_ids(ids: Tensor) -> Layout:
    places = (ids[0] if ids.dim() == 3 else ids)[:, :3].to("cpu", torch.float64)
    same = (places[:, 0] == places[0, 0]).long()
    count = int(same.cumprod(0).sum())
    rows, columns = places[:count, 1], places[:count, 2]
    height, width = (int((axis.max() - axis.min()).round()) + 1 for axis in (rows, columns))
    if height * width != count:
        return Layout(None, {}, f"img_ids has {count} tokens of its first image, which are not {height} x {width}")
    raster = torch.arange(count)
    steps = torch.stack([rows - rows[0] - raster // width, columns - columns[0] - raster % width])
    if steps.abs().max() > 0:
        return Layout(None, {}, "img_ids are not in raster order")
    return Layout((height, width), {"reference": len(places) - count})


def sd3_layout(model: Any, arguments: Mapping[str, Any]) -> Layout:
    """Latents `[B, C, H, W]` cut into square patches."""
    height, width = _latents(arguments)[2:]
    side = model.config.patch_size
    return Layout((height // side, width // side))


def qwen_layout(model: Any, arguments: Mapping[str, Any]) -> Layout:
    """Packed tokens with `img_shapes`: (t, h, w) of the image that is made, then of those that condition."""
    shapes = arguments.get("img_shapes")
    if not shapes:
        return Layout(None, {}, "the model was not given img_shapes")
    first, *others = [shapes[0]] if isinstance(shapes[0][0], int) else shapes[0]
    grid = tuple(first[1:]) if first[0] == 1 else tuple(first)
    return Layout(grid, {"reference": sum(prod(shape) for shape in others)})


def hidream_layout(model: Any, arguments: Mapping[str, Any]) -> Layout:
    """Latents `[B, C, H, W]`, whose tokens are padded to `max_seq` unless they are square."""
    shape = _latents(arguments)
    if len(shape) == 4:
        side = model.config.patch_size
        grid = (shape[2] // side, shape[3] // side)
        return Layout(grid, {"padding": 0 if shape[2] == shape[3] else model.max_seq - prod(grid)})
    sizes = {tuple(int(n) for n in size) for size in arguments["img_sizes"]}
    if len(sizes) != 1:
        return Layout(None, {}, f"images of several sizes in one batch, img_sizes={sorted(sizes)}")
    grid = sizes.pop()
    return Layout(grid, {"padding": shape[1] - prod(grid)})


def z_image_layout(model: Any, arguments: Mapping[str, Any]) -> Layout:
    """A list of latents `[C, T, H, W]`, tokens of each padded to a multiple of 32."""
    images = arguments["x"]
    if isinstance(images[0], list | tuple):
        return Layout(None, {}, "several images for one prompt (Omni) are one sequence")
    side, frames = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
    grids = {(x.shape[1] // frames, x.shape[2] // side, x.shape[3] // side) for x in images}
    if len(grids) != 1:
        return Layout(None, {}, f"images of several sizes in one batch, {sorted(grids)} tokens")
    grid = grids.pop()
    return Layout(grid[1:] if grid[0] == 1 else grid, {"padding": -prod(grid) % 32})


def unet_layout(model: Any, arguments: Mapping[str, Any]) -> Layout:
    """Latents `[B, C, H, W]` or `[B, C, T, H, W]`, halved and rounded up after each block but the last."""
    levels = [tuple(arguments["sample"].shape[2:])]
    for _ in model.config.down_block_types[1:]:
        *frames, height, width = levels[-1]
        levels.append((*frames, -(-height // 2), -(-width // 2)))
    return Layout(levels[0], {}, levels=tuple(levels))


# Arguments without data, for a layout of latents (T, H, W) before anything runs


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def video_example(frames: int, height: int, width: int) -> dict[str, Any]:
    return {"hidden_states": _empty(1, 1, frames, height, width)}


def cogvideox_example(frames: int, height: int, width: int) -> dict[str, Any]:
    return {"hidden_states": _empty(1, frames, 1, height, width)}


def ltx_example(frames: int, height: int, width: int) -> dict[str, Any]:
    tokens = _empty(1, frames * height * width, 1)
    return {"hidden_states": tokens, "num_frames": frames, "height": height, "width": width}


def ids_example(frames: int, height: int, width: int) -> dict[str, Any]:
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(float(height)), torch.arange(float(width)))
    return {"img_ids": places.reshape(-1, 3)}


def image_example(frames: int, height: int, width: int) -> dict[str, Any]:
    return {"hidden_states": _empty(1, 1, height, width)}


def qwen_example(frames: int, height: int, width: int) -> dict[str, Any]:
    return {"img_shapes": [[(frames, height, width)]]}


def z_image_example(frames: int, height: int, width: int) -> dict[str, Any]:
    return {"x": [_empty(1, frames, height, width)]}


def unet_example(frames: int, height: int, width: int) -> dict[str, Any]:
    return {"sample": _empty(1, 1, height, width)}


def motion_unet_example(frames: int, height: int, width: int) -> dict[str, Any]:
    return {"sample": _empty(1, 1, frames, height, width)}
