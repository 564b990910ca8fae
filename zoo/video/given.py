"""Images and videos that a caller hands in, of any common kind → pixels in 0..1 of the wanted size.

Numbers are read by their type: uint8 as 0..255, uint16 as 0..65535, floating point as 0..1; other types are refused.
Channels come last in arrays and first in tensors. Pictures of another aspect are cut in the middle, as training does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..pixels import cover

LARGEST = {torch.uint8: 255.0, torch.uint16: 65535.0}
OVERSHOOT = 0.01  # of floating-point pixels that were resized with negative weights; it is cut off
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow turns colours grey


def _is_picture(given: Any) -> bool:
    return isinstance(given, Image.Image) or (isinstance(given, np.ndarray | Tensor) and given.ndim in (2, 3))


def _of_pillow(name: str, image: Image.Image) -> np.ndarray:
    """`[H, W]` or `[H, W, C]` as a viewer shows it: turned by its EXIF, palettes resolved, with its alpha."""
    try:
        image = ImageOps.exif_transpose(image)  # loads it, too
    except Exception as error:  # Pillow lets whatever its decoders meet through
        raise ValueError(f"{name} cannot be decoded: {type(error).__name__}: {error}") from error
    if image.mode.startswith("I"):  # grey of 16 bits, which Pillow may keep in 32
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            found = f"integers from {pixels.min()} to {pixels.max()}"
            raise ValueError(f"{name} of mode {image.mode!r} has {found}; accepted are 0..65535")
        return pixels.astype(np.uint16)
    if image.has_transparency_data:
        return np.array(image.convert("RGBA"))
    kept = {"F": "F", "L": "L", "1": "L"}
    return np.array(image.convert(kept.get(image.mode, "RGB")))


def _to_tensor(name: str, picture: Any, channels: int) -> Tensor:
    """`[C, H, W]` of the type that was given, C one of 1, 3, 4 and `channels`."""
    pixels = _of_pillow(name, picture) if isinstance(picture, Image.Image) else picture
    if isinstance(pixels, np.ndarray):
        if pixels.dtype.kind in "uf" and pixels.dtype.itemsize <= 8:
            pixels = torch.from_numpy(np.array(pixels, dtype=pixels.dtype.newbyteorder("=")))
            place, expected = -1, "[H, W, C] of an array"
        else:
            raise _wrong_type(name, pixels.dtype)
    else:
        place, expected = -3, "[C, H, W] of a tensor"
    shape = list(pixels.shape)
    if pixels.ndim == 2:
        pixels = pixels.unsqueeze(place)
    if pixels.ndim != 3 or pixels.shape[place] not in (1, 3, 4, channels) or 0 in shape:
        raise ValueError(f"{name} has a picture of shape {shape}; expected {expected}, C of 1, 3 or 4")
    return pixels.movedim(place, 0)


def _wrong_type(name: str, dtype: Any) -> ValueError:
    return ValueError(
        f"{name} has numbers of type {str(dtype).removeprefix('torch.')}; accepted are uint8 (0..255), uint16 "
        "(0..65535) and floating point (0..1)"
    )


def _to_unit(name: str, pixels: Tensor) -> Tensor:
    """float32 in 0..1."""
    if pixels.dtype in LARGEST:
        return pixels.float() / LARGEST[pixels.dtype]
    if not pixels.dtype.is_floating_point:
        raise _wrong_type(name, pixels.dtype)
    pixels = pixels.float()
    low, high = (float(x) for x in pixels.aminmax())
    if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):  # NaN fails, too
        raise ValueError(
            f"{name} has floating-point values from {low:g} to {high:g}; accepted are 0..1 (of -1..1: (x + 1) / 2; "
            "uint8 is taken as 0..255)"
        )
    return pixels.clamp(0, 1)


def _to_channels(name: str, pixels: Tensor, channels: int) -> Tensor:
    """Grey to colours or the other way; alpha over white, the page that pictures are drawn for."""
    if len(pixels) != channels and len(pixels) == 4:
        pixels = pixels[:3] * pixels[3:] + (1 - pixels[3:])
    if len(pixels) == 1 and channels == 3:
        return pixels.expand(3, -1, -1)
    if len(pixels) == 3 and channels == 1:
        return (pixels * pixels.new_tensor(LUMA).view(3, 1, 1)).sum(dim=0, keepdim=True)
    if len(pixels) != channels:
        raise ValueError(f"{name} has {len(pixels)} channels, and the model takes {channels}")
    return pixels


def _fit(name: str, picture: Any, *, channels: int, height: int, width: int) -> Tensor:
    """One picture as `[C, 1, height, width]`."""
    if not _is_picture(picture):
        kind = (
            f"shape {list(picture.shape)}" if isinstance(picture, np.ndarray | Tensor) else f"{type(picture).__name__}"
        )
        raise ValueError(
            f"{name} has a picture of {kind}; accepted are Pillow images, arrays [H, W, C], tensors [C, H, W]"
        )
    pixels = _to_channels(name, _to_unit(name, _to_tensor(name, picture, channels)), channels)
    return cover(pixels[:, None], height=height, width=width)


def _items(name: str, given: Any, axes: int) -> list[Any]:
    """The items of a batch, or of a video its pictures: of a list, or of an array or tensor of so many axes."""
    if isinstance(given, np.ndarray | Tensor) and given.ndim == axes:
        return list(given)
    if isinstance(given, list | tuple) and given:
        return [item for one in given for item in (_items(name, one, axes) if _has_axes(one, axes) else [one])]
    if _is_picture(given) or _has_axes(given, axes - 1):
        return [given]
    shape = f" of shape {list(given.shape)}" if isinstance(given, np.ndarray | Tensor) else ""
    raise ValueError(
        f"{name} is {type(given).__name__}{shape}; accepted are Pillow images, arrays with channels last, tensors with "
        "channels first, and lists of them (diffusers.utils.load_image opens files)"
    )


def _has_axes(given: Any, axes: int) -> bool:
    return isinstance(given, np.ndarray | Tensor) and given.ndim == axes


def read_images(given: Any, *, channels: int, height: int, width: int, name: str = "image") -> Tensor:
    """One image, or one for each video, as `[N, C, 1, height, width]` in 0..1, float32.

    Args:
        given: a Pillow image of any mode, an array `[H, W]`, `[H, W, C]` or `[N, H, W, C]`, a tensor `[H, W]`,
            `[C, H, W]` or `[N, C, H, W]`, or a list of these, of any size.
        channels: C of the result.
        name: of the argument, for errors.

    Raises:
        ValueError: names the argument, what it is and what is accepted.
    """
    size = {"channels": channels, "height": height, "width": width}
    return torch.stack([_fit(name, picture, **size) for picture in _items(name, given, 4)])


def read_videos(given: Any, *, channels: int, height: int, width: int) -> Tensor:
    """One video, or one for each video to make, as `[N, C, T, height, width]` in 0..1, float32.

    Args:
        given: a list of pictures (see `read_images`), an array `[T, H, W, C]` or `[N, T, H, W, C]`, a tensor
            `[T, C, H, W]` or `[N, T, C, H, W]`, or a list of videos.
        channels: C of the result.

    Raises:
        ValueError: names `video`, what it is and what is accepted.
    """
    if _is_picture(given):
        raise ValueError("video is one picture: image takes it")
    one = isinstance(given, list | tuple) and bool(given) and _is_picture(given[0])
    videos = [given] if one else _items("video", given, 5)
    size = {"channels": channels, "height": height, "width": width}
    read = [torch.cat([_fit("video", p, **size) for p in _items("video", v, 4)], dim=1) for v in videos]
    if len({video.shape[1] for video in read}) > 1:
        raise ValueError(
            f"video has videos of {[video.shape[1] for video in read]} frames; they must have equally many"
        )
    return torch.stack(read)
